"""Drafts for real courses, judged by `review`: `make eval`, or `python tools/evaluate.py --help`.

Each course is sent to a running service (`--url`) or to one that this starts with the embedded engine (`--model`), one
at a time, over HTTP/2. A row for each course is printed as it comes, and shares of all at the end. The judgement is the
answer's own `review`; where an older service has none, `reader` reckons it.

A file of courses has a JSON object a line: `content`; `id`, `title` and `lang` if there are any; and every other field
of a request under `options`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reader.review import _size, language_of, review
from testkit import Server, free_port

HERE = Path(__file__).resolve().parents[1]  # the checkout
MODELS = {"135m": "SmolLM2-135M-Instruct.Q4_1.gguf", "1.5b": "Qwen2.5-Coder-1.5B-Instruct.Q4.gguf"}
# The repository's own, short ones in seven languages, and the real courses where they lie beside the checkout.
COURSES = [HERE / "examples" / "courses.jsonl", HERE / "tools" / "data" / "short.jsonl"]
COURSES += filter(Path.exists, [HERE.parent / "shared" / "courses" / "public.jsonl"])
PATIENCE = {"FIRST_TOKEN_TIMEOUT": "900", "TOKEN_TIMEOUT": "300", "GENERATION_TIMEOUT": "1800"}  # a CPU is slow
FEWEST_WORDS = 12  # of each text of a badge that can be used
DOUBTS = {"unsupported_number", "unsupported_name", "low_support"}


@dataclass
class Row:
    """One course: its draft, and what was found in it."""

    id: str
    status: int  # of HTTP
    seconds: float
    error: str = ""
    title: str = ""
    sentences: int = 0
    items: int = 0
    words: tuple[int, int] = (0, 0)  # of description and criteria
    language: str = ""
    right_language: bool = False
    support: float | None = None
    said: int = 0  # sentences of both texts
    supported: int = 0  # those without a doubt about what they say
    notes: list[str] = field(default_factory=list)  # codes and fields
    tokens: int = 0
    badge: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        return self.status == 200

    def noted(self, code: str, part: str = "") -> bool:
        return any(note.startswith(code) and note.endswith(part) for note in self.notes)

    @property
    def usable(self) -> bool:
        spoilt = any(map(self.noted, ("repeated", "title_not_from_course")))
        return self.right_language and min(self.words) >= FEWEST_WORDS and not spoilt


# ---------------------------------------------------------------- asking and judging


def judged(course: Mapping[str, Any], answer: Mapping[str, Any], seconds: float) -> Row:
    badge, options = answer["response"], course.get("options", {})
    found = answer.get("review")
    if not found or not found["sentences"]:
        said = [value for value in options.values() if isinstance(value, str)]
        found = review(badge, course["content"], said, options.get("language"), options.get("badge_tone"))
    wanted = options.get("language") or course.get("lang") or language_of(course["content"])
    fields = [one["field"] for one in found["sentences"]]
    doubted = [(note["field"], note["text"]) for note in found["notes"] if note["code"] in DOUBTS]
    supported = [
        not any(name == one["field"] and text in one["text"] for name, text in doubted) for one in found["sentences"]
    ]
    texts = badge["badge_description"], badge["criteria"]["narrative"]
    return Row(
        id=str(course.get("id", "")),
        status=200,
        seconds=seconds,
        title=badge["badge_name"],
        sentences=fields.count("badge_description"),
        items=fields.count("criteria") if texts[1].lstrip().startswith(("- ", "* ")) else 0,
        words=(_size(texts[0]), _size(texts[1])),
        language=found["language"],
        right_language=found["language"].partition("-")[0] == wanted.partition("-")[0],
        support=found["support"],
        said=len(supported),
        supported=sum(supported),
        notes=[f"{note['code']}:{note['field']}" for note in found["notes"]],
        tokens=(answer.get("usage") or {}).get("completion_tokens", 0),
        badge=badge,
    )


async def drafted(http: httpx.AsyncClient, course: Mapping[str, Any], seed: int) -> Row:
    began = time.monotonic()
    body = {"content": course["content"], "seed": seed, **course.get("options", {})}
    try:
        answer = await http.post("/api/v1/generate", json=body)
    except httpx.HTTPError as error:
        return Row(str(course.get("id", "")), 0, time.monotonic() - began, repr(error))
    seconds = time.monotonic() - began
    if answer.status_code == 200:
        return judged(course, answer.json(), seconds)
    try:
        told = answer.json().get("error_code", "")
    except ValueError:
        told = answer.text[:80]
    return Row(str(course.get("id", "")), answer.status_code, seconds, told)


@asynccontextmanager
async def service(url: str | None, model: str) -> AsyncIterator[str]:
    """The address of the service that is there, or of one with this model, which ends with us."""
    if url:
        yield url.rstrip("/")
        return
    path = HERE / "model" / MODELS[model]
    if not path.exists():
        sys.exit(f"{path.relative_to(HERE)} is not there: make model MODEL={model}")
    port = free_port()
    command = [str(HERE / "dccapi.py"), "--bind", f"127.0.0.1:{port}", "--certs", "/nonexistent"]
    env = {"ENGINE": "embedded", "MODEL_PATH": str(path), "LOG_LEVEL": "WARNING", **PATIENCE}
    async with Server(command, env, f"http://127.0.0.1:{port}/readyz", HERE, start_timeout=120):
        yield f"http://127.0.0.1:{port}"


def connected(url: str) -> httpx.AsyncClient:
    """HTTP/2: with prior knowledge in cleartext. The certificate of `make certs` is signed by nobody."""
    key = os.environ.get("API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    cleartext = url.startswith("http:")
    return httpx.AsyncClient(
        http1=not cleartext, http2=True, verify=False, base_url=url, timeout=1900, trust_env=False, headers=headers
    )


# ---------------------------------------------------------------- tables


def shares(rows: Sequence[Row]) -> dict[str, float | None]:
    """What the rows have in common: shares of the courses, of those answered, and of their sentences; means."""
    done = [row for row in rows if row.answered]

    def share(found: Sequence[float | bool | None]) -> float | None:
        known = [value for value in found if value is not None]
        return round(sum(known) / len(known), 3) if known else None

    said = sum(row.said for row in done)
    return {
        "answered": share([row.answered for row in rows]),
        "usable": share([row.usable for row in done]),
        "description as long as asked": share([not row.noted("too_", "badge_description") for row in done]),
        "criteria a list as long as asked": share(
            [row.items > 0 and not row.noted("too_", "criteria") for row in done]
        ),
        "right language": share([row.right_language for row in done]),
        "sentences supported": round(sum(row.supported for row in done) / said, 3) if said else None,
        "drafts with repeats": share([row.noted("repeated") for row in done]),
        "title from the course": share([not row.noted("title_not_from_course") for row in done]),
        "support, mean": share([row.support for row in done]),
        "seconds, mean": share([row.seconds for row in done]),
        "tokens, mean": share([row.tokens for row in done]),
    }


HEAD = (
    f"{'course':<14}{'answer':>7}{'sent.':>6}{'items':>6}{'words':>9}  {'language':<10}"
    f"{'support':>7}{'seconds':>9}{'tokens':>7}  title"
)


def line(row: Row) -> str:
    if not row.answered:
        return f"{row.id[:13]:<14}{row.status or '-':>7}  {row.error}"
    words = "+".join(map(str, row.words))
    language = row.language + ("" if row.right_language else " wrong")
    support = "-" if row.support is None else f"{row.support:.2f}"
    figures = (
        f"{row.sentences:>6}{row.items:>6}{words:>9}  {language:<10}{support:>7}{row.seconds:>9.1f}{row.tokens:>7}"
    )
    return f"{row.id[:13]:<14}{row.status:>7}{figures}  {row.title}\n{'':<14}{', '.join(row.notes)}".rstrip()


def compared(rows: Sequence[Row], old: Mapping[str, Any]) -> list[str]:
    """What is another than in the rows of an earlier run."""
    before = {row["id"]: row for row in old["rows"]}
    lines = []
    for row in rows:
        now = json.loads(json.dumps(dataclasses.asdict(row)))
        was = before.get(row.id, {})
        for name in ("status", "title", "sentences", "items", "right_language", "support", "notes"):
            if was and was.get(name) != now[name]:
                lines.append(f"{row.id}: {name} {was.get(name)} -> {now[name]}")
        if not was:
            lines.append(f"{row.id}: new")
    lines += [f"{name}: gone" for name in before.keys() - {row.id for row in rows}]
    now_shares = shares(rows)
    for name, value in old["shares"].items():
        if value != now_shares.get(name):
            lines.append(f"{name}: {value} -> {now_shares.get(name)}")
    return lines


# ---------------------------------------------------------------- the run


def saved(rows: Sequence[Row], file: Path) -> None:
    document = {"shares": shares(rows), "rows": [dataclasses.asdict(row) for row in rows]}
    file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", "utf-8")


async def evaluate(url: str, courses: Sequence[Mapping[str, Any]], seed: int, file: Path | None) -> list[Row]:
    """Each row is saved as it comes: a run that is broken off leaves what it has."""
    rows: list[Row] = []
    print(HEAD, flush=True)
    async with connected(url) as http:
        for course in courses:
            row = await drafted(http, course, seed)
            print(line(row), flush=True)
            rows.append(row)
            if file:
                saved(rows, file)
    return rows


def report(rows: Sequence[Row], against: Mapping[str, Any] | None) -> None:
    print()
    for name, value in shares(rows).items():
        print(f"{name:<34}{'-' if value is None else value:>10}")
    if against:
        print("\nChanged:", *compared(rows, against), sep="\n  ")


def courses_in(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in file.read_text("utf-8").splitlines() if text.strip()]
    return [{"id": str(number), **course} for number, course in enumerate(lines, 1)]


async def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Drafts for real courses, judged by `review`.")
    parser.add_argument("--url", help="a service that runs; API_KEY in the environment is sent to it")
    parser.add_argument("--model", choices=MODELS, default="135m", help="of the service that is started without --url")
    parser.add_argument("--courses", type=Path, nargs="+", default=COURSES, metavar="FILE")
    parser.add_argument("--only", help="the ids of the courses to take, with commas between them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, shares and drafts are written to it")
    parser.add_argument("--against", type=Path, metavar="FILE", help="says what changed since that was written")
    given = parser.parse_args(arguments)
    courses = [*{course["id"]: course for file in given.courses for course in courses_in(file)}.values()]
    if given.only:
        courses = [course for course in courses if course["id"] in given.only.split(",")]
    against = json.loads(given.against.read_text("utf-8")) if given.against else None  # before --json may replace it
    async with service(given.url, given.model) as url:
        rows = await evaluate(url, courses, given.seed, given.json)
    report(rows, against)
    return 0 if rows and all(row.answered for row in rows) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the service that was started ends with us then as well
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)

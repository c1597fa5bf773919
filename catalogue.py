#!/usr/bin/env python3
"""A whole catalogue: a spreadsheet of courses in, badge drafts to review out, through a running dccapi.

    python catalogue.py run courses.csv drafts.jsonl --id "Course ID" --content Title Description
    python catalogue.py export drafts.jsonl --to csv            for people, the least supported drafts first
    python catalogue.py accept drafts.csv drafts.jsonl          their corrections, back into the drafts
    python catalogue.py export drafts.jsonl --to achievements   or --to dcc-template: a file a course
    python catalogue.py prepare courses.csv requests.jsonl --model NAME     the OpenAI Batch format, for an
    python catalogue.py collect requests.jsonl outputs.jsonl drafts.jsonl   engine that runs elsewhere

`drafts.jsonl` is the only state. Lines are appended and never changed; the last line of a course counts. A line is on
disk before it counts, so a kill at any moment costs at most what was being written, and the same command goes on.
Needs `httpx[http2]`, and `openpyxl` for XLSX; only `prepare` and `collect` import the service.

Exit codes: 0 all done, 3 some failed or are left, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import uuid
import warnings
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx

NUMBERS = {"temperature": float, "max_tokens": int, "top_p": float, "top_k": int, "repeat_penalty": float, "seed": int}
SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# The fields of a request that a column or --set may give.
OPTIONS = (
    *("badge_style", "badge_tone", "badge_level", "criterion_style", "institution", "institute_url"),
    *("custom_instructions", "language", "long_content", "skills", *NUMBERS),
)

MAX_CELL = 2**24  # characters of a CSV cell
SAMPLE = 2**18  # bytes from which the dialect of a CSV file is told
MAX_COURSE_ID = 200  # characters that the service takes as `course_id`
TRIES = 5  # of one course where the model, the engine or the connection failed in the middle
LONGEST_PAUSE = 30.0  # seconds between two tries, where the service does not ask for more
START_PATIENCE = 10.0  # seconds that the service may take to answer at the start
SILENCE = 120.0  # seconds without a byte, heartbeats included, after which a connection counts as lost


class Refused(Exception):
    """Wrong usage: a sentence that says what to do."""


# ---- Tables: CSV, XLSX and JSONL as people have them ----------------------------------------------------------------

Row = tuple[int, dict[str, Any]]  # the line on which it begins, and its cells by column
Cells = Generator[tuple[int, list[str]]]


@dataclass(frozen=True)
class Table:
    """A file of rows. It is read anew, row by row, each time that `rows` is called."""

    path: Path
    kind: str  # in words
    columns: Sequence[str]
    rows: Callable[[], Iterator[Row]]


def open_table(path: Path, encoding: str = "") -> Table:
    """Raises Refused where the file is not a table."""
    try:
        with path.open("rb") as file:
            head = file.read(SAMPLE)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from None
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise Refused(f"{path} is in Excel's old format, or encrypted. Save it as .xlsx without a password.")
    if head.startswith(b"PK"):
        return _with_header(path, "XLSX", partial(_xlsx_cells, path))
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        columns = dict.fromkeys(name for _, row in islice(jsonl_rows(path), 100) for name in row)
        return Table(path, "JSONL", list(columns), partial(jsonl_rows, path))
    encoding = encoding or _encoding_of(path, head)
    try:
        _check_encoding(path, encoding)
        sample = codecs.getincrementaldecoder(encoding)().decode(head)
    except (LookupError, UnicodeDecodeError):
        raise Refused(f"{path} is not in {encoding}. Name its encoding, such as --encoding windows-1250.") from None
    delimiter = _delimiter_of(sample, is_whole=len(head) < SAMPLE)
    kind = f"CSV in {encoding}, separated by {'tabs' if delimiter == chr(9) else delimiter}"
    return _with_header(path, kind, partial(_csv_cells, path, encoding, delimiter))


def _with_header(path: Path, kind: str, cells: Callable[[], Cells]) -> Table:
    """A table whose first row names the columns."""
    with contextlib.closing(cells()) as first:
        header = next(first, None)
    if header is None:
        raise Refused(f"{path} is empty.")
    columns = [" ".join(name.split()) for name in header[1]]

    def rows() -> Iterator[Row]:
        with contextlib.closing(cells()) as lines:
            next(lines)
            for number, row in lines:
                if any(row[len(columns) :]):
                    raise Refused(f"{path}, line {number}: more cells than columns. Put quotes around the texts.")
                yield number, dict(zip(columns, row + [""] * (len(columns) - len(row)), strict=False))

    return Table(path, kind, columns, rows)


def _encoding_of(path: Path, head: bytes) -> str:
    """By its mark, its zeros or its validity; what is left is Windows-1252, in which Excel writes in the West."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head[:1000]:
        return "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
    with contextlib.suppress(UnicodeDecodeError):
        _check_encoding(path, "utf-8-sig")
        return "utf-8-sig"
    return "cp1252"


def _check_encoding(path: Path, encoding: str) -> None:
    """Raises UnicodeDecodeError where the file is in another one. It is decoded in pieces, and nothing is kept."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as file:
        while data := file.read(SAMPLE):
            decoder.decode(data)
    decoder.decode(b"", final=True)


def _delimiter_of(sample: str, is_whole: bool) -> str:
    """The one that makes more than one column of the header, and as many of the most rows."""
    if said := re.match(r"sep=(.)\r?\n", sample):  # Excel's own way to name it
        return said[1]
    if not is_whole:  # its last line is cut
        sample = sample[: sample.rfind("\n") + 1] or sample

    def fit(delimiter: str) -> tuple[bool, float, int]:
        widths = [len(row) for row in islice(csv.reader(sample.splitlines(True), delimiter=delimiter), 100) if row]
        width = widths[0] if widths else 0
        return width > 1, widths.count(width) / max(1, len(widths)), width

    csv.field_size_limit(MAX_CELL)
    return max(",;\t|", key=fit)


def _csv_cells(path: Path, encoding: str, delimiter: str) -> Cells:
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        begins = 1
        try:
            for row in reader:
                row = [cell.removeprefix("\ufeff") for cell in row] if begins == 1 else row
                if any(cell.strip() for cell in row) and not (begins == 1 and re.fullmatch("sep=.?", row[0])):
                    yield begins, row
                begins = reader.line_num + 1
        except csv.Error as error:
            raise Refused(f"{path}, line {begins}: {error}.") from None


def _xlsx_cells(path: Path) -> Cells:
    """The first sheet."""
    try:
        import openpyxl
    except ImportError:
        raise Refused("XLSX needs openpyxl: pip install openpyxl. Or save the table as CSV.") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of styles and extensions that do not matter here
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError):
            raise Refused(f"{path} cannot be read as XLSX. Save it anew, or as CSV.") from None
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # some programs write wrong ones
        for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
            if any(cells := [_cell_text(value) for value in row]):
                yield number, cells
    finally:
        book.close()


def _cell_text(value: Any) -> str:
    """A cell as it is seen."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line.removeprefix(codecs.BOM_UTF8), f"{path}, line {number}")
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(document := json.loads(line), dict):
            return document
    raise Refused(f"{where} is not a JSON object.")


# ---- Courses --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What a draft is asked for."""

    line: int
    id: str
    content: str
    options: dict[str, Any]

    @property
    def request(self) -> dict[str, Any]:
        named = {"course_id": self.id} if len(self.id) <= MAX_COURSE_ID else {}
        return {"content": self.content, **self.options, **named}

    def fingerprint(self, model: str) -> str:
        """It changes with content, options and model."""
        asked = json.dumps([self.content, self.options, model], sort_keys=True)
        return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Catalogue:
    """The courses of a table: which columns are what, and the options of all."""

    table: Table
    id: str
    content: Sequence[str]
    options: dict[str, str]  # the option that a column holds, by column
    set: dict[str, Any]

    def courses(self) -> Generator[Course]:
        for line, row in self.table.rows():
            own = {name: self._option(line, name, row.get(column)) for column, name in self.options.items()}
            options = self.set | {name: value for name, value in own.items() if value not in ("", None)}
            id = row.get(self.id)
            yield Course(line, "" if id is None else str(id).strip(), self._content(row), options)

    def _content(self, row: Mapping[str, Any]) -> str:
        """One column as it is; several under their names."""
        texts = {name: str(row.get(name) or "") for name in self.content}
        if len(texts) == 1:
            return texts[self.content[0]]
        return "\n\n".join(f"{name}:\n{text.strip()}" for name, text in texts.items() if text.strip())

    def _option(self, line: int, name: str, value: Any) -> Any:
        try:
            return option(name, value)
        except (ValueError, KeyError):
            raise Refused(f"{self.table.path}, line {line}: {name} cannot be {value}.") from None

    def fingerprints(self, model: str = "") -> dict[str, str]:
        """Those of all courses, by id. Raises Refused with the lines of ids that are missing or stand twice."""
        lines: dict[str, int] = {}
        found: dict[str, str] = {}
        missing, twice = [], []
        for course in self.courses():
            if not course.id:
                missing.append(f"{course.line}")
            elif course.id in lines:
                twice.append(f"{course.line} ({course.id}, as in line {lines[course.id]})")
            else:
                lines[course.id], found[course.id] = course.line, course.fingerprint(model)
        faults = [f"no {self.id} in line {few(missing)}"] if missing else []
        faults += [f"the same {self.id} again in line {few(twice)}"] if twice else []
        if faults:
            raise Refused(f"{self.table.path}: {'; '.join(faults)}. Each course needs an id of its own.")
        return found


def few(items: Sequence[str]) -> str:
    """The first ten."""
    return ", ".join(items[:10]) + (f" and {len(items) - 10:,} more" if len(items) > 10 else "")


def option(name: str, value: Any) -> Any:
    """An option's value as the service wants it. Raises ValueError or KeyError."""
    if not isinstance(value, str) or not value.strip():
        return value
    value = value.strip()
    if name in NUMBERS:
        return NUMBERS[name](value)
    return SWITCHES[value.lower()] if name == "skills" else value


def choose(options: argparse.Namespace) -> Catalogue:
    """The catalogue that the command line names. Columns are found without regard to case, spaces and underscores."""
    table = open_table(options.courses, options.encoding)

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]+", "_", name.strip()).casefold()

    known: dict[str, list[str]] = {}
    for column in table.columns:
        known.setdefault(plain(column), []).append(column)

    def find(name: str, argument: str) -> str:
        found = known.get(plain(name), [])
        if len(found) == 1:
            return found[0]
        wrong = f"{len(found)} columns named {name}" if found else f"no column {name}"
        have = ", ".join(filter(None, table.columns))
        raise Refused(f"{table.path} has {wrong}. Name the right one with {argument}. Its columns: {have}")

    id, content = find(options.id, "--id"), [find(name, "--content") for name in options.content]
    columns = {known[name][0]: name for name in OPTIONS if len(known.get(name, [])) == 1}
    columns = {column: name for column, name in columns.items() if column not in (id, *content)}
    given = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        try:
            if not equals or name not in OPTIONS:
                raise ValueError
            given[name] = option(name, value)
        except (ValueError, KeyError):
            raise Refused(f"--set {setting} is not NAME=VALUE; the names are {', '.join(OPTIONS)}.") from None
    return Catalogue(table, id, list(dict.fromkeys(content)), columns, given)


# ---- Drafts: the only state -----------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Where the last line of a course stands, and what it says."""

    at: int
    fingerprint: str
    status: str
    done_at: int  # of its last finished draft; -1 where it has none


def index(path: Path) -> tuple[dict[str, Entry], int]:
    """The entries of drafts.jsonl by id, and the bytes up to the end of its last whole line."""
    entries: dict[str, Entry] = {}
    at = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    draft = _object(line, "")
                    id, mark, status = draft["id"], draft["fingerprint"], draft["status"]
                except (Refused, KeyError):
                    # The end of a file of ours may be torn, or zeros after a power cut. No other file is to lose it.
                    if not line.endswith(b"\n") and (line.startswith(b'{"id"'[: len(line)]) or not line.strip(b"\0")):
                        break
                    raise Refused(f"{path}, line {number} is not a draft. Is it the right file?") from None
                done_at = at if status == "done" else entries[id].done_at if id in entries else -1
                entries[id] = Entry(at, mark, status, done_at)
                at += len(line)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from None
    return entries, at


def _lock(file: int, path: Path) -> None:
    """Raises BlockingIOError where another process has it. Some network file systems know no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"{path} cannot be locked on this file system: do not run two at a time.", file=sys.stderr)


class Drafts:
    """drafts.jsonl, open for appending, and locked: two runs do not write one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}

    def __enter__(self) -> Drafts:
        with contextlib.ExitStack() as opened:
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
                opened.callback(os.close, self._file)
                _lock(self._file, self.path)
            except BlockingIOError:
                raise Refused(f"{self.path} is being written by another catalogue.py.") from None
            except OSError as error:
                raise Refused(f"{self.path} cannot be written: {error.strerror}.") from None
            self.entries, self._size = index(self.path)
            os.ftruncate(self._file, self._size)
            if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
                self._write(b"\n")
            directory = os.open(self.path.resolve().parent, os.O_RDONLY)
            opened.callback(os.close, directory)
            with contextlib.suppress(OSError):  # network file systems cannot
                os.fsync(directory)  # the name of a new file is on disk too
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def has(self, id: str, fingerprint: str) -> bool:
        entry = self.entries.get(id)
        return entry is not None and (entry.status, entry.fingerprint) == ("done", fingerprint)

    def line(self, at: int) -> dict[str, Any]:
        """The draft that stands at a place."""
        with self.path.open("rb") as file:
            file.seek(at)
            return _object(file.readline(), str(self.path))

    def append(self, draft: dict[str, Any]) -> None:
        """On disk when this returns. Raises OSError, and leaves the file as it was."""
        before = self.entries.get(draft["id"])
        done_at = before.done_at if before else -1
        if draft["status"] == "done":
            draft = self._with_lasting_id(draft, done_at)
            done_at = self._size
        at = self._size
        self._write(json.dumps(draft, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self.entries[draft["id"]] = Entry(at, draft["fingerprint"], draft["status"], done_at)

    def _with_lasting_id(self, draft: dict[str, Any], done_at: int) -> dict[str, Any]:
        """A draft that is written anew keeps the achievement's id, unless the service made it from the course."""
        id = str(draft["achievement"].get("id", ""))
        is_made_of_course = re.fullmatch(r"urn:uuid:.{14}5.{21}", id)
        if done_at < 0 or is_made_of_course:
            return draft
        former = self.line(done_at)["achievement"]["id"]
        return {**draft, "achievement": {**draft["achievement"], "id": former}}

    def _write(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)


def done(id: str, fingerprint: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a finished draft."""
    kept = {name: answer.get(name) for name in ("response", "achievement", "review", "usage", "model")}
    return {"id": id, "fingerprint": fingerprint, "status": "done", **kept, "error": None}


def failed(id: str, fingerprint: str, model: str, problem: Problem) -> dict[str, Any]:
    """The line of a course that has no draft."""
    nothing = dict.fromkeys(("response", "achievement", "review", "usage"))
    error = {"status": problem.status, "error_code": problem.code, "detail": str(problem)}
    return {"id": id, "fingerprint": fingerprint, "status": "failed", **nothing, "model": model, "error": error}


# ---- The service ----------------------------------------------------------------------------------------------------


class Problem(Exception):
    """What the service says instead of a draft (RFC 9457)."""

    def __init__(self, status: int, document: Any, retry_after: str | None = None) -> None:
        problem = document if isinstance(document, dict) else {}
        self.status = status
        self.code = str(problem.get("error_code") or f"http_{status}")
        self.retry_after = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
        super().__init__(str(problem.get("detail") or f"The service answered {status}."))

    @classmethod
    def of(cls, response: httpx.Response) -> Problem:
        document = None
        with contextlib.suppress(ValueError):
            document = response.json()
        return cls(response.status_code, document, response.headers.get("retry-after"))


class Lost(Exception):
    """The service cannot be reached, or no longer knows of a generation that it had begun."""

    def __init__(self, reason: object, was_begun: bool) -> None:
        super().__init__(f"The service is away ({reason})")
        self.was_begun = was_begun


# What httpx raises when a connection breaks; the last three come from its HTTP/2 layers.
BROKEN = (httpx.TransportError, ValueError, KeyError, RuntimeError)
# RFC 9218: people, who have 3, go before the catalogue.
HEADERS = {"priority": "u=6", "prefer": "respond-async"}


@contextlib.asynccontextmanager
async def connected(options: argparse.Namespace) -> AsyncIterator[httpx.AsyncClient]:
    """HTTP/2: over TLS where the server offers it, over cleartext with prior knowledge."""
    is_tls = options.server.startswith("https:")
    transport = httpx.AsyncHTTPTransport(http1=is_tls, http2=True, verify=not options.insecure)
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(SILENCE, connect=10, pool=None)
    base = options.server.rstrip("/") + "/api/v1"
    async with httpx.AsyncClient(base_url=base, transport=transport, headers=headers, timeout=timeout) as client:
        yield client


async def generate(client: httpx.AsyncClient, request: dict[str, Any], key: str) -> dict[str, Any]:
    """The answer of the service. Raises Problem or Lost.

    An asynchronous generation goes on when this program is killed, and the same key joins it. Its events are followed
    because their heartbeats tell a service that works from one that is gone.
    """
    try:
        response = await client.post("/generate", json=request, headers={**HEADERS, "idempotency-key": key})
    except BROKEN as error:
        raise Lost(type(error).__name__, was_begun=False) from None
    if response.status_code != 202:
        raise Problem.of(response)
    try:
        at = f"/generations/{response.json()['id']}"
        async with client.stream("GET", f"{at}/events", params={"accumulated": "false"}) as events:
            async for line in events.aiter_lines():
                if line.startswith("data:") and (event := json.loads(line[5:]))["type"] == "final":
                    return {**event, "response": event["content"]}
        state = (await client.get(at)).json()  # the event of an error has no status
    except BROKEN as error:
        raise Lost(type(error).__name__, was_begun=True) from None
    if problem := state.get("error"):
        raise Problem(problem["status"], problem)
    raise Lost("it was restarted", was_begun=True)


async def health_of(client: httpx.AsyncClient) -> dict[str, Any]:
    """What /health says. Raises Refused where no dccapi answers."""
    server = str(client.base_url).removesuffix("/api/v1/")
    until = time.monotonic() + START_PATIENCE
    while True:
        try:
            response = await client.get("/health")
            break
        except BROKEN as error:
            if time.monotonic() > until:
                reason = f"({type(error).__name__}). Start it, or name another with --server"
                raise Refused(f"No dccapi answers at {server} {reason}.") from None
            await asyncio.sleep(0.5)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        health: dict[str, Any] = response.json()
        if health["target_model"] and health["max_concurrent_requests"]:
            return health
    if response.status_code == 401:
        raise Refused(f"{server} wants a key: --api-key, or DCCAPI_KEY in the environment.")
    raise Refused(f"There is no dccapi at {server}: {Problem.of(response)}")


# ---- A run ----------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is, on stderr: a bar on a terminal, a line a minute elsewhere."""

    total: int
    done: int
    failed: int = 0
    written: int = 0  # by this run
    seconds: float = 0  # that its drafts took, one after the other
    reasons: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    is_terminal: bool = field(default_factory=lambda: sys.stderr.isatty())

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed

    def count(self, draft: Mapping[str, Any], seconds: float = 0) -> None:
        self.written += 1
        self.seconds += seconds
        self.done += draft["status"] == "done"
        if draft["status"] == "failed":
            self.failed += 1
            self.reasons[draft["error"]["error_code"]] += 1

    def text(self) -> str:
        said = f"{self.done:,} of {self.total:,} done, {self.failed:,} failed, {self.left:,} left"
        elapsed = time.monotonic() - self.started
        if not self.written or elapsed <= 0:
            return said
        rate = self.written / elapsed
        return f"{said}, {rate * 3600:,.0f} an hour, ends {clock(self.left / rate)}"

    def show(self, last: bool = False) -> None:
        if not self.is_terminal:
            print(self.text(), file=sys.stderr, flush=True)
            return
        text, columns = self.text(), shutil.get_terminal_size().columns - 1
        width = max(0, min(20, columns - len(text) - 1))
        filled = width * (self.done + self.failed) // max(1, self.total)
        bar = f"{'#' * filled}{'.' * (width - filled)} {text}"[:columns]
        print(f"\r\x1b[K{bar}", end="\n" if last else "", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(("\r\x1b[K" if self.is_terminal else "") + text, file=sys.stderr, flush=True)

    async def keep_showing(self) -> None:
        while True:
            await asyncio.sleep(0.25 if self.is_terminal else 60)
            self.show()

    def conclude(self) -> int:
        """Say what is not done, and why. The exit code."""
        if self.failed:
            reasons = ", ".join(f"{count:,} {code}" for code, count in self.reasons.most_common())
            self.say(f"Failed: {reasons}. Their lines say why; the same command tries them again.")
        if self.left:
            self.say("The same command goes on with what is left.")
        return 3 if self.failed or self.left else 0


def clock(seconds: float) -> str:
    """The time of day in so many seconds, with the day where that is not today: short, for a line of a terminal."""
    end = datetime.now() + timedelta(seconds=seconds)
    days = (end.date() - datetime.now().date()).days
    return f"{end:%H:%M}" if not days else f"{end:%a %H:%M}" if days < 7 else f"{end:%d %b %H:%M}"


class Stopped(Exception):
    """A wait was ended by Ctrl-C, or was in vain."""


class Run:
    """Courses through the service, so many at a time."""

    def __init__(
        self, client: httpx.AsyncClient, drafts: Drafts, model: str, progress: Progress, patience: float
    ) -> None:
        self.client, self.drafts, self.model, self.progress = client, drafts, model, progress
        self._patience = patience
        self._stopping = asyncio.Event()
        self._away_since: float | None = None

    async def write(self, courses: Iterator[Course], in_flight: int) -> None:
        """Write all, unless a signal, the service or the disk ends it. Raises Refused; what was written stays."""
        this, loop = asyncio.current_task(), asyncio.get_running_loop()

        def interrupted() -> None:
            if self._stopping.is_set() and this:
                this.cancel()
            else:
                self.progress.say("Finishing what is being written; Ctrl-C again stops now.")
            self._stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted)
        showing = asyncio.create_task(self.progress.keep_showing())
        refused: Sequence[BaseException] = ()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(self._work(courses))
        except* Refused as group:  # raising here would raise a group
            refused = group.exceptions
        except* OSError as errors:
            self.progress.say(f"{self.drafts.path} cannot be written: {errors.exceptions[0]}.")
        except* asyncio.CancelledError:
            self.progress.say("Stopped.")
        finally:
            showing.cancel()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            self.progress.show(last=True)
        if refused:
            raise refused[0]

    async def _work(self, courses: Iterator[Course]) -> None:
        """The workers share the iterator: each takes the next course."""
        for course in courses:
            started = time.monotonic()
            try:
                draft = await self._draft(course)
            except Stopped:
                return
            self.drafts.append(draft)
            self.progress.count(draft, time.monotonic() - started)
            if self._away_since is not None:
                self.progress.say("The service answers again.")
            self._away_since = None
            if self._stopping.is_set():
                return

    async def _draft(self, course: Course) -> dict[str, Any]:
        """The line of a course. Raises Stopped, and Refused where the service refuses all."""
        mark = course.fingerprint(self.model)
        key = hashlib.sha256(f"{mark} {course.id}".encode()).hexdigest()
        pause, tries = 0.5, 0
        while True:
            wait = pause
            try:
                return done(course.id, mark, await generate(self.client, course.request, key))
            except Lost as lost:
                tries += lost.was_begun
                reason = lost.args[0]
                problem = Problem(502, {"error_code": "connection_lost", "detail": f"{reason}, {TRIES} times."})
            except Problem as answer:
                if answer.status in (401, 403, 404, 405):
                    raise Refused(f"The service refuses: {answer}") from None
                is_its_fault = answer.status >= 500 or answer.status in (408, 429)
                tries += (answer.status not in (408, 429, 503)) if is_its_fault else TRIES
                wait, reason, problem = max(pause, answer.retry_after), str(answer), answer
            if tries >= TRIES:
                return failed(course.id, mark, self.model, problem)
            await self._pause(wait, reason)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _pause(self, seconds: float, reason: str) -> None:
        """Raises Stopped when it was asked for, or once no course has had an end for longer than the patience."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            self.progress.say(f"{reason.rstrip('.')}. Waiting.")
        if now - self._away_since > self._patience and not self._stopping.is_set():
            self._stopping.set()
            self.progress.say(f"Given up: nothing could be written for {self._patience:g} s.")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise Stopped


async def run(options: argparse.Namespace) -> int:
    catalogue = choose(options)
    count = len(catalogue.fingerprints())
    async with connected(options) as client:
        if options.check:
            print(f"{catalogue.table.path}: {catalogue.table.kind}; {count:,} rows, each with an id of its own")
            say_what_is_read(catalogue)
        health = await health_of(client)
        model, in_flight = str(health["target_model"]), options.in_flight or int(health["max_concurrent_requests"])
        if options.check and (fits := health.get("content_words_that_fit")):
            long = [course.id for course in catalogue.courses() if len(course.content.split()) > fits]
            print(f"Longer than the {fits:,} words that fit, so condensed: {len(long):,}", few(long))
        with Drafts(options.drafts) as drafts, contextlib.closing(catalogue.courses()) as courses:
            marks = catalogue.fingerprints(model)
            before = sum(drafts.has(id, mark) for id, mark in marks.items())
            progress = Progress(count, before)
            todo = (course for course in courses if not drafts.has(course.id, marks[course.id]))
            task = Run(client, drafts, model, progress, options.patience)
            if not options.check:
                await task.write(todo, in_flight)
                return progress.conclude()
            await task.write(islice((course for course in todo if course.content.strip()), 3), in_flight)
    if progress.written:
        each = progress.seconds / progress.written
        left = progress.total - progress.done
        hours = each * left / in_flight / 3600
        print(f"{progress.written} were written, in {each:.1f} s each. The {left:,} that are left take about", end=" ")
        print(f"{hours:,.1f} hours with {in_flight} in flight, until {clock(hours * 3600)} if they begin now.")
    return 3 if progress.failed else 0


def say_what_is_read(catalogue: Catalogue) -> None:
    """What a run would read, for people to see whether the columns and letters are right."""
    empty, same, strange = [], [], dict[str, None]()
    contents: dict[bytes, str] = {}
    for course in catalogue.courses():
        text = course.content.strip()
        first = contents.setdefault(hashlib.sha256(text.encode("utf-8", "replace")).digest(), course.id)
        if not text:
            empty.append(course.id)
        elif first != course.id:
            same.append(f"{course.id} (as {first})")
        if len(strange) < 8:
            strange |= dict.fromkeys(re.findall(r"\w*[^\W\x00-\x7f]\w*", text)[:8])
    roles = {column: f"{column} = {name}" for column, name in catalogue.options.items()}
    roles |= {column: f"{column} = content" for column in catalogue.content} | {catalogue.id: f"{catalogue.id} = id"}
    print("Columns:", ", ".join(roles.get(name, f"{name} (not used)") for name in catalogue.table.columns))
    print("Words with other letters than a to z:", " ".join(list(strange)[:8]) or "none")
    print(f"Without content: {len(empty):,}", few(empty))
    print(f"With the content of another: {len(same):,}", few(same))


# ---- Export and accept ----------------------------------------------------------------------------------------------

FIELDS = {"title": "badge_name", "description": "badge_description", "criteria": "criteria"}
COLUMNS = ("id", "status", "support", "notes", "accepted", *(f"corrected_{name}" for name in FIELDS), *FIELDS)
COLUMNS += ("skills", "language", "model", "error", "fingerprint")
# What a spreadsheet takes for a formula gets an apostrophe in front (OWASP, CSV injection); so does what has one.
FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
YES, NO = ("yes", "y", "true", "1", "x"), ("no", "n", "false", "0", "-")
OB_CONTEXTS = ["https://www.w3.org/ns/credentials/v2", "https://purl.imsglobal.org/spec/ob/v3p0/context-3.0.3.json"]


def export(options: argparse.Namespace) -> int:
    suffix = ".csv" if options.to == "csv" else f"-{options.to}"
    out = options.out or options.drafts.with_name(options.drafts.stem + suffix)
    if options.to == "csv" and out.exists() and not options.force:
        raise Refused(f"{out} exists and may hold a review; `accept` it, then --force writes it anew.")
    entries, _ = index(options.drafts)
    with options.drafts.open("rb") as file:

        def read(at: int) -> dict[str, Any]:
            file.seek(at)
            return _object(file.readline(), str(options.drafts))

        if options.to == "csv":
            # Sorted by their places in the file, so that few drafts are in memory.
            places = sorted((worst_first(read(entry.at)), entry.at) for entry in entries.values())
            count = export_csv(out, (read(at) for _, at in places))
        else:
            count = export_files(options, out, (read(entry.at) for entry in entries.values()))
    print(f"{count:,} courses in {out}", file=sys.stderr)
    return 0


def worst_first(draft: Mapping[str, Any]) -> tuple[bool, float]:
    """The lowest support first; before it what could not be measured, at the end what failed."""
    support = (draft["review"] or {}).get("support")
    return draft["status"] == "failed", -1.0 if support is None else support


def export_csv(out: Path, drafts: Iterable[dict[str, Any]]) -> int:
    """For people. The byte-order mark tells Excel that it is UTF-8."""
    count = 0
    with out.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for draft in drafts:
            cells = in_cells(draft)
            writer.writerow([shielded(cells.get(column, "")) for column in COLUMNS])
            count += 1
    return count


def in_cells(draft: Mapping[str, Any]) -> dict[str, str]:
    achievement, review, error = (draft[name] or {} for name in ("achievement", "review", "error"))
    accepted, support = draft.get("accepted"), review.get("support")
    aligned = [f"{one['targetName']} ({one['targetUrl']})" for one in achievement.get("alignment") or ()]
    named = [tag for tag in achievement.get("tag") or () if not any(one.startswith(f"{tag} (") for one in aligned)]
    return {
        **{name: draft[name] or "" for name in ("id", "status", "model", "fingerprint")},
        **{name: texts_of(draft).get(key, "") for name, key in FIELDS.items()},
        "accepted": "" if accepted is None else "yes" if accepted else "no",
        "support": "" if support is None else f"{support:.2f}",
        "notes": "\n".join(in_words(note) for note in review.get("notes") or ()),
        "skills": "; ".join([*aligned, *named]),
        "language": review.get("language") or "",
        "error": error.get("detail") or "",
    }


def texts_of(draft: Mapping[str, Any]) -> dict[str, str]:
    """The three texts of a badge by field."""
    badge = draft["response"] or {}
    return {name: text["narrative"] if isinstance(text, dict) else text for name, text in badge.items()}


def in_words(note: Mapping[str, Any]) -> str:
    """`Criteria, “1 year”: The course does not say this; check it.`"""
    where = str(note.get("field") or "").replace("badge_name", "title").removeprefix("badge_").capitalize()
    where = ", ".join(filter(None, (where, f"“{note['text']}”" if note.get("text") else "")))
    return f"{where}: {note['message']}" if where else str(note["message"])


def shielded(cell: str) -> str:
    return f"'{cell}" if FORMULA.match(cell) else cell


def unshielded(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def tidied(text: str) -> str:
    """Without control characters, and without what DCC's dashboard takes for Handlebars."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text.replace("\r\n", "\n")).strip()
    return re.sub(r"\{(?=\{)", "{ ", re.sub(r"\}(?=\})", "} ", text))


def accept(options: argparse.Namespace) -> int:
    """Append each draft that was accepted, refused or corrected, with its new texts."""
    table = open_table(options.reviewed, options.encoding)
    if missing := [name for name in ("id", "fingerprint", "accepted") if name not in table.columns]:
        raise Refused(f"{table.path} has no column {', '.join(missing)}; it is not what `export --to csv` made.")
    if not options.drafts.exists():
        raise Refused(f"There is no {options.drafts}.")
    changed, stale = 0, []
    with Drafts(options.drafts) as drafts:
        # Spreadsheets take zeros away from the beginning of an id.
        known = {(id.lstrip("0"), entry.fingerprint): id for id, entry in drafts.entries.items()}
        known |= {(id, entry.fingerprint): id for id, entry in drafts.entries.items()}
        for line, row in table.rows():
            cells = {name: unshielded(str(cell)) for name, cell in row.items()}
            id = known.get((cells["id"], cells["fingerprint"].strip()))
            if id is None:
                stale.append(f"{line} ({cells['id']})")
                continue
            draft = drafts.line(drafts.entries[id].at)
            warn_of_other_edits(line, cells, draft)
            if (reviewed := corrected(draft, cells)) != draft:
                drafts.append(reviewed)
                changed += 1
    print(f"{changed:,} drafts changed", file=sys.stderr)
    if stale:
        print(f"Not taken, as the draft was written anew since: line {few(stale)}. Export again.", file=sys.stderr)
    return 3 if stale else 0


def corrected(draft: dict[str, Any], cells: Mapping[str, str]) -> dict[str, Any]:
    """A draft with a person's texts and word; as it was where the person said nothing."""
    if draft["status"] != "done":
        return draft
    word = cells["accepted"].strip().lower()
    accepted = {"accepted": word in YES} if word in (*YES, *NO) else {}
    new = {key: text for name, key in FIELDS.items() if (text := tidied(cells.get(f"corrected_{name}", "")))}
    if not new:
        return {**draft, **accepted}
    texts = texts_of(draft) | new
    criteria = {"narrative": texts["criteria"]}
    achievement = draft["achievement"] | {"name": texts["badge_name"], "description": texts["badge_description"]}
    achievement["criteria"] = {**achievement.get("criteria", {}), **criteria}
    return {**draft, "response": {**texts, "criteria": criteria}, "achievement": achievement, **accepted}


def warn_of_other_edits(line: int, cells: Mapping[str, str], draft: Mapping[str, Any]) -> None:
    """A person may have written what is not understood, or into the columns that are not read."""
    if (word := cells["accepted"].strip()) and word.lower() not in (*YES, *NO):
        print(f"Line {line}: {word} in the column accepted is neither yes nor no, and is not taken.", file=sys.stderr)
    for name, key in FIELDS.items():
        is_as_it_was = cells.get(name, "").split() == texts_of(draft).get(key, "").split()
        if not is_as_it_was and not cells.get(f"corrected_{name}"):
            print(f"Line {line}: {name} was changed; corrections go into corrected_{name}.", file=sys.stderr)


def export_files(options: argparse.Namespace, out: Path, drafts: Iterable[dict[str, Any]]) -> int:
    """A JSON file a course. What a person refused is left out.

    A file is named by the course's id and, because ids may differ in case or signs alone, by a part of its hash.
    """
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for draft in drafts:
        if draft["status"] != "done" or not draft.get("accepted", not options.accepted):
            continue
        achievement = draft["achievement"]
        document = achievement if options.to == "achievements" else dcc_template(achievement, options)
        name = re.sub(r"[^\w.-]+", "-", draft["id"]).strip("-.")[:80]
        path = out / f"{name}-{hashlib.sha256(draft['id'].encode()).hexdigest()[:8]}.json"
        path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", "utf-8")
        count += 1
    return count


def dcc_template(achievement: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A credential template of DCC's admin dashboard (its docs/GETTING_STARTED.md), which fills in the variables.

    `earnerName` comes from the CSV of a batch, `issuanceDate` and `now` from the dashboard; the signer sets the
    issuer's id.
    """
    creator = achievement.get("creator") or {}
    url, name = options.issuer or creator.get("id"), options.issuer_name or creator.get("name")
    if not (url and name):
        raise Refused('The template needs an issuer: --issuer https://example.edu --issuer-name "Example University".')
    identity = {"type": "IdentityObject", "hashed": False, "identityType": "name", "identityHash": "{{ earnerName }}"}
    return {
        "@context": OB_CONTEXTS,
        "id": f"urn:dccapi:credential:{uuid.uuid5(uuid.NAMESPACE_URL, achievement['id'])}:{{{{ now }}}}",
        "type": ["VerifiableCredential", "OpenBadgeCredential"],
        "name": achievement["name"],
        "issuer": {"id": url, "type": ["Profile"], "name": name, "url": url},
        "validFrom": "{{ issuanceDate }}",
        "credentialSubject": {
            "type": ["AchievementSubject"],
            "name": "{{ earnerName }}",
            "identifier": [identity],
            "achievement": {name: value for name, value in achievement.items() if name != "@context"},
        },
    }


# ---- The OpenAI Batch format ----------------------------------------------------------------------------------------


def beside(requests: Path) -> Path:
    """What `collect` needs of the courses, which has no place in the format: an API may refuse other fields."""
    return requests.with_name(f"{requests.stem}.courses.jsonl")


@functools.cache
def system_prompt() -> str:
    import dccapi

    return dccapi.load_settings().system_prompt_file.read_text("utf-8").strip()


def prompt_of(request: dict[str, Any]) -> Any:
    """The prompt as the service makes it. Raises Problem."""
    import dccapi
    from reader.__main__ import TASKS

    try:
        asked = dccapi.GenerateRequest.read(request)
    except dccapi.ApiError as error:
        raise Problem(error.status, {"error_code": error.code, "detail": error.detail}) from None
    said = TASKS["text"](content=asked.content)
    if not re.search(dccapi.VISIBLE, said["text"]):
        raise Problem(422, {"detail": "The content is only markup."})
    return dccapi.build_prompt(asked, dccapi.Course(**said), system_prompt(), {})


def prepare(options: argparse.Namespace) -> int:
    """Requests for an engine that runs elsewhere, as far as all servers of the format know their fields."""
    catalogue = choose(options)
    marks = catalogue.fingerprints(options.model)
    count, bad = 0, []
    with options.requests.open("w", encoding="utf-8") as out, beside(options.requests).open("w") as kept:
        for course in catalogue.courses():
            try:
                prompt = prompt_of(course.request)
            except Problem as problem:
                bad.append(f"{course.line} ({problem})")
                continue
            sampling = {name: prompt.sampling[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
            schema = {"name": "badge", "schema": prompt.schema}
            body = {
                "model": options.model,
                "messages": [
                    {"role": "system", "content": prompt.system},
                    {"role": "user", "content": prompt.user},
                ],
                **{name: value for name, value in sampling.items() if value is not None},
                "response_format": {"type": "json_schema", "json_schema": schema},
            }
            line = {"custom_id": course.id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            print(json.dumps(line, ensure_ascii=False), file=out)
            print(json.dumps({"id": course.id, "fingerprint": marks[course.id], "request": course.request}), file=kept)
            count += 1
    print(f"{count:,} requests in {options.requests}; {beside(options.requests)} is for `collect`", file=sys.stderr)
    if bad:
        print(f"Left out: line {few(bad)}", file=sys.stderr)
    return 3 if bad else 0


def collect(options: argparse.Namespace) -> int:
    """The outputs as drafts. What was collected before is skipped."""
    kept = beside(options.requests)
    courses: dict[str, tuple[int, str]] = {}  # place and fingerprint
    at = 0
    try:
        with kept.open("rb") as file:
            for line in file:
                course = json.loads(line)
                courses[course["id"]] = at, course["fingerprint"]
                at += len(line)
    except OSError:
        raise Refused(f"There is no {kept}, which `prepare` wrote beside the requests.") from None
    with Drafts(options.drafts) as drafts, kept.open("rb") as file:
        progress = Progress(len(courses), sum(drafts.has(id, mark) for id, (_, mark) in courses.items()))
        for number, output in jsonl_rows(options.outputs):
            id = str(output.get("custom_id"))
            if id not in courses:
                raise Refused(f"{options.outputs}, line {number} answers no request of {options.requests}.")
            place, mark = courses[id]
            if not drafts.has(id, mark):
                file.seek(place)
                draft = read_output(json.loads(file.readline()), output)
                drafts.append(draft)
                progress.count(draft)
    progress.say(progress.text())
    return progress.conclude()


def read_output(course: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    """The draft in a line of a batch's output."""
    response = output.get("response") or {}
    body, status = response.get("body") or {}, int(response.get("status_code") or 0)
    model = str(body.get("model") or "")
    try:
        if output.get("error") or status != 200:
            error = output.get("error") or body.get("error") or {}
            detail = error.get("message") if isinstance(error, dict) else error
            raise Problem(status, {"error_code": "batch_error", "detail": detail or f"The engine answered {status}."})
        return done(course["id"], course["fingerprint"], {**answer_in(course["request"], body), "model": model})
    except Problem as problem:
        return failed(course["id"], course["fingerprint"], model, problem)


def answer_in(request: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """What the service would have answered, with its own functions. Raises Problem."""
    import dccapi
    from reader.__main__ import TASKS

    try:
        choice, prompt = body["choices"][0], prompt_of(request)
        text = choice["message"].get("content") or choice["message"].get("reasoning_content") or ""
        draft = dccapi.Draft()
        draft.feed(text)
        draft.finish(cut=choice.get("finish_reason") == "length")
    except dccapi.ApiError as error:
        raise Problem(error.status, {"error_code": error.code, "detail": error.detail}) from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Problem(502, {"error_code": "batch_error", "detail": "This is no chat completion."}) from None
    badge = cast(dccapi.Badge, draft.badge)
    tags, index = dccapi.skills_in(badge._tags, prompt), dccapi.load_settings().skills_index
    review = TASKS["review"](
        index=str(index or "") if prompt.request.skills else "",
        skills=tags,
        badge=badge.model_dump(),
        course=prompt.course.text,
        options=[*prompt.request.options.values()],
        wanted_language=prompt.request.language,
        tone=prompt.request.option("badge_tone"),
        notes=prompt.course.notes,
    )
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {name: (body.get("usage") or {}).get(name, 0) for name in counts}
    terms = {"tag": tags, "alignment": review.pop("alignment", ())}
    achievement = dccapi.build_achievement(badge.model_dump(), prompt.request, **terms)
    return {"response": badge.model_dump(), "achievement": achievement, "review": review, "usage": usage}


# ---- Command line ---------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="catalogue.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *files: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        for file in files:
            added.add_argument(file, type=Path)
        return added

    writes = command("run", "a draft for each course that has none", "courses", "drafts")
    shown = command("export", "drafts for people and other systems", "drafts")
    reads = command("accept", "take a reviewed CSV back into the drafts", "reviewed", "drafts")
    asked = command("prepare", "requests in the OpenAI Batch format", "courses", "requests")
    command("collect", "outputs in the OpenAI Batch format as drafts", "requests", "outputs", "drafts")
    for each in (writes, asked, reads):
        each.add_argument("--encoding", default="", help="of a CSV file; as a rule it is told from the file")
    for each in (writes, asked):
        each.add_argument("--id", default="id", metavar="COLUMN", help="the column of the course's id (id)")
        each.add_argument("--content", default=["content"], nargs="+", metavar="COLUMN", help="of its text (content)")
        each.add_argument("--set", default=[], action="append", metavar="NAME=VALUE", help="an option for all")
    writes.add_argument("--server", default=os.environ.get("DCCAPI_URL", "http://localhost:8001"), help="or DCCAPI_URL")
    writes.add_argument("--api-key", default=os.environ.get("DCCAPI_KEY"), help="or DCCAPI_KEY, which `ps` cannot show")
    writes.add_argument("--insecure", action="store_true", help="trust any certificate, such as a self-signed one")
    writes.add_argument("--in-flight", type=positive, metavar="N", help="drafts at a time (the service's workers)")
    writes.add_argument("--patience", type=float, default=3600, metavar="S", help="seconds to wait for the service")
    writes.add_argument("--check", action="store_true", help="say what is read, write three, say how long all takes")
    asked.add_argument("--model", required=True, metavar="NAME", help="as the engine names it")
    shown.add_argument("--to", required=True, choices=("csv", "achievements", "dcc-template"))
    shown.add_argument("--out", type=Path, metavar="PATH", help="a file for csv, else a directory")
    shown.add_argument("--force", action="store_true", help="replace a CSV that exists")
    shown.add_argument("--accepted", action="store_true", help="files for those that were accepted only")
    shown.add_argument("--issuer", default="", metavar="URL", help="of dcc-template; else the institution's")
    shown.add_argument("--issuer-name", default="", metavar="NAME")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says. The exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 gets what it can show
    options = parser().parse_args(arguments)
    commands = {"export": export, "accept": accept, "prepare": prepare, "collect": collect}
    try:
        if options.command == "run":
            return asyncio.run(run(options))
        return commands[options.command](options)
    except Refused as reason:
        print(f"catalogue.py: {reason}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"catalogue.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 3


if __name__ == "__main__":
    sys.exit(main())

"""The documents: settings, links, options and variables are as they say, and the commands that can be run are run."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import podman_compose
import pytest

import catalogue
import dccapi
from dccapi import Settings
from service import COURSE, HERE, certificate, client, serving
from test_examples import needs
from testkit import ScriptedOllama, Server, badge_json, free_port

GUIDES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
DOCUMENTS = [*GUIDES, HERE / "SECURITY.md", HERE / "CHANGELOG.md", HERE / "model/README.md"]
NAMED_OTHERWISE = {"model_name": "phi4badges", "system_prompt_file": "SYSTEM_PROMPT.txt", "enable_multiplexing": "true"}

# What is not run, and why. `make` says what it would do, and podman-compose reads the options of its commands.
NOT_RUN = {
    r"ollama |curl .*localhost:8000/": "needs Ollama",
    r"podman (inspect|stats|unshare|--version)|podman-compose --version": "needs containers: test_containers.py",
    r"vllm |pip install|apt-get |git pull": "fetches what is not ours",
    r"ss |free |ls |systemctl ": "tells of the machine, not of the service",
    r"(python|hypercorn) .*dccapi": "starts the service: test_service.py",
    r"python examples/ray_catalogue.py ": "needs Ray: test_ray.py",
    r"curl \$PROXY": "needs LiteLLM and a provider",
    r"curl .*http_code": "shows that keys are on, and here are none",
}
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?"
    r"(?:python|hypercorn|curl|openssl|make|podman|podman-compose|ollama|vllm|git|pip|apt-get|sh|ss|free|ls|systemctl|grep)"
    r" \S"
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
OWN_PROGRAMS = ("dccapi.py", "examples/client.py", "tools/bench.py", "tools/evaluate.py")
# Of others, in sentences; Ray is not installed here.
OTHER_OPTIONS = {"--interrupt_requests", "--user"}


class Command(NamedTuple):
    document: str
    text: str
    prints: str  # what it prints, where the document says so


# ---- What the documents say -----------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """Variable to default, as docs/settings.md has them."""
    found: dict[str, str] = {}
    for line in (HERE / "docs/settings.md").read_text("utf-8").splitlines():
        if line.startswith("| `"):
            _, names, defaults = line.split("|")[:3]
            listed = re.findall(r"`([A-Z_]+)`", names)
            values = [value.strip(" `") for value in defaults.split(",")] if len(listed) > 1 else [defaults.strip(" `")]
            found |= dict(zip(listed, values + [""] * (len(listed) - len(values)), strict=True))
    return found


def spans(guide: Path) -> list[tuple[str, str]]:
    """The pieces of code in sentences and tables, and what they are said to print."""
    found = re.findall(r"`([^`]+)`(?: prints `([^`]+)`)?", FENCE.sub("", guide.read_text("utf-8")))
    return [(" ".join(code.replace("\\|", "|").split()), printed) for code, printed in found]


def statements(block: str) -> Iterator[str]:
    """The commands of a block of shell: a line each, or as many as quotes and backslashes hold together."""
    part = ""
    for line in block.splitlines(keepends=True):
        part += line
        with contextlib.suppress(ValueError):  # a quotation that goes on
            if not part.endswith("\\\n") and shlex.split(part, comments=True):
                yield from part.strip().split(" && ")
                part = ""
    assert not shlex.split(part, comments=True)


def commands() -> list[Command]:
    """Those of all guides, in the order in which they are read, each once."""
    found: dict[str, Command] = {}
    for guide in GUIDES:
        blocks = [block for kind, block in FENCE.findall(guide.read_text("utf-8")) if kind in ("sh", "console", "bash")]
        parts = [(one, "") for block in blocks for one in statements(block)]
        for text, printed in [*parts, *(part for part in spans(guide) if COMMAND.match(part[0]))]:
            found.setdefault(text, Command(guide.name, text, printed))
    return list(found.values())


COMMANDS = commands()


def arguments(command: str) -> list[str]:
    """The words of a command, without what it sets in the environment."""
    words = shlex.split(command, comments=True)
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


# ---- What must be there ---------------------------------------------------------------------------------------------


def test_every_setting_is_documented_with_its_default() -> None:
    found = documented()
    assert {name.upper() for name in Settings.model_fields} == set(found)
    for name, field in Settings.model_fields.items():
        default = NAMED_OTHERWISE.get(name, "" if field.default is None else str(field.default))
        if name != "allowed_origins":  # its default is told in words
            assert found[name.upper()] == default, name


def anchors(document: Path) -> set[str]:
    """The fragments of a document's headings, as GitHub and GitLab make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, fragment in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text("utf-8")):
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not fragment or fragment in anchors(path), (target, fragment)


async def test_the_page_and_the_service_name_documents_that_they_serve() -> None:
    sources = [
        HERE / "dccapi.py",
        *HERE.glob("reader/*.py"),
        HERE / "examples/demo.html",
        *HERE.glob("examples/page/*.js"),
    ]
    named = {
        name
        for path in [*sources, dccapi.OPENAPI]
        for name in re.findall(r"docs/([\w-]+\.md)", path.read_text("utf-8"))
    }
    assert named >= {"README.md", "api.md", "catalogue.md", "troubleshooting.md"}
    async with serving(api_keys="lms:s3cret") as service, client(service) as asking:
        for guide in GUIDES:
            answer = await asking.get(f"/api/v1/docs/{guide.name}")
            assert (answer.status_code, answer.text) == (200, guide.read_text("utf-8"))
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            named.discard(guide.name)
        assert not named
        assert (await asking.get("/docs/SECURITY.md")).status_code == 401


def test_variables_are_such_as_there_are() -> None:
    sources = ("Makefile", "compose.yaml", "catalogue.py", "examples/curl.sh", "examples/ray_catalogue.py")
    known = "\n".join((HERE / name).read_text("utf-8") for name in (*sources, "tests/test_engines.py"))
    known += " ".join(Settings.model_fields).upper() + " OLLAMA_NUM_PARALLEL"
    for guide in GUIDES:
        for code, _ in spans(guide):
            for name in re.findall(r"\b([A-Z][A-Z_]{2,})\b(?==)", code):
                assert re.search(rf"\b{name}\b", known), (guide.name, code)


async def test_options_stand_in_the_help_of_our_programs() -> None:
    async def help_of(program: str) -> str:
        return (await run(f"{shlex.quote(sys.executable)} {program} --help", HERE, {}))[1]

    helps = dict(zip(OWN_PROGRAMS, await asyncio.gather(*map(help_of, OWN_PROGRAMS)), strict=True))
    subparsers = next(action for action in catalogue.parser()._actions if isinstance(action.choices, dict))
    helps["catalogue.py"] = "".join(parser.format_help() for parser in subparsers.choices.values())
    helps["examples/ray_catalogue.py"] = (HERE / "examples/ray_catalogue.py").read_text("utf-8")  # Ray is not here
    of_make = {"bench": "tools/bench.py", "eval": "tools/evaluate.py"}
    for command in COMMANDS:
        words = arguments(command.text)
        program = next((word for word in words if word in helps), "")
        if words[0] == "make" and words[1] in of_make:
            program = of_make[words[1]]
            words = " ".join(word.removeprefix("ARGS=") for word in words).split()
        for option in (word.partition("=")[0] for word in words if word.startswith("--") and program):
            assert re.search(rf"{option}\b", helps[program]), command
    for guide in GUIDES:
        for code, _ in spans(guide):
            if (option := code.split()[0]).startswith("--") and option not in OTHER_OPTIONS:
                assert any(re.search(rf"{option}\b", help) for help in helps.values()), (guide.name, code)


# ---- What is run ----------------------------------------------------------------------------------------------------


async def run(command: str, directory: Path, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code and output, both streams together."""
    process = await asyncio.create_subprocess_shell(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, said.decode()


def checkout(directory: Path) -> None:
    """A folder like a fresh clone after `make demo`, with the files that a reader has."""
    for path in HERE.iterdir():
        if path.name not in (".git", ".venv", "certs"):
            (directory / path.name).symlink_to(path)
    python = directory / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (directory / ".curlrc").write_text("fail-with-body\nmax-time = 20\n")
    (directory / "course.txt").write_text(COURSE["content"])
    for name in ("syllabus.pdf", "syllabus.docx"):
        (directory / name).symlink_to(HERE / "tests/documents" / name)


def before(command: str, directory: Path) -> None:
    """What a person, or an engine elsewhere, does between two commands."""
    if " accept " in command:
        with (directory / "drafts.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        with (directory / "drafts.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({**row, "accepted": "yes"} for row in rows)
    if " collect " in command:
        requests = [json.loads(line) for line in (directory / "requests.jsonl").read_text("utf-8").splitlines()]
        body = {"model": "NAME", "choices": [{"message": {"content": badge_json()}, "finish_reason": "stop"}]}
        outputs = [{"custom_id": one["custom_id"], "response": {"status_code": 200, "body": body}} for one in requests]
        (directory / "outputs.jsonl").write_text("\n".join(map(json.dumps, outputs)))


@pytest.mark.slow
@needs("curl", "openssl")
@pytest.mark.timeout(180)
async def test_the_commands_of_the_documents_do_what_they_say(tmp_path: Path) -> None:
    """In the order in which they are read, in one folder and with one service, on ports of its own."""
    certificate()
    checkout(tmp_path)
    not_run = {rule: re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{rule})") for rule in NOT_RUN}
    used: set[str] = set()
    cleartext, tls = free_port(), free_port()
    here = f"http://localhost:{cleartext}"
    environment = {"HOME": str(tmp_path), "DCCAPI_URL": here, "BASE": here, "KEY": ""}
    binds = ["--bind", f"127.0.0.1:{cleartext}", "--tls-bind", f"127.0.0.1:{tls}"]
    ports = {"localhost:8001": f"localhost:{cleartext}", "localhost:8443": f"localhost:{tls}"}
    ports["https://badges.example.edu"] = here
    async with ScriptedOllama() as engine:
        settings = {"OLLAMA_URL": engine.url, "ALLOWED_ORIGINS": "https://lms.example.edu"}
        async with Server(["dccapi.py", *binds], settings, f"{here}/livez", HERE):
            for document, text, prints in COMMANDS:
                if rules := [rule for rule, begins in not_run.items() if begins.match(text)]:
                    used.update(rules)
                    continue
                words = arguments(text)
                if words[:2] == ["podman", "compose"]:
                    podman_compose.podman_compose._parse_args(words[2:])  # SystemExit where it does not know one
                    continue
                command = re.sub(r"(^|\s)make ", rf"\1make -n -C {shlex.quote(str(HERE))} ", text)
                for documented, own in ports.items():
                    command = command.replace(documented, own)
                before(command, tmp_path)
                code, said = await run(command, tmp_path, environment)
                assert code == 0, (document, text, said)
                assert not prints or said.strip() == prints, (document, text, said)
    assert used == NOT_RUN.keys()
    assert len(list((tmp_path / "drafts-achievements").glob("*.json"))) == 4

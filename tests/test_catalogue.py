"""catalogue.py: tables as people have them, drafts.jsonl whatever happens, review, and the OpenAI Batch format."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from starlette.datastructures import Headers

import catalogue
import dccapi
import testkit
from service import HERE, Service, ask, judge, serving
from testkit import Script, ScriptedOllama, badge_json, split

__all__ = ["judge"]

KNOTS = "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."
CATALOGUE = [sys.executable, str(HERE / "catalogue.py")]


def table(path: Path, rows: Iterable[Iterable[Any]], encoding: str = "utf-8", delimiter: str = ",") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def courses(directory: Path, count: int) -> Path:
    rows = [[f"C-{number:04}", f"{KNOTS} Part {number}."] for number in range(count)]
    return table(directory / "courses.csv", [["id", "content"], *rows])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def part(body: Any) -> str:
    """Which of the courses an engine was asked for."""
    found = re.search(r"Part (\d+)", json.dumps(body))
    assert found
    return found[1]


def asked(engine: testkit.ScriptedEngine) -> Counter[str]:
    """How often each course reached the engine."""
    return Counter(part(call.body) for call in engine.calls)


async def told(*arguments: Any, code: int = 0) -> str:
    """What catalogue.py says, as a process with this exit code."""
    process = await asyncio.create_subprocess_exec(
        *CATALOGUE,
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said = (await asyncio.wait_for(process.communicate(), 50))[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == code, said
    return said


async def run(service: Service, *arguments: Any, code: int = 0) -> str:
    return await told("run", *arguments, "--server", service.url, code=code)


@contextlib.asynccontextmanager
async def running(url: str, *arguments: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """`catalogue.py run` as a process, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(*CATALOGUE, "run", *map(str, arguments), "--server", url),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until(process: asyncio.subprocess.Process, text: str) -> None:
    """Wait for a line of stderr."""
    assert process.stderr
    async for line in process.stderr:
        if text in line.decode():
            return
    raise AssertionError(f"it never said {text}")


def chosen(path: Path, *arguments: str) -> list[catalogue.Course]:
    options = catalogue.parser().parse_args(["run", str(path), "drafts.jsonl", *arguments])
    return list(catalogue.choose(options).courses())


# ---- Tables ---------------------------------------------------------------------------------------------------------

GERMAN = [
    ["Kurs-ID", "Titel", "Beschreibung"],
    ["K;1", "Übungen", 'Größe "XL"; 5 Stunden,\r\nPrüfung'],
    ["K2", "b", "<p>ä</p>"],
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_is_read_in_any_usual_dialect_and_encoding(tmp_path: Path, encoding: str, delimiter: str) -> None:
    read = catalogue.open_table(table(tmp_path / "courses.csv", GERMAN, encoding, delimiter))
    assert read.columns == GERMAN[0]
    assert [(line, list(row.values())) for line, row in read.rows()] == [(2, GERMAN[1]), (4, GERMAN[2])]


def test_a_delimiter_named_as_excel_does_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nid;content, all of it\n1;a, b\n", "utf-8")
    read = catalogue.open_table(tmp_path / "a.csv")
    assert list(read.rows()) == [(3, {"id": "1", "content, all of it": "a, b"})]


def test_an_encoding_that_cannot_be_told_is_named_by_the_user(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", [["id", "content"], ["1", "Zażółć"]], "cp1250")
    (course,) = chosen(path, "--encoding", "cp1250")
    assert course.content == "Zażółć"
    with pytest.raises(catalogue.Refused, match="is not in utf-8"):
        chosen(path, "--encoding", "utf-8")


def test_xlsx_gives_cells_as_they_are_seen(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["id", "content"], [101, "<p>Größe</p>"], [], [102.0, None]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    read = catalogue.open_table(tmp_path / "a.xlsx")
    assert list(read.rows()) == [(2, {"id": "101", "content": "<p>Größe</p>"}), (4, {"id": "102", "content": ""})]


def test_jsonl_keeps_its_types_and_names_a_broken_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"id": 7, "content": "a", "seed": 3}\n\n[1]\n', "utf-8")
    with pytest.raises(catalogue.Refused, match="line 3 is not a JSON object"):
        catalogue.open_table(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"id": 7, "content": "a", "seed": 3}\n', "utf-8")
    (course,) = chosen(tmp_path / "a.jsonl")
    assert (course.id, course.options) == ("7", {"seed": 3})


def test_several_columns_are_joined_under_their_names_and_options_are_read(tmp_path: Path) -> None:
    rows = [
        ["Course ID", "Title", "Text", "badge level", "seed"],
        ["1", "Knots", "a\nb", "Expert", "4"],
        ["2", "", "c"],
    ]
    arguments = ["--id", "course id", "--content", "title", "Text", "--set", "badge_level=Advanced"]
    first, second = chosen(table(tmp_path / "a.csv", rows), *arguments)
    assert (first.content, first.options) == ("Title:\nKnots\n\nText:\na\nb", {"badge_level": "Expert", "seed": 4})
    assert (second.content, second.options) == ("Text:\nc", {"badge_level": "Advanced"})


HEADER = ["id", "content"]
TWICE = "no id in line 2; the same id again in line 4 (1, as in line 3)"
WRONG: dict[str, tuple[list[list[str]], list[str]]] = {
    "no column id. Name the right one with --id. Its columns: Nr, content": ([["Nr", "content"], ["1", "a"]], []),
    "no column content. Name the right one with --content. Its columns: id, Text": ([["id", "Text"], ["1", "a"]], []),
    "2 columns named Id": ([["id", "content", "ID"], ["1", "a"]], ["--id", "Id"]),
    TWICE: ([HEADER, ["", "a"], ["1", "b"], ["1", "c"]], []),
    "line 2: more cells than columns": ([HEADER, ["1", "a", "b"]], []),
    "line 2: seed cannot be x": ([[*HEADER, "seed"], ["1", "a", "x"]], []),
    "--set level=Expert is not NAME=VALUE; the names are": ([HEADER, ["1", "a"]], ["--set", "level=Expert"]),
    "No dccapi answers at http://127.0.0.1": ([HEADER, ["1", "a"]], []),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_usage_is_refused_before_the_first_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(catalogue, "START_PATIENCE", 0)
    rows, arguments = WRONG[said]
    path, drafts = table(tmp_path / "courses.csv", rows), tmp_path / "drafts.jsonl"
    nobody = f"http://127.0.0.1:{testkit.free_port()}"
    assert catalogue.main(["run", str(path), str(drafts), *arguments, "--server", nobody]) == 2
    assert said in capsys.readouterr().err
    assert not drafts.exists()


# ---- A run ----------------------------------------------------------------------------------------------------------


async def test_each_course_gets_a_line_at_the_catalogues_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str | None, ...]] = []
    drafts = tmp_path / "drafts.jsonl"
    async with serving() as service:
        note_headers(monkeypatch, seen)
        await run(service, courses(tmp_path, 5), drafts, "--set", "badge_level=Expert")
        assert all("Level: Expert" in json.dumps(call.body) for call in service.engine.calls)
        assert service.engine.max_open_calls <= 4
    assert sorted(draft["id"] for draft in lines(drafts)) == [f"C-{number:04}" for number in range(5)]
    for draft in lines(drafts):
        names = ["id", "fingerprint", "status", "response", "achievement", "review", "usage", "model", "error"]
        assert list(draft) == names
        assert (draft["status"], draft["error"], draft["model"]) == ("done", None, "phi4badges")
        assert draft["response"] == json.loads(badge_json())
        assert draft["achievement"]["type"] == ["Achievement"]
    assert {(priority, version) for priority, version, _ in seen} == {("u=6", "2")}
    assert len({key for _, _, key in seen}) == 5


def note_headers(monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str | None, ...]]) -> None:
    """Keep what each course's request says."""
    call = dccapi.Guard.__call__

    async def noting(guard: dccapi.Guard, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("method") == "POST":
            headers = Headers(scope=scope)
            seen.append((headers.get("priority"), scope["http_version"], headers.get("idempotency-key")))
        await call(guard, scope, receive, send)

    monkeypatch.setattr(dccapi.Guard, "__call__", noting)


@pytest.mark.slow
async def test_a_second_run_writes_what_changed_and_what_failed_only(tmp_path: Path) -> None:
    broken = {"1"}

    def script(body: dict[str, Any], index: int) -> Script:
        return Script(status=400, error="no") if part(body) in broken else Script()

    path, drafts = courses(tmp_path, 4), tmp_path / "drafts.jsonl"
    async with serving(script=script) as service:
        assert "Failed: 1 engine_error" in await run(service, path, drafts, code=3)
        (failed,) = [draft for draft in lines(drafts) if draft["status"] == "failed"]
        assert (failed["id"], failed["error"]["status"], failed["response"]) == ("C-0001", 502, None)
        broken.clear()
        service.engine.calls.clear()
        former = {draft["id"]: draft for draft in lines(drafts)}["C-0002"]
        path.write_text(path.read_text().replace("Part 2", "New: Part 2"))
        await run(service, path, drafts)
        assert asked(service.engine) == {"1": 1, "2": 1}
        service.engine.calls.clear()
        await run(service, path, drafts)
        assert not service.engine.calls
    assert Counter(draft["id"] for draft in lines(drafts)) == {"C-0000": 1, "C-0001": 2, "C-0002": 2, "C-0003": 1}
    anew = {draft["id"]: draft for draft in lines(drafts)}["C-0002"]
    assert anew["fingerprint"] != former["fingerprint"]
    assert anew["achievement"]["id"] == former["achievement"]["id"]


@pytest.mark.parametrize("torn", [b'{"id": "C-0001", "fin', b"\0" * 100, b'{"i'])
async def test_a_torn_last_line_is_dropped_and_its_course_written(tmp_path: Path, torn: bytes) -> None:
    path, drafts = courses(tmp_path, 2), tmp_path / "drafts.jsonl"
    async with serving() as service:
        await run(service, path, drafts)
        first = drafts.read_bytes().splitlines(keepends=True)[0]
        drafts.write_bytes(first + torn)
        await run(service, path, drafts)
    assert drafts.read_bytes().startswith(first)
    assert sorted(draft["id"] for draft in lines(drafts)) == ["C-0000", "C-0001"]


async def test_a_file_that_holds_no_drafts_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a letter")
    async with serving() as service:
        assert "line 1 is not a draft" in await run(service, courses(tmp_path, 1), other, code=2)
        assert not service.engine.calls
    assert other.read_text() == "a letter"


async def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path, drafts = courses(tmp_path, 1), tmp_path / "drafts.jsonl"
    with drafts.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with serving() as service:
            assert "is being written by another" in await run(service, path, drafts, code=2)


def test_where_a_file_system_knows_no_locks_drafts_are_written_with_a_word_of_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with catalogue.Drafts(tmp_path / "drafts.jsonl") as drafts:
        drafts.append(draft("a"))
    assert "do not run two at a time" in capsys.readouterr().err


async def test_what_the_service_cannot_do_now_is_waited_for(tmp_path: Path) -> None:
    """Of two at once it takes one; its Retry-After is 1 once it has measured a generation."""
    path, drafts, now = courses(tmp_path, 3), tmp_path / "drafts.jsonl", asyncio.get_running_loop().time
    async with serving(max_per_client=1, script=Script(first_delay=0.2)) as service:
        await run(service, path, drafts, "--in-flight", 1)
        drafts.unlink()
        path.write_text(path.read_text().replace("Part", "New: Part"))
        began = now()
        said = await run(service, path, drafts, "--in-flight", 2)
        assert now() - began >= 1.2
        assert len(service.engine.calls) == 6
    assert said.count("Waiting.") == said.count("The service answers again.") == 1


async def test_an_engine_that_is_down_is_waited_for(tmp_path: Path) -> None:
    def script(body: dict[str, Any], index: int) -> Script:
        return Script(status=503, error="loading", retry_after="1") if index < 4 else Script()

    async with serving(script=script) as service:
        await run(service, courses(tmp_path, 3), tmp_path / "drafts.jsonl")
    assert [draft["status"] for draft in lines(tmp_path / "drafts.jsonl")] == ["done"] * 3


async def test_what_no_try_can_help_is_asked_once(tmp_path: Path) -> None:
    rows = [["id", "content", "badge_level"], ["long", "a " * 9000, ""], ["wrong", KNOTS, "Wizard"], ["empty", "", ""]]
    drafts = tmp_path / "drafts.jsonl"
    async with serving(max_body_bytes=4096) as service:
        said = await run(service, table(tmp_path / "courses.csv", rows), drafts, code=3)
        assert "Waiting" not in said
        assert not service.engine.calls
    errors = {draft["id"]: draft["error"] for draft in lines(drafts)}
    assert {id: error["status"] for id, error in errors.items()} == {"empty": 422, "long": 413, "wrong": 422}
    assert "badge_level must be Beginner" in errors["wrong"]["detail"]


async def test_a_key_that_is_missing_stops_the_run(tmp_path: Path) -> None:
    path, drafts = courses(tmp_path, 3), tmp_path / "drafts.jsonl"
    async with serving(api_keys="lms:sesame") as service:
        assert "wants a key" in await run(service, path, drafts, code=2)
        await run(service, path, drafts, "--api-key", "sesame")


async def test_a_service_that_refuses_all_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forbidden(*_: Any) -> Any:
        raise catalogue.Problem(403, {"detail": "This key may not."})

    monkeypatch.setattr(catalogue, "generate", forbidden)
    async with serving() as service:
        arguments = ["run", str(courses(tmp_path, 9)), str(tmp_path / "drafts.jsonl"), "--server", service.url]
        with pytest.raises(catalogue.Refused, match="This key may not"):
            await catalogue.run(catalogue.parser().parse_args(arguments))
    assert not (tmp_path / "drafts.jsonl").read_text()


async def test_patience_has_an_end(tmp_path: Path) -> None:
    async with serving(script=Script(status=503, error="loading", retry_after="1")) as service:
        said = await run(service, courses(tmp_path, 2), tmp_path / "drafts.jsonl", "--patience", 0.1, code=3)
    assert "Given up: nothing could be written for 0.1 s" in said
    assert not (tmp_path / "drafts.jsonl").read_text()


@pytest.mark.slow
async def test_a_service_that_was_drained_or_killed_is_waited_for(tmp_path: Path) -> None:
    drafts, port = tmp_path / "drafts.jsonl", testkit.free_port()
    url = f"http://127.0.0.1:{port}"
    async with ScriptedOllama() as engine:
        engine.script = lambda body, index: Script(delay=0.005)
        command, env = ["dccapi.py", "--bind", f"127.0.0.1:{port}", "--certs", "absent"], {"OLLAMA_URL": engine.url}
        async with testkit.Server(command, env, f"{url}/livez", HERE) as server:
            task = asyncio.create_task(told("run", courses(tmp_path, 16), drafts, "--server", url))
            await engine.wait_for_calls(5, 20)
            await server.terminate()
        before = len(engine.calls)
        async with testkit.Server(command, env, f"{url}/livez", HERE) as server:
            await engine.wait_for_calls(before + 1, 20)
            await server.kill()
        async with testkit.Server(command, env, f"{url}/livez", HERE):
            await task
    assert Counter(draft["id"] for draft in lines(drafts)) == {f"C-{number:04}": 1 for number in range(16)}


async def test_a_person_waits_for_one_free_worker_and_not_for_the_catalogue(tmp_path: Path) -> None:
    gates: dict[int, asyncio.Event] = {}

    def script(body: Any, index: int) -> Script:
        return Script(gate=gates.setdefault(index, asyncio.Event()))

    path, drafts = courses(tmp_path, 100), tmp_path / "drafts.jsonl"
    limits = {"max_concurrent_requests": 2, "max_queue": 300, "max_per_client": 300}
    async with serving(script=script, **limits) as service, running(service.url, path, drafts, "--in-flight", 80):
        await testkit.eventually(lambda: (len(service.queue.running), len(service.queue.waiting)) == (2, 78), 30)
        person = asyncio.create_task(ask(service, {"content": "Chess"}))
        await testkit.eventually(
            lambda: len(service.queue.waiting) == 79 and all(g.prompt for g in service.queue.waiting), 30
        )
        gates[0].set()
        _, _, call = await service.engine.wait_for_calls(3)
        assert "Chess" in json.dumps(call.body)
        gates[2].set()
        assert (await person).status == 200


async def test_ctrl_c_finishes_what_is_in_flight_and_a_second_one_stops_now(tmp_path: Path) -> None:
    gate = asyncio.Event()
    path, drafts = courses(tmp_path, 30), tmp_path / "drafts.jsonl"
    async with serving(script=Script(gate=gate)) as service:
        async with running(service.url, path, drafts) as process:
            await service.engine.wait_for_calls(4, 20)
            process.send_signal(signal.SIGINT)
            await until(process, "Finishing what is being written")
            gate.set()
            assert await asyncio.wait_for(process.wait(), 10) == 3
        assert len(lines(drafts)) == len(service.engine.calls) == 4
        gate.clear()
        async with running(service.url, path, drafts) as process:
            await service.engine.wait_for_calls(8, 20)
            process.send_signal(signal.SIGINT)
            await until(process, "Finishing what is being written")
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 10) == 3
        assert len(lines(drafts)) == 4
        gate.set()
        await service.idle()


@pytest.mark.slow
async def test_nothing_is_lost_and_nothing_written_twice_under_sigkill(tmp_path: Path) -> None:
    """Kills at random moments. A course whose generation was under way joins it: no call is made twice."""
    count, drafts, chance = 60, tmp_path / "drafts.jsonl", random.Random(16)
    path = courses(tmp_path, count)
    async with serving(script=Script(pieces=split(badge_json(), 8), delay=0.01)) as service:
        for kill in range(4):
            async with running(service.url, path, drafts) as process:
                await service.engine.wait_for_calls(1 + 12 * kill + chance.randrange(1, 10), 20)
                await asyncio.sleep(chance.random() * 0.1)  # anywhere in a draft
                process.kill()
                await process.wait()
        await run(service, path, drafts)
        assert asked(service.engine) == {f"{number}": 1 for number in range(count)}
    assert Counter(draft["id"] for draft in lines(drafts)) == {f"C-{number:04}": 1 for number in range(count)}
    assert all(draft["status"] == "done" for draft in lines(drafts))


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    room = 300

    def fills(file: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        room -= (written := write(file, data[:room]))
        return written

    path = tmp_path / "drafts.jsonl"
    with catalogue.Drafts(path) as drafts:
        drafts.append(draft("a"))
        monkeypatch.setattr(catalogue.os, "write", fills)
        with pytest.raises(OSError, match="No space left"):
            drafts.append(draft("b"))
        assert [line["id"] for line in lines(path)] == ["a"]
        room = 10**6
        drafts.append(draft("b"))
    assert [line["id"] for line in lines(path)] == ["a", "b"]


async def test_check_tells_what_is_read_and_how_long_all_takes(tmp_path: Path) -> None:
    rows = [["id", "content", "Größe"], ["1", "Übung: Climbing Knots"], ["2", "Übung: Climbing Knots"], ["3", ""]]
    rows += [[f"{number}", f"{KNOTS} {number}"] for number in range(4, 9)]
    path, drafts = table(tmp_path / "courses.csv", rows, "cp1252", ";"), tmp_path / "drafts.jsonl"
    async with serving(script=Script(first_delay=0.01)) as service:
        said = await run(service, path, drafts, "--check")
        assert len(service.engine.calls) == 3
    for words in (
        "CSV in cp1252, separated by ;; 8 rows",
        "Columns: id = id, content = content, Größe (not used)",
        "other letters than a to z: Übung\n",
        "Without content: 1 3\n",
        "With the content of another: 1 2 (as 1)\n",
    ):
        assert words in said
    assert re.search(r"3 were written, in \d+\.\d s each. The 5 that are left take about 0\.0 hours with 4 in", said)
    assert len(lines(drafts)) == 3


async def test_check_tells_what_is_read_where_no_service_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "START_PATIENCE", 0)
    nobody = f"http://127.0.0.1:{testkit.free_port()}"
    arguments = ["run", str(courses(tmp_path, 9)), str(tmp_path / "drafts.jsonl"), "--check", "--server", nobody]
    with pytest.raises(catalogue.Refused, match="No dccapi answers"):
        await catalogue.run(catalogue.parser().parse_args(arguments))
    assert "9 rows" in capsys.readouterr().out


def test_a_terminal_of_another_encoding_shows_what_it_can(tmp_path: Path) -> None:
    path = table(tmp_path / "courses.csv", [["id", "content"], ["1", "Węzły żeglarskie"]], "utf-8", ",")
    line = [
        "catalogue.py",
        "run",
        str(path),
        str(tmp_path / "drafts.jsonl"),
        "--check",
        "--server",
        "http://127.0.0.1:9",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    said = subprocess.Popen([sys.executable, *line], cwd=HERE, env=environment, stdout=subprocess.PIPE)
    assert said.stdout
    try:
        text = "".join(said.stdout.readline().decode() for _ in range(3))
    finally:
        said.kill()
        said.communicate()
    assert "W\\u0119z\\u0142y" in text


def test_progress_fits_the_terminal_with_the_time_of_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    progress = catalogue.Progress(10_000, 4_000, started=time.monotonic() - 3600, is_terminal=True)
    for _ in range(2_000):
        progress.count(draft("a"))
    progress.show(last=True)
    said = capsys.readouterr().err.removeprefix("\r\x1b[K")
    assert re.fullmatch(
        r"#+\.+ 6,000 of 10,000 done, 0 failed, 4,000 left, 2,000 an hour, ends (\w+ )?\d\d:\d\d\n", said
    )
    assert len(said) <= 80
    assert [len(catalogue.clock(days * 86_400)) for days in (0, 1, 8)] == [5, 9, 12]  # also where it ends another day


# ---- Review ---------------------------------------------------------------------------------------------------------

NOTE = {"code": "unsupported_number", "field": "criteria", "text": "1 year", "message": "The course does not say this."}


def draft(id: str, support: float | None = 0.9, **more: Any) -> dict[str, Any]:
    badge = {"badge_name": "Knots", "badge_description": "Ties.", "criteria": {"narrative": "- Tied **six**"}}
    achievement = {
        "@context": catalogue.OB_CONTEXTS,
        "id": "urn:uuid:0b9d1f0a-63a4-4c1e-9c53-2f4f5d0c7a11",
        "type": ["Achievement"],
        "name": "Knots",
        "description": "Ties.",
        "criteria": {"narrative": "- Tied **six**"},
        "achievementType": "Badge",
        "tag": ["rope work", "=safety"],
        "creator": {"id": "https://example.edu", "type": ["Profile"], "url": "https://example.edu", "name": "Example"},
        "alignment": [{"type": ["Alignment"], "targetName": "rope work", "targetUrl": "https://skills.example/1"}],
    }
    review = {"language": "en", "support": support, "sentences": [], "notes": [NOTE]}
    known = {"id": id, "fingerprint": f"f{id}", "status": "done", "response": badge, "achievement": achievement}
    return known | {"review": review, "usage": None, "model": "m", "error": None} | more


def written(path: Path, *drafts: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in drafts), "utf-8")
    return path


def export(drafts: Path, *arguments: str) -> int:
    return catalogue.main(["export", str(drafts), "--to", *arguments])


def reviewed(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_the_least_supported_first_in_words_and_no_formula(tmp_path: Path) -> None:
    problem = catalogue.Problem(413, {"error_code": "content_too_long", "detail": "Shorten the content."})
    missing = catalogue.failed("f", "ff", "m", problem)
    drafts = written(tmp_path / "d.jsonl", draft("a"), draft("-b", 0.2), missing, draft("c", None), draft("a", 0.1))
    assert export(drafts, "csv") == 0
    rows = reviewed(tmp_path / "d.csv")
    assert [row["id"] for row in rows] == ["c", "a", "'-b", "f"]
    assert (rows[1]["support"], rows[1]["criteria"], rows[1]["title"]) == ("0.10", "'- Tied **six**", "Knots")
    assert rows[1]["notes"] == "Criteria, “1 year”: The course does not say this."
    assert rows[1]["skills"] == "rope work (https://skills.example/1); =safety"
    assert rows[3]["error"] == "Shorten the content."
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


@pytest.mark.parametrize("text", ["=1+1", "'=1", "''- a", "- a", "@a", "\ta", "'a", "a"])
def test_what_is_written_safely_for_spreadsheets_is_read_back(text: str) -> None:
    assert not catalogue.shielded(text).startswith(("=", "+", "-", "@", "\t"))
    assert catalogue.unshielded(catalogue.shielded(text)) == text


def test_corrected_texts_are_what_the_other_exports_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafts = written(tmp_path / "d.jsonl", draft("007"), draft("=b"), draft("c"))
    assert export(drafts, "csv") == 0
    rows = reviewed(tmp_path / "d.csv")
    rows[0] |= {"id": "7", "accepted": "x", "corrected_criteria": "'- Tied five\r\n- Checked {{one}}"}
    rows[1] |= {"accepted": "No", "title": "Edited in the wrong place"}
    rows[2] |= {"accepted": "later"}
    table(tmp_path / "r.csv", [rows[0].keys(), *(row.values() for row in rows)], "utf-16", "\t")  # as Excel saves it
    for _ in range(2):
        assert catalogue.main(["accept", str(tmp_path / "r.csv"), str(drafts)]) == 0
        assert len(lines(drafts)) == 5  # a second time changes nothing
    said = capsys.readouterr().err
    assert "title was changed; corrections go into corrected_title." in said
    assert "later in the column accepted is neither yes nor no" in said
    assert "criteria was changed" not in said
    assert export(drafts, "achievements", "--accepted") == 0
    (file,) = (tmp_path / "d-achievements").iterdir()
    assert json.loads(file.read_text("utf-8"))["criteria"] == {"narrative": "- Tied five\n- Checked { {one} }"}
    assert export(drafts, "achievements", "--out", str(tmp_path / "all")) == 0
    assert sorted(path.name[:3] for path in (tmp_path / "all").iterdir()) == ["007", "c-2"]  # not what was refused
    assert export(drafts, "csv") == 2
    assert "may hold a review" in capsys.readouterr().err
    assert export(drafts, "csv", "--force") == 0
    assert {row["id"]: row["accepted"] for row in reviewed(tmp_path / "d.csv")} == {"007": "yes", "'=b": "no", "c": ""}


def test_a_review_of_a_draft_that_was_written_anew_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafts = written(tmp_path / "d.jsonl", draft("a"), draft("b"))
    assert export(drafts, "csv") == 0
    written(drafts, draft("a", fingerprint="new"), draft("b"))
    assert catalogue.main(["accept", str(tmp_path / "d.csv"), str(drafts)]) == 3
    assert "line 2 (a). Export again." in capsys.readouterr().err
    assert len(lines(drafts)) == 2


@pytest.mark.parametrize("to", ["achievements", "dcc-template"])
def test_files_are_valid_open_badges_with_the_same_ids_each_time(tmp_path: Path, judge: Any, to: str) -> None:
    drafts = written(tmp_path / "d.jsonl", draft("Ä/1"), draft("ä/1"), draft("c"))
    found = []
    for name in ("one", "two"):
        assert export(drafts, to, "--out", str(tmp_path / name)) == 0
        found.append({file.name: file.read_text("utf-8") for file in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert len(found[0]) == 3
    filled = {
        "earnerName": 'Sam \\"S\\"',
        "issuanceDate": "2026-11-25T12:00:00.000Z",
        "now": "2026-11-25T12:00:00.000Z",
    }
    for text in found[0].values():
        for name, value in filled.items():
            text = text.replace("{{ " + name + " }}", value)
        checks = ("schema", "rules", "jsonld", "dcc") if to == "dcc-template" else ("schema", "rules", "jsonld")
        assert judge.judge(json.loads(text), checks=checks)["errors"] == []


def test_a_template_without_an_issuer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anonymous = draft("a")
    del anonymous["achievement"]["creator"]
    drafts = written(tmp_path / "d.jsonl", anonymous)
    assert export(drafts, "dcc-template") == 2
    assert "--issuer https://example.edu" in capsys.readouterr().err
    assert export(drafts, "dcc-template", "--issuer", "https://example.edu", "--issuer-name", "Example") == 0


# ---- The OpenAI Batch format ----------------------------------------------------------------------------------------


def output(id: str, text: str = "", status: int = 200) -> dict[str, Any]:
    """A line as `vllm run-batch` and OpenAI write it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    body = {"id": "x", "object": "chat.completion", "model": "big", "choices": [choice], "usage": usage}
    if status != 200:
        body = {"error": {"message": "out of memory"}}
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": id, "response": response, "error": None}


async def test_a_batch_gives_the_rows_that_a_run_gives(tmp_path: Path) -> None:
    rows = [["id", "content"], *([id, f"<p>{KNOTS}</p>"] for id in "abcd"), ["e", ""]]
    path = table(tmp_path / "courses.csv", rows)
    requests, outputs, drafts = (tmp_path / f"{name}.jsonl" for name in ("requests", "outputs", "drafts"))
    assert catalogue.main(["prepare", str(path), str(requests), "--model", "big"]) == 3  # one has no content
    assert [line["custom_id"] for line in lines(requests)] == ["a", "b", "c", "d"]
    for line in lines(requests):
        assert (line["method"], line["url"], line["body"]["model"]) == ("POST", "/v1/chat/completions", "big")
        assert f"<course>\n{KNOTS}\n</course>" in line["body"]["messages"][1]["content"]
    said = [output("c", f"<think>hm</think>\n```json\n{badge_json('C')}\n```"), output("a", badge_json("Knots"))]
    written(outputs, *said, output("b", "I cannot."), output("d", status=500))
    collect = ["collect", str(requests), str(outputs), str(drafts)]
    assert catalogue.main(collect) == 3
    found = {draft["id"]: draft for draft in lines(drafts)}
    assert {id: draft["status"] for id, draft in found.items()} == {
        **dict.fromkeys("ac", "done"),
        **dict.fromkeys("bd", "failed"),
    }
    assert found["b"]["error"]["error_code"] == "invalid_model_output"
    assert found["d"]["error"] == {"status": 500, "error_code": "batch_error", "detail": "out of memory"}
    assert (found["c"]["model"], found["c"]["usage"]["total_tokens"]) == ("big", 14)
    script = Script(pieces=split(badge_json("Knots")))
    async with serving(ScriptedOllama(models=["big:latest"]), script, model_name="big") as service:
        only = table(tmp_path / "one.csv", rows[:2])
        await run(service, only, tmp_path / "run.jsonl")
        await run(service, only, drafts)  # what was collected is skipped
        assert len(service.engine.calls) == 1
    (ran,) = lines(tmp_path / "run.jsonl")
    for one in (ran, found["a"]):
        assert one["achievement"].pop("id")
    assert {**ran, "usage": None} == {**found["a"], "usage": None}
    written(outputs, *(output(id, badge_json(id)) for id in "abcd"))
    assert catalogue.main(collect) == 0
    assert [draft["id"] for draft in lines(drafts)[4:]] == ["b", "d"]

"""What keeps other sites' pages, other clients and hostile courses from the service; over real connections."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

import dccapi
from documents_kit import changed_reader
from service import COURSE, HERE, PAGE, SLOW, Service, ask, asked, client, logging_into, problem_in, serving
from testkit import Script, ScriptedOpenAI, badge_json, eventually

EVIL = ("origin", "https://evil.example")
TEXT = json.dumps(COURSE)


# --- other sites' pages ---


async def status_of(service: Service, method: str, path: str, headers: dict[str, str], body: str | None = None) -> int:
    async with client(service) as http:
        return (await http.request(method, path, headers=headers, content=body)).status_code


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    {
        "a form or a fetch without preflight": ("POST", "/generate", {"origin": EVIL[1]}, 403),
        "a sandboxed frame": ("POST", "/generate", {"origin": "null"}, 403),
        "an img": ("GET", "/generate/stream?content=knots", {"sec-fetch-site": "cross-site"}, 403),
        "an img of a neighbour": ("GET", "/generate/stream?content=knots", {"sec-fetch-site": "same-site"}, 403),
        "a link to a generation": (
            "GET",
            "/generate/stream?content=knots",
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
            403,
        ),
        "a link to the page": ("GET", "/demo", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        "a link to the documentation": (
            "GET",
            "/docs",
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
            200,
        ),
        "the page itself": ("POST", "/generate", {"origin": "http://own", "sec-fetch-site": "same-origin"}, 200),
        "the page itself without Sec-Fetch": ("POST", "/generate", {"origin": "http://own:1", "host": "own:1"}, 200),
        "a page of this machine": ("POST", "/generate", {"origin": PAGE, "sec-fetch-site": "cross-site"}, 200),
        "another page of this machine": ("POST", "/generate", {"origin": "http://localhost:5173"}, 200),
        "a name that begins as this machine": ("POST", "/generate", {"origin": "http://localhost.evil.example"}, 403),
        "a server, or curl": ("POST", "/generate", {}, 200),
    }.values(),
)
async def test_only_pages_of_this_machine_may_ask_by_default(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async with serving() as service:
        body = TEXT if method == "POST" else None
        assert await status_of(service, method, path, headers | {"content-type": "text/plain"}, body) == status
        assert len(service.engine.calls) == (method == "POST" and status == 200)


@pytest.mark.parametrize(
    ("allowed", "origin", "status"),
    [
        ("https://LMS.example.edu:443/, https://b.example", "https://lms.example.edu", 200),
        ("https://b.example/path\nhttps://lms.example.edu", "https://lms.example.edu", 200),
        ("https://b.example/https://evil.example", "https://evil.example", 403),
        ("https://lms.example.edu", "https://evil.example", 403),
        ("https://lms.example.edu", "http://localhost:3000", 403),
        ("*", "https://evil.example", 200),
    ],
)
async def test_allowed_origins_may_ask_and_read_and_no_others(allowed: str, origin: str, status: int) -> None:
    async with serving(allowed_origins=allowed) as service, client(service) as http:
        headers = {"origin": origin, "sec-fetch-site": "cross-site"}
        for path, expected in (("/generate", status), ("/nothing", 404 if status == 200 else 403)):
            response = await http.post(path, json=COURSE, headers=headers)
            assert response.status_code == expected
            if expected == 403:
                assert response.headers["content-type"] == "application/problem+json"
                assert response.json()["error_code"] == "forbidden"
            readable = response.headers.get("access-control-allow-origin")
            assert readable == (None if status == 403 else origin)


@pytest.mark.parametrize("wrong", ["lms.example.edu", "https://*.example.edu", "https://a.example;https://b.example"])
def test_an_origin_that_would_never_match_stops_the_start(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_ORIGINS", wrong)
    with pytest.raises(SystemExit, match=r"ALLOWED_ORIGINS must be .* origins such as"):
        dccapi.load_settings()


def test_a_name_of_two_keys_stops_the_start() -> None:
    with pytest.raises(ValueError, match=r"API_KEYS .* no name twice"):
        dccapi.Settings(api_keys="lms:a, moodle:b, lms:c")


@pytest.mark.parametrize(
    ("host", "settings", "status"),
    [
        ("rebound.example:8001", {}, 403),
        ("127.0.0.1.nip.io", {}, 403),
        ("localhost:8001", {}, 200),
        ("demo.localhost", {}, 200),
        ("[::1]:8001", {}, 200),
        ("badges.example", {"trusted_proxies": "127.0.0.1"}, 200),
        ("badges.example", {"api_keys": "lms:s3cret"}, 200),
        ("badges.example", {"allowed_origins": "*"}, 200),
    ],
)
async def test_a_name_pointed_at_this_machine_opens_nothing(host: str, settings: dict[str, Any], status: int) -> None:
    async with serving(**settings) as service:
        headers = {"host": host, "x-api-key": "s3cret", "sec-fetch-site": "same-origin"}
        assert await status_of(service, "POST", "/generate", headers, TEXT) == status
        assert await status_of(service, "GET", "/", headers) == status


# --- keys ---


async def test_a_key_neither_sees_nor_cancels_the_generation_of_another() -> None:
    async with serving(script=SLOW, api_keys="lms:s3cret,cms:0ther") as service:
        mine, other = [("x-api-key", "s3cret")], [("x-api-key", "0ther")]
        accepted = (await ask(service, headers=[*mine, ("prefer", "respond-async")])).json()
        path = f"/generations/{accepted['id']}"
        for method in ("GET", "DELETE"):
            assert (await ask(service, None, path, method, other)).status == 404
        assert (await ask(service, None, path, "GET", mine)).json()["status"] == "running"
        async with await service.connect() as connection:
            assert (await connection.headers(await connection.request("GET", f"{path}/events"))).status == 200
            assert (await ask(service, None, path, "DELETE", mine)).status == 204


@pytest.mark.alone
async def test_the_21st_wrong_key_of_an_address_in_a_minute_waits_and_others_do_not() -> None:
    async with serving(api_keys="lms:s3cret", trusted_proxies="127.0.0.1") as service:

        async def seconds(key: str, address: str, status: int) -> float:
            started = time.monotonic()
            headers = [("x-api-key", key), ("x-forwarded-for", address)]
            assert (await ask(service, None, "/health", "GET", headers)).status == status
            return time.monotonic() - started

        quick = 0
        while await seconds("wrong", "198.51.100.1", 401) < 1:
            quick += 1
        assert 20 <= quick <= 40  # more than 20 where a minute ends between them
        assert await seconds("wrong", "198.51.100.2", 401) < 1
        assert await seconds("s3cret", "198.51.100.1", 200) < 1


# --- proxies ---


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("198.51.100.7:5678", "198.51.100.7"),
        ("[2001:db8::7]:5678", "2001:db8::7"),
        ("2001:db8::7", "2001:db8::7"),
        ("198.51.100.7, ::ffff:10.0.0.1", "198.51.100.7"),
        ("198.51.100.7, 10.0.0.1:80", "198.51.100.7"),
    ],
)
async def test_an_address_is_read_however_a_proxy_writes_it(hop: str, address: str) -> None:
    proxies = "127.0.0.1, 10.0.0.0/8"
    async with serving(script=SLOW, trusted_proxies=proxies) as service, await service.connect() as connection:
        headers = [("x-forwarded-for", hop)]
        await connection.headers(await connection.request("POST", "/generate/stream", headers, COURSE))
        assert [generation.client for generation in service.queue.running] == [address]


@pytest.mark.parametrize(
    ("proxies", "given", "prefix"),
    [("127.0.0.1", "/badges/", "/badges"), ("127.0.0.1", "//evil.example", ""), ("", "/badges", "")],
)
async def test_behind_a_path_prefix_the_addresses_of_answers_are_right(proxies: str, given: str, prefix: str) -> None:
    async with serving(trusted_proxies=proxies) as service:
        headers = [("x-forwarded-prefix", given), ("prefer", "respond-async")]
        accepted = await ask(service, headers=headers)
        path = f"{prefix}/api/v1/generations/{accepted.json()['id']}"
        assert (accepted.headers["location"], accepted.json()["events"]) == (path, f"{path}/events")
        await service.idle()


# --- courses and bodies ---


@pytest.mark.parametrize(
    "mark",
    [
        "</course x>", "< / COURSE\n>", "<|im_end|>", "<|end|>", "<|system|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "<start_of_turn>", "<end_of_turn>",
        "</s>", "<eos>", "[INST]", "[/INST]", "<<SYS>>",
    ],
)  # fmt: skip
async def test_the_marks_of_prompts_in_a_course_lose_their_meaning_and_not_their_text(mark: str) -> None:
    prompt = (await asked({"content": f"Knots {mark} for climbers", "custom_instructions": f"Say {mark}"}))["prompt"]
    course, end, rest = prompt.partition("\n</course>\n")
    assert mark not in course
    assert f"{mark[1:]} for climbers" in course
    assert end
    assert mark not in rest or "course" in mark.lower()


@pytest.mark.parametrize("text", ["if a<b and b>c", "a[INSTALL]", "x <| y", "p < s > q", "List<s1>", "a || b"])
async def test_what_only_looks_like_a_mark_stays(text: str) -> None:
    assert text in (await asked({"content": text}))["prompt"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "nonsense"])
async def test_an_encoded_body_is_a_415(encoding: str) -> None:
    async with serving() as service:
        response = await ask(service, headers=[("content-encoding", encoding)])
        assert (response.status, response.headers["accept-encoding"]) == (415, "identity")
        assert (await ask(service, headers=[("content-encoding", "Identity")])).status == 200
        for path, media_type in (("/extract", "text/plain"), ("/generate", "multipart/form-data; boundary=x")):
            headers = [("content-type", media_type), ("content-encoding", encoding)]
            assert (await ask(service, b"Knots and ropes.", path, headers=headers)).status == 415


# --- slow markup ---


@pytest.mark.slow
@pytest.mark.alone
async def test_forty_slow_texts_of_one_client_do_not_delay_another() -> None:
    slow = orjson.dumps({"content": "[" * 240_000})
    async with serving(trusted_proxies="127.0.0.1") as service, await service.connect() as connection:
        headers = [("x-forwarded-for", "198.51.100.1"), ("content-type", "application/json")]
        streams = [await connection.request("POST", "/generate", headers, slow) for _ in range(40)]
        started = time.monotonic()
        other = [("x-forwarded-for", "198.51.100.2")]
        assert (await ask(service, {"content": "<p>Knots for <b>climbers</b></p>"}, headers=other)).status == 200
        assert time.monotonic() - started < 1
        statuses = [(await connection.response(stream, 30)).status for stream in streams]
        assert set(statuses) <= {200, 413, 422, 429}
        assert 429 in statuses


async def test_a_text_that_is_parsed_too_long_is_a_422_and_its_parser_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = spied(monkeypatch)
    monkeypatch.setattr(dccapi, "TEXT_TIMEOUT", 0.001)
    async with serving(new_readers=True) as service:
        response = await ask(service, {"content": "<p>Knots</p>"})
        assert (response.status, response.json()["error_code"]) == (422, "document_too_slow")
        monkeypatch.setattr(dccapi, "TEXT_TIMEOUT", 5)
        assert (await ask(service, {"content": "<p>Knots</p>"})).status == 200
        assert parsers[0].returncode is not None or len(parsers) == 1


async def test_a_parser_that_was_killed_while_it_had_nothing_to_do_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsers = spied(monkeypatch)
    async with serving(new_readers=True) as service:
        assert (await ask(service)).status == 200
        for parser in parsers:
            parser.kill()
            await parser.wait()
        assert (await ask(service)).status == 200


async def test_a_parser_without_memory_is_a_422(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed_reader(tmp_path, "__main__.py", "MAX_MEMORY = 2**29", "MAX_MEMORY = 2**20")
    (tmp_path / "hypercorn.toml").write_text((HERE / "hypercorn.toml").read_text())
    monkeypatch.setattr(dccapi, "HERE", tmp_path)
    async with serving(new_readers=True) as service:
        response = await ask(service, {"content": "<p>Knots</p>" * 10_000})
        assert (response.status, response.json()["error_code"]) == (422, "document_broken")


async def test_what_is_parsed_counts_as_in_flight_and_ends_with_its_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parsers = spied(monkeypatch)
    changed_reader(tmp_path, "__main__.py", "    _confine()\n", "    sys.stdin.read()\n")  # never answers
    (tmp_path / "hypercorn.toml").write_text((HERE / "hypercorn.toml").read_text())
    monkeypatch.setattr(dccapi, "HERE", tmp_path)
    async with serving(new_readers=True, max_per_client=1) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate", body={"content": "<p>Knots</p>"})
        await eventually(lambda: parsers)
        assert (await ask(service)).status == 429
        connection.reset(stream)
        await eventually(lambda: parsers[0].returncode is not None, what="the end of the parser")
        await eventually(lambda: not service.queue.waiting, what="the end of the request")
        monkeypatch.setattr(dccapi, "HERE", HERE)
        assert (await ask(service)).status == 200


def spied(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    """The child processes that are started from now on."""
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def spy(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(process := await start(*arguments, **options))
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spy)
    return started


async def test_a_sigterm_to_all_processes_does_not_end_one_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = spied(monkeypatch)
    async with serving(new_readers=True) as service:
        for _ in range(3):
            assert (await ask(service)).status == 200
            for parser in parsers:
                parser.terminate()
        assert {parser.returncode for parser in parsers} == {None}


async def test_without_room_for_its_body_a_request_is_refused_and_keeps_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    text = [("content-type", "text/plain")]
    async with serving(max_per_client=2) as service, client(service) as http1:
        for size in (100, 400_000) * 2:
            problem_in(await ask(service, b"x" * size, "/extract", headers=text), 503, "queue_full")
            answer = await http1.post("/extract", content=b"x" * size, headers=dict(text))
            assert (answer.status_code, answer.json()["error_code"]) == (503, "queue_full")
        await service.idle()
        assert (await ask(service)).status == 200


@pytest.mark.parametrize("died_before", [False, True])
async def test_what_a_killed_child_leaves_behind_is_waited_for(died_before: bool) -> None:
    """As process 1 of a container, which inherits it, is made one by prctl here."""
    libc, orphans = ctypes.CDLL(None), "import os, time; (pid := os.fork()) and print(pid, flush=True); time.sleep(0.2)"
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    try:
        child = await dccapi._started("-c", orphans)
        assert child.stdout
        orphan = int(await child.stdout.readline())
        if died_before:  # of too much memory
            child.kill()
            await child.wait()
        await dccapi._killed(child)
        with pytest.raises(ProcessLookupError):  # which a zombie does not raise
            os.kill(orphan, 0)
    finally:
        libc.prctl(36, 0)


# --- what is kept ---


async def test_finished_generations_keep_no_course_and_a_bounded_number_of_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as service:
        body = {"content": "Knots " * 4000, "max_tokens": 200}
        for _ in range(3):
            assert (await ask(service, body)).status == 200
        kept = list(service.queue._finished)
        assert len(kept) == 3
        assert not [one for one in kept if one.prompt]
        monkeypatch.setattr(dccapi, "MAX_FINISHED_BYTES", 2 * service.queue._finished[kept[0]] + 1)
        assert (await ask(service, body)).status == 200
        assert len(service.queue._finished) == 2
        assert (await ask(service, None, f"/generations/{kept[0].id}", "GET")).status == 404


async def test_a_client_that_leaves_while_it_waits_takes_its_course_along() -> None:
    async with serving(script=SLOW, max_concurrent_requests=1) as service, await service.connect() as busy:
        stream = await busy.request("POST", "/generate/stream", body=COURSE)
        await busy.headers(stream)
        await eventually(lambda: service.queue.running)
        gc.collect()
        gc.disable()
        try:
            async with await service.connect() as connection:
                await connection.request("POST", "/generate", body={"content": "Knots " * 2000})
                await eventually(lambda: any(waiting.prompt for waiting in service.queue.waiting))
            await eventually(lambda: not service.queue.waiting)
            await eventually(
                lambda: sum(isinstance(held, dccapi.GenerateRequest) for held in gc.get_objects()) == 1,
                what="the end of the course",
            )
        finally:
            gc.enable()


async def test_failed_generations_keep_no_course_in_their_tracebacks() -> None:
    async with serving(script=Script(drop_after=3)) as service:
        for path in ("/generate", "/generate/stream"):
            await ask(service, {"content": "Knots " * 4000}, path)
        await service.idle()
        gc.collect()
        assert len(service.queue._finished) == 2
        assert not [held for held in gc.get_objects() if isinstance(held, dccapi.Prompt | dccapi.GenerateRequest)]


async def test_a_generation_that_succeeded_as_it_was_cancelled_has_succeeded_for_its_key() -> None:
    async with serving() as service:
        closed = service.queue._closed

        def cancelled_last(generation: Any, *rest: Any) -> None:
            service.queue.end(generation, dccapi.Cancelled())
            closed(generation, *rest)

        service.queue._closed = cancelled_last  # type: ignore[method-assign]
        answers = [(await ask(service, headers=[("idempotency-key", "k")])).body for _ in range(2)]
        assert answers[0] == answers[1]
        assert len(service.engine.calls) == 1


@pytest.mark.parametrize("place", ["_expire", "end", "_record"])
async def test_a_worker_survives_a_fault_of_its_bookkeeping(place: str) -> None:
    async with serving(max_concurrent_requests=1) as service:
        method, faults = getattr(service.queue, place), iter([True])

        def faulty(*arguments: Any) -> Any:
            method(*arguments)
            if next(faults, False):
                raise KeyError(place)

        setattr(service.queue, place, faulty)
        first = await ask(service)
        assert first.status in (200, 500), first.body
        delattr(service.queue, place)
        assert (await ask(service)).status == 200
        assert not service.queue.running


async def test_a_fault_of_the_queue_loses_no_badge_that_is_written() -> None:
    gate = asyncio.Event()
    async with serving(max_concurrent_requests=1, script=Script(gate=gate)) as service:
        answer = asyncio.create_task(ask(service))
        await service.engine.wait_for_calls(1)

        def faulty() -> None:
            del service.queue._dispatch  # type: ignore[method-assign]
            raise KeyError

        service.queue._dispatch = faulty  # type: ignore[method-assign]
        gate.set()
        assert (await answer).status == 200
        assert (await ask(service)).status == 200


async def test_where_no_process_can_be_started_that_reads_the_client_is_asked_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def started(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(dccapi, "_started", started)
    lines: list[str] = []
    async with serving(new_readers=True) as service:
        with logging_into(lines):
            problem_in(await ask(service), 503, "queue_full")
            plain = [("content-type", "text/plain")]
            told = problem_in(await ask(service, b"knots", "/extract", headers=plain), 503, "queue_full")
    assert "(Resource temporarily unavailable)" in told["detail"]
    assert sum("BlockingIOError, raised at" in line for line in lines) == 2


# --- the embedded engine's child ---

CHILD = """
import sys
print("{url}", flush=True)
sys.stdin.read()
"""


async def test_the_embedded_engine_is_started_again_and_says_until_then_why_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start, faults, lines = asyncio.create_subprocess_exec, iter([OSError(errno.EMFILE, "Too many open files")]), []

    async def unlucky(*arguments: Any, **options: Any) -> Any:
        if fault := next(faults, None):
            raise fault
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", unlucky)
    (tmp_path / "hypercorn.toml").write_text((HERE / "hypercorn.toml").read_text())
    monkeypatch.setattr(dccapi, "HERE", tmp_path)
    async with ScriptedOpenAI() as server:
        (tmp_path / "dccapi.py").write_text(CHILD.format(url=server.base_url.removesuffix("/v1")))
        settings = dccapi.Settings(engine="embedded", model_path=Path(__file__), model_name="phi4badges")
        engine = dccapi.EmbeddedEngine(settings)
        with logging_into(lines):
            await engine.start()
            try:
                for _ in range(2):  # which starts nothing
                    with pytest.raises(dccapi.EngineUnreachable, match="Too many open files"):
                        await engine.url()
                await eventually(lambda: engine._child)
                prompt = dccapi.build_prompt(dccapi.GenerateRequest(**COURSE), dccapi.Course(COURSE["content"]), "", {})
                pieces = [piece async for piece in engine.stream(prompt)]
                assert "".join(piece for piece in pieces if isinstance(piece, str)) == badge_json()
                engine._child.kill()
                await engine._child.wait()
                assert {await engine.url() for _ in range(2)} == {server.base_url}
                second = engine._child
                assert second.returncode is None
                second.kill()
                await eventually(lambda: engine._child is not second)  # nobody asks
            finally:
                await engine.stop()
            assert engine._child.returncode == -signal.SIGKILL
    told = {line for line in lines if "is started again: Too many open files" in line}
    assert len(told) == 1  # root's logger may have it too
    assert any("is started again: its process ended with -9" in line for line in lines)


async def test_an_embedded_engine_has_ended_when_its_output_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    until_told = 'print("http://127.0.0.1:9", flush=True)\nsys.stdin.readline()\nsys.stdin.readline()\n'
    (tmp_path / "dccapi.py").write_text(f"import os, sys, time\n{until_told}os.close(1)\ntime.sleep(60)\n")
    monkeypatch.setattr(dccapi, "HERE", tmp_path)
    engine = dccapi.EmbeddedEngine(dccapi.Settings(engine="embedded", model_path=Path(__file__)))
    await engine.start()
    try:
        assert await engine.url() == "http://127.0.0.1:9/v1"
        engine._child.stdin.write(b"\n")
        await eventually(lambda: not engine._said.done())  # who asks waits for the next one
        assert engine._child.returncode is None  # a large process takes a while to be gone
    finally:
        await engine.stop()


@pytest.mark.parametrize(
    ("does", "told"),
    [("os.kill(os.getpid(), 9)", "ended with -9"), ("os.write(1, b'mod\\xe8le\\n')", "mod.le")],
)
async def test_an_embedded_engine_that_fails_at_its_start_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: str, told: str
) -> None:
    (tmp_path / "dccapi.py").write_text(f"import os\n{does}\n")
    monkeypatch.setattr(dccapi, "HERE", tmp_path)
    engine = dccapi.EmbeddedEngine(dccapi.Settings(engine="embedded", model_path=Path(__file__)))
    await engine.start()
    first = engine._said
    try:
        for _ in range(2):  # one that waits already, and one that comes later
            with pytest.raises(dccapi.EngineUnreachable, match=told):
                await asyncio.wait_for(engine.url(), 10)
        assert engine._said is first  # it is not started again for everyone who asks
    finally:
        await engine.stop()

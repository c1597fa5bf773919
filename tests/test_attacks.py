"""Clients that want the service down, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from h2.errors import ErrorCodes
from hpack import Encoder

import dccapi
from service import COURSE, HERE, SLOW, Service, commands, events_of, serving, token
from testkit import (
    PREFACE,
    H2Client,
    Script,
    ScriptedOllama,
    Server,
    badge_json,
    eventually,
    flood_of_resets,
    frame,
    free_port,
    requests_and_resets,
    rss_kib,
    split,
    status_line,
    trusting_tls,
)


@contextlib.asynccontextmanager
async def process(limit: str = "", command: str = "python dccapi.py", **env: str) -> AsyncIterator[tuple[Server, int]]:
    """The service as a process, on a scripted engine that takes for ever, and its port."""
    port = free_port()
    line = [sys.executable, *commands(port)[command]]
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: SLOW
        url = f"http://127.0.0.1:{port}/livez"
        shell = ["-c", f'{limit or ":"}; exec "$@"', "sh", *line]
        async with Server(shell, {"OLLAMA_URL": ollama.url, **env}, url, HERE, "/bin/sh") as server:
            yield server, port


# --- Resets ---


async def test_the_allowance_of_resets_is_that_of_the_address() -> None:
    async with serving() as service:
        async with await service.connect() as first:
            for _ in range(950):
                first.reset(await first.request("GET", "/livez"))
            assert (await first.response(await first.request("GET", "/livez"))).status == 200
        async with await service.connect() as second, await service.connect() as sibling:
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    second.reset(await second.request("GET", "/livez"))
            await asyncio.wait_for(second.closed.wait(), 2)
            assert second.goaway
            assert second.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM
            assert (await sibling.response(await sibling.request("GET", "/livez"))).status == 200


async def test_a_request_that_is_reset_before_it_starts_is_not_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    executed = []
    admit = dccapi.Guard.admit

    async def counted(self: dccapi.Guard, scope: Any, receive: Any, send: Any) -> None:
        executed.append(scope.get("path"))
        await admit(self, scope, receive, send)

    monkeypatch.setattr(dccapi.Guard, "admit", counted)
    async with serving() as service:
        heads, resets = requests_and_resets(200, "/generate/stream?content=knots")
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        executed.clear()
        writer.write(PREFACE + b"".join(one for pair in zip(heads, resets, strict=True) for one in pair))
        writer.write(frame(6, 0, b"12345678"))
        await asyncio.wait_for(reader.readuntil(b"12345678"), 5)
        await service.idle()
        writer.close()
    assert len(executed) <= 10, "only where a request and its reset were torn apart"


async def test_connections_whose_clients_have_left_are_gone_soon_however_many_they_are() -> None:
    heads, resets = requests_and_resets(100)
    async with serving() as service:
        began = time.process_time()
        for _ in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(PREFACE + b"".join(heads + resets))
            await asyncio.sleep(0)
            writer.close()

        def served() -> int:
            return sum("_server_callback" in repr(task) for task in asyncio.all_tasks())

        await eventually(lambda: not served(), 20, "the end of every connection")
        assert time.process_time() - began < 3


async def test_streams_that_the_server_has_to_reset_count_too() -> None:
    strange = [(":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/caf\u00e9")]
    encoder = Encoder()
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(PREFACE + b"".join(frame(1, 2 * number + 1, encoder.encode(strange), 5) for number in range(1500)))
        answer = await asyncio.wait_for(reader.read(-1), 10)
        assert answer.endswith(ErrorCodes.ENHANCE_YOUR_CALM.to_bytes(4))
        writer.close()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("torn", [False, True], ids=["each reset at once", "all reset at the end"])
async def test_fifty_connections_of_990_resets_leave_the_others_quick(torn: bool) -> None:
    async with process() as (server, port):
        before, slowest = rss_kib(server.pid), 0.0
        attacks = asyncio.gather(*(flood_of_resets(port, torn) for _ in range(50)))
        while not attacks.done():
            started = time.monotonic()
            assert " 200" in await status_line(f"http://127.0.0.1:{port}/livez")
            slowest = max(slowest, time.monotonic() - started)
        growth = rss_kib(server.pid) - before
        print(f"50 x 990: /livez at most {slowest * 1000:.0f} ms, {growth} KiB more")
        assert slowest < 0.5
        assert growth < 128 * 1024


# --- Connections ---


@pytest.mark.parametrize("env", [{"MAX_CONNECTIONS_PER_CLIENT": "100000"}, {"MAX_CONNECTIONS_PER_CLIENT": "20"}])
async def test_more_silent_connections_than_file_descriptors_leave_livez_alone(env: dict[str, str]) -> None:
    async with process("ulimit -n 128", **env) as (server, port), contextlib.AsyncExitStack() as stack:
        silent = []
        for number in range(300):
            silent.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
            if number % 20 == 0:
                assert " 200" in await asyncio.wait_for(status_line(f"http://127.0.0.1:{port}/livez"), 2)
        held = len(os.listdir(f"/proc/{server.pid}/fd"))
        assert held < (126 if env["MAX_CONNECTIONS_PER_CLIENT"] == "100000" else 60)
        told = [line for line in server.log if "connections are open" in line]
        assert 1 <= len(told) <= 2
        assert not [line for line in server.log if "Traceback" in line]


async def test_the_soft_limit_of_file_descriptors_is_raised_at_the_start() -> None:
    async with process("ulimit -S -n 64") as (server, _):
        assert len(set(resource.prlimit(server.pid, resource.RLIMIT_NOFILE))) == 1


async def test_behind_a_trusted_proxy_the_bound_on_connections_is_not_the_proxys() -> None:
    for proxies, left in (("127.0.0.1", 9), ("", 3)):
        async with serving(max_connections_per_client=3, trusted_proxies=proxies) as service:
            opened = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(9)]
            await eventually(lambda: len(dccapi.peer_of("").connections) == left, what="the bound")  # noqa: B023
            for _, writer in opened:
                writer.transport.abort()


@pytest.mark.parametrize(("blocks", "size"), [(1, 3_000), (1024, 3_000_000)])
async def test_a_full_disk_refuses_a_document_and_does_not_keep_the_service_from_stopping(
    blocks: int, size: int
) -> None:
    limited = process(f"ulimit -f {blocks}", PYTHONDONTWRITEBYTECODE="1")
    async with limited as (server, port), await H2Client.connect("127.0.0.1", port) as one:
        upload = await one.request("POST", "/extract", [("content-type", "text/plain")], b"x" * size)
        told = (await one.response(upload)).json()
        assert (told["error_code"], "(File too large)" in told["detail"]) == ("queue_full", True)
        await eventually(lambda: [line for line in server.log if "OSError, raised at" in line])
        assert await server.terminate(10) == 0


# --- Heads ---


HEADS = {
    "silence": b"",
    "no end": b"GET /livez HTTP/1.1\r\nx: ",
    "a preface": PREFACE,
    "no END_HEADERS": PREFACE + frame(1, 1, b"\x82", 1),
}


@pytest.mark.alone
@pytest.mark.parametrize("tls", [False, True])
async def test_a_head_that_never_ends_ends_its_connection(tls: bool) -> None:
    async with serving(head_timeout=0.5, tls=tls) as service:
        ends = await asyncio.gather(*(seconds_until_closed(service, beginning, tls) for beginning in HEADS.values()))
    assert {name: seconds for name, seconds in zip(HEADS, ends, strict=True) if not 0.3 < seconds < 2} == {}


async def seconds_until_closed(service: Service, beginning: bytes, tls: bool) -> float:
    context = trusting_tls() if tls else None
    if context and beginning.startswith(b"PRI"):
        context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, ssl=context)
    started = time.monotonic()
    writer.write(beginning)
    dribble = asyncio.create_task(drip(writer)) if beginning.endswith(b"x: ") else None
    with contextlib.suppress(OSError):
        while await asyncio.wait_for(reader.read(2**16), 3):
            pass
    if dribble:
        dribble.cancel()
    writer.transport.abort()
    return time.monotonic() - started


async def drip(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def test_a_client_that_is_silent_in_tls_is_let_go() -> None:
    async with serving(head_timeout=0.5, tls=True) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()


async def test_an_idle_keep_alive_and_an_open_stream_outlast_the_timeout_of_heads() -> None:
    script = Script(pieces=split(badge_json(narrative="Ties knots. " * 200)), delay=0.02)
    async with serving(head_timeout=0.3, script=script) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        for _ in range(2):
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"alive")
            until = time.monotonic() + 0.8
            while time.monotonic() < until:
                await token(connection, stream)
        writer.close()


# --- What is held ---


async def test_requests_that_arrive_in_part_are_held_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dccapi, "MAX_HELD_OF_ONE", 200_000)
    async with serving() as service, await service.connect() as connection:
        post = [("content-type", "application/json"), ("x-padding", "x" * 2000)]
        streams = [await connection.request("POST", "/generate", post, end_stream=False) for _ in range(8)]
        for stream in streams:
            await connection.send_data(stream, b"x" * 16_000)
        refused = [stream for stream in streams if connection._streams[stream].status or stream == streams[-1]]
        assert (await connection.response(refused[0])).json()["error_code"] == "queue_full"
        for _ in range(60):
            await connection.request("POST", "/generate", post, end_stream=False)
        await eventually(
            lambda: any(one.reset_code == ErrorCodes.REFUSED_STREAM for one in connection._streams.values())
        )
        for stream in list(connection._streams):
            if stream:
                connection.reset(stream)
        assert (await connection.response(await connection.request("POST", "/generate", body=COURSE))).status == 200


async def test_free_memory_is_given_back_while_the_service_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        trimmed = 0

        def malloc_trim(self, kept: int) -> None:
            Libc.trimmed += kept == 0

    monkeypatch.setattr(dccapi, "SWEEP_INTERVAL", 0.001)
    monkeypatch.setattr(dccapi, "TRIM_INTERVAL", 0.001)
    monkeypatch.setattr(dccapi.ctypes, "CDLL", lambda name: Libc())
    async with serving():
        await eventually(lambda: Libc.trimmed > 2, what="another trimming")


# --- GOAWAY ---


async def test_the_streams_of_a_client_that_says_goaway_finish() -> None:
    async with serving(script=Script(delay=0.01)) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await connection.send_raw(frame(7, 0, b"\0" * 8) + frame(8, 0, b"\0\0\1\0"))
        assert (await events_of(connection, stream))[-1]["data"]["type"] == "final"


async def test_the_streams_of_a_client_that_says_goaway_and_closes_end() -> None:
    async with serving(script=SLOW) as service:
        async with await service.connect() as connection:
            await token(connection, await connection.request("POST", "/generate/stream", body=COURSE))
            await connection.send_raw(frame(7, 0, b"\0" * 7 + b"\2"))
        await service.idle()


# --- The hypercorn command, and Ctrl-C ---


async def test_two_worker_processes_are_refused_in_words() -> None:
    line = ["-m", "hypercorn", "--workers", "2", "--bind", f"127.0.0.1:{free_port()}", "dccapi:app"]
    async with Server(line, {}, None, HERE) as server:
        await server.wait()  # with 0, by Hypercorn
        assert "one worker process only" in server.tail()


@pytest.mark.slow
async def test_without_its_configuration_a_stream_outlasts_a_thousand_requests() -> None:
    async with process(command="hypercorn dccapi:app") as (_, port), await H2Client.connect("127.0.0.1", port) as one:
        stream = await one.request("POST", "/generate/stream", body=COURSE)
        for _ in range(1100):
            assert (await one.response(await one.request("GET", "/livez"))).status == 200
        await token(one, stream)


@pytest.mark.parametrize("command", ["python dccapi.py", "hypercorn dccapi:app"])
async def test_the_second_ctrl_c_ends_it_at_once(command: str) -> None:
    async with (
        process(command=command, DRAIN_TIMEOUT="30") as (server, port),
        await H2Client.connect("127.0.0.1", port) as one,
    ):
        stream = await one.request("POST", "/generate/stream", body=COURSE)
        await token(one, stream)
        os.killpg(server.pid, signal.SIGINT)
        await asyncio.sleep(1.2)  # one Ctrl-C may arrive twice
        await token(one, stream)
        os.killpg(server.pid, signal.SIGINT)
        await server.wait(3)

"""HTTP/2 and HTTP/1.1 by clients that are slow, broken or hostile, and what Hypercorn does without our workarounds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h2.errors
import hypercorn.asyncio
import hypercorn.logging
import pytest
from h2.connection import H2Connection
from h2.events import ResponseReceived
from h2.settings import SettingCodes, Settings
from hpack import Encoder
from hypercorn.protocol.events import Body
from hyperframe.frame import DataFrame, PriorityFrame

import dccapi
from service import COURSE, HERE, SLOW, Service, ask, events_of, logging_into, named, serving, token
from testkit import (
    H2Client,
    Script,
    ScriptedOllama,
    Server,
    badge_json,
    badge_pieces,
    eventually,
    frame,
    free_port,
    rss_kib,
    split,
)

# --- Streams and bodies ---


async def test_a_refused_upload_leaves_its_siblings_undisturbed() -> None:
    async with serving(script=SLOW) as service, await service.connect() as connection:
        sibling = await connection.request("POST", "/generate/stream", body=COURSE)
        await token(connection, sibling)
        declared = [("content-type", "application/json"), ("content-length", "1000000")]
        for headers in (declared, declared[:1]):
            upload = await connection.request("POST", "/generate", headers, end_stream=False)
            if headers is not declared:
                await connection.send_data(upload, b"x" * 300_000)
            answer = await connection.response(upload, timeout=1)
            assert (answer.status, answer.json()["error_code"], answer.ended) == (413, "body_too_large", True)
            await connection.send_data(upload, b"x" * 700_000)
            await token(connection, sibling)
        assert not connection.closed.is_set()


async def test_an_http1_upload_that_is_refused_can_be_read_and_the_connection_used_again() -> None:
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 400000\r\n\r\n")
        writer.write(b"x" * 400_000)
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 1)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 5)
        assert b"HTTP/1.1 200 " in rest
        writer.close()
        await writer.wait_closed()


@pytest.mark.alone
async def test_a_slow_http1_upload_that_nobody_wants_is_answered_when_it_has_arrived() -> None:
    async with serving(body_timeout=0.6, max_body_bytes=1000) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        head = b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        writer.write(head + b"content-length: 4000\r\n\r\n")
        for _ in range(4):
            writer.write(b"k" * 1000)
            await asyncio.sleep(0.25)
        assert b" 404 " in await asyncio.wait_for(reader.readline(), 1)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"HTTP/1.1 200 " in await asyncio.wait_for(reader.read(), 5)
        writer.close()


@pytest.mark.alone
async def test_a_body_that_nobody_reads_does_not_hold_its_connection_up() -> None:
    async with serving(script=SLOW) as service, await service.connect() as connection:
        sibling = await connection.request("POST", "/generate/stream", body=COURSE)
        await token(connection, sibling)
        for path in ("/livez", "/generate/stream?content=knots", "/nothing"):
            unread = await connection.request("GET", path, end_stream=False)
            for _ in range(40):
                await connection.send_raw(DataFrame(unread, b"x" * 100).serialize())
            started = time.monotonic()
            alive = await connection.request("GET", "/livez")
            assert (await connection.response(alive)).status == 200
            assert time.monotonic() - started < 0.1
        await token(connection, sibling)


async def test_an_upload_whose_refusal_fits_no_window_does_not_hold_its_connection_up() -> None:
    async with serving() as service, await service.connect(initial_window=0) as connection:
        upload = await connection.request("POST", "/generate", [("content-length", "1000000")], end_stream=False)
        assert (await connection.headers(upload)).status == 413
        for _ in range(40):
            await connection.send_raw(DataFrame(upload, b"x" * 100).serialize())
        assert (await connection.headers(await connection.request("GET", "/livez"))).status == 200


@pytest.mark.alone
async def test_an_upload_that_goes_on_has_body_timeout_for_each_part_as_large_as_a_body() -> None:
    async with serving(body_timeout=0.6, max_body_bytes=1000) as service, await service.connect() as connection:
        upload = await connection.request("POST", "/extract", [("content-type", "text/plain")], end_stream=False)
        for _ in range(3):
            await connection.send_data(upload, b"knots " * 83 + b"xx")
            await asyncio.sleep(0.25)
        await connection.send_data(upload, b"", end_stream=True)
        assert (await connection.response(upload)).status == 200


@pytest.mark.alone
async def test_an_unfinished_body_is_refused_in_time() -> None:
    async with serving(body_timeout=0.2) as service, await service.connect() as connection:
        started = time.monotonic()
        unfinished = await connection.request("POST", "/generate", body=b'{"content"', end_stream=False)
        answer = await connection.response(unfinished)
        assert (answer.status, answer.json()["error_code"], answer.ended) == (408, "body_timeout", True)
        assert 0.15 < time.monotonic() - started < 1
        await connection.send_data(unfinished, b": 1}", end_stream=True)
        alive = await connection.request("GET", "/livez")
        assert (await connection.response(alive)).status == 200


@pytest.mark.alone
@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
async def test_a_client_with_a_closed_window_is_let_go_and_buffers_nothing(path: str) -> None:
    pieces = ["x" * 1000] * 200
    async with (
        serving(script=Script(pieces=pieces, delay=0.005), token_timeout=0.5) as service,
        await service.connect(initial_window=0) as connection,
    ):
        stalled = await connection.request("POST", path, body=COURSE | {"max_tokens": 4096})
        (call,) = await service.engine.wait_for_calls(1)
        if path == "/generate":  # nothing is written before the end, which no window takes
            await asyncio.wait_for(service.idle(), 5)
        else:
            started = time.monotonic()
            await asyncio.wait_for(call.closed_by_client.wait(), 2)
            assert time.monotonic() - started < 0.5 + 0.25
        answer = await connection.response(stalled)
        assert answer.reset_code == h2.errors.ErrorCodes.CANCEL
        await service.idle()


def protocol_of(connection: H2Client, kind: type = dccapi.GuardedH2Protocol) -> Any:
    """Hypercorn's side of a connection in this process."""
    port = connection._writer.get_extra_info("sockname")[1]
    (found,) = [thing for thing in gc.get_objects() if type(thing) is kind and thing.client[1] == port]
    return found


def served_connections() -> list[Any]:
    found = [thing for thing in gc.get_objects() if type(thing) is dccapi.GuardedTCPServer]
    return [thing for thing in found if not thing.writer.transport.is_closing()]


async def test_a_slow_reader_holds_one_write_at_a_time_and_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = split(badge_json(narrative="knots " * 600 + "end"), 400)
    handed = 0
    stream_send = dccapi.GuardedH2Protocol.stream_send

    async def counted(self: dccapi.GuardedH2Protocol, event: Any) -> None:
        nonlocal handed
        handed += len(event.data) if isinstance(event, Body) else 0
        await stream_send(self, event)

    monkeypatch.setattr(dccapi.GuardedH2Protocol, "stream_send", counted)
    async with (
        serving(script=Script(pieces=pieces)) as service,
        await service.connect(auto_window=False) as connection,
    ):
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await eventually(lambda: len(service.engine.calls) == 1 and service.engine.open_calls == 0)
        await connection.headers(stream)
        taken = connection._streams[stream]
        await eventually(lambda: taken.unacknowledged == 65535, what="a closed window")
        assert 65535 < handed < 65535 + dccapi.MAX_WRITE + 2 * 4096 + 1000
        connection.acknowledge()
        events = await events_of(connection, stream)
        assert "".join(token["content"] for token in named(events, "token")) == "".join(pieces)
        assert events[-1]["data"]["type"] == "final"


@pytest.mark.slow
async def test_1200_requests_beside_one_stream_on_one_connection() -> None:
    pieces = badge_pieces()
    async with serving(script=Script(pieces=pieces, delay=0.1)) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await connection.headers(stream)
        for _ in range(1200):
            alive = await connection.request("GET", "/livez")
            assert (await connection.response(alive)).status == 200
        assert not connection._streams[stream].ended, "the stream is to outlast them"
        events = await events_of(connection, stream)
        assert "".join(token["content"] for token in named(events, "token")) == "".join(pieces)
        assert events[-1]["data"]["type"] == "final"
        assert connection.goaway is None


async def test_requests_that_come_at_once_let_others_run_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    made, made_meanwhile = 0, 0
    create_stream = dccapi.GuardedH2Protocol._create_stream

    def look() -> None:
        nonlocal made_meanwhile
        made_meanwhile = made - 20

    async def counted(self: dccapi.GuardedH2Protocol, request: Any) -> None:
        nonlocal made
        made += 1
        if made == 20:  # with the first, the timer of the idle connection ends
            asyncio.get_running_loop().call_soon(look)
        await create_stream(self, request)

    monkeypatch.setattr(dccapi.GuardedH2Protocol, "_create_stream", counted)
    async with serving() as service, await service.connect() as connection:
        head = [(":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/livez")]
        for number in range(100):
            connection.h2.send_headers(1 + 2 * number, head, end_stream=True)
        connection.flush()
        await eventually(lambda: made == 100)
    assert made_meanwhile < 20


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_ten_thousand_resets_cost_the_others_nothing() -> None:
    port = free_port()
    async with (
        ScriptedOllama() as ollama,
        Server(
            ["dccapi.py", "--bind", f"127.0.0.1:{port}", "--certs", "absent"],
            {"OLLAMA_URL": ollama.url},
            f"http://127.0.0.1:{port}/livez",
            cwd=HERE,
        ) as server,
        await H2Client.connect("127.0.0.1", port) as sibling,
    ):
        ollama.script = lambda body, index: SLOW
        before = rss_kib(server.pid)
        slowest = 0.0
        attacking = True

        async def watch() -> None:
            nonlocal slowest
            while attacking:
                started = time.monotonic()
                assert (await sibling.response(await sibling.request("GET", "/livez"))).status == 200
                slowest = max(slowest, time.monotonic() - started)

        watcher = asyncio.create_task(watch())
        resets = connections = 0
        peak = before
        while resets < 10_000:
            connections += 1
            async with await H2Client.connect("127.0.0.1", port) as attacker:
                with contextlib.suppress(ConnectionError):
                    while resets < 10_000:
                        attacker.reset(await attacker.request("POST", "/generate/stream", body=COURSE))
                        resets += 1
                peak = max(peak, rss_kib(server.pid))
        attacking = False
        await watcher
        assert connections > 5, "a connection that resets over a thousand streams is closed"
        assert slowest < 0.5
        assert peak - before < 64 * 1024
        await eventually(lambda: ollama.open_calls == 0)
        async with asyncio.timeout(10):
            while True:
                health = (await sibling.response(await sibling.request("GET", "/health"))).json()
                if (health["active_requests"], health["queued_requests"]) == (0, 0):
                    break
        gc.collect()
        print(
            f"10,000 resets: {connections} connections, /livez at most {slowest * 1000:.0f} ms, "
            f"RSS {before} to {peak} KiB, then {rss_kib(server.pid)}"
        )


async def test_a_thousand_resets_are_a_clients_right_and_leave_nothing_behind() -> None:
    async with serving() as service, await service.connect() as connection:
        for _ in range(900):
            connection.reset(await connection.request("GET", "/health"))
        assert (await connection.response(await connection.request("GET", "/livez"))).status == 200
        protocol = protocol_of(connection)
        await eventually(lambda: not protocol.stream_buffers, what="no stream buffer")


async def test_more_streams_than_workers_and_queue_are_refused_not_killed() -> None:
    gate = asyncio.Event()
    settings = {"max_queue": 8, "max_per_client": 10_000}
    async with serving(script=Script(gate=gate), **settings) as service, await service.connect() as connection:
        connection.h2.remote_settings.max_concurrent_streams = 5000
        streams = [await connection.request("GET", "/generate/stream?content=knots") for _ in range(1200)]
        statuses = [(await connection.headers(stream)).status for stream in streams]
        assert statuses.count(200) == 12
        assert statuses.count(503) == 1188
        gate.set()
        for stream in streams[:12]:
            assert (await events_of(connection, stream))[-1]["data"]["type"] == "final"


async def test_priority_frames_disturb_nobody() -> None:
    async with serving(script=SLOW) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        for number in range(1500):
            frame = PriorityFrame(10_001 + 2 * number)
            frame.depends_on, frame.stream_weight, frame.exclusive = 0, 15, True
            await connection.send_raw(frame.serialize())
        await token(connection, stream)
        async with await service.connect() as other:
            assert (await other.response(await other.request("GET", "/livez"))).status == 200


async def test_data_after_the_end_of_a_request_frees_its_worker() -> None:
    async with serving(script=SLOW) as service, await service.connect() as connection:
        for path in ("/generate", "/generate/stream"):
            stream = await connection.request("POST", path, body=COURSE)
            calls = await service.engine.wait_for_calls(1 + len(service.engine.calls) * (path != "/generate"))
            await connection.send_raw(DataFrame(stream, b"more").serialize())
            await asyncio.wait_for(calls[-1].closed_by_client.wait(), 0.25)
            await service.idle()


async def test_every_response_ends_its_stream_large_ones_too() -> None:
    narrative = "knots " * 40_000
    script = Script(pieces=split(badge_json(narrative=narrative), 600))
    async with serving(script=script) as service, await service.connect() as connection:
        body = COURSE | {"max_tokens": 4096}
        answer = await connection.response(await connection.request("POST", "/generate", body=body))
        assert answer.ended
        assert len(answer.body) > 240_000
        stream = await connection.request("POST", "/generate/stream", body=body)
        answer = await connection.response(stream, timeout=20)
        assert answer.ended
        assert len(answer.body) > 10_000_000
        for path in ("/livez", "/nothing", "/openapi.json", "/"):
            for method in ("GET", "HEAD"):
                assert (await connection.response(await connection.request(method, path))).ended


@pytest.mark.parametrize("path", ["/nothing", "/extract"])
async def test_an_upload_is_held_in_part_whether_it_is_wanted_or_not(path: str) -> None:
    size = 8 * 2**20
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        kind = "text/plain" if path == "/extract" else "multipart/form-data; boundary=x"
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {size}\r\n\r\n"
        writer.write(head.encode())
        most = 0
        for _ in range(31):
            writer.write(b"k" * 262_144)
            await writer.drain()
            await asyncio.sleep(0)
            most = max(most, dccapi.peer_of("127.0.0.1").held)
        assert 2**14 < most < 4 * 262_144
        writer.write(b"k" * 262_144)
        assert (b" 404 " if path == "/nothing" else b" 200 ") in await asyncio.wait_for(reader.readline(), 10)
        await eventually(lambda: not dccapi.peer_of("127.0.0.1").held, what="nothing held")
        writer.close()
        await writer.wait_closed()


async def test_a_query_is_taken_up_to_the_length_of_a_head() -> None:
    async with serving() as service, await service.connect() as connection:
        answer = await connection.response(await connection.request("GET", "/generate/stream?content=" + "x" * 40_000))
        assert answer.status == 200


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "GET"), (":scheme", "http"), (":path", "/caf\u00e9"), (":authority", "x")],
        [(":method", "G\u00c9T"), (":scheme", "http"), (":path", "/livez"), (":authority", "x")],
        [(":method", "CONNECT"), (":authority", "x")],
    ],
    ids=["path", "method", "connect"],
)
async def test_a_strange_request_kills_no_sibling_and_logs_no_traceback(fields: list[tuple[str, str]]) -> None:
    lines: list[str] = []
    with logging_into(lines):
        async with serving(script=SLOW) as service, await service.connect() as connection:
            sibling = await connection.request("POST", "/generate/stream", body=COURSE)
            await connection.headers(sibling)
            connection.h2.config.validate_outbound_headers = False
            connection.h2.send_headers(3, fields, end_stream=True)
            connection.flush()
            await eventually(lambda: 3 in connection._streams and connection._streams[3].over)
            await token(connection, sibling)
    assert not [line for line in lines if "Traceback" in line]


@pytest.mark.slow
async def test_a_slow_reader_that_keeps_taking_is_not_let_go() -> None:
    script = Script(pieces=split(badge_json(narrative="knots " * 2000)), delay=0.001)
    async with (
        serving(script=script, token_timeout=0.6) as service,
        await service.connect(initial_window=4000, auto_window=False) as connection,
    ):
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        taken = connection._streams[stream]
        began = time.monotonic()
        # A frame of 16 KiB takes half the timeout, a write of 128 KiB four times it.
        while time.monotonic() - began < 3:
            await eventually(lambda: taken.unacknowledged or taken.over)
            assert not taken.over
            await asyncio.sleep(0.06)
            connection.h2.acknowledge_received_data(taken.unacknowledged, stream)
            taken.unacknowledged = 0
            connection.flush()


@contextlib.asynccontextmanager
async def wide_open(service: Service, path: str, count: int) -> AsyncIterator[tuple[socket.socket, H2Connection]]:
    """A client with windows that never close and a small socket buffer, which has asked for the same thing often."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", service.port))
        connection = H2Connection()
        windows = {SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1, SettingCodes.ENABLE_PUSH: 0}
        connection.local_settings = Settings(client=True, initial_values=windows)
        connection.initiate_connection()
        connection.increment_flow_control_window(2**31 - 1 - 65535)
        head = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        for _ in range(count):
            connection.send_headers(connection.get_next_available_stream_id(), head, end_stream=True)
        await loop.sock_sendall(client, connection.data_to_send())
        yield client, connection


@pytest.mark.slow
async def test_a_slow_but_steady_reader_loses_none_of_its_many_streams() -> None:
    """Streams that write at once, each on its own, wait for all that the others have written: over TOKEN_TIMEOUT."""
    streams, rate, gate = 60, 1_500_000, asyncio.Event()
    script = Script(pieces=split(badge_json(narrative="Ties six knots. " * 30), 400), gate=gate)
    async with serving(script=script, token_timeout=1.2) as service:
        accepted = (await ask(service, headers=[("prefer", "respond-async")])).json()
        async with wide_open(service, accepted["events"], streams) as (client, connection):
            await eventually(lambda: sum(len(one.followers) for one in service.queue.running) > streams)
            gate.set()
            loop = asyncio.get_running_loop()
            kinds, read, started = [], 0, loop.time()
            while len(kinds) < streams and (data := await loop.sock_recv(client, 32768)):
                read += len(data)
                events = [type(event).__name__ for event in connection.receive_data(data)]
                kinds += [kind for kind in events if kind in ("StreamEnded", "StreamReset")]
                await asyncio.sleep(max(0.0, started + read / rate - loop.time()))  # the pace, not a condition
        assert kinds == ["StreamEnded"] * streams
        assert read > streams * 60 * 1024


# --- Connections ---


def connections() -> int:
    """Hypercorn's, in this process."""
    return sum("_server_callback" in task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore


@pytest.mark.parametrize("protocol", ["h1", "h2"])
async def test_a_connection_that_its_client_closed_is_forgotten(protocol: str) -> None:
    async with serving() as service:
        for _ in range(5):
            if protocol == "h1":
                reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
                writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.readuntil(b"alive")
                writer.close()
                await writer.wait_closed()
            else:
                connection = await service.connect()
                await connection.response(await connection.request("GET", "/livez"))
                await connection.abort()
        await eventually(lambda: connections() == 0, what="the end of closed connections")


async def test_a_response_that_fails_in_the_middle_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = dccapi.EventEncoder.pending

    def broken(encoder: dccapi.EventEncoder) -> bytes:
        if encoder.seen:
            raise ArithmeticError
        return pending(encoder)

    monkeypatch.setattr(dccapi.EventEncoder, "pending", broken)
    async with serving() as service, await service.connect() as connection:
        answer = await connection.response(await connection.request("POST", "/generate/stream", body=COURSE))
        assert (answer.status, answer.ended, answer.reset_code) == (200, False, h2.errors.ErrorCodes.CANCEL)


async def test_a_connection_whose_last_stream_was_reset_is_idle_again() -> None:
    async with serving(script=SLOW) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await connection.headers(stream)
        (served,) = served_connections()
        accepted = served.writer.get_extra_info("socket")._sock
        assert accepted.ends_at == math.inf
        connection.reset(stream)
        await eventually(lambda: accepted.ends_at < math.inf, what="the time of keep_alive_timeout")


async def test_what_is_sent_over_a_tls_connection_that_is_lost_raises_nothing() -> None:
    async with serving(tls=True) as service, await service.connect(ssl=True):
        (served,) = served_connections()
        served.writer.transport._ssl_protocol._transport.abort()
        await eventually(lambda: connections() == 0, what="the end of the connection")
        for event in (dccapi.RawData(b"token"), dccapi.Updated(idle=False), dccapi.Updated(idle=True)):
            await served.protocol_send(event)


async def test_a_stop_ends_idle_connections_and_those_that_nobody_has_used() -> None:
    async with serving(script=SLOW, drain_timeout=0.1) as service:
        used, connection = await service.connect(), await service.connect()
        assert (await used.response(await used.request("GET", "/livez"))).status == 200
        stream = await connection.request("POST", "/generate", body=COURSE)
        await eventually(lambda: service.queue.running, what="a generation")
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 1
    assert (await connection.response(stream)).status == 503
    assert await asyncio.wait_for(reader.read(), 1) == b""
    writer.close()
    for one in (used, connection):
        await asyncio.wait_for(one.closed.wait(), 1)
        await one.abort()


async def test_a_stop_ends_a_connection_soon_that_becomes_idle_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: Any, **__: Any) -> dict[str, Any]:
        await asyncio.sleep(0.5)
        return {"content": "knots"}

    async with serving() as service:
        monkeypatch.setattr(service.queue.readers, "ask", read)
        connection = await service.connect()  # which is kept open in spite of GOAWAY
        stream = await connection.request("POST", "/extract", [("content-type", "text/plain")], b"knots")
        await eventually(lambda: service.queue.documents, what="a document")
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 2
    assert (await connection.response(stream)).status == 200
    await connection.abort()


async def test_a_stop_ends_a_connection_that_stays_busy_soon() -> None:
    async with serving(drain_timeout=0.1) as service:
        connection = await service.connect(initial_window=0)
        await connection.headers(await connection.request("GET", "/livez"))  # its body fits no window
        stopped = time.monotonic()
    assert 3 < time.monotonic() - stopped < 5
    await connection.abort()


async def test_a_request_that_comes_when_all_is_drained_is_refused_so_that_it_may_be_asked_elsewhere() -> None:
    async with serving() as service, await service.connect() as connection:
        (served,) = await eventually(served_connections)
        await served.context.terminated.set()
        answer = await connection.response(await connection.request("GET", "/livez"))
        assert answer.reset_code == h2.errors.ErrorCodes.REFUSED_STREAM
        late, writer = await asyncio.open_connection("127.0.0.1", service.port)
        assert await asyncio.wait_for(late.read(), 1) == b""  # Python 3.12 and later would wait for it without end
        writer.close()


async def test_a_tls_client_that_takes_no_part_in_closing_leaves_a_clean_log(monkeypatch: pytest.MonkeyPatch) -> None:
    close = dccapi.TCPServer._close

    async def timed_out(self: dccapi.TCPServer) -> None:
        await close(self)
        raise TimeoutError("SSL shutdown timed out")  # as asyncio does after 30 s

    monkeypatch.setattr(dccapi.TCPServer, "_close", timed_out)
    lines: list[str] = []
    with logging_into(lines):
        async with serving() as service:
            async with await service.connect() as connection:
                assert (await connection.response(await connection.request("GET", "/livez"))).status == 200
            await eventually(lambda: connections() == 0, what="the end of the connection")
    assert not [line for line in lines if '"WARNING"' in line or "Traceback" in line]


async def test_a_client_that_leaves_while_tls_begins_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    class Writer:
        def get_extra_info(self, name: str) -> None: ...  # as asyncio's, once its transport is gone

    arguments: Any = (None, asyncio.get_running_loop(), dccapi.Config(), None, {}, None, Writer())
    await dccapi.GuardedTCPServer(*arguments)
    assert not caplog.records


async def test_a_connection_that_broke_the_protocol_is_forgotten() -> None:
    async with serving() as service:
        connection = await service.connect()
        await connection.request("POST", "/generate")
        await connection.send_raw(frame(6, 3, b"12345678"))  # PING on a stream
        await connection.closed.wait()
        await connection.abort()
        await eventually(lambda: connections() == 0, what="the end of the connection")


@pytest.mark.parametrize("more", [b"", b"\n", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_an_http1_client_that_closes_its_side_when_it_has_asked_gets_an_answer_that_is_ready(more: bytes) -> None:
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + more)
        writer.write_eof()  # as `nc` does
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 2)
        writer.close()


async def test_pipelined_http1_requests_are_answered_in_order() -> None:
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET /no HTTP/1.1\r\nHost: x\r\n")
        for _ in range(3):
            assert b" 200 " in await reader.readuntil(b"\r\n")
            await reader.readuntil(b"alive")
            await reader.readuntil(b"}")
        writer.write(b"Connection: close\r\n\r\n")
        assert b" 404 " in await asyncio.wait_for(reader.read(), 2)
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("request_line", [b"GET /livez", b"CONNECT x"])
@pytest.mark.parametrize("setting", [b"AAA", b"AAMAAABk"])
async def test_nonsense_in_an_upgrade_to_h2c_leaves_nothing_behind(request_line: bytes, setting: bytes) -> None:
    lines: list[str] = []
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: " + setting
    with logging_into(lines):
        async with serving() as service:
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(request_line + b" HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n\r\n")
            await reader.readline()
            writer.transport.abort()
            await eventually(lambda: connections() == 0, what="the end of the connection")
    assert not [line for line in lines if "Traceback" in line]


async def test_a_stream_that_is_reset_while_it_waits_to_write_takes_none_of_its_frames_along() -> None:
    """A lost block of headers would spoil the header compression of all streams after it."""
    loop = asyncio.get_running_loop()
    async with serving() as service, wide_open(service, "/openapi.json", 120) as (client, connection):
        (served,) = await eventually(served_connections)
        # Each writes 150 KB, so what comes behind fifty of them waits until the client reads.
        await eventually(lambda: len(served.writer._protocol._drain_waiters) > 50, what="a full connection")

        async def ask(path: str) -> int:
            stream: int = connection.get_next_available_stream_id()
            head = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
            connection.send_headers(stream, head, end_stream=True)
            await loop.sock_sendall(client, connection.data_to_send())
            await eventually(lambda: stream in streams)
            return stream

        protocol = served.protocol.protocol
        streams = protocol.streams
        reset = await ask("/health")
        await eventually(lambda: protocol.connection.streams[reset].state_machine.headers_sent)
        connection.reset_stream(reset)
        await loop.sock_sendall(client, connection.data_to_send())
        await eventually(lambda: reset not in streams)
        last = await ask("/health")
        headers: dict[bytes, bytes] = {}
        while not headers:
            for event in connection.receive_data(await loop.sock_recv(client, 2**20)):
                if isinstance(event, ResponseReceived) and event.stream_id == last:
                    headers = dict(event.headers)
        assert headers[b":status"] == b"200"
        assert headers[b"content-type"] == b"application/json"


async def test_a_connection_that_takes_nothing_is_closed_with_all_its_streams(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = []

    async def record(*arguments: Any, **options: Any) -> None:
        faults.append(sys.exc_info())

    monkeypatch.setattr(hypercorn.logging.Logger, "exception", record)
    async with serving(token_timeout=0.4) as service:
        idle = len(asyncio.all_tasks())
        async with wide_open(service, "/openapi.json", 120):
            await eventually(lambda: len(asyncio.all_tasks()) > idle + 5, what="the requests")
            await eventually(lambda: not dccapi.peer_of("").connections, what="its end")
            await eventually(lambda: len(asyncio.all_tasks()) <= idle, what="the end of its streams")
    assert not faults
    assert not [record for record in caplog.records if record.name == "asyncio"]


# --- Violations of HTTP/2 ---


# What plain Hypercorn leaves behind ends with the loop of its test.
own_loop = pytest.mark.asyncio(loop_scope="function")


@contextlib.asynccontextmanager
async def plain_hypercorn(app: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[H2Client]:
    """A connection to an app on Hypercorn as it is published."""
    monkeypatch.setitem(vars(hypercorn.protocol), "H2Protocol", dccapi.H2Protocol)
    monkeypatch.setitem(vars(hypercorn.asyncio.run), "TCPServer", dccapi.TCPServer)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = dccapi.Config.from_mapping(bind=[f"fd://{listening.detach()}"], errorlog=None, graceful_timeout=0.1)
    dccapi.peer_of.cache_clear()
    stop = asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    server = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
    connection = await H2Client.connect("127.0.0.1", port)
    try:
        yield connection
    finally:
        await connection.abort()
        stop.set()
        await asyncio.wait({server}, timeout=0.2)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        while others:  # some of them wait for ever, which is the point, and some drop a cancellation
            for task in others:
                task.cancel()
            _, others = await asyncio.wait(others, timeout=0.5)


async def early(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan")
    if scope["path"] == "/unread":
        await asyncio.sleep(0.5)
    if scope["path"] == "/broken":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("given up")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


GET = [(":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/livez")]


def headers_frame(fields: list[tuple[str, str]], stream: int = 1, flags: int = 5) -> bytes:
    """END_HEADERS is 4, END_STREAM 1."""
    return frame(1, stream, Encoder().encode(fields, huffman=False), flags)


VIOLATIONS = {  # of RFC 9113, in the order of its sections, each after a valid connection preface
    "a frame larger than SETTINGS_MAX_FRAME_SIZE (4.2)": frame(0, 1, b"x" * 16385),
    "a broken header block (4.3)": frame(1, 1, b"\xff\xff\xff\xff\xff", 5),
    "an unknown frame type (4.1)": frame(22, 0, b"12345678"),
    "DATA on an idle stream (5.1)": frame(0, 1, b"x"),
    "RST_STREAM on an idle stream (5.1)": frame(3, 1, b"\0\0\0\0"),
    "WINDOW_UPDATE on an idle stream (5.1)": frame(8, 1, b"\0\0\0\1"),
    "CONTINUATION without HEADERS (6.10)": frame(9, 1, b"", 4),
    "HEADERS after the end of a stream (5.1)": headers_frame(GET) + headers_frame(GET),
    "an even stream id (5.1.1)": headers_frame(GET, 2),
    "a smaller stream id (5.1.1)": headers_frame(GET, 5) + headers_frame(GET, 3),
    "a stream that depends on itself (5.3.1)": frame(2, 1, b"\0\0\0\1\0"),
    "DATA on stream 0 (6.1)": frame(0, 0, b"x"),
    "padding as long as the frame (6.1)": headers_frame(GET, flags=4) + frame(0, 1, b"\x06test", 8),
    "HEADERS on stream 0 (6.2)": headers_frame(GET, 0),
    "PRIORITY on stream 0 (6.3)": frame(2, 0, b"\0\0\0\1\0"),
    "PRIORITY of a wrong length (6.3)": frame(2, 1, b"\0\0"),
    "RST_STREAM on stream 0 (6.4)": frame(3, 0, b"\0\0\0\0"),
    "RST_STREAM of a wrong length (6.4)": headers_frame(GET, flags=4) + frame(3, 1, b"\0\0"),
    "SETTINGS with ACK and a payload (6.5)": frame(4, 0, b"\0\3\0\0\0\1", 1),
    "SETTINGS on a stream (6.5)": frame(4, 1),
    "SETTINGS of a wrong length (6.5)": frame(4, 0, b"\0\3\0"),
    "ENABLE_PUSH of 2 (6.5.2)": frame(4, 0, b"\0\2\0\0\0\2"),
    "INITIAL_WINDOW_SIZE over the limit (6.5.2)": frame(4, 0, b"\0\4\x80\0\0\0"),
    "MAX_FRAME_SIZE under the limit (6.5.2)": frame(4, 0, b"\0\5\0\0\0\1"),
    "PUSH_PROMISE by a client (6.6)": frame(5, 1, b"\0\0\0\2", 4),
    "PING on a stream (6.7)": frame(6, 1, b"12345678"),
    "PING of a wrong length (6.7)": frame(6, 0, b"1234"),
    "GOAWAY on a stream (6.8)": frame(7, 1, b"\0" * 8),
    "WINDOW_UPDATE by 0 (6.9)": frame(8, 0, b"\0\0\0\0"),
    "WINDOW_UPDATE by 0 on a stream (6.9)": headers_frame(GET, flags=4) + frame(8, 1, b"\0\0\0\0"),
    "WINDOW_UPDATE of a wrong length (6.9)": frame(8, 0, b"\0\0"),
    "a window over the limit (6.9.1)": frame(8, 0, b"\x7f\xff\xff\xff"),
    "an upper-case header (8.2)": headers_frame([*GET, ("X-Upper", "1")]),
    "a connection header (8.2.2)": headers_frame([*GET, ("connection", "close")]),
    "te other than trailers (8.2.2)": headers_frame([*GET, ("te", "gzip")]),
    "an unknown pseudo header (8.3)": headers_frame([*GET, (":x", "1")]),
    "a response's pseudo header (8.3)": headers_frame([*GET, (":status", "200")]),
    "a pseudo header after others (8.3)": headers_frame([*GET[:3], ("a", "b"), GET[3]]),
    "no :method (8.3.1)": headers_frame(GET[1:]),
    "no :scheme (8.3.1)": headers_frame([GET[0], *GET[2:]]),
    "no :path (8.3.1)": headers_frame(GET[:3]),
    "an empty :path (8.3.1)": headers_frame([*GET[:3], (":path", "")]),
    "two :method (8.3.1)": headers_frame([GET[0], *GET]),
    "a wrong content-length (8.1.1)": headers_frame([*GET, ("content-length", "9")], flags=4) + frame(0, 1, b"x", 1),
}


@own_loop
async def test_violations_of_http2_are_answered_as_hypercorn_answers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of h2spec, which no registry here has: what plain Hypercorn gets right, the guarded one does too."""

    async def reaction(connection: H2Client, bytes_sent: bytes) -> list[str]:
        await connection.send_raw(bytes_sent)
        with contextlib.suppress(ConnectionError):
            await connection.send_raw(frame(6, 0, b"12345678"))  # its ACK says that all before was dealt with
        await eventually(lambda: connection.closed.is_set() or connection.pings, timeout=2)
        goaway = connection.goaway and f"GOAWAY {int(connection.goaway.error_code or 0)}"
        resets = [
            f"RST {stream.reset_code}" for stream in connection._streams.values() if stream.reset_code is not None
        ]
        return [*([goaway] if goaway else []), *resets, *(["closed"] if connection.closed.is_set() else [])]

    guarded, plain = {}, {}
    async with serving() as service:
        for name, violation in VIOLATIONS.items():
            async with await service.connect() as connection:
                guarded[name] = await reaction(connection, violation)
    for name, violation in VIOLATIONS.items():
        async with plain_hypercorn(early, monkeypatch) as connection:
            plain[name] = await reaction(connection, violation)
    assert guarded == plain
    assert sum(bool(answer) for answer in guarded.values()) >= len(VIOLATIONS) - 5


# --- What Hypercorn still does, so that a workaround does not outlive its reason ---


@own_loop
async def test_hypercorn_still_dies_of_data_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        stream = await connection.request("POST", "/", end_stream=False)
        await connection.response(stream)
        await connection.send_raw(DataFrame(stream, b"late").serialize())
        await asyncio.wait_for(connection.closed.wait(), 2)


@own_loop
async def test_hypercorn_still_stops_reading_behind_a_body_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        unread = await connection.request("POST", "/unread", end_stream=False)
        for _ in range(20):
            await connection.send_raw(DataFrame(unread, b"x").serialize())
        with pytest.raises(TimeoutError):
            await connection.response(await connection.request("GET", "/"), timeout=0.25)


async def test_hypercorn_still_lets_an_application_run_ahead_of_a_closed_window() -> None:
    buffer = hypercorn.protocol.h2.StreamBuffer(hypercorn.asyncio.run.WorkerContext.event_class)
    for _ in range(10):
        push = asyncio.create_task(buffer.push(b"x" * 2**16))
        await asyncio.sleep(0)
        assert await buffer.pop(0) == b""
        await asyncio.wait_for(push, 1)
    assert len(buffer.buffer) == 10 * 2**16


@own_loop
async def test_hypercorn_still_takes_any_number_of_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dccapi.Config, "keep_alive_max_requests", 10**9)
    async with plain_hypercorn(early, monkeypatch) as connection:
        for _ in range(1500):
            connection.reset(await connection.request("GET", "/"))
        assert (await connection.response(await connection.request("GET", "/"))).status == 200


@own_loop
async def test_hypercorn_still_starves_running_streams_at_its_limit_of_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dccapi.Config, "keep_alive_max_requests", 3)
    async with plain_hypercorn(early, monkeypatch) as connection:
        running = await connection.request("GET", "/unread")
        for _ in range(4):
            await connection.request("GET", "/")
        with pytest.raises((TimeoutError, ConnectionError)):
            await connection.response(running, timeout=1)


@own_loop
async def test_hypercorn_still_raises_at_a_thousand_priority_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        with contextlib.suppress(ConnectionError, OSError):
            for number in range(1100):
                await connection.send_raw(PriorityFrame(10_001 + 2 * number).serialize())
        await asyncio.wait_for(connection.closed.wait(), 2)


@own_loop
async def test_hypercorn_still_leaves_a_response_that_is_given_up_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        with pytest.raises(TimeoutError):
            await connection.response(await connection.request("GET", "/broken"), timeout=0.25)


async def test_hypercorn_still_shuts_down_without_asking_the_application() -> None:
    from hypercorn.utils import ShutdownError, raise_shutdown

    async def trigger() -> None: ...

    with pytest.raises(ShutdownError):
        await raise_shutdown(trigger)


async def test_hypercorn_still_raises_what_closing_a_tls_connection_raises() -> None:
    class Writer:
        def write_eof(self) -> None: ...

        def close(self) -> None: ...

        async def wait_closed(self) -> None:
            raise TimeoutError("SSL shutdown timed out")

    config: Any = dccapi.Config()
    arguments: Any = (None, asyncio.get_running_loop(), config, None, {}, None, Writer())
    with pytest.raises(TimeoutError):
        await dccapi.TCPServer(*arguments)._close()


async def test_hypercorn_still_takes_unknown_settings_in_silence(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("keep_alive_tiemout = 3\n")
    assert dccapi.Config.from_toml(tmp_path / "x.toml").keep_alive_tiemout == 3

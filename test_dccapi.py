"""Behaviour of dccapi, over real connections to a real Hypercorn, in the order of dccapi.py's sections.

The engine of most tests is scripted, for faults and for determinism; the last section runs the real embedded model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import h2.errors
import httpx
import hypercorn.asyncio
import orjson
import pytest
from aiohttp.http_exceptions import LineTooLong
from hyperframe.frame import DataFrame, PriorityFrame
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import dccapi
from testkit import (
    H2Client,
    Script,
    ScriptedEngine,
    ScriptedOllama,
    ScriptedOpenAI,
    Server,
    badge_json,
    badge_pieces,
    eventually,
    free_port,
    parse_sse,
    rss_kib,
    split,
    trusting_tls,
)

HERE = Path(__file__).resolve().parent
COURSE = {"content": "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."}
COURSES = [json.loads(line) for line in (HERE / "examples" / "courses.jsonl").read_text("utf-8").splitlines()]
MODEL = HERE / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SLOW = Script(pieces=badge_pieces() * 40, delay=0.02)


@dataclass
class Service:
    """dccapi on a real Hypercorn in this event loop, its scripted engine, and what tests look at."""

    port: int
    engine: ScriptedEngine
    queue: dccapi.GenerationQueue

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self, **options: Any) -> H2Client:
        return await H2Client.connect("127.0.0.1", self.port, **options)

    async def idle(self, timeout: float = 5) -> None:
        """Wait until nothing is left of any generation."""
        await eventually(lambda: not self.queue.running and not self.queue.waiting, timeout, "an idle queue")
        await eventually(lambda: self.engine.open_calls == 0, timeout, "no open engine call")


@contextlib.asynccontextmanager
async def serving(
    engine: ScriptedEngine | None = None, script: Any = None, tls: bool = False, **settings: Any
) -> AsyncIterator[Service]:
    async with engine or ScriptedOllama() as engine:
        if script is not None:
            engine.script = script if callable(script) else lambda body, index: script
        if isinstance(engine, ScriptedOpenAI):
            settings = {"engine": "openai", "openai_base_url": engine.base_url, **settings}
        app = dccapi.create_app(dccapi.Settings(**{"ollama_url": engine.url, "resume_grace": 0.2, **settings}))
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listening.getsockname()[1]
        config = dccapi.load_config(str(HERE / "hypercorn.toml"))
        config.bind = [f"fd://{listening.detach()}"]
        config.errorlog = None
        if tls:
            config.certfile, config.keyfile = certificate()
        stop = asyncio.Event()
        server = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
        await eventually(lambda: app.queue in dccapi.RUNNING or server.done(), what="the start")
        try:
            yield Service(port, engine, app.queue)
        finally:
            stop.set()
            await server


def certificate() -> tuple[str, str]:
    directory = HERE / "certs"
    dccapi.make_certificate(directory)
    return str(directory / "cert.pem"), str(directory / "key.pem")


def client(service: Service, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=service.url, timeout=20, **options)


async def events_of(connection: H2Client, stream: int, timeout: float = 20) -> list[dict[str, Any]]:
    return [event async for event in connection.events(stream, timeout)]


def named(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in events if event.get("data", {}).get("type") == kind]


# ---------------------------------------------------------------------------------------------------------------------
# Generations
# ---------------------------------------------------------------------------------------------------------------------


class OneCallEngine:
    """An engine in the hands of a state machine: it writes what it is told to, when it is told to."""

    defaults: dict[str, Any] = {}

    def __init__(self) -> None:
        self.calls: list[asyncio.Queue[Any]] = []

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def stream(self, prompt: dccapi.Prompt) -> AsyncIterator[Any]:
        said: asyncio.Queue[Any] = asyncio.Queue()
        self.calls.append(said)
        while True:
            entry = await said.get()
            if isinstance(entry, Exception):
                raise entry
            yield entry


class GenerationMachine(RuleBasedStateMachine):
    """Any interleaving of followers, leaving, resuming, cancelling, engine events and faults."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = OneCallEngine()
        self.settings = dccapi.Settings(
            max_concurrent_requests=2, resume_grace=1000, max_queue=1000, max_per_client=1000
        )
        self.queue = dccapi.GenerationQueue(self.settings, self.engine)  # type: ignore[arg-type]
        self.run(self.queue.start())
        self.made: list[dccapi.Generation] = []
        self.seen: dict[str, list[Any]] = {}
        self.following: list[tuple[Any, asyncio.Event, dccapi.Generation, list[Any]]] = []

    def run(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(awaitable)

    def settle(self) -> None:
        async def rounds() -> None:
            for _ in range(6):
                await asyncio.sleep(0)

        self.run(rounds())

    def chosen(self, number: int) -> dccapi.Generation | None:
        return self.made[number % len(self.made)] if self.made else None

    @rule()
    def submit(self) -> None:
        prompt = dccapi.Prompt("", "a", {}, {"max_tokens": 50})
        self.made.append(self.queue.submit(prompt, "client", "request"))
        self.settle()

    @rule(number=st.integers(0, 9), grace=st.sampled_from([0.0, 1000.0]), skip=st.integers(0, 3))
    def follow(self, number: int, grace: float, skip: int) -> None:
        if generation := self.chosen(number):

            async def enter() -> tuple[Any, asyncio.Event]:
                context = self.queue.following(generation, grace)
                return context, context.__enter__()

            context, changed = self.run(enter())
            start = min(skip, len(generation.log))
            self.following.append((context, changed, generation, list(generation.log[:start])))

    @rule(number=st.integers(0, 9))
    def read(self, number: int) -> None:
        if self.following:
            _, _, generation, read = self.following[number % len(self.following)]
            read += generation.log[len(read) :]

    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        if self.following:
            context, _, generation, _ = self.following.pop(number % len(self.following))

            async def exit() -> None:
                context.__exit__(None, None, None)

            self.run(exit())
            self.settle()
            alone = not any(other is generation for _, _, other, _ in self.following)
            if alone and generation.grace == 0:
                assert generation.outcome is not None, "nobody waits for it, and it goes on"

    @rule(number=st.integers(0, 9), reason=st.sampled_from([dccapi.Cancelled, dccapi.EngineTimeout]))
    def cancel(self, number: int, reason: type[dccapi.ApiError]) -> None:
        if generation := self.chosen(number):

            async def end() -> None:
                self.queue.end(generation, reason())

            self.run(end())
            if number % 2:
                self.settle()

    @rule(
        number=st.integers(0, 9),
        entry=st.one_of(
            st.text(max_size=5),
            st.sampled_from(
                [
                    badge_json(),
                    dccapi.Usage(5, 3, "stop"),
                    dccapi.Usage(5, 3, "length"),
                    dccapi.EngineError(),
                    RuntimeError("a bug"),
                ]
            ),
        ),
    )
    def engine_says(self, number: int, entry: Any) -> None:
        if self.engine.calls:
            self.engine.calls[number % len(self.engine.calls)].put_nowait(entry)
            self.settle()

    @invariant()
    def the_log_is_gapless_and_ends_once(self) -> None:
        for generation in self.made:
            ends = [entry for entry in generation.log if not isinstance(entry, str)]
            assert len(ends) <= 1
            assert not ends or generation.log[-1] is ends[0]
            seen = self.seen.setdefault(generation.id, [])
            assert generation.log[: len(seen)] == seen, "the log is append-only"
            self.seen[generation.id] = list(generation.log)
        for _, _, generation, read in self.following:
            assert read == generation.log[: len(read)]

    @invariant()
    def one_engine_call_a_generation(self) -> None:
        assert len(self.engine.calls) <= len(self.made)
        assert len(self.queue.running) <= 2

    def teardown(self) -> None:
        while self.following:
            self.leave(0)
        for generation in self.made:
            self.cancel(self.made.index(generation), dccapi.Cancelled)
        self.settle()
        assert all(generation.outcome is not None for generation in self.made)
        assert not self.queue.running
        assert not self.queue.waiting
        self.run(self.queue.stop())
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


GenerationMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyInterleavingKeepsTheLog = pytest.mark.filterwarnings("ignore::pytest.PytestWarning")(GenerationMachine.TestCase)


async def test_four_generations_run_at_once_and_the_fifth_waits() -> None:
    gate = asyncio.Event()
    async with serving(script=Script(gate=gate)) as service, await service.connect() as connection:
        streams = [await connection.request("POST", "/generate/stream", body=COURSE) for _ in range(5)]
        await service.engine.wait_for_calls(4)
        await eventually(lambda: service.queue.waiting == 1)
        waiting = connection.events(streams[4])
        assert await anext(waiting) == {"retry": 1000}
        assert (await anext(waiting))["data"]["position"] == 1
        assert service.engine.max_open_calls == 4
        gate.set()
        for stream in streams:
            assert (await events_of(connection, stream))[-1]["data"]["type"] == "final"
        assert service.engine.max_open_calls == 4


async def test_four_at_once_take_hardly_longer_than_one() -> None:
    script = Script(pieces=badge_pieces(), delay=0.01)
    async with serving(script=script) as service, await service.connect() as connection:

        async def seconds(count: int) -> float:
            started = time.monotonic()
            streams = [await connection.request("POST", "/generate", body=COURSE) for _ in range(count)]
            for stream in streams:
                assert (await connection.response(stream, timeout=20)).status == 200
            return time.monotonic() - started

        one = await seconds(1)
        assert await seconds(4) < 1.3 * one


async def test_multiplexing_off_means_one_generation_at_a_time() -> None:
    async with serving(enable_multiplexing=False) as service, client(service) as http:
        answers = await asyncio.gather(*(http.post("/generate", json=COURSE) for _ in range(3)))
        assert [answer.status_code for answer in answers] == [200] * 3
        assert service.engine.max_open_calls == 1


async def test_a_waiting_client_sees_its_position_until_it_runs() -> None:
    gates = [asyncio.Event() for _ in range(4)]
    scripts = [Script(gate=gate) for gate in gates]
    async with (
        serving(script=lambda body, index: scripts[min(index, 3)], max_concurrent_requests=1) as service,
        await service.connect() as connection,
    ):
        streams = [await connection.request("POST", "/generate/stream", body=COURSE) for _ in range(4)]
        last = await connection.request("POST", "/generate", body=COURSE | {"seed": 1})
        await eventually(lambda: service.queue.waiting == 4)
        for number, gate in enumerate(gates):
            gate.set()
            await service.engine.wait_for_calls(min(4, number + 2))
        assert (await connection.response(last)).headers["x-queue-position"] == "4"
        events = await events_of(connection, streams[3])
        positions = [event["data"]["position"] for event in events if event.get("event") == "queue"]
        assert positions == [3, 2, 1, 0]
        waits = [event["data"]["estimated_wait"] for event in events if event.get("event") == "queue"]
        assert waits[0] >= waits[1]
        assert waits[-1] == 0
        assert events[-1]["data"]["type"] == "final"


async def test_a_waiting_client_that_leaves_gives_its_place_up_at_once() -> None:
    gate = asyncio.Event()
    async with (
        serving(script=Script(gate=gate), max_concurrent_requests=1) as service,
        await service.connect() as connection,
    ):
        first, second, third = [await connection.request("POST", "/generate/stream", body=COURSE) for _ in range(3)]
        await eventually(lambda: service.queue.waiting == 2)
        connection.reset(second)
        await eventually(lambda: service.queue.waiting == 1, timeout=0.25)
        gate.set()
        assert (await events_of(connection, third))[-1]["data"]["type"] == "final"
        assert len(service.engine.calls) == 2


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    gate = asyncio.Event()
    async with (
        serving(script=Script(gate=gate), max_concurrent_requests=1, max_queue=1) as service,
        await service.connect() as connection,
    ):
        running = [await connection.request("POST", "/generate", body=COURSE) for _ in range(2)]
        await eventually(lambda: service.queue.waiting == 1)
        # In the middle of the upload: the body is never finished.
        refused = await connection.request("POST", "/generate", body=b"{", end_stream=False)
        answer = await connection.response(refused, timeout=1)
        assert (answer.status, answer.json()["error_code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        await connection.send_data(refused, b"x" * 100_000)
        health = await connection.request("GET", "/health")
        assert (await connection.response(health)).json()["queue_status"] == "full"
        gate.set()
        for stream in running:
            assert (await connection.response(stream)).status == 200


async def test_one_client_cannot_take_the_queue_from_the_others() -> None:
    gate = asyncio.Event()
    settings = {"max_per_client": 2, "api_keys": "ann:aaa,bob:bbb"}
    async with serving(script=Script(gate=gate), **settings) as service, await service.connect() as connection:
        ann, bob = [("x-api-key", "aaa")], [("authorization", "Bearer bbb")]
        running = [await connection.request("POST", "/generate", ann, body=COURSE) for _ in range(2)]
        await service.engine.wait_for_calls(2)
        refused = await connection.response(await connection.request("POST", "/generate", ann, body=COURSE))
        assert (refused.status, refused.json()["error_code"]) == (429, "too_many_requests")
        assert int(refused.headers["retry-after"]) >= 1
        running.append(await connection.request("POST", "/generate", bob, body=COURSE))
        gate.set()
        for stream in running:
            assert (await connection.response(stream)).status == 200


async def test_only_a_trusted_proxy_says_who_the_client_is() -> None:
    gate = asyncio.Event()
    for proxies, status in (("127.0.0.0/8", 200), ("", 429)):
        gate.clear()
        async with (
            serving(script=Script(gate=gate), max_per_client=1, trusted_proxies=proxies) as service,
            await service.connect() as connection,
        ):
            first = await connection.request("POST", "/generate", [("x-forwarded-for", "198.51.100.1")], body=COURSE)
            await service.engine.wait_for_calls(1)
            second = await connection.request("POST", "/generate", [("x-forwarded-for", "198.51.100.2")], body=COURSE)
            if status == 200:
                await service.engine.wait_for_calls(2)
            gate.set()
            assert (await connection.response(second)).status == status
            assert (await connection.response(first)).status == 200


# ---------------------------------------------------------------------------------------------------------------------
# Views of a generation
# ---------------------------------------------------------------------------------------------------------------------


async def test_an_event_stream_is_tokens_and_exactly_one_final() -> None:
    async with serving() as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        head = await connection.headers(stream)
        assert head.headers["content-type"] == "text/event-stream"
        assert head.headers["cache-control"] == "no-cache"
        assert head.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in head.headers
        events = await events_of(connection, stream)
        tokens = named(events, "token")
        assert "".join(token["content"] for token in tokens) == badge_json()
        assert tokens[-1]["accumulated"] == badge_json()
        assert all(token["done"] is False for token in tokens)
        assert [event["data"]["type"] for event in events if event.get("event") == "message"].count("final") == 1
        final = events[-1]["data"]
        assert final["content"] == json.loads(badge_json())
        assert final["usage"] == {
            "prompt_tokens": 467,
            "completion_tokens": len(tokens),
            "total_tokens": 467 + len(tokens),
        }
        numbers = [int(event["id"].rpartition(".")[2]) for event in events if event.get("event") == "message"]
        assert numbers == list(range(1, len(tokens) + 2))


async def test_accumulated_false_leaves_the_text_so_far_out() -> None:
    async with serving() as service, await service.connect() as connection:
        body = COURSE | {"accumulated": False}
        events = await events_of(connection, await connection.request("POST", "/generate/stream", body=body))
        assert named(events, "token")
        assert not any("accumulated" in token for token in named(events, "token"))


async def test_partial_events_grow_to_the_final_badge() -> None:
    async with serving(script=Script(delay=0.001)) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream?partial=true", body=COURSE)
        events = await events_of(connection, stream)
        badges = [event["data"]["badge"] for event in events if event.get("event") == "partial"]
        assert len(badges) > 5
        for before, after in zip(badges, badges[1:], strict=False):
            assert before != after
            assert set(before) <= set(after)
            assert after.get("badge_name", "").startswith(before.get("badge_name", ""))
        assert badges[-1] == events[-1]["data"]["content"]


async def test_comments_keep_a_waiting_stream_alive() -> None:
    gate = asyncio.Event()
    script = Script(gate=gate)
    async with serving(script=script, heartbeat=0.05) as service, await service.connect() as connection:
        events = connection.events(await connection.request("GET", "/generate/stream?content=knots"))
        comments = 0
        async for event in events:
            comments += "comment" in event
            if comments == 3:
                gate.set()
            if comments == 4:
                break
        assert comments >= 3


async def test_head_starts_no_generation() -> None:
    async with serving() as service, client(service) as http:
        answer = await http.head("/generate/stream", params=COURSE)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert not service.engine.calls


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
@pytest.mark.parametrize("way", ["reset", "close"])
@pytest.mark.parametrize("moment", ["before the first token", "in mid-stream"])
async def test_a_client_that_leaves_frees_its_worker(path: str, way: str, moment: str) -> None:
    gate = asyncio.Event()
    if moment == "in mid-stream":
        gate.set()
    script = Script(pieces=SLOW.pieces, delay=0.01, gate=gate)
    async with serving(script=script) as service:
        connection = await service.connect()
        stream = await connection.request("POST", path, body=COURSE)
        (call,) = await service.engine.wait_for_calls(1)
        if moment == "in mid-stream":
            await eventually(lambda: call.pieces_sent > 3)
        left = time.monotonic()
        if way == "reset":
            connection.reset(stream)
        else:
            await connection.abort()
        await asyncio.wait_for(call.closed_by_client.wait(), 1)
        await service.idle()
        assert time.monotonic() - left < 0.25
        if way == "reset":
            alive = await connection.request("GET", "/livez")
            assert (await connection.response(alive)).status == 200
        await connection.close()


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
async def test_an_http1_client_that_leaves_frees_its_worker(path: str) -> None:
    async with serving(script=SLOW) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        body = orjson.dumps(COURSE)
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(body), body))
        (call,) = await service.engine.wait_for_calls(1)
        await eventually(lambda: call.pieces_sent > 3)
        writer.transport.abort()
        await asyncio.wait_for(call.closed_by_client.wait(), 0.25)
        await service.idle()


async def test_a_dropped_eventsource_goes_on_without_a_gap_or_a_second_call() -> None:
    pieces = split(badge_json(), 60)
    async with serving(script=Script(pieces=pieces, delay=0.01)) as service:
        read: list[dict[str, Any]] = []
        last = ""
        path = "/generate/stream?content=knots"
        for cut in (10, 35, None):
            async with await service.connect() as connection:
                resume = [("last-event-id", last)] if last else []
                async for event in connection.events(await connection.request("GET", path, resume)):
                    if event.get("event") == "message":
                        read.append(event)
                        last = event["id"]
                    if cut and len(read) == cut:
                        break
                await connection.abort()
        tokens = named(read, "token")
        assert [token["content"] for token in tokens] == pieces
        assert [token["accumulated"] for token in tokens] == ["".join(pieces[: n + 1]) for n in range(len(pieces))]
        assert read[-1]["data"]["type"] == "final"
        assert len(service.engine.calls) == 1
        async with client(service) as http:
            for done in (last, "unknown.3", f"{last.partition('.')[0]}.99999", "nonsense", f"{last}x"):
                answer = await http.get(path, headers={"last-event-id": done})
                assert answer.status_code == 204, done
        assert len(service.engine.calls) == 1


async def test_an_eventsource_that_never_comes_back_ends_after_its_grace() -> None:
    async with serving(script=SLOW, resume_grace=0.15) as service:
        connection = await service.connect()
        await connection.request("GET", "/generate/stream?content=knots")
        (call,) = await service.engine.wait_for_calls(1)
        await eventually(lambda: call.pieces_sent > 2)
        left = time.monotonic()
        await connection.abort()
        await call.closed_by_client.wait()
        assert 0.14 < time.monotonic() - left < 0.5
        await service.idle()


async def test_an_asynchronous_generation_runs_to_its_end_alone() -> None:
    async with serving(script=Script(delay=0.002)) as service, client(service) as http:
        accepted = await http.post("/generate", json=COURSE, headers={"prefer": "respond-async"})
        assert accepted.status_code == 202
        assert accepted.json()["status"] in ("queued", "running")
        location = accepted.headers["location"]
        assert location == f"/api/v1/generations/{accepted.json()['id']}"
        await service.idle()
        state = (await http.get(location)).json()
        assert state["status"] == "succeeded"
        assert state["result"]["response"] == json.loads(badge_json())
        events = [event async for event in parse_sse((await http.get(accepted.json()["events"])).aiter_bytes())]
        assert events[-1]["data"]["type"] == "final"
        assert "".join(token["content"] for token in named(events, "token")) == badge_json()


async def test_delete_cancels_waiting_and_running_generations() -> None:
    async with serving(script=SLOW, max_concurrent_requests=1) as service, client(service) as http:
        running, waiting = [
            (await http.post("/generate", json=COURSE, headers={"prefer": "respond-async"})).json()["id"]
            for _ in range(2)
        ]
        (call,) = await service.engine.wait_for_calls(1)
        async with await service.connect() as connection:
            stream = await connection.request("GET", f"/generations/{running}/events")
            await connection.headers(stream)
            for id in (waiting, running):
                assert (await http.delete(f"/generations/{id}")).status_code == 204
            await asyncio.wait_for(call.closed_by_client.wait(), 0.25)
            last = (await events_of(connection, stream))[-1]["data"]
            assert (last["type"], last["error_code"]) == ("error", "cancelled")
        assert (await http.get(f"/generations/{waiting}")).json()["status"] == "cancelled"
        await service.idle()
        assert len(service.engine.calls) == 1
        assert (await http.get("/generations/unknown")).status_code == 404


async def test_an_idempotency_key_joins_the_running_or_finished_generation() -> None:
    gate = asyncio.Event()
    async with serving(script=Script(gate=gate)) as service, client(service) as http:
        headers = {"idempotency-key": "k-1"}
        first = asyncio.create_task(http.post("/generate", json=COURSE, headers=headers))
        await service.engine.wait_for_calls(1)
        second = asyncio.create_task(http.post("/generate", json=COURSE | {"accumulated": False}, headers=headers))
        conflict = await http.post("/generate", json=COURSE | {"seed": 2}, headers=headers)
        assert (conflict.status_code, conflict.json()["error_code"]) == (409, "idempotency_conflict")
        gate.set()
        assert (await first).json() == (await second).json()
        assert (await http.post("/generate", json=COURSE, headers=headers)).json() == (await first).json()
        assert len(service.engine.calls) == 1
        assert (await http.post("/generate", json=COURSE, headers={"idempotency-key": "k-2"})).status_code == 200
        assert len(service.engine.calls) == 2
        assert (await http.post("/generate", json=COURSE, headers={"idempotency-key": "x" * 256})).status_code == 422


async def test_an_idempotency_key_of_a_failed_generation_starts_a_new_one() -> None:
    scripts = [Script(drop_after=3), Script()]
    async with serving(script=lambda body, index: scripts[index]) as service, client(service) as http:
        headers = {"idempotency-key": "k"}
        assert (await http.post("/generate", json=COURSE, headers=headers)).status_code == 502
        assert (await http.post("/generate", json=COURSE, headers=headers)).status_code == 200


async def test_a_join_survives_the_first_client_leaving() -> None:
    gate = asyncio.Event()
    async with serving(script=Script(gate=gate)) as service, await service.connect() as connection:
        key = [("idempotency-key", "k")]
        first = await connection.request("POST", "/generate", key, body=COURSE)
        await service.engine.wait_for_calls(1)
        second = await connection.request("POST", "/generate/stream", key, body=COURSE)
        await connection.headers(second)
        connection.reset(first)
        gate.set()
        assert (await events_of(connection, second))[-1]["data"]["type"] == "final"
        assert len(service.engine.calls) == 1


async def test_finished_generations_are_kept_for_their_time_and_no_more_than_256() -> None:
    async with serving(result_ttl=0.3) as service, client(service) as http:
        for _ in range(3):
            await http.post("/generate", json=COURSE)
        assert len(service.queue._known) == 3
        await eventually(lambda: not service.queue._known)
    async with serving(script=Script(pieces=[badge_json()])) as service, client(service) as http:
        for _ in range(260):
            assert (await http.post("/generate", json=COURSE)).status_code == 200
        assert len(service.queue._known) == 256


# ---------------------------------------------------------------------------------------------------------------------
# Guard and Hypercorn: the rows of HTTP/2
# ---------------------------------------------------------------------------------------------------------------------


async def token(connection: H2Client, stream: int) -> dict[str, Any]:
    """The next token of a stream that goes on."""
    count = len(named([event async for event in _so_far(connection, stream)], "token"))
    async for event in connection.events(stream):
        if event.get("data", {}).get("type") == "token":
            count -= 1
            if count < 0:
                return event
    raise AssertionError("the stream has ended")


async def _so_far(connection: H2Client, stream: int) -> AsyncIterator[dict[str, Any]]:
    async def body() -> AsyncIterator[bytes]:
        yield (await connection.headers(stream)).body

    async for event in parse_sse(body()):
        yield event


def protocol_of(connection: H2Client, kind: type = dccapi.GuardedH2Protocol) -> Any:
    """Hypercorn's side of a connection in this process."""
    port = connection._writer.get_extra_info("sockname")[1]
    (found,) = [thing for thing in gc.get_objects() if type(thing) is kind and thing.client[1] == port]
    return found


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
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 1)
        writer.write(b"x" * 400_000)
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 5)
        assert b"HTTP/1.1 200 " in rest
        writer.close()
        await writer.wait_closed()


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


async def test_a_slow_reader_holds_one_write_at_a_time_and_misses_nothing() -> None:
    pieces = split(badge_json(narrative="knots " * 600), 400)
    async with serving(script=Script(pieces=pieces)) as service:
        async with await service.connect(auto_window=False) as connection:
            stream = await connection.request("POST", "/generate/stream", body=COURSE)
            await eventually(lambda: len(service.engine.calls) == 1 and service.engine.open_calls == 0)
            (buffer,) = protocol_of(connection).stream_buffers.values()
            assert 0 < len(buffer.buffer) < dccapi.MAX_WRITE + 2 * 4096 + 1000
            connection.acknowledge()
            events = await events_of(connection, stream)
            assert [token["content"] for token in named(events, "token")] == pieces
            assert events[-1]["data"]["type"] == "final"


async def test_1200_requests_beside_one_stream_on_one_connection() -> None:
    gate = asyncio.Event()
    pieces = badge_pieces()
    async with serving(script=Script(pieces=pieces, delay=0.03)) as service, await service.connect() as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await connection.headers(stream)
        for _ in range(1200):
            alive = await connection.request("GET", "/livez")
            assert (await connection.response(alive)).status == 200
        gate.set()
        events = await events_of(connection, stream)
        assert [token["content"] for token in named(events, "token")] == pieces
        assert events[-1]["data"]["type"] == "final"
        assert connection.goaway is None


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
        health = await sibling.response(await sibling.request("GET", "/health"))
        assert (health.json()["active_requests"], health.json()["queued_requests"]) == (0, 0)
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
        assert len(protocol.priority._streams) == 1  # its root


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
    async with serving(script=Script(pieces=split(badge_json(narrative=narrative), 600))) as service:
        async with await service.connect() as connection:
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


async def test_h2c_by_prior_knowledge_and_by_upgrade_and_http1_for_a_post() -> None:
    async with serving() as service:
        async with await service.connect() as connection:
            assert (await connection.response(await connection.request("GET", "/livez"))).status == 200
        upgrade = (
            b"host: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n"
        )
        for request, first in (
            (b"GET /livez HTTP/1.1\r\n" + upgrade + b"\r\n", b"HTTP/1.1 101"),
            (b"POST /generate HTTP/1.1\r\n" + upgrade + b"content-length: 2\r\n\r\n{}", b"HTTP/1.1 422"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(request)
            assert (await asyncio.wait_for(reader.readline(), 2)).startswith(first)
            writer.transport.abort()
            await asyncio.sleep(0)


async def test_tls_speaks_h2_by_alpn_and_http1_otherwise() -> None:
    async with serving(tls=True) as service:
        async with await service.connect(ssl=True) as connection:
            answer = await connection.response(await connection.request("POST", "/generate", body=COURSE))
            assert answer.status == 200
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{service.port}", verify=trusting_tls()) as http:
            answer = await http.get("/livez")
            assert (answer.status_code, answer.http_version) == (200, "HTTP/1.1")


async def test_a_query_that_is_too_long_is_refused_with_a_way_out() -> None:
    async with serving() as service, await service.connect() as connection:
        answer = await connection.response(await connection.request("GET", "/generate/stream?content=" + "x" * 40_000))
        assert (answer.status, answer.json()["error_code"]) == (414, "uri_too_long")
        answer = await connection.response(await connection.request("GET", "/generate/stream?content=" + "x" * 20_000))
        assert answer.status == 200


async def test_an_unforeseen_fault_shows_the_client_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as service, client(service) as http:
        service.queue.submit = None  # type: ignore
        answer = await http.post("/generate", json=COURSE, headers={"origin": "https://example.org"})
        assert answer.status_code == 500
        assert answer.json()["error_code"] == "internal_error"
        assert "Traceback" not in answer.text
        assert "NoneType" not in answer.text
        assert answer.headers["access-control-allow-origin"] == "*"


async def test_responses_carry_security_headers() -> None:
    async with serving() as service, client(service) as http:
        for path in ("/livez", "/nothing", "/"):
            headers = (await http.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert headers["referrer-policy"] == "no-referrer"


PYTHONS = [sys.executable, *os.environ.get("OTHER_PYTHONS", "").split()]


def commands(port: int) -> dict[str, list[str]]:
    bind = ["--bind", f"127.0.0.1:{port}"]
    return {
        "python dccapi.py": ["dccapi.py", *bind, "--certs", "absent"],
        "hypercorn dccapi:app": ["-m", "hypercorn", *bind, "dccapi:app"],
        "hypercorn --config": ["-m", "hypercorn", "--config", "hypercorn.toml", *bind, "dccapi:app"],
    }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("way", list(commands(0)))
@pytest.mark.parametrize(("sign", "drain_timeout"), [(signal.SIGTERM, 0.4), (signal.SIGINT, 20)])
async def test_a_stop_drains_and_exits_with_0(
    python: str, way: str, sign: signal.Signals, drain_timeout: float
) -> None:
    port = free_port()
    finishes = drain_timeout > 1
    gate = asyncio.Event()
    async with ScriptedOllama() as ollama:
        pieces = badge_pieces()
        ollama.script = lambda body, index: Script(pieces=pieces, delay=0.01 if finishes else 0.2)
        env = {"OLLAMA_URL": ollama.url, "DRAIN_TIMEOUT": str(drain_timeout), "MAX_CONCURRENT_REQUESTS": "1"}
        async with (
            Server(commands(port)[way], env, f"http://127.0.0.1:{port}/livez", cwd=HERE, python=python) as server,
            await H2Client.connect("127.0.0.1", port) as connection,
        ):
            running = await connection.request("POST", "/generate/stream", body=COURSE)
            waiting = await connection.request("POST", "/generate/stream", body=COURSE)
            await token(connection, running)
            await connection.headers(waiting)
            os.kill(server.pid, sign)
            told = (await events_of(connection, waiting))[-1]["data"]
            assert (told["type"], told["error_code"]) == ("error", "shutting_down")
            refused = await connection.response(await connection.request("POST", "/generate", body=COURSE))
            assert (refused.status, refused.json()["error_code"]) == (503, "shutting_down")
            last = (await events_of(connection, running))[-1]["data"]
            assert last["type"] == ("final" if finishes else "error")
            if not finishes:
                assert last["error_code"] == "shutting_down"
            gate.set()
            assert await server.wait(10) == 0
            assert "Traceback" not in "\n".join(server.log)
            await eventually(lambda: ollama.open_calls == 0)


async def test_a_worker_process_that_is_signalled_itself_drains_too() -> None:
    port = free_port()
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: Script(delay=0.01)
        async with (
            Server(
                commands(port)["hypercorn dccapi:app"],
                {"OLLAMA_URL": ollama.url},
                f"http://127.0.0.1:{port}/livez",
                cwd=HERE,
            ) as server,
            await H2Client.connect("127.0.0.1", port) as connection,
        ):
            running = await connection.request("POST", "/generate/stream", body=COURSE)
            await token(connection, running)
            os.killpg(server.pid, signal.SIGTERM)
            assert (await events_of(connection, running))[-1]["data"]["type"] == "final"
            assert await server.wait(10) == 0


@pytest.mark.parametrize("python", PYTHONS)
async def test_a_client_that_never_answers_cannot_hold_a_stop_up(python: str) -> None:
    certificate()
    port, cleartext = free_port(), free_port()
    binds = ["--bind", f"127.0.0.1:{cleartext}", "--tls-bind", f"127.0.0.1:{port}"]
    async with (
        ScriptedOllama() as ollama,
        Server(
            ["dccapi.py", *binds], {"OLLAMA_URL": ollama.url}, f"http://127.0.0.1:{cleartext}/livez", HERE, python
        ) as server,
    ):
        frozen = await H2Client.connect("127.0.0.1", port, ssl=True)
        await frozen.response(await frozen.request("GET", "/livez"))
        frozen._reading.cancel()
        frozen._writer.transport.pause_reading()  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", port)):  # and one that never begins its handshake
            assert await server.terminate(8) == 0
        await frozen.abort()
        assert "Traceback" not in "\n".join(server.log)


async def test_a_hundred_abrupt_closes_leave_a_clean_log() -> None:
    certificate()
    port, cleartext = free_port(), free_port()
    binds = ["--bind", f"127.0.0.1:{cleartext}", "--tls-bind", f"127.0.0.1:{port}"]
    env = {"MAX_PER_CLIENT": "100"}
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: Script(delay=0.01)
        env["OLLAMA_URL"] = ollama.url
        async with Server(["dccapi.py", *binds], env, f"http://127.0.0.1:{cleartext}/livez", HERE) as server:
            for number in range(100):
                if number % 5 == 0:
                    with socket.create_connection(("127.0.0.1", port)) as unfinished:
                        unfinished.sendall(b"\x16\x03\x01")
                        unfinished.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    continue
                connection = await H2Client.connect("127.0.0.1", port, ssl=True)
                if number % 5 == 1:
                    await connection.request("GET", "/livez")
                elif number % 5 == 2:
                    await connection.headers(await connection.request("POST", "/generate/stream", body=COURSE))
                elif number % 5 == 3:
                    await connection.response(await connection.request("GET", "/livez"))
                await connection.abort()
            await eventually(lambda: ollama.open_calls == 0)
            assert await server.terminate() == 0
            unusual = [line for line in server.log if " INFO dccapi: " not in line and "Running on" not in line]
            assert unusual == []


@pytest.mark.timeout(180)
async def test_a_thousand_eventsources_wait_in_the_queue() -> None:
    port = free_port()
    gate = asyncio.Event()
    env = {"MAX_QUEUE": "2000", "MAX_PER_CLIENT": "2000", "HEARTBEAT": "1"}
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: Script(pieces=[badge_json()], gate=gate)
        env["OLLAMA_URL"] = ollama.url
        async with Server(commands(port)["python dccapi.py"], env, f"http://127.0.0.1:{port}/livez", HERE) as server:
            before = rss_kib(server.pid)
            connections = [await H2Client.connect("127.0.0.1", port) for _ in range(10)]
            streams = []
            for number in range(1004):
                connection = connections[number % 10]
                streams.append(
                    (connection, await connection.request("GET", f"/generate/stream?content=knots+{number}"))
                )
            for connection, stream in streams:
                await connection.headers(stream, timeout=30)

            def waits(connection: H2Client, stream: int) -> bool:
                body = bytes(connection._streams[stream].body)
                return b'"position":' in body and b": heartbeat" in body

            await eventually(lambda: all(waits(*pair) for pair in streams), timeout=30, what="position and heartbeat")
            each = (rss_kib(server.pid) - before) / len(streams)
            print(f"{len(streams)} waiting streams: {each:.1f} KiB each")
            assert each < 64
            gate.set()
            for connection, stream in streams:
                assert (await events_of(connection, stream, 60))[-1]["data"]["type"] == "final"
            for connection in connections:
                await connection.close()
        assert len(ollama.calls) == 1004


def tasks_of_the_service() -> int:
    """The scripted engine's own are those of idle connections in the pool."""
    return sum("ScriptedEngine" not in repr(task) for task in asyncio.all_tasks())


@pytest.mark.timeout(180)
async def test_two_thousand_generations_half_of_them_abandoned_leave_nothing() -> None:
    choose = random.Random(7)
    faults = [
        {},
        {},
        {},
        {"drop_after": 5},
        {"error_line": "runner died"},
        {"end_without_done": True},
        {"status": 500, "error": "x"},
    ]

    def script(body: dict[str, Any], index: int) -> Script:
        return Script(split(badge_json(), 20), delay=0.001, first_delay=0.001, **choose.choice(faults))

    settings = {"max_concurrent_requests": 8, "max_per_client": 1000, "resume_grace": 0.05, "result_ttl": 1}
    settings["max_queue"] = 500
    async with serving(script=script, **settings) as service:
        tasks_before = tasks_of_the_service()
        gc.collect()
        before = rss_kib(os.getpid())
        outcomes: dict[str, int] = {}

        async def one(connection: H2Client, number: int) -> None:
            way = choose.choice(["/generate", "/generate/stream", "GET"])
            if way == "GET":
                stream = await connection.request("GET", f"/generate/stream?content=knots+{number}")
            else:
                stream = await connection.request("POST", way, body=COURSE)
            if choose.random() < 0.5:
                await asyncio.sleep(choose.choice([0, 0.002, 0.01, 0.05, 0.2]))
                connection.reset(stream)
                outcome = "abandoned"
            else:
                answer = await connection.response(stream, timeout=60)
                events = answer.headers.get("content-type") == "text/event-stream"
                outcome = f"{answer.status} {b'final' in answer.body}" if events else str(answer.status)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        for batch in range(20):
            async with await service.connect() as connection:
                await asyncio.gather(*(one(connection, 100 * batch + number) for number in range(100)))
        await service.idle(20)
        await eventually(lambda: tasks_of_the_service() <= tasks_before, what="no task left")
        await eventually(lambda: not service.queue._known, what="nothing remembered")
        gc.collect()
        growth = rss_kib(os.getpid()) - before
        print(f"2,000 generations: {outcomes}, RSS +{growth} KiB")
        assert sum(outcomes.values()) == 2000
        assert outcomes["abandoned"] > 800
        assert growth < 32 * 1024


def test_only_tested_pythons_and_one_worker_process_are_allowed() -> None:
    assert 'requires-python = ">=3.11,<3.14"' in (HERE / "pyproject.toml").read_text()
    config = dccapi.load_config(str(HERE / "hypercorn.toml"))
    assert config.workers == 1
    assert config.keep_alive_timeout >= 75


# -- what upstream still does, so that a workaround does not outlive its reason


@contextlib.asynccontextmanager
async def plain_hypercorn(app: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[H2Client]:
    """A connection to an app on Hypercorn as it is published."""
    monkeypatch.setitem(vars(hypercorn.protocol), "H2Protocol", dccapi.H2Protocol)
    monkeypatch.setitem(vars(hypercorn.protocol.h2), "StreamBuffer", dccapi.StreamBuffer)
    monkeypatch.setitem(vars(hypercorn.asyncio.run), "TCPServer", dccapi.TCPServer)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = dccapi.Config.from_mapping(bind=[f"fd://{listening.detach()}"], errorlog=None, graceful_timeout=0.1)
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
        for task in others:  # some of them wait for ever, which is the point
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


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


async def test_hypercorn_still_dies_of_data_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        stream = await connection.request("POST", "/", end_stream=False)
        await connection.response(stream)
        await connection.send_raw(DataFrame(stream, b"late").serialize())
        await asyncio.wait_for(connection.closed.wait(), 2)


async def test_hypercorn_still_stops_reading_behind_a_body_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        unread = await connection.request("POST", "/unread", end_stream=False)
        for _ in range(20):
            await connection.send_raw(DataFrame(unread, b"x").serialize())
        with pytest.raises(TimeoutError):
            await connection.response(await connection.request("GET", "/"), timeout=0.25)


async def test_hypercorn_still_lets_an_application_run_ahead_of_a_closed_window() -> None:
    buffer = dccapi.StreamBuffer(hypercorn.asyncio.run.WorkerContext.event_class)
    for _ in range(10):
        push = asyncio.create_task(buffer.push(b"x" * 2**16))
        await asyncio.sleep(0)
        assert await buffer.pop(0) == b""
        await asyncio.wait_for(push, 1)
    assert len(buffer.buffer) == 10 * 2**16


async def test_hypercorn_still_takes_any_number_of_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dccapi.Config, "keep_alive_max_requests", 10**9)
    async with plain_hypercorn(early, monkeypatch) as connection:
        for _ in range(1500):
            connection.reset(await connection.request("GET", "/"))
        assert (await connection.response(await connection.request("GET", "/"))).status == 200


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


async def test_hypercorn_still_raises_at_a_thousand_priority_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_hypercorn(early, monkeypatch) as connection:
        with contextlib.suppress(ConnectionError, OSError):
            for number in range(1100):
                await connection.send_raw(PriorityFrame(10_001 + 2 * number).serialize())
        await asyncio.wait_for(connection.closed.wait(), 2)


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


async def test_aiohttp_still_does_not_repeat_a_post_on_a_connection_just_closed() -> None:
    async with ScriptedOllama() as ollama, aiohttp.ClientSession() as session:
        ollama.script = lambda body, index: Script(close_on_reuse=index == 0)
        body = {"model": "phi4badges", "prompt": "x"}
        async with session.post(ollama.url + "/api/generate", json=body) as response:
            await response.read()
        with pytest.raises(aiohttp.ClientError):
            await session.post(ollama.url + "/api/generate", json=body)


async def test_aiohttp_still_refuses_long_lines() -> None:
    async with ScriptedOllama() as ollama, aiohttp.ClientSession() as session:
        ollama.script = lambda body, index: Script(raw_chunks=[b"x" * 600 * 1024 + b"\n"])
        async with session.post(ollama.url + "/api/generate", json={"model": "phi4badges", "prompt": "x"}) as response:
            with pytest.raises((ValueError, LineTooLong)):
                await response.content.readline()

"""Generations, their queue and their events: any order of what can happen, and load."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import example, given, settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import dccapi
import testkit
from service import COURSE, HERE, SLOW, ask, commands, events_of, pure, serving
from testkit import (
    H2Client,
    Script,
    ScriptedOllama,
    Server,
    badge_json,
    badge_pieces,
    eventually,
    free_port,
    rss_kib,
    split,
)

# --- Any order of events ---


class OneCallEngine:
    """An engine in the hands of a state machine: it writes what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {}
        self.context = None
        self.remark = ""
        self.sifts = self.is_tiny = False
        self.calls: list[asyncio.Queue[Any]] = []

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def stream(self, prompt: dccapi.Prompt) -> AsyncIterator[Any]:
        said: asyncio.Queue[Any] = asyncio.Queue()
        self.calls.append(said)
        while True:
            entry = await said.get()
            if isinstance(entry, Exception):
                raise type(entry)(*entry.args)  # a traceback would keep the prompt
            yield entry


class NoReaders:
    async def ask(self, task: str, client: str, **arguments: Any) -> dict[str, Any]:
        return {}

    async def stop(self) -> None: ...


class GenerationMachine(RuleBasedStateMachine):
    """Any interleaving of followers, leaving, resuming, cancelling, engine events and faults."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = OneCallEngine()
        self.settings = dccapi.Settings(
            max_concurrent_requests=2, resume_grace=1000, max_queue=1000, max_per_client=1000
        )
        self.queue = dccapi.GenerationQueue(self.settings, self.engine, NoReaders())  # type: ignore[arg-type]
        self.made: list[dccapi.Generation] = []
        self.seen: dict[str, tuple[list[str], Any]] = {}
        self.following: list[tuple[Any, asyncio.Event, dccapi.Generation, list[Any]]] = []
        self.may_come_back: set[dccapi.Generation] = set()

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
        prompt = dccapi.build_prompt(dccapi.GenerateRequest(content="a"), dccapi.Course("a"), "", {})

        async def enter() -> None:
            self.made.append(self.queue.submit("client", "request"))
            self.queue.ready(self.made[-1], prompt)

        self.run(enter())
        self.settle()

    @rule(number=st.integers(0, 9), grace=st.sampled_from([0.0, 1000.0]), skip=st.integers(0, 3))
    def follow(self, number: int, grace: float, skip: int) -> None:
        if generation := self.chosen(number):

            async def enter() -> tuple[Any, asyncio.Event]:
                context = self.queue.following(generation, grace)
                return context, context.__enter__()

            context, changed = self.run(enter())
            if grace:
                self.may_come_back.add(generation)
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
            if alone and generation not in self.may_come_back:
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
            seen, end = self.seen.get(generation.id, ([], None))
            assert generation.log[: len(seen)] == seen, "the log is append-only"
            assert end is None or (generation.outcome is end and generation.log == seen), "it has ended"
            self.seen[generation.id] = list(generation.log), generation.outcome
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
        self.run(self.queue.drain())
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


GenerationMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyInterleavingKeepsTheLog = pytest.mark.filterwarnings("ignore::pytest.PytestWarning")(GenerationMachine.TestCase)


# --- Queue and joins ---


async def test_one_key_makes_one_generation_of_long_courses_at_the_same_time() -> None:
    body = {"content": "Knots for climbers and more. " * 400}
    gate = asyncio.Event()
    script = Script(gate=gate, prompt_eval_count=3000)
    async with serving(script=script) as service, await service.connect() as connection:
        key = [("idempotency-key", "k")]
        streams = [await connection.request("POST", "/generate", key, body) for _ in range(4)]
        other = await connection.request("POST", "/generate", key, body | {"seed": 1})
        await service.engine.wait_for_calls(1)
        gate.set()
        answers = [await connection.response(stream) for stream in streams]
        told = await connection.response(other)
        if told.status == 409:  # whichever came first has the key
            assert len({answer.json()["request_id"] for answer in answers}) == 1
        else:
            assert {answer.status for answer in answers} == {409}
        assert len(service.engine.calls) == 1


@pytest.mark.alone
async def test_four_at_once_take_hardly_longer_than_one() -> None:
    script = Script(pieces=badge_pieces(), delay=0.01)
    async with serving(script=script) as service, await service.connect() as connection:

        async def seconds(count: int) -> float:
            started = time.monotonic()
            streams = [await connection.request("POST", "/generate", body=COURSE) for _ in range(count)]
            for stream in streams:
                assert (await connection.response(stream, timeout=20)).status == 200
            return time.monotonic() - started

        await seconds(4)  # the processes that read are started
        one = await seconds(1)
        assert await seconds(4) < 1.3 * one


async def test_an_asynchronous_generation_survives_the_grace_of_an_earlier_follower() -> None:
    async with serving(script=SLOW, resume_grace=0.2) as service, await service.connect() as connection:
        key = [("idempotency-key", "k")]
        first = await connection.request("POST", "/generate/stream", key, COURSE)
        await connection.headers(first)
        (generation,) = service.queue.running
        follower = await connection.request("GET", f"/generations/{generation.id}/events")
        await connection.headers(follower)
        connection.reset(first)
        connection.reset(follower)
        await eventually(lambda: len(generation.followers) == 1)
        prefer = [*key, ("prefer", "respond-async")]
        accepted = await connection.response(await connection.request("POST", "/generate", prefer, COURSE))
        assert accepted.status == 202
        await eventually(lambda: len(generation.followers) == 1, what="the end of the grace")
        assert generation.state == "running"


async def test_a_stop_leaves_a_slow_reader_time_for_its_last_events() -> None:
    pieces = split(badge_json(description="Ties knots. " * 900), 2000)
    async with serving(script=Script(pieces=pieces, delay=0.0002)) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=4096)
        writer.write(b"GET /generate/stream?content=Knots HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await eventually(lambda: [one for one in service.queue.known.values() if len(one.log) > 1500], 10)

        async def read() -> bytes:
            await asyncio.sleep(3.2)  # more than `drain_timeout` and 2 s
            return await reader.read()

        reading = asyncio.create_task(read())
    assert (await reading).endswith(b"\r\n0\r\n\r\n")
    writer.close()


async def test_streams_that_have_ended_and_requests_that_come_again_leave_nothing_behind() -> None:
    key = [("idempotency-key", "k"), ("prefer", "respond-async")]
    async with serving() as service, await service.connect() as connection:

        async def events() -> int:
            accepted = (await connection.response(await connection.request("POST", "/generate", key, COURSE))).json()
            streams = [await connection.request("GET", accepted["events"]) for _ in range(20)]
            for stream in streams:
                assert (await connection.response(stream)).status == 200
            # The grace of each stream is over; the asynchronous request stays.
            await eventually(lambda: all(len(one.followers) == 1 for one in service.queue.known.values()))
            gc.collect()
            return sum(isinstance(one, asyncio.Event) for one in gc.get_objects())

        await events()
        before = await events()
        for _ in range(8):
            after = await events()
        assert after < before + 6


async def test_a_client_that_leaves_long_after_an_eventsource_frees_its_worker_at_once() -> None:
    async with serving(script=SLOW, resume_grace=0.2) as service, await service.connect() as connection:
        first = await connection.request("POST", "/generate/stream", body=COURSE)
        (call,) = await service.engine.wait_for_calls(1)
        (generation,) = service.queue.running
        follower = await connection.request("GET", f"/generations/{generation.id}/events")
        await connection.headers(follower)
        connection.reset(follower)
        await eventually(lambda: len(generation.followers) == 1, what="the end of the grace")
        assert not call.closed_by_client.is_set()
        connection.reset(first)
        await asyncio.wait_for(call.closed_by_client.wait(), 0.15)


async def test_a_retry_with_its_key_right_after_leaving_starts_anew() -> None:
    async with serving(script=Script(delay=0.01)) as service, await service.connect() as connection:
        key = [("idempotency-key", "k")]
        first = await connection.request("POST", "/generate", key, COURSE)
        await service.engine.wait_for_calls(1)
        connection.h2.reset_stream(first, 8)  # leaves in one packet with what follows
        retry = await connection.response(await connection.request("POST", "/generate", key, COURSE))
        assert retry.status == 200, retry.body


# --- Events ---


JSON_VALUES = st.recursive(
    st.text() | st.integers(-(2**53), 2**53) | st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=3)
)


@pure
@given(
    data=st.dictionaries(st.text(), JSON_VALUES, max_size=4),
    id=st.from_regex(r"[A-Za-z0-9_-]{1,22}", fullmatch=True),
    seen=st.integers(0, 9999),
)
@example(data={"text": "\u2028and\u2029and\x85"}, id="a", seen=1)
def test_an_event_is_read_back_as_it_was_written(data: dict[str, Any], id: str, seen: int) -> None:
    parser = testkit.SseParser()
    encoder = dccapi.EventEncoder(dccapi.Generation("client", "request", id=id), dccapi.StreamOptions(), seen)
    written = encoder.event("queue", data) + encoder.event("final", data)
    events = [event for number in range(len(written)) for event in parser.feed(written[number : number + 1])]
    kinds = {"queue": "queue", "message": "final"}
    assert events == [
        {"id": f"{id}.{seen}", "event": name, "data": {"type": kind} | data} for name, kind in kinds.items()
    ]
    assert written.decode().splitlines() == written.decode().split("\n")[:-1], "as httpx reads lines"


@pure
@given(
    pieces=st.lists(st.text(min_size=1, max_size=9), max_size=12), seen=st.integers(0, 12), accumulated=st.booleans()
)
@example(pieces=["\u2028", "\x85", "\u2029"], seen=1, accumulated=True)
def test_accumulated_is_the_text_so_far_wherever_a_reader_starts(
    pieces: list[str], seen: int, accumulated: bool
) -> None:
    generation = dccapi.Generation("client", "request")
    for piece in pieces:
        generation.append(piece)
    seen = min(seen, len(pieces))
    encoder = dccapi.EventEncoder(generation, dccapi.StreamOptions(accumulated=accumulated), seen)
    parser, events = testkit.SseParser(), []
    while written := encoder.pending():
        events += parser.feed(written)
        assert written.decode().splitlines() == written.decode().split("\n")[:-1]
    assert [event["data"] for event in events] == [
        {"type": "token", "content": pieces[n], "done": False}
        | ({"accumulated": "".join(pieces[: n + 1])} if accumulated else {})
        for n in range(seen, len(pieces))
    ]


# --- Load ---


@pytest.mark.slow
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


@pytest.mark.slow
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
        await eventually(lambda: not service.queue.known, what="nothing remembered")
        gc.collect()
        growth = rss_kib(os.getpid()) - before
        print(f"2,000 generations: {outcomes}, RSS +{growth} KiB")
        assert sum(outcomes.values()) == 2000
        assert outcomes["abandoned"] > 800
        assert growth < 32 * 1024


# --- Courses that are read ---


async def test_each_eighth_place_goes_to_the_oldest() -> None:
    prompt = dccapi.build_prompt(dccapi.GenerateRequest(**COURSE), dccapi.Course(COURSE["content"]), "", {})
    async with serving(script=SLOW, max_concurrent_requests=1) as service:
        queue = service.queue
        submitted = [queue.submit("a client", str(number), urgency) for number, urgency in enumerate([6, *[1] * 8])]
        for generation in submitted:
            queue.ready(generation, prompt)
        while queue.running:
            queue.end(*queue.running, dccapi.Cancelled())
            await eventually(lambda: all(running.outcome is None for running in queue.running))
        order = sorted(submitted, key=lambda generation: generation.started)
        assert [int(generation.request_id) for generation in order] == [1, 2, 3, 4, 5, 6, 7, 0, 8]


async def test_a_document_that_is_read_at_a_stop_is_still_answered() -> None:
    async with serving() as service:
        with service.queue.reading("a client"):
            assert service.queue.documents == ["a client"]
            await service.queue.drain()
        assert service.queue.documents == []


async def test_a_document_that_is_read_holds_up_no_generation() -> None:
    async with serving() as service:
        with service.queue.reading("a client"):
            generation = service.queue.submit("another client", "request")
            prompt = dccapi.build_prompt(dccapi.GenerateRequest(**COURSE), dccapi.Course(COURSE["content"]), "", {})
            service.queue.ready(generation, prompt)
            assert generation.state == "running"
            service.queue.end(generation, dccapi.Cancelled())


async def test_a_generation_that_is_ended_while_its_course_is_read_keeps_none_of_it() -> None:
    async with serving() as service:
        generation = service.queue.submit("a client", "request")
        service.queue.end(generation, dccapi.Cancelled())
        prompt = dccapi.build_prompt(dccapi.GenerateRequest(**COURSE), dccapi.Course(COURSE["content"]), "", {})
        service.queue.ready(generation, prompt)
        assert generation.prompt is None


async def test_a_finished_badge_is_answered_also_while_documents_have_every_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dccapi, "TEXT_TIMEOUT", 1)
    gate = asyncio.Event()
    async with serving(script=Script(gate=gate), token_timeout=0.3) as service:
        asking = asyncio.create_task(ask(service))
        await eventually(lambda: service.engine.calls)
        for _ in range(dccapi.READERS):
            await service.queue.readers._free.acquire()
        gate.set()
        response = await asking
        assert (response.status, response.json()["review"]) == (200, None)

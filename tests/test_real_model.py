"""The real model: the embedded engine in its child process. Skipped where the model is absent, except in CI."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest

import dccapi
from service import (
    COURSE,
    COURSES,
    HERE,
    MODEL,
    children,
    commands,
    engines_of,
    events_of,
    named,
    needs_model,
    parse_badge,
    runs,
    texts_of,
)
from testkit import H2Client, Server, eventually, free_port

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def embedded(port: int, **env: str) -> AsyncIterator[Server]:
    environment = {"ENGINE": "embedded", "MODEL_PATH": str(MODEL), **env}
    command = commands(port)["python dccapi.py"]
    async with Server(command, environment, f"http://127.0.0.1:{port}/readyz", HERE, start_timeout=60) as server:
        yield server


@needs_model
@pytest.mark.timeout(600)
async def test_real_courses_become_valid_badges_over_h2c() -> None:
    port = free_port()
    async with embedded(port), await H2Client.connect("127.0.0.1", port) as connection:
        for course in COURSES:
            body = {"content": course["content"], "seed": 1, "partial": True}
            events = await events_of(connection, await connection.request("POST", "/generate/stream", body=body), 120)
            last = events[-1]["data"]
            assert last["type"] == "final", last
            badge = dccapi.Badge.model_validate(last["content"])
            assert parse_badge(json.dumps(last["content"])) == badge
            assert last["usage"]["prompt_tokens"] > 100
            assert last["usage"]["completion_tokens"] > 20
            assert last["model"] == MODEL.stem
            written = "".join(token["content"] for token in named(events, "token"))
            assert json.loads(written)["badge_name"].strip() == badge.badge_name
            partials = [event["data"]["badge"] for event in events if event.get("event") == "partial"]
            for before, after in itertools.pairwise(partials[:-1]):
                for name, text in texts_of(before).items():
                    assert texts_of(after)[name].startswith(text)
            assert partials[-1] == last["content"]
            assert last["achievement"]["name"] == badge.badge_name


@needs_model
@pytest.mark.timeout(300)
async def test_a_course_over_the_context_is_refused_with_the_figures() -> None:
    port = free_port()
    async with embedded(port, NUM_CTX="1024"), await H2Client.connect("127.0.0.1", port) as connection:
        for content in ("プログラミング入門。" * 300, "word " * 2000):
            body = {"content": content, "long_content": "refuse"}
            answer = await connection.response(
                await connection.request("POST", "/generate", body=body),
                timeout=120,
            )
            assert (answer.status, answer.json()["error_code"]) == (413, "content_too_long")
            assert answer.json()["prompt_tokens"] > answer.json()["context_tokens"] == 1024


@needs_model
@pytest.mark.timeout(300)
async def test_a_killed_engine_ends_its_generation_and_the_next_one_works() -> None:
    port = free_port()
    async with embedded(port) as server, await H2Client.connect("127.0.0.1", port) as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await anext(event async for event in connection.events(stream, 60) if named([event], "token"))
        (child,) = engines_of(server.pid)
        os.kill(child, signal.SIGKILL)
        last = (await events_of(connection, stream))[-1]["data"]
        assert (last["type"], last["error_code"]) == ("error", "engine_error")
        body = COURSE | {"seed": 1}
        answer = await connection.response(await connection.request("POST", "/generate", body=body), timeout=120)
        assert answer.status == 200
        assert engines_of(server.pid) != [child]


@needs_model
@pytest.mark.timeout(300)
async def test_a_sigterm_to_all_processes_lets_what_runs_finish() -> None:
    port = free_port()
    async with embedded(port) as server, await H2Client.connect("127.0.0.1", port) as connection:
        stream = await connection.request("POST", "/generate/stream", body=COURSE | {"seed": 1})
        await anext(event async for event in connection.events(stream, 60) if named([event], "token"))
        for process in (*children(server.pid), server.pid):  # as systemd does
            os.kill(process, signal.SIGTERM)
        assert (await events_of(connection, stream, 60))[-1]["data"]["type"] == "final"
        assert await server.wait() == 0


@needs_model
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
async def test_the_child_ends_with_us(sign: signal.Signals) -> None:
    port = free_port()
    async with embedded(port) as server:
        (child,) = engines_of(server.pid)
        assert runs(child)
        os.kill(server.pid, sign)
        await server.wait()
        await eventually(lambda: not runs(child), what="the end of the child")

"""More machines: examples/nginx.conf in a real nginx, before two engines and before two dccapi.

Skipped without nginx, except in CI. The last test runs against any OpenAI server that OPENAI_SERVER names.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import dccapi
from service import COURSE, COURSES, HERE, certificate, children, events_of, named, runs, serving
from testkit import (
    Call,
    H2Client,
    Script,
    ScriptedEngine,
    ScriptedOllama,
    ScriptedOpenAI,
    Server,
    badge_json,
    eventually,
    free_port,
    parse_sse,
    split,
    trusting_tls,
)

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
needs_nginx = pytest.mark.skipif(not NGINX and not os.environ.get("CI"), reason="needs nginx: apt-get install nginx")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

BADGE = json.loads(badge_json())
CLIENTS = [f"127.0.0.{number}" for number in range(11, 19)]  # as addresses of their own, which Linux gives


@dataclass
class Balancer:
    """A running nginx with the example's configuration."""

    process: Server
    config: Path
    access_log: Path
    engines_port: int  # its part 1
    port: int  # its part 2

    @property
    def engines_url(self) -> str:
        return f"http://127.0.0.1:{self.engines_port}"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def connect(self) -> H2Client:
        return await H2Client.connect("127.0.0.1", self.port, ssl=True)

    def client(self, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """HTTP/1.1, from an address of its own."""
        transport = httpx.AsyncHTTPTransport(local_address=address, verify=trusting_tls())
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=30)

    async def take_out(self, port: int) -> None:
        """As an operator would: mark a server `down` and reload. What runs goes on in the old workers."""
        text = self.config.read_text()
        assert text.count(f"127.0.0.1:{port} ") == 1
        self.config.write_text(text.replace(f"127.0.0.1:{port} ", f"127.0.0.1:{port} down "))
        old = set(children(self.process.pid))
        os.kill(self.process.pid, signal.SIGHUP)
        await eventually(lambda: set(children(self.process.pid)) - old, what="new workers")
        await eventually(lambda: not any(map(self._accepts, old)), what="the old workers to stop accepting")

    @staticmethod
    def _accepts(worker: int) -> bool:
        try:
            return runs(worker) and "shutting down" not in Path(f"/proc/{worker}/cmdline").read_text()
        except OSError:
            return False


@contextlib.asynccontextmanager
async def balancing(
    directory: Path, engines: Sequence[int] = (), replicas: Sequence[int] = ()
) -> AsyncIterator[Balancer]:
    """nginx as examples/nginx.conf says, with other addresses; where no replica is given, none listens."""
    engine_a, engine_b = engines
    replica_a, replica_b = replicas or (free_port(), free_port())
    engines_port, port = free_port(), free_port()
    certfile, keyfile = certificate()
    temporary = "".join(
        f"{kind}_temp_path {directory / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = (HERE / "examples" / "nginx.conf").read_text()
    for ours, theirs in {
        "listen 10.0.0.1:11435;": f"listen 127.0.0.1:{engines_port};",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{port} ssl http2;",
        "server 10.0.0.11:11434 ": f"server 127.0.0.1:{engine_a} ",
        "server 10.0.0.12:11434 ": f"server 127.0.0.1:{engine_b} ",
        "server 10.0.0.21:8001 ": f"server 127.0.0.1:{replica_a} ",
        "server 10.0.0.22:8001 ": f"server 127.0.0.1:{replica_b} ",
        "/etc/ssl/dccapi/cert.pem": certfile,
        "/etc/ssl/dccapi/key.pem": keyfile,
        "access_log /var/log/nginx/access.log": f"access_log {directory / 'access.log'}",
        "error_log /var/log/nginx/error.log;": "error_log stderr;",
        "error_log /var/log/nginx/error.log crit;": "error_log stderr crit;",
        "\nhttp {": "\nhttp {\n" + temporary,
    }.items():
        assert config.count(ours) == 1, ours
        config = config.replace(ours, theirs)
    path = directory / "nginx.conf"
    path.write_text(config)
    main = f"daemon off; pid {directory / 'nginx.pid'};"
    async with Server(["-e", "stderr", "-c", str(path), "-g", main], {}, None, python=NGINX or "nginx") as process:
        for listening in (engines_port, port):
            await connected(listening, process)
        yield Balancer(process, path, directory / "access.log", engines_port, port)


async def connected(port: int, process: Server) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"nginx does not listen:\n{process.tail()}")


@dataclass
class Fleet:
    """Two scripted engines behind nginx and, where a test asks for them, two dccapi behind the same."""

    engines: list[Any]
    nginx: Balancer
    ports: list[int]
    replicas: list[Server]


@contextlib.asynccontextmanager
async def two_engines(
    directory: Path, script: Any = None, dialect: type[ScriptedEngine] = ScriptedOllama, ports: Sequence[int] = ()
) -> AsyncIterator[Fleet]:
    async with dialect() as one, dialect() as other:
        for engine in (one, other):
            if script is not None:
                engine.script = lambda body, index: script
        async with balancing(directory, [one.port, other.port], ports) as nginx:
            yield Fleet([one, other], nginx, list(ports), [])


@contextlib.asynccontextmanager
async def two_replicas(directory: Path, script: Any = None, **settings: Any) -> AsyncIterator[Fleet]:
    ports = [free_port(), free_port()]
    async with two_engines(directory, script, ports=ports) as fleet, contextlib.AsyncExitStack() as stack:
        env = {"OLLAMA_URL": fleet.nginx.engines_url, "TRUSTED_PROXIES": "127.0.0.1"}
        env |= {name.upper(): str(value) for name, value in settings.items()}
        servers = [
            Server(
                ["dccapi.py", f"--bind=127.0.0.1:{port}", f"--certs={directory}"],
                env,
                f"http://127.0.0.1:{port}/livez",
                HERE,
            )
            for port in ports
        ]
        fleet.replicas += await asyncio.gather(*map(stack.enter_async_context, servers))
        yield fleet


def calls_of(fleet: Fleet) -> list[Call]:
    return [call for engine in fleet.engines for call in engine.calls]


def writing(engine: ScriptedEngine) -> list[Call]:
    """The calls that have had a token and are not at their end."""
    return [call for call in engine.calls if call.pieces_sent and not call.ended]


async def badge_or_error(connection: H2Client, number: int, attempts: int = 1) -> list[str]:
    """What each attempt at one badge came to, JSON and events by turns: "badge" or the error's code."""
    outcomes: list[str] = []
    while len(outcomes) < attempts and "badge" not in outcomes:
        if number % 2:
            stream = await connection.request("POST", "/generate", body=COURSE)
            response = await connection.response(stream, timeout=60)
            answer = response.json()
            outcomes.append("badge" if response.status == 200 else answer["error_code"])
            assert response.status != 200 or answer["response"] == BADGE
        else:
            stream = await connection.request("POST", "/generate/stream", body=COURSE)
            last = (await events_of(connection, stream, timeout=60))[-1]["data"]
            outcomes.append("badge" if last["type"] == "final" else last["error_code"])
            assert last["type"] != "final" or last["content"] == BADGE
    return outcomes


# ---------------------------------------------------------------- several engines


@contextlib.asynccontextmanager
async def behind(fleet: Fleet, **settings: Any) -> AsyncIterator[H2Client]:
    """A connection to a dccapi in this process, whose engine is the fleet."""
    address = {"ollama_url": fleet.nginx.engines_url, "openai_base_url": fleet.nginx.engines_url + "/v1"}
    unused = type(fleet.engines[0])()  # says which API it is
    async with serving(unused, **address, **settings) as service, await service.connect() as connection:
        yield connection


@needs_nginx
@pytest.mark.parametrize("dialect", [ScriptedOllama, ScriptedOpenAI])
async def test_when_an_engine_dies_under_200_requests_only_what_it_was_writing_fails_and_its_retry_is_a_badge(
    tmp_path: Path, dialect: type[ScriptedEngine]
) -> None:
    script = Script(pieces=split(badge_json(), 20), first_delay=0.02, delay=0.005)
    limits = {"max_concurrent_requests": 16, "max_queue": 200, "max_per_client": 200}
    async with two_engines(tmp_path, script, dialect) as fleet, behind(fleet, **limits) as connection:
        requests = [asyncio.create_task(badge_or_error(connection, number, 2)) for number in range(200)]
        dying = fleet.engines[0]
        await eventually(lambda: len(calls_of(fleet)) > 60 and len(writing(dying)) > 2, timeout=20)
        lost = len(writing(dying))
        await dying.stop()
        outcomes = await asyncio.gather(*requests)
    assert Counter(map(tuple, outcomes)) == {("badge",): 200 - lost, ("engine_error", "badge"): lost}


@needs_nginx
async def test_calls_go_where_the_fewest_are_running(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        two_engines(tmp_path, Script(gate=gate)) as fleet,
        behind(fleet, max_concurrent_requests=8) as connection,
    ):
        requests = [asyncio.create_task(badge_or_error(connection, number)) for number in range(8)]
        await eventually(lambda: len(calls_of(fleet)) == 8)
        assert [engine.open_calls for engine in fleet.engines] == [4, 4]
        gate.set()
        assert await asyncio.gather(*requests) == [["badge"]] * 8


@needs_nginx
async def test_the_share_of_a_dead_engine_waits_for_the_others(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        two_engines(tmp_path, Script(gate=gate)) as fleet,
        behind(fleet, max_concurrent_requests=16) as connection,
    ):
        await fleet.engines[0].stop()
        requests = [asyncio.create_task(badge_or_error(connection, number)) for number in range(16)]
        await eventually(lambda: fleet.engines[1].open_calls == 16)
        gate.set()
        assert await asyncio.gather(*requests) == [["badge"]] * 16


@needs_nginx
async def test_a_call_whose_engine_dies_before_the_first_token_moves_to_another_once(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with two_engines(tmp_path, Script(gate=gate)) as fleet, behind(fleet) as connection:
        request = asyncio.create_task(badge_or_error(connection, 0))
        await eventually(lambda: calls_of(fleet))
        first, second = fleet.engines if fleet.engines[0].calls else fleet.engines[::-1]
        await first.stop()
        await second.wait_for_calls(1)
        gate.set()
        assert await request == ["badge"]
        assert (len(first.calls), len(second.calls)) == (1, 1)


@needs_nginx
async def test_a_call_that_has_had_a_token_is_never_repeated(tmp_path: Path) -> None:
    async with two_engines(tmp_path, Script(stall_after=3)) as fleet, behind(fleet) as connection:
        request = asyncio.create_task(badge_or_error(connection, 0))
        await eventually(lambda: calls_of(fleet) and calls_of(fleet)[0].pieces_sent == 3)
        await (fleet.engines[0] if fleet.engines[0].calls else fleet.engines[1]).stop()
        assert await request == ["engine_error"]
        assert len(calls_of(fleet)) == 1


@needs_nginx
async def test_an_engine_that_refuses_gets_no_more_calls_and_its_refusals_become_badges(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as fleet, behind(fleet) as connection:
        fleet.engines[0].script = lambda body, index: Script(status=503, error="Loading model")
        for number in range(20):
            assert await badge_or_error(connection, number) == ["badge"]
        assert [len(engine.calls) for engine in fleet.engines] == [1, 20]


@needs_nginx
@pytest.mark.parametrize("dialect", [ScriptedOllama, ScriptedOpenAI])
async def test_without_any_engine_it_is_a_503_as_without_a_balancer(
    tmp_path: Path, dialect: type[ScriptedEngine]
) -> None:
    async with two_engines(tmp_path, None, dialect) as fleet, behind(fleet) as connection:
        for engine in fleet.engines:
            await engine.stop()
        assert await badge_or_error(connection, 0) == ["engine_unreachable"]
        response = await connection.response(await connection.request("POST", "/generate", body=COURSE))
        assert (response.status, response.headers["retry-after"]) == (503, "5")
        health = await connection.response(await connection.request("GET", "/health"))
        assert (health.status, health.json()["status"]) == (503, "unhealthy")


# ---------------------------------------------------------------- several replicas


@needs_nginx
async def test_tokens_come_one_by_one_through_both_balancers(tmp_path: Path) -> None:
    """The engine falls silent after thirty tokens: whatever buffers would hold them back."""
    async with (
        two_replicas(tmp_path, Script(stall_after=30)) as fleet,
        await fleet.nginx.connect() as connection,
        fleet.nginx.client() as client,
        client.stream("POST", "/generate/stream", json=COURSE) as over_http1,
    ):
        over_http2 = await connection.request("POST", "/generate/stream", body=COURSE)
        for events in (connection.events(over_http2), parse_sse(over_http1.aiter_bytes())):
            texts = (event["data"]["content"] async for event in events if event.get("event") == "message")
            async with asyncio.timeout(5):
                assert badge_json().startswith("".join([await anext(texts) for _ in range(3)]))


@needs_nginx
@pytest.mark.parametrize("tokens", [0, 3])
async def test_a_client_that_leaves_ends_the_engine_call_behind_both_balancers(tmp_path: Path, tokens: int) -> None:
    async with (
        two_replicas(tmp_path, Script(stall_after=tokens)) as fleet,
        await fleet.nginx.connect() as connection,
    ):
        stream = await connection.request("POST", "/generate/stream", body=COURSE)
        await eventually(lambda: calls_of(fleet) and calls_of(fleet)[0].pieces_sent == tokens)
        connection.reset(stream)
        await asyncio.wait_for(calls_of(fleet)[0].closed_by_client.wait(), 0.25)
        for engine in fleet.engines:
            engine.script = lambda body, index: Script()
        assert await badge_or_error(connection, 0) == ["badge"]
        assert len(calls_of(fleet)) == 2, "the first was not repeated"


async def follow(nginx: Balancer, address: str) -> list[str]:
    """The tokens that an EventSource gets whose network breaks after every five, each time on a new connection."""
    tokens: list[str] = []
    last = ""
    for _ in range(20):
        headers = {"last-event-id": last} if last else {}
        async with (
            nginx.client(address) as client,
            client.stream("GET", "/generate/stream", params=COURSE, headers=headers) as response,
        ):
            if response.status_code == 204:
                break
            before = len(tokens)
            async for event in parse_sse(response.aiter_bytes()):
                last = event.get("id", last)
                if event.get("event") == "message" and event["data"]["type"] == "token":
                    tokens.append(event["data"]["content"])
                if len(tokens) == before + 5:
                    break
    return tokens


@needs_nginx
async def test_each_client_resumes_at_its_replica_and_no_badge_is_generated_twice(tmp_path: Path) -> None:
    pieces = split(badge_json(), 38)
    script = Script(pieces=pieces, delay=0.02)
    async with two_replicas(tmp_path, script, max_concurrent_requests=8) as fleet:
        seen = await asyncio.gather(*(follow(fleet.nginx, address) for address in CLIENTS))
        assert ["".join(texts) for texts in seen] == ["".join(pieces)] * len(CLIENTS)
        assert len(calls_of(fleet)) == len(CLIENTS)
        assert all(f"127.0.0.1:{port} " in fleet.nginx.access_log.read_text() for port in fleet.ports)


@needs_nginx
async def test_an_asynchronous_generation_is_found_again_by_its_client(tmp_path: Path) -> None:
    async with two_replicas(tmp_path) as fleet:
        for address in CLIENTS:
            async with fleet.nginx.client(address) as client:
                accepted = await client.post("/generate", json=COURSE, headers={"prefer": "respond-async"})
            async with fleet.nginx.client(address) as client:
                response = await client.get(accepted.json()["events"])
                assert '"type":"final"' in response.text


@needs_nginx
async def test_the_limit_of_one_client_is_that_of_its_address_behind_the_balancer(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        two_replicas(tmp_path, Script(gate=gate), max_per_client=1) as fleet,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(fleet.nginx.client(address)) for address in CLIENTS]
        requests = []
        for client in clients:
            requests.append(asyncio.create_task(client.post("/generate", json=COURSE)))
            await eventually(lambda: len(calls_of(fleet)) == len(requests))
            # Whatever address it claims.
            forged = {"x-forwarded-for": "192.0.2.7"}
            assert (await client.post("/generate", json=COURSE, headers=forged)).status_code == 429
            if len(requests) == 4:
                break
        gate.set()
        assert [(await request).status_code for request in requests] == [200] * 4


@needs_nginx
async def test_the_longest_query_passes_and_no_log_holds_it(tmp_path: Path) -> None:
    course = "Zwetschgen" + "x" * 32_000
    path = "/generate/stream?content=" + course
    async with two_replicas(tmp_path, Script(drop_after=3)) as fleet, await fleet.nginx.connect() as connection:
        events = await events_of(connection, await connection.request("GET", path))
        assert events[-1]["data"]["error_code"] == "engine_error"
        assert course in calls_of(fleet)[0].body["prompt"]
        for replica in fleet.replicas:
            await replica.kill()
        assert (await connection.response(await connection.request("GET", path))).status == 503
        await eventually(lambda: "GET /generate/stream 503" in fleet.nginx.access_log.read_text())
        logged = fleet.nginx.access_log.read_text()
        assert "Zwetschgen" not in logged + "\n".join(fleet.nginx.process.log)


@needs_nginx
@pytest.mark.alone
async def test_a_replica_that_is_taken_out_and_stopped_under_load_costs_no_client_anything(tmp_path: Path) -> None:
    stopped = asyncio.Event()
    numbers = itertools.count()

    async def draw(nginx: Balancer, address: str) -> list[str]:
        """Badge after badge, each over a connection of its own, until the replica has ended and then two more."""
        outcomes: list[str] = []
        more = 2
        while more:
            more -= stopped.is_set()
            async with nginx.client(address) as client:
                path, whole = (("/generate", '"response":'), ("/generate/stream", '"type":"final"'))[next(numbers) % 2]
                response = await client.post(path, json=COURSE)
                outcomes.append("badge" if response.status_code == 200 and whole in response.text else response.text)
        return outcomes

    script = Script(pieces=split(badge_json(), 20), delay=0.02)
    async with two_replicas(tmp_path, script, max_concurrent_requests=8) as fleet:
        drawing = [asyncio.create_task(draw(fleet.nginx, address)) for address in CLIENTS]
        await eventually(lambda: len(calls_of(fleet)) > 2 * len(CLIENTS), timeout=20)
        await fleet.nginx.take_out(fleet.ports[0])
        assert await fleet.replicas[0].terminate() == 0
        stopped.set()
        outcomes = [outcome for one in await asyncio.gather(*drawing) for outcome in one]
        assert Counter(outcomes).keys() == {"badge"}
        assert any("draining" in line for line in fleet.replicas[0].log), "it was stopped under load"


@needs_nginx
async def test_a_replica_that_is_killed_is_a_clear_error_and_the_retry_a_badge(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        two_replicas(tmp_path, Script(gate=gate), max_concurrent_requests=8) as fleet,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(fleet.nginx.client(address)) for address in CLIENTS]
        requests = [asyncio.create_task(client.post("/generate", json=COURSE)) for client in clients]
        await eventually(lambda: len(calls_of(fleet)) == len(CLIENTS))
        await fleet.replicas[0].kill()
        await eventually(lambda: any(call.closed_by_client.is_set() for call in calls_of(fleet)))
        gate.set()
        answers = await asyncio.gather(*requests)
        assert {answer.status_code for answer in answers} == {200, 503}
        for client, answer in zip(clients, answers, strict=True):
            if answer.status_code == 503:
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.headers["retry-after"] == "5"
                assert answer.json()["error_code"] == "shutting_down"
                assert (await client.post("/generate", json=COURSE)).json()["response"] == BADGE


# ---------------------------------------------------------------- any OpenAI server


@pytest.mark.timeout(1800)
@pytest.mark.skipif("OPENAI_SERVER" not in os.environ, reason="needs OPENAI_SERVER=http://host:port/v1, MODEL_NAME too")
async def test_an_openai_server_writes_badges_of_real_courses_at_the_same_time() -> None:
    settings = {"openai_base_url": os.environ["OPENAI_SERVER"], "max_concurrent_requests": 8}
    timeouts = {"first_token_timeout": 600, "generation_timeout": 900, "token_timeout": 120}
    async with serving(ScriptedOpenAI(), **settings, **timeouts) as service, await service.connect() as connection:
        health = (await connection.response(await connection.request("GET", "/health"))).json()
        assert health["status"] == "healthy", health
        streams = [
            await connection.request("POST", "/generate/stream", body={"content": course["content"], "max_tokens": 600})
            for course in COURSES[:4]
        ]
        for stream in streams:
            events = await events_of(connection, stream, timeout=900)
            last = events[-1]["data"]
            assert last["type"] == "final", last
            assert "".join(token["content"] for token in named(events, "token"))
            assert last["usage"]["completion_tokens"] > 0
            assert dccapi.Badge.model_validate(last["content"])

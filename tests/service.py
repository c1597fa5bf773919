"""dccapi on a real Hypercorn in this event loop, and what the tests ask of it and expect in return."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import hypercorn.asyncio
import orjson
import pytest
import trustme
from hypothesis import settings as hypothesis_settings

import dccapi
import testkit
from testkit import (
    H2Client,
    Script,
    ScriptedEngine,
    ScriptedOllama,
    ScriptedOpenAI,
    badge_pieces,
    eventually,
    parse_sse,
)

HERE = Path(__file__).resolve().parents[1]  # the checkout
COURSE = {"content": "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."}
COURSES = [json.loads(line) for line in (HERE / "examples" / "courses.jsonl").read_text("utf-8").splitlines()]
MODEL = HERE / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE = "http://[::1]:3000"  # the origin of a page that may ask
SLOW = Script(pieces=badge_pieces() * 40, delay=0.02)


def parse_badge(text: str, *, cut: bool = False) -> dccapi.Badge:
    """The badge in a whole text of a model. Raises InvalidModelOutput."""
    draft = dccapi.Draft()
    draft.feed(text)
    draft.finish(cut)
    assert draft.badge
    return draft.badge


def partial_badge(rendered: str) -> dict[str, Any]:
    """The badge of the `partial` event that is sent when so much of its JSON is rendered; {} where none is."""
    generation = dccapi.Generation("", "", log=[rendered] if rendered else [])
    sent = dccapi.EventEncoder(generation, dccapi.StreamOptions(partial=True)).pending().decode()
    _, is_sent, event = sent.partition("event: partial\n")
    badge: dict[str, Any] = orjson.loads(event.partition("data: ")[2])["badge"] if is_sent else {}
    return badge


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
    engine: ScriptedEngine | None = None,
    script: Any = None,
    tls: bool = False,
    new_readers: bool = False,
    **settings: Any,
) -> AsyncIterator[Service]:
    async with engine or ScriptedOllama() as engine:
        if script is not None:
            engine.script = script if callable(script) else lambda body, index: script
        if isinstance(engine, ScriptedOpenAI):
            settings = {"engine": "openai", "openai_base_url": engine.base_url, **settings}
        app = dccapi.create_app(
            dccapi.Settings(**{"ollama_url": engine.url, "resume_grace": 0.2, "drain_timeout": 0.5, **settings})
        )
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listening.getsockname()[1]
        config = dccapi.Config.from_toml(HERE / "hypercorn.toml")
        config.bind = [f"fd://{listening.detach()}"]
        config.errorlog = None
        if tls:
            config.certfile, config.keyfile = certificate()
        dccapi.peer_of.cache_clear()
        stop = asyncio.Event()
        server = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
        # Hypercorn's last step of a start.
        await eventually(lambda: server.done() or any("raise_shutdown" in repr(task) for task in asyncio.all_tasks()))
        try:
            with contextlib.nullcontext() if new_readers else lent_readers(app.queue.readers):
                yield Service(port, engine, app.queue)
        finally:
            stop.set()
            await server


READERS: list[asyncio.subprocess.Process] = []


@pytest.fixture(scope="module", autouse=True)
async def readers() -> AsyncIterator[None]:
    yield
    while READERS:
        await dccapi._killed(READERS.pop())


@contextlib.contextmanager
def lent_readers(readers: dccapi.Readers) -> Iterator[None]:
    """Processes that read for one test of a file after another: each takes 0.2 s of the processor to start."""
    readers._idle += READERS
    READERS.clear()
    try:
        yield
    finally:
        READERS.extend(readers._idle)
        readers._idle.clear()


def certificate() -> tuple[str, str]:
    """A certificate for localhost and its key, in certs/ as `make certs` puts them there."""
    paths = HERE / "certs" / "cert.pem", HERE / "certs" / "key.pem"
    if not all(path.exists() for path in paths):
        paths[0].parent.mkdir(exist_ok=True)
        issued = trustme.CA().issue_cert("localhost", "127.0.0.1", "::1")
        paths[0].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        paths[1].write_bytes(issued.private_key_pem.bytes())
    return str(paths[0]), str(paths[1])


def client(service: Service, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=service.url, timeout=20, **options)


async def events_of(connection: H2Client, stream: int, timeout: float = 20) -> list[dict[str, Any]]:
    return [event async for event in connection.events(stream, timeout)]


def named(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in events if event.get("data", {}).get("type") == kind]


MARKER = "Zwetschgenknödel"  # a word that nothing but the content and the answer holds
NEVER_SHOWN = ("Traceback", 'File "', "127.0.0.1", "localhost", "s3cret", "aiohttp", "Errno")
pure = hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=100)


async def ask(
    service: Service, body: Any = COURSE, path: str = "/generate", method: str = "POST", headers: Any = ()
) -> testkit.Response:
    """One request of a page at another origin, over a connection of its own, and the whole response."""
    async with await service.connect() as connection:
        stream = await connection.request(method, path, [("origin", PAGE), *headers], body)
        return await connection.response(stream, timeout=10)


async def watch(
    service: Service, body: Any = COURSE, path: str = "/generate/stream", method: str = "POST"
) -> list[Any]:
    """What `onmessage` gets of an event stream."""
    async with await service.connect() as connection:
        events = await events_of(connection, await connection.request(method, path, body=body))
    return [event["data"] for event in events if event.get("event") == "message"]


def problem_in(response: testkit.Response, status: int, code: str) -> dict[str, Any]:
    """The problem in a response, once its shape is as contract 3.4 has it."""
    assert (response.status, response.headers["content-type"]) == (status, "application/problem+json"), response
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "error_code", "request_id", "timestamp"} <= problem.keys()
    assert (problem["status"], problem["error_code"]) == (status, code)
    assert all(isinstance(problem[name], str) and problem[name] for name in ("type", "title", "detail"))
    assert problem["request_id"] == response.headers["x-request-id"]
    assert datetime.fromisoformat(problem["timestamp"]).tzinfo
    assert response.headers["access-control-allow-origin"] in ("*", PAGE)
    assert "access-control-allow-credentials" not in response.headers
    assert not [word for word in NEVER_SHOWN if word in response.body.decode() + str(response.headers)]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return problem


def error_in(events: list[Any], code: str) -> dict[str, Any]:
    """The error that ends an event stream, once its shape is as contract 3.3 has it."""
    *before, error = events
    assert {event["type"] for event in before} <= {"token"}
    assert (error["type"], error["error_code"]) == ("error", code)
    assert error["content"] == error["error"] != ""
    assert error["request_id"]
    assert not [word for word in NEVER_SHOWN if word in json.dumps(error)]
    return error


async def fails(service: Service, status: int, code: str, body: Any = COURSE) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both views of a failure of the engine: the problem and the error event."""
    return (
        problem_in(await ask(service, body), status, code),
        error_in(await watch(service, body), code),
    )


async def writes(service: Service, body: Any = COURSE) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = await ask(service, body)
    assert response.status == 200, response.body
    return response.json()


@contextlib.asynccontextmanager
async def speaking(*answers: list[bytes]) -> AsyncIterator[tuple[str, list[int]]]:
    """An engine that answers its n-th request with the n-th list of writes and closes after what is not whole.

    Gives its URL and, for each request, the number of its connection.
    """
    requests: list[int] = []
    tasks = []

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        number = len(tasks)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                if b" /api/show " in head:  # it does not say what it is
                    writer.write(testkit.http_answer(404, "text/plain", b"404 page not found"))
                    continue
                requests.append(number)
                answer = answers[min(len(requests), len(answers)) - 1]
                for part in answer:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)  # each is read on its own
                if not b"".join(answer).endswith(b"\r\n0\r\n\r\n"):
                    break
        writer.transport.abort()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()
        await asyncio.wait(tasks)
        await asyncio.sleep(0)  # aborted transports close their sockets in the next round of the loop


@contextlib.contextmanager
def logging_into(lines: list[str]) -> Iterator[None]:
    """Everything that any logger says, our own fields and tracebacks included."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(dccapi.JsonFormatter().format(record))

    keeper, root = Keeper(), logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(keeper)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(keeper)


COMMANDS = {
    "python": lambda port, config: ["dccapi.py", "--bind", f"127.0.0.1:{port}", "--certs", "/nowhere", *config],
    "hypercorn": lambda port, config: ["-m", "hypercorn", "--bind", f"127.0.0.1:{port}", *config, "dccapi:app"],
}


async def asked(body: dict[str, Any], path: str = "/generate", **settings: Any) -> dict[str, Any]:
    """What the engine is asked for a request that must succeed."""
    async with serving(**settings) as service:
        assert (response := await ask(service, body, path)).status == 200, response.body
        return service.engine.calls[0].body


OB3 = HERE.parent / "shared" / "ob3"
BADGE = {"badge_name": "Knots", "badge_description": "Ties knots.", "criteria": {"narrative": "- Tied **six** knots"}}
ISSUER = {"id": "did:key:z6MknNQD1WHLGGraFi6zcbGevuAgkVfdyCdtZnQTGWVVvR5Q", "name": "Example University"}


@pytest.fixture(scope="module")
def judge() -> Any:
    if not (OB3 / "judge.py").exists():
        pytest.skip("needs ../shared/ob3/judge.py")
    spec = importlib.util.spec_from_file_location("judge", OB3 / "judge.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENGINES = pytest.mark.parametrize("engine", [ScriptedOllama, ScriptedOpenAI])


def needs_model(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test with the small model, which takes both cores."""
    is_there = MODEL.exists() or bool(os.environ.get("CI"))
    return pytest.mark.alone(pytest.mark.skipif(not is_there, reason="needs the small model: make model")(test))


def texts_of(badge: dict[str, Any]) -> dict[str, str]:
    """The texts of a badge, or of as much of it as is written."""
    return {name: text["narrative"] if isinstance(text, dict) else text for name, text in badge.items()}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engines_of(pid: int) -> list[int]:
    """The embedded engine's child processes, without those that read courses."""
    return [child for child in children(pid) if b"\0engine\0" in Path(f"/proc/{child}/cmdline").read_bytes()]


def runs(pid: int) -> bool:
    """A zombie that nobody has waited for does not run."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


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


PYTHONS = [sys.executable, *os.environ.get("OTHER_PYTHONS", "").split()]


def commands(port: int) -> dict[str, list[str]]:
    bind = ["--bind", f"127.0.0.1:{port}"]
    return {
        "python dccapi.py": ["dccapi.py", *bind, "--certs", "absent"],
        "hypercorn dccapi:app": ["-m", "hypercorn", *bind, "dccapi:app"],
        "hypercorn --config": ["-m", "hypercorn", "--config", "hypercorn.toml", *bind, "dccapi:app"],
    }

"""The benchmark of dccapi: `make bench`, or `python tools/bench.py --help`.

Every figure stands beside that of a peer, measured in the same run on the same scripted engine:

    direct   the client straight at the engine
    plain    uvicorn and httpx the obvious way: one generator, one json.dumps with the text so far per token, HTTP/1.1
    litellm  LiteLLM's proxy, in an environment of its own, only with --litellm

Engine, server and client are a process each. Engine and client are raw asyncio protocols that do as little as they can:
on two cores the server is what a run waits for. A request's `max_tokens` says how many tokens the engine writes, its
`seed` how many a second: 0 is flat out, below 0 is never. Paced tokens hold the time at which they were sent.
CPU seconds are the server's own, from /proc. dccapi is asked over h2c, the peers over HTTP/1.1.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import re
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

import hpack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from testkit import Server, eventually, free_port, rss_kib

HERE = Path(__file__).resolve().parents[1]  # the checkout
MODEL = HERE / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
COURSE = json.loads((HERE / "examples" / "courses.jsonl").read_text("utf-8").partition("\n")[0])["content"][:1500]
NEVER, FLAT_OUT = -1, 0
FRAME = struct.Struct(">HBBBL")  # HTTP/2: length (high 16 bits, low 8), type, flags, stream


# ---------------------------------------------------------------- the engine


def record(text: str, **more: Any) -> bytes:
    """A line of Ollama's answer, as one chunk."""
    head = {"model": "phi4badges", "created_at": "2026-11-22T19:56:26.258874789Z", "response": text, "done": False}
    line = json.dumps(head | more, separators=(",", ":")).encode() + b"\n"
    return b"%x\r\n%b\r\n" % (len(line), line)


def piece(number: int, count: int, word: str) -> str:
    """A token of a badge of `count` tokens."""
    if number == 0:
        return f'{{"badge_name": "Unix{word}", "badge_description": "Figures.", "criteria": {{"narrative": "'
    return '"}}' if number == count - 1 else word


class Engine(asyncio.Protocol):
    """Ollama's generate, with nothing behind it."""

    rendered: dict[int, bytes] = {}  # noqa: RUF012 - shared by all connections
    task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def connection_lost(self, error: Exception | None) -> None:
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return
        self.received = b""
        if not head.startswith(b"POST /api/generate"):
            self._whole({"models": [{"name": "phi4badges:latest"}], "version": "0.24.0"})
            return
        request = json.loads(body)
        count, rate = request["options"]["num_predict"], request["options"]["seed"]
        if not request.get("stream", True):
            text = "".join(piece(number, count, " knots") for number in range(count))
            self._whole({"model": "phi4badges", "response": text, **self._end(count)})
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if rate == FLAT_OUT:
            if count not in self.rendered:
                lines = [record(piece(number, count, " knots")) for number in range(count)]
                self.rendered[count] = b"".join([*lines, record("", **self._end(count)), b"0\r\n\r\n"])
            self.transport.write(self.rendered[count])
        elif rate != NEVER:
            self.task = asyncio.create_task(self._pace(count, rate))

    async def _pace(self, count: int, rate: int) -> None:
        started = time.monotonic()
        for number in range(count):
            await asyncio.sleep(started + number / rate - time.monotonic())
            self.transport.write(record(piece(number, count, f" {time.monotonic():.6f}")))
        self.transport.write(record("", **self._end(count)) + b"0\r\n\r\n")

    def _end(self, count: int) -> dict[str, Any]:
        return {"done": True, "done_reason": "stop", "prompt_eval_count": 1024, "eval_count": count}

    def _whole(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )


async def run_engine(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


# ---------------------------------------------------------------- the plain peer


def run_plain(port: int, engine: str) -> None:
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    http = httpx.AsyncClient(base_url=engine, timeout=None)

    def asked(body: dict[str, Any], stream: bool) -> dict[str, Any]:
        options = {"num_predict": body["max_tokens"], "seed": body["seed"]}
        return {"model": "phi4badges", "prompt": body["content"], "stream": stream, "options": options}

    async def events(body: dict[str, Any]) -> AsyncIterator[str]:
        accumulated = ""
        async with http.stream("POST", "/api/generate", json=asked(body, True)) as answer:
            async for line in answer.aiter_lines():
                document = json.loads(line)
                accumulated += document["response"]
                if document["done"]:
                    yield f"data: {json.dumps({'type': 'final', 'content': json.loads(accumulated)})}\n\n"
                else:
                    token = {"type": "token", "content": document["response"], "accumulated": accumulated}
                    yield f"data: {json.dumps(token | {'done': False})}\n\n"

    async def stream(request: Request) -> Response:
        return StreamingResponse(events(await request.json()), media_type="text/event-stream")

    async def generate(request: Request) -> Response:
        answer = await http.post("/api/generate", json=asked(await request.json(), False))
        return JSONResponse({"response": json.loads(answer.json()["response"])})

    async def livez(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    routes = [Route("/livez", livez), Route("/generate", generate, methods=["POST"])]
    app = Starlette(routes=[*routes, Route("/generate/stream", stream, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="warning")


# ---------------------------------------------------------------- the client


SENT = re.compile(rb'"(?:content|response)": ?"(?:[^0-9"\\]|\\.)*([0-9]+\.[0-9]{6})')


class Reply:
    """What came of one request, looked at as it arrives."""

    def __init__(self, mark: bytes, timed: bool) -> None:
        self.asked = time.monotonic()
        self.first = 0.0  # when the first token came
        self.late: list[float] = []  # of each timed token: seconds since the engine sent it
        self.size = self.events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.text = b""  # the last that came
        self._mark, self._timed = mark, timed

    def feed(self, data: bytes) -> None:
        now = time.monotonic()
        self.size += len(data)
        if self._timed:
            whole, newline, rest = (self.text + data).rpartition(b"\n")
            self.late += [now - float(sent) for sent in SENT.findall(whole)]
            self.events += whole.count(self._mark)
            self.text = newline + rest
        else:
            self.text = self.text[1 - len(self._mark) :] + data  # a mark may come in two parts
            self.events += self.text.count(self._mark)
        self.first = self.first or (now if self.events else 0)

    def end(self, fault: str = "") -> None:
        if not self.done.done():
            if fault:
                self.done.set_exception(ConnectionError(fault))
                self.done.exception()  # else asyncio complains of each reply that nobody waits for
            else:
                self.done.set_result(None)


class Http1(asyncio.Protocol):
    """A connection that carries one request after the other."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.reply: Reply | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self.reply:
            self.reply.end("the connection was closed")

    def ask(self, reply: Reply, method: str, path: str, body: bytes) -> None:
        self.reply, self._left, self._last = reply, -1, b""
        self._head: bytes | None = b""  # None once it is read
        self.transport.write(
            f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def data_received(self, data: bytes) -> None:
        assert self.reply
        if self._head is not None:
            self._head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                return
            if b" 200 " not in self._head[:15]:
                self.reply.end(f"{self._head[:40]!r} {data[:400]!r}")
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self._head)
            self._left, self._head = int(length[1]) if length else -1, None
        self.reply.feed(data)
        if self._left >= 0:
            self._left -= len(data)
        self._last = (self._last + data)[-5:]
        if self._left == 0 or (self._left < 0 and self._last == b"0\r\n\r\n"):
            self.reply.end()


class Http2(asyncio.Protocol):
    """A connection with windows that never close, for as many requests as there are."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._replies: dict[int, Reply] = {}
        self._next, self._rest = 1, b""
        self._window, self._unsent = 2**16 - 1, deque[tuple[int, bytes]]()  # the connection's, and what waits for it
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._frame(4, 0, 0, struct.pack(">HL", 4, 2**31 - 1))  # SETTINGS_INITIAL_WINDOW_SIZE
        self._frame(8, 0, 0, struct.pack(">L", 2**31 - 2**16))

    def connection_lost(self, error: Exception | None) -> None:
        for reply in self._replies.values():
            reply.end("the connection was closed")

    def ask(self, reply: Reply, method: str, path: str, body: bytes) -> None:
        self._replies[self._next] = reply
        headers = [(":method", method), (":scheme", "http"), (":authority", "bench"), (":path", path)]
        headers.append(("content-type", "application/json"))
        self._frame(1, 4 | (not body), self._next, self._encoder.encode(headers))
        if body:
            self._unsent.append((self._next, body))
            self._send_bodies()
        self._next += 2

    def _send_bodies(self) -> None:
        while self._unsent and len(self._unsent[0][1]) <= self._window:
            stream, body = self._unsent.popleft()
            self._window -= len(body)
            self._frame(0, 1, stream, body)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.transport.write(FRAME.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload)

    def data_received(self, data: bytes) -> None:
        data, at = self._rest + data, 0
        while len(data) - at >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(data, at)
            if len(data) - at < (end := 9 + (high << 8) + low):
                break
            self._take(kind, flags, stream, data[at + 9 : at + end])
            at += end
        self._rest = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        reply = self._replies.get(stream)
        if kind == 0 and reply:
            reply.feed(payload)
        elif kind == 1 and reply:
            headers = {str(name): str(value) for name, value in self._decoder.decode(payload)}
            if headers[":status"] != "200":
                reply.end(str(headers))
        elif kind == 3 and reply:
            reply.end("the stream was reset")
        elif kind == 8 and stream == 0:
            self._window += int.from_bytes(payload)
            self._send_bodies()
        elif kind in (4, 6) and not flags & 1:  # SETTINGS, PING
            self._frame(kind, 1, 0, b"" if kind == 4 else payload)
        if kind in (0, 1) and flags & 1 and reply:
            self._replies.pop(stream).end()


@dataclass
class Peer:
    """A server under test and how it is asked."""

    name: str
    port: int
    process: Server
    mark: bytes = b'"done":false'  # stands in each token's event and nowhere else
    http2: bool = False
    idle: list[Any] = field(default_factory=list)  # connections
    holds_back: ClassVar = False

    def request(self, tokens: int, rate: int) -> tuple[str, dict[str, Any]]:
        return "/generate", {"content": COURSE, "max_tokens": tokens, "seed": rate}

    async def connect(self) -> Any:
        protocol = Http2 if self.http2 else Http1
        _, connection = await asyncio.get_running_loop().create_connection(protocol, "127.0.0.1", self.port)
        return connection

    async def post(
        self, tokens: int, rate: int = FLAT_OUT, *, stream: bool = True, timed: bool = False, query: str = ""
    ) -> Reply:
        """One request from its first byte to its last."""
        path, body = self.request(tokens, rate)
        if stream:
            path, body = self.streamed(path, body)
        self.idle = [connection for connection in self.idle if not connection.transport.is_closing()]
        connection = self.idle.pop() if self.idle else await self.connect()
        if self.http2:
            self.idle.append(connection)
        reply = Reply(self.mark, timed)
        connection.ask(reply, "POST", path + query, json.dumps(body).encode())
        await reply.done
        if not self.http2:
            self.idle.append(connection)
        # dccapi tells the last bracket once the text has ended: until then it may have been an idea.
        if stream and reply.events not in (tokens, tokens + 1) and not self.holds_back:
            raise RuntimeError(f"{self.name}: {reply.events} events for {tokens} tokens: …{reply.text[-600:]!r}")
        return reply

    def streamed(self, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return path + "/stream", body

    def cpu(self) -> float:
        """CPU seconds so far."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> float:
        """MB of resident memory."""
        return rss_kib(self.process.pid) * 1024 / 1e6

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.abort()
        self.idle.clear()


class Direct(Peer):
    def request(self, tokens: int, rate: int) -> tuple[str, dict[str, Any]]:
        options = {"num_predict": tokens, "seed": rate}
        return "/api/generate", {"model": "phi4badges", "prompt": COURSE, "stream": False, "options": options}

    def streamed(self, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return path, body | {"stream": True}


class LiteLlm(Peer):
    holds_back: ClassVar = True  # its ollama/ provider lets a JSON answer go only when it is whole

    def request(self, tokens: int, rate: int) -> tuple[str, dict[str, Any]]:
        messages = [{"role": "user", "content": COURSE}]
        return "/v1/chat/completions", {"model": "bench", "messages": messages, "max_tokens": tokens, "seed": rate}

    def streamed(self, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return path, body | {"stream": True}


# ---------------------------------------------------------------- starting


@asynccontextmanager
async def direct() -> AsyncIterator[Peer]:
    port = free_port()
    command = [str(Path(__file__)), "engine", str(port)]
    async with Server(command, {}, f"http://127.0.0.1:{port}/livez", HERE) as process:
        yield Direct("direct", port, process)


@asynccontextmanager
async def plain(engine: str) -> AsyncIterator[Peer]:
    port = free_port()
    command = [str(Path(__file__)), "plain", str(port), engine]
    async with Server(command, {}, f"http://127.0.0.1:{port}/livez", HERE) as process:
        yield Peer("plain", port, process, mark=b'"done": false')


@asynccontextmanager
async def dccapi(engine: str, **settings: str) -> AsyncIterator[Peer]:
    port = free_port()
    env = {"OLLAMA_URL": engine, "LOG_LEVEL": "WARNING", "MAX_CONCURRENT_REQUESTS": "64"}
    env |= {"MAX_QUEUE": "2000", "MAX_PER_CLIENT": "3000", "MAX_CONNECTIONS_PER_CLIENT": "3000", **settings}
    command = [str(HERE / "dccapi.py"), "--bind", f"127.0.0.1:{port}", "--certs", "/nonexistent"]
    async with Server(command, env, f"http://127.0.0.1:{port}/livez", HERE) as process:
        yield Peer("dccapi", port, process, http2=True)


@asynccontextmanager
async def litellm(engine: str, environment: Path) -> AsyncIterator[Peer]:
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"installing litellm[proxy] into {environment}", flush=True)
        await asyncio.to_thread(lambda: subprocess.run([sys.executable, "-m", "venv", environment], check=True))
        install = [str(python), "-m", "pip", "install", "--quiet", "litellm[proxy]"]
        await asyncio.to_thread(lambda: subprocess.run(install, check=True))
    port = free_port()
    config = environment / "bench.yaml"  # JSON is YAML
    model = {"model": "ollama/phi4badges", "api_base": engine}
    config.write_text(json.dumps({"model_list": [{"model_name": "bench", "litellm_params": model}]}))
    command = [str(environment / "bin" / "litellm"), "--config", str(config), "--port", str(port)]
    ready = f"http://127.0.0.1:{port}/health/liveliness"
    env = {"DO_NOT_TRACK": "1", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}  # or it does not start
    async with Server(command, env, ready, HERE, str(python), start_timeout=120) as process:
        yield LiteLlm("litellm", port, process, mark=b'"delta":{"')


# ---------------------------------------------------------------- the figures


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def flat_out(peer: Peer, streams: int, tokens: int, seconds: float, query: str = "") -> tuple[float, float, int]:
    """Events per second, CPU seconds per 1,000 events, and bytes of one stream: round after round of streams."""
    await peer.post(16)  # what is only done once
    started, spent, events, size = time.monotonic(), peer.cpu(), 0, 0
    while not events or time.monotonic() < started + seconds:
        replies = await asyncio.gather(*(peer.post(tokens, query=query) for _ in range(streams)))
        events += streams * tokens
        size = replies[0].size
    peer_seconds, spent = time.monotonic() - started, peer.cpu() - spent
    peer.close()
    return events / peer_seconds, spent / events * 1000, size


async def paced(peer: Peer, streams: int, rate: int, seconds: float) -> dict[str, float]:
    """Milliseconds that tokens come after the engine sent them; CPU share of the server."""
    await peer.post(16)
    started, spent = time.monotonic(), peer.cpu()
    replies = await asyncio.gather(*(peer.post(int(rate * seconds), rate, timed=True) for _ in range(streams)))
    share = (peer.cpu() - spent) / (time.monotonic() - started)
    peer.close()
    late = [late * 1000 for reply in replies for late in reply.late]
    return {
        "p50": percentile(late, 50),
        "p99": percentile(late, 99),
        "worst": max(late),
        "first event": max(reply.late[0] * 1000 for reply in replies),
        "to first event": percentile([(reply.first - reply.asked) * 1000 for reply in replies], 50),
        "cpu": share,
    }


async def requests_per_second(peer: Peer, at_once: int, seconds: float) -> float:
    """Answers without streaming, `at_once` always under way."""
    count = 0
    deadline = time.monotonic() + seconds

    async def ask() -> None:
        nonlocal count
        while time.monotonic() < deadline:
            await peer.post(64, stream=False)
            count += 1

    started = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(at_once)))
    taken = time.monotonic() - started
    peer.close()
    return count / taken


async def waiting_streams(peer: Peer, streams: int, connections: int) -> float:
    """KiB of each EventSource that waits in the queue."""
    before = rss_kib(peer.process.pid)
    peer.idle = [await peer.connect() for _ in range(connections)]
    query = urlencode({"content": COURSE, "max_tokens": 4, "seed": NEVER})
    replies = []
    for number in range(64 + streams):  # the first 64 run
        reply = Reply(b'"type":"queue"', timed=False)
        peer.idle[number % connections].ask(reply, "GET", f"/generate/stream?{query}", b"")
        replies.append(reply)
        if number % 20 == 0:
            await asyncio.sleep(0)
    await eventually(lambda: all(reply.events for reply in replies), 120, "every position")
    each = (rss_kib(peer.process.pid) - before) / len(replies)
    peer.close()
    return each


async def running_streams(peer: Peer, streams: int) -> float:
    """KiB of each stream that gets tokens."""
    replies = asyncio.gather(*(peer.post(250, 50, timed=True) for _ in range(streams)))
    before = rss_kib(peer.process.pid)
    await asyncio.sleep(4)
    each = (rss_kib(peer.process.pid) - before) / streams
    await replies
    peer.close()
    return each


async def start_up(start: Callable[[], AbstractAsyncContextManager[Peer]]) -> float:
    """Seconds from the command to /livez; the best of three, since other processes only ever add."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        async with start():
            times.append(time.monotonic() - began)
    return min(times)


def draft_cost(pieces: Sequence[str]) -> float:
    """Microseconds that the badge's reader takes for a token; the best of 20 runs."""
    sys.path.insert(0, str(HERE))
    from dccapi import Draft

    times = []
    for _ in range(20):
        draft, began = Draft(), time.perf_counter()
        for text in pieces:
            draft.feed(text)
        draft.finish(cut=False)
        times.append(time.perf_counter() - began)
    return min(times) / len(pieces) * 1e6


def mixed_pieces() -> list[str]:
    """A badge with what a Markdown list has besides words, in pieces as tokenizers make them."""
    text = "Learners tie, dress and check the knots on which climbers rely, on ropes of 9.5 mm. "
    item = "- Ties a figure eight, a clove hitch and a prusik unaided, and inspects a partner's knots.\n"
    badge = {"badge_name": "Knots", "badge_description": text * 5, "criteria": {"narrative": item * 30}}
    return re.findall(r" ?\w+| ?.", json.dumps(badge, ensure_ascii=False))


class Table:
    """The figures, each told as soon as it is known."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        figure: str,
        unit: str,
        values: Mapping[str, float],
        against: str = "",
        judged: float | None = None,
        bar: str = "",
    ) -> None:
        """A line. `bar`, such as `< 5`, is about `judged`, else about the ratio, else about dccapi's own value."""
        ratio = values["dccapi"] / values[against] if against else None
        value = judged if judged is not None else ratio if ratio is not None else values["dccapi"]
        row = {"figure": figure, "unit": unit, **values, "against": against, "ratio": ratio, "bar": bar}
        if bar:
            sign, limit = bar.split()
            row |= {"judged": value, "holds": value >= float(limit) if sign == ">=" else value < float(limit)}
        self.rows.append(row)
        told = ", ".join(f"{name} {number:.4g}" for name, number in values.items())
        print(f"{figure} [{unit}]: {told}" + (f"; {value:.3g} {bar}: {row['holds']}" if bar else ""), file=sys.stderr)

    def markdown(self) -> str:
        peers = [name for name in PEERS if any(name in row for row in self.rows)]
        head = ["figure", "unit", *peers, "ratio", "bar", "holds"]
        lines = [head, ["---", "---", *(["---:"] * (len(peers) + 1)), "---", "---"]]
        for row in self.rows:
            ratio = f"{row['ratio']:.2f} of {row['against']}" if row["against"] else ""
            bar = f"{row['judged']:.3g} {row['bar']}" if row["bar"] else ""
            values = [f"{row[name]:,.4g}" if name in row else "" for name in peers]
            holds = {True: "yes", False: "NO", None: ""}[row.get("holds")]
            lines.append([row["figure"], row["unit"], *values, ratio, bar, holds])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PEERS = ("direct", "plain", "litellm", "dccapi")


async def measure(options: argparse.Namespace) -> Table:
    table = Table()
    seconds = options.seconds
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(direct())
        url = f"http://127.0.0.1:{engine.port}"
        relays = [await stack.enter_async_context(plain(url))]
        if options.litellm:
            relays.append(await stack.enter_async_context(litellm(url, options.litellm)))
        ours = await stack.enter_async_context(dccapi(url))
        relays.append(ours)
        idle = {peer.name: peer.rss() for peer in relays}
        peers = [engine, *relays]

        for streams in (4, 1, 64):
            # Each peer twice, in turn; the better run counts: what else the machine does only ever takes away.
            runs: dict[str, list[tuple[float, float, int]]] = {peer.name: [] for peer in peers}
            for _ in range(2):
                for peer in peers:
                    runs[peer.name].append(await flat_out(peer, streams, 1024, seconds))
            rates = {name: max(run[0] for run in found) for name, found in runs.items()}
            costs = {name: min(run[1] for run in found) for name, found in runs.items() if name != "direct"}
            four = streams == 4
            table.add(f"{streams} streams flat out", "events/s", rates, "plain", bar=">= 3" if four else "")
            table.add(f"{streams} streams flat out", "CPU s/1,000 events", costs, "plain", bar="< 0.33" if four else "")
            if four:
                plain_pieces = [piece(number, 1024, " knots") for number in range(1024)]
                for name, pieces in (("plain words", plain_pieces), ("a realistic mix", mixed_pieces())):
                    cost = draft_cost(pieces)
                    share = cost * rates["dccapi"] / 1e4
                    figure = f"… of which the badge's reader, {name} (judged: % of the time of an event)"
                    table.add(figure, "µs/event", {"dccapi": cost}, judged=share, bar="< 5")

        # At the length's end: how the cost of an event grows, and how many bytes the text so far takes.
        by_length = {
            n: [await flat_out(ours, 4, n, seconds, "?accumulated=false") for _ in range(2)] for n in (1024, 4096)
        }
        short, long = (min(run[1] for run in by_length[n]) for n in (1024, 4096))
        table.add("accumulated=false, 1,024 tokens", "CPU s/1,000 events", {"dccapi": short})
        table.add("… 4,096 tokens", "CPU s/1,000 events", {"dccapi": long}, judged=long / short, bar="< 1.2")
        _, _, whole = await flat_out(ours, 1, 4096, 0)
        table.add("bytes of 4,096 tokens", "MB", {"dccapi": whole / 1e6})
        small = by_length[4096][0][2]
        table.add("… accumulated=false", "MB", {"dccapi": small / 1e6}, judged=small / whole, bar="< 0.05")

        for streams in (4, 64):
            late = {peer.name: await paced(peer, streams, 50, 5) for peer in peers}
            base, own = late["direct"], late["dccapi"]
            name = f"{streams} streams at 50 tokens/s"
            for figure, bar in (("p50", "< 1"), ("p99", "< 5"), ("first event", "< 5")) if streams == 4 else ():
                values = {peer: value[figure] for peer, value in late.items()}
                added = own[figure] - (base[figure] if figure != "first event" else 0)
                table.add(f"{name}: after the engine, {figure}", "ms", values, judged=added, bar=bar)
            if streams == 64:
                values = {peer: value["p99"] for peer, value in late.items()}
                table.add(f"{name}: after the engine, p99", "ms", values, bar="< 50")
            values = {peer: value["to first event"] for peer, value in late.items()}
            table.add(f"{name}: request to first event", "ms", values)
            values = {peer: value["cpu"] * 100 for peer, value in late.items() if peer != "direct"}
            table.add(f"{name}: CPU", "% of a core", values, "plain")

        answers = {peer.name: await requests_per_second(peer, 16, seconds) for peer in peers}
        table.add("answers of 64 tokens without streaming, 16 at once", "requests/s", answers, "plain")

        table.add("RSS idle", "MB", idle, "plain", judged=idle["dccapi"], bar="< 80")
        for connections, place in ((10, "on 10 connections"), (1064, "on a connection each")):
            async with dccapi(url) as fresh:
                each = await waiting_streams(fresh, 1000, connections)
            table.add(f"RSS of each of 1,000 waiting EventSources {place}", "KiB", {"dccapi": each}, bar="< 64")
        async with plain(url) as one, dccapi(url) as other:
            running = {peer.name: await running_streams(peer, 64) for peer in (one, other)}
        table.add("RSS of each of 64 running streams", "KiB", running, "plain")
        starts = {"plain": await start_up(lambda: plain(url)), "dccapi": await start_up(lambda: dccapi(url))}
        table.add("from the command to /livez", "s", starts, "plain", judged=starts["dccapi"], bar="< 1.5")
        if options.real:
            await measure_real(table)
    return table


async def measure_real(table: Table) -> None:
    """Tokens per second of the embedded model: four streams against one."""
    rates = []
    async with dccapi("", ENGINE="embedded", MODEL_PATH=str(MODEL), MAX_CONCURRENT_REQUESTS="4", OLLAMA_URL="") as peer:
        for streams in (1, 1, 4):  # the first warms up
            deadline = time.monotonic() + 300
            started = time.monotonic()
            connection = await peer.connect()
            replies = [Reply(peer.mark, timed=False) for _ in range(streams)]
            body = json.dumps({"content": COURSE, "max_tokens": 256, "seed": 1}).encode()
            for reply in replies:
                connection.ask(reply, "POST", "/generate/stream?accumulated=false", body)
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - started):
                await asyncio.gather(*(reply.done for reply in replies))
            rates.append(sum(reply.events for reply in replies) / (time.monotonic() - started))
            connection.transport.abort()
    table.add("real model, 1 stream", "tokens/s", {"dccapi": rates[1]})
    table.add("real model, 4 streams (judged: against 1)", "tokens/s", {"dccapi": rates[2]}, judged=rates[2] / rates[1])


def versions() -> dict[str, str]:
    names = "hypercorn h2 aiohttp orjson starlette uvicorn httptools uvloop httpx".split()  # noqa: SIM905
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}, {memory:.0f} GiB, Linux {platform.release()}"


def main() -> int:
    if sys.argv[1:2] == ["engine"]:
        asyncio.run(run_engine(int(sys.argv[2])))
    elif sys.argv[1:2] == ["plain"]:
        run_plain(int(sys.argv[2]), sys.argv[3])
    parser = argparse.ArgumentParser(description="The benchmark of dccapi")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--seconds", type=float, default=3, help="of each run flat out (default %(default)s)")
    parser.add_argument("--real", action="store_true", help="also the embedded model")
    parser.add_argument(
        "--litellm", type=Path, metavar="DIR", help="also LiteLLM's proxy, installed into DIR if absent"
    )
    options = parser.parse_args()
    head: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(),
    }
    table = asyncio.run(measure(options))
    found = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    print(f"{head['date']}, {head['machine']}\n{found}\n\n{table.markdown()}")
    if options.json:
        options.json.write_text(json.dumps(head | {"figures": table.rows}, indent=1) + "\n")
    return 0  # whether a bar holds depends on the processor, so the table says it and the exit code does not


if __name__ == "__main__":
    sys.exit(main())

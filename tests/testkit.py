"""Test kit: an engine double in two dialects, a raw HTTP/2 client, an SSE parser, and the service as a subprocess."""

from __future__ import annotations

import asyncio
import codecs
import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import h2.events
import orjson
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings
from hpack import Encoder

# ---------------------------------------------------------------- waiting and measuring


# Below those that the kernel gives to outgoing connections, and others for each of four workers of pytest-xdist.
_first = 20_000 + 3_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
_ports = itertools.count(random.randrange(3_000))  # another run may be under way


def free_port() -> int:
    """A TCP port of the loopback interface that is free, and that nobody else takes soon."""
    for number in itertools.islice(_ports, 3_000):
        with socket.socket() as probe, suppress(OSError):
            port = _first + number % 3_000
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def rss_kib(pid: int, parent: bytes = b"") -> int:
    """Resident memory of a process and its descendants: the hypercorn command works in a child process.

    Those that read documents are left out: how many there are depends on what was asked. So is a child that still has
    its parent's command line: between fork and exec it shares its parent's memory, which would count twice.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"-m\0reader" in command or command == parent:
            return 0
        own = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())  # none once it is a zombie
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    return (int(own[1]) if own else 0) + sum(rss_kib(int(child), command) for child in children)


def trusting_tls() -> ssl.SSLContext:
    """A client's TLS context that trusts any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def eventually(condition: Callable[[], Any], timeout: float = 15, what: str = "the condition") -> Any:
    """Wait until `condition()` is true, and return what it gave."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout} s")
        await asyncio.sleep(0.005)
    return result


# ---------------------------------------------------------------- what a scripted engine says


def badge_json(
    name: str = "Climbing Knots Essentials",
    description: str = "Recognises learners who tie, dress and check the knots on which climbers rely.",
    narrative: str = "Ties a figure eight, a clove hitch and a prusik unaided, and inspects a partner's knots.",
) -> str:
    """A valid badge, laid out as the service tells it."""
    badge = {"badge_name": name, "badge_description": description, "criteria": {"narrative": narrative}}
    return json.dumps(badge, ensure_ascii=False)


def split(text: str, n: int | None = None) -> list[str]:
    """The text in `n` pieces of nearly equal length, or in pieces of four characters."""
    if n is None:
        return [text[start : start + 4] for start in range(0, len(text), 4)]
    return [text[len(text) * i // n : len(text) * (i + 1) // n] for i in range(n)]


def badge_pieces() -> list[str]:
    """A valid badge, as tokens."""
    return split(badge_json())


@dataclass
class Script:
    """How the engine answers one call. Without a fault set it answers well; faults count pieces from the first one."""

    pieces: Sequence[str] = field(default_factory=badge_pieces)
    delay: float = 0  # before every piece but the first
    first_delay: float = 0  # before the status line too: an engine sends it with the first piece
    gate: asyncio.Event | None = None  # waited for before first_delay
    done_reason: str | None = "stop"  # None leaves the key out
    prompt_eval_count: int = 467
    eval_count: int | None = None  # None: as many as pieces were sent
    honour_num_predict: bool = False  # stop with "length" where the request's limit says so
    # faults
    status: int = 200
    error: str | dict[str, Any] | bytes = ""  # goes with a status other than 200; bytes are sent as they are, as text
    retry_after: str | None = None  # a header that goes with it
    end_without_done: bool = False  # a clean end of the body, but no closing record
    error_line: str | None = None  # an error record under status 200 instead of the closing one
    drop_after: int | None = None  # reset in the middle of a chunk; 0: before the status line
    stall_after: int | None = None  # silence until the client leaves; 0: before the status line
    raw_chunks: Sequence[bytes] | None = None  # the body byte by byte as given, instead of all the above
    close_after_response: bool = False  # says keep-alive, and closes
    close_on_reuse: bool = False  # the same for a client that loses the race: closed as its next request arrives


@dataclass
class Call:
    """What one engine call asked for and how it went; times are of loop.time()."""

    body: dict[str, Any]
    headers: dict[str, str]
    connection_number: int
    started: float
    ended: float | None = None
    pieces_sent: int = 0
    closed_by_client: asyncio.Event = field(default_factory=asyncio.Event)  # only while this call was being answered


def exceeds_context(prompt_tokens: int, context: int) -> Script:
    """llama.cpp's refusal of a prompt that does not fit."""
    message = f"request ({prompt_tokens} tokens) exceeds the available context size ({context} tokens)"
    error = {"code": 400, "message": message + ", try increasing it", "type": "exceed_context_size_error"}
    return Script(status=400, error=error | {"n_prompt_tokens": prompt_tokens, "n_ctx": context})


# ---------------------------------------------------------------- the engine double


def go_json(value: Any) -> bytes:
    """JSON as Go's encoder writes it, which escapes what HTML might trip over."""
    text = orjson.dumps(value)
    return text.replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")


def go_timestamp() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    fraction = f".{nanoseconds:09}".rstrip("0").rstrip(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def http_head(status: int, content_type: str, framing: str, *first: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *first]
    lines += [f"Content-Type: {content_type}", f"Date: {formatdate(usegmt=True)}", framing, "", ""]
    return "\r\n".join(lines).encode()


def http_answer(status: int, content_type: str, body: bytes, *first: str) -> bytes:
    return http_head(status, content_type, f"Content-Length: {len(body)}", *first) + body


def http_chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


class WatchedReader(asyncio.StreamReader):
    """A stream reader that tells of the client's end or reset at once, whatever its owner is waiting for."""

    on_end: Callable[[], None] | None = None

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.on_end:
            self.on_end()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        if self.on_end:
            self.on_end()


class ScriptedEngine(ABC):
    """A small HTTP/1.1 server that answers generations by script. The dialects below say how each record is written."""

    generate_path: str
    stream_type: str
    streams_by_default = True
    json_type = "application/json; charset=utf-8"
    end_of_body = b"0\r\n\r\n"
    host = "127.0.0.1"

    def __init__(self, models: Iterable[str] = ("phi4badges:latest",), port: int = 0) -> None:
        self.script: Callable[[dict[str, Any], int], Script] = lambda body, index: Script()
        self.models = list(models)
        self.shown: dict[str, Any] | None = None  # what Ollama's /api/show says; a server without it otherwise
        self.port = port
        self.calls: list[Call] = []  # generations only
        self.requests: list[str] = []  # everything: "GET /api/tags"
        self.open_calls = self.max_open_calls = self.connections = self.closed_on_reuse = 0
        self.answering = asyncio.Event()  # cleared: the engine accepts, reads and says nothing
        self.answering.set()
        self.faults: list[Exception] = []  # of the double or of the test's script; raised at the end
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.stop()
        if self.faults:
            raise self.faults[0]

    async def start(self) -> None:
        """Listen; after a stop() on the same port as before."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: asyncio.StreamReaderProtocol(WatchedReader(limit=2**22), self._converse), self.host, self.port
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection, as when the engine is killed."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close their sockets in the next round of the loop
        await self._server.wait_closed()

    async def wait_for_calls(self, n: int, timeout: float = 5) -> list[Call]:
        await eventually(lambda: len(self.calls) >= n, timeout, f"{n} engine calls ({len(self.calls)} before the wait)")
        return self.calls

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert isinstance(reader, WatchedReader)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        number = self.connections
        try:
            while await self._answer_one(reader, writer, number):
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or stop() was called; asyncio 3.11 complains of a handler that ends cancelled
        except Exception as fault:
            self.faults.append(fault)
        finally:
            writer.transport.abort()  # and no wait for a client that reads nothing

    async def _answer_one(self, reader: WatchedReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        fields = (line.partition(":") for line in head[1:-2])
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        text = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append(f"{method} {path}")
        await self.answering.wait()
        body: Any = None
        with suppress(orjson.JSONDecodeError):
            body = orjson.loads(text)
        refusal = self.refusal(headers, path, body)
        info = self.info(path)
        if path == "/api/show" and self.shown is not None:
            info, method = self.shown, "GET"
        if path != self.generate_path and info is None:
            writer.write(http_answer(404, "text/plain", b"404 page not found"))
        elif method != (allowed := "GET" if info is not None else "POST"):
            writer.write(http_answer(405, "text/plain", b"405 method not allowed", f"Allow: {allowed}"))
        elif refusal:
            writer.write(http_answer(refusal[0], self.json_type, go_json(refusal[1])))
        elif info is not None:
            writer.write(http_answer(200, self.json_type, go_json(info)))
        elif load := self.load_only(body):
            writer.write(http_answer(200, self.json_type, go_json(load)))
        else:
            call = Call(body, headers, number, asyncio.get_running_loop().time())
            script = self._open(call)
            try:
                self._cancel_when_client_leaves(call, reader)
                await self._perform(call, script, writer)
                await writer.drain()
            finally:
                reader.on_end = None
                self.open_calls -= 1
                call.ended = asyncio.get_running_loop().time()
            if script.close_on_reuse and await reader.read(1):
                self.closed_on_reuse += 1
            if script.close_on_reuse or script.close_after_response:
                return False
        return headers.get("connection", "").lower() != "close"

    def _open(self, call: Call) -> Script:
        script = self.script(call.body, len(self.calls))
        limit = self.token_limit(call.body)
        if script.honour_num_predict and limit is not None and limit < len(script.pieces):
            script = replace(script, pieces=script.pieces[:limit], done_reason="length")
        self.calls.append(call)
        self.open_calls += 1
        self.max_open_calls = max(self.max_open_calls, self.open_calls)
        return script

    def _cancel_when_client_leaves(self, call: Call, reader: WatchedReader) -> None:
        task = asyncio.current_task()
        assert task is not None

        def client_left() -> None:
            reader.on_end = None  # a reset may be reported after an end
            call.closed_by_client.set()
            task.cancel()

        reader.on_end = client_left
        if reader.at_eof():
            client_left()

    async def _perform(self, call: Call, script: Script, writer: asyncio.StreamWriter) -> None:
        if script.gate:
            await script.gate.wait()
        await asyncio.sleep(script.first_delay)
        if script.status != 200:
            plain = isinstance(script.error, bytes)
            body = script.error if isinstance(script.error, bytes) else go_json(self.error_body(script.error))
            more = [] if script.retry_after is None else [f"Retry-After: {script.retry_after}"]
            kind = "text/plain" if plain else "application/json"
            head = http_head(script.status, kind, "Transfer-Encoding: chunked", *more)
            writer.write(head + http_chunks(body) + self.end_of_body)
            return
        if call.body.get("stream", self.streams_by_default) is False:
            head = http_head(200, self.json_type, "Transfer-Encoding: chunked")
            writer.write(head + http_chunks(self.whole(call, script)) + self.end_of_body)
            return
        raw = script.raw_chunks
        parts: Sequence[str | bytes] = script.pieces if raw is None else raw
        unsent = http_head(200, self.stream_type, "Transfer-Encoding: chunked")
        unsent += http_chunks(*self.opening(call)) if raw is None else b""
        for index in range(len(parts) + 1):
            if index == script.stall_after:
                await asyncio.Event().wait()  # until the client's leaving cancels it
            if index == script.drop_after:
                self._reset(writer, b"" if index == 0 else b"1000\r\n" + self.piece(call, "cut")[:20])
            if index == len(parts):
                break
            if index:
                # Raw chunks lie far enough apart for each to be read on its own.
                await asyncio.sleep(script.delay or (0.01 if raw is not None else 0))
            part = parts[index]
            writer.write(unsent + http_chunks(self.piece(call, part) if isinstance(part, str) else part))
            await writer.drain()
            unsent = b""
            call.pieces_sent += 1
        end = [] if raw is not None or script.end_without_done else self.ending(call, script)
        if script.error_line is not None:
            end = [self.error_record(script.error_line)]
        writer.write(unsent + http_chunks(*end) + self.end_of_body)

    @staticmethod
    def _reset(writer: asyncio.StreamWriter, last_words: bytes) -> None:
        writer.write(last_words)
        # Lingering for zero seconds makes close() send RST instead of FIN.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        raise ConnectionResetError("by script")

    def error_body(self, error: str | dict[str, Any]) -> dict[str, Any]:
        return {"error": error}

    def opening(self, call: Call) -> list[bytes]:
        return []

    # What a dialect says; the records are bytes, each the contents of one chunk.
    @abstractmethod
    def info(self, path: str) -> dict[str, Any] | None: ...  # the body of a GET, None where there is none
    @abstractmethod
    def refusal(self, headers: dict[str, str], path: str, body: Any) -> tuple[int, dict[str, Any]] | None: ...

    def load_only(self, body: dict[str, Any]) -> dict[str, Any] | None:
        return None

    @abstractmethod
    def token_limit(self, body: dict[str, Any]) -> int | None: ...
    @abstractmethod
    def error_record(self, error: str) -> bytes: ...
    @abstractmethod
    def piece(self, call: Call, text: str) -> bytes: ...
    @abstractmethod
    def ending(self, call: Call, script: Script) -> list[bytes]: ...

    def whole(self, call: Call, script: Script) -> bytes:  # with "stream": false
        raise NotImplementedError


class ScriptedOllama(ScriptedEngine):
    """Ollama 0.24 as recorded in shared/ollama."""

    generate_path = "/api/generate"
    stream_type = "application/x-ndjson"

    def info(self, path: str) -> dict[str, Any] | None:
        details = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"]}
        details |= {"parameter_size": "134.52M", "quantization_level": "Q4_1"}
        facts = {"modified_at": "2026-11-22T19:56:26.258874789Z", "size": 98365399, "digest": "76a1" * 16}
        tags = {"models": [{"name": name, "model": name, **facts, "details": details} for name in self.models]}
        answers: dict[str, dict[str, Any]] = {
            "/api/tags": tags,
            "/api/version": {"version": "0.24.0"},
            "/api/ps": {"models": []},
        }
        return answers.get(path)

    def refusal(self, headers: dict[str, str], path: str, body: Any) -> tuple[int, dict[str, Any]] | None:
        if path != self.generate_path:
            return None
        if not isinstance(body, dict):
            return 400, {"error": "unexpected EOF"}
        model = str(body.get("model", ""))
        known = {*self.models, *(name.removesuffix(":latest") for name in self.models)}
        return None if model in known else (404, {"error": f"model '{model}' not found"})

    def load_only(self, body: dict[str, Any]) -> dict[str, Any] | None:
        return None if body.get("prompt") else self._record(body, "", True) | {"done_reason": "load"}

    def token_limit(self, body: dict[str, Any]) -> int | None:
        limit: int | None = body.get("options", {}).get("num_predict")
        return limit

    def error_record(self, error: str) -> bytes:
        return go_json({"error": error}) + b"\n"

    def piece(self, call: Call, text: str) -> bytes:
        return go_json(self._record(call.body, text, False)) + b"\n"

    def ending(self, call: Call, script: Script) -> list[bytes]:
        return [go_json(self._record(call.body, "", True) | self._figures(call, script)) + b"\n"]

    def whole(self, call: Call, script: Script) -> bytes:
        call.pieces_sent = len(script.pieces)
        return go_json(self._record(call.body, "".join(script.pieces), True) | self._figures(call, script))

    def _record(self, body: dict[str, Any], text: str, done: bool) -> dict[str, Any]:
        return {"model": body["model"], "created_at": go_timestamp(), "response": text, "done": done}

    def _figures(self, call: Call, script: Script) -> dict[str, Any]:
        spent = int((asyncio.get_running_loop().time() - call.started) * 1e9)
        reason = {} if script.done_reason is None else {"done_reason": script.done_reason}
        return reason | {
            "context": [1, 9690, 198, 198, 2683, 359, 354, 4507],
            "total_duration": spent + 134_376_961,
            "load_duration": 71_513_986,
            "prompt_eval_count": script.prompt_eval_count,
            "prompt_eval_duration": 62_862_975,
            "eval_count": call.pieces_sent if script.eval_count is None else script.eval_count,
            "eval_duration": spent,
        }


class ScriptedOpenAI(ScriptedEngine):
    """The chat completions of llama.cpp's server, in the key order in which it writes them."""

    generate_path = "/v1/chat/completions"
    stream_type = "text/event-stream"
    streams_by_default = False

    def __init__(self, models: Iterable[str] = ("phi4badges",), port: int = 0, api_key: str | None = None) -> None:
        super().__init__(models, port)
        self.api_key = api_key
        self.facts: dict[str, Any] = {}  # what /models says of each model, besides llama.cpp's facts

    @property
    def base_url(self) -> str:
        return self.url + "/v1"

    def info(self, path: str) -> dict[str, Any] | None:
        facts = {"object": "model", "created": 1795377600, "owned_by": "llamacpp"}
        models = [{"id": name, **facts, **self.facts} for name in self.models]
        return {"object": "list", "data": models} if path == "/v1/models" else None

    def refusal(self, headers: dict[str, str], path: str, body: Any) -> tuple[int, dict[str, Any]] | None:
        def refuse(code: int, message: str, kind: str) -> tuple[int, dict[str, Any]]:
            return code, {"error": {"code": code, "message": message, "type": kind}}

        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            return refuse(401, "Invalid API Key", "authentication_error")
        if path != self.generate_path:
            return None
        if not isinstance(body, dict):
            return refuse(400, "parse error", "invalid_request_error")
        return None if body.get("model") in self.models else refuse(404, "model not found", "not_found_error")

    def token_limit(self, body: dict[str, Any]) -> int | None:
        return body.get("max_tokens")

    def error_body(self, error: str | dict[str, Any]) -> dict[str, Any]:
        return {"error": {"code": 500, "message": error, "type": "server_error"} if isinstance(error, str) else error}

    def error_record(self, error: str) -> bytes:
        return b"data: %b\n\n" % orjson.dumps(self.error_body(error))

    def opening(self, call: Call) -> list[bytes]:
        return [self._chunk(call, {"role": "assistant", "content": None})]

    def piece(self, call: Call, text: str) -> bytes:
        return self._chunk(call, {"content": text})

    def ending(self, call: Call, script: Script) -> list[bytes]:
        records = [] if script.done_reason is None else [self._chunk(call, {}, script.done_reason)]
        if (call.body.get("stream_options") or {}).get("include_usage"):
            written = call.pieces_sent if script.eval_count is None else script.eval_count
            usage = {"completion_tokens": written, "prompt_tokens": script.prompt_eval_count}
            records.append(self._chunk(call, None, usage=usage | {"total_tokens": written + script.prompt_eval_count}))
        return [*records, b"data: [DONE]\n\n"]

    def _chunk(self, call: Call, delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
        choices = [] if delta is None else [{"finish_reason": finish, "index": 0, "delta": delta}]
        chunk = {"choices": choices, "created": int(time.time()), "id": f"chatcmpl-{id(call):x}"}
        chunk |= {"model": call.body["model"], "system_fingerprint": "b9554-d403f00", "object": "chat.completion.chunk"}
        return b"data: %b\n\n" % orjson.dumps(chunk | more)


# ---------------------------------------------------------------- Server-Sent Events


class SseParser:
    """Bytes in, events out, by the rules of WHATWG HTML 9.2.6, but bytes that are not UTF-8 raise.

    An event is {"id", "event", "data"}, its data parsed when it is JSON; comments and retry fields are reported too.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = ""
        self._after_cr = self._started = False
        self._data: list[str] = []
        self._event = self._id = ""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        text = self._decoder.decode(data)
        if text and not self._started:
            self._started = True
            text = text.removeprefix("\ufeff")
        if text and self._after_cr:  # the line ended with the CR; its LF may come in a later chunk
            text = text.removeprefix("\n")
            self._after_cr = False
        self._after_cr = self._after_cr or text.endswith("\r")
        *lines, self._line = re.split("\r\n|\r|\n", self._line + text)
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: str) -> dict[str, Any] | None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            return self._dispatch()
        if not name:
            return {"comment": value}
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            return {"retry": int(value)}
        return None

    def _dispatch(self) -> dict[str, Any] | None:
        data: Any = "\n".join(self._data)
        event = {"id": self._id, "event": self._event or "message", "data": data} if self._data else None
        self._data, self._event = [], ""
        if event is not None:
            with suppress(orjson.JSONDecodeError):
                event["data"] = orjson.loads(data)
        return event


async def parse_sse(chunks: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The events of a body as they arrive, e.g. of httpx's `response.aiter_bytes()`."""
    parser = SseParser()
    async for chunk in chunks:
        for event in parser.feed(chunk):
            yield event


# ---------------------------------------------------------------- HTTP/2, frame by frame


Headers = Iterable[tuple[str, str]]
Body = bytes | dict[str, Any] | None


@dataclass
class Response:
    """What has arrived on a stream."""

    status: int = 0  # 0: no headers yet
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | bytearray = field(default_factory=bytearray)
    ended: bool = False  # END_STREAM was seen
    reset_code: int | None = None  # of the server's RST_STREAM
    left: bool = False  # we reset it
    unacknowledged: int = 0

    @property
    def over(self) -> bool:
        return self.ended or self.left or self.reset_code is not None

    def json(self) -> Any:
        return orjson.loads(self.body)


class H2Client:
    """An HTTP/2 connection in the hands of a test. Waiting raises ConnectionError when the server is gone."""

    def __init__(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], h2c: H2Connection, at: str) -> None:
        self.h2 = h2c
        self.auto_window = True  # False: what arrives is not acknowledged, so the server runs out of window
        self.goaway: h2.events.ConnectionTerminated | None = None
        self.closed = asyncio.Event()
        self.pings = 0  # of ours, that the server has answered
        (self._reader, self._writer), self._authority = streams, at
        self._streams: dict[int, Response] = {}
        self._settled = False
        self._changed = asyncio.Event()
        self._why_closed = "the connection was closed by this client"
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        host: str,
        port: int,
        ssl: ssl.SSLContext | bool | None = None,
        initial_window: int = 65535,
        auto_window: bool = True,
    ) -> Self:
        """h2c with prior knowledge, or h2 by ALPN; `ssl=True` trusts any certificate."""
        if ssl is True:
            ssl = trusting_tls()
        if ssl:
            ssl.set_alpn_protocols(["h2"])
        patience = {"ssl_shutdown_timeout": 1} if ssl else {}
        reader, writer = await asyncio.open_connection(host, port, ssl=ssl or None, **patience)
        if ssl and (chosen := writer.get_extra_info("ssl_object").selected_alpn_protocol()) != "h2":
            writer.transport.abort()
            raise ConnectionError(f"the server chose {chosen} by ALPN")
        h2c = H2Connection()
        ours = {SettingCodes.INITIAL_WINDOW_SIZE: initial_window, SettingCodes.ENABLE_PUSH: 0}
        h2c.local_settings = Settings(client=True, initial_values=ours)
        h2c.initiate_connection()
        if initial_window > 65535:
            h2c.increment_flow_control_window(initial_window - 65535)
        client = cls((reader, writer), h2c, f"{host}:{port}")
        client.auto_window = auto_window
        try:
            client.flush()
            await client._until(lambda: client._settled, 20, "the server's SETTINGS")
        except BaseException:
            await client.abort()
            raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def close(self) -> None:
        """Say GOAWAY and close."""
        with suppress(ProtocolError):
            self.h2.close_connection()
        self.flush()
        self._writer.close()
        await self.abort(patience=1)

    async def abort(self, patience: float = 0) -> None:
        """Close the socket without a word."""
        self._reading.cancel()
        await asyncio.wait([self._reading])
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(patience or None):
                if not patience:
                    self._writer.transport.abort()
                await self._writer.wait_closed()
        self._writer.transport.abort()
        await asyncio.sleep(0)

    def flush(self) -> None:
        """Send what h2 has prepared."""
        if (data := self.h2.data_to_send()) and not self._writer.is_closing():
            self._writer.write(data)

    async def request(
        self, method: str, path: str, headers: Headers = (), body: Body = None, end_stream: bool = True
    ) -> int:
        """Send a request and return its stream id. A dict is sent as JSON with its two headers, bytes without any."""
        self._must_be_open()
        fields = [(":method", method), (":scheme", "https" if self._writer.get_extra_info("ssl_object") else "http")]
        fields += [(":authority", self._authority), (":path", path), *headers]
        if isinstance(body, dict):
            body = orjson.dumps(body)
            fields += [("content-type", "application/json"), ("content-length", str(len(body)))]
        stream_id = self.h2.get_next_available_stream_id()
        self._streams[stream_id] = Response()
        self.h2.send_headers(stream_id, fields, end_stream=end_stream and body is None)
        self.flush()
        await asyncio.sleep(0)  # lets the reader run in a loop of requests
        if body is not None:
            await self.send_data(stream_id, body, end_stream)
        return stream_id

    async def send_data(self, stream_id: int, data: bytes, end_stream: bool = False, timeout: float = 10) -> int:
        """Send as the windows allow; the number of bytes sent, fewer than given only if the server was done earlier."""
        stream, sent = self._streams[stream_id], 0

        def room() -> int:
            gone = stream.left or stream.reset_code is not None
            return 0 if gone else min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)

        while True:
            await self._until(lambda: room() > 0 or stream.over or not data, timeout, f"room on stream {stream_id}")
            self._must_be_open()
            part = data[sent : sent + max(0, room())]
            if (data and not part) or stream.left or stream.reset_code is not None:
                return sent
            sent += len(part)
            self.h2.send_data(stream_id, part, end_stream=end_stream and sent == len(data))
            self.flush()
            await self._writer.drain()
            if sent == len(data):
                return sent

    async def send_raw(self, frames: bytes) -> None:
        """Send bytes past h2's checks; what they open or close, h2 does not know."""
        self._must_be_open()
        self._writer.write(frames)
        await self._writer.drain()

    def reset(self, stream_id: int, code: int = ErrorCodes.CANCEL) -> None:
        """RST_STREAM, unless the stream is over already."""
        self._streams[stream_id].left = True
        with suppress(StreamClosedError):
            self.h2.reset_stream(stream_id, code)
        self.flush()

    def acknowledge(self) -> None:
        """Open the windows again after `auto_window` was off, and keep them open."""
        self.auto_window = True
        for stream_id, stream in self._streams.items():
            if stream.unacknowledged:
                self.h2.acknowledge_received_data(stream.unacknowledged, stream_id)
                stream.unacknowledged = 0
        self.flush()

    async def headers(self, stream_id: int, timeout: float = 5) -> Response:
        """The response as far as it has come, once its headers are there."""
        stream = self._streams[stream_id]
        await self._until(lambda: stream.status or stream.over, timeout, f"headers on stream {stream_id}")
        if not stream.status:
            raise ConnectionError(f"the server reset stream {stream_id} with code {stream.reset_code}")
        return replace(stream, body=bytes(stream.body))

    async def response(self, stream_id: int, timeout: float = 5) -> Response:
        """The response, once it has ended or was reset."""
        stream = self._streams[stream_id]
        await self._until(lambda: stream.over, timeout, f"the end of stream {stream_id}")
        return replace(stream, body=bytes(stream.body))

    async def chunks(self, stream_id: int, timeout: float = 20) -> AsyncIterator[bytes]:
        """The body from its start as it arrives; it may be silent for `timeout` seconds."""
        stream, seen = self._streams[stream_id], 0

        def unseen() -> bytes:
            return bytes(stream.body[seen:])

        while True:
            await self._until(lambda: stream.over or unseen(), timeout, f"more of stream {stream_id}")
            if chunk := unseen():
                seen += len(chunk)
                yield chunk
            elif stream.reset_code is not None and not stream.ended:
                raise ConnectionError(f"the server reset stream {stream_id} with code {stream.reset_code}")
            else:
                return

    def events(self, stream_id: int, timeout: float = 20) -> AsyncIterator[dict[str, Any]]:
        """The Server-Sent Events of a stream from its start, as they arrive."""
        return parse_sse(self.chunks(stream_id, timeout))

    def _must_be_open(self) -> None:
        if self.closed.is_set():
            raise ConnectionError(self._why_closed)

    async def _until(self, condition: Callable[[], Any], timeout: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    self._must_be_open()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"{what}: not within {timeout} s") from None

    async def _read(self) -> None:
        pending = bytearray()
        try:
            while data := await self._reader.read(65536):
                pending += data
                # One frame at a time, so that a frame which h2 refuses does not hide those before it.
                while len(pending) >= 9 and len(pending) >= (size := 9 + int.from_bytes(pending[:3])):
                    frame = bytes(pending[:size])
                    del pending[:size]
                    for event in self.h2.receive_data(frame):
                        self._take(event)
                self.flush()
                self._announce()
            self._why_closed = "the server closed the connection"
        except (OSError, ProtocolError) as error:
            self._why_closed = f"the connection broke: {error!r}"
            self.flush()
        finally:
            if self.goaway:
                self._why_closed += f", after GOAWAY with code {int(self.goaway.error_code or 0)}"
            self.closed.set()
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _take(self, event: h2.events.Event) -> None:
        stream = self._streams.setdefault(getattr(event, "stream_id", None) or 0, Response())
        match event:
            case h2.events.RemoteSettingsChanged():
                self._settled = True
            case h2.events.ResponseReceived():
                for raw_name, raw_value in event.headers or ():
                    name, value = bytes(raw_name).decode(), bytes(raw_value).decode()
                    stream.headers[name] = f"{stream.headers[name]}, {value}" if name in stream.headers else value
                stream.status = int(stream.headers.pop(":status"))
            case h2.events.DataReceived():
                stream.body += event.data or b""
                if self.auto_window:
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                else:
                    stream.unacknowledged += event.flow_controlled_length or 0
            case h2.events.StreamEnded():
                stream.ended = True
            case h2.events.StreamReset() if event.remote_reset:
                stream.reset_code = int(event.error_code or 0)
            case h2.events.PingAckReceived():
                self.pings += 1
            case h2.events.ConnectionTerminated():
                self.goaway = event
                # RFC 9113 6.8: streams under way go on after GOAWAY, but h2 takes it for the end of the connection.
                self.h2.state_machine.state = ConnectionState.CLIENT_OPEN


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # with SETTINGS


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """An HTTP/2 frame (RFC 9113 4.1), true or not."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def requests_and_resets(count: int, path: str = "/livez") -> tuple[list[bytes], list[bytes]]:
    encoder = Encoder()
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
    streams = range(1, 2 * count, 2)
    return (
        [frame(1, stream, encoder.encode(head), 5) for stream in streams],
        [frame(3, stream, b"\0\0\0\x08") for stream in streams],
    )


@cache
def resets_of_a_flood(torn: bool) -> bytes:
    heads, resets = requests_and_resets(990, "/generate/stream?content=knots")
    pairs = [part for pair in zip(heads, resets, strict=True) for part in pair]
    return PREFACE + b"".join(heads + resets if torn else pairs)


async def flood_of_resets(port: int, torn: bool) -> None:
    """One connection of 990 requests that are reset: each at once, or all of them at the end."""
    with suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(resets_of_a_flood(torn))
        try:
            async with asyncio.timeout(8):  # one whose resets were all allowed stays open
                while await reader.read(2**16):
                    pass
        finally:
            writer.transport.abort()


# ---------------------------------------------------------------- the service as a process


class Server:
    """The service as a process of its own: `python, *command`, with `env` and little else of our environment."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        ready_url: str | None,
        cwd: str | Path | None = None,
        python: str = sys.executable,
        start_timeout: float = 20,
    ) -> None:
        self.command = [python, *command]
        # A setting in the shell of whoever runs the tests must not reach the service.
        kept = ("PATH", "HOME", "TMPDIR", "LANG", "LC_", "LD_", "PYTHON", "VIRTUAL_ENV", "COVERAGE")
        self.env = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        self.env |= {"PYTHONUNBUFFERED": "1", **env}
        self.ready_url = ready_url  # of /livez; None: do not wait, e.g. for a start that must fail
        self.cwd = cwd
        self.start_timeout = start_timeout
        self.log: deque[str] = deque(maxlen=5000)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            env=self.env,
            cwd=self.cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=2**22,
        )
        self._collecting = asyncio.create_task(self._collect())
        try:
            if self.ready_url:
                await self._wait_until_ready(self.ready_url)
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.kill()

    async def terminate(self, timeout: float = 20) -> int:
        """SIGTERM to the main process alone, as a service manager does; returns the exit code."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        return await self.wait(timeout)

    async def wait(self, timeout: float = 20) -> int:
        """The exit code; negative for a signal. The log is complete when this returns."""
        try:
            async with asyncio.timeout(timeout):
                code = await self._process.wait()
                await asyncio.shield(self._collecting)
                return code
        except TimeoutError:
            raise TimeoutError(f"still running {timeout} s later; its log ends with\n{self.tail()}") from None

    async def kill(self) -> None:
        """Kill the process and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()
        await self._collecting
        await asyncio.sleep(0)

    def tail(self) -> str:
        return "\n".join(list(self.log)[-30:])

    async def _collect(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.log.append(line.decode(errors="replace").rstrip("\n"))

    async def _wait_until_ready(self, url: str) -> None:
        deadline = time.monotonic() + self.start_timeout
        answer = "no connection"
        while True:
            if self._process.returncode is not None:
                await self._collecting
                raise RuntimeError(f"the service exited with {self._process.returncode}:\n{self.tail()}")
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(2):
                    answer = await status_line(url)
            if " 200" in answer:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} not ready within {self.start_timeout} s ({answer}):\n{self.tail()}")
            await asyncio.sleep(0.02)


async def status_line(url: str) -> str:
    """GET over HTTP/1.1, any certificate trusted; what the answer's first line says."""
    parts = urlsplit(url)
    context = trusting_tls() if parts.scheme == "https" else None
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    try:
        writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        return (await reader.readuntil(b"\r\n")).decode().strip()
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()

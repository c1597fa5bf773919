"""Honest clients beside every attack that is known, on one core: `python tools/soak.py --minutes 30`.

The service runs with its default settings and a scripted engine. Each client and each attack has an address of its own
(127.0.0.0/8, so Linux alone). Honest clients ask for JSON, for events over h2c, and for a result later; each must get a
badge, or a refusal of the contract. At the end the service must have logged no traceback, and be within 64 MB of
the size that it had. Exit code 0 if all of that is so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from hpack import Encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from testkit import PREFACE, Script, ScriptedOllama, Server, badge_json, frame, free_port, rss_kib, split

HERE = Path(__file__).resolve().parents[1]  # the checkout
COURSE = {"content": "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall. " * 8}
FAT = {"content": "Ties knots on ropes of all kinds. " * 7300}  # 250 KB
MARKUP = {"content": "[" * 240_000}
REFUSALS = {413, 429, 503}
PATIENCE = 120  # seconds that an honest client waits
SETTLED = 75  # seconds after the last attack: two trims of the service's memory


class Soak:
    """What is asked of one service, and what came of it."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.outcomes = Counter[str]()
        self.attacks = Counter[str]()
        self.slowest = 0.0  # answer of /livez, in seconds

    # -- honest clients

    def client(self, address: str, http2: bool) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(http1=not http2, http2=http2, local_address=address)
        return httpx.AsyncClient(transport=transport, base_url=self.url, timeout=PATIENCE)

    async def whole(self, client: httpx.AsyncClient) -> str:
        answer = await client.post("/generate", json=COURSE)
        return self._outcome(answer, answer.json() if answer.status_code == 200 else None)

    async def streamed(self, client: httpx.AsyncClient) -> str:
        async with client.stream("POST", "/generate/stream", json=COURSE) as answer:
            text = (await answer.aread()).decode()
        last = text.rstrip().rpartition("data: ")[2]
        if answer.status_code != 200:
            return self._outcome(answer, None)
        event = json.loads(last)
        if event["type"] == "error":
            return f"error {event['error_code']}"
        return "badge" if event["content"]["badge_name"] else "no badge"

    async def later(self, client: httpx.AsyncClient) -> str:
        answer = await client.post("/generate", json=COURSE, headers={"prefer": "respond-async"})
        if answer.status_code != 202:
            return self._outcome(answer, None)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            await asyncio.sleep(0.5)
            found = await client.get(answer.headers["location"])
            if found.status_code != 200:
                return self._outcome(found, None)
            state = found.json()
            if state["status"] not in ("queued", "running"):
                return self._outcome(found, state["result"])
        return "no end"

    def _outcome(self, answer: httpx.Response, result: Any) -> str:
        if answer.status_code in REFUSALS:
            return f"refused {answer.status_code} {answer.json()['error_code']}"
        return "badge" if result and result["response"]["badge_name"] else f"no badge, {answer.status_code}"

    async def honest(self, address: str, way: str) -> None:
        async with self.client(address, http2=way == "streamed") as client:
            while True:
                try:
                    outcome = await getattr(self, way)(client)
                except httpx.HTTPError as error:
                    outcome = f"broken: {error!r}"
                self.outcomes[f"{way}: {outcome}"] += 1
                await asyncio.sleep(0.2)

    async def watch(self) -> None:
        async with self.client("127.0.0.2", http2=False) as client:
            while True:
                started = time.monotonic()
                try:
                    answer = await client.get("/livez")
                    self.outcomes[f"livez: {answer.status_code}"] += 1
                except httpx.HTTPError as error:
                    self.outcomes[f"livez: broken: {error!r}"] += 1
                self.slowest = max(self.slowest, time.monotonic() - started)
                await asyncio.sleep(0.1)

    # -- attacks, each one round

    async def raw(self, address: str, sent: bytes, seconds: float, drip: bytes = b"") -> None:
        """Send, read what comes, and leave without a word after so many seconds."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))
                try:
                    writer.write(sent)
                    while drip:
                        await asyncio.sleep(0.5)
                        writer.write(drip)
                        await writer.drain()
                    while await reader.read(2**16):
                        pass
                finally:
                    writer.transport.abort()

    async def many(self, count: int, address: str, sent: bytes, seconds: float, drip: bytes = b"") -> None:
        await asyncio.gather(*(self.raw(address, sent, seconds, drip) for _ in range(count)))

    async def rapid_reset(self, address: str) -> None:
        await self.many(10, address, resets(together=True), 5)

    async def torn_reset(self, address: str) -> None:
        await self.many(10, address, resets(together=False), 5)

    async def silence(self, address: str) -> None:
        await self.many(300, address, b"", 12)

    async def endless_heads(self, address: str) -> None:
        await self.many(100, address, b"GET /livez HTTP/1.1\r\nx: ", 12, drip=b"x")

    async def large_heads(self, address: str) -> None:
        head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n" + b"x: " + b"x" * 55_000 + b"\r\n\r\n"
        await self.many(250, address, head, 12)

    async def open_posts(self, address: str) -> None:
        await self.many(5, address, PREFACE + requests(200, "POST", "/generate", b"x" * 1000), 12)

    async def closed_windows(self, address: str) -> None:
        """A reader that never opens a window; its streams count as in flight."""
        preface = PREFACE[:-9] + frame(4, 0, b"\0\4\0\0\0\0")
        await self.many(2, address, preface + requests(20, "GET", "/generate/stream?content=knots"), 12)

    async def goaway(self, address: str) -> None:
        sent = PREFACE + requests(4, "GET", "/generate/stream?content=knots") + frame(7, 0, b"\0" * 8)
        await self.many(4, address, sent, 3)

    async def nonsense(self, address: str) -> None:
        for sent in (os.urandom(400), PREFACE + os.urandom(400), b"\x16\x03\x01" + os.urandom(200), b"GET\r\n\r\n"):
            await self.many(5, address, sent, 1)

    async def posts(self, address: str, path: str, count: int, **request: Any) -> None:
        async with self.client(address, http2=False) as client:
            asked = (client.post(path, **request) for _ in range(count))
            await asyncio.gather(*asked, return_exceptions=True)

    async def slow_markup(self, address: str) -> None:
        await self.posts(address, "/generate", 40, json=MARKUP)

    async def fat_requests(self, address: str) -> None:
        await self.posts(address, "/generate", 32, json=FAT)

    async def documents(self, address: str) -> None:
        await self.posts(address, "/extract", 4, content=b"PK\3\4" + os.urandom(200_000))
        await self.posts(address, "/extract", 4, content=b"%PDF-1.7\n" + b"1 0 obj << " * 20_000)

    async def other_sites(self, address: str) -> None:
        cross = {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "content-type": "text/plain"}
        await self.posts(address, "/generate", 20, json=COURSE, headers=cross)
        await self.posts(address, "/generate", 20, json=COURSE, headers={"content-encoding": "br"})

    async def attack(self, way: str, address: str) -> None:
        while True:
            await getattr(self, way)(address)
            self.attacks[way] += 1
            await asyncio.sleep(0.5)


ATTACKS = ["rapid_reset", "torn_reset", "silence", "endless_heads", "large_heads", "open_posts", "closed_windows"]
ATTACKS += ["goaway", "nonsense", "slow_markup", "fat_requests", "documents", "other_sites"]


def requests(count: int, method: str, path: str, data: bytes = b"") -> bytes:
    """Requests of one HTTP/2 connection; with data, their bodies never end."""
    encoder = Encoder()
    head = [(":method", method), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
    sent = b""
    for stream in range(1, 2 * count, 2):
        sent += frame(1, stream, encoder.encode(head), 4 if data else 5)
    return sent + b"".join(frame(0, stream, data) for stream in range(1, 2 * min(count, 60), 2) if data)


def resets(together: bool, count: int = 990) -> bytes:
    encoder = Encoder()
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost")]
    head.append((":path", "/generate/stream?content=knots"))
    heads = [frame(1, stream, encoder.encode(head), 5) for stream in range(1, 2 * count, 2)]
    ends = [frame(3, stream, b"\0\0\0\x08") for stream in range(1, 2 * count, 2)]
    pairs = [one for pair in zip(heads, ends, strict=True) for one in pair]
    return PREFACE + b"".join(pairs if together else heads + ends)


async def soak(minutes: float, core: str) -> bool:
    port = free_port()
    engine = ScriptedOllama()
    engine.script = lambda body, index: Script(split(badge_json(), 20), delay=0.02)
    async with engine:
        command = ["-c", core, sys.executable, "dccapi.py", "--bind", f"127.0.0.1:{port}", "--certs", "absent"]
        url = f"http://127.0.0.1:{port}/livez"
        async with Server(command, {"OLLAMA_URL": engine.url}, url, HERE, python="taskset") as server:
            return await measured(Soak(port), server, minutes)


async def measured(soak: Soak, server: Server, minutes: float) -> bool:
    strange = Counter[str]()  # what the service logs besides its generations

    async def run(seconds: float, work: list[Awaitable[None]]) -> int:
        """The size of the service, in KiB, at its largest meanwhile."""
        tasks, largest, end = [asyncio.ensure_future(one) for one in work], 0, time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(1)
            largest = max(largest, rss_kib(server.pid))
            while server.log:
                line = server.log.popleft()
                if " INFO " not in line:
                    strange[re.sub(r"[0-9a-f-]{8,}|\d+(?=[ .,:])", "N", line.partition(" dccapi: ")[2] or line)] += 1
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return largest

    honest: Callable[[], list[Awaitable[None]]] = lambda: [  # noqa: E731
        soak.watch(),
        *(soak.honest(f"127.0.0.{10 + number}", way) for number in range(4) for way in ("whole", "streamed", "later")),
    ]
    await run(10, honest())
    await run(3, [])
    soak.outcomes.clear()
    before, soak.slowest = rss_kib(server.pid), 0.0
    attacks = [soak.attack(way, f"127.0.1.{number}") for number, way in enumerate(ATTACKS, 1)]
    largest = await run(minutes * 60, [*honest(), *attacks])
    await run(SETTLED, [])
    after = rss_kib(server.pid)

    bad = {name: n for name, n in soak.outcomes.items() if re.search(r"broken|no badge|no end|livez: [^2]", name)}
    faults = [line for line in strange if re.search(r"Traceback|raised at|never retrieved|ERROR", line)]
    print(f"honest, {minutes:g} minutes: {sum(soak.outcomes.values())}, of which bad {sum(bad.values())}")
    for name, count in sorted(soak.outcomes.items()):
        print(f"  {count:7} {name}")
    print("rounds of attacks:", ", ".join(f"{name} {count}" for name, count in sorted(soak.attacks.items())))
    print(f"/livez at most {soak.slowest * 1000:.0f} ms")
    print(f"RSS {before} KiB, at most {largest} KiB, {SETTLED} s after the attacks {after} KiB")
    print("logged, besides generations:")
    for line, count in strange.most_common(20):
        print(f"  {count:7} {line[:200]}")
    return not bad and not faults and after - before < 64 * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--core", default="0", help="of the service; its clients have the others")
    options = parser.parse_args()
    if others := os.sched_getaffinity(0) - {int(options.core)}:
        os.sched_setaffinity(0, others)
    good = asyncio.run(soak(options.minutes, options.core))
    print("passed" if good else "FAILED")
    return not good


if __name__ == "__main__":
    sys.exit(main())

"""dccapi in a real Chromium, over TLS and HTTP/2. Skipped without Chromium, except in CI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright

from test_dccapi import badge_json, serving
from testkit import Script, eventually, split

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="needs Chromium: apt-get install chromium"),
]


class Proxy:
    """A TCP proxy that can cut its connections."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.carried: list[int] = []  # bytes from the server, one number for each connection

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        number = len(self.carried)
        self.carried.append(0)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, far_writer}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, counts: bool) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    self.carried[number] += len(data) * counts
                    sink.write(data)
                    await sink.drain()
            sink.transport.abort()

        await asyncio.gather(pump(reader, far_writer, False), pump(far_reader, writer, True))
        self._writers -= {writer, far_writer}


@contextlib.asynccontextmanager
async def page_at(url: str) -> AsyncIterator[Page]:
    """A page of a fresh Chromium with a profile of its own; its policy set aside for the tests' scripts."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            context = await browser.new_context(ignore_https_errors=True, bypass_csp=True)
            page = await context.new_page()
            await page.goto(url)
            yield page
        finally:
            await browser.close()


# Follows `count` generations as a page would that has never heard of `final`: it leaves ending to the browser.
FOLLOW = """
async ([count, path]) => Promise.all([...Array(count).keys()].map(number => new Promise((resolve, reject) => {
    const source = new EventSource(`${path}&seed=${number}`);
    const seen = {text: '', finals: 0, opened: 0, ids: []};
    source.onopen = () => seen.opened++;
    source.onmessage = event => {
        const data = JSON.parse(event.data);
        seen.ids.push(event.lastEventId);
        if (data.type === 'token') seen.text += data.content;
        if (data.type === 'final') seen.finals++;
    };
    source.onerror = () => source.readyState === EventSource.CLOSED && resolve(seen);
    setTimeout(() => reject(new Error('not closed: ' + JSON.stringify(seen))), 60000);
})))
"""


PROTOCOLS = """
() => performance.getEntriesByType('resource').filter(e => e.name.includes('stream')).map(e => e.nextHopProtocol)
"""


async def test_twenty_eventsources_share_one_h2_connection_and_none_generates_twice() -> None:
    pieces = split(badge_json(), 30)
    settings = {"max_per_client": 100, "resume_grace": 10}
    async with (
        serving(tls=True, script=Script(pieces=pieces, delay=0.01), **settings) as service,
        Proxy(service.port) as proxy,
        page_at(f"https://localhost:{proxy.port}/") as page,
    ):
        seen = await page.evaluate(FOLLOW, [20, "/generate/stream?content=knots"])
        protocols = await page.evaluate(PROTOCOLS)
        assert [one["text"] for one in seen] == [badge_json()] * 20
        assert [one["finals"] for one in seen] == [1] * 20
        assert len(service.engine.calls) == 20
        assert set(protocols) == {"h2"}
        assert sum(carried > 20_000 for carried in proxy.carried) == 1, "one connection carries them all"


async def test_an_eventsource_that_is_cut_resumes_by_itself_and_shows_the_same_text() -> None:
    pieces = split(badge_json(), 120)
    async with (
        serving(tls=True, script=Script(pieces=pieces, delay=0.03), resume_grace=10) as service,
        Proxy(service.port) as proxy,
        page_at(f"https://localhost:{proxy.port}/") as page,
    ):
        following = asyncio.create_task(page.evaluate(FOLLOW, [2, "/generate/stream?content=knots"]))
        await service.engine.wait_for_calls(2)
        await eventually(lambda: service.engine.calls[0].pieces_sent > 40)
        proxy.cut()
        seen = await following
        for one in seen:
            assert one["opened"] >= 2, "it was cut"
            assert one["text"] == badge_json()
            assert one["finals"] == 1
            assert len(one["ids"]) == len(set(one["ids"])) == len(pieces) + 1
        assert len(service.engine.calls) == 2


# The published Co-writer's way of asking and of reading, written anew: whole lines, `data: ` in front, no event names.
CO_WRITER = """<!doctype html><meta charset="utf-8"><title>Co-writer</title>
<h1 id="name"></h1><p id="description"></p><p id="criteria"></p><pre id="progress"></pre>
<script>
const show = (id, text) => { document.getElementById(id).textContent = text; };
async function write(url, course) {
    const response = await fetch(url, {
        method: 'POST',
        headers: {'Content-Type': 'application/json', 'Accept': 'text/event-stream'},
        body: JSON.stringify({
            course_input: course,
            badge_configuration: {badge_style: 'professional', badge_tone: 'not-specified', badge_level: '',
                                  criterion_style: 'Task-Oriented', institution: '', user_prompt: null},
            enable_skill_extraction: false, context_length: 0, image_generation: {enable_image_generation: true}
        })
    });
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let rest = '';
    for (;;) {
        const {done, value} = await reader.read();
        if (done) return;
        const lines = (rest + decoder.decode(value, {stream: true})).split('\\n');
        rest = lines.pop();
        for (const line of lines) {
            if (!line.startsWith('data: ')) continue;
            const data = JSON.parse(line.slice(6));
            if (data.type === 'token' && !data.done) show('progress', data.accumulated);
            if (data.type === 'error') show('progress', data.error || data.message);
            if (data.type !== 'final') continue;
            show('name', data.content.badge_name);
            show('description', data.content.badge_description);
            show('criteria', data.content.criteria.narrative);
        }
    }
}
</script>"""


async def test_the_co_writer_shows_the_badge_from_another_origin() -> None:
    async def serve_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = CO_WRITER.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    origin = await asyncio.start_server(serve_page, "127.0.0.1", 0)
    async with origin, serving(script=Script(delay=0.005)) as service:
        port = origin.sockets[0].getsockname()[1]
        async with page_at(f"http://localhost:{port}/") as page:
            url = f"{service.url}/api/v1/generate-badge-suggestions/stream"
            await page.evaluate("([url, course]) => write(url, course)", [url, "Knots for climbers"])
            badge = json.loads(badge_json())
            assert await page.inner_text("#name") == badge["badge_name"]
            assert await page.inner_text("#description") == badge["badge_description"]
            assert await page.inner_text("#criteria") == badge["criteria"]["narrative"]
            assert json.loads(await page.inner_text("#progress")) == badge
        asked = service.engine.calls[0].body["prompt"]
        assert "Style: Professional" in asked
        assert "Tone" not in asked

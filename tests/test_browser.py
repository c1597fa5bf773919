"""dccapi in a real Chromium, over TLS and HTTP/2. Skipped without Chromium, except in CI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import xml.etree.ElementTree
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import jsonschema_rs
import pytest
from playwright.async_api import Locator, Page, async_playwright, expect

from dccapi import Badge, open_badges
from service import HERE, MODEL, SLOW, certificate, judge, needs_model, serving
from testkit import Script, Server, badge_json, eventually, exceeds_context, free_port, split

__all__ = ["judge"]  # the fixture

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
    pytest.mark.slow,
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
async def chromium(**options: Any) -> AsyncIterator[Page]:
    """An empty page of a fresh Chromium with a profile of its own."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            context = await browser.new_context(ignore_https_errors=True, **options)
            yield await context.new_page()
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def page_at(url: str) -> AsyncIterator[Page]:
    """A page whose policy is set aside for the tests' scripts."""
    async with chromium(bypass_csp=True) as page:
        await page.goto(url)
        yield page


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
            assert len(one["ids"]) == len(set(one["ids"])) > len(pieces) / 2
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


# ---------------------------------------------------------------------------------------------------------------------
# The demo page
# ---------------------------------------------------------------------------------------------------------------------

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
COURSE = "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."
NAMES = ["Climbing Knots Essentials", "Rope and Knot Craft", "Safe Knots on the Wall", "The Climber's Six Knots"]


def drafts(delay: float = 0.01, **script: Any) -> Any:
    """The engine's script for drafts that can be told apart."""
    return lambda body, index: Script(pieces=split(badge_json(NAMES[index % 4])), delay=delay, **script)


@contextlib.asynccontextmanager
async def demo_at(url: str, **options: Any) -> AsyncIterator[Page]:
    """The demo page, its policy in force. It must not complain, nor ask any other host for anything.

    Chromium itself writes a line for each refused or cut request; the page says those in its own words.
    """
    origin = re.match("https?://[^/]+/", url)[0]
    complaints: list[str] = []
    elsewhere: list[str] = []
    async with chromium(**options) as page:
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
        page.on("request", lambda request: elsewhere.append(request.url))
        await page.goto(url)
        await page.locator("#health b").wait_for()
        yield page
        await page.evaluate("1")  # what the page has said until now has arrived here
        assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
        assert [one for one in elsewhere if not one.startswith((origin, "data:", "blob:" + origin))] == []


async def write(page: Page, count: int = 4, course: str = COURSE) -> None:
    await page.fill("#content", course)
    await page.click(f"#count label >> nth={count - 1}")
    await page.click("#write")


def card(page: Page, number: int) -> Locator:
    return page.get_by_role("article", name=f"Draft {number}", exact=True)


def field(page: Page, number: int, label: str) -> Locator:
    return card(page, number).get_by_label(label)


async def states(page: Page, *expected: str) -> None:
    """Wait until the cards say this."""
    await expect(page.locator(".card .state")).to_have_text(list(expected), timeout=20_000)


async def names_of(page: Page) -> list[str]:
    names: list[str] = await page.eval_on_selector_all(".name textarea", "inputs => inputs.map(input => input.value)")
    return names


async def downloaded(page: Page, button: Locator) -> tuple[str, bytes]:
    """Name and content of the file that a button gives."""
    async with page.expect_download() as started:
        await button.click()
    download = await started.value
    content = await asyncio.to_thread(Path(await download.path()).read_bytes)
    return download.suggested_filename, content


async def open_export(page: Page, number: int, format: str) -> None:
    await card(page, number).get_by_role("button", name="Export").click()
    if not await page.locator(f"#export [value={format}]").is_visible():
        await page.click("#for-systems summary")
    await page.check(f"#export [value={format}]")


async def export(page: Page, number: int, format: str) -> Any:
    """What the download holds; the dialog is closed again."""
    await open_export(page, number, format)
    _, content = await downloaded(page, page.locator("#export-save"))
    await page.click("#export [data-close]")
    return json.loads(content)


async def fill_issuer(page: Page, number: int) -> None:
    await open_export(page, number, "credential")
    await page.fill("#issuer-name", "Riverside State University")
    await page.fill("#issuer-id", "https://riverside.example")
    await expect(page.locator("#preview")).to_contain_text("OpenBadgeCredential")
    await page.click("#export [data-close]")


EVENT_PROTOCOLS = """
() => performance.getEntriesByType('resource').filter(e => e.name.includes('/events')).map(e => e.nextHopProtocol)
"""
WATCH_SHIFTS = """
() => {
    window.shifts = 0;
    const add = list => list.getEntries().forEach(entry => { window.shifts += entry.value; });
    new PerformanceObserver(add).observe({type: 'layout-shift'});
}
"""

WATCH_WRITING = """
() => {
    window.most = 0;
    const look = () => {
        const states = [...document.querySelectorAll('.state')].map(state => state.textContent);
        window.most = Math.max(window.most, states.filter(text => text === 'Writing').length);
    };
    new MutationObserver(look).observe(document.querySelector('#cards'), {subtree: true, childList: true});
}
"""


async def test_four_drafts_stream_at_once_on_one_h2_connection_and_nothing_moves() -> None:
    texts = ["Ties, dresses and checks the knots on which climbers rely. " * count for count in (8, 12)]
    scripts = [Script(pieces=split(badge_json(name, *texts)), delay=0.005, prompt_eval_count=900) for name in NAMES]
    scripts[3].delay = 0.02
    async with (
        serving(tls=True, script=lambda body, index: scripts[index]) as service,
        Proxy(service.port) as proxy,
        demo_at(f"https://localhost:{proxy.port}/", viewport={"width": 1280, "height": 900}) as page,
    ):
        await write(page)
        await eventually(lambda: service.engine.open_calls == 4)
        await expect(page.locator(".card.live")).to_have_count(4)
        await page.evaluate(WATCH_SHIFTS)
        for number in (1, 2, 3):
            await expect(card(page, number).locator(".state")).to_have_text("Draft")
        assert await card(page, 4).locator(".state").inner_text() == "Writing"
        assert await page.evaluate("window.shifts") < 0.001
        await states(page, *["Draft"] * 4)
        assert sorted(await names_of(page)) == sorted(NAMES)
        assert service.engine.max_open_calls == len(service.engine.calls) == 4
        assert len({call.body["options"]["seed"] for call in service.engine.calls}) == 4
        assert set(await page.evaluate(EVENT_PROTOCOLS)) == {"h2"}
        assert await page.text_content("#service-protocol") == "h2"
        assert len([carried for carried in proxy.carried if carried > 5_000]) == 1, "one connection carries them all"


@needs_model
@pytest.mark.timeout(300)
async def test_the_real_model_writes_four_drafts_over_h2_and_one_becomes_a_credential() -> None:
    port, secure = free_port(), free_port()
    certificate()
    command = ["dccapi.py", "--bind", f"127.0.0.1:{port}", "--tls-bind", f"127.0.0.1:{secure}", "--certs", "certs"]
    environment = {"ENGINE": "embedded", "MODEL_PATH": str(MODEL)}
    async with (
        Server(command, environment, f"http://127.0.0.1:{port}/readyz", HERE, start_timeout=60),
        Proxy(secure) as proxy,
        demo_at(f"https://localhost:{proxy.port}/") as page,
    ):
        await page.click("#samples button >> nth=0")
        await page.click("summary >> nth=1")
        await page.fill("#seed", "1")
        await page.click("#write")
        await page.evaluate(WATCH_WRITING)
        await expect(page.locator(".state", has_text="Draft")).to_have_count(4, timeout=200_000)
        assert await page.evaluate("window.most") == 4, "all are written at the same time"
        assert set(await page.evaluate(EVENT_PROTOCOLS)) == {"h2"}
        assert len([carried for carried in proxy.carried if carried > 20_000]) == 1, "one connection carries them all"
        for number in (1, 2, 3, 4):
            Badge.model_validate(await export(page, number, "badge"))
        await fill_issuer(page, 1)
        jsonschema_rs.validate(open_badges()[0], await export(page, 1, "credential"), validate_formats=True)
        await card(page, 2).get_by_role("button", name="Write again").click()
        await expect(card(page, 2).locator(".state")).to_have_text("Writing", timeout=60_000)
        await card(page, 2).get_by_role("button", name="Stop").click()
        # Where nothing was written yet, the draft before is back.
        await expect(card(page, 2).locator(".state")).to_have_text(re.compile("Stopped|Draft"))
        await expect(page.locator("#service-lines")).to_contain_text("0 writing, 0 waiting")


async def test_stop_ends_the_engine_call_and_leaves_the_other_drafts_alone() -> None:
    async with serving(script=SLOW) as service, demo_at(service.url + "/") as page:
        await write(page, 2)
        await states(page, "Writing", "Writing")
        for number in (1, 2):
            await expect(card(page, number).locator(".name textarea")).not_to_have_value("")
        await card(page, 2).get_by_role("button", name="Stop").click()
        await states(page, "Writing", "Stopped")
        stopped = [call for call in service.engine.calls if call.closed_by_client.is_set()]
        assert (len(stopped), service.engine.open_calls) == (1, 1)
        await page.click("#stop-all")
        await states(page, "Stopped", "Stopped")
        await service.idle()
        assert "" not in await names_of(page), "what was written stays to be read"


async def test_a_waiting_draft_tells_its_place_and_can_be_stopped_there() -> None:
    gate = asyncio.Event()
    async with (
        serving(script=drafts(gate=gate), max_concurrent_requests=1) as service,
        demo_at(service.url + "/") as page,
    ):
        await write(page, 3)
        places = "Waiting, number 1 in the queue", "Waiting, number 2 in the queue"
        await states(page, "Reading the course", *places)
        await card(page, 2).get_by_role("button", name="Stop").click()
        await states(page, "Reading the course", "Stopped", places[0])
        gate.set()
        await states(page, "Draft", "Stopped", "Draft")
        assert len(service.engine.calls) == 2


async def test_a_cut_connection_resumes_by_itself() -> None:
    async with (
        serving(tls=True, script=drafts(0.05)) as service,
        Proxy(service.port) as proxy,
        demo_at(f"https://localhost:{proxy.port}/") as page,
    ):
        await write(page, 2)
        await states(page, "Writing", "Writing")
        proxy.cut()
        await states(page, "Connection lost, resuming", "Connection lost, resuming")
        await states(page, "Draft", "Draft")
        assert sorted(await names_of(page)) == sorted(NAMES[:2])
        assert len(service.engine.calls) == 2


async def test_a_reload_keeps_finished_drafts_and_goes_on_with_running_ones() -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    gates[0].set()
    script = lambda body, index: Script(pieces=split(badge_json(NAMES[index])), gate=gates[index])  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await write(page, 2)
        await states(page, "Draft", "Reading the course")
        await field(page, 1, "Description").fill("Written by hand.")
        await page.reload()
        await expect(field(page, 1, "Description")).to_have_value("Written by hand.")
        assert await page.input_value("#content") == COURSE
        gates[1].set()
        await states(page, "Draft", "Draft")
        await page.reload()
        await states(page, "Draft", "Draft")
        assert await names_of(page) == NAMES[:2]
        assert len(service.engine.calls) == 2
        await page.click("#clear")
        await expect(page.locator(".card")).to_have_count(0)
        await page.click("#undo")
        await expect(page.locator(".card")).to_have_count(2)
        await page.click("#clear")
        await page.reload()
        await expect(page.locator("#empty")).to_be_visible()


async def test_a_draft_that_the_service_has_forgotten_says_so() -> None:
    async with serving(script=drafts(gate=asyncio.Event())) as service, demo_at(service.url + "/") as page:
        await write(page, 1)
        await states(page, "Reading the course")
        generation = next(iter(service.queue.running))
        service.queue.known.clear()
        await page.reload()
        await states(page, "Failed")
        await expect(card(page, 1).locator(".alert")).to_contain_text("Write it again")
        service.queue.known[generation.id] = generation


async def test_an_export_is_a_credential_an_achievement_or_the_badge(judge: Any) -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await page.select_option("#badge_level", "Expert")
        await write(page, 1)
        await states(page, "Draft")
        await field(page, 1, "Name").fill("Knots & <Bends>")
        await open_export(page, 1, "credential")
        await page.click("#export-save")
        await expect(page.locator("#export-error")).to_contain_text("Name the issuer")
        await page.click("#export [data-close]")
        await fill_issuer(page, 1)
        await page.reload()
        credential = await export(page, 1, "credential")
        assert credential["issuer"]["name"] == "Riverside State University", "it is remembered"
        assert judge.judge(credential, "credential", checks=("schema", "rules", "jsonld", "dcc"))["errors"] == []
        achievement = await export(page, 1, "achievement")
        assert judge.judge(achievement, "achievement")["errors"] == []
        badge = await export(page, 1, "badge")
        assert credential["credentialSubject"]["achievement"]["name"] == achievement["name"] == "Knots & <Bends>"
        assert badge["badge_name"] == achievement["name"]
        assert badge["criteria"]["narrative"] == achievement["criteria"]["narrative"]
        assert achievement["image"]["id"].startswith("data:image/svg+xml;base64,")


async def test_a_faulty_issuer_is_explained_beside_its_field() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await write(page, 1)
        await states(page, "Draft")
        await open_export(page, 1, "credential")
        await page.fill("#issuer-name", "Riverside")
        await page.fill("#issuer-id", "riverside example")
        await page.click("#export-save")
        await expect(page.locator("#export-error")).to_contain_text("web address")
        await expect(page.get_by_label("web address")).to_be_focused()


async def test_the_drawn_badge_can_be_taken_as_svg_and_as_png() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await page.fill("#institution", "École & Söhne <1884>")
        await write(page, 1)
        await states(page, "Draft")
        name, drawing = await downloaded(page, card(page, 1).get_by_role("button", name="SVG"))
        assert name == "climbing-knots-essentials.svg"
        said = " ".join(xml.etree.ElementTree.fromstring(drawing).itertext())
        assert "Climbing Knots Essentials" in said
        assert "École & Söhne <1884>" in said
        name, picture = await downloaded(page, card(page, 1).get_by_role("button", name="PNG"))
        assert name == "climbing-knots-essentials.png"
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture[16:24] == bytes([0, 0, 4, 0] * 2), "1024 by 1024"


async def test_one_field_is_written_anew_and_can_be_put_back() -> None:
    anew = json.dumps({"badge_description": "Quite another description of the same knots."})
    script = lambda body, index: Script(pieces=split(anew if index else badge_json()), delay=0.01)  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await write(page, 1)
        await states(page, "Draft")
        before = await field(page, 1, "Description").input_value()
        await card(page, 1).get_by_role("button", name="Rewrite the description").click()
        await expect(field(page, 1, "Description")).to_have_value("Quite another description of the same knots.")
        await states(page, "Draft")
        assert await names_of(page) == NAMES[:1]
        await page.click("#undo")
        await expect(field(page, 1, "Description")).to_have_value(before)
        await card(page, 1).get_by_role("button", name="Write again").click()
        await expect(card(page, 1).locator(".alert")).to_contain_text("Try again")
        await states(page, "Draft")
        await expect(field(page, 1, "Description")).to_have_value(before)


async def test_a_refused_request_is_told_once_at_the_form() -> None:
    async with (
        serving(script=drafts(prompt_eval_count=200), num_ctx=400) as service,
        demo_at(service.url + "/") as page,
    ):
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("Paste a course description")
        await expect(page.locator("#content")).to_be_focused()
        await page.fill("#content", "word " * 5000)
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("Shorten it")
        await page.fill("#content", COURSE)
        await page.click("summary >> nth=1")
        await page.fill("#temperature", "7")
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("Temperature")
        await expect(page.locator("#temperature")).to_be_focused()
        assert await page.locator(".card").count() == 0
        await page.fill("#temperature", "1")
        await page.click("#write")
        await states(page, *["Draft"] * 4)
        assert service.engine.calls[0].body["options"]["temperature"] == 1


async def test_a_failure_is_told_in_its_card_with_what_to_do() -> None:
    script = lambda body, index: exceeds_context(700, 600) if index == 0 else Script(error_line="died")  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await write(page, 1)
        await states(page, "Failed")
        service.engine.script = drafts()
        await card(page, 1).get_by_role("button", name="Write again").click()
        await states(page, "Draft")
        await expect(card(page, 1).locator(".alert")).to_be_empty()


async def test_a_full_service_says_when_to_come_back() -> None:
    async with (
        serving(script=SLOW, max_per_client=2) as service,
        demo_at(service.url + "/") as page,
    ):
        await write(page, 4)
        await states(page, "Writing", "Writing", "Failed", "Failed")
        await expect(card(page, 3).locator(".alert")).to_contain_text("The service asks to wait")
        await page.click("#stop-all")
        await service.idle()


async def test_with_keys_on_the_page_asks_for_one() -> None:
    async with serving(script=drafts(), api_keys="office:right-key") as service, demo_at(service.url + "/") as page:
        await expect(page.locator("#health")).to_contain_text("A key is needed")
        await write(page, 2)
        await expect(page.locator("#key-dialog")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.locator("#form-error")).to_contain_text("needs a key")
        await page.click("#write")
        await page.fill("#key", "wrong-key")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key")).to_have_value("")
        await page.fill("#key", "right-key")
        await page.click("#key-dialog .primary")
        await states(page, "Draft", "Draft")
        await expect(page.locator("#health")).to_contain_text("Ready")
        await page.reload()
        await expect(page.locator("#health")).to_contain_text("Ready")
        stored = await page.evaluate("JSON.stringify(localStorage)")
        assert "right-key" not in stored, "it is kept with the tab only, unless wished otherwise"


async def test_over_http_1_1_the_page_says_what_that_costs() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/api/v1/demo") as page:
        await page.click("#service summary")
        await expect(page.locator("#protocol-note")).to_be_visible()
        assert await page.text_content("#service-protocol") == "HTTP/1.1"
        await write(page)
        await states(page, *["Draft"] * 4)


INERT = [
    "<img src=x onerror=window.ran=1>",
    "</script><script>window.ran=1</script>",
    "</textarea><svg onload=window.ran=1>",
    "javascript:window.ran=1",
    "]]>&lt;b&gt;{{constructor.constructor('window.ran=1')()}}",
]


async def test_markup_in_any_field_is_shown_and_not_run() -> None:
    script = lambda body, index: Script(pieces=split(badge_json(*[INERT[index]] * 3)))  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await page.fill("#institution", INERT[0])
        await page.click("summary >> nth=0")
        await page.fill("#custom_instructions", INERT[1])
        for index in range(0, len(INERT), 4):
            await write(page, min(4, len(INERT) - index), "".join(INERT))
            await expect(page.locator(".state", has_text="Draft")).to_have_count(min(len(INERT), index + 4))
        assert sorted(await names_of(page)) == sorted(INERT)
        await page.reload()
        await expect(page.locator(".card")).to_have_count(len(INERT))
        assert sorted(await names_of(page)) == sorted(INERT)
        await page.locator(".card").first.get_by_role("button", name="Export").click()
        await page.click("#for-systems summary")
        await page.fill("#issuer-name", INERT[2])
        await page.fill("#issuer-id", "javascript:window.ran=1")
        await expect(page.locator("#preview")).to_contain_text("window.ran=1")
        assert await page.evaluate("window.ran") is None
        assert await page.locator("main img, main script, main textarea svg").count() == 0


async def test_a_course_file_can_be_opened_and_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "course.md").write_text("# Knots\n\nFigure eight.", "utf-8")
    (tmp_path / "course.pdf").write_bytes(b"%PDF-1.7")
    async with serving() as service, demo_at(service.url + "/") as page:
        await page.set_input_files("#file", tmp_path / "course.md")
        await expect(page.locator("#content")).to_have_value("# Knots\n\nFigure eight.")
        await expect(page.locator("#source")).to_contain_text("From course.md")
        await page.set_input_files("#file", tmp_path / "course.pdf")
        await expect(page.locator("#form-error")).to_contain_text("course.pdf: The document is damaged")
        await page.evaluate(
            """() => {
                const data = new DataTransfer();
                data.items.add(new File(['<p>Dropped</p>'], 'course.html', {type: 'text/html'}));
                document.querySelector('#content').dispatchEvent(
                    new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
            }"""
        )
        await expect(page.locator("#content")).to_have_value("Dropped")


async def test_everything_can_be_done_with_the_keyboard() -> None:
    async with serving(script=drafts(0.03)) as service, demo_at(service.url + "/") as page:

        async def tab_to(name: str, back: bool = False) -> None:
            for _ in range(80):
                await page.keyboard.press("Shift+Tab" if back else "Tab")
                focused = page.locator(":focus")
                if await focused.count() and name in await focused.evaluate(
                    "node => node.getAttribute('aria-label') || node.labels?.[0]?.textContent || node.textContent"
                ):
                    return
            raise AssertionError(f"no way to {name}")

        await tab_to("Course description")
        await page.keyboard.type("Knots for climbers")
        await page.keyboard.press("Control+Enter")
        await states(page, *["Draft"] * 4)
        await tab_to("Rewrite the name of draft 1")
        await tab_to("Criteria of draft 1")
        await page.keyboard.press("Control+End")
        await page.keyboard.type(" By hand.")
        assert (await field(page, 1, "Criteria").input_value()).endswith(" By hand.")
        await tab_to("Write again draft 1")
        await page.keyboard.press("Enter")
        await expect(card(page, 1).get_by_role("button", name="Stop")).to_be_focused()
        await states(page, *["Draft"] * 4)
        await expect(card(page, 1).get_by_role("button", name="Export")).to_be_focused()
        assert not (await field(page, 1, "Criteria").input_value()).endswith(" By hand.")
        await page.keyboard.press("Control+z")
        await expect(field(page, 1, "Criteria")).to_have_value(re.compile(" By hand.$"))
        await page.keyboard.press("Enter")
        await tab_to("For badge systems")
        await page.keyboard.press("Escape")
        await expect(card(page, 1).get_by_role("button", name="Export")).to_be_focused()


RULES = """
async () => (await axe.run({resultTypes: ['violations']})).violations.map(v => [v.id, v.nodes.map(node => node.html)])
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_axe_finds_nothing(scheme: Any, width: int) -> None:
    gate = asyncio.Event()
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    options |= {"reduced_motion": "reduce"}  # no colour is measured in the middle of its fading in
    script = lambda body, index: Script(pieces=split(badge_json()), gate=gate, status=404 if index == 2 else 200)  # noqa: E731
    async with (
        serving(script=script, max_concurrent_requests=3) as service,
        demo_at(service.url + "/", bypass_csp=True, **options) as page,
    ):
        await page.add_script_tag(path=AXE)
        assert await page.evaluate(RULES) == []
        await page.fill("#institution", "Riverside State University")
        for summary in await page.locator("#composer summary").all():
            await summary.click()
        await write(page)
        await states(page, *["Reading the course"] * 3, "Waiting, number 1 in the queue")
        assert await page.evaluate(RULES) == []
        gate.set()
        await expect(page.locator(".state", has_text="Draft")).to_have_count(3)
        await page.fill("#temperature", "9")
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("Temperature")
        assert await page.evaluate(RULES) == []
        await page.locator("[data-do=export]:not(:disabled)").first.click()
        assert await page.evaluate(RULES) == []
        await page.click("#for-systems summary")
        await page.click("#export-save")
        await expect(page.locator("#export-error")).not_to_be_empty()
        assert await page.evaluate(RULES) == []
        await page.keyboard.press("Escape")
        await page.click("#clear")
        assert await page.evaluate(RULES) == []
        wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, "nothing lies outside of the window"

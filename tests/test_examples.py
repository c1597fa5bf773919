"""The examples as their users run them, and the documentation page in a real Chromium without any other network.

What needs Chromium, npm, curl or shellcheck is skipped where that is missing, except in CI.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypercorn.asyncio
import pytest
from hypercorn.config import Config
from playwright.async_api import ConsoleMessage, Locator, Page, async_playwright
from starlette.responses import JSONResponse, Response

import dccapi
from service import COURSE, COURSES, HERE, MODEL, certificate, needs_model, serving
from test_browser import CHROMIUM, FLAGS, Proxy
from testkit import Script, Server, badge_json, eventually, free_port, http_answer, split

EXAMPLES = HERE / "examples"
BADGE = json.loads(badge_json())
TEXT = COURSE["content"]
# About three seconds a badge, where a test has to come in between.
SLOWLY = Script(pieces=split(badge_json(), 60), delay=0.05)
CI = bool(os.environ.get("CI"))


def needs(*tools: str | None) -> pytest.MarkDecorator:
    """Skips where one is missing; `None` is Chromium under any of its names."""
    missing = [tool or "chromium" for tool in tools if not tool or not shutil.which(tool)]
    return pytest.mark.skipif(bool(missing) and not CI, reason=f"needs {', '.join(missing)}: apt-get install")


needs_chromium = needs(CHROMIUM)
needs_component = needs(CHROMIUM, "node", "npm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


# ---------------------------------------------------------------------------------------------------------------------
# A browser and a site
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """A page, and all that its browser said and asked for."""

    page: Page
    complaints: list[str]  # console warnings, errors and violations of the policy, uncaught exceptions
    origins: set[str]


@contextlib.asynccontextmanager
async def visiting(url: str, rule: str = "", **options: Any) -> AsyncIterator[Visit]:
    """A page of a fresh Chromium that reaches no host but this machine, and that by another rule where one is given."""
    resolver = f"{rule}, MAP localhost 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--host-resolver-rules={resolver}"]
        )
        try:
            page = await (await browser.new_context(ignore_https_errors=True, **options)).new_page()
            visit = Visit(page, [], set())

            def heard(message: ConsoleMessage) -> None:
                if message.type in ("warning", "error"):
                    visit.complaints.append(message.text)

            page.on("console", heard)
            page.on("pageerror", lambda error: visit.complaints.append(str(error)))
            page.on("request", lambda request: visit.origins.add("/".join(request.url.split("/")[:3])))
            await page.goto(url)
            yield visit
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def site(script: bytes) -> AsyncIterator[str]:
    """The address of a page of a site of its own, which runs `script`."""
    files = {
        "/": (
            "text/html",
            b'<!doctype html><html lang="en"><meta charset="utf-8"><title>A site</title><link rel="icon" href="data:,">'
            b'<div id="root"></div><script src="/site.js"></script>',
        ),
        "/site.js": ("text/javascript", script),
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        kind, body = files[request.split()[1].decode()]
        fields = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
        writer.write("\r\n".join([*fields, "", ""]).encode() + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://localhost:{server.sockets[0].getsockname()[1]}/"


@contextlib.asynccontextmanager
async def real() -> AsyncIterator[tuple[str, str]]:
    """The addresses of the service with the real model: cleartext and TLS."""
    certificate()
    cleartext, tls = free_port(), free_port()
    command = ["dccapi.py", "--bind", f"127.0.0.1:{cleartext}", "--tls-bind", f"127.0.0.1:{tls}"]
    settings = {"ENGINE": "embedded", "MODEL_PATH": str(MODEL)}
    async with Server(command, settings, f"http://127.0.0.1:{cleartext}/readyz", HERE, start_timeout=60):
        yield f"http://localhost:{cleartext}", f"https://localhost:{tls}"


# ---------------------------------------------------------------------------------------------------------------------
# StreamingBadgeGenerator.jsx
# ---------------------------------------------------------------------------------------------------------------------

# With what they depend on, each at one version: npm is to choose nothing.
ESBUILD = "esbuild@0.28.2"
REACTS = {
    "18": ["react@18.3.1", "react-dom@18.3.1", "scheduler@0.23.2", "loose-envify@1.4.0", "js-tokens@4.0.0"],
    "19": ["react@19.3.1", "react-dom@19.3.1", "scheduler@0.28.0"],
}
# As a site would mount it; StrictMode mounts everything twice. Its properties and what `onBadge` got are the test's.
ENTRY = """
import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import StreamingBadgeGenerator from './StreamingBadgeGenerator.jsx';

const root = createRoot(document.getElementById('root'));
window.badges = [];
const onBadge = (event, number) => window.badges.push([number, event.content.badge_name]);
window.show = (properties) => root.render(
  <StrictMode><StreamingBadgeGenerator {...(properties && { ...properties, onBadge })} /></StrictMode>
);
window.leave = () => root.unmount();
"""


def built(major: str, directory: Path) -> bytes:
    """The component as a script for browsers, with the React of that version."""

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    packages = [ESBUILD, *REACTS[major]]
    installed = directory / "installed"
    if not installed.exists() or installed.read_text() != " ".join(packages):
        # No script of a package runs: esbuild's own only looks whether its program is there.
        options = ["--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
        run("npm", "install", *options, "--prefix", directory, *packages)
        installed.write_text(" ".join(packages))
    (directory / "entry.jsx").write_text(ENTRY)
    shutil.copy(EXAMPLES / "StreamingBadgeGenerator.jsx", directory)
    # React's development build says what it dislikes.
    options = ["--bundle", "--jsx=automatic", "--jsx-dev", "--outfile=site.js", "--log-level=warning"]
    run("node", "node_modules/esbuild/bin/esbuild", "entry.jsx", *options)
    return (directory / "site.js").read_bytes()


@pytest.fixture(scope="module", params=REACTS, ids="React {}".format)
def component(request: pytest.FixtureRequest) -> bytes:
    return built(request.param, request.config.cache.mkdir(f"react{request.param}"))


# Every text that the heading of a draft has had, by draft.
WATCH = """
() => {
    window.headings = [];
    new MutationObserver(() => document.querySelectorAll('article h3').forEach((heading, number) => {
        const seen = window.headings[number] ??= [];
        if (seen.at(-1) !== heading.textContent) seen.push(heading.textContent);
    })).observe(document.body, {subtree: true, childList: true, characterData: true});
}
"""


async def write_drafts(page: Page, properties: Mapping[str, Any] | None, course: str = TEXT) -> None:
    await page.evaluate("properties => window.show(properties)", properties)
    await page.get_by_label("Course description").fill(course)
    await page.get_by_role("button", name=re.compile("^Write . drafts?$")).click()


async def says(page: Page, text: str, timeout: float = 10) -> None:
    """Wait until the component's status is that."""
    await page.get_by_role("status").filter(has_text=re.compile(f"^{text}$")).wait_for(timeout=timeout * 1000)


@needs_component
async def test_the_component_shows_four_drafts_growing_at_once_over_one_connection(component: bytes) -> None:
    async with (
        serving(tls=True, script=SLOWLY) as service,
        Proxy(service.port) as proxy,
        site(component) as address,
        visiting(address) as visit,
    ):
        page = visit.page
        await page.evaluate(WATCH)
        await write_drafts(page, {"baseUrl": f"https://localhost:{proxy.port}", "options": {"badge_level": "Expert"}})
        await service.engine.wait_for_calls(4)
        await eventually(lambda: service.engine.open_calls == 4, what="four at once")
        await says(page, "Drafts: 4 writing")
        await says(page, "Drafts: 4 ready")
        for number, seen in enumerate(await page.evaluate("window.headings"), 1):
            first, *names = seen
            assert first == f"Draft {number}"
            assert names, "a title is shown when it is whole"
            assert all(after.startswith(before) for before, after in itertools.pairwise(names))
            assert names[-1] == BADGE["badge_name"]
        for article in await page.get_by_role("article").all():
            text = await article.inner_text()
            assert BADGE["badge_description"] in text
            assert BADGE["criteria"]["narrative"] in text
            assert "Ready, " in text
        assert sorted(await page.evaluate("window.badges")) == [[number, BADGE["badge_name"]] for number in range(4)]
        assert all("Level: Expert" in call.body["prompt"] for call in service.engine.calls)
        assert sum(carried > 5_000 for carried in proxy.carried) == 1, "one connection carries them all"
        assert visit.complaints == []


@needs_component
async def test_the_component_stops_one_draft_or_all_and_its_end_stops_them_too(component: bytes) -> None:
    async with serving(script=SLOWLY) as service, site(component) as address, visiting(address) as visit:
        page, calls = visit.page, service.engine.calls
        await write_drafts(page, {"baseUrl": service.url})
        await service.engine.wait_for_calls(4)
        await page.get_by_role("button", name="Stop draft 2").click()
        await eventually(lambda: service.engine.open_calls == 3, 1, "the end of one engine call")
        await says(page, "Drafts: 3 ready, 1 stopped")
        assert sum(call.closed_by_client.is_set() for call in calls) == 1

        await page.get_by_role("button", name="Write draft 2 again").click()
        await service.engine.wait_for_calls(5)
        await says(page, "Drafts: 4 ready")

        for way in ("button", "unmount"):
            begun = len(calls)
            await page.get_by_role("button", name="Write 4 drafts").click()
            await service.engine.wait_for_calls(begun + 4)
            if way == "button":
                await page.get_by_role("button", name="Stop all").click()
                await says(page, "Drafts: 4 stopped")
            else:
                await page.evaluate("window.leave()")
            await service.idle()
            assert all(call.closed_by_client.is_set() for call in calls[begun:])
        assert visit.complaints == []


@needs_component
async def test_the_component_says_what_went_wrong_and_tries_again(component: bytes) -> None:
    scripts = [Script(status=500, error="out of memory"), Script()]
    async with (
        serving(script=lambda body, index: scripts[index], api_keys="site:s3cret") as service,
        site(component) as address,
        visiting(address) as visit,
    ):
        page = visit.page
        alert = page.get_by_role("alert")

        async def told(*texts: str) -> None:
            await says(page, "Drafts: 1 failed")
            told = await alert.inner_text()
            assert all(text in told for text in texts), told

        properties = {"baseUrl": service.url, "drafts": 1, "apiKey": "wrong"}
        await write_drafts(page, properties)
        await told("A key is needed", "unauthorized", "request ")
        again = page.get_by_role("button", name="Write draft 1 again")
        properties["apiKey"] = "s3cret"
        await write_drafts(page, {**properties, "options": {"top_k": 0, "badge_tone": "Rude"}})
        await told("top_k: ", "badge_tone: ", "invalid_request")
        await write_drafts(page, properties)
        await told("engine_error")
        await again.click()
        await says(page, "Drafts: 1 ready")
        assert await alert.count() == 0
        await write_drafts(page, {**properties, "baseUrl": f"http://localhost:{free_port()}"})
        await told("connection", "Try again")
        assert len(service.engine.calls) == 2


@needs_component
async def test_the_component_tells_a_broken_connection_and_the_place_in_the_queue(component: bytes) -> None:
    async with (
        serving(script=SLOWLY, max_concurrent_requests=1) as service,
        Proxy(service.port) as proxy,
        site(component) as address,
        visiting(address) as visit,
    ):
        page = visit.page
        await write_drafts(page, {"baseUrl": f"http://localhost:{proxy.port}", "drafts": 2})
        await says(page, "Drafts: 1 waiting, 1 writing")
        await page.get_by_text("Waiting, number 1 in the queue").wait_for()
        proxy.cut()
        await says(page, "Drafts: 2 failed")
        assert (
            await page.get_by_role("alert").all_inner_texts()
            == [f"The connection to localhost:{proxy.port} failed. Try again."] * 2
        )
        await service.idle()


@needs_component
async def test_the_component_works_without_properties_and_shows_markup_as_text(component: bytes) -> None:
    name = "Knots <img src=x onerror=\"document.title='run'\">"
    async with (
        serving(script=Script(pieces=split(badge_json(name)))) as service,
        site(component) as address,
        visiting(address, f"MAP localhost:8001 127.0.0.1:{service.port}") as visit,
    ):
        await write_drafts(visit.page, None)
        await says(visit.page, "Drafts: 4 ready")
        assert await visit.page.get_by_role("heading").all_inner_texts() == [name] * 4
        assert await visit.page.title() == "A site"
        assert visit.origins == {address.rstrip("/"), "http://localhost:8001"}


@needs_component
@needs_model
@pytest.mark.timeout(400)
@pytest.mark.parametrize("component", list(REACTS)[-1:], indirect=True)
async def test_the_component_writes_four_badges_with_the_real_model(component: bytes) -> None:
    async with real() as (_, tls), site(component) as address, visiting(address) as visit:
        properties = {"baseUrl": tls, "options": {"seed": 1, "badge_tone": "Concise", "skills": False}}
        await write_drafts(visit.page, properties, COURSES[1]["content"])
        await says(visit.page, "Drafts: 4 ready", 300)
        assert len(await visit.page.evaluate("window.badges")) == 4
        assert visit.complaints == []


# ---------------------------------------------------------------------------------------------------------------------
# client.py
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A program that has ended."""

    code: int
    out: str
    err: str

    @property
    def badges(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


async def start(*command: str | Path, text: str = "", **env: str) -> asyncio.subprocess.Process:
    """A program with that standard input and none of our settings."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=kept | env,
        # A shell starts its background jobs without Ctrl-C, and these tests may be such a job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin
    process.stdin.write(text.encode())
    process.stdin.close()
    return process


async def ended(process: asyncio.subprocess.Process, timeout: float = 60) -> Run:
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return Run(process.returncode or 0, out.decode(), err.decode())


async def start_client(url: str, *arguments: str | Path, **env: str) -> asyncio.subprocess.Process:
    return await start(sys.executable, EXAMPLES / "client.py", "--url", url, *arguments, text=TEXT, **env)


async def run_client(url: str, *arguments: str | Path, **env: str) -> Run:
    return await ended(await start_client(url, *arguments, **env))


async def test_the_client_writes_four_drafts_at_once_on_one_connection(tmp_path: Path) -> None:
    course = tmp_path / "knots.txt"
    course.write_text(TEXT)
    gate = asyncio.Event()
    async with serving(script=Script(gate=gate, delay=0.02)) as service, Proxy(service.port) as proxy:
        process = await start_client(f"http://localhost:{proxy.port}", course)
        await service.engine.wait_for_calls(4)
        await eventually(lambda: all(generation.followers for generation in service.queue.running))
        gate.set()
        run = await ended(process)
        assert (run.code, len(service.engine.calls), len(proxy.carried)) == (0, 4, 1), run
        assert [(badge["course"], badge["badge"]) for badge in run.badges] == [(str(course), BADGE)] * 4
        assert sorted(badge["draft"] for badge in run.badges) == [1, 2, 3, 4]
        assert {badge["achievement"]["name"] for badge in run.badges} == {BADGE["badge_name"]}
        for progress in ("begun", "writing badge_name", "writing criteria", "done"):
            assert f"{course}, draft 4: {progress}" in run.err


async def test_the_client_takes_courses_with_options_over_tls_with_a_key(tmp_path: Path) -> None:
    courses = tmp_path / "courses.jsonl"
    courses.write_text("\n\n".join(json.dumps({"content": f"Knots {n}", "badge_level": "Expert"}) for n in range(6)))
    settings = {"tls": True, "api_keys": "lms:s3cret", "max_concurrent_requests": 2}
    async with serving(script=Script(delay=0.01), **settings) as service, Proxy(service.port) as proxy:
        arguments = f"https://localhost:{proxy.port}", "--drafts", "1", courses
        run = await run_client(*arguments, "--insecure", DCCAPI_KEY="s3cret")
        assert (run.code, len(proxy.carried)) == (0, 1), run
        assert {badge["course"] for badge in run.badges} == {f"{courses}:{number}" for number in range(1, 12, 2)}
        prompts = [call.body["prompt"] for call in service.engine.calls]
        assert sorted(prompt[prompt.index("Knots ") :][:7] for prompt in prompts) == [f"Knots {n}" for n in range(6)]
        assert all("Level: Expert" in prompt for prompt in prompts)
        assert "number 2 in the queue" in run.err

        run = await run_client(*arguments, DCCAPI_KEY="s3cret")
        assert run.code == 1
        assert "certificate" in run.err


async def test_the_client_goes_on_after_a_cut_and_begins_no_second_generation() -> None:
    async with serving(script=SLOWLY) as service, Proxy(service.port) as proxy:
        process = await start_client(f"http://localhost:{proxy.port}", "--drafts", "1", "-")
        (call,) = await service.engine.wait_for_calls(1)
        for pieces in (20, 40):
            await eventually(lambda pieces=pieces: call.pieces_sent > pieces)
            proxy.cut()
        run = await ended(process)
        assert (run.code, [badge["badge"] for badge in run.badges]) == (0, [BADGE]), run
        assert len(proxy.carried) == 3
        assert run.err.count("connecting again") == 2
        assert len(service.engine.calls) == 1


async def test_the_client_repeats_a_post_whose_answer_was_lost_without_a_second_generation() -> None:
    async with serving(script=SLOWLY) as service:
        lost: list[asyncio.Event] = []

        async def lose_the_first_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", service.port)
            first = not lost
            lost.append(asyncio.Event())

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError):
                    while data := await source.read(65536):
                        sink.write(data)

            pumps = [asyncio.create_task(pump(reader, far_writer))]
            if first:
                await service.engine.wait_for_calls(1)
            else:
                pumps.append(asyncio.create_task(pump(far_reader, writer)))
                await pumps[0]
            for task in pumps:
                task.cancel()
            writer.transport.abort()
            far_writer.transport.abort()

        async with await asyncio.start_server(lose_the_first_answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            run = await run_client(f"http://127.0.0.1:{port}", "--drafts", "1", "-")
        assert (run.code, [badge["badge"] for badge in run.badges]) == (0, [BADGE]), run
        assert (len(lost), len(service.engine.calls)) == (2, 1)


async def test_the_client_says_what_failed_and_keeps_what_did_not() -> None:
    scripts = [Script(), Script(status=500, error="out of memory"), Script(), Script()]
    async with serving(script=lambda body, index: scripts[index], api_keys="lms:s3cret") as service:
        run = await run_client(service.url, "-", "--api-key", "s3cret")
        assert (run.code, len(run.badges)) == (1, 3), run
        assert run.err.count("failed: ") == run.err.count("(engine_error)") == 1

        run = await run_client(service.url, "-")
        assert (run.code, run.out) == (1, "")
        assert run.err.count("(unauthorized)") == 4

    for settings, code in (
        ({"max_per_client": 1}, "too_many_requests"),
        ({"max_queue": 1, "max_concurrent_requests": 1}, "queue_full"),
    ):
        async with serving(script=Script(gate=(gate := asyncio.Event())), **settings) as service:
            process = await start_client(service.url, "-", "--drafts", "3")
            assert process.stderr
            refused = b""
            while code.encode() not in refused:
                refused = await process.stderr.readline()
            assert re.search(rf"failed: .*\({code}\); Retry-After: \d+ seconds$", refused.decode().strip())
            gate.set()
            run = await ended(process)
            assert (run.code, len(run.badges)) == (1, 1 if code == "too_many_requests" else 2), run


async def test_the_client_ends_with_a_sentence_where_the_service_is_gone_for_good() -> None:
    async with serving(script=SLOWLY) as service:
        async with Proxy(service.port) as proxy:
            url = f"http://localhost:{proxy.port}"
            process = await start_client(url, "-", "--drafts", "8")
            await service.engine.wait_for_calls(4, 20)
        run = await ended(process)
        assert (run.code, run.out) == (1, ""), run
        assert run.err.splitlines()[-1].startswith(f"client.py: failed: no connection to {url}: ")
        assert run.err.count(": failed: ") == 1
        assert "draft 5" not in run.err
        assert "Traceback" not in run.err


async def test_the_client_tells_every_fault_of_a_request(tmp_path: Path) -> None:
    courses = tmp_path / "courses.jsonl"
    courses.write_text('{"content": "Knots", "top_k": 0, "badge_tone": "Rude"}')
    async with serving() as service:
        run = await run_client(service.url, "--drafts", "1", courses)
        assert (run.code, run.out, service.engine.calls) == (1, "", [])
        assert "top_k: " in run.err
        assert "badge_tone: " in run.err


async def test_the_client_takes_documents_and_texts_in_any_encoding(tmp_path: Path) -> None:
    documents = [HERE / "tests" / "documents" / f"syllabus.{kind}" for kind in ("pdf", "docx", "odt")]
    (windows := tmp_path / "windows.txt").write_bytes("Café für Köche: grüßen, kühlen, würzen.".encode("cp1252"))
    (empty := tmp_path / "empty.pdf").write_bytes(b"%PDF-1.7")
    async with serving() as service:
        run = await run_client(service.url, "--drafts", "1", *documents, windows, empty)
        assert (run.code, {badge["course"] for badge in run.badges}) == (
            1,
            {str(path) for path in [*documents, windows]},
        )
        assert f"{empty}, draft 1: failed: " in run.err
        assert "(document_broken)" in run.err
        prompts = [call.body["prompt"] for call in service.engine.calls]
        assert sum("Café für Köche" in prompt for prompt in prompts) == 1
        assert all(len(prompt) > 1000 or "Café" in prompt for prompt in prompts)


NOBODY = f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["absent.txt"], 2, "absent.txt cannot be read: No such file or directory."),
        ([EXAMPLES], 2, "cannot be read: Is a directory."),
        ([EXAMPLES / "client.py", "--drafts", "many"], 2, "--drafts"),
        (["-", "--drafts", "0"], 2, "--drafts"),
        (["-", "--url", "http://localhost:one"], 2, "Invalid port"),
        (["-", "--url", "http://localhost:99999"], 2, "http://localhost:99999 is no address of a service."),
        (["-", "--url", "localhost:8001"], 2, "localhost:8001 is no address of a service."),
        (["-", "--url", NOBODY, "--api-key", "schlüssel"], 2, "client.py: A key has only "),
    ],
)
async def test_the_client_ends_with_a_sentence_where_it_is_used_wrongly(
    arguments: list[str | Path], code: int, said: str
) -> None:
    run = await run_client("http://127.0.0.1:9", *arguments)
    assert (run.code, run.out) == (code, ""), run
    assert said in run.err.splitlines()[-1]
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("http_proxy", "socks5://localhost:1", "proxies"), ("SSL_CERT_FILE", "/absent.pem", "SSL_CERT_FILE")],
)
async def test_the_client_says_what_its_environment_has_wrong(variable: str, value: str, said: str) -> None:
    run = await run_client("https://127.0.0.1:9" if variable == "SSL_CERT_FILE" else NOBODY, "-", **{variable: value})
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1), run
    assert said in run.err


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("<&-", 2, "client.py: Standard input is closed."),
        (">&-", 2, "client.py: Standard output is closed: the drafts go there."),
        (">/dev/full", 1, "client.py: the drafts cannot be written down: No space left on device."),
    ],
)
async def test_the_client_says_that_it_can_read_or_write_nothing(redirected: str, code: int, said: str) -> None:
    async with serving() as service:
        command = f'exec "$0" "$1" --url {service.url} - {redirected}'
        run = await ended(await start("sh", "-c", command, sys.executable, EXAMPLES / "client.py", text=TEXT))
    assert (run.code, run.err.splitlines()[-1]) == (code, said)
    assert "Traceback" not in run.err


# Python reads NaN and halves of surrogate pairs, but may not send them.
LINES = ["[1]", '{"content": "Knots"} x', "[" * 100_000, '{"content": "Knots", "seed": NaN}', r'{"content": "\ud800"}']


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
async def test_the_client_names_a_line_that_is_no_course(tmp_path: Path, line: str) -> None:
    (courses := tmp_path / "courses.jsonl").write_text(f'{{"content": "Knots"}}\n\n{line}\n')
    run = await run_client("http://127.0.0.1:9", courses)
    assert (run.code, run.out, run.err) == (2, "", f"client.py: {courses}, line 3 is not a JSON object.\n")


async def test_the_client_says_that_another_server_is_not_this_one() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(http_answer(200, "text/html", b"hello"))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        run = await run_client(url, "--drafts", "1", "-")
    assert (run.code, run.out) == (1, "")
    assert f"failed: no connection to {url}" in run.err.splitlines()[-1]
    assert "Traceback" not in run.err


EMPTY: dict[str, Any] = {"type": "partial", "badge": {}}


@pytest.mark.parametrize(
    ("status", "body", "event"),
    [
        (202, {"state": "done"}, None),
        (202, "text", None),
        (202, None, None),
        (404, ["a"], None),
        (202, {"id": "a"}, EMPTY),
        (202, {"id": "a"}, {"type": "final", "content": {}}),
        (202, {"id": "a"}, "text"),
    ],
)
async def test_the_client_says_that_another_api_is_not_this_one(status: int, body: Any, event: Any) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        events = Response(f"data: {json.dumps(event)}\n\n", media_type="text/event-stream")
        await (JSONResponse(body, status) if scope["method"] == "POST" else events)(scope, receive, send)

    port = free_port()
    config, stop = Config.from_mapping(bind=[f"127.0.0.1:{port}"], errorlog=None), asyncio.Event()
    server = asyncio.create_task(hypercorn.asyncio.serve(other, config, mode="asgi", shutdown_trigger=stop.wait))
    run = await run_client(f"http://127.0.0.1:{port}", "--drafts", "1", "-")
    stop.set()
    await server
    assert (run.code, run.out) == (1, "")
    assert run.err.splitlines()[-1].endswith("; is the address right?")
    assert "Traceback" not in run.err


async def test_the_client_says_what_to_install_where_it_is_missing() -> None:
    run = await ended(await start(sys.executable, "-S", EXAMPLES / "client.py", "-"))
    assert (run.code, run.out) == (1, "")
    assert run.err.endswith("Install what it needs: pip install 'httpx[http2]'\n")


async def test_the_client_ends_quietly_and_begins_no_more_where_nobody_reads_on() -> None:
    async with serving(script=Script(pieces=split(badge_json(), 20), delay=0.01)) as service:
        process = await start_client(service.url, "-", "--drafts", "16")
        assert process.stdout
        process.stdout._transport.close()
        assert process.stderr
        said = (await process.stderr.read()).decode()
        assert await process.wait() == 1
        await service.idle()
        assert len(service.engine.calls) < 12
    assert "Traceback" not in said
    assert "Exception" not in said


async def test_the_client_stops_its_generations_when_it_is_interrupted() -> None:
    async with serving(script=SLOWLY) as service:
        process = await start_client(service.url, "-")
        calls = await service.engine.wait_for_calls(4)
        await eventually(lambda: all(call.pieces_sent > 5 for call in calls))
        process.send_signal(signal.SIGINT)
        run = await ended(process)
        await service.idle()
        assert (run.code, run.out) == (130, ""), run
        assert "Traceback" not in run.err
        assert all(call.closed_by_client.is_set() for call in calls), run.err


@needs_model
@pytest.mark.timeout(400)
async def test_the_client_writes_badges_with_the_real_model(tmp_path: Path) -> None:
    courses = tmp_path / "courses.jsonl"
    courses.write_text("\n".join(json.dumps(course | {"seed": 1, "badge_tone": "Concise"}) for course in COURSES[1:]))
    async with real() as (_, tls):
        run = await ended(await start_client(tls, "--insecure", "--drafts", "2", courses), 300)
        assert (run.code, len(run.badges)) == (0, 2 * len(COURSES[1:])), run
        assert all(dccapi.Badge.model_validate(badge["badge"]) for badge in run.badges)


# ---------------------------------------------------------------------------------------------------------------------
# curl.sh
# ---------------------------------------------------------------------------------------------------------------------


async def tour(url: str, timeout: float = 60, **env: str) -> Run:
    return await ended(await start("sh", EXAMPLES / "curl.sh", BASE=url, **env), timeout)


def check_tour(run: Run) -> None:
    assert run.code == 0, run
    steps = {
        title: body.splitlines() for title, _, body in (step.partition("\n") for step in run.out.split("\n== ") if step)
    }
    health, as_json, events, eventsource, later, cancelled, field, credential = steps.values()
    assert json.loads(health[0])["status"] == "healthy"
    assert json.loads(as_json[0])["response"].keys() == BADGE.keys()
    assert as_json[1] == "(status 200 over HTTP/2)"
    for lines in (events, eventsource, later):
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert told[0]["type"] == "queue"
        assert told[-1]["type"] == "final"
        assert not any("accumulated" in event for event in told)
    assert "event: partial" in events
    assert json.loads(later[-1])["status"] == "succeeded"
    assert json.loads(cancelled[-1])["status"] == "cancelled"
    assert json.loads(field[0])["response"]["badge_description"].startswith("Recognises learners")
    assert json.loads(credential[0])["type"] == ["VerifiableCredential", "OpenBadgeCredential"]


@needs("curl")
@pytest.mark.parametrize("tls", [False, True], ids=["h2c", "TLS"])
async def test_the_tour_with_curl_shows_all_that_it_says(tls: bool) -> None:
    script = Script(pieces=split(badge_json(), 20), delay=0.02)
    async with serving(tls=tls, script=script, api_keys="lms:s3cret" if tls else "") as service:
        env = {"INSECURE": "1", "API_KEY": "s3cret"} if tls else {}
        check_tour(await tour(f"http{'s' * tls}://localhost:{service.port}", **env))
        assert len(service.engine.calls) == 6


@needs("curl")
async def test_the_tour_with_curl_ends_at_the_first_failure() -> None:
    async with serving(script=Script(status=500, error="out of memory")) as service:
        run = await tour(service.url)
        assert run.code != 0
        assert run.out.count("\n== ") == 2
        assert "engine_error" in run.out
        assert (await tour(f"http://127.0.0.1:{free_port()}")).code != 0


@needs("curl")
@needs_model
@pytest.mark.timeout(400)
async def test_the_tour_with_curl_works_with_the_real_model() -> None:
    async with real() as (cleartext, _):
        check_tour(await tour(cleartext, 300))


@needs("shellcheck")
async def test_the_tour_with_curl_is_plain_shell() -> None:
    run = await ended(await start("shellcheck", EXAMPLES / "curl.sh"))
    assert run.code == 0, run.out


# ---------------------------------------------------------------------------------------------------------------------
# /docs
# ---------------------------------------------------------------------------------------------------------------------


ROUTES = {
    (method.upper(), path)
    for path, item in json.loads(dccapi.OPENAPI.read_text("utf-8"))["paths"].items()
    for method in item
    if method in ("get", "post", "delete")
}


async def operation(page: Page, method: str, path: str) -> Locator:
    """An operation of the page, unfolded."""
    summary = page.locator(f".opblock-summary-{method.lower()}").filter(
        has=page.locator(f'[data-path="{path}"]'),
    )
    block = page.locator(".opblock").filter(has=summary)
    await summary.locator(".opblock-summary-control").click()
    await block.locator(".execute").wait_for()
    return block


async def executed(block: Locator) -> tuple[str, str]:
    """Status and body of the answer to "try it out" as it is filled in."""
    await block.locator(".execute").click()
    answer = block.locator(".live-responses-table")
    await answer.locator(".response-col_status").last.wait_for()
    status = await answer.locator(".response .response-col_status").inner_text()
    body = answer.locator(".response-col_description .highlight-code").first
    return status.split()[0], await body.inner_text()


@needs_chromium
@pytest.mark.parametrize("prefix", ["", "/api/v1"])
async def test_the_documentation_shows_every_route_and_asks_no_other_host(prefix: str) -> None:
    async with serving() as service:
        host = f"http://badges.localhost:{service.port}"
        async with visiting(f"{host}{prefix}/docs", "MAP badges.localhost 127.0.0.1") as visit:
            page = visit.page
            await page.locator(".opblock").nth(len(ROUTES) - 1).wait_for()
            shown = {
                (await block.locator(".opblock-summary-method").inner_text(), str(path))
                for block in await page.locator(".opblock").all()
                for path in [await block.locator("[data-path]").get_attribute("data-path")]
            }
            assert shown == ROUTES
            for method, path in sorted(ROUTES) if not prefix else []:
                block = await operation(page, method, path)
                await block.locator(".responses-table .response").first.wait_for()
            assert await page.locator(".errors-wrapper").count() == 0
            assert visit.origins == {host}
            assert visit.complaints == []


@needs_chromium
async def test_every_example_of_the_documentation_can_be_tried_out() -> None:
    async with serving() as service, visiting(f"{service.url}/docs") as visit:
        shows = {
            ("POST", "/generate"): BADGE["badge_name"],
            ("POST", "/generate/stream"): '"type":"final"',
            ("GET", "/generate/stream"): '"type":"final"',
            ("POST", "/regenerate-field"): "badge_name",
            ("POST", "/credentials"): "OpenBadgeCredential",
            ("GET", "/health"): "healthy",
        }
        for (method, path), text in shows.items():
            status, body = await executed(await operation(visit.page, method, path))
            assert status == "200", (method, path, body)
            assert text in body
        assert len(service.engine.calls) == 4
        assert visit.complaints == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["bearer", "X-API-Key"])
async def test_the_documentation_sends_the_key_that_it_is_given(scheme: str) -> None:
    async with serving(api_keys="lms:s3cret") as service, visiting(f"{service.url}/docs") as visit:
        block = await operation(visit.page, "POST", "/generate")
        assert (await executed(block))[0] == "401"
        await visit.page.locator(".scheme-container").get_by_role("button", name="Authorize").click()
        form = visit.page.locator(".auth-container").filter(has_text=scheme)
        await form.get_by_role("textbox").fill("s3cret")
        await form.locator(".authorize").click()
        await form.locator(".btn-done").click()
        await block.get_by_role("button", name="Clear").click()
        status, body = await executed(block)
        assert status == "200"
        assert BADGE["badge_name"] in body

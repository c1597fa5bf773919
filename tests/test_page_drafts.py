"""The page's drafts in a real Chromium: two tabs, what the service has found, choosing between drafts, waiting."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from playwright.async_api import Page, expect

import test_browser
from service import COURSE, SLOW, serving
from test_browser import AXE, RULES, card, demo_at, drafts, field, states, write
from testkit import Script, badge_json, split

pytestmark = test_browser.pytestmark
DESCRIPTION = (
    "Climbers tie a figure eight, a clove hitch and a prusik. They pass a practical exam on the wall. "
    "Astronomers calibrate 17 telescopes in Antarctica."
)
FALSE = "Astronomers calibrate 17 telescopes in Antarctica."
CRITERIA = "- Ties the figure eight\n- Ties the clove hitch\n- Ties the prusik\n- Passes the practical exam on the wall"


async def beside(page: Page) -> Page:
    """A second tab of the same browser on the same page."""
    other = await page.context.new_page()
    await other.goto(page.url)
    await other.locator("#health b").wait_for()
    return other


async def test_a_tab_that_was_left_open_takes_nothing_from_another() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await write(page, 3)
        await states(page, *["Draft"] * 3)
        other = await beside(page)
        await states(other, *["Draft"] * 3)
        await field(page, 1, "Description").fill("Written by hand.")
        await expect(field(other, 1, "Description")).to_have_value("Written by hand.")
        await field(other, 1, "Name").fill("Knotwork")
        await expect(field(page, 1, "Name")).to_have_value("Knotwork")
        await card(page, 2).get_by_role("button", name="Remove").click()
        await expect(other.locator(".card")).to_have_count(2)
        await page.click("#undo")
        await expect(other.locator(".card")).to_have_count(3)
        await card(page, 3).get_by_role("button", name="Remove").click()
        await field(page, 1, "Criteria").fill("The last word.")
        await page.goto("about:blank")
        await other.close()
        await page.goto(service.url + "/")
        await expect(field(page, 1, "Criteria")).to_have_value("The last word.")
        await expect(field(page, 1, "Description")).to_have_value("Written by hand.")
        await expect(field(page, 1, "Name")).to_have_value("Knotwork")
        await expect(page.locator(".card")).to_have_count(2)


async def test_another_tab_shows_what_is_written_and_goes_on_when_its_tab_closes() -> None:
    gate = asyncio.Event()
    async with serving(script=drafts(gate=gate), resume_grace=10) as service, demo_at(service.url + "/") as page:
        await write(page, 1)
        await states(page, "Reading the course")
        other = await beside(page)
        await states(other, "Reading the course")
        await page.evaluate("document.title")  # the first tab follows, the second is told
        assert await other.evaluate("sources.size") == 0
        await page.goto("about:blank")
        gate.set()
        await states(other, "Draft")
        assert len(service.engine.calls) == 1
        await page.goto(service.url + "/")


async def test_drafts_of_the_earlier_page_are_taken_over_and_none_is_dropped() -> None:
    old = """count => {
        localStorage['dccapi.batch.b'] = JSON.stringify({request: {content: 'Knots'}, created: 5});
        for (let n = 1; n <= count; n++) localStorage[`dccapi.draft.d${n}`] = JSON.stringify({
            id: `d${n}`, batch: 'b', number: n, created: 5, state: 'done', tokens: 1, finish: "stop", error: null,
            fields: {name: `Old ${n}`, description: 'Kept.', criteria: 'Kept.'}, achievement: null});
    }"""
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await page.evaluate(old, 30)
        await page.reload()
        await expect(page.locator(".card")).to_have_count(30)
        assert await page.evaluate("Object.keys(localStorage).filter(key => key.includes('draft.')).length") == 0
        await write(page, 1)
        await expect(page.locator(".card")).to_have_count(31)
        await expect(page.locator(".card:visible")).to_have_count(1)
        await page.reload()
        await expect(page.locator("#cards .group")).to_have_count(2)
        await page.click(".group:nth-child(2) .fold")
        await expect(page.locator(".card")).to_have_count(31)


async def test_a_browser_that_keeps_nothing_says_so() -> None:
    broken = "indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); };"
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await page.add_init_script(broken)
        await page.reload()
        await expect(page.locator("#storage-note")).to_contain_text("keeps no drafts")
        await write(page, 1)
        await states(page, "Draft")


async def test_what_the_course_does_not_bear_is_marked_with_a_word_and_shown_beside_the_course() -> None:
    script = lambda body, index: Script(pieces=split(badge_json("Climbing Knots", DESCRIPTION, CRITERIA)))  # noqa: E731
    async with (
        serving(script=script) as service,
        demo_at(service.url + "/", bypass_csp=True, reduced_motion="reduce") as page,
    ):
        await write(page, 1, COURSE["content"])
        await states(page, "Draft")
        marked = card(page, 1).locator(".description .read u")
        await expect(marked).to_have_text([FALSE])
        assert "underline" in await marked.evaluate("node => getComputedStyle(node).textDecorationLine")
        tag = card(page, 1).get_by_role("button", name="not in the course")
        await tag.click()
        aside = card(page, 1).locator(".description .aside")
        await expect(aside).to_contain_text("nearest sentence of the course")
        await expect(aside).to_contain_text("17")
        await page.add_script_tag(path=AXE)
        assert await page.evaluate(RULES) == []
        await card(page, 1).locator(".notes summary").click()
        await expect(card(page, 1).locator(".notes li")).not_to_have_count(0)
        await page.reload()
        await expect(card(page, 1).locator(".description .read u")).to_have_text([FALSE])
        await tag.click()
        await aside.get_by_role("button", name="Take the sentence out").click()
        await expect(field(page, 1, "Description")).to_have_value(DESCRIPTION.removesuffix(f" {FALSE}"))
        await expect(marked).to_have_count(0)
        await page.click("#undo")
        await tag.click()
        await aside.get_by_role("button", name="It is right").click()
        await expect(marked).to_have_count(0)
        assert await field(page, 1, "Description").input_value() == DESCRIPTION


async def test_a_draft_without_notes_is_as_calm_as_ever() -> None:
    calm = DESCRIPTION.replace(FALSE, "The practical exam on the wall has the knots for climbers.")
    script = lambda body, index: Script(pieces=split(badge_json("Knots for Climbers", calm, CRITERIA)))  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await write(page, 1, COURSE["content"])
        await states(page, "Draft")
        assert await page.evaluate("state.drafts[0].review.notes") == []
        await expect(page.locator(".marked, .notes:visible, .tag")).to_have_count(0)


async def test_four_drafts_differ_on_purpose_and_their_parts_can_be_put_together() -> None:
    texts = [("Climbing Knots", "Ties knots on the wall."), ("Rope Work", "Ties ropes on the wall.")]
    script = lambda body, index: Script(pieces=split(badge_json(*texts[index % 2])))  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await page.select_option("#language", "pt")
        await write(page)
        await states(page, *["Draft"] * 4)
        options = [call.body["options"] for call in service.engine.calls]
        assert len({one["seed"] for one in options}) == len({one["temperature"] for one in options}) == 4
        assert len({call.body["prompt"] for call in service.engine.calls}) == 4
        assert all("Portuguese" in call.body["prompt"] for call in service.engine.calls)
        emphases = await page.locator(".emphasis").all_inner_texts()
        assert len(set(emphases)) == 4
        group = page.locator(".group")
        await expect(group).to_have_count(1)
        await expect(group.locator("h3")).to_contain_text("Knots for climbers: figure eight, clove hitch, prusik")
        await expect(field(page, 1, "Description")).to_have_attribute("lang", "en")
        await group.get_by_role("button", name="Compare two").click()
        await expect(group.locator(".versus mark")).not_to_have_count(0)
        shown = await group.locator(".versus .words.description mark").all_inner_texts()
        assert shown == ["knots", "ropes"]
        await group.get_by_role("button", name="Use this description in draft 2").click()
        await expect(field(page, 2, "Description")).to_have_value("Ties knots on the wall.")
        await page.click("#undo")
        await expect(field(page, 2, "Description")).to_have_value("Ties ropes on the wall.")
        await card(page, 3).get_by_role("button", name="Favourite").click()
        await card(page, 2).get_by_role("button", name="Favourite").click()
        await page.reload()
        await expect(page.locator(".star[aria-pressed=true]")).to_have_count(1)
        await page.locator(".fold").click()
        await expect(page.locator(".card:visible")).to_have_count(0)
        await expect(page.locator(".told")).to_contain_text("favourite: Rope Work")


async def test_a_stopped_draft_can_be_copied_exported_and_written_on() -> None:
    anew = json.dumps({"criteria": {"narrative": "- Ties every knot"}})
    script = lambda body, index: Script(pieces=split(anew)) if index else SLOW  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await write(page, 1)
        await expect(field(page, 1, "Name")).to_have_value("Climbing Knots Essentials")
        await card(page, 1).get_by_role("button", name="Stop").click()
        await states(page, "Stopped")
        await expect(card(page, 1).get_by_role("button", name="Export")).to_be_enabled()
        await expect(card(page, 1).get_by_role("button", name="Copy")).to_be_enabled()
        await card(page, 1).get_by_role("button", name="Rewrite the criteria").click()
        await expect(field(page, 1, "Criteria")).to_have_value("- Ties every knot")
        await field(page, 1, "Description").fill("By hand.")
        await card(page, 1).get_by_role("button", name="Write again").click()
        await expect(card(page, 1).locator(".alert")).to_contain_text("Try again")
        await expect(field(page, 1, "Description")).to_have_value("By hand.")


@pytest.mark.parametrize(
    ("health", "is_practice"),
    [
        ({"engine": "embedded", "target_model": "SmolLM2-135M-Instruct.Q4_1.gguf"}, True),
        ({"engine": "embedded", "target_model": "Qwen2.5-Coder-1.5B-Instruct.Q4.gguf"}, False),
        ({"engine": "ollama", "target_model": "smollm2:135m"}, False),
    ],
)
async def test_the_small_bundled_model_is_called_what_it_is(health: dict[str, Any], is_practice: bool) -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:

        async def answer(route: Any) -> None:
            told = await (await route.fetch()).json()
            await route.fulfill(json=told | health)

        await page.route("**/health", answer)
        await page.reload()
        await expect(page.locator("#service-model")).to_have_text(health["target_model"])
        await expect(page.locator("#model-note")).to_be_visible(visible=is_practice)
        assert health["target_model"] not in await page.locator("#health").inner_text()
        if is_practice:
            await expect(page.locator("#model-note")).to_contain_text("make demo MODEL=1.5b")


async def test_a_waiting_card_is_small_and_a_dead_server_stops_the_clock() -> None:
    async with (
        serving(script=SLOW, max_concurrent_requests=1) as service,
        test_browser.Proxy(service.port) as proxy,
        demo_at(f"http://127.0.0.1:{proxy.port}/") as page,
    ):
        await write(page, 2)
        await states(page, "Writing", "Waiting, number 1 in the queue")
        await expect(page.locator(".card.waiting")).to_have_count(1)
        height = "node => node.getBoundingClientRect().height"
        tall, small = [await card(page, number).evaluate(height) for number in (1, 2)]
        assert small < 200 < tall
        await expect(card(page, 1).locator(".figures")).to_contain_text("left")
        proxy._server.close()
        proxy.cut()
        await states(page, *["The service does not answer"] * 2)
        await expect(card(page, 1).locator(".alert")).to_contain_text("goes on by itself")
        clock = await card(page, 1).locator(".figures").inner_text()
        assert " s" not in clock.replace("stopped", ""), "no clock runs"
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("does not answer")
        proxy._server = await asyncio.start_server(proxy._carry, "127.0.0.1", proxy.port)
        await expect(page.locator("#form-error")).to_be_empty(timeout=20_000)
        await expect(card(page, 1).locator(".alert")).to_be_empty()
        await card(page, 1).get_by_role("button", name="Stop").click()
        await expect(card(page, 1).locator(".state")).to_have_text("Stopped")


async def test_the_form_says_faults_in_its_own_words_and_completes_an_address() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        for summary in await page.locator("#composer summary").all():
            await summary.click()
        await page.fill("#institute_url", "example.edu")
        await page.fill("#longest", "5000")
        await write(page, 1)
        await expect(page.locator("#form-error")).to_have_text(
            "Longest draft, in words: write a whole number from 20 to 2000."
        )
        await expect(page.locator("#longest")).to_be_focused()
        await expect(page.locator("#institute_url")).to_have_value("https://example.edu")
        await page.fill("#longest", "300")
        await page.fill("#institute_url", "not an address")
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("Institution’s website: write a web address")
        await page.fill("#institute_url", "exämple.edu")
        await page.click("#write")
        await states(page, "Draft")
        await expect(page.locator("#institute_url")).to_have_value("https://xn--exmple-cua.edu")
        assert service.engine.calls[0].body["options"]["num_predict"] >= 600

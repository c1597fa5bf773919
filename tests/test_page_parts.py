"""The demo page's documents, exports, drawn badge and skills, in a real Chromium with the scripted engine."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from typing import Any

import pytest
from playwright.async_api import FilePayload, Page, expect

from documents_kit import docx, pages_of, paragraph
from service import judge, serving
from test_browser import AXE, RULES, card, demo_at, downloaded, drafts, open_export, pytestmark, write
from testkit import Script, badge_json, exceeds_context, split

__all__ = ["judge", "pytestmark"]

WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PDF_LINES = ["Knots for climbers", "The figure eight ties a climber in.", "The prusik climbs a fixed rope."]
PDF = pages_of([(72, 700 - 20 * n, 12, "Helvetica", line) for n, line in enumerate(PDF_LINES)])
DOCX = docx(paragraph("Rope work", "H1") + paragraph("Learners co\u00adil and care for ropes and throw them."))

DROP = """
([name, type, data]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(data), one => one.charCodeAt(0))], name, {type}));
    document.querySelector('#content').dispatchEvent(
        new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
}
"""
PASTE = """
text => {
    const clipboardData = new DataTransfer();
    clipboardData.setData('text/plain', text);
    document.querySelector('#content').dispatchEvent(
        new ClipboardEvent('paste', {clipboardData, bubbles: true, cancelable: true}));
}
"""
FINISHED = ".card:has([data-do=export]:not([hidden], [disabled]))"


async def drop(page: Page, name: str, media_type: str, data: bytes) -> None:
    await page.evaluate(DROP, [name, media_type, base64.b64encode(data).decode()])


async def one_draft(page: Page) -> None:
    await write(page, 1)
    await expect(page.locator(FINISHED)).to_have_count(1)


async def test_documents_are_dropped_read_corrected_and_written() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await drop(page, "syllabus.pdf", "application/pdf", PDF)
        await expect(page.locator("#source")).to_contain_text("From syllabus.pdf, 1 page")
        await expect(page.locator("#content")).to_have_attribute("lang", "en")
        await drop(page, "ropes.docx", WORD, DOCX)
        await expect(page.locator("#source")).to_contain_text("From ropes.docx")
        await expect(page.locator("#found-list")).to_contain_text("Soft hyphens were taken out")
        await page.click("#undo")
        await expect(page.locator("#content")).to_have_value(re.compile("Knots for climbers\n"))
        corrected = "\n".join(PDF_LINES) + "\nThe clove hitch is practised."
        await page.fill("#content", corrected)
        await expect(page.locator("#source")).to_contain_text("From syllabus.pdf"), "it stays while it is corrected"
        assert len(service.engine.calls) == 0, "nothing is written before it is read"
        await page.click("#count label >> nth=0")
        await page.click("#write")
        await expect(page.locator(FINISHED)).to_have_count(1)
        assert "The clove hitch is practised." in service.engine.calls[0].body["prompt"]


async def test_a_document_can_be_taken_with_the_keyboard_alone_and_a_bad_one_says_what_to_do() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        async with page.expect_file_chooser() as chosen:
            await page.focus("#content")
            await page.keyboard.press("Tab")
            await expect(page.locator("#open")).to_be_focused()
            await page.keyboard.press("Enter")
        encoded = "Seile und Knoten für Kletterer. Die Teilnehmenden üben, sich zu sichern.".encode("utf-16")
        await (await chosen.value).set_files(FilePayload(name="kurs.txt", mimeType="text/plain", buffer=encoded))
        await expect(page.locator("#content")).to_be_focused()
        await expect(page.locator("#content")).to_have_value(encoded.decode("utf-16"))
        await expect(page.locator("#content")).to_have_attribute("lang", "de")
        await page.keyboard.press("Control+End")
        await page.keyboard.type(" Prüfung an der Wand.")
        await expect(page.locator("#words")).not_to_contain_text("little to go by")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator(FINISHED)).to_have_count(4)
        assert "Prüfung an der Wand." in service.engine.calls[0].body["prompt"]
        await drop(page, "old.rtf", "application/rtf", b"{\\rtf1 Knots}")
        await expect(page.locator("#form-error")).to_contain_text("save it as .docx or .odt")
        await drop(page, "torn.pdf", "application/pdf", PDF[:300])
        await expect(page.locator("#form-error")).to_contain_text("torn.pdf: The document")


async def test_the_length_of_a_course_is_told_in_words_also_of_chinese() -> None:
    async with serving(num_ctx=2048) as service, demo_at(service.url + "/") as page:
        await page.fill("#content", "knots " * 10)
        await expect(page.locator("#words")).to_contain_text(re.compile("10 of about .* words: little to go by"))
        await page.fill("#content", "登山绳结课程")
        await expect(page.locator("#words")).to_contain_text("4 of about")
        await expect(page.locator("#long-told")).to_be_hidden()
        await page.evaluate("setContent('עברית\\n'.repeat(5000), '')")  # a line more is no line slower
        await expect(page.locator("#content")).to_have_attribute("dir", "rtl")
        await page.fill("#content", "knots " * 3000)
        await expect(page.locator("#long-told")).to_be_visible()
        await expect(page.locator("#content")).to_have_attribute("dir", "auto")
        await page.fill("#content", "Knots. ")
        await page.evaluate(PASTE, "Ropes.\n" * 40000)
        await expect(page.locator("#content")).to_have_value(re.compile("^Knots. Ropes.\n(Ropes.\n)+$"))
        await page.click("#write")
        await expect(page.locator("#form-error")).to_contain_text("Shorten it")


async def test_what_a_condensed_course_lost_is_told_with_its_draft() -> None:
    sections = [f"## Part {n}\n\n" + f"Learners tie knot number {n} and test it on rope {n}. " * 12 for n in range(40)]
    script = lambda body, index: (  # noqa: E731
        exceeds_context(9000, 2048) if len(body["prompt"]) > 12000 else Script(pieces=split(badge_json()))
    )
    async with serving(script=script, num_ctx=2048) as service, demo_at(service.url + "/") as page:
        await write(page, 1, "\n\n".join(sections))
        await expect(page.locator(FINISHED)).to_have_count(1, timeout=20_000)
        await card(page, 1).locator(".notes summary").click()
        await expect(card(page, 1).locator(".notes")).to_contain_text("too long for the model")


async def test_a_draft_goes_to_word_to_a_table_and_to_paper() -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await page.fill("#institution", "École & Söhne <1884>")
        await one_draft(page)
        badge = json.loads(badge_json())
        await open_export(page, 1, "word")
        name, data = await downloaded(page, page.locator("#export-save"))
        await expect(page.locator("#export-told")).to_contain_text(name)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            parts = {one: archive.read(one) for one in archive.namelist()}
        trees = {one: ElementTree.fromstring(part) for one, part in parts.items() if one.endswith((".xml", ".rels"))}
        said = "".join(trees["word/document.xml"].itertext())
        assert badge["badge_name"] in said
        assert "École & Söhne <1884>" in said
        assert b"<w:szCs " in parts["word/styles.xml"], "Arabic and Hebrew have sizes of their own"
        assert parts["word/media/badge1.png"].startswith(b"\x89PNG")
        await page.check("#export [value=csv]")
        name, data = await downloaded(page, page.locator("#export-save"))
        (row,) = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        assert (row["name"], row["institution"]) == (badge["badge_name"], "École & Söhne <1884>")
        await page.evaluate("window.print = () => { window.printed = document.querySelector('#sheet').innerText; }")
        await page.check("#export [value=print]")
        await page.click("#export-save")
        await page.emulate_media(media="print")
        await expect(page.locator("#sheet h1")).to_have_text(badge["badge_name"])
        await expect(page.locator("#composer")).to_be_hidden()
        await expect(page.locator("#export")).to_be_hidden()


async def test_a_credential_is_one_click_away_and_names_what_is_missing() -> None:
    options: Any = {"viewport": {"width": 390, "height": 844}}
    async with serving(script=drafts()) as service, demo_at(service.url + "/", **options) as page:
        await one_draft(page)
        await open_export(page, 1, "credential")
        await expect(page.locator("#recipient-told")).to_contain_text("placeholder")
        await page.fill("#issuer-name", "Riverside")
        await page.fill("#issuer-id", "riverside.example")
        await expect(page.locator("#preview")).to_contain_text('"https://riverside.example"')
        await page.fill("#recipient", "learner@example.edu")
        await expect(page.locator("#preview")).to_contain_text('"mailto:learner@example.edu"')
        buttons, preview = [await page.locator(one).bounding_box() for one in ("#export-save", "#preview")]
        assert buttons["y"] < preview["y"]
        name, _ = await downloaded(page, page.locator("#export-save"))
        await expect(page.locator("#export-told")).to_contain_text(name)
        await page.fill("#recipient", "Anna")
        await page.fill("#issuer-id", "Riverside")
        await page.click("#export-save")
        await expect(page.locator("#export-error")).to_contain_text("Issuer’s web address: write the address of the")
        await expect(page.locator("#export-error")).to_contain_text("write an e-mail address")
        await page.click("#export [data-close]")
        await page.get_by_label("Criteria of draft 1").fill("")
        await open_export(page, 1, "achievement")
        await page.click("#export-save")
        await expect(page.locator("#export-error")).to_contain_text("Criteria: there is nothing yet")


async def test_the_design_stays_when_the_name_is_edited_and_the_institution_is_whole() -> None:
    institution = "Hochschule für Angewandte Wissenschaften, Kunst und Gestaltung am Nördlichen Bodensee"
    colours = "() => [...document.querySelectorAll('.card .art path')].map(one => one.getAttribute('fill')).join()"
    async with serving(script=drafts()) as service, demo_at(service.url + "/") as page:
        await page.fill("#institution", institution)
        await one_draft(page)
        before = await page.evaluate(colours)
        await page.get_by_label("Name of draft 1").fill("Rope Care - Basics – and Practice")
        await expect(page.locator(".card .art svg")).to_have_attribute(
            "aria-label", r"Badge, Rope Care - Basics – and Practice, " + institution
        )
        assert await page.evaluate(colours) == before
        lines = await page.locator(".card .art text").all_text_contents()
        assert not [line for line in lines if line.startswith(("-", "–"))]
        assert " ".join(lines).endswith(institution)
        await card(page, 1).get_by_role("button", name="Design").click()
        await page.get_by_role("radio", name="Wine").check()
        await page.get_by_role("radio", name="Hexagon").check()
        logo = b'<svg xmlns="http://www.w3.org/2000/svg" width="80" height="40"><rect width="80" height="40"/></svg>'
        await page.set_input_files("#logo", FilePayload(name="logo.svg", mimeType="image/svg+xml", buffer=logo))
        await expect(page.locator("#logo-remove")).to_be_visible()
        await page.click("#design-take")
        await page.reload()
        await expect(page.locator(".card .art image")).to_have_count(1)
        _, drawing = await downloaded(page, card(page, 1).get_by_role("button", name="SVG"))
        assert b"#742a45" in drawing
        assert b"data:image/png;base64," in drawing


SKILL = {
    "name": "tie climbing knots",
    "url": "https://esco.example/1",
    "framework": "ESCO",
    "type": "ext:ESCOAlignment",
    "score": 0.6,
}


async def with_skills(page: Page) -> None:
    """The service as one with an index of skills: the contract's answers."""

    async def health(route: Any) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, json={**await answer.json(), "skills": [{"framework": "ESCO"}]})

    await page.route("**/health", health)
    await page.route(
        "**/skills?q=*",
        lambda route: route.fulfill(
            json=[SKILL | {"name": "inspect ropes", "url": "https://esco.example/2"}] * ("ropes" in route.request.url)
        ),
    )
    await page.reload()
    await page.locator("#health b").wait_for()


async def test_skills_are_chips_and_are_exported_as_edited(judge: Any) -> None:
    async with serving(script=drafts()) as service, demo_at(service.url + "/", bypass_csp=True) as page:
        await with_skills(page)
        await one_draft(page)
        await page.evaluate(
            "skill => { const [draft] = state.drafts; draft.review = {...draft.review, suggestions: [skill]};"
            " setSkills(draft, {tag: ['belaying']}); }",
            SKILL | {"sentence": "Knots for climbers."},
        )
        chips = card(page, 1).locator(".chips li")
        await card(page, 1).locator(".suggestions summary").click()
        await card(page, 1).get_by_role("button", name="+ tie climbing knots").click()
        await page.get_by_role("combobox", name="Skills").fill("ropes")
        await page.get_by_role("option", name="inspect ropes").wait_for()
        await page.keyboard.press("ArrowDown")
        await page.keyboard.press("Enter")
        await page.keyboard.type("patience")
        await expect(page.locator(".adding .hint")).to_have_text("No framework has it. Enter adds “patience” as it is.")
        await page.keyboard.press("Enter")
        await expect(chips).to_have_count(4)
        await card(page, 1).get_by_role("button", name="Remove the skill belaying").click()
        await expect(chips).to_have_count(3)
        await page.add_script_tag(path=AXE)
        assert await page.evaluate(RULES) == []
        await open_export(page, 1, "achievement")
        await expect(page.locator("#preview, #export-error").filter(has_text="ropes")).to_be_visible()
        _, data = await downloaded(page, page.locator("#export-save"))
        achievement = json.loads(data)
        assert {one["targetName"] for one in achievement["alignment"]} == {"tie climbing knots", "inspect ropes"}
        assert set(achievement["tag"]) == {"tie climbing knots", "inspect ropes", "patience"}
        assert judge.judge(achievement, "achievement")["errors"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_in_the_dialogs(scheme: Any) -> None:
    options: Any = {"color_scheme": scheme, "viewport": {"width": 320, "height": 800}, "reduced_motion": "reduce"}
    script = Script(pieces=split(badge_json()))
    async with serving(script=script) as service, demo_at(service.url + "/", bypass_csp=True, **options) as page:
        await page.add_script_tag(path=AXE)
        await drop(page, "ropes.docx", WORD, DOCX)
        await expect(page.locator("#found")).to_be_visible()
        await page.click("#count label >> nth=0")
        await page.click("#write")
        await expect(page.locator(FINISHED)).to_have_count(1)
        await card(page, 1).get_by_role("button", name="Design").click()
        assert await page.evaluate(RULES) == []
        await page.keyboard.press("Escape")
        await open_export(page, 1, "credential")
        assert await page.evaluate(RULES) == []
        assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0

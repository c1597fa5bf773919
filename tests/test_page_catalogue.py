"""A whole catalogue on the demo page, in a real Chromium. Skipped without Chromium, except in CI."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from playwright.async_api import Page, expect

import catalogue
import dccapi
import test_browser
from service import serving
from test_browser import AXE, RULES, WATCH_SHIFTS, demo_at, downloaded
from test_catalogue import GERMAN, KNOTS, asked, chosen, courses, lines, table
from testkit import Script, badge_json, eventually

pytestmark = test_browser.pytestmark


async def choose(page: Page, path: Path) -> None:
    await page.click("#to-catalogue")
    await page.set_input_files("#catalogue-file", path)
    await expect(page.locator("#columns-told")).to_contain_text(path.name)


async def begin(page: Page, path: Path) -> None:
    await choose(page, path)
    await page.click("#columns-write")
    await expect(page.locator("#catalogue-run")).to_be_visible()


async def says(page: Page, text: str | re.Pattern[str], timeout: float = 30_000) -> None:
    """Wait until the line of the run says this."""
    await expect(page.locator("#catalogue-told")).to_contain_text(text, timeout=timeout)


async def exported(page: Page, path: Path) -> Path:
    """The file that a button gives: the CSV or the JSONL."""
    _, content = await downloaded(page, page.locator(f"#catalogue-{path.suffix[1:]}"))
    await asyncio.to_thread(path.write_bytes, content)
    return path


def answer(body: Any, index: int) -> Script:
    return Script(pieces=[badge_json()])


# ---- A run ----------------------------------------------------------------------------------------------------------


async def test_a_reload_in_the_middle_loses_no_row_and_writes_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = courses(tmp_path, 300)
    urgencies, submit = set(), dccapi.GenerationQueue.submit

    def noted(queue: dccapi.GenerationQueue, client: str, request_id: str, urgency: int = 3) -> dccapi.Generation:
        urgencies.add(urgency)
        return submit(queue, client, request_id, urgency)

    monkeypatch.setattr(dccapi.GenerationQueue, "submit", noted)
    async with (
        serving(script=answer, tls=True) as service,
        demo_at(f"https://localhost:{service.port}/") as page,
    ):
        await begin(page, path)
        await page.evaluate(WATCH_SHIFTS)
        await eventually(lambda: len(service.engine.calls) > 100, 20)
        assert await page.evaluate("window.shifts") < 0.001, "nothing moves while rows are filled"
        await page.reload()
        await says(page, "300 of 300 drafts written")
        assert len(service.engine.calls) <= 300 + 4
        assert service.engine.max_open_calls <= 4
        assert urgencies == {6}
        written = lines(await exported(page, tmp_path / "drafts.jsonl"))
        model = written[0]["model"]
        assert [(one["id"], one["status"]) for one in written] == [(f"C-{number:04}", "done") for number in range(300)]
        assert [one["fingerprint"] for one in written] == [one.fingerprint(model) for one in chosen(path)]
        assert set(asked(service.engine)) == {str(number) for number in range(300)}


async def test_one_tab_writes_and_another_follows_and_takes_over(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = lambda body, index: Script(pieces=[badge_json()], gate=None if index < 6 else gate)  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await begin(page, courses(tmp_path, 12))
        second = await page.context.new_page()
        await second.goto(page.url)
        await says(second, "6 of 12")
        await expect(second.locator("#catalogue-wait")).to_contain_text("Another tab")
        assert set(await second.locator(".line-of.waiting .cell-notes").all_inner_texts()) == {""}
        await second.click("#catalogue-pause")
        await says(page, "pausing, 4 being written")
        gate.set()
        await says(page, "paused, 2 left")
        await page.goto(service.url + "/livez")
        await second.click("#catalogue-pause")
        await says(second, "12 of 12")
        assert len(service.engine.calls) == 12


async def test_what_passes_is_waited_for_and_what_does_not_is_a_failed_row(tmp_path: Path) -> None:
    rows = [["id", "content", "badge_level"], ["a", "word " * 60_000, ""], ["b", KNOTS, "Wizard"], ["c", "", ""]]
    path = table(tmp_path / "courses.csv", [*rows, *([f"d{n}", f"{KNOTS} {n}", "Expert"] for n in range(4))])
    async with (
        serving(script=answer, api_keys="office:right-key", max_per_client=2) as service,
        demo_at(service.url + "/") as page,
    ):
        await begin(page, path)
        await page.fill("#key", "right-key")
        await page.click("#key-dialog .primary")
        await says(page, "4 of 7 drafts written, 3 failed")
        await page.click("text=Failed 3")
        failed = page.locator(".line-of .cell-notes")
        await expect(failed).to_have_count(3)
        told = await failed.all_inner_texts()
        assert "0.25 MB" in told[0]
        assert "badge_level" in told[1]
        assert told[2] == "This row has no content."


# ---- Tables ---------------------------------------------------------------------------------------------------------

READ = """
async ([name, data, encoding]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const {columns, rows} = await readTable(new File([bytes], name), encoding);
    return [columns, rows.map(({line, cells}) => [line, cells])];
}
"""


def workbook(path: Path, rows: Iterable[Iterable[Any]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    book.create_sheet("Other").append(["not read"])
    book.save(path)
    return path


async def test_tables_are_read_as_catalogue_py_reads_them(tmp_path: Path) -> None:
    texts = {
        "sep.csv": b"sep=;\nid;content, all of it\n1;a, b\n",
        "mac.csv": b'a,b\r"1""2\r3",x\r',
        "trailing.csv": b"\n\na,b\n1,\n ,\n,2",
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    encodings = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]
    marks = enumerate(",;\t|,;")
    paths = [tmp_path / name for name in texts]
    paths += [table(tmp_path / f"{n}.csv", GERMAN, encodings[n], mark) for n, mark in marks]
    values = [1, 1.0, 0.25, True, datetime(2026, 3, 1, 9, 30), "a & <b>\n“c”", None, 12345678901]
    paths.append(workbook(tmp_path / "book.xlsx", [["id", "  course \n title", *"cdefgh"], values, [], ["K2", "x"]]))
    async with serving() as service, demo_at(service.url + "/") as page:
        for path in paths:
            read = catalogue.open_table(path)
            expected = [[line, list(row.values())] for line, row in read.rows()]
            data = base64.b64encode(path.read_bytes()).decode()
            assert await page.evaluate(READ, [path.name, data, ""]) == [list(read.columns), expected], path.name


async def test_what_is_wrong_with_a_table_is_told_before_anything_is_written(tmp_path: Path) -> None:
    rows = [["Course ID", "Title", "Text"], ["1", "Knots", KNOTS], ["1", "Knots", KNOTS], ["", "None", ""]]
    (tmp_path / "picture.xlsx").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "open.csv").write_text('id,content\n1,"never closed\n2,b\n')
    async with serving(script=answer) as service, demo_at(service.url + "/") as page:
        await choose(page, table(tmp_path / "courses.csv", rows, "utf-16", ";"))
        await page.select_option("#columns-id", label="Course ID")
        await expect(page.locator("#columns-faults")).to_contain_text("same id again in line 3 (1, as in line 2)")
        await expect(page.locator("#columns-faults")).to_contain_text("No id in line 4")
        await expect(page.locator("#columns-write")).to_be_disabled()
        await page.select_option("#columns-id", label="None: number the rows")
        await expect(page.locator("#columns-notes")).to_contain_text("1 row of fewer than 12 words")
        await page.uncheck("#columns-content [value='1']")
        await expect(page.locator("#columns-notes")).to_contain_text("1 row without content")
        await expect(page.locator("#columns-notes")).to_contain_text("the content of another: line 3 (as 2)")
        await expect(page.locator("#columns-first")).to_have_text(KNOTS)
        for name, reason in {"picture.xlsx": "cannot be read as XLSX", "open.csv": "never closed"}.items():
            await page.set_input_files("#catalogue-file", tmp_path / name)
            await expect(page.locator("#catalogue-error")).to_contain_text(reason)
        assert not service.engine.calls


# ---- Review ---------------------------------------------------------------------------------------------------------


def worse(body: Any, index: int) -> Script:
    """The second draft says what its course does not."""
    said = ["Ties the knots of 1999 that climbers need."] if "Part 1." in json.dumps(body) else []
    return Script(pieces=[badge_json("Knots for Climbers", *said)])


async def test_a_review_is_read_back_by_catalogue_py(tmp_path: Path) -> None:
    async with serving(script=worse) as service, demo_at(service.url + "/") as page:
        await begin(page, courses(tmp_path, 3))
        await says(page, "3 of 3")
        drafts = await exported(page, tmp_path / "drafts.jsonl")
        before = lines(drafts)
        await page.focus("#catalogue-grid")
        await page.keyboard.press("Home")
        await page.keyboard.press("ArrowDown")
        await page.keyboard.press("Enter")
        await expect(page.locator("#row-notes")).to_contain_text("1999")
        await expect(page.locator("#row-course")).to_contain_text("Part 1.")
        await page.fill("#row-name", "Knots by hand")
        await page.click("#row-accept")
        await expect(page.locator("#row-course")).to_contain_text("Part 2.")
        await page.click("#row-refuse")
        await expect(page.locator("#row-dialog")).to_be_hidden()
        await page.reload()
        await page.click("text=Accepted 1")
        await expect(page.locator(".line-of b")).to_have_text(["Knots by hand"])
        await catalogue_accepts(page, tmp_path, drafts, before)


async def catalogue_accepts(page: Page, directory: Path, drafts: Path, before: list[dict[str, Any]]) -> None:
    reviewed = await exported(page, directory / "reviewed.csv")
    assert catalogue.main(["accept", str(reviewed), str(drafts)]) == 0
    after = {one["id"]: one for one in lines(drafts)}
    assert [after[f"C-000{n}"].get("accepted") for n in range(3)] == [None, True, False]
    assert after["C-0001"]["achievement"]["name"] == after["C-0001"]["response"]["badge_name"] == "Knots by hand"
    assert after["C-0000"] == before[0]
    assert lines(await exported(page, directory / "again.jsonl")) == [after[f"C-000{n}"] for n in range(3)]
    page_rows = list(catalogue.open_table(reviewed).rows())
    assert catalogue.main(["export", str(drafts), "--to", "csv", "--out", str(directory / "ours.csv")]) == 0
    ours = catalogue.open_table(directory / "ours.csv")
    assert list(ours.columns) == list(page_rows[0][1])
    support = [row["support"] for _, row in page_rows]
    assert support == sorted(support)


async def test_two_thousand_rows_are_a_few_in_the_document(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = lambda body, index: Script(pieces=[badge_json()], gate=gate)  # noqa: E731
    async with serving(script=script) as service, demo_at(service.url + "/") as page:
        await begin(page, courses(tmp_path, 2000))
        rows = page.locator(".line-of")
        most = await page.evaluate("""async () => {
            const grid = document.querySelector('#catalogue-grid');
            let most = 0;
            for (let top = 0; top < grid.scrollHeight; top += 3000) {
                grid.scrollTop = top;
                await new Promise(requestAnimationFrame);
                await new Promise(requestAnimationFrame);
                most = Math.max(most, grid.querySelectorAll('.line-of').length);
            }
            return most;
        }""")
        assert 5 < most < 60
        await page.focus("#catalogue-grid")
        await page.keyboard.press("End")
        await expect(rows.last).to_contain_text("C-1999")
        await expect(rows.last).to_have_attribute("aria-rowindex", "2001")
        await page.fill("#catalogue-find", "c-1234")
        await expect(rows).to_have_count(1)
        await page.click("#catalogue-pause")
        gate.set()
        await says(page, "paused, 1,996 left")


@pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("dark", 1280)])
async def test_axe_finds_nothing_in_the_catalogue(tmp_path: Path, scheme: Any, width: int) -> None:
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    async with (
        serving(script=worse) as service,
        demo_at(service.url + "/#catalogue", reduced_motion="reduce", **options) as page,
    ):

        async def is_clean() -> None:
            assert await page.evaluate(RULES) == []
            assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0

        await page.add_script_tag(path=AXE)
        await is_clean()
        rows = [["id", "content"], *([f"{n}", f"{KNOTS} Part {n}."] for n in range(5)), ["x", ""]]
        await choose(page, table(tmp_path / "courses.csv", rows))
        await page.click("#columns-options summary")
        await is_clean()
        await page.click("#columns-write")
        await says(page, "5 of 6 drafts written, 1 failed")
        await page.locator(".line-of button").first.click()
        await is_clean()
        await page.locator(".line-of").nth(1).click()
        await expect(page.locator("#row-dialog")).to_be_visible()
        await is_clean()

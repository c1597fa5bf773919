"""What `reader` reads in documents of every kind, and what it says of bad ones. Over HTTP: test_dccapi.py."""

from __future__ import annotations

import ctypes
import io
import os
import random
import resource
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from documents_kit import (
    OLE,
    Child,
    changed_reader,
    child,
    docx,
    docx_table,
    odt,
    one_page,
    packed,
    pages_of,
    paragraph,
    pdf_of,
    pptx,
    shape,
    stream,
)
from service import HERE, pure
from testkit import eventually

BROKEN, ENCRYPTED, SLOW = "document_broken", "document_encrypted", "document_too_slow"
NO_TEXT, UNSUPPORTED = "document_has_no_text", "unsupported_media_type"


@pytest.fixture(scope="module")
def reader() -> Iterator[Child]:
    with child() as running:
        yield running


def read(running: Child, path: Path, data: bytes, name: str = "course", media_type: str = "") -> dict[str, Any]:
    path.write_bytes(data)
    answer = running.ask("document", path=str(path), name=name, media_type=media_type)
    assert isinstance(answer, dict)
    return answer


# --- The protocol ---


def test_every_task_is_answered_in_a_frame_and_a_fault_ends_no_process(reader: Child) -> None:
    assert reader.ask("text", content="<p>Knots &amp; hitches</p>") == {
        "text": "Knots & hitches",
        "language": "en",
        "notes": [],
        "grounds": {"taught": " hitch knot ", "ordered": "  ", "title": "Knots & hitches", "has_orders": False},
    }
    assert [one["code"] for one in reader.ask("text", content="oﬃce")["notes"]] == ["text_repaired"]
    assert reader.ask("document", path="/nowhere/at/all")["error"] == BROKEN
    assert reader.ask("fly")["error"] == BROKEN


def test_a_child_that_only_makes_plain_text_loads_no_parser_of_documents() -> None:
    with child() as running:
        running.ask("text", content="<p>Knots</p>")
        loaded = Path(f"/proc/{running.process.pid}/maps").read_text()
        assert "pdfium" not in loaded
        assert running.peak() < 64 * 2**20


def test_no_task_opens_a_connection_starts_a_program_or_writes_a_file() -> None:
    program = (
        "import reader.__main__, socket, subprocess, pathlib\nreader.__main__._confine()\n"
        "for forbidden in (lambda: socket.create_connection(('127.0.0.1', 9)), lambda: subprocess.run(['true']),\n"
        "                  lambda: pathlib.Path('/tmp/dccapi-never').write_text('x' * 9000)):\n"
        "    try:\n        forbidden()\n        raise SystemExit('done')\n    except OSError:\n        pass\n"
    )
    import subprocess
    import sys

    Path("/tmp/dccapi-never").unlink(missing_ok=True)
    run = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=False)
    Path("/tmp/dccapi-never").unlink(missing_ok=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_process_that_may_write_no_files_leaves_no_broken_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    shutil.copytree(HERE / "reader", tmp_path / "reader", ignore=shutil.ignore_patterns("__pycache__"))
    for _ in range(2):  # the second would import what the first has left
        with child(tmp_path) as running:
            assert "Knots" in read(running, tmp_path / "file", docx(paragraph("Knots")))["content"]


def under_hard_limits() -> None:
    for kind, size in ((resource.RLIMIT_CPU, 3600), (resource.RLIMIT_AS, 400 * 2**20)):
        resource.setrlimit(kind, (size, size))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(24, 24)  # PR_CAPBSET_DROP, CAP_SYS_RESOURCE: then root cannot raise them either


def test_where_limits_are_hard_documents_are_read_within_them(tmp_path: Path) -> None:
    with child(before=under_hard_limits) as running:
        assert running.ask("text", content="Knots")["text"] == "Knots"
        assert "Knots" in read(running, tmp_path / "file", docx(paragraph("Knots")))["content"]


# --- Formats ---

SYLLABUS = """# Welding 101: Joining Metals

This course introduces arc and gas welding to people who have never held a torch. Students learn how heat changes \
metal, how to prepare a joint, and how to judge a finished weld by eye and with simple tests, so that they can work \
safely in a shop.

## Learning outcomes
1. Set up an arc welder for mild steel.
2. Prepare and tack a butt joint.
  - clean the edges
  - set the root gap
3. Judge a weld by its bead.

## Topics
- Safety and protective clothing
- Thermodynamics of fusion

## Schedule

Week | Topic | Reading
1 | Safety, protective clothing and the law that governs the shop floor in this country | Chapter 1
2 | Arc welding | Chapters 2 and 3

## Assessment

A practical test (60 %) and a logbook (40 %)."""


@pytest.mark.parametrize("kind", ["docx", "odt", "pdf"])
def test_one_syllabus_by_libreoffice_reads_the_same_in_every_format(reader: Child, kind: str) -> None:
    answer = reader.ask("document", path=str(HERE / f"tests/documents/syllabus.{kind}"), name="", media_type="")
    assert answer["content"].replace("\n\n1. Set", "\n1. Set") == SYLLABUS
    assert (answer["title"], answer["pages"]) == ("Welding 101: Joining Metals", 1)
    assert answer["words"] == len(answer["content"].split())
    assert answer["notes"] == []


def test_docx_keeps_headings_lists_and_tables(reader: Child, tmp_path: Path) -> None:
    body = paragraph("Knots", "T") + paragraph("Outcomes", "H1") + paragraph("tie a bowline", numbering="1")
    body += paragraph("untie it", numbering="1") + paragraph("Weeks", "H2") + paragraph("first", numbering="2")
    body += docx_table([["Week", "Topic"], ["1", "Hitches | bends"], ["", ""]])
    body += "<w:p><w:r><w:rPr><w:b/></w:rPr><w:t>Grading</w:t></w:r></w:p>"
    body += "<w:p><w:del><w:r><w:delText>gone</w:delText></w:r></w:del></w:p>"
    answer = read(reader, tmp_path / "file", docx(body))
    assert answer["content"] == (
        "# Knots\n\n# Outcomes\n- tie a bowline\n- untie it\n\n## Weeks\n1. first\n\n"
        "Week | Topic\n1 | Hitches | bends\n\n## Grading"
    )


def test_odt_leaves_comments_and_deleted_text_out(reader: Child, tmp_path: Path) -> None:
    body = "<text:tracked-changes><text:p>old</text:p></text:tracked-changes>"
    body += '<text:h text:outline-level="2">Knots</text:h><text:p>Tie<text:s/>a'
    body += "<office:annotation><text:p>why?</text:p></office:annotation><text:tab/>bowline &lt;b&gt;</text:p>"
    answer = read(reader, tmp_path / "file", odt(body))
    assert answer["content"] == "## Knots\n\nTie a bowline <b>"


def test_slides_come_in_order_with_title_nested_points_and_notes(reader: Child, tmp_path: Path) -> None:
    table = "<p:graphicFrame><a:tbl>" + "".join(
        f"<a:tr>{''.join(f'<a:tc><a:p><a:r><a:t>{cell}</a:t></a:r></a:p></a:tc>' for cell in row)}</a:tr>"
        for row in (("Week", "Topic"), ("1", "Hitches"))
    )
    first = (
        shape("Bends\n  sheet bend\nHitches", "body") + shape("Knots", "title") + shape("7", "sldNum"),
        "Say it slowly.",
    )
    second = (shape("Plan", "ctrTitle") + table + "</a:tbl></p:graphicFrame>" + shape("A picture", ""), "")
    answer = read(reader, tmp_path / "file", pptx(second, first))
    assert answer["content"] == (
        "## Knots\n- Bends\n  - sheet bend\n- Hitches\n\nNotes:\n\nSay it slowly.\n\n"
        "## Plan\n\nWeek | Topic\n1 | Hitches\n\nA picture"
    )
    assert (answer["title"], answer["pages"]) == ("Knots", 2)


def test_slides_that_hold_a_word_document_are_slides(reader: Child, tmp_path: Path) -> None:
    slides = pptx((shape("Knots"), ""))
    types = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    with zipfile.ZipFile(io.BytesIO(slides)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace(
        b"<Default", f'<Default Extension="docx" ContentType="{types}"/><Default'.encode(), 1
    )
    assert read(reader, tmp_path / "file", packed({**parts}))["content"] == "Knots"


def test_html_loses_its_navigation_and_keeps_its_structure(reader: Child, tmp_path: Path) -> None:
    page = (
        "<!doctype html><html><head><title>T</title><style>p {}</style></head><body><nav>Home</nav>"
        "<h1>Knots\n &amp; hitches</h1><p>Tie<br>them</p><ol start=3><li><p>bowline</p>"
        "<ul><li>slow</ul><li>hitch</ol><table><tr><th>Week<th>Topic"
        "<tr><td><p>1</p><td><ul><li>bends<li>hitches</ul></table><script>x()</script><footer>Imprint</footer>"
    )
    answer = read(reader, tmp_path / "file", page.encode(), "x.txt", "text/plain")
    assert answer["content"] == (
        "# Knots & hitches\n\nTie\nthem\n3. bowline\n  - slow\n4. hitch\n\nWeek | Topic\n1 | bends; hitches"
    )
    assert answer["pages"] is None


def test_markdown_keeps_its_marks(reader: Child, tmp_path: Path) -> None:
    text = "---\ntitle: Knots\nlayout: page\n---\n# Knots\n\n- a **bowline**\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    answer = read(reader, tmp_path / "file", text.encode(), "x.md")
    assert answer["content"] == "Knots\n\n" + text.partition("---\n# ")[2].join(["# ", ""])
    assert answer["title"] == "Knots"


TEXTS = {
    "utf-8": "Schweißen für Anfänger: Grundlagen des Lichtbogens",
    "utf-8-sig": "Schweißen für Anfänger: Grundlagen des Lichtbogens",
    "utf-16": "Сварка для начинающих: основы дуги",
    "utf-16-le": "Soudage pour débutants, les bases de l'arc électrique",
    "utf-32": "Soudage pour débutants",
    "cp1252": "Le café des étudiants – “soudage” à l’arc électrique, où l’on prépare une pièce de métal.",
    "iso8859-15": "Hitsauksen perusteet: opiskelija osaa hitsata terästä kaarella ja arvioida hitsin laadun, 50 €.",
    "cp1250": "Podstawy spawania: student potrafi przygotować złącze, ocenić jakość spoiny i pracować bezpiecznie.",
    "cp1251": "Основы сварки: студент умеет подготовить соединение, оценить качество шва и работать безопасно.",
    "koi8-r": "Основы сварки: студент умеет подготовить соединение, оценить качество шва и работать безопасно.",
    "shift_jis": "溶接入門：学生はアーク溶接の基礎を学び、安全に作業する方法を理解し、継手を準備することができる。",
    "euc_jp": "溶接入門：学生はアーク溶接の基礎を学び、安全に作業する方法を理解し、継手を準備することができる。",
    "gb18030": "焊接入门：学生将学习电弧焊的基础知识，了解如何安全操作，并能够准备接头和评估焊缝的质量。",
    "big5": "焊接入門：學生將學習電弧焊的基礎知識，了解如何安全操作，並能夠準備接頭和評估焊縫的品質。",
    "euc_kr": "용접 입문: 학생은 아크 용접의 기초를 배우고 안전하게 작업하는 방법을 이해하며 이음매를 준비할 수 있다.",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_text_is_read_in_any_usual_encoding(reader: Child, tmp_path: Path, encoding: str) -> None:
    answer = read(reader, tmp_path / "file", TEXTS[encoding].encode(encoding), "course.txt", "text/plain")
    assert answer["content"] == TEXTS[encoding]


@pytest.mark.parametrize("text", ["Knoten für Kletterer. Prüfung: sechs Knoten.", "Übungen", "Café – größer"])
def test_a_short_western_text_is_no_other(reader: Child, tmp_path: Path, text: str) -> None:
    assert read(reader, tmp_path / "file", text.encode("cp1252"))["content"] == text


def test_a_declared_charset_is_believed_where_the_bytes_fit(reader: Child, tmp_path: Path) -> None:
    greek = "Συγκόλληση".encode("iso8859-7")
    assert (
        read(reader, tmp_path / "file", greek, media_type="text/plain; charset=iso-8859-7")["content"] == "Συγκόλληση"
    )
    page = "<html><meta charset='windows-1253'><p>Συγκόλληση".encode("cp1253")
    assert read(reader, tmp_path / "file", page)["content"] == "Συγκόλληση"
    assert read(reader, tmp_path / "file", "é".encode(), media_type="text/plain; charset=no-such")["content"] == "é"


# --- PDF ---

PROSE = (
    "The course introduces the knots that climbers use and shows how each of them is tied, dressed, loaded and "
    "checked before it is trusted with a life, and how a knot that was wet or frozen is untied again without a knife "
    "or a spike."
)


def column(x: float, text: str, width: int) -> list[tuple[float, float, float, str, str]]:
    lines: list[str] = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return [(x, 640 - 14 * number, 10, "Helvetica", line.rstrip()) for number, line in enumerate(lines)]


def test_columns_are_read_one_after_the_other(reader: Child, tmp_path: Path) -> None:
    right = PROSE.replace("knot", "hitch")
    page = [(60, 700, 20, "Helvetica-Bold", "Knots and hitches"), *column(60, PROSE, 45), *column(330, right, 45)]
    page = sorted(page, key=lambda word: -word[1])  # as a program writes that goes down the page
    answer = read(reader, tmp_path / "file", pages_of(page))
    assert answer["content"] == f"# Knots and hitches\n\n{PROSE}\n\n{right}"


def test_running_lines_go_and_hyphenation_is_undone_across_pages(reader: Child, tmp_path: Path) -> None:
    def page(number: int, *lines: str) -> list[tuple[float, float, float, str, str]]:
        texts = [(60.0, 700.0 - 14 * row, 10.0, "Helvetica", line) for row, line in enumerate(lines)]
        return [(60, 760, 8, "Helvetica", "Guide to Knots"), *texts, (300, 30, 8, "Helvetica", f"{number} / 3")]

    answer = read(
        reader,
        tmp_path / "file",
        pages_of(
            page(
                1,
                "Learners tie the bowline and explain why it holds, and then they under-",
                "stand how a rope ages in the sun and the rain of many summers in",
            ),
            page(2, "the mountains, where nobody is there to help them when it breaks."),
            page(3, "The end."),
        ),
    )
    assert answer["content"] == (
        "Learners tie the bowline and explain why it holds, and then they understand how a rope ages in the sun and "
        "the rain of many summers in the mountains, where nobody is there to help them when it breaks.\n\n"
        "The end.\n\nGuide to Knots"
    )
    assert [note["code"] for note in answer["notes"]] == ["text_repaired", "text_repaired"]


def test_a_table_without_lines_is_a_table(reader: Child, tmp_path: Path) -> None:
    rows = [("Week", "Topic", "Hours"), ("1", "Bends", "3"), ("2", "Hitches and their use", "4")]
    page = [
        (x, 700 - 16 * number, 10, "Helvetica", cell)
        for number, row in enumerate(rows)
        for x, cell in zip((60, 140, 400), row, strict=True)
    ]
    answer = read(reader, tmp_path / "file", pages_of(page))
    assert answer["content"] == "Week | Topic | Hours\n1 | Bends | 3\n2 | Hitches and their use | 4"


def test_a_page_that_lies_on_its_side_is_read(reader: Child, tmp_path: Path) -> None:
    turned = one_page(b"BT /F1 12 Tf 0 1 -1 0 200 100 Tm (Knots for climbers) Tj 0 -40 Td (Sailors too.) Tj ET")
    assert read(reader, tmp_path / "file", turned)["content"] == "Knots for climbers\n\nSailors too."


def test_pages_without_text_are_told(reader: Child, tmp_path: Path) -> None:
    answer = read(reader, tmp_path / "file", pages_of([(60, 700, 12, "Helvetica", "Knots")], [], [], []))
    assert answer["content"] == "Knots"
    assert [(note["code"], note["message"]) for note in answer["notes"]] == [
        ("pages_without_text", "Without text, perhaps scans: pages 2-4.")
    ]


# --- Hostile documents ---

KNOTS = b"BT /F1 12 Tf 72 700 Td (Knots for climbers) Tj ET"
PAGE = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] >>"
ITSELF = b"/XObject << /X 6 0 R >>"
CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
LAUGHS = "".join(
    f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ENTITIES = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha">{LAUGHS}]>'
FILE_ENTITY = '<!DOCTYPE x [<!ENTITY i SYSTEM "file:///etc/passwd">]>'
MANIFEST = '<manifest:manifest xmlns:manifest="m"><manifest:encryption-data/></manifest:manifest>'


def locked(data: bytes) -> bytes:
    """A ZIP archive whose parts say that they are encrypted."""
    out = bytearray(data)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = out.find(mark)
        while at >= 0:
            out[at + place] |= 1
            at = out.find(mark, at + 4)
    return bytes(out)


def password() -> bytes:
    from reportlab.lib.pdfencrypt import StandardEncryption

    return pages_of([(60, 700, 12, "Helvetica", "Knots")], encrypt=StandardEncryption("secret", canPrint=0))


def scan() -> bytes:
    image = stream(
        b"\x80" * 10_000,
        b"/Type /XObject /Subtype /Image /Width 100 /Height 100 /ColorSpace /DeviceGray /BitsPerComponent 8",
    )
    return one_page(b"q 612 0 0 792 0 0 cm /X Do Q", image, resources=b"/XObject << /X 6 0 R >>")


HOSTILE: dict[str, tuple[Any, set[str]]] = {
    # Told apart by its content: none of these is what its name says.
    "empty": (lambda: b"", {NO_TEXT}),
    "white space": (lambda: b" \n\t\xc2\xa0", {NO_TEXT}),
    "zero bytes": (lambda: bytes(4096), {UNSUPPORTED}),
    "noise": (lambda: random.Random(1).randbytes(2**20), {UNSUPPORTED}),
    "RTF": (lambda: rb"{\rtf1\ansi Knots}", {UNSUPPORTED}),
    "PNG": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), {UNSUPPORTED}),
    "JPEG": (lambda: b"\xff\xd8\xff\xe0" + bytes(100), {UNSUPPORTED}),
    "TIFF": (lambda: b"II*\0" + bytes(100), {UNSUPPORTED}),
    "an old Word document": (lambda: OLE + bytes(2000), {UNSUPPORTED}),
    "a program": (lambda: b"\x7fELF" + bytes(2000), {UNSUPPORTED}),
    "an archive": (lambda: packed({"a.txt": "Knots"}), {UNSUPPORTED}),
    "a spreadsheet": (lambda: packed({"[Content_Types].xml": "spreadsheetml.sheet.main"}), {UNSUPPORTED}),
    "an archive in an archive": (lambda: packed({"a.docx": docx(paragraph("x"))}), {UNSUPPORTED}),
    # Protected
    "PDF with a password": (password, {ENCRYPTED}),
    "Office with a password": (lambda: OLE + bytes(600) + "EncryptedPackage".encode("utf-16-le"), {ENCRYPTED}),
    "ODT with a password": (lambda: odt("<text:p>x</text:p>", **{"META-INF/manifest.xml": MANIFEST}), {ENCRYPTED}),
    "DOCX in a locked archive": (lambda: locked(docx(paragraph("x"))), {ENCRYPTED}),
    # Without text
    "a scan": (scan, {NO_TEXT}),
    "a PDF without a page": (lambda: pdf_of([CATALOG, b"<< /Type /Pages /Kids [] /Count 0 >>"]), {NO_TEXT, BROKEN}),
    "an empty DOCX": (lambda: docx(""), {NO_TEXT}),
    "an empty ODT": (lambda: odt(""), {NO_TEXT}),
    "no slides": (lambda: pptx(), {NO_TEXT}),
    "HTML that shows nothing": (lambda: b"<html><script>x()</script><p>&nbsp;</p>", {NO_TEXT}),
    # Bombs
    "a bomb of white space": (lambda: docx(" " * 20_000_000), {BROKEN}),
    "a bomb of paragraphs": (lambda: docx(paragraph("a") * 200_000), {BROKEN}),
    "a bomb in ODT": (lambda: odt("<text:p>a</text:p>" * 2_000_000), {BROKEN}),
    "a bomb in a slide": (lambda: pptx((shape("a") * 400_000, "")), {BROKEN}),
    "a bomb in a part that nobody reads": (
        lambda: docx(paragraph("Knots"), **{"word/media/a.png": bytes(10**7)}), {""},
    ),
    "too many parts": (lambda: packed({f"{n}.xml": "" for n in range(11_000)}), {BROKEN}),
    "a bomb in a page": (lambda: one_page(KNOTS, bomb=600), {BROKEN, SLOW}),
    "text without end": (lambda: one_page(b"BT /F1 9 Tf " + b"(abc) Tj 0 -1 Td " * 2_000_000), {BROKEN, SLOW}),
    "lines without end": (lambda: one_page(KNOTS + b"0 0 m 9 9 l S " * 1_000_000), {BROKEN, SLOW, ""}),
    "a million objects": (
        lambda: pdf_of([CATALOG, b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", PAGE, *[b"[1 2]"] * 10**6]), {NO_TEXT},
    ),
    # Nests and loops
    "DOCX of nested tables": (
        lambda: docx("<w:tbl><w:tr><w:tc>" * 9000 + paragraph("x") + "</w:tc></w:tr></w:tbl>" * 9000), {BROKEN},
    ),
    "ODT of nested lists": (
        lambda: odt("<text:list><text:list-item>" * 9000 + "x" + "</text:list-item></text:list>" * 9000), {BROKEN},
    ),
    "slides of nested groups": (
        lambda: pptx(("<p:grpSp>" * 100_000 + shape("Knots") + "</p:grpSp>" * 100_000, "")), {BROKEN},
    ),
    "HTML of nested elements": (lambda: b"<html>" + b"<div>" * 800_000 + b"x", {BROKEN}),
    "HTML of nested lists": (lambda: b"<html>" + b"<ul><li>" * 400_000 + b"x", {BROKEN}),
    "nested graphics states": (lambda: one_page(b"q " * 5_000_000 + KNOTS), {BROKEN, SLOW, ""}),
    "a form in itself": (
        lambda: one_page(
            KNOTS + b" /X Do",
            stream(b"/X Do /X Do", b"/Type /XObject /Subtype /Form /BBox [0 0 1 1] /Resources << %s >>" % ITSELF),
            resources=ITSELF,
        ),
        {BROKEN, SLOW, ""},
    ),
    "pages in themselves": (
        lambda: pdf_of([CATALOG, b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 1000000 >>"]), {NO_TEXT, BROKEN},
    ),
    # XML
    "entities in DOCX": (lambda: docx("<w:p><w:r><w:t>&i;</w:t></w:r></w:p>", ENTITIES), {BROKEN}),
    "entities in ODT": (lambda: odt("<text:p>&i;</text:p>", ENTITIES), {BROKEN}),
    "entities in a slide": (lambda: pptx((shape("x"), ""), prolog=ENTITIES), {BROKEN}),
    "a file as an entity in DOCX": (lambda: docx("<w:p><w:r><w:t>&i;</w:t></w:r></w:p>", FILE_ENTITY), {BROKEN}),
    "a file as an entity in ODT": (lambda: odt("<text:p>&i;</text:p>", FILE_ENTITY), {BROKEN}),
    "XML that is none": (lambda: docx("<w:p>"), {BROKEN}),
    "a DOCX without its text": (
        lambda: packed({"[Content_Types].xml": "wordprocessingml.document.main"}), {BROKEN},
    ),
    "an ODT without its text": (lambda: packed({"mimetype": "application/vnd.oasis.opendocument.text"}), {BROKEN}),
    # Damage
    "the head of a PDF": (lambda: b"%PDF-1.7\n", {BROKEN}),
    "the head of an archive": (lambda: b"PK\x03\x04" + bytes(40), {BROKEN}),
    "half a DOCX": (lambda: (HERE / "tests/documents/syllabus.docx").read_bytes()[:3000], {BROKEN}),
    "half an ODT": (lambda: (HERE / "tests/documents/syllabus.odt").read_bytes()[:9000], {BROKEN}),
}  # fmt: skip


def error_of(answer: dict[str, Any]) -> str:
    assert "died" not in answer
    assert answer.get("detail", "x.").endswith(".")
    return str(answer.get("error", ""))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_refused_with_its_reason(reader: Child, tmp_path: Path, name: str) -> None:
    make, errors = HOSTILE[name]
    answer = read(reader, tmp_path / "file", make(), name + ".pdf", "application/pdf")
    assert error_of(answer) in errors
    assert reader.ask("text", content="Next")["text"] == "Next"
    assert reader.peak() < 96 * 2**20  # the document was another process's


ENDLESS = {
    "Python": "while True:\n        pass",
    "C": "import collections, itertools\n    collections.deque(itertools.count(), 0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("language", ENDLESS)
def test_a_document_that_takes_too_long_is_told_so(tmp_path: Path, language: str) -> None:
    changed_reader(tmp_path, "__main__.py", '{"document": 15}', '{"document": 1}')
    changed_reader(tmp_path, "documents.py", "kind = kind_of(path)", ENDLESS[language])
    with child(tmp_path) as running:
        assert read(running, tmp_path / "file", b"Knots")["error"] == SLOW
        assert running.ask("text", content="Next")["text"] == "Next"


async def test_a_process_that_is_killed_takes_that_of_its_document_along(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which it waits to open
    with child() as running:
        running.send("document", path=str(tmp_path / "pipe"))
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
        (reading,) = await eventually(lambda: children.read_text().split())
        running.process.kill()
        await eventually(lambda: not Path(f"/proc/{reading}").exists())


def test_a_document_that_takes_its_process_over_answers_no_other_request(tmp_path: Path) -> None:
    said = 'b\'{"content": 1}\\n{"text": "of another"}\\n\''
    changed_reader(tmp_path, "__main__.py", "answer = orjson.dumps(result_of(request))", f"answer = {said}")
    with child(tmp_path) as running:
        running.send("document", path="/")
        assert running.process.stdout
        assert running.process.stdout.readline().count(b"of another") == 1
        assert running.ask("text", content="Knots")["text"] == "Knots"


SAMPLES = [path.read_bytes() for path in sorted((HERE / "tests/documents").iterdir())]
SAMPLES.append(pptx((shape("Knots", "title") + shape("a\n  b", "body"), "Notes of the slide")))
ANSWERS = {"", BROKEN, ENCRYPTED, SLOW, NO_TEXT, UNSUPPORTED}
damage = settings(pure, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@damage
@given(st.sampled_from(SAMPLES), st.floats(0, 1))
def test_a_document_cut_off_anywhere_is_answered(reader: Child, tmp_path: Path, sample: bytes, share: float) -> None:
    assert error_of(read(reader, tmp_path / "file", sample[: int(share * len(sample))])) in ANSWERS


@pytest.mark.slow
@damage
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=40))
def test_a_document_of_flipped_bits_is_answered(
    reader: Child, tmp_path: Path, sample: bytes, flips: list[tuple[float, int]]
) -> None:
    spoilt = bytearray(sample)
    for share, bit in flips:
        spoilt[int(share * (len(spoilt) - 1))] ^= 1 << bit
    assert error_of(read(reader, tmp_path / "file", bytes(spoilt))) in ANSWERS

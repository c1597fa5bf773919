"""Documents of all kinds, good ones and bad ones, read by a process of documents.py as the service runs it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condense import condense
from documents_kit import Child, child, docx, docx_table, odt, pages_of, paragraph, pptx, shape


@pytest.fixture(scope="module")
def reader() -> Iterator[Child]:
    with child() as running:
        yield running


@pytest.fixture
def read(reader: Child, tmp_path: Path) -> Any:
    def ask(data: bytes, name: str = "", media_type: str = "") -> Any:
        (tmp_path / "upload").write_bytes(data)
        return reader.ask("document", path=str(tmp_path / "upload"), name=name, media_type=media_type)

    return ask


# ---------------------------------------------------------------- the protocol


def test_a_text_is_answered_with_its_repairs_and_its_language(reader: Child) -> None:
    said = reader.ask("text", content="# Knots\n\nThe learners tie knots and in\xadspect them before they climb.")
    assert said == {
        "text": "Knots\n\nThe learners tie knots and inspect them before they climb.",
        "repairs": {"soft_hyphens": 1},
        "language": "en",
    }


def test_an_unknown_task_is_an_error_and_the_next_one_is_served(reader: Child) -> None:
    assert reader.ask("nonsense")["error"] == "document_broken"
    assert reader.ask("text", content="Knots")["text"] == "Knots"


# ---------------------------------------------------------------- good documents

KNOTS = "# Knots for Climbers\n\nRopes & knots.\n- Tie a knot\n- Check it\n\nTask | Weight\nTest | 60 %"


def test_a_docx_keeps_headings_lists_and_tables(read: Any) -> None:
    said = read(
        docx(
            paragraph("Knots for Climbers", "H1")
            + paragraph("Ropes & knots.")
            + paragraph("Tie a knot", numbering="1")
            + paragraph("Check it", numbering="1")
            + docx_table([["Task", "Weight"], ["Test", "60 %"]])
        )
    )
    assert said == {
        "content": KNOTS,
        "title": "Knots for Climbers",
        "language": "en",
        "pages": None,
        "words": 21,
        "notes": [],
    }


def test_an_odt_keeps_headings_lists_and_tables(read: Any) -> None:
    items = "".join(f"<text:list-item><text:p>{text}</text:p></text:list-item>" for text in ("Tie a knot", "Check it"))
    cell = "<table:table-cell><text:p>{}</text:p></table:table-cell>"
    rows = "".join(
        f"<table:table-row>{cell.format(one)}{cell.format(other)}</table:table-row>"
        for one, other in (("Task", "Weight"), ("Test", "60 %"))
    )
    said = read(
        odt(
            '<text:h text:outline-level="1">Knots for Climbers</text:h><text:p>Ropes &amp; knots.</text:p>'
            f"<text:list>{items}</text:list><table:table>{rows}</table:table>"
        )
    )
    assert (said["content"], said["title"]) == (KNOTS, "Knots for Climbers")


def test_slides_come_in_their_order_with_their_notes(read: Any) -> None:
    second, first = (shape("Second", "title") + shape("Tie\n  Deeper\nCheck", "body"), "Say it"), (shape("First"), "")
    said = read(pptx(second, first))  # the kit lays the order of the slides against that of their files
    assert said["content"] == "First\n\n## Second\n- Tie\n  - Deeper\n- Check\n\nNotes:\n\nSay it"
    assert said["pages"] == 2


def test_html_keeps_headings_lists_and_tables_without_the_menu(read: Any) -> None:
    rows = "<tr><th>Task</th><th>Weight</th></tr><tr><td>Test</td><td>60 %</td></tr>"
    said = read(
        b"<!doctype html><title>Course</title><nav>Menu</nav><h1>Knots for Climbers</h1><p>Ropes &amp; knots.</p>"
        b"<ul><li>Tie a knot</li><li>Check it</li></ul><table>" + rows.encode() + b"</table>"
    )
    assert said["content"] == KNOTS


def test_markdown_stays_as_it_is(read: Any) -> None:
    text = "# Knots\n\n- tie\n- check\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    assert read(text.encode(), "knots.md")["content"] == text


JAPANESE = (
    "登山のロープワーク入門。この授業では八の字結び、巻き結びを学びます。受講者は結び目を点検できるようになります。"
)
FRENCH = "Élèves – « nœuds » et cordes à l’épreuve. Les étudiants apprennent à vérifier les nœuds d’un partenaire."


@pytest.mark.parametrize(
    ("text", "encoding", "language"),
    [
        (FRENCH, "utf-8", "fr"),
        (FRENCH, "utf-8-sig", "fr"),
        (FRENCH, "utf-16", "fr"),
        (FRENCH, "utf-16-le", "fr"),
        (FRENCH, "utf-16-be", "fr"),
        (FRENCH, "utf-32", "fr"),
        (FRENCH, "cp1252", "fr"),
        (FRENCH.replace("œ", "oe").replace("’", "'").replace("–", "-"), "iso-8859-1", "fr"),
        (JAPANESE, "utf-8", "ja"),
        (JAPANESE, "shift-jis", "ja"),
        (JAPANESE, "euc-jp", "ja"),
    ],
)
def test_text_is_read_in_any_usual_encoding(read: Any, text: str, encoding: str, language: str) -> None:
    said = read(text.encode(encoding))
    assert (said["content"], said["language"]) == (text, language)


def test_a_declared_charset_tells_the_encoding(read: Any) -> None:
    assert read("Zażółć węzeł".encode("iso-8859-2"), media_type="text/plain; charset=iso-8859-2")["content"] == (
        "Zażółć węzeł"
    )


# ---------------------------------------------------------------- PDF


def lines(x: float, y: float, *texts: str) -> list[tuple[float, float, float, str, str]]:
    return [(x, y - 14 * number, 10, "Helvetica", text) for number, text in enumerate(texts)]


def page(number: int, *parts: tuple[float, float, float, str, str]) -> list[tuple[float, float, float, str, str]]:
    head, foot = (72, 740, 8, "Helvetica", "Faculty of Mountains"), (300, 40, 8, "Helvetica", f"Page {number}")
    return [head, *parts, foot]


LEFT = (
    "The left column begins here with a",
    "sentence about ropes and about how",
    "they are kept dry and out of the sun,",
    "and it goes on for some lines so that",
    "it is clearly a column of prose text,",
    "and ends with the word lighthouse.",
)
RIGHT = (
    "The right column tells of harnesses",
    "and of helmets, which must be worn at",
    "all times in the hall and at the crag,",
    "whatever the weather of the day is and",
    "however easy the route may look today,",
    "and ends with the word harbour.",
)


def syllabus() -> bytes:
    said = lines(
        *(72, 670, "Knots hold climbers, and climbers who know them hold one an-"),
        "other. This course teaches eight knots, one in each week of the",
        "term, and how each of them is tied, dressed, set and checked.",
    )
    cells = [
        (x, 670 - 20 * row, 10, "Helvetica", text)
        for row, texts in enumerate((("Task", "Weight"), ("Practical test", "60 %"), ("Written test", "40 %")))
        for x, text in zip((72, 300), texts, strict=True)
    ]
    return pages_of(
        page(
            1,
            (72, 700, 18, "Helvetica-Bold", "Knots for Climbers"),
            *said,
            *lines(72, 600, "• Tie a figure eight", "• Check a partner"),
        ),
        page(2, *lines(72, 700, *LEFT), *lines(320, 700, *RIGHT)),
        page(3, (72, 700, 14, "Helvetica-Bold", "Assessment"), *cells),
    )


def test_a_pdf_is_read_in_order_without_running_lines(read: Any) -> None:
    said = read(syllabus(), "knots.pdf")
    assert said["content"].split("\n") == [
        "# Knots for Climbers",
        "",
        "Knots hold climbers, and climbers who know them hold one another. This course teaches eight knots, one in "
        "each week of the term, and how each of them is tied, dressed, set and checked.",
        "- Tie a figure eight",
        "- Check a partner",
        " ".join(LEFT),
        " ".join(RIGHT),
        "",
        "## Assessment",
        "",
        "Task | Weight",
        "Practical test | 60 %",
        "Written test | 40 %",
        "",
        "Faculty of Mountains",
    ]
    assert (said["title"], said["pages"], said["language"]) == ("Knots for Climbers", 3, "en")
    assert [note["code"] for note in said["notes"]] == ["text_repaired", "text_repaired"]


# ---------------------------------------------------------------- long courses are condensed

COURSE = """\
# Knots for Climbers

This course teaches climbers to tie, dress and check the knots that hold them.

## Attendance policy

{policy}

## Learning outcomes

- Tie a figure eight on a harness.
- Inspect the knots of a partner before a climb.

## Reading list

Ashley, The Ashley Book of Knots, ISBN 978-0-385-04025-9.

## Topics

{topics}

## Contact

Office hours on Monday, 10:00, room 12, or knots@example.org.
"""
POLICY = "Students who miss a class must write to the office, and those who miss two are asked to leave. " * 20
TOPICS = "Friction holds a knot. The figure eight keeps its strength under load. Prusik loops grip a rope. " * 3


def test_a_course_that_fits_is_not_condensed() -> None:
    said = condense(" Knots \n\n and ropes. ", 3, 21)
    assert said == {"text": " Knots \n\n and ropes. ", "left_out": [], "words_kept": 3, "words": 3}


def test_policies_readings_and_contacts_go_before_what_the_course_is_about() -> None:
    course = COURSE.format(policy=POLICY, topics=TOPICS)
    said = condense(course, len(course.split()) - len(POLICY.split()) - 20)
    assert said["left_out"] == ["Attendance policy", "Reading list", "Contact"]
    kept = COURSE.partition("## Attendance")[0] + COURSE[COURSE.index("## Learning") : COURSE.index("## Reading")]
    assert said["text"] == f"{kept}## Topics\n\n{TOPICS.strip()}"
    assert said["words_kept"] == len(said["text"].split())


def test_sentences_that_say_least_go_when_sections_are_not_enough() -> None:
    said = condense(COURSE.format(policy=POLICY, topics=TOPICS), 55)
    assert "This course teaches climbers to tie" in said["text"]
    assert "Inspect the knots of a partner before a climb." in said["text"]
    assert said["text"].count("Prusik loops grip a rope.") <= 1  # what is said again goes first
    assert said["words_kept"] <= 55


HEADINGS = [
    ("Learning outcomes", "Late work and attendance policy"),
    ("Resultados de aprendizaje", "Bibliografía"),
    ("Objectifs du cours", "Barème et assiduité"),
    ("Lernziele", "Sprechstunde und Kontakt"),
    ("Resultados da aprendizagem", "Calendário e prazos"),
    ("Osaamistavoitteet", "Arvosanat"),
    ("Leerdoelen", "Literatuur"),
    ("Obiettivi formativi", "Orario di ricevimento"),
    ("到達目標", "参考文献"),
    ("学习目标", "联系方式"),
]


@pytest.mark.parametrize("marks", ["## ", ""])
@pytest.mark.parametrize(("stays", "goes"), HEADINGS)
def test_headings_of_ten_languages_tell_what_stays(stays: str, goes: str, marks: str) -> None:
    filler = "Alpha beta gamma delta epsilon zeta eta theta. "
    said = condense(f"{marks}{goes}\n\n{filler * 9}\n\n{marks}{stays}\n\n{filler * 9}", 75)
    assert (said["left_out"], stays in said["text"], goes in said["text"]) == ([goes], True, False)


def test_what_stands_under_a_policy_goes_with_it() -> None:
    body = "Alpha beta gamma delta epsilon zeta eta theta.\n\n"
    text = f"# Policies\n\n{body}## Phones in class\n\n{body}# Topics\n\n{body}"
    assert condense(text, 12)["left_out"] == ["Policies", "Phones in class"]


def test_a_script_without_spaces_is_cut_by_characters() -> None:
    said = condense("到達目標\n\n" + JAPANESE * 40, 100, 300)
    assert said["text"].startswith("到達目標\n\n登山")
    assert 200 < len(said["text"]) <= 300


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab .!\n#-|:：。結び目9@%"), max_size=400),
    words=st.integers(0, 60),
    characters=st.none() | st.integers(0, 300),
)
def test_never_more_than_asked_for_and_nothing_that_the_course_does_not_say(
    text: str, words: int, characters: int | None
) -> None:
    said = condense(text, words, characters)
    assert said["words_kept"] == len(said["text"].split()) <= words
    assert characters is None or len(said["text"]) <= characters
    assert not Counter(re.sub(r"\s", "", said["text"])) - Counter(text)


def test_twenty_thousand_words_are_condensed_at_once() -> None:
    course = COURSE.format(policy=POLICY * 20, topics=" ".join(f"Topic {n} is about rope {n}." for n in range(2000)))
    course += " ".join(f"Sentence {n} tells of knots and of ropes." for n in range(2000)) + "x" * 20_000
    start = time.process_time()
    assert condense(course, 3000, 20_000)["words_kept"] > 2500
    assert time.process_time() - start < 1


def test_the_child_condenses(reader: Child) -> None:
    said = reader.ask("condense", content="Knots hold. Ropes hold.", words=2, characters=20)
    assert said == {"text": "Knots hold.", "left_out": [], "words_kept": 2, "words": 4}

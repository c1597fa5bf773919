"""Long courses are condensed: what tells least goes first, openly, and the budget holds."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import example, given, settings, strategies as st

from documents_kit import child
from reader.condense import condense

JAPANESE = (
    "登山のロープワーク入門。この授業では八の字結び、巻き結びを学びます。受講者は結び目を点検できるようになります。"
)
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
@example("", 0, 0)
@example(" \n", 0, 0)
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


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    "piece", ["\n", "\x0b", " \n", "a. ", "9 ", "(", "# ", "a\n\n", "結", ":", "| ", "a", "A-F: 9 "]
)
def test_no_text_takes_the_square_of_its_length(piece: str) -> None:
    def seconds(length: int, end: str) -> float:
        start = time.process_time()
        condense("Knots.\n" + piece * (length // len(piece)) + end, 10, 1000)
        return time.process_time() - start

    for end in ("", "end"):
        # Four times the length, where a square is sixteen. Python may collect garbage in the middle of one try.
        assert any(seconds(300_000, end) < 8 * seconds(75_000, end) + 0.1 for _ in range(3))


def test_a_process_of_documents_condenses() -> None:
    with child() as reader:
        said = reader.ask("condense", content="Knots hold. Ropes hold.", words=2, characters=20)
    assert said == {"text": "Knots hold.", "left_out": [], "words_kept": 2, "words": 4}

"""A long course is shortened openly: what tells least of what is learned goes first, and the budget holds."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condense import condense, count
from documents_kit import child
from service import HERE, pure

COURSES = HERE.parent / "shared" / "courses" / "public.jsonl"

# Headings of ten languages: what is learned, what of, how it is shown; then what goes first.
LANGUAGES = {
    "en": (("Learning outcomes", "Topics", "Assessment"), ("Attendance policy", "Contact", "Required readings")),
    "es": (("Resultados", "Contenidos", "Evaluación"), ("Política de asistencia", "Contacto", "Bibliografía")),
    "fr": (("Objectifs", "Contenu", "Évaluation"), ("Règlement", "Enseignant et courriel", "Bibliographie")),
    "de": (("Lernziele", "Kursinhalte", "Prüfung"), ("Anwesenheit", "Sprechstunde", "Literatur")),
    "pt": (("Competências", "Ementa", "Avaliação"), ("Frequência", "Contato", "Bibliografia")),
    "fi": (("Osaamistavoitteet", "Sisältö", "Tentti"), ("Läsnäolo", "Opettaja", "Oppimateriaali")),
    "nl": (("Leerdoelen", "Onderwerpen", "Toetsing"), ("Aanwezigheid", "Spreekuur", "Literatuur")),
    "it": (("Obiettivi", "Argomenti", "Valutazione"), ("Frequenza", "Ricevimento", "Letture")),
    "ja": (("到達目標", "授業内容", "評価"), ("出席について", "連絡先", "参考書")),
    "zh": (("学习成果", "课程内容", "考核"), ("考勤规定", "联系方式", "参考书目")),
}


def section(heading: str, words: int = 40) -> str:
    body = " ".join(f"{heading.split()[0].lower()}word{number}" for number in range(words))
    return f"## {heading}\n\n{body}.\n"


def course(language: str) -> str:
    stays, goes = LANGUAGES[language]
    return "# Knots\n\n" + "\n".join(section(heading) for pair in zip(goes, stays, strict=True) for heading in pair)


@pytest.mark.parametrize("language", LANGUAGES)
def test_policies_contacts_and_readings_go_and_outcomes_topics_and_assessment_stay(language: str) -> None:
    stays, goes = LANGUAGES[language]
    content = course(language)
    found = condense(content, count("# Knots\n\n" + "".join(map(section, stays))))
    assert found["left_out"] == list(goes)
    assert re.findall(r"(?m)^## (.*)", found["text"]) == list(stays)
    assert found["text"].startswith("# Knots\n\n")


def test_a_text_that_fits_is_left_as_it_is() -> None:
    content = "# Knots\n\nA  bowline.\n\n\n[link](http://x.y)  "
    assert condense(content, 100) == {"text": content, "left_out": [], "words_kept": 5, "words": 5}


def test_only_as_many_sections_go_as_have_to() -> None:
    content = course("en")
    found = condense(content, count(content) - 30)
    assert len(found["left_out"]) == 1
    assert found["words_kept"] > found["words"] - 60


def test_headings_without_marks_are_found_and_parts_go_with_their_section() -> None:
    content = (
        "Knots for climbers\n\nYou learn to tie the bowline and the figure eight.\n\nOffice hours\n\n"
        "Monday from nine to ten in room four of the old building.\n\nLearning outcomes\n\nTie the bowline."
    )
    assert condense(content, 20)["left_out"] == ["Office hours"]
    content = (
        "# Knots\n\n## Policies\n\nNone is here.\n\n### Late work\n\nIt is late.\n\n## Topics\n\nBends and hitches."
    )
    found = condense(content, 8)
    assert (found["text"], found["left_out"]) == ("# Knots\n\n## Topics\n\nBends and hitches.", ["Policies"])


def test_sentences_that_say_least_go_within_a_section_and_the_rest_keeps_its_words_and_order() -> None:
    content = (
        "# Knots\n\n## Topics\n\nClimbers tie knots in ropes, and ropes hold climbers. See you on 12/12/2024 at 10:30! "
        "Knots in ropes fail when climbers tie them badly. Mail bob@example.org.\n- ropes and knots\n- 10:30"
    )
    found = condense(content, 26)
    assert found["text"] == (
        "# Knots\n\n## Topics\n\nClimbers tie knots in ropes, and ropes hold climbers. "
        "Knots in ropes fail when climbers tie them badly.\n- ropes and knots"
    )
    assert found["left_out"] == []


def test_what_stands_twice_goes_before_what_stands_once() -> None:
    once = "Learners tie the bowline with one hand. "
    found = condense(f"# Knots\n\n## Outcomes\n\n{once * 20}They also tie the sheet bend.", 18)
    assert found["text"] == f"# Knots\n\n## Outcomes\n\n{once}They also tie the sheet bend."


def test_addresses_of_links_go_first() -> None:
    link = "[the bowline](https://example.org/a/very/long/address/of/a/knot)"
    found = condense("# Knots\n\n" + f"- {link} is a knot of many uses\n" * 3 + "- the end", 1000, 200)
    assert "https" not in found["text"]
    assert "the bowline is a knot of many uses" in found["text"]


def test_the_budget_holds_where_no_spaces_stand_between_words() -> None:
    content = (
        "# 溶接入門\n\n## 到達目標\n\n"
        + "学生はアーク溶接の基礎を理解する。" * 50
        + "\n\n## 連絡先\n\n"
        + "研究室に来てください。" * 50
    )
    found = condense(content, 200, 1000)
    assert count(found["text"]) <= 200
    assert len(found["text"].encode()) <= 1000
    assert found["left_out"] == ["連絡先"]
    assert "学生はアーク溶接の基礎を理解する。" in found["text"]


@pure
@given(
    st.lists(
        st.sampled_from(
            [
                "# Knots",
                "## Policies",
                "### Topics",
                "",
                "",
                "- an item",
                "Some words. More of them!",
                "a | b",
                "溶接入門。学生は",
            ]
        )
        | st.text("ab .\n#-|é語", max_size=60)
    ),
    st.integers(1, 40),
    st.none() | st.integers(1, 200),
)
def test_the_budget_always_holds_and_nothing_is_added(lines: list[str], words: int, size: int | None) -> None:
    content = "\n".join(lines)
    found = condense(content, words, size)
    assert count(found["text"]) <= words
    assert found["words_kept"] == count(found["text"])
    assert size is None or len(found["text"].encode()) <= size
    letters = iter(re.sub(r"\s", "", content))
    assert all(letter in letters for letter in re.sub(r"\s", "", found["text"]))


def test_twenty_thousand_words_take_less_than_a_second() -> None:
    content = "\n".join(
        section(f"{topic} {number}", 400) for number in range(13) for topic in ("Topics", "Policy", "Week", "A")
    )
    assert count(content) > 20_000
    began = time.process_time()
    assert count(condense(content, 3000)["text"]) <= 3000
    assert time.process_time() - began < 1


@pytest.mark.skipif(not COURSES.exists(), reason="needs ../shared/courses/public.jsonl")
def test_the_longest_public_course_is_condensed_in_the_child() -> None:
    texts = [json.loads(line)["content"] for line in COURSES.read_text("utf-8").splitlines()]
    with child() as running:
        found = running.ask("condense", content=max(texts, key=len), words=2500, size=15_000)
    assert 1800 < found["words_kept"] <= 2500
    assert found["words"] > 13_000
    assert found["left_out"]

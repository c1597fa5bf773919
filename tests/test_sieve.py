"""What is kept of a model's sentences, and what the course says in place of the rest. No connection, no engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

import dccapi
from reader import review
from reader.sieve import EVERY_MARKUP, FEWEST_WORDS, Sieve
from service import HERE, parse_badge, partial_badge, pure
from testkit import badge_json

SHORT = [json.loads(line) for line in (HERE / "tools" / "data" / "short.jsonl").read_text("utf-8").splitlines()]
COURSE = next(course["content"] for course in SHORT if course["id"] == "short-en")
COUNTS = {"badge_description": (3, 4), "criteria": (4, 8)}
TRUE = "Students inspect hives and recognise the queen."
ITEMS = [TRUE, "Extract and bottle honey", "Count varroa mites with a sugar shake", "They keep records of each visit."]


def written(sieve: Sieve, description: Any, criteria: Any, size: int = 7) -> tuple[str, dict[str, Any]]:
    text = json.dumps({"badge_name": "Beekeeping", "badge_description": description, "criteria": criteria})
    draft, tokens, before = dccapi.Draft(sieve=sieve), "", dict[str, Any]()
    for at in range(0, len(text), size):
        tokens += draft.feed(text[at : at + size])
        now = partial_badge(tokens)
        assert now.get("badge_description", "").startswith(before.get("badge_description", ""))
        before = now
    tokens += draft.finish(cut=False)
    assert draft.badge
    return tokens, draft.badge.model_dump()


sentences = st.lists(st.sampled_from([*ITEMS, "Learners bake bread for 9 days.", "BADGE_NAME", "…", ""]), max_size=5)


@pure
@given(description=sentences, criteria=sentences, size=st.integers(1, 40), is_tiny=st.booleans())
def test_any_lists_become_a_badge_that_says_enough_once_and_nothing_else(
    description: list[str], criteria: list[str], size: int, is_tiny: bool
) -> None:
    tokens, badge = written(Sieve(COURSE, "en", (), COUNTS, is_tiny=is_tiny), description, criteria, size)
    assert json.loads(tokens) == badge
    found = review.review(badge, COURSE)
    assert {note["code"] for note in found["notes"]} == set()
    assert len(badge["criteria"]["narrative"].split()) >= FEWEST_WORDS


@pytest.mark.parametrize("course", SHORT, ids=[course["id"] for course in SHORT])
def test_a_model_that_writes_nonsense_leaves_a_draft_of_the_courses_own_sentences(course: dict[str, str]) -> None:
    sieve = Sieve(course["content"], course["lang"], (), COUNTS)
    _, badge = written(sieve, ["BADGE: BADGE-2019-02-30"] * 4, ["Codigo: 2018-04-30", "Codigo: 2018-04-30"])
    found = review.review(badge | {"badge_name": course["title"]}, course["content"])
    assert found["support"] == 1
    assert found["language"] == course["lang"]
    assert [note["code"] for note in found["notes"]] == []


def test_without_a_course_nothing_but_repetitions_is_left_out() -> None:
    description = ["Bakers knead dough.", "Bakers knead dough", "They bake for 9 days."]
    _, badge = written(Sieve(), description, ["Knead dough", "Knead the dough", "Bake"])
    assert badge["badge_description"] == "Bakers knead dough. They bake for 9 days."
    assert badge["criteria"]["narrative"] == "- Knead dough\n- Bake"


def test_sentences_that_the_course_bears_stay_as_the_model_wrote_them() -> None:
    _, badge = written(Sieve(COURSE, "en", (), COUNTS), [TRUE, "Bees are sold on Mars in 2031."], ITEMS[1:])
    assert badge["badge_description"].startswith(TRUE)
    assert "Mars" not in badge["badge_description"]
    assert badge["criteria"]["narrative"].split("\n")[:3] == [f"- {item}" for item in ITEMS[1:]]


def test_a_long_item_is_no_more_sentences_than_there_is_room_for_and_ends_whole() -> None:
    item = (
        "Students inspect hives. They recognise the queen. They keep records of each visit. They prevent swarming. Th"
    )
    _, badge = written(Sieve(COURSE, "en", (), {"badge_description": (2, 3)}), [item], ["Bottle honey"])
    assert (
        badge["badge_description"]
        == "Students inspect hives. They recognise the queen. They keep records of each visit."
    )


def test_an_item_that_a_token_limit_cut_is_left_out() -> None:
    draft = dccapi.Draft()
    tokens = draft.feed('{"badge_name": "Knots", "badge_description": ["Ties."], "criteria": ["Tie six", "Check th')
    tokens += draft.finish(cut=True)
    assert json.loads(tokens)["criteria"]["narrative"] == "- Tie six"


# --- What models leave in their texts ---

SPOILT = "<pre>Ties</pre> <b>knots</b><br/>of &quot;three&quot; kinds; 3 < 4, R&D, <harness> <i class='x'>and more</i>"
CLEAN = ["Ties", "knots of", '"three"', "kinds; 3 < 4, R&D, <harness> and more"]


@pure
@given(size=st.integers(1, 60), is_list=st.booleans())
def test_markup_is_taken_out_of_texts_however_they_come(size: int, is_list: bool) -> None:
    texts = [SPOILT, "Coils <i>a</i> rope.<br>"]
    tokens, badge = written(Sieve(markup=EVERY_MARKUP), *([[text] for text in texts] if is_list else texts), size)
    assert json.loads(tokens) == badge
    assert badge["badge_description"].split() == " ".join(CLEAN).split()
    assert badge["criteria"]["narrative"].removeprefix("- ") == "Coils a rope."


@pytest.mark.parametrize("end", ["a<b", "a <", "a &am", "a <br", "a <b", "a < b"])
def test_what_only_begins_like_markup_stays(end: str) -> None:
    _, badge = written(Sieve(), f"Ties {end}", ["Ties"], 1)
    assert badge["badge_description"] == f"Ties {end}"


def test_of_other_models_only_breaks_and_blocks_are_taken_out() -> None:
    badge = parse_badge(badge_json(name="Rope<br>Work", description="<pre>Ties a <b>knot</b></pre>"))
    assert (badge.badge_name, badge.badge_description) == ("Rope Work", "Ties a <b>knot</b>")


def test_a_course_about_markup_keeps_it() -> None:
    _, badge = written(Sieve(markup=None), ["Writes <b> and &nbsp; by hand."], ["Ends each <li>"])
    assert badge["badge_description"] == "Writes <b> and &nbsp; by hand."
    assert badge["criteria"]["narrative"] == "- Ends each <li>"


@pytest.mark.parametrize(
    "title", ["BADGE: Rope Work", "Badge name: Rope Work", " badge_title:Rope Work", "Title: Rope Work", "Rope Work"]
)
def test_a_title_is_not_called_a_badge(title: str) -> None:
    assert parse_badge(badge_json(name=title)).badge_name == "Rope Work"


def test_the_requests_own_words_are_no_badge() -> None:
    told = "Each tells what the holder knows and can do in another topic of the course."
    sieve = Sieve(request=f"- badge_description: a list of sentences. {told}")
    _, badge = written(sieve, [told, TRUE], ITEMS)
    assert badge["badge_description"] == TRUE
    for texts in ([told], told):
        with pytest.raises(dccapi.InvalidModelOutput):
            written(sieve, texts, ITEMS)


@pytest.mark.parametrize(
    "invented",
    [
        "Colony supers prepare varroa records every Saturday.",  # words of many sentences, of none together
        "My students inspect hives and recognise the queen, brood and stores.",
        "Click to inspect hives safely, recognise the queen, brood and stores.",
        "inspect hives safely, recognise the queen, brood and stores.",
        "You are required to inspect hives, recognise the queen, brood and stores and complete this badge.",
        "[lessons]# Inspect hives safely, recognise the queen, brood and stores.",
    ],
)
def test_a_tiny_models_sentence_has_a_sentence_of_the_course_behind_it(invented: str) -> None:
    _, badge = written(Sieve(COURSE, "en", (), COUNTS, is_tiny=True), [invented, TRUE], ITEMS)
    assert invented not in badge["badge_description"]


@pytest.mark.parametrize(
    ("sentence", "is_kept"),
    [
        ("Die Lernenden erkennen die Königin und die Brut, und ernten den Honigs.", True),
        ("Die Lernenden erkenntigen die Königin und die Bruterschöpfung, und müschten Honigaufruf.", False),
    ],
)
def test_outside_english_a_tiny_models_words_are_those_of_the_course(sentence: str, is_kept: bool) -> None:
    course = "Die Lernenden erkennen die Königin und die Brut. Sie ernten Honig. Sie zählen Milben im Herbst."
    _, badge = written(Sieve(course, "de", (), COUNTS, is_tiny=True), [sentence], [])
    assert (sentence in badge["badge_description"]) == is_kept


def test_a_word_of_any_length_takes_little_memory() -> None:
    sieve = Sieve("Bienen " + "a" * 200_000, "de", (), COUNTS, is_tiny=True)
    sieve.kept("criteria", "Die Bienen fliegen im Herbst.", [])
    assert sum(map(len, sieve._word_beginnings)) < 2000


@pytest.mark.parametrize(
    ("title", "is_preferred"),
    [
        ("Winter Supervision", True),
        ("Beekeeping follows a colony of honey bees from spring to the winter of one yea", True),
        ("The First Year", False),
        ("honey bee colony", False),
        ("Beekeeping Basics", False),
    ],
)
def test_a_courses_headline_is_better_than_a_title_that_has_nothing_of_it(title: str, is_preferred: bool) -> None:
    assert Sieve(COURSE, "en", is_tiny=True).prefers(review.title_of(COURSE), title) == is_preferred
    assert not Sieve(COURSE, "en").prefers(review.title_of(COURSE), title)


@pytest.mark.parametrize(
    "sieve", [Sieve(), Sieve(COURSE, "en", (), COUNTS), Sieve(COURSE, "en", (), COUNTS, is_tiny=True)]
)
def test_neither_bare_numbers_nor_the_title_are_items(sieve: Sieve) -> None:
    _, badge = written(sieve, [TRUE], ["3", "BEEKEEPING.", *ITEMS])
    assert badge["criteria"]["narrative"].startswith(f"- {ITEMS[0]}\n")


def test_letters_of_another_script_than_the_courses_are_no_text() -> None:
    course = "अपने पौधे को क्लाउड में स्थानांतरित करें। मिट्टी की नमी का पता लगाएं।"
    sieve = Sieve(course, "hi", (), COUNTS)
    assert sieve.kept("criteria", "अपने पौधे को क्लाउड में स्थानांतरित करें।", [])
    assert not sieve.kept("criteria", "अपने पौधे को क्लाउ드 में स्थानাংतरित करें।", [])


@pytest.mark.parametrize(
    ("item", "kept"),
    [
        ("Description: Extract and bottle the honey", "Extract and bottle the honey"),
        ("Badge_name: Beekeeping", ""),
        ("Inspect hives safely, recognise the queen, brood and stores (an example", ""),
        ("queen_skills", ""),
        ("example University", ""),
        ("Recognise the queen, brood and", ""),
        ("Bottle honey. No prior experience is required. A basic knowledge of bees is assumed.", "Bottle honey."),
    ],
)
def test_what_is_left_of_an_item_of_a_model_of_ours(item: str, kept: str) -> None:
    course = f"{COURSE} No prior experience is required. A basic knowledge of bees is assumed."
    before = [("badge_name", "Beekeeping")]
    sieve = Sieve(course, "en", ("Example University",), COUNTS, is_tiny=True)
    assert sieve.kept("criteria", item, before) == kept


@pytest.mark.parametrize(
    "label",
    [
        "## Prerequisites\n\n",
        "=== Prerequisites\n\n",
        "Prerequisites: ",
        "Prior knowledge\n\n",
        "## Late policy\n\n",
        "Office hours: ",
    ],
)
@pytest.mark.parametrize("is_tiny", [True, False])
def test_what_is_to_be_known_before_and_policies_are_not_what_a_course_teaches(label: str, is_tiny: bool) -> None:
    known = "Handle tools such as knives and the smoker gun."
    sieve = Sieve(f"{COURSE}\n\n{label}{known}", "en", (), COUNTS, is_tiny=is_tiny)
    _, badge = written(sieve, [known, TRUE], [known, *ITEMS])
    assert "smoker gun" not in str(badge)


def test_a_quote_loses_the_marks_before_it_and_around_words_but_none_within() -> None:
    course = (
        "+ They build graphs with neo4j_graphrag for all of the 2*3 *tables*.\n\u2713 They query *them* in `Cypher`."
    )
    counts = {"badge_description": (2, 2), "criteria": (2, 2)}
    _, badge = written(Sieve(course, "en", (), counts), ["BADGE"], ["BADGE"])
    said = "They build graphs with neo4j_graphrag for all of the 2*3 tables. They query them in Cypher."
    assert badge["badge_description"] == said


@pytest.mark.parametrize(
    "sentence",
    [
        "Demonstrate knowledge of when informed consent is required.",
        "Explain the prerequisites of photosynthesis.",
        "Describe the metabolism of vitamin A.",
        "Explain what each tool is used for.",
        "For loops over lists and while loops with conditions",
    ],
)
def test_what_only_looks_like_a_prerequisite_or_an_end_stays(sentence: str) -> None:
    sieve = Sieve(f"{COURSE} {sentence}", "en", (), COUNTS, is_tiny=True)
    assert sieve.kept("criteria", sentence, []) == sentence


@pytest.mark.parametrize(
    ("language", "sentence"), [("zh", "统计蜂螨数量"), ("ar", "يستخرجون العسل ويتعرفون على الملكة.")]
)
def test_words_that_are_written_together_are_those_of_the_course(language: str, sentence: str) -> None:
    course = {
        "zh": "学员学会安全检查蜂箱,识别蜂王和工蜂。秋季统计蜂螨数量。",
        "ar": "يتعرف المتعلمون على الملكة ويستخرجون العسل من الخلية.",
    }
    assert Sieve(course[language], language, (), COUNTS, is_tiny=True).kept("criteria", sentence, [])


def test_where_most_of_a_course_seems_to_be_policies_nothing_is_left_out_for_that() -> None:
    course = f"Bees.\n\n## Late policy\n\n{TRUE} They keep records of each visit. They extract honey in summer."
    assert Sieve(course, "en", (), COUNTS).kept("criteria", TRUE, []) == TRUE


def test_the_parts_of_a_sentence_that_lean_on_it_are_no_items() -> None:
    course = "In the end, learners inspect hives, including the queen and her brood, ranging over many months."
    _, badge = written(Sieve(course, "en", (), COUNTS), ["BADGE"], ["BADGE"])
    assert "- Including" not in badge["criteria"]["narrative"]
    assert "- Ranging" not in badge["criteria"]["narrative"]


def test_a_long_sentence_of_the_course_is_better_than_none() -> None:
    long = f"Topics are {', '.join(f'the care of hive number {number} in its winter' for number in range(2, 7))}."
    sieve = Sieve(f"Learners inspect hives. {long} They extract honey.", "en", (), COUNTS)
    _, badge = written(sieve, ["BADGE"], ["BADGE"])
    assert badge["badge_description"] == f"They extract honey. Learners inspect hives. {long}"


def test_a_title_that_is_a_sentence_becomes_what_it_is_about() -> None:
    assert Sieve(COURSE).as_title("This course introduces you to bees in winter, and") == "Bees in winter"
    cut = "Fundamental Principles of the Colonies of Honey Bees in Winter and of the Semicon"
    assert Sieve(COURSE).as_title(cut) == "Fundamental Principles of the Colonies of Honey Bees in Winter"


def test_a_title_has_a_capital_where_a_model_of_ours_wrote_none() -> None:
    assert Sieve(COURSE).as_title("bees in winter") == "Bees in winter"
    assert Sieve(COURSE).as_title("iOS for beekeepers") == "iOS for beekeepers"
    assert Sieve().as_title("bees in winter") == "bees in winter"
    assert Sieve(COURSE + "\nBEES AND SQL").as_title("BEES AND SQL") == "BEES AND SQL"


def test_a_description_may_have_the_sentence_that_is_the_title() -> None:
    course = "Beekeeping: hives, queens, honey. Practical exam in the apiary."
    sieve = Sieve(course, "en", (), {"badge_description": (1, 1), "criteria": (2, 2)}, is_tiny=True)
    draft = dccapi.Draft({"badge_name": "Beekeeping: Hives, Queens, Honey"}, sieve=sieve)
    draft.feed('{"badge_description": ["BADGE"], "criteria": ["BADGE"]}')
    draft.finish(cut=False)
    assert draft.badge
    assert sorted(draft.badge.badge_description.split()) == sorted(course.split())


def test_some_short_words_of_a_course_are_no_title() -> None:
    course = "Λιανικό εμπόριο\n\nΣε αυτά τα μαθήματα μετράτε το απόθεμα ενός καταστήματος με κάμερα και μικροελεγκτή."
    sieve = Sieve(course, "el", is_tiny=True)
    assert sieve.prefers(review.title_of(course), "Αυτά τα")
    assert not sieve.prefers(review.title_of(course), "Απόθεμα ενός καταστήματος")


def test_a_tiny_course_is_said_as_a_whole() -> None:
    course = "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."
    sieve = Sieve(course, "en", (), {"badge_description": (1, 1), "criteria": (2, 2)}, is_tiny=True)
    _, badge = written(sieve, ["This badge will be used by you in your future job."], ["clove hitch", "prusik"])
    assert sorted(badge["badge_description"].split()) == sorted(course.split())


def test_where_nothing_else_is_left_a_poor_text_stays() -> None:
    sieve = Sieve(
        "https://sql.example", "en", (), COUNTS, request="Each tells what the holder knows and can do now", is_tiny=True
    )
    poor = ["Each tells what the holder knows and can do now", "Bakes <br>bread"]
    _, badge = written(sieve, poor, poor)
    assert badge["criteria"]["narrative"] == "- Bakes bread"

"""The badge in a model's text: any thoughts, badge and layout, in any pieces. No connection, no engine."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, strategies as st

import dccapi
from service import parse_badge, partial_badge, pure, texts_of
from test_dialects import BADGE, IDEA, KNOTS, THOUGHTS
from testkit import badge_json

WORDS = (
    "knots", "and", "é", "🧗", "שלום", "\u202eabc\u202c", '"', "\\", "\\n", "{", "}", '{"badge_name":', "```",
    "<think>", "</think>", "[/THINK]", "assistantfinal", "<|channel|>final", "◁/think▷", "json", ",", "- item",
)  # fmt: skip
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(lambda words: "The " + " ".join(words))
paragraphs = st.lists(sentences, min_size=1, max_size=4).map("\n\n".join)
any_badge = st.fixed_dictionaries(
    {
        "badge_name": sentences.map(lambda text: text[:100].strip()),
        "badge_description": paragraphs,
        "criteria": st.fixed_dictionaries({"narrative": paragraphs}),
    }
)
any_thoughts = st.tuples(
    st.sampled_from([*THOUGHTS.values(), "", "Here it is:\n", "```json\n", "\n\n", "JSON: "]),
    st.sampled_from([IDEA, IDEA[:40], "no idea", IDEA + " Or " + IDEA, "{}", '{"a": [{"b": "</th"}]}']),
).map(lambda parts: parts[0].format(parts[1]))


EXTRA: list[list[tuple[str, Any]]] = [
    [], [("tags", ["a", "b"])], [("note", 'a "note"'), ("level", 3)], [("x", {"y": [{}]})],
    [("badge_level", None), ("credits", 5), ("course", "x" * 300)],
]  # fmt: skip


@st.composite
def layouts(draw: Any, badge: dict[str, Any]) -> str:
    """The badge as a model may lay it out: any order, indent, escapes, and what else it writes between its fields."""
    fields = list(badge.items())
    extra = draw(st.sampled_from(EXTRA))
    document = dict(draw(st.permutations([*fields, *extra])))
    text = json.dumps(
        document,
        indent=draw(st.sampled_from([None, 2, "\t"])),
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(", ", ": "), (",", ":")])),
    )
    return str(draw(st.sampled_from(["{}", '{{"badge": {}}}', "{{{}"])).format(text))


sizes = st.lists(st.integers(1, 15), min_size=1, max_size=9)
lists = st.lists(sentences, min_size=1, max_size=4)


def told(text: str, sizes: list[int], kept: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The tokens of a model's text, put together, and the badge; what is told only ever grows."""
    draft, tokens, at, sizes_again = dccapi.Draft(kept or {}), "", 0, itertools.cycle(sizes)
    before: dict[str, str] = {}
    while at < len(text):
        end = at + next(sizes_again)
        tokens += draft.feed(text[at:end])
        now = texts_of(partial_badge(tokens))
        assert all(now.get(name, "").startswith(text) for name, text in before.items()), (before, now)
        before, at = now, end
    tokens += draft.finish(cut=False)
    assert draft.badge
    return tokens, draft.badge.model_dump()


@pure
@given(data=st.data(), badge=any_badge, thoughts=any_thoughts, sizes=sizes)
def test_the_tokens_are_the_badges_json_whatever_stands_around_it(
    data: Any, badge: dict[str, Any], thoughts: str, sizes: list[int]
) -> None:
    after = data.draw(st.sampled_from(["", "\n```", "\nI hope it helps.", "\n\n{}", "<|return|>"]))
    tokens, written = told(thoughts + data.draw(layouts(badge)) + after, sizes)
    assert json.loads(tokens) == written == badge


@pure
@given(badge=any_badge, sizes=sizes, opening=st.sampled_from(["<think>", "[THINK]", "<|channel|>analysis<|message|>"]))
def test_thoughts_that_never_end_hold_no_badge(badge: dict[str, Any], sizes: list[int], opening: str) -> None:
    text = opening + json.dumps(badge).replace("/", "").replace("final", "").replace("channel|>", "")
    with pytest.raises(dccapi.InvalidModelOutput):
        told(text, sizes)


LISTED = {
    "a list of items": ('["{0}", "- {1}", ""]', "- {0}\n- {1}"),
    "an object with a list": ('{{"narrative": [" {0} ", "• {1}"], "id": "x"}}', "- {0}\n- {1}"),
    "a text": ('"{0}\\n{1}"', "{0}\n{1}"),
    "an object": ('{{"id": 3, "narrative": "- {0}"}}', "- {0}"),
}


@pure
@given(
    sizes=sizes, form=st.sampled_from(list(LISTED)), texts=st.sampled_from([("Tied *six*", "-5 °C"), ("**A** b", "é")])
)
def test_lists_become_a_paragraph_and_a_markdown_list(sizes: list[int], form: str, texts: tuple[str, str]) -> None:
    written, narrative = LISTED[form]
    text = (
        f'{{"badge_name": "Knots", "badge_description": ["Ties.", "Checks. "], "criteria": {written.format(*texts)}}}'
    )
    tokens, badge = told(text, sizes)
    assert json.loads(tokens) == badge
    lines = [line.rstrip() for line in badge["criteria"]["narrative"].split("\n")]  # a piece may end with a space
    assert (badge["badge_description"].rstrip(), "\n".join(lines)) == ("Ties. Checks.", narrative.format(*texts))


@pure
@given(badge=any_badge, sizes=sizes, field=st.sampled_from(list(BADGE)), data=st.data())
def test_fields_that_are_kept_come_first_and_as_they_were(
    badge: dict[str, Any], sizes: list[int], field: str, data: Any
) -> None:
    kept = {name: value for name, value in badge.items() if name != field}
    other = BADGE if data.draw(st.booleans()) else {}  # written again, and not asked for
    tokens, written = told(data.draw(layouts({**other, field: badge[field]})), sizes, kept)
    assert json.loads(tokens) == written == badge


def test_an_institution_is_not_taken_for_a_description() -> None:
    for description in ("", "string", "…"):
        draft = dccapi.Draft({}, "Alpine Club")
        draft.feed(badge_json(description=description))
        with pytest.raises(dccapi.InvalidModelOutput):
            draft.finish(cut=False)


SIZE = dccapi.MAX_OUTPUT_CHARS
NASTY = {
    "punctuation, then a word": "x" + "." * (SIZE - 2) + "x",
    "an unknown text": '{"a": "' + "x " * (SIZE // 2),
    "a key without end": '{"' + "x " * (SIZE // 2),
    "an unknown text after the badge": KNOTS[:-1] + ', "a": "' + "x " * (SIZE // 2),
    "brackets": 'x {"a":[' * 64 + "[" * SIZE,
    "objects in each other": 'x {"a":[' * (SIZE // 8),
    "beginnings of objects": 'x {"' * (SIZE // 4),
    "ends of thoughts": '</think>{"a":[' * (SIZE // 14),
    "white space, escaped": '{"badge_name": "a' + "\\n" * (SIZE // 2),
    "items": '{"badge_name": "a", "criteria": [' + '"a",' * (SIZE // 4),
    "a placeholder without end": '{"badge_name": "badge' + "_" * SIZE + '", ',
    "a title of underscores": '{"badge_name": "badge' + "_" * (SIZE - 40) + '5", ',
}


@pytest.mark.parametrize("size", [8, SIZE], ids=["in pieces", "at once"])
@pytest.mark.parametrize("text", NASTY)
def test_no_text_takes_long_to_read(text: str, size: int) -> None:
    started = time.process_time()
    with contextlib.suppress(dccapi.InvalidModelOutput):
        _read(NASTY[text][:SIZE], size)
    assert time.process_time() - started < 2


def _read(text: str, size: int) -> None:
    draft = dccapi.Draft()
    for at in range(0, len(text), size):
        draft.feed(text[at : at + size])
    draft.finish(cut=False)


def test_an_idea_within_many_thoughts_without_a_mark_is_no_badge() -> None:
    thoughts = "So. " + f"{IDEA} or " * 200 + "</think>"
    assert parse_badge(thoughts + badge_json()).model_dump() == BADGE
    with pytest.raises(dccapi.InvalidModelOutput):
        parse_badge(thoughts + badge_json(name="string"))


TORN = {
    "a wrapper that is not closed": '{"badge": ' + KNOTS + "\n```",
    "no last bracket": KNOTS[:-1] + "\nI hope it helps.",
    "nonsense behind the last field": KNOTS[:-1] + ', "tags": ["a", "b"{}\nok {}',
    "broken off, and begun again": KNOTS[:50] + "\x07\n" + KNOTS,
    "a key broken off": '{"badge_na\n' + KNOTS,
    "criteria broken off": KNOTS.replace('"Tied six."', "7") + KNOTS,
    "a field of no use, and begun again": KNOTS.replace("criteria", "credits") + KNOTS,
    "an array": '{"badges": [{"topics": ["a"]}, ' + KNOTS + "]}",
    "a schema before it": '{"type": "object", "properties": {"badge_title": {}}}' + KNOTS,
    "a wrapper that is not closed, and begun again": f'So: {{"badge": {IDEA}{KNOTS}',
    "thoughts behind it": f"Here it is: {KNOTS}\n<think>Good? {{}}</think>",
    "an idea with the words in prose": f'Not {{"badge_name": "</think> {{"}}. {KNOTS}',
}


@pytest.mark.parametrize("text", TORN)
def test_tokens_are_the_json_of_the_badge_that_is_found_in_torn_text(text: str) -> None:
    for size in (1, 3, 4, 7, 1000):
        tokens, badge = told(TORN[text], [size])
        assert json.loads(tokens) == badge == json.loads(KNOTS), size


CUT = {
    "a text": ('"Ties knots. Checks th', "Ties knots. Checks th (Alpine Club)"),
    "a list, whose last sentence is left out": ('["Ties knots.", "Checks th', "Ties knots (Alpine Club)."),
}


@pytest.mark.parametrize("form", CUT)
def test_an_institution_is_added_to_a_description_that_a_token_limit_cut(form: str) -> None:
    written, description = CUT[form]
    kept = {"badge_name": "Knots", "criteria": {"narrative": "- Tied six"}}
    draft = dccapi.Draft(kept, "Alpine Club")
    tokens = draft.feed('{"badge_description": ' + written) + draft.finish(cut=True)
    assert draft.badge
    assert json.loads(tokens)["badge_description"] == draft.badge.badge_description == description


def test_a_field_written_anew_does_not_repeat_the_kept_title() -> None:
    draft = dccapi.Draft({"badge_name": "Knots", "badge_description": "Ties knots."})
    tokens = draft.feed('{"criteria": ["Knots", "Tie six"]}') + draft.finish(cut=False)
    assert json.loads(tokens)["criteria"]["narrative"] == "- Tie six"


def test_a_brace_that_stands_twice_holds_no_token_back() -> None:
    draft = dccapi.Draft()
    told = [draft.feed(piece) for piece in ("{", "{", '"badge_name": "Knots", "badge_description": "Ties')]
    assert "".join(told) == '{"badge_name": "Knots", "badge_description": "Ties'


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_badge_all_of_whose_braces_stand_twice_is_told_as_it_is_written(size: int) -> None:
    written = badge_json().replace("{", "{{").replace("}", "}}")
    for text in (written, f'{{"badge": {written}}}'):
        draft = dccapi.Draft()
        told = "".join(draft.feed(text[at : at + size]) for at in range(0, len(text), size))
        assert json.loads(told + "}") == json.loads(badge_json())


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_white_space_before_the_first_field_loses_no_badge(size: int) -> None:
    draft, written = dccapi.Draft(), badge_json().replace("{", "{" + " " * 150, 1)
    tokens = "".join(draft.feed(written[at : at + size]) for at in range(0, len(written), size))
    assert json.loads(tokens + draft.finish(cut=False)) == json.loads(badge_json())


def test_a_token_limit_behind_braces_that_stand_twice_ends_the_text() -> None:
    assert parse_badge(KNOTS[:-1] + ', "x": {{', cut=True).badge_name == "Knots"
    with pytest.raises(dccapi.InvalidModelOutput):
        parse_badge('{"x": {{', cut=True)


def test_half_a_title_is_none() -> None:
    draft = dccapi.Draft({"badge_description": "Ties knots.", "criteria": {"narrative": "- Ties."}})
    draft.feed('{"badge_name": "Kno')
    with pytest.raises(dccapi.InvalidModelOutput):
        draft.finish(cut=True)


def test_a_token_limit_costs_no_badge_behind_an_object_that_is_none() -> None:
    written = '{"plan": "Knots first"}\n' + badge_json()[:-8]
    assert parse_badge(written, cut=True).badge_name == parse_badge(badge_json()).badge_name


@pytest.mark.parametrize("prose", ["", "Here it is:\n"])
def test_half_a_skill_is_none(prose: str) -> None:
    written = prose + badge_json().removesuffix("}") + ', "skills": ["knots", "clove hit'
    assert parse_badge(written, cut=True)._tags == ("knots",)


def test_an_idea_that_only_the_end_of_the_thoughts_ends_is_no_badge() -> None:
    idea = '{"badge_name": "Idea", "badge_description": "An idea.", "criteria": ["Has one"]'
    assert parse_badge(f"{idea}</think>{badge_json()}") == parse_badge(badge_json())

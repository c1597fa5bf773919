"""The evaluation: tools/evaluate.py against the scripted engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from service import HERE, serving
from testkit import Script, badge_json

sys.path.insert(0, str(HERE / "tools"))

import evaluate

KNOTS = (
    "Knots for climbers. In two evenings you tie the figure eight, the clove hitch and the prusik. "
    "You check the harness of your partner. A practical exam on the wall takes 60 minutes."
)
SAID = (
    "Climbers tie the figure eight and the clove hitch. They check the harness of their partner. "
    "A practical exam on the wall takes 60 minutes."
)
GOOD = badge_json(
    "Knots for Climbers", SAID, "- Tie the figure eight\n- Check the harness of a partner\n- Pass the exam"
)
BAD = badge_json("Cooking", "Los alumnos cocinan durante 99 días con Blender en la cocina de la escuela.", "Nada más.")


@pytest.fixture
def courses(tmp_path: Path) -> Path:
    file = tmp_path / "courses.jsonl"
    lines = [{"id": "knots", "lang": "en", "content": KNOTS}, {"id": "none", "content": ""}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


async def ran(badge: str, *arguments: Any) -> int:
    async with serving(script=Script(pieces=[badge])) as service:
        return await evaluate.main(["--url", service.url, *map(str, arguments)])


async def test_each_course_has_a_row_and_all_have_their_shares(
    courses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await ran(GOOD, "--courses", courses, "--json", tmp_path / "new.json") == 1  # one has no answer
    knots, none = json.loads((tmp_path / "new.json").read_text())["rows"]
    assert (knots["status"], knots["title"], knots["language"]) == (200, "Knots for Climbers", "en")
    assert (knots["sentences"], knots["items"], knots["supported"]) == (3, 3, 6)
    assert knots["right_language"]
    assert knots["support"] > 0.8
    assert knots["tokens"] > 0
    assert (none["status"], none["badge"]) == (422, {})
    found = json.loads((tmp_path / "new.json").read_text())["shares"]
    assert (found["answered"], found["usable"], found["sentences supported"]) == (0.5, 1, 1)
    printed = capsys.readouterr().out
    assert "Knots for Climbers" in printed
    assert "answered" in printed


async def test_what_changed_since_an_earlier_run_is_said(
    courses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    assert await ran(GOOD, "--courses", courses, "--only", "knots", "--json", old) == 0
    capsys.readouterr()
    assert await ran(GOOD, "--courses", courses, "--only", "knots", "--against", old) == 0
    assert "title" not in capsys.readouterr().out.partition("Changed:")[2]
    assert await ran(BAD, "--courses", courses, "--only", "knots", "--against", old) == 0
    changes = capsys.readouterr().out.partition("Changed:")[2]
    assert "knots: title Knots for Climbers -> Knots for climbers" in changes
    assert "right language: 1.0 -> 0.0" in changes
    assert "usable: 1.0 -> 0.0" in changes


def test_sentences_of_criteria_that_are_no_list_count_as_said() -> None:
    badge = json.loads(badge_json("Knots", SAID, "Bakers knead sourdough overnight. Check the harness."))
    row = evaluate.judged({"content": KNOTS}, {"response": badge}, 1)
    assert (row.items, row.said, row.supported) == (0, 5, 4)
    assert evaluate.shares([row])["sentences supported"] == 0.8


async def test_a_service_that_is_not_there_is_a_row_without_an_answer(courses: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    assert await evaluate.main(["--url", url, "--courses", str(courses), "--json", str(tmp_path / "new.json")]) == 1
    rows = json.loads((tmp_path / "new.json").read_text())["rows"]
    assert [row["status"] for row in rows] == [0, 0]
    assert "ConnectError" in rows[0]["error"]


def test_the_review_of_the_answer_is_taken_where_there_is_one() -> None:
    sentence = {"field": "badge_description", "text": "A.", "support": 0.5, "source": ""}
    told = {"language": "xx", "support": 0.5, "sentences": [sentence], "notes": []}
    row = evaluate.judged({"content": KNOTS}, {"response": json.loads(GOOD), "review": told}, 1)
    assert (row.language, row.support, row.sentences) == ("xx", 0.5, 1)
    assert evaluate.judged({"content": KNOTS}, {"response": json.loads(GOOD)}, 1).language == "en"

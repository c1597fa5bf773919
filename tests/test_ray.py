"""examples/ray_catalogue.py: a prepared catalogue through two llama.cpp servers with Ray Data, in its own environment.

Skipped where Ray cannot be installed, never when CI=true.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import catalogue
from service import COURSES, HERE, MODEL, needs_model, runs
from testkit import eventually

pytestmark = pytest.mark.slow

RAY = "ray[data]>=2.60,<3"
EXAMPLE = HERE / "examples" / "ray_catalogue.py"
KEY = "s3cret"
COUNT = 6
# Without them, SmolLM2-135M writes until it is cut; the embedded engine has such bounds too.
SHORT = {"badge_name": {"pattern": "^[A-Z][a-z ]{3,30}$"}, "badge_description": 40, "criteria": 40}


@pytest.fixture(scope="module")
def python_with_ray() -> Path:
    """The Python of an environment that is made once beside ours: Ray is no part of what the tests need elsewhere."""
    home = Path(sys.prefix) / "ray"
    python = home / "bin" / "python"
    commands = [[sys.executable, "-m", "venv", home], [python, "-m", "pip", "install", "--quiet", RAY]]
    if not (home / "complete").exists():
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if result.returncode and not os.environ.get("CI"):
                pytest.skip(f"needs {RAY}, which cannot be installed here")
            assert not result.returncode, result.stderr
        (home / "complete").touch()
    return python


@contextlib.asynccontextmanager
async def llama_server() -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """The child of the embedded engine, on its own."""
    options = ["engine", str(MODEL), "2048", "2", "small"]
    pipe, env = asyncio.subprocess.PIPE, os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # two share the cores
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "dccapi.py"), *options),
        stdin=pipe,
        stdout=pipe,
        stderr=asyncio.subprocess.DEVNULL,
        env=env,
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(f"{KEY}\n".encode())
        async with asyncio.timeout(60):
            address = (await process.stdout.readline()).decode().strip()
        yield f"{address}/v1", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def prepared(directory: Path) -> Path:
    """Requests of short courses for short badges."""
    courses, requests = directory / "courses.jsonl", directory / "requests.jsonl"
    texts = [COURSES[number % len(COURSES)]["content"][:200] for number in range(COUNT)]
    rows = [json.dumps({"id": f"C-{number}", "content": text}) for number, text in enumerate(texts)]
    courses.write_text("\n".join(rows))
    options = ["--set", "max_tokens=250", "--set", "skills=false", "--set", "seed=1"]
    assert catalogue.main(["prepare", str(courses), str(requests), "--model", "small", *options]) == 0
    lines = [json.loads(line) for line in requests.read_text("utf-8").splitlines()]
    for line in lines:
        bound(line["body"]["response_format"]["json_schema"]["schema"]["properties"])
    requests.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    return requests


def bound(properties: dict[str, Any]) -> None:
    properties["badge_name"] |= SHORT["badge_name"]
    for name in ("badge_description", "criteria"):
        properties[name]["items"] |= {"maxLength": SHORT[name]}


@needs_model
@pytest.mark.timeout(600)
async def test_a_catalogue_is_complete_though_a_server_and_ray_itself_are_killed_on_the_way(
    tmp_path: Path, python_with_ray: Path
) -> None:
    requests, outputs, drafts = prepared(tmp_path), tmp_path / "outputs.jsonl", tmp_path / "drafts.jsonl"
    files = tmp_path / "outputs.jsonl.parts" / "files"

    def answered() -> int:
        return len(list(files.glob("*.jsonl")))

    @contextlib.asynccontextmanager
    async def ray() -> AsyncIterator[asyncio.subprocess.Process]:
        command = [python_with_ray, EXAMPLE, requests, outputs, *servers]
        env = os.environ | {"OPENAI_API_KEY": KEY, "HOME": str(tmp_path), "PYTHONWARNINGS": ""}
        with (tmp_path / "ray.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(*command, env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async with llama_server() as (one, mortal), llama_server() as (two, _):
        servers = ["--server", one, "--server", two]
        async with ray() as process:
            await eventually(lambda: answered() >= 1, 120, "the first output")
            mortal.kill()
            before = answered()
            await eventually(lambda: answered() > before, 120, "an output without the server")
            process.kill()
            assert await process.wait() < 0
        assert before < answered() < COUNT
        async with ray() as process:
            async with asyncio.timeout(240):
                assert await process.wait() == 0, (tmp_path / "ray.log").read_text()
    assert not runs(mortal.pid)
    lines = [json.loads(line) for line in outputs.read_text("utf-8").splitlines()]
    assert sorted(line["custom_id"] for line in lines) == [f"C-{number}" for number in range(COUNT)]
    assert catalogue.main(["collect", str(requests), str(outputs), str(drafts)]) == 0
    found = [json.loads(line) for line in drafts.read_text("utf-8").splitlines()]
    assert {draft["id"]: draft["status"] for draft in found} == {f"C-{number}": "done" for number in range(COUNT)}


def test_the_example_says_what_is_installed_here() -> None:
    assert f"pip install '{RAY}'" in EXAMPLE.read_text("utf-8")

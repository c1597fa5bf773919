"""Clients that generators make of examples/openapi.json, in Python and in TypeScript, against the service.

What generates and runs them is installed once, into pytest's cache. Skipped where it cannot be fetched or Node is
missing, never when CI=true.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dccapi
from service import serving
from test_examples import BADGE, CI, EXAMPLES, TEXT, Run, ended, needs, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PYTHON = "openapi-python-client==0.29.1"
NODE = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3"]
COMPLAINT = re.compile("warn|skip|unsupported|unable|cannot|not found", re.IGNORECASE)

# Reads the key, and writes what the service said as JSON. Both scripts do the same.
IN_PYTHON = """
import io, json, sys
from dccapi_client import AuthenticatedClient, Client
from dccapi_client.api.badges import post_credentials, post_extract, post_generate, post_generate_stream
from dccapi_client.api.state import get_health
from dccapi_client.models import (
    Answer, BadgeLevel, CredentialRequest, Extracted, GenerateRequest, Health, OpenBadgeCredential, PostedBadge,
    Problem, ProfileTerms, UploadedDocument,
)
from dccapi_client.types import File

url, content = sys.argv[1:]
client = AuthenticatedClient(url, token="s3cret", raise_on_unexpected_status=True)
health = get_health.sync(client=client)
assert isinstance(health, Health)
answer = post_generate.sync(
    client=client, body=GenerateRequest(content, badge_level=BadgeLevel.EXPERT, temperature=0.5, seed=7)
)
assert isinstance(answer, Answer)
problem = post_generate.sync(client=client, body=GenerateRequest(content, temperature=9))
assert isinstance(problem, Problem)
stranger = post_generate.sync(client=Client(url, raise_on_unexpected_status=True), body=GenerateRequest(content))
assert isinstance(stranger, Problem)
events = post_generate_stream.sync(client=client, body=GenerateRequest(content), partial=True)
assert isinstance(events, str)
badge = PostedBadge.from_dict(answer.response.to_dict())
issuer = ProfileTerms(id="https://example.edu", name="Example University")
credential = post_credentials.sync(client=client, body=CredentialRequest(issuer, badge=badge))
assert isinstance(credential, OpenBadgeCredential)
document = File(io.BytesIO(content.encode()), "course.txt", "text/plain")
extracted = post_extract.sync(client=client, body=UploadedDocument(document))
assert isinstance(extracted, Extracted)
assert extracted.content == content
print(json.dumps({
    "health": [health.status.value, health.target_model],
    "badge": answer.response.badge_name,
    "achievement": [answer.achievement.name, answer.achievement.criteria.narrative],
    "support": [sentence.support for sentence in answer.review.sentences],
    "problem": [problem.status, problem.error_code, problem.errors[0].loc],
    "stranger": [stranger.status, stranger.error_code, stranger.errors or None],
    "last": json.loads(events.strip().split("data: ")[-1])["type"],
    "credential": [credential.issuer.name, credential.credential_subject.achievement.name],
}))
"""
IN_TYPESCRIPT = """
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.mjs";

declare const process: { argv: string[] };
const [url, content] = process.argv.slice(2) as [string, string];
const client = createClient<paths>({ baseUrl: url, headers: { "X-API-Key": "s3cret" } });

const { data: health } = await client.GET("/health");
const { data: answer } = await client.POST("/generate", {
  body: { content, badge_level: "Expert", temperature: 0.5, seed: 7 },
});
const { error: problem } = await client.POST("/generate", { body: { content, temperature: 9 } });
const { error: stranger } = await createClient<paths>({ baseUrl: url }).POST("/generate", { body: { content } });
const { data: events } = await client.POST("/generate/stream", {
  params: { query: { partial: true } }, body: { content }, parseAs: "text",
});
if (!health || !answer || typeof answer === "string" || !("response" in answer)) throw new Error("no badge");
if (!problem || !stranger || !events) throw new Error("no problem");
const { data: credential } = await client.POST("/credentials", {
  body: { badge: answer.response, issuer: { id: "https://example.edu", name: "Example University" } },
});
if (!credential || typeof credential.issuer === "string") throw new Error("no issuer");

// @ts-expect-error: a choice that there is not
const wrong: components["schemas"]["GenerateRequest"] = { content, badge_level: "Novice" };
// @ts-expect-error: the course is missing
const missing: components["schemas"]["GenerateRequest"] = { seed: 7 };
// @ts-expect-error: it is a text
const number: number = answer.response.badge_name;

console.log(JSON.stringify({
  health: [health.status, health.target_model],
  badge: answer.response.badge_name,
  achievement: [answer.achievement.name, answer.achievement.criteria.narrative],
  support: answer.review?.sentences.map((sentence) => sentence.support),
  problem: [problem.status, problem.error_code, problem.errors?.[0].loc],
  stranger: [stranger.status, stranger.error_code, stranger.errors ?? null],
  last: JSON.parse(events.trim().split("data: ").at(-1)!).type,
  credential: [credential.issuer.name, credential.credentialSubject.achievement.name],
}));
"""


def run(*command: str | Path, directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=directory, env=os.environ | env, timeout=240, **output)


def install(directory: Path, packages: list[str], *command: str | Path) -> None:
    """Once, until other packages are wanted."""
    installed = directory / "installed"
    if installed.exists() and installed.read_text() == " ".join(packages):
        return
    shutil.rmtree(directory)
    directory.mkdir()
    done = run(*command, *packages, directory=directory)
    if done.returncode and not CI:
        pytest.skip(f"needs {', '.join(packages)}, which cannot be installed here")
    assert done.returncode == 0, done.stdout
    installed.write_text(" ".join(packages))


def install_python(directory: Path, *packages: str) -> None:
    """Importable from `directory`, with all that they need: `python -S` sees nothing else."""
    install(directory, [*packages], sys.executable, "-m", "pip", "install", "--quiet", "--target", directory)


def generate(*command: str | Path, directory: Path, **env: str) -> None:
    """Run a generator that has nothing to complain of."""
    done = run(*command, directory=directory, **env)
    assert done.returncode == 0, done.stdout
    assert not COMPLAINT.search(done.stdout), done.stdout


@pytest.fixture(scope="module")
def packages(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.config.cache.mkdir("openapi-python-client")
    install_python(directory, PYTHON)
    return directory


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.config.cache.mkdir("openapi-typescript")
    options = ["--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
    install(directory, NODE, "npm", "install", *options, "--prefix", directory)
    return directory


async def check(*command: str | Path, **env: str) -> None:
    """What the script said is what the service answers."""
    async with serving(api_keys="lms:s3cret") as service:
        done: Run = await ended(await start(*command, f"{service.url}/api/v1", TEXT, **env))
        assert (done.code, done.err) == (0, ""), done
        request = service.engine.calls[0].body
    assert "Level: Expert" in request["prompt"]
    assert (request["options"]["temperature"], request["options"]["seed"]) == (0.5, 7)
    said: dict[str, Any] = json.loads(done.out)
    assert all(0 <= support <= 1 for support in said.pop("support"))
    assert said == {
        "health": ["healthy", "phi4badges"],
        "badge": BADGE["badge_name"],
        "achievement": [BADGE["badge_name"], BADGE["criteria"]["narrative"]],
        "problem": [422, "invalid_request", ["temperature"]],
        "stranger": [401, "unauthorized", None],
        "last": "final",
        "credential": ["Example University", BADGE["badge_name"]],
    }


async def test_a_python_client_made_of_the_openapi_document_writes_a_badge(tmp_path: Path, packages: Path) -> None:
    env = {"PYTHONPATH": str(packages), "PATH": f"{packages / 'bin'}:{os.environ['PATH']}"}  # it calls ruff
    options = ["--path", dccapi.OPENAPI, "--output-path", "made", "--fail-on-warning"]
    generate(sys.executable, "-S", "-m", "openapi_python_client", "generate", *options, directory=tmp_path, **env)
    operations = [one for item in json.loads(dccapi.OPENAPI.read_text("utf-8"))["paths"].values() for one in item]
    modules = [path for path in (tmp_path / "made").glob("dccapi_client/api/*/*.py") if path.name != "__init__.py"]
    assert len(modules) == len(operations)
    await check(sys.executable, "-S", "-c", IN_PYTHON, PYTHONPATH=f"{packages}:{tmp_path / 'made'}")


@needs("node", "npm")
async def test_a_typescript_client_made_of_the_openapi_document_writes_a_badge(tmp_path: Path, node: Path) -> None:
    (tmp_path / "node_modules").symlink_to(node / "node_modules")
    (tmp_path / "badge.mts").write_text(IN_TYPESCRIPT)
    made = ["node_modules/openapi-typescript/bin/cli.js", dccapi.OPENAPI, "--output", "schema.mts"]
    generate("node", *made, directory=tmp_path)
    strictly = [
        "--strict",
        "--skipLibCheck",
        "--module",
        "nodenext",
        "--target",
        "es2022",
    ]
    generate("node", "node_modules/typescript/bin/tsc", *strictly, "badge.mts", directory=tmp_path)
    await check("node", tmp_path / "badge.mjs")


async def test_the_client_runs_with_what_its_first_lines_say_to_install(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    client = EXAMPLES / "client.py"
    said = re.search(r"^    pip install '(.+)'$", client.read_text("utf-8"), re.MULTILINE)
    assert said
    install_python(directory := request.config.cache.mkdir("client"), said[1])
    (course := tmp_path / "course.txt").write_text(TEXT)
    async with serving() as service:
        command = [sys.executable, "-S", client, "--url", service.url, "--drafts", "1", course]
        done = await ended(await start(*command, PYTHONPATH=str(directory)))
    assert (done.code, [badge["badge"] for badge in done.badges]) == (0, [BADGE]), done

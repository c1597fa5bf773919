"""Running the service: start and stop, headers and pages, OpenAPI, metrics, the log."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator

import dccapi
from service import (
    COMMANDS,
    COURSE,
    HERE,
    MARKER,
    PYTHONS,
    SLOW,
    Service,
    ask,
    certificate,
    client,
    commands,
    events_of,
    fails,
    logging_into,
    problem_in,
    serving,
    token,
)
from testkit import H2Client, Script, ScriptedOllama, Server, badge_json, badge_pieces, eventually, free_port
from tools import openapi

# --- Start and stop ---


async def test_the_process_ends_with_a_message_for_an_unknown_key_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "hypercorn.toml").write_text("keep_alive_timeout = 120\nkeep_alive_timout = 120\n")
    config = ["--config", str(tmp_path / "hypercorn.toml")]
    async with Server(COMMANDS["hypercorn"](free_port(), config), {}, None, HERE) as server:
        await server.wait()
    assert "keep_alive_timout" in server.tail()


def test_another_hypercorn_than_the_tested_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dccapi, "version", lambda package: "0.19.0")
    with pytest.raises(SystemExit, match=r"needs Hypercorn 0\.18\.0.* not 0\.19\.0"):
        dccapi.mend_hypercorn()


def test_a_worker_class_that_goes_past_our_listener_is_refused() -> None:
    config = dccapi.Config()
    config.worker_class = "uvloop"
    with pytest.raises(SystemExit, match="of the class asyncio"):
        dccapi.set_up(config, dccapi.create_app(dccapi.Settings()))


@pytest.mark.parametrize(("target", "tests_too"), [("run", False), ("demo", False), ("test", True)])
def test_only_the_tests_install_test_tools(target: str, tests_too: bool, tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "requirements-dev.lock"):
        shutil.copy(HERE / name, tmp_path)
    would_do = subprocess.check_output(["make", "--dry-run", target], cwd=tmp_path, text=True)
    assert "-r requirements.lock" in would_do
    assert ("-r requirements-dev.lock" in would_do) == tests_too


def test_a_certificate_is_made_once_and_never_over_a_persons_own(tmp_path: Path) -> None:
    def make() -> subprocess.CompletedProcess[str]:
        command = [HERE / "tools" / "certs.sh", sys.executable, tmp_path / "certs"]
        return subprocess.run(command, capture_output=True, text=True)

    certificate, key = tmp_path / "certs" / "cert.pem", tmp_path / "certs" / "key.pem"
    assert make().returncode == 0
    assert sorted((tmp_path / "certs").iterdir()) == [certificate, key]
    ssl.create_default_context().load_cert_chain(certificate, key)
    assert key.stat().st_mode & 0o777 == 0o600
    made = certificate.read_bytes(), key.read_bytes()
    assert make().returncode == 0
    assert (certificate.read_bytes(), key.read_bytes()) == made
    key.unlink()
    refused = make()
    assert refused.returncode == 1
    assert "holds only one of cert.pem and key.pem" in refused.stderr
    assert list((tmp_path / "certs").iterdir()) == [certificate]
    assert certificate.read_bytes() == made[0]


async def test_a_port_that_is_taken_is_named_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "dccapi.py", "--bind", bind, "--certs", "absent"),
            cwd=HERE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
    assert process.returncode == 1
    assert re.match(rf"dccapi: cannot serve on {bind}: .*Address already in use\..*--bind", said.decode())
    assert said.count(b"\n") == 1


async def test_a_certificate_that_is_none_is_told_in_one_sentence(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("Knots")
    command = ["dccapi.py", "--bind", f"127.0.0.1:{free_port()}", "--certs", str(tmp_path)]
    async with Server(command, {}, None, HERE) as server:
        assert await server.wait() == 1
    assert len(server.log) == 1
    assert re.match(r"dccapi: cannot serve on .*PEM.* --certs", server.log[0])


@pytest.mark.parametrize(
    ("bind", "keys", "warnings"), [("0.0.0.0", "", 1), ("127.0.0.1", "", 0), ("0.0.0.0", "lms:s3cret", 0)]
)
async def test_a_start_on_a_public_address_without_keys_is_warned_about_once(
    bind: str, keys: str, warnings: int
) -> None:
    port = free_port()
    command = ["dccapi.py", "--bind", f"{bind}:{port}", "--certs", "absent"]
    async with Server(command, {"API_KEYS": keys}, f"http://127.0.0.1:{port}/livez", HERE) as server:
        assert await server.terminate() == 0
    assert len([line for line in server.log if "WARNING" in line and "API_KEYS" in line]) == warnings


@pytest.mark.parametrize(
    ("address", "public"),
    [("http://[::]:8001", True), ("http://:8001", True), ("http://[::1]:8001", False), ("http://localhost:8001", False),
     ("https://badges.example.edu:8443", True), ("http://unix:/run/dccapi.sock", False), ("http://fd://3", False)],
)  # fmt: skip
def test_a_public_address_is_told_from_this_machines(address: str, public: bool) -> None:
    assert (re.fullmatch(dccapi.LOCAL_ADDRESS, address) is None) is public


def test_a_service_that_is_signalled_while_it_starts_stops_with_exit_code_0() -> None:
    signalled = "dccapi.Engine.start = lambda engine: os.kill(os.getpid(), signal.SIGTERM) or start(engine)"
    code = f"import dccapi, os, signal\nstart = dccapi.Engine.start\n{signalled}\ndccapi.main()"
    run = [sys.executable, "-c", code, "--bind", f"127.0.0.1:{free_port()}", "--certs", "absent"]
    assert subprocess.run(run, cwd=HERE, timeout=20, check=False).returncode == 0


@pytest.mark.slow
async def test_a_worker_process_that_is_signalled_itself_drains_too() -> None:
    port = free_port()
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: Script(delay=0.01)
        async with (
            Server(
                commands(port)["hypercorn dccapi:app"],
                {"OLLAMA_URL": ollama.url},
                f"http://127.0.0.1:{port}/livez",
                cwd=HERE,
            ) as server,
            await H2Client.connect("127.0.0.1", port) as connection,
        ):
            running = await connection.request("POST", "/generate/stream", body=COURSE)
            await token(connection, running)
            os.killpg(server.pid, signal.SIGTERM)
            assert (await events_of(connection, running))[-1]["data"]["type"] == "final"
            assert await server.wait(10) == 0


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
async def test_a_client_that_never_answers_cannot_hold_a_stop_up(python: str) -> None:
    certificate()
    port, cleartext = free_port(), free_port()
    binds = ["--bind", f"127.0.0.1:{cleartext}", "--tls-bind", f"127.0.0.1:{port}"]
    async with (
        ScriptedOllama() as ollama,
        Server(
            ["dccapi.py", *binds], {"OLLAMA_URL": ollama.url}, f"http://127.0.0.1:{cleartext}/livez", HERE, python
        ) as server,
    ):
        frozen = await H2Client.connect("127.0.0.1", port, ssl=True)
        await frozen.response(await frozen.request("GET", "/livez"))
        frozen._reading.cancel()
        frozen._writer.transport.pause_reading()  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", port)):  # and one that never begins its handshake
            assert await server.terminate(8) == 0
        await frozen.abort()
        assert "Traceback" not in "\n".join(server.log)


@pytest.mark.parametrize("python", PYTHONS)
async def test_a_connection_whose_last_stream_was_reset_cannot_hold_a_stop_up(python: str) -> None:
    port = free_port()
    async with ScriptedOllama() as engine:
        engine.script = lambda body, index: SLOW
        command = commands(port)["hypercorn --config"]
        async with Server(
            command, {"OLLAMA_URL": engine.url}, f"http://127.0.0.1:{port}/livez", HERE, python=python
        ) as server:
            connection = await H2Client.connect("127.0.0.1", port)
            stream = await connection.request("POST", "/generate/stream", body=COURSE)
            await connection.headers(stream)
            (call,) = await engine.wait_for_calls(1)
            connection.reset(stream)
            await call.closed_by_client.wait()
            assert await server.terminate(timeout=8) == 0
            assert "Traceback" not in "\n".join(server.log)
            await connection.abort()


async def test_a_python_that_drops_docstrings_keeps_the_sentences_of_the_errors() -> None:
    port = free_port()
    command = ["-OO", "dccapi.py", "--bind", f"127.0.0.1:{port}", "--certs", "absent"]
    env = {"OLLAMA_URL": "http://127.0.0.1:9"}
    async with (
        Server(command, env, f"http://127.0.0.1:{port}/livez", HERE),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        for answer, error in (
            (await http.get("/nothing"), dccapi.NotFound),
            (await http.get("/generate"), dccapi.MethodNotAllowed),
            (await http.post("/generate", content=b"{"), dccapi.InvalidJson),
            (await http.post("/generate", json=COURSE), dccapi.EngineUnreachable),
        ):
            assert answer.status_code == error.status
            assert answer.json()["detail"].startswith(error.text)


def test_the_version_is_the_same_wherever_it_stands() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert "build-system" not in project  # no package, so nothing else has a version
    label = f'org.opencontainers.image.version="{dccapi.__version__}"'
    assert label in (HERE / "Containerfile").read_text("utf-8")
    released = re.findall(r"(?m)^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (HERE / "CHANGELOG.md").read_text("utf-8"))
    assert released[0] == dccapi.__version__


# --- Messages ---


async def test_a_422_tells_every_fault_in_words_for_people() -> None:
    fields = {
        "content": 5, "temperature": 9, "top_p": "x", "top_k": 1.5, "seed": "x", "badge_level": "Wizard",
        "badge_configuration": 5, "institution": "x" * 400, "language": "x y", "institute_url": "x", "stream": "maybe",
    }  # fmt: skip
    async with serving() as service, client(service) as http:
        answer = (await http.post("/generate", json=fields)).json()
    told = {fault["loc"][-1]: fault["msg"] for fault in answer["errors"]}
    assert told == {
        "content": "must be a valid string",
        "temperature": "must be less than or equal to 2",
        "top_p": "must be a valid number",
        "top_k": "must be a whole number",
        "seed": "must be a whole number",
        "badge_level": "must be Beginner, Intermediate, Advanced or Expert",
        "badge_configuration": "must be a JSON object",
        "institution": "must have at most 300 characters",
        "language": "must be a language tag, for example en or pt-BR",
        "institute_url": "must be the address of the institution, for example https://example.edu",
        "stream": "must be true or false",
    }
    assert all(f"{field} {words}" in answer["detail"] for field, words in told.items())


async def test_a_422_looks_at_no_more_unknown_fields_than_the_header_names() -> None:
    """Each is compared with all that are known: ten thousands of them held all requests up for most of a second."""
    async with serving() as service:
        answer = await ask(service, {f"badge_styl{number}": 1 for number in range(10_000)})
    assert answer.status == 422
    assert answer.json()["detail"].count("badge_style is") == 20
    assert answer.headers["x-ignored-fields"].count("badge_styl") == 20


# --- Headers and pages ---


async def test_responses_carry_security_headers() -> None:
    async with serving() as service, client(service) as http:
        for path in ("/livez", "/nothing", "/"):
            headers = (await http.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert headers["referrer-policy"] == "no-referrer"


async def test_json_that_curl_sends_as_a_form_is_taken_and_json_of_other_types_is_not() -> None:
    async with serving() as service:
        body = json.dumps(COURSE).encode()
        headers = [("content-type", "application/x-www-form-urlencoded")]  # as `curl -d` says
        assert (await ask(service, body, headers=headers)).status == 200
        problem_in(await ask(service, body[:-1], headers=headers), 415, "unsupported_media_type")
        xml = [("content-type", "application/xml")]
        problem_in(await ask(service, body, headers=xml), 415, "unsupported_media_type")


# --- OpenAPI ---


def test_the_committed_openapi_document_is_what_the_tool_makes() -> None:
    assert dccapi.OPENAPI.read_text("utf-8") == openapi.text(), "`make openapi` writes it anew"


async def test_openapi_has_an_example_for_every_body_answer_and_error() -> None:
    document = openapi.document()
    validators = {
        name: Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})
        for name in document["components"]["schemas"]
    }
    problems = [one["content"]["application/problem+json"] for one in document["components"]["responses"].values()]
    codes = {sample["value"]["error_code"] for problem in problems for sample in problem["examples"].values()}
    assert codes == {kind.code for kind in dccapi.ApiError.__subclasses__()}
    for item in document["paths"].values():
        for operation in item.values():
            for one in [*operation["responses"].values(), operation.get("requestBody", {})]:
                if "$ref" in one:
                    one = document["components"]["responses"][one["$ref"].rpartition("/")[2]]
                for media_type, media in one.get("content", {}).items():
                    assert media["examples"], operation["summary"]
                    for sample in media["examples"].values():
                        if media_type.endswith("json"):
                            validators[media["schema"]["$ref"].rpartition("/")[2]].validate(sample["value"])


async def test_openapi_describes_the_events_that_are_sent() -> None:
    document = openapi.document()
    schema = document["components"]["schemas"]["Event"]["properties"]["data"]["contentSchema"]
    validator = Draft202012Validator({**schema, "components": document["components"]})
    async with serving(max_concurrent_requests=1) as service, await service.connect() as connection:
        kinds = set()
        for options, script in (("?partial=true", Script()), ("?accumulated=false", Script(drop_after=9))):
            service.engine.script = lambda body, index, script=script: script
            stream = await connection.request("POST", f"/generate/stream{options}", body=COURSE)
            for event in await events_of(connection, stream):
                if "data" in event:
                    validator.validate(event["data"])
                    kinds.add(event["data"]["type"])
    assert kinds == {"queue", "token", "partial", "final", "error"}
    assert not validator.is_valid({"type": "token", "content": "a"})


async def test_openapis_operations_are_well_formed() -> None:
    async with serving() as service:
        document = (await ask(service, None, "/openapi.json", "GET")).json()

    def nodes(node: Any) -> Any:
        yield node
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from nodes(inner)

    for reference in [node["$ref"] for node in nodes(document) if isinstance(node, dict) and "$ref" in node]:
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            operation = item[method]
            parameters = operation.get("parameters", []) + item.get("parameters", [])
            assert len({(one["name"], one["in"]) for one in parameters}) == len(parameters)
            assert all("schema" in one and (one["in"] != "path" or one["required"] is True) for one in parameters)
            assert {one["name"] for one in parameters if one["in"] == "path"} == set(re.findall(r"{(\w+)}", path))
            assert all(re.fullmatch(r"[1-5]\d\d|default", status) for status in operation["responses"])
            responses = [document["components"]["responses"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one
                         for one in operation["responses"].values()]  # fmt: skip
            assert all(one["description"] for one in responses)
            for one in [*responses, operation.get("requestBody", {})]:
                assert all("schema" in media or media == {} for media in one.get("content", {}).values())
    writing = document["paths"]["/generate"]["post"]["responses"].keys()
    assert writing >= {"200", "400", "401", "408", "409", "413", "415", "422", "429", "502", "503", "504"}


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_openapi_document_is_true(tmp_path: Path) -> None:
    """All phases, all checks but one: DELETE cancels a generation, whose state stays to be seen (use_after_free)."""
    port = free_port()
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: Script(pieces=[badge_json()])  # one token, so that any max_tokens will do
        env = {"OLLAMA_URL": ollama.url, "MAX_PER_CLIENT": "1000", "BODY_TIMEOUT": "2"}
        async with Server(commands(port)["python dccapi.py"], env, f"http://127.0.0.1:{port}/livez", HERE) as server:
            url = f"http://127.0.0.1:{port}"
            # That one date is after another is nothing that a schema can say.
            (tmp_path / "schemathesis.toml").write_text(
                '[[operations]]\ninclude-path = "/credentials"\n'
                '[operations.checks.positive_data_acceptance]\nexpected-statuses = ["2xx", "413", "422"]\n'
                # Bytes may be a document of any kind, or none.
                '[[operations]]\ninclude-path = "/extract"\n'
                '[operations.checks.positive_data_acceptance]\nexpected-statuses = ["2xx", "413", "415", "422"]\n'
                # What is refused before it is read has another status than what is not valid.
                '[checks.negative_data_rejection]\nexpected-statuses = ["4xx"]\n'
            )
            schemathesis = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).with_name("schemathesis")),
                *("run", f"{url}/openapi.json", "--url", f"{url}/api/v1", "--max-examples", "5", "--seed", "1"),
                *("--checks", "all", "--exclude-checks", "use_after_free", "--warnings", "off"),
                cwd=tmp_path,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await schemathesis.communicate()
            assert schemathesis.returncode == 0, output.decode()[-6000:]
            assert "Traceback" not in "\n".join(server.log)


# --- Metrics ---


async def samples(service: Service, **headers: str) -> dict[str, float]:
    """What Prometheus would read, by the text before the value."""
    response = await ask(service, None, "/metrics", "GET", list(headers.items()))
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = [line.rpartition(" ") for line in response.body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


GENAI = 'gen_ai_operation_name="generate_content",gen_ai_provider_name="ollama",gen_ai_request_model="phi4badges"'


async def test_the_metrics_tell_what_ran_what_waits_and_what_was_refused() -> None:
    async with serving(api_keys="lms:s3cret,cms:0ther", max_concurrent_requests=1, max_queue=1) as service:
        key = {"x-api-key": "s3cret"}
        assert (await ask(service, headers=list(key.items()))).status == 200
        assert (await ask(service, headers=[("x-api-key", "0ther")])).status == 200
        before = await samples(service, **key)
        service.engine.script = lambda body, index: SLOW
        async with await service.connect() as connection:
            for _ in range(2):
                await connection.request("POST", "/generate", list(key.items()), COURSE)
            await eventually(lambda: len(service.queue.waiting) == 1)
            problem_in(await ask(service, headers=list(key.items())), 503, "queue_full")
            await ask(service)
            during = await samples(service, **key)
        await service.idle()
        after = await samples(service, **key)
    assert before['dccapi_generations_total{key="lms",outcome="succeeded"}'] == 1
    assert before['dccapi_generations_total{key="cms",outcome="succeeded"}'] == 1
    for name, count in (
        (f'gen_ai_server_request_duration_seconds_count{{error_type="",{GENAI}}}', 2),
        (f"gen_ai_server_time_to_first_token_seconds_count{{{GENAI}}}", 2),
        (f"gen_ai_server_time_per_output_token_seconds_count{{{GENAI}}}", 2),
        (f'gen_ai_client_token_usage_sum{{{GENAI},gen_ai_token_type="output"}}', 2 * len(badge_pieces())),
        (f"dccapi_queue_wait_seconds_count{{{GENAI}}}", 2),
        (f'gen_ai_server_request_duration_seconds_bucket{{error_type="",{GENAI},le="600.0"}}', 2),
        ("dccapi_engine_up", 1),
    ):
        assert before[name] == count, name
    assert (during["dccapi_active_generations"], during["dccapi_queue_depth"]) == (1, 1)
    assert during['dccapi_rejections_total{reason="queue_full"}'] == 1
    assert during['dccapi_rejections_total{reason="unauthorized"}'] == 1
    assert (after["dccapi_active_generations"], after["dccapi_queue_depth"]) == (0, 0)
    assert after['dccapi_generations_total{key="lms",outcome="cancelled"}'] == 2
    assert not [name for name in after if "s3cret" in name or "0ther" in name]


async def test_the_metrics_count_a_failed_generation_once_and_no_probe() -> None:
    async with serving(script=Script(drop_after=3)) as service:
        await fails(service, 502, "engine_error")
        after = await samples(service)
        assert after['dccapi_generations_total{key="",outcome="engine_error"}'] == 2
        assert after[f'gen_ai_server_request_duration_seconds_count{{error_type="engine_error",{GENAI}}}'] == 2
        assert not [name for name in after if name.startswith("dccapi_rejections_total{")]
        service.engine.models = []
        problem_in(await ask(service, None, "/readyz", "GET"), 503, "model_missing")
        after = await samples(service)
        assert after["dccapi_engine_up"] == 0
        assert not [name for name in after if name.startswith("dccapi_rejections_total{")]


# --- Log ---


async def test_debug_lines_never_hold_what_was_put_into_an_address() -> None:
    lines: list[str] = []
    with logging_into(lines):
        async with serving(log_level="DEBUG", api_keys="lms:s3cret") as service:
            headers = [("x-api-key", "s3cret")]
            id = (await ask(service, headers=[*headers, ("prefer", "respond-async")])).json()["id"]
            await ask(service, None, f"/generations/{id}/events?key=s3cret", "GET")
            await ask(service, None, f"/generate/stream?content={MARKER}&key=s3cret", "GET")
            await ask(service, None, "/generate/s3cret", "GET", headers)
    said = "\n".join(line for line in lines if json.loads(line)["logger"] == "dccapi")
    assert not [word for word in (MARKER, "s3cret", id) if word in said]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(pieces=[f"{MARKER} is no badge."]), "invalid_model_output"),
        (Script(drop_after=4), "engine_error"),
        (Script(raw_chunks=[f'{{"response": "{MARKER}'.encode()]), "engine_error"),
        (Script(pieces=[f"{MARKER} " * 40] * 4000), "invalid_model_output"),
        (Script(status=400, error=f"[{{'loc': ['body', 'prompt'], 'input': 'Bake {MARKER}.'}}]"), "engine_error"),
        (Script(error_line=f"failed to parse: Bake {MARKER}."), "engine_error"),
    ],
    ids=[
        "no badge",
        "a drop",
        "half a line",
        "too much",
        "a refusal that repeats the prompt",
        "an error that repeats it",
    ],
)
async def test_a_failed_generation_has_its_line_too_and_never_any_content(script: Script, reason: str) -> None:
    lines: list[str] = []
    with logging_into(lines):
        async with serving(script=script, log_level="DEBUG") as service:
            response = await ask(service, {"content": f"Bake {MARKER}."}, headers=[("x-request-id", "lms-8")])
            assert response.status == 502
    (fields,) = [json.loads(line) for line in lines if '"generation"' in line and "finish_reason" in line]
    assert (fields["request_id"], fields["engine"], fields["finish_reason"]) == ("lms-8", "ollama", reason)
    assert not [line for line in lines if MARKER in line or ascii(MARKER)[1:-1] in line]
    assert not [line for line in lines if "Traceback" in line]


async def test_a_hundred_abrupt_closes_leave_a_clean_log() -> None:
    certificate()
    port, cleartext = free_port(), free_port()
    binds = ["--bind", f"127.0.0.1:{cleartext}", "--tls-bind", f"127.0.0.1:{port}"]
    env = {"MAX_PER_CLIENT": "100"}
    async with ScriptedOllama() as ollama:
        ollama.script = lambda body, index: Script(delay=0.01)
        env["OLLAMA_URL"] = ollama.url
        async with Server(["dccapi.py", *binds], env, f"http://127.0.0.1:{cleartext}/livez", HERE) as server:
            for number in range(100):
                if number % 5 == 0:
                    with socket.create_connection(("127.0.0.1", port)) as unfinished:
                        unfinished.sendall(b"\x16\x03\x01")
                        unfinished.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    continue
                connection = await H2Client.connect("127.0.0.1", port, ssl=True)
                if number % 5 == 1:
                    await connection.request("GET", "/livez")
                elif number % 5 == 2:
                    await connection.headers(await connection.request("POST", "/generate/stream", body=COURSE))
                elif number % 5 == 3:
                    await connection.response(await connection.request("GET", "/livez"))
                await connection.abort()
            await eventually(lambda: ollama.open_calls == 0)
            assert await server.terminate() == 0
            unusual = [line for line in server.log if " INFO dccapi: " not in line and "Running on" not in line]
            assert unusual == []

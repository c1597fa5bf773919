"""The engines: what they are asked, and what becomes of each answer, fault and refusal."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import orjson
import pytest

import dccapi
import testkit
from service import COURSE, ENGINES, ask, asked, fails, logging_into, problem_in, serving, speaking, watch, writes
from testkit import (
    Script,
    ScriptedEngine,
    ScriptedOllama,
    ScriptedOpenAI,
    badge_json,
    badge_pieces,
    eventually,
    exceeds_context,
    split,
)

# --- What an engine is asked ---


async def openai_asked(options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    async with serving(ScriptedOpenAI(), **settings) as service:
        await writes(service, COURSE | options)
    return service.engine.calls[0].body


@pytest.mark.parametrize("engine", [ScriptedOllama, ScriptedOpenAI])
async def test_every_option_of_a_request_reaches_the_engine(engine: type[ScriptedEngine]) -> None:
    options = {
        "badge_style": "Academic", "badge_tone": "Detailed", "badge_level": "Intermediate",
        "criterion_style": "Outcome-Focused", "institution": "Alpine Club",
        "custom_instructions": "Mention the weather.",
    }  # fmt: skip
    body = json.dumps(
        await asked(COURSE | options, engine=engine()) if engine is ScriptedOllama else await openai_asked(options)
    )
    for text in (COURSE["content"], *options.values()):
        assert text in body


async def test_ollama_is_asked_as_the_issue_says() -> None:
    sampling = {"temperature": 0, "max_tokens": 77, "top_p": 1, "top_k": 1, "repeat_penalty": 0, "seed": 0}
    body = await asked(COURSE | sampling, num_ctx=2048, keep_alive="-1", model_name="phi4badges:latest")
    assert body["options"] == {
        "temperature": 0, "top_p": 1, "top_k": 1, "repeat_penalty": 0, "seed": 0, "num_ctx": 2048, "num_predict": 77
    }  # fmt: skip
    assert (body["model"], body["stream"], body["truncate"], body["shift"]) == ("phi4badges:latest", True, False, False)
    assert body["keep_alive"] == -1  # Ollama takes bare seconds as a number only
    assert (await asked(COURSE))["keep_alive"] == "30m"
    schema = json.dumps(body["format"])
    assert body["format"]["required"] == ["badge_name", "badge_description", "criteria", "skills"]
    assert body["format"]["properties"]["criteria"]["items"] == {"type": "string"}
    assert not [word for word in ("pattern", "maxLength", "minLength") if word in schema]


async def test_an_openai_server_is_asked_as_the_issue_says() -> None:
    body = await openai_asked({"max_tokens": 77, "seed": 3, "top_k": 7, "repeat_penalty": 1.3})
    assert (body["max_tokens"], body["seed"], body["top_k"], body["temperature"]) == (77, 3, 7, 0.2)
    assert body["repeat_penalty"] == 1.3
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"]["required"] == [*dccapi.Badge.model_fields, "skills"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "seed" not in await openai_asked({})


LONG = {"content": "knots " * 200, "long_content": "refuse"}


async def test_the_clients_sampling_wins_over_the_engines_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dccapi.Engine, "defaults", {"repeat_penalty": 1.15})
    assert (await openai_asked({}))["repeat_penalty"] == 1.15
    assert (await openai_asked({"repeat_penalty": None}))["repeat_penalty"] == 1.15
    assert (await openai_asked({"repeat_penalty": 1.02}))["repeat_penalty"] == 1.02


# --- What it answers, byte by byte ---


def ndjson(text: str, **members: Any) -> bytes:
    """A line of Ollama's."""
    record = {"model": "phi4badges", "created_at": "2026-11-22T20:17:57.4Z", "response": text, "done": False, **members}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


BADGE_LINES = [ndjson(piece) for piece in split(badge_json(name="Knoten für Bergsteiger 🧗"), 6)]
DONE = ndjson("", done=True, done_reason="stop", prompt_eval_count=3000, eval_count=6)
STREAM = b"".join(BADGE_LINES) + DONE
LONG_LINE = DONE.replace(b'{"model"', b'{"context": [%b], "model"' % b",".join([b"12345"] * 102400))
CLIMBER = STREAM.index("🧗".encode())


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([STREAM], id="many lines in one chunk"),
        pytest.param([STREAM[: CLIMBER + n] for n in (1,)] + [STREAM[CLIMBER + 1 : CLIMBER + 3], STREAM[CLIMBER + 3 :]],
                     id="a character across chunks"),
        pytest.param([STREAM[n : n + 97] for n in range(0, len(STREAM), 97)], id="chunks that know nothing of lines"),
        pytest.param([STREAM[:-1]], id="a last line without its newline"),
        pytest.param([STREAM.replace(b"\n", b"\r\n")], id="lines with CRLF"),
        pytest.param([*BADGE_LINES, b"\n\n", DONE], id="empty lines"),
        pytest.param([*BADGE_LINES, LONG_LINE], id="a line of 600 KiB"),
    ],
)  # fmt: skip
async def test_an_answer_is_read_however_its_bytes_arrive(chunks: list[bytes]) -> None:
    async with serving(script=Script(raw_chunks=chunks)) as service:
        answer = await writes(service)
    assert answer["response"]["badge_name"] == "Knoten für Bergsteiger 🧗"
    assert answer["usage"] == {"prompt_tokens": 3000, "completion_tokens": 6, "total_tokens": 3006}


async def test_a_line_without_end_is_an_engine_error_and_not_kept_in_memory() -> None:
    async with serving(script=Script(raw_chunks=[b"x" * 2**20] * 6)) as service:
        await fails(service, 502, "engine_error")


# --- Failures ---


FAILURES = {  # what goes wrong: the script and settings, the status and error_code of it
    "a fresh connection is dropped": (Script(drop_after=0), {}, 503, "engine_unreachable"),
    "the connection drops after some tokens": (Script(drop_after=5), {}, 502, "engine_error"),
    "the connection drops after the last token": (Script(drop_after=len(badge_pieces())), {}, 502, "engine_error"),
    "an error record comes in mid-stream": (
        Script(error_line="llama runner process has terminated: exit status 2 at 127.0.0.1"), {}, 502, "engine_error"),
    "the runner dies and repeats what it said of another prompt": (
        Script(error_line="llama-server process has terminated: signal: killed: srv send_error: task id = 1022, error: "
               "request (7163 tokens) exceeds the available context size (6144 tokens), try increasing it"),
        {}, 502, "engine_error"),
    "an error record is all that comes": (Script(pieces=[], error_line="s3cret"), {}, 502, "engine_error"),
    "the stream ends without its closing record": (Script(end_without_done=True), {}, 502, "engine_error"),
    "thirty equal tokens end the stream": (Script(pieces=["0"] * 30, end_without_done=True), {}, 502, "engine_error"),
    "nothing comes at all": (Script(pieces=[]), {}, 502, "invalid_model_output"),
    "only prose comes": (Script(pieces=["Sure, ", "here is ", "a badge."]), {}, 502, "invalid_model_output"),
    "placeholders come": (Script(pieces=split(badge_json(name="string"))), {}, 502, "invalid_model_output"),
    "what was asked comes back": (
        Script(pieces=split(badge_json("Knots", "Sentences that explain what this course teaches and which topics."))),
        {}, 502, "invalid_model_output"),
    "the limit comes before the narrative": (
        Script(pieces=split(badge_json())[:20], done_reason="length"), {}, 502, "invalid_model_output"),
    "the engine fails": (Script(status=500, error="CUDA error at 127.0.0.1:9, key s3cret"), {}, 502, "engine_error"),
    "the engine is busy": (Script(status=503, error="server busy, please try again"), {}, 503, "queue_full"),
    "a balancer has no engine to ask": (Script(status=502, error="Bad Gateway"), {}, 503, "engine_unreachable"),
    "no first token": (Script(stall_after=0), {"first_token_timeout": 0.15}, 504, "engine_timeout"),
    "no next token": (Script(stall_after=3), {"token_timeout": 0.15}, 504, "engine_timeout"),
    "no end": (Script(pieces=badge_pieces() * 40, delay=0.02), {"generation_timeout": 0.2}, 504, "engine_timeout"),
}  # fmt: skip


@ENGINES
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_of_the_engine_is_told_and_frees_the_worker(engine: type[ScriptedEngine], failure: str) -> None:
    script, settings, status, code = FAILURES[failure]
    async with serving(engine(), script, max_concurrent_requests=1, **settings) as service:
        await fails(service, status, code)
        assert len(service.engine.calls) == 2  # one for each view: nothing was tried again
        await service.idle()
        service.engine.script = lambda body, index: Script()
        await writes(service)


@pytest.mark.parametrize(
    ("engine", "record"),
    [
        (ScriptedOllama, b'{"error":"llama runner process has terminated"}\n'),
        (ScriptedOpenAI, b'data: {"error":{"code":500,"message":"s3cret","type":"server_error"}}\n\n'),
        (ScriptedOpenAI, b'error: {"code":500,"message":"s3cret","type":"server_error"}\n\n'),
    ],
)
async def test_an_error_record_is_told_at_once(engine: type[ScriptedEngine], record: bytes) -> None:
    async with serving(engine(), Script(raw_chunks=[record], stall_after=1), generation_timeout=5) as service:
        await fails(service, 502, "engine_error")


@ENGINES
async def test_nobody_listening_is_a_503(engine: type[ScriptedEngine]) -> None:
    async with serving(engine()) as service:
        await service.engine.stop()
        await fails(service, 503, "engine_unreachable")
        problem_in(await ask(service, None, "/readyz", "GET"), 503, "engine_unreachable")
        await service.engine.start()
        await writes(service)  # it heals by itself


async def test_a_connection_that_is_not_accepted_is_a_504() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        try:
            async with serving(ollama_url=f"http://127.0.0.1:{address[1]}", connect_timeout=0.15) as service:
                await fails(service, 504, "engine_timeout")
                problem_in(await ask(service, None, "/readyz", "GET"), 503, "engine_unreachable")
        finally:
            for one in waiting:
                one.close()


@ENGINES
async def test_a_model_that_the_engine_does_not_have_is_a_503(engine: type[ScriptedEngine]) -> None:
    async with serving(engine(models=["llama3:latest"])) as service:
        await fails(service, 503, "model_missing")
        problem_in(await ask(service, None, "/readyz", "GET"), 503, "model_missing")


@pytest.mark.parametrize(
    ("name", "listed", "there"),
    [
        ("phi4badges", "phi4badges:latest", True),
        ("phi4badges:latest", "phi4badges:latest", True),
        ("phi4badges:q8", "phi4badges:q8", True),
        ("phi4badges", "phi4badges:q8", False),
        ("phi4badges:q8", "phi4badges:latest", False),
        ("registry:5000/me/phi4badges", "registry:5000/me/phi4badges:latest", True),
    ],
)
async def test_a_model_without_a_tag_is_the_latest(name: str, listed: str, there: bool) -> None:
    async with serving(ScriptedOllama(models=[listed]), model_name=name) as service:
        health = (await ask(service, None, "/health", "GET")).json()
        assert (await ask(service)).status == (200 if there else 503)
    assert (health["model_available"], health["target_model"]) == (there, name)


async def test_an_engines_refusal_is_understood_however_its_bytes_arrive() -> None:
    message = json.dumps({"error": "the input length exceeds the context length"}).encode()
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [head, testkit.http_chunks(message[:20]), testkit.http_chunks(message[20:]) + b"0\r\n\r\n"]
    async with speaking(parts) as (url, _), serving(ollama_url=url) as service:
        await fails(service, 413, "content_too_long")


async def test_the_engines_key_is_sent_and_never_told() -> None:
    async with serving(ScriptedOpenAI(api_key="s3cret"), openai_api_key="s3cret") as service:
        await writes(service)
        health = await ask(service, None, "/health", "GET")
    assert health.status == 200
    assert b"s3cret" not in health.body
    assert service.engine.calls[0].headers["authorization"] == "Bearer s3cret"
    async with serving(openai_api_key="s3cret") as service:  # Ollama, whose it is not
        await writes(service)
    assert "authorization" not in service.engine.calls[0].headers
    async with serving(ScriptedOpenAI(api_key="s3cret"), openai_api_key="0ld") as service:
        await fails(service, 502, "engine_error")
        assert "0ld" not in (await ask(service)).body.decode()


# --- Connections ---


async def test_calls_one_after_another_share_a_connection() -> None:
    async with serving() as service:
        for _ in range(3):
            await writes(service)
    assert {call.connection_number for call in service.engine.calls} == {1}


@ENGINES
async def test_a_pooled_connection_closed_by_the_engine_is_replaced_unnoticed(engine: type[ScriptedEngine]) -> None:
    script = [Script(close_on_reuse=True), Script()]
    async with serving(engine(), lambda body, index: script[index]) as service:
        await writes(service)
        await writes(service)
    assert service.engine.closed_on_reuse == 1
    assert [call.connection_number for call in service.engine.calls] == [1, 2]


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE_BADGE = [
    CHUNKED,
    testkit.http_chunks(ndjson(badge_json()), ndjson("", done=True, done_reason="stop")) + b"0\r\n\r\n",
]


async def test_what_follows_the_last_record_apart_does_not_cost_the_connection() -> None:
    record = testkit.http_chunks(ndjson(badge_json()), ndjson("", done=True, done_reason="stop"))
    parts = [CHUNKED, record, testkit.http_chunks(b"\n"), b"0\r\n\r\n"]
    async with speaking(parts) as (url, connections), serving(ollama_url=url) as service:
        for _ in range(3):
            await writes(service)
    assert connections == [1, 1, 1]


async def test_a_call_that_is_cancelled_as_its_answer_ends_does_not_go_on() -> None:
    engine = dccapi.Engine(dccapi.Settings(engine="openai", openai_base_url="http://localhost/v1"))

    async def rest() -> bytes:
        asyncio.get_running_loop().call_soon(call.cancel)  # asyncio.wait_for of Python 3.11 drops it there
        return b""

    record = b'{"choices": [{"delta": {"content": "{}"}, "finish_reason": "stop"}]}\n[DONE]\n'
    response = AsyncMock(content=AsyncMock(readany=AsyncMock(return_value=record), read=rest))
    response.__aenter__.return_value = response
    engine._response = AsyncMock(return_value=response)  # type: ignore[method-assign]

    async def calls() -> None:
        async for _ in engine.stream(AsyncMock()):
            pass
        await asyncio.sleep(1)

    call = asyncio.create_task(calls())
    assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], asyncio.CancelledError)


@pytest.mark.parametrize("beginning", [b"garbage\r\n\r\n", CHUNKED, CHUNKED + b"9"])
async def test_no_call_is_tried_again_once_a_byte_of_its_answer_came(beginning: bytes) -> None:
    answers = WHOLE_BADGE, [beginning], WHOLE_BADGE
    async with speaking(*answers) as (url, requests), serving(ollama_url=url) as service:
        await writes(service)
        problem_in(await ask(service), 502, "engine_error")
    assert len(requests) == 2


async def test_a_call_that_ends_without_an_answer_is_made_once_more_at_most() -> None:
    script = [Script(), Script(first_delay=0.6, drop_after=0), Script(drop_after=0)]
    async with serving(script=lambda body, index: script[index]) as service:
        await writes(service)
        problem_in(await ask(service), 503, "engine_unreachable")
        assert len(service.engine.calls) == 3


async def test_a_call_is_made_once_more_at_most_beside_others_too() -> None:
    script = [Script(), *[Script(first_delay=0.3, drop_after=0)] * 9]
    async with serving(script=lambda body, index: script[index]) as service, await service.connect() as connection:
        await writes(service)
        first = await connection.request("POST", "/generate", body=COURSE)
        await eventually(lambda: len(service.engine.calls) == 2 and service.engine.calls[1].ended)
        second = await connection.request("POST", "/generate", body=COURSE)  # which finds its server there
        for stream in (first, second):
            assert (await connection.response(stream)).status == 503
        assert len(service.engine.calls) == 4


async def test_a_child_that_dies_with_a_call_is_replaced_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (model := tmp_path / "model.gguf").touch()
    async with speaking([], WHOLE_BADGE) as (url, requests):
        engine = dccapi.EmbeddedEngine(dccapi.Settings(engine="embedded", model_path=model))
        await dccapi.Engine.start(engine)  # without a child: at its address is another server
        monkeypatch.setattr(engine, "url", AsyncMock(return_value=url))
        monkeypatch.setattr(engine, "introduce", AsyncMock())
        engine.remark = ""
        prompt = dccapi.build_prompt(dccapi.GenerateRequest(**COURSE), dccapi.Course(COURSE["content"]), "", {})
        async with await engine._response(prompt) as response:
            assert response.status == 200
        await engine._session.close()
    assert requests == [1, 2]


async def test_probes_do_not_take_the_engines_connections_from_generations() -> None:
    async with serving(connect_timeout=1) as service, await service.connect() as connection:
        service.engine.answering.clear()  # busy: /api/tags is slow
        probes = [await connection.request("GET", "/readyz") for _ in range(40)]
        stream = await connection.request("POST", "/generate", body=COURSE)
        for probe in probes:
            assert (await connection.response(probe)).status == 503
        service.engine.answering.set()
        assert (await connection.response(stream)).status == 200
        assert service.engine.requests.count("GET /api/tags") < 4


async def test_a_probe_that_fails_once_its_askers_have_left_is_not_logged() -> None:
    lines: list[str] = []
    with logging_into(lines):
        async with serving() as service, await service.connect() as connection:
            service.engine.answering.clear()
            asker = await connection.request("GET", "/readyz")
            await eventually(lambda: "GET /api/tags" in service.engine.requests)
            (probe,) = (task for task in asyncio.all_tasks() if ".models()" in repr(task))
            connection.reset(asker)
            await eventually(lambda: not dccapi.peer_of("127.0.0.1").held, what="no request under way")
            await service.engine.stop()
            await asyncio.wait([probe])
            del probe
        gc.collect()
    assert not [line for line in lines if "never retrieved" in line]


# --- Limits and odd answers ---


@pytest.mark.alone
@ENGINES
@pytest.mark.parametrize("blank", ["    ", "\n\t\n  "])
async def test_a_loop_of_white_space_is_stopped_at_the_engine(engine: type[ScriptedEngine], blank: str) -> None:
    start = badge_json()[:40]
    script = Script(pieces=[start, *[blank] * 3000], delay=0.001)
    async with serving(engine(), script) as service:
        response = await ask(service, COURSE | {"max_tokens": 4096})
        problem_in(response, 502, "invalid_model_output")
        await service.idle(0.25)
    assert service.engine.calls[0].closed_by_client.is_set()
    assert service.engine.calls[0].pieces_sent < 1000


@pytest.mark.alone
async def test_an_engine_that_ignores_num_predict_is_stopped() -> None:
    async with serving(script=Script(pieces=["a "] * 3000, delay=0.001)) as service:
        problem_in(await ask(service, COURSE | {"max_tokens": 20}), 502, "invalid_model_output")
        await service.idle(0.25)
    assert service.engine.calls[0].pieces_sent < 200


@ENGINES
async def test_an_engine_that_ignores_the_format_still_gives_its_badge(engine: type[ScriptedEngine]) -> None:
    text = f"Certainly! Here is the badge:\n```json\n{badge_json()}\n```\nI hope it helps."
    async with serving(engine(), Script(pieces=split(text))) as service:
        answer = await writes(service)
    assert answer["response"] == json.loads(badge_json())
    assert answer["usage"] == {
        "prompt_tokens": 467,
        "completion_tokens": len(split(text)),
        "total_tokens": 467 + len(split(text)),
    }
    assert answer["finish_reason"] == "stop"
    assert answer["model"] == "phi4badges"


@ENGINES
async def test_a_badge_complete_at_the_limit_says_length(engine: type[ScriptedEngine]) -> None:
    async with serving(engine(), Script(done_reason="length")) as service:
        assert (await writes(service))["finish_reason"] == "length"
        assert (await watch(service))[-1]["finish_reason"] == "length"


async def test_a_done_without_reason_is_a_stop() -> None:
    async with serving(script=Script(done_reason=None)) as service:
        assert (await writes(service))["finish_reason"] == "stop"


@pytest.mark.parametrize("reason", ["load", "unload"])
async def test_a_model_loaded_or_unloaded_instead_of_writing_is_an_engine_error(reason: str) -> None:
    async with serving(script=Script(done_reason=reason)) as service:
        await fails(service, 502, "engine_error")


async def test_openais_end_without_a_finish_reason_is_an_engine_error() -> None:
    async with serving(ScriptedOpenAI(), Script(done_reason=None)) as service:
        await fails(service, 502, "engine_error")


@pytest.mark.parametrize(("read", "written"), [(2048, 70), (2100, 70), (2000, 70)])
async def test_a_prompt_that_an_old_ollama_cut_silently_is_a_413_with_the_figures(read: int, written: int) -> None:
    script = Script(prompt_eval_count=read, eval_count=written)
    async with serving(script=script, num_ctx=2048) as service:
        for told in await fails(service, 413, "content_too_long", LONG):
            assert told["context_tokens"] == 2048
            assert told["prompt_tokens"] > 2048


@ENGINES
async def test_a_count_below_the_number_of_words_says_nothing(engine: type[ScriptedEngine]) -> None:
    async with serving(engine(), Script(prompt_eval_count=9), num_ctx=2048) as service:
        assert (await writes(service, LONG))["usage"]["prompt_tokens"] == 9


async def test_a_call_whose_thoughts_fill_the_context_is_in_the_sum_of_what_its_badge_took() -> None:
    thinks = Script(["<think>", *["So "] * 142], prompt_eval_count=2000, done_reason="length")
    async with serving(script=lambda body, index: Script() if index else thinks, num_ctx=2144) as service:
        usage = (await writes(service, {"content": "knots " * 1000}))["usage"]
    assert usage == {"prompt_tokens": 2467, "completion_tokens": 143 + len(badge_pieces()), "total_tokens": 2677}


async def test_ollamas_context_error_is_a_413_with_the_figures() -> None:
    script = Script(status=400, error="the input length exceeds the context length")
    async with serving(script=script, num_ctx=2048) as service:
        for told in await fails(service, 413, "content_too_long", LONG):
            assert told["context_tokens"] == 2048
            assert told["prompt_tokens"] >= 200
            assert re.search(r"\b2048\b", told.get("detail") or told["error"])


async def test_llama_cpps_context_error_is_a_413_with_its_own_figures() -> None:
    async with serving(ScriptedOpenAI(), exceeds_context(7345, 6000)) as service:
        for told in await fails(service, 413, "content_too_long"):
            assert (told["prompt_tokens"], told["context_tokens"]) == (7345, 6000)
            assert {"7345", "6000"} <= set(re.findall(r"\d+", told.get("detail") or told["error"]))


# --- OpenAI servers ---


async def test_a_strict_openai_server_is_asked_without_extensions_from_then_on() -> None:
    def strict(body: dict[str, Any], index: int) -> Script:
        message = "Unrecognized request arguments supplied: repeat_penalty, repetition_penalty, top_k"
        refusal = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return Script(status=400, error=refusal) if "top_k" in body else Script()

    async with serving(ScriptedOpenAI(), strict) as service:
        await writes(service)
        await writes(service)
        assert (await watch(service))[-1]["type"] == "final"
    assert ["top_k" in call.body for call in service.engine.calls] == [True] * 3 + [False] * 3
    assert not [name for call in service.engine.calls[3:] for name in call.body if "penalty" in name]


FORMATS = {  # the answer of a server to a response_format that it does not know
    "llama-cpp-python": (500, {"message": "1 validation error:\n {'loc': ('body', 'response_format', 'type')}"}),
    "FastAPI": (422, {"detail": [{"loc": ["body", "response_format", "type"], "msg": "Input should be 'text'"}]}),
    "OpenAI": (400, {"message": "This model does not support response format `json_schema`."}),
}


@pytest.mark.parametrize("server", FORMATS)
@pytest.mark.parametrize("known", ["json_object", None])
async def test_a_server_that_knows_no_json_schema_is_asked_another_way_from_then_on(
    server: str, known: str | None
) -> None:
    status, refusal = FORMATS[server]
    gate = asyncio.Event()

    def limited(body: dict[str, Any], index: int) -> Script:
        refused = body.get("response_format", {}).get("type") not in (known, None)
        return Script(status=status, error=refusal, gate=gate) if refused else Script(gate=gate)

    async with serving(ScriptedOpenAI(), limited) as service, await service.connect() as connection:
        streams = [await connection.request("POST", "/generate", body=COURSE) for _ in range(4)]
        await service.engine.wait_for_calls(4)
        gate.set()
        assert [(await connection.response(stream)).status for stream in streams] == [200] * 4
        await writes(service)
    asked = [call.body.get("response_format", {}).get("type") for call in service.engine.calls]
    assert asked.count("json_schema") == 4
    assert asked.count("json_object") == (5 if known else 4)
    assert asked[-1] == known
    formats = [call.body.get("response_format", {}) for call in service.engine.calls]
    schemas = [format["schema"] for format in formats if format.get("type") == "json_object"]
    assert all("badge_name" in schema["properties"] for schema in schemas)


QUOTED = f"prompt: {COURSE['content']} uses response_format and top_k"


@pytest.mark.parametrize(
    ("status", "refusal"),
    [
        (400, {"message": QUOTED}),
        (500, {"message": "out of memory while compiling the grammar of response_format"}),
        (
            422,
            {"detail": [{"loc": ["body", "prompt"], "msg": "too rude", "input": {"top_k": 30, "response_format": {}}}]},
        ),
    ],
    ids=["it quotes the course", "it is out of memory", "it repeats the request"],
)
async def test_a_refusal_for_another_reason_takes_nothing_from_later_requests(
    status: int, refusal: dict[str, Any]
) -> None:
    def once(body: dict[str, Any], index: int) -> Script:
        return Script(status=status, error=refusal) if "rude" in body["messages"][1]["content"] else Script()

    async with serving(ScriptedOpenAI(), once) as service:
        problem_in(await ask(service, {"content": "A rude course."}), 502, "engine_error")
        await writes(service)
    assert service.engine.calls[-1].body["response_format"]["type"] == "json_schema"
    assert "top_k" in service.engine.calls[-1].body


async def test_a_refusal_that_names_two_parts_leaves_out_one_after_the_other() -> None:
    refusal = {"message": "unsupported: response_format.json_schema (supported: temperature, top_k)"}

    def limited(body: dict[str, Any], index: int) -> Script:
        refused = body.get("response_format", {}).get("type") == "json_schema"
        return Script(status=400, error=refusal) if refused else Script()

    async with serving(ScriptedOpenAI(), limited) as service:
        await writes(service)
    assert service.engine.calls[-1].body["response_format"]["type"] == "json_object"


async def test_where_a_server_does_not_count_the_pieces_of_its_answer_are_counted() -> None:
    chunks = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in badge_pieces()]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    lines = [b"data: " + orjson.dumps(chunk) + b"\r\n\r\n" for chunk in chunks]
    async with serving(
        ScriptedOpenAI(), Script(raw_chunks=[b": ping\r\n\r\n", *lines, b"data: [DONE]\r\n\r\n"])
    ) as service:
        usage = (await writes(service))["usage"]
    assert usage == {"prompt_tokens": 0, "completion_tokens": len(badge_pieces()), "total_tokens": len(badge_pieces())}


@pytest.mark.parametrize("engine", [ScriptedOllama, ScriptedOpenAI])
@pytest.mark.parametrize("rest", [b"", b"x" * 5 * 2**20], ids=["cut off", "without end"])
async def test_what_follows_the_last_record_does_not_matter(engine: type[ScriptedEngine], rest: bytes) -> None:
    double = engine()
    double.end_of_body = b"%x\r\n%b" % (len(rest) + 1, rest)
    async with serving(double, Script(close_after_response=True)) as service:
        assert (await writes(service))["finish_reason"] == "stop"


async def test_a_server_that_refuses_everything_is_asked_twice_at_most() -> None:
    refusal = Script(status=400, error={"message": "top_k: not permitted", "type": "invalid_request_error"})
    async with serving(ScriptedOpenAI(), refusal) as service:
        problem_in(await ask(service), 502, "engine_error")
        assert len(service.engine.calls) == 2


# --- What aiohttp still does, so that a workaround does not outlive its reason ---


async def test_aiohttp_still_does_not_repeat_a_post_on_a_connection_just_closed() -> None:
    async with ScriptedOllama() as ollama, aiohttp.ClientSession() as session:
        ollama.script = lambda body, index: Script(close_on_reuse=index == 0)
        body = {"model": "phi4badges", "prompt": "x"}
        async with session.post(ollama.url + "/api/generate", json=body) as response:
            await response.read()
        with pytest.raises(aiohttp.ClientError):
            await session.post(ollama.url + "/api/generate", json=body)

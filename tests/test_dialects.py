"""What engines send: every dialect, fault and pace that is known, over real connections.

The rows are those of the tables "Engines' dialects" and "A real Ollama" of issue 11, each with the words of the server
that it is about.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import pytest

import dccapi
from service import (
    COURSE,
    ENGINES,
    HERE,
    MARKER,
    SLOW,
    Service,
    ask,
    error_in,
    fails,
    logging_into,
    problem_in,
    serving,
    speaking,
    watch,
    writes,
)
from testkit import Script, ScriptedEngine, ScriptedOllama, ScriptedOpenAI, badge_json, badge_pieces, split

BADGE = json.loads(badge_json())
IDEA = json.dumps({**BADGE, "badge_name": "First Idea"})


def ndjson(*records: str | dict[str, Any], **last: Any) -> list[bytes]:
    """An answer of Ollama's, a line for each piece of text and each record; `last` is about its closing record."""
    said = [{"response": record} if isinstance(record, str) else record for record in records]
    end = {"response": "", "done": True, "done_reason": "stop", "prompt_eval_count": 467, "eval_count": 50, **last}
    return [json.dumps({"model": "phi4badges", "done": False, **record}).encode() + b"\n" for record in [*said, end]]


def sse(*deltas: str | dict[str, Any], finish: str | None = "stop") -> list[bytes]:
    """An answer of an OpenAI server."""
    said = [{"delta": {"content": delta} if isinstance(delta, str) else delta, "index": 0} for delta in deltas]
    choices = [*said, {"delta": {}, "index": 0, "finish_reason": finish}]
    lines = [b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n" for choice in choices]
    return [*lines, b"data: [DONE]\n\n"]


async def badge_of(service: Service, body: Any = COURSE) -> dict[str, Any]:
    """The answer, once it is the same as JSON, as the tokens put together and as the final event."""
    answer = await writes(service, body)
    *tokens, final = await watch(service, body)
    assert final["type"] == "final", final
    told = "".join(token["content"] for token in tokens)
    assert json.loads(told) == answer["response"] == final["content"]
    assert tokens[-1]["accumulated"] == told
    return answer


async def health_of(service: Service) -> tuple[int, dict[str, Any]]:
    response = await ask(service, None, "/health", "GET")
    return response.status, response.json()


# --- Thoughts ---

THOUGHTS = {  # what stands before the badge, with a first idea for {}
    "<think>": "<think>\nMaybe {}?\n</think>\n\n",
    "<thinking>": "<thinking>Maybe {}?</thinking>",
    "<thought>": "<thought>Maybe {}?</thought>",
    "<reasoning>": "<reasoning>Maybe {}?</reasoning>\n```json\n",
    "<seed:think>": "<seed:think>Maybe {}?</seed:think>",
    "[THINK]": "[THINK]Maybe {}?[/THINK]",
    "◁think▷": "◁think▷Maybe {}?◁/think▷",
    "begin_of_thought": "<|begin_of_thought|>Maybe {}?<|end_of_thought|>",
    "START_THINKING": "<|START_THINKING|>Maybe {}?<|END_THINKING|><|START_RESPONSE|>",
    "gpt-oss": "<|channel|>analysis<|message|>Maybe {}?<|end|><|start|>assistant<|channel|>final<|message|>",
    "gpt-oss, constrained": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final "
    "<|constrain|>json<|message|>",
    "gpt-oss, marks stripped": "analysisMaybe {}?assistantfinal",
    "Gemma's channel": "<|channel>thought\nMaybe {}?<channel|>",
    "only a closing tag": "Okay, a badge. Maybe {}? Yes.\n</think>\n\n",
    "only a closing tag, an idea in a fence": "Okay:\n```json\n{}\n```\nOr shorter.</think>\n",
    "only a closing tag, and nothing before the idea": "{}</think>\n",
    "two blocks": "<think>Maybe {0}?</think>\n<think>Or {0}?</think>\n",
    "prose before and between": "Sure.\n<think>A <think> in it. {}</think>\nHere it is:\n",
}
THINK_WORDS = {
    "badge_name": "The <think> Tag of Knots",
    "badge_description": 'Says "</think>", [/THINK] and assistantfinal {"aloud"}.',
    "criteria": {"narrative": "- <|channel|>final: ◁/think▷\n- <thinking> in {braces} and \\backslashes\\"},
}


@ENGINES
@pytest.mark.parametrize("thoughts", THOUGHTS)
async def test_thoughts_are_dropped_however_they_are_marked(engine: type[ScriptedEngine], thoughts: str) -> None:
    text = THOUGHTS[thoughts].format(IDEA) + badge_json() + "\n```"
    async with serving(engine(), Script(pieces=split(text))) as service:
        assert (await badge_of(service))["response"] == BADGE


@ENGINES
async def test_words_of_thinking_in_the_badges_own_texts_stay(engine: type[ScriptedEngine]) -> None:
    text = f"<think>{IDEA}</think>" + json.dumps(THINK_WORDS, ensure_ascii=False)
    async with serving(engine(), Script(pieces=split(text))) as service:
        assert (await badge_of(service))["response"] == THINK_WORDS


@pytest.mark.parametrize(
    "text", [f"<think>Maybe {IDEA}? Or", f"Maybe {IDEA}?\n</think>\n", f"<think>{IDEA}</think> Done"]
)
@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_a_first_idea_is_no_badge_where_none_follows(text: str, reason: str) -> None:
    async with serving(script=Script(pieces=split(text), done_reason=reason)) as service:
        problem_in(await ask(service), 502, "invalid_model_output")
        events = await watch(service)
        error_in(events, "invalid_model_output")
        assert "".join(event.get("content", "") for event in events[:-1]) == ""


THINKS = {"capabilities": ["completion", "thinking"], "template": "{{ .System }}{{ .Prompt }}"}


@pytest.mark.parametrize(
    ("shown", "think"),
    [
        ({**THINKS, "details": {"family": "qwen3"}}, False),
        ({**THINKS, "details": {"family": "gptoss"}}, "low"),
        ({**THINKS, "details": {"family": "gpt-oss"}}, "low"),
        ({**THINKS, "capabilities": ["completion"]}, None),
        ({"capabilities": "?", "details": "?", "model_info": "?"}, None),
        (None, None),  # it knows no /api/show
    ],
    ids=["can be told not to", "gptoss", "gpt-oss", "does not", "nonsense", "not told"],
)
async def test_ollama_is_told_not_to_think_where_the_model_can(shown: Any, think: Any) -> None:
    async with serving() as service:
        service.engine.shown = shown
        await writes(service)
        await writes(service)
        assert [call.body.get("think") for call in service.engine.calls] == [think, think]
        if shown and "template" in shown:
            assert service.engine.requests.count("POST /api/show") == 1  # asked once


FIVE = split(badge_json(), 5)
THINKING = {  # a thought in a field of its own, and the badge after it
    "Ollama": (ScriptedOllama, ndjson(*[{"response": "", "thinking": IDEA}] * 10, *FIVE)),
    "reasoning_content": (ScriptedOpenAI, sse(*[{"content": None, "reasoning_content": IDEA}] * 10, *FIVE)),
    "reasoning": (ScriptedOpenAI, sse(*[{"content": "", "reasoning": IDEA}] * 10, *FIVE)),
    "parts": (ScriptedOpenAI, sse(
        *[{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": IDEA}]}]}] * 10,
        *[{"content": [{"type": "text", "text": piece}]} for piece in FIVE])),
    "parts, then strings": (ScriptedOpenAI, sse({"content": [{"type": "thinking", "thinking": IDEA}]}, *FIVE)),
}  # fmt: skip


@pytest.mark.parametrize("dialect", THINKING)
async def test_a_thought_is_a_sign_of_life_and_never_a_token(dialect: str) -> None:
    engine, chunks = THINKING[dialect]
    script = Script(raw_chunks=chunks, delay=0.05)
    async with serving(engine(), script, first_token_timeout=0.4, token_timeout=0.4) as service:
        assert (await badge_of(service))["response"] == BADGE


async def test_silence_after_a_thought_is_token_timeouts() -> None:
    script = Script(raw_chunks=ndjson({"thinking": "So"}, {"thinking": "…"}), stall_after=2)
    async with serving(script=script, first_token_timeout=30, token_timeout=0.2) as service:
        assert "TOKEN_TIMEOUT" in problem_in(await ask(service), 504, "engine_timeout")["detail"]


async def test_a_badge_in_place_of_thoughts_is_read_when_nothing_else_came() -> None:
    thought = [{"content": "", "reasoning_content": piece} for piece in badge_pieces()]
    async with serving(ScriptedOpenAI(), Script(raw_chunks=sse(*thought))) as service:
        assert (await badge_of(service))["response"] == BADGE
    ideas = [{"reasoning_content": IDEA + " no, rather"}]
    async with serving(ScriptedOpenAI(), Script(raw_chunks=sse(*ideas, finish="length"))) as service:
        problem_in(await ask(service), 502, "invalid_model_output")


# --- What else is in an answer ---

CASES = HERE.parent / "shared" / "cases" / "engines.jsonl"
KNOTS = json.dumps({"badge_name": "Knots", "badge_description": "Ties knots.", "criteria": {"narrative": "Tied six."}})
BROKEN = b'data: {"id": "7", "choices": [], "error": {"message": "CUDA out of memory"}}\n\n'
OLD_BROKEN = b'data: {"object": "error", "message": "CUDA out of memory", "code": 500}\n\n'
WHOLE = {"object": "chat.completion", "choices": [{"message": {"content": KNOTS}, "finish_reason": "stop"}]}
OWN_CASES: list[tuple[str, str, list[bytes], dict[str, Any]]] = [  # name, engine, what it sends, what is wanted
    ("count of the uncached part only", "ollama", ndjson(KNOTS, prompt_eval_count=9), {}),
    ("empty lines, comments", "openai", [b"data:\n\ndata: \n\n: ping\n\nevent: message\n", *sse(KNOTS)], {}),
    ("an answer that is no stream", "openai", [json.dumps(WHOLE).encode()], {}),
    ("a text in parts", "openai", sse({"content": [{"type": "text", "text": KNOTS}]}), {"tokens_lack": "type"}),
    ("the engine's filter", "openai", sse(KNOTS[:40], finish="content_filter"), {"detail_has": "filter"}),
    ("an error behind other keys", "openai", [*sse(KNOTS[:40])[:1], BROKEN], {"detail_has": "(out of memory)"}),
    ("an error of vLLM before 0.10", "openai", [*sse(KNOTS[:40])[:1], OLD_BROKEN], {"detail_has": "(out of memory)"}),
    ("a tag that is half a character", "ollama",
     ndjson(KNOTS[:-1] + ', "tags": ["kn\\ud800ots", "\\ud800"]}'), {"tags": ["knots"]}),
]  # fmt: skip
ALL_CASES: list[Any] = [
    {
        "name": name,
        "engine": engine,
        "lines": b"".join(sent).decode().split("\n"),
        "want": {"status": 502 if "detail_has" in want else 200, "badge_name": "Knots", **want},
    }
    for name, engine, sent, want in OWN_CASES
]
if CASES.exists():
    ALL_CASES += [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
else:
    ALL_CASES.append(pytest.param({"name": "the shared ones"}, marks=pytest.mark.skip("needs ../shared/cases")))


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case["name"])
async def test_an_answer_of_this_kind_is_read(case: dict[str, Any]) -> None:
    engine = {"ollama": ScriptedOllama, "openai": ScriptedOpenAI}[case["engine"]]()
    chunks = [line.replace("{n}", "467").encode() + b"\n" for line in case["lines"]]
    want = case["want"]
    async with serving(engine, Script(raw_chunks=chunks)) as service:
        if want["status"] != 200:
            problem = (await ask(service)).json()
            assert (problem["status"], want.get("detail_has", "") in problem["detail"]) == (want["status"], True)
            return
        answer = await badge_of(service)
    assert answer["response"]["badge_name"] == want["badge_name"]
    assert want.get("tokens_lack", "\0") not in json.dumps(answer["response"])
    assert answer["achievement"].get("tag", []) == want.get("tags", [])


FINISHED = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "STOP"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "SAFETY"), "content filter"),
    **dict.fromkeys(("error", "abort", "cancelled", "insufficient_system_resource", "never heard of"), "failed"),
}


async def test_every_reason_for_the_end_is_known_or_a_failure() -> None:
    async with serving(ScriptedOpenAI()) as service:
        for said, meant in FINISHED.items():
            service.engine.script = lambda body, index, said=said: Script(done_reason=said)  # type: ignore[misc]
            response = await ask(service)
            if meant in ("stop", "length"):
                assert (response.status, response.json().get("finish_reason")) == (200, meant), said
            else:
                assert meant in problem_in(response, 502, "engine_error")["detail"], said


# --- Refusals ---

VLLM = {"object": "error", "type": "BadRequestError", "param": None, "code": 400}
TOO_LONG: dict[str, tuple[type[ScriptedEngine], int, Any, int | None, int | None]] = {
    # status and error of the server, what its context holds and what the prompt has
    "vLLM before 0.10": (ScriptedOpenAI, 400, json.dumps({**VLLM, "message": "This model's maximum context length is "
        "2048 tokens. However, you requested 3548 tokens (2524 in the messages, 1024 in the completion). Please reduce "
        "the length of the messages or completion."}).encode(), 2048, 2524),
    "vLLM": (ScriptedOpenAI, 400, {**VLLM, "message": "You passed 7001 input tokens and requested 1024 output tokens. "
        "However, the model's context length is only 6144 tokens, resulting in a maximum input length of 5120 tokens. "
        "Please reduce the length of the input prompt. (parameter=input_tokens, value=7001)"}, 6144, 7001),
    "vLLM, max_tokens": (ScriptedOpenAI, 400, {**VLLM, "param": "max_tokens", "message": "'max_tokens' or "
        "'max_completion_tokens' is too large: 1700. This model's maximum context length is 2048 tokens and your "
        "request has 449 input tokens (1700 > 2048 - 449)."}, 2048, 449),
    "sglang": (ScriptedOpenAI, 400, {**VLLM, "message": "Requested token count exceeds the model's maximum context "
        "length of 4096 tokens. You requested a total of 5000 tokens: 4488 tokens from the input messages and 512 "
        "tokens for the completion. Please reduce the number of tokens in the input messages or the completion to fit "
        "within the limit."}, 4096, 4488),
    "sglang, input alone": (ScriptedOpenAI, 400, json.dumps({**VLLM, "message": "The input (61709 tokens) is longer "
        "than the model's context length (40960 tokens)."}).encode(), 40960, 61709),
    "sglang, allowed length": (ScriptedOpenAI, 400, {**VLLM, "message": "Input length (160062 tokens) exceeds the "
        "maximum allowed length (59862 tokens). Use a shorter input or enable --allow-auto-truncate."}, 59862, 160062),
    "TGI": (ScriptedOpenAI, 422, b'{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= '
        b'8192. Given: 6204 `inputs` tokens and 2047 `max_new_tokens`","error_type":"validation"}', 8192, 6204),
    "TGI, in plain text": (ScriptedOpenAI, 422, b"Input validation error: `inputs` must have less than 1024 tokens. "
        b"Given: 1500", 1024, 1500),
    "llama.cpp": (ScriptedOpenAI, 400, {"code": 400, "message": "request (7345 tokens) exceeds the available context "
        "size (6000 tokens), try increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": 7345,
        "n_ctx": 6000}, 6000, 7345),
    "llama.cpp before 6500": (ScriptedOpenAI, 400, {"code": 400, "message": "the request exceeds the available context "
        "size. try increasing the context size or enable context shift", "type": "invalid_request_error"}, None, None),
    "llama-cpp-python": (ScriptedOpenAI, 500, {"message": "Requested tokens (2570) exceed context window of 2048"},
        2048, 2570),
    "LM Studio": (ScriptedOpenAI, 400, b'{"error":"Trying to keep the first 14538 tokens when context the overflows. '
        b"However, the model is loaded with context length of only 2048 tokens, which is not enough. Try to load the "
        b'model with a larger context length, or provide a shorter input"}', 2048, 14538),
    "LM Studio 0.4": (ScriptedOpenAI, 400, b'{"error":"The number of tokens to keep from the initial prompt is greater '
        b"than the context length (n_keep: 13055>= n_ctx: 4096). Try to load the model with a larger context length, "
        b'or provide a shorter input."}', 4096, 13055),
    "LM Studio 0.4, short": (ScriptedOpenAI, 400, b'{"error":"Cannot truncate prompt with n_keep (15028) >= n_ctx '
        b'(7424)"}', 7424, 15028),
    "Mistral": (ScriptedOpenAI, 400, {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, "
        "too large for model with 32768 maximum context length", "type": "invalid_request_error"}, 32768, 40000),
    "OpenAI": (ScriptedOpenAI, 400, {"message": "This model's maximum context length is 128,000 tokens. However, your "
        "messages resulted in 204,308 tokens. Please reduce the length of the messages.", "param": "messages",
        "code": "context_length_exceeded"}, 128000, 204308),
    "vLLM 0.17": (ScriptedOpenAI, 400, {**VLLM, "message": "Input length (11680) exceeds model's maximum context "
        "length (4096)."}, 4096, 11680),
    "vLLM 0.16": (ScriptedOpenAI, 400, {**VLLM, "param": "max_tokens", "message": "max_tokens must be at least 1, got "
        "-7584. (parameter=max_tokens, value=-7584)"}, None, None),
    "TensorRT-LLM": (ScriptedOpenAI, 400, {"message": "Prompt length (8219) exceeds maximum input length (8192)"},
        8192, 8219),
    "TabbyAPI": (ScriptedOpenAI, 400, {"message": "Request length 71599 + 2048 is greater than max_seq_len 65536"},
        65536, 71599),
    "xAI": (ScriptedOpenAI, 400, b'{"code": "Client specified an invalid argument", "error": "This model\'s maximum '
        b'prompt length is 131072 but the request contains 136973 tokens."}', 131072, 136973),
    "Gemini": (ScriptedOpenAI, 400, {"code": 400, "message": "The input token count (317740) exceeds the maximum "
        "number of tokens allowed (131072).", "status": "INVALID_ARGUMENT"}, 131072, 317740),
    "a proxy": (ScriptedOpenAI, 413, b"<html><h1>413 Request Entity Too Large</h1></html>", None, None),
    "Ollama 0.24": (ScriptedOllama, 400, "the input length exceeds the context length", 6144, None),
    "Ollama 0.30": (ScriptedOllama, 400, json.dumps({"error": {"code": 400, "message": "request (7515 tokens) exceeds "
        "the available context size (6144 tokens), try increasing it", "type": "exceed_context_size_error",
        "n_prompt_tokens": 7515, "n_ctx": 6144}}), 6144, 7515),
    "Ollama 0.32": (ScriptedOllama, 400, "the prompt is longer than the context length currently available to the "
        "model; shorten the prompt, adjust the context length in settings, or use a model with a longer context "
        "length", 6144, None),
}  # fmt: skip


@pytest.mark.parametrize("server", TOO_LONG)
async def test_a_prompt_that_is_too_long_is_told_with_the_servers_own_figures(server: str) -> None:
    engine, status, error, limit, tokens = TOO_LONG[server]
    async with serving(engine(), Script(status=status, error=error)) as service:
        for told in await fails(service, 413, "content_too_long"):
            sentence = told.get("detail") or told["error"]
            assert told.get("context_tokens") == limit, sentence
            assert told["prompt_tokens"] == tokens or (tokens is None and told["prompt_tokens"] > (limit or 0)), (
                sentence
            )
            assert {str(figure) for figure in (limit, tokens) if figure} <= set(re.findall(r"\d+", sentence))
            if limit:  # a part of what was sent, or all of it where another setting is to be lowered
                assert told["content_words_that_fit"] <= told["content_words"]
                assert "Lower max_tokens" in sentence or told["content_words_that_fit"] < told["content_words"]


async def test_a_short_course_with_too_many_max_tokens_is_not_told_to_be_shorter() -> None:
    engine, status, error, _, _ = TOO_LONG["vLLM, max_tokens"]
    async with serving(engine(), Script(status=status, error=error)) as service:
        detail = problem_in(await ask(service), 413, "content_too_long")["detail"]
    assert "Lower max_tokens to 1599." in detail
    assert "horten" not in detail


async def test_a_course_is_condensed_also_where_a_server_refuses_it_without_figures() -> None:
    engine, status, error, _, _ = TOO_LONG["a proxy"]
    refusal, course = Script(status=status, error=error), "Climbers tie knots and check them. " * 200
    async with serving(engine(), lambda body, index: refusal if index < 2 else Script()) as service:
        answer = await writes(service, {"content": course})
        sizes = [len(str(call.body["messages"]).split()) for call in service.engine.calls]
    assert sizes[0] > sizes[1] > sizes[2]
    assert "condensed" in {note["code"] for note in answer["review"]["notes"]}


REFUSED_PARTS: dict[str, tuple[int, Any]] = {  # status and error of a server that does not take the part
    "stream_options": (400, {"message": "Unrecognized request argument supplied: stream_options"}),
    "max_tokens": (400, {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.", "param": "max_tokens", "code": "unsupported_parameter"}),
    "seed": (422, b"Failed to deserialize the JSON body into the target type: seed: invalid value: integer `3`"),
    "temperature": (400, {"message": "Unsupported value: 'temperature' does not support 0.2 with this model. Only the "
        "default (1) value is supported."}),
    "top_p": (400, {"message": "top_p is not supported"}),
    "top_k": (400, {"message": "Unrecognized request argument supplied: top_k"}),
    "repeat_penalty": (422, {"detail": [{"loc": ["body", "repeat_penalty"], "msg": "Extra inputs are not permitted"}]}),
    "repetition_penalty": (400, {"message": "Unrecognized request argument supplied: repetition_penalty"}),
    "json_schema": (400, {"message": "Invalid parameter: 'response_format' of type 'json_schema' is not supported"}),
    "chat_template_kwargs": (422, {"detail": [{"loc": ["body", "chat_template_kwargs"], "msg": "Extra inputs are not "
        "permitted", "input": {"enable_thinking": False, "seed": 3}}]}),
    "system": (400, {**VLLM, "message": "System role not supported"}),
    "think": (400, '"phi4badges" does not support thinking'),
    "format": (500, 'invalid format: "{}"; expected "json" or a valid JSON Schema object'),
}  # fmt: skip


def _has(body: dict[str, Any], part: str) -> bool:
    if part == "system":
        return any(message["role"] == "system" for message in body["messages"])
    if part == "json_schema":
        return body.get("response_format", {}).get("type") == "json_schema"
    return part in body


WITHOUT_SYSTEM = [
    (400, {**VLLM, "message": "Conversation roles must alternate user/assistant/user/assistant/..."}),
    (500, {"code": 500, "message": "Error: Jinja Exception: Only user and assistant roles are supported!"}),
]


@pytest.mark.parametrize(("status", "error"), WITHOUT_SYSTEM)
async def test_a_template_without_a_system_role_gets_the_instructions_from_the_user(status: int, error: Any) -> None:
    def script(body: dict[str, Any], index: int) -> Script:
        return Script(status=status, error=error) if _has(body, "system") else Script()

    async with serving(ScriptedOpenAI(), script) as service:
        assert (await badge_of(service))["response"] == BADGE
        assert len(service.engine.calls) == 3  # refused once


@pytest.mark.parametrize("part", REFUSED_PARTS)
async def test_a_part_that_a_server_does_not_take_is_left_out_from_then_on(part: str) -> None:
    status, error = REFUSED_PARTS[part]
    lines: list[str] = []
    engine: ScriptedEngine = ScriptedOllama() if part in ("think", "format") else ScriptedOpenAI()
    engine.shown = THINKS
    with logging_into(lines):
        async with serving(engine, lambda b, i: Script(status=status, error=error) if _has(b, part) else Script()) as s:
            body = COURSE | {"seed": 3, "custom_instructions": MARKER}
            assert (await badge_of(s, body))["response"] == BADGE
    calls = [call.body for call in engine.calls]
    assert [_has(call, part) for call in calls] == [True, False, False]
    assert set(calls[0]) - set(calls[1]) <= {part}
    if part == "max_tokens":
        assert calls[1]["max_completion_tokens"] == 1024
    if part == "system":
        assert "badge" in calls[1]["messages"][0]["content"].partition("<course>")[0]
    assert any(f"without {part} from now on" in line for line in lines)


async def test_a_server_that_takes_nothing_optional_is_asked_without_any_of_it() -> None:
    parts = ("system", "chat_template_kwargs", "stream_options", *dccapi.SAMPLING, "json_schema")

    def strict(body: dict[str, Any], index: int) -> Script:
        part = next((part for part in parts if _has(body, part)), None)
        if part is None and "response_format" in body:
            return Script(status=400, error={"message": "response_format: json_object is not supported"})
        return Script(status=REFUSED_PARTS[part][0], error=REFUSED_PARTS[part][1]) if part else Script()

    async with serving(ScriptedOpenAI(), strict) as service:
        await badge_of(service, COURSE | {"seed": 3})
        assert service.engine.calls[-1].body.keys() == {"model", "messages", "stream", "max_completion_tokens"}
        assert len(service.engine.calls) == len(parts) + 1 + 2


async def test_what_did_not_help_is_asked_for_again() -> None:
    refusal = Script(status=400, error=b"seed, temperature, top_p: no. Or it is something else.")
    async with serving(ScriptedOpenAI(), lambda body, index: refusal if index < 4 else Script()) as service:
        problem_in(await ask(service, COURSE | {"seed": 3}), 502, "engine_error")
        assert len(service.engine.calls) == 4
        await writes(service, COURSE | {"seed": 3})
        assert {"seed", "temperature", "top_p"} <= service.engine.calls[-1].body.keys()


AZURE = {"message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy. "
    "Please modify your prompt and retry.", "param": "prompt", "code": "content_filter", "status": 400}  # fmt: skip
TOLD: dict[str, tuple[type[ScriptedEngine], int, Any, str]] = {  # status and error, and what of it is told
    "memory": (ScriptedOllama, 500, "model requires more system memory (5.6 GiB) than is available (3.9 GiB)",
        "requires more system memory (5.6 GiB) than is available (3.9 GiB)"),
    "memory of a GPU": (ScriptedOllama, 500, f"llama-server process has terminated: cudaMalloc failed: out of memory "
        f"{MARKER}", "(out of memory)"),
    "load time-out": (ScriptedOllama, 500, "timed out waiting for llama runner to start - progress 0.00 - ",
        "timed out waiting for llama runner to start"),
    "load time-out since 0.30": (ScriptedOllama, 500, f"timed out waiting for llama-server to start - {MARKER}",
        "timed out waiting for llama-server to start"),
    "an embedding model": (ScriptedOllama, 400, '"all-minilm" does not support generate', "does not support generate"),
    "a key": (ScriptedOpenAI, 401, {"message": f"Incorrect API key provided: {MARKER}"}, "key"),
    "Azure's filter": (ScriptedOpenAI, 400, AZURE, "content filter"),
}  # fmt: skip


@pytest.mark.parametrize("reason", TOLD)
async def test_the_engines_reason_is_told_in_answer_log_and_health_until_it_works(reason: str) -> None:
    engine, status, error, told = TOLD[reason]
    lines: list[str] = []
    with logging_into(lines):
        async with serving(engine(), Script(status=status, error=error)) as service:
            for view in await fails(service, 502, "engine_error"):
                assert told in (view.get("detail") or view["error"])
            health = (await health_of(service))[1]
            assert ("filter" in reason) == (health["error"] is None)  # a filter is about one course
            assert told in (health["error"] or told)
            service.engine.script = lambda body, index: Script()
            await badge_of(service)
            assert await health_of(service) == (200, {**health, "error": None})
    assert [line for line in lines if told in line and '"WARNING"' in line]
    assert not [line for line in lines if MARKER in line]


@ENGINES
@pytest.mark.parametrize(
    ("said", "waits"), [("37", "37"), (None, "5"), ("Wed, 21 Oct 2026 07:28:00 GMT", "5"), ("²", "5")]
)
async def test_a_busy_engine_is_a_503_with_its_retry_after(engine: type[ScriptedEngine], said: Any, waits: str) -> None:
    script = Script(status=429, error="you (x) have reached your hourly usage limit", retry_after=said)
    async with serving(engine(), script) as service:
        response = await ask(service)
        assert "engine is busy" in problem_in(response, 503, "queue_full")["detail"]
        assert response.headers["retry-after"] == waits


# --- Models and their context ---


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("Phi4Badges", "phi4badges:latest"),
        ("library/qwen3:8b", "qwen3:8b"),
        ("registry.ollama.ai/library/qwen3:8b", "qwen3:8b"),
        ("https://registry.ollama.ai/library/smol", "smol:latest"),
        ("hf.co/u/M-GGUF:q4_k_m", "hf.co/u/M-GGUF:Q4_K_M"),
        ("me/smol", "me/smol:latest"),
    ],
)
async def test_a_model_is_compared_as_ollama_compares_names(name: str, listed: str) -> None:
    async with serving(ScriptedOllama(models=[listed]), model_name=name) as service:
        status, health = await health_of(service)
        assert (status, health["model_available"]) == (200, True)
        assert (await ask(service, None, "/readyz", "GET")).status == 200
    async with serving(ScriptedOllama(models=["not/" + listed]), model_name=name) as service:
        problem_in(await ask(service, None, "/readyz", "GET"), 503, "model_missing")


async def test_ollamas_openai_api_has_the_model_under_its_full_name() -> None:
    async with serving(ScriptedOpenAI(models=["phi4badges:latest"])) as service:
        assert (await ask(service, None, "/readyz", "GET")).status == 200


class Unlisted(ScriptedOpenAI):
    def info(self, path: str) -> None:
        return None


async def test_an_openai_server_without_a_list_of_models_is_ready_when_it_answers() -> None:
    async with serving(Unlisted()) as service:
        assert (await health_of(service))[0] == 200
        await badge_of(service)


JINJA = "{%- for message in messages %}{{ message['role'] }}{{ message['content'] }}{%- endfor %}"


async def test_a_template_without_a_place_for_the_system_prompt_is_told_until_it_has_one() -> None:
    lines: list[str] = []
    with logging_into(lines):
        async with serving() as service:
            for shown in (
                {"template": "{{ .Prompt }}"},
                {"template": JINJA},
                {"template": "{{ .Prompt }}", "renderer": "q"},
            ):
                service.engine.shown = shown
                await writes(service)
                await writes(service)
                status, health = await health_of(service)
                assert (status, bool(health["error"])) == (200, len(shown["template"]) < 20 and "renderer" not in shown)
    assert len([line for line in lines if "no place for the system prompt" in line]) == 1


async def test_the_models_own_context_rules_where_it_is_smaller_than_num_ctx() -> None:
    script = Script(status=400, error="the input length exceeds the context length")
    async with serving(script=script, num_ctx=16384) as service:
        service.engine.shown = {"model_info": {"general.architecture": "smol", "smol.context_length": 8192}}
        told, _ = await fails(service, 413, "content_too_long")
        assert (told["context_tokens"], told["prompt_tokens"]) == (8192, 8193)
        problem_in(await ask(service, {"content": "knots " * 8193, "long_content": "refuse"}), 413, "content_too_long")
        assert len(service.engine.calls) == 2  # this one was not asked
        short = Script(prompt_eval_count=8100, eval_count=60)
        service.engine.script = lambda body, index: short
        await writes(service)


LONG = {"content": "knots " * 1000, "long_content": "refuse"}


@pytest.mark.parametrize("facts", [{"max_model_len": 900}, {"meta": {"n_ctx": 900, "n_ctx_train": 131072}}, None])
async def test_an_openai_servers_limit_is_its_own_and_never_num_ctx(facts: dict[str, Any] | None) -> None:
    engine = ScriptedOpenAI()
    refusal = {"message": "request (1400 tokens) exceeds the available context size (900 tokens)", "n_ctx": 900}
    async with serving(engine, Script(prompt_eval_count=1400), num_ctx=256) as service:
        assert (await writes(service, LONG))["usage"]["prompt_tokens"] == 1400
        if facts is None:  # learned from a refusal
            engine.script = lambda body, index: Script(status=400, error=refusal)
        else:
            engine.facts = facts
            assert 0 <= (await health_of(service))[1]["content_words_that_fit"] < 900
        assert problem_in(await ask(service, LONG), 413, "content_too_long")["context_tokens"] == 900
        calls = len(engine.calls)
        problem_in(await ask(service, LONG), 413, "content_too_long")
        assert len(engine.calls) == calls
        await engine.stop()  # another one takes its place
        problem_in(await ask(service), 503, "engine_unreachable")
        engine.facts, engine.script = {}, lambda body, index: Script()
        await engine.start()
        await writes(service)
        await writes(service, LONG)


async def test_an_engine_that_is_down_is_told_with_what_helps() -> None:
    async with serving() as service:
        await service.engine.stop()
        response = await ask(service)
        problem_in(response, 503, "engine_unreachable")
        assert response.headers["retry-after"]
        status, health = await health_of(service)
        assert (status, "OLLAMA_URL" in health["error"]) == (503, True)
        await service.engine.start()
        await badge_of(service)
        assert (await health_of(service))[0] == 200


@pytest.mark.parametrize("known", [False, True])
async def test_a_connection_that_is_closed_before_any_byte_is_a_503_with_retry_after(known: bool) -> None:
    whole = [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
    async with speaking(*([whole] if known else []), [], []) as (url, _), serving(ollama_url=url) as service:
        if known:
            problem_in(await ask(service), 502, "engine_error")
        response = await ask(service)
        problem_in(response, 503, "engine_unreachable")
        assert int(response.headers["retry-after"]) >= 1


async def test_a_server_that_closes_every_connection_costs_one_answer_at_most() -> None:
    async with serving(script=Script(close_on_reuse=True)) as service:
        assert [(await ask(service)).status for _ in range(4)][1:] == [200] * 3


# --- Deadlines ---


async def test_a_badge_lives_while_the_engine_reads_other_courses() -> None:
    gate = asyncio.Event()
    slow = Script(pieces=split(badge_json(), 3), delay=0.8)
    async with serving(script=slow, token_timeout=0.4) as service, await service.connect() as connection:
        assert "TOKEN_TIMEOUT" in problem_in(await ask(service), 504, "engine_timeout")["detail"]
        writing = await connection.request("POST", "/generate", body=COURSE)
        await service.engine.wait_for_calls(2)
        service.engine.script = lambda body, index: Script(gate=gate)
        reading = await connection.request("POST", "/generate", body=COURSE)
        assert (await connection.response(writing)).status == 200
        gate.set()
        assert (await connection.response(reading)).status == 200


async def test_a_badge_lives_on_after_a_client_has_left_whose_course_was_read_beside_it() -> None:
    script = Script(pieces=split(badge_json(), 2), delay=1.5)
    async with serving(script=script, token_timeout=1.2) as service, await service.connect() as connection:
        writing = await connection.request("POST", "/generate", body=COURSE)
        await service.engine.wait_for_calls(1)
        service.engine.script = lambda body, index: Script(gate=asyncio.Event())
        reading = await connection.request("POST", "/generate", body=COURSE)
        await service.engine.wait_for_calls(2)
        await asyncio.sleep(0.9)
        connection.reset(reading)
        assert (await connection.response(writing)).status == 200


async def test_silence_counts_from_when_a_course_is_read_that_was_read_beside_it() -> None:
    writes = Script(pieces=split(badge_json(), 2), delay=2)
    script = lambda body, index: Script(first_delay=0.85) if index else writes  # noqa: E731
    async with serving(script=script, token_timeout=1.2) as service, await service.connect() as connection:
        writing = await connection.request("POST", "/generate", body=COURSE)
        await service.engine.wait_for_calls(1)
        assert (await connection.response(await connection.request("POST", "/generate", body=COURSE))).status == 200
        assert (await connection.response(writing)).status == 200


async def test_prompts_that_are_read_at_once_wait_for_each_other() -> None:
    async with (
        serving(
            script=lambda body, index: Script(first_delay=0.4 * (index % 4 + 1)), first_token_timeout=0.7
        ) as service,
        await service.connect() as connection,
    ):
        streams = [await connection.request("POST", "/generate", body=COURSE) for _ in range(4)]
        assert [(await connection.response(stream)).status for stream in streams] == [200] * 4
        service.engine.script = lambda body, index: Script(first_delay=1.6)
        response = await ask(service)  # alone
        told = problem_in(response, 504, "engine_timeout")["detail"]
        assert "FIRST_TOKEN_TIMEOUT" in told
        assert int(response.headers["retry-after"]) >= 1


async def test_a_prompt_waits_for_a_short_one_that_was_read_beside_it() -> None:
    script = lambda body, index: Script(first_delay=0.3 if index else 1)  # noqa: E731
    async with serving(script=script, first_token_timeout=0.7) as service, await service.connect() as connection:
        first = await connection.request("POST", "/generate", body=COURSE)
        await service.engine.wait_for_calls(1)
        second = await connection.request("POST", "/generate", body=COURSE)
        assert {(await connection.response(stream)).status for stream in (first, second)} == {200}


async def test_a_badge_that_is_written_without_end_is_ended_whatever_is_read_beside_it() -> None:
    script = lambda body, index: Script(first_delay=0.3) if index else SLOW  # noqa: E731
    waits = {"token_timeout": 0.4, "generation_timeout": 0.8}
    async with serving(script=script, **waits) as service, await service.connect() as connection:
        writing = await connection.request("POST", "/generate", body=COURSE)
        await service.engine.wait_for_calls(1)
        assert (await connection.response(await connection.request("POST", "/generate", body=COURSE))).status == 200
        assert "GENERATION_TIMEOUT" in (await connection.response(writing, 2)).json()["detail"]


@pytest.mark.slow
@pytest.mark.alone
async def test_an_engine_that_is_stuck_ends_within_its_bounds() -> None:
    waits = {"first_token_timeout": 0.3, "token_timeout": 0.3, "generation_timeout": 1.5, "max_concurrent_requests": 2}
    stuck = [Script(stall_after=2)] + [Script(stall_after=0)] * 9
    async with (
        serving(script=lambda body, index: stuck[index], **waits) as service,
        await service.connect() as connection,
    ):
        started = time.monotonic()
        streams = [await connection.request("POST", "/generate", body=COURSE) for _ in range(10)]
        told = [(await connection.response(stream)).json()["detail"] for stream in streams]
        await service.idle(0.5)
    told.sort(key=lambda one: "FIRST_TOKEN_TIMEOUT" in one)
    assert "GENERATION_TIMEOUT" in told[0]  # others were read all the time
    assert all("FIRST_TOKEN_TIMEOUT" in one for one in told[1:])
    assert time.monotonic() - started < 8


async def test_a_loop_is_a_failure_of_the_model_and_says_so() -> None:
    async with serving(script=Script(pieces=["a"] * 8200)) as service:
        assert "without end" in problem_in(await ask(service), 502, "invalid_model_output")["detail"]


# --- Nothing of a course, and nothing of what a model writes, is logged ---

SECRET = {"message": f"{MARKER}: seed, temperature, context length", "type": MARKER, "code": MARKER, "param": MARKER}
TAGGED = badge_json(name=MARKER)[:-1] + f', "tags": ["{MARKER}\\ud800", "\\ud800", "", 7, {{"a": "{MARKER}"}}]}}'
FAULTS = {
    "a refusal": Script(status=400, error=SECRET),
    "a refusal in plain text": Script(status=422, error=f"{MARKER} context window (top_p)".encode()),
    "a failure": Script(status=500, error={"error": SECRET}),
    "a failure that names memory": Script(status=500, error=f"{MARKER} requires more system memory ({MARKER})"),
    "a busy engine": Script(status=429, error=SECRET, retry_after="soon"),
    "an error in mid-stream": Script(pieces=[MARKER], error_line=MARKER),
    "a reset in mid-stream": Script(pieces=[MARKER] * 9, drop_after=4),
    "no JSON": Script(raw_chunks=[f"data: {MARKER}\n".encode()]),
    "records of other types": Script(raw_chunks=[b'data: {"choices": "%b", "usage": 3}\n' % MARKER.encode()]),
    "figures of other types": Script(raw_chunks=ndjson(badge_json(MARKER), prompt_eval_count=MARKER)),
    "an end that is not known": Script(pieces=[MARKER], done_reason=MARKER),
    "no badge": Script(pieces=[MARKER]),
    "a name that is too long": Script(pieces=[badge_json(name=MARKER * 20)]),
    "half characters": Script(pieces=[badge_json().replace("Ties", f"{MARKER} \\ud800")]),
    "a loop": Script(pieces=[MARKER] * 9000),
    "a good badge with odd tags": Script(pieces=[TAGGED]),
}


@ENGINES
async def test_no_log_line_holds_text_of_a_course_or_of_a_model(engine: type[ScriptedEngine]) -> None:
    lines: list[str] = []
    statuses = {}
    with logging_into(lines):
        async with serving(engine(), log_level="DEBUG") as service:
            for fault, script in FAULTS.items():
                service.engine.script = lambda body, index, script=script: script  # type: ignore[misc]
                body = {"content": f"{MARKER} and knots.", "institution": MARKER, "custom_instructions": MARKER}
                statuses[fault] = (await ask(service, body)).status
                await watch(service, body)
            await service.idle()
    assert statuses.pop("a good badge with odd tags") == statuses.pop("half characters") == 200
    assert not {fault: status for fault, status in statuses.items() if status not in (413, 502, 503)}
    assert len(lines) > 100
    assert not [line for line in lines if MARKER[:12] in line]

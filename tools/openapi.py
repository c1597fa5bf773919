"""Makes `examples/openapi.json` (OpenAPI 3.1): `make openapi`, after a change of routes, requests or errors.

The service serves that file as it stands. The models of what is asked are the service's own; those below describe what
is answered. Every example of an answer, an event or an error comes from the code that makes them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, RootModel
from pydantic.json_schema import models_json_schema

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dccapi
from dccapi import Answer, GenerateRequest, RegenerateRequest

# ---------------------------------------------------------------------------------------------------------------------
# What is answered
# ---------------------------------------------------------------------------------------------------------------------


class Accepted(BaseModel):
    """An asynchronous generation."""

    id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    events: str = Field(description="The path of its events.")


class Status(BaseModel):
    """A word."""

    status: Literal["alive", "ready"]


class Health(BaseModel):
    """Whether badges can be written now, and how many are."""

    status: Literal["healthy", "unhealthy"]
    engine: str
    ollama_url: str
    available_models: list[str]
    target_model: str
    model_available: bool
    model_path: str | None
    system_prompt_loaded: bool
    system_prompt_preview: str
    active_requests: int
    max_concurrent_requests: int
    queued_requests: int
    max_queue: int
    queue_status: Literal["ready", "busy", "full"]
    multiplexing_enabled: bool
    version: str
    error: str | None
    content_words_that_fit: int | None
    skills: list[dict[str, Any]] | None


class Extracted(BaseModel):
    """What a document says, with headings, lists and tables as Markdown writes them."""

    content: str
    title: str | None
    language: str
    pages: int | None
    words: int
    notes: list[dict[str, Any]]


class Skill(BaseModel):
    """A skill of the index, and how well it fits what was looked for, 0 to 1."""

    name: str
    url: str
    framework: str
    type: str
    score: float


class Skills(RootModel[list[Skill]]):
    """Skills of the index, best first."""


class UploadedDocument(BaseModel):
    """A form with one document, or a document's own bytes with their Content-Type."""

    file: str = Field(json_schema_extra={"format": "binary"})


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    error_code: str
    request_id: str
    timestamp: str
    errors: list[dict[str, Any]] | None = None


class GenerationState(Accepted):
    """A generation and what came of it."""

    position: int
    result: Answer | None
    error: Problem | None


class TokenEvent(BaseModel):
    """A piece of the text."""

    type: Literal["token"]
    content: str
    accumulated: str | None = Field(None, description="The text so far; absent with `accumulated=false`.")
    done: Literal[False]


class FinalEvent(BaseModel):
    """The badge. The last event."""

    type: Literal["final"]
    content: dccapi.Badge
    achievement: dict[str, Any]
    model: str
    usage: dccapi.TokenUsage
    finish_reason: Literal["stop", "length"]
    request_id: str


class ErrorEvent(BaseModel):
    """Why there is no badge. The last event."""

    type: Literal["error"]
    content: str
    error: str
    error_code: str
    request_id: str


class QueueEvent(BaseModel):
    """Named `queue`. Position 0 means running; the estimate is in seconds."""

    type: Literal["queue"]
    position: int
    estimated_wait: float


class PartialEvent(BaseModel):
    """Named `partial`, with `partial=true`: the badge as far as it is written."""

    type: Literal["partial"]
    badge: dict[str, Any]


EVENTS = (TokenEvent, FinalEvent, ErrorEvent, QueueEvent, PartialEvent)


def reference(schema: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"}


class Event(BaseModel):
    """A Server-Sent Event. The last of a stream is one `final` or one `error`; `retry` comes once, comments between.

    Unnamed: `token`, `final` and `error`. Named: `queue` and, on request, `partial`.
    An `id` sent back as `Last-Event-ID` goes on after it; 204 says that nothing is left.
    """

    id: str | None = None
    event: Literal["message", "queue", "partial"] = "message"
    data: str = Field(
        json_schema_extra={
            "contentMediaType": "application/json",
            "contentSchema": {"oneOf": [reference(model.__name__) for model in EVENTS]},
        }
    )


class Links(RootModel[dict[str, Any]]):
    """The paths; the demo page to a client that accepts HTML."""


class Document(RootModel[dict[str, Any]]):
    """OpenAPI 3.1."""


class Page(RootModel[str]):
    """A page for people."""


class Samples(RootModel[str]):
    """Prometheus' text format."""


# Schemas of requests say what is taken, those of answers what is given. Those of credentials stand in a file.
ASKED = (GenerateRequest, RegenerateRequest, UploadedDocument)
ANSWERED = (Answer, Accepted, GenerationState, Extracted, Skills, Health, Status, Problem, Event, *EVENTS)
PAGES = (Links, Document, Page, Samples)
# Others are JSON.
MEDIA_TYPES = {
    "UploadedDocument": "multipart/form-data",
    "Event": "text/event-stream",
    "Page": "text/html",
    "Samples": "text/plain",
}

# ---------------------------------------------------------------------------------------------------------------------
# The operations
# ---------------------------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """A method of a path: what it answers, and which problems it may have beside those that all have."""

    method: str
    path: str
    tag: str
    summary: str
    answers: Mapping[str, Sequence[str]]  # schemas by status: of one or more media types, or none for no body
    problems: str = ""
    parameters: Sequence[str] = ()
    body: str = ""  # its schema


WRITING = "409 429 502 503 504"
VIEWS = ("accumulated", "partial")
RESUME = ("Last-Event-ID", *VIEWS)
POSTED = ("Idempotency-Key", "Prefer", *VIEWS)
POSTED_STREAM = ("Idempotency-Key", *VIEWS)
QUERY = (*(name for name in GenerateRequest.model_fields if name not in ("badge_configuration", "stream")), RESUME[0])
WRITTEN: dict[str, Sequence[str]] = {"200": ["Answer", "Event"], "202": ["Accepted"]}
STREAMED: dict[str, Sequence[str]] = {"200": ["Event"]}
AWARDED: dict[str, Sequence[str]] = {"200": ["OpenBadgeCredential"]}
RESUMED: dict[str, Sequence[str]] = {"200": ["Event"], "204": []}

GENERATE = "A badge as JSON or, where they are accepted, as events; 202 and its URL with Prefer: respond-async."
STREAM = "A badge as Server-Sent Events."
EVENTSOURCE = "The same for an EventSource; one that comes back goes on where it was."
REGENERATE = "The badge with one field written anew, answered as /generate answers."
CREDENTIALS = "An unsigned OpenBadgeCredential; no engine is involved."
EXTRACT = "The text of a document (PDF, DOCX, PPTX, ODT, HTML, Markdown, text); no engine is involved."
CANCEL = "Cancel a generation; its state stays to be seen."
FOLLOW = "The events from the start, or after Last-Event-ID. This address needs no key: nobody can guess it."
HEALTH = "Engine, model and queue; 503 when no badge could be written now."
METRICS = "For Prometheus, in the format that it asks for."
INDEX = "The demo page to a browser, the paths to others."

OPERATIONS = (
    *(
        one
        for path in ("/generate", "/generate-badge-suggestions")
        for one in (
            Operation("post", path, "Badges", GENERATE, WRITTEN, WRITING, POSTED, "GenerateRequest"),
            Operation("post", f"{path}/stream", "Badges", STREAM, STREAMED, WRITING, POSTED_STREAM, "GenerateRequest"),
            Operation("get", f"{path}/stream", "Badges", EVENTSOURCE, RESUMED, "413 422 429 503", QUERY),
        )
    ),
    Operation("post", "/regenerate-field", "Badges", REGENERATE, WRITTEN, WRITING, POSTED, "RegenerateRequest"),
    Operation("post", "/credentials", "Badges", CREDENTIALS, AWARDED, body="CredentialRequest"),
    Operation("post", "/extract", "Badges", EXTRACT, {"200": ["Extracted"]}, "429 503", body="UploadedDocument"),
    Operation("get", "/skills", "Badges", "Skills of the index.", {"200": ["Skills"]}, "404 422 503", ["q"]),
    Operation("get", "/generations/{id}", "Badges", "State and result of a generation.", {"200": ["GenerationState"]}),
    Operation("delete", "/generations/{id}", "Badges", CANCEL, {"204": []}),
    Operation("get", "/generations/{id}/events", "Badges", FOLLOW, RESUMED, "422", RESUME),
    Operation("get", "/health", "State", HEALTH, {"200": ["Health"], "503": ["Health"]}),
    Operation("get", "/livez", "State", "The process is up.", {"200": ["Status"]}),
    Operation("get", "/readyz", "State", "Engine and model are ready.", {"200": ["Status"]}, "503"),
    Operation("get", "/metrics", "State", METRICS, {"200": ["Samples"]}),
    Operation("get", "/", "Pages", INDEX, {"200": ["Links", "Page"]}),
    Operation("get", "/demo", "Pages", "The demo page.", {"200": ["Page"]}, "404"),
    Operation("get", "/docs", "Pages", "Swagger UI, without any other host.", {"200": ["Page"]}),
    Operation("get", "/openapi.json", "Pages", "This document.", {"200": ["Document"]}, "404"),
)

# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------

URN = "urn:uuid:0b9d1f0a-63a4-4c1e-9c53-2f4f5d0c7a11"
ID, REQUEST_ID = "Y7oWQd0Bq1xK3nZ5uT8vRg", "3f0c6c0a5b8e4e0f9a1d2c3b4a5f6e7d"
COURSE = {"content": "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."}
OPTIONS = {"badge_style": "Technical", "badge_level": "Beginner", "institution": "Example University", "seed": 1}
BADGE = dccapi.Badge(
    badge_name="Knots for Climbers",
    badge_description="Ties and checks the knots that climbers trust their lives to.",
    criteria=dccapi.Criteria(narrative="Tied the figure eight, the clove hitch and the prusik in an exam on the wall."),
)
AWARD = {
    "badge": BADGE.model_dump(),
    "issuer": {"id": "https://example.edu", "name": "Example University"},
    "valid_from": "2026-01-31T12:00:00Z",
}
EXTRACTED: dict[str, Any] = {
    "content": "# Knots for climbers\n\nFigure eight, clove hitch, prusik.",
    "title": "Knots for climbers",
    "language": "en",
    "pages": None,
    "words": 9,
    "notes": [],
}
SKILL: dict[str, Any] = {
    "name": "JavaScript",
    "url": "http://data.europa.eu/esco/skill/fd33c66c-70c4-40e6-b87c-03495bbfcf8d",
    "framework": "ESCO",
    "type": "ext:ESCOAlignment",
    "score": 0.99,
}
REVIEW: dict[str, Any] = {
    "language": "en",
    "support": 0.9,
    "sentences": [
        {
            "field": "badge_description",
            "text": BADGE.badge_description,
            "support": 0.9,
            "source": "Knots for climbers: figure eight, clove hitch, prusik.",
        }
    ],
    "notes": [],
}
PARAMETERS = {
    "q": "java",
    "content": COURSE["content"],
    "id": ID,
    "Prefer": "respond-async",
    "Idempotency-Key": "course-4711",
    "Last-Event-ID": f"{ID}.2",
}

Examples = dict[str, dict[str, Any]]


def asked() -> Examples:
    """Examples of bodies, by schema and name."""
    return {
        "GenerateRequest": {"short": COURSE, "with options": {**COURSE, **OPTIONS}},
        "RegenerateRequest": {"a name": {**COURSE, "badge": AWARD["badge"], "field": "badge_name"}},
        "CredentialRequest": {"a badge": AWARD},
        "UploadedDocument": {"a text": {"file": COURSE["content"]}},
    }


def answered() -> Examples:
    """Examples of answers, by schema and name; what is random or of today is fixed."""
    answer = Answer(
        response=BADGE,
        achievement=dccapi.build_achievement(BADGE) | {"id": URN},
        model="phi4badges",
        usage=dccapi.TokenUsage(prompt_tokens=540, completion_tokens=96, total_tokens=636),
        finish_reason="stop",
        request_id=REQUEST_ID,
        review=REVIEW,
    )
    credential = dccapi.build_credential(AWARD) | {"id": URN}
    credential["credentialSubject"]["achievement"]["id"] = URN
    accepted = dccapi.accepted(generation([]))
    waiting = {**accepted, "position": 3, "result": None, "error": None}
    done = {**waiting, "status": "succeeded", "position": 0, "result": answer.model_dump()}
    return {
        "Answer": {"a badge": answer.model_dump()},
        "Accepted": {"waiting": accepted},
        "GenerationState": {"waiting": waiting, "done": done},
        "OpenBadgeCredential": {"unsigned": credential},
        "Event": {
            "a badge": "retry: 1000\n\n" + events(0, ['{"badge_name": "Kn', "ots", answer]),
            "an error": events(2, ['{"badge_name": "Kn', "ots", dccapi.EngineTimeout()]),
        },
        "Extracted": {"a text": EXTRACTED},
        "Skills": {"one": [SKILL]},
        "Health": {"busy": health()},
        "Status": {"up": {"status": "alive"}, "ready": {"status": "ready"}},
        "Samples": {"a gauge": "# TYPE dccapi_queue_depth gauge\ndccapi_queue_depth 3.0\n"},
        "Links": {"some": {"name": "dccapi", "version": dccapi.__version__, "links": {"generate": "/generate"}}},
        "Document": {"its beginning": {"openapi": "3.1.0"}},
        "Page": {"a page": "<!doctype html>…"},
    }


def generation(log: list[str | Answer | dccapi.ApiError]) -> dccapi.Generation:
    return dccapi.Generation(
        "",
        REQUEST_ID,
        id=ID,
        log=log,
    )


def events(seen: int, log: list[str | Answer | dccapi.ApiError]) -> str:
    """The events of a generation after those that its reader has seen."""
    encoder = dccapi.EventEncoder(generation(log), dccapi.StreamOptions(partial=True), seen)
    position = b"" if seen else encoder.queue(3, 12.5)
    return (position + encoder.pending()).decode()


def health() -> dict[str, Any]:
    return dict.fromkeys(Health.model_fields) | {
        "status": "healthy",
        "engine": "ollama",
        "ollama_url": "http://localhost:11434",
        "available_models": ["phi4badges:latest"],
        "target_model": "phi4badges",
        "model_available": True,
        "system_prompt_loaded": True,
        "system_prompt_preview": "You write Open Badges 3.0 metadata…",
        "active_requests": 4,
        "max_concurrent_requests": 4,
        "queued_requests": 3,
        "max_queue": 64,
        "queue_status": "busy",
        "multiplexing_enabled": True,
        "version": dccapi.__version__,
        "content_words_that_fit": 3500,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    schemas = component_schemas()
    examples = {**asked(), **answered()}
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = operation(one, schemas, examples)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dccapi",
            "version": dccapi.__version__,
            "license": {"name": "MIT", "identifier": "MIT"},
            "description": "Open Badges 3.0 drafts from course descriptions. Every path stands at the root as well.",
        },
        "externalDocs": {
            "description": "The API with examples; docs/README.md names the other documents.",
            "url": "docs/api.md",
        },
        "servers": [{"url": "/api/v1"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": problem_responses(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def component_schemas() -> dict[str, Any]:
    """The schemas of all models, by name."""
    models: Any = [(model, "validation") for model in ASKED]
    models += [(model, "serialization") for model in (*ANSWERED, *PAGES)]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = definitions["$defs"]
    for name in ("GenerateRequest", "RegenerateRequest", "BadgeOptions"):
        describe_options(schemas[name])
    for name in ("GenerateRequest", "RegenerateRequest"):
        describe_content(schemas[name])
    for file in sorted(dccapi.OPENAPI.parent.glob("*.schema.json")):
        schemas |= definitions_of(file, schemas.keys())
    for name in ("Answer", "FinalEvent"):
        schemas[name]["properties"]["achievement"] = reference("Achievement")
    return schemas


# Readers of OpenAPI unfold what refers to itself until they give up: these stay closed. The service checks them.
CLOSED: dict[str, Any] = {
    "Node": {"description": "What the contexts define everywhere, and names that are URIs."},
    "Anything": {"description": "What JSON-LD keeps."},
    "Reference": {"description": "URIs, or objects."},
    "ParentOrg": {"type": "object", "description": "A Profile."},
    "EndorsementCredential": {"type": "object", "description": "An Open Badges 3.0 EndorsementCredential."},
}


def definitions_of(file: Path, taken: Container[str]) -> dict[str, Any]:
    """The `$defs` of a JSON schema that the service validates with; a name that is taken gets the file's in front."""
    text = file.read_text("utf-8")
    prefix = re.sub(r"\W", "_", file.name.removesuffix(".schema.json"))
    names = {name: f"{prefix}_{name}" if name in taken else name for name in json.loads(text)["$defs"]}
    text = re.sub(r'"#/\$defs/(\w+)"', lambda found: json.dumps(reference(names[found[1]])["$ref"]), text)
    schemas = {names[name]: CLOSED.get(name, schema) for name, schema in json.loads(text)["$defs"].items()}
    for schema in schemas.values():  # without `Node`, nothing is known to be one name too many
        schema.pop("unevaluatedProperties", None)
    return schemas


def describe_options(schema: dict[str, Any]) -> None:
    """Say of a request what its validators in code do: the choices, and what stands for "not given"."""
    properties = schema["properties"]
    properties |= {choice: {"enum": list(values)} for choice, values in dccapi.CHOICES.items()}
    for name in properties.keys() - {"content", "badge", "field"}:
        properties[name] = {"anyOf": [properties[name], {"enum": [*dccapi.NOT_GIVEN, None]}]}


def describe_content(schema: dict[str, Any]) -> None:
    """`course_input` stands for `content` where that is not given, and is ignored where it is."""
    absent = {"enum": [*dccapi.NOT_GIVEN, None]}
    instead = {"course_input": schema["properties"]["content"], "content": absent}
    schema["anyOf"] = [{"required": ["content"]}, {"properties": instead, "required": ["course_input"]}]
    schema["required"].remove("content")


def problem_responses() -> dict[str, Any]:
    """A response for each status, with an example for each error that has it."""
    faults = [{"loc": ["content"], "msg": "Field required", "type": "missing"}]
    examples: dict[str, dict[str, Any]] = {}
    for kind in dccapi.ApiError.__subclasses__():
        error = kind(errors=faults) if kind is dccapi.InvalidRequest else kind()
        problem = dccapi.problem(error, REQUEST_ID) | {"timestamp": "2026-01-31T12:00:00.000+00:00"}
        examples.setdefault(str(kind.status), {})[kind.code] = problem
    return {
        status: {
            "description": ", ".join(problem["title"] for problem in named.values()),
            "content": content("application/problem+json", "Problem", named),
        }
        for status, named in examples.items()
    }


def content(media_type: str, schema: str, examples: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: {"value": value} for name, value in examples.items()}
    return {media_type: {"schema": reference(schema), "examples": named}}


def operation(one: Operation, schemas: dict[str, Any], examples: Examples) -> dict[str, Any]:
    names = (*re.findall(r"{(\w+)}", one.path), *one.parameters)
    described: dict[str, Any] = {
        "summary": one.summary,
        "tags": [one.tag],
        "operationId": f"{one.method}_{re.sub('[^a-z]+', '_', one.path).strip('_')}".strip("_"),
        "parameters": [parameter(name, schemas["GenerateRequest"]["properties"]) for name in names],
        "responses": responses(one, schemas, examples),
    }
    if one.body:
        described["requestBody"] = {
            "required": True,
            "content": content(MEDIA_TYPES.get(one.body, "application/json"), one.body, examples[one.body]),
        }
    if one.path in dccapi.OPEN_PATHS:
        described["security"] = []
    return described


def responses(one: Operation, schemas: dict[str, Any], examples: Examples) -> dict[str, Any]:
    problems = ["403", "414", *one.problems.split()]
    problems += ["400", "408", "413", "415", "422"] if one.body else []
    problems += ["404"] if "{id}" in one.path else []
    problems += ["401"] if one.path not in dccapi.OPEN_PATHS else []
    described: dict[str, Any] = {code: {"$ref": f"#/components/responses/{code}"} for code in sorted(problems)}
    for status, names in one.answers.items():
        described[status] = {"description": schemas[names[0]]["description"] if names else "No content"}
        for name in names:
            media_type = MEDIA_TYPES.get(name, "application/json")
            described[status].setdefault("content", {}).update(content(media_type, name, examples[name]))
    return described


def parameter(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    example = {"example": PARAMETERS[name]} if name in PARAMETERS else {}
    if name in fields:
        return {"name": name, "in": "query", "required": name == "content", "schema": fields[name], **example}
    if name == "q":
        return {"name": name, "in": "query", "required": True, "schema": {"type": "string"}, **example}
    if name == "id":
        return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, **example}
    pattern = {"pattern": "^[!-~]{1,255}$"} if name == "Idempotency-Key" else {}
    # Swagger UI would send the parameter's `example` with every request, and get no badge.
    schema = {"type": "string", **pattern, "examples": [PARAMETERS[name]]}
    return {"name": name, "in": "header", "required": False, "schema": schema}


def text() -> str:
    """What stands in the file."""
    return json.dumps(document(), ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    dccapi.OPENAPI.write_text(text(), "utf-8")

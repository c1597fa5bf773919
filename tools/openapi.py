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
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, Field, RootModel
from pydantic.json_schema import models_json_schema

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dccapi
from dccapi import GenerateRequest, RegenerateRequest

# ---------------------------------------------------------------------------------------------------------------------
# What is answered
# ---------------------------------------------------------------------------------------------------------------------


class Note(BaseModel):
    """What to look at before a draft or a text is used. `code` is a word for programs."""

    code: str
    field: str
    text: str
    message: str


class ReviewedSentence(BaseModel):
    """A sentence of the draft and the sentence of the course that bears it most."""

    field: str
    text: str
    support: float | None
    source: str


class Review(BaseModel):
    """What a draft says that its course does not. `support` is a share of 0 to 1."""

    language: str
    support: float | None
    sentences: list[ReviewedSentence]
    notes: list[Note]


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Written(BaseModel):
    """What comes with every badge."""

    achievement: dict[str, Any]  # its schema stands in a file
    model: str
    usage: TokenUsage
    finish_reason: Literal["stop", "length"]
    request_id: str
    review: Review | None = Field(description="null where the draft could not be reviewed.")


class Answer(Written):
    """A finished badge (contract 3.2)."""

    response: dccapi.Badge


class Accepted(BaseModel):
    """An asynchronous generation."""

    id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    events: str = Field(description="The path of its events.")


class Status(BaseModel):
    """A word."""

    status: Literal["alive", "ready"]


class Framework(BaseModel):
    """Where skills of the index come from, and on what terms."""

    name: str
    version: str
    licence: str
    notice: str
    skills: int


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
    skills: list[Framework] | None


class Extracted(BaseModel):
    """What a document says, with headings, lists and tables as Markdown writes them."""

    content: str
    title: str | None
    language: str
    pages: int | None
    words: int
    notes: list[Note]


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


class Fault(BaseModel):
    """A fault of a request: where it is, what to do, and its kind."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    error_code: str
    request_id: str
    timestamp: str
    errors: list[Fault] = Field([], description="Every fault of a request that is not valid (422).")


class GenerationState(Accepted):
    """A generation and what came of it."""

    position: int
    result: Answer | None
    error: Problem | None


class TokenEvent(BaseModel):
    """A piece of the text."""

    type: Literal["token"]
    content: str
    accumulated: str = Field("", description="The text so far; absent with `accumulated=false`.")
    done: Literal[False]


class FinalEvent(Written):
    """The badge. The last event."""

    type: Literal["final"]
    content: dccapi.Badge


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


class EventStream(RootModel[str | Event]):
    """Server-Sent Events. OpenAPI 3.1 has one schema for both: their text as a whole, and each of them."""


class Links(BaseModel):
    """The paths; the demo page to a client that accepts HTML."""

    name: str
    version: str
    links: dict[str, str]


class Document(RootModel[dict[str, Any]]):
    """OpenAPI 3.1."""


class Page(RootModel[str]):
    """A page for people."""


class Samples(RootModel[str]):
    """Prometheus' text format."""


# Schemas of requests say what is taken, those of answers what is given. Those of credentials stand in a file.
ASKED = (GenerateRequest, RegenerateRequest, UploadedDocument)
ANSWERED = (Answer, Accepted, GenerationState, Extracted, Skills, Health, Status, Problem, Event, *EVENTS)
TEXTS = (EventStream, Links, Document, Page, Samples)
# Others are JSON.
MEDIA_TYPES = {
    "UploadedDocument": "multipart/form-data",
    "EventStream": "text/event-stream",
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
WRITTEN: dict[str, Sequence[str]] = {"200": ["Answer", "EventStream"], "202": ["Accepted"]}
STREAMED: dict[str, Sequence[str]] = {"200": ["EventStream"]}
AWARDED: dict[str, Sequence[str]] = {"200": ["OpenBadgeCredential"]}
RESUMED: dict[str, Sequence[str]] = {"200": ["EventStream"], "204": []}

GENERATE = "A badge as JSON or, where they are accepted, as events; 202 and its URL with Prefer: respond-async."
STREAM = "A badge as Server-Sent Events."
EVENTSOURCE = "The same for an EventSource; one that comes back goes on where it was."
REGENERATE = "The badge with one field written anew, answered as /generate answers."
CREDENTIALS = "An unsigned OpenBadgeCredential; no engine is involved."
EXTRACT = "The text of a document (PDF, DOCX, PPTX, ODT, HTML, Markdown, text); no engine is involved."
CANCEL = "Cancel a generation; its state stays to be seen."
FOLLOW = "The events from the start, or after Last-Event-ID. This address needs no key: nobody can guess it."
HEALTH = "Engine, model and queue; 503 when no badge could be written now."
METRICS = "For Prometheus, in its text format."
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
    Operation("get", "/docs", "Pages", "Swagger UI, without any other host.", {"200": ["Page"]}, "404"),
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
    answer = {
        "response": BADGE.model_dump(),
        "achievement": dccapi.build_achievement(BADGE.model_dump()) | {"id": URN},
        "model": "phi4badges",
        "usage": {"prompt_tokens": 540, "completion_tokens": 96, "total_tokens": 636},
        "finish_reason": "stop",
        "request_id": REQUEST_ID,
        "review": REVIEW,
    }
    credential = dccapi.build_credential(AWARD) | {"id": URN}
    credential["credentialSubject"]["achievement"]["id"] = URN
    accepted = {"id": ID, "status": "queued", "events": f"/api/v1/generations/{ID}/events"}
    waiting = {**accepted, "position": 3, "result": None, "error": None}
    done = {**waiting, "status": "succeeded", "position": 0, "result": answer}
    return {
        "Answer": {"a badge": answer},
        "Accepted": {"waiting": accepted},
        "GenerationState": {"waiting": waiting, "done": done},
        "OpenBadgeCredential": {"unsigned": credential},
        "EventStream": {
            "a badge": "retry: 1000\n\n" + events(0, answer),
            "an error": events(2, dccapi.EngineTimeout()),
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


def events(seen: int, outcome: dccapi.Answer | dccapi.ApiError) -> str:
    """The events of a generation after those that its reader has seen."""
    generation = dccapi.Generation("", REQUEST_ID, id=ID, log=['{"badge_name": "Kn', "ots"], outcome=outcome)
    encoder = dccapi.EventEncoder(generation, dccapi.StreamOptions(partial=True), seen)
    position = b"" if seen else encoder.event("queue", {"position": 3, "estimated_wait": 12.5})
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


CHOICES: dict[str, Sequence[str]] = {
    **{choice: get_args(kind) for choice, kind in dccapi.CHOICES.items()},
    "long_content": get_args(GenerateRequest.model_fields["long_content"].annotation),
}


def component_schemas() -> dict[str, Any]:
    """The schemas of all models, by name."""
    models: Any = [(model, "validation") for model in ASKED]
    models += [(model, "serialization") for model in (*ANSWERED, *TEXTS)]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = definitions["$defs"]
    for model in ANSWERED:
        for field in schemas[model.__name__].get("properties", {}).values():
            field.pop("default", None)  # generators of clients take what has one for what is always there
    for name in ("Answer", "FinalEvent"):
        schemas[name]["properties"]["achievement"] = reference("Achievement")
    for name in ("GenerateRequest", "RegenerateRequest", "BadgeOptions"):
        describe_options(schemas[name])
    schemas |= {schema_of(choice): {"type": "string", "enum": [*values]} for choice, values in CHOICES.items()}
    schemas["NotGiven"] = {"description": "The same as no value.", "type": "string", "enum": [*dccapi.NOT_GIVEN]}
    for file in sorted(dccapi.OPENAPI.parent.glob("*.schema.json")):
        schemas |= definitions_of(file, schemas.keys())
    schemas["Achievement"]["properties"]["alignment"] = {"type": "array", "items": reference("Alignment")}  # of `Node`
    take_null(schemas["CredentialRequest"])
    return schemas


def take_null(request: dict[str, Any]) -> None:
    """Say of a credential's request what its builder does before it is validated: null is the same as not given."""
    null = {"type": "null"}
    for name, part in request["properties"].items():
        if name not in request["required"]:
            told = {"description": part.pop("description")} if "description" in part else {}
            request["properties"][name] = told | {"anyOf": [part, null]}
    request["if"]["properties"] = {"badge": {"not": null}}
    request["then"] = {"properties": {"achievement": null}}
    request["else"]["properties"] = {"achievement": {"not": null}}


def schema_of(choice: str) -> str:
    """The name of the schema of a choice: generators of clients make one type of it."""
    return choice.title().replace("_", "")


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
    definitions = json.loads(text)["$defs"]
    return {names[name]: CLOSED.get(name) or readable(schema) for name, schema in definitions.items()}


def readable(node: Any) -> Any:
    """The same for generators of clients: they read nothing beside a `$ref`, neither `if` nor `then`, and no choice
    of constants."""
    if not isinstance(node, dict):
        return [readable(item) for item in node] if isinstance(node, list) else node
    schema = {name: readable(value) for name, value in node.items()}
    for place in schema.get("prefixItems", ()):
        if "const" in place:
            place |= {"type": "string", "enum": [place.pop("const")]}
    schema.pop("unevaluatedProperties", None)  # without `Node`, nothing is known to be one name too many
    if schema.get("if") == {"type": "string"}:
        return {"anyOf": [schema["then"], schema["else"]]}  # the other is no string
    if schema.keys() & {"properties", "required"} and "$ref" in schema:
        base = {"$ref": schema.pop("$ref")}
        return schema if base == reference("Node") else {"allOf": [base], **schema}
    return schema


def describe_options(schema: dict[str, Any]) -> None:
    """Say of a request what its validators in code do: the choices, and what stands for "not given".

    A default stands with its type: where it stands with the field, generators of clients ask for the field or send it.
    """
    for name in schema["properties"].keys() - {"content", "badge", "field"}:
        field = schema["properties"][name]
        field.pop("title", None)
        described = {"description": field.pop("description")} if "description" in field else {}
        default = {"default": field.pop("default")} if field.get("default") is not None else {}
        kinds = [reference(schema_of(name))] if name in CHOICES else field.pop("anyOf", [field])
        given = [kind | default for kind in kinds if kind != {"type": "null"}]
        schema["properties"][name] = described | {"anyOf": [*given, reference("NotGiven"), {"type": "null"}]}


def problem_responses() -> dict[str, Any]:
    """A response for each status, with an example for each error that has it."""
    faults = [{"loc": ["content"], "msg": "Field required", "type": "missing"}]
    examples: dict[str, dict[str, Any]] = {}
    for kind in dccapi.ApiError.__subclasses__():
        error = kind(errors=faults) if kind is dccapi.InvalidRequest else kind()
        problem = error.problem(REQUEST_ID) | {"timestamp": "2026-01-31T12:00:00.000+00:00"}
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
        "operationId": f"{one.method}_{re.sub('[^a-z]+', '_', one.path).strip('_') or 'index'}",
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
    problems = ["403", *one.problems.split()]
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

"""Open Badges 3.0: achievements and credentials, against the official judge and its samples."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings as hypothesis_settings, strategies as st
from pyld import jsonld

import dccapi
from service import BADGE, HERE, ISSUER, OB3, judge

__all__ = ["judge"]  # the fixture

ALL_CHECKS = ("schema", "rules", "jsonld", "dcc")


def credential(**fields: Any) -> dict[str, Any]:
    """What POST /credentials answers."""
    subject = {} if "badge" in fields or "achievement" in fields else {"badge": BADGE}
    return dccapi.build_credential({**subject, "issuer": ISSUER, **fields})


AWKWARD = (
    '"', "'", "\\", "{{", "}}", "{{{name}}}", "{", "}", "{\x00{", "\r\n", "\n\n", "\t", "\x00", "\x1b[31m", "\x7f",
    "\x85", "🧪", "👩‍🔬", "🇪🇸", "שלום", "مرحبا بالعالم", "\u202eabc\u202c", "\u2028", "日本語", "é", "e\u0301",
    "**bold**", "# Title\n", "- item\n", "[link](https://example.org/?a={{b}})", "`code`", "| a | b |\n",
    "<b>&amp;</b>", "@id", "_:x",
)  # fmt: skip
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(AWKWARD)
visible = st.builds("{} x {}".format, words, words)
texts = st.lists(words, max_size=12).map("".join).flatmap(lambda text: st.just(text + "x") | st.just("x" + text))
long_texts = st.builds(lambda text: (text * 20_000).encode()[:20_000].decode(errors="ignore"), visible)
badges = st.builds(
    lambda name, description, narrative: {
        "badge_name": name,
        "badge_description": description,
        "criteria": {"narrative": narrative},
    },
    visible,
    texts,
    texts | long_texts,
)
PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
options = st.fixed_dictionaries(
    {},
    optional={
        "recipient_id": st.sampled_from(["did:key:z6Mk", "mailto:jane@example.edu", None]),
        "valid_from": st.sampled_from(["2026-01-15T00:00:00Z", "2026-01-15T00:00:00.5+02:00", None]),
        "valid_until": st.sampled_from(["2999-01-01T00:00:00-05:00", None]),
        "image": st.sampled_from([PNG, "https://example.edu/a.svg", {"id": PNG, "caption": "{{a knot}}"}]),
        "achievement_type": st.sampled_from(["Course", "ext:Knot.Course_1-a"]),
        "alignment": st.sampled_from([[{"targetName": "Knots }}", "targetUrl": "https://example.org/k#1"}]]),
    },
)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(badge=badges, fields=options)
@example(badge=BADGE, fields={"image": PNG, "achievement_type": "Course"})
def test_any_badge_gives_a_credential_that_the_judge_and_dcc_accept(judge: Any, badge: Any, fields: Any) -> None:
    document = json.loads(json.dumps(credential(badge=badge, **fields), ensure_ascii=False))
    verdict = judge.judge(document, "credential", checks=("schema", "rules", "jsonld", "dcc"))
    assert verdict["valid"], verdict["errors"]


CONTEXTS = {dccapi.VC_CONTEXT: "credentials-v2.jsonld", dccapi.OB_CONTEXT: "ob-v3p0-3.0.3.json"}


def expanded(document: dict[str, Any]) -> list[dict[str, Any]]:
    """JSON-LD expansion with local contexts, in safe mode: a term that would be dropped is an error."""

    def load(url: str, options: object = None) -> dict[str, Any]:
        context = json.loads((HERE / "examples" / "contexts" / CONTEXTS[url]).read_text("utf-8"))
        return {"contentType": "application/ld+json", "contextUrl": None, "documentUrl": url, "document": context}

    def refuse(term: object) -> None:
        raise AssertionError(f"dropped on expansion: {term}")

    return jsonld.expand(document, {"documentLoader": load, "base": None}, on_property_dropped=refuse)


def leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "@context":
                yield from leaves(value)
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value)
    else:
        yield node


def values_of(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict) and "@value" in node:
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from values_of(value)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(badge=badges, fields=options)
def test_no_term_is_lost_on_expansion_and_no_text_is_a_template(badge: Any, fields: Any) -> None:
    document = credential(badge=badge, **fields)
    values = [value["@value"] for value in values_of(expanded(document))]
    achievement = document["credentialSubject"]["achievement"]
    for text in (achievement["name"], achievement["description"], achievement["criteria"]["narrative"]):
        assert text in values
    for leaf in leaves(document):
        assert leaf not in (None, "", [], {})
        assert not re.search(r"\{\{|\}\}|[\x00-\x08\x0b-\x1f\x7f-\x9f]", leaf)
    assert set(document) - {"validUntil"} == {
        "@context", "id", "type", "issuer", "validFrom", "credentialSubject"
    }  # fmt: skip
    assert datetime.fromisoformat(document["validFrom"]).tzinfo
    assert len(json.dumps(document, ensure_ascii=False).encode()) < 100 * 1024


@pytest.mark.parametrize("checks", [("schema", "rules", "jsonld")])
def test_the_achievement_of_a_generation_is_valid_and_says_what_the_request_knows(judge: Any, checks: Any) -> None:
    request = dccapi.GenerateRequest.model_validate(
        {
            "content": "Knots",
            "badge_configuration": {"institution": "Harbour {{School}}", "institute_url": "https://h.edu"},
        }
    )
    document = dccapi.build_achievement(BADGE, request, tag=["knots", "ropes"], alignment=[])
    assert judge.judge(document, "achievement", checks=checks)["valid"]
    assert list(document)[:6] == ["@context", "id", "type", "name", "description", "criteria"]
    assert document["creator"] == {
        "id": "https://h.edu", "type": ["Profile"], "name": "Harbour { {School} }", "url": "https://h.edu"
    }  # fmt: skip
    assert document["tag"] == ["knots", "ropes"]
    assert document["achievementType"] == "Badge"
    assert "alignment" not in document


def test_an_achievement_says_nothing_that_is_not_known() -> None:
    request = dccapi.GenerateRequest.model_validate({"content": "Knots", "institution": "Harbour School"})
    document = dccapi.build_achievement(BADGE, request)
    assert set(document) == {"@context", "id", "type", "name", "description", "criteria", "achievementType"}
    assert document["criteria"] == BADGE["criteria"]
    expanded(document)


@pytest.mark.parametrize("institution", ["\x00", "   ", "x\x1b"])
@pytest.mark.parametrize("url", ["http://#", "https://h.edu/%zz", "https://h.edu/"])
def test_an_institution_that_cannot_be_written_does_not_cost_the_badge(institution: str, url: str) -> None:
    fields = {"content": "Knots", "institution": institution, "institute_url": url}
    request = dccapi.GenerateRequest.model_validate(fields)
    document = dccapi.build_achievement(BADGE, request)
    assert document.get("creator", {}).get("name") in (None, "x")
    assert ("creator" in document) == (url == "https://h.edu/")


def test_an_achievement_of_ours_can_be_posted_back() -> None:
    achievement = dccapi.build_achievement(BADGE)
    document = credential(achievement=achievement, recipient_id="did:key:z6Mk")
    assert document["credentialSubject"]["id"] == "did:key:z6Mk"
    assert document["credentialSubject"]["achievement"] == {k: v for k, v in achievement.items() if k != "@context"}


ACHIEVEMENT = {
    "@context": [dccapi.VC_CONTEXT, dccapi.OB_CONTEXT],
    "id": "urn:uuid:0f1e4b0e-6f8a-4f0b-9a53-0d3c1f3a7b11",
    "type": ["Achievement"],
    "name": "Knots",
    "description": "Ties knots.",
    "criteria": {"narrative": "Tied six knots."},
}


ENDORSEMENT = {
    "@context": [dccapi.VC_CONTEXT, dccapi.OB_CONTEXT],
    "id": "urn:uuid:0f1e4b0e-6f8a-4f0b-9a53-0d3c1f3a7b12",
    "type": ["VerifiableCredential", "EndorsementCredential"],
    "name": "Good knots",
    "issuer": {"id": "https://harbour.edu", "type": ["Profile"]},
    "validFrom": "2026-01-15T00:00:00Z",
    "credentialSubject": {"id": "urn:uuid:0f1e4b0e-6f8a-4f0b-9a53-0d3c1f3a7b11", "type": ["EndorsementSubject"]},
}


def test_in_language_is_written_only_when_it_is_asked_for() -> None:
    for fields in ({"badge": BADGE}, {"achievement": {**ACHIEVEMENT, "inLanguage": "es"}}):
        assert "inLanguage" not in credential(**fields)["credentialSubject"]["achievement"]
        assert credential(**fields, in_language="pt-BR")["credentialSubject"]["achievement"]["inLanguage"] == "pt-BR"


def refusals(**fields: Any) -> list[dict[str, Any]]:
    """The faults that POST /credentials names; [] when there are none."""
    try:
        credential(**fields)
    except dccapi.InvalidRequest as error:
        return list(error.members["errors"])
    return []


def faults(**fields: Any) -> list[tuple[str, ...]]:
    """Their places."""
    return [tuple(str(step) for step in fault["loc"]) for fault in refusals(**fields)]


# Each bad sample as a request: the place of the fault it is refused for. None: a request cannot say it.
BAD_SAMPLES: dict[str, str | None] = {
    "01-no-criteria": "achievement.criteria",
    "02-criteria-empty": "achievement.criteria.narrative",
    "03-criteria-is-string": "achievement.criteria",
    "04-type-missing-array-wrong": "achievement.type",
    "05-achievementType-not-in-list": "achievement.achievementType",
    "06-image-base64-extra": "achievement.image.image_base64",
    "07-unknown-term": "achievement.imageConfig",
    "08-achievement-id-not-uri": "achievement.id",
    "09-context-order": "achievement.@context",
    "10-validFrom-no-zone": "valid_from",
    "11-vcdm1-dates": "issuanceDate",
    "12-no-subject-id": None,  # no recipient_id stands for the placeholder
    "13-issuer-string": "issuer",
    "14-alignment-no-url": "achievement.alignment.0.targetUrl",
    "15-resultDescription-no-id": "achievement.resultDescription.0.id",
    "16-tag-string": "achievement.tag",
    "17-inLanguage": "achievement.inLanguage",
    "18-empty-name": "achievement.name",
    "19-cowriter-raw": "achievement.badge_name",
    "20-signed": "proof",
}


def as_request(document: dict[str, Any]) -> dict[str, Any]:
    """The document as a /credentials request; what the request has no name for keeps its own."""
    if "credentialSubject" not in document:
        return {"achievement": document}
    fields = dict(document)
    context, _, _ = (fields.pop(name) for name in ("@context", "id", "type"))
    subject = fields.pop("credentialSubject")
    names = {"validFrom": "valid_from", "validUntil": "valid_until"}
    fields = {names.get(name, name): value for name, value in fields.items()}
    achievement = {"@context": context, **subject["achievement"]}
    return {**fields, "achievement": achievement, **({"recipient_id": subject["id"]} if "id" in subject else {})}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_refused_for_its_fault(name: str) -> None:
    path = OB3 / "samples" / "bad" / f"{name}.json"
    if not path.exists():
        pytest.skip("needs ../shared/ob3/samples")
    request = as_request(json.loads(path.read_text("utf-8")))
    found = [".".join(place) for place in faults(**request)]
    assert (BAD_SAMPLES[name] in found) if BAD_SAMPLES[name] else not found


def test_every_bad_sample_is_in_the_table() -> None:
    if not OB3.exists():
        pytest.skip("needs ../shared/ob3/samples")
    assert {path.stem for path in (OB3 / "samples" / "bad").iterdir()} == set(BAD_SAMPLES)


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


PNG_START = b"\x89PNG\r\n\x1a\n"
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"issuer": {**ISSUER, "id": id}}, "issuer.id") for id in (
        "", "x", "a b:c", "https://", "http://#", "urn:uuid:1", "did:", "did:KEY:1", "data:x", "https://a.b/{{c}}",
        "é:a", "a:%", "URN:UUID:0f1e4b0e-6f8a-4f0b-9a53-0d3c1f3a7b11", "https://a.b/\n", None, 5,
    )),
    ({"recipient_id": "jane"}, "recipient_id"),
    ({"recipient_id": ""}, "recipient_id"),
    *(({"valid_from": date}, "valid_from") for date in (
        "", "2026-01-15", "2026-01-15T00:00:00", "2026-01-15 00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-15T24:00:00Z",
        "0000-01-01T00:00:00Z", "2026-01-15T00:00:00Z\n", 0, 1.5, "1768435200",
    )),
    ({"valid_from": "2026-01-15T00:00:00Z", "valid_until": "2026-01-15T00:00:00Z"}, "valid_until"),
    ({"valid_from": "2026-01-15T00:00:00Z", "valid_until": "2026-01-15T01:00:00+02:00"}, "valid_until"),
    ({"valid_until": "2000-01-01T00:00:00Z"}, "valid_until"),
    *(({"achievement_type": kind}, "achievement_type") for kind in (
        "Module", "badge", "", "ext:", "My ext:x", "ext:a b", "ext:a\n",
    )),
    ({"alignment": [{"targetName": "x"}]}, "alignment.0.targetUrl"),
    ({"alignment": [{"targetUrl": "https://a.b"}]}, "alignment.0.targetName"),
    ({"alignment": [{"targetName": "x", "targetUrl": "a.b"}]}, "alignment.0.targetUrl"),
    ({"alignment": [{"targetName": "x", "targetUrl": "https://a.b", "targetType": "x"}]}, "alignment.0.targetType"),
    ({"alignment": []}, "alignment"),
    ({"alignment": {"targetName": "x", "targetUrl": "https://a.b"}}, "alignment"),
    *(({"image": image}, "image") for image in (
        "", "a.png", "javascript:alert(1)", "data:image/png;base64,", "data:image/png,x", data_uri("png", b"GIF89a..."),
        data_uri("png", PNG_START[:7]), data_uri("gif", PNG_START), data_uri("jpeg", b"\xff\xd8\xff\xe0"),
        data_uri("svg+xml", PNG_START), data_uri("svg+xml", b"<html>"), data_uri("png", b"<svg/>"),
        data_uri("png", PNG_START).rstrip("="), data_uri("png", PNG_START) + "=", data_uri("png", PNG_START) + "\n",
        data_uri("png", PNG_START + bytes(9))[:-1], "data:image/png;base64,iVBORw0KGgo-AAAA",
    )),
    ({"image": {"caption": "x"}}, "image.id"),
    ({"image": {"id": PNG, "image_base64": "x"}}, "image.image_base64"),
    ({"issuer": {**ISSUER, "image": data_uri("gif", b"GIF89a")}}, "issuer.image"),
    ({"issuer": {**ISSUER, "url": "did:key:z6Mk"}}, "issuer.url"),
    ({"issuer": {**ISSUER, "email": "x"}}, "issuer.email"),
    ({"issuer": {**ISSUER, "email": "{{a}}@b.c"}}, "issuer.email"),
    ({"issuer": {**ISSUER, "phone": 1}}, "issuer.phone"),
    ({"issuer": {**ISSUER, "fax": "1"}}, "issuer.fax"),
    ({"issuer": {"id": "did:key:z6Mk"}}, "issuer.name"),
    ({"issuer": None}, "issuer"),
    ({"in_language": "English"}, "in_language"),
    ({"in_language": "en\n"}, "in_language"),
    *(({"badge": {**BADGE, "badge_name": text}}, "badge.badge_name") for text in (
        "", " ", "\x00", "\u200b", None, 1,
    )),
    ({"badge": {**BADGE, "image": "x"}}, "badge.image"),
    ({"badge": {**BADGE, "criteria": {"narrative": "x", "id": "x"}}}, "badge.criteria.id"),
    ({"badge": None}, ""),
    ({"badge": None, "achievement": None}, ""),
    ({"badge": BADGE, "achievement": ACHIEVEMENT}, "achievement"),
    ({"achievement": {**ACHIEVEMENT, "context": None}}, "achievement.context"),
    ({"achievement": {**ACHIEVEMENT, "tag": None}}, "achievement.tag"),
    ({"achievement": {**ACHIEVEMENT, "tag": ["a", 1]}}, "achievement.tag.1"),
    ({"achievement": {**ACHIEVEMENT, "image": PNG}}, "achievement.image"),
    ({"achievement": {**ACHIEVEMENT, "endorsementJwt": ["a.b.c"]}}, "achievement.endorsementJwt"),
    ({"achievement": {**ACHIEVEMENT, "type": ["Achievement", "Sticker"]}}, "achievement.type.1"),
    ({"achievement": {**ACHIEVEMENT, "ext:knot": {"rope": 1}}}, "achievement.ext:knot.rope"),
    ({"achievement": {**ACHIEVEMENT, "ext:knot": [[[{"type": "Sticker"}]]]}}, "achievement.ext:knot.0.0.0.type"),
    ({"achievement": {**ACHIEVEMENT, "tag": ["x"] * 100 + [1]}}, "achievement.tag.100"),
    ({"achievement": {**ACHIEVEMENT, "tag": ["x"] * 600 + [1]}}, ""),  # too many to tell where
    ({"achievement": {k: v for k, v in ACHIEVEMENT.items() if k != "type"}}, "achievement.type"),
    ({"proof": {}}, "proof"),
    ({"validFrom": "2026-01-15T00:00:00Z"}, "validFrom"),
    ({"badge": {**BADGE, "badge_description": "x" * 103_000}}, ""),
    ({"image": data_uri("png", PNG_START + bytes(80_000))}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "place"), REFUSED, ids=lambda value: ascii(value)[:60])
def test_a_bad_request_is_refused_with_the_place_of_its_fault(fields: dict[str, Any], place: str) -> None:
    assert [".".join(found) for found in faults(**fields)] == [place]


def test_a_fault_is_told_by_the_first_rule_that_it_breaks() -> None:
    (fault,) = refusals(badge=BADGE, issuer={**ISSUER, "id": None})
    assert fault["msg"].startswith("must be a URI with its scheme")
    (fault,) = refusals(achievement={**ACHIEVEMENT, "achievementType": "Module"})
    assert fault["msg"].startswith("must be ")


def test_every_fault_is_named_at_once() -> None:
    found = faults(
        badge={"badge_name": ""},
        achievement=ACHIEVEMENT,
        issuer={"id": "x"},
        valid_from="2026-01-15T00:00:00Z",
        valid_until="2025-01-15T00:00:00Z",
        image=PNG[:-1],
        extra=1,
    )
    assert {".".join(place) for place in found} == {
        "badge.badge_name", "badge.badge_description", "badge.criteria", "achievement", "issuer.id", "issuer.name",
        "valid_until", "image", "extra",
    }  # fmt: skip


def test_a_fault_of_the_badge_is_not_taken_for_a_missing_badge() -> None:
    assert faults(badge={**BADGE, "badge_name": ""}) == [("badge", "badge_name")]


@given(st.binary(min_size=6, max_size=30))
def test_pngs_and_svgs_of_any_length_are_images(rest: bytes) -> None:
    starts = [b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE svg"]
    for image in [data_uri("png", PNG_START + rest), *(data_uri("svg+xml", start + b" " + rest) for start in starts)]:
        assert credential(image=image)["credentialSubject"]["achievement"]["image"] == {"id": image, "type": "Image"}


@given(st.text())
def test_a_text_that_shows_something_is_kept_and_another_is_refused(text: str) -> None:
    if faults(badge={**BADGE, "badge_name": text}):
        assert not re.search(r"\w", text)
    else:
        name = credential(badge={**BADGE, "badge_name": text})["credentialSubject"]["achievement"]["name"]
        assert name.strip()
        assert re.findall(r"\w", name) == re.findall(r"\w", text)


def sayable(document: dict[str, Any]) -> dict[str, Any]:
    """The document as a request, without what a request has no name for: evidence, results, an awarded date."""
    return {name: value for name, value in as_request(document).items() if name in fields_of("CredentialRequest")}


def test_good_samples_are_accepted_and_keep_every_term(judge: Any) -> None:
    for path in sorted((OB3 / "samples" / "good").iterdir()):
        request = sayable(json.loads(path.read_text("utf-8")))
        made = credential(**request)
        assert judge.judge(made, "credential", checks=ALL_CHECKS)["errors"] == [], path.stem
        achievement = made["credentialSubject"]["achievement"]
        assert achievement == {"achievementType": "Badge"} | without(request["achievement"], "@context", "inLanguage")
        assert made["issuer"] == request.get("issuer", ISSUER | {"type": ["Profile"]})


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def test_a_request_that_is_made_to_be_slow_is_refused_at_once() -> None:
    deep: Any = {"rope": 1}
    for _ in range(240):
        deep = {"ext:knot": deep}
    deeper = deep
    for _ in range(700):
        deeper = [deeper]
    party: dict[str, Any] = {"id": "https://h.edu", "type": ["Profile"], "rope": 1}
    for _ in range(70):
        party = {"id": "https://h.edu", "type": ["Profile"], "endorsement": [{**ENDORSEMENT, "issuer": party}]}
    many = [{"alignment": [{}] * 100}] * 100  # 30,700 faults in 31 KB
    wide = {"tag": [1] * 100_000}, {"alignment": [{}] * 60_000}, {"endorsement": [{}] * 60_000}, {"endorsement": many}
    for terms in ({"ext:knot": deep}, {"ext:knot": deeper}, {"creator": party}, *wide):
        start = time.process_time()
        assert faults(achievement={**ACHIEVEMENT, **terms})
        assert time.process_time() - start < 1


# -- our schema beside the official ones and the contexts


def fields_of(name: str) -> dict[str, Any]:
    """The properties of a class in our schema."""
    part = dccapi.open_badges()[0]["$defs"][name]
    inherited = fields_of(part["$ref"].rpartition("/")[2]) if "$ref" in part else {}
    return inherited | part.get("then", {}).get("properties", {}) | part.get("properties", {})


def required_of(name: str) -> set[str]:
    part = dccapi.open_badges()[0]["$defs"][name]
    return set(part.get("required", ())) | (required_of(part["$ref"].rpartition("/")[2]) if "$ref" in part else set())


def parts_of(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON document."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts_of(value)


@pytest.mark.parametrize("variant", ["schema.formal", "schema.jsonld"])
def test_our_schema_has_all_that_the_official_ones_have(judge: Any, variant: str) -> None:
    official = json.loads((OB3 / "schemas" / judge.SCHEMAS[variant]).read_text("utf-8"))
    classes = official["$defs"] | {"OpenBadgeCredential": official}
    ours = dccapi.open_badges()[0]["$defs"]
    for name, part in classes.items():
        if "properties" in part:
            assert set(part["properties"]) <= set(fields_of(name)), name
            assert set(part.get("required", ())) <= required_of(name), name
            if part.get("additionalProperties") is False:
                assert "additionalProperties" in json.dumps([ours[name], ours.get(name + "Terms")]), name
    terms = {word for part in parts_of(ours) for word in [*part.get("enum", ()), part.get("const", "")]}
    assert {word for part in parts_of(classes) for word in part.get("enum", ())} <= terms


def test_our_schema_has_the_terms_of_the_contexts_and_no_others() -> None:
    contexts = [json.loads((HERE / "examples" / "contexts" / file).read_text("utf-8")) for file in CONTEXTS.values()]
    terms = {name: term for context in contexts for name, term in context["@context"].items()}
    everywhere = set(fields_of("Node")) | {"type"}
    assert everywhere <= set(terms)
    for name, part in dccapi.open_badges()[0]["$defs"].items():
        if name in terms and "properties" in part:
            types = [name, "VerifiableCredential"] if "validFrom" in part["properties"] else [name]
            scopes = [terms[one].get("@context", {}) for one in types if isinstance(terms[one], dict)]
            defined = everywhere | {term for scope in scopes for term in scope if not term.startswith("@")}
            named = set(fields_of(name)) - {"@context", "endorsementJwt", "inLanguage", "awardedDate"}
            assert named <= defined, (name, named - defined)
            closed = "additionalProperties" in part or name == "Image"
            assert closed or defined <= set(fields_of(name)) | {"inLanguage"}, (name, defined - set(fields_of(name)))


# -- any achievement: a generator on top of our schema, and mutations that break what it makes

EXTENSIONS = "https://purl.imsglobal.org/spec/ob/v3p0/extensions.json"
ED25519 = "https://w3id.org/security/suites/ed25519-2020/v1"
PROOF = {
    "type": "DataIntegrityProof", "cryptosuite": "eddsa-rdfc-2022", "created": "2026-01-15T00:00:00Z",
    "proofPurpose": "assertionMethod", "verificationMethod": "did:key:z6Mk#z6Mk", "proofValue": "z58",
}  # fmt: skip
STATUS = {"id": "https://h.edu/status#1", "type": "BitstringStatusListEntry", "statusPurpose": "revocation"}
addresses = st.sampled_from(["https://h.edu/a?b=c#d", "http://[::1]:8080/", "HTTPS://exämple.org/ü"])
uris = addresses | st.sampled_from(["urn:uuid:0f1e4b0e-6f8a-4f0b-9a53-0d3c1f3a7b11", "did:web:h.edu#k", "tel:+34"])
LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "String": words,
    "VisibleText": visible,
    "Number": st.integers(-5, 5) | st.floats(-1e6, 1e6),
    "Uri": uris,
    "WebAddress": addresses,
    "ImageAddress": uris | st.just(PNG),
    "Language": st.sampled_from(["en", "pt-BR", "zh-Hant-TW", "es-419"]),
    "DateTime": st.sampled_from(["2026-01-15T00:00:00Z", "2024-02-29T23:59:59.123456789-05:30"]),
    "Date": st.just("2000-02-29"),
    "Anything": st.sampled_from([None, True, 1.5, "x", [[], {"id": "urn:a:b", "name": "x", "ext:y": ["z", {}]}]]),
    "Reference": st.sampled_from(["urn:a:b", ["urn:a:b", {"id": "urn:a:b", "digestSRI": "sha384-x"}]]),
    "TypeOrTypes": st.sampled_from(["Criteria", ["Criteria"]]),
    "Proof": st.sampled_from([PROOF, without(PROOF, "cryptosuite") | {"type": "Ed25519Signature2020"}]),
    "CredentialStatus": st.sampled_from([STATUS, {"id": "urn:a:b", "type": "1EdTechRevocationList"}]),
}
CONTEXT_FORMS = [
    [dccapi.VC_CONTEXT, dccapi.OB_CONTEXT],
    [dccapi.VC_CONTEXT, dccapi.OB_CONTEXT, EXTENSIONS],
    dccapi.OB_CONTEXT,
    [dccapi.VC_CONTEXT, dccapi.OB_CONTEXT.replace("3.0.3", "3.0.2")],
    ["https://www.w3.org/2018/credentials/v1", dccapi.OB_CONTEXT.replace("3.0.3", "3.0.1")],
]


def value_of(draw: Any, part: dict[str, Any], depth: int) -> Any:
    """A value that a part of our schema allows."""
    name = part.get("$ref", "").rpartition("/")[2]
    if name in LEAVES:
        return draw(LEAVES[name])
    if name == "Types":
        wanted = [one["contains"] for one in part.get("allOf", [part])]
        types = [one["const"] if "const" in one else draw(st.sampled_from(one["enum"])) for one in wanted]
        return types + draw(st.sampled_from([[], [], ["ext:Thing"], ["Profile"]]))
    if name and fields_of(name):
        return object_of(draw, name, depth)
    part = dccapi.open_badges()[0]["$defs"][name] if name else part
    if "items" in part:
        return [value_of(draw, part["items"], depth) for _ in range(draw(st.integers(0, 2)))]
    if "else" in part:
        return value_of(draw, part[draw(st.sampled_from(["then", "else"]))], depth)
    if "anyOf" in part:
        return draw(st.sampled_from([*part["anyOf"][0].get("enum", []), "ext:Knot.1_a-b"]))
    return part["const"] if "const" in part else draw(st.sampled_from(part["enum"]))


def object_of(draw: Any, name: str, depth: int = 0) -> dict[str, Any]:
    """An object of a class, with what it must have and some of what it may have."""
    fields, required = fields_of(name), required_of(name) - {"@context"}
    inherited = {"Achievement": set(), "Profile": {"alignment"}}.get(name, {"image", "alignment", "endorsement"})
    others = sorted(set(fields) - required - inherited - {"@context", "endorsementJwt"})
    chosen = draw(st.lists(st.sampled_from(others), unique=True, max_size=max(0, 4 - depth))) if others else []
    made = {field: value_of(draw, fields[field], depth + 1) for field in [*sorted(required), *chosen]}
    if name not in ("Image", "IdentifierEntry"):
        made |= draw(st.sampled_from([{}, {}, {"ext:note": "x"}, {"https://h.edu/terms#rope": {"ext:y": [1, None]}}]))
    if name == "EndorsementCredential":
        made |= {"@context": [*CONTEXT_FORMS[1], ED25519]}
        if re.search(r'"awardedDate"|\{\{|\}\}', json.dumps(made, indent=1)):
            made.pop("proof", None)
    if name == "ResultDescription":
        made = without(made, "requiredLevel", "requiredValue")
        for level in made.get("rubricCriterionLevel", []):
            made["requiredLevel"] = level["id"]
        for value in made.get("allowedValue", []):
            made["requiredValue"] = value
    return {"narrative": "x"} | made if name == "Criteria" else made


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    """An achievement and an issuer, both valid."""
    achievement = object_of(draw, "Achievement")
    forms = CONTEXT_FORMS[: 2 if re.search("endorsement|inLanguage|digest|mediaType", str(achievement)) else None]
    achievement = {"@context": draw(st.sampled_from(forms)), **achievement}
    return {"achievement": achievement, "issuer": without(object_of(draw, "Profile") | ISSUER, "email")}


def places_in(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places_in(value, (*place, name))


@st.composite
def broken(draw: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The request with one thing changed in its achievement; mostly that breaks it."""
    request = json.loads(json.dumps(request))
    *path, last = draw(st.sampled_from([*places_in(request["achievement"])][1:]))
    parent = request["achievement"]
    for step in path:
        parent = parent[step]
    others = ["x", "", "a b:c", 5, True, None, [], ["x"], [[]], {"x": 1}, {}]
    change = draw(st.sampled_from(["drop", "add", "replace", "replace"]))
    if "@context" in path:  # without the first context, or with an empty one, it may still be valid
        parent[last] = draw(st.sampled_from(others[:4]))
    elif change == "drop":
        del parent[last]
    elif change == "add" and isinstance(parent, dict):
        parent |= draw(st.sampled_from([{"rope": "x"}, {"tag": ["x"]}, {"credentialSubject": {}}, {"name": "x"}]))
    else:
        parent[last] = draw(st.sampled_from(others))
    return request


@pytest.mark.timeout(300)
@hypothesis_settings(  # to shrink such documents takes minutes
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.shrink}
)
@given(data=st.data())
def test_any_valid_achievement_is_taken_and_any_other_refused(judge: Any, data: Any) -> None:
    request = data.draw(requests())
    made = credential(**request)
    assert judge.judge(request["achievement"], "achievement")["errors"] == []
    assert judge.judge(made, "credential", checks=ALL_CHECKS)["errors"] == []
    other = data.draw(broken(request))
    verdict = judge.judge(other["achievement"], "achievement")
    told = refusals(**other)
    assert verdict["valid"] == (not told), (verdict["errors"], told)
    for fault in told:
        assert fault["loc"][0] == "achievement"
        assert re.fullmatch(r"(must|is|has) [^\\^$\[\]]+", fault["msg"])
    if not told:
        assert judge.judge(credential(**other), "credential", checks=ALL_CHECKS)["errors"] == []


def test_skills_are_named_once_as_they_were_spelled_first() -> None:
    request = dccapi.GenerateRequest(content="Knots", language="fr")
    prompt = dccapi.build_prompt(request, dccapi.Course("Knots", "en"), "", {})
    assert dccapi.skills_in(["Nœuds ", "…", "\u200b", "nœuds", "• C++."], prompt) == ["Nœuds", "C++"]

"""Open Badges 3.0: achievements and credentials, against the official judge and its samples."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pyld import jsonld

import dccapi
from service import BADGE, HERE, ISSUER, OB3, judge

__all__ = ["judge"]  # the fixture


def credential(**fields: Any) -> dict[str, Any]:
    """What POST /credentials answers."""
    subject = {} if "badge" in fields or "achievement" in fields else {"badge": BADGE}
    return dccapi.build_credential(dccapi.CredentialRequest.model_validate({**subject, "issuer": ISSUER, **fields}))


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
    achievement = dccapi.build_achievement(dccapi.Badge.model_validate(BADGE), request, ["knots", "", "ropes", "knots"])
    document = achievement.model_dump()
    assert judge.judge(document, "achievement", checks=checks)["valid"]
    assert list(document)[:6] == ["@context", "id", "type", "name", "description", "criteria"]
    assert document["creator"] == {
        "id": "https://h.edu", "type": ["Profile"], "name": "Harbour { {School} }", "url": "https://h.edu"
    }  # fmt: skip
    assert document["tag"] == ["knots", "ropes"]
    assert document["achievementType"] == "Badge"


def test_an_achievement_says_nothing_that_is_not_known() -> None:
    request = dccapi.GenerateRequest.model_validate({"content": "Knots", "institution": "Harbour School"})
    document = dccapi.build_achievement(dccapi.Badge.model_validate(BADGE), request).model_dump()
    assert set(document) == {"@context", "id", "type", "name", "description", "criteria", "achievementType"}
    assert document["criteria"] == BADGE["criteria"]
    expanded(document)


@pytest.mark.parametrize("institution", ["\x00", "   ", "x\x1b"])
@pytest.mark.parametrize("url", ["http://#", "https://h.edu/%zz", "https://h.edu/"])
def test_an_institution_that_cannot_be_written_does_not_cost_the_badge(institution: str, url: str) -> None:
    fields = {"content": "Knots", "institution": institution, "institute_url": url}
    request = dccapi.GenerateRequest.model_validate(fields)
    document = dccapi.build_achievement(dccapi.Badge.model_validate(BADGE), request).model_dump()
    assert document.get("creator", {}).get("name") in (None, "x")
    assert ("creator" in document) == (url == "https://h.edu/")


def test_an_achievement_of_ours_can_be_posted_back() -> None:
    achievement = dccapi.build_achievement(dccapi.Badge.model_validate(BADGE)).model_dump()
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


def test_in_language_is_written_only_when_it_is_asked_for() -> None:
    for fields in ({"badge": BADGE}, {"achievement": {**ACHIEVEMENT, "inLanguage": "es"}}):
        assert "inLanguage" not in credential(**fields)["credentialSubject"]["achievement"]
        assert credential(**fields, in_language="pt-BR")["credentialSubject"]["achievement"]["inLanguage"] == "pt-BR"


def faults(**fields: Any) -> list[tuple[str, ...]]:
    """The places of the faults that POST /credentials names; [] when there are none."""
    try:
        credential(**fields)
    except ValidationError as error:
        return [tuple(str(step) for step in fault["loc"]) for fault in error.errors()]
    return []


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
    "15-resultDescription-no-id": "achievement.resultDescription",
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
    *(({"image": image}, "image.id") for image in (
        "", "a.png", "javascript:alert(1)", "data:image/png;base64,", "data:image/png,x", data_uri("png", b"GIF89a..."),
        data_uri("png", PNG_START[:7]), data_uri("gif", PNG_START), data_uri("jpeg", b"\xff\xd8\xff\xe0"),
        data_uri("svg+xml", PNG_START), data_uri("svg+xml", b"<html>"), data_uri("png", b"<svg/>"),
        data_uri("png", PNG_START).rstrip("="), data_uri("png", PNG_START) + "=", data_uri("png", PNG_START) + "\n",
        data_uri("png", PNG_START + bytes(9))[:-1], "data:image/png;base64,iVBORw0KGgo-AAAA",
    )),
    ({"image": {"caption": "x"}}, "image.id"),
    ({"image": {"id": PNG, "image_base64": "x"}}, "image.image_base64"),
    ({"issuer": {**ISSUER, "image": data_uri("gif", b"GIF89a")}}, "issuer.image.id"),
    ({"issuer": {**ISSUER, "url": "did:key:z6Mk"}}, "issuer.url"),
    ({"issuer": {**ISSUER, "email": "x"}}, "issuer.email"),
    ({"issuer": {**ISSUER, "email": "{{a}}@b.c"}}, "issuer.email"),
    ({"issuer": {**ISSUER, "phone": "1"}}, "issuer.phone"),
    ({"issuer": {"id": "did:key:z6Mk"}}, "issuer.name"),
    ({"issuer": None}, "issuer"),
    ({"in_language": "English"}, "in_language"),
    ({"in_language": "en\n"}, "in_language"),
    *(({"badge": {**BADGE, "badge_name": text}}, "badge.badge_name") for text in (
        "", " ", "\x00", "\u200b", "\ud800x", None, 1,
    )),
    ({"badge": {**BADGE, "image": "x"}}, "badge.image"),
    ({"badge": {**BADGE, "criteria": {"narrative": "x", "id": "x"}}}, "badge.criteria.id"),
    ({"badge": None}, "achievement"),
    ({"badge": None, "achievement": None}, "achievement"),
    ({"badge": BADGE, "achievement": ACHIEVEMENT}, "achievement"),
    ({"achievement": {**ACHIEVEMENT, "context": None}}, "achievement.context"),
    ({"achievement": {**ACHIEVEMENT, "tag": []}}, "achievement.tag"),
    ({"achievement": {k: v for k, v in ACHIEVEMENT.items() if k != "type"}}, "achievement.type"),
    ({"proof": {}}, "proof"),
    ({"validFrom": "2026-01-15T00:00:00Z"}, "validFrom"),
    ({"badge": {**BADGE, "badge_description": "x" * 103_000}}, ""),
    ({"image": data_uri("png", PNG_START + bytes(80_000))}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "place"), REFUSED, ids=lambda value: ascii(value)[:60])
def test_a_bad_request_is_refused_with_the_place_of_its_fault(fields: dict[str, Any], place: str) -> None:
    assert [".".join(found) for found in faults(**fields)] == [place]


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
        "valid_until", "image.id", "extra",
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


def test_good_samples_that_a_request_can_say_are_accepted() -> None:
    if not OB3.exists():
        pytest.skip("needs ../shared/ob3/samples")
    accepted = {
        path.stem
        for path in (OB3 / "samples" / "good").iterdir()
        if not faults(**as_request(json.loads(path.read_text("utf-8"))))
    }
    assert accepted >= {"achievement-minimal", "achievement-es-emoji", "credential-minimal"}

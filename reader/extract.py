"""What a document gives: a text with its notes, or the reason why it is not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DETAILS = {
    "document_broken": "The document is damaged and cannot be read. Open it, save it anew, and send it again.",
    "document_encrypted": "The document is protected with a password. Remove the password and send it again.",
    "document_has_no_text": "The document has no text; it may be a scan. Run OCR on it first, or paste its text.",
    "document_too_slow": "The document takes too long to read. Send a shorter one, or paste its text.",
    "unsupported_media_type": "Send a PDF, DOCX, PPTX, ODT, HTML, Markdown or plain text document.",
}
TOO_LARGE = "The document unpacks to more than can be read. Send a shorter one, or paste its text."
REPAIRED = {
    "mojibake": "Garbled characters were put right",
    "soft_hyphens": "Soft hyphens were taken out",
    "zero_width": "Invisible characters were taken out",
    "ligatures": "Ligatures were written as letters",
    "bullets": "Bullets of symbol fonts were written as list marks",
    "page_marks": "Running headers, footers and page numbers were left out",
    "hyphenation": "Words that were broken at the end of a line were joined",
}


class Refused(BaseException):
    """A document that is not read, with the reason. No `except Exception` of a library stops it."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code)
        self.code, self.detail = code, detail or DETAILS[code]


@dataclass
class Extract:
    """What a reader finds in a document. The text has headings, lists and tables as Markdown writes them."""

    text: str
    title: str = ""
    pages: int | None = None
    notes: list[dict[str, str]] = field(default_factory=list)


def note(code: str, message: str, text: str = "") -> dict[str, str]:
    """As the notes of a review are."""
    return {"code": code, "field": "content", "text": text, "message": message}


def repair_notes(repairs: Mapping[str, int]) -> list[dict[str, str]]:
    return [note("text_repaired", f"{REPAIRED[kind]} ({count}).") for kind, count in repairs.items()]

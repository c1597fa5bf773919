"""The text of a document of any kind: PDF, DOCX, PPTX, ODT, HTML, Markdown, plain text in any usual encoding."""

from __future__ import annotations

import codecs
import re
from html import unescape
from typing import Any

from reader.condense import word_count
from reader.course_text import FRONT_MATTER, MAX_TEXT, TOLD_IN_FRONT, VISIBLE, is_html, said_in_html, tidied
from reader.extract import DETAILS, Extract, Refused, note, repair_notes
from reader.review import language_of

# What begins with these bytes is something else.
KNOWN_BYTES = (
    (b"{\\rtf", "This is RTF. Save it as DOCX or PDF and send that."),
    (b"\x89PNG|\xff\xd8\xff|GIF8|II*\0|MM\0*|RIFF|BM", "This is a picture. Run OCR on it first, or paste its text."),
)
# What a text begins with tells its encoding; UTF-32 comes before UTF-16, whose mark is the beginning of its own.
MARKED = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Windows-1252 of Western languages, which a guess takes for another encoding where the text is short.
LETTERS = "äöüÄÖÜßéèêëÉÈàâáÀÁçÇîïíìÍôóòöõÓûùúÚñÑãÃåÅæÆøØœ–—‘’“”„…•€«»°§¿¡ºª".encode("cp1252")
WESTERN = re.compile(rb"(?:[\x00-\x7f]|[%s](?![\x80-\xff]{3}))*" % re.escape(LETTERS))
CHARSET = re.compile(rb"""(?i)charset\s*=\s*["']?([\w.:-]+)|<\?xml[^>]*encoding=["']([\w.:-]+)""")


def kind_of(path: str) -> str:
    """The kind of a document by its content. Its name and media type only tell text from text."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        from reader.office import Package

        if kind := Package(path).kind():
            return kind
        raise Refused(
            "unsupported_media_type",
            "This is an archive or a spreadsheet; /docs/catalogue.md says how a table of courses is taken. "
            + DETAILS["unsupported_media_type"],
        )
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        with open(path, "rb") as file:
            if "EncryptedPackage".encode("utf-16-le") in file.read(2**24):
                raise Refused("document_encrypted")
        raise Refused(
            "unsupported_media_type", "This is of an old Office version. Save it as DOCX, PPTX or PDF and send that."
        )
    for starts, detail in KNOWN_BYTES:
        if head.startswith(tuple(starts.split(b"|"))):
            raise Refused("unsupported_media_type", detail)
    return "text"


def decoded(data: bytes, charset: str = "") -> str:
    """The text of bytes in any usual encoding. What bears no text at all is refused."""
    guesses = [encoding for bom, encoding in MARKED if data.startswith(bom)][:1]
    if not guesses and 0.3 * len(data) < data.count(0) < 0.6 * len(data):
        guesses = ["utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"]
    declared = CHARSET.search(data[:2048])
    guesses += ["utf-8", charset, (declared[1] or declared[2]).decode("ascii", "ignore") if declared else ""]
    for guess in filter(None, guesses):
        try:
            text = data.decode(guess)
            break
        except (LookupError, ValueError):
            continue
    else:
        import charset_normalizer

        best = None if WESTERN.fullmatch(data) else charset_normalizer.from_bytes(data[: 2**18]).best()
        encoding = best.encoding if best and best.encoding not in ("latin_1", "iso8859_1") else "cp1252"
        text = data.decode(encoding, "replace").replace("¤", "€")  # one byte in ISO 8859-1 and 8859-15
    if len(re.findall(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\ufffd]", text)) > len(text) / 200:
        raise Refused("unsupported_media_type")
    return text.lstrip("\ufeff")


def text_of_file(path: str, name: str, media_type: str) -> Extract:
    with open(path, "rb") as file:
        data = file.read(4 * MAX_TEXT)
    charset = re.search(r"(?i)charset=\"?([\w.:-]+)", media_type)
    text = re.sub(r"\r\n?", "\n", decoded(data, charset[1] if charset else ""))
    markdown = re.search(r"(?i)\.(?:md|markdown|txt|rst)$", name) or re.search("markdown|plain", media_type)
    if re.match(r"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype html|html)\b", text) or (
        not markdown and is_html(text)
    ):
        title = re.search(r"(?is)<title\b[^>]*>(.*?)</title>", text)
        return Extract(said_in_html(text, marked=True), unescape(title[1]) if title else "")
    if front := FRONT_MATTER.match(text):
        text = "\n".join([*TOLD_IN_FRONT.findall(front[1]), "", text[front.end() :]])
    return Extract(text)


def document(path: str, name: str = "", media_type: str = "") -> dict[str, Any]:
    """What a document of any kind says, with its headings, lists and tables."""
    kind = kind_of(path)
    if kind == "pdf":
        from reader.pdf import pdf_text

        found = pdf_text(path)
    elif kind in ("docx", "pptx", "odt"):
        from reader.office import READERS

        found = READERS[kind](path)
    else:
        found = text_of_file(path, name, media_type)
    if len(found.text) > MAX_TEXT:
        found.notes.append(note("left_out", f"Only the first {MAX_TEXT:,} characters were read."))
    tidy = tidied(found.text[:MAX_TEXT])
    if not re.search(VISIBLE, tidy.text):
        raise Refused("document_has_no_text")
    return {
        "content": tidy.text,
        "title": _title(found.title, tidy.text),
        "language": language_of(tidy.text),
        "pages": found.pages,
        "words": word_count(tidy.text),
        "notes": found.notes + repair_notes(tidy.repairs),
    }


def _title(told: str, text: str) -> str | None:
    """The first heading, or what the document is called where it has none, or its first line where that is short."""
    heading = re.search(r"(?m)^#{1,6} (.*)", text[:3000])
    told = re.sub(
        r"(?i)^microsoft word - |\.(?:docx?|pdf|pptx?|odt|tex|dvi|rtf)$|^(?:untitled|title|powerpoint presentation)$",
        "",
        told.strip(),
    )
    first = text.partition("\n")[0].strip("# *")
    found = heading[1] if heading else told or (first if len(first) <= 100 else "")
    return " ".join(found.split())[:200] or None

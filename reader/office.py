"""The text of DOCX, ODT and PPTX documents, by way of HTML. Imported where one is read: it takes memory and time."""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections import Counter
from html import escape
from typing import ClassVar
from xml.etree import ElementTree

import mammoth

from reader.course_text import MAX_DEPTH, said_in_html
from reader.extract import TOO_LARGE, Extract, Refused

MAX_PARTS, MAX_XML = 10_000, 16 * 2**20  # files in a ZIP archive, and bytes of XML when it is unpacked
KINDS = {
    "odt": rb"\A\s*application/vnd\.oasis\.opendocument\.text",
    "docx": rb"wordprocessingml\.(?:document|template)\.main|ms-word\.\w+\.macroEnabled\w*\.main",
    "pptx": rb"presentationml\.(?:presentation|slideshow|template)\.main|ms-powerpoint\.\w+\.macroEnabled\.main",
}
MAX_XML_ELEMENTS = 250_000  # of one part


DOCX_STYLES = "p[style-name='Title'] => h1:fresh\np[style-name='Subtitle'] => h2:fresh"


class Handler:
    """Takes the elements of an XML document as they come, so that no nest is too deep and none is kept.

    Subclasses write HTML. Office documents declare no entities; one with a DOCTYPE is meant to do harm.
    """

    SKIPPED: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.html: list[str] = []
        self.skipping = 0
        self.depth_now = self.elements = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth_now += 1
        self.elements += 1
        if self.depth_now > MAX_DEPTH or self.elements > MAX_XML_ELEMENTS:
            raise Refused("document_broken", TOO_LARGE)
        tag = tag.partition("}")[2]
        if self.skipping or tag in self.SKIPPED:
            self.skipping += 1
        else:
            self.open(tag, {name.partition("}")[2] or name: value for name, value in attributes.items()})

    def end(self, tag: str) -> None:
        self.depth_now -= 1
        if self.skipping:
            self.skipping -= 1
        else:
            self.shut(tag.partition("}")[2])

    def open(self, tag: str, attributes: dict[str, str]) -> None: ...

    def shut(self, tag: str) -> None: ...

    def data(self, text: str) -> None:
        if not self.skipping:
            self.say(text)

    def say(self, text: str) -> None:
        self.html.append(escape(text))

    def doctype(self, *_: object) -> None:
        raise Refused("document_broken")

    def close(self) -> str:
        return "".join(self.html)


class OdtHandler(Handler):
    SKIPPED = frozenset(
        {"annotation", "tracked-changes", "table-of-content", "covered-table-cell", "sequence-decls", "object"}
    )
    TAGS: ClassVar = {"p": "p", "list-item": "li", "list-header": "li", "table": "table", "table-row": "tr"}

    def __init__(self) -> None:
        super().__init__()
        self.numbered: set[tuple[str, str]] = set()  # styles of lists, and their levels
        self.titles = {"Title"}  # styles of paragraphs
        self.style = ""
        self.open_tags: list[str] = []
        self.in_text = 0
        self.depth, self.outermost = 0, ""  # of lists in each other, and the style of the outermost
        self.counts: Counter[str] = Counter()  # of its items

    def open(self, tag: str, attributes: dict[str, str]) -> None:
        name = attributes.get("style-name", "")
        if tag == "style" and attributes.get("parent-style-name") == "Title":
            self.titles.add(attributes.get("name", ""))
        elif tag == "list-style":
            self.style = attributes.get("name", "")
        elif tag == "list-level-style-number" and attributes.get("num-format"):
            self.numbered.add((self.style, attributes.get("level", "")))
        elif tag == "list":
            goes_on = attributes.get("continue-numbering") == "true" or "continue-list" in attributes
            if not self.depth:
                self.outermost = name
                if not goes_on:
                    self.counts[name] = 0
            self.depth += 1
            numbered = (name or self.outermost, str(self.depth)) in self.numbered
            self._opened("ol" if numbered else "ul", f' start="{self.counts[name] + 1}"' if self.depth == 1 else "")
        elif tag == "h" or (tag == "p" and name in self.titles):
            self._opened(f"h{min(6, int(attributes.get('outline-level') or 1))}")
        elif tag == "table-cell":
            self._opened("td")
        elif tag in self.TAGS:
            self._opened(self.TAGS[tag])
        elif tag in ("s", "tab", "line-break"):
            self.html.append("<br>" if tag == "line-break" else " ")
        self.in_text += tag in ("p", "h")
        if tag in ("p", "h") and self.depth == 1 and "li" in self.open_tags[-2:-1]:
            self.counts[self.outermost] += 1

    def _opened(self, tag: str, attributes: str = "") -> None:
        self.open_tags.append(tag)
        self.html.append(f"<{tag}{attributes}>")

    def shut(self, tag: str) -> None:
        self.in_text -= tag in ("p", "h")
        self.depth -= tag == "list"
        if tag in ("list", "h", "table-cell", *self.TAGS) and self.open_tags:
            self.html.append(f"</{self.open_tags.pop()}>")

    def data(self, text: str) -> None:
        if self.in_text and not self.skipping:
            self.say(text)


class SlideHandler(Handler):
    """A slide, its notes, or a diagram: the title first, then what else it says."""

    SKIPPED = frozenset({"Fallback", "extLst"})
    NOT_SAID = frozenset({"dt", "ftr", "hdr", "sldNum", "sldImg"})

    def __init__(self) -> None:
        super().__init__()
        self.title: list[str] = []
        self.place: str | None = None  # what a shape is for; None for one that is in no layout
        self.lines: list[tuple[int, str]] = []  # of the shape, each with its depth in a list, 0 for none
        self.text: list[str] = []
        self.depth, self.level, self.in_text = 0, 0, False

    def open(self, tag: str, attributes: dict[str, str]) -> None:
        if tag in ("sp", "graphicFrame", "pt"):
            self.place, self.lines = None, []
        elif tag == "ph":
            self.place = attributes.get("type", "body")
        elif tag in ("tbl", "tr"):
            self.html.append("<table>" if tag == "tbl" else "<tr>")
        elif tag == "p":
            self.text, self.level, self.depth = [], 0, int(self.place == "body")
        elif tag == "pPr":
            self.level = min(8, int(attributes.get("lvl") or 0))
        elif tag in ("buChar", "buAutoNum", "buNone"):
            self.depth = int(tag != "buNone")
        elif tag in ("br", "tab"):
            self.text.append(" ")
        self.in_text = tag == "t"

    def data(self, text: str) -> None:
        if self.in_text and not self.skipping:
            self.text.append(text)

    def shut(self, tag: str) -> None:
        self.in_text = False
        if tag == "p" and (text := "".join(self.text).strip()):
            self.lines.append((self.level + 1 if self.depth else 0, text))
        elif tag == "tc":
            self.html.append(f"<td>{'<br>'.join(escape(text) for _, text in self.lines)}</td>")
            self.lines = []
        elif tag in ("tbl", "tr"):
            self.html.append("</table>" if tag == "tbl" else "</tr>")
        elif tag in ("sp", "pt"):
            self._shape()

    def _shape(self) -> None:
        if self.place in ("title", "ctrTitle"):
            self.title += [text for _, text in self.lines]
        elif self.place not in self.NOT_SAID:
            for depth, text in self.lines:
                listed = depth if len(self.lines) > 1 else 0
                item = f"<li>{escape(text)}</li>" if listed else f"<p>{escape(text)}</p>"
                self.html.append("<ul>" * listed + item + "</ul>" * listed)
        self.lines = []

    def close(self) -> str:
        return f"<h2>{escape(' '.join(self.title))}</h2>{''.join(self.html)}"


class Relations(Handler):
    """The parts that a part of a package refers to: what for, and by which name and identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def open(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "Relationship":
            kind = attributes.get("Type", "").rpartition("/")[2]
            self.found.append((kind, attributes.get("Id", ""), attributes.get("Target", "")))


class Attributes(Handler):
    """What some elements hold: their text, or one of their attributes."""

    def __init__(self, **wanted: str) -> None:
        super().__init__()
        self.wanted, self.found, self.tag = wanted, dict[str, list[str]](), ""

    def open(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag = tag
        if attribute := self.wanted.get(tag):
            self.found.setdefault(tag, []).append(attributes.get(attribute, ""))

    def shut(self, tag: str) -> None:
        self.tag = ""

    def data(self, text: str) -> None:
        if self.wanted.get(self.tag) == "":
            self.found.setdefault(self.tag, []).append(text)


class Package:
    """The parts of a document that is a ZIP archive, as far as they are read within bounds."""

    def __init__(self, path: str) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError):
            raise Refused("document_broken") from None
        parts = self.archive.infolist()
        if any(part.flag_bits & 1 for part in parts):
            raise Refused("document_encrypted")
        xml = sum(part.file_size for part in parts if part.filename.endswith((".xml", ".rels", "mimetype")))
        if len(parts) > MAX_PARTS or xml > MAX_XML:
            raise Refused("document_broken", TOO_LARGE)
        self.names = {part.filename for part in parts}

    def kind(self) -> str:
        """docx, pptx or odt, by what the package says of itself; slides may hold documents of other kinds."""
        types = b"".join(self.archive.read(name) for name in ("mimetype", "[Content_Types].xml") if name in self.names)
        return next((kind for kind, shape in KINDS.items() if re.search(shape, types)), "")

    def read(self, name: str, handler: Handler) -> str:
        parser = ElementTree.XMLParser(target=handler)
        with self.archive.open(name) as part:
            while chunk := part.read(2**16):
                parser.feed(chunk)
        return str(parser.close())

    def related(self, name: str) -> list[tuple[str, str, str]]:
        folder, _, file = name.rpartition("/")
        relations = Relations()
        if (path := f"{folder}/_rels/{file}.rels") in self.names:
            self.read(path, relations)
        return [
            (kind, key, posixpath.normpath(posixpath.join(folder, target)).lstrip("/"))
            for kind, key, target in relations.found
        ]

    def told(self, name: str, **wanted: str) -> dict[str, str]:
        held = Attributes(**wanted)
        if name in self.names:
            self.read(name, held)
        return {tag: "".join(texts).strip() for tag, texts in held.found.items()}


def _office(html: str, title: str = "", pages: int | None = None) -> Extract:
    return Extract(said_in_html(html, marked=True), title, pages)


def _number(digits: str | None) -> int | None:
    return int(digits) if digits and digits.isdecimal() else None


def docx_text(path: str) -> Extract:
    package = Package(path)
    for name in package.names:
        if name.endswith((".xml", ".rels")) and not name.startswith("customXml/"):
            package.read(name, Handler())  # mammoth keeps all of it, and takes entities for what they say
    with open(path, "rb") as file:
        html = mammoth.convert_to_html(file, style_map=DOCX_STYLES, convert_image=lambda _: []).value
    html = re.sub(r'<sup><a href="#(?:foot|end)note-\d+"[^<>]*>(\[\d+\])</a></sup>', r" \1", html)
    html = re.sub(r'<a href="#(?:foot|end)note-ref[^<>]*>↑</a>', "", html)
    title = package.told("docProps/core.xml", title="").get("title", "")
    return _office(html, title, _number(package.told("docProps/app.xml", Pages="").get("Pages")))


def odt_text(path: str) -> Extract:
    package = Package(path)
    if "META-INF/manifest.xml" in package.names and b"encryption-data" in package.archive.read("META-INF/manifest.xml"):
        raise Refused("document_encrypted")
    told = package.told("meta.xml", **{"title": "", "document-statistic": "page-count"})
    return _office(
        package.read("content.xml", OdtHandler()), told.get("title", ""), _number(told.get("document-statistic"))
    )


def pptx_text(path: str) -> Extract:
    package = Package(path)
    main = "ppt/presentation.xml"
    order = Attributes(sldId="id")
    package.read(main, order)
    slides = {key: name for kind, key, name in package.related(main) if kind == "slide"}
    said, pages = [], 0
    for key in order.found.get("sldId", []):
        if (name := slides.get(key, "")) not in package.names:
            continue
        pages += 1
        said.append(package.read(name, SlideHandler()))
        for kind, _, part in package.related(name):
            if kind in ("notesSlide", "diagramData") and part in package.names:
                html = package.read(part, SlideHandler())
                if re.search(r">[^<]", html):
                    said.append(f"<p>Notes:</p>{html}" if kind == "notesSlide" else html)
    title = package.told("docProps/core.xml", title="").get("title", "")
    return _office("".join(said), title, pages)


READERS = {"docx": docx_text, "odt": odt_text, "pptx": pptx_text}

"""Documents that the tests make by code, good ones and bad ones, and a client of `reader`."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import orjson

from service import HERE

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
RELATIONS = 'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"'
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
ODF = " ".join(
    f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
    for name in ("office", "text", "table", "style", "meta")
)
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class Child:
    """A process of `reader`, spoken to as dccapi.py does."""

    def __init__(self, home: Path = HERE, before: Callable[[], object] | None = None) -> None:
        pipe = subprocess.PIPE
        line = [sys.executable, "-m", "reader"]
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, cwd=home, preexec_fn=before)

    def send(self, task: str, **arguments: Any) -> None:
        request = orjson.dumps({"task": task, **arguments})
        assert self.process.stdin is not None
        self.process.stdin.write(request + b"\n")
        self.process.stdin.flush()

    def ask(self, task: str, **arguments: Any) -> Any:
        self.send(task, **arguments)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        return orjson.loads(answer) if answer else {"died": self.process.wait()}

    def peak(self) -> int:
        """The most memory that it had, in bytes."""
        with open(f"/proc/{self.process.pid}/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        return int(lines["VmHWM"].split()[0]) * 1024

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.process.wait()


def changed_reader(home: Path, file: str, before: str, after: str) -> None:
    """A copy of `reader` under `home`, where `after` stands for `before` in one of its files."""
    if not (home / "reader").exists():
        shutil.copytree(HERE / "reader", home / "reader")
    changed = home / "reader" / file
    source = changed.read_text()
    assert before in source
    changed.write_text(source.replace(before, after))


@contextmanager
def child(home: Path = HERE, before: Callable[[], object] | None = None) -> Iterator[Child]:
    running = Child(home, before)
    try:
        yield running
    finally:
        running.stop()


def packed(parts: dict[str, str | bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def content_types(main: str) -> str:
    return (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default Extension="xml" '
        'ContentType="application/xml"/><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.'
        f'relationships+xml"/><Override PartName="/{main[0]}" ContentType="application/vnd.openxmlformats-'
        f'officedocument.{main[1]}.main+xml"/></Types>'
    )


def relations(*targets: tuple[str, str, str]) -> str:
    inner = "".join(f'<Relationship Id="{key}" Type="{OFFICE}/{kind}" Target="{to}"/>' for key, kind, to in targets)
    return f"<Relationships {RELATIONS}>{inner}</Relationships>"


def paragraph(text: str, style: str = "", numbering: str = "") -> str:
    marks = f'<w:pStyle w:val="{style}"/>' if style else ""
    marks += f'<w:numPr><w:ilvl w:val="0"/><w:numId w:val="{numbering}"/></w:numPr>' if numbering else ""
    return f'<w:p><w:pPr>{marks}</w:pPr><w:r><w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'


def docx_table(rows: list[list[str]]) -> str:
    cells = ["".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) for row in rows]
    return f"<w:tbl>{''.join(f'<w:tr>{row}</w:tr>' for row in cells)}</w:tbl>"


def docx(body: str, prolog: str = "", **more: str | bytes) -> bytes:
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="{key}"><w:name w:val="{name}"/></w:style>'
        for key, name in (("H1", "heading 1"), ("H2", "heading 2"), ("T", "Title"))
    )
    level = '<w:abstractNum w:abstractNumId="{0}"><w:lvl w:ilvl="0"><w:numFmt w:val="{1}"/></w:lvl></w:abstractNum>'
    numbers = "".join(f'<w:num w:numId="{n}"><w:abstractNumId w:val="{n}"/></w:num>' for n in (1, 2))
    numbering = level.format(1, "bullet") + level.format(2, "decimal") + numbers
    return packed(
        {
            "[Content_Types].xml": content_types(("word/document.xml", "wordprocessingml.document")),
            "_rels/.rels": relations(("r1", "officeDocument", "word/document.xml")),
            "word/_rels/document.xml.rels": relations(
                ("s", "styles", "styles.xml"), ("n", "numbering", "numbering.xml")
            ),
            "word/styles.xml": f"<w:styles {W}>{styles}</w:styles>",
            "word/numbering.xml": f"<w:numbering {W}>{numbering}</w:numbering>",
            "word/document.xml": f"{prolog}<w:document {W}><w:body>{body}</w:body></w:document>",
            **more,
        }
    )


def odt(body: str, prolog: str = "", styles: str = "", **more: str | bytes) -> bytes:
    return packed(
        {
            "mimetype": "application/vnd.oasis.opendocument.text",
            "content.xml": f"{prolog}<office:document-content {ODF}><office:automatic-styles>{styles}"
            f"</office:automatic-styles><office:body><office:text>{body}</office:text></office:body>"
            "</office:document-content>",
            **more,
        }
    )


def pptx(*slides: tuple[str, str], prolog: str = "") -> bytes:
    """Slides of shapes, each with its notes ("" for none)."""
    names = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
    names += f'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" xmlns:r="{OFFICE}"'
    numbers = range(1, len(slides) + 1)
    order = "".join(f'<p:sldId id="{255 + n}" r:id="s{n}"/>' for n in reversed(numbers))
    targets = [(f"s{n}", "slide", f"slides/slide{n}.xml") for n in numbers]
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": content_types(("ppt/presentation.xml", "presentationml.presentation")),
        "_rels/.rels": relations(("r1", "officeDocument", "ppt/presentation.xml")),
        "ppt/presentation.xml": f"<p:presentation {names}><p:sldIdLst>{order}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": relations(*targets),
    }
    for number, (shapes, notes) in zip(numbers, slides, strict=True):
        parts[f"ppt/slides/slide{number}.xml"] = f"{prolog}<p:sld {names}>{shapes}</p:sld>"
        if notes:
            parts[f"ppt/slides/_rels/slide{number}.xml.rels"] = relations(
                ("n", "notesSlide", f"../notesSlides/notesSlide{number}.xml")
            )
            parts[f"ppt/notesSlides/notesSlide{number}.xml"] = f"<p:notes {names}>{shape(notes, 'body')}</p:notes>"
    return packed(parts)


def shape(text: str, place: str = "") -> str:
    """A shape with a paragraph a line; two spaces before a line put it a level deeper."""
    lines = [(len(line) - len(line.lstrip())) // 2 for line in text.split("\n")]
    said = "".join(
        f'<a:p><a:pPr lvl="{level}"/><a:r><a:t>{escape(line.strip())}</a:t></a:r></a:p>'
        for level, line in zip(lines, text.split("\n"), strict=True)
    )
    placed = f'<p:nvSpPr><p:nvPr><p:ph type="{place}"/></p:nvPr></p:nvSpPr>' if place else ""
    return f"<p:sp>{placed}<p:txBody>{said}</p:txBody></p:sp>"


def pdf_of(objects: list[bytes], root: int = 1) -> bytes:
    """A PDF file of numbered objects, with its table of where they are."""
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root %d 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        *(len(objects) + 1, table, len(objects) + 1, root, start),
    )
    return bytes(out)


def stream(data: bytes, more: bytes = b"", bomb: int = 0) -> bytes:
    """A stream of a PDF; a bomb has so many megabytes of white space after its data."""
    packer = zlib.compressobj(9)
    packed_data = packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)
    packed_data += (packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)) * bomb + packer.flush()
    return b"<< /Length %d /Filter /FlateDecode %s >>\nstream\n%s\nendstream" % (len(packed_data), more, packed_data)


def one_page(content: bytes, *objects: bytes, resources: bytes = b"", bomb: int = 0) -> bytes:
    """A PDF of one page; its own objects begin with number 6."""
    return pdf_of(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
            b"/Resources << /Font << /F1 5 0 R >> %s >> >>" % resources,
            stream(content, bomb=bomb),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
            *objects,
        ]
    )


def pages_of(*pages: list[tuple[float, float, float, str, str]], **options: Any) -> bytes:
    """A PDF: on each page texts, each with its place, size and font."""
    from reportlab.pdfgen.canvas import Canvas

    file = io.BytesIO()
    canvas = Canvas(file, pagesize=(612, 792), invariant=True, **options)
    for page in pages:
        for x, y, size, font, text in page:
            canvas.setFont(font, size)
            canvas.drawString(x, y, text)
        canvas.showPage()
    canvas.save()
    return file.getvalue()

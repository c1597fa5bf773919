"""The text of PDF documents in reading order: headings, lists, tables and columns by where words stand on a page.

Imported where one is read: it takes memory and time.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import pypdfium2
import pypdfium2.raw as pdf

from reader.course_text import BULLET, PAGE, whole_words
from reader.extract import Extract, Refused, note, repair_notes

MAX_PAGES = 1000
MAX_RULES = 5000  # lines and boxes drawn on a page; more are a picture
BULLETS = re.compile(rf"[•◦▪▫‣⁃∙·●○■□►➢➤✓❖–—*{BULLET}-](?=\s|$)|o(?=\t|$)")
NUMBERING = re.compile(r"\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,5})[.)](?=\s|$)|\d+(?:\.\d+)+(?=\s|$)")
NO_SPACES = re.compile("[\u0e00-\u0eff\u3000-\u30ff\u3400-\u9fff\uff00-\uff60]")  # scripts that set none between words
MARKER = re.compile(rf"{BULLETS.pattern}|{NUMBERING.pattern}")
ACCENTS = {"´": "\u0301", "`": "\u0300", "ˆ": "\u0302", "¨": "\u0308", "˜": "\u0303", "¸": "\u0327"}
# An accent that an old font of TeX prints as a character of its own, before its letter: "g´en´eral".
LOOSE_ACCENT = re.compile(r"([´`ˆ¨˜¸])([A-Za-z\u0131])")


@dataclass
class Piece:
    """Words on one baseline that stand close together, and where they stand: y grows upwards."""

    text: str
    left: float
    bottom: float
    right: float
    top: float
    size: float
    bold: bool

    @property
    def middle(self) -> float:
        return (self.bottom + self.top) / 2

    def add(self, other: Piece) -> None:
        self.text = _joined(self.text, other.text)
        self.right, self.top = max(self.right, other.right), max(self.top, other.top)
        self.size = max(self.size, other.size)  # that of a bullet may be smaller
        self.bottom, self.bold = min(self.bottom, other.bottom), self.bold and other.bold


Row = list[Piece]  # what stands on one line of the page, from left to right


def _joined(before: str, after: str) -> str:
    close = before and after and NO_SPACES.match(before[-1]) and NO_SPACES.match(after[0])
    return before + after if close else f"{before} {after}".strip()


def pdf_text(path: str) -> Extract:
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        raise Refused("document_encrypted" if error.err_code in (4, 5) else "document_broken") from None
    pages: list[list[Row]] = []
    rules: list[Rules] = []
    for number in range(min(len(document), MAX_PAGES)):
        try:
            page = document[number]
            pages.append(_rows(_words_on(page)))
            rules.append(_rules_on(page))
            page.close()
        except pypdfium2.PdfiumError:
            pages.append([])
            rules.append(Rules([], []))
    empty = [number for number, rows in enumerate(pages, 1) if not rows]
    if len(empty) == len(pages):
        raise Refused("document_has_no_text")
    notes = [note("pages_without_text", f"Without text, perhaps scans: pages {_ranges(empty)}.")] if empty else []
    if len(document) > MAX_PAGES:
        notes.append(note("left_out", f"Only the first {MAX_PAGES} of {len(document)} pages were read."))
    last, gone = _without_running_lines(pages)
    if gone:
        notes += repair_notes({"page_marks": gone})
    lines = [line for rows, drawn in zip(pages, rules, strict=True) for line in _lines_of(rows, drawn)]
    text = _composed("\n".join([_paragraphs(lines), "", *last]))
    title = str(document.get_metadata_dict().get("Title") or "")
    return Extract(text, title, len(document), notes)


def _words_on(page: Any) -> list[Piece]:
    shown = page.get_textpage()
    words: list[tuple[int, Piece]] = []
    text, first = "", 0
    count = shown.count_chars()
    for at in range(count):
        code = pdf.FPDFText_GetUnicode(shown, at)
        broken = code in (2, 0xFFFE)  # a hyphen at the end of a line
        char = "-" if broken else chr(code) if code and not 0xD800 <= code < 0xE000 else " "
        if not text:
            first = at
        if not char.isspace():
            text += char
        if text and (broken or char.isspace() or at == count - 1):
            words.append(_word(shown, text, first, at - char.isspace()))
            text = ""
    turn = Counter(turn for turn, _ in words).most_common(1)
    return _with_accents([_turned(word, turn[0][0]) for quarter, word in words if quarter == turn[0][0]])


def _with_accents(words: list[Piece]) -> list[Piece]:
    """Puts accents that old fonts of TeX print as characters of their own onto their letters."""
    accents = [word for word in words if word.text in ACCENTS]
    letters = [word for word in words if word.text[0].isalpha()]
    for accent in accents[:500]:
        middle = (accent.left + accent.right) / 2
        for word in letters:
            if word.left < middle < word.right and abs(word.middle - accent.middle) < word.size:
                at = int((middle - word.left) / (word.right - word.left) * len(word.text)) + 1
                word.text = normalize("NFC", word.text[:at] + ACCENTS[accent.text] + word.text[at:])
                accent.text = ""
                break
    return [word for word in words if word.text]


def _word(shown: Any, text: str, first: int, last: int) -> tuple[int, Piece]:
    """A word and how many quarters of a turn it stands askew."""
    begin, end, matrix, name = pdf.FS_RECTF(), pdf.FS_RECTF(), pdf.FS_MATRIX(), ctypes.create_string_buffer(128)
    pdf.FPDFText_GetLooseCharBox(shown, first, begin)
    pdf.FPDFText_GetLooseCharBox(shown, last, end)
    pdf.FPDFText_GetMatrix(shown, first, matrix)
    pdf.FPDFText_GetFontInfo(shown, first, name, 128, None)
    bold = pdf.FPDFText_GetFontWeight(shown, first) >= 600 or re.search(rb"(?i)bold|black|heavy|cmbx|bx\d", name.value)
    size = pdf.FPDFText_GetFontSize(shown, first) * math.hypot(matrix.c, matrix.d)
    left, right = min(begin.left, end.left), max(begin.right, end.right)
    bottom, top = min(begin.bottom, end.bottom), max(begin.top, end.top)
    turn = round(math.atan2(matrix.b, matrix.a) / (math.pi / 2)) % 4
    return turn, Piece(text, left, bottom, right, top, size or top - bottom, bool(bold))


def _turned(word: Piece, turn: int) -> Piece:
    for _ in range(turn):  # a quarter, clockwise
        word.left, word.bottom, word.right, word.top = word.bottom, -word.right, word.top, -word.left
    return word


@dataclass(frozen=True)
class Rules:
    """The lines that are drawn on a page, as tables have them: heights of those across, places of those down."""

    across: list[tuple[float, float, float]]
    down: list[tuple[float, float, float]]

    def part_rows(self, upper: float, lower: float, place: float) -> bool:
        return any(left <= place <= right and lower < height < upper for height, left, right in self.across)

    def columns_at(self, height: float) -> list[float]:
        """The places of the lines between the cells of a table at this height; none outside of one."""
        places = sorted(place for place, bottom, top in self.down if bottom < height < top)
        apart = [place for number, place in enumerate(places) if not number or place - places[number - 1] > 4]
        return apart if len(apart) >= 3 else []


def _rules_on(page: Any) -> Rules:
    across: list[tuple[float, float, float]] = []
    down: list[tuple[float, float, float]] = []
    for shape in itertools.islice(page.get_objects([pdf.FPDF_PAGEOBJ_PATH], max_depth=3), MAX_RULES):
        left, bottom, right, top = shape.get_bounds()
        if right - left > 20:
            across += [(bottom, left, right), (top, left, right)]
        if top - bottom > 6:
            down += [(left, bottom, top), (right, bottom, top)]
    return Rules(across, down)


def _rows(words: list[Piece]) -> list[Row]:
    pieces: list[Piece] = []
    for word in words:
        before = pieces[-1] if pieces else None
        if before and abs(before.middle - word.middle) < 0.5 * before.size:
            gap = word.left - before.right
            if -0.5 * word.size < gap < 1.2 * word.size:
                before.text += "\t" * (gap > 0.7 * word.size)
                before.add(word)
                continue
        pieces.append(word)
    rows: list[Row] = []
    for piece in sorted(pieces, key=lambda piece: -piece.middle):
        if rows and abs(rows[-1][0].middle - piece.middle) < 0.45 * max(rows[-1][0].size, piece.size):
            rows[-1].append(piece)
        else:
            rows.append([piece])
    return [sorted(row, key=lambda piece: piece.left) for row in rows]


def _without_running_lines(pages: list[list[Row]]) -> tuple[list[str], int]:
    """Takes what stands at the top or bottom of several pages out; gives each such line once, and their number."""
    places: dict[tuple[str, int], list[tuple[int, Row]]] = {}
    for number, rows in enumerate(pages):
        for row in {id(row): row for row in [*rows[:2], *rows[-3:]]}.values():
            line = " ".join(piece.text for piece in row)
            if len(line) < 160:
                places.setdefault((re.sub(r"\d+", "#", line), round(row[0].middle / 4)), []).append((number, row))
    said, gone = [], 0
    for (line, _), found in places.items():
        numbered = len(line) <= 12 and bool(PAGE.fullmatch(line.replace("#", "1")))
        if len(pages) > 1 and (numbered or len(found) >= min(3, len(pages))):
            for number, row in found:
                pages[number] = [other for other in pages[number] if other is not row]
            gone += len(found)
            if not numbered and re.search(r"[^\W\d_]{3}", line):
                said.append(" ".join(piece.text for piece in found[0][1]))
    return said, gone


@dataclass
class Line:
    """A line of the text in reading order: one cell, or the cells of a table's row."""

    cells: list[Piece]
    bottom: float
    top: float
    end: float  # where its column ends
    columns: list[float]  # the lines drawn between the cells, if any

    @property
    def text(self) -> str:
        return " | ".join(re.sub(r"\s+", " ", whole_words(cell.text)[0]) for cell in self.cells)

    @property
    def size(self) -> float:
        return self.cells[0].size

    @property
    def rounded(self) -> float:
        return round(self.size * 2) / 2

    @property
    def bold(self) -> bool:
        return all(cell.bold for cell in self.cells)


def _lines_of(rows: list[Row], rules: Rules) -> list[Line]:
    return [line for column in _columns(rows, rules) for line in _table_rows(column, rules)]


def _columns(rows: list[Row], rules: Rules) -> list[list[Row]]:
    """The rows of a page in reading order: where columns stand side by side, one after the other."""
    best: tuple[int, int, int, float] = (0, 0, 0, 0)
    lefts = Counter(round(piece.left / 3) for row in rows for piece in row)
    tabled = [bool(rules.columns_at(row[0].middle)) for row in rows]
    for left, often in lefts.most_common(12):
        gutter = left * 3 - 3.0
        start = 0
        for end in range(len(rows) + 1) if often >= 4 else ():
            if (
                end == len(rows)
                or tabled[end]
                or any(piece.left < gutter - 2 and piece.right > gutter for piece in rows[end])
            ):
                if end - start > best[0] and _are_columns(rows[start:end], gutter):
                    best = (end - start, start, end, gutter)
                start = end + 1
    count, start, end, gutter = best
    if not count:
        return [rows] if rows else []
    left_side = [side for row in rows[start:end] if (side := [piece for piece in row if piece.right <= gutter])]
    right_side = [side for row in rows[start:end] if (side := [piece for piece in row if piece.right > gutter])]
    parts = (rows[:start], left_side, right_side, rows[end:])
    return [column for part in parts for column in _columns(part, rules)]


def _are_columns(rows: list[Row], gutter: float) -> bool:
    """Whether prose stands on both sides; short pieces side by side are a table."""
    spans = []
    for side in (
        [p for row in rows for p in row if p.right <= gutter],
        [p for row in rows for p in row if p.right > gutter],
    ):
        width = max((piece.right for piece in side), default=0) - min((piece.left for piece in side), default=0)
        full = [piece for piece in side if len(piece.text) >= 20 and piece.right - piece.left > 0.7 * width]
        if len(side) < 5 or len(full) < max(4, 0.5 * len(side)):
            return False
        spans.append((side[0].top, side[-1].bottom))
    (top, bottom), (other_top, other_bottom) = spans
    return min(top, other_top) - max(bottom, other_bottom) > 0.4 * min(top - bottom, other_top - other_bottom)


def _table_rows(rows: list[Row], rules: Rules) -> list[Line]:
    lefts = Counter(round(piece.left / 4) for row in rows for piece in row[1:])
    end = max(piece.right for row in rows for piece in row)
    lines: list[Line] = []
    for row in rows:
        columns = rules.columns_at(row[0].middle)
        cells = _cells_between(row, columns) if columns else _cells_by_gaps(row, lefts)
        line = Line(cells, min(piece.bottom for piece in row), max(piece.top for piece in row), end, columns)
        if lines and _goes_on_in_cells(lines[-1], line, rules):
            _add_to_cells(lines[-1], line)
        else:
            lines.append(line)
    return lines


def _cells_between(row: Row, columns: list[float]) -> Row:
    cells: Row = []
    for piece in row:
        if cells and bisect(columns, cells[-1].left + 2) == bisect(columns, piece.left + 2):
            cells[-1].add(piece)
        else:
            cells.append(piece)
    return cells


def _cells_by_gaps(row: Row, lefts: Counter[int]) -> Row:
    """Pieces are cells where others begin at the same place, or far from what stands before them."""
    cells = row[:1]
    for piece in row[1:]:
        aligned = sum(lefts[round(piece.left / 4) + step] for step in (-1, 0, 1)) >= 2
        apart = aligned or piece.left - cells[-1].right > 3 * piece.size
        if apart and not (len(cells) == 1 and MARKER.fullmatch(cells[0].text)):
            cells.append(piece)
        else:
            cells[-1].text += "\t"
            cells[-1].add(piece)
    return cells


def _goes_on_in_cells(row: Line, line: Line, rules: Rules) -> bool:
    """Whether a line is more of the text in the cells of the table's row above it."""
    upper, lower = row.cells[0].middle, line.cells[0].middle
    if row.columns or line.columns:
        same = len(row.columns) == len(line.columns) and abs(row.columns[0] - line.columns[0]) < 3
        return same and not rules.part_rows(upper, lower, row.columns[0] + 2)
    lefts = [cell.left for cell in row.cells]
    if len(lefts) < 2 or row.bottom - line.top > 0.8 * line.size or abs(lefts[0] - line.cells[0].left) < 8:
        return False
    aligned = all(min(abs(left - cell.left) for left in lefts) < 8 for cell in line.cells)
    return aligned and not rules.part_rows(upper, lower, lefts[0] + 2)


def _add_to_cells(row: Line, line: Line) -> None:
    for cell in line.cells:
        place = bisect(row.columns, cell.left + 2)
        above = [other for other in row.cells if bisect(row.columns, other.left + 2) == place]
        if above:
            nearest = min(above, key=lambda other: abs(other.left - cell.left))
            nearest.text += ("\n" if nearest.text.endswith("-") else " ") + cell.text
        else:
            row.cells.append(cell)
    row.cells.sort(key=lambda cell: cell.left)
    row.bottom = line.bottom


class Sizes:
    """What the sizes of the type say: which is the text's, and which lines are headings of which level."""

    def __init__(self, lines: list[Line]) -> None:
        sizes: Counter[float] = Counter()
        for line in lines:
            sizes[line.rounded] += len(line.text)
        self.body = sizes.most_common(1)[0][0]
        self.larger = sorted({size for size in sizes if size > 1.12 * self.body}, reverse=True)[:3]
        self.all_bold = sum(len(line.text) for line in lines if line.bold) > 0.4 * sizes.total()

    def level(self, line: Line, flows: bool) -> int:
        """The level of a heading; 0 for text. A short line all in bold is one of the lowest level."""
        text = line.text
        if len(line.cells) > 1 or len(text) > 120 or len(re.findall(r"[^\W\d_]", text)) < 2 or BULLETS.match(text):
            return 0
        if line.rounded > 1.12 * self.body:
            return 1 + sum(line.rounded < size for size in self.larger)
        bold = line.bold and not self.all_bold and not flows and len(text) <= 80 and text[-1] not in ".,;"
        return len(self.larger) + 1 if bold else 0


def _paragraphs(lines: list[Line]) -> str:
    """The text of lines in reading order, with headings, lists and whole paragraphs."""
    sizes = Sizes(lines)
    said: list[str] = []
    indents: list[float] = []  # of the lists that the line is in
    before: Line | None = None
    for line in lines:
        text = line.text
        flows = before is not None and _flows(before, line)
        mark, number = BULLETS.match(line.cells[0].text), NUMBERING.match(text)
        if level := sizes.level(line, flows):
            marks = "#" * level + " "
            if flows and said[-1].startswith(marks):
                said[-1] += f" {text}"
            else:
                said += ["", marks + text]
        elif mark or number:
            while indents and line.cells[0].left < indents[-1] - 3:
                indents.pop()
            if not indents or line.cells[0].left > indents[-1] + 3:
                indents.append(line.cells[0].left)
            said.append("  " * (len(indents) - 1) + (f"- {text[mark.end() :].strip()}" if mark else text))
        elif flows and not said[-1].startswith("#"):
            broken = said[-1].endswith("-") and text[0].isalpha()
            said[-1] = f"{said[-1]}\n{text}" if broken else _joined(said[-1], text)
        else:
            in_table = before is not None and len(before.cells) > 1 and len(line.cells) > 1
            room = (2.5 if in_table else 0.7) * line.size
            gap = before.bottom - line.top if before else 0.0
            apart = gap > room or gap < -line.size or not said or said[-1].startswith("#")
            said += ["", text] if apart else [text]
        if not (mark or number or flows):
            indents = []
        before = line
    return "\n".join(said)


def _flows(before: Line, line: Line) -> bool:
    """Whether a line is in the middle of a paragraph: its first word had no room on the line before."""
    if len(before.cells) > 1 or len(line.cells) > 1 or abs(before.size - line.size) > 0.1 * line.size:
        return False
    last, piece = before.cells[0], line.cells[0]
    if BULLETS.match(piece.text) or NUMBERING.match(piece.text) or (line.bold and not before.bold):
        return False
    first = 1 if NO_SPACES.match(piece.text) else len(piece.text.split()[0])
    room = before.end - last.right - 0.3 * line.size
    runs_on = last.text[-1] not in ".!?:;。" and piece.text[0].islower() and last.right - last.left > 3 * room
    full = room < (piece.right - piece.left) * first / len(piece.text) or runs_on
    gap = before.bottom - line.top
    if gap < -line.size:  # on the next page or in the next column
        return (
            full and last.text[-1] not in ".!?:;。" and (piece.text[0].islower() or bool(NO_SPACES.match(piece.text)))
        )
    return full and gap < 0.6 * line.size


def _composed(text: str) -> str:
    if len(re.findall(r"[´¨ˆ˜][A-Za-zı]", text)) < 3:
        return text
    return LOOSE_ACCENT.sub(lambda m: normalize("NFC", m[2].replace("ı", "i") + ACCENTS[m[1]]), text)


def _ranges(numbers: list[int]) -> str:
    """1-3, 5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)

"""Plain text out of the course texts that people have: HTML, Markdown, text with the dirt of PDF files.

A program of its own, not a part of the service: documents can be made to take minutes and gigabytes, so dccapi.py runs
this file in processes with limits of memory and time. `python documents.py` reads JSON from stdin, each behind its
length in eight bytes, `{"task": one of TASKS, ...its arguments}`, and writes JSON to stdout in the same way: what the
task returns, or `{"error", "detail"}`. It ends when stdin does.

Text is taken for HTML or Markdown only where it shows that it is, and what tools did to it is undone only where no fact
changes. Of text without markup and dirt every character stays.
"""

from __future__ import annotations

import codecs
import ctypes
import itertools
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html import unescape
from typing import Any

import orjson
from ftfy import fix_encoding
from ftfy.badness import badness
from selectolax.lexbor import LexborHTMLParser

MAX_MEMORY = 2**29  # bytes of one process

# One character that can be seen: neither control nor space nor format character.
VISIBLE = r"[^\x00-\x20\x7f-\xa0\xad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]"

# Only the names of HTML make a tag: `vector<int>` and `<Introduction to Python>` are text of the course.
BLOCK = "p|div|section|article|header|footer|main|nav|h[1-6]|ul|ol|li|dl|dt|dd|table|tr|pre|blockquote|details|summary"
NAME = (
    rf"(?:{BLOCK}|html|head|body|meta|link|object|embed|img|picture|source|figure|figcaption|video|audio|t(?:head|body|foot)"
    r"|t[hd]|col|colgroup|caption|form|fieldset|legend|label|input|button|select|option|textarea|address|aside|[bh]r|wbr"
    r"|abbr|big|center|cite|code|del|dfn|em|font|ins|kbd|mark|rp|rt|ruby|samp|small|span|strike|strong|su[bp]|time|tt|var"
    r"|math|semantics|m(?:[inos]|text|row|frac|sqrt|root|su[bp]|subsup|under|over|underover|style|space|padded|fenced|table"
    r"|t[rd])|\w+:\w+|[abiqsu](?!\s[^<>=]*>))"
)
COMMENT = r"<!--(?:[^<]|<(?!!--))*?-->"
NO_TEXT = (
    r"(?is)<(head|script|style|noscript|template|svg|iframe|annotation(?:-xml)?)\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>"
    rf"|{COMMENT}"
)
# HTML is what begins with a tag, or has tags that touch the text they mark. Prose about HTML sets its tags apart.
IS_HTML = (
    rf"\s*(?:\Z|<(?i:!doctype|\?xml)|<(?i:{NAME})(?:\s[^<>]*=[^<>]*>"
    rf"|\s*/?>(?:(?![\s.,;:)/-])|\s*(?:<|\Z)|\s+(?![a-z])\w(?s:.*)</(?i:{NAME})\s*>)))"
)
HAS_HTML = (
    rf"(?im)[^\s\"'`(</>]</{NAME}\s*>|[^\s\"'`(</>]<[bh]r\s*/?>|^[ \t]*<br\s*/?>\w"
    rf"|<br\s*/?>[ \t]*(?:\n|<br)|[.!?] <br\s*/?>|(?:^[ \t]*<{NAME}|<img)\s[^<>]*=[^<>]*>"
)
TELLS_OF_HTML = rf"(?i:(?<![\w./\"'=<-])x?html)|\btags?\b|[\"'`]<(?i:{NAME})>|\w,? <(?i:{NAME})>(?:[,.;)]| [a-z])"
# None that a C program takes the address of: `&sum;`, `&int;`.
ENTITY = r"&(?:amp|lt|gt|quot|nbsp|[lr][sd]quo|[mn]dash|[A-Za-z](?:uml|acute|grave|circ|tilde|cedil)|#x?\w{2,5});"
BLOCKS = "br,hr,option,caption,figcaption,h1,h2,h3,h4,h5,h6," + BLOCK.replace("|h[1-6]", "").replace("|", ",")
FORMULAS = {
    "sup": "^{0}\ufdd0", "sub": "_{0}\ufdd0", "msup": "{0}^{1}", "msub": "{0}_{1}", "msubsup": "{0}_{1}^{2}",
    "mfrac": " {0}/{1} ", "msqrt": "√{0}", "mroot": "{0}^(1/{1})", "munder": "{0}_{1}", "munderover": "{0}_{1}^{2}",
}  # fmt: skip

# A block of `key: value` lines with small letters; others between rulers are courses.
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?=[a-z])((?:[a-z][\w-]*:.*\n|[ \t#-].*\n)*?)---[ \t]*\n")
TOLD_IN_FRONT = re.compile(r"(?m)^(?:title|name|subtitle|description|summary|abstract|keywords|topics):[ \t]*(.+)")
CODE = re.compile(
    r"(?m)^[ \t]*+(?P<fence>`{3,6}|~{3,6})(?![`~])[ \t]*+[\w+#.{}-]*+[ \t]*\n(?P<lines>(?:(?![ \t]*+(?P=fence)).*\n)*+)"
    r"[ \t]*+(?P=fence)[ \t]*+$|(?<!`)(?P<ticks>``?)(?P<inline>[^`\s](?:[^`\n]*[^`\s])?)(?P=ticks)(?![`\w])"
)
# Beside a mark stands no letter, unless its script sets no spaces between words: `2*3*4`, `a[i](x.y)`.
BEFORE, AFTER = r"(?<![^\s(\[>|~¿¡«\u0e00-\U0010ffff])", r"(?![^\s.,;:!?)\]|*_~'»\u0e00-\U0010ffff-])"
ADDRESS = r"""\(\s*<?(?=[^\s()]*[a-zA-Z#])[^\s()<>]*[/.#:@](?:[^\s()<>]|\([^\s()]*\))*+>?(?:\s+["'][^()]*)?\s*\)"""
IMAGE = rf"!\[(?P<alt>[^][]*)\]{ADDRESS}"
REFERENCE = r"(?<![^\W\u0e00-\uffff])\[(?P<text>[^][\n]+)\]\[(?P<label>[^][\n]*)\]"
DEFINITION = r"(?m)^ {0,3}\[([^][\n]+)\]:[ \t]+<?(?:https?://|mailto:|[./#])\S*(?:[ \t]+[\"'(].*)?\n?"
TABLE = (
    r"(?m)^(?P<head>(?=[^|\n]*+\|).*\n)[ \t]*+\|?+(?:[ \t]*+:?-++:?[ \t]*+\|)++(?:[ \t]*+:?-++:?)?[ \t]*+(?:\n|\Z)"
    r"(?P<rows>(?:(?=[^|\n]*+\|).*(?:\n|\Z))*+)"
)
EMPHASIS = (
    rf"{BEFORE}(?P<mark>\*\*|__(?!\w+?__)|\*(?!.\*)|_(?!._))(?=[\w*\"'(\[$\ufdd1])(?!(?:(?!(?P=mark))[^(\n])*\))"
    rf"(?P<text>(?:(?!(?P=mark))[^\n]|\n(?![\s*#>-]))++(?<=\S))(?P=mark){AFTER}"
)
MARKS = (
    rf"(?<![^\W\u0e00-\uffff])\[(?P<text>[^][]*+(?:\[[^][]*+\][^][]*+)*+)\]{ADDRESS}",
    rf"(?m)^[ \t]*{COMMENT}[ \t]*\n?(?P<text>)",
    r"(?m)^(?:> ?)*+#{1,6}[ \t]++(?!of\b)(?P<text>\S)",
    r"(?m)^(?:={3,}|-{3,}|:{3,}[ \t]*+\w*+)[ \t]*+(?:\n|\Z)(?P<text>)",
    EMPHASIS,
    EMPHASIS,  # one kind within another
)

# Dirt that tools leave, and what belongs there. Joiners mean something in Indic and Arabic scripts and in emoji.
JOINED = r"\u0590-\u1fff\u2190-\ufdff\ufe00-\ufe0f\ufe70-\ufefc\U00010000-\U0010ffff"
BULLET = r"\uf02d\uf06c-\uf077\uf09e-\uf0a8\uf0b2\uf0b7\uf0d8\uf0e8\uf0f0\uf0fc-\uf0fe"
LIGATURES = ("ff", "fi", "fl", "ffi", "ffl", "st", "st")
DIRT: tuple[tuple[str, str, Any], ...] = (
    ("soft_hyphens", r"\xad[ \t]*\n[ \t]*(?=\w)|\xad|(?<=[^\W\d_])\xac\n[ \t]*(?=[^\W\d_])", ""),
    ("zero_width", rf"[\u2060-\u2064\ufeff\u180e]|(?<![\u0e00-\u17ff])\u200b|(?<![{JOINED}])[\u200c\u200d]", ""),
    ("ligatures", r"[\ufb00-\ufb06]", lambda found: LIGATURES[ord(found[0]) - 0xFB00]),
    ("bullets", rf"(?m)^([ \t]*)[{BULLET}][ \t\xa0]*", r"\1- "),
    ("bullets", r"[\uf0a7\uf0b7]", "•"),
)
BROKEN = re.compile(r"(?<![\w-])([^\W\d_]+[^\W\d_])[-\u2010]\n\s*(?!(?:\1|and|und|oder|och)\b)([^\W\d_]{2,})(?!\w)")
HYPHENATED = re.compile(
    r"(?:self|well|non|ex|all|cross|half|high|low|long|short|full|two|three|four)-|\w+-(?:based|led|free|cent(?:er|re)d"
    r"|driven|oriented|related|specific|level|long|term|time|wide|making|solving|friendly)$"
)
PAGE = re.compile(
    r"(?i)[\s|·–—-]*+(?:(?P<title>.*?)(?<!\w)(?P<word>page|pg?\.|seite|página|pagina|sivu|sida|strona|стр\.|第)\s*)?"
    r"(?P<number>\d{1,4})\s*(?:(?:/|of|von|de|di|sur|av|z|из)\s*(?P<last>\d{1,4}))?[\s|·–—页頁-]*"
)


@dataclass(frozen=True)
class CourseText:
    """What a course says, and how often each kind of dirt was taken from it."""

    text: str
    repairs: dict[str, int]


def plain_text(content: str) -> CourseText:
    """What a course says, without the markup of HTML, Word's HTML or Markdown, which costs tokens. No text is lost."""
    text = re.sub(r"\r\n?", "\n", content).replace("\ufdd1", "").lstrip("\ufeff")
    if front := FRONT_MATTER.match(text):
        text = "\n".join([*TOLD_IN_FRONT.findall(front[1]), "", text[front.end() :]])
    code, numbers = [*CODE.finditer(text)], itertools.count()
    text = _without_html(CODE.sub(lambda _: f"\ufdd1{next(numbers)}\ufdd1", text))
    plain = _without_markdown(text)
    if plain != text or any(found["fence"] for found in code):
        said = [found["inline"] or found["lines"].strip("\n") for found in code]
    else:
        said = [found[0] for found in code]
    return _tidied(re.sub("\ufdd1(\\d+)\ufdd1", lambda found: said[int(found[1])], plain))


def _tidied(text: str) -> CourseText:
    """Without the dirt that tools leave, which is counted."""
    repairs = {"mojibake": badness(text)}
    if repairs["mojibake"]:
        text = re.sub(r".+", lambda line: fix_encoding(line[0]), text)
        repairs["mojibake"] -= badness(text)
    for kind, dirt, clean in DIRT:
        text, count = re.subn(dirt, clean, text)
        repairs[kind] = repairs.get(kind, 0) + count
    text, repairs["page_marks"] = _without_page_marks(text)
    text, repairs["hyphenation"] = whole_words(text)
    return CourseText(text.strip(), {kind: count for kind, count in repairs.items() if count > 0})


def _is_html(text: str) -> bool:
    text = re.sub(NO_TEXT, "", text)
    return bool(re.match(IS_HTML, text) or (re.search(HAS_HTML, text) and not re.search(TELLS_OF_HTML, text)))


def _without_html(text: str) -> str:
    for _ in range(2 if "&" in text else 0):  # it may have been escaped, even twice
        bare = re.sub(ENTITY, lambda found: unescape(found[0]), text)
        escaped = "<" not in text and not re.search(rf"&(?!{ENTITY[1:]})|(?i:html)", text)
        if not _is_html(text) and (escaped or _is_html(bare)):
            text = bare
    return said_in_html(text) if "<" in text and _is_html(text) else text


def said_in_html(text: str, marked: bool = False) -> str:
    """The text of HTML, in which other text may stand, or of an HTML document: `marked`, as Markdown marks it."""
    text = re.sub(NO_TEXT, "", text)
    if marked:
        _limit(text)
    else:
        text = re.sub(rf"(?i)<(?!/?{NAME}(?:\s[^<>]*)?/?>|!doctype|!\[|\?xml)", "&lt;", text)
    tree = LexborHTMLParser(text)
    for node in tree.css("img"):
        node.replace_with(_formula(node.attributes.get("alt") or ""))
    room = 2**24  # a deep nest would take the square of its size
    for node in reversed(tree.css(",".join(FORMULAS))):  # inner ones first
        if (room := room - len(node.html or "")) < 0:
            break
        shape = FORMULAS[node.tag or ""]
        said = [part.text() for part in (node.iter(include_text=True) if "{1}" in shape else [node])]
        parts = [_operand(part) for part in said if part.strip()]
        if len(parts) == shape.count("{") and not re.match(r"\(.*[*\[®™]|(st|nd|rd|th|TM)$", parts[0]):
            node.replace_with(shape.format(*parts))
    if marked:
        _mark(tree)
    for node in tree.css(BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    for cell in tree.css("td,th"):
        cell.insert_after(CELL if marked else " | ")
    text = re.sub(r"(?<=\d)\ufdd0(?=\d)", " ", tree.body.text() if tree.body else "").replace("\ufdd0", "")
    text = re.sub(r"(?m)^ +| +$", "", re.sub(r"[ \t\xa0]+", " ", text))
    if marked:
        text = _with_marks(text)
    return re.sub(r"\n{3,}", "\n\n", text)


# Noncharacters that stand for marks while the text of HTML is put together: a row and a heading begin and end, an item
# begins, one step of indentation.
ROW, ROW_END, HEAD, HEAD_END, ITEM, STEP, CELL = "\ufdd2\ufdd3\ufdd4\ufdd5\ufdd6\ufdd7\ufdd8"
NOT_SAID = "nav,footer,button,select,input,textarea,[hidden]"


def _limit(html: str) -> None:
    """Refuses documents of more elements, or deeper ones, than can be read in time."""
    depth = 0
    for tag in TAGS.finditer(html) if html.count("<") < 2 * MAX_ELEMENTS else ():
        depth = max(0, depth - 1) if tag[1] else depth + 1
        if depth > MAX_DEPTH:
            raise Refused("document_broken", TOO_LARGE)
    if len(html) > 4 * MAX_TEXT or html.count("<") >= 2 * MAX_ELEMENTS:
        raise Refused("document_broken", TOO_LARGE)


def _mark(tree: LexborHTMLParser) -> None:
    for node in tree.css(NOT_SAID):
        node.decompose()
    for node in tree.css("br"):
        node.replace_with("\n")
    for node in tree.css("p"):  # a line all in bold is a heading of those who know no styles
        if (
            0 < len(line := node.text().strip()) < 80
            and line[-1] not in ".,;:!?"
            and not _lies_in(node, "td", "th", "li")
        ):
            bold = "".join(part.text() for part in node.css("strong,b")).strip()
            if bold == line:
                _wrap(node, HEAD + "## ", HEAD_END)
    for level in range(1, 7):
        for node in tree.css(f"h{level}"):
            _wrap(node, HEAD + "#" * level + " ", HEAD_END)
    for node in tree.css("tr"):
        _wrap(node, ROW, ROW_END)
    for listing in tree.css("ul,ol"):
        depth = _lies_in(listing, "ul", "ol")
        items = (item for item in listing.iter() if item.tag == "li" and not _only_nests(item))
        for number, item in enumerate(items, int(listing.attributes.get("start") or 1)):
            item.insert_before(ITEM + STEP * depth + ("- " if listing.tag == "ul" else f"{number}. "))


def _wrap(node: Any, before: str, after: str) -> None:
    node.insert_before(before)
    node.insert_after(after)


def _only_nests(item: Any) -> bool:
    """Whether an item is there only for the list in it."""
    first = next(item.iter(), None)
    return first is not None and first.tag in ("ul", "ol") and not item.text(deep=False).strip()


def _lies_in(node: Any, *tags: str) -> int:
    """How many of these elements lie around a node; deeper nests than any document has are not counted out."""
    count = 0
    for _ in range(40):
        node = node.parent
        if node is None:
            break
        count += node.tag in tags
    return min(count, 6)


def _with_marks(text: str) -> str:
    text = re.sub(f"{HEAD}([^{HEAD}{HEAD_END}]*){HEAD_END}", lambda head: f"\n\n{' '.join(head[1].split())}\n\n", text)
    text = re.sub(f"\n\n#+ *\n\n|[{HEAD}{HEAD_END}]", "\n\n", text)
    text = re.sub(rf"\s*{ROW}([^{ROW}{ROW_END}]*){ROW_END}(?=(\s*{ROW})?)", _row, text)
    text = re.sub(rf"{ITEM}{STEP}*\S+\s*(?=[{ITEM}#]|\Z)", "", text)  # an item that says nothing
    text = re.sub(rf"\s*{ITEM}({STEP}*)(\S+)\s*", lambda item: f"\n{item[1]}{item[2]} ", text)
    return re.sub(f"[{ROW}{ROW_END}{CELL}]", "\n", text).replace(STEP, "  ")


def _row(found: re.Match[str]) -> str:
    """A line with the cells of a row; blank lines before and after the table."""
    cells = [_cell(cell) for cell in found[1].split(CELL)]
    line = " | ".join(cells[:-1]) if sum(map(bool, cells)) > 1 else "".join(cells)
    before = "\n" if found.string[found.start() - 1 : found.start()] == ROW_END else "\n\n"
    return before + line + ("" if found[2] else "\n\n")


def _cell(text: str) -> str:
    """The paragraphs and items of a cell on one line."""
    parts = re.split(rf"\s*(?:\n|{ITEM}{STEP}*(?:-|\d+\.)(?=\s))\s*", text.strip())
    return re.sub(r"(?<=[.;:,!?]); ", " ", "; ".join(" ".join(part.split()) for part in parts if part.strip()))


def _operand(text: str) -> str:
    text = " ".join(text.split())
    return text if re.fullmatch(r"[+−-]?\w*(?:[.,]\w+)?|\(.*\)", text) else f"({text})"


def _formula(alt: str) -> str:
    """What an image says that stands for a formula."""
    tex = re.sub(r"^\s*(?:La)?TeX:\s*", "", alt)
    return tex if tex != alt or re.search(r"\$.+\$|\\[a-zA-Z(\[]|\w\^", alt) else ""


def _without_markdown(text: str) -> str:
    plain = re.sub(IMAGE, lambda image: _formula(image["alt"]), text)
    plain = re.sub(TABLE, lambda table: re.sub(r"(?m)^[ \t]*\|[ \t]*", "", table["head"] + table["rows"]), plain)
    used = {(label or said).casefold() for said, label in re.findall(REFERENCE, plain)}
    used &= {label.casefold() for label in re.findall(DEFINITION, plain)}
    plain = re.sub(REFERENCE, lambda m: m["text"] if (m["label"] or m["text"]).casefold() in used else m[0], plain)
    plain = re.sub(DEFINITION, lambda m: "" if m[1].casefold() in used else m[0], plain)
    for mark in MARKS:
        plain = re.sub(mark, r"\g<text>", plain)
    if plain == text or not re.search(VISIBLE, plain):
        return text
    return re.sub(r"\n{3,}", "\n\n", plain)


def _without_page_marks(text: str) -> tuple[str, int]:
    """Without page numbers that count up, and without lines that stand again where pages begin and end.

    The first of equal lines stays, so no fact is lost.
    """
    lines = text.replace("\f", "\n\f\n").split("\n")
    rows = [number for number, line in enumerate(lines) if line == "\f" or line.strip()]
    pages = {at: "" for at, number in enumerate(rows) if lines[number] == "\f"}
    borders = {*pages, -1, len(rows)} if pages else set()
    seen: dict[tuple[str, int], int] = {}
    for at, number in enumerate(rows):
        page = PAGE.fullmatch(lines[number].strip()) if len(lines[number]) <= 120 else None
        if page and (page["word"] or page["last"] or borders & {at - 1, at + 1}):
            title, place = page["title"] or "", int(page["number"])
            if at - (before := seen.get((title, place - 1), at)) >= 3:
                pages |= {before: title, at: title}
            seen[title, place] = at
    beside: dict[str, list[int]] = {}
    for at in {near for border in {*pages, -1, len(rows)} for near in range(border - 2, border + 3)} - pages.keys():
        if pages and 0 <= at < len(rows) and ":" not in lines[rows[at]]:
            beside.setdefault(lines[rows[at]].strip(), []).append(at)
    often = {line: places for line, places in beside.items() if len(places) >= max(3, len(pages) / 3)}
    pages |= {at: line for line, places in often.items() for at in places}
    first = {line: at for at, line in sorted(pages.items(), reverse=True) if line}
    gone = {rows[at] for at, line in pages.items() if first.get(line) != at}
    return "\n".join(line for number, line in enumerate(lines) if number not in gone), len(gone)


def whole_words(text: str) -> tuple[str, int]:
    """Without the hyphens of line ends, where the text or the parts tell that the word is written without one."""
    words = set(re.findall(r"\w+(?:-\w+)*", BROKEN.sub(" ", text).casefold())) if BROKEN.search(text) else set()

    def whole(found: re.Match[str]) -> str:
        first, second = found[1].casefold(), found[2].casefold()
        if found.string[found.end() : found.end() + 1] == "-":  # free-for-all
            return f"{found[1]}-{found[2]}"
        if first + second not in words:
            if f"{first}-{second}" in words or HYPHENATED.match(f"{first}-{second}"):
                return f"{found[1]}-{found[2]}"
            if {first, second} <= words or len(second) < 3 or not (found[1][-1] + found[2][0]).islower():
                return found[0]
        return found[1] + found[2]

    plain = BROKEN.sub(whole, text)
    return plain, text.count("\n") - plain.count("\n")


# ---- Documents ------------------------------------------------------------------------------------------------------

DETAILS = {
    "document_broken": "The document is damaged and cannot be read. Open it, save it anew, and send it again.",
    "document_encrypted": "The document is protected with a password. Remove the password and send it again.",
    "document_has_no_text": "The document has no text; it may be a scan. Run OCR on it first, or paste its text.",
    "document_too_slow": "The document takes too long to read. Send a shorter one, or paste its text.",
    "unsupported_media_type": "Send a PDF, DOCX, PPTX, ODT, HTML, Markdown or plain text document.",
}
TOO_LARGE = "The document unpacks to more than can be read. Send a shorter one, or paste its text."
# Of scripts without spaces, two letters are about a word.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
MAX_TEXT = 2**21  # characters of a document that are read: about 700 pages
MAX_ELEMENTS, MAX_DEPTH = 100_000, 500  # of HTML, whose tree takes time and memory
# HTML need not say where these end.
TAGS = re.compile(
    r"<(/?)(?!(?:p|li|dt|dd|t[rhd]|thead|tbody|tfoot|option|br|hr|img|input|meta|link|col|wbr)\b)[a-zA-Z]"
)


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


# ---- Any document ---------------------------------------------------------------------------------------------------

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
CHARSET = re.compile(rb"""(?i)charset\s*=\s*["']?([\w.:-]+)|<\?xml[^>]*encoding=["']([\w.:-]+)""")
REPAIRED = {
    "mojibake": "Garbled characters were put right",
    "soft_hyphens": "Soft hyphens were taken out",
    "zero_width": "Invisible characters were taken out",
    "ligatures": "Ligatures were written as letters",
    "bullets": "Bullets of symbol fonts were written as list marks",
    "page_marks": "Running headers, footers and page numbers were left out",
    "hyphenation": "Words that were broken at the end of a line were joined",
}


def kind_of(path: str) -> str:
    """The kind of a document by its content. Its name and media type only tell text from text."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        import documents_office

        if kind := documents_office.Package(path).kind():
            return kind
        raise Refused(
            "unsupported_media_type", "This is an archive or a spreadsheet. " + DETAILS["unsupported_media_type"]
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

        best = charset_normalizer.from_bytes(data[: 2**18]).best()
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
        not markdown and _is_html(text)
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
        import documents_pdf

        found = documents_pdf.pdf_text(path)
    elif kind in ("docx", "pptx", "odt"):
        import documents_office

        found = documents_office.READERS[kind](path)
    else:
        found = text_of_file(path, name, media_type)
    if len(found.text) > MAX_TEXT:
        found.notes.append(note("left_out", f"Only the first {MAX_TEXT:,} characters were read."))
    tidy = _tidied(found.text[:MAX_TEXT])
    if not re.search(VISIBLE, tidy.text):
        raise Refused("document_has_no_text")
    notes = found.notes + [
        note("text_repaired", f"{REPAIRED[kind]} ({count}).") for kind, count in tidy.repairs.items()
    ]
    return {
        "content": tidy.text,
        "title": _title(found.title, tidy.text),
        "language": language_of(tidy.text),
        "pages": found.pages,
        "words": len(tidy.text.split()) + len(UNSPACED.findall(tidy.text)) // 2,
        "notes": notes,
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


def language_of(text: str) -> str:
    """The BCP 47 tag of a text's language; "und" if it is not known."""
    try:
        import review
    except ImportError:  # beside this file stands no review.py
        return "und"
    return str(review.language_of(text))


# ---- The program ----------------------------------------------------------------------------------------------------

MAX_SECONDS = {"document": 15}  # of processor time; others have 5


def text(content: str) -> dict[str, Any]:
    said = plain_text(content)
    return {"text": said.text, "repairs": said.repairs, "language": language_of(said.text)}


def condense(**arguments: Any) -> dict[str, Any]:
    import condense

    return condense.condense(**arguments)


def review(**arguments: Any) -> dict[str, Any]:
    import review

    return review.review(**arguments)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "text": text,
    "document": document,
    "condense": condense,
    "review": review,
}


def answered(request: dict[str, Any]) -> bytes:
    """The answer to a request. Each document is read in a process of its own: parsers in C end that, not this one,
    and keep no memory."""
    return _answered_apart(request) if request.get("task") == "document" else orjson.dumps(result_of(request))


def result_of(request: dict[str, Any]) -> dict[str, Any]:
    """What a task returns, or why it does not."""
    name = request.pop("task", None)
    try:
        _allow(MAX_SECONDS.get(name, 5))
        return TASKS[name](**request)
    except Refused as refused:
        return _error(refused.code, refused.detail)
    except MemoryError:
        return _error("document_broken", TOO_LARGE)
    except Exception:  # a parser met what it was not made for
        return _error("document_broken")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _error(code: str, detail: str = "") -> dict[str, Any]:
    return {"error": code, "detail": detail or DETAILS[code]}


def _answered_apart(request: dict[str, Any]) -> bytes:
    outlet, inlet = os.pipe()
    if not (process := os.fork()):
        try:
            os.close(outlet)
            _end_with_parent()
            answer = orjson.dumps(result_of(request))
            with open(inlet, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(inlet)
    with open(outlet, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == 0:
        return answer
    slow = status == -signal.SIGXCPU
    return orjson.dumps(_error("document_too_slow") if slow else _error("document_broken", TOO_LARGE))


def _end_with_parent() -> None:
    """The service kills the process that it has started. Where there is no prctl, the limits end this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:  # it is dead already
            os._exit(1)


def _allow(seconds: int) -> None:
    """Sets the processor time of a task. Python is interrupted after it; C code that goes on is killed by SIGXCPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 3, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)


def _too_slow(*_: object) -> None:
    raise Refused("document_too_slow")


def _confine() -> None:
    """Limits what a document that takes over a parser can do: memory, files, network, other programs."""
    if sys.platform != "darwin":  # which knows no limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of files: libraries try whether they can write one
    signal.signal(signal.SIGPROF, _too_slow)
    sys.addaudithook(_refuse)


# A socket alone reaches nobody, and urllib3 binds one when it is imported.
FORBIDDEN = (
    "socket.connect",
    "socket.send",
    "socket.get",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.system",
)


def _refuse(event: str, _: object) -> None:
    if event.startswith(FORBIDDEN):
        raise PermissionError(event)


def main() -> None:
    """Reads requests from stdin, writes answers to stdout, each behind its length in eight bytes, until EOF."""
    _confine()
    while head := sys.stdin.buffer.read(8):
        answer = answered(orjson.loads(sys.stdin.buffer.read(int.from_bytes(head))))
        sys.stdout.buffer.write(len(answer).to_bytes(8) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    import documents  # the readers know this file by its name, so that is the one to run

    documents.main()

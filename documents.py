"""Plain text out of the course texts that people have: HTML, Markdown, text with the dirt of PDF files.

A program of its own, not a part of the service: markup can be made to take minutes and gigabytes, so dccapi.py runs
this file in processes with a limit of memory, and kills one that is too slow. `python documents.py` reads texts from
stdin and writes what they say to stdout, each behind its length in eight bytes, until stdin ends.

Text is taken for HTML or Markdown only where it shows that it is, and what tools did to it is undone only where no fact
changes. Of text without markup and dirt every character stays.
"""

from __future__ import annotations

import itertools
import re
import resource
import sys
from dataclasses import dataclass
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
    text = re.sub("\ufdd1(\\d+)\ufdd1", lambda found: said[int(found[1])], plain)
    repairs = {"mojibake": badness(text)}
    if repairs["mojibake"]:
        text = re.sub(r".+", lambda line: fix_encoding(line[0]), text)
        repairs["mojibake"] -= badness(text)
    for kind, dirt, clean in DIRT:
        text, count = re.subn(dirt, clean, text)
        repairs[kind] = repairs.get(kind, 0) + count
    text, repairs["page_marks"] = _without_page_marks(text)
    text, repairs["hyphenation"] = _with_whole_words(text)
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
    if "<" not in text or not _is_html(text):
        return text
    text = re.sub(rf"(?i)<(?!/?{NAME}(?:\s[^<>]*)?/?>|!doctype|!\[|\?xml)", "&lt;", re.sub(NO_TEXT, "", text))
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
    for node in tree.css(BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    for cell in tree.css("td,th"):
        cell.insert_after(" | ")
    text = re.sub(r"(?<=\d)\ufdd0(?=\d)", " ", tree.body.text() if tree.body else "").replace("\ufdd0", "")
    text = re.sub(r"(?m)^ +| +$", "", re.sub(r"[ \t\xa0]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text)


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


def _with_whole_words(text: str) -> tuple[str, int]:
    """Without the hyphens of line ends, where the text or the parts tell that the word is written without one."""
    words = set(re.findall(r"\w+(?:-\w+)*", BROKEN.sub(" ", text).casefold())) if BROKEN.search(text) else set()

    def whole(found: re.Match[str]) -> str:
        first, second = found[1].casefold(), found[2].casefold()
        if first + second not in words:
            if f"{first}-{second}" in words or HYPHENATED.match(f"{first}-{second}"):
                return f"{found[1]}-{found[2]}"
            if {first, second} <= words or len(second) < 3 or not (found[1][-1] + found[2][0]).islower():
                return found[0]
        return found[1] + found[2]

    plain = BROKEN.sub(whole, text)
    return plain, text.count("\n") - plain.count("\n")


def main() -> None:
    """Read texts from stdin and write what they say to stdout, each behind its length in eight bytes, until EOF."""
    if sys.platform != "darwin":  # which knows no limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    while head := sys.stdin.buffer.read(8):
        asked = orjson.loads(sys.stdin.buffer.read(int.from_bytes(head)))
        answer = orjson.dumps(TASKS[asked.pop("task")](**asked))
        sys.stdout.buffer.write(len(answer).to_bytes(8) + answer)
        sys.stdout.buffer.flush()


def _text(content: str) -> dict[str, Any]:
    import review

    said = plain_text(content)
    return {"text": said.text, "repairs": said.repairs, "language": review.language_of(said.text)}


def _review(**arguments: Any) -> dict[str, Any]:
    import review

    return review.review(**arguments)


TASKS: dict[str, Any] = {"text": _text, "review": _review}


if __name__ == "__main__":
    main()

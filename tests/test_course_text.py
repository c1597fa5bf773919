"""What of a course's text reaches the model: its facts, character for character, without markup and without dirt."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
from hypothesis import given, strategies as st

import dccapi
from reader import course_text
from service import BADGE, HERE, ISSUER, ask, asked, problem_in, pure, serving

CASES = HERE.parent / "shared" / "cases" / "texts.jsonl"


async def reaches_the_model(content: str) -> str:
    """What stands between the delimiters of the course in the prompt that the engine got."""
    prompt: str = (await asked({"content": content}))["prompt"]
    return prompt.partition("<course>\n")[2].partition("\n</course>")[0]


# --- What is no markup ---

KEPT = {
    "products": "Compute 2*3*4 and 5 * 6 by hand, x*y*z, (a*b)*(c*d), 2**3**4.",
    "names of Python": "The methods __init__ and __str__, snake_case, _private, *args, **kwargs, f(*a, **b), __FILE__",
    "TeX": r"Show $a_1 * b_1$, x^2\,dx, \{x \in \mathbb{R}\}, \textbf{Lemma}~\ref{a_b} and ``quoted'' text, 5\,\%",
    "label": "Welding\n\n[Credits]: 3\n[Website]: https://example.org/welding",
    "SQL": "SELECT COUNT(*), SUM(*), t.* FROM `orders` t WHERE name LIKE '*abc*' AND a <> 3 AND b <= 4;",
    "comparisons": "Pass:\n> 60 %\n>= 50 points, a<b and c>d, 5 < 6 > 4, -> and <-",
    "tildes": "~~~ optional ~~~\nand ~~~ more",
    "types": "vector<int>, Map<String, List<T>>, Promise<void>, #include <vector>, git clone <url> <dir>",
    "C": "/* doc */ int *f(char **argv) { p = &sum; q = &copy; return (*fp)(char*) & a*b; } // (int*)",
    "indices": "arr[i](x.y), handlers[key](e.target), a[1][2] and Smith [2019](see below)",
    "tags in prose": "Students use the <p> and <table> tags, close each with </p>, and break lines with <br> or <br/>.",
    "tags at the start": "<h1> to <h6> are headings, <p> is a paragraph.",
    "HTML in prose": "An HTML paragraph is <p>Hello</p>, a link <a href='x'>so</a>; write &lt; for < and &amp; for &.",
    "an unknown tag": "<Introduction to Python> In this course…",
    "headings in brackets": "<Title>\nWelding\n<Summary>\nArc and gas",
    "PHP": "<?php echo $x; ?> is PHP.",
    "years": "1914. The war begins.\n\n1918. It ends.",
    "marked lines": "=== Objectives\nfoo\n--- Assessment\nbar\n# of seats: 12\n#1 in the country\nC# and F#",
    "a picture alone": "![only a picture](x.png)",
    "columns": "Mon    09:00   Lab\nTue    10:00   Lecture\n\n\n\nWed    free  ",
    "YAML": "title: Welding\ntopics:\n  - arc: *anchor\n  - &ref gas\nempty: ~",
    "CSV": 'id,name\n1,"Arc, gas * MIG *"\n2,Tig_welding_,"<5"',
    "RST": ".. note:: Read |sub| first.\n\n=====  =====\nName   Hours\n=====  =====",
    "wiki": "== Weld ==\n'''bold''' [[Arc|arc]] {{cite}}\n* a\n** b\n{|\n|-\n| x || y\n|}",
    "e-mail": "On Monday Bob <bob@example.org> wrote:\n> > Is it free?\n> Yes, see <https://example.org/a_b_c>",
    "a poem": "The woods are lovely,\n  And miles to go before I sleep,\n  And miles to go before I sleep.",
    "chemistry": "2 H2 + O2 -> 2 H2O; [Cu(NH3)4]2+; pH > 7; H₂O, 10⁻³, Fe³⁺; (S)-2-amino-\n3-phenyl",
    "music": "C# minor, Op. 27 #2: F#m7 B♭ |: A B :| ♩ = 120",
    "ranges and lists": "2010-\n2015, DNA-\nsequencing, micro-\nand macroeconomics, buku-\nbuku\n- one\n– two\n• three",
    "numbers in lines": "Weeks\n1\nKnots\n2\nBelaying\n3\nFalls\n4\nExam",
    "quotes": "“naïve” ‘quotes’ … – — « guillemets » 5′ 2″ ½ № µ 10 °C £5 ¥ ÂGE NAÇÃO À LA CARTE Å",
    "letters of their own": "Ĳssel, Ǆ, æther, œuvre, Straße, ñandú, ŉ, ſ",
    "Arabic and Persian": "مقرر البرمجة: ٣ ساعات (60 %) — می‌خواهم ‏RTL‏",
    "Hebrew": "מבוא לתכנות: 3 נק״ז",
    "Hindi and Malayalam": "पाठ्यक्रम: क्‍या और क्यों — ३ क्रेडिट; അവന്‍ ",
    "Thai and Khmer": "หลักสูตรการเขียน​โปรแกรม 3 หน่วยกิต ការ​គ្រប់គ្រង",
    "Japanese": "プログラミング入門（３単位）　第１回：変数＊型〜配列",
    "emoji": "👩‍⚕️ nursing 🏳️‍🌈 ❤️‍🔥 1️⃣",
}


@pytest.mark.parametrize("content", KEPT.values(), ids=KEPT)
async def test_a_text_without_markup_reaches_the_model_as_it_is(content: str) -> None:
    assert await reaches_the_model(content) == content.strip()
    assert course_text.plain_text(content).repairs == {}


WORDS = [
    "Welding",
    "Schweißen",
    "soudage",
    "ñandú",
    "Ελληνικά",
    "програма",
    "עברית",
    "العربية",
    "हिन्दी",
    "ไทย",
    "日本語",
    "tiếng",
]
FACTS = (
    *("2*3*4", "__init__", "snake_case", "a_b", "*", "**", "_", "3 * 4", "x^2\\,dx", "COUNT(*),", "vector<int>", "a<b"),
    *(
        "[Credits]: 3",
        "[x]",
        "#1",
        "C#",
        "60 %",
        ">=",
        "~",
        "|",
        "1.",
        "2)",
        "10-12",
        "self-paced",
        "R&D",
        "-",
        "–",
        "$5",
    ),
)


@pure
@given(
    st.lists(st.sampled_from([*WORDS, *FACTS]) | st.from_regex(r"[A-Za-z]{1,9}[.,;:!?]?", fullmatch=True)),
    st.lists(st.sampled_from([" ", "  ", "\n", "\n\n", "\n\n\n", "\t"]), min_size=1),
)
def test_any_text_without_markup_or_dirt_is_kept_character_for_character(words: list[str], gaps: list[str]) -> None:
    text = "".join(word + gaps[number % len(gaps)] for number, word in enumerate(words)).strip()
    assert course_text.plain_text(text) == course_text.CourseText(text, {})


@pure
@given(st.text("ab1é語 *_#>|-=+.,\n"))
def test_marks_may_go_but_never_a_letter_or_a_digit(text: str) -> None:
    if not course_text.FRONT_MATTER.match(text):
        assert re.sub(r"[\W_]", "", course_text.plain_text(text).text) == re.sub(r"[\W_]", "", text)


@pure
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_is_read_and_none_that_shows_something_becomes_empty(text: str) -> None:
    read = course_text.plain_text(text)
    assert all(count > 0 for count in read.repairs.values())
    assert read.text or not re.search(dccapi.VISIBLE, text) or "<" in text


# --- Markup ---

READ = {
    "Word's HTML": (
        """<html xmlns:o="urn:x"><head><style>p.MsoNormal {margin:0}</style></head><body>
        <p class=MsoNormal style='mso-x:1'>Knots&nbsp;<o:p></o:p><b>for</b> climbers</p><script>x()</script>
        <table><tr><td>Week 1</td><td>Figure eight</td></tr></table></body></html>""",
        "Knots for climbers\n\nWeek 1 | Figure eight |",
    ),
    "a page": (
        "<html><body><nav>Home</nav><form id=f><h1>Welding</h1><details><summary>Week 1</summary>Loops</details>",
        "Home\n\nWelding\n\nWeek 1\nLoops",
    ),
    "inline tags": (
        "This course covers <b>welding</b> and <em>cutting</em>.",
        "This course covers welding and cutting.",
    ),
    "lines of br": ("Welding<br>Week 1<br/>Week 2: knots", "Welding\n\nWeek 1\n\nWeek 2: knots"),
    "br alone": ("Intro. <br> Week 1 <br>\nWeek 2", "Intro.\n\nWeek 1\n\nWeek 2"),
    "escaped twice": ("&lt;p&gt;Arc &amp;amp; gas&lt;/p&gt;&lt;p&gt;Exam&lt;/p&gt;", "Arc & gas\n\nExam"),
    "escaped thrice": ("&amp;lt;p&amp;gt;Arc&amp;lt;/p&amp;gt;", "Arc"),
    "escaped text": ("Research &amp; Design &lt;3, the &lt;p&gt; tag", "Research & Design <3, the <p> tag"),
    "types in HTML": ("<p>Use List<String> and a<b here</p>", "Use List<String> and a<b here"),
    "powers": ("<p>10<sup>6</sup> Pa, x<sup>n+1</sup>, the 1<sup>st</sup></p>", "10^6 Pa, x^(n+1), the 1st"),
    "a power without more": ("Pressures of 10<sup>6</sup> Pa", "Pressures of 10^6 Pa"),
    "indices": ("<p>H<sub>2</sub>O, log<sub>2</sub>8</p>", "H_2O, log_2 8"),
    "MathML": (
        "<p>Add <math><mfrac><mn>1</mn><mn>2</mn></mfrac></math> and 2<math><mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi>"
        "</mrow><msup><mi>c</mi><mn>2</mn></msup></mfrac><annotation>tex</annotation></math>.</p>",
        "Add 1/2 and 2 (a+b)/(c^2) .",
    ),
    "formulas as images": (
        '<p>Area <img alt="LaTeX: \\pi r^2" src="x"> or <img alt="$x^2$">, <img alt="Logo" src="y"></p>',
        "Area \\pi r^2 or $x^2$,",
    ),
    "formulas as Markdown's images": (
        "Area ![LaTeX: \\pi r^2](x/y.png) or ![$x^2$](x.png) ![Logo](l.png)",
        "Area \\pi r^2 or $x^2$",
    ),
    "Markdown": (
        "---\nsite: sand::paper\ntitle: Climbing\n---\n\n# Knots\n\n| a | b |\n|---|---|\n| 1 | [two](http://x.y) |\n\n"
        "**Bold**, *kind*, _tone_, ***both***, __So bold__, `code`, これは**重要**です\n\nEnd\n===\n::: note\nText",
        "Climbing\n\nKnots\n\na | b |\n1 | two |\n\nBold, kind, tone, both, So bold, code, これは重要です\n\nEnd\nText",
    ),
    "code in Markdown": (
        "## Loops\n```python\nx = a*b*c  # *no*\n# __init__\n<p>Hi</p>\n```\n`*args*` and `List<T>`",
        "Loops\nx = a*b*c  # *no*\n# __init__\n<p>Hi</p>\n*args* and List<T>",
    ),
    "links": (
        'A [text][1], [R][], [so](http://x.y/a_(b) "T") [![badge](a.png)](http://b.c)\n\n[1]: https://x.y\n[r]: https://r.org\n'
        "[Credits]: 3",
        "A text, R, so \n\n[Credits]: 3",
    ),
    "quoted heading": ("> ## Needs\n> 60 % and more", "Needs\n> 60 % and more"),
    "Markdown in HTML": ("<details>\n<summary>S</summary>\n\n- [x](y.md)\n</details>\n\n## T", "S\n\n- x\n\nT"),
    "courses between rulers": ("---\nCourse 1: Arc.\n---\nCourse 2: Gas.\n", "Course 1: Arc.\nCourse 2: Gas."),
    "comments": ("<!-- draft -->\n# Knots\n\nHitch", "Knots\n\nHitch"),
}


@pytest.mark.parametrize(("content", "said"), READ.values(), ids=READ)
async def test_markup_goes_and_what_it_says_stays(content: str, said: str) -> None:
    assert await reaches_the_model(content) == said
    assert course_text.plain_text(content).repairs == {}


# --- Dirt ---

PAGES = "Welding Guide\nPage 1 of 3\nArc\nGas\nMIG and thermo-\nWelding Guide\nPage 2 of 3\ndynamics\nTIG\nTorch\n"
TIDIED: dict[str, tuple[str, str, dict[str, int]]] = {
    "mojibake": (
        "CafÃ© culture\nstudentsâ€™ work, naïve CafÃ©\n\x93quoted\x94 Ð¡Ð¾Ð·Ð´Ð°Ð½Ð¸Ðµ",
        "Café culture\nstudents’ work, naïve Café\n“quoted” Создание",
        {"mojibake": 0},
    ),
    "encoded twice": ("Ã‰tude de lâ€™ÃƒÂ©tÃ©", "Étude de l’été", {"mojibake": 0}),
    "ligatures": ("the ﬁrst ﬂow, oﬃce", "the first flow, office", {"ligatures": 3}),
    "soft hyphens": ("work\xad\nshop, work\xadshop, weld¬\ning", "workshop, workshop, welding", {"soft_hyphens": 3}),
    "zero width": ("weld\u200bing \u2060arc\ufeff t\u200cig", "welding arc tig", {"zero_width": 4}),
    "bullets": ("\uf0b7 Arc\n  \uf0a7\tGas\n\uf0d8 MIG \uf0b7 TIG", "- Arc\n  - Gas\n- MIG • TIG", {"bullets": 4}),
    "broken words": ("under-\nstand thermo-\n  dynamics\nnow", "understand thermodynamics\nnow", {"hyphenation": 2}),
    "hyphens that the text shows": ("an on-\nline quiz, on-line", "an on-line quiz, on-line", {"hyphenation": 1}),
    "words of the text": ("CLASS-\nROOM, classroom\non-\nto", "CLASSROOM, classroom\non-\nto", {"hyphenation": 1}),
    "compounds": ("self-\nregulated, problem-\nbased", "self-regulated, problem-based", {"hyphenation": 2}),
    "two words of the text": ("class-\nroom: the room of a class", "class-\nroom: the room of a class", {}),
    "page marks": (
        PAGES + "Welding Guide\nPage 3 of 3\nExam",
        "Welding Guide\nArc\nGas\nMIG and thermodynamics\nTIG\nTorch\nExam",
        {"page_marks": 5, "hyphenation": 1},
    ),
    "page marks on one line": (
        "Guide | Page 1\nArc\nGas\nMIG\nGuide | Page 2\nTIG\nTorch\nGuide | Page 3\nExam",
        "Guide | Page 1\nArc\nGas\nMIG\nTIG\nTorch\nExam",
        {"page_marks": 2},
    ),
    "form feeds": (
        "A guide\nArc\nGas\n1\fA guide\nMIG\nTIG\n2\fA guide\nExam\n3",
        "A guide\nArc\nGas\nMIG\nTIG\nExam",
        {"page_marks": 7},
    ),
    "facts at page borders": (
        "Arc\nCredits: 3\n\fGas\nCredits: 3\n\fMIG\nCredits: 3",
        "Arc\nCredits: 3\n\nGas\nCredits: 3\n\nMIG\nCredits: 3",
        {"page_marks": 2},
    ),
    "a byte-order mark": ("\ufeff---\ntitle: Arc\n---\nText\r\nof lines", "Arc\n\nText\nof lines", {}),
    "a byte-order mark read wrongly": ("ï»¿Arc", "Arc", {"mojibake": 1, "zero_width": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("content", "tidy", "repairs"), TIDIED.values(), ids=TIDIED)
async def test_dirt_goes_and_is_counted(content: str, tidy: str, repairs: dict[str, int]) -> None:
    assert await reaches_the_model(content) == tidy
    counted = course_text.plain_text(content).repairs
    if repairs == {"mojibake": 0}:  # how many pieces a spoilt word has is ftfy's business
        assert counted.keys() == repairs.keys()
    else:
        assert counted == repairs


def cases() -> list[Any]:
    if not CASES.exists():
        return [pytest.param({}, marks=pytest.mark.skip(reason="needs ../shared/cases/texts.jsonl"))]
    lines = CASES.read_text("utf-8").splitlines()
    return [pytest.param(case, id=case["name"]) for case in map(json.loads, lines)]


@pytest.mark.parametrize("case", cases())
async def test_the_shared_cases_hold(case: dict[str, Any]) -> None:
    said = await reaches_the_model(case["text"])
    assert [piece for piece in case["has"] if piece not in said] == []
    assert [piece for piece in case["lacks"] if piece in said] == []


@pure
@given(st.lists(st.sampled_from(WORDS), min_size=1))
def test_utf_8_that_was_read_as_windows_1252_is_read_again(words: list[str]) -> None:
    text = " ".join(words)
    spoilt = text.encode().decode("cp1252", "replace")
    if "\ufffd" not in spoilt and unicodedata.is_normalized("NFC", text):
        assert course_text.plain_text(spoilt).text == text


# --- The request ---


@pytest.mark.parametrize(
    "content",
    [
        *(
            "\u200b\u200d\ufeff",
            "<p></p>",
            "<b> </b>",
            "<p>&nbsp;</p>",
            "<br><br/>",
            "<!-- draft -->",
            "&lt;p&gt;&lt;/p&gt;",
        ),
        *("<style>p {}</style>", "<p>\u200b</p>", '<img src="x.png" alt="Logo">', "<script>x()</script>\n<div></div>"),
    ],
)
async def test_a_course_of_nothing_visible_is_refused_with_a_sentence(content: str) -> None:
    async with serving() as service:
        for path, more in (("/generate", {}), ("/regenerate-field", {"badge": BADGE, "field": "criteria"})):
            problem = problem_in(await ask(service, {"content": content, **more}, path), 422, "invalid_request")
            assert [fault["loc"] for fault in problem["errors"]] == [["content"]]
            assert problem["errors"][0].keys() == {"loc", "msg", "type"}
        problem_in(
            await ask(service, None, f"/generate/stream?{urlencode({'content': content})}", "GET"),
            422,
            "invalid_request",
        )
        assert service.engine.calls == []


@pytest.mark.parametrize("path", ["/generate", "/credentials"])
async def test_a_byte_order_mark_before_the_json_is_ignored(path: str) -> None:
    body = orjson.dumps({"content": "Knots"} if path == "/generate" else {"badge": BADGE, "issuer": ISSUER})
    async with serving() as service:
        headers = [("content-type", "application/json")]
        assert (await ask(service, b"\xef\xbb\xbf" + body, path, headers=headers)).status == 200
        problem_in(await ask(service, b"\xef\xbb\xbf", path, headers=headers), 400, "invalid_json")


SLOW = (
    *(
        "*a ",
        "**",
        "_a ",
        "`a ",
        "[a](b.c ",
        "[[a]",
        "<",
        "<p ",
        "<sup>a",
        "<math><mfrac>",
        "<!--",
        "&lt;p&gt;",
        "| a |\n",
        "|-",
    ),
    *(
        "ab-\nabc ",
        "\fa\n",
        "Page 1\n",
        "```a\n",
        "---\na: b\n",
        "\u200b",
        "Ã©",
        "â€",
        "ÃƒÂ©",
        " ",
        "> ",
        "[a]: /b\n[a][a]\n",
    ),
)


@pytest.mark.parametrize("piece", SLOW, ids=ascii)
def test_a_text_that_is_made_to_be_slow_takes_linear_time(piece: str) -> None:
    began = time.process_time()
    course_text.plain_text((piece * 2**18)[: 2**18])
    assert time.process_time() - began < 3  # half a second at most here; the square of the size takes minutes

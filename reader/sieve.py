"""What is kept of the sentences that a model writes, one by one, and what the course says in place of the rest.

Models repeat themselves and what they were asked, and leave markup behind. Small ones invent numbers, and fall into
English. Arithmetic finds that in a sentence as in a whole draft (`reader.review`). What a text lacks then, in number or
in words, is said with sentences of the course itself.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from reader import condense, review

FEWEST_WORDS = 12  # of a text
FEW = 3  # sentences that a text may have in any case, where it has not as many words
ENOUGH = 0.5  # of the words of a sentence stand in the course
ENOUGH_OF_TINY, ENOUGH_OF_ONE = 0.75, 0.5  # the same for a tiny model, and in one sentence of the course
LONG_WORD, LONGEST_WORD = 5, 40  # letters of words that are looked at, and of their beginnings
ENOUGH_OF_WORDS = 0.8  # share of the long words of a sentence whose beginning is one of the course's
CUT_TITLE = 80  # characters; as long a title was cut by the engine's grammar
BEGINNING = 300  # characters of a course, where it may say its title in other words than its headline
LONGEST_SAID = 6  # words of a title that a course says beside its headline
REPEATED_RUN = 8  # words in a row of the request
LONGEST_ITEM = 180  # characters; a longer one without a full stop was cut by the engine's grammar
LONG_QUOTE, LONGEST_QUOTE = 40, 80  # words of a sentence of the course that stands for one of the model
END = re.compile(r"[.!?…。！？؟।][\"'”»)]*\Z")
LABEL = re.compile(
    r"(?i)\A(?:(?:badge|course)[ _])?"
    r"(?:badge|criteria|criterion|description|features|name|narrative|overview|summary|title)"
    r"\s*:\s*(?=\W*\w)"
)
IDENTIFIER = re.compile(r"\w+_\w+")
CUT_SHORT = re.compile(r"\b(?:an?|and|as|for|of|or|the|with)…?\Z")  # in English; what ends in a full stop is whole
# Links, tables, marks, questions, and what breaks off.
NOT_SAID = re.compile(r"[\[\]|{}<>@=\\]|(?<![A-Za-z])#|https?:|www\.|[?？؟]\Z|[:：,;](?:\W*|\s*\d{1,2}[.)]?)\Z")
# What has to be known before a course, and its policies, are not what it teaches. They are told by headings of only
# these words, or of one more before them, by such a word with a colon, and in English by whole phrases.
_BEFORE = (
    r"pre-?requisites?|prior knowledge|required knowledge|entry requirements|prerrequisitos?|requisitos previos"
    r"|conocimientos previos|pré-?requis|connaissances préalables|(?:teilnahme)?voraussetzung(?:en)?|vorkenntnisse"
    r"|pré-requisitos?|conhecimentos prévios|prerequisit[oi]|esitiedot|edeltävät opinnot|voorkennis|förkunskaper"
    r"|forkundskaber|forkunnskaper|wymagania wstępne|пререквизиты|предварительные требования|ön koşul(?:lar)?"
    r"|前提知識|履修条件|先修课程|先修要求|预备知识|선수 ?과목|المتطلبات السابقة"
)
_POLICY = (
    r"polic(?:y|ies)|office hours|contact|contact information|academic (?:honesty|integrity)|plagiarism|grading"
    r"|grading scale|attendance|disclaimer|references|bibliography|readings?|required texts?|acknowledge?ments?"
    r"|bibliografía|bibliografia|bibliographie|literatur|contacto|kontakt|haftungsausschluss|aviso legal|avertissement"
    r"|descargo de responsabilidad|免責事項|免责声明|参考文献|면책 조항"
)
BESIDE = re.compile(rf"(?i)\W*(?:\w+ )?(?:{_BEFORE}|{_POLICY})(?: knowledge)?(?:\W*\Z|\s*[:：])")
ASSUMED = re.compile(
    r"(?i)\bpermission of (?:the )?instructor\b|\bwe (?:also )?assume (?:that|an?)\b"
    r"|\bis a prerequisite (?:for|to) (?:the|this)\b"
    r"|\b(?:background|experience|familiarity|knowledge)(?: (?:in|of|with) (?!how|if|wh)[\w ,-]{1,60}?)? (?:is|are)"
    r" (?:assumed|expected|recommended|required)"
    r"|\bno (?:prior|previous) (?:\w+ )?(?:background|coursework|experience|exposure|knowledge)\b"
)
MOST_BESIDE = 0.5  # If more of a course looks like that, its headings were misread: nothing is left out then.
# Who writes, and what is beside the text: neither is of a badge.
ASIDE = re.compile(
    r"(?i)\bclick\b|\bfor more information\b|\bis no instruction\b|\b(?:image|picture|video|see) (?:above|below)\b"
)
BADGE = re.compile(r"(?i)\bbadges?\b")  # Tiny models write about the badge itself; such sentences are left out.
FIRST_PERSON = re.compile(r"\bI(?:['’]\w+| am| was| have| had| will| would| can| do)\b|\b[Mm]y\b")  # in English
# Markup that stands for a space, and in EVERY_MARKUP also what changes letters, that small models leave behind.
_BLOCK = r"<(?:/?(?:blockquote|center|div|h[1-6]|li|ol|p|pre|table|tbody|t[dhr]|thead|ul)|br|hr)(?:\s[^<>]{0,80})?/?>"
_INLINE = r"</?(?:a|abbr|b|big|code|em|font|i|img|kbd|mark|s|small|span|strong|su[bp]|tt|u)(?:\s[^<>]{0,80})?/?>"
MARKUP = re.compile(rf"(?i)(?P<space>{_BLOCK})|&[a-z]{{2,8}};")
EVERY_MARKUP = re.compile(rf"(?i)(?P<space>{_BLOCK})|{_INLINE}|&[a-z]{{2,8}};")
MARKS = re.compile(
    r"\A(?:[-*•·+–>#.\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]+|\(?\d{1,3}[.)]|\(?[a-z][.)])\s+"
    r"|(?<!\w)([*`]{1,3})(?=\S)(?P<marked>[^*`\n]+)(?<=\S)\1(?!\w)"
)
LETTER = re.compile(r"[^\W\d_]")

SCRIPT = re.compile(
    "ARABIC|ARMENIAN|BENGALI|CJK|CYRILLIC|DEVANAGARI|GEORGIAN|GUJARATI|GURMUKHI|HANGUL|HEBREW|HIRAGANA|KANNADA|KATAKANA"
    "|KHMER|LAO|MALAYALAM|MYANMAR|SINHALA|TAMIL|TELUGU|THAI"
)

NEAR = 24  # so many sentences back a repetition is looked for: more than a badge has
COMMA = re.compile(r"[,;、，،；]\s*")
# The beginnings of parts that say nothing alone, in English.
LEANS = re.compile(
    r"(?i)(?:after|although|and|as|at|because|before|but|by|designed|during|e\.g|especially|from|her|his|in|including|its"
    r"|on|or|our|over|particularly|ranging|rather|so|such|than|that|their|then|though|through|throughout|to|under|upon"
    r"|using|when|where|which|who|whose|with|within|without|your)(?![-\w])"
)
AND = re.compile(r"[,;、，،；]\s*|\s(?:and|und|et|y|e|och|og|en|ja|sekä|ve|и|і|oraz)\s|\s(?=و\w{3})")

Said = Sequence[tuple[str, str]]  # the field and the text of each sentence before


_meaning = functools.lru_cache(256)(review._meaning)


def _begins(sentence: str) -> bool:
    first = sentence.lstrip("\"'“«¿¡(")[:1]
    return first.isalnum() and not first.islower()


def _count(field: str, said: Said) -> int:
    """The sentences of a description, the items of criteria."""
    texts = [text for name, text in said if name == field]
    return len(texts) if field == "criteria" else sum(max(1, len(review._sentences(text))) for text in texts)


def _is_beside(sentence: str, heading: str = "") -> bool:
    return bool(BESIDE.match(heading) or BESIDE.match(sentence) or ASSUMED.search(sentence))


def _bare_word(word: str) -> str:
    """`review.bare`; "" for what is no word, or of a script without spaces."""
    return review.bare(word) if word.isalpha() and not review.IS_UNSPACED.match(word) else ""


def _scripts(text: str) -> set[str]:
    """The scripts of its letters. Latin and Greek ones stand in texts of any language."""
    names = (unicodedata.name(letter, "") for letter in {*text} if letter.isalpha() and not letter.isascii())
    return {script[0] for script in map(SCRIPT.match, names) if script}


def _plain(text: str) -> set[str]:
    """Its sentences, in small letters and with single spaces."""
    return {" ".join(sentence.casefold().split()) for sentence in review._sentences(text)}


@functools.lru_cache(16)
def _runs(request: str) -> set[tuple[str, ...]]:
    words = request.split()
    return {tuple(words[at : at + REPEATED_RUN]) for at in range(len(words) - REPEATED_RUN + 1)}


class Sieve:
    """Without a course it leaves out nothing but repetitions and markup. Pure: what was said before is given each time.

    `counts` has the least and the most sentences of each text, `request` what the model was told to do, `markup` what
    is taken out of its texts. The sentences of a model that `is_tiny` are hardly its own where they are right, so each
    needs one of the course behind it.
    """

    def __init__(
        self,
        course: str = "",
        language: str = "und",
        options: Sequence[str] = (),
        counts: Mapping[str, tuple[int, int]] = {},
        request: str = "",
        markup: re.Pattern[str] | None = MARKUP,
        is_tiny: bool = False,
    ) -> None:
        self.course, self.language, self.options, self.counts = course, language, options, counts
        self.markup, self.is_tiny, self._request = markup, is_tiny, _runs(request)

    def kept(self, field: str, text: str, before: Said) -> str:
        """What is left of an item of a list: "" where it is not worth keeping."""
        if (bare := self.bare(text)) != text:
            text = " ".join(bare.split())
        if self.echoes(text) or not LETTER.search(text):
            return ""
        if not self.course or field not in self.counts:
            return "" if self._is_repeated(field, text, before) else text
        if text.casefold().strip(" .") in map(str.casefold, self.options):
            return ""
        room = self.counts[field][1] - _count(field, before)
        parts = [LABEL.sub("", part) for part in review._sentences(" ".join(text.split()))]
        if parts and not END.search(parts[-1]) and (len(parts) > 1 or len(text) > LONGEST_ITEM):  # cut off
            parts.pop()
        said: list[tuple[str, str]] = []
        for part in parts[: max(0, room) if field == "badge_description" else None]:
            if field == "badge_description" and not _begins(part):  # the rest of one that the grammar cut
                continue
            if self._is_borne(part) and not self._is_repeated(field, part, [*before, *said]):
                said.append((field, self._ended(part) if field == "badge_description" else part))
        text = " ".join(part for _, part in said)
        return "" if self._is_repeated(field, text, before) else text

    def bare(self, text: str) -> str:
        """A text without the markup that a model left in it."""

        def said(mark: re.Match[str]) -> str:
            return html.unescape(mark[0]) if mark[0][0] == "&" else " " if mark["space"] else ""

        return self.markup.sub(said, text) if self.markup else text

    def echoes(self, text: str) -> bool:
        """Whether it repeats the request's own words."""
        words = text.split()
        runs = (tuple(words[at : at + REPEATED_RUN]) for at, word in enumerate(words) if word in self._starts)
        return not self._request.isdisjoint(runs)

    def spare(self, text: str) -> str:
        """What an item is worth where no other is left."""
        text = " ".join(self.bare(text).split())
        return "" if self.echoes(text) or not LETTER.search(text) else text

    def bears(self, title: str) -> bool:
        """Whether the course, or an option, has two thirds of the title's words."""
        keys = _meaning(title)
        return not self.course or 3 * sum(key in self._grounds.places for key in keys) >= 2 * len(keys)

    def prefers(self, own: str, title: str) -> bool:
        """Whether the course's own title is better than a tiny model's: shorter than a sentence, or a headline of
        which the model's has nothing, as the beginning of the course has nothing of that."""
        if not (self.course and self.is_tiny and _meaning(own)):
            return False
        if not _meaning(title) or len(title) > review.HEADLINE > len(own):
            return True
        is_other = len(own) <= review.HEADLINE and set(_meaning(own)).isdisjoint(_meaning(title))
        is_said = title.casefold() in " ".join(self.course[:BEGINNING].casefold().split())
        words = title.split()  # some of two or three letters are none of a title: "this one"
        return is_other and not (is_said and len(words) <= LONGEST_SAID and max(map(len, words)) > 4)

    def as_title(self, title: str) -> str:
        """A title of the embedded model as titles are written, where it is a sentence, cut off or without a capital."""
        if not self.course:
            return title
        is_sentence = not re.match(r"(?i)an?\s", title)  # "An Introduction to Rope Work" is a title
        title = (review.subject_of(title) if is_sentence else "") or review.shortened(title, CUT_TITLE)
        return title[:1].upper() + title[1:] if title.islower() else title

    def more(self, field: str, before: Said) -> Iterator[str]:
        """Sentences of the course, as long as this text has too few of them or too few words."""
        if not self.course or field not in self.counts:
            return
        least, most = self.counts[field]
        said = [*before]
        best = self._best(field)
        for sentence, all_fields in [(one, True) for one in best] + [(one, False) for one in best]:
            words = sum(review._size(text) for name, text in said if name == field)
            count = _count(field, said)
            if count >= (least if words >= FEWEST_WORDS else max(most, FEW)) or (count and not all_fields):
                return  # what the other text says as well is only better than nothing
            if not self._is_repeated(field, sentence, said, all_fields=all_fields):
                said.append((field, sentence))
                yield sentence

    # -- judging

    def _is_repeated(self, field: str, text: str, before: Said, all_fields: bool = False) -> bool:
        keys = _meaning(text)
        # A short course may have no other sentence for the description than its title.
        others = [one for one in before[-NEAR:] if one[0] != "badge_name" or field == "criteria"]
        apart = ((name, one) for name, other in others for one in {other, *review._sentences(other)})
        for name, other in apart:
            same_field = name in (field, "badge_name") or all_fields
            bare, heard = text.casefold().strip(" .。"), other.casefold().strip(" .。")
            if same_field and (bare == heard or (all_fields and name == field and bare in heard)):
                return True
            if review._same(field, keys, field if all_fields else name, _meaning(other)):
                return True
        return False

    def _is_borne(self, sentence: str) -> bool:
        """Whether the course has its words, numbers and names."""
        keys = review._meaning(sentence)
        borne = [key for key in keys if key in self._grounds.places]
        if not keys or len(borne) < (ENOUGH_OF_TINY if self.is_tiny else ENOUGH) * len(keys):
            return False
        of_one = set(_meaning(self._grounds.source(borne))).intersection(borne) if self.is_tiny else keys
        if len(of_one) < ENOUGH_OF_ONE * len(keys):
            return False
        if self.is_tiny and (NOT_SAID.search(sentence) or sentence.count("(") != sentence.count(")")):
            return False
        if self._is_aside(sentence) or review._is_order(sentence) or self._is_invented(sentence):
            return False
        if _is_beside(sentence) or not self._beside.isdisjoint(_plain(sentence)):
            return False
        if any(word not in self.course for word in IDENTIFIER.findall(sentence)) or _scripts(sentence) - self._scripts:
            return False
        return next(self._grounds.lacks(sentence, self.language, foreign=False), None) is None

    def _is_invented(self, sentence: str) -> bool:
        """Whether the course has not even the beginnings of its words: outside English tiny models invent some."""
        if not self.is_tiny or self.language in ("en", "und"):
            return False
        words = [word for word in map(_bare_word, review._tokens(sentence.lower())) if len(word) >= LONG_WORD]
        # Endings of up to four letters differ.
        beginnings = (word[: max(LONG_WORD - 1, min(len(word) - 4, LONGEST_WORD))] for word in words)
        known = sum(beginning in self._word_beginnings for beginning in beginnings)
        return known < ENOUGH_OF_WORDS * len(words)

    @functools.cached_property
    def _starts(self) -> set[str]:
        return {run[0] for run in self._request}

    @functools.cached_property
    def _scripts(self) -> set[str]:
        return _scripts(self.course).union(*map(_scripts, self.options))

    @functools.cached_property
    def _word_beginnings(self) -> set[str]:
        words = (_bare_word(word)[:LONGEST_WORD] for word in self._grounds.vocabulary)
        return {word[:end] for word in words for end in range(LONG_WORD - 1, len(word) + 1)}

    def _is_aside(self, sentence: str) -> bool:
        is_of_badge = self.is_tiny and BADGE.search(sentence) and not BADGE.search(self.course)
        in_english = self.language == "en" and (FIRST_PERSON.search(sentence) or CUT_SHORT.search(sentence))
        return bool(is_of_badge or in_english or ASIDE.search(sentence))

    @functools.cached_property
    def _grounds(self) -> review.Grounds:
        taught = [piece for piece in self._pieces if not self._beside.intersection(_plain(piece))]
        return review.Grounds([*taught, *self.options], None, None)

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return review._split(self.course)[1]

    @functools.cached_property
    def _sections(self) -> list[condense.Section]:
        """The sections of the course, whose lines may be wrapped, with what each sentence tells."""
        lines = (" ".join(piece.split()) + piece[len(piece.rstrip()) :] for piece in self._pieces)
        sections = condense._sections("".join(lines))
        condense._score(sections)
        return sections

    @functools.cached_property
    def _beside(self) -> set[str]:
        """The sentences that say what is to be known before, and those of policies."""
        pieces = [(piece.text, section) for section in self._sections for piece in section.pieces]
        found = [text for text, section in pieces if _is_beside(text, section.heading)]
        is_part = sum(map(len, found)) < MOST_BESIDE * sum(len(text) for text, _ in pieces)
        return {plain for text in found for plain in _plain(text)} if is_part else set()

    # -- sentences of the course

    def _ended(self, sentence: str) -> str:
        full_stop = "。" if review.IS_UNSPACED.search(sentence[-1:]) or "\u3041" <= sentence[-1:] <= "\u30ff" else "."
        return sentence if END.search(sentence) else sentence + full_stop

    def _best(self, field: str) -> list[str]:
        """What can stand in a text: what tells most first, whole sentences before parts of them."""
        title = review.title_of(self.course)
        found: list[tuple[tuple[int, float], str]] = []
        for section, piece in ((one, piece) for one in self._sections for piece in one.pieces):
            whole = " ".join(MARKS.sub(lambda mark: mark["marked"] or "", piece.text.strip()).split())
            last = piece.is_heading or section.weight < 0 or self._tells_little(whole) or title == whole.rstrip(".")
            last = last or not self._beside.isdisjoint(_plain(piece.text)) or review._size(whole) > LONG_QUOTE
            last = last or whole.count("(") != whole.count(")")
            if field == "badge_description":
                found.append(((4 * last + (not END.search(whole)), -piece.score), self._ended(whole)))
                continue
            found.append(((4 * last, -piece.score), whole))
            for rank, mark in enumerate((COMMA, AND), 1):
                parts = [part for part in mark.split(whole) if review._size(part) >= 3 and not self._leans(part)]
                found += [((4 * last + rank, -piece.score), part) for part in parts if part != whole]
        found.sort(key=lambda one: one[0])
        return [text[0].upper() + text[1:] for _, text in found if self._can_be_quoted(text)]

    def _leans(self, part: str) -> bool:
        return self.language == "en" and LEANS.match(part) is not None

    def _can_be_quoted(self, text: str) -> bool:
        if NOT_SAID.search(text) or self._is_aside(text):
            return False
        return 2 <= review._size(text) <= LONGEST_QUOTE and bool(_meaning(text))

    def _tells_little(self, text: str) -> bool:
        """Dates, prices, links; names of people; a word or two."""
        words = [word for word in text.split() if word[0].isalpha()]
        names = sum(word[0].isupper() for word in words) > max(2, len(words) / 2)
        return review._size(text) < 3 or names or bool(condense.NOISE.search(text))

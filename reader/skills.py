"""Which skills of a public framework a badge stands for: arithmetic over an index that `make skills` has made.

The index is one SQLite file: the skills, every name of theirs as a key (its stems, sorted), and an FTS5 table of the
same stems that ranks by BM25. What a model named and what the course says are looked up in it. An alignment needs a
name that agrees with the skill's and a course that has the skill's words; what comes near is only suggested.
"""

from __future__ import annotations

import functools
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

from reader.review import sentences_of

APPLICATION = 0x44434353  # "DCCS", SQLite's application_id of an index
SCHEMA = 1  # its user_version; also of `stems`, which made the keys
ESCO, ONET_SKILL, ONET_TECHNOLOGY = "ext:ESCOAlignment", "ext:ONETSkill", "ext:ONETTechnology"  # targetType

MOST_ALIGNED = 8
MOST_SUGGESTED = 5
MOST_NAMES = 8
MOST_FOUND = 20  # of a search
LONGEST_QUERY = 200  # characters
CANDIDATES = 36  # of a name, by BM25
CANDIDATES_OF_SENTENCE = 12
MOST_SENTENCES = 16  # of a course that are looked up by BM25; all are looked at for the names of products
WORDS_OF_SENTENCE = 10  # those that the fewest skills have
LONGEST_RUN = 4  # words of a product's name

# Chosen on tests/data/skills.jsonl.
AGREES = 0.88  # of a name with one of the skill's
BORNE = 0.75  # of the words of the skill's label that the course has
BORNE_OF_OWN = 0.5  # the same, where the name is the label itself
NEAR = 0.62  # of both, multiplied, for a suggestion

# --- Words ---

PIECE = re.compile(r"[^\s,;:()\"“”„«»!?]*[^\s,;:.()\"“”„«»!?'’]")  # a word as it is spelled: Node.js, C++, PL/SQL
TOKEN = re.compile(r"[A-Za-zÀ-ÿ0-9][A-Za-zÀ-ÿ0-9]*(?:[+#]+|\.[A-Za-z]+)?")
STOP_WORDS = frozenset(
    """a an and as at by for from his her in into is it its of on or own that the their them this to using via with
    within your skills skill basic basics introduction""".split()  # noqa: SIM905 - one string reads better
)
# Verbs and nouns that hardly tell one skill from another.
LIGHT_WORDS = (
    "use apply perform conduct carry out utilise execute undertake do make employ provide technique techniques method"
    " methods practice practices procedure procedures tool tools software program programs activities work setup"
    " appropriate proper specific various"
)
HALF_ENDING = re.compile(r"(?<=\w{3})(?:ati?o?|i[no]?|m|men?|a)\Z")
ENDINGS = re.compile(r"(?<=\w{4})(?:ations?|ating|ated|ates?)\Z|(?<=\w{3})(?:ments?|ings?|ions?|ed|es|e|s)\Z")


@functools.lru_cache(20_000)
def stem(word: str) -> str:
    """What is left of an English word without its endings: that of debugging is debug, that of analyses is analys."""
    if len(word) < 4 or not word.isalpha():
        return word
    if word == "children":
        return "child"
    if word.startswith(("analys", "analyz")):
        return "analys"
    word = re.sub(r"iz(?=e|ing|ation)", "is", word)
    word = re.sub(r"ies\Z", "y", word)
    word = word if word.endswith("ss") else re.sub(r"s\Z", "", word)
    word = re.sub(r"(?<=\w{2}ic)al(?:ly)?\Z", "", word)
    short = ENDINGS.sub("", word)
    short = re.sub(r"([b-df-hj-np-tv-z])\1\Z", r"\1", short)
    return short[:-1] if len(short) > 3 and short[-1] in "ye" else short


def stems(text: str) -> list[str]:
    return [stem(word) for token in TOKEN.findall(text) if (word := token.lower()) not in STOP_WORDS]


def key_of(text: str) -> str:
    """The stems of a name, each once, sorted."""
    return " ".join(sorted(set(stems(text))))


# Verbs that say little beside what is done: who creates incident reports has the skill of incident reports.
WEAK_VERBS = "create provide implement draw up set deliver handle write produce complete"

WEAK_WEIGHT = 0.3
LIGHT = frozenset(map(stem, LIGHT_WORDS.split()))
WEAK = frozenset(map(stem, WEAK_VERBS.split()))

# --- The index ---


class BadIndex(Exception):
    """The index cannot be read; the message says why."""


@dataclass(frozen=True)
class Found:
    """A skill of the index."""

    name: str
    url: str
    framework: str
    type: str
    score: float  # 0 to 1
    sentence: str = ""  # of the course, that speaks for it


class Index:
    """Raises BadIndex where the file is none of ours, or of another version."""

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise BadIndex(f"there is no file {path}; `make skills` makes one")
        self.db = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            found = [self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if found[0] != APPLICATION:
                raise BadIndex(f"{path} is no index of skills; `make skills` makes one")
            if found[1] != SCHEMA:
                raise BadIndex(
                    f"{path} has version {found[1]} and this service reads {SCHEMA}: run `make skills` again"
                )
            self.size: int = self.db.execute("SELECT count(*) FROM skills").fetchone()[0]
        except (sqlite3.Error, TypeError) as error:
            raise BadIndex(f"{path} is broken ({error}); `make skills` makes another") from None
        self.weight = functools.lru_cache(20_000)(self._weight)

    def frameworks(self) -> list[dict[str, Any]]:
        rows = self.db.execute("SELECT name, version, licence, notice, skills FROM frameworks ORDER BY skills DESC")
        return [dict(zip(("name", "version", "licence", "notice", "skills"), row, strict=True)) for row in rows]

    def _weight(self, stem: str) -> float:
        """A word of few skills tells more than one of many; weak verbs tell little, light words next to nothing."""
        found = self.db.execute("SELECT skills FROM stems WHERE stem = ?", (stem,)).fetchone()
        return math.log(1 + self.size / (1 + (found[0] if found else 0))) * (
            0.12 if stem in LIGHT else WEAK_WEIGHT if stem in WEAK else 1
        )

    def weigh(self, words: Iterable[str]) -> float:
        return sum(map(self.weight, words))

    def ranked(self, words: Iterable[str], most: int, prefix: bool = False) -> list[int]:
        """The skills that have any of these stems in a name, best first by BM25; the last as a prefix too."""
        terms = [f'"{word}"' for word in words]
        if prefix:
            terms[-1] += "*"
        rows = self.db.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words, 3.0, 1.0) LIMIT ?",
            (" OR ".join(terms), most),
        )
        return [row for (row,) in rows]

    def begun(self, stem: str) -> str:
        """A last word as it is typed: of "weldin", which begins no stem, what stands before the half of its ending."""
        if self.ranked([stem], 1, prefix=True):
            return stem
        return HALF_ENDING.sub("", stem)

    def known(self, skills: Sequence[int]) -> Iterator[tuple[int, frozenset[str], list[frozenset[str]]]]:
        """Of each of these skills: itself, the stems of its label, those of all its names, the label first."""
        rows = self.db.execute(
            f"SELECT skill, key FROM names WHERE skill IN ({_marks(skills)}) ORDER BY skill, is_label DESC", skills
        )
        for skill, names in groupby(rows, key=itemgetter(0)):
            known = [frozenset(key.split()) for _, key in names]
            yield skill, known[0], known

    def products(self, names: Sequence[str]) -> Iterable[tuple[str, int, bool]]:
        """The products of these names: the name, the skill, whether it is an ordinary word."""
        return self.db.execute(f"SELECT name, skill, is_ordinary FROM products WHERE name IN ({_marks(names)})", names)

    def share(self, label: frozenset[str], words: frozenset[str]) -> float:
        """How much of a label these words have, 0 to 1."""
        return self.weigh(label & words) / (self.weigh(label) or 1)

    def skill(self, skill: int, score: float, sentence: str = "") -> Found:
        rows = self.db.execute("SELECT name, url, framework, type FROM skills WHERE id = ?", (skill,))
        name, url, framework, kind = rows.fetchone()
        return Found(name, url, framework, kind, round(min(1.0, score), 2), sentence)


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


@functools.lru_cache(1)
def opened(path: str) -> Index:
    """Opened once in a process."""
    return Index(path)


def agreement(index: Index, one: frozenset[str], other: frozenset[str]) -> float:
    """How much two names have in common, 0 to 1: twice what they share by what they have."""
    total = index.weigh(one) + index.weigh(other)
    return 2 * index.weigh(one & other) / total if total else 0.0


def frameworks(path: str) -> dict[str, Any]:
    """The frameworks of the index with their licences; `{"fault"}` with one that cannot be read."""
    try:
        return {"frameworks": opened(path).frameworks()}
    except (BadIndex, OSError, sqlite3.Error) as error:
        return {"fault": f"SKILLS_INDEX: {error}"}


# --- Search ---


def search(path: str, query: str, most: int = MOST_FOUND) -> dict[str, Any]:
    """The skills that a query may mean, best first; `{"fault"}` with an index that cannot be read."""
    try:
        index = opened(path)
        words = [*dict.fromkeys(stems(query[:LONGEST_QUERY]))][:12]
        if not words:
            return {"skills": []}
        words[-1] = index.begun(words[-1])
        wanted = frozenset(words)
        best: dict[int, float] = {}
        ranked = index.ranked(words, 4 * most, prefix=True)
        for skill, label, names in index.known(ranked):
            for name in names:
                whole = _completed(name, words[-1], wanted)
                score = agreement(index, wanted, whole) - 0.01 * (name != label) - 0.02 * (whole != name)
                best[skill] = max(score, best.get(skill, 0.0))
        ranked.sort(key=lambda skill: -best[skill])  # stable: equal ones stay as BM25 has them
        found = [asdict(index.skill(skill, best[skill])) for skill in ranked[:most]]
    except (BadIndex, sqlite3.Error) as error:
        return {"fault": str(error)}
    return {"skills": [{name: value for name, value in one.items() if name != "sentence"} for one in found]}


def _completed(name: frozenset[str], beginning: str, wanted: frozenset[str]) -> frozenset[str]:
    """The name with what the last word of a query begins in place of the whole word: somebody is still typing."""
    return frozenset(beginning if word.startswith(beginning) and word not in wanted else word for word in name)


# --- Alignments ---


class Words:
    """The sentences of a course and their stems."""

    def __init__(self, course: str) -> None:
        self.sentences = sentences_of(course)
        self.stems = [stems(sentence) for sentence in self.sentences]
        self.all = frozenset(chain.from_iterable(self.stems))

    def sentence(self, wanted: frozenset[str], index: Index) -> str:
        """The first sentence that has most of these stems."""
        weights = [index.weigh(wanted.intersection(words)) for words in self.stems]
        return self.sentences[weights.index(max(weights))] if weights else ""


@dataclass(frozen=True)
class Candidate:
    """What speaks for a skill."""

    agreement: float  # of what was said with a name of the skill
    borne: float  # what of the skill's label the course has
    least: float  # of `borne` that it takes
    stems: frozenset[str]

    @property
    def is_accepted(self) -> bool:
        return self.agreement >= AGREES and self.borne >= self.least

    @property
    def rank(self) -> tuple[bool, float]:
        return self.is_accepted, self.agreement * self.borne


def aligned(path: str, names: Sequence[str], course: str, language: str) -> dict[str, Any]:
    """The skills that a badge stands for, as `alignment` of an Achievement, and near misses as `suggestions`.

    `names` are those that the model gave. The index is English: of a course in another language only products are
    found. With an index that cannot be read: `{"fault"}`.
    """
    try:
        index, words = opened(path), Words(course)
        found = _products(index, names, words)
        if language.partition("-")[0].lower() in ("en", "und"):
            for skill, candidate in chain(_of_names(index, names, words), _of_sentences(index, words)):
                if skill not in found or found[skill].rank < candidate.rank:
                    found[skill] = candidate
        best = sorted(found.items(), key=lambda one: one[1].rank, reverse=True)
        accepted = [one for one in best if one[1].is_accepted]
        near = [one for one in best if not one[1].is_accepted and one[1].rank[1] >= NEAR]
        return {
            "alignment": [_alignment(index.skill(skill, 1)) for skill, _ in accepted[:MOST_ALIGNED]],
            "suggestions": [
                asdict(index.skill(skill, one.rank[1], words.sentence(one.stems, index)))
                for skill, one in [*accepted[MOST_ALIGNED:], *near][:MOST_SUGGESTED]
            ],
        }
    except (BadIndex, sqlite3.Error) as error:
        return {"fault": str(error)}


def _alignment(skill: Found) -> dict[str, Any]:
    """By Open Badges 3.0."""
    return {
        "type": ["Alignment"],
        "targetName": skill.name,
        "targetUrl": skill.url,
        "targetFramework": skill.framework,
        "targetType": skill.type,
    }


def _of_names(index: Index, names: Sequence[str], words: Words) -> Iterator[tuple[int, Candidate]]:
    """The skills that the model's names may mean."""
    for said in filter(None, (frozenset(stems(name)) for name in names[:MOST_NAMES])):
        for skill, label, known in index.known(index.ranked(said, CANDIDATES)):
            # The course may say a label in other words, but not without what it is about. Other names of a skill mean
            # something else more often.
            own = agreement(index, said, label) >= AGREES and max(label, key=index.weight) in words.all
            least = BORNE_OF_OWN if own else BORNE
            agrees = max(agreement(index, said, name) for name in known)
            yield skill, Candidate(agrees, index.share(label, words.all), least, label | said)


def _of_sentences(index: Index, words: Words) -> Iterator[tuple[int, Candidate]]:
    """The skills of which one sentence has the label, and a whole name of two words or more together."""
    for sentence in words.stems[:MOST_SENTENCES]:
        said = frozenset(sentence)
        rare = sorted(said - LIGHT, key=lambda stem: (-index.weight(stem), stem))[:WORDS_OF_SENTENCE]
        if len(rare) < 2:
            continue
        for skill, label, known in index.known(index.ranked(rare, CANDIDATES_OF_SENTENCE)):
            if any(_stand_together(name - LIGHT, sentence) for name in known):
                yield skill, Candidate(1.0, index.share(label, said), BORNE, label)


def _stand_together(wanted: frozenset[str], sentence: Sequence[str]) -> bool:
    """Whether a sentence has these two stems or more, with one other among them at most."""
    if len(wanted) < 2 or not wanted.issubset(sentence):
        return False
    size = len(wanted) + 1
    return any(wanted.issubset(sentence[at : at + size]) for at in range(max(1, len(sentence) - size + 1)))


def _products(index: Index, names: Sequence[str], words: Words) -> dict[int, Candidate]:
    """The products that the course names as they are spelled.

    The model must have named one that is called by an ordinary word, such as Slack, or by a letter or two.
    """
    named = frozenset(chain.from_iterable(map(_runs, names)))
    runs = dict.fromkeys(chain.from_iterable(map(_runs, words.sentences)))
    spelled = [run for run in runs if run in named or run != run.lower()]
    found: dict[str, tuple[int, Candidate]] = {}
    for at in range(0, len(spelled), 500):  # SQLite before 3.32 takes 999 parameters
        for name, skill, is_ordinary in index.products(spelled[at : at + 500]):
            is_sure = name in named or " " in name or not (is_ordinary or len(name) < 3)
            found[name] = skill, Candidate(1.0 if is_sure else NEAR, 1.0, BORNE, frozenset(stems(name)))
    # "Google Analytics" does not name Google.
    inside = {run for name in found for run in _runs(name) if run != name}
    return {skill: candidate for name, (skill, candidate) in found.items() if name not in inside or name in names}


def _runs(text: str) -> list[str]:
    """Up to four words that follow each other, as they stand there."""
    pieces = PIECE.findall(text)
    return [
        " ".join(pieces[at : at + size])
        for at, size in product(range(len(pieces)), range(1, LONGEST_RUN + 1))
        if at + size <= len(pieces)
    ]

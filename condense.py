"""Shortens the text of a long course to a budget, openly: what tells least of what is learned goes first.

The text is cut at its headings. Sections of policies, contacts, calendars, readings and grades go first, each as a
whole; then the sentences that say least, wherever they stand. What stays keeps its words and its order.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Words of headings in several languages, and what a section under them is worth. Each matches the beginning of a word;
# one of five letters or more, or of a script that sets no spaces, matches anywhere: Lernziele, Kursinhalt.
WORTH: tuple[tuple[int, str], ...] = (
    (
        3,  # outcomes
        "outcome objective goal competenc skill learn able resultado objetivo aprendizaje competência competencia meta "
        "résultat objectif compétence acquis lernziel lernergebnis kompetenz qualifikation ziele tavoit oppimistulo "
        "osaami leerdoel doelst eindterm competentie leeruitkom obiettiv risultat 目標 到達 目的 ねらい 能力 "
        "目标 成果 学习",
    ),
    (
        2,  # topics
        "topic content module unit lesson curriculum syllabus subject covered contenido temario tema módulo unidad "
        "déroulement conteúdo ementa tópico unidade contenu thème matière inhalt thema themen modul gliederung "
        "sisäl aihe inhoud onderwerp contenut argoment programma week session semana sesión séance semaine woche "
        "sitzung sessão viikko lezione settimana chapter part 週 周 第 内容 計画 トピック 主题 大纲 模块 單元",
    ),
    (
        3,  # description
        "description overview about introduction summary abstract purpose descripción presentación introducción "
        "resumen descrição apresentação introdução resumo présentation résumé aperçu beschreibung überblick einführung "
        "zusammenfassung kuvaus johdanto esittely yleis beschrijving overzicht inleiding descrizione presentazione "
        "introduzione 概要 紹介 説明 简介 概述 介绍 描述 簡介",
    ),
    (
        1,  # assessment
        "assessment evaluation exam project assignment capstone evaluación proyecto avaliação projeto évaluation "
        "projet prüfung leistungsnachweis arvioin tentti suorit toets beoordeling valutazione esame 評価 試験 "
        "課題 考核 评估 考试 作业",
    ),
    (
        -3,  # policies
        "policy policies attendance late integrity plagiar honesty conduct accommodation disabilit harassment emergenc "
        "wellness health copyright etiquette netiquette accessibility withdraw refund tuition fees registration enrol "
        "inclusion diversity política asistencia plagio integridad honestidad norma discapacidad matrícula frequência "
        "presença plágio regra politique règlement présence assiduité plagiat intégrité retard handicap inscription "
        "richtlinie anwesenheit regelung anmeldung gebühr nachteilsausgleich datenschutz käytänn läsnäolo ilmoittautu "
        "sään beleid aanwezigheid plagiaat inschrijv kosten politica frequenza regole iscrizion tasse "
        "方針 出席 注意 履修 規則 剽窃 政策 出勤 考勤 诚信 抄袭 规定 纪律 费用 注册",
    ),
    (
        -3,  # contacts
        "contact office instructor teacher professor staff faculty email phone location website technical support help "
        "contacto profesor docente tutoría correo contato enseignant professeur courriel bureau kontakt dozent "
        "sprechstunde ansprechpartner lehrende yhteystie opettaja yhteyshenkil docent spreekuur contatti ricevimento "
        "連絡 担当 教員 オフィスアワー 联系 教师 讲师 答疑 办公",
    ),
    (
        -2,  # calendars
        "calendar schedule timetable dates deadline due holiday calendario cronograma horario fechas calendário "
        "horário calendrier horaire échéance termin zeitplan stundenplan kalender aikataulu kalenteri rooster planning "
        "orario scadenz 日程 スケジュール 時間割 日历 时间表 进度",
    ),
    (
        -2,  # readings
        "reading textbook bibliograph reference resource material literature library books links lectura bibliograf "
        "referencia recurso libro leitura referência référence ressource manuel literatur lehrbuch quellen kirjallis "
        "oppimateriaali lähte literatuur boeken bronnen letture materiali testi 参考 教科書 文献 教材 书目 资源",
    ),
    (
        -2,  # grades
        "grading grade gpa points rubric calificaci puntaje nota classificação notation barème benotung notenskala "
        "arvosana arvostel cijfer voto punteggio 成績 配点 成绩 评分 分数",
    ),
    (
        -2,  # what is about the text
        "acknowledg licen contribut thanks credits install setup changelog translation sponsor faq license "
        "agradecimiento licencia remerciement licence danksagung lizenz kiitokset dankwoord ringraziamenti "
        "謝辞 致谢 许可",
    ),
)
NO_SPACES = re.compile("[\u0e00-\u0eff\u3000-\u30ff\u3400-\u9fff\uff00-\uff60]")
STEMS = [(worth, re.compile("|".join(rf"\b{re.escape(word)}" if len(word) < 5 and word.isascii() else re.escape(word)
                                     for word in words.split()))) for worth, words in WORTH]  # fmt: skip
MARKED = re.compile(r"(#{1,6})\s+(.*)")
ITEM = re.compile(r"\s*(?:[-*•+]|\(?\w{1,3}[.)])\s|.* \| ")
SENTENCE = re.compile(r"(?<=[.!?])[\"”’)]*\s+(?=[\"“‘(¿¡]?[^\W\d_a-zà-ÿ])|(?<=[。！？])")
BARE = re.compile(r"https?://|www\.|\S@\S|\d{1,2}:\d\d|\b(?:19|20)\d\d\b|\d+ ?%|\+?\d[\d ()-]{7,}")
LINK = re.compile(r"!?\[([^][]*)\]\([^()\s]*(?:\s+\"[^\"]*\")?\)")
TERM = re.compile(r"[^\W\d_]{4,}")


GAPS = ("", " ", "\n", "\n\n")  # between sentences, the widest last


@dataclass
class Unit:
    """A sentence, an item of a list or a row of a table, and what stood before it."""

    text: str
    gap: str
    section: Section
    value: float = 0.0
    kept: bool = True


@dataclass
class Section:
    heading: str
    gap: str
    level: int
    worth: float
    units: list[Unit] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return any(unit.kept for unit in self.units)


def count(text: str) -> int:
    """The words of a text; where a script sets no spaces, two characters count as one."""
    close = len(NO_SPACES.findall(text))
    return len(NO_SPACES.sub("", text).split()) + close // 2


def condense(content: str, words: int, size: int | None = None) -> dict[str, Any]:
    """A text of at most `words` words and, if given, `size` bytes; the headings of what was left out."""
    given = count(content)

    def fits(text: str) -> bool:
        return count(text) <= words and (size is None or len(text.encode()) <= size)

    if fits(content):
        return {"text": content, "left_out": [], "words_kept": given, "words": given}
    sections = _sections(LINK.sub(r"\1", content))  # addresses tell a reader of the course nothing
    _value(sections)
    cuts = _cuts(sections)
    few, many = 0, len(cuts)
    while few < many:  # the smallest number of cuts with which it fits
        middle = (few + many) // 2
        _cut(cuts, middle)
        if fits(_text(sections)):
            many = middle
        else:
            few = middle + 1
    _cut(cuts, few)
    text = _text(sections)
    if not any(section.kept for section in sections):
        best = max((unit for section in sections for unit in section.units), key=lambda unit: unit.value, default=None)
        text = f"{text}\n\n{best.text}".strip() if best else text
    if not fits(text):
        text = _cut_short(text, words, size)
    return {"text": text, "left_out": _left_out(sections), "words_kept": count(text), "words": given}


def _cut_short(text: str, words: int, size: int | None) -> str:
    """The beginning of a sentence that is too long by itself."""
    parts = re.findall(rf"{NO_SPACES.pattern}|\S+?(?={NO_SPACES.pattern}|\s|\Z)\s*", text)
    few, many = 0, len(parts)
    while few < many:
        middle = (few + many + 1) // 2
        start = "".join(parts[:middle])
        if count(start) <= words and (size is None or len(start.encode()) <= size):
            few = middle
        else:
            many = middle - 1
    return "".join(parts[:few]).strip()


# ---- Sections and sentences -----------------------------------------------------------------------------------------


def _sections(content: str) -> list[Section]:
    lines = content.split("\n")
    headings = _headings(lines)
    sections = [Section("", "", 0, 1.0)]
    above: list[Section] = []  # sections that the line is in
    gap = ""
    for number, line in enumerate(lines):
        if not line.strip():
            gap = "\n\n"
        elif number in headings:
            level = headings[number]
            above = [section for section in above if section.level < level]
            own = _worth_of(line) if len(sections) > 1 else 0.0  # the first is the title
            sections.append(Section(line.strip(), gap or "\n", level, own or (above[-1].worth if above else 0.0)))
            above.append(sections[-1])
            gap = ""
        else:
            section = sections[-1]
            parts = [line] if ITEM.match(line) else [part for part in SENTENCE.split(line) if part.strip()]
            for at, part in enumerate(parts):
                section.units.append(Unit(part, (gap or "\n") if not at else " ", section))
            gap = ""
    return sections


def _headings(lines: list[str]) -> dict[int, int]:
    """The lines that are headings, and their levels. Without marks, a short line that stands alone is one."""
    marked = {number: len(found[1]) for number, line in enumerate(lines) if (found := MARKED.match(line))}
    if len(marked) > 1:
        return marked
    alone_ones: dict[int, int] = {}
    for number, line in enumerate(lines):
        alone = number == 0 or not lines[number - 1].strip()
        told = any(after.strip() for after in lines[number + 1 : number + 3])
        short = len(line.split()) <= 10 and 2 < len(line.strip()) <= 80
        if alone and told and short and not ITEM.match(line) and line.strip()[-1] not in ".,;!?。、":
            alone_ones[number] = 1
    return alone_ones


def _worth_of(heading: str) -> float:
    text = heading.casefold()
    return float(max(-3, min(3, sum(worth for worth, stems in STEMS if stems.search(text)))))


# ---- What goes ------------------------------------------------------------------------------------------------------


def _terms(text: str) -> list[str]:
    text = text.casefold()
    close = NO_SPACES.findall(text)
    return TERM.findall(NO_SPACES.sub(" ", text)) + [a + b for a, b in itertools.pairwise(close)]


def _value(sections: list[Section]) -> None:
    """What each sentence tells: words that the course uses often, under a heading that matters, nothing twice."""
    often: Counter[str] = Counter()
    for section in sections:
        for unit in section.units:
            often.update(set(_terms(unit.text)))
    units = [unit for section in sections for unit in section.units]
    told = [
        math.fsum(math.log(often[term]) for term in terms) / (len(terms) + 3)
        for terms in (_terms(unit.text) for unit in units)
    ]
    most = max(told, default=0.0) or 1.0
    seen: set[str] = set()
    for unit, tells in zip(units, told, strict=True):
        first = unit is unit.section.units[0]
        unit.value = (
            0.6 * tells / most + 0.8 * unit.section.worth + 0.3 * first - 0.4 * min(3, len(BARE.findall(unit.text)))
        )
        if (key := " ".join(unit.text.casefold().split())) in seen:
            unit.value -= 100
        seen.add(key)


def _cuts(sections: list[Section]) -> list[list[Unit]]:
    """What is left out first, what next: sections that tell nothing of what is learned, then single sentences."""
    poor = sorted((section for section in sections if section.worth < 0), key=lambda section: section.worth)
    rich = [unit for section in sections if section.worth >= 0 for unit in section.units]
    rich.sort(key=lambda unit: unit.value)
    return [section.units for section in poor] + [[unit] for unit in rich]


def _cut(cuts: list[list[Unit]], number: int) -> None:
    for at, units in enumerate(cuts):
        for unit in units:
            unit.kept = at >= number


def _inside(section: Section) -> Callable[[Section], bool]:
    return lambda other: other.level > section.level


def _left_out(sections: list[Section]) -> list[str]:
    """The headings under which nothing stays, without those that lie under another one of them."""
    gone: list[str] = []
    level = 0  # of the section that is left out and that the next ones may lie in; 0 for none
    for at, section in enumerate(sections):
        if level and section.level > level:
            continue
        within = itertools.takewhile(_inside(section), sections[at + 1 :])
        parts = [section, *within]
        empty = not any(part.units for part in parts)
        level = 0 if empty or any(part.kept for part in parts) else section.level
        if level:
            gone.append(section.heading.lstrip("# "))
    return gone


def _text(sections: list[Section]) -> str:
    said: list[str] = []
    headings: list[Section] = []  # that say nothing yet
    if not sections[0].units and len(sections) > 1:
        said.append(sections[1].heading)  # the title of the course
    for section in sections:
        headings = [other for other in headings if other.level < section.level]
        if section.heading and said[:1] != [section.heading]:
            headings.append(section)
        gap = ""
        for unit in section.units:
            gap = max(gap, unit.gap, key=GAPS.index)
            if not unit.kept:
                continue
            for other in headings:
                said += ["\n\n", other.heading]
            if headings:
                gap = max(section.units[0].gap, "\n", key=GAPS.index)
            headings = []
            said += [gap, unit.text]
            gap = ""
    return "".join(said).strip()

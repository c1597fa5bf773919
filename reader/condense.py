"""A long course made shorter, for a model with a small context, without a model.

What tells most of a course stays as it is and in its order: its outcomes, topics, description and assessment. Sections
about policies, contacts, dates, readings and marks go first, then the sentences that say least.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from unicodedata import normalize

# How words of headings begin, by language: of sections that stay, and of those that go first.
STAY = {
    "en": (
        "outcome, objective, aim, goal, competenc, skill, description, overview, summary, about, introduction, "
        "topic, content, module, unit, lesson, week, session, syllabus, assessment, assignment, project, exam, "
        "evaluation, learn, lab, thesis, capstone, portfolio, prerequisite"
    ),
    "es": (
        "resultado, objetivo, competencia, habilidad, descripci, resumen, presentaci, introducci, tema, "
        "contenido, módulo, unidad, lección, semana, sesión, temario, programa, evaluaci, tarea, proyecto, "
        "examen, aprendizaje, práctica, requisito"
    ),
    "fr": (
        "résultat, objectif, compétence, savoir-faire, acquis, descripti, résumé, présentation, introduction, "
        "thème, contenu, module, unité, leçon, semaine, séance, programme, évaluation, devoir, projet, examen, "
        "apprentissage, travaux, prérequis"
    ),
    "de": (
        "ergebnis, lernergebnis, lernziel, ziel, kompetenz, qualifikationsziel, fähigkeit, beschreibung, "
        "kursbeschreibung, überblick, zusammenfassung, einführung, thema, themen, inhalt, lehrinhalt, "
        "lerninhalt, modul, einheit, lektion, woche, sitzung, lehrplan, prüfung, leistungsnachweis, aufgabe, "
        "projekt, klausur, voraussetzung, vorkenntnis"
    ),
    "pt": (
        "resultado, objetivo, objectivo, competência, habilidade, descri, ementa, resumo, apresentaç, introduç, "
        "tema, tópico, conteúdo, módulo, unidade, lição, semana, sessão, programa, avaliaç, tarefa, projeto, "
        "projecto, exame, aprendizagem, requisito"
    ),
    "fi": (
        "osaamistavoit, tavoit, oppimistavoit, oppimistulo, osaami, taidot, kuvaus, yleiskuvaus, tiivistelmä, "
        "johdanto, aihe, sisältö, sisällö, moduuli, jakso, oppitunti, viikko, opetusohjelma, arviointi, tehtäv, "
        "projekti, tentti, harjoitu, esitiedo"
    ),
    "nl": (
        "leerresultaat, leerresultaten, leerdoel, doel, competentie, vaardighe, beschrijving, overzicht, "
        "samenvatting, inleiding, onderwerp, thema, inhoud, leerinhoud, module, eenheid, lessen, sessie, "
        "programma, toets, beoordeling, opdracht, project, tentamen, eindterm, voorkennis"
    ),
    "it": (
        "risultat, obiettiv, competenz, abilità, descrizion, riassunto, presentazion, introduzion, temi, "
        "argoment, contenut, modul, unità, lezion, settiman, programma, valutazion, verific, compit, progett, "
        "esam, apprendiment, prerequisit"
    ),
    "ja": (
        "到達目標, 学習成果, 学修成果, 目標, 目的, 能力, 概要, 紹介, 内容, 授業計画, テーマ, 単元, 週, 回, "
        "評価方法, 課題, 試験, スキル, 演習"
    ),
    "zh": (
        "学习成果, 學習成果, 目标, 目標, 能力, 技能, 简介, 簡介, 概述, 概要, 介绍, 介紹, 内容, 內容, 主题, 主題, "
        "大纲, 大綱, 模块, 单元, 單元, 章, 周, 考核, 评估, 評估, 作业, 作業, 项目, 專題, 考试, 考試, 实验, 實驗"
    ),
}
GO = {
    "en": (
        "policies, course policy, late policy, attendance policy, grading policy, policy on, contact, "
        "office hour, instructor, teaching staff, teaching assistant, calendar, important date, due date, dates, "
        "deadline, key date, reading list, readings, recommended reading, required reading, further reading, "
        "required text, texts, "
        "bibliograph, textbook, references, grading, grades, grade scale, marking scheme, attendance, absence, "
        "late work, late submission, make-up, plagiar, academic integrity, academic honesty, "
        "academic misconduct, cheating, accommodation, disability service, students with disabilit, "
        "accessibility statement, accessibility service, title ix, copyright, disclaimer, emergency procedure, "
        "tuition, fees, registration, withdrawal, campus resource, student support, support service, "
        "counseling service, counselling service, wellbeing, netiquette, technical support, "
        "technology requirement, technical requirement, acknowledg, appendix, table of contents, room, "
        "nondiscrimination, diversity statement"
    ),
    "es": (
        "políticas, normas, normativa, contacto, tutoría, profesor, docente, calendario, fecha, plazo, "
        "bibliograf, lectura, textos, referencia, calificaci, escala de calific, asistencia, plagio, "
        "integridad académica, honestidad académica, discapacidad, derechos de autor, matrícula, inscripci, "
        "horario, aula, anexo, índice, agradecimiento"
    ),
    "fr": (
        "politiques du cours, règlement, contact, permanence, enseignant, équipe pédagogique, calendrier, dates, "
        "échéance, délai, bibliograph, lectures recommandées, lectures obligatoires, références, notation des, "
        "barème, présence obligatoire, assiduité, absence, plagiat, intégrité académique, handicap, "
        "droits d'auteur, inscription, horaire, salle, annexe, table des matières, remerciement"
    ),
    "de": (
        "richtlinie, prüfungsordnung, studienordnung, kontakt, sprechstunde, dozent, lehrende, ansprechpartner, "
        "kalender, termine, frist, literatur, leseliste, bibliogra, quellen, benotung, notenschlüssel, "
        "notenskala, bewertungsschlüssel, anwesenheit, plagiat, akademische integrität, nachteilsausgleich, "
        "barrierefreiheit, urheberrecht, anmeldung, einschreibung, veranstaltungsort, anhang, "
        "inhaltsverzeichnis, danksagung, datenschutz, gebühr"
    ),
    "pt": (
        "políticas, normas, contato, contacto, atendimento, professor, docente, calendário, datas, prazo, "
        "bibliograf, leitura, referências, classificação final, escala de notas, notas, presença, frequência, "
        "assiduidade, plágio, integridade académica, integridade acadêmica, deficiência, direitos autorais, "
        "matrícula, inscriç, horário, anexo, índice, agradecimento"
    ),
    "fi": (
        "käytännöt, säännöt, ohjesään, yhteystie, vastaanotto, opettajat, aikataulu, kalenteri, päivämäärä, "
        "määräaika, kirjallisuus, lukemisto, lähteet, oppikirja, arvosana, arviointiasteikko, läsnäolo, "
        "poissaolo, plagioin, vilppi, esteettömyys, tekijänoikeu, ilmoittautu, liitteet, sisällysluettelo, "
        "tietosuoja"
    ),
    "nl": (
        "beleid, regels, reglement, contact, spreekuur, docent, kalender, belangrijke data, deadline, "
        "literatuur, leeslijst, bibliograf, referenties, bronnen, cijfers, becijfering, aanwezigheid, "
        "afwezigheid, plagiaat, academische integriteit, fraude, functiebeperking, toegankelijkheid, "
        "auteursrecht, inschrijving, aanmelding, rooster, lokaal, locatie, bijlage, inhoudsopgave"
    ),
    "it": (
        "politiche del corso, regolament, contatti, ricevimento, docent, calendari, scadenz, bibliograf, "
        "letture, testi consigliati, testi di riferimento, riferimenti, votazion, scala di valutazione, "
        "frequenza, presenze, assenz, plagio, integrità accademica, disabilità, diritto d'autore, iscrizion, "
        "orari, aula, allegat, indice del, ringraziament"
    ),
    "ja": (
        "方針, 規則, 連絡先, オフィスアワー, 担当教員, 教員, 日程, カレンダー, 締切, 期限, 参考文献, 参考書, "
        "教科書, 文献, 成績, 出席, 欠席, 剽窃, 不正行為, 障害のある, 著作権, 履修登録, 教室, 付録, 目次, 謝辞, "
        "注意事項"
    ),
    "zh": (
        "政策, 规定, 規定, 联系方式, 聯絡方式, 答疑, 教师, 教師, 日历, 日曆, 日期, 截止, 参考书, 參考書, "
        "参考文献, 參考文獻, 阅读书目, 閱讀書目, 教材, 评分标准, 評分標準, 成绩, 成績, 出勤, 缺勤, 抄袭, 抄襲, "
        "学术诚信, 學術誠信, 残疾, 殘障, 版权, 版權, 注册, 註冊, 教室, 附录, 附錄, 目录, 目錄"
    ),
}


def _beginnings(words: dict[str, str]) -> re.Pattern[str]:
    """Scripts with spaces are matched where words begin; others anywhere."""
    stems = sorted({re.escape(stem) for listed in words.values() for stem in listed.split(", ")})
    spaced = [stem for stem in stems if ord(stem[0]) < 0x3000]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})|{'|'.join(stem for stem in stems if stem not in spaced)}")


STAYS, GOES = _beginnings(STAY), _beginnings(GO)
# What stands in sentences that tell when, where and whom to ask, and in tables of marks.
NOISE = re.compile(
    r"https?://|www\.|\w@\w|\b\d{1,2}[:.h]\d{2}\b|[$€£¥]\s?\d|\+?\d[\d ()/-]{7,}\d|\b\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b"
    r"|\bISBN\b|\bdoi\b|\bet al\b|\bPress\b|\((?:19|20)\d\d[a-z]?\)"
    r"|\b\d{1,3}\s?%?\s?[-–]\s?\d{1,3}\s?%|\b[A-F][+-]?\s?[|=:]\s?\d|©"
)
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
TOKEN = re.compile(rf"(?=([{UNSPACED}]{{2}}))|([^\W\d_{UNSPACED}]{{4,}})")
SENTENCE_END = re.compile(r"(?<=\w\w[.!?])\s+(?=[^\sa-z])|(?<=[)\]\"'’”»][.!?])\s+(?=[^\sa-z])|(?<=[。！？])\s*(?=\S)")
ITEM = re.compile(r"\s*(?:[-*•–+]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s")
LABEL = re.compile(r"([^:：|.]{3,40})(?::\s|：)\s*\S")  # Office hours: Monday
NUMBERED = re.compile(r"\s*(\d+(?:\.\d+)*)[.)]?\s+\S")
LONGEST = 60, 400  # words and characters of one piece; a text without sentences is cut into such


def word_count(text: str) -> int:
    """Two letters of a script without spaces are about a word."""
    return len(text.split()) + len(re.findall(f"[{UNSPACED}]", text)) // 2


@dataclass
class Piece:
    """A heading, or a sentence or a row of a table, with the white space before it."""

    before: str
    text: str
    is_heading: bool = False
    words: int = 0
    score: float = 0.0

    def __post_init__(self) -> None:
        self.words = len(self.text.split())


@dataclass
class Section:
    """What stands under a heading; `weight` is 1 where it stays, -1 where it goes first."""

    heading: str
    weight: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def words(self) -> int:
        return sum(piece.words for piece in self.pieces)

    def is_empty_without(self, gone: set[int]) -> bool:
        """Whether what stands under the heading is left out."""
        under = [piece for piece in self.pieces if not piece.is_heading]
        return all(id(piece) in gone for piece in under or self.pieces)


@dataclass
class Excess:
    """How much has to go."""

    words: int
    characters: float

    def less(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.words -= piece.words
            self.characters -= len(piece.text)

    @property
    def is_gone(self) -> bool:
        return self.words <= 0 and self.characters <= 0


def condense(content: str, words: int, characters: int | None = None) -> dict[str, Any]:
    """At most so many words and characters of a course, and the headings of what is left out."""
    total, limit = len(content.split()), math.inf if characters is None else max(0, characters)
    if total <= words and len(content) <= limit:
        return {"text": content, "left_out": [], "words_kept": total, "words": total}
    sections = _sections(content)
    excess = Excess(total - words, len(content) - limit)
    gone = _leave_out_sections(sections, excess, words)
    gone |= _leave_out_sentences([section for section in sections if id(section.pieces[0]) not in gone], excess)
    text = _joined([piece for section in sections for piece in section.pieces], gone)
    if not text or len(text.split()) > words or len(text) > limit:  # not even one sentence fits
        text = _cut(text or content.strip(), words, limit)
    left_out = [section.heading for section in sections if section.heading and section.is_empty_without(gone)]
    return {"text": text, "left_out": left_out, "words_kept": len(text.split()), "words": total}


# ---- Sections -------------------------------------------------------------------------------------------------------


def _sections(content: str) -> list[Section]:
    sections = [Section("", 1)]  # what stands before the first heading tells what the course is
    above: list[tuple[int, int]] = []  # the levels and weights of the headings that the next one may stand under
    lines = [*re.finditer(r"(\s*?(?:\n|\A)[^\S\n]*)(\S[^\n]*)", content.rstrip())]
    often = Counter(line[2].strip() for line in lines)
    for line, after in zip_longest(lines, lines[1:]):
        before, text = line[1], line[2].rstrip()
        level = _heading_level(before, text, after)
        if level and often[text] <= 2:  # "Back to top" is none
            above = [(other, weight) for other, weight in above if other < level]
            weight = _weight(text) or (above[-1][1] if above else 0)
            above.append((level, weight))
            if len(sections) == 1:  # the title of the course
                weight = weight or 1
            sections.append(Section(text.strip("#= :*"), weight, [Piece(before, text, is_heading=True)]))
        elif (label := LABEL.match(text)) and _weight(label[1]) < 0 <= sections[-1].weight:
            sections.append(Section(label[1].strip("-* "), -1, _pieces(before, text)))
            sections.append(Section("", sections[-2].weight))
        else:
            sections[-1].pieces += _pieces(before, text)
    return [section for section in sections if section.pieces]


def _heading_level(before: str, text: str, after: re.Match[str] | None) -> int:
    """1 for the highest; 0 for a line of the text."""
    if marks := re.match(r"(#{1,6}|={1,6})\s", text):  # of Markdown, of AsciiDoc
        return len(marks[1])
    if len(text) > 80 or len(text.split()) > 10 or text[-1] in ".,;!。，；" or " | " in text or after is None:
        return 0
    apart = not before or before.count("\n") > 1
    if number := NUMBERED.match(text):
        return number[1].count(".") + 1 if apart else 0
    if (
        ITEM.match(text)
        or NOISE.search(text)
        or not re.match(r"[\w¿¡«\"“(]", text)
        or not re.search(r"[^\W\d_]{2}", text)
    ):
        return 0
    known = _weight(text) and (text[0].isupper() or not text[0].isascii()) and len(text.split()) <= 6
    return 9 if known or (apart and (len(text) <= 50 or after[1].count("\n") == 1)) else 0


def _weight(heading: str) -> int:
    """1 for a heading of what stays, -1 for one of what goes first, 0 where no word or as much tells either."""
    words = normalize("NFC", heading).casefold()
    rest, left_out = GOES.subn(" ", words)
    balance = len(STAYS.findall(rest)) - left_out
    return (balance > 0) - (balance < 0)


def _pieces(before: str, line: str) -> list[Piece]:
    """The sentences of a line; longer ones are cut."""
    most_words, most_characters = LONGEST
    said: list[str] = []
    for sentence in [line] if len(line) < 60 or " | " in line else SENTENCE_END.split(line):
        words = sentence.split()
        for at in range(0, len(words), most_words):
            part = " ".join(words[at : at + most_words]) if len(words) > most_words else sentence
            said += [part[start : start + most_characters] for start in range(0, len(part), most_characters)]
    spaces = "" if re.search(f"[{UNSPACED}]", line) else " "
    return [Piece(spaces if number else before, text) for number, text in enumerate(said)]


def _leave_out_sections(sections: list[Section], excess: Excess, words: int) -> set[int]:
    """Leaves out whole sections of the kinds that go first, the longest first, until the rest fits."""
    gone: set[int] = set()
    left = sum(section.words for section in sections)
    for section in sorted((section for section in sections if section.weight < 0), key=lambda one: -one.words):
        if excess.is_gone or left - section.words < words / 3:  # a course of nothing else keeps some of it
            continue
        left -= section.words
        excess.less(section.pieces)
        gone |= {id(piece) for piece in section.pieces}
    return gone


# ---- Sentences ------------------------------------------------------------------------------------------------------


def _leave_out_sentences(sections: list[Section], excess: Excess) -> set[int]:
    """Leaves out what says least until the rest fits."""
    gone: set[int] = set()
    _score(sections)
    for piece in sorted((piece for section in sections for piece in section.pieces), key=lambda one: one.score):
        if excess.is_gone:
            break
        gone.add(id(piece))
        excess.less([piece])
    return gone


def _score(sections: list[Section]) -> None:
    """A sentence says much that has many of the words that the course uses often, and those of no earlier one."""
    said = [(section, piece, _tokens(piece.text)) for section in sections for piece in section.pieces]
    often = Counter(token for tokens in {piece.text: tokens for _, piece, tokens in said}.values() for token in tokens)
    everywhere = max(8, len(said) / 5)  # words as "students" and "this" tell nothing
    seen: set[str] = set()
    firsts = {id(section): next((p for p in section.pieces if not p.is_heading), None) for section in sections}
    for section, piece, tokens in said:
        is_outcome = section.weight > 0 and ITEM.match(piece.text) is not None
        first = firsts[id(section)]
        worth = sum(math.log1p(often[token]) for token in tokens if often[token] < everywhere)
        new = len(tokens - seen) / len(tokens) if tokens else 0
        size = max(piece.words, len(piece.text) / 8)
        piece.score = worth * (0.5 + new) / (size + 4) + 0.5 * section.weight
        piece.score -= 0.7 * min(3, len(NOISE.findall(piece.text)))
        piece.score -= 0.7 * min(2, len(GOES.findall(normalize("NFC", piece.text).casefold())))
        piece.score -= 9 * (piece.words > 2 and not tokens - seen)
        piece.score += 1 if piece.is_heading else 0.4 * (piece is first) + 0.6 * is_outcome
        seen |= tokens


def _tokens(text: str) -> set[str]:
    """Words without their endings, or pairs of letters where words are not told apart."""
    return {pair or word[:7] for pair, word in TOKEN.findall(text.casefold())}


def _joined(pieces: list[Piece], gone: set[int]) -> str:
    """The pieces that stay, with line breaks where one was between them."""
    said: list[str] = []
    before = ""
    for piece in pieces:
        before = max(before, piece.before, key=lambda space: (space.count("\n"), len(space)))
        if id(piece) not in gone:
            said += [before, piece.text]
            before = ""
    return "".join(said).strip()


def _cut(text: str, words: int, characters: float) -> str:
    """As many whole words as there is room for; of a text without spaces, characters."""
    ends = [word.end() for word in re.finditer(r"\S+", text)][: max(0, words)]
    fitting = [end for end in ends if end <= characters]
    if fitting or not ends:
        return text[: fitting[-1] if fitting else 0]
    return text[: int(characters)]

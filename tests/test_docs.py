"""The documents: every setting stands there with its default, every link leads somewhere, every shell block parses."""

import re
import subprocess
from pathlib import Path

import pytest

from dccapi import Settings

HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
NAMED_OTHERWISE = {"model_name": "phi4badges", "system_prompt_file": "SYSTEM_PROMPT.txt", "enable_multiplexing": "true"}


def documented() -> dict[str, str]:
    """Variable to default, as docs/settings.md has them."""
    found: dict[str, str] = {}
    for line in (HERE / "docs/settings.md").read_text("utf-8").splitlines():
        if line.startswith("| `"):
            _, names, defaults = line.split("|")[:3]
            listed = re.findall(r"`([A-Z_]+)`", names)
            values = [value.strip(" `") for value in defaults.split(",")] if len(listed) > 1 else [defaults.strip(" `")]
            found |= dict(zip(listed, values + [""] * (len(listed) - len(values)), strict=True))
    return found


def test_every_setting_is_documented_with_its_default() -> None:
    found = documented()
    assert {name.upper() for name in Settings.model_fields} == set(found)
    for name, field in Settings.model_fields.items():
        default = NAMED_OTHERWISE.get(name, "" if field.default is None else str(field.default))
        if name != "allowed_origins":  # its default is told in words
            assert found[name.upper()] == default, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_commands_parse(document: Path) -> None:
    text = document.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target
    for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.M | re.S):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True, timeout=10)

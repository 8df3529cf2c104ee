"""Read the Markdown texts for users: their blocks, prose and sections."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache_schema", "extract", "train")
TEXTS = (
    "README.md",
    "extract/README.md",
    "train/README.md",
    "cache_schema/README.md",
    "tests/benchmarks/README.md",
)
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" if none is named), its text, and where it begins."""

    language: str
    text: str
    where: str


def read_blocks(name: str) -> list[Block]:
    text = (ROOT / name).read_text()
    return [Block(m[1], m[2], f"{name}:{text.count(chr(10), 0, m.start()) + 1}") for m in _FENCE.finditer(text)]


def read_prose(name: str) -> str:
    """Return a text without its fenced blocks."""
    return _FENCE.sub("", (ROOT / name).read_text())


def read_section(name: str, title: str) -> str:
    """Return the text below a heading of level 1 or 2, up to the next such heading."""
    text = (ROOT / name).read_text()
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{name} has no section {title}"
    return found[2]

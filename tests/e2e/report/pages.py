"""What a report was made from, and how a test reads its page."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page
from safetensors.numpy import load_file

NAMES = {
    3: "<script>alert(1)</script>",
    5: '"><img src=x onerror=alert(2)>',
    6: "</script><b>Bus & 'Co'",
    48: "Bäume {{ 7*7 }} $a$ | `x` | [y](javascript:z)",
    55: "plain, with a comma",
}
PREFIX = "s<i>\"&'"
COLUMNS = ("name", "ap", "f1", "precision", "recall", "support", "threshold")


@dataclass(frozen=True)
class Made:
    """A working directory with a finished run, its tiles and cache."""

    root: Path

    @property
    def run(self) -> Path:
        return (self.root / "runs" / "head").resolve()

    def read(self, name: str) -> Any:
        return json.loads((self.run / name).read_text())

    def evidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits, labels and decisions of the validation tiles that count, by this test's own arithmetic."""
        kept = load_file(self.run / "val_logits.safetensors")
        metrics = self.read("metrics.json")
        shown = kept["labels"].any(axis=1)
        logits, labels = kept["logits"][shown].astype(np.float64), kept["labels"][shown]
        probs = 1 / (1 + np.exp(-logits / metrics["calibration"]["temperature"]))
        return logits, labels, probs >= np.array([row["threshold"] for row in metrics["per_class"]])


Open = Callable[..., Page]


def texts(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def show(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def read_rows(page: Page, selector: str) -> list[list[str]]:
    rows: list[list[str]] = page.eval_on_selector_all(
        f"{selector} tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )
    return rows


def copy_runs(made: Made, root: Path) -> Path:
    """The run directories alone, to be spoilt; cache and tiles stay where they are."""
    shutil.copytree(made.root / "runs", root / "runs", symlinks=True)
    return root / "runs/head-001"


def find_shown(report: Path) -> list[str]:
    """Tiles with a thumbnail, each once, in the page's order."""
    found = re.findall(r'alt="Tile (images/\S+?\.png): shows', report.read_text())
    return [html.unescape(name) for name in dict.fromkeys(found)]

"""A report is whole, bounded and safe, whatever the names and whatever is missing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from tests.unit.train.report.made_up import NAMES, make_run
from train.config import DataConfig
from train.report import write_events, write_report
from train.report.facts import Facts
from train.report.licences import DINOV3_URL


class Parsed(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_a_page_of_hostile_names(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path, rng, data=DataConfig(taxonomy="</pre><script>1"))
    write_events(run)
    write_report(run)
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))
    text = (run.path / "report.html").read_text(encoding="utf-8")
    page = Parsed(text)
    assert page.tags.count("script") == 1
    assert not {"u", "b>", "link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links
    assert all(link.startswith(("#", DINOV3_URL, "https://creativecommons.org/")) for link in links)
    for name in NAMES:
        assert name in page.cells, name
    joined = "".join(page.cells)
    for expected in ("gs://bucket/<i>cache</i>", "</pre><script>1", "</td><script>2", "images/<b>"):
        assert expected in joined
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    at = page.cells.index("never seen")
    row = [cell for cell in page.cells[at + 1 : at + 7] if cell.strip()]
    assert row[:5] == ["n/a", "n/a", "n/a", "n/a", "0"]


def test_a_large_run_makes_a_page_of_bounded_size(tmp_path: Path, rng: np.random.Generator) -> None:
    """As many classes as there can be, and more: curves, tables and tiles are bounded for each."""
    run = make_run(tmp_path, rng, rows=200, names=tuple(f"class number {c}" for c in range(200)))
    write_report(run)
    assert (run.path / "report.html").stat().st_size < 3 * 2**20


def test_logits_of_another_run_are_not_believed(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path, rng)
    metrics = run.read_json("metrics.json")
    metrics["per_class"][0]["support"] += 1
    run.write_json("metrics.json", metrics)
    facts = Facts.read(run)
    assert facts.evidence is None
    assert "are not from the same run" in facts.lacking


def test_figures_that_are_not_there_leave_the_page_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    """No history, no intervals, no baselines and no bins, as of a rung of a ladder or an earlier release."""
    run = make_run(tmp_path, rng)
    run.history.unlink()
    metrics = run.read_json("metrics.json")
    del metrics["reliability"], metrics["baselines"]
    metrics["intervals"] = dict.fromkeys(metrics["intervals"])
    run.write_json("metrics.json", metrics)
    write_report(run)
    text = (run.path / "report.html").read_text()
    assert "metrics.json is from an earlier release" in text
    assert 'id="training"' not in text
    assert f"{metrics['map_macro']:.3f}" in text

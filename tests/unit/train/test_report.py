"""report.html is one file that opens offline, and names from outside are text in it, never markup."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.planted import fresh_seed
from train.config import DataConfig, TrainConfig
from train.evaluation import Evaluation, evaluate_rows
from train.loss import LossConfig
from train.report import draw_tiles, write_report
from train.rows import LabelledRows
from train.rundir import RunDirectory

NAMES = (
    "<script>alert(1)</script>",
    "roof & \"pool\" 'x'",
    "plain",
    "<img src=x onerror=y>",
    "Bäume_$a$",
    "never seen",
)


class Page(HTMLParser):
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


def make_rows(rng: np.random.Generator, rows: int = 40) -> LabelledRows:
    labels = rng.random((rows, len(NAMES))) < 0.5
    labels[:, -1] = False
    return LabelledRows(
        index=np.arange(rows),
        tiles=np.array([f"images/<b>{i}.png" for i in range(rows)]),
        scenes=np.array([f"s{i % 6}" for i in range(rows)]),
        labels=labels,
        reading="class",
        class_ids=tuple(range(len(NAMES))),
        class_names=NAMES,
        notes=(),
    )


def evaluate(rows: LabelledRows, rng: np.random.Generator) -> Evaluation:
    logits = torch.from_numpy(rng.normal(size=rows.labels.shape).astype(np.float32))
    return evaluate_rows(logits, rows, np.ones(len(rows), bool), loss=LossConfig())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


@pytest.fixture
def page(tmp_path: Path, rng: np.random.Generator) -> Page:
    config = TrainConfig(cache="gs://bucket/<i>cache</i>", run="r", data=DataConfig(taxonomy="</pre><script>1"))
    run = RunDirectory.create(str(tmp_path / "head"))
    run.write_json("config.json", {"config": config.to_json()})
    for epoch in (1, 2):
        figures = {"train_loss": 0.1 / epoch, "loss": 0.2, "f1_weighted": 0.5, "f1_macro": 0.4, "map_macro": None}
        run.append_history({"epoch": epoch, **figures})
    rows = make_rows(rng)
    write_report(run, config, {"validation <u>": evaluate(rows, rng), "test": evaluate(rows, rng)})
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))
    return Page((run.path / "report.html").read_text(encoding="utf-8"))


def test_names_from_outside_are_text(page: Page) -> None:
    assert not {"script", "i", "u", "b"} & set(page.tags)
    assert page.tags.count("img") == 1  # the curves
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for name in NAMES:
        assert page.cells.count(name) == 2, name  # once a result
    text = "".join(page.cells)
    for expected in ("gs://bucket/<i>cache</i>", "validation <u>", "</pre><script>1"):
        assert expected in text


def test_it_needs_nothing_from_outside(page: Page) -> None:
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    urls = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert urls
    assert all(url is not None and url.startswith("data:image/png;base64,") for url in urls)
    image = Image.open(io.BytesIO(base64.b64decode(str(urls[0]).split(",", 1)[1])))
    image.load()
    assert min(image.size) > 200
    assert "url(" not in "".join(page.cells)
    assert "@import" not in "".join(page.cells)


def test_classes_without_positives_are_not_scored(page: Page) -> None:
    at = page.cells.index("never seen")
    row = [cell for cell in page.cells[at + 1 : at + 7] if cell.strip()]
    assert row[:5] == ["n/a", "n/a", "n/a", "n/a", "0"]


def test_the_picture_takes_any_name(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = make_rows(rng, 5)
    images = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(5)]
    draw_tiles(tmp_path / "tiles.png", images, rows, rows.labels)
    assert min(Image.open(tmp_path / "tiles.png").size) > 200

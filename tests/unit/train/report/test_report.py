"""The arithmetic behind the report against plain loops and scikit-learn, its bounds, and names that are hostile."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shlex
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from cache_schema import TileprobeError
from tests.caches import make_provenance, make_recorded, make_table
from tests.planted import fresh_seed
from train.__main__ import _make_config, finetune, head
from train.config import DataConfig, TrainConfig
from train.data.labels import LabelledRows
from train.errors import TrainError
from train.metrics.decisions import bin_decisions, expected_calibration_error, measure_distance
from train.metrics.evaluation import evaluate_rows
from train.model.loss import LossConfig
from train.report import draw_tiles, write_events, write_report
from train.report.analysis import choose_extremes, draw_curve, list_beside, list_swaps
from train.report.card import escape_markdown
from train.report.commands import describe_extraction, describe_training
from train.report.embeddings import MOST_OF_A_BLOCK, MOST_POINTS, draw_sample, make_map
from train.report.facts import Facts
from train.report.licences import DINOV3_URL, find_licences
from train.report.plots import choose_ticks
from train.report.tiles import MOST_BYTES, SIDE, encode_thumbnail, read_thumbnails
from train.runs.directory import RunDirectory
from train.runs.val_logits import save_val_logits

NAMES = (
    "<script>alert(1)</script>",
    "roof & \"pool\" 'x'",
    "plain",
    "<img src=x onerror=y>",
    "Bäume_$a$",
    "never seen",
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def draw_decisions(rng: np.random.Generator, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities with ties, labels and decisions."""
    labels = rng.random((rows, classes)) < rng.uniform(0.05, 0.6, classes)
    probs = ((rng.random(labels.shape) + labels).clip(0, 1.6) / 1.7).round(2).astype(np.float32)
    return probs, labels, probs >= rng.uniform(0.2, 0.8, classes).astype(np.float32)


def make_rows(labels: np.ndarray, names: tuple[str, ...]) -> LabelledRows:
    n = len(labels)
    return LabelledRows(
        index=np.arange(n),
        tiles=np.array([f"images/<b>{i // 8}_{i % 8}.png" for i in range(n)], np.dtypes.StringDType()),
        scenes=np.array([f"s{i // 8}" for i in range(n)]),
        labels=labels,
        reading="class",
        class_ids=tuple(range(len(names))),
        class_names=names,
        notes=(),
    )


def make_run(
    root: Path, rng: np.random.Generator, *, rows: int = 40, names: tuple[str, ...] = NAMES, **settings: Any
) -> RunDirectory:
    """What the trainer leaves, of made-up logits; the last class has no positive."""
    config = TrainConfig(cache="gs://bucket/<i>cache</i>", run="r", **settings)
    run = RunDirectory.create(str(root / "head"))
    labels = rng.random((rows, len(names))) < np.geomspace(0.6, 0.05, len(names))
    labels[:, -1] = False
    labels[:, 0] |= ~labels.any(axis=1)
    logits = torch.from_numpy((rng.normal(size=labels.shape) + 2.0 * labels - 1).astype(np.float32))
    made = make_rows(labels, names)
    recorded = make_recorded(backbone="</td><script>2")
    written = {"config": config.to_json(), "version": "ab", "provenance": make_provenance().to_json()}
    run.write_json("config.json", {**written, "recorded": recorded.to_json()})
    run.write_json("split.json", {"train": [], "val": made.tiles.tolist()})
    evaluation = evaluate_rows(logits, made, np.ones(rows, bool), loss=LossConfig())
    run.write_json("metrics.json", evaluation.to_json())
    save_val_logits(run, made, logits)
    for epoch in (1, 2):
        figures = {"train_loss": 0.1 / epoch, "loss": 0.2, "f1_weighted": 0.5, "f1_macro": 0.4, "map_macro": None}
        run.append_history({"epoch": epoch, **figures})
    return run


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


def test_curves_and_their_area_are_scikit_learns(rng: np.random.Generator) -> None:
    for _ in range(10):
        probs, labels, preds = draw_decisions(rng, int(rng.integers(5, 900)), 1)
        labels[0] = True
        curve = draw_curve(probs[:, 0], labels[:, 0], preds[:, 0])
        assert curve is not None
        precision, recall, _ = precision_recall_curve(labels[:, 0], probs[:, 0].astype(float))
        points = set(zip(recall.tolist(), precision.tolist(), strict=True))
        assert set(zip(curve.recall.tolist(), curve.precision.tolist(), strict=True)) <= points
        area = float((np.diff(curve.recall, prepend=0) * curve.precision).sum())
        assert area == pytest.approx(average_precision_score(labels[:, 0], probs[:, 0]), abs=1e-9)
        drawn = curve.thin()
        assert len(drawn[0]) <= 121
        assert (drawn[0][0], drawn[0][-1]) == (curve.recall[0], 1)
        assert set(zip(drawn[0].tolist(), drawn[1].tolist(), strict=True)) <= points
        hits = (labels & preds).sum()
        assert curve.operating == (hits / labels.sum(), hits / max(preds.sum(), 1))
    assert draw_curve(probs[:, 0], np.zeros(len(probs), bool), preds[:, 0]) is None


def test_errors_beside_other_classes_are_counted_by_hand(rng: np.random.Generator) -> None:
    _, labels, preds = draw_decisions(rng, 90, 7)
    for errors in (labels & ~preds, ~labels & preds):
        found = list_beside(errors, labels, preds)
        assert len(found) == 7
        for c, beside in enumerate(found):
            tiles = [t for t in range(90) if errors[t, c]]
            assert beside.tiles == len(tiles)
            excess = {}
            for d in set(range(7)) - {c} if tiles else ():
                shares = [sum(side[t, d] for t in tiles) / len(tiles) for side in (labels, preds)]
                excess[d] = max(shares[0] - labels[:, d].mean(), shares[1] - preds[:, d].mean())
            wanted = sorted((d for d in excess if excess[d] > 1e-12), key=lambda d: -excess[d])[:5]
            assert sorted(n.column for n in beside.neighbours) == sorted(wanted)
            for n in beside.neighbours:
                assert n.shown == sum(labels[t, n.column] for t in tiles)
                assert n.predicted == sum(preds[t, n.column] for t in tiles)
                assert n.excess == pytest.approx(excess[n.column])
            assert [n.excess for n in beside.neighbours] == sorted((n.excess for n in beside.neighbours), reverse=True)


def test_swaps_are_counted_by_hand(rng: np.random.Generator) -> None:
    _, labels, preds = draw_decisions(rng, 120, 6)
    counts = {
        (c, d): sum(labels[t, c] and not preds[t, c] and preds[t, d] and not labels[t, d] for t in range(120))
        for c in range(6)
        for d in range(6)
    }
    found = list_swaps(labels, preds, top=9)
    assert found == sorted(((c, d, n) for (c, d), n in counts.items() if n), key=lambda p: (-p[2], p[0], p[1]))[:9]


def test_extremes_are_the_first_and_last_in_order(rng: np.random.Generator) -> None:
    probs, labels, preds = (side[:, 0] for side in draw_decisions(rng, 200, 1))
    found = choose_extremes(probs, labels, preds, most=4)
    rows = range(200)
    for chosen, kind, key in (
        (found.found, labels & preds, -probs),
        (found.missed, labels & ~preds, probs),
        (found.false, ~labels & preds, -probs),
    ):
        assert list(chosen) == sorted((r for r in rows if kind[r]), key=lambda r: (key[r], r))[:4]


def test_bins_hold_every_decision(rng: np.random.Generator) -> None:
    probs, labels, _ = draw_decisions(rng, 300, 5)
    probs[:3, 0] = (0, 1, 1 / 3)
    bins = bin_decisions(probs, labels, 10)
    flat, truth = probs.ravel().astype(float), labels.ravel()
    distance = 0.0
    for number, part in enumerate(bins):
        inside = [i for i in range(flat.size) if min(int(flat[i] * 10), 9) == number]
        assert part["count"] == len(inside)
        if inside:
            assert part["prob"] == pytest.approx(np.mean([flat[i] for i in inside]))
            assert part["positive"] == pytest.approx(np.mean([truth[i] for i in inside]))
            distance += len(inside) / flat.size * abs(part["prob"] - part["positive"])
    assert measure_distance(bins) == pytest.approx(distance)
    assert expected_calibration_error(probs, labels, 10) == measure_distance(bins)
    assert measure_distance(bin_decisions(probs[:0], labels[:0])) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-9 * max(1.0, abs(low)):
        return
    ticks = choose_ticks(low, high)
    assert len(ticks) <= 12
    assert all(low - 1e-6 * max(width, abs(low), 1) <= tick <= high + 1e-6 * max(width, abs(low), 1) for tick in ticks)


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


def test_thumbnails_fit_their_budget(tmp_path: Path, rng: np.random.Generator) -> None:
    """Noise is the worst there is to encode."""
    noise = rng.integers(0, 256, (500, 300, 3), dtype=np.uint8)
    limit = MOST_BYTES * 3 // 4 // 600
    made = encode_thumbnail(noise, limit)
    data = base64.b64decode(made.uri.removeprefix("data:image/webp;base64,"))
    assert len(data) <= limit
    image = Image.open(io.BytesIO(data))
    assert image.size == (made.width, made.height)
    assert max(image.size) == SIDE
    assert image.size[1] / image.size[0] == pytest.approx(5 / 3, rel=0.02)


class Gone:
    """A place that does not answer, and counts how often it was asked."""

    url, identity = "gs://gone", "crc32c"

    def __init__(self) -> None:
        self.asked = 0

    def list(self, folder: str) -> Any:
        raise NotImplementedError

    def read(self, name: str, generation: int) -> bytes:
        self.asked += 1
        raise TrainError("no answer")

    read_checked = read


def test_where_nothing_answers_one_tile_is_tried() -> None:
    gone = Gone()
    with pytest.raises(TileprobeError, match="no answer"):
        read_thumbnails(gone, make_table(40), range(40))
    assert gone.asked == 1


def test_a_sample_is_bounded_by_block(rng: np.random.Generator) -> None:
    rows = np.sort(rng.choice(200_000, 20_000, replace=False))
    chosen = draw_sample(rows, 256, seed=3)
    assert len(chosen) == MOST_POINTS == len(set(chosen.tolist()))
    assert np.bincount(rows[chosen] // 256).max() <= MOST_OF_A_BLOCK
    assert np.array_equal(chosen, draw_sample(rows, 256, seed=3))
    assert not np.array_equal(chosen, draw_sample(rows, 256, seed=4))
    assert np.array_equal(draw_sample(rows[:1500], 256, seed=3), np.arange(1500))


def test_a_map_keeps_groups_together(tmp_path: Path, rng: np.random.Generator) -> None:
    from cache_schema import LABEL_ID_COLUMNS, open_cache
    from tests.caches import write_rows

    centres = 8 * rng.normal(size=(3, 16))
    group = rng.integers(0, 3, 90)
    vectors = centres[group] + rng.normal(size=(90, 16))
    tiles = np.array([f"images/{i:03}_0.png" for i in range(90)])
    url = write_rows(str(tmp_path / "cache"), tiles, {"cls": vectors}, np.zeros((90, LABEL_ID_COLUMNS)))
    rows = np.arange(5, 90)
    made = make_map(open_cache(url), rows, "cls", seed=0)
    assert np.array_equal(made.chosen, np.arange(85))
    distance = np.linalg.norm(made.points[:, None] - made.points, axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    assert (group[rows][nearest] == group[rows]).mean() > 0.95
    again = make_map(open_cache(url), rows, "cls", seed=0)
    assert np.array_equal(made.points, again.points)
    assert "85 validation tiles" in made.method


CONFIGS = [
    TrainConfig(cache="c", run="runs/head"),
    TrainConfig(
        cache="gs://b/c d", run="runs/x", lr=0.003, loss="bce", head="linear", data=DataConfig(exclude=(5, 48)), seed=3
    ),
    TrainConfig(cache="c", run="runs/head", amp=False, patience=4, folds=3, deterministic=True).like_original(),
    TrainConfig(
        cache="c", run="runs/finetune", unfreeze=3, epochs=10, batch_size=32, lr=1e-4, warmup=0.1, views="d4",
        cache_prefix=True, large_prefix=True, head_run="runs/head-001", amp=True,
        data=DataConfig(split_file="runs/head-001/split.json", taxonomy="my classes.csv"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_shown_is_the_run_again(tmp_path: Path, rng: np.random.Generator, config: TrainConfig) -> None:
    """Parsed by the command line itself it gives the same settings."""
    facts = replace(Facts.read(make_run(tmp_path, rng)), config=config)
    python, m, package, name, *words = shlex.split(describe_training(facts))
    assert (python, m, package) == ("python", "-m", "train")
    command = {"head": head, "finetune": finetune}[name]
    options = command.make_context(name, words).params
    parsed = _make_config(options)
    assert asdict(parsed) == asdict(config)


def test_the_extraction_shown_is_what_the_cache_knows() -> None:
    settings = {"recorded": make_recorded(tiles="gs://b/my tiles").to_json(), "provenance": make_provenance().to_json()}
    words = shlex.split(describe_extraction(settings, "cache/x"))
    assert words[:4] == ["python", "-m", "extract", "run"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--tiles"] == "gs://b/my tiles"
    assert options["--image-size"] == "64"
    assert options["--precision"] == "float32"


@pytest.mark.parametrize(
    ("backbone", "tiles", "base", "said"),
    [
        ("vitl16", "gs://b/xView_tiled/train", "facebook/dinov3-vitl16-pretrain-sat493m", "CC BY-NC-SA 4.0"),
        (
            "facebook/dinov3-vits16-pretrain-lvd1689m",
            "x",
            "facebook/dinov3-vits16-pretrain-lvd1689m",
            "your own imagery",
        ),
        ("runs/finetune/export", "gs://b/mine", None, "your own imagery"),
        ("demo", "gs://tileprobe-demo/train", None, "drawn by this package's demo"),
    ],
)
def test_licences_follow_from_names(
    tmp_path: Path, rng: np.random.Generator, backbone: str, tiles: str, base: str | None, said: str
) -> None:
    run = make_run(tmp_path, rng)
    settings = run.read_json("config.json")
    settings["recorded"] |= {"backbone": backbone, "tiles": tiles}
    run.write_json("config.json", settings)
    found = find_licences(Facts.read(run))
    assert found.base_model == base
    assert said in found.imagery
    assert (DINOV3_URL in found.backbone) == (backbone != "demo")
    write_report(run)
    card = (run.path / "model_card.md").read_text()
    assert (f"base_model: {base}" in card) == (base is not None)
    assert ("license_name: dinov3-license" in card) == (base is not None)


@given(st.text(max_size=60))
def test_markdown_from_outside_stays_in_its_cell(text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]*_]", escaped.replace("\\\\", ""))
    assert "<" not in escaped


def test_logits_of_another_run_are_not_believed(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path, rng)
    metrics = run.read_json("metrics.json")
    metrics["per_class"][0]["support"] += 1
    run.write_json("metrics.json", metrics)
    facts = Facts.read(run)
    assert facts.evidence is None
    assert "are not of one run" in facts.lacking


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
    assert "metrics.json is an earlier release" in text
    assert 'id="training"' not in text
    assert f"{metrics['map_macro']:.3f}" in text


def test_the_picture_takes_any_name(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = make_rows(rng.random((5, len(NAMES))) < 0.5, NAMES)
    images = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(5)]
    draw_tiles(tmp_path / "tiles.png", images, rows, rows.labels)
    assert min(Image.open(tmp_path / "tiles.png").size) > 200

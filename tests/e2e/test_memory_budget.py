"""The cached path with vectors in memory and streamed, as its user runs it: the same figures, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import CacheRoot, Status
from extract.ranks.group import join_ranks
from tests.caches import plant_cache, rewrite_block
from tests.planted import Finished, fresh_seed
from tests.planted import train as run_train
from train.config import DataConfig, TrainConfig
from train.data.cached import open_cached_tiles
from train.data.sets import read_sets
from train.loop.assemble import make_head, make_meta
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.model.classifier import Classifier
from train.runs.directory import RunDirectory

ROWS = 2_600
"""Eleven blocks."""
STREAMED = ("--memory-budget", "70K")
"""Less than the 83 kB of all vectors, enough for a buffer of 560 of the 2,080 training rows."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(plant_cache(str(tmp_path_factory.mktemp("vectors") / "cache"), ROWS, seed=fresh_seed()))


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A copy of that cache, to be spoilt."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `held` and a run `streamed`, and what they printed."""
    root = tmp_path_factory.mktemp("budget")
    for name, budget in (("held", ()), ("streamed", STREAMED)):
        result = train_head(root, cache, *budget, "--run-dir", name, "--epochs", 3)
        assert result.status == 0, result.err
        (root / f"{name}.out").write_text(result.out)
    return root


def train_head(cwd: Path, cache: Path, *options: object) -> Finished:
    return run_train(cwd, "head", "--cache", cache, "--device", "cpu", "--batch-size", 64, "--lr", 0.01, *options)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def fit_head(cache: Path, root: Path, split: Path, *, seed: int, budget: int | None) -> dict[str, Any]:
    """The last epoch's figures, without the report that a whole run ends with."""
    data = DataConfig(split_file=str(split))
    config = TrainConfig(
        str(cache), str(root), data=data, epochs=4, batch_size=64, lr=0.01, seed=seed, memory_budget=budget
    )
    with join_ranks("cpu") as ranks:
        sets = read_sets(config, ranks)
        meta = make_meta(config, sets.train)
        classifier = Classifier(make_head(meta, 16, seed), None, meta.features)
        run = RunDirectory.create(str(root / f"{budget}-{seed}"))
        val = ValidationSet(open_cached_tiles(sets.val, ranks), sets.val.rows, sets.counted)
        Trainer(classifier, open_cached_tiles(sets.train, ranks), val, config, meta, run, ranks).fit(print)
    return run.read_history()[-1]


def test_streamed_and_held_vectors_give_the_same_figures_within_the_spread_of_seeds(
    cache: Path, runs: Path, tmp_path: Path
) -> None:
    """Means over six seeds differ by less than three standard errors of a difference, or a hundredth."""
    split = runs / "held" / "split.json"
    held, streamed = (
        [fit_head(cache, tmp_path, split, seed=seed, budget=budget) for seed in range(6)]
        for budget in (None, 70 * 1024)
    )
    for key in ("loss", "f1_weighted", "f1_macro", "map_macro"):
        a, b = (np.array([figures[key] for figures in mode]) for mode in (held, streamed))
        spread = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
        assert abs(a.mean() - b.mean()) <= max(3 * spread, 0.01), key
    assert np.mean([figures["map_macro"] for figures in streamed]) > 0.8
    assert held[0]["loss"] != streamed[0]["loss"]  # orders differ: else nothing was compared


def test_a_run_says_where_its_vectors_are_and_how_fast_it_was(runs: Path) -> None:
    held, streamed = ((runs / f"{name}.out").read_text() for name in ("held", "streamed"))
    assert "vectors are held in memory: 81.3K, the budget is " in held
    assert "vectors stay in the cache: 81.3K, the budget is 70K; blocks are read in every epoch" in streamed
    assert "shuffled 560 rows at a time" in streamed
    for out in (held, streamed):
        assert [line.split(":")[0] for line in out.splitlines() if line.startswith("epoch ")] == [
            f"epoch {epoch}/3" for epoch in range(1, 4)
        ]
        assert out.count(" tiles/s, ") == 3
    # Resolved, so that a resumed run chooses the same.
    assert read(runs / "streamed" / "config.json")["config"]["memory_budget"] == 70 * 1024
    assert read(runs / "held" / "config.json")["config"]["memory_budget"] > 2**20


def test_a_resumed_run_streams_the_same_order(runs: Path, tmp_path: Path) -> None:
    """The last epoch again, from the checkpoint before it."""
    run = Path(shutil.copytree(runs / "streamed-001", tmp_path / "runs" / "head-001"))
    (tmp_path / "runs" / "head").symlink_to("head-001")
    history = (run / "history.jsonl").read_bytes()
    weights = run / "last" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    result = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    assert "after epoch 2 of 3" in result.out
    assert "vectors stay in the cache" in result.out
    assert (run / "history.jsonl").read_bytes() == history
    assert weights.read_bytes() == whole


def test_every_row_counts_once_in_either_mode(cache: Path, tmp_path: Path) -> None:
    """A step too small to change a weight: the loss of the epoch is that of the starting weights over all rows."""
    lines = []
    for name, budget in (("held", ()), ("streamed", STREAMED)):
        result = train_head(
            tmp_path, cache, *budget, "--run-dir", name, "--epochs", 1, "--lr", 1e-12, "--dropout", 0, "--no-amp"
        )
        assert result.status == 0, result.err
        lines.append(json.loads((tmp_path / name / "history.jsonl").read_text()))
    held, streamed = lines
    assert streamed["train_loss"] == pytest.approx(held["train_loss"], rel=1e-5)
    assert streamed["loss"] == pytest.approx(held["loss"], rel=1e-5)
    assert streamed["map_macro"] == pytest.approx(held["map_macro"], abs=1e-5)


# Refused


def assert_refused(result: Finished, *parts: str) -> None:
    assert result.status == 1
    assert "Traceback" not in result.err
    (line,) = result.errors
    for part in parts:
        assert part in line, line


def test_a_budget_that_cannot_work_names_the_least_that_does(cache: Path, tmp_path: Path) -> None:
    assert_refused(
        train_head(tmp_path, cache, "--memory-budget", "10K"),
        "--memory-budget 10K is too small to stream blocks of 256 rows and batches of 64: give at least 64K",
    )
    assert not (tmp_path / "runs").exists()
    assert train_head(tmp_path, cache, "--memory-budget", "64K", "--epochs", 1).status == 0
    result = train_head(tmp_path, cache, "--memory-budget", "lots")
    assert result.status == 2
    assert "lots: bytes above 0, with K, M or G if you like, such as 512M" in result.err


@pytest.mark.parametrize("budget", [(), STREAMED])
def test_a_vector_that_is_not_finite_is_named(own: Path, tmp_path: Path, budget: tuple[object, ...]) -> None:
    version = CacheRoot(str(own)).open_version(read(own / "current")["version"])
    values = version.read_block(3)
    values.pooled["cls"][5, 2] = np.nan
    rewrite_block(str(own), 3, values)
    assert_refused(
        train_head(tmp_path, own, *budget),
        f"array cls of row {3 * 256 + 5} is not finite",
        f"`python -m cache_schema verify {own} --repair` and `make extract`",
    )
    assert not (tmp_path / "runs").exists()


def test_a_cache_of_quarantined_rows_alone_says_so(own: Path, tmp_path: Path) -> None:
    version = CacheRoot(str(own)).open_version(read(own / "current")["version"])
    for block in range(version.layout.blocks):
        values = version.read_block(block)
        values.pooled["cls"][:] = np.nan
        values.status[:] = Status.UNDECODABLE
        rewrite_block(str(own), block, values)
    assert_refused(
        train_head(tmp_path, own),
        f"no row of {own} is embedded: 2,600 are quarantined, 0 missing",
        "make extract ARGS=--retry-quarantined",
    )

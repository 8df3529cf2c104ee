"""A cache, runs and an export that an earlier release made, see README.md: the present code goes on with all of them.

On the machine that made them the figures come out the same to the last digit. Elsewhere float32 sums are taken in
another order, so figures are compared to within 1e-6.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import Status, open_cache
from cache_schema.upkeep.verify import verify_version
from tests.planted import train as run_train
from train.runs.checkpoint import load_checkpoint

RUN_1 = Path(__file__).parent / "run-1"
TOLERANCE = 1e-6
ON_CPU = ("--device", "cpu", "--workers", 0)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A copy that may be written to, with the links to the newest runs."""
    root = Path(shutil.copytree(RUN_1, tmp_path / "work"))
    for name in ("head", "stopped"):
        (root / "runs" / name).symlink_to(f"{name}-001")
    return root


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path: Path) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Header, the columns before the probabilities, and the probabilities."""
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return header, [row[:3] for row in rows], np.array([row[3:] for row in rows], np.float64)


def assert_same_figures(found: Any, expected: Any, where: str = "") -> None:
    """Every key that was there is there, with its value: numbers within the tolerance; what is new is not looked at."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), where
        for key, value in expected.items():
            assert_same_figures(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_same_figures(*pair, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=TOLERANCE), where
    else:
        assert found == expected, where


def test_its_cache_opens_and_is_whole() -> None:
    version = open_cache(str(RUN_1 / "cache"))
    assert version.id == read(RUN_1 / "cache" / "current")["version"]
    assert verify_version(version).lines == ()
    assert (version.read_status() == Status.EMBEDDED).all()


def test_its_checkpoints_are_read() -> None:
    for run, name, epoch in (("head-001", "best", 3), ("head-001", "last", 8), ("stopped-001", "last", 4)):
        loaded = load_checkpoint(RUN_1 / "runs" / run / name)
        assert {key: tensor.shape for key, tensor in loaded.tensors.items()} == {
            "head.0.weight": (16, 16),
            "head.0.bias": (16,),
            "head.3.weight": (5, 16),
            "head.3.bias": (5,),
        }
        assert (loaded.meta.epoch, loaded.meta.hidden, loaded.meta.features) == (epoch, 16, ("cls",))
        assert loaded.meta.class_names == ("Helicopter", "Small Car", "Bus", "Building", "Storage Tank")
        assert (loaded.optimizer is None) == (name == "best")


def test_evaluating_its_run_gives_its_figures(work: Path) -> None:
    finished = run_train(work, "evaluate", "--run-dir", "runs/head", "--cache", "cache", "--json", *ON_CPU[:2])
    assert finished.status == 0, finished.err
    expected = read(RUN_1 / "evaluate.json")
    del expected["notes"]  # sentences for people, which may be worded better
    assert_same_figures(json.loads(finished.out), expected)


def test_its_stopped_run_ends_as_the_run_that_was_not_stopped(work: Path) -> None:
    finished = run_train(work, "head", "--resume", "--run-dir", "runs/stopped")
    assert finished.status == 0, finished.err
    assert "after epoch 4 of 8, step 3 of the next" in finished.out
    whole, resumed = RUN_1 / "runs" / "head-001", work / "runs" / "stopped-001"
    assert_same_figures(read_lines(resumed / "history.jsonl"), read_lines(whole / "history.jsonl"))
    assert_same_figures(read(resumed / "metrics.json"), read(whole / "metrics.json"))
    assert read(resumed / "split.json") == read(whole / "split.json")
    for name in ("best", "last"):
        found, expected = (load_checkpoint(run / name).tensors for run in (resumed, whole))
        for key, tensor in expected.items():
            np.testing.assert_allclose(found[key], tensor, atol=TOLERANCE)


@pytest.mark.parametrize(
    "expected, arguments",
    [
        ("cache.csv", ("--run-dir", "runs/head", "--cache", "cache")),
        ("export.csv", ("--run-dir", "export", "--tiles", "few")),
    ],
)
def test_predictions_have_the_same_probabilities(work: Path, expected: str, arguments: tuple[str, ...]) -> None:
    finished = run_train(work, "predict", *arguments, "--out", "found.csv", *ON_CPU)
    assert finished.status == 0, finished.err
    header, rows, probs = read_csv(work / "found.csv")
    expected_header, expected_rows, expected_probs = read_csv(RUN_1 / expected)
    assert (header, rows) == (expected_header, expected_rows)
    np.testing.assert_allclose(probs, expected_probs, atol=TOLERANCE)

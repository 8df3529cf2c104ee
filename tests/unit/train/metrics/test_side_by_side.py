"""The printed tables against the numbers they show."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planted import fresh_seed
from train.metrics.scores import compute_metrics
from train.metrics.side_by_side import (
    format_estimate,
    format_interval,
    format_per_class,
    format_summary,
    format_table,
    rank_best_and_worst,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def draw(rng: np.random.Generator, rows: int = 203, classes: int = 12) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Float32 probabilities with ties; classes 2 and 7 have no positives, and nobody predicts class 4."""
    labels = rng.random((rows, classes)) < np.linspace(0.05, 0.7, classes)
    labels[:, [2, 7]] = False
    labels[0, [c for c in range(classes) if c not in (2, 7)]] = True
    probs = np.round(np.clip(0.4 * labels + 0.8 * rng.random((rows, classes)), 0.001, 0.999), 2).astype(np.float32)
    probs[:, 4] *= 0.4
    return probs, labels, [f"class {c}" for c in range(classes)]


def test_best_and_worst_are_among_classes_that_have_positives(rng: np.random.Generator) -> None:
    result = compute_metrics(*draw(rng), loss=0.0)
    top, bottom = rank_best_and_worst(result, k=3)
    present = [row["f1"] for row in result["per_class"] if row["support"]]
    assert [row["f1"] for row in top] == sorted(present, reverse=True)[:3]
    assert [row["f1"] for row in bottom] == sorted(present)[:3]
    assert len(rank_best_and_worst(result, k=50)[0]) == 10


def test_equal_f1_is_ordered_by_support_then_name() -> None:
    rows = [{"name": name, "support": support, "f1": 0.5} for name, support in (("b", 3), ("c", 9), ("a", 3))]
    top, bottom = rank_best_and_worst({"per_class": rows}, k=3)
    assert [row["name"] for row in top] == ["c", "a", "b"]
    assert bottom == top[::-1]


def test_summary_shows_every_column_and_both_ends(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    result = compute_metrics(probs, labels, names, loss=0.0)
    fewer = compute_metrics(probs[:, :8], labels[:, :8], names[:8], loss=None)
    text = format_summary(result, {"without four": fewer})
    header, *lines = text.splitlines()
    assert header.split() == ["all", "classes", "without", "four"]
    figures = {line[:22].strip(): line[22:].split() for line in lines}
    assert figures["weighted F1"] == [f"{result['f1_weighted']:.4f}", f"{fewer['f1_weighted']:.4f}"]
    assert figures["loss"] == ["0.0000", "n/a"]
    assert figures["classes n/a"] == ["2", "2"]
    assert figures["classes scored"] == ["10", "6"]
    top, bottom = rank_best_and_worst(result)
    order = [line.split("  ")[0] for line in lines if line.startswith("class ")]
    assert order == [row["name"] for row in top + bottom]
    assert max(map(len, lines)) <= 120
    assert text == text.rstrip()


def test_per_class_table_has_a_line_for_each_class(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    names[5] = "a class with a very long name indeed"
    lines = format_per_class(compute_metrics(probs, labels, names, thresholds=np.full(12, 0.25), loss=0.0)).splitlines()
    assert len(lines) == 13
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["class", "2", "n/a", "n/a", "n/a", "n/a", "0", "0.250"]


def test_a_table_aligns_every_column() -> None:
    rows = [["", "first", "second", "note"], ["a", "1.5", "22.25", "n"], ["long name", "n/a", "3", ""]]
    assert format_table(rows, "<>><") == [
        "           first  second  note",
        "a            1.5   22.25  n",
        "long name    n/a       3",
    ]
    assert format_table(rows)[1:] == ["a          1.5    22.25   n", "long name  n/a    3"]


def test_an_unknown_interval_is_said_to_be_one() -> None:
    assert format_estimate(0.12345, (0.1, 0.2)) == "0.123 [0.100, 0.200]"
    assert format_estimate(-0.5, [-1, 0.25], 2, sign="+") == "-0.50 [-1.00, +0.25]"
    assert format_interval(None) == format_interval((float("nan"), float("nan"))) == "[n/a]"
    assert format_estimate(None, None) == "n/a [n/a]"

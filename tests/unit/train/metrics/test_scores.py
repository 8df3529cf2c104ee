"""Metrics against counts written out here and against scikit-learn called one class at a time."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from train.data.labels import LabelledRows
from train.data.rare import TITLE as RAREST
from train.metrics.decisions import Decisions
from train.metrics.evaluation import DOMINANT_CLASSES, evaluate_rows
from train.metrics.scores import compute_metrics
from train.metrics.side_by_side import format_summary, rank_best_and_worst
from train.model.loss import LossConfig

KEYS = [
    *("loss", "accuracy", "label_accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_weighted"),
    *("recall_weighted", "f1_weighted", "f1_weighted_tuned", "f1_micro", "map_macro", "per_class"),
]
ROW_KEYS = ["name", "support", "precision", "recall", "f1", "ap", "threshold"]
AVERAGES = [key for key in KEYS if "_m" in key or "_w" in key]
TOLERANCE = 1e-6


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs every run; `TEST_SEED=n` repeats one."""
    seed = int(os.environ.get("TEST_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


def draw(rng: np.random.Generator, rows: int = 203, classes: int = 12) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Float32 probabilities with ties; classes 2 and 7 have no positives, and nobody predicts class 4."""
    labels = rng.random((rows, classes)) < np.linspace(0.05, 0.7, classes)
    labels[:, [2, 7]] = False
    labels[0, [c for c in range(classes) if c not in (2, 7)]] = True
    probs = np.round(np.clip(0.4 * labels + 0.8 * rng.random((rows, classes)), 0.001, 0.999), 2).astype(np.float32)
    probs[:, 4] *= 0.4
    return probs, labels, [f"class {c}" for c in range(classes)]


def count(labels: np.ndarray, preds: np.ndarray) -> dict[str, list[float]]:
    """True positives, false positives and false negatives of each class, one row at a time."""
    counts: dict[str, list[float]] = {key: [0.0] * labels.shape[1] for key in ("tp", "fp", "fn")}
    for truth, decision in zip(labels.tolist(), preds.tolist(), strict=True):
        for c, (is_there, is_said) in enumerate(zip(truth, decision, strict=True)):
            if is_there or is_said:
                counts["tp" if is_there and is_said else "fp" if is_said else "fn"][c] += 1
    return counts


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def average_precision(labels: np.ndarray, probs: np.ndarray) -> float:
    """Sum of precision times the rise of recall, at every distinct probability."""
    area, recall = 0.0, 0.0
    for threshold in sorted(set(probs.tolist()), reverse=True):
        kept = probs >= threshold
        rise = labels[kept].sum() / labels.sum()
        area += (rise - recall) * labels[kept].sum() / kept.sum()
        recall = rise
    return float(area)


def test_per_class_equals_counts_written_out(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    result = compute_metrics(probs, labels, names, loss=0.25)
    counts = count(labels, probs >= 0.5)
    assert [row["name"] for row in result["per_class"]] == names
    for c, row in enumerate(result["per_class"]):
        tp, fp, fn = (counts[key][c] for key in ("tp", "fp", "fn"))
        assert row["support"] == tp + fn
        if row["support"] == 0:
            assert [row[key] for key in ("precision", "recall", "f1", "ap")] == [None] * 4
            continue
        assert row["precision"] == pytest.approx(ratio(tp, tp + fp), abs=TOLERANCE)
        assert row["recall"] == pytest.approx(ratio(tp, tp + fn), abs=TOLERANCE)
        assert row["f1"] == pytest.approx(ratio(2 * tp, 2 * tp + fp + fn), abs=TOLERANCE)
        assert row["ap"] == pytest.approx(average_precision(labels[:, c], probs[:, c]), abs=TOLERANCE)


def test_averages_equal_counts_written_out(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    preds = probs >= 0.5
    result = compute_metrics(probs, labels, names, loss=0.25)
    tp, fp, fn = (np.array(count(labels, preds)[key]) for key in ("tp", "fp", "fn"))
    there = tp + fn > 0
    f1 = [ratio(2 * t, 2 * t + p + n) for t, p, n in zip(tp, fp, fn, strict=True)]
    precision = [ratio(t, t + p) for t, p in zip(tp, fp, strict=True)]
    ap = [average_precision(labels[:, c], probs[:, c]) for c in np.flatnonzero(there)]
    expected = {
        "loss": 0.25,
        "accuracy": np.mean([a.tolist() == b.tolist() for a, b in zip(labels, preds, strict=True)]),
        "label_accuracy": 1 - (fp.sum() + fn.sum()) / labels.size,
        "precision_macro": np.mean(np.array(precision)[there]),
        "recall_macro": np.mean((tp / np.maximum(tp + fn, 1))[there]),
        "f1_macro": np.mean(np.array(f1)[there]),
        "precision_weighted": np.dot(precision, tp + fn) / (tp + fn).sum(),
        "recall_weighted": tp.sum() / (tp + fn).sum(),
        "f1_weighted": np.dot(f1, tp + fn) / (tp + fn).sum(),
        "f1_micro": 2 * tp.sum() / (2 * tp.sum() + fp.sum() + fn.sum()),
        "map_macro": np.mean(ap),
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=TOLERANCE)


def test_equals_scikit_learn_one_class_at_a_time(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    tuned = rng.random(labels.shape) < 0.5
    preds = probs >= 0.5
    result = compute_metrics(probs, labels, names, preds_tuned=tuned, loss=0.0)
    there = np.flatnonzero(labels.any(axis=0))
    wide = probs.astype(np.float64)
    for average in ("macro", "weighted"):
        for key, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
            expected = score(labels[:, there], preds[:, there], average=average, zero_division=0)
            assert result[f"{key}_{average}"] == pytest.approx(expected, abs=TOLERANCE)
    assert result["f1_micro"] == pytest.approx(sk.f1_score(labels.ravel(), preds.ravel()), abs=TOLERANCE)
    expected = sk.f1_score(labels, tuned, average="weighted", zero_division=0)
    assert result["f1_weighted_tuned"] == pytest.approx(expected, abs=TOLERANCE)
    expected = sk.average_precision_score(labels[:, there], wide[:, there], average="macro")
    assert result["map_macro"] == pytest.approx(expected, abs=TOLERANCE)
    for c in there:
        row = result["per_class"][c]
        assert row["f1"] == pytest.approx(sk.f1_score(labels[:, c], preds[:, c], zero_division=0), abs=TOLERANCE)
        assert row["ap"] == pytest.approx(sk.average_precision_score(labels[:, c], wide[:, c]), abs=TOLERANCE)


def test_keys_are_those_of_the_file_and_survive_json(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    thresholds = rng.random(12).astype(np.float32)
    result = compute_metrics(
        probs, labels, names, preds_tuned=probs >= 0.3, thresholds=thresholds, loss=np.float32(0.5)
    )
    assert list(result) == KEYS
    assert [list(row) for row in result["per_class"]] == [ROW_KEYS] * 12
    assert [row["threshold"] for row in result["per_class"]] == thresholds.tolist()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_given_preds_replace_the_default_decision(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    result = compute_metrics(probs, labels, names, preds=labels, loss=0.0)
    assert result["accuracy"] == result["f1_weighted"] == result["f1_micro"] == 1.0
    assert result["map_macro"] < 1.0  # still ranked by probs


def test_a_probability_of_one_half_is_a_positive() -> None:
    result = compute_metrics(np.array([[0.5], [0.4]], np.float32), np.array([[True], [False]]), ["only"], loss=0.0)
    assert result["accuracy"] == 1.0


def test_perfect_model_scores_one(rng: np.random.Generator) -> None:
    _, labels, names = draw(rng)
    result = compute_metrics(np.where(labels, 0.9, 0.1), labels, names, preds_tuned=labels, loss=0.0)
    assert [result[key] for key in KEYS[1:-1]] == [1.0] * 11


def test_model_that_predicts_nothing_scores_zero(rng: np.random.Generator) -> None:
    _, labels, names = draw(rng)
    result = compute_metrics(np.full(labels.shape, 0.1), labels, names, loss=0.0)
    f1_figures = [key for key in AVERAGES if key not in {"map_macro", "f1_weighted_tuned"}]
    assert {key: result[key] for key in f1_figures} == dict.fromkeys(f1_figures, 0.0)
    prevalence = labels.mean(axis=0)  # what a constant score is worth as average precision
    assert result["map_macro"] == pytest.approx(prevalence[prevalence > 0].mean(), abs=TOLERANCE)


def test_false_alarms_on_an_absent_class_move_micro_and_label_accuracy_only(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    probs[:, 2] = 0.1
    quiet = compute_metrics(probs, labels, names, loss=0.0)
    probs[:, 2] = 0.9
    noisy = compute_metrics(probs, labels, names, loss=0.0)
    moved = {key for key in KEYS if quiet[key] != noisy[key]}
    assert moved - {"accuracy"} == {"label_accuracy", "f1_micro"}


def test_without_any_positive_the_averages_are_none(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    labels[:] = False
    result = compute_metrics(probs, labels, names, preds_tuned=probs > 2, loss=0.1)
    assert [result[key] for key in AVERAGES] == [None] * len(AVERAGES)
    assert result["label_accuracy"] == pytest.approx(np.mean(probs < 0.5), abs=TOLERANCE)
    assert rank_best_and_worst(result) == ([], [])
    assert ["classes", "n/a", "12"] in [line.split() for line in format_summary(result).splitlines()]


def test_without_rows_everything_but_the_loss_is_none() -> None:
    nothing = np.zeros((0, 3), bool)
    result = compute_metrics(np.zeros((0, 3)), nothing, ["a", "b", "c"], preds_tuned=nothing, loss=0.1)
    assert [result[key] for key in KEYS[1:-1]] == [None] * 11
    assert [row["support"] for row in result["per_class"]] == [0, 0, 0]
    assert format_summary(result)


@pytest.mark.parametrize("rows", [1, 50])
def test_a_single_class_is_scored_like_any_other(rng: np.random.Generator, rows: int) -> None:
    probs = rng.random((rows, 1))
    labels = rng.random((rows, 1)) < 0.5
    labels[0] = True
    result = compute_metrics(probs, labels, ["only"], loss=0.0)
    expected = sk.f1_score(labels[:, 0], probs[:, 0] >= 0.5, zero_division=0)
    for key in ("f1_weighted", "f1_macro", "f1_micro"):
        assert result[key] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_loss_json_cannot_hold_becomes_none(rng: np.random.Generator, loss: float | None) -> None:
    assert compute_metrics(*draw(rng), loss=loss)["loss"] is None


def test_dropped_classes_leave_no_trace(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    names[3], names[9] = DOMINANT_CLASSES
    rows = LabelledRows(
        *(np.arange(len(probs)), np.arange(len(probs)).astype(str), rng.integers(0, 9, len(probs)).astype(str)),
        *(labels, "class", tuple(range(12)), tuple(names), ()),
    )
    logits = torch.from_numpy(probs).logit()
    decisions = Decisions(1.5, rng.random(12).astype(np.float32))
    counted = np.ones(len(probs), bool)
    found = evaluate_rows(logits, rows, counted, loss=LossConfig(), decisions=decisions, rarest=(5, 1))
    variants = {"without Building and Small Car": [c for c in range(12) if c not in (3, 9)], RAREST: [1, 5]}
    assert list(found.variants) == list(variants)
    for title, kept in variants.items():
        assert found.variants[title] == compute_metrics(
            logits.sigmoid().numpy()[:, kept],
            labels[:, kept],
            [names[c] for c in kept],
            preds_tuned=decisions.decide(logits.numpy())[:, kept],
            thresholds=decisions.thresholds[kept],
            loss=None,
        )
    rows = replace(rows, class_names=tuple(f"class {c}" for c in range(12)))
    assert not evaluate_rows(logits, rows, counted, loss=LossConfig(), decisions=decisions).variants


def test_unsound_input_is_refused(rng: np.random.Generator) -> None:
    probs, labels, names = draw(rng)
    with pytest.raises(ValueError, match="one column for each of 11"):
        compute_metrics(probs, labels, names[:-1], loss=0.0)
    with pytest.raises(ValueError, match="labels must be bool"):
        compute_metrics(probs, labels.astype(np.int64), names, loss=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preds_tuned must be bool"):
        compute_metrics(probs, labels, names, preds_tuned=labels[:-1], loss=0.0)
    with pytest.raises(ValueError, match="thresholds"):
        compute_metrics(probs, labels, names, thresholds=np.zeros(11), loss=0.0)
    with pytest.raises(ValueError, match="one column"):
        compute_metrics(probs[:, :0], labels[:, :0], [], loss=0.0)
    probs[3, 3] = np.nan
    with pytest.raises(ValueError, match="hold NaN"):
        compute_metrics(probs, labels, names, loss=0.0)

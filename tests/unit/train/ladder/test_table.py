"""A ladder's paired differences against a computation of their own, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planted import fresh_seed
from train.data.labels import LabelledRows
from train.ladder.rungs import Leg, Record, choose_rungs
from train.ladder.table import COMPARED, Result, conclude, table_to_json, tabulate
from train.metrics.scores import compute_metrics
from train.metrics.side_by_side import PairedDifference

TOLERANCE = 1e-9
RESAMPLES = 1000


def make_rows(labels: np.ndarray, scenes: np.ndarray) -> LabelledRows:
    n, classes = labels.shape
    names = tuple(f"class {c}" for c in range(classes))
    return LabelledRows(
        np.arange(n), np.arange(n).astype(str), scenes, labels, "class", tuple(range(classes)), names, ()
    )


def make_result(name: str, probs: np.ndarray, rows: LabelledRows, seconds: float = 1.0) -> Result:
    rungs = {rung.name: rung for rung in choose_rungs("neighbours,linear,mlp,1,3,6,all", 6)[0]}
    metrics = compute_metrics(probs, rows.labels, rows.class_names, loss=None)
    intervals = {key: [metrics[key] - 0.1, metrics[key] + 0.1] for key in COMPARED}
    record = Record(rungs[name], "finished", None, [Leg(1, 0.0, seconds, 0, 3 << 20)])
    return Result(record, {**metrics, "intervals": intervals}, probs, 0.5, None)


# Figures of rows that are really drawn, one class and one resample at a time.


def average_precision(probs: np.ndarray, labels: np.ndarray) -> float:
    """Rows of equal probability enter together."""
    levels, level_of = np.unique(-probs, return_inverse=True)
    entered = np.bincount(level_of, minlength=len(levels)).cumsum()
    hits = np.bincount(level_of, weights=labels, minlength=len(levels))
    return float((hits * hits.cumsum() / entered).sum() / labels.sum())


def score_drawn(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    support = labels.sum(axis=0)
    preds = probs >= 0.5
    f1 = 2 * (preds & labels).sum(axis=0) / np.maximum(1, preds.sum(axis=0) + support)
    found = [average_precision(probs[:, c], labels[:, c]) for c in np.flatnonzero(support)]
    return {"f1_weighted": float((f1 * support).sum() / support.sum()), "map_macro": float(np.mean(found))}


def test_paired_differences_equal_those_of_rows_really_drawn() -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    labels = rng.random((70, 3)) < [0.6, 0.3, 0.1]
    labels[0] = True
    scenes = np.sort(rng.choice(list("abcdefgh"), 70))
    noise = rng.normal(size=(2, *labels.shape))
    ours, theirs = (1 / (1 + np.exp(-(labels - 0.5 + noise)))).round(2).astype(np.float32)
    gain = PairedDifference.measure(ours, theirs, labels, scenes, seed=seed)
    names = np.unique(scenes)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    differences: dict[str, list[float]] = {"f1_weighted": [], "map_macro": []}
    for times in drawn:
        chosen = np.repeat(np.arange(70), times[np.searchsorted(names, scenes)])
        if labels[chosen].any():
            own, other = (score_drawn(probs[chosen], labels[chosen]) for probs in (ours, theirs))
            for key, values in differences.items():
                values.append(own[key] - other[key])
    whole = [score_drawn(probs, labels) for probs in (ours, theirs)]
    for key, values in differences.items():
        assert gain.difference[key] == pytest.approx(whole[0][key] - whole[1][key], abs=TOLERANCE)
        assert gain.interval[key] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=TOLERANCE)


def test_a_single_scene_gives_a_difference_without_an_interval() -> None:
    labels = np.array([[True], [False], [True]])
    rows = make_rows(labels, np.array(["a", "a", "a"]))
    better, worse = np.array([[0.9], [0.1], [0.8]], np.float32), np.array([[0.9], [0.85], [0.8]], np.float32)
    results = [make_result("mlp", worse, rows), make_result("unfreeze-1", better, rows)]
    gains = {"unfreeze-1": PairedDifference.measure(better, worse, labels, rows.scenes)}
    assert "UNFREEZE=1: +0.167 mAP over the MLP head for 1.0x the time, without an interval" in conclude(
        results, results[0], gains
    )
    written = table_to_json(results, gains)[1]["over_reference"]
    assert written["intervals"] == {"f1_weighted": None, "map_macro": None}
    assert "+0.167 [n/a]" in tabulate(results, results[0], gains)[2]


# What is said of the differences.

ROWS = make_rows(np.array([[True], [False]]), np.array(["a", "b"]))
PROBS = np.array([[0.6], [0.4]], np.float32)


def say(rungs: dict[str, tuple[float, float, float, float]]) -> str:
    """The sentence on rungs of these seconds, differences in mAP, and intervals; the reference is the MLP, or the
    first."""
    results = [make_result(name, PROBS, ROWS, seconds) for name, (seconds, *_) in rungs.items()]
    for result, (_, difference, _, _) in zip(results, rungs.values(), strict=True):
        result.metrics["map_macro"] = 0.5 + difference
    reference = next((result for result in results if result.record.rung.name == "mlp"), results[0])
    gains = {
        name: PairedDifference({"map_macro": difference}, {"map_macro": (low, high)})
        for name, (_, difference, low, high) in rungs.items()
        if name != reference.record.rung.name
    }
    return conclude(results, reference, gains)


MLP = (10.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "rungs, sentence",
    [
        (
            {"linear": (9, 0.3, 0.2, 0.4), "mlp": MLP, "unfreeze-3": (140, 0.021, 0.004, 0.038)},
            "UNFREEZE=3 gains 0.021 mAP [+0.004, +0.038] over the MLP head for 14x the time",
        ),
        (
            {"mlp": MLP, "unfreeze-3": (25, 0.021, -0.004, 0.038)},
            "UNFREEZE=3 shows no gain: +0.021 mAP [-0.004, +0.038] over the MLP head for 2.5x the time, and the "
            "interval holds 0",
        ),
        (
            {"mlp": MLP, "unfreeze-3": (25, 0.021, 0.0, 0.038)},
            "UNFREEZE=3 shows no gain: +0.021 mAP [+0.000, +0.038] over the MLP head for 2.5x the time, and the "
            "interval holds 0",
        ),
        (
            {"mlp": MLP, "unfreeze-1": (25, -0.03, -0.04, -0.02)},
            "UNFREEZE=1 loses 0.030 mAP [-0.040, -0.020] over the MLP head for 2.5x the time",
        ),
        (
            {"mlp": MLP, "unfreeze-1": (50, 0.02, 0.01, 0.03), "unfreeze-3": (140, 0.021, 0.004, 0.038)},
            "UNFREEZE=3 gains 0.021 mAP [+0.004, +0.038] over the MLP head for 14x the time; it is the best of 2 on "
            "these same tiles, which flatters it; UNFREEZE=1 gains 0.020 mAP [+0.010, +0.030] over the MLP head for "
            "5.0x the time",
        ),
        (
            {"linear": (8, 0.3, 0.2, 0.4), "mlp": MLP},
            "linear head gains 0.300 mAP [+0.200, +0.400] over the MLP head for 0.8x the time",
        ),
        (
            {"neighbours": (2, 0, 0, 0), "linear": (8, 0.3, 0.2, 0.4)},
            "linear head gains 0.300 mAP [+0.200, +0.400] over the nearest neighbours for 4.0x the time",
        ),
        ({"linear": (8, 0.3, 0.2, 0.4)}, "linear head is the only rung: there is nothing to compare it with"),
    ],
)
def test_the_sentence_claims_no_more_than_the_interval_does(
    rungs: dict[str, tuple[float, float, float, float]], sentence: str
) -> None:
    assert say(rungs) == sentence

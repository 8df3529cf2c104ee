"""Compute the multi-label metrics of a set of tiles: the dictionary of metrics.json.

A class with no positives has no recall and no average precision: its figures are None ("n/a"), never 0 or 1, and macro
averages and mAP leave it out. False alarms on such a class still count in micro averages, subset accuracy and label
accuracy, which take in every class.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.metrics import average_precision_score

from cache_schema.layout import BoolArray

from .figures import DECISION_THRESHOLD

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
Float64Array = npt.NDArray[np.float64]

Metrics = dict[str, Any]


def compute_f1(hits: Array, predicted: Array, support: Array) -> Float64Array:
    """Compute F1 from counts: 2 hits / (predicted + support), 0 where nothing is predicted or present.

    Args:
        hits, predicted, support: true positives, predicted rows and positive rows; shapes that broadcast to `hits`.
    """
    return divide(2 * hits, predicted + support)


def average_classes(values: Array, weights: Array, *, empty: float = math.nan) -> Float64Array:
    """Average (…, C) values over the classes with (…, C) weights; `empty` where all weights are 0.

    The support as weights gives a weighted average, `support > 0` a macro average.
    """
    return divide((values * weights).sum(axis=-1), weights.sum(axis=-1), empty=empty)


def divide(numerator: Array, denominator: Array, *, empty: float = 0.0) -> Float64Array:
    """Divide element by element; `empty` where the denominator is 0."""
    quotient = np.full(np.shape(numerator), empty)
    np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator) > 0)
    return quotient


def compute_metrics(
    probs: FloatArray,
    labels: BoolArray,
    class_names: Sequence[str],
    *,
    preds: BoolArray | None = None,
    preds_tuned: BoolArray | None = None,
    thresholds: FloatArray | None = None,
    loss: float | None,
) -> Metrics:
    """Compute every figure of metrics.json as Python floats, ints and None.

    The definitions are scikit-learn's, with `zero_division=0` where a class has positives but none was predicted.
    `accuracy` is subset accuracy (all classes of a tile right), `label_accuracy` one minus the Hamming loss.

    Args:
        probs: (N, C) floating, after the sigmoid; ranks the tiles for average precision.
        labels: (N, C) bool, the truth.
        class_names: C names, in column order.
        preds: (N, C) bool decisions; by default `probs >= 0.5`.
        preds_tuned: (N, C) bool decisions with tuned thresholds, for `f1_weighted_tuned`; None leaves it None.
        thresholds: (C,) the tuned thresholds, copied into `per_class`; None leaves them None.
        loss: mean loss of the same tiles, or None. A loss that is not finite becomes None: JSON has no NaN.

    Returns:
        The averages and `per_class`, a list of C dictionaries. A class without positives has None for precision,
        recall, f1 and ap. With no positive in any class (so also with N = 0) every average is None; `accuracy` and
        `label_accuracy` are None only when N = 0.

    Raises:
        ValueError: shapes disagree, there is no class, or a probability is NaN.
    """
    preds = probs >= DECISION_THRESHOLD if preds is None else preds
    shape = probs.shape
    if len(shape) != 2 or shape[1] == 0 or shape[1] != len(class_names):
        raise ValueError(f"probs {shape} must be (N, C) with one column for each of {len(class_names)} classes")
    check_flags(shape, labels=labels, preds=preds, preds_tuned=preds_tuned)
    if thresholds is not None and thresholds.shape != (shape[1],):
        raise ValueError(f"thresholds {thresholds.shape} must be ({shape[1]},)")
    if np.isnan(probs).any():
        raise ValueError("probabilities hold NaN: training diverged, or rows without an embedding were not left out")
    support = labels.sum(axis=0)
    hits, predicted = (labels & preds).sum(axis=0), preds.sum(axis=0)
    of_class = {
        "precision": divide(hits, predicted),
        "recall": divide(hits, support),
        "f1": compute_f1(hits, predicted, support),
        "ap": _average_precisions(probs, labels),
    }
    rows = [
        {
            "name": str(name),
            "support": int(support[c]),
            **{key: float(values[c]) if support[c] else None for key, values in of_class.items()},
            "threshold": None if thresholds is None else float(thresholds[c]),
        }
        for c, name in enumerate(class_names)
    ]
    f1_tuned = None
    if preds_tuned is not None:
        f1_tuned = compute_f1((labels & preds_tuned).sum(axis=0), preds_tuned.sum(axis=0), support)
    return {
        "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
        "accuracy": float((labels == preds).all(axis=1).mean()) if len(labels) else None,
        "label_accuracy": 1.0 - np.count_nonzero(labels != preds) / labels.size if len(labels) else None,
        "precision_macro": _average(of_class["precision"], support > 0),
        "recall_macro": _average(of_class["recall"], support > 0),
        "f1_macro": _average(of_class["f1"], support > 0),
        "precision_weighted": _average(of_class["precision"], support),
        "recall_weighted": _average(of_class["recall"], support),
        "f1_weighted": _average(of_class["f1"], support),
        "f1_weighted_tuned": None if f1_tuned is None else _average(f1_tuned, support),
        "f1_micro": float(compute_f1(hits.sum(), predicted.sum(), support.sum())) if support.any() else None,
        "map_macro": _average(of_class["ap"], support > 0),
        "per_class": rows,
    }


def check_flags(shape: tuple[int, ...], **arrays: Array | None) -> None:
    """Raise ValueError, with the name of the array, unless each array is bool and of this shape.

    Integers would be summed by value, and scikit-learn would read them as multi-class.
    """
    for name, array in arrays.items():
        if array is not None and (array.shape != shape or array.dtype != np.bool_):
            raise ValueError(f"{name} must be bool {shape}: got {array.dtype} {array.shape}")


def _average_precisions(probs: FloatArray, labels: BoolArray) -> Float64Array:
    """Compute the (C,) average precision of each class; 0 for a class without positives."""
    ap = np.zeros(labels.shape[1])
    if (present := labels.any(axis=0)).any():
        # In float64, because scikit-learn counts in the dtype of the scores. All classes at once, and without the
        # checks that `compute_metrics` has already made: they would take half of an epoch's time.
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            ap[present] = average_precision_score(
                labels[:, present], probs[:, present].astype(np.float64), average=None
            )
    return ap


def _average(values: Float64Array, weights: Array) -> float | None:
    return float(average_classes(values, weights)) if weights.any() else None


def average_rarest(metrics: Metrics, rarest: Iterable[int]) -> dict[str, float | None]:
    """Average F1 and AP over the columns `rarest` for a history line; None if none of them has a positive."""
    rows = [metrics["per_class"][column] for column in rarest]
    return {"f1_macro_rarest": _average_shown(rows, "f1"), "map_macro_rarest": _average_shown(rows, "ap")}


def _average_shown(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return float(np.mean(values)) if values else None

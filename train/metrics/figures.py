"""Multi-label metrics of a set of tiles, as the dictionary of `metrics.json` and as text.

A class with no positives has no recall and no average precision: its figures are None ("n/a"), never 0 or 1, and it
takes no part in macro averages or mAP. Whether a model gives false alarms on such a class still shows: micro averages,
subset accuracy and label accuracy count every class.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.metrics import accuracy_score, average_precision_score, hamming_loss, precision_recall_fscore_support

from cache_schema.layout import BoolArray

FloatArray = npt.NDArray[np.floating[Any]]

Metrics = dict[str, Any]

DECISION_THRESHOLD = 0.5

DOMINANT_CLASSES = ("Building", "Small Car")
"""Present in nearly every xView tile, so they outweigh the rest in a weighted mean."""

_FIGURES = (
    ("loss", "loss"),
    ("subset accuracy", "accuracy"),
    ("label accuracy", "label_accuracy"),
    ("mAP", "map_macro"),
    ("F1 weighted", "f1_weighted"),
    ("F1 weighted, tuned", "f1_weighted_tuned"),
    ("F1 macro", "f1_macro"),
    ("F1 micro", "f1_micro"),
    ("precision weighted", "precision_weighted"),
    ("precision macro", "precision_macro"),
    ("recall weighted", "recall_weighted"),
    ("recall macro", "recall_macro"),
)

_CLASS_HEADER = f"{'F1':>7}{'AP':>8}{'precision':>11}{'recall':>8}{'support':>9}{'threshold':>11}"


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
    """Every figure of `metrics.json`, of Python floats, ints and None only.

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
    _check(probs, labels, class_names, preds, preds_tuned, thresholds)
    support = labels.sum(axis=0)
    per_class = _score_classes(probs, labels, preds)
    rows = [
        {
            "name": str(name),
            "support": int(support[c]),
            **{
                key: None if support[c] == 0 else float(per_class[key][c])
                for key in ("precision", "recall", "f1", "ap")
            },
            "threshold": None if thresholds is None else float(thresholds[c]),
        }
        for c, name in enumerate(class_names)
    ]
    return {
        "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
        "accuracy": float(accuracy_score(labels, preds)) if len(labels) else None,
        "label_accuracy": 1.0 - float(hamming_loss(labels, preds)) if len(labels) else None,
        "precision_macro": _average(per_class["precision"], support > 0),
        "recall_macro": _average(per_class["recall"], support > 0),
        "f1_macro": _average(per_class["f1"], support > 0),
        "precision_weighted": _average(per_class["precision"], support),
        "recall_weighted": _average(per_class["recall"], support),
        "f1_weighted": _average(per_class["f1"], support),
        "f1_weighted_tuned": None if preds_tuned is None else _average(_score(labels, preds_tuned)[2], support),
        "f1_micro": float(_score(labels, preds, average="micro")[2]) if support.any() else None,
        "map_macro": _average(per_class["ap"], support > 0),
        "per_class": rows,
    }


def compute_metrics_without(
    dropped: Collection[str],
    probs: FloatArray,
    labels: BoolArray,
    class_names: Sequence[str],
    *,
    preds: BoolArray | None = None,
    preds_tuned: BoolArray | None = None,
    thresholds: FloatArray | None = None,
    loss: float | None = None,
) -> Metrics:
    """`compute_metrics` as if the `dropped` classes did not exist: the same arrays, less their columns.

    `loss` has to be that of the classes kept; None when it is not known. Names that are no class here are ignored, so
    that `DOMINANT_CLASSES` can be given with any taxonomy.
    """
    kept = without_classes(class_names, dropped)
    return compute_metrics(
        probs[:, kept],
        labels[:, kept],
        [class_names[c] for c in kept],
        preds=None if preds is None else preds[:, kept],
        preds_tuned=None if preds_tuned is None else preds_tuned[:, kept],
        thresholds=None if thresholds is None else thresholds[kept],
        loss=loss,
    )


def without_classes(class_names: Sequence[str], dropped: Collection[str]) -> npt.NDArray[np.intp]:
    """Columns, ascending, of the classes that are not in `dropped`: (C - dropped,) integers."""
    return np.array([c for c, name in enumerate(class_names) if name not in dropped], dtype=np.intp)


def top_and_bottom(metrics: Mapping[str, Any], k: int = 5) -> tuple[list[Metrics], list[Metrics]]:
    """The `k` entries of `per_class` with the best F1, best first, and the `k` with the worst, worst first.

    Only classes with positives; equal F1 is ordered by support, then by name. Fewer than `2 k` such classes make the
    two lists overlap.
    """
    present = [row for row in metrics["per_class"] if row["support"] > 0]
    ranked = sorted(present, key=lambda row: (-row["f1"], -row["support"], row["name"]))
    return ranked[:k], ranked[::-1][:k]


def format_summary(
    metrics: Mapping[str, Any],
    *,
    title: str = "all classes",
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    k: int = 5,
) -> str:
    """The averages side by side, one column for `metrics` and each of `variants` (by its title), then the extremes.

    The top and bottom `k` classes are those of `metrics`. Ends without a newline.
    """
    columns = {title: metrics, **(variants or {})}
    widths = [max(len(name), 8) + 3 for name in columns]
    lines = [" " * 22 + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for label, key in _FIGURES:
        cells = [f"{_figure(column[key], 4):>{width}}" for column, width in zip(columns.values(), widths, strict=True)]
        lines.append(f"{label:<22}" + "".join(cells))
    present = [sum(row["support"] > 0 for row in column["per_class"]) for column in columns.values()]
    absent = [len(column["per_class"]) - count for column, count in zip(columns.values(), present, strict=True)]
    for label, counts in (("classes scored", present), ("classes n/a", absent)):
        lines.append(f"{label:<22}" + "".join(f"{count:>{width}}" for count, width in zip(counts, widths, strict=True)))
    for label, rows in zip(("top", "bottom"), top_and_bottom(metrics, k), strict=True):
        lines += ["", *_format_rows(f"{label} {len(rows)} by F1", rows)] if rows else []
    if absent[0]:
        lines += [
            "",
            "n/a: no positives in this set, so left out of macro averages and mAP (weight 0 in weighted ones)",
        ]
    return "\n".join(lines)


def format_per_class(metrics: Mapping[str, Any]) -> str:
    """One line a class, in column order, "n/a" where it has no positives. Ends without a newline."""
    return "\n".join(_format_rows("class", metrics["per_class"]))


def _format_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max([len(title), 22, *(len(row["name"]) for row in rows)])
    lines = [f"{title:<{width}}{_CLASS_HEADER}"]
    for row in rows:
        f1, ap, precision, recall = (_figure(row[key], 3) for key in ("f1", "ap", "precision", "recall"))
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.3f}"
        lines.append(
            f"{row['name']:<{width}}{f1:>7}{ap:>8}{precision:>11}{recall:>8}{row['support']:>9}{threshold:>11}"
        )
    return lines


def _figure(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _check(
    probs: FloatArray,
    labels: BoolArray,
    class_names: Sequence[str],
    preds: BoolArray,
    preds_tuned: BoolArray | None,
    thresholds: FloatArray | None,
) -> None:
    shape = probs.shape
    if len(shape) != 2 or shape[1] == 0 or shape[1] != len(class_names):
        raise ValueError(f"probs {shape} must be (N, C) with one column for each of {len(class_names)} classes")
    for name, array in (("labels", labels), ("preds", preds), ("preds_tuned", preds_tuned)):
        # An integer array would be counted by value and read as multi-class by scikit-learn.
        if array is not None and (array.shape != shape or array.dtype != np.bool_):
            raise ValueError(f"{name} must be bool {shape}: got {array.dtype} {array.shape}")
    if thresholds is not None and thresholds.shape != (shape[1],):
        raise ValueError(f"thresholds {thresholds.shape} must be ({shape[1]},)")
    if np.isnan(probs).any():
        raise ValueError("probabilities hold NaN: training diverged, or rows without an embedding were not left out")


def _score(labels: BoolArray, preds: BoolArray, average: str | None = None) -> tuple[Any, Any, Any, Any]:
    """scikit-learn's (precision, recall, f1, support); per class when `average` is None, zeros without rows."""
    if len(labels) == 0:  # which scikit-learn refuses
        return (np.zeros(labels.shape[1]),) * 4
    # A single column is binary to scikit-learn, which would then score the negatives as a class of their own.
    columns = [1] if labels.shape[1] == 1 else range(labels.shape[1])
    scores: tuple[Any, Any, Any, Any] = precision_recall_fscore_support(
        labels, preds, labels=columns, average=average, zero_division=0
    )
    return scores


def _score_classes(probs: FloatArray, labels: BoolArray, preds: BoolArray) -> dict[str, npt.NDArray[np.float64]]:
    """(C,) float64 precision, recall, f1 and ap; entries of classes without positives mean nothing."""
    precision, recall, f1, _ = _score(labels, preds)
    ap = np.zeros(labels.shape[1])
    if (present := labels.any(axis=0)).any():
        # In float64, because scikit-learn counts in the dtype of the scores. All classes at once, and without checks
        # that `_check` has made: it is half of an epoch's time otherwise.
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            ap[present] = average_precision_score(
                labels[:, present], probs[:, present].astype(np.float64), average=None
            )
    return {"precision": precision, "recall": recall, "f1": f1, "ap": ap}


def _average(values: npt.NDArray[np.float64], weights: npt.NDArray[Any]) -> float | None:
    return float(np.average(values, weights=weights)) if weights.any() else None


def average_rarest(metrics: Metrics, rarest: Iterable[int]) -> dict[str, float | None]:
    """Macro F1 and mAP of the columns `rarest`, for a line of the history; None where none has a positive."""
    rows = [metrics["per_class"][column] for column in rarest]
    return {"f1_macro_rarest": _average_shown(rows, "f1"), "map_macro_rarest": _average_shown(rows, "ap")}


def _average_shown(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return float(np.mean(values)) if values else None

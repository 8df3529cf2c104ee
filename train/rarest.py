"""The end of the long tail: the ten classes with the fewest training tiles, and how a model does on them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.layout import BoolArray

from .metrics import Metrics

TITLE = "rarest in training"
COUNT = 10


def find_rarest(train_labels: BoolArray, val_labels: BoolArray, count: int = COUNT) -> npt.NDArray[np.intp]:
    """Columns of the `count` rarest classes of a split, rarest first; equal ones in column order.

    Only classes that both sides show: without a training tile nothing was learned, without a validation tile nothing
    can be measured. They depend on the split alone, so runs on one split are compared on the same classes.

    Args:
        train_labels: (n, C) bool.
        val_labels: (m, C) bool, the rows that are scored.
    """
    support = train_labels.sum(axis=0)
    shown = np.flatnonzero((support > 0) & val_labels.any(axis=0))
    return np.asarray(shown[np.argsort(support[shown], kind="stable")][:count])


def average_rarest(metrics: Metrics, rarest: Iterable[int]) -> dict[str, float | None]:
    """Macro F1 and mAP of the columns `rarest`, for a line of the history; None where none has a positive."""
    rows = [metrics["per_class"][column] for column in rarest]
    return {"f1_macro_rarest": _average(rows, "f1"), "map_macro_rarest": _average(rows, "ap")}


def describe_rarest(train_labels: BoolArray, rarest: Iterable[int], names: Sequence[str]) -> str:
    """A line for the user: which classes they are, and how many tiles train each."""
    return f"{TITLE}: " + (", ".join(f"{names[c]} {train_labels[:, c].sum():,}" for c in rarest) or "no class to score")


def _average(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return float(np.mean(values)) if values else None

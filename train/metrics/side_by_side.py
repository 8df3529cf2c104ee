"""Print figures side by side: tables, intervals, and the paired difference of two models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy.typing as npt

from cache_schema.layout import BoolArray

from .figures import AVERAGES, FIGURES, OF_A_CLASS, format_value
from .intervals import Interval, bootstrap_difference
from .scores import FloatArray, Metrics, compute_metrics


def format_table(rows: Sequence[Sequence[str]], aligned: str = "<") -> list[str]:
    """Align rows of cells to columns two spaces apart, a line a row.

    Args:
        rows: the header first; all of the same length.
        aligned: `<` for left or `>` for right, a character a column; the last one applies to all further columns.
    """
    columns = list(zip(*rows, strict=True))
    sides = aligned.ljust(len(columns), aligned[-1])
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)).rstrip()
        for row in rows
    ]


def format_interval(interval: Sequence[float] | None, digits: int = 3, *, sign: str = "") -> str:
    """Format an interval as `[low, high]`; `[n/a]` if it is None or NaN."""
    if interval is None or math.isnan(interval[0]):
        return "[n/a]"
    low, high = (format_value(value, digits, sign=sign) for value in interval)
    return f"[{low}, {high}]"


def format_estimate(value: float | None, interval: Sequence[float] | None, digits: int = 3, *, sign: str = "") -> str:
    """Format a value followed by its interval."""
    return f"{format_value(value, digits, sign=sign)} {format_interval(interval, digits, sign=sign)}"


@dataclass(frozen=True)
class PairedDifference:
    """A model minus a reference.

    Attributes:
        difference: by key of a figure.
        interval: by key, the 95 % interval over scenes, both models scored on the same resampled scenes.
    """

    difference: Mapping[str, float]
    interval: Mapping[str, Interval]

    @classmethod
    def measure(
        cls,
        probs: FloatArray,
        reference: FloatArray,
        labels: BoolArray,
        scenes: npt.NDArray[Any],
        *,
        seed: int = 0,
    ) -> Self:
        """Compare two models on the same rows.

        Args:
            probs, reference: (n, C) probabilities of the model and of the reference.
            labels: (n, C) bool, with at least one positive.
            scenes: (n,) the scene of each row.
            seed: of the resampling.
        """
        interval = bootstrap_difference(probs, reference, labels, scenes, seed=seed)
        names = [str(column) for column in range(labels.shape[1])]
        after, before = (compute_metrics(each, labels, names, loss=None) for each in (probs, reference))
        return cls({key: after[key] - before[key] for key in interval}, interval)

    def format(self, key: str) -> str:
        """Format one figure's difference and interval, with signs."""
        return format_estimate(self.difference[key], self.interval[key], sign="+")

    def describe(self) -> str:
        """Return every figure's title, difference and interval on one line."""
        return ", ".join(f"{FIGURES[key].title} {self.format(key)}" for key in self.difference)


def rank_best_and_worst(metrics: Mapping[str, Any], k: int = 5) -> tuple[list[Metrics], list[Metrics]]:
    """Return the `k` entries of `per_class` with the best F1, best first, and the `k` with the worst, worst first.

    Classes without positives are left out; equal F1 is ordered by support, then by name. With fewer than `2 k` classes
    the two lists overlap.
    """
    present = [row for row in metrics["per_class"] if row["support"] > 0]
    ranked = sorted(present, key=lambda row: (-row["f1"], -row["support"], row["name"]))
    return ranked[:k], ranked[::-1][:k]


def format_summary(metrics: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Format the averages of `metrics` and of each variant, by its title, side by side.

    The best and worst classes of `metrics` follow.
    """
    columns = {"all classes": metrics, **(variants or {})}
    rows = [["", *columns]]
    for key in AVERAGES:
        figure = FIGURES[key]
        rows.append([figure.title, *(figure.format(column[key]) for column in columns.values())])
    present = [sum(row["support"] > 0 for row in column["per_class"]) for column in columns.values()]
    absent = [len(column["per_class"]) - count for column, count in zip(columns.values(), present, strict=True)]
    rows += [["classes scored", *map(str, present)], ["classes n/a", *map(str, absent)]]
    lines = format_table(rows, "<>")
    for name, classes in zip(("top", "bottom"), rank_best_and_worst(metrics), strict=True):
        if classes:
            lines += ["", *_tabulate_classes(f"{name} {len(classes)} by {FIGURES['f1'].title}", classes)]
    if absent[0]:
        lines += [
            "",
            f"n/a: no positives in this set, so left out of macro averages and {FIGURES['map_macro'].title} (weight 0 "
            "in weighted ones)",
        ]
    return "\n".join(lines)


def format_per_class(metrics: Mapping[str, Any]) -> str:
    """Format a line a class, in column order; "n/a" where a class has no positives."""
    return "\n".join(_tabulate_classes("class", metrics["per_class"]))


def _tabulate_classes(title: str, classes: Sequence[Mapping[str, Any]]) -> list[str]:
    figures = [FIGURES[key] for key in OF_A_CLASS]
    rows = [[row["name"], *(figure.format(row[figure.key]) for figure in figures)] for row in classes]
    return format_table([[title, *(figure.title for figure in figures)], *rows], "<>")

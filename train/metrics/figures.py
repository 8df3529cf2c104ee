"""The registry of figures: the title and format of every number of metrics.json and history.jsonl that a person reads.

Whatever prints or plots a figure takes its title from here, so that a figure has one name everywhere.
"""

import math
from dataclasses import dataclass
from typing import Literal

DECISION_THRESHOLD = 0.5
"""Probability from which a class counts as predicted when no threshold was tuned."""

KEY_FIGURES = ("f1_weighted", "f1_macro", "map_macro")
"""The figures that have intervals, and by which runs, folds and configurations are compared."""

COMPARED = ("f1_weighted", "f1_weighted_tuned", "f1_macro", "f1_micro", "map_macro")
"""The figures that compare a model with its baselines."""

AVERAGES = (
    "loss",
    "accuracy",
    "label_accuracy",
    "map_macro",
    *("f1_weighted", "f1_weighted_tuned", "f1_macro", "f1_micro"),
    *("precision_weighted", "precision_macro", "recall_weighted", "recall_macro"),
)
"""The figures of a whole set of tiles, in the order of the summary."""

OF_A_CLASS = ("f1", "ap", "precision", "recall", "support", "threshold")
"""The figures of one class, in the order of the summary."""


def format_value(value: float | None, digits: int = 3, *, sign: str = "") -> str:
    """Format a number with `digits` decimals, "n/a" for None and NaN; `sign` "+" signs positive numbers too."""
    return "n/a" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


@dataclass(frozen=True)
class Figure:
    """What a figure is called and how it is shown.

    Attributes:
        key: its key in metrics.json, `per_class` or history.jsonl.
        title: what a person reads.
        digits: decimals, where a table has no reason to show fewer.
        higher_is_better: False for losses and calibration errors.
        threshold: the threshold of the decisions that it scores; None if it scores no decisions.
    """

    key: str
    title: str
    digits: int = 4
    higher_is_better: bool = True
    threshold: Literal["0.5", "tuned"] | None = None

    def format(self, value: float | None, digits: int | None = None) -> str:
        """Format a value with this figure's decimals, or with `digits`."""
        return format_value(value, self.digits if digits is None else digits)

    def describe(self, value: float | None, digits: int | None = None) -> str:
        """Return the title followed by the value."""
        return f"{self.title} {self.format(value, digits)}"

    def describe_threshold(self) -> str:
        """Say in words at which threshold the figure was taken; empty if at none."""
        return {None: "", "0.5": "at threshold 0.5", "tuned": "at tuned thresholds"}[self.threshold]


FIGURES = {
    figure.key: figure
    for figure in (
        Figure("train_loss", "training loss", higher_is_better=False),
        Figure("loss", "loss", higher_is_better=False),
        Figure("accuracy", "subset accuracy", threshold="0.5"),
        Figure("label_accuracy", "label accuracy", threshold="0.5"),
        Figure("map_macro", "mAP"),
        Figure("f1_weighted", "weighted F1", threshold="0.5"),
        Figure("f1_weighted_tuned", "weighted F1, tuned", threshold="tuned"),
        Figure("f1_macro", "macro F1", threshold="0.5"),
        Figure("f1_micro", "micro F1", threshold="0.5"),
        Figure("precision_weighted", "weighted precision", threshold="0.5"),
        Figure("precision_macro", "macro precision", threshold="0.5"),
        Figure("recall_weighted", "weighted recall", threshold="0.5"),
        Figure("recall_macro", "macro recall", threshold="0.5"),
        Figure("f1_macro_rarest", "macro F1, rarest classes", threshold="0.5"),
        Figure("map_macro_rarest", "mAP, rarest classes"),
        Figure("f1", "F1", 3, threshold="0.5"),
        Figure("ap", "AP", 3),
        Figure("precision", "precision", 3, threshold="0.5"),
        Figure("recall", "recall", 3, threshold="0.5"),
        Figure("support", "support", 0),
        Figure("threshold", "threshold", 3),
        Figure("temperature", "temperature", 3),
        Figure("ece", "expected calibration error", higher_is_better=False),  # of `ece_before` and `ece_after`
    )
}
"""Every figure by its key."""

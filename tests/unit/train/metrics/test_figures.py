"""Every key of a run's files that a person reads has one title."""

from __future__ import annotations

import numpy as np

from train.metrics import figures
from train.metrics.figures import FIGURES, format_value
from train.metrics.scores import average_rarest, compute_metrics


def test_every_key_of_metrics_json_and_the_history_is_registered() -> None:
    labels = np.eye(3, dtype=bool)
    metrics = compute_metrics(labels.astype(np.float32), labels, ["a", "b", "c"], loss=0.5)
    history = {**metrics, **average_rarest(metrics, [0])}
    assert set(history) - {"per_class"} <= set(FIGURES)
    assert set(metrics["per_class"][0]) - {"name"} == set(figures.OF_A_CLASS)
    for keys in (figures.KEY_FIGURES, figures.COMPARED, figures.AVERAGES):
        assert set(keys) <= set(metrics)


def test_titles_are_unique_and_name_their_threshold() -> None:
    assert len({figure.title for figure in FIGURES.values()}) == len(FIGURES)
    for key, figure in FIGURES.items():
        assert figure.key == key
        assert ("tuned" in figure.title) == (figure.threshold == "tuned") == ("tuned" in figure.describe_threshold())


def test_a_missing_value_is_not_a_number() -> None:
    assert format_value(None) == format_value(float("nan")) == "n/a"
    assert format_value(0.25, sign="+") == "+0.250"
    assert FIGURES["f1_weighted"].describe(0.12345) == "weighted F1 0.1235"
    assert FIGURES["f1_weighted"].describe(0.12345, digits=2) == "weighted F1 0.12"
    assert FIGURES["support"].format(7) == "7"

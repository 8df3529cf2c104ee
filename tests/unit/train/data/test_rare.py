"""Which classes are the rarest, and their averages."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.rare import describe_rarest, find_rarest
from train.metrics.scores import average_rarest


def make_labels(support: list[int]) -> np.ndarray:
    return np.arange(50)[:, None] < np.array(support)


def test_the_rarest_are_those_both_sides_show_by_training_tiles() -> None:
    train, val = make_labels([40, 3, 0, 7, 3, 1, 9]), make_labels([1, 9, 4, 2, 5, 0, 6])
    assert find_rarest(train, val).tolist() == [1, 4, 3, 6, 0]
    assert find_rarest(train, val, 2).tolist() == [1, 4]
    assert find_rarest(train, val & False).tolist() == []
    assert len(find_rarest(make_labels([5] * 14), make_labels([5] * 14))) == 10
    assert describe_rarest(train, [1, 4], "abcdefg") == "rarest in training: b 3, e 3"


def test_averages_pass_over_classes_without_positives() -> None:
    per_class = [{"f1": 0.9, "ap": 0.8}, {"f1": None, "ap": None}, {"f1": 0.1, "ap": 0.3}, {"f1": 0.3, "ap": 0.2}]
    averages = average_rarest({"per_class": per_class}, [3, 1, 2])
    assert averages == {"f1_macro_rarest": pytest.approx(0.2), "map_macro_rarest": pytest.approx(0.25)}
    assert average_rarest({"per_class": per_class}, [1]) == {"f1_macro_rarest": None, "map_macro_rarest": None}

"""The rarest classes, class weights and repeat factors, against the formulas they follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.planted import fresh_seed
from tests.unit.train.data.test_batches import NAMES, draw_labels
from train.config import ClassWeights
from train.data.rare import (
    BETA,
    MAX_WEIGHT,
    compute_class_weights,
    compute_repeat_factors,
    describe_rarest,
    describe_repeats,
    describe_weights,
    find_rarest,
    weigh_positives,
)
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


def make_counted_labels(support: list[int], rows: int) -> np.ndarray:
    return np.arange(rows)[:, None] < np.array(support)


@pytest.mark.parametrize("scheme", ["balanced", "effective"])
def test_weights_are_the_inverse_of_a_classs_size_within_bounds(scheme: ClassWeights) -> None:
    rng = np.random.default_rng(fresh_seed())
    support = sorted(int(10**x) for x in rng.uniform(0.3, 3.5, 30))
    weights = compute_class_weights(make_counted_labels(support, 4000), scheme)
    # The effective number as its geometric sum: each further positive brings BETA times what the one before did.
    sizes = [n if scheme == "balanced" else sum(BETA**i for i in range(n)) for n in support]
    expected = [min(max(np.mean(sizes) / size, 1.0), MAX_WEIGHT) for size in sizes]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert weights[0] > 1 > 0.99 * weights[-1]
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(compute_class_weights(make_counted_labels(support, 4000), "none"), 1)


@pytest.mark.parametrize("scheme", ["balanced", "effective"])
def test_a_class_without_a_positive_keeps_weight_1_and_is_named(scheme: ClassWeights) -> None:
    labels = make_counted_labels([0, 90, 5, 0], 100)
    with np.errstate(all="raise"):
        weights = compute_class_weights(labels, scheme)
        assert compute_class_weights(labels[:0], scheme).tolist() == [1] * 4
    assert weights[[0, 3]].tolist() == [1, 1]
    assert weights[1:3].tolist() == compute_class_weights(labels[:, 1:3], scheme).tolist()
    first, second = describe_weights(labels, ("Aircraft", "Building", "Bus", "Crane"), scheme)
    assert first == f"class weights, {scheme}: positives of 1 of 4 classes count up to {weights[2]:.1f} x"
    assert second == "class weights: 2 classes without a training tile keep weight 1: Aircraft, Crane"
    assert describe_weights(labels, ("Aircraft", "Building", "Bus", "Crane"), "none") == ()


def test_positives_are_weighed_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    logits, weights = torch.randn(40, 6, generator=generator), 10 * torch.rand(6, generator=generator)
    labels = torch.rand(40, 6, generator=generator) < 0.4
    plain = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    expected = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none", pos_weight=weights)
    np.testing.assert_allclose(weigh_positives(plain, labels, weights), expected, rtol=1e-5, atol=1e-6)


def test_a_tile_has_the_largest_factor_of_its_classes() -> None:
    labels = draw_labels(np.random.default_rng(fresh_seed()))
    with np.errstate(all="raise"):
        factors = compute_repeat_factors(labels, 0.1)
    for row, factor in zip(labels, factors, strict=True):
        of_classes = [max(1.0, math.sqrt(0.1 / labels[:, c].mean())) for c in np.flatnonzero(row)]
        assert factor == pytest.approx(max(of_classes, default=1.0), rel=1e-12)
    assert factors.max() > 1.5
    assert (factors == 1).any()
    assert (compute_repeat_factors(labels, 0.0) == 1).all()


def test_the_line_for_the_user_says_what_is_repeated() -> None:
    labels = np.zeros((400, len(NAMES)), bool)
    labels[:, 0], labels[:4, 1] = True, True
    assert describe_repeats(labels, NAMES, 0.04) == (
        "repeat factor 0.04: 4 of 400 tiles are shown more than once, an epoch has about 404; b, on 4, 2.0 x"
    )
    assert "a higher --repeat-factor would repeat some" in describe_repeats(labels, NAMES, 0.001)

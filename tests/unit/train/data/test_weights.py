"""Class weights against the formulas they follow, within their bounds, and where a class has no positive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.planted import fresh_seed
from train.config import ClassWeights
from train.data.rare import BETA, MAX_WEIGHT, compute_class_weights, describe_weights, weigh_positives


def make_labels(support: list[int], rows: int) -> np.ndarray:
    return np.arange(rows)[:, None] < np.array(support)


@pytest.mark.parametrize("scheme", ["balanced", "effective"])
def test_weights_are_the_inverse_of_a_classs_size_within_bounds(scheme: ClassWeights) -> None:
    rng = np.random.default_rng(fresh_seed())
    support = sorted(int(10**x) for x in rng.uniform(0.3, 3.5, 30))
    weights = compute_class_weights(make_labels(support, 4000), scheme)
    # The effective number as its geometric sum: each further positive brings BETA times what the one before did.
    sizes = [n if scheme == "balanced" else sum(BETA**i for i in range(n)) for n in support]
    expected = [min(max(np.mean(sizes) / size, 1.0), MAX_WEIGHT) for size in sizes]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert weights[0] > 1 > 0.99 * weights[-1]
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(compute_class_weights(make_labels(support, 4000), "none"), 1)


@pytest.mark.parametrize("scheme", ["balanced", "effective"])
def test_a_class_without_a_positive_keeps_weight_1_and_is_named(scheme: ClassWeights) -> None:
    labels = make_labels([0, 90, 5, 0], 100)
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

"""Binary cross-entropy and the asymmetric loss against float64 references from their formulas, and the dispatch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planted import fresh_seed
from train.config import TrainConfig
from train.model.loss import LOSS_PARAMETERS, LossConfig, asymmetric_loss, bce_loss, focal_loss

PARAMETERS = [(0.0, 4.0, 0.05), (1.0, 4.0, 0.05), (0.5, 0.5, 0.2), (2.0, 2.0, 0.0), (0.0, 0.0, 0.3)]
EVERY = [LossConfig("focal"), LossConfig("bce"), *(LossConfig("asymmetric", 0.65, 2.0, *p) for p in PARAMETERS)]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, np.where(labels, -logits, logits))


def asymmetric(logits: np.ndarray, labels: np.ndarray, pos: float, neg: float, margin: float) -> np.ndarray:
    """Equations 4 to 7 of Ridnik et al. 2021 in float64, from probabilities."""
    p = 1 / (1 + np.exp(-logits))
    shifted = np.maximum(p - margin, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_positive = -((1 - p) ** pos) * np.log(p)
        of_negative = -(shifted**neg) * np.log(1 - shifted)
    return np.where(labels, of_positive, of_negative)


def draw(scale: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(fresh_seed())
    return rng.normal(0, scale, (41, 60)).astype(np.float32), rng.random((41, 60)) < 0.3


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_cross_entropy_equals_its_float64_reference(scale: float) -> None:
    logits, labels = draw(scale)
    loss = bce_loss(torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels))
    assert loss.dtype == torch.float32
    expected = cross_entropy(logits.astype(np.float64), labels)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_asymmetric_loss_equals_its_float64_reference(parameters: tuple[float, float, float], scale: float) -> None:
    """`p - margin` is a float32 difference: near the margin its error is absolute, some 1e-7."""
    logits, labels = draw(scale)
    pos, neg, margin = parameters
    loss = asymmetric_loss(
        torch.from_numpy(logits), torch.from_numpy(labels), gamma_pos=pos, gamma_neg=neg, margin=margin
    )
    assert loss.dtype == torch.float32
    expected = asymmetric(logits.astype(np.float64), labels, *parameters)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_gradients_equal_finite_differences(loss: LossConfig) -> None:
    logits, labels = draw(3.0)
    # Where a negative's cost begins, the asymmetric loss has a kink that central differences would step over.
    logits = np.where(abs(1 / (1 + np.exp(-logits)) - loss.margin) < 0.01, logits - 0.5, logits).astype(np.float32)
    leaf = torch.from_numpy(logits).requires_grad_()
    loss(leaf, torch.from_numpy(labels)).sum().backward()
    assert leaf.grad is not None

    def reference(values: np.ndarray) -> np.ndarray:
        if loss.name == "asymmetric":
            return asymmetric(values, labels, loss.gamma_pos, loss.gamma_neg, loss.margin)
        entropy = cross_entropy(values, labels)
        if loss.name == "bce":
            return entropy
        return np.where(labels, loss.alpha, 1 - loss.alpha) * (1 - np.exp(-entropy)) ** loss.gamma * entropy

    step, wide = 1e-4, logits.astype(np.float64)
    slope = (reference(wide + step) - reference(wide - step)) / (2 * step)
    np.testing.assert_allclose(leaf.grad.numpy(), slope, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(loss: LossConfig, dtype: torch.dtype) -> None:
    leaf = torch.tensor([[1e4, -1e4, 1e4, -1e4, 200.0, -200.0, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[True, True, False, False, False, True, False]])
    values = loss(leaf, labels)
    values.sum().backward()
    assert values.dtype == torch.float32
    assert leaf.grad is not None
    assert bool(values.isfinite().all())
    assert bool(leaf.grad.isfinite().all())
    assert values[0, 0] == values[0, 3] == 0  # right and sure


def test_without_asymmetry_it_is_the_focal_loss_without_weights() -> None:
    logits, labels = (torch.from_numpy(array) for array in draw(4.0))
    loss = asymmetric_loss(logits, labels, gamma_pos=2.0, gamma_neg=2.0, margin=0.0)
    torch.testing.assert_close(loss, 2 * focal_loss(logits, labels, alpha=0.5, gamma=2.0), rtol=1e-6, atol=1e-30)


def test_every_name_is_its_own_function_with_its_own_parameters() -> None:
    logits, labels = (torch.from_numpy(array) for array in draw(2.0))
    assert set(LOSS_PARAMETERS) == {"focal", "bce", "asymmetric"}
    config = TrainConfig(
        cache="c", run="r", loss="focal", alpha=0.3, gamma=1.5, gamma_pos=1.0, gamma_neg=3.0, margin=0.1
    )
    assert torch.equal(config.make_loss()(logits, labels), focal_loss(logits, labels, alpha=0.3, gamma=1.5))
    assert torch.equal(LossConfig("bce")(logits, labels), bce_loss(logits, labels))
    expected = asymmetric_loss(logits, labels, gamma_pos=1.0, gamma_neg=3.0, margin=0.1)
    assert torch.equal(LossConfig("asymmetric", 0.3, 1.5, 1.0, 3.0, 0.1)(logits, labels), expected)
    # What a run without the options trains with.
    default = TrainConfig(cache="c", run="r").make_loss()
    assert torch.equal(default(logits, labels), focal_loss(logits, labels, alpha=0.65, gamma=2.0))


@pytest.mark.parametrize("wrong", [{"gamma_pos": -1.0}, {"gamma_neg": -0.1}, {"margin": 1.0}, {"margin": -0.1}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        asymmetric_loss(torch.zeros(1, 1), torch.zeros(1, 1), **wrong)
    with pytest.raises(ValueError, match="differ in shape"):
        bce_loss(torch.zeros(4, 3), torch.zeros(4, 1))

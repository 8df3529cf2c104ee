"""Losses against float64 references from their formulas, in value and in gradient, and the choice between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.planted import fresh_seed
from train.config import TrainConfig
from train.model.loss import LOSS_PARAMETERS, LossConfig, asymmetric_loss, bce_loss, focal_loss


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def reference(logits: np.ndarray, labels: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    """Equation 5 of Lin et al. 2017 in float64; logarithms as `-log(1 + exp(-x))`, which numpy holds exact."""
    logits = logits.astype(np.float64)
    log_p = -np.logaddexp(0.0, -logits)
    log_not_p = -np.logaddexp(0.0, logits)
    of_positive = -alpha * np.exp(gamma * log_not_p) * log_p
    of_negative = -(1 - alpha) * np.exp(gamma * log_p) * log_not_p
    return np.where(labels, of_positive, of_negative)


def draw(rng: np.random.Generator, scale: float) -> tuple[np.ndarray, np.ndarray]:
    logits = rng.normal(0, scale, (37, 60)).astype(np.float32)
    return logits, rng.random((37, 60)) < 0.2


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.25, 0.65, 1.0])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_value_equals_float64_reference(rng: np.random.Generator, alpha: float, gamma: float, scale: float) -> None:
    logits, labels = draw(rng, scale)
    loss = focal_loss(torch.from_numpy(logits), torch.from_numpy(labels), alpha=alpha, gamma=gamma)
    assert loss.dtype == torch.float32
    assert loss.shape == (37, 60)
    # Relative, so the tiny losses of easy negatives are held to it too; below 1e-30 float32 runs out of exponent.
    np.testing.assert_allclose(loss.numpy(), reference(logits, labels, alpha, gamma), rtol=1e-6, atol=1e-30)


def test_defaults_are_those_of_the_design(rng: np.random.Generator) -> None:
    logits, labels = draw(rng, 3.0)
    loss = focal_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(loss.numpy(), reference(logits, labels, 0.65, 2.0), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_equals_finite_differences(rng: np.random.Generator, gamma: float) -> None:
    logits, labels = draw(rng, 4.0)
    leaf = torch.from_numpy(logits).requires_grad_()
    focal_loss(leaf, torch.from_numpy(labels), gamma=gamma).sum().backward()
    assert leaf.grad is not None
    step = 1e-4  # central differences: error about step**2 = 1e-8, rounding about 1e-16 * 20 / 1e-4 = 2e-11
    wide = logits.astype(np.float64)
    rise = reference(wide + step, labels, 0.65, gamma) - reference(wide - step, labels, 0.65, gamma)
    np.testing.assert_allclose(leaf.grad.numpy(), rise / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_extreme_logits_stay_finite_in_value_and_gradient(gamma: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 200.0, -200.0]], requires_grad=True)
    labels = torch.tensor([[True, True, False, False, True, False]])
    loss = focal_loss(logits, labels, gamma=gamma)
    loss.sum().backward()
    # Right and sure costs nothing and pulls nowhere; wrong and sure costs the logit, at a slope of alpha.
    torch.testing.assert_close(loss.detach(), torch.tensor([[0.0, 6500.0, 3500.0, 0.0, 0.0, 0.0]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.65, 0.35, 0.0, 0.0, 0.0]]), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_is_computed_in_float32_whatever_the_logits_are(rng: np.random.Generator, dtype: torch.dtype) -> None:
    logits, labels = draw(rng, 8.0)
    narrow = torch.from_numpy(logits).to(dtype)
    narrow[0, 0], narrow[0, 1] = 1e4, -1e4
    leaf = narrow.clone().requires_grad_()
    loss = focal_loss(leaf, torch.from_numpy(labels))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())
    np.testing.assert_allclose(
        loss.detach().numpy(), reference(narrow.float().numpy(), labels, 0.65, 2.0), rtol=1e-6, atol=1e-30
    )


def test_autocast_is_off_inside(rng: np.random.Generator) -> None:
    """No operation of the loss may see autocast on, whichever operations a later torch chooses to cast."""
    seen: list[bool] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(func, "__name__", "") in {"pow", "sigmoid", "logsigmoid", "log_sigmoid"}:
                seen.append(torch.is_autocast_enabled("cpu"))
            return func(*args, **(kwargs or {}))

    logits, labels = draw(rng, 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        loss = focal_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    assert seen
    assert not any(seen)
    assert loss.dtype == torch.float32


def test_gamma_zero_is_weighted_binary_cross_entropy(rng: np.random.Generator) -> None:
    # Not much beyond 13: where a negative is that sure, PyTorch's float64 subtracts numbers that are all but equal.
    logits, labels = (torch.from_numpy(array) for array in draw(rng, 3.0))
    alpha = 0.65
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.double(), labels.double(), weight=torch.where(labels, alpha, 1 - alpha).double(), reduction="none"
    )
    loss = focal_loss(logits, labels, alpha=alpha, gamma=0.0)
    torch.testing.assert_close(loss.double(), entropy, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_may_be_of_any_dtype(rng: np.random.Generator, dtype: torch.dtype) -> None:
    logits, labels = (torch.from_numpy(array) for array in draw(rng, 2.0))
    assert torch.equal(focal_loss(logits, labels.to(dtype)), focal_loss(logits, labels))


def test_empty_batch_gives_an_empty_loss() -> None:
    assert focal_loss(torch.zeros(0, 60), torch.zeros(0, 60)).shape == (0, 60)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        focal_loss(torch.zeros(4, 60), torch.zeros(4, 1))


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"alpha": -0.1}, {"gamma": -1.0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="alpha must lie"):
        focal_loss(torch.zeros(1, 1), torch.zeros(1, 1), **wrong)


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


def draw_wide(scale: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(fresh_seed())
    return rng.normal(0, scale, (41, 60)).astype(np.float32), rng.random((41, 60)) < 0.3


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_cross_entropy_equals_its_float64_reference(scale: float) -> None:
    logits, labels = draw_wide(scale)
    loss = bce_loss(torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels))
    assert loss.dtype == torch.float32
    expected = cross_entropy(logits.astype(np.float64), labels)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_asymmetric_loss_equals_its_float64_reference(parameters: tuple[float, float, float], scale: float) -> None:
    """`p - margin` is a float32 difference: near the margin its error is absolute, some 1e-7."""
    logits, labels = draw_wide(scale)
    pos, neg, margin = parameters
    loss = asymmetric_loss(
        torch.from_numpy(logits), torch.from_numpy(labels), gamma_pos=pos, gamma_neg=neg, margin=margin
    )
    assert loss.dtype == torch.float32
    expected = asymmetric(logits.astype(np.float64), labels, *parameters)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_gradients_of_every_loss_equal_finite_differences(loss: LossConfig) -> None:
    logits, labels = draw_wide(3.0)
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
def test_every_loss_stays_finite_at_extreme_logits(loss: LossConfig, dtype: torch.dtype) -> None:
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
    logits, labels = (torch.from_numpy(array) for array in draw_wide(4.0))
    loss = asymmetric_loss(logits, labels, gamma_pos=2.0, gamma_neg=2.0, margin=0.0)
    torch.testing.assert_close(loss, 2 * focal_loss(logits, labels, alpha=0.5, gamma=2.0), rtol=1e-6, atol=1e-30)


def test_every_name_is_its_own_function_with_its_own_parameters() -> None:
    logits, labels = (torch.from_numpy(array) for array in draw_wide(2.0))
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
def test_parameters_of_the_asymmetric_loss_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        asymmetric_loss(torch.zeros(1, 1), torch.zeros(1, 1), **wrong)
    with pytest.raises(ValueError, match="differ in shape"):
        bce_loss(torch.zeros(4, 3), torch.zeros(4, 1))

"""`focal_loss` against a float64 reference written from the paper's formula, in value and in gradient."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from train.model.loss import focal_loss


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs every run; `TEST_SEED=n` repeats one."""
    seed = int(os.environ.get("TEST_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


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

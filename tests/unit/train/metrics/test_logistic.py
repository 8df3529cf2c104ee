"""All classes at once reach the optimum that scikit-learn finds one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.planted import fresh_seed
from train.metrics.logistic import LinearProbe, fit_logistic


def draw(rows: int = 250, width: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Features of unequal scale and a class each that is common, rare, hopeless, and separable without error."""
    rng = np.random.default_rng(fresh_seed())
    inputs = (rng.normal(size=(rows, width)) * np.geomspace(0.3, 3, width)).astype(np.float32)
    labels = np.stack(
        [
            inputs[:, -1] + rng.normal(size=rows) > 0,
            inputs[:, -2] + rng.normal(size=rows) > 7,
            rng.random(rows) < 0.3,
            inputs[:, -3] > 0.5,
        ],
        axis=1,
    )
    labels[:3, 1] = True
    return inputs, labels


def objective(inputs: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: float, strength: float) -> float:
    logits = inputs.astype(np.float64) @ weight.astype(np.float64) + bias
    entropy = np.logaddexp(0, np.where(labels, -logits, logits)).mean()
    return float(entropy + (weight.astype(np.float64) ** 2).sum() / (2 * strength * len(inputs)))


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_it_reaches_the_optimum_of_scikit_learn(strength: float) -> None:
    inputs, labels = draw()
    probe = fit_logistic(torch.from_numpy(inputs), torch.from_numpy(labels), strength=strength, steps=300)
    assert probe.converged
    for c in range(labels.shape[1]):
        reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(inputs, labels[:, c])
        best = objective(inputs, labels[:, c], reference.coef_[0], float(reference.intercept_[0]), strength)
        found = objective(inputs, labels[:, c], probe.weight[:, c].numpy(), float(probe.bias[c]), strength)
        assert found == pytest.approx(best, abs=1e-4)
        expected = reference.predict_proba(inputs)[:, 1]
        np.testing.assert_allclose(probe(torch.from_numpy(inputs))[:, c].sigmoid(), expected, atol=0.02)


def test_a_class_does_not_depend_on_its_company() -> None:
    inputs, labels = (torch.from_numpy(array) for array in draw())
    together = fit_logistic(inputs, labels, tolerance=1e-6, steps=300)
    for c in range(labels.shape[1]):
        alone = fit_logistic(inputs, labels[:, [c]], tolerance=1e-6, steps=300)
        torch.testing.assert_close(together(inputs)[:, [c]].sigmoid(), alone(inputs).sigmoid(), atol=2e-3, rtol=0)


def test_a_search_that_was_cut_short_says_so() -> None:
    inputs, labels = (torch.from_numpy(array) for array in draw())
    probe = fit_logistic(inputs, labels, steps=2)
    assert not probe.converged
    nothing: LinearProbe = fit_logistic(inputs, labels[:, :0])
    assert nothing.converged
    assert nothing(inputs).shape == (len(inputs), 0)

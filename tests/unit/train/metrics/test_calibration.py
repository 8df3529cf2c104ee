"""Temperature against a general optimiser, calibration error against a plain loop; nothing scores on what it saw."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from tests.planted import fresh_seed
from train.metrics.decisions import (
    COLDEST,
    HOTTEST,
    Decisions,
    calibrate,
    cross_fit,
    expected_calibration_error,
    fit_temperature,
    tune_thresholds,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def draw(
    rng: np.random.Generator, sharpness: float, rows: int = 400, classes: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `sharpness` times as large as the labels deserve."""
    logits = rng.normal(size=(rows, classes)) * 2 - np.linspace(0, 3, classes)
    labels = rng.random((rows, classes)) < 1 / (1 + np.exp(-logits))
    return (sharpness * logits).astype(np.float32), labels


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    margin = np.where(labels, logits, -logits).astype(np.float64) / temperature
    return float(np.logaddexp(0, -margin).mean())


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_temperature_equals_a_general_optimisers(rng: np.random.Generator, sharpness: float) -> None:
    logits, labels = draw(rng, sharpness)
    found = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda t: cross_entropy(logits, labels, t), bounds=(COLDEST, HOTTEST), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(best.x, rel=1e-4)
    assert cross_entropy(logits, labels, found) <= best.fun + 1e-12
    assert found == pytest.approx(sharpness, rel=0.25)  # what the logits were made with


def test_temperature_has_bounds(rng: np.random.Generator) -> None:
    logits, labels = draw(rng, 1.0)
    assert fit_temperature(logits, logits > 0) == pytest.approx(COLDEST, rel=1e-6)  # no error to be modest about
    assert fit_temperature(logits, logits < 0) == pytest.approx(HOTTEST, rel=1e-6)
    assert fit_temperature(logits[:0], labels[:0]) == 1.0
    assert fit_temperature(np.zeros_like(logits), labels) > 0
    logits[3, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(logits, labels)
    with pytest.raises(ValueError, match="labels must be bool"):
        fit_temperature(logits, labels[:-1])


def test_calibration_error_equals_a_plain_loop(rng: np.random.Generator) -> None:
    logits, labels = draw(rng, 3.0)
    probs = calibrate(logits, 1.0)
    probs[0] = [0.0, 1.0, 0.2, 0.4, 0.6, 0.8, 1 / 15]
    total = 0.0
    for low in range(15):
        inside = [
            (float(p), bool(y))
            for p, y in zip(probs.ravel(), labels.ravel(), strict=True)
            if min(int(float(p) * 15), 14) == low
        ]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(y for _, y in inside) / len(inside)
            total += len(inside) / probs.size * abs(confidence - accuracy)
    assert expected_calibration_error(probs, labels) == pytest.approx(total, abs=1e-12)
    assert expected_calibration_error(probs[:0], labels[:0]) is None
    assert expected_calibration_error(labels.astype(np.float32), labels) == 0.0


def test_thresholds_are_for_calibrated_probabilities(rng: np.random.Generator) -> None:
    """The decision is that of thresholds tuned on the plain sigmoid, cut for cut: only their numbers differ."""
    logits, labels = draw(rng, 4.0)
    fitted = Decisions.fit(logits, labels)
    assert fitted.temperature > 2
    np.testing.assert_array_equal(fitted.thresholds, tune_thresholds(fitted.calibrate(logits), labels))
    plain = calibrate(logits, 1.0)
    np.testing.assert_array_equal(fitted.decide(logits), plain >= tune_thresholds(plain, labels))
    np.testing.assert_allclose(
        fitted.calibrate(logits), 1 / (1 + np.exp(-logits.astype(np.float64) / fitted.temperature)), atol=1e-6
    )
    logits[0] = np.nan
    assert not fitted.decide(logits)[0].any()


def test_cross_fitting_is_fitting_on_the_other_folds(rng: np.random.Generator) -> None:
    logits, labels = draw(rng, 4.0)
    scenes = rng.permutation(np.repeat(["a", "b", "c", "d"], 100))
    probs, preds = cross_fit(logits, labels, scenes, folds=4)
    for scene in "abcd":
        own = scenes == scene
        fitted = Decisions.fit(logits[~own], labels[~own])
        np.testing.assert_array_equal(probs[own], fitted.calibrate(logits[own]))
        np.testing.assert_array_equal(preds[own], fitted.decide(logits[own]))
    before, after = (expected_calibration_error(p, labels) for p in (calibrate(logits, 1.0), probs))
    assert before is not None
    assert after is not None
    assert after < before / 2


def test_a_scenes_labels_never_reach_its_own_figures(rng: np.random.Generator) -> None:
    logits, labels = draw(rng, 2.0)
    scenes = rng.integers(0, 9, len(logits))
    probs, preds = cross_fit(logits, labels, scenes)
    changed = 0
    for scene in range(9):
        own = scenes == scene
        perturbed = labels.copy()
        perturbed[own] = ~perturbed[own]
        probs_after, preds_after = cross_fit(logits, perturbed, scenes)
        np.testing.assert_array_equal(probs_after[own], probs[own])
        np.testing.assert_array_equal(preds_after[own], preds[own])
        changed += int((probs_after[~own] != probs[~own]).sum())
    assert changed > 0


def test_a_single_scene_is_left_as_it_is(rng: np.random.Generator) -> None:
    logits, labels = draw(rng, 4.0)
    probs, preds = cross_fit(logits, labels, np.zeros(len(logits), int))
    np.testing.assert_array_equal(probs, calibrate(logits, 1.0))
    np.testing.assert_array_equal(preds, probs >= 0.5)

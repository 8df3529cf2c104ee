"""Temperatures and thresholds against general optimisers and full searches; nothing scores on what it was fitted to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score

from tests.planted import fresh_seed
from tests.unit.train.report.made_up import draw_decisions
from train.metrics.decisions import (
    COLDEST,
    HOTTEST,
    Decisions,
    bin_decisions,
    calibrate,
    cross_fit,
    cross_fitted_preds,
    fit_temperature,
    measure_distance,
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
    assert measure_distance(bin_decisions(probs, labels)) == pytest.approx(total, abs=1e-12)
    assert measure_distance(bin_decisions(probs[:0], labels[:0])) is None
    assert measure_distance(bin_decisions(labels.astype(np.float32), labels)) == 0.0


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
    before, after = (measure_distance(bin_decisions(p, labels)) for p in (calibrate(logits, 1.0), probs))
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


def draw_probs(rng: np.random.Generator, rows: int = 120, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities below 0.5, so that the default decision is useless, and at least one positive a class."""
    labels = rng.random((rows, classes)) < np.linspace(0.05, 0.6, classes)
    labels[0] = True
    return (0.2 * labels + 0.25 * rng.random((rows, classes))).astype(np.float32), labels


def search(probs: np.ndarray, labels: np.ndarray) -> float:
    """The best F1 of one class over decisions `prob >= p` for every probability there is."""
    return max(float(f1_score(labels, probs >= p, zero_division=0)) for p in np.unique(probs))


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_f1_equals_the_best_of_all_candidates(rng: np.random.Generator, decimals: int) -> None:
    probs, labels = draw_probs(rng)
    probs = np.round(probs, decimals)
    thresholds = tune_thresholds(probs, labels)
    assert thresholds.dtype == np.float32
    for c, threshold in enumerate(thresholds):
        reached = f1_score(labels[:, c], probs[:, c] >= threshold, zero_division=0)
        assert reached == pytest.approx(search(probs[:, c], labels[:, c]), abs=1e-12)


def test_threshold_lies_midway_between_the_probabilities_it_separates(rng: np.random.Generator) -> None:
    probs, labels = draw_probs(rng)
    for c, threshold in enumerate(tune_thresholds(probs, labels)):
        above = probs[probs[:, c] >= threshold, c].min()
        below = probs[probs[:, c] < threshold, c].max(initial=0.0)
        assert threshold == pytest.approx((float(above) + float(below)) / 2, abs=1e-7)


def test_of_equal_optima_the_highest_threshold_is_taken() -> None:
    # F1 is 2/3 for the first row alone and for the first four.
    probs = np.array([[0.9], [0.7], [0.5], [0.3]], np.float32)
    labels = np.array([[True], [False], [False], [True]])
    assert tune_thresholds(probs, labels).tolist() == pytest.approx([0.8], abs=1e-7)


def test_neighbouring_floats_are_separated() -> None:
    low = np.float32(0.3)
    for _ in range(4):  # the middle rounds up and down in turn
        high = np.nextafter(low, np.float32(1))
        probs = np.array([[high], [low]], np.float32)
        threshold = tune_thresholds(probs, np.array([[True], [False]]))
        assert (probs >= threshold).tolist() == [[True], [False]]
        low = high


def test_a_class_without_positives_gets_one_half(rng: np.random.Generator) -> None:
    probs, labels = draw_probs(rng)
    labels[:, 3] = False
    thresholds = tune_thresholds(probs, labels)
    assert thresholds[3] == 0.5
    assert (np.delete(thresholds, 3) < 0.5).all()
    assert tune_thresholds(probs[:0], labels[:0]).tolist() == [0.5] * 6


@pytest.mark.parametrize("smallest", [0.0, 0.2])
def test_a_class_of_positives_only_is_always_predicted(rng: np.random.Generator, smallest: float) -> None:
    probs = (smallest + 0.1 * rng.random((30, 1))).astype(np.float32)
    probs[0] = smallest
    labels = np.ones((30, 1), bool)
    threshold = tune_thresholds(probs, labels)
    assert (probs >= threshold).all()
    assert threshold == pytest.approx([smallest / 2], abs=1e-7)


@pytest.mark.parametrize("folds", [6, 50])
def test_with_a_fold_for_each_scene_it_is_leave_one_scene_out(rng: np.random.Generator, folds: int) -> None:
    probs, labels = draw_probs(rng)
    scenes = rng.permutation(np.repeat(["a", "b", "c", "d", "e", "f"], 20))
    preds = cross_fitted_preds(probs, labels, scenes, folds=folds)
    for scene in "abcdef":
        own = scenes == scene
        np.testing.assert_array_equal(preds[own], probs[own] >= tune_thresholds(probs[~own], labels[~own]))


@pytest.mark.parametrize("folds", [2, 5])
def test_labels_of_a_scene_never_reach_its_own_decisions(rng: np.random.Generator, folds: int) -> None:
    probs, labels = draw_probs(rng)
    scenes = rng.integers(0, 12, len(probs))
    before = cross_fitted_preds(probs, labels, scenes, folds=folds)
    assert before.any()
    others_changed = 0
    for scene in np.unique(scenes):
        own = scenes == scene
        perturbed = labels.copy()
        perturbed[own] = ~perturbed[own]
        after = cross_fitted_preds(probs, perturbed, scenes, folds=folds)
        np.testing.assert_array_equal(after[own], before[own])
        others_changed += int((after[~own] != before[~own]).sum())
    assert others_changed > 0  # otherwise nothing is tuned at all


def test_seed_decides_the_folds_and_nothing_else_does(rng: np.random.Generator) -> None:
    probs, labels = draw_probs(rng)
    scenes = rng.integers(0, 12, len(probs))
    first = cross_fitted_preds(probs, labels, scenes, folds=2, seed=3)
    np.testing.assert_array_equal(cross_fitted_preds(probs, labels, scenes, folds=2, seed=3), first)
    order = rng.permutation(len(probs))
    shuffled = cross_fitted_preds(probs[order], labels[order], scenes[order], folds=2, seed=3)
    np.testing.assert_array_equal(shuffled, first[order])
    others = [cross_fitted_preds(probs, labels, scenes, folds=2, seed=seed) for seed in range(4, 24)]
    assert any((other != first).any() for other in others)


def test_one_scene_is_decided_at_one_half(rng: np.random.Generator) -> None:
    _, labels = draw_probs(rng)
    probs = rng.random(labels.shape)
    probs[0] = 0.5
    preds = cross_fitted_preds(probs, labels, np.zeros(len(probs), int))
    np.testing.assert_array_equal(preds, probs.astype(np.float32) >= 0.5)
    assert cross_fitted_preds(probs[:0], labels[:0], np.zeros(0, int)).shape == (0, 6)


def test_unsound_input_is_refused(rng: np.random.Generator) -> None:
    probs, labels = draw_probs(rng)
    scenes = np.arange(len(probs))
    with pytest.raises(ValueError, match="labels must be bool"):
        tune_thresholds(probs, labels[:-1])
    with pytest.raises(ValueError, match="labels must be bool"):
        tune_thresholds(probs, labels.astype(np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scenes"):
        cross_fitted_preds(probs, labels, scenes[:-1])
    with pytest.raises(ValueError, match="folds must be at least 2"):
        cross_fitted_preds(probs, labels, scenes, folds=1)
    for value in (np.nan, -0.1, 1.1):
        probs[5, 2] = value
        with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
            tune_thresholds(probs, labels)


def test_bins_hold_every_decision(rng: np.random.Generator) -> None:
    probs, labels, _ = draw_decisions(rng, 300, 5)
    probs[:3, 0] = (0, 1, 1 / 3)
    bins = bin_decisions(probs, labels, 10)
    flat, truth = probs.ravel().astype(float), labels.ravel()
    distance = 0.0
    for number, part in enumerate(bins):
        inside = [i for i in range(flat.size) if min(int(flat[i] * 10), 9) == number]
        assert part["count"] == len(inside)
        if inside:
            assert part["prob"] == pytest.approx(np.mean([flat[i] for i in inside]))
            assert part["positive"] == pytest.approx(np.mean([truth[i] for i in inside]))
            distance += len(inside) / flat.size * abs(part["prob"] - part["positive"])
    assert measure_distance(bins) == pytest.approx(distance)
    assert measure_distance(bin_decisions(probs[:0], labels[:0])) is None

"""Tuned thresholds against a search over every candidate, and cross-fitting against leaks between scenes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from sklearn.metrics import f1_score

from train.metrics.decisions import cross_fitted_preds, tune_thresholds


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs every run; `TEST_SEED=n` repeats one."""
    seed = int(os.environ.get("TEST_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


def draw(rng: np.random.Generator, rows: int = 120, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities below 0.5, so that the default decision is useless, and at least one positive a class."""
    labels = rng.random((rows, classes)) < np.linspace(0.05, 0.6, classes)
    labels[0] = True
    return (0.2 * labels + 0.25 * rng.random((rows, classes))).astype(np.float32), labels


def search(probs: np.ndarray, labels: np.ndarray) -> float:
    """The best F1 of one class over decisions `prob >= p` for every probability there is."""
    return max(float(f1_score(labels, probs >= p, zero_division=0)) for p in np.unique(probs))


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_f1_equals_the_best_of_all_candidates(rng: np.random.Generator, decimals: int) -> None:
    probs, labels = draw(rng)
    probs = np.round(probs, decimals)
    thresholds = tune_thresholds(probs, labels)
    assert thresholds.dtype == np.float32
    for c, threshold in enumerate(thresholds):
        reached = f1_score(labels[:, c], probs[:, c] >= threshold, zero_division=0)
        assert reached == pytest.approx(search(probs[:, c], labels[:, c]), abs=1e-12)


def test_threshold_lies_midway_between_the_probabilities_it_separates(rng: np.random.Generator) -> None:
    probs, labels = draw(rng)
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
    probs, labels = draw(rng)
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
    probs, labels = draw(rng)
    scenes = rng.permutation(np.repeat(["a", "b", "c", "d", "e", "f"], 20))
    preds = cross_fitted_preds(probs, labels, scenes, folds=folds)
    for scene in "abcdef":
        own = scenes == scene
        np.testing.assert_array_equal(preds[own], probs[own] >= tune_thresholds(probs[~own], labels[~own]))


@pytest.mark.parametrize("folds", [2, 5])
def test_labels_of_a_scene_never_reach_its_own_decisions(rng: np.random.Generator, folds: int) -> None:
    probs, labels = draw(rng)
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
    probs, labels = draw(rng)
    scenes = rng.integers(0, 12, len(probs))
    first = cross_fitted_preds(probs, labels, scenes, folds=2, seed=3)
    np.testing.assert_array_equal(cross_fitted_preds(probs, labels, scenes, folds=2, seed=3), first)
    order = rng.permutation(len(probs))
    shuffled = cross_fitted_preds(probs[order], labels[order], scenes[order], folds=2, seed=3)
    np.testing.assert_array_equal(shuffled, first[order])
    others = [cross_fitted_preds(probs, labels, scenes, folds=2, seed=seed) for seed in range(4, 24)]
    assert any((other != first).any() for other in others)


def test_one_scene_is_decided_at_one_half(rng: np.random.Generator) -> None:
    _, labels = draw(rng)
    probs = rng.random(labels.shape)
    probs[0] = 0.5
    preds = cross_fitted_preds(probs, labels, np.zeros(len(probs), int))
    np.testing.assert_array_equal(preds, probs.astype(np.float32) >= 0.5)
    assert cross_fitted_preds(probs[:0], labels[:0], np.zeros(0, int)).shape == (0, 6)


def test_unsound_input_is_refused(rng: np.random.Generator) -> None:
    probs, labels = draw(rng)
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

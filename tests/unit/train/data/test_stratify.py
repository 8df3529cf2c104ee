"""Whole scenes are shared out so that each side gets its share of every class, as far as whole scenes allow."""

from __future__ import annotations

import numpy as np
import pytest

from tests.labelled import plant_labels
from tests.planted import fresh_seed
from train.data.split import fold_rows, share_out
from train.errors import SplitError

CLASSES = 20


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def plant(rng: np.random.Generator, scenes: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of 5 to 40 tiles, and long-tailed labels that cluster in them."""
    names = np.repeat([f"s{i}" for i in range(scenes)], rng.integers(5, 40, scenes))
    return names, plant_labels(rng, names, CLASSES)


def draw_at_random(rng: np.random.Generator, scenes: np.ndarray, fraction: float) -> np.ndarray:
    """What a shuffle of the scenes gives."""
    names, scene_of = np.unique(scenes, return_inverse=True)
    return rng.permutation(np.arange(len(names)) >= round(fraction * len(names)))[scene_of].astype(int)


def miss(labels: np.ndarray, sides: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(C,) largest distance of a side's share of a class from the one that was asked for."""
    got = np.stack([labels[sides == k].sum(axis=0) for k in range(len(shares))]) / labels.sum(axis=0)
    return np.abs(got - shares[:, None]).max(axis=0)


@pytest.mark.parametrize("shares", [[0.2, 0.8], [0.1, 0.3, 0.6], [0.25] * 4])
def test_shares_of_every_class_are_close_and_closer_than_by_chance(
    rng: np.random.Generator, shares: list[float]
) -> None:
    scenes, labels = plant(rng)
    asked = np.array(shares)
    sides = share_out(scenes, labels, asked, 0)
    missed = miss(labels, sides, asked)
    # A class of n tiles in whole scenes cannot be split finer than by some of its scenes.
    largest = np.array([np.unique(scenes[labels[:, c]], return_counts=True)[1].max() for c in range(CLASSES)])
    assert (missed <= np.maximum(0.05, 2.5 * largest / labels.sum(axis=0))).all()
    assert missed.mean() < 0.06
    if len(shares) == 2:
        chance = [miss(labels, draw_at_random(rng, scenes, shares[0]), asked).mean() for _ in range(20)]
        assert missed.mean() < 0.8 * np.mean(chance)
    tiles = np.bincount(sides, minlength=len(asked)) / len(sides)
    assert np.abs(tiles - asked).max() < 0.04
    for name in np.unique(scenes):
        assert len(np.unique(sides[scenes == name])) == 1


def test_a_class_in_two_scenes_is_on_both_sides(rng: np.random.Generator) -> None:
    """However small a side: what cannot be measured, or learnt, is worse than a share that is off."""
    scenes, labels = plant(rng, 30)
    labels[:, 10:] = False  # other rare classes would pull at the same scenes
    for c, (first, second) in zip((-3, -2, -1), rng.permutation(30)[:6].reshape(3, 2), strict=True):
        for scene in (first, second):
            labels[rng.choice(np.flatnonzero(scenes == f"s{scene}")), c] = True
    sides = share_out(scenes, labels, np.array([0.2, 0.8]), 1)
    for side in (0, 1):
        assert labels[sides == side][:, -3:].any(axis=0).all()


def test_classes_of_a_single_scene_are_on_the_larger_side(rng: np.random.Generator) -> None:
    """What is learnt and not measured is worth more than what is measured and not learnt."""
    scenes, labels = plant(rng, 12)
    labels[:, 8:] = False  # other rare classes would pull at the same scenes
    for c, scene in zip((-2, -1), rng.permutation(12)[:2], strict=True):
        labels[np.flatnonzero(scenes == f"s{scene}")[:3], c] = True
    sides = share_out(scenes, labels, np.array([0.2, 0.8]), 1)
    assert not labels[sides == 0][:, -2:].any()
    assert (sides == 0).any()


def test_the_same_whatever_the_order_of_rows_and_another_for_another_seed(rng: np.random.Generator) -> None:
    scenes, labels = plant(rng, 40)
    shares = np.array([0.2, 0.8])
    sides, order = share_out(scenes, labels, shares, 5), rng.permutation(len(scenes))
    np.testing.assert_array_equal(share_out(scenes[order], labels[order], shares, 5), sides[order])
    assert len({share_out(scenes, labels, shares, seed).tobytes() for seed in range(8)}) > 4


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_alike(rng: np.random.Generator, folds: int) -> None:
    scenes, labels = plant(rng)
    fold = fold_rows(scenes, labels, folds, 0)
    tiles = np.bincount(fold, minlength=folds) / len(fold)
    assert np.abs(tiles * folds - 1).max() < 0.2
    present = [len(np.unique(fold[labels[:, c]])) for c in range(CLASSES)]
    reachable = [min(folds, len(np.unique(scenes[labels[:, c]]))) for c in range(CLASSES)]
    assert np.mean(np.array(present) / reachable) > 0.9


def test_more_folds_than_scenes_are_refused(rng: np.random.Generator) -> None:
    scenes, labels = plant(rng, 7)
    with pytest.raises(SplitError, match=r"only 7 scenes \(s0, s1, s2, s3\): --folds 8 needs 8"):
        fold_rows(scenes, labels, 8, 0)
    with pytest.raises(SplitError, match="only 1 scenes"):
        fold_rows(scenes[scenes == "s0"], labels[scenes == "s0"], 2, 0)
    assert len(np.unique(fold_rows(scenes, labels, 7, 0))) == 7

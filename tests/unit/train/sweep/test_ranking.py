"""Ranking, spread and cross-fitting against computations written out with loops and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from tests.planted import fresh_seed
from train.config import TrainConfig
from train.metrics.figures import KEY_FIGURES
from train.sweep.ranking import (
    HeadResult,
    assign_folds,
    choose_epochs,
    cross_fit,
    format_ranking,
    rank_configurations,
    score_counts,
)

FOLDS, CLASSES, EPOCHS, ROWS = 3, 6, 4, 120
BASE = TrainConfig(cache="c", run="r")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def count(labels: np.ndarray, preds: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(K, 2, C) hits and decisions."""
    return np.array([[part[fold == k].sum(axis=0) for part in (labels & preds, preds)] for k in range(FOLDS)])


def f1(labels: np.ndarray, preds: np.ndarray, average: str) -> float:
    present = np.flatnonzero(labels.any(axis=0))
    return float(f1_score(labels[:, present], preds[:, present], average=average, zero_division=0))


def test_counts_give_the_f1_of_scikit_learn(rng: np.random.Generator) -> None:
    labels, preds = rng.random((ROWS, CLASSES)) < 0.3, rng.random((2, ROWS, CLASSES)) < 0.4
    labels[:, 2] = preds[0, :, 3] = False  # a class without positives, and one never decided for
    fold = rng.integers(0, FOLDS, ROWS)
    counts = np.stack([count(labels, p, fold).sum(axis=0) for p in preds])
    weighted, macro = score_counts(counts, labels.sum(axis=0))
    assert weighted == pytest.approx([f1(labels, p, "weighted") for p in preds], abs=1e-12)
    assert macro == pytest.approx([f1(labels, p, "macro") for p in preds], abs=1e-12)
    assert score_counts(np.zeros((2, CLASSES), int), np.zeros(CLASSES, int)) == (0, 0)


def test_scenes_stay_in_one_fold(rng: np.random.Generator) -> None:
    scenes = rng.integers(0, 23, ROWS).astype(str)
    fold = assign_folds(scenes, 3)
    assert set(fold.tolist()) == set(range(5))
    assert all(len(set(fold[scenes == scene].tolist())) == 1 for scene in set(scenes.tolist()))
    assert np.array_equal(fold, assign_folds(scenes, 3))
    assert not np.array_equal(fold, assign_folds(scenes, 4))
    assert assign_folds(np.array(["a"] * 5), 0).tolist() == [0] * 5
    assert sorted(assign_folds(np.array(["a", "b"]), 0).tolist()) == [0, 1]


def test_ranking_and_cross_fitting_equal_a_plain_computation(rng: np.random.Generator) -> None:
    """8 configurations x 2 seeds whose decisions in each epoch are drawn: what is chosen is luck, and must show."""
    labels = rng.random((ROWS, CLASSES)) < 0.3
    fold = np.arange(ROWS) % FOLDS
    support = np.array([labels[fold == k].sum(axis=0) for k in range(FOLDS)])
    configs = [replace(BASE, lr=lr) for lr in 1e-4 * np.arange(1, 9)]
    drawn, results = {}, []
    for seed in range(2):
        for c, config in enumerate(configs):
            preds = rng.random((EPOCHS, ROWS, CLASSES)) < 0.4
            drawn[c, seed] = preds
            scores = [f1(labels, p, "weighted") for p in preds]
            best = int(np.argmax(scores))
            others, own = choose_epochs(np.stack([count(labels, p, fold) for p in preds]), support)
            figures = {"f1_weighted": scores[best], "f1_macro": rng.random(), "map_macro": rng.random()}
            results.append(HeadResult(replace(config, seed=seed), best + 1, figures, others, own, None))
    ranked = rank_configurations(results, [])

    means = [
        np.mean([max(f1(labels, p, "weighted") for p in drawn[c, seed]) for seed in range(2)])
        for c in range(len(configs))
    ]
    assert [entry.config.lr for entry in ranked] == [configs[c].lr for c in np.argsort(-np.array(means))]
    for entry in ranked:
        for key in KEY_FIGURES:
            values = [r.figures[key] for r in results if r.config.lr == entry.config.lr]
            assert entry.mean(key) == pytest.approx(sum(values) / 2)
            assert entry.spread(key) == pytest.approx((sum((v - sum(values) / 2) ** 2 for v in values)) ** 0.5)

    decided = np.zeros((2, ROWS, CLASSES), bool)
    for k in range(FOLDS):
        own = fold == k
        chosen: dict[int, list[int]] = {}
        value = {}
        for c in range(len(configs)):
            scores = [[f1(labels[~own], p[~own], "weighted") for p in drawn[c, seed]] for seed in range(2)]
            chosen[c] = [int(np.argmax(s)) for s in scores]
            value[c] = np.mean([max(s) for s in scores])
        winner = max(value, key=lambda c: value[c])
        for seed in range(2):
            decided[seed, own] = drawn[winner, seed][chosen[winner][seed], own]
    found = cross_fit(ranked, support)
    assert found is not None
    for average in ("weighted", "macro"):
        expected = np.mean([f1(labels, decided[seed], average) for seed in range(2)])
        assert found[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)
    # The luck of the choice is not in it, unless every part of the rows would have chosen alike.
    assert found["f1_weighted"] <= ranked[0].mean("f1_weighted") + 1e-12
    assert cross_fit(ranked, support[:1]) is None


def make_result(lr: float, seed: int, value: float) -> HeadResult:
    figures = dict.fromkeys(KEY_FIGURES, value)
    return HeadResult(replace(BASE, lr=lr, seed=seed), 1, figures, np.zeros(1), np.zeros((1, 2, 1), int), None)


def test_a_configuration_of_which_a_head_diverged_is_not_ranked() -> None:
    results = [make_result(0.1, 0, 0.9), make_result(0.2, 0, 0.4), make_result(0.3, 0, 0.6), make_result(0.2, 1, 0.5)]
    ranked = rank_configurations(results, [replace(BASE, lr=0.1, seed=1)])
    assert [entry.config.lr for entry in ranked] == [0.3, 0.2]
    assert ranked[0].spread("f1_weighted") is None
    _, first, second = format_ranking(ranked).splitlines()
    assert "±" not in first
    assert "0.4500 ± 0.0707" in second

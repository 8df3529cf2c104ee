"""Neighbours block by block equal those of one product, and whatever was drawn or left out is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.labelled import name_tiles, open_sets, plant_labels, plant_vectors, write_cache, write_taxonomy
from tests.planted import fresh_seed
from train.config import DataConfig, TrainConfig
from train.data.labels import read_vectors
from train.data.memory import StreamingMemory
from train.data.sets import Sets
from train.data.vectors import BlockVectors
from train.metrics import baselines, neighbours
from train.metrics.baselines import Baselines, compare
from train.metrics.neighbours import find_neighbours

CPU, CLASSES, WIDTH = torch.device("cpu"), 4, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("baselines")
    rng = np.random.default_rng(fresh_seed())
    tiles = name_tiles([12] * 8)
    labels = plant_labels(rng, np.repeat(np.arange(8), 12), CLASSES)
    labels[:, 2] = False  # a class that is nowhere
    labels[:, 3] = True  # and one that is everywhere
    vectors = plant_vectors(rng, labels, WIDTH) * np.geomspace(0.02, 5, WIDTH) + 1
    cache = write_cache(root / "cache", tiles, vectors, labels)
    data = DataConfig(label_ids="class", taxonomy=write_taxonomy(root / "classes.csv", CLASSES), empty="keep")
    return TrainConfig(cache=cache, run=str(root / "run"), data=data)


@pytest.fixture(scope="module")
def sets(config: TrainConfig) -> Sets:
    return open_sets(config)


@pytest.mark.parametrize("queries, keys", [(2048, 8192), (5, 7), (3, 2)])
def test_neighbours_are_those_of_one_product(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, queries: int, keys: int
) -> None:
    sets = open_sets(replace(config, features="cls+patch_mean"))
    monkeypatch.setattr(neighbours, "_QUERIES", queries)
    monkeypatch.setattr(neighbours, "_KEYS", keys)
    found = find_neighbours(sets.val, sets.train, k=4, threshold=0.5, device=CPU)
    vectors = [read_vectors(cache, torch.arange(len(cache.rows))).double() for cache in (sets.val, sets.train)]
    val, train = (array / array.norm(dim=1, keepdim=True) for array in vectors)
    assert val.shape == (len(sets.val.rows), 2 * WIDTH)
    cosine = val @ train.T
    best, row = cosine.topk(4)
    torch.testing.assert_close(found.cosine.double(), best, atol=1e-5, rtol=0)
    assert torch.equal(found.row, row)
    assert found.near == int((cosine >= 0.5).sum())
    assert found.searched == len(sets.train.rows)


def test_what_was_drawn_is_said(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(sets.train.rows)
    monkeypatch.setattr(neighbours, "MOST_PRODUCTS", 20 * len(sets.val.rows) * WIDTH)
    monkeypatch.setattr(baselines, "MOST_PROBE_CELLS", 30 * WIDTH * CLASSES)
    made = compare(sets, CPU, 0)
    assert {name: baseline.basis for name, baseline in made.val.items()} == {
        "label frequency": f"{n} training tiles",
        "10 nearest neighbours": f"20 training tiles, drawn from {n}",
        "linear probe": f"30 training tiles, drawn from {n}",
    }
    assert made.audit is not None
    assert (made.audit.train, made.audit.of_train) == (20, n)
    assert f"among 20 training tiles (drawn from {n})" in made.notes[0]


def test_vectors_that_are_not_held_are_not_looked_at(sets: Sets) -> None:
    in_cache = BlockVectors(sets.val.version, ("cls",), StreamingMemory(buffer_rows=8, ahead=1))
    left_out = compare(replace(sets, val=replace(sets.val, vectors=in_cache)), CPU, 0)
    assert not left_out.val
    assert left_out.audit is None
    assert left_out.notes[0].startswith("baselines and leak audit: skipped")


def test_the_probe_is_scikit_learns_on_standardised_features(sets: Sets) -> None:
    """A class that is nowhere, or everywhere, is given its frequency."""
    probs = Baselines(sets.train, CPU, 0)._probe.predict(sets.val)
    train, val = (read_vectors(cache, torch.arange(len(cache.rows))).numpy() for cache in (sets.train, sets.val))
    for c in (0, 1):
        reference = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=1000))
        expected = reference.fit(train, sets.train.rows.labels[:, c]).predict_proba(val)[:, 1]
        np.testing.assert_allclose(probs[:, c], expected, atol=0.01)
    assert (probs[:, 2] == 0).all()
    assert (probs[:, 3] == 1).all()


def test_a_test_set_is_decided_by_thresholds_of_the_validation_set(sets: Sets) -> None:
    made = Baselines(sets.train, CPU, 0)
    val = made.score(sets.val, sets.counted, made.find_neighbours(sets.val))
    everywhere = np.ones(len(sets.train.rows), bool)
    scored = made.score(sets.train, everywhere, made.find_neighbours(sets.train), val)
    for name, baseline in scored.items():
        np.testing.assert_array_equal(baseline.thresholds, val[name].thresholds)
    preds = made._probe.predict(sets.train) >= val["linear probe"].thresholds
    labels = sets.train.rows.labels
    f1 = 2 * (preds & labels).sum(axis=0) / np.maximum(1, preds.sum(axis=0) + labels.sum(axis=0))
    expected = np.average(f1, weights=labels.sum(axis=0))
    assert scored["linear probe"].metrics["f1_weighted_tuned"] == pytest.approx(expected, abs=1e-6)

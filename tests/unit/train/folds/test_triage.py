"""Which labels are doubted, in which order, and which never are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cache_schema import open_cache
from extract.ranks.group import join_ranks
from tests.planted import fresh_seed
from tests.vectors import write_cache
from train.config import DataConfig, TrainConfig
from train.data.labels import read_labelled_cache
from train.data.vectors import Residence
from train.folds.cross_validation import predict_out_of_fold
from train.folds.triage import find_doubts


def test_doubt_is_what_is_not_believed_times_how_well_the_class_is_known() -> None:
    rng = np.random.default_rng(fresh_seed())
    labels = rng.random((200, 5)) < 0.3
    labels[:, 3], labels[:, 4] = False, True
    probs = np.clip(0.2 + 0.5 * labels + rng.normal(0, [0.1, 0.3, 0.6, 0.2, 0.2], labels.shape), 0, 1).astype(
        np.float32
    )
    found = find_doubts(probs, labels, top=1000)
    expected = {}
    for c in range(3):  # the last two have nothing to be compared with
        skill = 2 * roc_auc_score(labels[:, c], probs[:, c]) - 1
        for row in range(200):
            distrust = 1 - probs[row, c] if labels[row, c] else probs[row, c]
            if distrust > 0.5:
                expected[row, c] = distrust * skill**0.5
    assert {(d.row, d.column): d.doubt for d in found} == pytest.approx(expected, rel=1e-5)
    assert [d.doubt for d in found] == sorted((d.doubt for d in found), reverse=True)
    assert all(d.label == labels[d.row, d.column] and d.prob == probs[d.row, d.column] for d in found)
    assert {d.kind for d in found if d.label} == {"likely wrong"}
    assert {d.kind for d in found if not d.label} == {"likely missing"}
    assert find_doubts(probs, labels, top=7) == found[:7]


def test_positives_of_a_class_nobody_can_learn_do_not_crowd_the_list() -> None:
    """Forty tiles of a class of which the model says nothing but that it is rare, and ten flips in one it knows."""
    rng = np.random.default_rng(fresh_seed())
    truth = rng.random(1000) < 0.4
    known = np.clip(0.1 + 0.8 * truth + rng.normal(0, 0.05, 1000), 0, 1)
    flips = rng.choice(1000, 10, replace=False)
    labels = np.stack([truth, np.arange(1000) % 25 == 0], axis=1)
    labels[flips, 0] ^= True
    probs = np.stack([known, rng.uniform(0.02, 0.06, 1000)], axis=1).astype(np.float32)
    assert {(d.row, d.column) for d in find_doubts(probs, labels, top=10)} == {(row, 0) for row in flips.tolist()}


def test_no_tile_is_judged_by_a_head_that_saw_its_scene(tmp_path: Path) -> None:
    """Labels drawn at random can be known by heart alone: a head that saw them ranks them with an AUC near 1, one that
    did not with 0.5, here within 5 standard errors of some 0.02."""
    rng = np.random.default_rng(fresh_seed())
    labels = rng.random((200, 8)) < 0.4
    write_cache(tmp_path / "cache", rng.standard_normal((200, 64)).astype(np.float16), labels)
    config = TrainConfig(cache=str(tmp_path / "cache"), run="r", epochs=12, lr=0.01, data=DataConfig(empty="keep"))
    version = open_cache(config.cache)
    residence = Residence.choose(config, [version], torch.device("cpu"))
    with join_ranks("cpu") as ranks:
        cache = read_labelled_cache(version, config.data, residence, ranks)
        found = predict_out_of_fold(config, cache, ranks, folds=5)
    assert found is not None
    shown = cache.rows.labels.any(axis=0)
    assert roc_auc_score(cache.rows.labels[:, shown], found.logits[:, shown], average="macro") < 0.6

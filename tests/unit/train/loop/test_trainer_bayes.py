"""A problem whose best possible answer is known: the trainer comes within 1 % of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erfc
from sklearn.metrics import f1_score

from extract.ranks.group import join_ranks
from tests.planted import fresh_seed
from tests.vectors import make_meta
from train.config import TrainConfig
from train.data.batches import Batch, epoch_order
from train.data.labels import LabelledRows
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.metrics.decisions import cross_fit
from train.model.classifier import Classifier, Head
from train.model.shards import load_tensors
from train.runs.checkpoint import load_best
from train.runs.directory import RunDirectory

CLASSES, WIDTH, TRAIN, VAL, TEST = 60, 64, 40_000, 1_500, 8_000
POSITIVES = np.geomspace(2, 20_000, CLASSES).round().astype(int)
"""In training: a long tail."""
DISTANCE = np.linspace(12.0, 9.0, CLASSES)
"""Of an object's mean from the rest, in standard deviations: the rare ones lie further out."""
LABELLED = 0.7
"""Share of a class's objects that were labelled: no model can know which, so this bounds F1 at 0.82."""


class Planted:
    """Independent classes: an object moves the vector along its class's direction, in noise of deviation 1."""

    def __init__(self, rng: np.random.Generator, rows: int) -> None:
        labels, objects = np.zeros((2, rows, CLASSES), bool)
        for c, count in enumerate(np.maximum(1, POSITIVES * rows // TRAIN)):
            there = rng.choice(rows, round(count / LABELLED), replace=False)
            objects[there, c], labels[there[:count], c] = True, True
        vectors = rng.normal(size=(rows, WIDTH))
        vectors[:, :CLASSES] += objects * DISTANCE
        self.inputs, self.labels = torch.from_numpy(vectors).float(), torch.from_numpy(labels)
        self.rows = LabelledRows(
            index=np.arange(rows),
            tiles=np.array([f"t{i}" for i in range(rows)]),
            scenes=np.array([f"s{i % 50}" for i in range(rows)]),
            labels=labels,
            reading="class",
            class_ids=tuple(range(CLASSES)),
            class_names=tuple(f"class {c}" for c in range(CLASSES)),
            notes=(),
        )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def share(self) -> torch.Tensor:
        return torch.arange(len(self))

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for rows in epoch_order(len(self), seed, epoch).split(batch_size):
            yield Batch(self.inputs[rows], self.labels[rows], rows, len(rows))

    def iterate_share(self) -> Iterator[torch.Tensor]:
        yield from self.inputs.split(8192)


def decide_by_bayes(vectors: np.ndarray) -> np.ndarray:
    """The decisions with the highest expected F1.

    The posterior of a class rises with its own coordinate alone, so they are cuts of it, and the best of all cuts
    follows from the normal distribution.
    """
    cuts = np.linspace(-2, 9, 4001)[:, None]
    share = POSITIVES / TRAIN
    there, elsewhere = (erfc(far / np.sqrt(2)) / 2 for far in (cuts - DISTANCE, cuts))
    predicted = share / LABELLED * there + (1 - share / LABELLED) * elsewhere
    best = np.argmax(2 * share * there / (predicted + share), axis=0)
    return vectors[:, :CLASSES] >= cuts[best, 0]


def test_the_trainer_reaches_the_bayes_value(tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    train, val, test = (Planted(rng, rows) for rows in (TRAIN, VAL, TEST))
    labels = test.rows.labels
    bayes = f1_score(labels, decide_by_bayes(test.inputs.numpy()), average="weighted", zero_division=0)
    assert 0.6 < bayes < 0.9
    config = TrainConfig(cache="c", run=str(tmp_path / "head"), epochs=4, batch_size=256, hidden=256, lr=3e-3)
    meta = make_meta(val.rows, config)
    run = RunDirectory.create(config.run)
    torch.manual_seed(0)
    classifier = Classifier(Head(WIDTH, CLASSES, hidden=config.hidden, dropout=config.dropout), None, ("cls",))
    with join_ranks("cpu") as ranks:
        counted = np.ones(VAL, bool)
        Trainer(classifier, train, ValidationSet(val, val.rows, counted), config, meta, run, ranks).fit(print)
    load_tensors(classifier, load_best(run.path).tensors)
    with torch.inference_mode():
        logits = classifier.eval()(test.inputs)
    # Thresholds are cross-fitted by scene, so nothing here has seen the rows it is scored on.
    _, preds = cross_fit(logits.numpy(), labels, test.rows.scenes)
    assert f1_score(labels, preds, average="weighted", zero_division=0) == pytest.approx(bayes, rel=0.01)

"""List the labels to check first: those that a model which never saw the tile doubts most.

Every tile is judged by a head trained on other scenes. The doubt of a label starts from the probability that the head
gives to the opposite label: one minus the self-confidence of confident learning (Northcutt, Jiang, Chuang: "Confident
Learning: Estimating Uncertainty in Dataset Labels", JAIR 70 (2021)). It is damped by how well the head ranks the class:
by the root of 2 AUC - 1, which is 1 for a perfect ranking and 0 for a random one. Without damping, every positive of a
class that nobody can learn from a few tiles would come before plain mistakes. Each class is treated separately.

On planted tiles with 3 % of the labels flipped and one class labelled at random, damping left the quality of the whole
list about the same, and removed the random class, which filled 7 % of the list otherwise. The paper's thresholds for
each class did worse on rare classes: they are means over a class's labels, so they are wrong where half of the labels
are wrong.

Doubt is no proof: a tile that is hard, or unlike all others, is doubted too.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from cache_schema import open_cache
from cache_schema.layout import BoolArray
from extract.ranks.group import join_ranks
from extract.ranks.same_job import Asked
from train.config import TrainConfig
from train.data.labels import LabelledRows, read_labelled_cache
from train.data.vectors import Residence
from train.errors import SplitError, TrainError

from .cross_validation import predict_out_of_fold

FloatArray = npt.NDArray[np.float32]
FOLDS = 5
COLUMNS = ("tile", "class", "label", "out_of_fold_probability", "doubt", "kind")
"""Columns of the CSV file."""


@dataclass(frozen=True)
class Doubt:
    """One label of one tile that the out-of-fold model doubts.

    Attributes:
        row, column: indices of the judged row and of the class.
        label: the given label: whether the tile shows the class.
        prob: out-of-fold probability that it does.
        doubt: 0 to 1, comparable between classes; not a probability.
    """

    row: int
    column: int
    label: bool
    prob: float
    doubt: float

    @property
    def kind(self) -> str:
        """Say whether the label is probably wrong, or one is probably missing."""
        return "likely wrong" if self.label else "likely missing"


def run_triage(config: TrainConfig, out: Path, *, top: int) -> None:
    """Judge every labelled tile of `config.cache` out of fold and write the `top` most doubtful labels to `out`.

    Raises:
        TrainError: the labels leave nothing to compare, the run fine-tuned layers, or `out` cannot be written.
        SplitError: fewer than 5 scenes.
    """
    if top < 1:
        raise TrainError(f"--top {top}: at least 1")
    if config.unfreeze:
        raise TrainError(
            f"{config.run} trained layers, triage fits the cached head: give --run-dir a run of train head"
        )
    with join_ranks(config.device, Asked.of("train triage", config)) as ranks:
        if ranks.world_size > 1:
            raise TrainError("triage runs in one process: start it with `python -m train triage`, not with torchrun")
        allowed = config.allow_unsealed
        version = open_cache(config.cache, allow_unsealed=allowed)
        residence = Residence.choose(config, [version], ranks.device)
        cache = read_labelled_cache(version, config.data, residence, ranks, allow_unsealed=allowed)
        for line in cache.rows.notes:
            ranks.say(line)
        check_doubtable(cache.rows)
        # Options that favour rare classes raise their probability on tiles that do not show them.
        plain = replace(config, class_weights="none", repeat_factor=0.0, clip_norm=None)
        found = predict_out_of_fold(plain, cache, ranks, folds=FOLDS)
        assert found is not None
        probs = torch.from_numpy(found.logits).sigmoid().numpy()
        doubts = find_doubts(probs, cache.rows.labels, top=top)
        write_doubts(out, doubts, cache.rows)
        print(_describe(doubts, cache.rows, out))


def check_doubtable(rows: LabelledRows) -> None:
    """Refuse labels that leave nothing to compare.

    Raises:
        SplitError: fewer than 5 scenes.
        TrainError: fewer than two classes are shown.
    """
    scenes = len(set(rows.scenes[~rows.empty].tolist()))
    if scenes < FOLDS:
        raise SplitError(
            f"only {scenes} scenes show a class: triage judges a scene by a head trained on others and needs {FOLDS}; "
            "check --scene-regex of the run"
        )
    shown = [rows.class_names[c] for c in np.flatnonzero(rows.labels.any(axis=0)).tolist()]
    if len(shown) < 2:
        raise TrainError(
            f"the labels show {f'one class only ({shown[0]})' if shown else 'no class'}: triage compares tiles of at "
            "least two; check --label-ids, --taxonomy and --exclude of the run"
        )


def find_doubts(probs: FloatArray, labels: BoolArray, *, top: int) -> list[Doubt]:
    """Find at most `top` labels that the probabilities contradict, most doubtful first.

    Args:
        probs: (n, C) in 0..1, each by a model that did not see the row's scene.
        labels: (n, C) bool, the given labels. A class that no row or every row shows is skipped: whether the model
            knows it cannot be measured.
    """
    distrust = np.where(labels, 1 - probs, probs).astype(np.float64)
    skill = np.zeros(labels.shape[1])
    for c in np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0)):
        skill[c] = max(0.0, 2 * roc_auc_score(labels[:, c], probs[:, c]) - 1)
    doubt = np.where(distrust > 0.5, distrust * np.sqrt(skill), 0)
    rows, columns = np.nonzero(doubt > 0)
    order = np.argsort(-doubt[rows, columns], kind="stable")[:top]
    return [
        Doubt(row, column, bool(labels[row, column]), float(probs[row, column]), float(doubt[row, column]))
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]


def write_doubts(out: Path, doubts: Sequence[Doubt], rows: LabelledRows) -> None:
    """Write a CSV line for each doubt: tile, class, label, out-of-fold probability, doubt and kind.

    Raises:
        TrainError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            for doubt in doubts:
                figures = (int(doubt.label), f"{doubt.prob:.6f}", f"{doubt.doubt:.6f}", doubt.kind)
                writer.writerow([rows.tiles[doubt.row], rows.class_names[doubt.column], *figures])
    except OSError as error:
        raise TrainError(f"cannot write {out}: {error.strerror}: choose another --out") from error


def _describe(doubts: Sequence[Doubt], rows: LabelledRows, out: Path) -> str:
    wrong = sum(doubt.label for doubt in doubts)
    return (
        f"{len(rows):,} tiles judged by heads trained on other scenes; the {len(doubts):,} most doubtful "
        f"labels -> {out}: {wrong:,} likely wrong, {len(doubts) - wrong:,} likely missing\n"
        "doubt is no proof: hard and unusual tiles are doubted too, so look at a tile before its label is changed"
    )

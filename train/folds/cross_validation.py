"""Cross-validate by scene: train K heads, each without one fold of scenes, and predict that fold with it.

Nothing is chosen on the rows that score: a fold's head trains all its epochs, and its last epoch counts. The heads are
for the figures only; the run's own model trains on its split, so that its validation side stays unseen.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from cache_schema.layout import BoolArray
from extract.ranks.group import Ranks
from train.config import TrainConfig
from train.data.labels import LabelledCache, LabelledRows
from train.data.sets import Sets, mark_counted, mark_left_out, repeat_rare_tiles
from train.data.split import fold_rows
from train.errors import SplitError
from train.loop.assemble import prepare_training
from train.loop.schedule import choose_batch_size
from train.loop.step import use_amp
from train.loop.validation import predict_logits
from train.metrics.evaluation import Evaluation, describe_calibration, evaluate_rows, score_epoch
from train.metrics.figures import FIGURES, KEY_FIGURES
from train.metrics.side_by_side import format_estimate, format_table
from train.runs.directory import RunDirectory

OUT_OF_FOLD = "out_of_fold.safetensors"


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """The predictions of heads for rows that they were not trained on.

    Attributes:
        fold: (n,) int64, the fold of each row: its scene was held out from that fold's head.
        logits: (n, C) float32 of that head.
    """

    fold: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]

    def save(self, run: RunDirectory, cache: LabelledCache) -> None:
        """Write `out_of_fold.safetensors`: `row` (n,) int64 of the cache's table, `fold` (n,) int64 and `logits` (n, C)
        float32. Its metadata hold the cache's version and, as JSON, the class names in column order."""
        temporary = run.path / f"{OUT_OF_FOLD}.tmp"
        arrays = {"row": cache.rows.index, "fold": self.fold, "logits": self.logits}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        names = json.dumps(list(cache.rows.class_names), ensure_ascii=False)
        save_file(tensors, temporary, metadata={"version": cache.version.id, "class_names": names})
        temporary.rename(run.path / OUT_OF_FOLD)


def predict_out_of_fold(config: TrainConfig, cache: LabelledCache, ranks: Ranks, *, folds: int) -> OutOfFold | None:
    """Train `folds` heads on cached vectors and predict every row by the head that has not seen its scene.

    Args:
        config: of each head: features, epochs, learning rate and so on; empty tiles train only if it keeps them.
        cache: n usable rows before any split, empty tiles included; the same on all ranks.
        ranks: all call this together; a line for each fold is printed.
        folds: 2 or more.

    Returns:
        the predictions in the order of `cache.rows` on rank 0; None on other ranks.

    Raises:
        SplitError: fewer scenes than folds, or a fold without a tile that shows a class.
        TrainError: a fold's training failed.
    """
    fold = fold_rows(cache.rows.scenes, cache.rows.labels, folds, config.seed)
    logits = np.full(cache.rows.labels.shape, np.nan, np.float32)
    for number in range(folds):
        sets = _take_fold(cache, fold == number, config, f"fold {number + 1} of {folds}")
        ranks.say(sets.notes[0])
        found = _train_fold(config, sets, ranks)
        if found is not None:
            logits[fold == number] = found
    return OutOfFold(fold.astype(np.int64), logits) if ranks.is_main else None


def _take_fold(cache: LabelledCache, held_out: BoolArray, config: TrainConfig, name: str) -> Sets:
    train, val = cache.select(~held_out), cache.select(held_out)
    train = repeat_rare_tiles(train.select(~mark_left_out(train.rows, config.data.empty)), config)
    for side in (train.rows, val.rows):
        if not side.labels.any():
            raise SplitError(f"{name}: no tile {'left to train on' if side is train.rows else 'in it'} shows a class: "
                             "choose fewer --folds")  # fmt: skip
    unlearnt = np.flatnonzero(val.rows.labels.any(axis=0) & ~train.rows.labels.any(axis=0))
    names = ", ".join(cache.rows.class_names[c] for c in unlearnt)
    note = f"{name}: {len(train.rows):,} tiles train, {len(val.rows):,} are held out"
    if names:
        note += f"; warning: all tiles that show {names} are held out together: it cannot be learnt in this fold"
    counted = mark_counted(val.rows, config.data.empty)
    return Sets(None, train, val, counted, None, (note,), {}, np.zeros(0, bool))


def _train_fold(config: TrainConfig, sets: Sets, ranks: Ranks) -> npt.NDArray[np.float32] | None:
    """Train one head; return its (m, C) logits of the held-out rows on rank 0. Its files are deleted."""
    size = choose_batch_size(len(sets.train.rows), config.batch_size)
    config = replace(config, batch_size=size, save_every=config.epochs, patience=None)
    with tempfile.TemporaryDirectory(prefix="tileprobe-fold-") as folder:
        trainer, make_tiles = prepare_training(config, RunDirectory(Path(folder)), sets, ranks)
        trainer.fit(lambda line: None)
        logits = predict_logits(trainer.classifier, make_tiles(sets.val), ranks, amp=use_amp(config.amp, ranks.device))
    return None if logits is None else logits.numpy()


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """The figures of the heads of all folds.

    Attributes:
        per_fold: for each fold its `scenes`, `tiles` and averages at threshold 0.5.
        pooled: all rows together, each predicted by the head that has not seen it; tuned decisions are cross-fitted by
            scene.
    """

    per_fold: list[dict[str, Any]]
    pooled: Evaluation

    @classmethod
    def score(cls, found: OutOfFold, rows: LabelledRows, config: TrainConfig) -> CrossValidation:
        logits, counted = torch.from_numpy(found.logits), mark_counted(rows, config.data.empty)
        per_fold = []
        for number in range(config.folds):
            mine = found.fold == number
            held_out = rows.select(mine)
            averages = score_epoch(logits[torch.from_numpy(mine)], held_out, counted[mine], loss=config.make_loss())
            del averages["per_class"], averages["f1_weighted_tuned"]
            tiles, scenes = int(counted[mine].sum()), len(np.unique(held_out.scenes[counted[mine]]))
            per_fold.append({"scenes": scenes, "tiles": tiles, **averages})
        return cls(per_fold, evaluate_rows(logits, rows, counted, loss=config.make_loss(), seed=config.seed))

    def spread(self, key: str) -> tuple[float, float]:
        """Return the mean of a figure over folds and its standard deviation (with n - 1)."""
        values = [fold[key] for fold in self.per_fold]
        return float(np.mean(values)), float(np.std(values, ddof=1))

    def to_json(self) -> dict[str, Any]:
        spreads = {key: self.spread(key) for key in KEY_FIGURES}
        return {
            "folds": len(self.per_fold),
            "mean": {key: mean for key, (mean, _) in spreads.items()},
            "std": {key: std for key, (_, std) in spreads.items()},
            "per_fold": self.per_fold,
            "pooled": self.pooled.to_json(),
        }

    def describe(self) -> list[str]:
        """Describe each fold on a line, their mean and spread, and all rows together with intervals over scenes."""
        figures = [FIGURES[key] for key in KEY_FIGURES]
        rows = [["out of fold", *(figure.title for figure in figures)]]
        for number, fold in enumerate(self.per_fold, 1):
            title = f"fold {number}: {fold['tiles']:,} tiles, {fold['scenes']:,} scenes"
            rows.append([title, *(figure.format(fold[figure.key]) for figure in figures)])
        spreads = [", ".join(map(figure.format, self.spread(figure.key))) for figure in figures]
        rows.append(["mean, standard deviation", *spreads])
        metrics, intervals = self.pooled.metrics, self.pooled.intervals
        estimates = [format_estimate(metrics[key], intervals[key], 4) for key in KEY_FIGURES]
        rows.append(["all tiles [95 % over scenes]", *estimates])
        tuned = FIGURES["f1_weighted_tuned"].describe(metrics["f1_weighted_tuned"])
        return [*format_table(rows, "<>"), f"all tiles: {tuned}", describe_calibration(self.pooled.calibration)]


def cross_validate(
    config: TrainConfig, cache: LabelledCache, run: RunDirectory, ranks: Ranks
) -> CrossValidation | None:
    """Cross-validate as configured; rank 0 writes `folds.json` and `out_of_fold.safetensors` into the run.

    Returns:
        the figures on rank 0; None on other ranks.
    """
    found = predict_out_of_fold(config, cache, ranks, folds=config.folds)
    if found is None:
        return None
    scores = CrossValidation.score(found, cache.rows, config)
    found.save(run, cache)
    run.write_json("folds.json", scores.to_json())
    return scores

"""`python -m train evaluate`: score a run on labelled tiles."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_schema import RawLabels
from extract.ranks.group import join_ranks
from extract.ranks.same_job import Asked
from train.data.labels import label_rows
from train.data.sets import mark_counted
from train.errors import TrainError
from train.metrics.evaluation import describe_evaluation, evaluate_rows
from train.model.augment import Views

from .inference import Scored, describe_views, infer
from .inputs import Listed
from .target import Target
from .trained_model import LoadedRun


def run_evaluation(run: str, target: Target, *, tta: Views, device: str, workers: int | None) -> dict[str, Any] | None:
    """Print the metrics of a run on labelled tiles, with the same figures and per-class table as training.

    Args:
        target: labelled tiles; the run's rules decide how labels are read.
        tta: `d4` averages each tile's logits over its eight symmetries.

    Returns:
        on the main rank the metrics, as in a run's metrics.json, and `run`, `tiles`, `notes`; None on other ranks.
    """
    with join_ranks(device, Asked.of("train evaluate", target, run=run, tta=tta)) as ranks:
        loaded = ranks.run_on_main(lambda: LoadedRun.load(run))
        found = infer(loaded, target, ranks, workers=workers, labels=True, tta=tta)
        report, values = ranks.run_on_main(lambda: _score(loaded, found, tta))
        if not ranks.is_main:
            return None
        print(report)
        return values


def _score(loaded: LoadedRun, found: tuple[Listed, Scored] | None, tta: Views) -> tuple[str, dict[str, Any]]:
    assert found is not None
    (listed, scored), data = found, loaded.config.data
    raw = RawLabels.pack(scored.label_ids)
    rows = label_rows(listed.table, raw, scored.status, data, reading=loaded.meta.reading)
    if rows.class_names != loaded.meta.class_names:
        raise TrainError(
            f"{data.taxonomy} does not name the classes that {loaded.directory} was trained on: it was changed since, "
            "so restore it"
        )
    counted = mark_counted(rows, data.empty)
    if not counted.any():
        raise TrainError("no labelled tile shows a class of this run: there is nothing to score")
    evaluation = evaluate_rows(
        torch.from_numpy(scored.logits[rows.index]),
        rows,
        counted,
        loss=loaded.config.make_loss(),
        decisions=loaded.decisions,
    )
    notes = [
        *rows.notes,
        *_warn_of_training_tiles(loaded, listed.place, rows.tiles[counted]),
        *describe_views(tta),
    ]
    values = {"run": str(loaded.directory), "tiles": listed.place, "notes": notes, **evaluation.to_json()}
    return "\n".join([*notes, "", describe_evaluation(evaluation, per_class=True)]), values


def _warn_of_training_tiles(loaded: LoadedRun, tiles: str, names: npt.NDArray[np.str_]) -> list[str]:
    """Return a line for the user if the run was trained on some of the scored tiles."""
    trained_on = loaded.directory.read_json("config.json")["recorded"]["tiles"]
    if os.path.abspath(trained_on) != os.path.abspath(tiles):
        return []
    seen = len(set(loaded.directory.read_json("split.json")["train"]) & {str(name) for name in names})
    if not seen:
        return []
    return [f"warning: {seen:,} of the {len(names):,} tiles scored here trained this run: its figures flatter it"]

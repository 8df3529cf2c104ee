"""Compare a run that favours rare classes with an earlier run of the same name that does not.

A run with class weights or repeated tiles is compared, tile by tile, with the newest earlier run on the same split that
has neither. Paired differences separate two runs far better than their own intervals do.
"""

from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.config import TrainConfig
from train.data.labels import LabelledRows
from train.data.rare import TITLE, find_rarest
from train.data.sets import Sets
from train.errors import TrainError
from train.runs.directory import RunDirectory
from train.runs.val_logits import load_val_logits

from .figures import FIGURES
from .scores import compute_metrics
from .side_by_side import PairedDifference, format_table

_NO_MATTER = {
    *("data", "run", "resume", "device", "workers", "memory_budget", "folds", "save_every", "deterministic"),
    *("class_weights", "repeat_factor"),
}


def compare_with_plain(run: RunDirectory, config: TrainConfig, sets: Sets, logits: Tensor) -> tuple[str, ...]:
    """Describe what class weights and repeats changed, against the newest earlier run without them.

    Earlier runs are searched in the directory of `run`, on this machine; `logits` are (n, C), of all validation rows.

    Returns:
        lines for the summary; none for a run without weights and repeats.
    """
    if is_plain(config):
        return ()
    what = f"class weights {config.class_weights}, repeat factor {config.repeat_factor:g}"
    found = _find_plain(run, config, sets)
    if found is None:
        return ("", f"{what}: no earlier run without them is on this split, so their effect is unknown")
    plain, plain_logits, differing = found
    rows, counted = sets.val.rows.select(sets.counted), torch.from_numpy(sets.counted)
    probs, plain_probs = (tensor[counted].sigmoid().numpy() for tensor in (logits, plain_logits))
    rarest = find_rarest(sets.train.rows.labels, rows.labels)
    if not len(rarest):
        return ("", f"{what}: no class is in both training and validation, so their effect is unknown")
    lines = ["", f"{what}, against {plain} without: difference [95 %, paired over scenes]"]
    if differing:
        lines.append(f"other settings differ too: {', '.join(differing)}")
    for title, columns in ((TITLE, rarest), ("all classes", np.arange(rows.labels.shape[1]))):
        difference = PairedDifference.measure(
            probs[:, columns], plain_probs[:, columns], rows.labels[:, columns], rows.scenes
        )
        lines.append(f"{title:<20}{difference.describe()}")
    return (*lines, *_tabulate_rarest(probs, plain_probs, rows, sets.train.rows, rarest))


def is_plain(config: TrainConfig) -> bool:
    """Say whether a run uses neither class weights nor repeated tiles."""
    return config.class_weights == "none" and not config.repeat_factor


def _find_plain(
    run: RunDirectory, config: TrainConfig, sets: Sets
) -> tuple[RunDirectory, Tensor, tuple[str, ...]] | None:
    for sibling in run.find_siblings():
        try:
            stored = sibling.read_config()
            comparable = (
                is_plain(stored)
                and stored.data.exclude == config.data.exclude
                and stored.data.taxonomy == config.data.taxonomy
                and sibling.read_version() == sets.train.version.id
                and sibling.read_json("split.json") == sets.split
            )
        except TrainError:  # stopped early, or written by another release
            continue
        logits = load_val_logits(sibling, sets.val.rows) if comparable else None
        if logits is not None:
            theirs, own = asdict(stored), asdict(config)
            differing = [key for key in own if key not in _NO_MATTER and theirs[key] != own[key]]
            return sibling, logits, tuple(f"{key} {theirs[key]} -> {own[key]}" for key in differing)
    return None


def _tabulate_rarest(
    probs: npt.NDArray[np.float32],
    plain_probs: npt.NDArray[np.float32],
    rows: LabelledRows,
    train: LabelledRows,
    rarest: npt.NDArray[np.intp],
) -> list[str]:
    """Format a line for each of the rarest classes: training and validation tiles, F1 and AP without and with."""
    figures = [FIGURES["f1"], FIGURES["ap"]]
    after, before = (compute_metrics(each, rows.labels, rows.class_names, loss=None) for each in (probs, plain_probs))
    table = [[TITLE, "train", "val", *(figure.title for figure in figures)]]
    for c in rarest:
        old, new = before["per_class"][c], after["per_class"][c]
        moved = [f"{figure.format(old[figure.key])} -> {figure.format(new[figure.key])}" for figure in figures]
        table.append([new["name"], str(train.labels[:, c].sum()), str(new["support"]), *moved])
    return format_table(table, "<>")

"""The validation logits a run keeps, and what they tell beside those of a sibling: another run of the same name.

A run with class weights or repeated tiles is put beside the newest sibling on the same split that has neither, tile by
tile, which separates two runs far better than their own intervals do.
"""

from dataclasses import asdict
from typing import Any

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

from .figures import compute_metrics
from .intervals import bootstrap_difference

_NO_MATTER = {
    *("run", "resume", "device", "workers", "memory_budget", "folds", "save_every", "deterministic"),
    *("class_weights", "repeat_factor"),
}

_FIGURES = (("f1_weighted", "weighted F1"), ("f1_macro", "macro F1"), ("map_macro", "mAP"))


def compare_with_plain(run: RunDirectory, config: TrainConfig, sets: Sets, logits: Tensor) -> tuple[str, ...]:
    """Lines on what weights and repeats did, against the newest sibling without them; none for a run without them.

    Args:
        run: its siblings are looked for beside it, on this machine.
        config, sets: of the run.
        logits: (n, C) of all its validation rows.
    """
    if is_plain(config):
        return ()
    what = f"class weights {config.class_weights}, repeat factor {config.repeat_factor:g}"
    found = _find_plain(run, config, sets)
    if found is None:
        return ("", f"{what}: no earlier run without them is on this split, so nothing tells what they did")
    sibling, theirs, differing = found
    rows, counted = sets.val.rows.select(sets.counted), torch.from_numpy(sets.counted)
    own_probs, their_probs = (tensor[counted].sigmoid().numpy() for tensor in (logits, theirs))
    rarest = find_rarest(sets.train.rows.labels, rows.labels)
    if not len(rarest):
        return ("", f"{what}: training and validation show no class in common, so nothing tells what they did")
    lines = ["", f"{what}, against {sibling} without: difference [95 %, paired over scenes]"]
    if differing:
        lines.append(f"other settings differ too: {', '.join(differing)}")
    for title, columns in ((TITLE, rarest), ("all classes", np.arange(rows.labels.shape[1]))):
        lines.append(_describe_difference(title, own_probs[:, columns], their_probs[:, columns], rows, columns))
    return (*lines, *_tabulate_rarest(own_probs, their_probs, rows, sets.train.rows, rarest))


def is_plain(config: TrainConfig) -> bool:
    """Whether rare classes were left as they are."""
    return config.class_weights == "none" and not config.repeat_factor


def _find_plain(
    run: RunDirectory, config: TrainConfig, sets: Sets
) -> tuple[RunDirectory, Tensor, tuple[str, ...]] | None:
    """The newest plain sibling, its logits, and the settings in which it differs."""
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
        except TrainError:  # it was stopped early, or is another release's
            continue
        logits = load_val_logits(sibling, sets.val.rows) if comparable else None
        if logits is not None:
            return sibling, logits, _list_differing(asdict(stored), asdict(config))
    return None


def _list_differing(theirs: dict[str, Any], own: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{key} {theirs[key]} -> {own[key]}"
        for key in own
        if key not in {*_NO_MATTER, "data"} and theirs[key] != own[key]
    )


def _describe_difference(
    title: str,
    own: npt.NDArray[np.float32],
    theirs: npt.NDArray[np.float32],
    rows: LabelledRows,
    columns: npt.NDArray[np.intp],
) -> str:
    labels, names = rows.labels[:, columns], [rows.class_names[c] for c in columns]
    after, before = (compute_metrics(probs, labels, names, loss=None) for probs in (own, theirs))
    intervals = bootstrap_difference(own, theirs, labels, rows.scenes)
    parts = [
        f"{label} {after[key] - before[key]:+.3f} [{intervals[key][0]:+.3f}, {intervals[key][1]:+.3f}]"
        for key, label in _FIGURES
    ]
    return f"{title:<20}{', '.join(parts)}"


def _tabulate_rarest(
    own: npt.NDArray[np.float32],
    theirs: npt.NDArray[np.float32],
    rows: LabelledRows,
    train: LabelledRows,
    rarest: npt.NDArray[np.intp],
) -> list[str]:
    """A line for each of the rarest classes: tiles that show it, F1 and AP without and with."""
    after, before = (compute_metrics(probs, rows.labels, rows.class_names, loss=None) for probs in (own, theirs))
    width = max(22, *(len(rows.class_names[c]) for c in rarest))
    lines = [f"{TITLE:<{width}}{'train':>8}{'val':>6}{'F1':>17}{'AP':>17}"]
    for c in rarest:
        old, new = before["per_class"][c], after["per_class"][c]
        moved = "".join(f"{f'{old[key]:.3f} -> {new[key]:.3f}':>17}" for key in ("f1", "ap"))
        lines.append(f"{rows.class_names[c]:<{width}}{train.labels[:, c].sum():>8}{new['support']:>6}{moved}")
    return lines

"""The sets of a run: which rows train, validate and test."""

from dataclasses import dataclass

import numpy as np

from cache_schema import ProvenanceError, open_cache
from cache_schema.layout import BoolArray

from .config import ORIGINAL_IMAGE_SIZE, TrainConfig
from .errors import TrainError
from .rows import LabelledRows, read_labelled_rows
from .scenes import split_rows


@dataclass(frozen=True, eq=False)
class Sets:
    """The rows a run trains on, validates on and is scored on once; `counted` (n_val,) marks the main figures' rows.

    `split` is what split.json holds: every usable tile of either side, empty ones too.
    """

    train: LabelledRows
    val: LabelledRows
    counted: BoolArray
    test: LabelledRows | None
    notes: tuple[str, ...]
    split: dict[str, list[str]]


def read_sets(config: TrainConfig) -> Sets:
    """Rows of all caches in use, split, with empty tiles where they belong."""
    if config.data.split_tiles:
        _refuse_unlike_original(config)
    rows = read_labelled_rows(config.cache, config.data, allow_unsealed=config.allow_unsealed)
    notes = list(rows.notes)
    if config.val_cache:
        train = rows
        val = _read_other(config, config.val_cache, rows)
        notes += val.notes
    else:
        split = split_rows(rows.tiles, rows.scenes, config.data, config.seed)
        train, val = rows.select(~split.val), rows.select(split.val)
        notes += split.notes
    sides = {"train": train.tiles.tolist(), "val": val.tiles.tolist()}
    dropped = train.empty if config.data.empty != "keep" else np.zeros(len(train), bool)
    train = train.select(~dropped)
    counted = np.ones(len(val), bool) if config.data.empty != "drop" else ~val.empty
    if not len(train) or not counted.any():
        raise TrainError("no tile with a known class is left to train or to validate on: check labels and --exclude")
    test = None
    if config.test_cache:
        test = _read_other(config, config.test_cache, rows)
        notes += test.notes
    notes.append(
        f"{len(train):,} tiles train, {int(counted.sum()):,} validate"
        + (f", {len(test):,} test" if test else "")
        + f"; {int(dropped.sum() + (~counted).sum()):,} empty ones left out (--empty {config.data.empty})"
    )
    return Sets(train, val, counted, test, tuple(notes), sides)


def _refuse_unlike_original(config: TrainConfig) -> None:
    size = open_cache(config.cache, allow_unsealed=config.allow_unsealed).provenance.image_size
    if size != ORIGINAL_IMAGE_SIZE:
        raise TrainError(
            f"--like-original needs a cache of {ORIGINAL_IMAGE_SIZE} px and {config.cache} is of {size} px: "
            f"run `make extract IMAGE_SIZE={ORIGINAL_IMAGE_SIZE}`"
        )


def _read_other(config: TrainConfig, cache: str, rows: LabelledRows) -> LabelledRows:
    """A validation or test set: the same embeddings and label rules, or an error."""
    other = read_labelled_rows(cache, config.data, allow_unsealed=config.allow_unsealed, reading=rows.reading)
    differences = other.version.provenance.differences(rows.version.provenance)
    if differences:
        raise ProvenanceError(
            f"{cache} and {config.cache} hold different embeddings ({'; '.join(differences)}): "
            "extract both with the same BACKBONE, IMAGE_SIZE and --precision"
        )
    return other

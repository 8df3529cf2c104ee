"""The sets of a run: which rows train, validate and test."""

from dataclasses import dataclass

import numpy as np
import torch

from cache_schema import ProvenanceError, open_cache
from cache_schema.layout import BoolArray

from .config import ORIGINAL_IMAGE_SIZE, TrainConfig
from .errors import TrainError
from .rows import LabelledCache, read_labelled_cache
from .scenes import split_rows
from .vectors import Residence

_HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Sets:
    """The rows a run trains on, validates on and is scored on once; `counted` (n_val,) marks the main figures' rows.

    `split` is what split.json holds: every usable tile of either side, empty ones too.
    """

    train: LabelledCache
    val: LabelledCache
    counted: BoolArray
    test: LabelledCache | None
    notes: tuple[str, ...]
    split: dict[str, list[str]]


def read_sets(config: TrainConfig, device: torch.device = _HOST) -> Sets:
    """Rows of all caches in use, split, with empty tiles where they belong.

    Args:
        config: of the run.
        device: where vectors are held, if they are.

    Raises:
        TileprobeError: a cache, its labels, or the split asked for cannot serve.
    """
    if config.data.split_tiles:
        _refuse_unlike_original(config)
    urls = filter(None, (config.cache, config.val_cache, config.test_cache))
    versions = [open_cache(url, allow_unsealed=config.allow_unsealed) for url in urls]
    residence = Residence.choose(config, versions, device)
    whole = read_labelled_cache(config.cache, config.data, residence, allow_unsealed=config.allow_unsealed)
    notes = [*whole.rows.notes, *(() if config.unfreeze else (residence.describe(whole.vectors),))]
    if config.val_cache:
        train, val = whole, _read_other(config, config.val_cache, whole, residence)
        notes += val.rows.notes
    else:
        split = split_rows(whole.rows.tiles, whole.rows.scenes, config.data, config.seed)
        train, val = whole.select(~split.val), whole.select(split.val)
        notes += split.notes
    sides = {"train": train.rows.tiles.tolist(), "val": val.rows.tiles.tolist()}
    left_out = train.rows.empty if config.data.empty != "keep" else np.zeros(len(train.rows), bool)
    train = train.select(~left_out) if left_out.any() else train  # without a copy, where there is none
    counted = ~val.rows.empty if config.data.empty == "drop" else np.ones(len(val.rows), bool)
    if not len(train.rows) or not counted.any():
        raise TrainError("no tile with a known class is left to train or to validate on: check labels and --exclude")
    test = _read_other(config, config.test_cache, whole, residence) if config.test_cache else None
    notes += test.rows.notes if test else ()
    empty = int(left_out.sum() + (~counted).sum())
    notes.append(
        f"{len(train.rows):,} tiles train, {int(counted.sum()):,} validate"
        + (f", {len(test.rows):,} test" if test else "")
        + (f"; {empty:,} empty ones left out (--empty {config.data.empty})" if empty else "")
    )
    return Sets(train, val, counted, test, tuple(notes), sides)


def _refuse_unlike_original(config: TrainConfig) -> None:
    size = open_cache(config.cache, allow_unsealed=config.allow_unsealed).provenance.image_size
    if size != ORIGINAL_IMAGE_SIZE:
        raise TrainError(
            f"--like-original needs a cache of {ORIGINAL_IMAGE_SIZE} px and {config.cache} is of {size} px: "
            f"run `make extract IMAGE_SIZE={ORIGINAL_IMAGE_SIZE}`"
        )


def _read_other(config: TrainConfig, url: str, whole: LabelledCache, residence: Residence) -> LabelledCache:
    """A validation or test set: the same embeddings and label rules, or an error."""
    reading = whole.rows.reading
    other = read_labelled_cache(url, config.data, residence, allow_unsealed=config.allow_unsealed, reading=reading)
    if other.version.id == whole.version.id:
        raise TrainError(f"{url} holds the very tiles of {config.cache}: a set to score on needs tiles of its own")
    differences = other.version.provenance.differences(whole.version.provenance)
    if differences:
        raise ProvenanceError(
            f"{url} and {config.cache} hold different embeddings ({'; '.join(differences)}): "
            "extract both with the same BACKBONE, IMAGE_SIZE and --precision"
        )
    return other

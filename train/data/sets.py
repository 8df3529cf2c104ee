"""The sets of a run: which rows train, validate and test."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cache_schema import LabelIds, ProvenanceError, Version, open_cache
from cache_schema.cli.text import show_first
from cache_schema.layout import BoolArray
from extract.ranks.group import Ranks
from train.config import ORIGINAL_IMAGE_SIZE, EmptyTiles, TrainConfig
from train.errors import TrainError

from .labels import LabelledCache, LabelledRows, read_labelled_cache
from .rare import compute_repeat_factors, describe_rarest, describe_repeats, describe_weights, find_rarest
from .split import check_folds, split_rows
from .vectors import Residence

_NAMED = 10
"""Classes that a line names before it only counts them."""


@dataclass(frozen=True, eq=False)
class Sets:
    """The rows a run trains on, validates on and is finally tested on.

    Attributes:
        whole: all usable rows of the training cache before the split, empty tiles included; None without --folds, to
            save memory.
        train, val, test: the sets; `test` is None without a test cache.
        counted, counted_test: (n_val,) and (n_test,) bool, the rows of the main figures.
        notes: lines for the user.
        sides: names of all usable training and validation tiles, empty ones included.
    """

    whole: LabelledCache | None
    train: LabelledCache
    val: LabelledCache
    counted: BoolArray
    test: LabelledCache | None
    notes: tuple[str, ...]
    sides: dict[str, npt.NDArray[np.str_]]
    counted_test: BoolArray

    @property
    def split(self) -> dict[str, list[str]]:
        """The content of split.json; not stored, since names take several times the memory as Python strings."""
        return {side: tiles.tolist() for side, tiles in self.sides.items()}


def read_sets(config: TrainConfig, ranks: Ranks) -> Sets:
    """Read and split the rows of all caches in use, and place or drop empty tiles.

    Every rank must call this. All ranks return the same sets, with vectors on their own device, or all raise.

    Args:
        config: the same on every rank, with the memory budget agreed between them.

    Raises:
        TileprobeError: a cache, its labels or the split is unusable.
    """
    opened = ranks.run_everywhere(lambda: _open_caches(config))
    chosen = ranks.run_on_main(lambda: [version.id for version in opened])
    ranks.run_everywhere(lambda: _refuse_other_versions(opened, chosen))
    residence = Residence.choose(config, opened, ranks.device)

    def read(version: Version, reading: LabelIds | None) -> LabelledCache:
        allowed = config.allow_unsealed
        return read_labelled_cache(version, config.data, residence, ranks, allow_unsealed=allowed, reading=reading)

    whole = read(opened[0], None)
    val = read(opened[1], whole.rows.reading) if config.val_cache else None
    test = read(opened[-1], whole.rows.reading) if config.test_cache else None
    return ranks.run_everywhere(lambda: _make_sets(config, residence, whole, val, test))


def _make_sets(
    config: TrainConfig,
    residence: Residence,
    whole: LabelledCache,
    val: LabelledCache | None,
    test: LabelledCache | None,
) -> Sets:
    notes = list(whole.rows.notes)
    if not len(whole.rows):
        raise TrainError(
            f"{config.cache} holds no tile to train on ({'; '.join(notes[1:])}): see `python -m cache_schema info "
            f"{config.cache}`, fix the tiles and run `make extract` again"
        )
    notes += () if config.unfreeze else (residence.describe(whole.vectors),)
    if config.folds:
        check_folds(whole.rows.scenes, config.folds)
    if val is not None:
        train = whole
        notes += val.rows.notes
    else:
        rows = whole.rows
        split = split_rows(rows.tiles, rows.scenes, rows.labels, config.data, config.seed)
        train, val = whole.select(~split.val), whole.select(split.val)
        notes += split.notes
    sides = {"train": train.rows.tiles, "val": val.rows.tiles}
    left_out = mark_left_out(train.rows, config.data.empty)
    train = train.select(~left_out) if left_out.any() else train  # no copy unless rows are left out
    counted = mark_counted(val.rows, config.data.empty)
    if not len(train.rows) or not counted.any():
        raise TrainError("no tile with a known class is left to train or to validate on: check labels and --exclude")
    notes += _name_missing_classes(train.rows, val.rows.select(counted))
    notes += test.rows.notes if test else ()
    empty = int(left_out.sum() + (~counted).sum())
    notes.append(
        f"{len(train.rows):,} tiles train, {int(counted.sum()):,} validate"
        + (f", {len(test.rows):,} test" if test else "")
        + (f"; {empty:,} empty ones left out (--empty {config.data.empty})" if empty else "")
    )
    labels, names = train.rows.labels, train.rows.class_names
    rarest = find_rarest(labels, val.rows.labels[counted]).tolist()
    notes.append(describe_rarest(labels, rarest, names))
    notes += describe_weights(labels, names, config.class_weights)
    if config.repeat_factor:
        if not (residence.held or config.unfreeze):
            raise TrainError(
                "--repeat-factor needs the vectors in memory, and they do not fit the budget "
                f"({residence.describe(whole.vectors)}): give a larger --memory-budget, or use --class-weights"
            )
        train = repeat_rare_tiles(train, config)
        notes.append(describe_repeats(labels, names, config.repeat_factor))
    counted_test = mark_counted(test.rows, config.data.empty) if test else np.zeros(0, bool)
    return Sets(whole if config.folds else None, train, val, counted, test, tuple(notes), sides, counted_test)


def repeat_rare_tiles(train: LabelledCache, config: TrainConfig) -> LabelledCache:
    """Set the repeat factors of the training rows, if configured."""
    if not config.repeat_factor:
        return train
    factors = compute_repeat_factors(train.rows.labels, config.repeat_factor)
    return replace(train, rows=replace(train.rows, repeat_factors=factors))


def mark_left_out(rows: LabelledRows, empty: EmptyTiles) -> BoolArray:
    """Mark the rows that do not train, (n,) bool: empty tiles, unless they are kept."""
    return rows.empty if empty != "keep" else np.zeros(len(rows), bool)


def mark_counted(rows: LabelledRows, empty: EmptyTiles) -> BoolArray:
    """Mark the rows of the main figures, (n,) bool: all, without empty tiles if they are dropped."""
    return ~rows.empty if empty == "drop" else np.ones(len(rows), bool)


def _name_missing_classes(train: LabelledRows, val: LabelledRows) -> list[str]:
    """Return a line each for classes without training tiles, without validation tiles, or without either."""
    learnt, measured = (np.asarray(rows.labels.any(axis=0)) for rows in (train, val))
    lines = []
    for missing, text in (
        (measured & ~learnt, "warning: no training tile shows {}: it cannot be learnt, as its figures will show"),
        (learnt & ~measured, "warning: no validation tile shows {}: n/a in every figure, threshold 0.5"),
    ):
        if missing.any():
            lines.append(text.format(show_first([train.class_names[c] for c in np.flatnonzero(missing)], limit=_NAMED)))
    nowhere = int((~learnt & ~measured).sum())
    if nowhere:
        lines.append(f"{nowhere} of {len(learnt)} classes occur in no tile: n/a in every figure")
    return lines


def _open_caches(config: TrainConfig) -> list[Version]:
    """Open the versions to train on, validate on and test on, and check that they fit the run and each other.

    Raises:
        TileprobeError: one is missing or unfinished, lacks a feature, has the same tiles as the first, or other
            embeddings.
    """
    urls = filter(None, (config.cache, config.val_cache, config.test_cache))
    opened: list[Version] = [open_cache(url, allow_unsealed=config.allow_unsealed) for url in urls]
    first, *others = opened
    size = first.provenance.image_size
    if config.data.split_tiles and size != ORIGINAL_IMAGE_SIZE:
        raise TrainError(
            f"--like-original needs a cache of {ORIGINAL_IMAGE_SIZE} px and {first.url} is of {size} px: "
            f"run `make extract IMAGE_SIZE={ORIGINAL_IMAGE_SIZE}`"
        )
    for version in opened:
        pooling = version.layout.pooling
        lacking = [name for name in config.features.split("+") if name not in pooling]
        if lacking:
            raise TrainError(
                f"--features {config.features}: choose from {', '.join(pooling)}, or extract with another --pooling: "
                f"{version.url} holds no {', '.join(lacking)}"
            )
    for other in others:
        if other.id == first.id:
            raise TrainError(
                f"{other.url} holds the same tiles as {first.url}: a validation or test set needs other tiles"
            )
        differences = other.provenance.differences(first.provenance)
        if differences:
            raise ProvenanceError(
                f"{other.url} and {first.url} hold different embeddings ({'; '.join(differences)}): "
                "extract both with the same BACKBONE, IMAGE_SIZE and --precision"
            )
    return opened


def _refuse_other_versions(opened: Sequence[Version], chosen: Sequence[str]) -> None:
    """Check that this rank opened the versions that rank 0 did, whose ids are `chosen`."""
    for version, version_id in zip(opened, chosen, strict=True):
        if version.id != version_id:
            raise TrainError(
                f"{version.url} holds version {version_id} for rank 0 and {version.id} for another rank: give "
                "every node the same cache; if it was just extracted again, start again"
            )

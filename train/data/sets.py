"""The sets of a run: which rows train, validate and test."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cache_schema import LabelIds, ProvenanceError, Version, open_cache
from cache_schema.layout import BoolArray
from extract.ranks.group import Ranks
from train.config import ORIGINAL_IMAGE_SIZE, EmptyTiles, TrainConfig
from train.errors import TrainError

from .labels import LabelledCache, LabelledRows, read_labelled_cache
from .rare import compute_repeat_factors, describe_rarest, describe_repeats, describe_weights, find_rarest
from .split import check_folds, split_rows
from .vectors import Residence

_NAMED = 10
"""Classes a line names before it only counts them."""


@dataclass(frozen=True, eq=False)
class Sets:
    """The rows a run trains on, validates on and is scored on once.

    `counted` (n_val,) and `counted_test` (n_test,) mark the rows of the main figures.

    `whole` is every usable row of the training cache, empty ones too, before the split; None unless there are to be
    folds, since names and labels of many tiles take room. `sides` are the names of every usable tile of either side,
    empty ones too.
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
        """What split.json holds; made anew each time, since as Python strings the names take several times the room."""
        return {side: tiles.tolist() for side, tiles in self.sides.items()}


def read_sets(config: TrainConfig, ranks: Ranks) -> Sets:
    """Rows of all caches in use, split, with empty tiles where they belong.

    Every rank must call this and gets the same, but for the device on which vectors are held; or all end.

    Args:
        config: of the run, the same on every rank; several ranks have agreed on its memory budget.
        ranks: who read the caches between them.

    Raises:
        TileprobeError: a cache, its labels, or the split asked for cannot serve.
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
    """The sets of a run from its caches, as they were read."""
    notes = list(whole.rows.notes)
    if not len(whole.rows):
        raise TrainError(
            f"{config.cache} holds no tile to train on ({'; '.join(notes[1:])}): see `python -m cache_schema info "
            f"{config.cache}`, mend the tiles and run `make extract` again"
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
    train = train.select(~left_out) if left_out.any() else train  # without a copy, where there is none
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
    """The rows to train on, those of rare classes to be shown more often, as configured."""
    if not config.repeat_factor:
        return train
    factors = compute_repeat_factors(train.rows.labels, config.repeat_factor)
    return replace(train, rows=replace(train.rows, repeat_factors=factors))


def mark_left_out(rows: LabelledRows, empty: EmptyTiles) -> BoolArray:
    """(n,) bool, the rows that do not train: empty tiles, unless they are kept."""
    return rows.empty if empty != "keep" else np.zeros(len(rows), bool)


def mark_counted(rows: LabelledRows, empty: EmptyTiles) -> BoolArray:
    """(n,) bool, the rows of the main figures: all but empty tiles that are to be dropped."""
    return ~rows.empty if empty == "drop" else np.ones(len(rows), bool)


def _name_missing_classes(train: LabelledRows, val: LabelledRows) -> list[str]:
    """A line each for the classes that no tile to train on shows, no tile to validate on, or neither."""
    learnt, measured = (np.asarray(rows.labels.any(axis=0)) for rows in (train, val))
    lines = []
    for missing, text in (
        (measured & ~learnt, "warning: no tile to train on shows {}: it cannot be learnt, its figures say so"),
        (learnt & ~measured, "warning: no tile to validate on shows {}: n/a in every figure, threshold 0.5"),
    ):
        names = [name for name, is_missing in zip(train.class_names, missing.tolist(), strict=True) if is_missing]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(text.format(", ".join(names[:_NAMED]) + more))
    nowhere = int((~learnt & ~measured).sum())
    if nowhere:
        lines.append(f"{nowhere} of {len(learnt)} classes occur in no tile: n/a in every figure")
    return lines


def _open_caches(config: TrainConfig) -> list[Version]:
    """The versions in use, of the training tiles and of what is validated and tested on, if they go together.

    Raises:
        TileprobeError: one is missing or unfinished, lacks a feature, or holds the same tiles as the first or other
            embeddings.
    """
    urls = filter(None, (config.cache, config.val_cache, config.test_cache))
    opened: list[Version] = [open_cache(url, allow_unsealed=config.allow_unsealed) for url in urls]
    first, *others = opened
    if config.data.split_tiles:
        _refuse_unlike_original(first)
    for version in opened:
        _check_features(config.features, version)
    for version in others:
        _refuse_unlike_first(version, first)
    return opened


def _check_features(features: str, version: Version) -> None:
    """Refuse pooled arrays that the cache does not hold.

    Raises:
        TrainError: names those it holds.
    """
    there = version.layout.pooling
    lacking = [name for name in features.split("+") if name not in there]
    if lacking:
        raise TrainError(
            f"--features {features}: choose of {', '.join(there)}, or extract with another --pooling: {version.url} "
            f"holds no {', '.join(lacking)}"
        )


def _refuse_unlike_original(version: Version) -> None:
    size = version.provenance.image_size
    if size != ORIGINAL_IMAGE_SIZE:
        raise TrainError(
            f"--like-original needs a cache of {ORIGINAL_IMAGE_SIZE} px and {version.url} is of {size} px: "
            f"run `make extract IMAGE_SIZE={ORIGINAL_IMAGE_SIZE}`"
        )


def _refuse_unlike_first(other: Version, first: Version) -> None:
    """Check that a validation or test set is of other tiles and the same embeddings as the training set."""
    if other.id == first.id:
        raise TrainError(f"{other.url} holds the very tiles of {first.url}: a set to score on needs tiles of its own")
    differences = other.provenance.differences(first.provenance)
    if differences:
        raise ProvenanceError(
            f"{other.url} and {first.url} hold different embeddings ({'; '.join(differences)}): "
            "extract both with the same BACKBONE, IMAGE_SIZE and --precision"
        )


def _refuse_other_versions(opened: Sequence[Version], chosen: Sequence[str]) -> None:
    """Check that this rank opened the very versions that rank 0 did, whose ids are `chosen`."""
    for version, version_id in zip(opened, chosen, strict=True):
        if version.id != version_id:
            raise TrainError(
                f"{version.url} holds version {version_id} for one rank and {version.id} for another: give every "
                "node the same cache, or start again if it was extracted anew just now"
            )

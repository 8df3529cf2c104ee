"""Split tiles into training and validation sides, or into folds, by whole scenes.

Neighbouring tiles overlap, so a split by tile leaks. `share_out` deals scenes to sides such that every side has about
its share of the tiles and of every class.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_schema.layout import BoolArray
from cache_schema.storage.objects import read_object
from cache_schema.storage.place import VIEWER, Purpose
from extract.tiles.scenes import MIN_SCENES
from train.config import DataConfig
from train.errors import SplitError

_ROUNDS = 3
"""Times each scene may change sides; after that the shares hardly change."""
_ABSENT = 4.0
"""Cost of a class that is absent on a side, times the side's share, next to squared differences of shares. Such a class
cannot be learnt or measured there; learning counts for more."""


class Split(NamedTuple):
    """A split of n rows: those that validate, (n,) bool, while the others train, and lines for the user."""

    val: BoolArray
    notes: tuple[str, ...]


def split_rows(
    tiles: npt.NDArray[np.str_], scenes: npt.NDArray[np.str_], labels: BoolArray, config: DataConfig, seed: int
) -> Split:
    """Split n tiles with (n, C) `labels`, as configured.

    Raises:
        SplitError: there are fewer than 5 scenes, or the split file does not cover the tiles.
    """
    if config.split_file:
        return _read_split(tiles, config.split_file)
    if config.split_tiles:
        val = np.zeros(len(tiles), bool)
        order = np.random.default_rng(seed).permutation(len(tiles))
        val[order[: round(config.val_fraction * len(tiles))]] = True
        return Split(val, ("random split of tiles: neighbouring tiles leak, so the figures are for comparison only",))
    _refuse_few_scenes(scenes, MIN_SCENES, "a split by scene")
    val = share_out(scenes, labels, np.array([config.val_fraction, 1 - config.val_fraction]), seed) == 0
    return Split(val, _describe_split(scenes, labels, val))


def fold_rows(scenes: npt.NDArray[np.str_], labels: BoolArray, folds: int, seed: int) -> npt.NDArray[np.intp]:
    """Return the fold of each row, (n,), 0 to `folds` - 1: whole scenes, with about equal shares of every class.

    Raises:
        SplitError: there are fewer scenes than folds, or than a split needs.
    """
    check_folds(scenes, folds)
    return share_out(scenes, labels, np.full(folds, 1 / folds), seed)


def check_folds(scenes: npt.NDArray[np.str_], folds: int) -> None:
    """Check, before any training, that there are enough scenes for the folds.

    Raises:
        SplitError: there are fewer scenes than folds, or than a split needs.
    """
    _refuse_few_scenes(scenes, max(folds, MIN_SCENES), f"--folds {folds}")


def _refuse_few_scenes(scenes: npt.NDArray[np.str_], needed: int, what: str) -> None:
    names = np.unique(scenes)
    if len(names) < needed:
        raise SplitError(
            f"only {len(names)} scenes ({', '.join(map(str, names[:4]))}): {what} needs {needed}; "
            "check --scene-regex, or give a VAL_CACHE"
        )


def _describe_split(scenes: npt.NDArray[np.str_], labels: BoolArray, val: BoolArray) -> tuple[str, ...]:
    """Describe the scenes and class shares of both sides, and warn if every tile is its own scene."""
    inside, names = np.unique(scenes[val]), np.unique(scenes)
    support = labels.sum(axis=0)
    shares = labels[val].sum(axis=0)[support > 0] / support[support > 0]
    notes = [f"split by scene: {len(names) - len(inside)} scenes train, {len(inside)} validate"]
    if len(shares):
        low, middle, high = np.quantile(shares, [0.1, 0.5, 0.9])
        notes[0] += f"; of each class {middle:.0%} validate (median; {low:.0%} to {high:.0%} for 8 classes in 10)"
    if len(names) == len(scenes):
        notes.append("warning: every tile is its own scene: if tiles overlap, set --scene-regex")
    return tuple(notes)


def _read_split(tiles: npt.NDArray[np.str_], path: str) -> Split:
    try:
        stored: Any = json.loads(read_object(path, Purpose("--split-file", VIEWER)))
        sides = dict.fromkeys(stored["val"], "val") | dict.fromkeys(stored["train"], "train")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SplitError(f"--split-file {path} is not a split.json: {error}") from error
    both = sorted(set(stored["val"]) & set(stored["train"]))
    if both:
        raise SplitError(f"--split-file {path} has {len(both):,} tiles on both sides, such as {both[0]}")
    unknown = [str(tile) for tile in tiles if str(tile) not in sides]
    if unknown:
        raise SplitError(
            f"{len(unknown):,} tiles are not in --split-file {path}, such as {', '.join(unknown[:3])}: "
            "use the split of this cache, or leave the option out"
        )
    val = np.array([sides[str(tile)] == "val" for tile in tiles], bool)
    if val.all() or not val.any():
        raise SplitError(f"--split-file {path} leaves one side empty for this cache's tiles")
    return Split(val, (f"split of {path}",))


def share_out(
    scenes: npt.NDArray[np.str_], labels: BoolArray, shares: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.intp]:
    """Assign each row to one of K sides by whole scenes, so that a side has about its share of tiles and classes.

    Args:
        scenes: (n,) scene of each row, at least K different ones.
        labels: (n, C) bool.
        shares: (K,) share of each side, summing to 1.
        seed: orders scenes whose rarest class has the same support.

    Returns:
        (n,) integers 0..K-1; no side is empty. The result does not depend on the order of the rows.
    """
    names, scene_of, sizes = np.unique(scenes, return_inverse=True, return_counts=True)
    counts = np.zeros((len(names), labels.shape[1]), np.int64)
    np.add.at(counts, scene_of, labels)
    totals = counts.sum(axis=0)
    counts, totals = counts[:, totals > 0], totals[totals > 0]
    rarest = np.where(counts > 0, totals, len(scenes) + 1).min(axis=1, initial=len(scenes) + 1)
    order = np.lexsort([np.random.default_rng(seed).permutation(len(names)), rarest])
    sides = _assign(np.column_stack([counts, sizes]), shares, order)
    return np.asarray(sides[scene_of])


def _assign(
    counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], order: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """Return the side of each scene, (S,), from counts (S, Q) of its classes and, in the last column, its tiles."""
    totals = counts.sum(axis=0)
    # Tiles weigh as much as all classes together.
    weights = np.append(np.ones(len(totals) - 1), max(1, len(totals) - 1))
    absent = np.repeat(_ABSENT * shares[:, None], len(totals), axis=1)
    held = np.zeros((len(shares), len(totals)), np.int64)
    sides = np.full(len(counts), -1)

    def choose(scene: np.intp) -> int:
        """Return the side where the scene costs least; only its own classes change the cost."""
        shown = np.flatnonzero(counts[scene])
        has, gained = held[:, shown], counts[scene, shown] / totals[shown]
        lacking = shares[:, None] - has / totals[shown]
        cost = (gained * (gained - 2 * lacking)) @ weights[shown]
        return int(np.argmin(cost - np.where(has == 0, absent[:, shown], 0).sum(axis=1)))

    for _ in range(1 + _ROUNDS):
        before = sides.copy()
        for scene in order:
            if sides[scene] >= 0:
                held[sides[scene]] -= counts[scene]
            sides[scene] = choose(scene)
            held[sides[scene]] += counts[scene]
        if np.array_equal(sides, before):
            break
        absent[:, -1] = np.inf  # from here on no side may be left without a tile
    return sides

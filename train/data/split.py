"""Which tiles train and which validate. Scenes stay whole: neighbouring tiles overlap, and a tile split leaks."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.layout import BoolArray
from cache_schema.storage.objects import read_object
from cache_schema.storage.place import VIEWER, Purpose
from extract.tiles.scenes import MIN_SCENES
from train.config import DataConfig
from train.errors import SplitError


@dataclass(frozen=True, eq=False)
class Split:
    """(n,) bool: rows that validate; the others train. `notes` are lines for the user."""

    val: BoolArray
    notes: tuple[str, ...]


def split_rows(
    tiles: npt.NDArray[np.str_], scenes: npt.NDArray[np.str_], labels: BoolArray, config: DataConfig, seed: int
) -> Split:
    """Split n tiles, of (n, C) `labels`, as `config` says.

    Raises:
        SplitError: fewer than 5 scenes, or a split file that does not cover the tiles.
    """
    if config.split_file:
        return _read_split(tiles, config.split_file)
    if config.split_tiles:
        val = np.zeros(len(tiles), bool)
        order = np.random.default_rng(seed).permutation(len(tiles))
        val[order[: round(config.val_fraction * len(tiles))]] = True
        return Split(val, ("random split of tiles: neighbours leak, figures are for comparison only",))
    _refuse_few_scenes(scenes, MIN_SCENES, "a split by scene")
    val = share_out(scenes, labels, np.array([config.val_fraction, 1 - config.val_fraction]), seed) == 0
    return Split(val, _describe_split(scenes, labels, val))


def fold_rows(scenes: npt.NDArray[np.str_], labels: BoolArray, folds: int, seed: int) -> npt.NDArray[np.intp]:
    """(n,) fold of each row, 0 to `folds` - 1: whole scenes, each with about its share of every class.

    Raises:
        SplitError: fewer scenes than folds, or than a split needs.
    """
    check_folds(scenes, folds)
    return share_out(scenes, labels, np.full(folds, 1 / folds), seed)


def check_folds(scenes: npt.NDArray[np.str_], folds: int) -> None:
    """Refuse, before anything is trained, more folds than there are scenes for.

    Raises:
        SplitError: fewer scenes than folds, or than a split needs.
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
    """How many scenes a side has, how the classes are shared out, and whether there are scenes at all."""
    inside, names = np.unique(scenes[val]), np.unique(scenes)
    support = labels.sum(axis=0)
    shares = labels[val].sum(axis=0)[support > 0] / support[support > 0]
    notes = [f"split by scene: {len(names) - len(inside)} scenes train, {len(inside)} validate"]
    if len(shares):
        low, middle, high = np.quantile(shares, [0.1, 0.5, 0.9])
        notes[0] += f"; of a class {middle:.0%} validate (median; {low:.0%} to {high:.0%} for 8 classes in 10)"
    if len(names) == len(scenes):
        notes.append("warning: every tile is a scene of its own: if tiles overlap, set --scene-regex")
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
            "use the split of this cache, or split anew without the option"
        )
    val = np.array([sides[str(tile)] == "val" for tile in tiles], bool)
    if val.all() or not val.any():
        raise SplitError(f"--split-file {path} leaves one side empty for this cache's tiles")
    return Split(val, (f"split of {path}",))


_ROUNDS = 3
"""Times each scene may change sides; the shares hardly move after that."""

_ABSENT = 4.0
"""What a class costs that a side does not show, times that side's share, beside squared differences of shares: there it
can be neither learnt nor measured, and learning counts for more."""


def share_out(
    scenes: npt.NDArray[np.str_], labels: BoolArray, shares: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.intp]:
    """The side of each row, of K: whole scenes, each side with about its share of the tiles and of every class.

    Args:
        scenes: (n,) scene of each row, of at least K scenes.
        labels: (n, C) bool.
        shares: (K,) of each side, adding up to 1.
        seed: of the order among scenes that are alike in their rarest class.

    Returns:
        (n,) integers 0..K-1; no side is empty. The order of the rows makes no difference.
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
    """(S,) side of each scene, from (S, Q) counts, the last of which is its tiles."""
    totals = counts.sum(axis=0)
    # Tiles weigh as much as all classes together.
    weights = np.append(np.ones(len(totals) - 1), max(1, len(totals) - 1))
    absent = np.repeat(_ABSENT * shares[:, None], len(totals), axis=1)
    held = np.zeros((len(shares), len(totals)), np.int64)
    sides = np.full(len(counts), -1)

    def choose(scene: np.intp) -> int:
        """The side where the scene costs least: only what it shows makes a difference."""
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
        absent[:, -1] = np.inf  # from here on no side is without a tile
    return sides

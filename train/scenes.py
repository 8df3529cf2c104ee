"""Which tiles train and which validate. Scenes stay whole: neighbouring tiles overlap, and a tile split leaks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.layout import BoolArray

from .bucket import is_bucket, read_object
from .config import DataConfig
from .errors import SplitError

MIN_SCENES = 5


@dataclass(frozen=True, eq=False)
class Split:
    """(n,) bool: rows that validate; the others train. `notes` are lines for the user."""

    val: BoolArray
    notes: tuple[str, ...]


def split_rows(tiles: npt.NDArray[np.str_], scenes: npt.NDArray[np.str_], config: DataConfig, seed: int) -> Split:
    """Split n tiles as `config` says.

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
    return _split_scenes(scenes, config.val_fraction, seed)


def _split_scenes(scenes: npt.NDArray[np.str_], fraction: float, seed: int) -> Split:
    """Shuffle scenes, then fill the validation side up to the asked share of tiles."""
    names, index, sizes = np.unique(scenes, return_inverse=True, return_counts=True)
    if len(names) < MIN_SCENES:
        raise SplitError(
            f"only {len(names)} scenes ({', '.join(map(str, names[:4]))}): a split by scene needs {MIN_SCENES}; "
            "check --scene-regex, or give a VAL_CACHE"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
    chosen = before < fraction * len(scenes) - sizes[order] / 2
    chosen[0], chosen[-1] = True, False  # neither side may be empty
    val_scenes = np.zeros(len(names), bool)
    val_scenes[order[chosen]] = True
    notes = [f"split by scene: {int((~val_scenes).sum())} scenes train, {int(val_scenes.sum())} validate"]
    if len(names) == len(scenes):
        notes.append("warning: every tile is a scene of its own: if tiles overlap, set --scene-regex")
    return Split(np.asarray(val_scenes[index]), tuple(notes))


def _read_split(tiles: npt.NDArray[np.str_], path: str) -> Split:
    try:
        stored: Any = json.loads(read_object(path) if is_bucket(path) else Path(path).read_text())
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

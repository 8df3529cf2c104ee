"""Find each tile's scene (the source image it was cut from) from its name, and choose whole scenes for LIMIT."""

import hashlib
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.errors import ConfigError

DEFAULT_SCENE_REGEX = r"^(?P<scene>.+?)(?:_\d+)+$"
MIN_SCENES = 5
"""Fewer scenes cannot be split into training and validation."""


def find_scenes(tiles: npt.NDArray[np.str_], scene_regex: str = DEFAULT_SCENE_REGEX) -> npt.NDArray[np.str_]:
    """Return the scene of each tile, (N,): the group `scene` of `scene_regex` in the stem, `1052_3_7` -> `1052`.

    Raises:
        ConfigError: the pattern does not compile or lacks the group, or names do not match (three are shown).
    """
    try:
        pattern = re.compile(scene_regex)
    except re.error as error:
        raise ConfigError(f"--scene-regex {scene_regex!r} is not a regular expression: {error}") from error
    if "scene" not in pattern.groupindex:
        raise ConfigError(f"--scene-regex {scene_regex!r} has no group (?P<scene>…)")
    scenes: npt.NDArray[Any] = np.empty(len(tiles), np.dtypes.StringDType())
    unmatched = []
    for row, tile in enumerate(tiles):
        match = pattern.search(PurePosixPath(str(tile)).stem)
        if match:
            scenes[row] = match["scene"]
        else:
            unmatched.append(str(tile))
    if unmatched:
        raise ConfigError(
            f"{len(unmatched):,} tile names do not fit --scene-regex {scene_regex!r}, such as "
            f"{', '.join(unmatched[:3])}: give a pattern whose group (?P<scene>…) is the source image"
        )
    return scenes


def choose_whole_scenes(scenes: npt.NDArray[np.str_], limit: int) -> npt.NDArray[np.bool_]:
    """Choose the same whole scenes every time: at least one, and up to about `limit` tiles.

    Scenes are taken in the order of their names' hashes, so a larger limit includes the scenes of a smaller one.

    Returns:
        (N,) bool, the tiles of the chosen scenes.
    """
    names, index, sizes = np.unique(scenes, return_inverse=True, return_counts=True)
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(str(names[i]).encode()).digest())
    chosen = np.zeros(len(names), bool)
    total = 0
    for scene in order:
        if total and total + sizes[scene] > limit:
            break
        chosen[scene] = True
        total += int(sizes[scene])
    return np.asarray(chosen[index])

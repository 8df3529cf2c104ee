"""Scenes stay whole, the share is what was asked for, and split files are taken at their word or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.tiles.scenes import MIN_SCENES
from tests.planted import fresh_seed
from train.config import DataConfig
from train.data.split import Split, split_rows
from train.errors import SplitError


def name_tiles(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    scenes = np.repeat([f"s{i}" for i in range(len(sizes))], sizes)
    return np.array([f"images/{scene}_{i}.png" for i, scene in enumerate(scenes)]), scenes


def split_by_size(tiles: np.ndarray, scenes: np.ndarray, config: DataConfig, seed: int) -> Split:
    """The split of tiles without labels: sizes of scenes are all there is to go by."""
    return split_rows(tiles, scenes, np.zeros((len(tiles), 3), bool), config, seed)


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=MIN_SCENES, max_size=40),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31 - 1),
)
def test_scenes_stay_whole_and_the_share_is_close_to_what_was_asked(
    sizes: list[int], fraction: float, seed: int
) -> None:
    tiles, scenes = name_tiles(sizes)
    val = split_by_size(tiles, scenes, DataConfig(val_fraction=fraction), seed).val
    assert not set(scenes[val]) & set(scenes[~val])
    assert val.any()
    assert not val.all()
    # Whole scenes can miss the share by half a scene; a first or last scene that had to be moved, by a whole one.
    assert abs(val.sum() - fraction * len(tiles)) <= max(sizes)


def test_equal_scenes_are_split_exactly() -> None:
    tiles, scenes = name_tiles([7] * 20)
    for seed in range(20):
        assert split_by_size(tiles, scenes, DataConfig(val_fraction=0.25), seed).val.sum() == 5 * 7


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(fresh_seed())
    tiles, scenes = name_tiles(rng.integers(1, 9, 30).tolist())
    order = rng.permutation(len(tiles))
    val = split_by_size(tiles, scenes, DataConfig(), 3).val
    shuffled = split_by_size(tiles[order], scenes[order], DataConfig(), 3).val
    assert set(scenes[val]) == set(scenes[order][shuffled])
    chosen = {frozenset(scenes[split_by_size(tiles, scenes, DataConfig(), seed).val]) for seed in range(10)}
    assert len(chosen) > 5


def test_too_few_scenes_are_refused() -> None:
    tiles, scenes = name_tiles([9] * (MIN_SCENES - 1))
    with pytest.raises(SplitError, match=r"only 4 scenes \(s0, s1, s2, s3\).*--scene-regex.*VAL_CACHE"):
        split_by_size(tiles, scenes, DataConfig(), 0)


def test_one_tile_a_scene_is_worth_a_warning() -> None:
    tiles, scenes = name_tiles([1] * 10)
    notes = split_by_size(tiles, scenes, DataConfig(), 0).notes
    assert any(note.startswith("warning: every tile is a scene") for note in notes)
    tiles, scenes = name_tiles([1] * 9 + [2])
    assert not any("warning" in note for note in split_by_size(tiles, scenes, DataConfig(), 0).notes)


def test_random_tile_split_takes_the_share_and_ignores_scenes() -> None:
    tiles, scenes = name_tiles([50] * 3)
    split = split_by_size(tiles, scenes, DataConfig(split_tiles=True), 42)
    assert split.val.sum() == 30
    assert set(scenes[split.val]) == set(scenes[~split.val]) == {"s0", "s1", "s2"}
    assert np.array_equal(split.val, split_by_size(tiles, scenes, DataConfig(split_tiles=True), 42).val)
    assert not np.array_equal(split.val, split_by_size(tiles, scenes, DataConfig(split_tiles=True), 43).val)
    assert any("leak" in note for note in split.notes)


def test_a_split_file_gives_the_split_it_was_written_from(tmp_path: Path) -> None:
    tiles, scenes = name_tiles([4] * 10)
    val = split_by_size(tiles, scenes, DataConfig(), fresh_seed()).val
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": tiles[~val].tolist(), "val": tiles[val].tolist()}))
    again = split_by_size(tiles, scenes, DataConfig(split_file=str(path)), 99)
    assert np.array_equal(again.val, val)
    # A file may hold more tiles than the cache, as after LIMIT.
    fewer = split_by_size(tiles[::3], scenes[::3], DataConfig(split_file=str(path)), 99)
    assert np.array_equal(fewer.val, val[::3])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "is not a split.json"),
        ("{", "is not a split.json"),
        ("[]", "is not a split.json"),
        ('{"train": []}', "is not a split.json"),
        ('{"train": 3, "val": []}', "is not a split.json"),
        ('{"train": ["images/s0_0.png"], "val": []}', r"5 tiles are not in --split-file .*, such as images/s1_1.png"),
        ("VAL", "leaves one side empty"),
        ("TRAIN", "leaves one side empty"),
    ],
)
def test_split_files_that_cannot_serve_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    tiles, scenes = name_tiles([1] * 6)
    path = tmp_path / "split.json"
    if text in ("VAL", "TRAIN"):
        sides = {"train": [], "val": []} | {text.lower(): tiles.tolist()}
        path.write_text(json.dumps(sides))
    elif text is not None:
        path.write_text(text)
    with pytest.raises(SplitError, match=message):
        split_by_size(tiles, scenes, DataConfig(split_file=str(path)), 0)


def test_a_tile_on_both_sides_is_refused(tmp_path: Path) -> None:
    tiles, scenes = name_tiles([1] * 6)
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": tiles.tolist(), "val": tiles[:2].tolist()}))
    with pytest.raises(SplitError, match=r"2 tiles on both sides, such as images/s0_0\.png"):
        split_by_size(tiles, scenes, DataConfig(split_file=str(path)), 0)

"""Scenes stay whole, each side gets its share of tiles and of every class, and split files are obeyed or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.tiles.scenes import MIN_SCENES
from tests.labelled import plant_labels
from tests.planted import fresh_seed
from train.config import DataConfig
from train.data.split import Split, fold_rows, share_out, split_rows
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
    assert any(note.startswith("warning: every tile is its own scene") for note in notes)
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


CLASSES = 20


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def plant(rng: np.random.Generator, scenes: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of 5 to 40 tiles, and long-tailed labels that cluster in them."""
    names = np.repeat([f"s{i}" for i in range(scenes)], rng.integers(5, 40, scenes))
    return names, plant_labels(rng, names, CLASSES)


def draw_at_random(rng: np.random.Generator, scenes: np.ndarray, fraction: float) -> np.ndarray:
    """What a shuffle of the scenes gives."""
    names, scene_of = np.unique(scenes, return_inverse=True)
    return rng.permutation(np.arange(len(names)) >= round(fraction * len(names)))[scene_of].astype(int)


def miss(labels: np.ndarray, sides: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(C,) largest distance of a side's share of a class from the one that was asked for."""
    got = np.stack([labels[sides == k].sum(axis=0) for k in range(len(shares))]) / labels.sum(axis=0)
    return np.abs(got - shares[:, None]).max(axis=0)


@pytest.mark.parametrize("shares", [[0.2, 0.8], [0.1, 0.3, 0.6], [0.25] * 4])
def test_shares_of_every_class_are_close_and_closer_than_by_chance(
    rng: np.random.Generator, shares: list[float]
) -> None:
    scenes, labels = plant(rng)
    asked = np.array(shares)
    sides = share_out(scenes, labels, asked, 0)
    missed = miss(labels, sides, asked)
    # A class of n tiles in whole scenes cannot be split finer than by some of its scenes.
    largest = np.array([np.unique(scenes[labels[:, c]], return_counts=True)[1].max() for c in range(CLASSES)])
    assert (missed <= np.maximum(0.05, 2.5 * largest / labels.sum(axis=0))).all()
    assert missed.mean() < 0.06
    if len(shares) == 2:
        chance = [miss(labels, draw_at_random(rng, scenes, shares[0]), asked).mean() for _ in range(20)]
        assert missed.mean() < 0.8 * np.mean(chance)
    tiles = np.bincount(sides, minlength=len(asked)) / len(sides)
    assert np.abs(tiles - asked).max() < 0.04
    for name in np.unique(scenes):
        assert len(np.unique(sides[scenes == name])) == 1


def test_a_class_in_two_scenes_is_on_both_sides(rng: np.random.Generator) -> None:
    """However small a side: what cannot be measured, or learnt, is worse than a share that is off."""
    scenes, labels = plant(rng, 30)
    labels[:, 10:] = False  # other rare classes would pull at the same scenes
    for c, (first, second) in zip((-3, -2, -1), rng.permutation(30)[:6].reshape(3, 2), strict=True):
        for scene in (first, second):
            labels[rng.choice(np.flatnonzero(scenes == f"s{scene}")), c] = True
    sides = share_out(scenes, labels, np.array([0.2, 0.8]), 1)
    for side in (0, 1):
        assert labels[sides == side][:, -3:].any(axis=0).all()


def test_classes_of_a_single_scene_are_on_the_larger_side(rng: np.random.Generator) -> None:
    """What is learnt and not measured is worth more than what is measured and not learnt."""
    scenes, labels = plant(rng, 12)
    labels[:, 8:] = False  # other rare classes would pull at the same scenes
    for c, scene in zip((-2, -1), rng.permutation(12)[:2], strict=True):
        labels[np.flatnonzero(scenes == f"s{scene}")[:3], c] = True
    sides = share_out(scenes, labels, np.array([0.2, 0.8]), 1)
    assert not labels[sides == 0][:, -2:].any()
    assert (sides == 0).any()


def test_the_same_whatever_the_order_of_rows_and_another_for_another_seed(rng: np.random.Generator) -> None:
    scenes, labels = plant(rng, 40)
    shares = np.array([0.2, 0.8])
    sides, order = share_out(scenes, labels, shares, 5), rng.permutation(len(scenes))
    np.testing.assert_array_equal(share_out(scenes[order], labels[order], shares, 5), sides[order])
    assert len({share_out(scenes, labels, shares, seed).tobytes() for seed in range(8)}) > 4


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_alike(rng: np.random.Generator, folds: int) -> None:
    scenes, labels = plant(rng)
    fold = fold_rows(scenes, labels, folds, 0)
    tiles = np.bincount(fold, minlength=folds) / len(fold)
    assert np.abs(tiles * folds - 1).max() < 0.2
    present = [len(np.unique(fold[labels[:, c]])) for c in range(CLASSES)]
    reachable = [min(folds, len(np.unique(scenes[labels[:, c]]))) for c in range(CLASSES)]
    assert np.mean(np.array(present) / reachable) > 0.9


def test_more_folds_than_scenes_are_refused(rng: np.random.Generator) -> None:
    scenes, labels = plant(rng, 7)
    with pytest.raises(SplitError, match=r"only 7 scenes \(s0, s1, s2, s3\): --folds 8 needs 8"):
        fold_rows(scenes, labels, 8, 0)
    with pytest.raises(SplitError, match="only 1 scenes"):
        fold_rows(scenes[scenes == "s0"], labels[scenes == "s0"], 2, 0)
    assert len(np.unique(fold_rows(scenes, labels, 7, 0))) == 7

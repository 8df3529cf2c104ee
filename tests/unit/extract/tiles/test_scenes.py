"""Scenes read off names, and LIMIT's choice among them."""

from __future__ import annotations

import numpy as np
import pytest

from extract.errors import ConfigError
from extract.tiles.scenes import choose_whole_scenes, find_scenes
from tests.planted import fresh_seed

DEFAULT = {
    "images/1052_3_7.png": "1052",
    "images/1052_3.png": "1052",
    "images/site_a_12_0.tif": "site_a",
    "images/a/b/7_1.png": "7",
    "images/x_1.y_2.png": "x_1.y",
    "images/_1_2.png": "_1",
}


def names(*tiles: str) -> np.ndarray:
    return np.array(tiles, np.dtypes.StringDType())


@pytest.mark.parametrize("tile, scene", DEFAULT.items())
def test_default_pattern(tile: str, scene: str) -> None:
    assert find_scenes(names(tile)).tolist() == [scene]


def test_pattern_of_ones_own() -> None:
    tiles = names("images/img_7_tile_3.png", "images/img_7_tile_4.png", "images/img_8_tile_1.png")
    assert find_scenes(tiles, r"img_(?P<scene>\d+)_").tolist() == ["7", "7", "8"]


def test_names_that_do_not_fit_are_counted_and_three_shown() -> None:
    tiles = names("images/7_1.png", *(f"images/tile{letter}.png" for letter in "abcde"))
    with pytest.raises(ConfigError) as caught:
        find_scenes(tiles)
    text = str(caught.value)
    assert text.startswith("5 tile names do not fit --scene-regex")
    assert "images/tilea.png, images/tileb.png, images/tilec.png:" in text
    assert "tiled" not in text


@pytest.mark.parametrize("pattern, message", [("(", "not a regular expression"), (r"(\d+)", r"no group \(\?P<scene>")])
def test_useless_pattern(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_scenes(names("images/1_1.png"), pattern)


def draw_scenes() -> np.ndarray:
    rng = np.random.default_rng(fresh_seed())
    sizes = rng.integers(1, 60, 40)
    return np.repeat([f"s{rng.integers(10**9)}-{i}" for i in range(40)], sizes).astype(np.dtypes.StringDType())


def test_limit_takes_whole_scenes_up_to_about_that_many() -> None:
    scenes = draw_scenes()
    largest = max(np.unique_counts(scenes).counts)
    for limit in (1, 17, 100, 500, len(scenes), len(scenes) + 1):
        chosen = choose_whole_scenes(scenes, limit)
        assert not set(scenes[chosen]) & set(scenes[~chosen])
        first = len(set(scenes[chosen])) == 1  # at least one scene, however large
        assert chosen.sum() <= limit or first
        assert chosen.sum() > limit - largest
    assert choose_whole_scenes(scenes, len(scenes)).all()


def test_larger_limit_contains_a_smaller_ones_scenes() -> None:
    scenes = draw_scenes()
    before = np.zeros(len(scenes), bool)
    for limit in range(1, len(scenes), 13):
        chosen = choose_whole_scenes(scenes, limit)
        assert not (before & ~chosen).any()
        before = chosen


def test_choice_depends_on_names_alone() -> None:
    """The same scenes whatever the order of tiles, and for ever: these three are what every release must choose."""
    scenes = draw_scenes()
    order = np.random.default_rng(fresh_seed()).permutation(len(scenes))
    assert set(scenes[choose_whole_scenes(scenes, 200)]) == set(scenes[order][choose_whole_scenes(scenes[order], 200)])
    numbered = np.array([str(i) for i in range(100)], np.dtypes.StringDType())
    assert numbered[choose_whole_scenes(numbered, 3)].tolist() == ["39", "51", "55"]

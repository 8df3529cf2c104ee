"""Options that cannot work, and where caches go when nothing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from extract.config import LAST_CACHE, ExtractConfig, remember_cache
from extract.errors import ConfigError


@pytest.mark.parametrize("changes, message", [
    ({"tiles": ""}, "TILES is not set: give gs://bucket/prefix or a directory"),
    ({"batch_size": 0}, "--batch-size 0: choose 1 to 256"),
    ({"batch_size": 257}, "--batch-size 257: choose 1 to 256"),
    ({"pooling": "cls+max"}, "--pooling cls.max: choose of cls, patch_mean, each once, joined by"),
    ({"pooling": "cls+cls"}, "--pooling cls.cls: choose of cls, patch_mean"),
    ({"pooling": ""}, "--pooling : choose of cls, patch_mean"),
    ({"workers": -1}, "--workers -1: 0 or more"),
    ({"limit": 0}, "--limit 0: at least 1 tile"),
    ({"limit": -5}, "--limit -5"),
    ({"max_quarantined": -0.1}, "a share of tiles, 0 to 1"),
    ({"max_quarantined": 1.5}, "a share of tiles, 0 to 1"),
    ({"max_quarantined": float("nan")}, "a share of tiles, 0 to 1"),
])  # fmt: skip
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExtractConfig(**{"tiles": "gs://bucket/x", **changes})


@pytest.mark.parametrize("changes", [
    {"batch_size": 1}, {"batch_size": 256}, {"workers": 0}, {"limit": 1}, {"max_quarantined": 0.0},
    {"max_quarantined": 1.0},
])  # fmt: skip
def test_edges_are_accepted(changes: dict[str, Any]) -> None:
    ExtractConfig(tiles="gs://bucket/x", **changes)


@pytest.mark.parametrize("tiles, backbone, limit, expected", [
    ("gs://bucket/xview_tiled/train", "vitl16", None, "cache/xview_tiled-train-vitl16-512"),
    ("gs://bucket/xview_tiled/train/", "vitl16", 500, "cache/xview_tiled-train-vitl16-512-limit500"),
    ("gs://bucket/a/b/c/train", "vitl16", None, "cache/c-train-vitl16-512"),
    ("gs://bucket", "vitl16", None, "cache/bucket-vitl16-512"),
    ("data/train", "some/checkpoint", None, "cache/data-train-checkpoint-512"),
    ("../data/./train", "org/model", None, "cache/data-train-model-512"),
])  # fmt: skip
def test_default_place_of_a_cache(tiles: str, backbone: str, limit: int | None, expected: str) -> None:
    assert ExtractConfig(tiles=tiles, backbone=backbone, limit=limit).cache_url(512) == expected


def test_cache_goes_where_it_was_asked() -> None:
    assert ExtractConfig(tiles="t", cache="gs://bucket/cache/").cache_url(64) == "gs://bucket/cache"


def test_cache_written_last_is_remembered_but_for_the_demos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remember_cache("cache/demo/train")
    assert not LAST_CACHE.exists()
    remember_cache("gs://bucket/cache")
    remember_cache("cache/demo/train")
    assert LAST_CACHE.read_text() == "gs://bucket/cache\n"

"""Tiles, a checkpoint and a cache to examine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, seed = tmp_path_factory.mktemp("doctor"), fresh_seed()
    plant_tiles(root / "tiles", scenes=8, per_scene=4, seed=seed)
    make_checkpoint(root / "small", seed=seed)
    extract_cache(root / "tiles", root / "cache", root / "small")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"

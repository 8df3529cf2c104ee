"""A cache, its tiles and its checkpoint for every command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.command_line.commands import QUICK
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 12 scenes, a checkpoint, their cache, and a head trained on it in `work`."""
    root = tmp_path_factory.mktemp("made")
    seed = fresh_seed()
    plant_tiles(root / "tiles", per_scene=5, seed=seed)
    extract_cache(root / "tiles", root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    (root / "work").mkdir()
    head = run_train(root / "work", "head", "--cache", root / "cache", *QUICK)
    assert head.status == 0, head.err
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "work", tmp_path / "work", symlinks=True))

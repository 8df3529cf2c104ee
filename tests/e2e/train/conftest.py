"""Caches that the real extraction made, and a working directory with a finished head run and a fine-tuned one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.train.recompute import EMPTY, QUICK, UNREADABLE
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles with one unreadable, one artefact and one unknown id; three sets of tiles, a checkpoint and caches."""
    root = tmp_path_factory.mktemp("train")
    seed = fresh_seed()
    backbone = make_checkpoint(root / "checkpoint", seed=seed)
    tiles = plant_tiles(root / "tiles", scenes=13, per_scene=9, seed=seed, empty=EMPTY, bare=True)
    (tiles / UNREADABLE).write_bytes(b"\x89PNG and no more")
    with (tiles / "labels" / "s05_1.txt").open("a") as stream:
        stream.write("75 0.5 0.5 0.1 0.1\n99 0.5 0.5 0.1 0.1\n")
    plant_tiles(root / "val-tiles", scenes=4, per_scene=8, seed=seed + 1, prefix="v", empty=3)
    plant_tiles(root / "test-tiles", scenes=4, per_scene=8, seed=seed + 2, prefix="t", empty=2)
    for name in ("tiles", "val-tiles", "test-tiles"):
        extract_cache(root / name, root / name.replace("tiles", "cache"), backbone)
    return root


@pytest.fixture(scope="session")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished head run and a fine-tuned one, of all defaults that matter."""
    root = tmp_path_factory.mktemp("work")
    head = run_train(root, "head", "--cache", made / "cache", *QUICK)
    assert head.status == 0, head.err
    (root / "head.out").write_text(head.out)
    finetune = run_train(root, "finetune", "--cache", made / "cache", "--workers", 0, "--epochs", 2, "--device", "cpu")
    assert finetune.status == 0, finetune.err
    (root / "finetune.out").write_text(finetune.out)
    return root


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A copy of that directory, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "work", symlinks=True))

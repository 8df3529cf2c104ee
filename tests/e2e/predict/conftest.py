"""Runs of a head and of fine-tuning, and inputs of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.predict.predictions import LEFTS, SCENE, TOPS, UTM33, write_image, write_raster
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head on a float32 cache and a run fine-tuned from another on a bf16 one, both exported; odd tiles; a scene."""
    root = tmp_path_factory.mktemp("predict")
    seed = fresh_seed()
    checkpoint = make_checkpoint(root / "checkpoint", seed=seed)
    plant_tiles(root / "tiles", scenes=6, per_scene=5, seed=seed)
    extract_cache(root / "tiles", root / "cache", checkpoint)
    extract_cache(root / "tiles", root / "half", checkpoint, precision="bf16")
    for command, *options in (
        ("head", "--cache", "cache", "--epochs", 3, "--features", "cls+patch_mean"),
        ("head", "--cache", "half", "--epochs", 1, "--run-dir", "runs/half"),
        # Large steps: weights that were rounded must show.
        ("finetune", "--cache", "half", "--head-run", "runs/half", "--unfreeze", 2, "--epochs", 1, "--workers", 0,
         "--backbone-lr", 3e-3),
    ):  # fmt: skip
        done = run_train(root, command, *options, "--device", "cpu")
        assert done.status == 0, done.err
    for run in ("head", "finetune"):
        done = run_train(root, "export", "--run-dir", f"runs/{run}", "--out", f"exports/{run}", "--no-onnx")
        assert done.status == 0, done.err
    rng = np.random.default_rng(seed)
    (root / "odd").mkdir()
    for number in range(37):  # a batch of 32, and one of 5
        height, width = (int(n) for n in rng.integers(30, 120, 2))
        write_image(root / "odd" / f"{number:02d}.png", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels = rng.integers(0, 256, (*SCENE, 3), dtype=np.uint8)
    write_raster(root / "scene.tif", pixels, crs="EPSG:32633", transform=UTM33)
    (root / "windows").mkdir()
    for row, top in enumerate(TOPS):
        for column, left in enumerate(LEFTS):
            write_image(root / "windows" / f"{row}_{column}.png", pixels[top : top + 64, left : left + 64])
    return root

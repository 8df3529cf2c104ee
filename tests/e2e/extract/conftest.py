"""Checkpoints, buckets of tiles, and a cache that nothing disturbed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from extract.config import ExtractConfig
from tests.checkpoints import make_checkpoint
from tests.e2e.extract.extraction import PROJECT_ROOT, SLOW, TILES
from tests.planted import fresh_seed
from tests.tiles import (
    Objects,
    draw_objects,
    run_extract,
    upload,
)


@pytest.fixture(scope="session")
def env(gcs_server: str) -> dict[str, str]:
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "STORAGE_EMULATOR_HOST": gcs_server}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "plain": make_checkpoint(root / "plain", seed=fresh_seed()),
        "gated": make_checkpoint(root / "gated", seed=fresh_seed(), use_gated_mlp=True),
    }


@pytest.fixture(scope="session")
def make_bucket(gcs_server: str) -> Any:
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    return lambda: client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")


@pytest.fixture(scope="session")
def objects() -> Objects:
    objects = draw_objects(np.random.default_rng(fresh_seed()), TILES)
    objects["images/103_3.png"] = b"no image"  # one of 560 is within what is accepted
    return objects


@pytest.fixture(scope="session")
def tiles(make_bucket: Any, objects: Objects) -> str:
    bucket = make_bucket()
    upload(bucket, objects, "xview/train/")
    return f"gs://{bucket.name}/xview/train"


@pytest.fixture(scope="session")
def undisturbed(
    env: dict[str, str], tiles: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A cache made by one rank of torchrun without interruption, and what was printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_extract(
        "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", "vectors", *SLOW, env=env, cwd=folder, nproc=1
    )
    assert result.returncode == 0, result.stderr
    return folder / "vectors", result.stdout


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """For runs in this process, which take a tenth of the time of one that starts its own."""
    monkeypatch.chdir(tmp_path)
    defaults = {"backbone": str(checkpoints["plain"]), "device": "cpu", "workers": 0, "precision": "float32"}
    return lambda tiles, **changes: ExtractConfig(tiles=str(tiles), **(defaults | changes))

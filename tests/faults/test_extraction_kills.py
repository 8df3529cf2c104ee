"""Extractions that are killed, restarted or stopped short: what is left is what an undisturbed one writes."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from google.cloud import storage

from tests.checkpoints import make_checkpoint
from tests.tiles import draw_objects, read_arrays, run_extract, write_directory

from .armed import Charge
from .extraction_kills import start_armed

TIMEOUT_S = 150


def run_kills(folder: Path, env: dict[str, str], kills: int, seed: int, cache: str | None = None) -> None:
    """In a process of its own, which forks the runs: this one has threads that no child may inherit."""
    command = [sys.executable, "-m", "tests.faults.extraction_kills", str(folder), str(kills), str(seed)]
    result = subprocess.run(
        [*command, *filter(None, [cache])],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    assert sum(row["survived"] for row in rows) == sum(row["tried"] for row in rows) == kills


def test_a_directory(tmp_path: Path, python_env: dict[str, str]) -> None:
    """Seed 153 has a rank and all ranks of torchrun killed, SIGTERM twice, and every named moment once."""
    run_kills(tmp_path, python_env, 10, 153)


def test_a_bucket(tmp_path: Path, bucket: storage.Bucket, python_env: dict[str, str]) -> None:
    run_kills(tmp_path, python_env, 8, 1, f"gs://{bucket.name}/cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seed = int(uuid.uuid4().int % 2**31)
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(seed), 100, size=32))
    make_checkpoint(tmp_path / "backbone", seed=seed, image_size=32)
    return tmp_path


def test_torchrun_restarts_a_killed_rank_and_goes_on(folder: Path, python_env: dict[str, str]) -> None:
    charge = Charge(str(folder / "marker"), "put", key="/commit/c/", nth=2, when="after")
    process = start_armed(folder, charge, "--nproc-per-node=2", "--max-restarts=1")
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert (folder / "marker").exists()
    assert process.returncode == 0, said
    result = run_extract(
        *("--tiles", "tiles", "--backbone", "backbone", "--cache", "undisturbed"), env=python_env, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    killed, undisturbed = read_arrays(folder / "killed"), read_arrays(folder / "undisturbed")
    for name in ("tile", "status", "label_ids"):
        np.testing.assert_array_equal(killed[name], undisturbed[name], err_msg=name)
    for name in ("cls", "patch_mean"):  # of other batches: a block was small in the one and not in the other
        np.testing.assert_allclose(killed[name], undisturbed[name], atol=4e-3, err_msg=name)

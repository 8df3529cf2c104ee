"""Extractions that are killed, restarted or stopped short: what is left is what an undisturbed one writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.cloud import storage

import cache_schema.root
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed
from tests.tiles import draw_objects, read_arrays, relative_differences, write_directory

from .armed import BLOCK_ROWS, Charge
from .extraction_kills import start_armed


def test_in_a_directory_and_in_a_bucket(tmp_path: Path, bucket: storage.Bucket, python_env: dict[str, str]) -> None:
    """One process without torchrun; `make soak` kills ranks and torchrun too.

    From a process of its own, which forks the runs: this one has threads that no child may inherit.
    """
    command = [sys.executable, "-m", "tests.faults.extraction_kills", tmp_path, "1", "5", "4"]
    result = subprocess.run(
        [*command, f"gs://{bucket.name}/cache"],
        env=python_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for rows, kills in zip(json.loads(result.stdout.splitlines()[-1]), (5, 4), strict=True):
        assert sum(row["survived"] for row in rows) == sum(row["tried"] for row in rows) == kills


def test_torchrun_restarts_a_killed_rank_and_goes_on(tmp_path: Path, python_env: dict[str, str]) -> None:
    seed = fresh_seed()
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(seed), 100, size=32))
    backbone = make_checkpoint(tmp_path / "backbone", seed=seed, image_size=32)
    charge = Charge(str(tmp_path / "marker"), "put", key="/commit/c/", nth=2, when="after")
    process = start_armed(tmp_path, charge, "--nproc-per-node=2", "--max-restarts=1")
    said, _ = process.communicate(timeout=150)
    assert (tmp_path / "marker").exists()
    assert process.returncode == 0, said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_schema.root, "choose_block_rows", lambda rows: BLOCK_ROWS)
        extract_cache(tmp_path / "tiles", tmp_path / "undisturbed", backbone, batch_size=32)
    killed, undisturbed = read_arrays(tmp_path / "killed"), read_arrays(tmp_path / "undisturbed")
    for name in ("tile", "status", "label_ids"):
        np.testing.assert_array_equal(killed[name], undisturbed[name], err_msg=name)
    for name in ("cls", "patch_mean"):  # ranks have fewer threads than one process, which shows in the last bits
        assert relative_differences(killed[name], undisturbed[name]).max() <= 1e-3, name

"""Extractions that are killed, restarted or stopped short: what is left is what an undisturbed one writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from google.cloud import storage

from tests.checkpoints import make_checkpoint
from tests.tiles import draw_objects, read_arrays, run_extract, write_directory

from .armed import ARMED, Charge, Fired

PROJECT_ROOT = Path(__file__).parents[2]
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
    run_kills(tmp_path, python_env, 6, 12, f"gs://{bucket.name}/cache")


def start_armed(folder: Path, env: dict[str, str], charge: Charge, *launch: str) -> subprocess.Popen[str]:
    arguments = ["--tiles", "tiles", "--backbone", "backbone", "--cache", "killed", "--device", "cpu", "--workers", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "extract.launch", *launch, "-m", "tests.faults.armed", "run", *arguments],
        env={**env, ARMED: json.dumps(asdict(charge))},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seed = int(uuid.uuid4().int % 2**31)
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(seed), 100, size=32))
    make_checkpoint(tmp_path / "backbone", seed=seed, image_size=32)
    return tmp_path


def test_torchrun_restarts_a_killed_rank_and_goes_on(folder: Path, python_env: dict[str, str]) -> None:
    charge = Charge(str(folder / "marker"), "put", key="/commit/c/", nth=2, when="after")
    process = start_armed(folder, python_env, charge, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
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


def test_a_hung_rank_ends_the_job_with_a_message(folder: Path, python_env: dict[str, str]) -> None:
    charge = Charge(str(folder / "marker"), "put", key="/commit/c/", signal=signal.SIGSTOP)
    process = start_armed(folder, python_env, charge, "--standalone", "--nproc-per-node=2")
    assert process.stdout
    said = []
    try:
        for line in process.stdout:  # ends with the processes, or with this test's time
            said.append(line)
            if "lost touch with the other ranks" in line:
                break
        assert said[-1].startswith("error: rank"), "".join(said)
    finally:
        hung = Fired(**json.loads((folder / "marker").read_text()))
        for pid in hung.pids[1:]:
            try:
                os.kill(pid, signal.SIGKILL)  # or torchrun would wait half a minute for the stopped one
            except ProcessLookupError:
                continue
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0

"""Extractions that are killed, restarted or stopped short: what is left is what an undisturbed one writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from google.cloud import storage

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
    """One process without torchrun; `make soak` kills ranks and torchrun too."""
    run_kills(tmp_path, python_env, 8, 1)


def test_a_bucket(tmp_path: Path, bucket: storage.Bucket, python_env: dict[str, str]) -> None:
    run_kills(tmp_path, python_env, 8, 1, f"gs://{bucket.name}/cache")

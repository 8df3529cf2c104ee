"""Extractions that are killed or told to stop go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import CacheNotFoundError, CacheRoot, open_cache
from tests.e2e.extract.extraction import BLOCKS, SLOW, TILES, assert_same_cache, extract
from tests.tiles import (
    extract_command,
)


def find_descendants(pid: int) -> list[int]:
    """The process and everything it started, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def start_and_wait_for_a_commit(
    tiles: str, checkpoint: Path, env: Mapping[str, str], folder: Path, nproc: int | None, workers: int = 1
) -> subprocess.Popen[str]:
    command = extract_command(
        "--tiles", tiles, "--backbone", checkpoint, "--cache", "vectors", *SLOW, "--workers", str(workers), nproc=nproc
    )
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=env, cwd=folder, text=True, start_new_session=True, **streams)
    deadline = time.monotonic() + 90
    while not list(folder.glob("vectors/*.zarr/commit/c/*/0")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def find_commits(folder: Path) -> dict[Path, int]:
    """Everything written for committed blocks: when it was written, by path."""
    blocks = [path.parent.name for path in folder.glob("vectors/*.zarr/commit/c/*/0")]
    files = [path for path in folder.glob("vectors/*.zarr/*/c/**/*") if path.is_file()]
    chunks = [path for path in files if path.parts[path.parts.index("c") - 1] in ("cls", "label_ids", "commit")]
    return {path: path.stat().st_mtime_ns for path in chunks if path.parts[path.parts.index("c") + 1] in blocks}


def test_killed_run_is_resumed_on_another_world_size(
    undisturbed: tuple[Path, str], tiles: str, checkpoints: dict[str, Path], env: dict[str, str], tmp_path: Path
) -> None:
    process = start_and_wait_for_a_commit(tiles, checkpoints["plain"], env, tmp_path, 2, workers=0)
    for pid in find_descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    committed = find_commits(tmp_path)
    done = sum(path.parts[-4] == "commit" for path in committed)
    assert 1 <= done < BLOCKS
    assert not (tmp_path / "vectors/current").exists()
    with pytest.raises(CacheNotFoundError, match="rows are missing"):
        open_cache(str(tmp_path / "vectors"))

    # The same command with another batch size, which must not count: the version keeps its own.
    other = [*SLOW[:2], "--batch-size", "32", *SLOW[4:]]
    result = extract(tmp_path, "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", "vectors", *other)
    assert result.status == 0, result.err
    # Blocks are of 256, 256 and 48 rows, and which of them were done is the race's to say.
    to_do = re.search(r"^(\d+) to do in float32 -> vectors", result.out, re.MULTILINE)
    assert to_do
    assert int(to_do[1]) < TILES
    assert "differs from the run that began this version: batch_size: 4, not 32" in result.out
    assert_same_cache(tmp_path / "vectors", undisturbed[0])
    assert open_cache(str(tmp_path / "vectors")).recorded.batch_size == 4
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, "committed blocks are not redone"


@pytest.mark.parametrize("number, nproc", [(signal.SIGTERM, 2), (signal.SIGINT, None)])
def test_told_to_stop_it_says_how_far_it_came(
    tiles: str, checkpoints: dict[str, Path], env: dict[str, str], tmp_path: Path, number: int, nproc: int | None
) -> None:
    """Ctrl-C goes to every process of the terminal, what a scheduler sends to the launcher alone."""
    process = start_and_wait_for_a_commit(tiles, checkpoints["plain"], env, tmp_path, nproc)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = len(list(tmp_path.glob("vectors/*.zarr/commit/c/*/0")))
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last == (
        f"stopped by {signal.Signals(number).name}: {done} of {BLOCKS} blocks of vectors are committed; "
        "the same command continues from there"
    )
    version_id = CacheRoot(str(tmp_path / "vectors")).versions()[0]
    version = CacheRoot(str(tmp_path / "vectors")).open_version(version_id)
    assert [version.check_block(int(block)) for block in np.flatnonzero(version.committed())] == [None] * done

"""Two extractions of one cache: the second is told, or goes on at once where the first was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cache_schema import CacheRoot, open_cache, own_version
from cache_schema.upkeep.lock import SUFFIX
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.tiles import extract_command, run_extract

SLOW = ("--image-size", "160", "--batch-size", "4", "--precision", "float32", "--workers", "0")


def wait_for_commits(process: subprocess.Popen[bytes], cache: Path, blocks: int) -> None:
    deadline = time.monotonic() + 90
    while len(list(cache.glob("*.zarr/commit/c/*/0"))) < blocks:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_is_told_and_after_a_kill_goes_on_at_once(
    python_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = fresh_seed()
    tiles = plant_tiles(tmp_path / "tiles", scenes=56, per_scene=10, seed=seed)  # three blocks
    backbone = make_checkpoint(tmp_path / "small", seed=seed)
    cache = tmp_path / "vectors"
    arguments = ("--tiles", tiles, "--backbone", backbone, "--cache", cache, *SLOW)
    first = subprocess.Popen(
        extract_command(*arguments), env=python_env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_commits(first, cache, 1)
        os.kill(first.pid, signal.SIGSTOP)  # so that it cannot be done before the second has started
        second = run_extract(*arguments, env=python_env, cwd=tmp_path)
        version_id = CacheRoot(str(cache)).versions()[0]
        assert second.returncode == 1
        assert second.stdout == ""
        assert second.stderr.startswith(f"error: version {version_id} is being written by process {first.pid} on ")
        assert second.stderr.count("\n") == 1
        os.kill(first.pid, signal.SIGCONT)
        wait_for_commits(first, cache, 2)
    finally:
        first.kill()
        first.wait()
    assert f'"pid": {first.pid}' in (cache / f"{version_id}{SUFFIX}").read_text()
    capsys.readouterr()
    extract_cache(tiles, cache, backbone, image_size=160, batch_size=4)
    out = capsys.readouterr().out
    assert f"process {first.pid} on " in out
    assert f"is gone: version {version_id} is taken over from it\n" in out
    assert "waiting 120 s" not in out
    version = open_cache(str(cache))
    assert version.check_seal()
    assert [version.check_block(block) for block in range(3)] == [None] * 3
    assert version.read_rows().embedded.all()
    assert not list(cache.glob(f"*{SUFFIX}*"))


def test_a_finished_version_needs_no_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = fresh_seed()
    tiles = plant_tiles(tmp_path / "tiles", scenes=3, per_scene=4, seed=seed)
    backbone = make_checkpoint(tmp_path / "small", seed=seed)
    cache = extract_cache(tiles, tmp_path / "vectors", backbone)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors").rglob("*")}
    with own_version(cache, open_cache(cache).id):
        monkeypatch.setattr("cache_schema.upkeep.lock._is_running", lambda pid, born: True)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        extract_cache(tiles, cache, backbone)
    assert "0 to do" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors").rglob("*")}
    assert {path for path in after if after[path] != before.get(path)} == set()
    assert np.all(open_cache(cache).read_rows().embedded)

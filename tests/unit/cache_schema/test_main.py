"""python -m cache_schema info|verify, as a user runs it; diff and gc have files of their own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema import CacheRoot
from tests.caches import delete, fill_cache, get_bytes, make_values, put_bytes

ROWS = 300


Run = Callable[..., Any]


def test_exit_statuses_and_streams_of_the_real_command(tmp_path: Path, python_env: dict[str, str]) -> None:
    def call(*args: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "cache_schema", *args]
        done = subprocess.run(command, env=python_env, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    nothing = str(tmp_path / "cache")
    expected = f"error: no cache at {nothing}: run `make extract` first, or check CACHE\n"
    assert call("verify", nothing) == (1, "", expected)
    version = CacheRoot(nothing).open_version(fill_cache(nothing, ROWS), read_only=False)
    assert call("verify", nothing)[::2] == (0, "")
    version.reopen_blocks([0])
    assert call("verify", nothing)[::2] == (3, "")


def test_info_of_a_finished_cache(cache_url: str, run: Run) -> None:
    other = fill_cache(cache_url, 20)
    version = fill_cache(cache_url, ROWS)
    done = run("info", cache_url)

    assert done.returncode == 0
    assert done.stderr == ""
    lines = {line[:15].strip(): line[15:] for line in done.stdout.splitlines()}
    assert lines["version"] == f"{version} (sealed)"
    assert lines["rows"] == "300: 273 embedded, 27 undecodable; 60 without a label file"
    assert lines["vectors"] == "cls + patch_mean, 8 x float16, 9,600 bytes"
    assert lines["blocks"] == "2 of 256 rows"
    assert lines["backbone"] == "tiny, 4 layers, float32"
    assert lines["image size"] == "64 px, bilinear-antialias"
    assert lines["other versions"] == other


def test_info_as_json(tmp_path: Path, run: Run) -> None:
    version = fill_cache(str(tmp_path), ROWS)
    done = run("info", str(tmp_path), "--json")

    summary = json.loads(done.stdout)
    assert summary["version"] == version
    assert summary["sealed"] is True
    assert summary["status"] == {"embedded": 273, "undecodable": 27}
    assert summary["provenance"]["pooling"] == ["cls", "patch_mean"]
    assert summary["recorded"]["libraries"] == {"zarr": "3.1.6"}


def test_info_of_an_unfinished_cache(tmp_path: Path, run: Run) -> None:
    version = CacheRoot(str(tmp_path)).open_version(fill_cache(str(tmp_path), ROWS, seal=False), read_only=False)
    version.reopen_blocks([1])
    done = run("info", str(tmp_path))

    assert done.returncode == 0
    assert "NOT FINISHED" in done.stdout
    assert "300: 44 pending, 233 embedded, 23 undecodable" in done.stdout


def test_info_reads_no_vectors_and_leaves_out_chunks_that_cannot_be_read(cache_url: str, run: Run) -> None:
    version = fill_cache(cache_url, ROWS)
    before = run("info", cache_url).stdout
    for array in ("cls", "patch_mean"):
        put_bytes(cache_url, f"{version}.zarr/{array}/c/0/0", b"no vectors")
    assert run("info", cache_url).stdout == before

    for key in ("status/c/0", "label_ids/c/1/0"):
        chunk = get_bytes(cache_url, f"{version}.zarr/{key}") or b""
        put_bytes(cache_url, f"{version}.zarr/{key}", bytes([chunk[0] ^ 1]) + chunk[1:])
    done = run("info", cache_url)
    assert done.returncode == 0
    assert "300: 256 pending, 40 embedded, 4 undecodable" in done.stdout


def test_info_of_another_version(tmp_path: Path, run: Run) -> None:
    other = fill_cache(str(tmp_path), 20)
    fill_cache(str(tmp_path), ROWS)
    assert f"{other} (sealed)" in run("info", str(tmp_path), "--version", other).stdout


def test_verify_a_sound_cache(cache_url: str, run: Run) -> None:
    version = fill_cache(cache_url, ROWS)
    done = run("verify", cache_url)

    assert done.returncode == 0
    assert done.stdout == (
        f"{cache_url}: version {version} is sound: 300 rows (273 embedded, 27 undecodable) in 2 blocks, sealed\n"
    )


def test_verify_an_unfinished_cache(cache_url: str, run: Run) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    version.reopen_blocks([1])
    done = run("verify", cache_url)

    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "1 of 2 blocks (44 rows) are not committed yet",
        "the version is not sealed",
        f"{cache_url}: no block is damaged: `make extract` repairs or finishes the rest",
    ]


def test_verify_names_every_damaged_block(tmp_path: Path, run: Run) -> None:
    url = str(tmp_path)
    version = fill_cache(url, 700)
    chunk = get_bytes(url, f"{version}.zarr/cls/c/1/0") or b""
    put_bytes(url, f"{version}.zarr/cls/c/1/0", chunk[:-1])
    delete(url, f"{version}.zarr/status/c/2")
    done = run("verify", url)

    assert done.returncode == 3
    lines = [
        "block 1 (rows 256-511): array cls: its chunk has 4,099 bytes instead of 4,100",
        "block 2 (rows 512-699): array status: its chunk is missing",
    ]
    advice = f"{url}: damaged: 2 blocks: `verify --repair` lets `make extract` redo them"
    assert done.stdout.splitlines() == [*lines, advice]
    assert done.stderr == ""

    repaired = run("verify", url, "--repair")
    assert repaired.returncode == 3
    assert repaired.stdout.splitlines() == [
        *lines,
        "cleared the seal and the commits of 2 blocks (444 rows)",
        "to redo what is missing, run the `make extract` that made it: TILES=gs://bucket/tiles BACKBONE=tiny "
        f"CACHE={url} IMAGE_SIZE=64",
    ]
    assert run("verify", url).stdout.splitlines()[0] == "2 of 3 blocks (444 rows) are not committed yet"


def test_verify_a_seal_of_other_commits(tmp_path: Path, run: Run) -> None:
    version = CacheRoot(str(tmp_path)).open_version(fill_cache(str(tmp_path), ROWS), read_only=False)
    version.write_block(0, make_values(version.layout, 0, seed=1))
    done = run("verify", str(tmp_path))

    assert done.returncode == 3
    assert done.stdout.splitlines()[0] == "array seal: does not match the table or the commits"


def test_verify_another_versions_table(tmp_path: Path, run: Run) -> None:
    """A version under another's name is not what its id says."""
    version = fill_cache(str(tmp_path), ROWS)
    (tmp_path / f"{version}.zarr").rename(tmp_path / "00000000000000000000.zarr")
    done = run("verify", str(tmp_path), "--version", "0" * 20)

    assert done.returncode == 3
    assert "does not match the id of this version" in done.stdout


def test_verify_a_damaged_table(tmp_path: Path, run: Run) -> None:
    version = fill_cache(str(tmp_path), ROWS)
    (tmp_path / f"{version}.zarr" / "tile" / "c" / "0").write_bytes(b"")
    done = run("verify", str(tmp_path))

    assert done.returncode == 3
    table = "tile table (rows 0-299): array tile: its chunk is empty (0 bytes): `make extract` repairs it"
    assert done.stdout.splitlines()[0] == table
    info = run("info", str(tmp_path))
    assert info.returncode == 1
    assert info.stderr.startswith("error: tile table of")
    assert info.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "verify"])
def test_no_cache_is_one_line(cache_url: str, run: Run, command: str) -> None:
    done = run(command, cache_url)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: no cache at {cache_url}: run `make extract` first, or check CACHE\n"


def test_a_file_is_no_cache(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("x")
    done = run("info", str(tmp_path / "file"))

    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_no_bucket_is_one_line(gcs_server: str, run: Run) -> None:
    done = run("info", "gs://there-is-no-such-bucket/cache")

    assert gcs_server
    assert done.returncode == 1
    assert "no bucket there-is-no-such-bucket" in done.stderr
    assert done.stderr.count("\n") == 1

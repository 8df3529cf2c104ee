"""Versions that nothing refers to any more, and what keeps the others."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.cloud import storage

from cache_schema import CacheError, CacheRoot, open_cache
from cache_schema.upkeep.gc import describe_age, find_references, list_versions, remove_versions
from tests.caches import delete, fill_cache, get_all, put_bytes

Run = Callable[..., Any]
ROWS = 300


def write_run(path: Path, version: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"config": {"cache": "cache/x"}, "version": version}))
    return path


def test_only_what_nothing_refers_to_is_removed(cache_url: str, tmp_path: Path, run: Run) -> None:
    trained, doomed, current = (fill_cache(cache_url, ROWS, depth=depth) for depth in (4, 5, 6))
    unfinished = fill_cache(cache_url, ROWS, depth=7, seal=False)
    head = write_run(tmp_path / "runs" / "trial" / "head-001", trained)
    before = get_all(cache_url)

    listed = run("gc", cache_url, "--runs", str(tmp_path / "runs"))
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = {line.split()[0]: line for line in listed.stdout.splitlines()[:4]}
    assert lines[trained].endswith(f"stays: {head} was trained on it")
    assert lines[doomed].endswith("to remove")
    assert lines[current].endswith("stays: in use")
    assert lines[unfinished].endswith("stays: not finished (--unsealed)")
    assert listed.stdout.splitlines()[4] == "1 of 4 versions, 0.2 MiB to remove: --yes removes them"
    assert get_all(cache_url) == before

    removed = run("gc", cache_url, "--runs", str(tmp_path / "runs"), "--yes")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert removed.stdout.splitlines()[4] == "removed 1 of 4 versions, 0.2 MiB"
    assert get_all(cache_url) == {key: data for key, data in before.items() if not key.startswith(f"{doomed}.zarr/")}
    assert CacheRoot(cache_url).versions() == sorted([trained, current, unfinished])
    assert open_cache(cache_url).read_rows().missing == 0
    again = run("gc", cache_url, "--runs", str(tmp_path / "runs"), "--yes")
    assert again.stdout.splitlines()[3] == "removed 0 of 3 versions, 0.0 MiB"


def test_runs_in_a_bucket_and_on_the_disk_keep_theirs(bucket: storage.Bucket, tmp_path: Path, run: Run) -> None:
    cache = str(tmp_path / "cache")
    remote, local, doomed, _ = (fill_cache(cache, 20, depth=depth) for depth in (4, 5, 6, 7))
    place = f"gs://{bucket.name}/team/runs"
    bucket.blob("team/runs/head-001/config.json").upload_from_string(json.dumps({"version": remote}))
    bucket.blob("other/head-001/config.json").upload_from_string(json.dumps({"version": doomed}))
    write_run(tmp_path / "runs" / "head-001", local)
    done = run("gc", cache, "--runs", place, "--runs", str(tmp_path / "runs"), "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"stays: {place}/head-001 was trained on it" in done.stdout
    assert set(CacheRoot(cache).versions()) == {remote, local, open_cache(cache).id}


def test_the_newest_are_kept(cache_url: str) -> None:
    versions = [fill_cache(cache_url, 20, depth=depth) for depth in (4, 5, 6, 7)]
    listed = list_versions(CacheRoot(cache_url), {}, keep=2)

    assert [version.id for version in listed] == versions[::-1]
    kept = "among the 2 newest (--keep)"
    assert [version.kept for version in listed] == ["in use", kept, kept, None]
    assert [version.kept is None for version in list_versions(CacheRoot(cache_url), {}, keep=9)] == [False] * 4


@pytest.mark.parametrize("state", ["unsealed", "creation interrupted", "damaged"])
def test_unfinished_versions_go_only_when_told(cache_url: str, state: str) -> None:
    version = fill_cache(cache_url, 20, depth=4, seal=False)
    current = fill_cache(cache_url, 20, depth=5)
    if state == "creation interrupted":
        delete(cache_url, f"{version}.zarr/commit/zarr.json")
    if state == "damaged":
        put_bytes(cache_url, f"{version}.zarr/zarr.json", b"{")
    root = CacheRoot(cache_url)

    assert all(found.kept for found in list_versions(root, {}))
    doomed = [found for found in list_versions(root, {}, unsealed=True) if not found.kept]
    assert [found.id for found in doomed] == [version]
    remove_versions(root, doomed)
    assert root.versions() == [current]


def test_a_sealed_version_stays_until_one_is_in_use(cache_url: str) -> None:
    """An extraction seals its version, then puts it into use."""
    fill_cache(cache_url, 20)
    delete(cache_url, "current")
    assert all(found.kept for found in list_versions(CacheRoot(cache_url), {}))


def test_what_came_into_use_meanwhile_stays(cache_url: str) -> None:
    first, _ = (fill_cache(cache_url, 20, depth=depth) for depth in (4, 5))
    root = CacheRoot(cache_url)
    doomed = [version for version in list_versions(root, {}) if version.kept is None]
    root.set_current(first)
    with pytest.raises(CacheError, match=f"version {first} of .* has just come into use"):
        remove_versions(root, doomed)
    assert first in root.versions()


def test_an_interrupted_removal_leaves_an_interrupted_creation(cache_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = (fill_cache(cache_url, 20, depth=depth) for depth in (4, 5))
    root = CacheRoot(cache_url)

    async def stop(prefix: str) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(root.store, "delete_dir", stop)
        with pytest.raises(RuntimeError):
            remove_versions(root, [version for version in list_versions(root, {}) if version.kept is None])
    assert first in root.versions()
    fill_cache(cache_url, 20, depth=4)
    assert open_cache(cache_url).read_rows().missing == 0


def test_a_broken_pointer_removes_nothing(tmp_path: Path, run: Run) -> None:
    url = str(tmp_path / "cache")
    versions = [fill_cache(url, 20, depth=depth) for depth in (4, 5)]
    put_bytes(url, "current", b"{")
    done = run("gc", url, "--yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert CacheRoot(url).versions() == sorted(versions)


def test_references_are_found_at_any_depth_and_behind_links(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / "runs" / name, version) for name, version in (("b/1", "x"), ("a", "x")))
    elsewhere = write_run(tmp_path / "elsewhere" / "head-001", "y")
    (tmp_path / "runs" / "moved").symlink_to(elsewhere)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "checkpoint").mkdir()
    (tmp_path / "runs" / "checkpoint" / "config.json").write_text("[]")
    references = find_references([str(tmp_path / "runs")])

    assert first.exists()
    assert references["x"] == str(second)
    assert os.path.realpath(references["y"]) == str(elsewhere)
    assert find_references([str(tmp_path / "none")]) == {}


@pytest.mark.parametrize("text", ["", '{"version": ', b"\xff\xfe"])
def test_a_run_that_cannot_be_read_stops_the_collection(tmp_path: Path, text: str | bytes, run: Run) -> None:
    config = write_run(tmp_path / "runs" / "head-001", "x") / "config.json"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    url = str(tmp_path / "cache")
    versions = [fill_cache(url, 20, depth=depth) for depth in (4, 5)]
    done = run("gc", url, "--runs", str(tmp_path / "runs"), "--yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {config} cannot be read, so the version it needs is unknown: fix it or remove that run\n"
    )
    assert CacheRoot(url).versions() == sorted(versions)


def test_runs_that_are_not_there_are_refused(tmp_path: Path, run: Run) -> None:
    fill_cache(str(tmp_path / "cache"), 20)
    done = run("gc", str(tmp_path / "cache"), "--runs", str(tmp_path / "typo"), "--yes")
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_size_and_age_of_a_version(cache_url: str) -> None:
    version = fill_cache(cache_url, 20)
    objects = {key: data for key, data in get_all(cache_url).items() if key.startswith(f"{version}.zarr/")}
    size, written = CacheRoot(cache_url).measure_version(version)
    assert size == sum(map(len, objects.values()))
    fill_cache(cache_url, 20, depth=5)
    assert CacheRoot(cache_url).measure_version(version) == (size, written)
    assert CacheRoot(cache_url).measure_version("0" * 20) == (0, 0)


def test_ages() -> None:
    seconds = (0, 59, 60, 3599, 3600, 7200, 86_400, 30 * 86_400)
    assert [describe_age(s) for s in seconds] == [
        *("new", "new", "1 minute old", "59 minutes old", "1 hour old", "2 hours old", "1 day old", "30 days old")
    ]

"""A bucket that changed since the last extraction: what is read and kept, and that it equals a fresh extraction."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

import cache_schema.root
from cache_schema import BlockValues, CacheRoot, Status, StorageError, Version, open_cache
from extract.__main__ import run as extract_command_line
from extract.config import ExtractConfig
from extract.errors import RunError
from extract.run import run_extraction
from tests.caches import get_bytes, put_bytes
from tests.checkpoints import make_checkpoint
from tests.faults.armed import BLOCK_ROWS
from tests.planted import fresh_seed, run_here
from tests.proxy import Proxy
from tests.tiles import Objects, cosines, draw_objects, draw_tile, list_tree, read_arrays, run_extract, upload

TILES = 70
"""Five blocks of `BLOCK_ROWS`, the last of them short."""
POOLED = ("cls", "patch_mean")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", seed=fresh_seed())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_schema.root, "choose_block_rows", lambda rows: BLOCK_ROWS)


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    defaults = {"backbone": str(checkpoint), "device": "cpu", "workers": 0, "precision": "float32", "batch_size": 8}
    defaults |= {"max_quarantined": 0.05}
    return lambda tiles, **changes: ExtractConfig(tiles=str(tiles), **(defaults | changes))


class Place:
    """Tiles in a directory or in a bucket, that can be changed."""

    def __init__(self, root: Path | storage.Bucket) -> None:
        self._root = root
        self.url = str(root) if isinstance(root, Path) else f"gs://{root.name}/t"
        self.objects: Objects = {}

    def put(self, objects: Objects) -> None:
        self.objects |= objects
        if isinstance(self._root, storage.Bucket):
            upload(self._root, objects, "t/")
            return
        for name, data in objects.items():
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            changed = path.stat().st_mtime_ns + 1000 if path.exists() else None
            path.write_bytes(data)
            if changed:  # whatever the clock of the file system can tell apart
                os.utime(path, ns=(changed, changed))

    def remove(self, *names: str) -> None:
        for name in names:
            del self.objects[name]
            if isinstance(self._root, storage.Bucket):
                self._root.blob("t/" + name).delete()
            else:
                (self._root / name).unlink()


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, gcs_server: str) -> Place:
    return Place(tmp_path / "tiles") if request.param == "directory" else Place(make_bucket())


@pytest.fixture
def in_bucket(gcs_server: str) -> Place:
    """Asked for before the proxy, which takes no uploads."""
    return Place(make_bucket())


def make_bucket() -> storage.Bucket:
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    return client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")


def tile(number: int) -> str:
    return f"images/{100 + number // 10}_{number % 10}.png"


def label(number: int) -> str:
    return f"labels/{100 + number // 10}_{number % 10}.txt"


LABEL = b"18 0.5 0.5 0.1 0.1\n"
NEW = [f"images/{name}.png" for name in ("0_1", "100_0a", "102_6a", "104_1a", "104_1b", "999_1", "999_2")]
CHANGED, RELABELLED, REMOVED = [3, 15, 16, 37, 69], [0, 10, 17, 50], [7, 22, 33, 63]
KEPT = TILES - len(CHANGED) - len(REMOVED)


def draw_bucket(rng: np.random.Generator) -> Objects:
    """Random tiles and labels; one label that will be emptied is not empty by chance, or nothing would change there."""
    return draw_objects(rng, TILES) | {label(RELABELLED[-1]): LABEL}


def change_everything(place: Place, rng: np.random.Generator) -> None:
    """In every block; new tiles before, between and after the old ones, so that rows move from block to block."""
    place.put({name: draw_tile(rng, 48) for name in NEW})
    place.put({name.replace("images", "labels").replace(".png", ".txt"): LABEL * 2 for name in NEW})
    place.put({tile(i): draw_tile(rng, 48) for i in CHANGED})
    place.put({label(3): LABEL * 5})  # a tile and its label at once
    place.put({label(i): LABEL * (7 + i) for i in RELABELLED[:-1]})
    place.put({label(RELABELLED[-1]): b""})
    place.remove(*(tile(i) for i in REMOVED))


def kept_rows(before: dict[str, Any], after: dict[str, Any], changed: list[str]) -> list[tuple[int, int]]:
    """Rows of the same name before and after, without those of `changed`."""
    old = {str(name): row for row, name in enumerate(before["tile"])}
    names = [str(name) for name in after["tile"]]
    return [(old[name], row) for row, name in enumerate(names) if name in old and name not in changed]


def assert_as_fresh(after: dict[str, npt.NDArray[Any]], fresh: dict[str, npt.NDArray[Any]]) -> None:
    assert after.keys() == fresh.keys()
    for name in after.keys() - {"commit", "seal", *POOLED}:
        np.testing.assert_array_equal(after[name], fresh[name], err_msg=name)
    embedded = after["status"] == Status.EMBEDDED
    for name in POOLED:
        assert cosines(after[name][embedded], fresh[name][embedded]).min() >= 0.9999
        assert np.isnan(after[name][~embedded]).all()


def assert_kept(before: dict[str, Any], after: dict[str, Any], rows: list[tuple[int, int]]) -> None:
    """Bit for bit: NaNs and all."""
    old, new = np.array(rows).T
    for name in POOLED:
        np.testing.assert_array_equal(after[name][new].view(np.uint16), before[name][old].view(np.uint16))
    np.testing.assert_array_equal(after["status"][new], before["status"][old])


def stain(cache: str) -> None:
    """Move a bit of every stored vector, digests made anew: what is kept can be told from what is computed."""
    root = CacheRoot(cache)
    version = root.open_version(open_cache(cache).id, read_only=False)
    version.reopen_blocks(range(version.layout.blocks))
    for block in range(version.layout.blocks):
        values = version.read_block(block)
        pooled = {name: (vectors.view(np.uint16) ^ 1).view(np.float16) for name, vectors in values.pooled.items()}
        blank = values.status != Status.EMBEDDED
        for name in pooled:
            pooled[name][blank] = np.nan
        version.write_block(block, BlockValues(pooled, values.label_ids, values.status))
    version.seal()


def test_every_kind_of_change_at_once(place: Place, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(fresh_seed())
    place.put(draw_bucket(rng) | {tile(20): b"no image"})
    run_extraction(config(place.url, cache="a"))
    stain("a")
    before, old = read_arrays("a"), open_cache("a").id
    change_everything(place, rng)
    capsys.readouterr()

    # Another size of batches is asked for: rows that are computed must not differ from those that are kept by it.
    run_extraction(config(place.url, cache="a", batch_size=5))
    output = capsys.readouterr().out
    assert f"since version {old}: 7 new, 5 changed, 4 removed, 4 relabelled, {KEPT - 4} kept\n" in output
    assert "differs from the run that made it: batch_size: 8, not 5\n" in output
    assert "12 to do in float32 -> a (version " in output
    assert f"{KEPT} rows kept from version {old}\n" in output
    assert re.search(r"^12 tiles in ", output, re.MULTILINE)
    after = open_cache("a")
    assert after.id != old
    assert after.recorded.batch_size == 8
    assert after.check_seal()
    assert [after.check_block(block) for block in range(after.layout.blocks)] == [None] * 5

    run_extraction(config(place.url, cache="fresh"))
    arrays, fresh = read_arrays("a"), read_arrays("fresh")
    assert open_cache("fresh").id == after.id
    assert_as_fresh(arrays, fresh)
    rows = kept_rows(before, arrays, [tile(i) for i in CHANGED])
    assert len(rows) == KEPT
    assert_kept(before, arrays, rows)
    # The version before is as it was, and no row of it was computed anew.
    assert open_cache("a", version=old).check_seal()
    assert (arrays["status"] == Status.UNDECODABLE).sum() == 1
    computed = [row for row, name in enumerate(arrays["tile"]) if name in [*NEW, *map(tile, CHANGED)]]
    assert relative(arrays["cls"][computed], fresh["cls"][computed]) <= 1e-3

    capsys.readouterr()
    run_extraction(config(place.url, cache="a"))
    output = capsys.readouterr().out
    assert "0 to do" in output
    assert "since version" not in output


def relative(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(a.astype(float) - b.astype(float)) / np.linalg.norm(b.astype(float)))


def asked_objects(proxy: Proxy) -> list[str]:
    """Names of the objects whose bytes were asked for, sorted."""
    paths = [unquote(urlsplit(path).path) for path in proxy.asked]
    names = [re.search(r"(images|labels)/[^/]+\.(png|txt)$", path) for path in paths]
    return sorted(match[0] for match in names if match)


def test_only_what_changed_is_read(in_bucket: Place, config: Any, proxy: Proxy) -> None:
    rng, place = np.random.default_rng(fresh_seed()), in_bucket
    place.put(draw_bucket(rng) | {tile(20): b"no image", tile(21): b"?"})
    proxy.choose_fault = lambda path: 404 if Proxy.reads(path, tile(30)) else None
    run_extraction(config(place.url, cache="a"))
    assert np.flatnonzero(read_arrays("a")["status"] == Status.GONE).tolist() == [30]
    change_everything(place, rng)
    place.put({tile(21): draw_tile(rng, 48)})
    proxy.choose_fault = lambda path: None
    proxy.asked.clear()

    run_extraction(config(place.url, cache="a"))
    images = [*NEW, *(tile(i) for i in (*CHANGED, 21, 30))]
    texts = [*(name.replace("images", "labels").replace(".png", ".txt") for name in images), *map(label, RELABELLED)]
    expected = [*images, *(name for name in texts if place.objects[name])]
    assert asked_objects(proxy) == sorted(expected)
    after = read_arrays("a")
    assert [str(name) for name in after["tile"][after["status"] != Status.EMBEDDED]] == [tile(20)]


def test_only_labels_changed(in_bucket: Place, config: Any, proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    place = in_bucket
    place.put(draw_objects(np.random.default_rng(fresh_seed()), 30))
    run_extraction(config(place.url, cache="a", unlabelled=True))
    before = read_arrays("a")
    place.put({label(4): LABEL * 3, label(5): b"car\n"})
    place.remove(label(6))
    proxy.asked.clear()
    capsys.readouterr()
    run_extraction(config(place.url, cache="a", unlabelled=True))
    assert asked_objects(proxy) == [label(4), label(5)]
    output = capsys.readouterr().out
    assert "0 new, 0 changed, 0 removed, 3 relabelled, 27 kept\n" in output
    assert re.search(r"^0 to do, \d+ s$", output, re.MULTILINE)
    assert f"4 label lines read, malformed ones among them: {label(5)}:1\n" in output
    after = read_arrays("a")
    assert_kept(before, after, [(row, row) for row in range(30)])
    assert [after["label_ids"][4, 18], after["label_ids"][5, 127], after["label_ids"][6].sum()] == [3, 1, 0]
    others = [row for row in range(30) if row not in (4, 5, 6)]
    np.testing.assert_array_equal(after["label_ids"][others], before["label_ids"][others])


def flip(cache: str, chunk: str) -> None:
    data = get_bytes(cache, chunk)
    assert data
    put_bytes(cache, chunk, data[:100] + bytes([data[100] ^ 1]) + data[101:])


def swap(cache: str, chunk: str) -> None:
    """Another block's chunk, with a checksum that is right."""
    data = get_bytes(cache, chunk.replace("/c/1/", "/c/0/"))
    assert data
    put_bytes(cache, chunk, data)


@pytest.mark.parametrize("damage", [flip, swap])
def test_a_damaged_block_is_not_trusted(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[str, str], None]
) -> None:
    rng = np.random.default_rng(fresh_seed())
    place = Place(tmp_path / "tiles")
    place.put(draw_bucket(rng))
    run_extraction(config(place.url, cache="a"))
    undamaged = read_arrays("a")
    stain("a")
    before, old = read_arrays("a"), open_cache("a").id
    damage("a", f"{old}.zarr/cls/c/1/0")
    place.put({"images/999_1.png": draw_tile(rng, 48), "labels/999_1.txt": LABEL})
    capsys.readouterr()
    run_extraction(config(place.url, cache="a"))
    assert f"{TILES - BLOCK_ROWS} rows kept from version {old}\n" in capsys.readouterr().out
    after = read_arrays("a")
    assert (after["status"] == Status.EMBEDDED).all()
    assert_kept(before, after, [(row, row) for row in (*range(BLOCK_ROWS), *range(2 * BLOCK_ROWS, TILES))])
    assert_kept(undamaged, after, [(row, row) for row in range(BLOCK_ROWS, 2 * BLOCK_ROWS)])


def test_stopped_in_between_it_goes_on(place: Place, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(fresh_seed())
    place.put(draw_bucket(rng))
    run_extraction(config(place.url, cache="a"))
    stain("a")
    before, old = read_arrays("a"), open_cache("a").id
    change_everything(place, rng)
    write = Version.write_block
    written: list[int] = []

    def write_one(version: Version, block: int, values: BlockValues) -> None:
        if written:
            raise StorageError("the disk is full")
        write(version, block, values)
        written.append(block)

    with monkeypatch.context() as patch:
        patch.setattr(Version, "write_block", write_one)
        with pytest.raises(StorageError, match="the disk is full"):
            run_extraction(config(place.url, cache="a"))
    assert open_cache("a").id == old
    assert open_cache("a").check_seal()
    (begun,) = [version for version in CacheRoot("a").versions() if version != old]
    assert CacheRoot("a").open_version(begun).committed().sum() == 1

    done = int(written.pop())
    chunks = list(Path("a").glob(f"{begun}.zarr/*/c/{done}/**/*"))
    times = {path: path.stat().st_mtime_ns for path in chunks if path.is_file()}
    assert times
    run_extraction(config(place.url, cache="a"))
    assert {path: path.stat().st_mtime_ns for path in times} == times, "what was committed is not redone"
    assert open_cache("a").id == begun
    after = read_arrays("a")
    assert_kept(before, after, kept_rows(before, after, [tile(i) for i in CHANGED]))
    run_extraction(config(place.url, cache="fresh"))
    assert_as_fresh(after, read_arrays("fresh"))


def test_losing_more_than_a_tenth_needs_a_word(config: Any, checkpoint: Path, tmp_path: Path) -> None:
    place = Place(tmp_path / "tiles")
    place.put(draw_objects(np.random.default_rng(fresh_seed()), 40))
    run_extraction(config(place.url, cache="a"))
    place.remove(*(tile(i) for i in range(4)))
    run_extraction(config(place.url, cache="a"))  # a tenth is not more than a tenth
    tenth = open_cache("a").id
    place.remove(*(tile(i) for i in range(10, 14)))
    there = list_tree(tmp_path)
    command = ("run", "--tiles", place.url, "--backbone", checkpoint, "--cache", "a", "--precision", "float32")
    command += ("--device", "cpu", "--workers", 0)
    refused = run_here(extract_command_line, tmp_path, *command)
    assert refused.status == 1
    assert refused.out == ""
    assert re.fullmatch(
        rf"error: 4 of the 36 tiles of version {tenth} in a are gone from {place.url}: check TILES, or continue "
        r"without them with ARGS=--yes\n",
        refused.err,
    )
    assert list_tree(tmp_path) == there
    assert open_cache("a").id == tenth
    accepted = run_here(extract_command_line, tmp_path, *command, "--yes")
    assert accepted.status == 0, accepted.err
    assert "0 new, 0 changed, 4 removed, 0 relabelled, 32 kept\n" in accepted.out
    assert open_cache("a").layout.rows == 32


def test_two_ranks(config: Any, checkpoint: Path, tmp_path: Path, python_env: dict[str, str], gcs_server: str) -> None:
    rng = np.random.default_rng(fresh_seed())
    place = Place(make_bucket())
    place.put(draw_bucket(rng))
    cache = f"gs://{make_bucket().name}/caches/a"
    run_extraction(config(place.url, cache=cache))
    stain(cache)
    before, old = read_arrays(cache), open_cache(cache).id
    change_everything(place, rng)
    result = run_extract(
        "--tiles", place.url, "--backbone", checkpoint, "--cache", cache, "--workers", 0,
        env=python_env | {"STORAGE_EMULATOR_HOST": gcs_server}, cwd=tmp_path, nproc=2, module="tests.faults.armed",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{KEPT} rows kept from version {old}\n" in result.stdout
    assert "12 to do in float32" in result.stdout, "auto keeps the precision of the rows it keeps"
    after = read_arrays(cache)
    assert_kept(before, after, kept_rows(before, after, [tile(i) for i in CHANGED]))
    run_extraction(config(place.url, cache="fresh"))
    assert_as_fresh(after, read_arrays("fresh"))


def test_rows_that_are_kept_fix_the_size_of_batches(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(fresh_seed())
    place = Place(tmp_path / "tiles")
    place.put(draw_objects(rng, 20))
    run_extraction(config(place.url, cache="a"))
    place.put({tile(3): draw_tile(rng, 48)})
    monkeypatch.setattr("extract.backbone.embed.TileEmbedder.fits", lambda self: self.batch_size <= 4)
    with pytest.raises(RunError, match="a batch of 8 tiles does not fit in memory, and the rows kept from version"):
        run_extraction(config(place.url, cache="a", batch_size=4))

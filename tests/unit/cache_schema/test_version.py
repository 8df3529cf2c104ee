"""A version, on disk and in a bucket: what is written, what is trusted, what a damaged chunk costs."""

import asyncio
import errno
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from zarr.storage import WrapperStore

from cache_schema import BlockValues, CacheRoot, IntegrityError, Status, StorageError, Version, open_cache
from tests.caches import (
    WIDTH,
    delete,
    fill_cache,
    get_bytes,
    in_both_places,
    make_provenance,
    make_recorded,
    make_table,
    make_values,
    put_bytes,
)

ROWS = 300  # blocks of 256 and of 44 rows
ARRAYS = ("cls", "patch_mean", "label_ids", "status")
TIMEOUT_S = 20

S = TypeVar("S", bound=WrapperStore[Any])


def chunk_key(version: str, array: str, block: int) -> str:
    return f"{version}.zarr/{array}/c/{block}" + ("" if array == "status" else "/0")


def create(url: str, rows: int = ROWS) -> Version:
    return CacheRoot(url).create_version(make_table(rows), make_provenance(), make_recorded())


def assert_equal(read: BlockValues, written: BlockValues) -> None:
    for name in ("cls", "patch_mean"):
        assert read.pooled[name].dtype == np.float16
        assert read.pooled[name].tobytes() == written.pooled[name].tobytes()
    assert read.label_ids.tobytes() == written.label_ids.tobytes()
    assert read.status.tobytes() == written.status.tobytes()


class CountingStore(WrapperStore[Any]):
    """Notes which chunks are read and written."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.reads: list[str] = []
        self.writes: list[str] = []

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        self.reads.append(key)
        return await super().get(key, *args, **kwargs)

    async def set(self, key: str, value: Any) -> None:
        self.writes.append(key)
        await super().set(key, value)


class MeetingStore(WrapperStore[Any]):
    """Holds each chunk of a block until all of them are being written, and notes what had ended when a commit began."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self._meeting = asyncio.Barrier(len(ARRAYS))
        self.ended: list[str] = []
        self.ended_at_commit: list[list[str]] = []

    async def set(self, key: str, value: Any) -> None:
        if "/commit/" in key:
            self.ended_at_commit.append(list(self.ended))
        else:
            await asyncio.wait_for(self._meeting.wait(), TIMEOUT_S)
            await asyncio.sleep(0.002 * len(key))  # they do not end together either
        await super().set(key, value)
        self.ended.append(key)


class RefusingStore(CountingStore):
    """Has no room for one key."""

    refused = ""

    async def set(self, key: str, value: Any) -> None:
        if key == self.refused:
            raise OSError(errno.ENOSPC, "no room")
        await super().set(key, value)


def watch(url: str, version_id: str, kind: type[S]) -> tuple[Version, S]:
    """A version opened to be written through such a store."""
    root = CacheRoot(url)
    root.store = store = kind(root.store)
    return root.open_version(version_id, read_only=False), store


# Writing and reading


def test_what_is_written_is_read(cache_url: str) -> None:
    version = create(cache_url)
    written = [make_values(version.layout, block) for block in range(2)]
    for block in (1, 0):
        version.write_block(block, written[block])
    version.seal()

    rows = CacheRoot(cache_url, read_only=True).open_version(version.id).read_rows()

    assert rows.status.tolist() == np.concatenate([values.status for values in written]).tolist()
    assert rows.embedded.sum() == 300 - 23 - 4
    assert rows.missing == 0
    assert rows.pooled["cls"].shape == (ROWS, WIDTH)
    assert np.isnan(rows.pooled["patch_mean"][~rows.embedded]).all()
    for block, part in enumerate([slice(0, 256), slice(256, 300)]):
        assert_equal(version.read_block(block), written[block])
        assert rows.pooled["cls"][part].tobytes() == written[block].pooled["cls"].tobytes()
        assert rows.label_ids[part].tobytes() == written[block].label_ids.tobytes()


def test_pending_blocks_read_as_pending(cache_url: str) -> None:
    version = create(cache_url)
    assert version.committed().tolist() == [False, False]
    version.write_block(1, make_values(version.layout, 1))

    assert version.committed().tolist() == [False, True]
    rows = version.read_rows()
    assert rows.missing == 256
    assert (rows.status[:256] == Status.PENDING).all()
    assert (rows.status[256:] != Status.PENDING).all()
    assert version.read_status().tolist() == rows.status.tolist()


def test_each_chunk_is_one_put_without_a_read_and_the_commit_is_last(cache_url: str) -> None:
    version, store = watch(cache_url, create(cache_url).id, CountingStore)
    store.reads.clear()
    for block in (0, 1):  # the second is short
        store.writes.clear()
        version.write_block(block, make_values(version.layout, block))
        *chunks, commit = store.writes
        assert sorted(chunks) == sorted(chunk_key(version.id, name, block) for name in ARRAYS)
        assert commit == chunk_key(version.id, "commit", block)
    assert [key for key in store.reads if "/c/" in key] == []
    # Metadata is read for the first block, and not again.
    assert sorted(store.reads) == sorted(f"{version.id}.zarr/{name}/zarr.json" for name in (*ARRAYS, "commit"))


def test_chunks_are_written_side_by_side_and_the_commit_when_all_are_there(cache_url: str) -> None:
    version, store = watch(cache_url, create(cache_url).id, MeetingStore)
    for block in (0, 1):
        store.ended.clear()
        version.write_block(block, make_values(version.layout, block))
        assert sorted(store.ended_at_commit.pop()) == sorted(chunk_key(version.id, name, block) for name in ARRAYS)
        assert version.check_block(block) is None


def test_values_that_equal_the_fill_value_are_written(cache_url: str) -> None:
    version = create(cache_url)
    blank = make_values(version.layout, 1)
    n = len(blank.status)
    status = np.full(n, Status.GONE, np.uint8)
    nan = {name: np.full((n, WIDTH), np.nan, np.float16) for name in blank.pooled}
    version.write_block(1, BlockValues(nan, np.zeros_like(blank.label_ids), status))

    for name in ARRAYS:
        assert get_bytes(cache_url, chunk_key(version.id, name, 1)) is not None
    assert version.check_block(1) is None
    assert (version.read_rows().status[256:] == Status.GONE).all()


def test_a_refused_block_leaves_no_trace(cache_url: str) -> None:
    version = create(cache_url)
    values = make_values(version.layout, 1)
    vectors = values.pooled["patch_mean"].copy()
    vectors[0, 0] = np.inf
    with pytest.raises(IntegrityError, match="row 256 is not finite"):
        version.write_block(1, replace(values, pooled={**values.pooled, "patch_mean": vectors}))

    assert [get_bytes(cache_url, chunk_key(version.id, name, 1)) for name in (*ARRAYS, "commit")] == [None] * 5


def test_a_scan_reads_a_few_blocks_at_a_time(cache_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, 700))
    asked: list[slice] = []
    read_values = Version._read_values

    def note(self: Version, rows: slice, arrays: Any) -> BlockValues:
        asked.append(rows)
        return read_values(self, rows, arrays)

    monkeypatch.setattr("cache_schema.version._SCAN_BYTES", 2 * 256 * version.layout.width * 2)
    monkeypatch.setattr(Version, "_read_values", note)
    status = version.read_status()
    assert sorted(asked, key=lambda rows: rows.start) == [slice(0, 512), slice(512, 700)]
    assert status.dtype == np.uint8
    assert status.tolist() == version.read_rows().status.tolist()

    asked.clear()
    part = version.read_status(range(1, 2))
    assert asked == [slice(256, 512)]
    assert part.tolist() == [0] * 256 + status[256:512].tolist() + [0] * 188


def test_a_scan_holds_on_to_nothing(cache_url: str) -> None:
    """What `take` fills may be hundreds of megabytes, which must not wait for the garbage collector."""

    class Take:
        def __call__(self, block: int, values: BlockValues) -> None:
            self.last = values

    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, 300))
    take = Take()
    alive = weakref.ref(take)
    gc.disable()
    try:
        version.scan(take)
        assert take.last is not None
        del take
        assert alive() is None
    finally:
        gc.enable()


def test_vectors_of_a_block_are_read_again_alone(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, 700))
    read = version.open_pooled(["patch_mean", "cls"])
    for block in (2, 0, 2):
        first, second = read(block)
        expected = version.read_block(block).pooled
        np.testing.assert_array_equal(first, expected["patch_mean"])
        np.testing.assert_array_equal(second, expected["cls"])
    put_bytes(cache_url, f"{version.id}.zarr/cls/c/1/0", b"no chunk")
    with pytest.raises(IntegrityError, match="array cls cannot be read"):
        read(1)
    with pytest.raises(IntegrityError, match="array max cannot be read"):
        version.open_pooled(["cls", "max"])


def test_a_failed_write_leaves_the_block_pending(cache_url: str) -> None:
    version, store = watch(cache_url, create(cache_url).id, RefusingStore)
    old, new = make_values(version.layout, 0), make_values(version.layout, 0, seed=1)
    version.write_block(0, old)
    for name in (*ARRAYS, "commit"):
        store.refused = chunk_key(version.id, name, 0)
        store.writes.clear()
        with pytest.raises(StorageError, match="No space left on device: free space"):
            version.write_block(0, new)
        # The others are written, but no commit.
        assert set(store.writes) == {chunk_key(version.id, other, 0) for other in ARRAYS if other != name}
        assert version.read_rows().missing == ROWS, f"{name} was refused"
        assert version.check_block(0) == "its values do not match its digest"
    store.refused = ""
    version.write_block(0, new)
    assert version.check_block(0) is None


def test_two_writers_of_different_blocks(cache_url: str) -> None:
    left, right = create(cache_url), create(cache_url)
    left.write_block(0, make_values(left.layout, 0))
    right.write_block(1, make_values(right.layout, 1))

    assert left.committed().all()
    assert [left.check_block(block) for block in (0, 1)] == [None, None]


# The seal


def test_sealing(cache_url: str) -> None:
    version = create(cache_url)
    version.write_block(0, make_values(version.layout, 0))
    with pytest.raises(IntegrityError, match="1 of 2 blocks are not committed"):
        version.seal()
    assert not version.sealed
    version.write_block(1, make_values(version.layout, 1))
    assert not version.sealed
    version.seal()

    assert version.sealed
    assert version.check_seal()


def test_the_seal_sees_another_commit_and_another_generation(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    version.write_block(1, make_values(version.layout, 1, seed=1))
    assert not version.check_seal()
    version.write_block(1, make_values(version.layout, 1))
    assert version.check_seal()
    version.write_generation(make_table(ROWS, generation=2).generation)
    assert not version.check_seal()


def test_reopened_blocks_are_pending_and_the_seal_is_gone(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    version.reopen_blocks([1])

    assert not version.sealed
    assert version.committed().tolist() == [True, False]
    assert version.read_rows().missing == 44
    version.write_block(1, make_values(version.layout, 1, seed=1))
    version.seal()
    assert open_cache(cache_url).read_rows().missing == 0


# The table


def test_the_table_comes_back(cache_url: str) -> None:
    table = create(cache_url).read_table()

    expected = make_table(ROWS)
    assert table.full_digest() == expected.full_digest()
    assert table.labelled.tolist() == expected.labelled.tolist()


def test_resuming_follows_the_listings_generation_until_sealed(cache_url: str) -> None:
    def resume(generation: int) -> Version:
        table = make_table(ROWS, generation=generation)
        return CacheRoot(cache_url).create_version(table, make_provenance(), make_recorded())

    first = create(cache_url)
    assert resume(2).read_table().generation[0] == 2000
    for block in range(2):
        first.write_block(block, make_values(first.layout, block))
    first.seal()
    assert resume(3).read_table().generation[0] == 2000
    assert first.check_seal()


@in_both_places("column", ["tile", "size", "crc32c", "generation", "label_size", "label_crc32c"], in_bucket=["size"])
def test_a_damaged_table_is_told_and_mended(cache_url: str, column: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    key = f"{version.id}.zarr/{column}/c/0"
    whole = get_bytes(cache_url, key)
    assert whole is not None
    put_bytes(cache_url, key, whole[:20] + b"\xff" + whole[21:])
    with pytest.raises(IntegrityError, match="make extract"):
        version.read_table()

    mended = create(cache_url)
    assert mended.read_table().full_digest() == make_table(ROWS).full_digest()
    assert not mended.sealed
    assert mended.committed().all()
    mended.seal()
    assert open_cache(cache_url).read_rows().missing == 0


@pytest.mark.parametrize("sealed", [True, False])
def test_swapped_columns_are_mended(cache_url: str, sealed: bool) -> None:
    version_id = fill_cache(cache_url, ROWS, seal=sealed)
    keys = [f"{version_id}.zarr/{name}/c/0" for name in ("crc32c", "label_crc32c")]
    chunks = [get_bytes(cache_url, key) for key in keys]
    for key, chunk in zip(keys, reversed(chunks), strict=True):
        assert chunk is not None
        put_bytes(cache_url, key, chunk)

    assert not CacheRoot(cache_url).open_version(version_id).check_seal()
    assert create(cache_url).read_table().full_digest() == make_table(ROWS).full_digest()


def test_a_seal_that_contradicts_the_commits_is_taken_back(cache_url: str) -> None:
    version_id = fill_cache(cache_url, ROWS)
    delete(cache_url, chunk_key(version_id, "commit", 1))

    resumed = create(cache_url)
    assert not resumed.sealed
    assert resumed.committed().tolist() == [True, False]


# Damage


def flip(chunk: bytes) -> bytes:
    return chunk[:5] + bytes([chunk[5] ^ 16]) + chunk[6:]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flip,
    "cut": lambda chunk: chunk[: len(chunk) // 2],
    "cut by one": lambda chunk: chunk[:-1],
    "longer": lambda chunk: chunk + b"\0",
    "empty": lambda chunk: b"",
    "three bytes": lambda chunk: chunk[:3],
    "missing": lambda chunk: None,
}


def do_damage(url: str, key: str, damage: str) -> None:
    whole = get_bytes(url, key)
    assert whole is not None
    changed = DAMAGES[damage](whole)
    if changed is None:
        delete(url, key)
    else:
        put_bytes(url, key, changed)


@in_both_places("array", [*ARRAYS, "commit"], in_bucket=["cls", "commit"])
def test_a_damaged_chunk_costs_its_block_and_no_other(cache_url: str, array: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    first, second = (make_values(version.layout, block) for block in range(2))
    for damage in DAMAGES:
        do_damage(cache_url, chunk_key(version.id, array, 1), damage)

        assert version.check_block(1), damage
        assert version.check_block(0) is None
        rows = version.read_rows()
        assert rows.missing == 44, damage
        assert rows.status[:256].tolist() == first.status.tolist()
        assert rows.pooled["cls"][:256].tobytes() == first.pooled["cls"].tobytes()
        assert np.isnan(rows.pooled["cls"][256:]).all()
        assert not rows.label_ids[256:].any()
        assert version.read_status().tolist() == rows.status.tolist(), damage
        assert version.committed().tolist() == [True, array != "commit"], damage

        version.write_block(1, second)
        assert version.check_block(1) is None, damage
        assert version.read_rows().missing == 0


@in_both_places("array", [*ARRAYS, "commit"], in_bucket=["label_ids"])
def test_swapped_chunks_cost_both_blocks(cache_url: str, array: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, 700))
    keys = [chunk_key(version.id, array, block) for block in (0, 1)]
    chunks = [get_bytes(cache_url, key) for key in keys]
    for key, chunk in zip(keys, reversed(chunks), strict=True):
        assert chunk is not None
        put_bytes(cache_url, key, chunk)

    swapped_to_the_same = chunks[0] == chunks[1]
    assert swapped_to_the_same == (array == "status"), "the quarantined rows repeat with the block"
    if not swapped_to_the_same:
        assert [version.check_block(block) for block in range(3)] == ["its values do not match its digest"] * 2 + [None]
        assert version.read_rows().missing == 512
    assert version.read_status().tolist() == version.read_rows().status.tolist()


def test_swapped_poolings_cost_their_block(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    keys = [chunk_key(version.id, name, 0) for name in ("cls", "patch_mean")]
    chunks = [get_bytes(cache_url, key) for key in keys]
    for key, chunk in zip(keys, reversed(chunks), strict=True):
        assert chunk is not None
        put_bytes(cache_url, key, chunk)

    assert version.check_block(0) == "its values do not match its digest"
    assert version.read_rows().missing == 256


def test_a_damaged_seal_is_no_seal(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    for damage in DAMAGES:
        do_damage(cache_url, f"{version.id}.zarr/seal/c/0", damage)

        assert not version.sealed, damage
        version.seal()
        assert version.sealed


@pytest.mark.parametrize("array", ["cls", "status"])
def test_a_broken_array_costs_the_rows_not_a_traceback(cache_url: str, array: str) -> None:
    version_id = fill_cache(cache_url, ROWS)
    key = f"{version_id}.zarr/{array}/zarr.json"
    for metadata in (b"", b"{", b"[]", b"{}", None):
        if metadata is None:
            delete(cache_url, key)
        else:
            put_bytes(cache_url, key, metadata)
        version = open_cache(cache_url)
        assert f"array {array} cannot be read" in str(version.check_block(0)), metadata
        assert version.read_rows().missing == ROWS
        assert not version.read_status().any()


def test_bytes_that_claim_to_be_committed_but_are_not_storable(cache_url: str) -> None:
    version = create(cache_url)
    values = make_values(version.layout, 1)
    values.pooled["cls"][3, 0] = np.inf
    for name, array in {**values.pooled, "label_ids": values.label_ids, "status": values.status}.items():
        version._array(name)[256:] = array
    version._array("commit")[1] = np.frombuffer(values.digest(version.layout), np.uint8)

    assert "not finite" in str(version.check_block(1))

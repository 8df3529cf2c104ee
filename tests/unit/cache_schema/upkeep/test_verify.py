"""Every kind of damage to a stored version: what is said about it, and what a repair takes back."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cache_schema import BlockValues, CacheRoot, Status, Version, open_cache
from cache_schema.upkeep.verify import Findings, repair_version, verify_version
from tests.caches import delete, fill_cache, get_all, get_bytes, in_both_places, make_values, put_bytes

ROWS = 700  # blocks of 256, 256 and 188 rows
BLOCK = "block 1 (rows 256-511): "
SEAL = "array seal: does not match the table or the commits"
DIGEST = (
    "one of the arrays cls, patch_mean, label_ids, status, commit: its values do not match its digest: "
    "a chunk was swapped or overwritten"
)
CHUNKS = {"cls": 4100, "patch_mean": 4100, "label_ids": 65_540, "status": 260, "commit": 36}
"""Bytes of a chunk by array: 256 rows of 8 halves, of 128 shorts, of a byte; 32 bytes; each with a crc32c."""


def open_writable(url: str) -> Version:
    return CacheRoot(url).open_version(open_cache(url, allow_unsealed=True).id, read_only=False)


def chunk_key(version: Version, array: str, block: int) -> str:
    return f"{version.id}.zarr/{array}/c/{block}" + ("" if array == "status" else "/0")


def verify_and_repair(url: str) -> tuple[Findings, list[bool], bool]:
    """What is found, then which blocks are still committed and whether the seal stays after a repair."""
    findings = verify_version(open_cache(url, allow_unsealed=True))
    version = open_writable(url)
    repair_version(version, findings)
    return findings, version.committed().tolist(), version.sealed


# One chunk


def flip(chunk: bytes) -> bytes:
    return chunk[:5] + bytes([chunk[5] ^ 16]) + chunk[6:]


CHUNK_DAMAGES: Mapping[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "flipped": (flip, "its chunk fails its checksum: at least one byte is wrong"),
    "missing": (lambda chunk: None, "its chunk is missing"),
    "truncated": (lambda chunk: chunk[:20], "its chunk has 20 bytes instead of {size:,}"),
    "longer": (lambda chunk: chunk + bytes(1), "its chunk has {longer:,} bytes instead of {size:,}"),
    "zero bytes": (lambda chunk: b"", "its chunk is empty (0 bytes)"),
}


@in_both_places("array", CHUNKS, in_bucket=["status", "commit"])
def test_a_damaged_chunk_is_named_and_its_block_taken_back(cache_url: str, array: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    key, commit_key = (chunk_key(version, name, 1) for name in (array, "commit"))
    whole, commit, size = get_bytes(cache_url, key), get_bytes(cache_url, commit_key), CHUNKS[array]
    assert whole is not None
    assert commit is not None
    assert len(whole) == size
    for damage, (change, expected) in CHUNK_DAMAGES.items():
        changed = change(whole)
        if changed is None:
            delete(cache_url, key)
        else:
            put_bytes(cache_url, key, changed)
        findings, committed, sealed = verify_and_repair(cache_url)

        line = f"{BLOCK}array {array}: " + expected.format(size=size, longer=size + 1)
        assert findings.lines == ((line, SEAL) if array == "commit" else (line,)), damage
        assert findings.damaged == (1,)
        assert committed == [True, False, True], damage
        assert not sealed
        put_bytes(cache_url, key, whole)
        put_bytes(cache_url, commit_key, commit)
        version.seal()
    assert verify_version(version).lines == ()


@in_both_places("array", ["cls", "patch_mean", "label_ids", "commit"], in_bucket=["cls"])
def test_swapped_chunks_are_seen_by_the_digest_alone(cache_url: str, array: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    keys = [chunk_key(version, array, block) for block in (0, 1)]
    first, second = (get_bytes(cache_url, key) or b"" for key in keys)
    assert first != second
    put_bytes(cache_url, keys[0], second)
    put_bytes(cache_url, keys[1], first)
    findings, committed, sealed = verify_and_repair(cache_url)

    expected = (f"block 0 (rows 0-255): {DIGEST}", f"{BLOCK}{DIGEST}")
    assert findings.lines == ((*expected, SEAL) if array == "commit" else expected)
    assert committed == [False, False, True]
    assert not sealed


# The values of one block


Arrays = Mapping[str, npt.NDArray[Any]]


def overwrite(version: Version, change: Callable[[Arrays], None], *, commit: bool) -> None:
    """Change block 1 past every check; with a commit and a seal that agree, as a program with a bug would."""
    values = version.read_block(1)
    arrays = {**values.pooled, "label_ids": values.label_ids, "status": values.status}
    change(arrays)
    for name, array in arrays.items():
        version._array(name)[256:512] = array
    if commit:
        written = BlockValues({name: arrays[name] for name in values.pooled}, values.label_ids, values.status)
        version._array("commit")[1] = np.frombuffer(written.digest(version.layout), np.uint8)
        version.seal()


def put(array: str, rows: Any, value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[array][rows] = value

    return change


VALUE_DAMAGES: Mapping[str, tuple[Callable[[Arrays], None], list[str]]] = {
    "unknown status": (put("status", 44, 9), ["array status of row 300 is 9, which no committed row has"]),
    "pending row": (put("status", [44, 45], 0), ["array status of rows 300, 301 is 0, which no committed row has"]),
    "row with NaN": (put("cls", 44, np.nan), ["array cls of row 300 is not finite in float16"]),
    "one NaN in a row": (put("patch_mean", (44, 3), np.nan), ["array patch_mean of row 300 is not finite in float16"]),
    "row with inf": (put("cls", (44, 0), -np.inf), ["array cls of row 300 is not finite in float16"]),
    "quarantined row with a vector": (
        put("patch_mean", 10, 1),
        ["array patch_mean of row 266 holds values, but status says not embedded"],
    ),
    "quarantined row called embedded": (
        put("status", 10, Status.EMBEDDED),
        [f"array {name} of row 266 is not finite in float16" for name in ("cls", "patch_mean")],
    ),
    "embedded row called quarantined": (
        put("status", 44, Status.GONE),
        [f"array {name} of row 300 holds values, but status says not embedded" for name in ("cls", "patch_mean")],
    ),
}


@pytest.mark.parametrize("commit", [True, False], ids=["committed", "not committed"])
def test_values_that_contradict_each_other_are_named_by_row(cache_url: str, commit: bool) -> None:
    fill_cache(cache_url, ROWS)
    version = open_writable(cache_url)
    whole = version.read_block(1)
    for damage, (change, expected) in VALUE_DAMAGES.items():
        overwrite(version, change, commit=commit)
        findings, committed, sealed = verify_and_repair(cache_url)

        assert list(findings.lines) == [BLOCK + line for line in ([] if commit else [DIGEST]) + expected], damage
        assert committed == [True, False, True], damage
        assert not sealed, damage
        version.write_block(1, whole)
        version.seal()
    assert verify_version(version).lines == ()


# Seal, table, and what is not damage


def test_a_seal_of_other_commits_is_taken_back_and_no_commit(cache_url: str) -> None:
    fill_cache(cache_url, ROWS)
    version = open_writable(cache_url)
    version.write_block(1, make_values(version.layout, 1, seed=1))
    findings, committed, sealed = verify_and_repair(cache_url)

    assert findings.lines == (SEAL,)
    assert committed == [True] * 3
    assert not sealed


def test_a_sealed_version_without_a_commit_contradicts_itself(cache_url: str) -> None:
    fill_cache(cache_url, ROWS)
    open_writable(cache_url)._array("commit")[1] = 0
    findings, committed, sealed = verify_and_repair(cache_url)

    gone = "array commit: its record was cleared, but the version is sealed"
    assert findings.lines == (BLOCK + gone, SEAL)
    assert findings.damaged == (1,)
    assert committed == [True, False, True]
    assert not sealed


@in_both_places("column", ["tile", "size", "crc32c", "generation", "label_size", "label_crc32c"], in_bucket=["tile"])
def test_a_damaged_table_is_left_to_the_next_extraction(cache_url: str, column: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    key = f"{version.id}.zarr/{column}/c/0"
    put_bytes(cache_url, key, flip(get_bytes(cache_url, key) or b""))
    before = get_all(cache_url)
    findings = verify_version(version)
    said = repair_version(open_writable(cache_url), findings)

    assert findings.lines == (
        f"tile table (rows 0-699): array {column}: its chunk fails its checksum: at least one byte is wrong: "
        "`make extract` repairs it",
    )
    assert findings.table_damaged
    assert said[:2] == [
        "no block is damaged: nothing was cleared",
        "`make extract` repairs the tile table from the listing",
    ]
    assert get_all(cache_url) == before


def test_a_table_of_other_tiles_is_not_this_versions(cache_url: str) -> None:
    fill_cache(cache_url, ROWS)
    version = open_writable(cache_url)
    version._array("size")[3] = 7
    assert verify_version(version).lines == (
        "the tile table or the provenance does not match the id of this version",
        SEAL,
    )


def test_an_array_that_is_lost_is_not_repaired(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    delete(cache_url, f"{version.id}.zarr/cls/zarr.json")
    put_bytes(cache_url, f"{version.id}.zarr/size/zarr.json", b"{")
    before = get_all(cache_url)
    findings = verify_version(version)

    remedy = f"its zarr.json is missing or damaged: remove {cache_url}/{version.id}.zarr and run `make extract` again"
    assert findings.lines == (f"array cls: {remedy}", f"array size: {remedy}")
    assert repair_version(open_writable(cache_url), findings) == [
        "nothing was repaired: no extraction can write to an array that is lost"
    ]
    assert get_all(cache_url) == before


def test_a_damaged_seal_is_named(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    key = f"{version.id}.zarr/seal/c/0"
    put_bytes(cache_url, key, (get_bytes(cache_url, key) or b"")[:-1])
    assert verify_version(version).lines == (
        "array seal: its chunk has 35 bytes instead of 36: `make extract` seals it again",
    )


@pytest.mark.parametrize("state", ["sound", "unfinished", "begun"])
def test_what_is_not_damaged_is_left_byte_for_byte_alone(cache_url: str, state: str) -> None:
    fill_cache(cache_url, ROWS, seal=state != "begun")
    version = open_writable(cache_url)
    if state == "unfinished":
        version.reopen_blocks([1])
    if state == "begun":
        delete(cache_url, chunk_key(version, "commit", 1))
    before = get_all(cache_url)
    findings = verify_version(version)
    repair_version(version, findings)

    unfinished = ("1 of 3 blocks (256 rows) are not committed yet", "the version is not sealed")
    assert findings.lines == (() if state == "sound" else unfinished)
    assert findings.damaged == ()
    assert get_all(cache_url) == before


def test_damage_in_an_unfinished_version(cache_url: str) -> None:
    fill_cache(cache_url, ROWS, seal=False)
    version = open_writable(cache_url)
    version.reopen_blocks([0])
    put_bytes(cache_url, chunk_key(version, "commit", 1), b"")
    put_bytes(cache_url, chunk_key(version, "cls", 2), b"")
    findings, committed, sealed = verify_and_repair(cache_url)

    assert findings.lines == (
        f"{BLOCK}array commit: its chunk is empty (0 bytes)",
        "block 2 (rows 512-699): array cls: its chunk is empty (0 bytes)",
        "1 of 3 blocks (256 rows) are not committed yet",
        "the version is not sealed",
    )
    assert (committed, sealed) == ([False] * 3, False)


def test_a_few_blocks_are_in_memory_at_a_time(cache_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS))
    asked: list[slice] = []
    read_values = Version._read_values

    def note(self: Version, rows: slice, arrays: Mapping[str, Any]) -> BlockValues:
        asked.append(rows)
        return read_values(self, rows, arrays)

    monkeypatch.setattr(Version, "_read_values", note)
    assert verify_version(version).lines == ()
    assert sorted(asked, key=lambda rows: rows.start) == [slice(0, 256), slice(256, 512), slice(512, 700)]

"""Find damage in a stored version, and clear the commits of exactly the damaged blocks."""

import logging
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from cache_schema.errors import IntegrityError
from cache_schema.layout import TABLE_CHUNK_ROWS, count_blocks
from cache_schema.storage.store import storage_errors
from cache_schema.table import COLUMN_DTYPES
from cache_schema.version import DIGEST_CONTRADICTED, Version

_log = logging.getLogger(__name__)

_CHECKED_TOGETHER = 4
_MISSING = "its chunk is missing"
_TABLE = ("tile", *COLUMN_DTYPES)


@dataclass(frozen=True)
class Findings:
    """What `verify_version` found.

    Attributes:
        lines: one for each defect and unfinished part, naming array, block and rows; none for a sound version.
        damaged: numbers of damaged blocks, ascending.
        seal_contradicted: whether the seal does not match the table or the commits.
        table_damaged: whether the tile table is unreadable, or does not match the id of the version.
        lost_arrays: arrays that cannot be opened, which no extraction repairs.
    """

    lines: tuple[str, ...]
    damaged: tuple[int, ...] = ()
    seal_contradicted: bool = False
    table_damaged: bool = False
    lost_arrays: tuple[str, ...] = ()


def verify_version(version: Version) -> Findings:
    """Recompute every digest of a version, with a few blocks in memory at a time.

    Raises:
        StorageError: the disk or the bucket cannot be read; that is not reported as damage.
    """
    arrays = (*version.layout.arrays, *_TABLE, "seal", "commit")
    lost = tuple(name for name in arrays if not _opens(version, name))
    if lost:
        where = f"{version.url}/{version.group.path}"
        remedy = f"its zarr.json is missing or damaged: remove {where} and run `make extract` again"
        return Findings(tuple(f"array {name}: {remedy}" for name in lost), lost_arrays=lost)
    sealed, committed = version.sealed, version.committed()

    def check(block: int) -> list[str]:
        found = _check_values(version, block) if committed[block] else _check_commit(version, block, sealed)
        _log.debug("block %d: %s", block, "damaged" if found else "sound" if committed[block] else "not committed")
        return found

    with ThreadPoolExecutor(_CHECKED_TOGETHER) as threads:  # a block from a bucket takes longer to arrive than to check
        by_block = list(threads.map(check, range(version.layout.blocks)))
    lines = [
        f"block {block} ({_name_rows(version.layout.block_slice(block))}): {line}"
        for block, found in enumerate(by_block)
        for line in found
    ]
    damaged = tuple(block for block, found in enumerate(by_block) if found)
    table_lines = _check_table(version)
    seal_lines, contradicted = _check_seal(version, sealed)
    pending = ~committed
    pending[list(damaged)] = False
    if pending.any():
        rows = version.layout.count_rows(np.flatnonzero(pending).tolist())
        lines.append(f"{pending.sum():,} of {len(pending):,} blocks ({rows:,} rows) are not committed yet")
    return Findings((*lines, *table_lines, *seal_lines), damaged, contradicted, bool(table_lines))


def repair_version(version: Version, findings: Findings) -> list[str]:
    """Clear the seal and the commits of damaged blocks, so that the next extraction redoes these and no others.

    Return lines that say what was done and what to do. A version without such damage is not written to.
    """
    if findings.lost_arrays:
        return ["nothing was repaired: no extraction can write to an array that is lost"]
    lines = []
    if findings.damaged or findings.seal_contradicted:
        version.reopen_blocks(findings.damaged)
        rows = version.layout.count_rows(findings.damaged)
        lines.append(f"cleared the seal and the commits of {count_blocks(len(findings.damaged))} ({rows:,} rows)")
    else:
        lines.append("no block is damaged: nothing was cleared")
    if findings.table_damaged:
        lines.append("`make extract` repairs the tile table from the listing")
    tiles, backbone = version.recorded.tiles, version.recorded.backbone
    variables = {"TILES": tiles, "BACKBONE": backbone, "CACHE": version.url}
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    size = version.provenance.image_size
    lines.append(f"to redo what is missing, run the `make extract` that made it: {given} IMAGE_SIZE={size}")
    return lines


def _check_values(version: Version, block: int) -> list[str]:
    """Describe the defects of a committed block: chunks that are damaged by themselves, else rows that do not fit."""
    verdict = version.check_block(block)
    if verdict is None:
        return []
    chunks = {name: _describe_chunk(version, name, block) for name in (*version.layout.arrays, "commit")}
    if lines := [f"array {name}: {why}" for name, why in chunks.items() if why]:
        return lines
    lines = version.read_block(block).find_contradictions(version.layout, version.layout.block_slice(block))
    if verdict == DIGEST_CONTRADICTED:  # a swapped chunk passes its checksum, so the array is unknown
        lines.insert(0, f"one of the arrays {', '.join(chunks)}: {verdict}: a chunk was swapped or overwritten")
    return lines


def _check_commit(version: Version, block: int, sealed: bool) -> list[str]:
    """Describe the defects of a block without a commit record; before the seal a missing record is none."""
    why = _describe_chunk(version, "commit", block)
    if not sealed and why in (None, _MISSING):
        return []
    return [f"array commit: {why or 'its record was cleared, but the version is sealed'}"]


def _check_table(version: Version) -> list[str]:
    try:
        if version.provenance.version_id(version.read_table().identity_digest()) == version.id:
            return []
        general = "the tile table or the provenance does not match the id of this version"
    except IntegrityError as error:
        general = " ".join(str(error).split())
    lines = []
    for start in range(0, version.layout.rows, TABLE_CHUNK_ROWS):
        rows = slice(start, min(start + TABLE_CHUNK_ROWS, version.layout.rows))
        for name in _TABLE:
            if why := _describe_chunk(version, name, start // TABLE_CHUNK_ROWS):
                lines.append(f"tile table ({_name_rows(rows)}): array {name}: {why}: `make extract` repairs it")
    return lines or [general]


def _check_seal(version: Version, sealed: bool) -> tuple[list[str], bool]:
    """Describe the defects of the seal, and say whether it does not match the version."""
    if not sealed:
        why = _describe_chunk(version, "seal", 0)
        unread = why not in (None, _MISSING)
        return [f"array seal: {why}: `make extract` seals it again" if unread else "the version is not sealed"], False
    try:
        contradicted = not version.check_seal()
    except IntegrityError:  # the check of the table reports it
        return [], False
    return ["array seal: does not match the table or the commits"] if contradicted else [], contradicted


def _describe_chunk(version: Version, name: str, chunk: int) -> str | None:
    """Describe the defect of a single chunk; None if it exists and passes its checksum."""
    with storage_errors(version.url):
        array: Any = version.group[name]
        coordinates = (chunk, *[0] * (array.ndim - 1))
        key = f"{array.path}/{array.metadata.encode_chunk_key(coordinates)}"
        stored = sync(version.group.store.get(key, default_buffer_prototype()))
        if stored is None:
            return _MISSING
        if len(stored) == 0:
            return "its chunk is empty (0 bytes)"
        size = int(np.prod(array.chunks)) * array.dtype.itemsize + 4  # and a crc32c
        if name != "tile" and len(stored) != size:
            return f"its chunk has {len(stored):,} bytes instead of {size:,}"
        try:
            array.blocks[coordinates]
        except ValueError:
            return "its chunk fails its checksum: at least one byte is wrong"
    return None


def _opens(version: Version, name: str) -> bool:
    with storage_errors(version.url):
        try:
            return isinstance(version.group[name], zarr.Array)
        except (ValueError, KeyError):
            return False


def _name_rows(rows: slice) -> str:
    return f"rows {rows.start}-{rows.stop - 1}"

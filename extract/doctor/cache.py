"""Check the place of the cache: write access, existing versions, and free space."""

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import CacheError, CacheRoot
from cache_schema.layout import count_blocks
from cache_schema.storage.objects import open_objects
from cache_schema.storage.place import Purpose, check_url, is_bucket
from cache_schema.storage.store import storage_errors
from extract.config import ExtractConfig
from extract.earlier import find_earlier, open_in_use
from extract.plan import choose_provenance
from extract.tiles.source import Source
from extract.timing import estimate_cache_bytes

from .checkpoint import Weights, find_existing
from .finding import Concern, Verdict
from .machine import Device
from .storage import AGAIN, DEADLINE_S, Found

HASHED_BYTES = 4 * 2**30
"""Larger weights are not hashed to find the version's id: that would take longer than all other checks."""
_ROOM_LEFT = 0.9
"""Share of the free space above which a cache gets a warning."""


def check_place(url: str) -> Verdict[str]:
    """Write a test object to the place of the cache, and remove it.

    Raises:
        StorageError: not the URL of a cache, or the place cannot be written.
    """
    check_url(url, "CACHE")
    if is_bucket(url):
        return _check_bucket(url)
    folder = find_existing(Path(url))
    with storage_errors(url), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"doctor")
    return Verdict(url, f"{url} can be written" + ("" if folder == Path(url).absolute() else f" (below {folder})"))


def _check_bucket(url: str) -> Verdict[str]:
    objects = open_objects(url, Purpose(again=AGAIN), deadline_s=DEADLINE_S)
    name = f"doctor-{uuid.uuid4().hex}"
    if not objects.create(name, name.encode()):
        raise CacheError(f"{url} does not keep a new object: check CACHE and what else writes there")
    objects.delete(name)
    return Verdict(url, f"{url} can be written: a test object was created and removed")


@dataclass(frozen=True)
class Pending:
    """The work left for an extraction.

    Attributes:
        to_do: tiles to embed.
        to_write: rows to write, including those copied from an earlier version.
    """

    to_do: int
    to_write: int


def check_version(
    config: ExtractConfig, url: str, source: Source, found: Found, weights: Weights, device: Device
) -> Verdict[Pending]:
    """Find the version of the cache that an extraction would fill, and its progress; nothing is written.

    Raises:
        RunError: more than a tenth of the tiles of the version in use are gone.
        CacheError: an existing version cannot be read.
    """
    root, everything = CacheRoot(url, read_only=True), Pending(len(found.table), len(found.table))
    there = root.versions()
    unknown = (
        "not all tiles were listed"
        if not found.whole
        else "the weights are not downloaded yet"
        if weights.download
        else f"hashing {weights.file_bytes / 2**30:.0f} GiB of weights takes too long"
        if weights.file_bytes > HASHED_BYTES
        else None
    )
    if unknown:
        return Verdict(everything, f"{_count(there)} there; unknown whether one of them continues: {unknown}")
    provenance = choose_provenance(config, weights.checkpoint, root, found.table, device.ranks.device)
    wanted = provenance.version_id(found.table.identity_digest())
    if wanted in there:
        return _describe_version(root, wanted, everything)
    earlier = find_earlier(root, found.table, provenance, source.identity)
    if earlier:
        version, changes = earlier
        if not config.yes:
            changes.refuse_loss(version, source.url)
        detail = f"a new version {wanted}; since version {version.id}: {changes.describe()}"
        return Verdict(Pending(int((~changes.same_tile).sum()), len(found.table)), detail)
    in_use = open_in_use(root)
    other = f"; the one in use differs in {'; '.join(in_use.provenance.differences(provenance))}" if in_use else ""
    return Verdict(everything, f"a new version {wanted}; {_count(there)} there{other}")


def _describe_version(root: CacheRoot, version_id: str, everything: Pending) -> Verdict[Pending]:
    try:
        version = root.open_version(version_id)
    except CacheError:  # an extraction creates it again
        return Verdict(everything, f"version {version_id} was not created completely, and starts again")
    if version.sealed:
        return Verdict(Pending(0, 0), f"version {version_id} is finished: an extraction has nothing to do")
    left = version.layout.count_rows(np.flatnonzero(~version.committed()).tolist())
    blocks = f"{int(version.committed().sum()):,} of {count_blocks(version.layout.blocks)}"
    detail = f"version {version_id} is unfinished: {blocks} committed, and an extraction continues from there"
    return Verdict(Pending(left, left), detail)


def _count(versions: list[str]) -> str:
    return f"{len(versions) or 'no'} version{'' if len(versions) == 1 else 's'}"


def check_space(url: str, pending: Pending, numbers: int, *, at_least: str = "") -> Verdict[int]:
    """Check that the disk has room for the rows to write, each of `numbers` pooled numbers."""
    needed = estimate_cache_bytes(pending.to_write, numbers)
    wanted = f"{at_least}{needed / 2**20:,.1f} MiB to write"
    if is_bucket(url):
        return Verdict(needed, f"{wanted}; a bucket has room")
    free = shutil.disk_usage(find_existing(Path(url))).free
    detail = f"{wanted}, {free / 2**20:,.1f} MiB free"
    if needed <= _ROOM_LEFT * free:
        return Verdict(needed, detail)
    tight = Concern(
        "fail" if needed > free else "warning",
        "too little room for the cache" if needed > free else "barely enough room for the cache",
        "free space, or set CACHE to another disk or a bucket",
    )
    return Verdict(needed, detail, [tight])

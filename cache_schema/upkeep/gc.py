"""Which versions of a cache nothing refers to any more, and their removal."""

import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cache_schema.errors import CacheError
from cache_schema.root import CacheRoot

from .lock import PACE, Pace, find_owner, own_version

MIB = 2**20


@dataclass(frozen=True)
class StoredVersion:
    """One version of a cache, and whether it may go.

    Attributes:
        id: of the version.
        bytes: of all its objects.
        written: when it was last written to, in seconds since 1970.
        kept: why it stays, None if nothing speaks for it.
    """

    id: str
    bytes: int
    written: float
    kept: str | None

    def describe(self) -> str:
        """One line: id, size, age, what becomes of it."""
        age = describe_age(time.time() - self.written)
        fate = f"stays: {self.kept}" if self.kept else "to remove"
        return f"{self.id}  {self.bytes / MIB:>10,.1f} MiB  {age:>14}  {fate}"


def find_references(places: Iterable[str]) -> dict[str, str]:
    """Version id -> the first run below these places whose `config.json` names it.

    A run's cache is not asked for: it may be named by another path today, and the id alone says which embeddings a run
    was trained on.

    Args:
        places: directories, or `gs://bucket/prefix`; in a place that is not there, there are no runs.

    Raises:
        CacheError: a `config.json` cannot be read, so what it refers to is unknown.
        StorageError: the bucket cannot be read.
    """
    references: dict[str, str] = {}
    for place in places:
        for name, read in _find_bucket_runs(place) if place.startswith("gs://") else _find_local_runs(place):
            try:
                stored = json.loads(read())
            except (OSError, ValueError) as error:
                raise CacheError(
                    f"{name} cannot be read, so the version it needs is unknown: mend it or remove that run"
                ) from error
            version = stored.get("version") if isinstance(stored, dict) else None
            if isinstance(version, str):
                references.setdefault(version, os.path.dirname(name))
    return references


def _find_local_runs(place: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every `config.json` below a directory and how to read it."""
    # Unlike Path.glob, this follows links, also to run directories that were moved to another disk.
    for name in sorted(glob.glob(f"{glob.escape(place)}/**/config.json", recursive=True)):
        yield name, Path(name).read_bytes


def _find_bucket_runs(place: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The same of a bucket."""
    from cache_schema.storage.gcs import GcsObjects

    objects = GcsObjects(place, setting="--runs", role="Storage Object Viewer", again="nothing was removed")
    below = len(objects.name(""))

    def read(key: str) -> bytes:
        found = objects.download(key)
        return found[0] if found else b""

    for page in objects.list_pages(objects.name("")):
        for name in page:
            if name.endswith("/config.json"):
                yield f"{objects.url}/{name[below:]}", partial(read, name[below:])


def list_versions(
    root: CacheRoot, references: Mapping[str, str], *, keep: int = 0, unsealed: bool = False, pace: Pace = PACE
) -> list[StoredVersion]:
    """All versions of a cache, the one last written to first.

    Args:
        root: the cache.
        references: what runs refer to, see `find_references`.
        keep: how many stay, the newest first, of those that nothing else keeps.
        unsealed: let go of unfinished versions, except those that a process writes to.
        pace: for tests; a process elsewhere is given time to show that it lives.
    """
    sealed = {version_id: root.is_sealed(version_id) for version_id in root.versions()}
    current = root.current()  # after the seals: a version that was sealed before it became the one in use is seen here
    versions = []
    for version_id in sealed:
        kept = None
        if version_id == current:
            kept = "in use"
        elif version_id in references:
            kept = f"{references[version_id]} was trained on it"
        elif not unsealed and not (sealed[version_id] and current):
            kept = "not finished (--unsealed)"
        elif owner := find_owner(root.url, version_id, pace=pace):
            kept = f"being written by {owner}"
        versions.append(StoredVersion(version_id, *root.measure_version(version_id), kept))
    versions.sort(key=lambda version: version.written, reverse=True)
    spared = [version.id for version in versions if version.kept is None][:keep]
    reason = f"among the {keep} newest (--keep)"
    return [replace(version, kept=reason) if version.id in spared else version for version in versions]


def remove_versions(root: CacheRoot, versions: Sequence[StoredVersion]) -> None:
    """Remove these versions, each owned meanwhile: an extraction that is about to begin is told.

    Raises:
        OwnedError: an extraction has begun to write to one since they were listed.
        CacheError: an extraction has taken one into use since they were listed.
        StorageError: the disk or the bucket refuses; what is removed already stays so.
    """
    for version in versions:
        with own_version(root.url, version.id):
            if root.current() == version.id:
                message = f"version {version.id} of {root.url} has just come into use: run the same command again"
                raise CacheError(message)
            root.remove_version(version.id)


def describe_age(seconds: float) -> str:
    """`3 days old`, in the largest unit that fits."""
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} old"
    return "new"

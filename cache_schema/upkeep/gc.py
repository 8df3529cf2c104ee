"""Garbage-collect versions of a cache that no run refers to."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cache_schema.errors import CacheError
from cache_schema.root import CacheRoot
from cache_schema.storage.objects import open_objects
from cache_schema.storage.place import VIEWER, Purpose

from .lock import PACE, Pace, find_owner, own_version

MIB = 2**20


@dataclass(frozen=True)
class StoredVersion:
    """One version of a cache, and whether it may be removed.

    Attributes:
        id: the version.
        bytes: of all its objects.
        written: when it was last written to (Unix time).
        kept: why it stays, None if it may be removed.
    """

    id: str
    bytes: int
    written: float
    kept: str | None

    def describe(self) -> str:
        """Return one line: id, size, age, and whether it stays."""
        age = describe_age(time.time() - self.written)
        fate = f"stays: {self.kept}" if self.kept else "to remove"
        return f"{self.id}  {self.bytes / MIB:>10,.1f} MiB  {age:>14}  {fate}"


def find_references(places: Iterable[str]) -> dict[str, str]:
    """Map version ids to the first run below these places whose `config.json` names the version.

    The cache that a run names does not matter: its path may have changed, and the id alone identifies the embeddings.

    Args:
        places: directories or `gs://bucket/prefix`; one that does not exist holds no runs.

    Raises:
        CacheError: a `config.json` cannot be understood, so the version it refers to is unknown.
        StorageError: a place cannot be read.
    """
    references: dict[str, str] = {}
    for place in places:
        objects = open_objects(place, Purpose("--runs", VIEWER, "nothing was removed"))
        for name in objects.find("config.json"):
            url = f"{objects.url}/{name}"
            found = objects.read(name)
            try:
                stored = json.loads(found.data if found else b"")
            except ValueError as error:
                raise CacheError(
                    f"{url} cannot be read, so the version it needs is unknown: fix it or remove that run"
                ) from error
            version = stored.get("version") if isinstance(stored, dict) else None
            if isinstance(version, str):
                references.setdefault(version, os.path.dirname(url))
    return references


def list_versions(
    root: CacheRoot, references: Mapping[str, str], *, keep: int = 0, unsealed: bool = False, pace: Pace = PACE
) -> list[StoredVersion]:
    """List all versions of a cache, the one last written to first.

    Args:
        root: the cache.
        references: versions that runs refer to, see `find_references`.
        keep: how many of the newest to keep, of those that nothing else keeps.
        unsealed: remove unfinished versions too, unless a process writes to them.
        pace: for tests; how long to wait for the heartbeat of another machine.
    """
    sealed = {version_id: root.is_sealed(version_id) for version_id in root.versions()}
    current = root.current()  # read after the seals, so that a version sealed meanwhile is not missed
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
    kept_newest = [version.id for version in versions if version.kept is None][:keep]
    reason = f"among the {keep} newest (--keep)"
    return [replace(version, kept=reason) if version.id in kept_newest else version for version in versions]


def remove_versions(root: CacheRoot, versions: Sequence[StoredVersion]) -> None:
    """Remove these versions, holding the lock of each so that no extraction writes to it meanwhile.

    Raises:
        OwnedError: an extraction has begun to write to one since they were listed.
        CacheError: one has become the version in use since they were listed.
        StorageError: the disk or the bucket cannot be written; versions already removed stay removed.
    """
    for version in versions:
        with own_version(root.url, version.id):
            if root.current() == version.id:
                message = f"version {version.id} of {root.url} has just come into use: run the same command again"
                raise CacheError(message)
            root.remove_version(version.id)


def describe_age(seconds: float) -> str:
    """Write an age in its largest unit: `3 days old`."""
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} old"
    return "new"

"""One small object that several processes compare and swap: a file, or an object of a bucket."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .store import storage_errors

_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Stored:
    """What a slot holds; `generation` is a bucket's, 0 for a file, whose bytes alone tell one state from the next."""

    data: bytes
    generation: int = 0


class Slot(Protocol):
    """No two states of a slot may have the same bytes. Every method may raise StorageError."""

    def read(self) -> Stored | None:
        """What is there, None if nothing."""

    def put(self, data: bytes, over: Stored | None) -> Stored | None:
        """Write `data` if `over` is what is there (None: nothing); else None.

        None, too, when a bucket's acknowledgement was lost, and the repeated write refused: reading tells whose it is.
        """

    def remove(self, stored: Stored) -> None:
        """Remove it, if it is what is there."""


def open_slot(url: str, name: str) -> Slot:
    """The slot `name` beside the versions of the cache at `url`; nothing is read or made yet."""
    return GcsSlot(url, name) if url.startswith("gs://") else FileSlot(url, name)


class FileSlot:
    """A file, swapped under its lock; where a file system has no locks, by comparison alone."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._path = url, Path(url, name)

    def read(self) -> Stored | None:
        with storage_errors(self._url), self._open(os.O_RDONLY, fcntl.LOCK_SH) as file:
            return None if file is None else Stored(_read(file))

    def put(self, data: bytes, over: Stored | None) -> Stored | None:
        with storage_errors(self._url):
            return self._create(data) if over is None else self._replace(data, over)

    def remove(self, stored: Stored) -> None:
        with storage_errors(self._url), self._open(os.O_RDWR, fcntl.LOCK_EX) as file:
            if file is not None and _read(file) == stored.data:
                self._path.unlink()

    def _create(self, data: bytes) -> Stored | None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Who reads it before its content is there finds an unknown owner, and that it changes.
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        try:
            _lock(file, fcntl.LOCK_EX)
            os.pwrite(file, data, 0)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        return Stored(data)

    def _replace(self, data: bytes, over: Stored) -> Stored | None:
        with self._open(os.O_RDWR, fcntl.LOCK_EX) as file:
            if file is None or _read(file) != over.data:
                return None
            os.pwrite(file, data, 0)
            os.ftruncate(file, len(data))
        return Stored(data)

    @contextmanager
    def _open(self, flags: int, lock: int) -> Iterator[int | None]:
        """The file's descriptor, locked; None where there is none, or while waiting for the lock it was removed."""
        try:
            file = os.open(self._path, flags)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            _lock(file, lock)
            yield file if os.fstat(file).st_nlink else None
        finally:
            os.close(file)


class GcsSlot:
    """An object of a bucket, swapped by its generation."""

    def __init__(self, url: str, name: str) -> None:
        from .gcs import GcsObjects

        self._objects, self._name = GcsObjects(url, deadline_s=_DEADLINE_S), name

    def read(self) -> Stored | None:
        found = self._objects.download(self._name)
        return None if found is None else Stored(*found)

    def put(self, data: bytes, over: Stored | None) -> Stored | None:
        generation = self._objects.replace(self._name, data, over.generation if over else 0)
        return None if generation is None else Stored(data, generation)

    def remove(self, stored: Stored) -> None:
        self._objects.delete(self._name, stored.generation)


def _lock(file: int, kind: int) -> None:
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, kind)


def _read(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)

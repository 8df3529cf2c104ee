"""Objects below a URL, a directory or a bucket: read, write, create, replace what was read, list and delete them."""

import fcntl
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from .place import CACHE, Purpose, Stored, check_url, find_bucket_class, is_bucket
from .store import storage_errors


class Objects(Protocol):
    """Objects below a URL, by names such as `images/1052_0_3.png`.

    Works in any number of threads and processes, and can be pickled.

    Raises, from every method:
        StorageError: the disk or the bucket refuses, or does not answer before the deadline.
    """

    @property
    def url(self) -> str:
        """The place, without a slash at the end."""

    def read(self, name: str) -> Stored | None:
        """Return an object's bytes and state; None if there is no such object."""

    def write(self, name: str, data: bytes) -> None:
        """Write an object, replacing an older one; readers see either the old or the new bytes, never a part."""

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one; of many writers with different bytes exactly one gets True.

        Include something unique to the caller in the bytes, such as a random id: in a bucket they decide who wrote it.
        """

    def replace(self, name: str, data: bytes, over: Stored | None) -> Stored | None:
        """Write an object if its present state is `over` (None: it does not exist).

        No two states of the object may have the same bytes.

        Returns:
            the new state. None if the present state is another one, or if a bucket's acknowledgement was lost and the
            repeated write was refused: reading the object tells which.
        """

    def delete(self, name: str, over: Stored | None = None) -> None:
        """Delete an object, if given only in the state `over`; no error if there is none."""

    def list_dir(self, folder: str = "") -> Iterator[str]:
        """List the names directly below a folder, without slashes; none if there is no such folder."""

    def find(self, name: str) -> Iterator[str]:
        """List all objects whose last name is `name`, in the place itself and in all folders below it."""

    def measure_dir(self, folder: str) -> tuple[int, float]:
        """Return the bytes of all objects below a folder, and when the newest was written (Unix time; 0 for none)."""


def open_objects(
    url: str,
    purpose: Purpose = CACHE,
    *,
    deadline_s: float = 120.0,
    first_delay_s: float = 1.0,
    unfinished: str = "unfinished",
) -> Objects:
    """Open the objects below a directory or `gs://bucket/prefix`; nothing is made or requested yet.

    Args:
        url: the place.
        purpose: what it is used for, for error messages.
        deadline_s: seconds after which a request to a bucket that keeps failing is given up.
        first_delay_s: longest pause before such a request is repeated for the first time, in seconds.
        unfinished: folder of a directory for files that are being written.

    Raises:
        StorageError: another kind of URL.
    """
    check_url(url, purpose.setting)
    if is_bucket(url):
        kind = find_bucket_class(url, "objects")
        opened: Objects = kind(url, purpose, deadline_s=deadline_s, first_delay_s=first_delay_s)
        return opened
    return DirectoryObjects(url, purpose, unfinished=unfinished)


def read_object(url: str, purpose: Purpose) -> bytes:
    """Read one file or object by its own URL.

    Raises:
        OSError: there is none, or the file cannot be read.
        StorageError: the bucket cannot be read.
    """
    if not is_bucket(url):
        return Path(url).read_bytes()
    parent, _, name = url.rpartition("/")
    stored = open_objects(parent, purpose).read(name)
    if stored is None:
        raise FileNotFoundError(f"no object {url}")
    return stored.data


class DirectoryObjects:
    """Files below a directory, which is made by the first write.

    `write` puts the bytes into a temporary file and renames it. `replace` changes a file in place under its lock; on a
    file system without locks it only compares the bytes.
    """

    def __init__(self, path: str, purpose: Purpose = CACHE, *, unfinished: str = "unfinished") -> None:
        """Touch nothing yet; for the arguments see `open_objects`."""
        self.url = path.rstrip("/") or "/"
        self._root, self._purpose, self._unfinished = Path(path), purpose, unfinished

    def read(self, name: str) -> Stored | None:
        with self._errors(), self._open(name, os.O_RDONLY, fcntl.LOCK_SH) as file:
            return None if file is None else Stored(_read(file))

    def write(self, name: str, data: bytes) -> None:
        path, temporary = self._root / name, self._root / self._unfinished / uuid4().hex
        with self._errors():
            for folder in (path.parent, temporary.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def create(self, name: str, data: bytes) -> bool:
        return self.replace(name, data, None) is not None

    def replace(self, name: str, data: bytes, over: Stored | None) -> Stored | None:
        with self._errors():
            if over is None:
                return self._create(self._root / name, data)
            with self._open(name, os.O_RDWR, fcntl.LOCK_EX) as file:
                if file is None or _read(file) != over.data:
                    return None
                os.pwrite(file, data, 0)
                os.ftruncate(file, len(data))
            return Stored(data)

    def delete(self, name: str, over: Stored | None = None) -> None:
        path = self._root / name
        with self._errors():
            if over is None:
                path.unlink(missing_ok=True)
                return
            with self._open(name, os.O_RDWR, fcntl.LOCK_EX) as file:
                if file is not None and _read(file) == over.data:
                    path.unlink()

    def list_dir(self, folder: str = "") -> Iterator[str]:
        with self._errors():
            try:
                yield from sorted(os.listdir(self._root / folder))
            except FileNotFoundError:
                return

    def find(self, name: str) -> Iterator[str]:
        # Unlike Path.rglob, this follows links, also to folders that were moved to another disk.
        yield from sorted(glob.glob(f"**/{glob.escape(name)}", root_dir=self._root, recursive=True))

    def measure_dir(self, folder: str) -> tuple[int, float]:
        size, newest = 0, 0.0
        with self._errors():
            for path in (self._root / folder).rglob("*"):
                with suppress(FileNotFoundError):  # a temporary file that was renamed meanwhile
                    found = path.stat()
                    size += found.st_size if stat.S_ISREG(found.st_mode) else 0
                    newest = max(newest, found.st_mtime)
        return size, newest

    def _create(self, path: Path, data: bytes) -> Stored | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A reader that opens the file before its bytes are there reads an empty one.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        try:
            _lock(file, fcntl.LOCK_EX)
            os.pwrite(file, data, 0)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        return Stored(data)

    @contextmanager
    def _open(self, name: str, flags: int, lock: int) -> Iterator[int | None]:
        """Open and lock a file; None if there is none, or if it was deleted while this waited for the lock."""
        try:
            file = os.open(self._root / name, flags)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            _lock(file, lock)
            yield file if os.fstat(file).st_nlink else None
        finally:
            os.close(file)

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.url, self._purpose)


def _lock(file: int, kind: int) -> None:
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, kind)


def _read(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)

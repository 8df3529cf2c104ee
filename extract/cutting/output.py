"""Write the output of `tile` to a directory or `gs://bucket/prefix`; every object appears complete or not at all."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from cache_schema.storage.store import carries_credentials
from extract.errors import PlaceError

_UNFINISHED = "tiling/unfinished"
_LOCK = "tiling/lock"
_AGAIN = "finished scenes are kept, and the same command continues from there"


class Place(Protocol):
    """Objects by name, such as `images/1052_0_3.png`. Every method may raise a TileprobeError that names a remedy."""

    url: str

    def list(self, folder: str) -> Iterator[str]:
        """Names directly below a folder, without it; none where there is no such folder."""

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write an object, over an older one if there is one; readers see the one or the other, never a part."""

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""

    def own(self) -> AbstractContextManager[None]:
        """Keep other tilings out meanwhile, where that is needed."""


def open_place(url: str) -> Place:
    """The place at a directory or `gs://bucket/prefix`; nothing is made or asked yet.

    Raises:
        PlaceError: another kind of URL.
    """
    if carries_credentials(url):
        raise PlaceError("OUT is a URL with a user or password in it: leave them out")
    if url.startswith("gs://"):
        return BucketPlace(url)
    if "://" in url:
        raise PlaceError(f"cannot write tiles to {url}: OUT is gs://bucket/prefix or a local directory")
    return DirectoryPlace(url)


class DirectoryPlace:
    """A directory, made when something is written. A file is written under another name, and renamed when it is whole;
    that name lies outside images/ and labels/, so that no listing of tiles ever meets it."""

    def __init__(self, path: str) -> None:
        self.url = path.rstrip("/") or "/"
        self._root = Path(path)

    def list(self, folder: str) -> Iterator[str]:
        with self._errors():
            try:
                yield from os.listdir(self._root / folder)
            except FileNotFoundError:
                return

    def read(self, name: str) -> bytes | None:
        with self._errors():
            try:
                return (self._root / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        path, unfinished = self._root / name, self._root / _UNFINISHED / uuid4().hex
        with self._errors():
            for folder in (path.parent, unfinished.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_bytes(data)
                unfinished.replace(path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise

    def delete(self, name: str) -> None:
        with self._errors():
            (self._root / name).unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise PlaceError(
                f"{self.url}: {error.strerror}: {'free space' if full else 'check OUT and its permissions'}; {_AGAIN}"
            ) from error

    @contextmanager
    def own(self) -> Iterator[None]:
        """Keep other tilings out of the directory, and remove what one that was killed left half written.

        The lock ends with the process, however that ends. Where a file system has no locks, nothing is kept out.
        """
        with self._errors():
            (self._root / _LOCK).parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PlaceError(f"another process cuts tiles into {self.url}: wait for it, or stop it") from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            for name in self.list(_UNFINISHED):
                self.delete(f"{_UNFINISHED}/{name}")
            yield
        finally:
            os.close(file)


class BucketPlace:
    """A prefix of a bucket; every object is checked against its crc32c on its way."""

    def __init__(self, url: str) -> None:
        from cache_schema.storage.gcs import GcsObjects

        self._objects = GcsObjects(url, setting="OUT", again=_AGAIN)
        self.url = self._objects.url

    def list(self, folder: str) -> Iterator[str]:
        prefix = self._objects.name(f"{folder}/")
        for page in self._objects.list_pages(prefix):
            yield from (name[len(prefix) :] for name in page if name != prefix)

    def read(self, name: str) -> bytes | None:
        found = self._objects.download(name)
        return None if found is None else found[0]

    def write(self, name: str, data: bytes) -> None:
        self._objects.upload(name, data)

    def delete(self, name: str) -> None:
        self._objects.delete(name)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Nothing to keep out: two tilings with the same settings write the same objects, and other settings are
        refused."""
        yield

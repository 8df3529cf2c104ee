"""Where a cache's bytes lie: a directory or a bucket, as a Zarr store, and what their refusals mean for a user."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

from zarr.abc.store import Store
from zarr.storage import LocalStore

from cache_schema.errors import StorageError


def open_store(url: str, *, read_only: bool) -> Store:
    """The store at a directory or `gs://bucket/prefix`; no request is made yet."""
    if carries_credentials(url):
        raise StorageError("CACHE is a URL with a user or password in it: leave them out")
    if url.startswith("gs://"):
        from .gcs_store import GcsStore

        return GcsStore(url, read_only=read_only)
    if "://" in url:
        raise StorageError(f"cannot open {url}: a cache is a local directory or gs://bucket/prefix")
    return LocalStore(url, read_only=read_only)


def carries_credentials(url: str) -> bool:
    """Whether it is `scheme://user:password@place`: refused, since what is asked for is written to caches and runs."""
    _, mark, rest = url.partition("://")
    return bool(mark) and "@" in rest.partition("/")[0]


def measure_folder(url: str, folder: str) -> tuple[int, float]:
    """Bytes of everything below a folder of a store, and when the newest was written (seconds since 1970; 0 for none).

    Zarr's stores know sizes, but no times.
    """
    if url.startswith("gs://"):
        from .gcs import GcsObjects

        return GcsObjects(url, role="Storage Object Viewer").measure_dir(folder)
    size, newest = 0, 0.0
    with storage_errors(url):
        for path in Path(url, folder).rglob("*"):
            with suppress(FileNotFoundError):  # the temporary name of a file that is being written
                found = path.stat()
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
                newest = max(newest, found.st_mtime)
    return size, newest


class storage_errors:
    """Turns the operating system's refusals into an error that says what to do."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(
                f"{self._url}: {reason}: {'free space' if full else 'check CACHE and its permissions'}, or choose "
                "another CACHE; what is committed stays, and the same command goes on from there"
            ) from error

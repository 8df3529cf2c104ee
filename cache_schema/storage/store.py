"""The Zarr store of a cache, in a directory or a bucket, and errors of the disk that say what to do."""

import errno
import os
from typing import Self

from zarr.abc.store import Store
from zarr.storage import LocalStore

from cache_schema.errors import StorageError

from .place import CACHE, Purpose, check_url, is_bucket


def open_store(url: str, *, read_only: bool) -> Store:
    """Open the store at a directory or `gs://bucket/prefix`; no request is made yet.

    Raises:
        StorageError: another kind of URL.
    """
    check_url(url, "CACHE")
    if is_bucket(url):
        from .gcs_store import GcsStore

        return GcsStore(url, read_only=read_only)
    return LocalStore(url, read_only=read_only)


class storage_errors:
    """Turn the operating system's errors into a StorageError that says what to do.

    Args:
        url: the place that was read or written.
        purpose: what it is used for.
    """

    def __init__(self, url: str, purpose: Purpose = CACHE) -> None:
        self._url, self._purpose = url, purpose

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            setting, again = self._purpose.setting, self._purpose.again
            raise StorageError(
                f"{self._url}: {reason}: {'free space' if full else f'check {setting} and its permissions'}, or choose "
                f"another {setting}; {again}"
            ) from error

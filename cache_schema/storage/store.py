"""The Zarr store of a cache, in a directory or a bucket, and errors of the disk that say what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from zarr.abc.store import Store
from zarr.storage import LocalStore

from cache_schema.errors import StorageError

from .place import CACHE, Purpose, check_url, find_bucket_class, is_bucket


def open_store(url: str, *, read_only: bool) -> Store:
    """Open the store at a directory or `gs://bucket/prefix`; no request is made yet.

    Raises:
        StorageError: another kind of URL.
    """
    check_url(url, "CACHE")
    if is_bucket(url):
        store: Store = find_bucket_class(url, "store")(url, read_only=read_only)
        return store
    return LocalStore(url, read_only=read_only)


@contextmanager
def storage_errors(url: str, purpose: Purpose = CACHE) -> Iterator[None]:
    """Turn the operating system's errors at a place into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        setting, again = purpose.setting, purpose.again
        raise StorageError(
            f"{url}: {reason}: {'free space' if full else f'check {setting} and its permissions'}, or choose another "
            f"{setting}; {again}"
        ) from error

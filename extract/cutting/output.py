"""The place that `tile` writes to, and its lock."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_schema.storage.objects import Objects, open_objects
from cache_schema.storage.place import Purpose, is_bucket
from cache_schema.storage.store import storage_errors
from extract.errors import PlaceError

_UNFINISHED = "tiling/unfinished"
_LOCK = "tiling/lock"
_PURPOSE = Purpose("OUT", again="finished scenes are kept, and the same command continues from there")


def open_place(url: str) -> Objects:
    """Open the place at a directory or `gs://bucket/prefix`; nothing is made or requested yet.

    Unfinished files lie outside images/ and labels/, so that no listing of tiles shows them.

    Raises:
        StorageError: another kind of URL.
    """
    return open_objects(url, _PURPOSE, unfinished=_UNFINISHED)


@contextmanager
def own_place(place: Objects) -> Iterator[None]:
    """Keep other processes from cutting tiles into a directory, and delete unfinished files of one that was killed.

    The lock ends with the process. On a file system without locks it has no effect. A bucket needs no lock: with the
    same settings two processes write the same objects, and other settings are refused.

    Raises:
        PlaceError: another process cuts tiles into the directory.
        StorageError: the disk refuses.
    """
    if is_bucket(place.url):
        yield
        return
    path = Path(place.url, _LOCK)
    with storage_errors(place.url, _PURPOSE):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlaceError(f"another process cuts tiles into {place.url}: wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        for name in place.list_dir(_UNFINISHED):
            place.delete(f"{_UNFINISHED}/{name}")
        yield
    finally:
        os.close(file)

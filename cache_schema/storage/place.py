"""What a URL names, how error messages speak of it, and the state of an object that was read there.

To add a kind of bucket, add a row to `_BUCKETS`.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from cache_schema.errors import StorageError

VIEWER, USER = "Storage Object Viewer", "Storage Object User"
"""Roles on a bucket that allow reading, and reading and writing."""


@dataclass(frozen=True)
class _Bucket:
    """A kind of bucket: where the classes for it are, imported on first use, since they import a client library.

    Attributes:
        objects: implements `Objects`.
        store: a Zarr store.
    """

    objects: str
    store: str


_BUCKETS = {
    "gs://": _Bucket("cache_schema.storage.gcs:GcsObjects", "cache_schema.storage.gcs_store:GcsStore"),
}
"""By the scheme of their URLs."""


@dataclass(frozen=True)
class Purpose:
    """What a place is used for, in the words of its error messages.

    Attributes:
        setting: the variable or option that names the place.
        role: the role on a bucket that suffices.
        again: what is not lost, and how to continue.
    """

    setting: str = "CACHE"
    role: str = USER
    again: str = "what is committed stays, and the same command continues from there"


CACHE = Purpose()
"""A cache, read and written."""


@dataclass(frozen=True)
class Stored:
    """The state of an object when it was read.

    Attributes:
        data: its bytes.
        generation: the number that a bucket gives each state; 0 for a file, which is compared by its bytes.
    """

    data: bytes
    generation: int = 0


def is_bucket(url: str) -> bool:
    """Return whether a URL names a bucket or something in it; anything else is a path."""
    return url.startswith(tuple(_BUCKETS))


def find_bucket_class(url: str, what: str) -> Any:
    """Return the class for the `objects` or the Zarr `store` of the kind of bucket at this URL."""
    return next(resolve_name(getattr(kind, what)) for scheme, kind in _BUCKETS.items() if url.startswith(scheme))


def split_url(url: str) -> list[str]:
    """Split `gs://bucket/a/b` into bucket and folders, or a path into its folders."""
    for scheme in _BUCKETS:
        url = url.removeprefix(scheme)
    return url.rstrip("/").split("/")


def carries_credentials(url: str) -> bool:
    """Return whether it is `scheme://user:password@place`."""
    _, mark, rest = url.partition("://")
    return bool(mark) and "@" in rest.partition("/")[0]


def check_url(url: str, setting: str) -> None:
    """Check that the URL in the variable or option `setting` is `gs://bucket/prefix` or a path, without a password.

    Raises:
        StorageError: it is neither, or holds a user or password, which caches and runs would record.
    """
    if carries_credentials(url):
        raise StorageError(f"{setting} is a URL with a user or password in it: leave them out")
    if "://" in url and not is_bucket(url):
        kinds = ", ".join(f"{scheme}bucket/prefix" for scheme in _BUCKETS)
        raise StorageError(f"cannot open {url}: {setting} is {kinds} or a local directory")

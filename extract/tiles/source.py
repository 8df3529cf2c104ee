"""List and read tiles in `gs://bucket/prefix` or a local directory.

TILES holds `images/NAME.png|jpg|jpeg|tif` and `labels/NAME.txt`. The listing alone identifies every tile's bytes;
each read is checked against it.
"""

import os
import struct
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Protocol, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from cache_schema.errors import StorageError
from cache_schema.storage.place import VIEWER, Purpose, check_url, is_bucket
from extract.errors import SourceError, TileGoneError, TransportError

CONCURRENT_READS = 32
"""Requests in flight per process: at 50 ms each they deliver more tiles than one core decodes."""
_CHECKED_READS = 16
"""Connections that google-cloud-storage keeps open, used only for bodies that did not match the listing."""
_PAGE_FILES = 4096
_PURPOSE = Purpose("TILES", VIEWER)

ListedObject = tuple[str, int, int, int]
"""Name, size, crc32c, generation: one row of a page."""


@dataclass(frozen=True, eq=False)
class ListedPage:
    """n listed objects, in columns: one Python object each would take more time and memory than all later steps.

    Attributes:
        name: below TILES, such as `images/1052_3_7.png` (StringDType).
        size: bytes (int64).
        crc32c: of the bytes (uint32); for a local file, of its modification time instead.
        generation: object generation (int64); for a local file, its modification time in ns.
    """

    name: npt.NDArray[np.str_]
    size: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.uint32]
    generation: npt.NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[ListedObject]) -> Self:
        """Make columns from rows."""
        names, sizes, checksums, generations = zip(*rows, strict=True) if rows else ((), (), (), ())
        return cls(
            np.array(names, np.dtypes.StringDType()),
            np.array(sizes, np.int64),
            np.array(checksums, np.uint32),
            np.array(generations, np.int64),
        )

    @classmethod
    def concatenate(cls, pages: Sequence[Self]) -> Self:
        """Join pages to one, which is empty if there are none."""
        pages = [cls.from_rows([]), *pages]  # NumPy cannot concatenate an empty list
        return cls(*(np.concatenate([getattr(page, field.name) for page in pages]) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.name)

    def select(self, rows: npt.NDArray[np.integer | np.bool_]) -> Self:
        """Return the objects at `rows` (a mask, or indices)."""
        return type(self)(self.name[rows], self.size[rows], self.crc32c[rows], self.generation[rows])


class Source(Protocol):
    """Lists and reads objects by their name below TILES."""

    url: str
    identity: str
    """`crc32c` if the listing gives the bytes' checksum, `mtime` if a modification time is used instead."""

    def list(self, folder: str) -> Iterator[ListedPage]:
        """List the objects below `folder` (all of TILES if it is empty), page by page, in no particular order.

        Raises:
            SourceError: the folder cannot be listed, or an object's metadata is incomplete.
        """

    def read(self, name: str, generation: int) -> bytes:
        """Return the bytes of one object.

        Raises:
            TileGoneError: the listed generation no longer exists.
            TransportError: reading kept failing past its deadline.
            SourceError: access refused.
        """

    def read_checked(self, name: str, generation: int) -> bytes:
        """Read as `read` does, but verify the transfer and repeat it if it was damaged; slower.

        Used when a body did not match the listing: the result is what the bucket really holds.
        """


def open_source(url: str) -> Source:
    """Open `gs://bucket/prefix` or a local directory; no request is made yet.

    Raises:
        SourceError: another kind of URL, or a directory that does not exist.
    """
    try:
        check_url(url, _PURPOSE.setting)
        return GcsSource(url) if is_bucket(url) else LocalSource(url)
    except StorageError as error:
        raise SourceError(str(error)) from error


class LocalSource:
    """A directory of tiles."""

    identity = "mtime"

    def __init__(self, path: str) -> None:
        self.url = path.rstrip("/") or "/"
        self._root = Path(path)
        if not self._root.is_dir():
            raise SourceError(f"no directory {path}: check TILES")

    def list(self, folder: str) -> Iterator[ListedPage]:
        files = self._find_files(folder)
        while page := list(islice(files, _PAGE_FILES)):
            yield ListedPage.from_rows(page)

    def _find_files(self, folder: str) -> Iterator[ListedObject]:
        root = os.path.join(self._root, "")
        for directory, folders, files in os.walk(root + folder, onerror=self._refuse_folder):
            for linked in filter(os.path.islink, (os.path.join(directory, name) for name in folders)):
                # Following the link could loop for ever; skipping it would silently leave out its tiles.
                raise SourceError(f"cannot list {linked!r}: a link to a folder: replace it with the folder itself")
            for file in files:
                path = os.path.join(directory, file)
                name = path[len(root) :]
                try:
                    name.encode()
                    stat = os.stat(path)
                except (OSError, UnicodeEncodeError) as error:
                    raise SourceError(f"cannot list {path!r}: {error.args[-1]}: fix or remove it") from error
                if not S_ISREG(stat.st_mode):  # a read from a pipe or a device might never end
                    raise SourceError(f"cannot list {path!r}: not a file: remove it")
                checksum = google_crc32c.value(stat.st_mtime_ns.to_bytes(8, "little"))
                yield name, stat.st_size, checksum, stat.st_mtime_ns

    def _refuse_folder(self, error: OSError) -> None:
        """Raise for a folder that cannot be listed, whose tiles would otherwise be left out silently."""
        if not isinstance(error, FileNotFoundError):
            raise SourceError(f"cannot list {error.filename}: {error.strerror}: check TILES and its permissions")

    def read(self, name: str, generation: int) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError as error:
            raise TileGoneError(f"{self.url}/{name} is gone") from error
        except OSError as error:
            raise TransportError(f"cannot read {self.url}/{name}: {error.strerror}") from error

    read_checked = read


class GcsSource:
    """A prefix of a bucket. Picklable: it holds no client, each process has its own."""

    identity = "crc32c"

    def __init__(self, url: str) -> None:
        from cache_schema.storage.gcs import GcsObjects

        self._objects = GcsObjects(url, _PURPOSE, concurrency=_CHECKED_READS)
        self.url = self._objects.url

    def list(self, folder: str) -> Iterator[ListedPage]:
        try:
            for page in self._objects.list_items(folder, "name,size,crc32c,generation"):
                listed = [self._read_item(item) for item in page]
                # Consoles create an object whose name ends in / as the placeholder of a folder.
                yield ListedPage.from_rows([row for row in listed if not row[0].endswith("/")])
        except StorageError as error:
            raise _explain(error) from error

    def _read_item(self, item: Mapping[str, str]) -> ListedObject:
        """Parse an object resource of the JSON API: numbers are decimal strings, crc32c is big-endian base64."""
        try:
            (crc32c,) = struct.unpack(">I", a2b_base64(item["crc32c"]))
            name = item["name"][len(self._objects.name("")) :]
            return name, int(item["size"]), crc32c, int(item["generation"])
        except (KeyError, ValueError, struct.error) as error:
            raise SourceError(
                f"{self.url} lists an object without usable name, size, crc32c or generation, {dict(item)}: "
                "upload it again or remove it"
            ) from error

    def read(self, name: str, generation: int) -> bytes:
        from .gcs_reader import can_name, open_reader

        path = self._objects.name(name)
        if not can_name(path):
            return self.read_checked(name, generation)
        return open_reader(self._objects.bucket, CONCURRENT_READS).read(path, generation)

    def read_checked(self, name: str, generation: int) -> bytes:
        try:
            stored = self._objects.read(name, generation or None)
        except StorageError as error:
            raise _explain(error) from error
        if stored is None:
            raise TileGoneError(f"{self.url}/{name} is gone")
        return stored.data


def _explain(error: StorageError) -> SourceError:
    """A refusal by the bucket as a SourceError; anything else as a TransportError."""
    from google.api_core.exceptions import ClientError
    from google.auth.exceptions import GoogleAuthError

    refused = isinstance(error.__cause__, (ClientError, GoogleAuthError))
    return SourceError(str(error)) if refused else TransportError(str(error))

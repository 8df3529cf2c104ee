"""Where tiles are: list them, and read one object, from `gs://bucket/prefix` or a local directory.

Below TILES lie `images/NAME.png|jpg|jpeg|tif` and `labels/NAME.txt`. The listing alone identifies every tile's bytes;
a read is checked against it.
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
"""Requests in flight per process: at 50 ms each they bring more tiles than one core decodes."""
_CHECKED_READS = 16
"""Connections that google-cloud-storage keeps open: only bodies that were not what was listed travel through it."""
_PAGE_FILES = 4096
_PURPOSE = Purpose("TILES", VIEWER)

ListedObject = tuple[str, int, int, int]
"""Name, size, crc32c, generation: a row of a page."""


@dataclass(frozen=True, eq=False)
class ListedPage:
    """n objects of a listing, in columns: one by one they would cost more time and memory than all that follows.

    Attributes:
        name: below TILES, such as `images/1052_3_7.png` (StringDType).
        size: bytes (int64).
        crc32c: of the bytes (uint32); for a local file, of its modification time, which stands in for them.
        generation: object generation (int64); for a local file, its modification time in ns.
    """

    name: npt.NDArray[np.str_]
    size: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.uint32]
    generation: npt.NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[ListedObject]) -> Self:
        """The columns of objects that came one by one."""
        names, sizes, checksums, generations = zip(*rows, strict=True) if rows else ((), (), (), ())
        return cls(
            np.array(names, np.dtypes.StringDType()),
            np.array(sizes, np.int64),
            np.array(checksums, np.uint32),
            np.array(generations, np.int64),
        )

    @classmethod
    def concatenate(cls, pages: Sequence[Self]) -> Self:
        """One page after the other, as one; an empty one of none."""
        pages = [cls.from_rows([]), *pages]  # NumPy refuses to concatenate nothing
        return cls(*(np.concatenate([getattr(page, field.name) for page in pages]) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.name)

    def select(self, rows: npt.NDArray[np.integer | np.bool_]) -> Self:
        """The same columns at `rows` (a mask, or indices)."""
        return type(self)(self.name[rows], self.size[rows], self.crc32c[rows], self.generation[rows])


class Source(Protocol):
    """A place that lists and reads objects by their name below TILES."""

    url: str
    identity: str
    """`crc32c` where the listing knows the bytes' checksum, `mtime` where a modification time stands in."""

    def list(self, folder: str) -> Iterator[ListedPage]:
        """Objects below `folder`, page by page, in no particular order; below TILES itself if it is empty.

        Raises:
            SourceError: it cannot be listed, or says too little about an object.
        """

    def read(self, name: str, generation: int) -> bytes:
        """The bytes of one object.

        Raises:
            TileGoneError: the listed generation does not exist any more.
            TransportError: reading kept failing past its deadline.
            SourceError: access refused.
        """

    def read_checked(self, name: str, generation: int) -> bytes:
        """As `read`, for a body that was not what was listed: slower, but damage done on the way is noticed and read
        again, so what comes is what is there."""


def open_source(url: str) -> Source:
    """The source behind `gs://bucket/prefix` or a local directory; no request is made yet.

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
                # Followed, it could lead in a circle; passed over, its tiles would be missed by nobody.
                raise SourceError(f"cannot list {linked!r}: a link to a folder: put the folder itself there")
            for file in files:
                path = os.path.join(directory, file)
                name = path[len(root) :]
                try:
                    name.encode()
                    stat = os.stat(path)
                except (OSError, UnicodeEncodeError) as error:
                    raise SourceError(f"cannot list {path!r}: {error.args[-1]}: mend or remove it") from error
                if not S_ISREG(stat.st_mode):  # reading a pipe would wait for ever, a device never end
                    raise SourceError(f"cannot list {path!r}: not a file: remove it")
                stand_in = google_crc32c.value(stat.st_mtime_ns.to_bytes(8, "little"))
                yield name, stat.st_size, stand_in, stat.st_mtime_ns

    def _refuse_folder(self, error: OSError) -> None:
        """A folder that cannot be listed would leave its tiles out without a word."""
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
    """A prefix of a bucket; picklable, since its clients belong to the process."""

    identity = "crc32c"

    def __init__(self, url: str) -> None:
        from cache_schema.storage.gcs import GcsObjects

        self._objects = GcsObjects(url, _PURPOSE, concurrency=_CHECKED_READS)
        self.url = self._objects.url

    def list(self, folder: str) -> Iterator[ListedPage]:
        try:
            for page in self._objects.list_items(folder, "name,size,crc32c,generation"):
                listed = [self._read_item(item) for item in page]
                # A name that ends in / is the placeholder that consoles make for a folder.
                yield ListedPage.from_rows([row for row in listed if not row[0].endswith("/")])
        except StorageError as error:
            raise _explain(error) from error

    def _read_item(self, item: Mapping[str, str]) -> ListedObject:
        """A row from an object resource of the JSON API: decimal numbers, and crc32c in base64, big-endian."""
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

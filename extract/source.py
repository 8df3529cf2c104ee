"""Where tiles are: list them, and read one object, from `gs://bucket/prefix` or a local directory.

Below TILES lie `images/NAME.png|jpg|jpeg|tif` and `labels/NAME.txt`. The listing alone identifies every tile's bytes;
a read is checked against it.
"""

import base64
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import google_crc32c
import numpy as np

from cache_schema import NO_LABEL, TileTable

from .errors import SourceError, TileGoneError, TransportError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
CONCURRENT_READS = 32
"""Requests in flight per process: at 50 ms each they bring more tiles than one core decodes."""
_CHECKED_READS = 16
"""Connections that google-cloud-storage keeps open: only bodies that were not what was listed travel through it."""
_TRANSFER_ATTEMPTS = 10
_TRANSFER_PAUSE_S = 0.2


@dataclass(frozen=True)
class ListedObject:
    """One object of a listing. `crc32c` of a local file is that of its modification time, which stands in for it."""

    name: str
    size: int
    crc32c: int
    generation: int


@dataclass(frozen=True)
class Listing:
    """What lies below TILES.

    Attributes:
        table: the tiles to embed, sorted by name.
        unlabelled: tiles without a label object that were left out (0 when they were asked for).
        other: objects under images/ that are not tiles.
    """

    table: TileTable
    unlabelled: int
    other: int


class Source(Protocol):
    """A place that lists and reads objects by their name below TILES."""

    url: str
    identity: str
    """`crc32c` where the listing knows the bytes' checksum, `mtime` where a modification time stands in."""

    def list(self, folder: str) -> Iterator[ListedObject]:
        """Objects below `folder`, in no particular order."""

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
    if url.startswith("gs://"):
        return GcsSource(url)
    if "://" in url:
        raise SourceError(f"cannot read tiles from {url}: TILES is gs://bucket/prefix or a local directory")
    return LocalSource(url)


def list_tiles(source: Source, *, unlabelled: bool = False) -> Listing:
    """The tile table of a source, from its listing alone: no object is read.

    Args:
        source: where to look.
        unlabelled: include tiles that have no label object.

    Raises:
        SourceError: no tiles, or none with a label.
    """
    images: list[ListedObject] = []
    other = 0
    for found in source.list("images"):
        if PurePosixPath(found.name).suffix.lower() in IMAGE_SUFFIXES:
            images.append(found)
        else:
            other += 1
    if not images:
        raise SourceError(f"no tiles under {source.url}/images/: check TILES")
    labels = {_stem(label.name): label for label in source.list("labels") if label.name.endswith(".txt")}
    pairs = [(image, labels.get(_stem(image.name))) for image in sorted(images, key=lambda found: found.name)]
    kept = [pair for pair in pairs if unlabelled or pair[1] is not None]
    if not kept:
        raise SourceError(
            f"{len(images):,} tiles under {source.url}/images/, but none has its labels/NAME.txt: "
            "check TILES, or embed them anyway with --unlabelled"
        )
    return Listing(_build_table(kept), len(pairs) - len(kept), other)


def label_name(tile: str) -> str:
    """`images/a/b.png` -> `labels/a/b.txt`."""
    return f"labels/{_stem(tile)}.txt"


def _stem(name: str) -> str:
    """The name below images/ or labels/, without its suffix: what a tile and its label share."""
    return name.split("/", 1)[1].rsplit(".", 1)[0]


def _build_table(pairs: Iterable[tuple[ListedObject, ListedObject | None]]) -> TileTable:
    pairs = list(pairs)
    return TileTable(
        tile=np.array([image.name for image, _ in pairs], np.dtypes.StringDType()),
        size=np.array([image.size for image, _ in pairs], np.int64),
        crc32c=np.array([image.crc32c for image, _ in pairs], np.uint32),
        generation=np.array([image.generation for image, _ in pairs], np.int64),
        label_size=np.array([NO_LABEL if label is None else label.size for _, label in pairs], np.int64),
        label_crc32c=np.array([0 if label is None else label.crc32c for _, label in pairs], np.uint32),
    )


class LocalSource:
    """A directory of tiles."""

    identity = "mtime"

    def __init__(self, path: str) -> None:
        self.url = path.rstrip("/") or "/"
        self._root = Path(path)
        if not self._root.is_dir():
            raise SourceError(f"no directory {path}: check TILES")

    def list(self, folder: str) -> Iterator[ListedObject]:
        for directory, _, files in os.walk(self._root / folder, onerror=self._refuse_folder):
            for file in files:
                path = Path(directory, file)
                name = path.relative_to(self._root).as_posix()
                try:
                    name.encode()
                    stat = path.stat()
                except (OSError, UnicodeEncodeError) as error:
                    raise SourceError(f"cannot list {str(path)!r}: {error.args[-1]}: mend or remove it") from error
                stand_in = google_crc32c.value(stat.st_mtime_ns.to_bytes(8, "little"))
                yield ListedObject(name, stat.st_size, stand_in, stat.st_mtime_ns)

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
        bucket, _, prefix = url.removeprefix("gs://").rstrip("/").partition("/")
        self.url = url.rstrip("/")
        if len(bucket) < 3:
            raise SourceError(f"{url} names no bucket: TILES is gs://bucket/prefix")
        self._bucket_name = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    def list(self, folder: str) -> Iterator[ListedObject]:
        from cache_schema.gcs_client import GCS_ERRORS

        fields = "items(name,size,crc32c,generation),nextPageToken"
        try:
            for blob in self._bucket().list_blobs(prefix=f"{self._prefix}{folder}/", fields=fields):
                if not blob.name.endswith("/"):  # the placeholder that consoles make for a folder
                    name = blob.name[len(self._prefix) :]
                    yield ListedObject(name, blob.size, _decode_crc32c(blob.crc32c), blob.generation)
        except GCS_ERRORS as error:
            raise self._explain(error) from error

    def read(self, name: str, generation: int) -> bytes:
        from .gcs_reader import can_name, open_reader

        path = self._prefix + name
        if not can_name(path):
            return self.read_checked(name, generation)
        return open_reader(self._bucket_name).read(path, generation)

    def read_checked(self, name: str, generation: int) -> bytes:
        from google.cloud.exceptions import NotFound
        from google.cloud.storage.exceptions import DataCorruption

        from cache_schema.gcs_client import GCS_ERRORS

        try:
            for _ in range(_TRANSFER_ATTEMPTS):
                blob = self._bucket().blob(self._prefix + name, generation=generation or None)
                # Unlike other faults of the transport, a damaged body is not read again by the library.
                with suppress(DataCorruption):
                    return bytes(blob.download_as_bytes(raw_download=True, checksum="crc32c"))
                time.sleep(_TRANSFER_PAUSE_S)
        except NotFound as error:
            raise TileGoneError(f"{self.url}/{name} is gone") from error
        except GCS_ERRORS as error:
            raise self._explain(error) from error
        raise TransportError(f"{self.url}/{name} arrived damaged {_TRANSFER_ATTEMPTS} times: check the network")

    def _bucket(self) -> Any:
        from cache_schema.gcs_client import connect

        return connect(_CHECKED_READS).client().bucket(self._bucket_name)

    def _explain(self, error: Exception) -> SourceError:
        from google.api_core.exceptions import ClientError
        from google.auth.exceptions import GoogleAuthError

        from cache_schema.gcs_client import explain_gcs_error

        refused = isinstance(error, (ClientError, GoogleAuthError))
        text = explain_gcs_error(error, self.url, setting="TILES", role="Storage Object Viewer")
        return SourceError(text) if refused else TransportError(text)


def _decode_crc32c(text: str) -> int:
    """The listing's base64 of four big-endian bytes."""
    return int.from_bytes(base64.b64decode(text), "big")

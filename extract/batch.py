"""One batch of tiles, made in a feed worker: fetch tiles and labels together, check, decode, put side by side.

What is to be read travels with the request, so a worker needs no table and its memory does not grow with the bucket.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock, Semaphore
from typing import NamedTuple, Self

import google_crc32c
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from cache_schema import LABEL_ID_COLUMNS, NO_LABEL, Status, TileTable
from cache_schema.layout import BoolArray, UInt8Array, UInt16Array

from .decode import RGBImage, UndecodableTileError, decode_tile
from .errors import TileGoneError, TransportError
from .labels import ParsedLabels, parse_labels
from .listing import label_name
from .source import CONCURRENT_READS, Source
from .transform import TileImages

_MAX_EXAMPLES = 20


class TileRequest(NamedTuple):
    """One row of the table: what to read and what it must be."""

    row: int
    tile: str
    size: int
    crc32c: int
    generation: int
    label_size: int
    label_crc32c: int


@dataclass(frozen=True, eq=False)
class TileBatch:
    """One batch of n tiles, rows in the order asked for.

    Attributes:
        rows: (n,) int64 rows of the table.
        images: uint8; a row that is not embedded holds zeros.
        status: (n,) uint8, see `Status`.
        label_ids: (n, 128) uint16.
        label_lines: lines with content in all label files.
        problems: one readable line per quarantined tile and per malformed label line.
        decode_s: seconds its decoders took, over their number.
        fetch_s: seconds it was waited for beyond those.
    """

    rows: np.ndarray[tuple[int], np.dtype[np.int64]]
    images: TileImages
    status: UInt8Array
    label_ids: UInt16Array
    label_lines: int
    problems: tuple[str, ...]
    fetch_s: float
    decode_s: float

    def __len__(self) -> int:
        return len(self.rows)

    def pin_memory(self) -> Self:
        """The same batch, its images in page-locked memory; the DataLoader calls this in a thread of its own."""
        images = self.images
        pinned = images.pin_memory() if isinstance(images, Tensor) else [image.pin_memory() for image in images]
        return replace(self, images=pinned)


def make_requests(table: TileTable, rows: Iterable[int], *, labels: bool = True) -> list[TileRequest]:
    """Requests for `rows` of the table, in that order; without `labels`, for the tiles alone."""
    return [
        TileRequest(
            row,
            str(table.tile[row]),
            int(table.size[row]),
            int(table.crc32c[row]),
            int(table.generation[row]),
            int(table.label_size[row]) if labels else NO_LABEL,
            int(table.label_crc32c[row]),
        )
        for row in rows
    ]


class TileReader:
    """Reads tiles in threads: many wait for the network at a time, a few decode.

    Args:
        source: where tiles are.
        decoders: tiles decoded at a time, one a core.
    """

    def __init__(self, source: Source, decoders: int) -> None:
        self.source = source
        self.decoders = decoders
        self.pool = ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="read")
        self.decoding = Semaphore(decoders)


class _Tile(NamedTuple):
    """What became of one request; the image itself is in the batch's stack."""

    status: Status
    reason: str | None
    labels: ParsedLabels | None
    decode_s: float


class PendingBatch:
    """A batch whose tiles are being fetched and decoded."""

    def __init__(self, reader: TileReader, requests: Sequence[TileRequest]) -> None:
        """Start on every tile; those beyond the reader's threads wait their turn."""
        self.requests = requests
        self._reader = reader
        self._images = ImageStack(len(requests))
        self._tiles = [reader.pool.submit(self._read, row, request) for row, request in enumerate(requests)]

    def finish(self) -> TileBatch:
        """Wait for the tiles and put them together.

        Raises:
            SourceError: what is no single tile's own fault: an outage, refused access, a label that changed.
        """
        started = time.perf_counter()
        tiles = [tile.result() for tile in self._tiles]
        waited = time.perf_counter() - started
        label_ids = np.zeros((len(tiles), LABEL_ID_COLUMNS), "<u2")
        problems: list[str] = []
        for i, (request, tile) in enumerate(zip(self.requests, tiles, strict=True)):
            if tile.reason:
                problems.append(f"{request.tile}: quarantined: {tile.reason}")
            if tile.labels is not None:
                label_ids[i] = tile.labels.counts
                bad = tile.labels.malformed[:_MAX_EXAMPLES]
                problems += [f"{label_name(request.tile)}:{n}: malformed line" for n in bad]
        decode_s = sum(tile.decode_s for tile in tiles) / self._reader.decoders
        status = np.array([tile.status for tile in tiles], np.uint8)
        return TileBatch(
            rows=np.array([request.row for request in self.requests], np.int64),
            images=self._images.finish(status == Status.EMBEDDED),
            status=status,
            label_ids=label_ids,
            label_lines=sum(tile.labels.lines for tile in tiles if tile.labels is not None),
            problems=tuple(problems),
            fetch_s=max(0.0, waited - decode_s),
            decode_s=decode_s,
        )

    def _read(self, row: int, request: TileRequest) -> _Tile:
        """Everything about one tile, in one of the reader's threads."""
        data, labels = _fetch_tile(self._reader.source, request), _fetch_labels(self._reader.source, request)
        if isinstance(data, Status):
            return _Tile(data, data.reason, labels, 0.0)
        with self._reader.decoding:
            started = time.perf_counter()
            try:
                self._images.put(row, decode_tile(data, self._images.get_row(row)))
            except UndecodableTileError as error:
                return _Tile(error.status, f"{error.status.reason} ({error})", labels, 0.0)
            return _Tile(Status.EMBEDDED, None, labels, time.perf_counter() - started)


def _fetch_tile(source: Source, request: TileRequest) -> bytes | Status:
    """A tile's bytes, or why it is quarantined."""
    try:
        data = _read_listed(source, request.tile, request.generation, request.size, request.crc32c)
    except TileGoneError:
        return Status.GONE
    return Status.CHECKSUM_MISMATCH if data is None else data


def _fetch_labels(source: Source, request: TileRequest) -> ParsedLabels | None:
    """The tile's labels, None where it has no label object.

    A label that changed since the listing makes the whole block stale, not one row of it.
    """
    if request.label_size == NO_LABEL:
        return None
    if request.label_size == 0:
        return parse_labels(b"")
    name = label_name(request.tile)
    try:
        # The table pins the tile's generation; a label is pinned by its checksum.
        text = _read_listed(source, name, 0, request.label_size, request.label_crc32c)
    except TileGoneError:
        text = None
    if text is None:
        raise TransportError(f"{name} changed or went away since it was listed: run the same command again")
    return parse_labels(text)


def _read_listed(source: Source, name: str, generation: int, size: int, crc32c: int) -> bytes | None:
    """The object's bytes if they are those that were listed.

    The fast read checks nothing, so a body that does not fit is read again, twice, in the way that can tell damage
    done by the network from other bytes in the bucket.
    """
    for read in (source.read, source.read_checked, source.read_checked):
        data = read(name, generation)
        if len(data) == size and (source.identity != "crc32c" or google_crc32c.value(data) == crc32c):
            return data
    return None


class ImageStack:
    """A batch's images, put in by threads: rows of one tensor as long as their sizes agree, else one tensor each."""

    def __init__(self, rows: int) -> None:
        self._tensor: Tensor | None = None
        self._apart: dict[int, RGBImage] = {}
        self._rows = rows
        self._lock = Lock()

    def get_row(self, row: int) -> RGBImage | None:
        """Where to decode a row of the batch's usual size to; None before two images have shown that size."""
        return None if self._tensor is None else self._tensor[row].numpy()

    def put(self, row: int, image: RGBImage) -> None:
        """Take an image; one that was decoded to its row is there already, and is no second one."""
        place = self.get_row(row)
        if place is None or not np.shares_memory(image, place):
            with self._lock:
                # One huge tile among small ones must not reserve its size for each of them.
                if self._tensor is None and any(image.shape == other.shape for other in self._apart.values()):
                    self._tensor = self._allocate(image.shape)
                self._apart[row] = image

    def finish(self, embedded: BoolArray) -> TileImages:
        """The images; those of rows that are not `embedded` (n,) are zeros, of some small size where sizes differ."""
        shapes = {image.shape for image in self._apart.values()}
        if self._tensor is None and len(shapes) == 1:
            self._tensor = self._allocate(*shapes)
        blank = torch.zeros(16, 16, 3, dtype=torch.uint8)
        if self._tensor is None and not shapes:
            return blank.repeat(self._rows, 1, 1, 1)
        if self._tensor is not None and shapes <= {tuple(self._tensor.shape[1:])}:
            for row, image in self._apart.items():
                self._tensor[row].numpy()[:] = image
            self._tensor[torch.from_numpy(~embedded)] = 0
            return self._tensor
        images = {row: torch.tensor(image) for row, image in self._apart.items()}  # copied: Pillow's are read-only
        images |= dict.fromkeys(np.flatnonzero(~embedded).tolist(), blank)
        if self._tensor is not None:
            images |= {row: self._tensor[row].clone() for row in range(self._rows) if row not in images}
        return [images[row] for row in range(self._rows)]

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(self._rows, *shape, dtype=torch.uint8)
        # In a worker, tiles are decoded to where the other process reads them.
        return tensor if get_worker_info() is None else tensor.share_memory_()

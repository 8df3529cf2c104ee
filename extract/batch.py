"""One batch of tiles, made in a feed worker: fetch tiles and labels together, check, decode, put side by side.

What is to be read travels with the request, so a worker needs no table and its memory does not grow with the bucket.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import google_crc32c
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from cache_schema import LABEL_ID_COLUMNS, NO_LABEL, Status, TileTable
from cache_schema.layout import UInt8Array, UInt16Array

from .decode import RGBImage, UndecodableTileError, decode_tile
from .errors import TileGoneError, TransportError
from .labels import ParsedLabels, parse_labels
from .listing import label_name
from .source import Source
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
        fetch_s, decode_s: seconds a worker waited for bytes and decoded them.
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


class PendingBatch:
    """A batch whose reads are under way."""

    def __init__(self, source: Source, pool: ThreadPoolExecutor, requests: Sequence[TileRequest]) -> None:
        """Start every read of the batch; those beyond the pool's threads wait their turn."""
        self.requests = requests
        self._source = source
        self._fetched = [pool.submit(_fetch, source, request) for request in requests]

    def finish(self) -> TileBatch:
        """Decode tiles as they arrive.

        Raises:
            SourceError: what is no single tile's own fault: an outage, refused access, a label that changed.
        """
        started = time.perf_counter()
        images = _ImageStack(len(self.requests))
        status = np.full(len(self.requests), Status.EMBEDDED, np.uint8)
        label_ids = np.zeros((len(self.requests), LABEL_ID_COLUMNS), "<u2")
        problems: list[str] = []
        lines = 0
        decode_s = 0.0
        for i, (request, fetched) in enumerate(zip(self.requests, self._fetched, strict=True)):
            data, labels = fetched.result()
            decode_started = time.perf_counter()
            image, status[i], reason = _decode(data, images.get_row(i))
            if image is not None:
                images.put(i, image)
            decode_s += time.perf_counter() - decode_started
            if reason:
                problems.append(f"{request.tile}: quarantined: {reason}")
            if labels is not None:
                label_ids[i] = labels.counts
                lines += labels.lines
                problems += _name_malformed(request, labels)
        return TileBatch(
            rows=np.array([request.row for request in self.requests], np.int64),
            images=images.finish(),
            status=status,
            label_ids=label_ids,
            label_lines=lines,
            problems=tuple(problems),
            fetch_s=time.perf_counter() - started - decode_s,
            decode_s=decode_s,
        )


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """The labels of n tiles whose bytes are not needed; attributes as those of `TileBatch`."""

    label_ids: UInt16Array
    label_lines: int
    problems: tuple[str, ...]


def read_labels(source: Source, pool: ThreadPoolExecutor, requests: Sequence[TileRequest]) -> LabelBatch:
    """Read the label files of `requests`, and nothing else.

    Raises:
        SourceError: an outage, refused access, a label that changed since it was listed.
    """
    label_ids = np.zeros((len(requests), LABEL_ID_COLUMNS), "<u2")
    problems: list[str] = []
    lines = 0
    for i, labels in enumerate(pool.map(lambda request: _fetch_labels(source, request), requests)):
        if labels is not None:
            label_ids[i] = labels.counts
            lines += labels.lines
            problems += _name_malformed(requests[i], labels)
    return LabelBatch(label_ids, lines, tuple(problems))


def _name_malformed(request: TileRequest, labels: ParsedLabels) -> list[str]:
    return [f"{label_name(request.tile)}:{n}: malformed line" for n in labels.malformed[:_MAX_EXAMPLES]]


def _fetch(source: Source, request: TileRequest) -> tuple[bytes | Status, ParsedLabels | None]:
    return _fetch_tile(source, request), _fetch_labels(source, request)


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


def _decode(data: bytes | Status, into: RGBImage | None) -> tuple[RGBImage | None, Status, str | None]:
    if isinstance(data, Status):
        return None, data, data.reason
    try:
        return decode_tile(data, into), Status.EMBEDDED, None
    except UndecodableTileError as error:
        return None, error.status, f"{error.status.reason} ({error})"


class _ImageStack:
    """The images of a batch: rows of one tensor as long as their sizes agree, else one tensor each."""

    def __init__(self, rows: int) -> None:
        self._tensor: Tensor | None = None
        self._odd: dict[int, RGBImage] = {}
        self._missing = set(range(rows))
        self._rows = rows

    def get_row(self, row: int) -> RGBImage | None:
        """Where to decode a row of the batch's usual size to; None before the first image has shown that size."""
        return None if self._tensor is None else self._tensor[row].numpy()

    def put(self, row: int, image: RGBImage) -> None:
        """Take an image; one that was decoded to its row is there already."""
        self._missing.discard(row)
        if self._tensor is None:
            self._tensor = torch.empty(self._rows, *image.shape, dtype=torch.uint8)
            if get_worker_info() is not None:
                self._tensor.share_memory_()  # decoded to where the other process reads
        place = self._tensor[row].numpy()
        if image.shape != place.shape:
            self._odd[row] = image
        elif not np.shares_memory(image, place):
            place[:] = image

    def finish(self) -> TileImages:
        """The images; missing ones are zeros."""
        if self._tensor is None:
            return torch.zeros(self._rows, 16, 16, 3, dtype=torch.uint8)
        for row in self._missing:
            self._tensor[row] = 0
        if not self._odd:
            return self._tensor
        # Copied: Pillow's arrays are read-only.
        return [
            torch.tensor(self._odd[row]) if row in self._odd else self._tensor[row].clone() for row in range(self._rows)
        ]

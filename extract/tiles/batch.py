"""Make one batch of tiles in a feed worker: fetch tiles and labels together, check and decode them, stack the images.

A request carries all that a worker needs to read its tile. A worker holds no table, so its memory does not grow with
the bucket.
"""

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import google_crc32c
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from cache_schema import LABEL_ID_COLUMNS, NO_LABEL, Status, TileTable
from cache_schema.layout import BoolArray, UInt8Array, UInt16Array
from extract.errors import RasterError, TileGoneError, TransportError

from .decode import MAX_FILE_BYTES, RGBImage, UndecodableTileError, decode_tile
from .labels import MAX_LABEL_BYTES, ParsedLabels, parse_labels, refuse_labels
from .listing import label_name
from .source import Source
from .windows import WindowReader, WindowRequest

TileImages = Tensor | Sequence[Tensor]
"""(B, H, W, 3) uint8, or B tensors (H, W, 3) uint8 of different sizes."""

_MAX_EXAMPLES = 20


class TileRequest(NamedTuple):
    """One row of the table: the objects to read, and the size and checksum each must have."""

    row: int
    tile: str
    size: int
    crc32c: int
    generation: int
    label_size: int
    label_crc32c: int


Request = TileRequest | WindowRequest
"""One row of a batch."""


@dataclass(frozen=True, eq=False)
class TileBatch:
    """One batch of n tiles, or windows of rasters, in the order requested.

    Attributes:
        rows: (n,) int64 rows of the table.
        images: uint8; zeros in rows that are not embedded.
        status: (n,) uint8, see `Status`.
        label_ids: (n, 128) uint16, instances per raw label id.
        label_lines: lines in all label files, blank ones not counted.
        problems: one readable line per quarantined tile and per malformed label line.
        fetch_s, decode_s: seconds that the worker waited for bytes, and spent decoding.
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
        """Return the batch with its images in page-locked memory. The DataLoader calls this in a separate thread."""
        images = self.images
        pinned = images.pin_memory() if isinstance(images, Tensor) else [image.pin_memory() for image in images]
        return replace(self, images=pinned)


def make_requests(table: TileTable, rows: Iterable[int], *, labels: bool = True) -> list[TileRequest]:
    """Return requests for `rows` of the table, in that order; without `labels`, only for the images."""
    rows = list(rows)
    columns = (getattr(table, name)[rows].tolist() for name in TileRequest._fields[1:])
    requests = [TileRequest(*values) for values in zip(rows, *columns, strict=True)]
    return requests if labels else [request._replace(label_size=NO_LABEL) for request in requests]


class PendingBatch:
    """A batch whose reads are in flight."""

    def __init__(
        self, source: Source, pool: ThreadPoolExecutor, requests: Sequence[Request], windows: WindowReader | None = None
    ) -> None:
        """Submit a read of every tile to `pool`.

        Windows are read later, by `windows` in the thread that calls `finish`: a raster belongs to one thread.
        """
        self.requests = requests
        self._windows = windows or WindowReader()
        self._fetched = [
            request if isinstance(request, WindowRequest) else pool.submit(_fetch, source, request)
            for request in requests
        ]

    def finish(self) -> TileBatch:
        """Decode tiles as they arrive, in this thread: each worker process uses one core.

        Raises:
            SourceError: an outage, refused access, a label that changed: anything that is not one tile's own fault.
        """
        started = time.perf_counter()
        images = ImageStack(len(self.requests))
        status = np.full(len(self.requests), Status.EMBEDDED, np.uint8)
        label_ids = np.zeros((len(self.requests), LABEL_ID_COLUMNS), "<u2")
        problems: list[str] = []
        lines = 0
        decode_s = 0.0
        for i, (request, fetched) in enumerate(zip(self.requests, self._fetched, strict=True)):
            data, labels = (fetched, None) if isinstance(fetched, WindowRequest) else fetched.result()
            decode_started = time.perf_counter()
            status[i], reason = self._decode(data, images, i)
            decode_s += time.perf_counter() - decode_started
            if reason:
                problems.append(f"{request.tile}: quarantined: {reason}")
            if labels is not None:
                label_ids[i] = labels.counts
                lines += labels.lines
                problems += _name_malformed(request, labels)
        return TileBatch(
            rows=np.array([request.row for request in self.requests], np.int64),
            images=images.finish(status == Status.EMBEDDED),
            status=status,
            label_ids=label_ids,
            label_lines=lines,
            problems=tuple(problems),
            fetch_s=time.perf_counter() - started - decode_s,
            decode_s=decode_s,
        )

    def _decode(
        self, data: bytes | Status | WindowRequest, images: "ImageStack", row: int
    ) -> tuple[Status, str | None]:
        """Decode an image into its row. Return its status and, unless it is embedded, the reason."""
        if isinstance(data, Status):
            return data, data.reason
        try:
            if isinstance(data, WindowRequest):
                images.put(row, self._windows.read(data))
            else:
                images.put(row, decode_tile(data))
        except UndecodableTileError as error:
            return error.status, f"{error.status.reason} ({error})"
        except RasterError as error:
            return Status.UNDECODABLE, f"{Status.UNDECODABLE.reason} ({error})"
        return Status.EMBEDDED, None


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """The labels of n tiles without their images; attributes as in `TileBatch`."""

    label_ids: UInt16Array
    label_lines: int
    problems: tuple[str, ...]


def read_labels(source: Source, pool: ThreadPoolExecutor, requests: Sequence[TileRequest]) -> LabelBatch:
    """Read only the label files of `requests`.

    Raises:
        SourceError: an outage, refused access, a label that changed since it was listed.
    """
    label_ids = np.zeros((len(requests), LABEL_ID_COLUMNS), "<u2")
    problems: list[str] = []
    lines = 0
    for i, labels in enumerate(pool.map(partial(_fetch_labels, source), requests)):
        if labels is not None:
            label_ids[i] = labels.counts
            lines += labels.lines
            problems += _name_malformed(requests[i], labels)
    return LabelBatch(label_ids, lines, tuple(problems))


def _name_malformed(request: Request, labels: ParsedLabels) -> list[str]:
    return [f"{label_name(request.tile)}:{n}: malformed line" for n in labels.malformed[:_MAX_EXAMPLES]]


def _fetch(source: Source, request: TileRequest) -> tuple[bytes | Status, ParsedLabels | None]:
    return _fetch_tile(source, request), _fetch_labels(source, request)


def _fetch_tile(source: Source, request: TileRequest) -> bytes | Status:
    """Return a tile's bytes, or the status it is quarantined with."""
    if request.size > MAX_FILE_BYTES:
        return Status.OVER_LIMIT
    try:
        data = _read_listed(source, request.tile, request.generation, request.size, request.crc32c)
    except TileGoneError:
        return Status.GONE
    return Status.CHECKSUM_MISMATCH if data is None else data


def _fetch_labels(source: Source, request: TileRequest) -> ParsedLabels | None:
    """Return the tile's labels, or None if it has no label object.

    A label that changed since the listing is an error: it makes the whole block stale, not one row.
    """
    if request.label_size == NO_LABEL:
        return None
    if request.label_size == 0:
        return parse_labels(b"")
    if request.label_size > MAX_LABEL_BYTES:
        return refuse_labels()
    name = label_name(request.tile)
    try:
        # The table records the generation of the image only; a label is identified by its checksum.
        text = _read_listed(source, name, 0, request.label_size, request.label_crc32c)
    except TileGoneError:
        text = None
    if text is None:
        raise TransportError(f"{name} was changed or deleted since it was listed: run the same command again")
    return parse_labels(text)


def _read_listed(source: Source, name: str, generation: int, size: int, crc32c: int) -> bytes | None:
    """Return the object's bytes, or None if they are not the bytes that were listed.

    The fast read checks nothing. If its bytes do not match, the object is read twice more with a checksum, which tells
    damage by the network from an object that really changed.
    """
    for read in (source.read, source.read_checked, source.read_checked):
        data = read(name, generation)
        if len(data) == size and (source.identity != "crc32c" or google_crc32c.value(data) == crc32c):
            return data
    return None


class ImageStack:
    """Collects a batch's images: in one tensor while all sizes are equal, else in one tensor each."""

    def __init__(self, rows: int) -> None:
        self._tensor: Tensor | None = None
        self._apart: dict[int, RGBImage] = {}
        self._rows = rows

    def put(self, row: int, image: RGBImage) -> None:
        """Add the image of a row."""
        # Allocate for all rows only once two images agree, so that one huge tile does not size the whole batch.
        if self._tensor is None and any(image.shape == other.shape for other in self._apart.values()):
            self._tensor = self._allocate(image.shape)
        if self._tensor is not None and image.shape == self._tensor.shape[1:]:
            self._tensor[row].numpy()[:] = image
        else:
            self._apart[row] = image

    def finish(self, embedded: BoolArray) -> TileImages:
        """Return the images. Rows that are not `embedded` (n,) are zeros, 16 px a side if sizes differ."""
        shapes = {image.shape for image in self._apart.values()}
        if self._tensor is None and len(shapes) == 1:
            self._tensor = self._allocate(*shapes)
        blank = torch.zeros(16, 16, 3, dtype=torch.uint8)
        if self._tensor is None and not shapes:
            return blank.repeat(self._rows, 1, 1, 1)
        if self._tensor is not None and shapes <= {tuple(self._tensor.shape[1:])}:
            for row, image in self._apart.items():
                self._tensor[row].numpy()[:] = image
            for row in np.flatnonzero(~embedded).tolist():  # faster than a mask, which touches every byte
                self._tensor[row] = 0
            return self._tensor
        images = {row: torch.tensor(image) for row, image in self._apart.items()}  # copied: Pillow's are read-only
        images |= dict.fromkeys(np.flatnonzero(~embedded).tolist(), blank)
        if self._tensor is not None:
            images |= {row: self._tensor[row].clone() for row in range(self._rows) if row not in images}
        return [images[row] for row in range(self._rows)]

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        if get_worker_info() is None:
            return torch.empty(self._rows, *shape, dtype=torch.uint8)
        # In a worker, decode straight into shared memory, as PyTorch's default_collate does: share_memory_() would
        # copy the whole batch.
        storage = torch.UntypedStorage._new_shared(self._rows * math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(self._rows, *shape)

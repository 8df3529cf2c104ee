"""One batch of tiles, made in a feed worker: fetch tiles and labels together, check, decode, put side by side.

What is to be read travels with the request, so a worker needs no table and its memory does not grow with the bucket.
"""

import math
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
    """One row of the table: what to read and what it must be."""

    row: int
    tile: str
    size: int
    crc32c: int
    generation: int
    label_size: int
    label_crc32c: int


Request = TileRequest | WindowRequest
"""What becomes a row of a batch."""


@dataclass(frozen=True, eq=False)
class TileBatch:
    """One batch of n tiles, or windows of rasters, rows in the order asked for.

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

    def __init__(
        self, source: Source, pool: ThreadPoolExecutor, requests: Sequence[Request], windows: WindowReader | None = None
    ) -> None:
        """Start reading every tile of the batch; those beyond the pool's threads wait their turn.

        Args:
            source: where the tiles are.
            pool: of the threads that read them.
            requests: tiles and windows, in the order of the rows.
            windows: reads the windows, when it is their turn: a raster belongs to one thread.
        """
        self.requests = requests
        self._windows = windows or WindowReader()
        self._fetched = [
            request if isinstance(request, WindowRequest) else pool.submit(_fetch, source, request)
            for request in requests
        ]

    def finish(self) -> TileBatch:
        """Decode tiles as they arrive, in this thread: there is a worker for every core that decodes.

        Raises:
            SourceError: what is no single tile's own fault: an outage, refused access, a label that changed.
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
        """Put an image into its row, or say why there is none."""
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


def _name_malformed(request: Request, labels: ParsedLabels) -> list[str]:
    return [f"{label_name(request.tile)}:{n}: malformed line" for n in labels.malformed[:_MAX_EXAMPLES]]


def _fetch(source: Source, request: TileRequest) -> tuple[bytes | Status, ParsedLabels | None]:
    return _fetch_tile(source, request), _fetch_labels(source, request)


def _fetch_tile(source: Source, request: TileRequest) -> bytes | Status:
    """A tile's bytes, or why it is quarantined."""
    if request.size > MAX_FILE_BYTES:
        return Status.OVER_LIMIT
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
    if request.label_size > MAX_LABEL_BYTES:
        return refuse_labels()
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
    """A batch's images: rows of one tensor as long as their sizes agree, else one tensor each."""

    def __init__(self, rows: int) -> None:
        self._tensor: Tensor | None = None
        self._apart: dict[int, RGBImage] = {}
        self._rows = rows

    def put(self, row: int, image: RGBImage) -> None:
        """Take an image."""
        # One huge tile among small ones must not reserve its size for each of them.
        if self._tensor is None and any(image.shape == other.shape for other in self._apart.values()):
            self._tensor = self._allocate(image.shape)
        if self._tensor is not None and image.shape == self._tensor.shape[1:]:
            self._tensor[row].numpy()[:] = image
        else:
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
            for row in np.flatnonzero(~embedded).tolist():  # a mask would pass over every byte of the batch
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
        # In a worker, tiles are decoded to where the other process reads them. As PyTorch's own default_collate does,
        # since share_memory_() would first copy a batch of fresh pages.
        storage = torch.UntypedStorage._new_shared(self._rows * math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(self._rows, *shape)

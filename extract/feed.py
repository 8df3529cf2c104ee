"""Tiles on their way to the device: workers fetch tile and label together, check and decode them, and batch them.

What is to be read travels with the request, so a worker needs no table and its memory does not grow with the bucket.
"""

import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache_schema import LABEL_ID_COLUMNS, NO_LABEL, Status, TileprobeError, TileTable
from cache_schema.layout import UInt8Array, UInt16Array

from .decode import RGBImage, UndecodableTileError, decode_tile
from .errors import RunError, TileGoneError, TransportError
from .labels import ParsedLabels, parse_labels
from .listing import label_name
from .source import CONCURRENT_READS, Source
from .transform import TileImages

PREFETCHED_BATCHES = 2
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
        fetch_s, decode_s: seconds a worker spent on each.
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


class TileFeed:
    """Worker processes that read and decode batches ahead of their use, kept from one pass to the next.

    Args:
        source: where tiles are; each worker makes its own client on first use.
        workers: processes; 0 reads in this one.
        pin_memory: hand out page-locked images, for copies to a GPU that do not block.
    """

    def __init__(self, source: Source, *, workers: int, pin_memory: bool = False) -> None:
        self._batches = _Batches()
        self._pin_memory = pin_memory
        self._loader: DataLoader[Any] = DataLoader(
            _TileDataset(source),
            batch_sampler=self._batches,
            collate_fn=_pass_through,
            num_workers=workers,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
            persistent_workers=workers > 0,
            # Forked workers can deadlock on the locks of Zarr's event loop and of the HTTP client.
            multiprocessing_context=_make_forkserver() if workers else None,
        )

    def read(self, batches: Iterable[list[TileRequest]]) -> Iterator[TileBatch]:
        """One pass over `batches`, in order. They are drawn in this process, a few ahead of what has been yielded, so a
        generator may decide late what comes next.

        Raises:
            TileprobeError: what a worker met that is not one tile's own fault (outage, refused access).
            RunError: a worker process died.
        """
        self._batches.current = batches
        try:
            for item in self._loader:
                if isinstance(item, TileprobeError):
                    raise item
                yield _pin(item) if self._pin_memory else item
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # Most often the loader notices; but a worker may also die while this process takes over its shared memory.
            in_transfer = self._loader.num_workers > 0 and not isinstance(error, RuntimeError)
            if "DataLoader worker" not in str(error) and not in_transfer:
                raise
            raise RunError(
                f"a feed worker died ({error}); out of memory, most often: lower --workers or --batch-size; "
                "the same command goes on from the last committed block"
            ) from error


class _Batches:
    """A batch sampler whose batches are replaced before each pass."""

    def __init__(self) -> None:
        self.current: Iterable[list[TileRequest]] = ()

    def __iter__(self) -> Iterator[list[TileRequest]]:
        return iter(self.current)


class _TileDataset(Dataset[TileBatch | TileprobeError]):
    """Lives in a worker; `__getitems__` is handed a whole batch of requests."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pool: ThreadPoolExecutor | None = None

    def __getitems__(self, requests: Sequence[TileRequest]) -> TileBatch | TileprobeError:
        if self._pool is None:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="fetch")
        try:
            return _read_batch(self._source, self._pool, requests)
        except TileprobeError as error:
            # Raised here it would reach the main process wrapped in a worker's traceback.
            return error.with_traceback(None)


def _make_forkserver() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extract.feed"])
    # Ctrl-C goes to every process of a terminal. The rank answers it; its workers end with it, and keep quiet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ensure_running()  # inherits the mask, and its workers from it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _pass_through(item: Any) -> Any:
    """A batch leaves the dataset whole: nothing to collate."""
    return item


def _pin(batch: TileBatch) -> TileBatch:
    images = batch.images
    pinned = images.pin_memory() if isinstance(images, Tensor) else [image.pin_memory() for image in images]
    return TileBatch(**{**batch.__dict__, "images": pinned})


def _read_batch(source: Source, pool: ThreadPoolExecutor, requests: Sequence[TileRequest]) -> TileBatch:
    started = time.perf_counter()
    fetched = pool.map(lambda request: _fetch(source, request), requests)
    images: list[RGBImage | None] = []
    status = np.full(len(requests), Status.EMBEDDED, np.uint8)
    label_ids = np.zeros((len(requests), LABEL_ID_COLUMNS), "<u2")
    problems: list[str] = []
    lines = 0
    decode_s = 0.0
    for i, (request, (data, labels)) in enumerate(zip(requests, fetched, strict=True)):
        decode_started = time.perf_counter()
        image, status[i], reason = _decode(data)
        decode_s += time.perf_counter() - decode_started
        images.append(image)
        if reason:
            problems.append(f"{request.tile}: quarantined: {reason}")
        if labels is not None:
            label_ids[i] = labels.counts
            lines += labels.lines
            bad = labels.malformed[:_MAX_EXAMPLES]
            problems += [f"{label_name(request.tile)}:{n}: malformed line" for n in bad]
    return TileBatch(
        rows=np.array([request.row for request in requests], np.int64),
        images=_stack(images),
        status=status,
        label_ids=label_ids,
        label_lines=lines,
        problems=tuple(problems),
        fetch_s=time.perf_counter() - started - decode_s,
        decode_s=decode_s,
    )


def _fetch(source: Source, request: TileRequest) -> tuple[bytes | Status, ParsedLabels | None]:
    """A tile's bytes, or why it is quarantined, and its labels, None where it has no label object."""
    labels = None
    if request.label_size != NO_LABEL:
        labels = parse_labels(_read_label(source, request))
    try:
        for _ in range(2):
            data = source.read(request.tile, request.generation)
            if _is_listed(source, data, request.size, request.crc32c):
                return data, labels
    except TileGoneError:
        return Status.GONE, labels
    return Status.CHECKSUM_MISMATCH, labels


def _read_label(source: Source, request: TileRequest) -> bytes:
    """The label's bytes as listed. A label that changed since makes the whole block stale, not one row of it."""
    name = label_name(request.tile)
    for _ in range(2):
        try:
            # The table pins the tile's generation; a label is pinned by its checksum.
            text = source.read(name, 0)
        except TileGoneError:
            continue
        if _is_listed(source, text, request.label_size, request.label_crc32c):
            return text
    raise TransportError(f"{name} changed or went away since it was listed: run the same command again")


def _is_listed(source: Source, data: bytes, size: int, crc32c: int) -> bool:
    return len(data) == size and (source.identity != "crc32c" or google_crc32c.value(data) == crc32c)


def _decode(data: bytes | Status) -> tuple[RGBImage | None, Status, str | None]:
    if isinstance(data, Status):
        return None, data, data.reason
    try:
        return decode_tile(data), Status.EMBEDDED, None
    except UndecodableTileError as error:
        return None, error.status, f"{error.status.reason} ({error})"


def _stack(images: Sequence[RGBImage | None]) -> TileImages:
    """One tensor where all sizes agree, else one each; missing images are zeros."""
    shapes = {image.shape for image in images if image is not None}
    blank = np.zeros(next(iter(shapes)) if len(shapes) == 1 else (16, 16, 3), np.uint8)
    filled = [blank if image is None else image for image in images]
    if len(shapes) <= 1:
        return torch.from_numpy(np.stack(filled))
    return [torch.from_numpy(np.array(image)) for image in filled]  # copied: Pillow's arrays are read-only

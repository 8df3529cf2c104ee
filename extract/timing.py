"""Measure where the time of a run goes, and describe it with what was left out and what the whole bucket would take."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from cache_schema import LABEL_ID_COLUMNS, Status, Version
from cache_schema.cli.text import format_duration, show_first, show_name
from cache_schema.layout import LABEL_IDS_DTYPE, POOLED_DTYPE
from extract.tiles.batch import LabelBatch, TileBatch

from .writer import BlockWriter

_MALFORMED = ": malformed line"

_MAX_EXAMPLES = 5

_NOTEWORTHY = 0.02
"""Share of the time below which a wait is not worth mentioning."""

_TELLING_S = 5.0
"""Seconds below which a run has mostly waited for its workers to start."""

_MOST_WORKERS = 32


@dataclass
class Timing:
    """Where the time of one rank went while it embedded, and what it counted.

    Attributes:
        tiles: embedded or quarantined.
        kept: rows copied from an earlier version.
        copy_s: seconds of that copying.
        wall_s: seconds from the first request to the end of the last write, less `copy_s`.
        feed_s, device_s, write_s: seconds of the main process waiting for a batch, computing it, waiting for a write.
        fetch_worker_s, decode_worker_s: seconds of the feed's workers; their ratio divides `feed_s`.
        label_lines: lines with content in the label files.
        malformed: malformed ones among them, as far as they were named.
        examples: the first few of those, `FILE:LINE`.
    """

    tiles: int = 0
    kept: int = 0
    copy_s: float = 0.0
    wall_s: float = 0.0
    feed_s: float = 0.0
    device_s: float = 0.0
    write_s: float = 0.0
    fetch_worker_s: float = 0.0
    decode_worker_s: float = 0.0
    label_lines: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Timing") -> None:
        """Add another timing of the same rank."""
        for name in (item.name for item in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def note_batch(self, batch: TileBatch) -> None:
        self.tiles += len(batch)
        self.fetch_worker_s += batch.fetch_s
        self.decode_worker_s += batch.decode_s
        self.note_labels(batch)

    def note_labels(self, batch: TileBatch | LabelBatch) -> None:
        self.label_lines += batch.label_lines
        named = [problem.removesuffix(_MALFORMED) for problem in batch.problems if problem.endswith(_MALFORMED)]
        self.malformed += len(named)
        self.examples += named[: _MAX_EXAMPLES - len(self.examples)]


class Stopwatch:
    """Divides the time of an embedding rank into waiting for batches, computing, and waiting for writes.

    Enter it before the writer: it then counts the wait for the last block, too.

    Args:
        timing: filled in.
        writer: whose waits are not counted as computing.
    """

    def __init__(self, timing: Timing, writer: BlockWriter) -> None:
        self._timing = timing
        self._writer = writer
        self._started = self._waited = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def waits(self, batches: Iterable[TileBatch]) -> Iterator[TileBatch]:
        """Yield the batches; count the wait for each, and what the caller then does with it."""
        timing, asked, copied = self._timing, self._started, 0.0
        for batch in batches:
            got, waited = time.perf_counter(), self._writer.wait_s
            timing.note_batch(batch)
            timing.feed_s += got - asked - (timing.copy_s - copied)
            copied = timing.copy_s
            self._count_wall(got)
            yield batch
            asked, wrote = time.perf_counter(), self._writer.wait_s - waited
            timing.write_s += wrote
            timing.device_s += asked - got - wrote
            self._count_wall(asked)
        self._waited = self._writer.wait_s

    def __exit__(self, *_: object) -> None:
        self._timing.write_s += self._writer.wait_s - self._waited
        self._count_wall(time.perf_counter())

    def _count_wall(self, now: float) -> None:
        self._timing.wall_s = now - self._started - self._timing.copy_s


def share_waits(timings: Sequence[Timing]) -> dict[str, float]:
    """Return the shares of all ranks' time: waiting for `fetch` and `decode`, computing on the `device`, waiting for
    `write`."""
    wall = max(sum(t.wall_s for t in timings), 1e-9)
    fetching = sum(t.fetch_worker_s for t in timings)
    decoding = sum(t.decode_worker_s for t in timings)
    fetch_share = fetching / max(fetching + decoding, 1e-9)
    feed = sum(t.feed_s for t in timings) / wall
    return {
        "fetch": feed * fetch_share,
        "decode": feed * (1 - fetch_share),
        "device": sum(t.device_s for t in timings) / wall,
        "write": sum(t.write_s for t in timings) / wall,
    }


def describe_waits(timings: Sequence[Timing]) -> str:
    """Return `waiting: fetch 1.2 %, decode 0.4 %, device 98.3 %, write 0.1 %`."""
    return "waiting: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in share_waits(timings).items())


def advise(timings: Sequence[Timing], workers: int, cores: int, *, on_cpu: bool = False, written: str = "CACHE") -> str:
    """Return one sentence: what this run waited for most, apart from the device, and what would help.

    Args:
        workers: feed processes a rank.
        cores: CPU cores a rank.
        on_cpu: the backbone runs on those cores, too.
        written: name of what the run writes, for the user.
    """
    if max(t.wall_s for t in timings) < _TELLING_S:
        return "too short a run to tell what would help"
    shares = share_waits(timings)
    slowest = max(("fetch", "decode", "write"), key=lambda name: shares[name])
    if shares[slowest] < _NOTEWORTHY:
        return f"the device was busy {100 * shares['device']:.0f} % of the time: a faster one is all that would help"
    waiting = f"waiting on {slowest} {100 * shares[slowest]:.0f} %: "
    if slowest == "write":
        return waiting + f"put {written} on faster storage"
    # For the device never to wait, the workers would have to be 1 / (1 - feed) times as fast.
    feed = shares["fetch"] + shares["decode"]
    wanted = min(_MOST_WORKERS, math.ceil(max(workers, 1) / max(1 - feed, 1 / _MOST_WORKERS)))
    if slowest == "decode" and (on_cpu or wanted > cores):
        count = f"{cores} core{'s' if cores > 1 else ''} a rank"
        return (
            waiting + f"{count}{' for the model as well' if on_cpu else ''}: more of them, or smaller tiles, would help"
        )
    if wanted <= workers:
        return waiting + "the tiles' place answers slowly: compute nearer to it"
    return waiting + f"raise --workers to {wanted}"


def describe_speed(timings: Sequence[Timing], elapsed: float) -> str:
    tiles = sum(t.tiles for t in timings)
    slowest = max(t.wall_s for t in timings)
    per_rank = ", ".join(f"{t.tiles / t.wall_s:.0f}" for t in timings if t.tiles)
    return (
        f"{tiles:,} tiles in {slowest:.1f} s: {tiles / slowest:.0f} tiles/s (per rank {per_rank}), "
        f"{elapsed:.1f} s in all; {describe_waits(timings)}"
    )


def describe_labels(timings: Sequence[Timing]) -> str:
    lines = sum(t.label_lines for t in timings)
    malformed = sum(t.malformed for t in timings)
    if not malformed:
        return f"{lines:,} label lines read"
    examples = [show_name(example) for t in timings for example in t.examples]
    return f"{lines:,} label lines read, malformed ones among them: {show_first(examples, of=malformed)}"


def describe_quarantined(version: Version, status: npt.NDArray[np.uint8]) -> str:
    """Name the first ten quarantined tiles, each with its reason."""
    rows = np.flatnonzero(status > Status.EMBEDDED).tolist()
    names = version.read_table().tile
    lines = [f"\n  {show_name(names[row])}: {Status(status[row]).reason}" for row in rows]
    return f"quarantined {len(rows):,}:{show_first(lines, separator='', limit=10)}"


def estimate_whole(version: Version, all_tiles: int, timings: Sequence[Timing]) -> str:
    """Estimate from this trial what the whole bucket would take."""
    seconds = all_tiles * max(t.wall_s for t in timings) / sum(t.tiles for t in timings)
    layout = version.layout
    size = estimate_cache_bytes(all_tiles, layout.width * len(layout.pooling))
    return (
        f"all {all_tiles:,} tiles: about {format_duration(seconds)} on this hardware and {size / 2**20:,.0f} MiB "
        "of cache (the same command without LIMIT)"
    )


def estimate_cache_bytes(tiles: int, numbers: int) -> int:
    """Return the bytes of a cache of so many tiles with so many pooled numbers each; the table adds a few per cent."""
    return tiles * (numbers * POOLED_DTYPE.itemsize + LABEL_ID_COLUMNS * LABEL_IDS_DTYPE.itemsize)

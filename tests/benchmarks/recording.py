"""Record a real extraction batch by batch; the simulator samples its costs from the result."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_schema import BlockValues, Version
from extract.config import ExtractConfig
from extract.run import run_extraction
from extract.tiles.batch import TileBatch
from extract.timing import Timing

from .schedule import Costs


class _Moment(NamedTuple):
    """One batch: its worker's seconds, and the rank's waiting and computing time before it."""

    fetch_s: float
    decode_s: float
    feed_s: float
    device_s: float


@dataclass(frozen=True)
class Recording:
    """Record of one rank.

    Attributes:
        costs: costs of its batches and blocks.
        wall_s: seconds from the first request to the last block, as in its summary.
    """

    costs: Costs
    wall_s: float


def record_extraction(tiles: Path, backbone: Path, cache: Path, workers: int, cores: tuple[int, ...]) -> Recording:
    """Extract with one rank on `cores`. Call it in a separate process, because it patches classes."""
    os.sched_setaffinity(0, cores)
    os.chdir(cache.parent)  # so that `cache/last` of the user stays unchanged
    moments: list[_Moment] = []
    timings: list[Timing] = []
    writes: list[float] = []

    def note_batch(timing: Timing, batch: TileBatch) -> None:
        moments.append(_Moment(batch.fetch_s, batch.decode_s, timing.feed_s, timing.device_s))
        timings[:] = [timing]
        plain_note(timing, batch)

    def write_block(version: Version, block: int, values: BlockValues) -> None:
        started = time.perf_counter()
        plain_write(version, block, values)
        writes.append(time.perf_counter() - started)

    plain_note, plain_write = Timing.note_batch, Version.write_block
    Timing.note_batch, Version.write_block = note_batch, write_block  # type: ignore[method-assign]
    run_extraction(ExtractConfig(str(tiles), str(backbone), cache=str(cache), workers=workers, device="cpu"))
    (timing,) = timings
    feed = np.diff([*(moment.feed_s for moment in moments), timing.feed_s])
    device = np.diff([*(moment.device_s for moment in moments), timing.device_s])
    fetch, decode = (np.array([getattr(moment, name) for moment in moments]) for name in ("fetch_s", "decode_s"))
    # The first wait includes the start of the workers.
    start = max(0.0, float(feed[0] - fetch[0] - decode[0]))
    return Recording(Costs(fetch, decode, device, np.array(writes), start), timing.wall_s)

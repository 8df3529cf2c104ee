"""One extraction: list, share out blocks, embed, commit, seal.

There is no collective between the first block and the last: ranks draw blocks from a counter, so a slow rank simply
takes fewer, and what a block holds does not depend on who computed it.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cache_schema import BlockValues, CacheRoot, Status, Version
from cache_schema.layout import UInt8Array, count_blocks
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.transform import describe_scale
from extract.ranks.exchange import exchange, share_out
from extract.ranks.group import Counter as SharedCounter
from extract.ranks.group import Ranks, join_ranks
from extract.ranks.same_job import Asked
from extract.ranks.signals import Stopped, stop_on_signals
from extract.tiles.batch import TileRequest, make_requests
from extract.tiles.feed import TileFeed
from extract.tiles.source import Source, open_source

from .config import ExtractConfig, remember_cache
from .earlier import EarlierRows
from .errors import QuarantineError, RunError
from .plan import Plan, make_plan
from .timing import (
    Timing,
    advise,
    describe_labels,
    describe_quarantined,
    describe_speed,
    describe_waits,
    estimate_whole,
)
from .writer import BlockWriter

_log = logging.getLogger(__name__)

_ATTEMPTS = 2
"""Times that a run computes a block: once more if it is found damaged when the run is about to seal."""


@dataclass(frozen=True)
class Finished:
    """What a finished extraction says.

    Attributes:
        line: where the embeddings are.
        text: all that a person is told, with that line.
        values: the same for scripts.
    """

    line: str
    text: str
    values: dict[str, Any]


def run_extraction(config: ExtractConfig) -> Finished | None:
    """Bring the cache of `config.tiles` up to date with the bucket; what is committed already is not redone.

    Returns:
        what there is now, printed already; None on other ranks than the main one.

    Raises:
        TileprobeError: whatever a user can mend; committed blocks stay.
        Stopped: SIGTERM or SIGINT came; committed blocks stay, and one line has said how many.
    """
    with stop_on_signals(), join_ranks(config.device, Asked.of("extract run", config)) as ranks, ExitStack() as at_end:
        plan = None
        try:
            started = time.perf_counter()
            plan = ranks.run_on_main(lambda: make_plan(config, ranks.device, at_end))
            for note in plan.notes if ranks.is_main else ():
                print(note, flush=True)
            timing, tried = Timing(), Counter[int]()
            while True:
                if plan.pending:
                    timing.add(_embed(config, plan, ranks))
                    tried.update(plan.pending)
                timings: list[Timing] = [timing] * ranks.world_size
                torch.distributed.all_gather_object(timings, timing)
                status = _recheck(plan, ranks)
                elapsed = time.perf_counter() - started
                outcome = ranks.run_on_main(partial(_finish, config, plan, status, timings, ranks, elapsed, tried))
                if isinstance(outcome, Finished):
                    if ranks.is_main:
                        print(outcome.text, flush=True)
                    return outcome if ranks.is_main else None
                plan = outcome
        except Stopped as stop:
            if ranks.is_main:
                print(_describe_stop(stop, plan), file=sys.stderr, flush=True)
            raise


def _embed(config: ExtractConfig, plan: Plan, ranks: Ranks) -> Timing:
    """Embed and commit this rank's draw of the pending blocks."""
    version = CacheRoot(plan.cache).open_version(plan.version_id, read_only=False)
    workers = ranks.choose_workers(config.workers)
    source = open_source(config.tiles)
    feed = TileFeed(source, workers=workers, pin_memory=ranks.device.type == "cuda")
    feed.start()
    embedder = _load_embedder(plan, version, ranks)
    draw, count_done = ranks.make_counter("block"), ranks.make_counter("done")
    timing, started = Timing(), time.perf_counter()
    with (
        _profiler(config.profile if ranks.is_main else None) as note_step,
        tqdm(total=plan.to_do, unit="tile", desc="extract", disable=not ranks.draws_bars) as bar,
        ranks.stop_together(),  # a block in writing counts, whichever rank it is with
        BlockWriter(version) as writer,
    ):
        blocks = _BlockDraw(version, plan, source, writer, timing)
        asked, copied, described = started, 0.0, False
        for batch in feed.read(blocks.draw_batches(draw, embedder.batch_size)):
            got, waited = time.perf_counter(), writer.wait_s
            if not described and ranks.is_main and (embedded := np.flatnonzero(batch.status == Status.EMBEDDED)).size:
                bar.write(describe_scale(batch.images[embedded[0]].shape[0], plan.checkpoint.image_size))
                described = True
            writer.add(batch, embedder.embed(batch))
            first, last = int(batch.rows[0]), int(batch.rows[-1])
            _log.debug("rows %d-%d: fetched in %.2f s, decoded in %.2f s", first, last, batch.fetch_s, batch.decode_s)
            note_step()
            timing.note_batch(batch)
            timing.feed_s += got - asked - (timing.copy_s - copied)
            timing.write_s += (wrote := writer.wait_s - waited)
            timing.device_s += (asked := time.perf_counter()) - got - wrote
            timing.wall_s, copied = asked - started - timing.copy_s, timing.copy_s
            bar.set_postfix_str(describe_waits([timing]), refresh=False)
            bar.update(count_done(len(batch)) - bar.n)
        waited = writer.wait_s
    timing.write_s += writer.wait_s - waited
    timing.wall_s = time.perf_counter() - started - timing.copy_s
    return timing


def _load_embedder(plan: Plan, version: Version, ranks: Ranks) -> TileEmbedder:
    """The backbone, and a batch size that fits on every rank: halved once, before the first block, if it must be."""
    precision: Any = version.provenance.precision
    backbone = Backbone.load(plan.checkpoint, precision=precision, device=ranks.device)
    embedder = TileEmbedder(backbone, plan.checkpoint, version.recorded.batch_size)
    if not ranks.agree(embedder.fits()):
        asked, embedder.batch_size = embedder.batch_size, max(1, embedder.batch_size // 2)
        fit = ranks.agree(embedder.fits())
        ranks.run_on_main(lambda: _record_halved_batch(version, plan, asked, embedder.batch_size if fit else None))
    return embedder


def _record_halved_batch(version: Version, plan: Plan, asked: int, fitting: int | None) -> None:
    if plan.earlier_id:
        raise RunError(
            f"a batch of {asked} tiles does not fit in memory, and the rows kept from version {plan.earlier_id} were "
            "made in such: go on where it fits, or extract into another CACHE with a smaller --batch-size"
        )
    if fitting is None:
        size = version.provenance.image_size
        raise RunError(
            f"not even half a batch of {asked} tiles of {size} px fits in memory: "
            "set a smaller --batch-size or IMAGE_SIZE"
        )
    version.record_batch_size(fitting)
    print(f"a batch of {asked} tiles does not fit in memory: going on with {fitting}", flush=True)


@contextmanager
def _profiler(path: str | None) -> Iterator[Callable[[], None]]:
    """A function to call after every batch; with a path, a trace of five early batches is written there."""
    if path is None:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(path)) as run:
        yield run.step


def _describe_stop(stop: Stopped, plan: Plan | None) -> str:
    done = "before the first block"
    if plan:
        committed = CacheRoot(plan.cache).open_version(plan.version_id).committed()
        done = f"{int(committed.sum()):,} of {len(committed):,} blocks of {plan.cache} are committed"
    return f"stopped by {stop}: {done}; the same command goes on from there"


class _BlockDraw:
    """The blocks this rank draws: what an earlier version knows of them is copied, the rest becomes batches."""

    def __init__(self, version: Version, plan: Plan, source: Source, writer: BlockWriter, timing: Timing) -> None:
        self._version, self._pending = version, plan.pending
        self._writer, self._timing = writer, timing
        self._table = version.read_table()
        self._earlier = None
        if plan.earlier_id:
            earlier = CacheRoot(plan.cache).open_version(plan.earlier_id)
            self._earlier = EarlierRows(earlier, self._table, source)

    def draw_batches(self, draw: SharedCounter, batch_size: int) -> Iterator[list[TileRequest]]:
        """Batches of rows to embed; a batch never spans two blocks. Blocks without any are written on the way."""
        while (drawn := draw(1) - 1) < len(self._pending):
            missing = self._begin(self._pending[drawn])
            for start in range(0, len(missing), batch_size):
                yield make_requests(self._table, missing[start : start + batch_size])

    def _begin(self, block: int) -> list[int]:
        """Rows of `block` to be embedded."""
        started = time.perf_counter()
        rows = self._version.layout.block_slice(block)
        values = BlockValues.make_blank(self._version.layout, rows.stop - rows.start)
        if self._earlier:
            self._timing.note_labels(self._earlier.copy(rows, values))
        missing = rows.start + np.flatnonzero(values.status == Status.PENDING)
        self._writer.begin(block, values)
        self._timing.kept += len(values.status) - len(missing)
        self._timing.copy_s += time.perf_counter() - started
        rows_to_do: list[int] = missing.tolist()
        return rows_to_do


def _recheck(plan: Plan, ranks: Ranks) -> UInt8Array:
    """(N,) uint8, status of all rows as they are stored now, pending where a block cannot be trusted.

    All ranks call this once none of them writes any more; each reads its share of the cache.
    """
    version = ranks.run_everywhere(lambda: CacheRoot(plan.cache).open_version(plan.version_id))
    shares = share_out(version.layout.blocks, ranks.world_size)
    mine = shares[ranks.rank]
    status = ranks.run_everywhere(lambda: version.read_status(range(mine.start, mine.stop)))
    exchange(torch.from_numpy(status), [version.layout.span(share) for share in shares], ranks)
    return status


def _reopen_damaged(version: Version, status: UInt8Array, tried: Mapping[int, int]) -> tuple[int, ...]:
    """Blocks that hold pending rows; those whose values contradict their commit lose it, and the version its seal.

    Raises:
        RunError: this run has computed one of them often enough.
    """
    blocks = np.unique(np.flatnonzero(status == Status.PENDING) // version.layout.block_rows).tolist()
    hopeless = [block for block in blocks if tried[block] >= _ATTEMPTS]
    if hopeless:
        raise RunError(
            f"{version.url}: damaged again just after being written: {count_blocks(len(hopeless))}: check its "
            "disk or bucket, and that no other extraction writes there; then run the same command again"
        )
    print(f"{version.url}: damaged or missing, computed again: {count_blocks(len(blocks))}", flush=True)
    committed = version.committed()
    version.reopen_blocks([block for block in blocks if committed[block]])
    return tuple(blocks)


def _finish(
    config: ExtractConfig,
    plan: Plan,
    status: UInt8Array,
    timings: list[Timing],
    ranks: Ranks,
    elapsed: float,
    tried: Mapping[int, int],
) -> Finished | Plan:
    """Refuse or seal, move `current`, and say what there is now, or plan what is to be computed again.

    Args:
        config, plan, timings, ranks: of the run.
        status: (N,) uint8, of all rows as they are stored.
        elapsed: seconds since it began.
        tried: how often it has computed each block.
    """
    root = CacheRoot(plan.cache)
    version = root.open_version(plan.version_id, read_only=False)
    missing, quarantined = int((status == Status.PENDING).sum()), int((status > Status.EMBEDDED).sum())
    if missing:
        return replace(plan, pending=_reopen_damaged(version, status, tried), to_do=missing)
    if quarantined > config.max_quarantined * len(status):
        raise QuarantineError(
            f"{quarantined:,} of {len(status):,} tiles are quarantined, more than --max-quarantined "
            f"{config.max_quarantined} allows: mend them and run again with --retry-quarantined, or raise it\n"
            + describe_quarantined(version, status)
        )
    if not version.sealed:
        version.seal()
    if root.current() != version.id:
        root.set_current(version.id)
    remember_cache(plan.cache)
    line = f"{plan.cache}: {len(status) - quarantined:,} embeddings, sealed (version {version.id})"
    lines = [line]
    if quarantined:
        lines.append(describe_quarantined(version, status))
    kept = sum(timing.kept for timing in timings)
    if kept:
        lines.append(f"{kept:,} rows kept from version {plan.earlier_id}")
    if plan.pending:
        lines.append(describe_labels(timings))
    computed = sum(timing.tiles for timing in timings)
    values = {
        "cache": plan.cache,
        "version": version.id,
        "rows": len(status),
        "embedded": len(status) - quarantined,
        "quarantined": quarantined,
        "computed": computed,
        "kept": len(status) - computed,
        "malformed_lines": sum(timing.malformed for timing in timings),
        "seconds": round(elapsed, 3),
    }
    if not computed:
        return Finished(line, "\n".join([f"0 to do, {elapsed:.0f} s", *lines]), values)
    workers = ranks.choose_workers(config.workers)
    lines.append(describe_speed(timings, elapsed))
    lines.append(advise(timings, workers, ranks.cores, on_cpu=ranks.device.type == "cpu"))
    if config.limit is not None:
        lines.append(estimate_whole(version, plan.all_tiles, timings))
    return Finished(line, "\n".join(lines), values)

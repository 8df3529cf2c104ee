"""The end of an extraction: read back what is stored, seal the version and report, or plan what to compute again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cache_schema import CacheRoot, Status, Version
from cache_schema.layout import UInt8Array, count_blocks
from extract.ranks.exchange import exchange, share_out
from extract.ranks.group import Ranks

from .config import ExtractConfig, remember_cache
from .errors import QuarantineError, RunError
from .plan import Plan
from .timing import Timing, advise, describe_labels, describe_quarantined, describe_speed, estimate_whole

_ATTEMPTS = 2
"""How often a run computes a block: once more if the block is found damaged when the run is about to seal."""


@dataclass(frozen=True)
class Finished:
    """What a finished extraction reports.

    Attributes:
        line: where the embeddings are.
        text: the whole report for the user, with that line.
        values: the same for scripts.
    """

    line: str
    text: str
    values: dict[str, Any]


def recheck(plan: Plan, ranks: Ranks) -> UInt8Array:
    """Return the status of all rows as they are stored now, (N,) uint8; pending where a block cannot be trusted.

    All ranks call this after the last of them has stopped writing; each reads its share of the cache.
    """
    version = ranks.run_everywhere(lambda: CacheRoot(plan.cache).open_version(plan.version_id))
    shares = share_out(version.layout.blocks, ranks.world_size)
    mine = shares[ranks.rank]
    status = ranks.run_everywhere(lambda: version.read_status(range(mine.start, mine.stop)))
    exchange(torch.from_numpy(status), [version.layout.span(share) for share in shares], ranks)
    return status


def finish(
    config: ExtractConfig,
    plan: Plan,
    status: UInt8Array,
    timings: Sequence[Timing],
    ranks: Ranks,
    elapsed: float,
    tried: Mapping[int, int],
) -> Finished | Plan:
    """Seal the version, move `current` and report; if rows are missing, return the plan to compute them again.

    Args:
        status: (N,) uint8, of all rows as they are stored.
        timings: of all ranks.
        elapsed: seconds since the run began.
        tried: how often the run has computed each block.

    Raises:
        QuarantineError: too many tiles are quarantined.
        RunError: a block was damaged again just after it was written.
    """
    root = CacheRoot(plan.cache)
    version = root.open_version(plan.version_id, read_only=False)
    missing, quarantined = int((status == Status.PENDING).sum()), int((status > Status.EMBEDDED).sum())
    if missing:
        return replace(plan, pending=_reopen_damaged(version, status, tried), to_do=missing)
    if quarantined > config.max_quarantined * len(status):
        raise QuarantineError(
            f"{quarantined:,} of {len(status):,} tiles are quarantined, more than --max-quarantined "
            f"{config.max_quarantined} allows: fix them and run again with --retry-quarantined, or raise it\n"
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


def _reopen_damaged(version: Version, status: UInt8Array, tried: Mapping[int, int]) -> tuple[int, ...]:
    """Return the blocks that hold pending rows; remove the commits of those whose values contradict them.

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

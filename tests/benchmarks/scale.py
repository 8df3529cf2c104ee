"""Measures of scale: the simulator against a real run of two ranks, and what it says of up to 1,024."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

from extract.precision import choose_precision
from tests.checkpoints import make_checkpoint

from . import contenders
from .arithmetic import DECODE_S, READS_PER_S, WRITES_PER_S, Ramp, tiles_per_s
from .fixtures import WORKERS, Fixtures
from .measure import Bound, Figure, run_rounds
from .processes import pin_to, run_apart
from .schedule import Costs, Outcome, Samples, Setting, simulate

ROUNDS = 3
RUN_TILES = 2_816
"""Eleven blocks: an odd number, so that one of two ranks has a block more."""
BATCH = 32
_SEEDS = 20

GPU_BATCH = 256
GPU_WORKERS = 8
FETCH_S = 0.05 * GPU_BATCH / 32
"""A batch's reads, 32 at a time and 50 ms each: the latency that `extract/source.py` was laid out for."""
WRITE_S = 1.0
"""A block's five writes, one after the other: an assumption."""
START_S = 30.0
"""From a rank's start to its first request, a 1.2 GB checkpoint loaded: an assumption."""


@dataclass(frozen=True)
class Recording:
    """A real extraction by one rank, batch by batch.

    Attributes:
        costs: what its batches and blocks took.
        wall_s: as its summary counts, from the first request to the last block.
    """

    costs: Costs
    wall_s: float


def measure_prediction(fixtures: Fixtures) -> list[Figure]:
    """Costs from one rank on one core; the makespan of two ranks on two cores predicted from them, and run."""
    tiles, backbone = fixtures.first_small_tiles(RUN_TILES), _make_backbone(fixtures)
    setting = Setting(RUN_TILES, block_rows=256, batch=BATCH, ranks=2, workers=WORKERS)
    runs = {
        "one rank, recorded": partial(_record, fixtures, tiles, backbone),
        "two ranks": partial(fixtures.extract, tiles, backbone, nproc=2),
    }
    rounds = run_rounds("scale", runs, ROUNDS)
    recordings: list[Recording] = rounds["one rank, recorded"]
    real = [RUN_TILES / run.tiles_per_s for run in rounds["two ranks"]]
    predicted = [_predict(setting, recording.costs) for recording in recordings]
    same = [_predict(replace(setting, ranks=1), recording.costs) / recording.wall_s for recording in recordings]
    ratios = [guess / seconds for guess, seconds in zip(predicted, real, strict=True)]
    said = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return [
        Figure(
            "makespan of two ranks, predicted from one rank's batches, over a real run, or the inverse if that is more",
            Bound("<=", 1.15),
            tuple(max(ratio, 1 / ratio) for ratio in ratios),
            detail=f"predicted over real {said}: {median(predicted):.3g} over {median(real):.3g} s, {setting.blocks} "
            "blocks; a rank a core, so what the two take from each other is not in the prediction",
        ),
        Figure(
            "makespan of one rank, simulated from its own batches, over what it took, or the inverse if that is more",
            Bound("<=", 1.05),
            tuple(max(ratio, 1 / ratio) for ratio in same),
            detail=f"{median(recording.wall_s for recording in recordings):.3g} s",
        ),
    ]


def measure_simulation(fixtures: Fixtures) -> list[Figure]:
    """Up to 1,024 ranks with distributions of the shape measured here and the means of an H100 with vitl16 at 512."""
    recorded = _record(fixtures, fixtures.first_small_tiles(RUN_TILES), _make_backbone(fixtures)).costs
    costs = _scale_to_gpu(recorded)
    started = perf_counter()
    idle = _simulate_block_sizes(costs)
    preempted = _simulate_preemption(costs)
    cold = _simulate_cold_bucket(costs)
    figures = [*idle, *preempted, cold]
    click.echo(f"simulated in {perf_counter() - started:.0f} s", err=True)
    return figures


MEASURES = {"prediction": measure_prediction, "simulation": measure_simulation}


def _simulate_block_sizes(costs: Costs) -> list[Figure]:
    """Nothing is preempted, and the bucket is warm."""
    whole = Setting(100_000_000, 4096, GPU_BATCH, ranks=1024, workers=GPU_WORKERS)
    outcomes = {
        name: simulate(setting, costs)
        for name, setting in {
            "100 M tiles, 4,096 a block": whole,
            "100 M tiles, 1,024 a block": replace(whole, block_rows=1024),
            "10 M tiles, 4,096 a block": replace(whole, tiles=10_000_000),
            "10 M tiles, 256 a block": replace(whole, tiles=10_000_000, block_rows=256),
            "10 M tiles, 4,096 a block, 64 ranks": replace(whole, tiles=10_000_000, ranks=64),
        }.items()
    }
    first = outcomes["100 M tiles, 4,096 a block"]
    return [
        Figure(
            "blocks not computed exactly once by 1,024 ranks, nothing preempted",
            Bound("<=", 0),
            (float(sum((outcome.commits != 1).sum() for outcome in outcomes.values())),),
            unit="blocks",
            detail=f"{len(first.commits):,} blocks and more, all {len(outcomes)} runs finished",
        ),
        Figure(
            "share of 1,024 ranks' time in which no device computes once they have started: 100 M tiles",
            Bound("<=", 0.05),
            (_idle(first, costs),),
            unit="share",
            detail="; ".join(
                f"{name}: {_idle(outcome, costs):.3f}, tail {np.ptp(outcome.finish):.0f} s of {outcome.makespan:.0f} s"
                for name, outcome in outcomes.items()
            ),
        ),
    ]


def _simulate_preemption(costs: Costs) -> list[Figure]:
    """64 ranks, each killed at random times, once in so many hours."""
    base = Setting(20_000_000, 4096, GPU_BATCH, ranks=64, workers=GPU_WORKERS, back_s=60.0)
    ideal = base.tiles / tiles_per_s(512) / base.ranks
    rows, worst_lost, over_ideal = [], 0.0, 0.0
    for hours in (24, 4):
        for restart in ("job", "rank"):
            for block_rows in (256, 4096):
                setting = replace(base, block_rows=block_rows, kills_per_hour=1 / hours, restart=restart)  # type: ignore[arg-type]
                outcome = simulate(setting, costs, seed=hours)
                rows.append(
                    f"{hours} h, {restart}, {block_rows:,} a block: {outcome.kills} kills, {outcome.lost_share:.4f} of "
                    f"tiles twice, {outcome.makespan / ideal:.2f} of the ideal"
                )
                worst_lost = max(worst_lost, outcome.lost_share)
                over_ideal = max(over_ideal, outcome.makespan / ideal if hours == 24 and restart == "job" else 0)
    return [
        Figure(
            "tiles embedded twice, share of all, 64 ranks each killed once in 24 or 4 hours: the worst case",
            Bound("<=", 0.05),
            (worst_lost,),
            unit="share",
            detail="; ".join(rows),
        ),
        Figure(
            "makespan over the ideal, 64 ranks each killed once in 24 hours, every kill restarting all",
            Bound("<=", 1.5),
            (over_ideal,),
            detail=f"ideal {ideal:.0f} s: {base.tiles:,} tiles at {tiles_per_s(512):.0f} tiles/s a rank; "
            f"a restart takes {base.back_s + START_S:.0f} s",
        ),
    ]


def _simulate_cold_bucket(costs: Costs) -> Figure:
    """Reads and writes start at Google's initial rates and double every 20 minutes."""
    setting = Setting(20_000_000, 4096, GPU_BATCH, ranks=64, workers=GPU_WORKERS)
    warm = simulate(setting, costs)
    reads, writes = Ramp(READS_PER_S), Ramp(WRITES_PER_S)
    cold = simulate(replace(setting, reads=reads, writes=writes), costs)
    floor = reads.time(2 * setting.tiles)
    return Figure(
        "makespan from a cold bucket over what its request rate alone allows, 64 ranks and 20 M tiles",
        Bound("<=", 1.1),
        (cold.makespan / floor,),
        detail=f"cold {cold.makespan:.0f} s, its reads alone {floor:.0f} s, from a warm bucket {warm.makespan:.0f} s: "
        f"devices idle {_idle(cold, costs):.2f} against {_idle(warm, costs):.2f}",
    )


def _idle(outcome: Outcome, costs: Costs) -> float:
    """Share of the time after the start in which no device computes."""
    ranks = len(outcome.finish)
    return 1 - outcome.device_s / (ranks * (outcome.makespan - costs.start))


def _predict(setting: Setting, costs: Costs) -> float:
    return median(simulate(setting, costs, seed).makespan for seed in range(_SEEDS))


def _scale_to_gpu(costs: Costs) -> Costs:
    """Shapes as measured, means of an H100's rank: computing as the product and its efficiency say, decoding on a core
    a worker."""

    def rescale(samples: Samples, mean: float) -> Samples:
        return samples * (mean / samples.mean())

    return Costs(
        fetch=rescale(costs.fetch, FETCH_S),
        decode=rescale(costs.decode, DECODE_S * GPU_BATCH),
        device=rescale(costs.device, GPU_BATCH / tiles_per_s(512)),
        write=rescale(costs.write, WRITE_S),
        start=START_S,
    )


def _make_backbone(fixtures: Fixtures) -> Path:
    """About 1.5 GFLOP a tile: a block takes a second or two, and computing is what a rank does most."""
    path = fixtures.directory / "mid"
    if not path.exists():
        shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
        run_apart(make_checkpoint, path, image_size=128, **shape)
    return path


def _record(fixtures: Fixtures, tiles: Path, backbone: Path) -> Recording:
    with pin_to(sorted(os.sched_getaffinity(0))[:1]):
        cache = fixtures.directory / f"recorded-{perf_counter()}"
        raw: Sequence[list[float]]
        *raw, walls = run_apart(
            contenders.record_extraction, tiles, backbone, cache, choose_precision(contenders.CPU), WORKERS
        )
    fetch, decode, device, write, feed = (np.array(seconds) for seconds in raw)
    # The first wait is for the workers to start, too.
    start = max(0.0, float(feed[0] - fetch[0] - decode[0]))
    return Recording(Costs(fetch, decode, device, write, start), sum(walls))

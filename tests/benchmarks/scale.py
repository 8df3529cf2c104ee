"""Measure scale: the simulator against a real run of two ranks, its results for up to 1,024, and a second host."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from extract.tiles.source import CONCURRENT_READS
from tests.checkpoints import make_checkpoint

from .arithmetic import CHECKSUM_BYTES, DECODE_S, READS_PER_S, WRITES_PER_S, Cache, Ramp, tiles_per_s, write_s
from .fixtures import WORKERS, Fixtures, make_small_tiles
from .measure import Bound, Figure, run_rounds
from .processes import run_apart
from .recording import Recording, record_extraction
from .scale_hosts import measure_hosts
from .schedule import RESTARTS, Costs, Outcome, Restart, Samples, Setting, simulate

ROUNDS = 3
RUN_TILES = 1_792
"""Seven blocks: an odd number, so that one of two ranks gets one more."""
BATCH = 32
_SEEDS = 20

GPU_WORKERS = 8
ROUND_TRIP_S = 0.05
"""Latency of a request to a bucket, as assumed in `extract/tiles/source.py`; not measured here."""
UPLOAD_BYTES_S = 1e8
"""Upload speed of one request to a bucket: an assumption."""
START_S, BACK_S = 30.0, 60.0
"""Seconds from a rank's start to its first request, and from a kill to that start: assumptions."""


def measure_prediction(fixtures: Fixtures) -> list[Figure]:
    """Predict the makespan of a job of two ranks from two separate jobs of one rank, one core each; then run it."""
    tiles, backbone = _make_tiles(fixtures), _make_backbone(fixtures)
    setting = Setting(RUN_TILES, block_rows=256, batch=BATCH, ranks=2, workers=WORKERS)
    runs = {
        "two jobs, recorded": partial(_record, fixtures, tiles, backbone, jobs=2),
        "two ranks": partial(fixtures.extract, tiles, backbone, nproc=2),
    }
    rounds = run_rounds("scale", runs, ROUNDS)
    recorded: list[list[Recording]] = rounds["two jobs, recorded"]
    real = [RUN_TILES / run.tiles_per_s for run in rounds["two ranks"]]
    predicted = [_predict(setting, pool_costs([job.costs for job in jobs])) for jobs in recorded]
    apart = [job for jobs in recorded for job in jobs]
    same = [_predict(replace(setting, ranks=1), job.costs) / job.wall_s for job in apart]
    ratios = [guess / seconds for guess, seconds in zip(predicted, real, strict=True)]
    said = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return [
        Figure(
            "makespan of two ranks, predicted from batches of single ranks, over a real run, or the inverse if more",
            Bound("<=", 1.18),
            tuple(max(ratio, 1 / ratio) for ratio in ratios),
            detail=f"predicted over real {said}: {median(predicted):.3g} over {median(real):.3g} s, "
            f"{setting.blocks} blocks",
        ),
        Figure(
            "makespan of one rank, simulated from its own batches, over what it took, or the inverse if that is more",
            Bound("<=", 1.05),
            tuple(max(ratio, 1 / ratio) for ratio in same),
            detail=f"{median(job.wall_s for job in apart):.3g} s",
        ),
    ]


def measure_simulation(fixtures: Fixtures) -> list[Figure]:
    """Simulate up to 1,024 H100s, with the spread recorded on this machine."""
    (recording,) = _record(fixtures, _make_tiles(fixtures), _make_backbone(fixtures), jobs=1)
    recorded = recording.costs
    return [*_simulate_many_ranks(recorded), *_simulate_preemption(recorded), _simulate_cold_bucket(recorded)]


MEASURES = {"prediction": measure_prediction, "simulation": measure_simulation, "hosts": measure_hosts}


def _simulate_many_ranks(recorded: Costs) -> list[Figure]:
    """Simulate many ranks without preemption, on a warm bucket."""
    model = "vitl16 at 512"
    whole = Setting(100_000_000, 4096, batch=256, ranks=1024, workers=GPU_WORKERS)
    settings = {
        "100 M tiles, blocks of 4,096": whole,
        "100 M tiles, blocks of 1,024": replace(whole, block_rows=1024),
        "100 M tiles, blocks of 4,096, 64 ranks": replace(whole, ranks=64),
        "10 M tiles, blocks of 4,096": replace(whole, tiles=10_000_000),
        "1 M tiles, blocks of 256, 8 ranks": replace(whole, tiles=1_000_000, block_rows=256, ranks=8),
    }
    outcomes = {name: simulate(setting, scale_costs(recorded, setting, model)) for name, setting in settings.items()}
    for name, outcome in outcomes.items():
        if not outcome.finished:
            raise RuntimeError(f"the simulation of {name} did not end")
    return [
        Figure(
            "blocks not committed exactly once by 1,024 ranks, nothing preempted",
            Bound("<=", 0),
            (float(sum((outcome.commits != 1).sum() for outcome in outcomes.values())),),
            unit="blocks",
        ),
        Figure(
            f"share of the time in which 1,024 H100s do not compute once they have started: 100 M tiles, {model}",
            Bound("<=", 0.1),
            (_idle(outcomes["100 M tiles, blocks of 4,096"]),),
            unit="share",
            detail="; ".join(f"{name}: {_describe_idle(outcome)}" for name, outcome in outcomes.items()),
        ),
    ]


def _simulate_preemption(recorded: Costs) -> list[Figure]:
    """Simulate 64 ranks of the large model, each killed at random times at a given rate."""
    model = "vit7b16 at 512"
    base = Setting(20_000_000, 4096, batch=64, ranks=64, workers=GPU_WORKERS, back_s=BACK_S)
    ideal = base.tiles / tiles_per_s(model) / base.ranks

    def run(hours: int, restart: Restart, block_rows: int, seed: int = 0) -> Outcome:
        setting = replace(base, block_rows=block_rows, kills_per_hour=1 / hours, restart=restart)
        outcome = simulate(setting, scale_costs(recorded, setting, model), seed)
        in_hand = 2 * block_rows * (base.ranks if restart == "job" else 1)
        if not outcome.finished or outcome.most_lost > in_hand:
            raise RuntimeError(f"one kill lost {outcome.most_lost} tiles, and {in_hand} were in hand")
        return outcome

    rows, names = [], {"job": "all restart", "rank": "one restarts"}
    for hours, restart, block_rows in itertools.product((24, 4), RESTARTS, (256, 4096)):
        outcome = run(hours, restart, block_rows)
        rows.append(
            f"{hours} h, {names[restart]}, blocks of {block_rows:,}: {outcome.kills} "
            f"kills, {outcome.lost_share:.4f} of tiles twice, {outcome.makespan / ideal:.2f} of the ideal"
        )
    usual = [run(24, "job", 4096, seed) for seed in range(5)]
    return [
        Figure(
            f"share of tiles embedded twice: {model}, 64 ranks, each killed once in 24 hours, a kill restarts all",
            Bound("<=", 0.05),
            tuple(outcome.lost_share for outcome in usual),
            unit="share",
            detail="; ".join(rows),
        ),
        Figure(
            "makespan of the same over the ideal",
            Bound("<=", 1.2),
            tuple(outcome.makespan / ideal for outcome in usual),
            detail=f"ideal {ideal:.0f} s: {base.tiles:,} tiles at {tiles_per_s(model):.0f} a second and rank; "
            f"a restart takes {BACK_S + START_S:.0f} s",
        ),
    ]


def _simulate_cold_bucket(recorded: Costs) -> Figure:
    """Simulate a cold bucket: Google's initial rates, doubling every 20 minutes."""
    setting = Setting(20_000_000, 4096, batch=256, ranks=64, workers=GPU_WORKERS)
    costs = scale_costs(recorded, setting, "vitl16 at 512")
    warm = simulate(setting, costs)
    reads = Ramp(READS_PER_S)
    cold = simulate(replace(setting, reads=reads, writes=Ramp(WRITES_PER_S)), costs)
    floor = reads.time(2 * setting.tiles)
    return Figure(
        "makespan from a cold bucket over what its request rate alone allows: 20 M tiles, 64 ranks, vitl16 at 512",
        Bound("<=", 1.1),
        (cold.makespan / floor,),
        detail=f"cold {cold.makespan:.0f} s, its reads alone {floor:.0f} s; from a warm bucket {warm.makespan:.0f} s; "
        f"H100s without work {_idle(cold):.2f} and {_idle(warm):.2f} of the time",
    )


def _ranks_s(outcome: Outcome) -> float:
    """Return the seconds of all ranks since they started."""
    return len(outcome.finish) * (outcome.makespan - START_S)


def _idle(outcome: Outcome) -> float:
    return 1 - outcome.device_s / _ranks_s(outcome)


def _describe_idle(outcome: Outcome) -> str:
    seconds = outcome.makespan - START_S
    feed, write = (waited / _ranks_s(outcome) for waited in (outcome.feed_s, outcome.write_s))
    return (
        f"{_idle(outcome):.2f} (feed {feed:.2f}, write {write:.2f}, from the first rank to end to the last "
        f"{np.ptp(outcome.finish):.0f} s of {seconds:.0f} s)"
    )


def pool_costs(parts: Sequence[Costs]) -> Costs:
    """Pool the samples of all recordings, and average their start."""
    pooled = (
        np.concatenate([getattr(part, kind) for part in parts]) for kind in ("fetch", "decode", "device", "write")
    )
    return Costs(*pooled, start=sum(part.start for part in parts) / len(parts))


def _predict(setting: Setting, costs: Costs) -> float:
    return median(simulate(setting, costs, seed).makespan for seed in range(_SEEDS))


def scale_costs(recorded: Costs, setting: Setting, model: str) -> Costs:
    """Keep the recorded spreads, and set the means to those of an H100 that reads from and writes to a bucket.

    A tile and its label are fetched one after the other, 32 at a time. A worker decodes on one core. A block's chunks
    are written in parallel, then its commit.
    """

    def move(samples: Samples, mean: float) -> Samples:
        """Shift the mean: a delay of a batch does not grow with the batch."""
        return np.maximum(samples - samples.mean() + mean, 0.0)

    batch, vectors = setting.batch, setting.block_rows * Cache(setting.tiles).vector_bytes + CHECKSUM_BYTES
    return Costs(
        fetch=move(recorded.fetch, 2 * ROUND_TRIP_S * batch / CONCURRENT_READS),
        decode=move(recorded.decode, DECODE_S * batch),
        device=recorded.device * (batch / tiles_per_s(model) / recorded.device.mean()),
        write=move(recorded.write, write_s(vectors, ROUND_TRIP_S, UPLOAD_BYTES_S)),
        start=START_S,
    )


def _make_tiles(fixtures: Fixtures) -> Path:
    path = fixtures.directory / "few"
    return path if path.exists() else make_small_tiles(path, RUN_TILES)


def _make_backbone(fixtures: Fixtures) -> Path:
    """Make a backbone of about 0.9 GFLOP per tile: a block takes a second or two, mostly computing."""
    path = fixtures.directory / "mid"
    if not path.exists():
        shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
        run_apart(make_checkpoint, path, image_size=96, **shape)
    return path


def _record(fixtures: Fixtures, tiles: Path, backbone: Path, *, jobs: int) -> list[Recording]:
    """Record `jobs` single-rank jobs in parallel, each with its feed worker on one core and a separate cache."""
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))

    def run(core: int) -> Recording:
        cache = fixtures.directory / f"recorded-{core}-{perf_counter()}"
        return run_apart(record_extraction, tiles, backbone, cache, WORKERS, (core,))

    with ThreadPoolExecutor(jobs) as threads:
        return list(threads.map(run, itertools.islice(cores, jobs)))

"""Speed, time and cost that follow from what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import TileTable
from extract.doctor.cache import Pending
from extract.doctor.estimate import Speed, check_estimate, estimate
from extract.doctor.storage import Found
from tests.planted import fresh_seed


def simulate(speed: Speed, tiles: int) -> float:
    """Seconds until one rank has embedded so many tiles, event by event.

    Each worker fetches its next tile while it decodes the present one; the backbone takes tiles in turns as they come.
    At most as many workers as cores decode at a time.
    """
    workers, cores = speed.workers, min(speed.workers, speed.cores)
    fetched, decoded, core_free = [0.0] * workers, [0.0] * workers, [0.0] * cores
    done = 0.0
    for tile in range(tiles):
        worker = tile % workers
        fetched[worker] += speed.fetch_s
        core = min(range(cores), key=core_free.__getitem__)
        decoded[worker] = max(fetched[worker], decoded[worker], core_free[core]) + speed.decode_s
        core_free[core] = decoded[worker]
        done = max(done, decoded[worker]) + speed.backbone_s
    return done


seconds = st.floats(1e-4, 1.0)


@given(seconds, seconds, seconds, st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_speed_is_that_of_a_simulated_pipeline(
    backbone_s: float, fetch_s: float, decode_s: float, ranks: int, cores: int, workers: int
) -> None:
    speed = Speed(backbone_s, fetch_s, decode_s, ranks, cores, workers, on_cpu=False)
    tiles = 400
    start = fetch_s + decode_s + backbone_s
    measured = simulate(speed, tiles)
    assert measured == pytest.approx(tiles * speed.tile_s * ranks, rel=0.06, abs=3 * start)


def test_speed_by_hand() -> None:
    gpu = Speed(0.010, 0.008, 0.030, ranks=4, cores=8, workers=4, on_cpu=False)
    assert (gpu.wall, gpu.tile_s) == ("backbone", 0.010 / 4)
    assert replace(gpu, decode_s=0.080).wall == "decoding"
    assert replace(gpu, decode_s=0.080).tile_s == pytest.approx(0.080 / 4 / 4)
    assert replace(gpu, fetch_s=0.1).wall == "fetching"
    assert replace(gpu, workers=0).tile_s == pytest.approx(0.048 / 4)
    # On a CPU, eight cores that decode for 30 ms leave the backbone waiting for 3.75 ms of each tile.
    cpu = replace(gpu, on_cpu=True, ranks=1)
    assert (cpu.wall, cpu.tile_s) == ("backbone and decoding", pytest.approx(0.01375))


def make_found(rng: np.random.Generator, tiles: int, pages: int) -> Found:
    sizes = rng.integers(1000, 500_000, tiles)
    labels = rng.integers(-1, 3, tiles) * 100  # none (negative), empty, or of 100 and 200 bytes
    table = TileTable(
        tile=np.array([f"images/{i:07}.png" for i in range(tiles)], np.dtypes.StringDType()),
        size=sizes,
        crc32c=np.zeros(tiles, np.uint32),
        generation=np.zeros(tiles, np.int64),
        label_size=np.where(labels < 0, -1, labels),
        label_crc32c=np.zeros(tiles, np.uint32),
    )
    return Found(table, True, pages)


def test_estimate_by_hand() -> None:
    rng = np.random.default_rng(fresh_seed())
    found = make_found(rng, 1000, pages=2)
    table = found.table
    speed = Speed(0.5, 0.01, 0.01, ranks=2, cores=4, workers=3, on_cpu=False)
    whole = estimate(found, Pending(1000, 1000), speed, tiles_in_bucket=True, cache_in_bucket=True, arrays=2)
    labels = [int(size) for size in table.label_size if size > 0]
    assert whole.seconds == pytest.approx(1000 * 0.5 / 2)
    assert whole.read_bytes == sum(int(size) for size in table.size) + sum(labels)
    assert whole.class_b == 1000 + len(labels)
    assert whole.class_a == 2 + 4 * 5  # four blocks of 256 rows; cls, patch_mean, label_ids, status and commit of each
    assert whole.request_usd == pytest.approx(22 * 5e-6 + whole.class_b * 4e-7)
    none = estimate(found, Pending(0, 0), speed, tiles_in_bucket=True, cache_in_bucket=True, arrays=2)
    assert (none.seconds, none.read_bytes, none.class_a, none.class_b) == (0, 0, 2, 0)
    local = estimate(found, Pending(1000, 1000), speed, tiles_in_bucket=False, cache_in_bucket=False, arrays=2)
    assert (local.class_a, local.class_b) == (0, 0)


def test_cost_and_a_long_extraction() -> None:
    found = make_found(np.random.default_rng(0), 1000, pages=2)
    speed = Speed(720.0, 0.01, 0.01, ranks=8, cores=4, workers=3, on_cpu=False)
    here = ("tiles", "cache")
    verdict = check_estimate(found, Pending(1000, 1000), speed, here, price=12.5, arrays=2)
    assert "about 25.0 h on this hardware, 312.50 at 12.5 an hour" in verdict.detail
    assert [concern.status for concern in verdict.concerns] == ["warning"]
    assert "200.00 device-hours" in check_estimate(found, Pending(1000, 1000), speed, here, price=None, arrays=2).detail
    assert check_estimate(found, Pending(900, 900), speed, here, price=None, arrays=2).concerns == []

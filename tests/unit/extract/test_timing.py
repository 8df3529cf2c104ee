"""Where the time went, in figures and in one sentence of advice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cache_schema import LABEL_ID_COLUMNS
from cache_schema.cli.text import show_name
from extract.tiles.batch import TileBatch
from extract.timing import Stopwatch, Timing, advise, describe_labels, describe_speed, describe_waits, share_waits


def timing(wall: float, feed: float, fetch_worker: float, decode_worker: float, write: float = 0.0) -> Timing:
    return Timing(
        tiles=1000,
        wall_s=wall,
        feed_s=feed,
        device_s=wall - feed - write,
        write_s=write,
        fetch_worker_s=fetch_worker,
        decode_worker_s=decode_worker,
    )


def test_shares_are_of_all_ranks_together_and_add_up() -> None:
    """A worker's seconds only divide the wait between fetch and decode."""
    shares = share_waits([timing(10, 4, 30, 10), timing(10, 2, 0, 20, write=1)])
    assert shares == pytest.approx({"fetch": 0.15, "decode": 0.15, "device": 0.65, "write": 0.05})
    assert sum(shares.values()) == pytest.approx(1)


def test_shares_of_nothing_are_nothing() -> None:
    assert set(share_waits([Timing()]).values()) == {0.0}
    assert describe_waits([Timing()]) == "waiting: fetch 0.0 %, decode 0.0 %, device 0.0 %, write 0.0 %"


def test_speed_names_every_rank_and_the_slowest_counts() -> None:
    line = describe_speed([timing(10, 1, 1, 1), timing(5, 1, 1, 1)], 12.34)
    assert line.startswith("2,000 tiles in 10.0 s: 200 tiles/s (per rank 100, 200), 12.3 s in all; waiting: ")


@pytest.mark.parametrize("measured, workers, cores, advice", [
    (timing(4.9, 3, 1, 1), 1, 2, "too short a run to tell what would help"),
    (timing(100, 1, 1, 1), 1, 2, "the device was busy 99 % of the time: a faster one is all that would help"),
    (timing(100, 71, 9, 1), 2, 16, "waiting on fetch 64 %: raise --workers to 7"),
    (timing(100, 50, 1, 9), 4, 16, "waiting on decode 45 %: raise --workers to 8"),
    (timing(100, 50, 1, 9), 4, 4, "waiting on decode 45 %: 4 cores a rank: more of them, or smaller tiles, would help"),
    (timing(100, 99.9, 9, 0), 32, 64, "waiting on fetch 100 %: the tiles' place answers slowly"),
    (timing(100, 1, 1, 1, write=30), 1, 2, "waiting on write 30 %: put CACHE on faster storage"),
    (timing(100, 40, 1, 0), 0, 2, "waiting on fetch 40 %: raise --workers to 2"),
])  # fmt: skip
def test_advice(measured: Timing, workers: int, cores: int, advice: str) -> None:
    assert re.match(advice, advise([measured], workers, cores))


def test_on_a_cpu_more_workers_would_take_cores_from_the_model() -> None:
    advice = advise([timing(100, 50, 1, 9)], 1, 1, on_cpu=True)
    assert (
        advice
        == "waiting on decode 45 %: 1 core a rank for the model as well: more of them, or smaller tiles, would help"
    )


def test_malformed_lines_are_counted_and_a_few_named() -> None:
    """However many there are: what a run remembers must not grow with its bucket."""
    summed = Timing()
    for row in range(1000):
        problems = (f"images/{row}.png: quarantined: gone", f"labels/{row}.txt:3: malformed line")
        no_labels = np.zeros((1, LABEL_ID_COLUMNS), "<u2")
        batch = TileBatch(np.array([row]), [], np.ones(1, np.uint8), no_labels, 7, problems, 0.0, 0.0)
        summed.note_batch(batch)
    shown = ", ".join(f"labels/{row}.txt:3" for row in range(5))
    assert describe_labels([summed]) == (f"7,000 label lines read, malformed ones among them: {shown}, and 995 more")
    assert len(summed.examples) == 5


def test_name_is_shown_on_one_line_and_does_nothing_to_a_terminal() -> None:
    assert show_name("images/caf\u00e9 東京's.png") == "images/café 東京's.png"
    name = "a\nerror: b\x1b[2J\r\x07\u202e\x9b.png"
    assert show_name(name) == r"a\nerror: b\x1b[2J\r\x07\u202e\x9b.png"
    timing = Timing(label_lines=9, malformed=1, examples=[f"labels/{name}.txt:1"])
    assert describe_labels([timing]).isprintable()


def test_every_second_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As waiting for a batch, computing, waiting for a write or copying, also what comes after the last batch."""
    now = 0.0
    monkeypatch.setattr("extract.timing.time", SimpleNamespace(perf_counter=lambda: now))
    timing, writer = Timing(), SimpleNamespace(wait_s=0.0)
    watched: Any = writer

    def make_batches() -> Iterator[TileBatch]:
        nonlocal now
        for row, copied in ((0, 0.0), (1, 1.0)):
            now += 2 + copied
            timing.copy_s += copied
            no_labels = np.zeros((1, LABEL_ID_COLUMNS), "<u2")
            yield TileBatch(np.array([row]), [], np.ones(1, np.uint8), no_labels, 0, (), 0.25, 0.5)
        now += 1
        timing.copy_s += 1
        writer.wait_s += 1  # for a block that was copied whole: part of copying

    with Stopwatch(timing, watched) as stopwatch:
        for _ in stopwatch.waits(make_batches()):
            now += 5
            writer.wait_s += 1
        now += 4
        writer.wait_s += 4
    assert (timing.feed_s, timing.device_s, timing.write_s, timing.copy_s) == (4, 8, 6, 2)
    assert timing.wall_s == 4 + 8 + 6
    assert (timing.tiles, timing.fetch_worker_s, timing.decode_worker_s) == (2, 0.5, 1.0)

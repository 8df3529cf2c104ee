"""The simulator against closed forms, the bound of list scheduling, and its own books."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.arithmetic import Ramp
from tests.benchmarks.schedule import Costs, Outcome, Setting, bound_list_schedule, simulate
from tests.planted import fresh_seed

STEADY = Setting(tiles=256 * 40, block_rows=256, batch=256, ranks=4)


def check_books(setting: Setting, outcome: Outcome) -> None:
    """What holds whatever happens."""
    assert outcome.finished
    assert (outcome.commits == 1).all()
    assert outcome.computed == setting.tiles + outcome.lost
    assert min(outcome.device_s, outcome.feed_s, outcome.write_s) >= -1e-6
    assert outcome.other_s >= -1e-6 * max(1, outcome.makespan)
    # Of a rank, the block being computed and the one in writing at most; of a job, every rank's.
    hit = 1 if setting.restart == "rank" else setting.ranks
    assert outcome.most_lost <= 2 * setting.block_rows * hit
    assert outcome.lost <= outcome.kills * 2 * setting.block_rows * hit
    if not setting.kills_per_hour:
        assert outcome.kills == outcome.lost == 0


@pytest.mark.parametrize("blocks, ranks", [(40, 4), (41, 4), (3, 4), (1, 1), (1024, 1024), (1025, 1024)])
def test_equal_blocks_take_as_many_turns_as_the_busiest_rank_has(blocks: int, ranks: int) -> None:
    setting = replace(STEADY, tiles=256 * blocks, batch=64, ranks=ranks)
    outcome = simulate(setting, Costs.constant(device=0.75, write=0.5))
    # All but the last write lie under the next block.
    assert outcome.makespan == pytest.approx(math.ceil(blocks / ranks) * 4 * 0.75 + 0.5)
    assert outcome.device_s == pytest.approx(3.0 * blocks)
    check_books(setting, outcome)


def test_a_feed_that_draws_whole_blocks_ahead_keeps_them_from_others() -> None:
    """With a batch per block, the first two of four ranks draw all there is, and the others go without."""
    outcome = simulate(replace(STEADY, tiles=256 * 4), Costs.constant(device=3.0))
    assert outcome.makespan == pytest.approx(3 * 3.0)
    assert outcome.finish.tolist() == pytest.approx([9.0, 3.0, 0.0, 0.0])


def test_a_feed_draws_one_batch_for_every_batch_taken() -> None:
    """Were it two, the first of two ranks would end up with seven blocks and the other with five."""
    outcome = simulate(replace(STEADY, tiles=256 * 12, ranks=2), Costs.constant(device=1.0))
    assert outcome.finish.tolist() == pytest.approx([6.0, 6.0])


def test_slow_writes_and_slow_feeds_bound_a_rank() -> None:
    one = replace(STEADY, ranks=1)
    # A write waits for the one before, so all forty follow each other.
    written = simulate(one, Costs.constant(device=1.0, write=2.0))
    assert written.makespan == pytest.approx(1.0 + 40 * 2.0)
    assert written.write_s == pytest.approx(written.makespan - 40 * 1.0 - 2.0)
    # One worker decodes for 2 s a batch; two for 1 s.
    decoded = simulate(one, Costs.constant(device=0.5, decode=2.0))
    assert decoded.makespan == pytest.approx(40 * 2.0 + 0.5)
    two = simulate(replace(one, workers=2), Costs.constant(device=0.5, decode=2.0))
    assert two.makespan == pytest.approx(20 * 2.0 + 0.5 + 0.5)
    # Fetching lies under decoding, but for the first batch and the last tile's decoding.
    fetched = simulate(one, Costs.constant(fetch=1.0, decode=2.0))
    assert fetched.makespan == pytest.approx(1.0 + 2.0 / 256 + 39 * 2.0, abs=2.0)


@settings(max_examples=60)
@given(st.data())
def test_no_schedule_exceeds_the_bound_of_list_scheduling(data: st.DataObject) -> None:
    """Compute alone, batches as blocks, and no draw-ahead beyond what is bounded by the longest run of three."""
    ranks, blocks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 60))
    seconds = data.draw(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
    setting = replace(STEADY, tiles=32 * 4 * blocks, block_rows=128, batch=32, ranks=ranks)
    outcome = simulate(
        setting, Costs(np.zeros(1), np.zeros(1), np.array(seconds), np.zeros(1)), data.draw(st.integers(0, 99))
    )
    # A block is four batches, and a rank has drawn the next one when it is at the second batch of one.
    longest = 2 * 4 * max(seconds)
    assert outcome.makespan <= outcome.device_s / ranks + longest + 1e-6
    assert outcome.makespan >= outcome.device_s / ranks - 1e-6
    check_books(setting, outcome)


def test_the_bound_of_list_scheduling() -> None:
    assert bound_list_schedule([1, 1, 4], 2) == 7


@settings(max_examples=80)
@given(st.data())
def test_books_balance_whatever_is_killed(data: st.DataObject) -> None:
    setting = Setting(
        tiles=data.draw(st.integers(1, 3000)),
        block_rows=data.draw(st.sampled_from([64, 256])),
        batch=data.draw(st.sampled_from([16, 32, 64])),
        ranks=data.draw(st.integers(1, 9)),
        workers=data.draw(st.integers(1, 3)),
        kills_per_hour=data.draw(st.sampled_from([0.0, 1.0, 30.0])),
        back_s=data.draw(st.floats(0, 30)),
        restart=data.draw(st.sampled_from(["rank", "job"])),
        reads=data.draw(st.sampled_from([None, Ramp(100.0), Ramp(1000.0, 10.0)])),
        writes=data.draw(st.sampled_from([None, Ramp(5.0)])),
    )
    kinds = {kind: np.array(data.draw(st.lists(st.floats(0, 0.5), min_size=1, max_size=3))) for kind in KINDS}
    seed = data.draw(st.integers(0, 1000))
    outcome = simulate(setting, Costs(**kinds), seed)
    check_books(setting, outcome)
    again = simulate(setting, Costs(**kinds), seed)
    assert (again.makespan, again.lost, again.kills) == (outcome.makespan, outcome.lost, outcome.kills)
    if setting.reads:
        assert setting.reads.count(outcome.makespan) >= 2 * setting.tiles * (1 - 1e-9)
    if setting.writes:
        assert setting.writes.count(outcome.makespan) >= 5 * setting.blocks * (1 - 1e-9)


KINDS = ("fetch", "decode", "device", "write")


def test_lost_work_is_what_poisson_kills_predict() -> None:
    """A rank's kills come at rate k, and find it anywhere in a block of b seconds: half a block is lost on average.

    Precisely: a block that takes b seconds survives with probability exp(-k b), so a commit costs 1 / exp(-k b) tries;
    a try that fails had run E[t | t < b] = 1/k - b / (exp(k b) - 1) seconds. Lost batches over committed ones follow,
    with the batch under way counted whole.
    """
    per_s, batches, device = 0.002, 16, 1.0
    setting = Setting(
        tiles=16 * 16_000,
        block_rows=16 * batches,
        batch=16,
        ranks=8,
        kills_per_hour=per_s * 3600,
        back_s=5.0,
        restart="rank",
    )
    outcomes = [simulate(setting, Costs.constant(device=device), seed) for seed in range(5)]
    q = math.exp(-per_s * device)
    # P(killed in the j-th batch) of a block that starts anew; batches 1..j are lost.
    lost = sum(j * q ** (j - 1) * (1 - q) for j in range(1, batches + 1)) / q**batches
    expected = lost / batches
    measured = [outcome.lost / setting.tiles for outcome in outcomes]
    spread = np.std(measured, ddof=1) / math.sqrt(len(measured))
    assert abs(np.mean(measured) - expected) < 5 * spread + 0.02 * expected
    for outcome in outcomes:
        check_books(setting, outcome)


def test_a_job_restart_loses_all_ranks_blocks_and_waits_for_all() -> None:
    base = Setting(tiles=256 * 400, block_rows=256, batch=32, ranks=16, kills_per_hour=20, back_s=10)
    costs = Costs.constant(device=0.25)
    job = simulate(replace(base, restart="job"), costs, 1)
    rank = simulate(replace(base, restart="rank"), costs, 1)
    assert job.lost / job.kills > 3 * rank.lost / rank.kills
    assert job.makespan > rank.makespan
    check_books(base, job)


def test_others_take_what_a_killed_rank_leaves() -> None:
    """Of three blocks one rank does two, while the other has nothing to do: killed then, it is not waited for."""
    setting = Setting(768, block_rows=256, batch=64, ranks=2, kills_per_hour=3, back_s=300, restart="rank")
    outcomes = [simulate(setting, Costs.constant(device=10.0), seed) for seed in range(200)]
    killed_once = [outcome for outcome in outcomes if outcome.kills == 1]
    assert len(killed_once) > 5
    assert max(outcome.makespan for outcome in killed_once) < 200


def test_a_job_that_never_lives_long_enough_is_given_up() -> None:
    hopeless = Setting(tiles=256 * 4, block_rows=256, batch=256, ranks=4, kills_per_hour=3600, back_s=5, most_kills=50)
    outcome = simulate(hopeless, Costs.constant(device=10.0))
    assert (outcome.finished, outcome.kills) == (False, 50)


def test_a_cold_bucket_sets_the_pace_until_it_is_warm() -> None:
    setting = replace(STEADY, tiles=256 * 400, ranks=64, reads=Ramp(1000.0, 20.0))
    outcome = simulate(setting, Costs.constant(device=0.1))
    floor = Ramp(1000.0, 20.0).time(2 * setting.tiles)
    assert floor <= outcome.makespan <= floor + 0.5
    warm = simulate(replace(setting, reads=None), Costs.constant(device=0.1))
    assert warm.makespan < floor / 10


def test_random_costs_on_many_ranks_commit_every_block_once() -> None:
    rng = np.random.default_rng(fresh_seed())
    costs = Costs(
        rng.exponential(0.3, 50), rng.exponential(0.1, 50), rng.gamma(4, 0.1, 50), rng.exponential(0.2, 50), 2.0
    )
    setting = Setting(tiles=1_000_000, block_rows=256, batch=256, ranks=1024, workers=2)
    outcome = simulate(setting, costs)
    check_books(setting, outcome)
    assert outcome.makespan >= max(outcome.finish) - 1e-6
    assert np.ptp(outcome.finish) < 60

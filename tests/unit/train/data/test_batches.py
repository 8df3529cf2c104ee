"""An epoch's batches are the same for any number of ranks, and the ranks' shares make them up exactly."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import BlockValues, Layout
from extract.ranks.group import Ranks
from tests.planted import fresh_seed
from tests.vectors import hold as hold_vectors
from train.data.batches import count_epoch, draw_epoch, draw_repeats, epoch_order, split_evenly, take_share
from train.data.cached import CachedTiles
from train.data.labels import LabelledRows
from train.data.rare import compute_repeat_factors
from train.data.vectors import HeldVectors


def make_ranks(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, world_size, world_size, torch.device("cpu"), dist.HashStore())


POOLING = ("cls", "patch_mean")


def make_rows(index: list[int]) -> LabelledRows:
    """Rows of a table whose labels say which they are."""
    return LabelledRows(
        index=np.array(index, np.int64),
        tiles=np.array([f"t{i}" for i in index]),
        scenes=np.array(["s"] * len(index)),
        labels=(np.array(index, np.int64)[:, None] >> np.arange(10) & 1).astype(bool),
        reading="type",
        class_ids=tuple(range(10)),
        class_names=tuple("abcdefghij"),
        notes=(),
    )


def make_values(rows: slice) -> BlockValues:
    """Values of a block whose vectors say which rows they are of."""
    numbers = np.arange(rows.start, rows.stop)
    pooled = {
        "cls": np.stack([numbers, numbers + 0.5], axis=1).astype(np.float16),
        "patch_mean": np.stack([-numbers, -numbers - 0.5], axis=1).astype(np.float16),
    }
    nothing: Any = None
    return BlockValues(pooled, nothing, nothing)


def hold(rows: int, features: tuple[str, ...] = ("cls",), block_rows: int = 7) -> HeldVectors:
    """Vectors of a version of that many rows, kept block by block."""
    version: Any = SimpleNamespace(layout=Layout(rows, 2, POOLING, block_rows))
    vectors = HeldVectors(version, features, torch.device("cpu"))
    for block, where in enumerate(version.layout.block_slices()):
        vectors.keep(block, make_values(where))
    return vectors


NAMES = tuple("abcdef")


def make_sampled_rows(labels: np.ndarray, threshold: float | None) -> LabelledRows:
    n = len(labels)
    return LabelledRows(
        index=np.arange(n),
        tiles=np.array([f"t{i}" for i in range(n)]),
        scenes=np.array(["s"] * n),
        labels=labels,
        reading="type",
        class_ids=tuple(range(len(NAMES))),
        class_names=NAMES,
        notes=(),
        repeat_factors=None if threshold is None else compute_repeat_factors(labels, threshold),
    )


def draw_labels(rng: np.random.Generator, rows: int = 300) -> np.ndarray:
    """A long tail whose last class is on no tile; some tiles show nothing."""
    return rng.random((rows, len(NAMES))) < np.array([0.5, 0.1, 0.05, 0.02, 0.02, 0])


@settings(max_examples=60)
@given(rows=st.integers(0, 200), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_an_epochs_order_is_a_permutation_of_seed_and_epoch(rows: int, seed: int, epoch: int) -> None:
    torch.rand(3)  # what was drawn before must not matter
    order = epoch_order(rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(rows))
    assert torch.equal(order, epoch_order(rows, seed, epoch))
    if rows > 30:
        assert not torch.equal(order, epoch_order(rows, seed, epoch + 1))
        assert not torch.equal(order, epoch_order(rows, seed + 1, epoch))


@settings(max_examples=100)
@given(rows=st.lists(st.integers(0, 10**6), max_size=70), world_size=st.integers(1, 9))
def test_shares_partition_a_batch(rows: list[int], world_size: int) -> None:
    batch = torch.tensor(rows, dtype=torch.int64)
    shares = [take_share(batch, make_ranks(rank, world_size)).tolist() for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    world_size=st.integers(1, 7),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 50),
)
def test_cached_batches_do_not_depend_on_the_number_of_ranks(
    rows: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    index = list(range(0, 2 * rows, 2))
    vectors = hold(2 * rows)

    def read(size: int, first_step: int = 0) -> list[list[tuple[list[float], list[bool]]]]:
        """Rows of each global batch, and that every rank knows its size."""
        per_rank = [
            list(
                CachedTiles(make_rows(index), vectors, make_ranks(rank, size)).iterate_epoch(
                    batch_size=batch_size, seed=seed, epoch=epoch, first_step=first_step
                )
            )
            for rank in range(size)
        ]
        batches = []
        for shares in zip(*per_rank, strict=True):
            found = sorted(
                (x.tolist(), y.tolist()) for share in shares for x, y in zip(share.inputs, share.labels, strict=True)
            )
            assert all(share.global_size == len(found) for share in shares)
            batches.append(found)
        return batches

    alone = read(1)
    assert read(world_size) == alone
    half = len(alone) // 2
    assert read(world_size, half) == alone[half:]
    assert [len(batch) for batch in alone[:-1]] == [batch_size] * (len(alone) - 1)
    seen = sorted(row for batch in alone for row in batch)
    assert seen == sorted(([float(i), i + 0.5], [bool(i >> c & 1) for c in range(10)]) for i in index)


def test_evaluation_shares_make_up_all_rows() -> None:
    rng = np.random.default_rng(fresh_seed())
    index = np.sort(rng.choice(500, 101, replace=False)).tolist()
    vectors = hold(500)
    for world_size in (1, 2, 3, 7, 150):
        whole = torch.full((len(index), 2), torch.nan, dtype=torch.float16)
        for rank in range(world_size):
            tiles = CachedTiles(make_rows(index), vectors, make_ranks(rank, world_size))
            whole[tiles.share] = torch.cat(list(tiles.iterate_share()))
        assert whole[:, 0].tolist() == index


def test_split_evenly_gives_every_rank_as_many_parts() -> None:
    rng = np.random.default_rng(fresh_seed())
    for world_size, size in ((1, 4), (2, 4), (3, 5), (30, 2)):
        for total in (*rng.integers(1, 60, 8).tolist(), 2 * world_size * size, 1):
            rows = torch.randperm(total)
            shares = [take_share(rows, make_ranks(rank, world_size)) for rank in range(world_size)]
            parts = [split_evenly(share, total, size, make_ranks(0, world_size)) for share in shares]
            assert {len(mine) for mine in parts} == {-(-len(shares[0]) // size)}
            for share, mine in zip(shares, parts, strict=True):
                assert torch.equal(torch.cat(mine), share)
                assert max(map(len, mine)) <= size


def test_features_are_joined_in_the_order_asked_for() -> None:
    for features, expected in (
        (("patch_mean",), [-3.0, -3.5]),
        (("cls", "patch_mean"), [3.0, 3.5, -3.0, -3.5]),
        (("patch_mean", "cls"), [-3.0, -3.5, 3.0, 3.5]),
    ):
        (share,) = CachedTiles(make_rows([3]), hold(4, features), make_ranks(0, 1)).iterate_share()
        assert share.tolist() == [expected]


def test_factors_are_rounded_at_random_and_right_on_average() -> None:
    factors = np.array([1.0, 1.25, 2.0, 3.9] * 500)
    for epoch in range(3):
        repeats = draw_repeats(factors, 5, epoch)
        assert ((repeats == np.floor(factors)) | (repeats == np.ceil(factors))).all()
        # Of 500 draws the mean lies within 4.5 standard errors but once in 150,000 times.
        for first, factor in enumerate(factors[:4]):
            share = factor % 1
            error = 4.5 * math.sqrt(share * (1 - share) / 500)
            assert repeats[first::4].mean() == pytest.approx(factor, abs=error + 1e-12)
    torch.rand(3)
    np.random.random(3)
    np.testing.assert_array_equal(draw_repeats(factors, 5, 2), repeats)
    assert (draw_repeats(factors, 5, 3) != repeats).any()
    assert (draw_repeats(factors, 6, 2) != repeats).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_sees_its_share_of_the_same_repeated_batches(world_size: int) -> None:
    rng = np.random.default_rng(fresh_seed())
    seed, epoch, batch_size = (int(v) for v in rng.integers(1, 50, 3))
    labels = draw_labels(rng)
    rows = make_sampled_rows(labels, 0.2)
    vectors = np.arange(len(labels), dtype=np.float16)[:, None]
    held = hold_vectors(vectors)
    shares = []
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, world_size, torch.device("cpu"), dist.HashStore())
        tiles = CachedTiles(rows, held, ranks)
        shares.append(list(tiles.iterate_epoch(batch_size=batch_size, seed=seed, epoch=epoch)))
    batches = [sorted(int(row) for share in batch for row in share.rows) for batch in zip(*shares, strict=True)]
    order = draw_epoch(rows, seed, epoch)
    assert batches == [sorted(part.tolist()) for part in order.split(batch_size)]
    for batch, expected in zip(zip(*shares, strict=True), batches, strict=True):
        assert all(share.global_size == len(expected) for share in batch)
        assert all(torch.equal(share.inputs[:, 0].long(), share.rows) for share in batch)
    shown = Counter(row for batch in batches for row in batch)
    assert rows.repeat_factors is not None
    assert [shown[row] for row in range(len(rows))] == draw_repeats(rows.repeat_factors, seed, epoch).tolist()
    assert sum(shown.values()) == count_epoch(rows, seed, epoch) > len(rows)
    assert order.tolist() != sorted(order.tolist())


def test_without_repeats_an_epoch_is_what_it_was() -> None:
    rows = make_sampled_rows(draw_labels(np.random.default_rng(fresh_seed())), None)
    assert torch.equal(draw_epoch(rows, 3, 4), epoch_order(len(rows), 3, 4))
    assert count_epoch(rows, 3, 4) == len(rows)
    # With a factor of 1 everywhere too.
    rows = replace(rows, repeat_factors=np.ones(len(rows)))
    assert torch.equal(draw_epoch(rows, 3, 4), epoch_order(len(rows), 3, 4))


def test_factors_go_with_their_rows() -> None:
    rows = make_sampled_rows(draw_labels(np.random.default_rng(fresh_seed())), 0.2)
    chosen = np.arange(len(rows)) % 3 == 1
    assert rows.repeat_factors is not None
    np.testing.assert_array_equal(rows.select(chosen).repeat_factors, rows.repeat_factors[chosen])

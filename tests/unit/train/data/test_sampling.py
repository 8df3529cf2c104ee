"""Repeat factors are those of LVIS, and an epoch of repeated tiles is the same for any number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from extract.ranks.group import Ranks
from tests.planted import fresh_seed
from tests.vectors import hold
from train.data.batches import count_epoch, draw_epoch, draw_repeats, epoch_order
from train.data.cached import CachedTiles
from train.data.labels import LabelledRows
from train.data.rare import compute_repeat_factors, describe_repeats

NAMES = tuple("abcdef")


def make_rows(labels: np.ndarray, threshold: float | None) -> LabelledRows:
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


def test_a_tile_has_the_largest_factor_of_its_classes() -> None:
    labels = draw_labels(np.random.default_rng(fresh_seed()))
    with np.errstate(all="raise"):
        factors = compute_repeat_factors(labels, 0.1)
    for row, factor in zip(labels, factors, strict=True):
        of_classes = [max(1.0, math.sqrt(0.1 / labels[:, c].mean())) for c in np.flatnonzero(row)]
        assert factor == pytest.approx(max(of_classes, default=1.0), rel=1e-12)
    assert factors.max() > 1.5
    assert (factors == 1).any()
    assert (compute_repeat_factors(labels, 0.0) == 1).all()


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
    rows = make_rows(labels, 0.2)
    vectors = np.arange(len(labels), dtype=np.float16)[:, None]
    held = hold(vectors)
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
    rows = make_rows(draw_labels(np.random.default_rng(fresh_seed())), None)
    assert torch.equal(draw_epoch(rows, 3, 4), epoch_order(len(rows), 3, 4))
    assert count_epoch(rows, 3, 4) == len(rows)
    # With a factor of 1 everywhere too.
    rows = replace(rows, repeat_factors=np.ones(len(rows)))
    assert torch.equal(draw_epoch(rows, 3, 4), epoch_order(len(rows), 3, 4))


def test_factors_go_with_their_rows() -> None:
    rows = make_rows(draw_labels(np.random.default_rng(fresh_seed())), 0.2)
    chosen = np.arange(len(rows)) % 3 == 1
    assert rows.repeat_factors is not None
    np.testing.assert_array_equal(rows.select(chosen).repeat_factors, rows.repeat_factors[chosen])


def test_the_line_for_the_user_says_what_is_repeated() -> None:
    labels = np.zeros((400, len(NAMES)), bool)
    labels[:, 0], labels[:4, 1] = True, True
    assert describe_repeats(labels, NAMES, 0.04) == (
        "repeat factor 0.04: 4 of 400 tiles are shown more than once, an epoch has about 404; b, on 4, 2.0 x"
    )
    assert "a higher --repeat-factor would repeat some" in describe_repeats(labels, NAMES, 0.001)

"""Symmetries are a group, crops and colours are those of other libraries, draws depend on seed, epoch and row alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy import stats
from torch import Tensor, nn

from tests.checkpoints import MEAN, STD
from tests.planted import fresh_seed
from tests.tiles import draw_pixels
from train.model.augment import (
    _CROP_DRAWS,
    _JITTER_DRAWS,
    _SYMMETRY_DRAWS,
    MIN_CROP_SCALE,
    NO_AUGMENTATION,
    SYMMETRIES,
    Augmentation,
    apply_symmetry,
    average_views,
    crop_squares,
    draw_symmetries,
    draw_uniform,
    jitter_colours,
    split_mix,
)

SURE = 1e-7
"""A p-value below it is no chance: fresh seeds would meet one once in ten million tests."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())


def draw_batch(rng: np.random.Generator, tiles: int, size: int = 32) -> Tensor:
    """(tiles, 3, size, size) float32 in 0..1, with shapes in them."""
    images = np.stack([draw_pixels(rng, size, size) for _ in range(tiles)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


# The eight symmetries


def test_the_symmetries_are_the_quarter_turns_and_their_mirror_images(rng: np.random.Generator) -> None:
    pixels = draw_batch(rng, 3)
    turns = [np.rot90(pixels.numpy(), k, (2, 3)) for k in range(4)]
    expected = [*turns, *(turn[..., ::-1] for turn in turns)]
    found = [apply_symmetry(pixels, index) for index in range(SYMMETRIES)]
    matches = [[i for i, e in enumerate(expected) if np.array_equal(f.numpy(), e)] for f in found]
    assert sorted(matches) == [[i] for i in range(8)]
    assert matches[0] == [0]
    assert all(f.is_contiguous() for f in found)


def test_the_symmetries_are_the_group_of_the_square(rng: np.random.Generator) -> None:
    """Closed, with inverses; of the five groups of order 8 only this one has five elements of order 2, two of 4."""
    pixels = draw_batch(rng, 1, size=8)
    images = [apply_symmetry(pixels, a) for a in range(SYMMETRIES)]
    table = np.array(
        [[[torch.equal(apply_symmetry(x, b), y) for y in images].index(True) for b in range(8)] for x in images]
    )
    for line in (*table, *table.T):
        assert sorted(line) == list(range(8))
    assert table[0].tolist() == table[:, 0].tolist() == list(range(8))
    orders = []
    for a in range(SYMMETRIES):
        power, order = a, 1
        while power:
            power, order = table[power, a], order + 1
        orders.append(order)
    assert Counter(orders) == {1: 1, 2: 5, 4: 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_symmetry_for_each_tile_is_that_of_the_batch(rng: np.random.Generator, dtype: torch.dtype) -> None:
    pixels = draw_batch(rng, 20).to(dtype)
    index = torch.from_numpy(rng.permutation(np.arange(20) % SYMMETRIES))
    found = apply_symmetry(pixels, index)
    assert found.dtype == dtype
    assert found.is_contiguous()
    for row, i in enumerate(index.tolist()):
        assert torch.equal(found[row : row + 1], apply_symmetry(pixels[row : row + 1], i))
    assert apply_symmetry(pixels[:0], index[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("index", [-1, 8, torch.tensor([0, 8]), torch.tensor([-1, 0])])
def test_there_is_no_ninth_symmetry(index: int | Tensor) -> None:
    with pytest.raises(ValueError, match="0 to 7"):
        apply_symmetry(torch.zeros(2, 3, 4, 4), index)


# Draws


def test_the_generator_is_split_mix() -> None:
    """The five outputs for seed 1234567 that Rosetta Code gives, "Pseudo-random numbers/Splitmix64"."""
    outputs = split_mix(np.array([1234567], np.uint64), np.arange(5))
    assert outputs.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_symmetries_are_uniform_and_independent_of_neighbouring_rows_epochs_and_seeds(rng: np.random.Generator) -> None:
    seed, epoch, n = int(rng.integers(2**31)), int(rng.integers(100)), 40_000
    rows = torch.arange(n) + int(rng.integers(2**33))
    drawn = draw_symmetries(rows, seed, epoch)
    assert drawn.dtype == torch.int64
    counts = np.bincount(drawn.numpy(), minlength=SYMMETRIES)
    assert len(counts) == SYMMETRIES
    assert stats.chisquare(counts).pvalue > SURE
    others = {
        "next row": draw_symmetries(rows + 1, seed, epoch),
        "next epoch": draw_symmetries(rows, seed, epoch + 1),
        "next seed": draw_symmetries(rows, seed + 1, epoch),
        "seed and epoch exchanged": draw_symmetries(rows, epoch, seed),
    }
    for name, other in others.items():
        pairs = np.bincount((8 * drawn + other).numpy(), minlength=64)
        assert stats.chisquare(pairs).pvalue > SURE, name


def test_uniform_draws_are_uniform_and_independent_of_each_other(rng: np.random.Generator) -> None:
    seed, epoch, n = int(rng.integers(2**31)), int(rng.integers(100)), 20_000
    draws = draw_uniform(torch.arange(n), seed, epoch, range(9)).numpy()
    assert draws.shape == (n, 9)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > SURE
    correlations = np.corrcoef(draws.T) - np.eye(9)
    assert np.abs(correlations).max() < 6.5 / np.sqrt(n)  # standard errors
    first = draw_symmetries(torch.arange(n), seed, epoch).numpy()
    np.testing.assert_array_equal(first, np.floor(8 * draws[:, 0]))


def test_a_draw_depends_on_no_other_row_and_no_state(rng: np.random.Generator) -> None:
    rows = torch.from_numpy(rng.integers(0, 10_000_000, 500))
    drawn = draw_uniform(rows, 3, 4, range(1, 6))
    torch.rand(1)
    np.random.random(1)
    chosen = torch.from_numpy(rng.permutation(500)[:100])
    assert torch.equal(draw_uniform(rows[chosen], 3, 4, range(1, 6)), drawn[chosen])
    assert torch.equal(draw_uniform(rows, 3, 4, range(3, 5)), drawn[:, 2:4])
    assert draw_symmetries(rows[:0], 3, 4).shape == (0,)


# Crops


def test_crops_are_those_pillow_enlarges(rng: np.random.Generator) -> None:
    """Pillow in float, any fraction of a pixel; coordinates are rounded to float32: 1e-4 of values in 0..1."""
    pixels, size = draw_batch(rng, 12, size=64), 64
    side = rng.uniform(0.5, 1, 12)
    boxes = np.stack([rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side], axis=1)
    boxes[:4] = [[0, 0, 0.5], [0.5, 0.5, 0.5], [0, 0.25, 0.75], [0, 0, 1]]  # at the tile's edges, and all of it
    found = crop_squares(pixels, torch.from_numpy(boxes))
    assert found.shape == pixels.shape
    for tile, (left, top, s), image in zip(pixels.numpy(), boxes * size, found.numpy(), strict=True):
        for channel, enlarged in zip(tile, image, strict=True):
            box = (left, top, min(left + s, size), min(top + s, size))
            expected = Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR, box=box)
            np.testing.assert_allclose(enlarged, np.asarray(expected), atol=1e-4)
    np.testing.assert_allclose(found[3], pixels[3], atol=1e-5)
    assert crop_squares(pixels[:0], torch.zeros(0, 3)).shape == (0, 3, 64, 64)


def test_drawn_crops_lie_in_the_tile_and_are_uniform_in_area_and_place(rng: np.random.Generator) -> None:
    augmentation = Augmentation(crop_scale=MIN_CROP_SCALE)
    draws = draw_uniform(torch.arange(20_000), int(rng.integers(2**31)), 1, range(6, 9))
    left, top, side = augmentation._place_crops(draws).numpy().T
    for start in (left, top):
        assert start.min() >= 0
        assert (start + side).max() <= 1 + 1e-12
        assert stats.kstest(start / (1 - side), "uniform").pvalue > SURE
    assert stats.kstest((side**2 - MIN_CROP_SCALE) / (1 - MIN_CROP_SCALE), "uniform").pvalue > SURE


# Colours


def test_colours_are_those_of_a_float64_computation(rng: np.random.Generator) -> None:
    pixels = draw_batch(rng, 16)
    gains, contrast = rng.uniform(0.3, 1.9, (16, 3)), rng.uniform(0.1, 1.9, 16)
    found = jitter_colours(normalise(pixels), torch.from_numpy(gains), torch.from_numpy(contrast), MEAN, STD)
    for tile, gain, c, image in zip(pixels.double().numpy(), gains, contrast, found.numpy(), strict=True):
        seen = np.minimum(tile * gain[:, None, None], 1)
        grey = np.average(seen.transpose(1, 2, 0).reshape(-1, 3).mean(axis=0), weights=[299, 587, 114])
        seen = np.clip(c * seen + (1 - c) * grey, 0, 1)
        expected = (seen - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(image, expected, atol=2e-5)
    assert (found.amax(dim=(2, 3)) <= normalise(torch.ones(1, 3, 1, 1)).view(1, 3) + 1e-5).all()


def test_brightness_and_contrast_are_pillows(rng: np.random.Generator) -> None:
    """Pillow rounds to bytes after each step, and the mean grey to a whole one: up to 3 of 255."""
    images = [draw_pixels(rng, 32, 32) for _ in range(8)]
    brightness, contrast = rng.uniform(0.6, 1.4, (2, 8))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    gains = torch.from_numpy(brightness)[:, None].expand(-1, 3)
    found = jitter_colours(normalise(pixels), gains, torch.from_numpy(contrast), MEAN, STD)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    seen = ((found * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    changed = []
    for image, b, c, ours in zip(images, brightness, contrast, seen, strict=True):
        bright = ImageEnhance.Brightness(Image.fromarray(image)).enhance(b)
        theirs = np.asarray(ImageEnhance.Contrast(bright).enhance(c), np.float32)
        assert np.abs(theirs - ours).max() <= 3
        changed.append(np.abs(theirs - image).max())
    assert max(changed) > 10


def test_drawn_colours_stay_within_the_range_asked_for(rng: np.random.Generator) -> None:
    draws = draw_uniform(torch.arange(20_000), int(rng.integers(2**31)), 1, range(1, 6))
    gains, contrast = Augmentation(jitter=0.4)._scale_colours(draws)
    brightness = (1 + 0.4 * (2 * draws[:, :1] - 1)).numpy()
    assert stats.kstest((contrast - 0.6) / 0.8, "uniform").pvalue > SURE
    for own in (gains.numpy() / brightness).T:
        assert stats.kstest((own - 0.8) / 0.4, "uniform").pvalue > SURE
    assert stats.kstest((brightness[:, 0] - 0.6) / 0.8, "uniform").pvalue > SURE


# A batch

ALL = Augmentation(views="d4", jitter=0.3, crop_scale=0.6)


def augment(augmentation: Augmentation, pixels: Tensor, rows: Tensor, *, seed: int = 5, epoch: int = 2) -> Tensor:
    return augmentation.apply(pixels, rows, seed=seed, epoch=epoch, mean=MEAN, std=STD)


def test_without_augmentation_a_batch_is_what_it_was(rng: np.random.Generator) -> None:
    pixels = normalise(draw_batch(rng, 3))
    assert augment(NO_AUGMENTATION, pixels, torch.arange(3)) is pixels
    assert NO_AUGMENTATION.describe() == ()


def test_a_tile_is_augmented_the_same_in_any_batch(rng: np.random.Generator) -> None:
    """However the rows are shared out among batches and ranks."""
    pixels, rows = normalise(draw_batch(rng, 24)), torch.from_numpy(rng.permutation(1000)[:24])
    whole = augment(ALL, pixels, rows)
    for part in (slice(0, None, 2), slice(1, None, 2), slice(7, 8), slice(0, 0)):
        torch.testing.assert_close(augment(ALL, pixels[part], rows[part]), whole[part], rtol=0, atol=1e-5)
    for options in ({"seed": 6}, {"epoch": 3}):
        other = augment(ALL, pixels, rows, **options)
        assert (other - whole).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_each_part_has_draws_of_its_own(rng: np.random.Generator) -> None:
    """What colours and crop a tile gets does not change with the others, and the symmetry comes last."""
    assert sorted([*_SYMMETRY_DRAWS, *_JITTER_DRAWS, *_CROP_DRAWS]) == list(range(9))
    pixels, rows = normalise(draw_batch(rng, 16)), torch.arange(16)
    parts = [Augmentation(jitter=0.3), Augmentation(crop_scale=0.6), Augmentation(views="d4")]
    expected = pixels
    for part in parts:
        changed = augment(part, expected, rows)
        assert not torch.equal(changed, expected)
        expected = changed
    assert torch.equal(augment(ALL, pixels, rows), expected)
    turned = apply_symmetry(pixels, draw_symmetries(rows, 5, 2))
    assert torch.equal(augment(Augmentation(views="d4"), pixels, rows), turned)


def test_half_precision_is_augmented_in_full(rng: np.random.Generator) -> None:
    pixels = normalise(draw_batch(rng, 8)).bfloat16()
    found = augment(ALL, pixels, torch.arange(8))
    assert found.dtype == torch.bfloat16
    # Two roundings, each to 1/256 of a value, and of the first one up to 1.3 x 1.3 x 1.15 as much.
    exact = augment(ALL, pixels.float(), torch.arange(8))
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=0.03)


def test_the_user_is_told_what_is_done_to_the_tiles() -> None:
    (line,) = Augmentation("d4", 0.2, 0.8).describe()
    assert line == (
        "augmentation of training tiles: eight flips and rotations; brightness and contrast within 20%; "
        "crops of 80% of the area and up, which leave out some 10% of the objects while the labels stay"
    )
    assert Augmentation(views="d4").describe() == ("augmentation of training tiles: eight flips and rotations",)


# Averaging


def test_averaging_is_the_mean_over_eight_views_one_batch_at_a_time(rng: np.random.Generator) -> None:
    pixels = draw_batch(rng, 5, size=8)
    weights = torch.from_numpy(rng.normal(size=(3 * 64, 4))).float()
    sizes = []

    def model(views: Tensor) -> Tensor:
        sizes.append(len(views))
        return views.flatten(1) @ weights

    found = average_views(model, pixels)
    assert sizes == [5] * SYMMETRIES
    turns = [np.rot90(pixels.double().numpy(), k, (2, 3)) for k in range(4)]
    views = [*turns, *(turn[..., ::-1] for turn in turns)]
    expected = np.mean([view.reshape(5, -1) @ weights.double().numpy() for view in views], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found - model(pixels)).abs().max() > 0.1


def test_averaging_is_in_float32_whatever_the_model_gives(rng: np.random.Generator) -> None:
    pixels = draw_batch(rng, 4, size=8)
    weights = torch.from_numpy(rng.normal(size=(3 * 64, 4))).float()
    views = [(apply_symmetry(pixels, i).flatten(1) @ weights).bfloat16() for i in range(SYMMETRIES)]
    found = average_views(lambda view: (view.flatten(1) @ weights).bfloat16(), pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(views).float().mean(dim=0), rtol=1e-6, atol=1e-5)


def test_a_model_that_sees_no_direction_gives_the_same_with_and_without(rng: np.random.Generator) -> None:
    torch.manual_seed(fresh_seed())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    pixels = normalise(draw_batch(rng, 6))
    with torch.inference_mode():
        torch.testing.assert_close(average_views(model, pixels), model(pixels), rtol=1e-5, atol=1e-5)

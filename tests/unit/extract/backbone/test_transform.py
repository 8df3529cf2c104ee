"""The transform against Pillow's own resize in float mode, channel by channel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from extract.backbone.transform import TileTransform, describe_scale
from tests.planted import fresh_seed
from tests.tiles import draw_pixels

CPU = torch.device("cpu")
MEAN, STD = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)
SHAPES = [(64, 64), (80, 80), (48, 48), (200, 200), (37, 91), (130, 21), (512, 512), (1, 1), (65, 64)]


def transform_independently(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float64]:
    """(3, S, S): rescale, resize with Pillow in mode F, normalise."""
    channels = []
    for c in range(3):
        channel = Image.fromarray((pixels[:, :, c] / 255).astype(np.float32))
        assert channel.mode == "F"
        resized = np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR), np.float64)
        channels.append((resized - MEAN[c]) / STD[c])
    return np.stack(channels)


def run(images: torch.Tensor | list[torch.Tensor], size: int = 64, **changes: tuple[float, ...]) -> torch.Tensor:
    settings = {"mean": MEAN, "std": STD, **changes}
    return TileTransform(size, **settings)(images, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [64, 224])
def test_equals_pillow_in_float(shape: tuple[int, int], size: int) -> None:
    """Within 5e-5 of values that span some 7 units: both sides round in float32 (2.2e-5 was met in 450,000 values)."""
    rng = np.random.default_rng(fresh_seed())
    pixels = np.stack([draw_pixels(rng, *shape) for _ in range(3)])
    result = run(torch.from_numpy(pixels), size)
    assert (result.shape, result.dtype) == ((3, 3, size, size), torch.float32)
    expected = np.stack([transform_independently(image, size) for image in pixels])
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=5e-5)


def test_tiles_of_mixed_sizes_equal_each_alone() -> None:
    rng = np.random.default_rng(fresh_seed())
    images = [torch.from_numpy(draw_pixels(rng, *shape)) for shape in SHAPES]
    together = run(images)
    for image, result in zip(images, together, strict=True):
        torch.testing.assert_close(result, run(image[None])[0], rtol=0, atol=0)
        np.testing.assert_allclose(result, transform_independently(image.numpy(), 64), rtol=0, atol=5e-5)


@pytest.mark.parametrize("changed", ["mean", "std"])
def test_mean_and_std_matter_channel_by_channel(changed: str) -> None:
    """Normalisation that silently does nothing has spoiled published benchmarks."""
    image = torch.from_numpy(draw_pixels(np.random.default_rng(fresh_seed()), 80, 80))[None]
    before = run(image)
    for channel in range(3):
        values = list(MEAN if changed == "mean" else STD)
        values[channel] += 0.1
        difference = (run(image, **{changed: tuple(values)}) - before).abs().amax(dim=(0, 2, 3))
        assert difference[channel] > 0.05
        assert difference.sum() == difference[channel]


def test_dtype_is_rounded_once_at_the_end() -> None:
    image = torch.from_numpy(draw_pixels(np.random.default_rng(fresh_seed()), 80, 80))[None]
    result = TileTransform(64, MEAN, STD)(image, device=CPU, dtype=torch.bfloat16)
    torch.testing.assert_close(result, run(image).bfloat16(), rtol=0, atol=0)


def test_scale_is_described() -> None:
    assert describe_scale(512, 224) == "512 px -> 224 px: a 15 px car becomes 6.56 px"
    assert describe_scale(256, 512) == "256 px -> 512 px: a 15 px car becomes 30 px"

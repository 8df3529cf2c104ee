"""Augmentation that fits overhead images: the eight symmetries of the square, light and colour, square crops.

An overhead tile has no upright: turned or mirrored it is as likely a picture, which is not so of a photograph. A crop
keeps the pixel square, since the ground is seen at one scale in both directions.

Everything works on a batch of pixel values (B, 3, S, S), on their device. What a tile undergoes is drawn from (seed,
epoch, row) alone, never from a generator with a state: it does not depend on the number of ranks, on the rest of the
batch, or on whether the run was resumed. A tile that `--repeat-factor` shows twice in an epoch looks the same twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Views = Literal["one", "d4"]
VIEWS: tuple[Views, ...] = get_args(Views)
SYMMETRIES = 8
MIN_CROP_SCALE = 0.5
"""Labels are the whole tile's: a crop to the share a of the area leaves out an object with a chance of about 1 - a."""

UInt64Array = npt.NDArray[np.uint64]
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, which Pillow's contrast is about
_TRANSPOSE, _FLIP_COLUMNS, _FLIP_ROWS = 1, 2, 4
# Which of a row's draws is for what: that colours are jittered, say, must not change which way tiles are turned.
_SYMMETRY_DRAWS, _JITTER_DRAWS, _CROP_DRAWS = range(1), range(1, 6), range(6, 9)


@dataclass(frozen=True)
class Augmentation:
    """What is done to the tiles of a training batch.

    Attributes:
        views: `d4` turns and mirrors each tile in one of eight ways.
        jitter: largest relative change of brightness and contrast, 0 to below 1; of each colour, half as large.
        crop_scale: smallest share of a tile's area that is cropped and enlarged, 0.5 to 1; 1 crops nothing.
    """

    views: Views = "one"
    jitter: float = 0.0
    crop_scale: float = 1.0

    def apply(
        self, pixels: Tensor, rows: Tensor, *, seed: int, epoch: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Tensor:
        """Colours first, then the crop, then the symmetry; computed in float32, but for the symmetry.

        Args:
            pixels: (B, 3, S, S) floating, normalised; B may be 0.
            rows: (B,) int64 on the CPU, which of the set's rows these are.
            mean, std: per channel, what the pixels were normalised with.

        Returns:
            (B, 3, S, S) of the same dtype; without augmentation `pixels` itself.
        """
        if self.jitter:
            draws = _to_device(draw_uniform(rows, seed, epoch, _JITTER_DRAWS), pixels)
            gains, contrast = self._scale_colours(draws)
            pixels = jitter_colours(pixels, gains, contrast, mean, std)
        if self.crop_scale < 1:
            draws = _to_device(draw_uniform(rows, seed, epoch, _CROP_DRAWS), pixels)
            pixels = crop_squares(pixels, self._place_crops(draws))
        if self.views == "d4":
            pixels = apply_symmetry(pixels, draw_symmetries(rows, seed, epoch))
        return pixels

    def _scale_colours(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3) gains and (B,) contrasts from (B, 5) draws: brightness, contrast, and the three colours' own gains."""
        factors = 1 + self.jitter * (2 * draws - 1)
        own = 1 + self.jitter / 2 * (2 * draws[:, 2:] - 1)
        return factors[:, :1] * own, factors[:, 1]

    def _place_crops(self, draws: Tensor) -> Tensor:
        """(B, 3) left, top and side as shares of the tile's side, from (B, 3) draws: area and place are uniform."""
        side = (self.crop_scale + (1 - self.crop_scale) * draws[:, 0]).sqrt()
        return torch.stack([draws[:, 1] * (1 - side), draws[:, 2] * (1 - side), side], dim=1)

    def count_views(self) -> int:
        """In how many ways a tile may be turned and mirrored."""
        return SYMMETRIES if self.views == "d4" else 1

    def describe(self) -> tuple[str, ...]:
        """A line for the user; none without augmentation."""
        parts = []
        if self.views == "d4":
            parts.append("eight flips and rotations")
        if self.jitter:
            parts.append(f"brightness and contrast within {self.jitter:.0%}")
        if self.crop_scale < 1:
            lost = (1 - self.crop_scale) / 2
            parts.append(
                f"crops of {self.crop_scale:.0%} of the area and up, which leave out some {lost:.0%} of the objects "
                "while the labels stay"
            )
        return (f"augmentation of training tiles: {'; '.join(parts)}",) if parts else ()


NO_AUGMENTATION = Augmentation()


def apply_symmetry(pixels: Tensor, index: int | Tensor) -> Tensor:
    """Turn and mirror tiles: transpose if `index & 1`, then reverse columns if `& 2`, then reverse rows if `& 4`.

    These are all eight symmetries of the square; 0 leaves a tile as it is. Pixels are moved, not computed.

    Args:
        pixels: (B, C, S, S).
        index: 0 to 7, for the whole batch, or (B,) int64 on the CPU, one for each tile.

    Returns:
        (B, C, S, S), contiguous.

    Raises:
        ValueError: an index is none of the eight.
    """
    if isinstance(index, int):
        if not 0 <= index < SYMMETRIES:
            raise ValueError(f"symmetry {index}: 0 to {SYMMETRIES - 1}")
        turned = pixels.mT if index & _TRANSPOSE else pixels
        reversed_ = [axis for bit, axis in ((_FLIP_COLUMNS, 3), (_FLIP_ROWS, 2)) if index & bit]
        return (turned.flip(reversed_) if reversed_ else turned).contiguous()
    moved = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    # Tiles of one symmetry together: three torch.where over the whole batch take twice the time, and more.
    for one in index.unique().tolist():
        chosen = (index == one).nonzero().flatten().to(pixels.device)
        moved[chosen] = apply_symmetry(pixels[chosen], one)
    return moved


def average_views(model: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """The mean of a model's logits over the eight symmetries of each tile: (B, C) float32.

    Logits are averaged, not probabilities. A run's temperature and thresholds read logits, `sigmoid(logits / T)`; the
    mean of eight logits is on the scale of one, and `T` divides it with the meaning it was fitted with. A mean of
    probabilities lies nearer to one half than the logits it came from say, and has no place for `T`. Both were fitted
    on one view, though: the mean scatters less, so the thresholds are near the best ones rather than at them.

    One view is computed at a time: it takes eight times the work and the memory of one batch.
    """
    total = model(pixels).float()
    for index in range(1, SYMMETRIES):
        total = total + model(apply_symmetry(pixels, index))  # in float32, whatever the model gives
    return total / SYMMETRIES


def jitter_colours(
    pixels: Tensor, gains: Tensor, contrast: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Brightness, colour cast and contrast of tiles as the camera would see them, before normalisation.

    As in Pillow's ImageEnhance: brightness is a factor, contrast a factor on the distance from the tile's mean grey,
    and what leaves 0..1 is clamped after each.

    Args:
        pixels: (B, 3, S, S) floating, normalised by `mean` and `std`.
        gains: (B, 3), of each channel.
        contrast: (B,).

    Returns:
        (B, 3, S, S) of the same dtype, normalised.
    """
    shift, scale, luma = (pixels.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, std, _LUMA))
    gains, contrast = gains.float()[:, :, None, None], contrast.float().view(-1, 1, 1, 1)
    # In place, since fresh memory is most of the time: (pixels * scale + shift) * gains, and so on.
    seen = (pixels.float() * (scale * gains)).add_(shift * gains).clamp_(0, 1)
    grey = (seen.mean(dim=(2, 3), keepdim=True) * luma).sum(dim=1, keepdim=True)
    seen.sub_(grey).mul_(contrast).add_(grey).clamp_(0, 1)
    return seen.sub_(shift).div_(scale).to(pixels.dtype)


def crop_squares(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Enlarge a square of each tile to the whole, bilinearly; the tile's edge is repeated where it is sampled beyond.

    Args:
        pixels: (B, C, S, S) floating.
        boxes: (B, 3) left, top and side of the square as shares of the tile's side, inside it.

    Returns:
        (B, C, S, S) of the same dtype.
    """
    if not len(pixels):
        return pixels
    size = pixels.shape[-1]
    left, top, side = boxes.float().unbind(1)
    centres = (torch.arange(size, device=pixels.device) + 0.5) / size
    # Not by affine_grid: its matrix product may be computed in TF32, which would move pixels.
    x, y = (2 * (start[:, None] + side[:, None] * centres) - 1 for start in (left, top))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)
    return grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False).to(pixels.dtype)


def draw_symmetries(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """(n,) int64, 0 to 7: which symmetry each of `rows` (n,) int64 undergoes in an epoch."""
    return torch.from_numpy((_hash_rows(rows, seed, epoch, _SYMMETRY_DRAWS)[:, 0] >> np.uint64(61)).astype(np.int64))


def draw_uniform(rows: Tensor, seed: int, epoch: int, draws: range) -> Tensor:
    """(n, len(draws)) float64, uniform in [0, 1): draws number `draws` of each of `rows` (n,) int64 in an epoch."""
    return torch.from_numpy((_hash_rows(rows, seed, epoch, draws) >> np.uint64(11)) * 2.0**-53)


def _to_device(draws: Tensor, pixels: Tensor) -> Tensor:
    return draws.float().to(pixels.device, non_blocking=True)


def _hash_rows(rows: Tensor, seed: int, epoch: int, draws: range) -> UInt64Array:
    """(n, len(draws)) 64 random bits of (seed, epoch, row, draw); all four at least 0.

    SplitMix64 of Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, split in the order
    seed, epoch, row; a row's draws are the outputs of its own generator, found by their number.
    """
    state = np.zeros(1, np.uint64)
    for part in (np.array([seed]), np.array([epoch]), rows.numpy()):
        state = split_mix(state, part)
    return split_mix(state[:, None], np.asarray(draws))


def split_mix(state: UInt64Array, number: npt.NDArray[np.int64]) -> UInt64Array:
    """Output number `number`, counted from 0, of SplitMix64 generators in `state`; the two are broadcast."""
    z = state + (number.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = z ^ (z >> np.uint64(31))
    return mixed

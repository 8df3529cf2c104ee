"""Augment overhead images: the eight symmetries of the square, brightness and colour, square crops.

An overhead tile has no upright direction: turned or mirrored it is as likely as before, unlike a photograph. A crop
keeps pixels square, since the ground has the same scale in both directions.

Everything works on a batch of pixel values (B, 3, S, S), on their device. A tile's draws follow from (seed, epoch,
row) alone, never from the state of a generator: they do not depend on the number of ranks, on the rest of the batch, or
on whether the run was resumed. A tile that `--repeat-factor` shows twice in an epoch looks the same both times.
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
"""Labels describe the whole tile: a crop to a share a of its area loses an object with probability 1 - a or so."""

UInt64Array = npt.NDArray[np.uint64]
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, which Pillow's contrast is about
_TRANSPOSE, _FLIP_COLUMNS, _FLIP_ROWS = 1, 2, 4
# Numbers of a row's draws by purpose: whether colours are jittered, say, must not change how tiles are turned.
_SYMMETRY_DRAWS, _JITTER_DRAWS, _CROP_DRAWS = range(1), range(1, 6), range(6, 9)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the tiles of a training batch.

    Attributes:
        views: `d4` turns and mirrors each tile in one of eight ways.
        jitter: largest relative change of brightness and contrast, 0 to below 1; each colour changes by up to half.
        crop_scale: smallest share of a tile's area that is cropped and enlarged, 0.5 to 1; 1 crops nothing.
    """

    views: Views = "one"
    jitter: float = 0.0
    crop_scale: float = 1.0

    def apply(
        self, pixels: Tensor, rows: Tensor, *, seed: int, epoch: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Tensor:
        """Change colours, then crop, then turn; colours and crops are computed in float32.

        Args:
            pixels: (B, 3, S, S) floating, normalised; B may be 0.
            rows: (B,) int64 on the CPU, rows of the set.
            mean, std: per channel, with which the pixels were normalised.

        Returns:
            (B, 3, S, S) of the same dtype; without augmentation `pixels` itself.
        """
        if self.jitter:
            draws = draw_uniform(rows, seed, epoch, _JITTER_DRAWS).float().to(pixels.device, non_blocking=True)
            gains, contrast = self._scale_colours(draws)
            pixels = jitter_colours(pixels, gains, contrast, mean, std)
        if self.crop_scale < 1:
            draws = draw_uniform(rows, seed, epoch, _CROP_DRAWS).float().to(pixels.device, non_blocking=True)
            pixels = crop_squares(pixels, self._place_crops(draws))
        if self.views == "d4":
            pixels = apply_symmetry(pixels, draw_symmetries(rows, seed, epoch))
        return pixels

    def _scale_colours(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 3) gains and (B,) contrasts from (B, 5) draws: brightness, contrast, a gain for each colour."""
        factors = 1 + self.jitter * (2 * draws - 1)
        own = 1 + self.jitter / 2 * (2 * draws[:, 2:] - 1)
        return factors[:, :1] * own, factors[:, 1]

    def _place_crops(self, draws: Tensor) -> Tensor:
        """Return left, top and side, (B, 3) shares of the tile's side, from (B, 3) draws: uniform in area and place."""
        side = (self.crop_scale + (1 - self.crop_scale) * draws[:, 0]).sqrt()
        return torch.stack([draws[:, 1] * (1 - side), draws[:, 2] * (1 - side), side], dim=1)

    def count_views(self) -> int:
        """Return in how many ways a tile may be turned and mirrored."""
        return SYMMETRIES if self.views == "d4" else 1

    def describe(self) -> tuple[str, ...]:
        """Return a line for the user; none without augmentation."""
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

    These are the eight symmetries of the square; 0 leaves a tile as it is. Pixels are moved, not computed.

    Args:
        pixels: (B, C, S, S).
        index: 0 to 7, for the whole batch, or (B,) int64 on the CPU, one for each tile.

    Returns:
        (B, C, S, S), contiguous.

    Raises:
        ValueError: an index is not 0 to 7.
    """
    if isinstance(index, int):
        if not 0 <= index < SYMMETRIES:
            raise ValueError(f"symmetry {index}: 0 to {SYMMETRIES - 1}")
        turned = pixels.mT if index & _TRANSPOSE else pixels
        reversed_ = [axis for bit, axis in ((_FLIP_COLUMNS, 3), (_FLIP_ROWS, 2)) if index & bit]
        return (turned.flip(reversed_) if reversed_ else turned).contiguous()
    moved = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    # All tiles of a symmetry at once: three torch.where over the whole batch take more than twice the time.
    for one in index.unique().tolist():
        chosen = (index == one).nonzero().flatten().to(pixels.device)
        moved[chosen] = apply_symmetry(pixels[chosen], one)
    return moved


def average_views(model: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Return the mean of a model's logits over the eight symmetries of each tile: (B, C) float32.

    Logits are averaged, not probabilities: temperature and thresholds of a run apply to logits, `sigmoid(logits / T)`,
    and the mean of eight logits has the scale of one. A mean of probabilities lies nearer to one half, and `T` cannot
    be applied to it. Temperature and thresholds were fitted on one view; the mean scatters less, so the thresholds are
    close to the best ones, not equal to them.

    Views are computed one at a time: eight times the work, the memory of one batch.
    """
    total = model(pixels).float()
    for index in range(1, SYMMETRIES):
        total = total + model(apply_symmetry(pixels, index))  # in float32, whatever the dtype of the model's logits
    return total / SYMMETRIES


def jitter_colours(
    pixels: Tensor, gains: Tensor, contrast: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Change brightness, colour cast and contrast of tiles, on the values before normalisation.

    As in Pillow's ImageEnhance, brightness is a factor and contrast a factor on the distance from the tile's mean grey;
    values are clamped to 0..1 after each.

    Args:
        pixels: (B, 3, S, S) floating, normalised by `mean` and `std`.
        gains: (B, 3), factor on each channel.
        contrast: (B,), factor.

    Returns:
        (B, 3, S, S) of the same dtype, normalised.
    """
    shift, scale, luma = (pixels.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, std, _LUMA))
    gains, contrast = gains.float()[:, :, None, None], contrast.float().view(-1, 1, 1, 1)
    # In place, since allocating memory takes most of the time: (pixels * scale + shift) * gains, and so on.
    seen = (pixels.float() * (scale * gains)).add_(shift * gains).clamp_(0, 1)
    grey = (seen.mean(dim=(2, 3), keepdim=True) * luma).sum(dim=1, keepdim=True)
    seen.sub_(grey).mul_(contrast).add_(grey).clamp_(0, 1)
    return seen.sub_(shift).div_(scale).to(pixels.dtype)


def crop_squares(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Enlarge a square of each tile to the size of the tile, bilinearly; beyond the tile, its edge is repeated.

    Args:
        pixels: (B, C, S, S) floating.
        boxes: (B, 3) left, top and side of the square, which lies inside the tile, as shares of the tile's side.

    Returns:
        (B, C, S, S) of the same dtype.
    """
    if not len(pixels):
        return pixels
    size = pixels.shape[-1]
    left, top, side = boxes.float().unbind(1)
    centres = (torch.arange(size, device=pixels.device) + 0.5) / size
    # Not affine_grid: its matrix product may be computed in TF32, which would move pixels.
    x, y = (2 * (start[:, None] + side[:, None] * centres) - 1 for start in (left, top))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)
    return grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False).to(pixels.dtype)


def draw_symmetries(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the symmetry of each of `rows` (n,) int64 in an epoch: (n,) int64, 0 to 7."""
    return torch.from_numpy((_hash_rows(rows, seed, epoch, _SYMMETRY_DRAWS)[:, 0] >> np.uint64(61)).astype(np.int64))


def draw_uniform(rows: Tensor, seed: int, epoch: int, draws: range) -> Tensor:
    """Return draws number `draws` of each of `rows` (n,) int64 in an epoch: (n, len(draws)) float64 in [0, 1)."""
    return torch.from_numpy((_hash_rows(rows, seed, epoch, draws) >> np.uint64(11)) * 2.0**-53)


def _hash_rows(rows: Tensor, seed: int, epoch: int, draws: range) -> UInt64Array:
    """Return 64 random bits for each (seed, epoch, row, draw), all at least 0: (n, len(draws)).

    SplitMix64 of Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, split in the order
    seed, epoch, row. Each row has a separate generator; draw number i is its output number i.
    """
    state = np.zeros(1, np.uint64)
    for part in (np.array([seed]), np.array([epoch]), rows.numpy()):
        state = split_mix(state, part)
    return split_mix(state[:, None], np.asarray(draws))


def split_mix(state: UInt64Array, number: npt.NDArray[np.int64]) -> UInt64Array:
    """Return output `number`, counted from 0, of SplitMix64 generators in `state`; the two arrays are broadcast."""
    z = state + (number.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = z ^ (z >> np.uint64(31))
    return mixed

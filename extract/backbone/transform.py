"""Turn uint8 tiles into the backbone's pixel values, on the device: rescale, resize, normalise."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from extract.tiles.batch import TileImages

RESAMPLING = "bilinear-antialias"


@dataclass(frozen=True)
class TileTransform:
    """The only path from pixels to `pixel_values`. As DINOv3ViTImageProcessor, it rescales to 0..1, resizes to a square
    (bilinear, antialiased) and normalises per channel.

    Attributes:
        image_size: pixels a side of the result.
        mean, std: per channel, on 0..1.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: TileImages, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return (B, 3, S, S) of `dtype` on `device`, computed in float32. The device receives bytes, not floats."""
        if isinstance(images, Tensor):
            pixels = self._resize(images.to(device, non_blocking=True))
        else:
            pixels = torch.cat([self._resize(image[None].to(device, non_blocking=True)) for image in images])
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((pixels - mean) / std).to(dtype)

    def _resize(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        size = (self.image_size, self.image_size)
        if pixels.shape[2:] == size:
            return pixels
        return interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)


def describe_scale(tile_size: int, image_size: int) -> str:
    """Tell what resizing does to a small object: `512 px -> 224 px: a 15 px car becomes 6.6 px`."""
    return f"{tile_size} px -> {image_size} px: a 15 px car becomes {15 * image_size / tile_size:.3g} px"

"""Embed batches of tiles: from uint8 images to float16 vectors, the same for extraction, training and prediction."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cache_schema import Status, Version
from extract.tiles.batch import TileBatch

from .checkpoint import Checkpoint
from .dinov3 import Backbone
from .transform import TileTransform


class TileEmbedder:
    """Embeds batches of tiles; every forward pass has the same shape.

    A batch of another length gives slightly different vectors (5e-3 was measured between 1 and 32), so a short batch
    is padded and the padding dropped.

    Args:
        backbone, checkpoint: the model, and what its files say.
        batch_size: tiles per forward pass.
        pooling: names of the vectors to compute, of `POOLINGS`.
    """

    def __init__(self, backbone: Backbone, checkpoint: Checkpoint, batch_size: int, pooling: Sequence[str]) -> None:
        self.backbone = backbone
        self.pooling = tuple(pooling)
        self.transform = TileTransform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
        self.batch_size = batch_size

    @classmethod
    def for_version(cls, version: Version, backbone: Backbone, checkpoint: Checkpoint) -> Self:
        """Make the embedder that computes what this version of a cache stores, in batches of the size it recorded."""
        return cls(backbone, checkpoint, version.recorded.batch_size, version.layout.pooling)

    @torch.inference_mode()
    def embed(self, batch: TileBatch) -> dict[str, Tensor]:
        """Return (n, D) float16 for each pooling, on the backbone's device; NaN in rows that are not embedded.

        On CUDA this only queues the work; reading the result waits for it.
        """
        pixels = self.transform(batch.images, device=self.backbone.device, dtype=self.backbone.dtype)
        pooled = self.backbone(pad_batch(pixels, self.batch_size), self.pooling)
        vectors = {name: rows[: len(batch)].half() for name, rows in pooled.items()}
        blank = np.flatnonzero(batch.status != Status.EMBEDDED)
        if blank.size:
            for rows in vectors.values():
                rows[torch.from_numpy(blank).to(rows.device)] = float("nan")
        return vectors

    @torch.inference_mode()
    def fits(self) -> bool:
        """Return whether a batch fits in memory. One layer is run on zeros: peak memory is one layer's, since inference
        keeps nothing between layers."""
        size, backbone = self.transform.image_size, self.backbone
        try:
            backbone.run_prefix(torch.zeros(self.batch_size, 3, size, size, device=backbone.device), layers=1)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # what PyTorch's allocator for the CPU says
                raise
            return False
        return True


def pad_batch(pixels: Tensor, size: int) -> Tensor:
    """Append zeros to (b, …) until it has `size` rows: every forward pass has one shape, whatever the batch."""
    missing = size - len(pixels)
    return torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels

"""Batches of tiles to float16 vectors, the same way for extraction, training and prediction."""

import torch

from cache_schema import Status
from cache_schema.layout import Float16Array

from .backbone import Backbone, Checkpoint
from .batch import TileBatch
from .transform import TileTransform


class TileEmbedder:
    """Embeds batches through a forward pass of one shape.

    A batch of another length gives slightly different vectors (5e-3 was measured between 1 and 32), so a short batch
    is padded and the padding dropped.
    """

    def __init__(self, backbone: Backbone, checkpoint: Checkpoint, batch_size: int) -> None:
        self.backbone = backbone
        self.transform = TileTransform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
        self.batch_size = batch_size

    @torch.inference_mode()
    def embed(self, batch: TileBatch) -> dict[str, Float16Array]:
        """Per pooling (n, D) float16, NaN in rows that are not embedded."""
        pixels = self.transform(batch.images, device=self.backbone.device, dtype=self.backbone.dtype)
        missing = self.batch_size - len(batch)
        if missing:
            pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        vectors = {}
        for name, pooled in self.backbone(pixels).items():
            vectors[name] = pooled[: len(batch)].half().cpu().numpy()
            vectors[name][batch.status != Status.EMBEDDED] = float("nan")
        return vectors

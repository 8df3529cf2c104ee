"""Train as the original script did: a Dataset that fetches, decodes and resizes one tile at a time, a DataLoader, and
the backbone's forward pass in every epoch. This module does not use the project's code, and adds no slowdown.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel
from transformers.utils import logging

BATCH = 32
IMAGE_SIZE = 224
LABEL_IDS = 128
PASSES = 2
MEAN, STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


class TileDataset(Dataset[tuple[Tensor, Tensor]]):
    """Tiles `images/NAME.png` and their labels `labels/NAME.txt` below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, names: tuple[str, ...]) -> None:
        self._bucket_name = bucket
        self._prefix = prefix
        self._names = names
        self._bucket: Any = None
        self._mean = torch.tensor(MEAN).view(3, 1, 1)
        self._std = torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Pixels (3, 224, 224) float32, normalised; (128,) float32, 1 for each label id that occurs."""
        if self._bucket is None:  # one client per worker
            self._bucket = storage.Client(project="bench", credentials=AnonymousCredentials()).bucket(self._bucket_name)
        name = self._names[index]
        tile = self._bucket.blob(f"{self._prefix}/images/{name}.png").download_as_bytes()
        label = self._bucket.blob(f"{self._prefix}/labels/{name}.txt").download_as_bytes()
        image = Image.open(io.BytesIO(tile)).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        labels = torch.zeros(LABEL_IDS)
        labels[[int(line.split()[0]) for line in label.decode().splitlines()]] = 1
        return pixels.sub_(self._mean).div_(self._std), labels


def make_loader(
    bucket: str, prefix: str, names: tuple[str, ...], *, workers: int, batch: int = BATCH
) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(
        TileDataset(bucket, prefix, names), batch_size=batch, num_workers=workers, persistent_workers=True
    )


def run_feed(bucket: str, prefix: str, names: tuple[str, ...], workers: int) -> float:
    """Return tiles per second without a model, after a pass that starts the workers and their connections."""
    loader = make_loader(bucket, prefix, names, workers=workers)
    for _ in loader:
        pass
    started = time.perf_counter()
    tiles = sum(len(pixels) for _ in range(PASSES) for pixels, _ in loader)
    return tiles / (time.perf_counter() - started)


def run_epoch(
    checkpoint: Path,
    bucket: str,
    prefix: str,
    names: tuple[str, ...],
    *,
    workers: int,
    threads: int,
    batch: int,
    autocast: bool,
) -> float:
    """Return tiles per second of an epoch's forward passes in float32 or bfloat16 autocast.

    The clock starts at the first batch, because waiting for it is negligible in an epoch of hours.
    """
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    started = None
    tiles = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for pixels, _ in make_loader(bucket, prefix, names, workers=workers, batch=batch):
            started = started or time.perf_counter()
            tiles += len(model(pixel_values=pixels).pooler_output)
    assert started is not None
    return tiles / (time.perf_counter() - started)


def make_step(checkpoint: Path, unfreeze: int, *, classes: int, autocast: bool) -> Callable[[Tensor, Tensor], None]:
    """Make a training step of the last layers and a head, in float32, with `requires_grad` off for the first layers."""
    logging.disable_progress_bar()
    vit = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).train()
    vit.requires_grad_(False)
    for module in (*vit.model.layer[-unfreeze:], vit.norm):
        module.requires_grad_(True)
    head = nn.Sequential(
        nn.Linear(vit.config.hidden_size, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, classes)
    ).train()
    trained = [tensor for tensor in (*vit.parameters(), *head.parameters()) if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(pixels: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = head(vit(pixel_values=pixels).pooler_output)
        entropy = binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        weight = torch.where(labels, 0.65, 0.35)
        (weight * (1 - (-entropy).exp()) ** 2 * entropy).mean().backward()
        optimizer.step()

    return step

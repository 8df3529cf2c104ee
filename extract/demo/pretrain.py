"""Train the demo's backbone, a small DINOv3 ViT, to classify abstract shapes in synthetic scenes.

    python -m extract.demo.pretrain --out extract/demo/backbone

It replaces a real DINOv3 when none can be downloaded. Its features transfer to the demo's classes, which it has never
seen, because those are also small shapes on textured ground. It is useless on real images.
"""

import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from extract.backbone.precision import multiplies_bf16
from extract.backbone.transform import TileTransform

from .abstract import PRETRAIN
from .scenes import TILE_SIZE, Box, cut_tiles, draw_scene

IMAGE_SIZE = 128
_PATCH = 16
_PATCH_SHARE = 0.25
_PATCH_LOSS_WEIGHT = 10.0
_PATCH_POSITIVE_WEIGHT = 8.0
_HOLDOUT_SHARE = 0.04
_WHITENING_FLOOR = 1e-2
_BATCH_SIZE = 32
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP_STEPS = 1e-3, 0.05, 100
_WIDTH, _LAYERS, _HEADS = 128, 6, 4


class ShapeNamer(nn.Module):
    """A ViT with three linear heads: two classify the tile, one each patch.

    CLS and the patch mean have separate heads, since either may be cached. The patch head shows the ViT where to look;
    without it, so few tiles teach a transformer nothing about objects this small.
    """

    def __init__(self, vit: Any, classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.first_patch = 1 + vit.config.num_register_tokens
        width = vit.config.hidden_size
        self.cls_head, self.mean_head, self.patch_head = (nn.Linear(width, classes) for _ in range(3))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, 3, S, S) to logits (B, classes) of CLS and of the mean, and (B, patches, classes) of patches."""
        tokens = self.vit(pixel_values).last_hidden_state
        patches = tokens[:, self.first_patch :]
        return self.cls_head(tokens[:, 0]), self.mean_head(patches.mean(dim=1)), self.patch_head(patches)


def draw_tiles(scenes: int) -> tuple[Tensor, Tensor]:
    """Draw the tiles of the first `scenes` pre-training scenes.

    Returns:
        (N, S, S, 3) uint8 at the backbone's size; (N, C, S/16, S/16) bool, the classes in each patch.
    """
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        drawn = list(pool.map(_draw_resized, range(scenes), chunksize=4))
    pixels, labels = zip(*drawn, strict=True)
    return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))


def _draw_resized(number: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    torch.set_num_threads(1)
    tiles = [tile for _, _, tile in cut_tiles(draw_scene(PRETRAIN, number))]
    resize = TileTransform(IMAGE_SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = torch.from_numpy(np.stack([tile.pixels for tile in tiles]))
    resized = resize(pixels, device=torch.device("cpu"), dtype=torch.float32).permute(0, 2, 3, 1)
    return (resized * 255).round().to(torch.uint8).numpy(), np.stack([_label_patches(tile.boxes) for tile in tiles])


def _label_patches(boxes: tuple[Box, ...]) -> npt.NDArray[np.bool_]:
    """Return (C, side, side) bool: the patches that hold a good part of an object, at least one for each object."""
    side = IMAGE_SIZE // _PATCH
    labels = np.zeros((len(PRETRAIN.classes), side, side), bool)
    edges = np.arange(side + 1) * (TILE_SIZE / side)
    for box in boxes:
        across, down = (
            np.clip(np.minimum(end, edges[1:]) - np.maximum(start, edges[:-1]), 0, None) / (end - start)
            for start, end in ((box.x0, box.x1), (box.y0, box.y1))
        )
        share = np.outer(down, across)
        labels[box.label_id] |= share >= min(_PATCH_SHARE, share.max())
    return labels


def pretrain(pixels: Tensor, labels: Tensor, epochs: int) -> tuple[ShapeNamer, TileTransform]:
    """Train on all but the last few tiles, and print the precision on those.

    Args:
        pixels: (N, S, S, 3) uint8.
        labels: (N, C, side, side) bool, the classes in each patch.
        epochs: passes over the tiles; one over 7,680 takes about a minute on two cores.

    Returns:
        The trained model and its input transform.
    """
    torch.manual_seed(0)
    transform = TileTransform(pixels.shape[1], *measure_colours(pixels))
    model = ShapeNamer(build_vit(), labels.shape[1])
    initialise(model.vit, _prepare(transform, pixels[:1500]))
    held = round(len(pixels) * _HOLDOUT_SHARE)
    train, train_labels = pixels[:-held], labels[:-held]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, betas=(0.9, 0.98))
    steps = len(train) // _BATCH_SIZE

    def rate(step: int) -> float:
        return min((step + 1) / _WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / (steps * epochs))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    amp = multiplies_bf16(torch.device("cpu"))
    for epoch in range(epochs):
        start, total = time.monotonic(), 0.0
        model.train()
        for batch in torch.split(torch.randperm(len(train))[: steps * _BATCH_SIZE], _BATCH_SIZE):
            tiles, truth = augment(_prepare(transform, train[batch]), train_labels[batch].float())
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                logits = model(tiles)
            of_cls, of_mean, of_patches = (part.float() for part in logits)
            loss = sum_losses(of_cls, of_mean, of_patches, truth)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        precision = evaluate(model, transform, pixels[-held:], labels[-held:])
        seconds = time.monotonic() - start
        click.echo(f"epoch {epoch + 1}: loss {total / steps:.4f}, mAP held out {precision:.3f}, {seconds:.0f} s")
    return model, transform


@torch.no_grad()
def initialise(vit: Any, pixel_values: Tensor) -> None:
    """Initialise weights such that a short training makes progress from the start.

    Linear layers get the variance for their width (the library's 0.02 suits much wider ones). The patch embedding
    starts as the whitened principal components of patches: otherwise the brightness of the ground hides small objects.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.7 / module.in_features**0.5)
    patches = pixel_values.unfold(2, _PATCH, _PATCH).unfold(3, _PATCH, _PATCH).permute(0, 2, 3, 1, 4, 5)
    flat = patches.reshape(-1, 3 * _PATCH * _PATCH)
    embedding = vit.embeddings.patch_embeddings
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    width = len(embedding.bias)
    whitened = vectors[:, -width:] / (values[-width:] + _WHITENING_FLOOR).sqrt()
    rotated = torch.linalg.qr(torch.randn(width, width)).Q @ whitened.T
    embedding.weight.copy_(rotated.view_as(embedding.weight))
    embedding.bias.copy_(-rotated @ flat.mean(dim=0))


def sum_losses(of_cls: Tensor, of_mean: Tensor, of_patches: Tensor, labels: Tensor) -> Tensor:
    """Add the cross entropy of both tile heads and of patches, where the few positives weigh more.

    Args:
        of_cls, of_mean: (B, C) logits.
        of_patches: (B, side * side, C) logits.
        labels: (B, C, side, side) float32.
    """
    truth = labels.amax((2, 3))
    tiles = binary_cross_entropy_with_logits(of_cls, truth) + binary_cross_entropy_with_logits(of_mean, truth)
    weight = torch.tensor(_PATCH_POSITIVE_WEIGHT)
    patches = binary_cross_entropy_with_logits(of_patches, labels.flatten(2).transpose(1, 2), pos_weight=weight)
    return tiles + _PATCH_LOSS_WEIGHT * patches


def build_vit() -> Any:
    """Make a DINOv3 ViT with random weights."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    architecture = DINOv3ViTConfig(
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_register_tokens=4,
        patch_size=_PATCH,
        image_size=IMAGE_SIZE,
        pos_embed_rescale=None,  # all tiles have one scale, so no robustness to scale is needed
    )
    return DINOv3ViTModel(architecture)


def measure_colours(pixels: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation per channel on 0..1, to three decimals as in preprocessor files."""
    values = pixels[::8].float().flatten(0, 2) / 255
    mean, std = (
        tuple(round(value, 3) for value in statistic.tolist()) for statistic in (values.mean(0), values.std(0))
    )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def augment(tiles: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate tiles by random quarter turns and mirror them at random, with their labels: overhead views have no up."""
    turns = torch.randint(8, (len(tiles),))
    turned, turned_labels = tiles.clone(), labels.clone()
    for turn in range(1, 8):
        chosen = turns == turn
        for source, target in ((tiles, turned), (labels, turned_labels)):
            mirrored = source[chosen].flip(3) if turn >= 4 else source[chosen]
            target[chosen] = mirrored.rot90(turn % 4, (2, 3))
    return turned, turned_labels


@torch.no_grad()
def evaluate(model: ShapeNamer, transform: TileTransform, pixels: Tensor, labels: Tensor) -> float:
    """Return the mean average precision over the classes, from CLS alone, in float32."""
    from sklearn.metrics import average_precision_score

    model.eval()
    logits = torch.cat([model(_prepare(transform, tiles))[0] for tiles in torch.split(pixels, 64)])
    return float(average_precision_score(labels.any(dim=3).any(dim=2).numpy(), logits.numpy(), average="macro"))


def _prepare(transform: TileTransform, pixels: Tensor) -> Tensor:
    return transform(pixels, device=torch.device("cpu"), dtype=torch.float32)


def save_backbone(model: ShapeNamer, transform: TileTransform, directory: Path) -> None:
    """Write the ViT without its heads as float16 safetensors, together with the preprocessor's settings."""
    model.vit.half().save_pretrained(directory, safe_serialization=True)
    processor = {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "do_resize": True,
        "size": {"height": transform.image_size, "width": transform.image_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the checkpoint goes."
)
@click.option("--scenes", default=480, show_default=True, help="Scenes of 16 tiles to train on.")
@click.option("--epochs", default=18, show_default=True)
def main(out: Path, scenes: int, epochs: int) -> None:
    """Train the demo's backbone on synthetic scenes and write it as a checkpoint."""
    start = time.monotonic()
    pixels, labels = draw_tiles(scenes)
    click.echo(f"drew {len(pixels):,} tiles in {time.monotonic() - start:.0f} s")
    save_backbone(*pretrain(pixels, labels, epochs), out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()

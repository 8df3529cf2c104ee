"""Draw a picture of some tiles with their classes and a model's decisions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from cache_schema.layout import BoolArray
from train.data.labels import LabelledRows

from .facts import join_names


def draw_tiles(path: Path, images: Sequence[npt.NDArray[np.uint8]], rows: LabelledRows, preds: BoolArray) -> None:
    """Draw n tiles, each with its classes and the model's decisions, and save the picture.

    Args:
        path: PNG to write.
        images: n (H, W, 3) uint8.
        rows: their names and labels.
        preds: (n, C) bool decisions.
    """
    columns = 4
    height = -(-len(images) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4 * columns, 4.6 * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, tile, labels, decided in zip(axes.flat, images, rows.tiles, rows.labels, preds, strict=False):
        axis.imshow(image)
        right = bool((labels == decided).all())
        truth, said = (join_names(rows.class_names, side) for side in (labels, decided))
        lines = [str(tile), f"truth: {truth}", f"says: {said}"]
        text = "\n".join(textwrap.fill(line, 44) for line in lines)
        axis.set_title(text, fontsize=9, loc="left", color="#14532d" if right else "#7f1d1d", parse_math=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)

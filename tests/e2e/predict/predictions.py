"""`train predict` in this process, what it wrote, and the same by an independent computation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.transform import Affine
from safetensors.numpy import load_file
from transformers import AutoModel

from tests.checkpoints import MEAN, STD
from tests.planted import Finished
from tests.planted import train as run_train

SIZE = 64
PROBS = 1e-4
SAME = 1e-5
DEGREES = 1e-9
ON_CPU = ("--device", "cpu", "--workers", 0)
GRID = ("--window", 64, "--stride", 48)
SCENE = (200, 150)
"""Height and width: 4 x 3 windows of that grid, the last ones moved inward."""
TOPS, LEFTS = (0, 48, 96, 136), (0, 48, 86)
UTM33 = Affine(0.3, 0, 500_123.4, 0, -0.3, 5_000_000)


def write_image(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def write_raster(path: Path, pixels: np.ndarray, **georeferencing: Any) -> Path:
    height, width, bands = pixels.shape
    shape = {"height": height, "width": width, "count": bands, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", photometric="RGB", **shape, **georeferencing) as raster:
        raster.write(np.moveaxis(pixels, -1, 0))
    return path


def predict(root: Path, *arguments: object, run: str = "runs/head", out: str = "p.csv") -> Finished:
    options = ("--workers", 0) if "--workers" not in arguments else ()
    done = run_train(root, "predict", "--run-dir", run, "--out", out, "--device", "cpu", *options, *arguments)
    assert done.status == 0, done.err
    return done


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_probs(root: Path, name: str = "p.csv") -> np.ndarray:
    rows = read_csv(root / name)
    names = list(rows[0])[-60:]
    return np.array([[float(row[name] or "nan") for name in names] for row in rows])


def read_meta(root: Path, run: str = "head") -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((root / "runs" / run / "best" / "checkpoint.json").read_text())
    return meta


@torch.inference_mode()
def compute_probs(root: Path, images: list[np.ndarray]) -> np.ndarray:
    """(n, 60) by transformers, PyTorch's resizing and NumPy, from the checkpoint's and the run's files alone."""
    tensors = []
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        pixels = torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        tensors.append((pixels - mean) / std)
    found = AutoModel.from_pretrained(root / "checkpoint").eval()(torch.cat(tensors))
    inputs = torch.cat([found.pooler_output, found.last_hidden_state[:, 5:].mean(dim=1)], dim=1).numpy().astype(float)
    t = load_file(root / "runs" / "head" / "best" / "model.safetensors")
    hidden = np.maximum(inputs @ t["head.0.weight"].T + t["head.0.bias"], 0)
    logits = hidden @ t["head.3.weight"].T + t["head.3.bias"]
    return 1 / (1 + np.exp(-logits / read_meta(root)["temperature"]))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]

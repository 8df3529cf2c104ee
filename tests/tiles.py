"""Random tiles of every kind, buckets and directories of them, and the extraction as its users start it."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.cloud import storage
from PIL import Image

from cache_schema import open_cache

MODES = ("RGB", "RGBA", "L", "I;16", "P")
Objects = dict[str, bytes]


def draw_pixels(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Smooth shapes and noise: vectors of pure noise are all alike, and would agree whatever is done to the tiles."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.zeros((height, width, channels))
    for _ in range(4):
        angle, phase = rng.uniform(0, 6.3, (2, channels))
        waves += np.sin(rng.uniform(2, 25) * (x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)) + phase)
    pixels = 128 + 40 * waves + rng.uniform(-80, 80, channels) + rng.normal(0, 15, waves.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def draw_tile(rng: np.random.Generator, height: int, width: int | None = None, mode: str = "RGB") -> bytes:
    """A random PNG of one of `MODES`."""
    width = width or height
    if mode == "RGB":
        return encode(Image.fromarray(draw_pixels(rng, height, width)))
    if mode == "RGBA":
        return encode(Image.fromarray(draw_pixels(rng, height, width, 4)))
    grey = draw_pixels(rng, height, width, 1)[:, :, 0]
    if mode == "L":
        return encode(Image.fromarray(grey))
    if mode == "I;16":
        return encode(Image.fromarray(grey.astype(np.uint16) * 256 + rng.integers(0, 256, grey.shape, np.uint16)))
    image = Image.fromarray(grey, "L").convert("P")
    image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    return encode(image)


def encode_png(header: tuple[int, int, int, int], rows: bytes) -> bytes:
    """A PNG by the specification (width, height, bit depth, colour type), for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def draw_objects(rng: np.random.Generator, tiles: int, *, size: int = 48, tiles_a_scene: int = 10) -> Objects:
    """`images/SCENE_N.png` of several modes and their labels."""
    objects = {}
    for i in range(tiles):
        name = f"{100 + i // tiles_a_scene}_{i % tiles_a_scene}"
        objects[f"images/{name}.png"] = draw_tile(rng, size, mode=MODES[i % len(MODES)])
        ids = rng.integers(11, 95, rng.integers(0, 4))
        objects[f"labels/{name}.txt"] = "".join(f"{i} 0.5 0.5 0.1 0.1\n" for i in ids).encode()
    return objects


def write_directory(root: Path, objects: Mapping[str, bytes]) -> Path:
    for name, data in objects.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def upload(bucket: storage.Bucket, objects: Mapping[str, bytes], prefix: str = "") -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda item: bucket.blob(prefix + item[0]).upload_from_string(item[1]), objects.items()))


def extract_command(*arguments: str | Path, nproc: int | None = None, module: str = "extract") -> list[str]:
    """`python -m extract run …`, under torchrun when the number of ranks is given; `module` may stand for it."""
    launcher = ["-m", "extract.launch", "--standalone", f"--nproc-per-node={nproc}"] if nproc else []
    return [sys.executable, *launcher, "-m", module, "run", "--device", "cpu", *map(str, arguments)]


def run_extract(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path, nproc: int | None = None, module: str = "extract"
) -> subprocess.CompletedProcess[str]:
    command = extract_command(*arguments, nproc=nproc, module=module)
    return subprocess.run(command, env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def read_arrays(cache: str | Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of the version in use, by name."""
    version = open_cache(str(cache))
    return {name: np.asarray(array[:]) for name, array in version.group.arrays()}  # type: ignore[index]


def relative_differences(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Per row, the norm of the difference over the row's norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1))


def cosines(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Per row, float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def list_tree(root: Path, exclude: Sequence[str] = ()) -> list[str]:
    """Everything below a directory."""
    return sorted(
        os.path.join(folder, name).removeprefix(f"{root}/")
        for folder, folders, files in os.walk(root)
        for name in (*folders, *files)
        if name not in exclude
    )

"""Create shared test data (tiles, a bucket, checkpoints) on first use, in a directory deleted after the run."""

import os
import re
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import click
import numpy as np
from PIL import Image

from extract.demo.classes import DEMO
from extract.demo.scenes import Box, cut_tiles, draw_scene
from extract.demo.server import serve_bucket
from tests.checkpoints import make_checkpoint
from tests.tiles import extract_command

from .processes import PeakMemory, run_apart, watch_memory

T = TypeVar("T")

PROJECT_ROOT = Path(__file__).parents[2]
BUCKET = "tileprobe-bench"
WORKERS = 1
"""Feed processes next to a model, the same on both sides of a comparison: on two cores, computing leaves one."""
VITL16 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_register_tokens": 4,
    "patch_size": 16,
    "image_size": 224,
}
"""Configuration of facebook/dinov3-vitl16-pretrain-sat493m, for random weights."""
TILES = 128
"""Number of 512 px tiles in the bucket."""
SMALL_TILES = 20_000

_TILE_SIZE, _SMALL_SIZE = 512, 48
_TILES_A_SCENE = 4
_PNG_LEVEL = 6  # zlib's default, which most tools use
_SUMMARY = re.compile(r"([\d,]+) tiles in ([\d.]+) s\b.*\bwrite ([\d.]+) %")


class ExtractRun(NamedTuple):
    """Summary of `extract run`: tiles per second between its first request and its last block, and the share of that
    time in which computing waited for a write."""

    tiles_per_s: float
    write_share: float


@dataclass(frozen=True)
class Bucket:
    """Tiles served by the storage server, and the same files on disk."""

    directory: Path
    names: tuple[str, ...]
    """Sorted names without folder and suffix."""

    def prefix(self, tiles: int) -> str:
        """Return the prefix in the bucket of the first `tiles` tiles."""
        return f"first-{tiles}"

    def paths(self, tiles: int) -> list[Path]:
        """Return the files of the first `tiles` tiles."""
        return [self.directory / "images" / f"{name}.png" for name in self.names[:tiles]]


class Fixtures:
    """Working directory with test data. Leaving the context stops the server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open = ExitStack()
        self._caches = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @cached_property
    def vitl16(self) -> Path:
        """Checkpoint with vitl16's architecture, float32, 1.2 GB."""
        click.echo("preparing a vitl16 checkpoint with random weights", err=True)
        return run_apart(make_checkpoint, self.directory / "vitl16", **VITL16)

    @cached_property
    def tiny(self) -> Path:
        """Checkpoint whose forward pass takes almost no time."""
        return run_apart(make_checkpoint, self.directory / "tiny", image_size=32)

    @cached_property
    def tiles(self) -> Bucket:
        """`TILES` tiles of 512 px, about 340 kB each, and their labels, on disk."""
        click.echo(f"preparing {TILES} tiles of {_TILE_SIZE} px", err=True)
        directory = _make_folders(self.directory / "tiles")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            names = pool.map(partial(_write_scene, directory), range(TILES // _TILES_A_SCENE))
            return Bucket(directory, tuple(sorted(name for scene in names for name in scene)))

    def serve(self, *amounts: int) -> Bucket:
        """Serve the first tiles until the run ends, with a separate prefix for each number of tiles.

        Processes started later find the server through `STORAGE_EMULATOR_HOST`.
        """
        root = self.directory / f"bucket-{'-'.join(map(str, amounts))}"
        for amount in set(amounts):
            _link_first(self.tiles.directory, root / self.tiles.prefix(amount), self.tiles.names[:amount])
        os.environ["STORAGE_EMULATOR_HOST"] = self._open.enter_context(
            serve_bucket(root, log=self.directory / "server.log", bucket=BUCKET)
        )
        return self.tiles

    @cached_property
    def small_tiles(self) -> Path:
        """`SMALL_TILES` tiles of 48 px and their labels, in a local directory."""
        click.echo(f"preparing {SMALL_TILES:,} small tiles", err=True)
        return make_small_tiles(self.directory / "small", SMALL_TILES)

    def first_small_tiles(self, tiles: int) -> Path:
        """Return a directory with the first `tiles` of them."""
        names = sorted(path.stem for path in (self.small_tiles / "images").iterdir())[:tiles]
        return _link_first(self.small_tiles, self.directory / f"small-{tiles}", names)

    def extract(self, tiles: str | Path, backbone: str | Path, *options: str | int, nproc: int = 1) -> ExtractRun:
        """Run the user's command under torchrun, into a new cache."""
        run, _ = self._extract(tiles, backbone, *options, nproc=nproc, wait=subprocess.Popen.wait)
        return run

    def extract_watched(self, tiles: str | Path, backbone: str | Path) -> tuple[ExtractRun, PeakMemory]:
        """Run the same command and watch its memory; without torchrun, which would be an extra process."""
        return self._extract(tiles, backbone, nproc=None, wait=watch_memory)

    def _extract(
        self,
        tiles: str | Path,
        backbone: str | Path,
        *options: str | int,
        nproc: int | None,
        wait: Callable[[subprocess.Popen[str]], T],
    ) -> tuple[ExtractRun, T]:
        self._caches += 1
        where = ("--tiles", tiles, "--backbone", backbone, "--cache", f"cache-{self._caches}")
        command = extract_command(*where, "--workers", str(WORKERS), *map(str, options), nproc=nproc)
        log = self.directory / "extract.log"
        with log.open("w") as output:
            # Run in the working directory, so that `cache/last` of the user stays unchanged.
            environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
            process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
            )
            waited = wait(process)
        text = log.read_text()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {text[-2000:]}")
        return read_run(text), waited


def read_run(output: str) -> ExtractRun:
    """Parse the summary line `128 tiles in 12.3 s: …; waiting: fetch 1.2 %, …, write 0.0 %`.

    Raises:
        ValueError: the line is missing.
    """
    summary = _SUMMARY.search(output)
    if not summary:
        raise ValueError(f"no speed in: {output}")
    tiles, seconds, write = summary.groups()
    return ExtractRun(int(tiles.replace(",", "")) / float(seconds), float(write) / 100)


def make_small_tiles(directory: Path, tiles: int) -> Path:
    """Write random 48 px tiles and their labels into a new directory."""
    _make_folders(directory)
    rng = np.random.default_rng(0)
    for number in range(tiles):
        name = f"{number // 100:04d}_{number // 10 % 10}_{number % 10}"
        pixels = rng.integers(0, 256, (_SMALL_SIZE, _SMALL_SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(directory / "images" / f"{name}.png", compress_level=1)
        (directory / "labels" / f"{name}.txt").write_text(f"{11 + number % 80} 0.5 0.5 0.1 0.1\n")
    return directory


def _make_folders(root: Path) -> Path:
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    return root


def _link_first(source: Path, target: Path, names: Iterable[str]) -> Path:
    _make_folders(target)
    for name in names:
        for file in (f"images/{name}.png", f"labels/{name}.txt"):
            (target / file).hardlink_to(source / file)
    return target


def _write_scene(directory: Path, number: int) -> list[str]:
    """Write the four tiles of a scene and their labels; return their names."""
    names = []
    for row, column, tile in cut_tiles(draw_scene(DEMO, number), _TILE_SIZE):
        names.append(f"{number:04d}_{row}_{column}")
        image = Image.fromarray(tile.pixels)
        image.save(directory / "images" / f"{names[-1]}.png", compress_level=_PNG_LEVEL)
        (directory / "labels" / f"{names[-1]}.txt").write_text("".join(map(_format_label, tile.boxes)))
    return names


def _format_label(box: Box) -> str:
    """Format a YOLO line; centre and size are fractions of the tile's side."""
    centre_x, centre_y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    shares = (value / _TILE_SIZE for value in (centre_x, centre_y, box.x1 - box.x0, box.y1 - box.y0))
    return f"{box.label_id} {' '.join(f'{share:.6f}' for share in shares)}\n"

"""Small tile sets with a planted signal, a coloured square for each class on noise; their caches; the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extract.config import ExtractConfig
from extract.run import run_extraction
from tests.seeds import fresh_seed as fresh_seed
from train.__main__ import run as run_command_line

CLASSES: Mapping[str, tuple[int, int, tuple[int, int, int]]] = {
    "Building": (48, 73, (220, 30, 30)),
    "Small Car": (5, 18, (30, 220, 30)),
    "Bus": (6, 19, (40, 40, 230)),
    "Storage Tank": (55, 86, (230, 220, 40)),
    "Helicopter": (3, 15, (220, 60, 220)),
}
"""Name -> class id, type id, colour. 73 and 86 can only be type ids, 5, 6 and 48 only class ids."""

SHARES = (0.55, 0.4, 0.25, 0.25, 0.12)
TILE = 64


def plant_tiles(
    root: Path,
    *,
    scenes: int = 12,
    per_scene: int = 9,
    seed: int,
    prefix: str = "s",
    ids: str = "type",
    size: int = TILE,
    empty: int = 0,
    bare: bool = False,
) -> Path:
    """Write `scenes * per_scene` PNG tiles and YOLO labels below `root`; the first `empty` tiles show nothing.

    Every class occurs in the second tile of every scene, so that no split leaves one without positives; with `bare`
    the third shows nothing, so that none is without an empty tile.
    """
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for number in range(scenes * per_scene):
        scene, tile = divmod(number, per_scene)
        pixels = rng.integers(70, 140, (size, size, 3), dtype=np.uint8)
        lines = []
        for (class_id, type_id, colour), share in zip(CLASSES.values(), SHARES, strict=True):
            shown = number >= empty and not (bare and tile == 2)
            present = (tile == 1 or rng.random() < share) and shown
            for _ in range(int(rng.integers(1, 3)) if present else 0):
                side = int(rng.integers(size // 6, size // 3))
                x, y = (int(v) for v in rng.integers(0, size - side, 2))
                pixels[y : y + side, x : x + side] = colour
                box = ((x + side / 2) / size, (y + side / 2) / size, side / size, side / size)
                lines.append(" ".join([str(type_id if ids == "type" else class_id), *(f"{v:.6f}" for v in box)]))
        name = f"{prefix}{scene:02d}_{tile}"
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        (root / "labels" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def extract_cache(tiles: Path | str, cache: Path | str, backbone: Path, **options: Any) -> str:
    """Embed `tiles` into `cache` by the real extraction, in this process, in float32; working directory elsewhere."""
    settings: dict[str, Any] = {"precision": "float32", "batch_size": 16, "workers": 0, "device": "cpu", **options}
    scratch = Path(cache).parent if "://" not in str(cache) else backbone.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scratch)
        run_extraction(ExtractConfig(tiles=str(tiles), backbone=str(backbone), cache=str(cache), **settings))
    return str(cache)


@dataclass(frozen=True)
class Finished:
    """What a command left: its status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def train(cwd: Path, *arguments: object) -> Finished:
    """`python -m train ARGUMENTS` in this process, which saves the seconds torch needs to start."""
    return run_here(run_command_line, cwd, *arguments)


def run_here(command_line: Callable[[], None], cwd: Path, *arguments: object) -> Finished:
    """A command line of the project with `arguments`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["tileprobe", *map(str, arguments)])
        try:
            command_line()
        except SystemExit as exit_:
            status = exit_.code
    if isinstance(status, str):  # what the interpreter does with it
        err.write(f"{status}\n")
        status = 1
    return Finished(status or 0, out.getvalue(), err.getvalue())

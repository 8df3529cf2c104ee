"""`extract tile` in this process, and a plain second implementation of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from extract.__main__ import run as extract_command_line
from extract.tiles.labels import parse_labels
from tests.planted import Finished, run_here
from tests.raw_xview import (
    RawXView,
)
from tests.tiles import list_tree

Labels = list[tuple[int, float, float, float, float]]
LEFT_BESIDE = ["tiling/lock", "tiling/unfinished"]


def tile(cwd: Path, *arguments: object) -> Finished:
    return run_here(extract_command_line, cwd, "tile", *arguments)


def options(raw: RawXView, out: object, *more: object) -> tuple[object, ...]:
    return ("--images", raw.images, "--labels", raw.labels, "--out", out, *more)


def walk(length: int, size: int, stride: int) -> list[int]:
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + stride, length - size))
    return starts


def read_boxes(labels: Path) -> dict[str, list[tuple[int, int, int, int, int]]]:
    """Boxes by file name, with whole numbers as coordinates; what is not in order is left out."""
    boxes: dict[str, list[tuple[int, int, int, int, int]]] = {}
    for feature in json.loads(labels.read_text())["features"]:
        try:
            properties = feature["properties"]
            found = boxes.setdefault(properties["image_id"].replace(".tif", ""), [])
            left, top, right, bottom = (int(part) for part in properties["bounds_imcoords"].split(","))
            label_id = properties["type_id"]
            if type(label_id) is not int or label_id < 0 or label_id in (75, 82) or left >= right or top >= bottom:
                continue
            box = (label_id, left, top, right, bottom)
            found += [box] if box not in found else []
        except (TypeError, AttributeError, ValueError, KeyError):
            continue
    return boxes


def cut_plainly(
    images: Path, labels: Path, size: int, stride: int, least: float
) -> dict[str, tuple[npt.NDArray[np.uint8], Labels | None]]:
    """Pixels and label lines of every tile, by its name."""
    boxes = read_boxes(labels)
    tiles = {}
    for path in images.glob("[!.]*.tif"):
        with Image.open(path) as image:
            scene = np.asarray(image.convert("RGB"))
        height, width = scene.shape[:2]
        for row, top in enumerate(walk(height, size, stride)):
            for column, left in enumerate(walk(width, size, stride)):
                pixels = scene[top : top + size, left : left + size]
                lines: Labels | None = None if path.stem not in boxes else []
                for label_id, x0, y0, x1, y1 in boxes.get(path.stem, ()):
                    mask = np.zeros((height, width), bool)
                    mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
                    part = mask[top : top + size, left : left + size]
                    most = min(x1 - x0, part.shape[1]) * min(y1 - y0, part.shape[0])
                    if part.any() and part.sum() / most >= least:
                        ys, xs = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
                        w, h = (xs[-1] + 1 - xs[0]) / part.shape[1], (ys[-1] + 1 - ys[0]) / part.shape[0]
                        lines.append((label_id, xs[0] / part.shape[1] + w / 2, ys[0] / part.shape[0] + h / 2, w, h))
                tiles[f"{path.stem}_{row}_{column}"] = (pixels, lines)
    return tiles


def read_labels(data: bytes) -> Labels:
    assert not parse_labels(data).malformed
    fields = [line.split() for line in data.decode("ascii").splitlines()]
    return [(int(label_id), *map(float, numbers)) for label_id, *numbers in fields]  # type: ignore[misc]


def assert_agrees(out: Path, wanted: dict[str, tuple[npt.NDArray[np.uint8], Labels | None]]) -> None:
    """Names and pixels exactly; label lines in order, to the 6th decimal that is written."""
    assert {path.stem for path in (out / "images").iterdir()} == set(wanted)
    assert {path.stem for path in (out / "labels").iterdir()} == {
        name for name, (_, lines) in wanted.items() if lines is not None
    }
    for name, (pixels, lines) in wanted.items():
        with Image.open(out / "images" / f"{name}.png") as image:
            assert (image.mode, image.format) == ("RGB", "PNG")
            assert np.array_equal(np.asarray(image), pixels), name
        if lines is not None:
            found = read_labels((out / "labels" / f"{name}.txt").read_bytes())
            assert len(found) == len(lines), name
            assert np.allclose(found, lines, rtol=0, atol=1e-6) if lines else found == [], name


def digest_tree(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in list_tree(root) if (root / name).is_file()}

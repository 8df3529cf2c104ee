"""One scene into tiles: its boxes clipped to windows, its pixels to PNG, and the order in which both are written.

Images come first, labels once all images are there, the scene's mark last. A tile with a label is a row to an
extraction, so a scene that was interrupted has no labels, or is without its mark for the short time that labels take.
Marks lie outside images/ and labels/:

    tiling/settings.json          what all scenes of this place were cut with
    tiling/done/SCENE.DIGEST      the scene is whole; the digest is of settings, the scene's file and its boxes
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from imagecodecs import png_encode

from cache_schema.storage.objects import Objects
from extract.errors import RasterError
from extract.tiles.decode import RGBImage
from extract.tiles.raster import Raster, Window, count_windows, windows

from .annotations import Boxes
from .config import Cutting
from .output import open_place

T = TypeVar("T")

DONE = "tiling/done"
_WRITES_IN_FLIGHT = 16
"""Tiles encoded and on their way at a time: a bucket answers in the time that encoding two of them takes."""
_PNG_LEVEL = 3
"""Of zlib, by imagecodecs: Pillow's size at level 6 in a fifth of its time (346 KB and 26 ms for a tile of 512)."""


@dataclass(frozen=True)
class SceneJob:
    """A scene to be cut.

    Attributes:
        name: of the scene.
        path: its raster.
        stat: size in bytes and modification time in ns of that file.
        boxes: (n, 5), see `Boxes`.
        labelled: whether label files are written; a scene that no feature names was never looked at, and a tile without
            objects is something else.
        cutting: how.
        out: where to.
        old: objects of an earlier cut of it, to be removed beforehand.
    """

    name: str
    path: Path
    stat: tuple[int, int]
    boxes: Boxes
    labelled: bool
    cutting: Cutting
    out: str
    old: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """Name of the object that says it is done: just so, from just these boxes, out of just this file."""
        facts = [1, asdict(self.cutting), self.name, self.stat, self.labelled]
        digest = hashlib.sha256(json.dumps(facts).encode() + self.boxes.tobytes())
        return f"{DONE}/{self.name}.{digest.hexdigest()[:20]}"


@dataclass
class SceneCount:
    """What a scene gives.

    Attributes:
        tiles: windows.
        small: tiles of less than the full size, of a scene smaller than that.
        empty: labelled tiles without a line.
        lines: label lines.
        cut_off: boxes left out of a tile that shows too little of them.
        outside: boxes with no part in the scene.
        over_edge: boxes with a part outside the scene, which was cut away.
        unseen: boxes in the scene of which no tile shows enough.
        raw_ids: lines by type id.
    """

    tiles: int = 0
    small: int = 0
    empty: int = 0
    lines: int = 0
    cut_off: int = 0
    outside: int = 0
    over_edge: int = 0
    unseen: int = 0
    raw_ids: dict[int, int] = field(default_factory=dict)


def list_windows(height: int, width: int, cutting: Cutting) -> Iterator[Window]:
    """The windows of a scene of that extent, see `windows`."""
    return windows(height, width, cutting.size, cutting.stride)


def name_tile(scene: str, window: Window) -> str:
    """`1052_0_3`: scene, row, column."""
    return f"{scene}_{window.row}_{window.column}"


def clip_boxes(boxes: Boxes, window: Window, min_visibility: float) -> tuple[Boxes, npt.NDArray[np.intp], int]:
    """The parts of boxes that a window shows.

    Args:
        boxes: (n, 5) in pixels of the scene.
        window: the tile.
        min_visibility: see `Cutting`.

    Returns:
        (k, 5) type id and left, top, right, bottom as shares of the window; (k,) their rows in `boxes`; and how many
        more the window shows too little of.
    """
    extent = np.array([window.width, window.height] * 2)
    corners = boxes[:, 1:] - [window.left, window.top] * 2
    clipped = np.clip(corners, 0, extent)
    shown = np.prod(np.maximum(clipped[:, 2:] - clipped[:, :2], 0), axis=1)
    most = np.prod(np.minimum(corners[:, 2:] - corners[:, :2], extent[:2]), axis=1)
    kept = (shown > 0) & (shown / most >= min_visibility)
    rows = np.flatnonzero(kept)
    shares = np.column_stack([boxes[rows, 0], clipped[rows] / extent])
    return shares, rows, int((shown > 0).sum()) - len(rows)


def format_labels(shares: Boxes) -> bytes:
    """YOLO lines, `id cx cy w h` as shares of the tile, from (k, 5) type id and left, top, right, bottom."""
    lines = (
        f"{int(label_id)} {(left + right) / 2:.6f} {(top + bottom) / 2:.6f} {right - left:.6f} {bottom - top:.6f}\n"
        for label_id, left, top, right, bottom in shares.tolist()
    )
    return "".join(lines).encode()


def count_scene(job: SceneJob, height: int, width: int) -> SceneCount:
    """What cutting a scene of that extent will give; no pixel is read."""
    boxes, cutting = job.boxes, job.cutting
    inside = (boxes[:, 1] < width) & (boxes[:, 2] < height) & (boxes[:, 3] > 0) & (boxes[:, 4] > 0)
    whole = (boxes[:, 1] >= 0) & (boxes[:, 2] >= 0) & (boxes[:, 3] <= width) & (boxes[:, 4] <= height)
    count = SceneCount(
        tiles=count_windows(height, width, cutting.size, cutting.stride),
        outside=int((~inside).sum()),
        over_edge=int((inside & ~whole).sum()),
    )
    count.small = count.tiles if min(height, width) < cutting.size else 0
    if not job.labelled:
        return count
    seen, ids = np.zeros(len(boxes), bool), []
    for window in list_windows(height, width, cutting) if len(boxes) else ():
        shares, rows, cut_off = clip_boxes(boxes, window, cutting.min_visibility)
        seen[rows] = True
        ids.append(shares[:, 0])
        count.cut_off += cut_off
        count.empty += not len(rows)
    if not ids:
        count.empty = count.tiles
        return count
    values, numbers = np.unique(np.concatenate(ids).astype(int), return_counts=True)
    count.raw_ids = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    count.lines = sum(count.raw_ids.values())
    count.unseen = int((inside & ~seen).sum())
    return count


def cut_scene(job: SceneJob, is_stopped: Callable[[], bool] = lambda: False) -> bool:
    """Cut one scene and write its tiles, its labels and its mark, in this order.

    Holds one row of the raster's blocks and a few tiles at a time, never the scene.

    Args:
        job: the scene.
        is_stopped: asked between tiles.

    Returns:
        whether it is done; it is not when it was stopped, and then lacks its mark.

    Raises:
        RasterError: the scene cannot be read.
        TileprobeError: its tiles cannot be written.
    """
    place = open_place(job.out)
    # The mark first, since the scene is no longer whole; then labels, so that none of then is ever beside an image of
    # now; then tiles that the grid of now does not have.
    for name in sorted(job.old, key=lambda name: ("tiling", "labels", "images").index(name.partition("/")[0])):
        place.delete(name)
    with Raster(job.path) as raster, ThreadPoolExecutor(_WRITES_IN_FLIGHT) as threads:
        height, width = raster.height, raster.width
        images = (
            (f"images/{name_tile(job.name, window)}.png", raster.read(window))
            for window in list_windows(height, width, job.cutting)
        )
        if not _write_all(place, threads, images, encode_png, is_stopped):
            return False
        if read_stat(job.path) != job.stat:
            raise RasterError(f"{job.path} changed while it was read: run the same command again")
        labels = (
            (f"labels/{name_tile(job.name, window)}.txt", clip_boxes(job.boxes, window, job.cutting.min_visibility)[0])
            for window in list_windows(height, width, job.cutting)
        )
        if job.labelled and not _write_all(place, threads, labels, format_labels, is_stopped):
            return False
    place.write(job.mark, b"")
    return True


def read_stat(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns.

    Raises:
        RasterError: there is no such file any more.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise RasterError(f"{path}: {error.strerror}: check IMAGES") from error
    return found.st_size, found.st_mtime_ns


def encode_png(pixels: RGBImage) -> bytes:
    """(H, W, 3) uint8 as PNG, which loses nothing."""
    return bytes(png_encode(pixels, level=_PNG_LEVEL))


def _write_all(
    place: Objects,
    threads: ThreadPoolExecutor,
    items: Iterable[tuple[str, T]],
    encode: Callable[[T], bytes],
    is_stopped: Callable[[], bool],
) -> bool:
    """Encode and write every item in threads, with so many in flight; False if stopped before the last."""

    def write(name: str, value: T) -> None:
        place.write(name, encode(value))

    in_flight: deque[Future[None]] = deque()
    for name, value in items:
        if is_stopped():
            return False
        if len(in_flight) == _WRITES_IN_FLIGHT:
            in_flight.popleft().result()
        in_flight.append(threads.submit(write, name, value))
    for future in in_flight:
        future.result()
    return True

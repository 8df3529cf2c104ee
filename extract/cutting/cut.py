"""Cut one scene into tiles: clip its boxes to windows, encode its pixels as PNG, and write both in a safe order.

All images are written first, then all labels, then the mark that the scene is complete. By default an extraction embeds
only tiles with labels, so it skips a scene that was interrupted before its labels were written. Marks lie outside
images/ and labels/:

    tiling/settings.json          the settings of all scenes in this output
    tiling/done/SCENE.DIGEST      the scene is complete; digest of the settings, the scene's file and its boxes
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
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
"""Tiles being encoded or written at once: a bucket answers in the time it takes to encode two."""
_PNG_LEVEL = 3
"""zlib level for imagecodecs: as small as Pillow's level 6 in a fifth of the time (346 KB, 26 ms for 512 px)."""


@dataclass(frozen=True)
class SceneJob:
    """A scene to cut.

    Attributes:
        stat: size in bytes and modification time in ns of that file.
        boxes: (n, 5), see `Boxes`.
        labelled: whether to write label files. A scene without features may never have been annotated, so its tiles
            get no labels, not empty ones.
        out: URL of the output.
        old: objects of an earlier cut, to remove first.
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
        """Name of the object that marks the scene as complete with these settings, boxes and file."""
        facts = [1, asdict(self.cutting), self.name, self.stat, self.labelled]
        digest = hashlib.sha256(json.dumps(facts).encode() + self.boxes.tobytes())
        return f"{DONE}/{self.name}.{digest.hexdigest()[:20]}"


@dataclass
class SceneCount:
    """The tiles and labels that a scene gives.

    Attributes:
        tiles: number of tiles.
        small: tiles below the full size, because their scene is smaller.
        empty: tiles with an empty label file.
        lines: label lines.
        cut_off: times a box is left out of a tile that shows too little of it.
        outside: boxes completely outside the scene.
        over_edge: boxes clipped at the edge of the scene.
        unseen: boxes of which no tile shows enough.
        raw_ids: label lines by type id.
    """

    tiles: int = 0
    small: int = 0
    empty: int = 0
    lines: int = 0
    cut_off: int = 0
    outside: int = 0
    over_edge: int = 0
    unseen: int = 0
    raw_ids: Counter[int] = field(default_factory=Counter)

    def add(self, other: "SceneCount") -> None:
        """Add the count of another scene."""
        for name in (item.name for item in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def list_windows(height: int, width: int, cutting: Cutting) -> Iterator[Window]:
    """Yield the windows of a scene of that size, see `windows`."""
    return windows(height, width, cutting.size, cutting.stride)


def name_tile(scene: str, window: Window) -> str:
    """Return a tile's name from scene, row and column: `1052_0_3`."""
    return f"{scene}_{window.row}_{window.column}"


def clip_boxes(boxes: Boxes, window: Window, min_visibility: float) -> tuple[Boxes, npt.NDArray[np.intp], int]:
    """Clip boxes (n, 5), in pixels of the scene, to a window; see `Cutting` for `min_visibility`.

    Returns:
        (k, 5) type id and left, top, right, bottom as shares of the window; (k,) their rows in `boxes`; and the number
        of boxes dropped because the window shows too little of them.
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
    """Format (k, 5) type id and left, top, right, bottom as YOLO lines, `id cx cy w h` in shares of the tile."""
    lines = (
        f"{int(label_id)} {(left + right) / 2:.6f} {(top + bottom) / 2:.6f} {right - left:.6f} {bottom - top:.6f}\n"
        for label_id, left, top, right, bottom in shares.tolist()
    )
    return "".join(lines).encode()


def count_scene(job: SceneJob, height: int, width: int) -> SceneCount:
    """Count what cutting a scene of that size will give, without reading its pixels."""
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
    seen, count.empty = np.zeros(len(boxes), bool), count.tiles
    for window in list_windows(height, width, cutting) if len(boxes) else ():
        shares, rows, cut_off = clip_boxes(boxes, window, cutting.min_visibility)
        seen[rows] = True
        count.raw_ids.update(shares[:, 0].astype(int).tolist())
        count.cut_off += cut_off
        count.empty -= len(rows) > 0
    count.lines = count.raw_ids.total()
    count.unseen = int((inside & ~seen).sum())
    return count


def cut_scene(job: SceneJob, is_stopped: Callable[[], bool] = lambda: False) -> bool:
    """Cut one scene and write its tiles, its labels and its mark, in this order.

    Holds one row of the raster's blocks and a few tiles in memory, never the whole scene. `is_stopped` is called
    between tiles.

    Returns:
        whether the scene is complete; False if it was stopped, and then it has no mark.

    Raises:
        RasterError: the scene cannot be read.
        TileprobeError: its tiles cannot be written.
    """
    place = open_place(job.out)
    # Remove the mark first, since the scene is no longer complete; then labels, so that an old label never lies next
    # to a new image; then tiles that the new grid lacks.
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
    """Return a file's size in bytes and modification time in ns.

    Raises:
        RasterError: the file is gone.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise RasterError(f"{path}: {error.strerror}: check IMAGES") from error
    return found.st_size, found.st_mtime_ns


def encode_png(pixels: RGBImage) -> bytes:
    """Encode (H, W, 3) uint8 as PNG."""
    return bytes(png_encode(pixels, level=_PNG_LEVEL))


def _write_all(
    place: Objects,
    threads: ThreadPoolExecutor,
    items: Iterable[tuple[str, T]],
    encode: Callable[[T], bytes],
    is_stopped: Callable[[], bool],
) -> bool:
    """Encode and write every item in threads; return False if stopped before the last."""
    in_flight: deque[Future[None]] = deque()
    for name, value in items:
        if is_stopped():
            return False
        if len(in_flight) == _WRITES_IN_FLIGHT:
            in_flight.popleft().result()
        in_flight.append(threads.submit(lambda name, value: place.write(name, encode(value)), name, value))
    for future in in_flight:
        future.result()
    return True

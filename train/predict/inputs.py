"""Find and read the inputs of a prediction: images, directories, buckets, and rasters cut into windows."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL import Image

from cache_schema import NO_LABEL, TileTable
from cache_schema.cli.text import show_name
from extract.errors import ConfigError, RasterError, SourceError
from extract.tiles.batch import Request, TileRequest, make_requests
from extract.tiles.decode import MAX_PIXELS
from extract.tiles.listing import IMAGE_SUFFIXES, list_images
from extract.tiles.source import LocalSource, open_source
from extract.tiles.windows import WindowRequest

if TYPE_CHECKING:
    from extract.tiles.raster import LonLat, Window

LARGEST_TILE = 2048
"""Pixels per side. A larger GeoTIFF is cut as a raster: resized to one tile, its objects would vanish."""
WINDOW = 512
"""Default pixels per side of a window."""
_RASTER_SUFFIXES = (".tif", ".tiff")
_RINGS_AT_ONCE = 256
_HERE = "."
"""Place of all local files, which are named relative to the working directory."""


class Described(NamedTuple):
    """The tile or window that a row of predictions describes.

    Attributes:
        tile: name of the tile; for a window, name of the raster and position in the grid.
        window: position in the raster; None for a tile.
        ring: outline of the window as (longitude, latitude); None for a tile or without georeferencing.
    """

    tile: str
    window: "Window | None" = None
    ring: "list[LonLat] | None" = None


class Part(Protocol):
    """A part of the inputs, in order."""

    @property
    def place(self) -> str:
        """Location that tile names are relative to: `gs://bucket/prefix` or a directory."""

    def __len__(self) -> int: ...

    def make_requests(self, first: int) -> Iterator[Request]:
        """Yield a request for each tile or window; rows count up from `first`."""

    def describe(self, rings: bool) -> Iterator[Described]:
        """Describe each row, with outlines only if `rings`."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Tiles of one listing.

    Attributes:
        prefix: put before tile names when they are shown.
        labels: whether to read label files too.
    """

    place: str
    table: TileTable
    prefix: str = ""
    labels: bool = False

    def __len__(self) -> int:
        return len(self.table)

    def make_requests(self, first: int) -> Iterator[Request]:
        for row in range(len(self)):
            (request,) = make_requests(self.table, [row], labels=self.labels)
            yield request._replace(row=first + row)

    def describe(self, rings: bool) -> Iterator[Described]:
        for tile in self.table.tile:
            yield Described(self.prefix + tile)


@dataclass(frozen=True)
class Files:
    """Local image files in the order given, with their sizes in bytes."""

    place: ClassVar[str] = _HERE
    paths: tuple[str, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def make_requests(self, first: int) -> Iterator[Request]:
        for row, (path, size) in enumerate(zip(self.paths, self.sizes, strict=True), start=first):
            yield TileRequest(row, path, size, 0, 0, NO_LABEL, 0)

    def describe(self, rings: bool) -> Iterator[Described]:
        for path in self.paths:
            yield Described(path)


@dataclass(frozen=True)
class Scene:
    """A raster that is cut into windows while it is read.

    Attributes:
        height, width: pixels of the raster.
        georeferenced: whether it has a coordinate reference system.
        size, stride: side and step of the windows, in pixels.
    """

    place: ClassVar[str] = _HERE
    path: str
    height: int
    width: int
    georeferenced: bool
    size: int
    stride: int

    def __len__(self) -> int:
        from extract.tiles.raster import count_windows

        return count_windows(self.height, self.width, self.size, self.stride)

    def make_requests(self, first: int = 0) -> Iterator[WindowRequest]:
        from extract.tiles.raster import windows

        for row, window in enumerate(windows(self.height, self.width, self.size, self.stride), start=first):
            yield WindowRequest(row, self.path, window)

    def describe(self, rings: bool) -> Iterator[Described]:
        from extract.tiles.raster import Raster

        requests = self.make_requests()
        if not rings or not self.georeferenced:
            yield from (Described(request.tile, request.window) for request in requests)
            return
        with Raster(self.path) as raster:
            while some := list(islice(requests, _RINGS_AT_ONCE)):
                outlines = raster.wgs84_rings([request.window for request in some])
                assert outlines is not None
                for request, ring in zip(some, outlines, strict=True):
                    yield Described(request.tile, request.window, ring)


@dataclass(frozen=True)
class Inputs:
    """All inputs of a prediction; rows are numbered through all parts, in order.

    Attributes:
        notes: lines for the user on what each name stands for.
    """

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def group(self) -> Iterator[tuple[str, int, Iterator[Request]]]:
        """Yield place, number of rows and requests of consecutive parts in one place, which one feed can read."""
        first = 0
        for place, group in groupby(self.parts, lambda part: part.place):
            parts = tuple(group)
            *starts, end = accumulate(map(len, parts), initial=first)
            requests = (part.make_requests(start) for part, start in zip(parts, starts, strict=True))
            yield place, end - first, chain.from_iterable(requests)
            first = end

    def describe(self, *, rings: bool) -> Iterator[Described]:
        """Describe each row, in order."""
        for part in self.parts:
            yield from part.describe(rings)


def find_inputs(names: Sequence[str], window: int | None, stride: int | None) -> Inputs:
    """Find the inputs behind names: image files, directories, `gs://bucket/prefix`, GeoTIFFs.

    A directory or bucket stands for everything below its `images/`, or else everything in it. A local `.tif` is a
    raster if `window` is given or one of its sides exceeds `LARGEST_TILE` pixels; in a bucket it is always a tile.

    Args:
        names: as the user gave them; rows keep their order.
        window: pixels per side of the windows that rasters are cut into; None means 512.
        stride: pixels from one window to the next; None means the window size.

    Raises:
        ConfigError: the window or stride is out of range.
        SourceError: a name does not exist, holds no images, or is no image.
        RasterError: a raster cannot be opened.
    """
    grid = _Grid.check(window, stride)
    found: list[_Found] = []
    for is_file, group in groupby(names, lambda name: "://" not in name and not Path(name).is_dir()):
        alike = tuple(group)
        found += _find_files(alike, grid) if is_file else [_find_place(name, grid) for name in alike]
    return Inputs(tuple(part for parts, _ in found for part in parts), tuple(note for _, note in found))


_Found = tuple[Sequence[Part], str]
"""Parts, and a line for the user that describes them."""


@dataclass(frozen=True)
class _Grid:
    """Size and stride of windows in pixels, and whether to cut every GeoTIFF or only large ones."""

    size: int
    stride: int
    everything: bool

    @classmethod
    def check(cls, window: int | None, stride: int | None) -> "_Grid":
        size = WINDOW if window is None else window
        step = size if stride is None else stride
        if size < 1 or size * size > MAX_PIXELS:
            raise ConfigError(f"--window {size}: choose 1 to {math.isqrt(MAX_PIXELS):,} pixels a side")
        if not 1 <= step <= size:
            raise ConfigError(f"--stride {step}: choose 1 to the window, {size}: a larger one would leave gaps")
        return cls(size, step, window is not None)

    def cuts(self, path: str) -> bool:
        """Return whether a local file is a raster to cut."""
        return path.lower().endswith(_RASTER_SUFFIXES) and (self.everything or _is_large(path))

    def lay(self, path: str) -> Scene:
        """Open a raster and lay the windows over it."""
        from extract.tiles.raster import Raster

        with Raster(path) as raster:
            return Scene(path, raster.height, raster.width, raster.crs is not None, self.size, self.stride)


def _is_large(path: str) -> bool:
    """Return whether a TIFF's header says it is larger than a tile; false for a file that cannot be opened."""
    from extract.tiles.raster import Raster

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("TIFF",)) as image:
                return max(image.size) > LARGEST_TILE
    except Image.DecompressionBombError:
        return True
    # Pillow's plugins raise all kinds of errors, and files with many bands, for example, only GDAL reads.
    except Exception:
        try:
            with Raster(path) as raster:
                return max(raster.height, raster.width) > LARGEST_TILE
        except RasterError:
            return False


def _find_files(paths: tuple[str, ...], grid: _Grid) -> Iterator[_Found]:
    """Yield the parts of named files; consecutive tiles make one part."""
    for path in paths:
        if not Path(path).is_file():
            raise SourceError(f"no file or directory {show_name(path)}: check INPUT")
        if not path.lower().endswith(IMAGE_SUFFIXES):
            raise SourceError(f"{show_name(path)} is not a PNG, JPEG or TIFF image: check INPUT")
    for cut, group in groupby(paths, grid.cuts):
        files = tuple(group)
        what = show_name(files[0]) if len(files) == 1 else f"{len(files):,} files"
        if cut:
            scenes = [grid.lay(path) for path in files]
            yield scenes, f"{what}: {_describe_scenes(scenes, grid)}"
        else:
            yield [Files(files, tuple(Path(path).stat().st_size for path in files))], f"{what}: {_count_tiles(files)}"


def _find_place(name: str, grid: _Grid) -> _Found:
    """List a bucket or a directory."""
    source = open_source(name)
    listing = list_images(source)
    table, scenes = listing.table, list[Scene]()
    prefix = np.array(os.path.join(source.url, ""), np.dtypes.StringDType())
    if isinstance(source, LocalSource):
        table = replace(table, tile=prefix + table.tile)
        cut = np.array([grid.cuts(path) for path in table.tile.tolist()], bool)
        scenes = [grid.lay(path) for path in table.tile[cut].tolist()]
        table = table.select(~cut)
        parts: list[Part] = [Listed(_HERE, table)] if len(table) else []
    else:
        parts = [Listed(source.url, table, prefix=str(prefix))]
    notes = [_count_tiles(table.tile.tolist())] if len(table) else []
    notes += [_describe_scenes(scenes, grid)] if scenes else []
    notes += [f"not read: {listing.other:,} other files"] if listing.other else []
    return [*parts, *scenes], f"{show_name(name)}: {'; '.join(notes)}"


def _count_tiles(paths: Sequence[str]) -> str:
    tiffs = sum(path.lower().endswith(_RASTER_SUFFIXES) for path in paths)
    more = f", {tiffs:,} of them .tif: --window PIXELS would cut local ones into windows" if tiffs else ""
    return f"{len(paths):,} tile{'s' if len(paths) > 1 else ''}{more}"


def _describe_scenes(scenes: Sequence[Scene], grid: _Grid) -> str:
    what = (
        f"{len(scenes):,} rasters" if len(scenes) > 1 else f"a raster of {scenes[0].width:,} x {scenes[0].height:,} px"
    )
    return f"{what}, cut into {sum(map(len, scenes)):,} windows of {grid.size} px, stride {grid.stride}"

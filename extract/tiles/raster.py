"""Read georeferenced rasters window by window, as (H, W, 3) uint8 RGB, and locate windows on the Earth.

Only GDAL's GeoTIFF driver is used, whatever a file's name: with other drivers, a text file named `.tif` could make GDAL
open other files and URLs. Sidecar files (`.aux.xml`, `.tfw`, `.ovr`) are neither read nor written. A `Raster` belongs
to the process and thread that opened it.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.transform
import rasterio.windows
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, Interleaving
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform as transform_points

from extract.errors import ConfigError, RasterError

from .decode import MAX_PIXELS, RGBImage

RASTER_SUFFIXES = (".tif", ".tiff")
MAX_RASTER_PIXELS = 2**34
"""131,072 pixels squared. A raster is never held in memory, but a small file can claim a huge number of windows."""
MAX_BLOCK_BYTES = 4 * MAX_PIXELS
"""Largest strip or tile of a file, which GDAL decompresses as a whole: `MAX_PIXELS` in RGBA."""
CACHE_BYTES = 256 * 2**20
"""GDAL's block cache per process: holds the strips of one row of windows of a raster 170,000 pixels wide."""

_OPTIONS = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    "GDAL_PAM_ENABLED": "NO",  # neither reads nor writes .aux.xml
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # ignores all other files in the folder
    "GDAL_NUM_THREADS": "1",
}
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
_REMEDY_8_BIT = "make it 8-bit: gdal_translate -ot Byte -scale"
_FAILURES = (RasterioError, CPLE_BaseError, CRSError, OSError)

LonLat = tuple[float, float]


@dataclass(frozen=True)
class Window:
    """A rectangle of a raster: its row and column in the grid, and its pixels from the raster's top left corner."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


def windows(height: int, width: int, size: int, stride: int) -> Iterator[Window]:
    """Yield windows that cover a raster, row by row from the top left.

    They are `size` pixels a side and `stride` apart. The last row and column are moved inward to the edge, so that
    every pixel is covered by a full window; they overlap their neighbours more than the others do. A raster smaller
    than a window gets windows of the size of the raster: nothing is padded.

    Raises:
        ConfigError: a size or stride below 1, a stride that would leave gaps, or windows over `MAX_PIXELS`.
    """
    check_grid(size, stride)
    tops, lefts = _place_windows(height, size, stride), _place_windows(width, size, stride)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            yield Window(row, column, top, left, min(size, height), min(size, width))


def count_windows(height: int, width: int, size: int, stride: int) -> int:
    """Return how many windows `windows` yields."""
    return len(_place_windows(height, size, stride)) * len(_place_windows(width, size, stride))


def check_grid(size: int, stride: int) -> None:
    """Raise ConfigError where `windows` would."""
    if size < 1 or size * size > MAX_PIXELS:
        raise ConfigError(f"--size {size}: choose 1 to {math.isqrt(MAX_PIXELS):,} pixels a side")
    if not 1 <= stride <= size:
        raise ConfigError(f"--stride {stride}: choose 1 to {size}, the tile size; a larger stride would leave gaps")


def _place_windows(length: int, size: int, stride: int) -> Sequence[int]:
    last = max(length - size, 0)
    return [*range(0, last, stride), last]


class Raster(AbstractContextManager["Raster"]):
    """One GeoTIFF, open for reading.

    Attributes:
        path: the file.
        height, width: pixels.
        crs: rasterio's coordinate reference system; None if the file lacks one or its transform.
        transform: affine, from pixel (column, row) to coordinates of `crs`.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a local file and read its header.

        Raises:
            RasterError: no such file, not a GeoTIFF, over the limits, or bands that are not 8-bit colours.
        """
        self.path = Path(path)
        if not self.path.is_file():  # GDAL would read /vsicurl/… as a URL
            raise RasterError(f"no file {path}: check the path")
        try:
            with rasterio.Env(**_OPTIONS), warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                self._dataset = rasterio.open(self.path.absolute(), driver="GTiff")
        except _FAILURES as error:
            raise RasterError(f"{path} cannot be opened as a GeoTIFF ({_quote(error)}): get it again") from error
        try:
            self.height, self.width = int(self._dataset.height), int(self._dataset.width)
            self.transform = self._dataset.transform
            self.crs = None if self.transform.is_identity else self._dataset.crs
            self._bands, self._palette = self._choose_bands()
            self._check_extent()
            self._is_inverted = "YES" in self._dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE", "")
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._dataset.close()

    def read(self, window: Window) -> RGBImage:
        """Return the window's pixels, (height, width, 3) uint8 RGB.

        Grey is repeated, palettes are looked up, alpha and further bands are dropped. With three bands or more, those
        that the file labels red, green and blue are read, else the first three.

        Raises:
            RasterError: the file is damaged there, or was moved or truncated while it was read.
        """
        place = rasterio.windows.Window(window.left, window.top, window.width, window.height)
        try:
            with rasterio.Env(**_OPTIONS):
                bands = self._dataset.read(self._bands, window=place)
        except _FAILURES as error:
            where = f"rows {window.top} to {window.top + window.height}"
            raise RasterError(f"{self.path} is damaged at {where} ({_quote(error)}): get it again") from error
        if self._palette is not None:
            return np.asarray(self._palette[bands[0]])
        pixels = np.ascontiguousarray(np.moveaxis(bands, 0, -1))
        if self._is_inverted:
            pixels = 255 - pixels
        return np.asarray(pixels if len(bands) == 3 else np.repeat(pixels, 3, axis=2))

    def wgs84_rings(self, windows: Sequence[Window]) -> list[list[LonLat]] | None:
        """Return the outline of each window as (longitude, latitude) in degrees, for a GeoJSON polygon (RFC 7946).

        Each ring has five positions, the last equal to the first, counter-clockwise. A window across the antimeridian
        keeps its shape: its longitudes exceed 180. None if the raster has no coordinate reference system. One call for
        many windows takes a fraction of the time.

        Raises:
            RasterError: the coordinates cannot be converted.
        """
        if self.crs is None:
            return None
        corners = [
            corner
            for window in windows
            for bottom, right in [(window.top + window.height, window.left + window.width)]
            for corner in ((window.left, window.top), (window.left, bottom), (right, bottom), (right, window.top))
        ]
        columns, rows = zip(*corners, strict=True)
        xs, ys = rasterio.transform.xy(self.transform, rows, columns, offset="ul")
        try:
            with rasterio.Env(**_OPTIONS):
                lons, lats = transform_points(self.crs, "EPSG:4326", xs, ys)
        except _FAILURES as error:
            raise self._make_crs_error(_quote(error)) from error
        if not all(map(math.isfinite, (*lons, *lats))):
            raise self._make_crs_error("no longitude and latitude")
        positions = list(zip(lons, lats, strict=True))
        return [_close_ring(positions[start : start + 4]) for start in range(0, len(positions), 4)]

    def _make_crs_error(self, why: str) -> RasterError:
        return RasterError(
            f"{self.path}: cannot convert its coordinates to longitude and latitude ({why}): correct its coordinate "
            "reference system with gdal_edit.py -a_srs"
        )

    def _check_extent(self) -> None:
        if self.height * self.width > MAX_RASTER_PIXELS:
            raise RasterError(
                f"{self.path} has {self.width:,} x {self.height:,} pixels, more than the limit of "
                f"{math.isqrt(MAX_RASTER_PIXELS):,} squared: split it with gdal_translate -srcwin"
            )
        together = self._dataset.count if self._dataset.interleaving == Interleaving.pixel else 1
        rows, columns = self._dataset.block_shapes[0]  # the same for all bands; pixels are one byte per band
        if rows * columns * together > MAX_BLOCK_BYTES:
            raise RasterError(
                f"{self.path} is stored in blocks of {columns:,} x {rows:,} pixels, which exceed the limit of "
                f"{MAX_BLOCK_BYTES // 2**20} MiB: store it in smaller blocks with gdal_translate -co TILED=YES"
            )

    def _choose_bands(self) -> tuple[list[int], RGBImage | None]:
        """Return the 1-based numbers of the bands to read, one or three, and the (256, 3) palette if there is one."""
        colours = list(self._dataset.colorinterp)
        if len(colours) == 2 and colours[1] != ColorInterp.alpha:
            raise RasterError(f"{self.path} has 2 bands, neither grey nor RGB: choose one or three, gdal_translate -b")
        if len(colours) < 3:
            bands = [1]
        elif set(_RGB) <= set(colours):
            bands = [colours.index(colour) + 1 for colour in _RGB]
        else:
            bands = [1, 2, 3]
        palette = self._read_palette() if colours[0] == ColorInterp.palette and len(bands) == 1 else None
        for band in bands:
            dtype = self._dataset.dtypes[band - 1]
            bits = self._dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8")
            if dtype != "uint8" or (bits != "8" and palette is None):
                depth = dtype if dtype != "uint8" else f"{bits}-bit"
                raise RasterError(f"{self.path} has {depth} values, not 8-bit colours: {_REMEDY_8_BIT}")
        return bands, palette

    def _read_palette(self) -> RGBImage:
        palette = np.zeros((256, 3), np.uint8)
        for index, colour in self._dataset.colormap(1).items():
            if index < 256:
                palette[index] = colour[:3]
        return palette


def _close_ring(corners: list[LonLat]) -> list[LonLat]:
    """Close four corners to a counter-clockwise ring, in one piece even across the antimeridian."""
    lons = [lon for lon, _ in corners]
    if max(lons) - min(lons) > 180:
        corners = [(lon + 360 if lon < 0 else lon, lat) for lon, lat in corners]
    if _measure_area(corners) < 0:
        corners = corners[::-1]
    return [*corners, corners[0]]


def _measure_area(ring: Sequence[LonLat]) -> float:
    """Return twice the signed area, positive for a counter-clockwise ring (the shoelace formula)."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, [*ring[1:], ring[0]], strict=True))


def _quote(error: Any) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__

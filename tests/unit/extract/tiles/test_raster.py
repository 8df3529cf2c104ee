"""Rasters against Pillow, closed formulas and brute force."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from extract.errors import ConfigError, RasterError
from extract.tiles.raster import Raster, Window, count_windows, windows
from tests.planted import fresh_seed
from tests.raw_xview import write_geotiff
from tests.tiles import draw_pixels

PLACE = from_origin(500_000, 5_000_000, 0.3, 0.3)
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"compress": "lzw"},
    {"compress": "deflate", "tiled": True, "blockxsize": 64, "blockysize": 32},
    {"interleave": "band", "compress": "deflate", "predictor": 2},
    {"compress": "deflate", "blockysize": 300},  # all in one strip
    {"BIGTIFF": "YES"},
]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.data())
def test_windows_cover_every_pixel_and_are_whole(height: int, width: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    covered = np.zeros((height, width), int)
    found = list(windows(height, width, size, stride))
    for window in found:
        assert (window.height, window.width) == (min(size, height), min(size, width))
        assert 0 <= window.top <= height - window.height
        assert 0 <= window.left <= width - window.width
        covered[window.top : window.top + window.height, window.left : window.left + window.width] += 1
    assert covered.all()
    assert len({(window.row, window.column) for window in found}) == len(found)
    assert (
        len({(window.top, window.left) for window in found}) == len(found) == count_windows(height, width, size, stride)
    )
    inner = [w for w in found if w.top + size < height and w.left + size < width]
    assert all((w.top, w.left) == (w.row * stride, w.column * stride) for w in inner)


@pytest.mark.parametrize("size, stride", [(0, 1), (9000, 1), (64, 0), (64, 65)])
def test_grids_that_cannot_be_are_refused(size: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="choose"):
        list(windows(100, 100, size, stride))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_windows_are_the_pixels_that_pillow_reads(tmp_path: Path, layout: dict[str, Any]) -> None:
    rng = np.random.default_rng(fresh_seed())
    write_geotiff(tmp_path / "a.tif", draw_pixels(rng, 300, 211), "EPSG:32633", PLACE, **layout)
    with Image.open(tmp_path / "a.tif") as image:
        whole = np.asarray(image.convert("RGB"))
    with Raster(tmp_path / "a.tif") as raster:
        assert (raster.height, raster.width) == (300, 211)
        for window in windows(300, 211, 70, 55):
            pixels = raster.read(window)
            part = whole[window.top : window.top + window.height, window.left : window.left + window.width]
            assert pixels.dtype == np.uint8
            assert np.array_equal(pixels, part)
    assert sorted(os.listdir(tmp_path)) == ["a.tif"]


def read_whole(path: Path) -> np.ndarray:
    with Raster(path) as raster:
        return raster.read(Window(0, 0, 0, 0, raster.height, raster.width))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_other_modes_are_what_pillow_makes_of_them(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(fresh_seed())
    image = Image.fromarray(draw_pixels(rng, 40, 50, 4)).convert("RGB" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(200)
    image.save(tmp_path / "a.tif")
    wanted = image if mode in ("1", "L", "P") else image.convert("L" if mode == "LA" else "RGB")
    if mode == "RGBA":  # dropped, not blended
        assert np.array_equal(read_whole(tmp_path / "a.tif"), np.asarray(image)[..., :3])
    else:
        assert np.array_equal(read_whole(tmp_path / "a.tif"), np.asarray(wanted.convert("RGB")))


def test_bands_are_the_ones_the_file_calls_red_green_and_blue(tmp_path: Path) -> None:
    pixels = draw_pixels(np.random.default_rng(fresh_seed()), 30, 40, 5)
    path = tmp_path / "a.tif"
    write_geotiff(path, pixels, None, None)
    assert np.array_equal(read_whole(path), pixels[..., :3])
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.nir, ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.alpha]
    for beside in tmp_path.glob("*.aux.xml"):  # what was said must stand in the file itself
        beside.unlink()
    assert np.array_equal(read_whole(path), pixels[..., [3, 2, 1]])


def test_cmyk_is_turned_into_rgb_as_pillow_does_but_for_rounding(tmp_path: Path) -> None:
    pixels = draw_pixels(np.random.default_rng(fresh_seed()), 30, 40, 4)
    Image.fromarray(pixels, "CMYK").save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        wanted = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read_whole(tmp_path / "a.tif") - wanted).max() <= 1


def test_white_is_zero_in_some_files(tmp_path: Path) -> None:
    grey = draw_pixels(np.random.default_rng(fresh_seed()), 30, 40, 1)
    write_geotiff(tmp_path / "a.tif", grey, None, None, photometric="MINISWHITE")
    with Image.open(tmp_path / "a.tif") as image:
        assert np.array_equal(read_whole(tmp_path / "a.tif"), np.asarray(image.convert("RGB")))


def test_a_window_lies_where_mercator_says(tmp_path: Path) -> None:
    """EPSG:3857 has a closed inverse: longitude x/R, latitude atan(sinh(y/R)). Tolerance 1e-9 degrees, 0.1 mm."""
    rng = np.random.default_rng(fresh_seed())
    left, top, pixel = *rng.uniform(-1.5e7, 1.5e7, 2), rng.uniform(0.1, 50)
    write_geotiff(tmp_path / "a.tif", draw_pixels(rng, 60, 80), "EPSG:3857", from_origin(left, top, pixel, pixel))
    radius = 6378137.0

    def invert(column: int, row: int) -> tuple[float, float]:
        x, y = left + column * pixel, top - row * pixel
        return math.degrees(x / radius), math.degrees(math.atan(math.sinh(y / radius)))

    with Raster(tmp_path / "a.tif") as raster:
        for window in windows(60, 80, 32, 20):
            rings = raster.wgs84_rings([window])
            rows, columns = (window.top, window.top + window.height), (window.left, window.left + window.width)
            wanted = [
                invert(c, r)
                for c, r in zip((*columns, *columns[::-1]), (rows[1], rows[1], rows[0], rows[0]), strict=True)
            ]
            assert rings is not None
            (ring,) = rings
            assert ring[0] == ring[4]
            start = min(range(4), key=lambda i: math.dist(ring[i], wanted[0]))
            assert np.allclose([*ring[start:4], *ring[:start]], wanted, atol=1e-9, rtol=0)  # so counter-clockwise


@pytest.mark.parametrize("flipped", [False, True])
def test_rings_run_counter_clockwise_also_across_the_antimeridian(tmp_path: Path, flipped: bool) -> None:
    place = from_origin(3_330_000 if flipped else 19_990_000, -2_000_000, 600, -600 if flipped else 600)
    write_geotiff(tmp_path / "a.tif", np.zeros((100, 100, 3), np.uint8), "EPSG:3832" if flipped else "EPSG:3857", place)
    with Raster(tmp_path / "a.tif") as raster:
        rings = raster.wgs84_rings([Window(0, 0, 0, 0, 100, 100)])
    assert rings is not None
    (ring,) = rings
    assert sum((b[0] - a[0]) * (b[1] + a[1]) for a, b in pairwise(ring)) < 0  # by another formula
    lons = [lon for lon, _ in ring]
    assert 0 < max(lons) - min(lons) < 2


def test_a_raster_of_nowhere_has_no_ring(tmp_path: Path) -> None:
    for name, crs, place in (("a", None, PLACE), ("b", None, None)):
        write_geotiff(tmp_path / f"{name}.tif", np.zeros((9, 9, 3), np.uint8), crs, place)
        with Raster(tmp_path / f"{name}.tif") as raster:
            assert raster.crs is None
            assert raster.wgs84_rings([Window(0, 0, 0, 0, 9, 9)]) is None


def test_files_beside_a_raster_are_neither_read_nor_written(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "a.tif", np.zeros((9, 9, 3), np.uint8), None, None)
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:32633</SRS></PAMDataset>")
    (tmp_path / "a.tfw").write_text("0.3\n0\n0\n-0.3\n500000\n5000000\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with Raster(tmp_path / "a.tif") as raster:
        raster.read(Window(0, 0, 0, 0, 9, 9))
        assert raster.crs is None
        assert raster.transform.is_identity
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


VRT = """<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename>{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"""


def test_what_is_no_8_bit_geotiff_is_refused_with_a_remedy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_geotiff(tmp_path / "16.tif", rng.integers(0, 999, (9, 9, 3)).astype(np.uint16), None, None)
    write_geotiff(tmp_path / "float.tif", rng.random((9, 9, 3), np.float32), None, None)
    write_geotiff(tmp_path / "bits.tif", np.ones((9, 9), np.uint8), None, None, NBITS=4)
    write_geotiff(tmp_path / "two.tif", np.ones((9, 9, 2), np.uint8), None, None)
    Image.new("RGB", (9, 9)).save(tmp_path / "png.png")
    (tmp_path / "png.png").rename(tmp_path / "png.tif")
    (tmp_path / "vrt.tif").write_text(VRT.format(tmp_path / "16.tif"))
    (tmp_path / "empty.tif").touch()
    (tmp_path / "folder.tif").mkdir()
    for name, words in {
        "16": "uint16 values.*gdal_translate -ot Byte -scale",
        "float": "float32 values.*gdal_translate",
        "bits": "4-bit values.*gdal_translate",
        "two": "2 bands.*gdal_translate -b",
        "png": "cannot be opened as a GeoTIFF",
        "vrt": "cannot be opened as a GeoTIFF",
        "empty": "cannot be opened as a GeoTIFF",
        "folder": "no file",
        "none": "no file",
    }.items():
        with pytest.raises(RasterError, match=words) as caught:
            Raster(tmp_path / f"{name}.tif")
        assert "\n" not in str(caught.value)
    with pytest.raises(RasterError, match="no file"):
        Raster("/vsicurl/http://127.0.0.1:9/a.tif")


def test_damage_is_named_where_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    write_geotiff(tmp_path / "a.tif", draw_pixels(rng, 300, 200), None, None, compress="deflate", blockysize=50)
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) * 2 // 3])
    with Raster(tmp_path / "cut.tif") as raster:
        raster.read(Window(0, 0, 0, 0, 50, 200))
        with pytest.raises(RasterError, match="is damaged at rows 250 to 300 .*get it again"):
            raster.read(Window(0, 0, 250, 0, 50, 200))


def test_bombs_are_refused_before_a_pixel_is_unpacked(tmp_path: Path) -> None:
    sparse = {"driver": "GTiff", "count": 3, "dtype": "uint8", "SPARSE_OK": True, "compress": "deflate"}
    with rasterio.open(tmp_path / "wide.tif", "w", width=200_000, height=100_000, tiled=True, **sparse):
        pass
    side = {"width": 20_000, "height": 20_000, "blockxsize": 20_000, "blockysize": 20_000}
    with rasterio.open(tmp_path / "block.tif", "w", tiled=True, **side, **sparse):
        pass
    with pytest.raises(RasterError, match=r"200,000 x 100,000 pixels.*gdal_translate -srcwin"):
        Raster(tmp_path / "wide.tif")
    with pytest.raises(RasterError, match=r"blocks of 20,000 x 20,000.*-co TILED=YES"):
        Raster(tmp_path / "block.tif")


# ru_maxrss would begin with what pytest held when it forked.
READ_ALL = """
import re, sys
from extract.tiles.raster import Raster, windows
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
with Raster(sys.argv[1]) as raster:
    at_first = peak()
    for window in windows(raster.height, raster.width, 2048, 2048):
        raster.read(window)
print(peak() - at_first)
"""


def test_memory_does_not_grow_with_the_raster(tmp_path: Path, python_env: dict[str, str]) -> None:
    """432 MiB of pixels, in at most 256 MiB of blocks and a window of 12 MiB, a few times while it is turned round."""
    sparse = {"driver": "GTiff", "count": 3, "dtype": "uint8", "SPARSE_OK": True, "tiled": True}
    with rasterio.open(
        tmp_path / "a.tif", "w", width=12_288, height=12_288, blockxsize=2048, blockysize=2048, **sparse
    ):
        pass
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "a.tif")]
    grown = subprocess.run(command, env=python_env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(grown) < 340

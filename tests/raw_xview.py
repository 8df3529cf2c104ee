"""A made-up miniature of raw xView: GeoTIFFs with a place on the Earth, and one GeoJSON with every defect that is known
of the real one. The scenes are the demo's, so there is something to learn in them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.transform import Affine, from_origin

from extract.demo.classes import DEMO
from extract.demo.scenes import draw_scene

SCENES = (5, 36, 104, 389, 1052, 1411, 2355, 2584)
UNLABELLED_SCENE = "880"
"""Has a file, and no feature."""
MISSING_SCENE = "1395"
"""Has features, and no file, as in the real data."""
UNKNOWN_ID = 99

_LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"compress": "lzw"},
    {"compress": "deflate", "tiled": True, "blockxsize": 128, "blockysize": 128},
    {"compress": "deflate", "interleave": "band", "predictor": 2},
)
_PLACES = (
    ("EPSG:4326", from_origin(-72.34, 18.55, 3e-6, 3e-6)),
    ("EPSG:32633", from_origin(500_000, 5_000_000, 0.3, 0.3)),
)

Pixels = npt.NDArray[np.uint8]


@dataclass
class RawXView:
    """Where it lies, and what is wrong with it.

    Attributes:
        images, labels: what `extract tile` is given.
        scenes: names of those with a file and features.
        pixels: (H, W, 3) uint8 of every scene with a file.
        defects: features that are to be dropped, by what is wrong with them.
    """

    images: Path
    labels: Path
    scenes: tuple[str, ...]
    pixels: dict[str, Pixels] = field(default_factory=dict)
    defects: Counter[str] = field(default_factory=Counter)


def write_geotiff(
    path: Path, pixels: npt.NDArray[Any], crs: str | None, transform: Affine | None, **layout: Any
) -> None:
    """(H, W) or (H, W, C) pixels as a GeoTIFF."""
    bands = np.moveaxis(pixels if pixels.ndim == 3 else pixels[..., None], -1, 0)
    count, height, width = bands.shape
    shape = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, **shape, **layout) as file:
        file.write(bands)


def make_feature(image_id: object, type_id: object, bounds: object, number: int = 0) -> dict[str, Any]:
    """One feature, with the members that the real ones have."""
    ring = [[-72.3, 18.5], [-72.2, 18.5], [-72.2, 18.6], [-72.3, 18.6], [-72.3, 18.5]]
    properties = {
        "bounds_imcoords": bounds,
        "edited_by": "someone",
        "cat_id": "1040010028371A00",
        "type_id": type_id,
        "ingest_time": "2017/07/24 12:49:09.118+00",
        "index_right": 2356,
        "image_id": image_id,
        "point_geom": "0101000020E6100000616E4E6406B256C03BE6ADA0D6212D40",
        "feature_id": number,
        "grid_file": "Grid2.shp",
    }
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": [ring]}}


def write_geojson(path: Path, features: list[Any]) -> None:
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))


def make_raw_xview(root: Path, *, size: int = 512, numbers: tuple[int, ...] = SCENES) -> RawXView:
    """Draw the scenes, each about `size` pixels a side, and write all that raw xView consists of below `root`."""
    raw = RawXView(root / "train_images", root / "xView_train.geojson", tuple(str(number) for number in numbers))
    raw.images.mkdir(parents=True)
    features: list[Any] = []
    for index, number in enumerate([*numbers, int(UNLABELLED_SCENE)]):
        scene = draw_scene(DEMO, 20_000 + number, size)
        # No two extents alike, none a multiple of a tile; objects over the cut reach beyond the scene's edge.
        pixels = scene.pixels[: size - 7 * (index % 3), : size - 11 * (index % 4)]
        crs, transform = _PLACES[index % len(_PLACES)]
        write_geotiff(raw.images / f"{number}.tif", pixels, crs, transform, **_LAYOUTS[index % len(_LAYOUTS)])
        raw.pixels[str(number)] = pixels
        if str(number) != UNLABELLED_SCENE:
            for box in scene.boxes:
                edges = (math.floor(box.x0), math.floor(box.y0), math.ceil(box.x1), math.ceil(box.y1))
                features.append(make_feature(f"{number}.tif", box.label_id, ",".join(map(str, edges)), len(features)))
    for feature, defect in _make_defects(numbers, size):
        features.insert(len(features) // 2, feature)
        raw.defects[defect] += 1
    write_geojson(raw.labels, features)
    (raw.images / f"._{numbers[0]}.tif").write_bytes(b"Mac OS X")
    (raw.images / "readme.txt").write_text("not a picture")
    return raw


def _make_defects(numbers: tuple[int, ...], size: int) -> list[tuple[Any, str]]:
    """Features that a tiling has to drop, and the one that it keeps though no class has its id."""
    one, two = (f"{number}.tif" for number in numbers[:2])
    twice = make_feature(one, 18, "40,50,60,70", 1)
    far = size + 100
    return [
        (make_feature(one, 75, "10,20,30,40"), "artefact"),
        (make_feature(two, 82, "10,20,30,40"), "artefact"),
        (make_feature(two, 18, []), "bounds"),  # what the real data has
        (make_feature(two, 18, ""), "bounds"),
        (make_feature(two, 18, "1,2,3"), "bounds"),
        (make_feature(one, 18, "a,b,c,d"), "bounds"),
        (make_feature(one, 18, "1,2,nan,inf"), "bounds"),
        (make_feature(one, 18, None), "bounds"),
        (make_feature(one, 73, "30,30,30,60"), "empty"),
        (make_feature(one, 73, "60,60,20,90"), "empty"),
        (make_feature(two, 73, f"{far},{far},{far + 20},{far + 30}"), "outside"),
        (make_feature(two, 73, "-50,-40,-10,-20"), "outside"),
        (make_feature(None, 73, "10,20,30,40"), "no image"),
        (make_feature(104, 73, "10,20,30,40"), "no image"),
        (make_feature("../../etc/passwd", 73, "10,20,30,40"), "no image"),
        (make_feature(one, None, "10,20,30,40"), "no id"),
        (make_feature(one, "18", "10,20,30,40"), "no id"),
        (make_feature(one, -1, "10,20,30,40"), "no id"),
        ({"type": "Feature", "properties": None, "geometry": None}, "no properties"),
        (None, "no properties"),
        (make_feature(f"{MISSING_SCENE}.tif", 18, "10,20,30,40", 2), "no file"),
        (make_feature(f"{MISSING_SCENE}.tif", 73, "50,20,90,40", 3), "no file"),
        (twice, "kept"),
        (twice, "repeated"),
        (make_feature(one, UNKNOWN_ID, "5,5,25,30"), "kept"),
        (make_feature(two, 73, "-20,10,40,60"), "kept"),  # reaches beyond the edge
    ]

"""Draw synthetic overhead scenes (ground, and objects of a vocabulary with known boxes) and cut tiles from them.

They replace satellite images without a download or a licence. The same vocabulary and number give the same scene,
pixel for pixel.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .sprites import scale, stamp
from .terrain import Mask, Terrain, develop, paint_terrain
from .vocabulary import Habitat, ObjectClass, Vocabulary

SCENE_SIZE = 1024
TILE_SIZE = 256
MIN_VISIBLE = 0.35
"""A box is dropped from a tile that shows less than this share of its area."""

_ATTEMPTS = 8
_GAP = 2
_CELL = 4
_ZOOM = 1.6
"""Pixels per unit of the sprites: small ones are 7 to 20 px, still visible at half the resolution."""


@dataclass(frozen=True)
class Box:
    """An object's bounds in pixels: left, top, right, bottom."""

    label_id: int
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Scene:
    """An image (S, S, 3) uint8 and the boxes of its objects. A tile cut from a scene is a scene too."""

    pixels: npt.NDArray[np.uint8]
    boxes: tuple[Box, ...]


def draw_scene(vocabulary: Vocabulary, number: int, size: int = SCENE_SIZE) -> Scene:
    """Draw scene `number` of the vocabulary. Two vocabularies never share a random stream."""
    rng = np.random.default_rng([zlib.crc32(vocabulary.name.encode()), number])
    terrain = paint_terrain(rng, size)
    boxes = _place_objects(rng, terrain, vocabulary)
    return Scene(develop(rng, terrain.pixels), tuple(boxes))


def cut_tiles(scene: Scene, tile_size: int = TILE_SIZE) -> Iterator[tuple[int, int, Scene]]:
    """Yield row, column and tile, from the top left; boxes are clipped to the tile and relative to its corner."""
    for row in range(scene.pixels.shape[0] // tile_size):
        for column in range(scene.pixels.shape[1] // tile_size):
            top, left = row * tile_size, column * tile_size
            boxes = (_clip(box, left, top, tile_size) for box in scene.boxes)
            pixels = scene.pixels[top : top + tile_size, left : left + tile_size]
            yield row, column, Scene(pixels, tuple(box for box in boxes if box is not None))


def _clip(box: Box, left: int, top: int, size: int) -> Box | None:
    """Return the part of a box inside a tile; None if that is less than `MIN_VISIBLE`."""
    x0, x1 = (min(max(x - left, 0.0), size) for x in (box.x0, box.x1))
    y0, y1 = (min(max(y - top, 0.0), size) for y in (box.y0, box.y1))
    visible = (x1 - x0) * (y1 - y0) / ((box.x1 - box.x0) * (box.y1 - box.y0))
    return Box(box.label_id, x0, y0, x1, y1) if visible >= MIN_VISIBLE else None


def _place_objects(rng: np.random.Generator, terrain: Terrain, vocabulary: Vocabulary) -> list[Box]:
    """Place objects tile by tile, so that a class's rate is a share of tiles; they may cross tile borders."""
    size = len(terrain.pixels)
    taken: Mask = np.zeros((size // _CELL, size // _CELL), bool)
    boxes: list[Box] = []
    for wanted in vocabulary.classes:
        # Scenes differ in the abundance of each class, like a harbour, an airfield, a town or open land.
        abundance = rng.gamma(2.0, 0.5) if wanted.rate < 0.5 else rng.uniform(0.6, 1.25)
        for top in range(0, size, TILE_SIZE):
            for left in range(0, size, TILE_SIZE):
                if rng.random() < wanted.rate * abundance:
                    for _ in range(1 + rng.poisson(wanted.extra)):
                        box = _place_one(rng, terrain, taken, wanted, left, top)
                        boxes += [box] if box is not None else []
    return boxes


def _place_one(
    rng: np.random.Generator, terrain: Terrain, taken: Mask, wanted: ObjectClass, left: int, top: int
) -> Box | None:
    """Stamp one object in a free place of its habitat within the tile; None if a few attempts find none."""
    size = len(terrain.pixels)
    sprite = scale(wanted.draw(rng), _ZOOM * rng.uniform(0.8, 1.2))
    reach = max(float(np.abs(part.points).max()) for part in sprite.parts) + _GAP
    for _ in range(_ATTEMPTS):
        x, y, angle = _choose_spot(rng, terrain, wanted.habitat, left, top)
        inside = reach <= x < size - reach and reach <= y < size - reach
        if not inside or not _is_habitat(terrain, wanted.habitat, x, y):
            continue
        rows = slice(int(y - reach) // _CELL, int(y + reach) // _CELL + 1)
        columns = slice(int(x - reach) // _CELL, int(x + reach) // _CELL + 1)
        if taken[rows, columns].any():
            continue
        x0, y0, x1, y1 = stamp(terrain.pixels, sprite, x, y, angle, terrain.sun)
        taken[int(y0) // _CELL : int(y1) // _CELL + 1, int(x0) // _CELL : int(x1) // _CELL + 1] = True
        return Box(wanted.label_id, x0, y0, x1, y1)
    return None


def _choose_spot(
    rng: np.random.Generator, terrain: Terrain, habitat: Habitat, left: int, top: int
) -> tuple[float, float, float]:
    """Choose x, y and heading: for vehicles mostly along a road in the tile, for all others anywhere."""
    x, y = rng.uniform(left, left + TILE_SIZE), rng.uniform(top, top + TILE_SIZE)
    angle = rng.uniform(0, 2 * np.pi)
    if habitat == "roadside" and terrain.roads and rng.random() < 0.6:
        road = terrain.roads[rng.integers(len(terrain.roads))]
        lane = rng.choice([-1, 1]) * road.width / 4
        spot = road.start + rng.random() * (road.end - road.start)
        spot += lane * np.array([-np.sin(road.heading), np.cos(road.heading)])
        if left <= spot[0] < left + TILE_SIZE and top <= spot[1] < top + TILE_SIZE:
            return float(spot[0]), float(spot[1]), road.heading + (np.pi if lane > 0 else 0) + rng.normal(0, 0.05)
    return float(x), float(y), float(angle)


def _is_habitat(terrain: Terrain, habitat: Habitat, x: float, y: float) -> bool:
    wet, paved = terrain.water[int(y), int(x)], terrain.paved[int(y), int(x)]
    if habitat == "water":
        return bool(wet)
    if habitat == "land":
        return not wet and not paved
    return habitat == "anywhere" or not wet

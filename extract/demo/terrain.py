"""Paint the ground of a synthetic scene (fields, soil, water, roads, trees), and simulate light and sensor."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .sprites import Part, Pixels, Sprite, ellipse, jitter_colour, rectangle, shade, stamp

Mask = npt.NDArray[np.bool_]

_GREENS = [(92, 108, 62), (66, 86, 50), (108, 98, 72)]
_GROUNDS = [*_GREENS, (150, 138, 98), (132, 104, 78), (140, 138, 134), (176, 162, 130)]
_WATERS = [(38, 62, 76), (52, 78, 74), (30, 44, 60), (70, 88, 84)]
_ASPHALTS = [(88, 88, 90), (112, 110, 106), (140, 134, 124)]
_CLUTTER_PER_TILE = 3.0


@dataclass(frozen=True)
class Road:
    """A straight piece of road."""

    start: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    width: float

    @property
    def heading(self) -> float:
        """Direction in radians."""
        along = self.end - self.start
        return float(np.arctan2(along[1], along[0]))


@dataclass
class Terrain:
    """Ground to place objects on.

    Attributes:
        pixels: (S, S, 3) float32; objects are drawn into it.
        water: (S, S) bool.
        paved: (S, S) bool, the roads.
        roads: straight pieces of the roads.
        sun: direction of shadows in radians.
    """

    pixels: Pixels
    water: Mask
    paved: Mask
    roads: list[Road]
    sun: float


def paint_terrain(rng: np.random.Generator, size: int) -> Terrain:
    """Paint a square of ground, `size` pixels a side."""
    pixels = _paint_fields(rng, size)
    water = _flood(rng, pixels)
    roads, paved = _build_roads(rng, pixels, water)
    terrain = Terrain(pixels, water, paved, roads, sun=rng.uniform(0, 2 * np.pi))
    _scatter_clutter(rng, terrain)
    return terrain


def develop(rng: np.random.Generator, pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Return the scene as a sensor sees it, (S, S, 3) uint8, under random light, colour, contrast, haze and noise."""
    size = len(pixels)
    light = rng.uniform(0.72, 1.15) + rng.uniform(0.02, 0.10) * make_noise(rng, size, 3)
    cast = rng.normal(1, 0.035, 3).astype(np.float32)
    contrast, haze = rng.uniform(0.75, 1.15), rng.uniform(0, 24)
    # (seen * light * cast - 110) * contrast + 110 + haze, in as few passes over the image as possible
    grain = rng.integers(-128, 128, (size, size), np.int8) * np.float32(rng.uniform(0.01, 0.04))
    seen = pixels * light[..., None]
    seen *= cast * np.float32(contrast)
    seen += (grain + np.float32(110 - 110 * contrast + haze))[..., None]
    np.clip(seen, 0, 255, out=seen)
    return seen.astype(np.uint8)


def make_noise(rng: np.random.Generator, size: int, cells: int) -> npt.NDArray[np.float32]:
    """Make (size, size) smooth noise of about unit variance, with `cells` bumps a side."""
    bumps = Image.fromarray(rng.standard_normal((cells + 2, cells + 2), np.float32))
    method = Image.Resampling.BICUBIC if cells < 50 else Image.Resampling.BILINEAR
    return np.asarray(bumps.resize((size, size), method))


def _paint_fields(rng: np.random.Generator, size: int) -> Pixels:
    """Paint a patchwork of fields, some ploughed, on uneven ground."""
    axis = np.arange(size, dtype=np.float32)
    angle = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    width, height = rng.uniform(90, 400, 2).astype(np.float32)
    u = (axis * cos + (axis * sin)[:, None] + 12 * make_noise(rng, size, 4)) / width
    v = (axis * cos)[:, None] - axis * sin
    plots = (u.astype(np.int32) * 31 + (v / height).astype(np.int32) * 17) & 63
    chosen = rng.choice(len(_GROUNDS), 3, replace=False)
    colours = np.array([jitter_colour(rng, _GROUNDS[rng.choice(chosen)], 9) for _ in range(64)], np.float32)
    furrows = (rng.uniform(0, 5, 64) * (rng.random(64) < 0.5)).astype(np.float32)
    relief = np.sin(v * np.float32(rng.uniform(0.5, 1.3))) * furrows[plots]
    for cells, strength in ((12, 7), (90, 3), (400, 3)):
        relief += strength * make_noise(rng, size, cells)
    pixels: Pixels = colours[plots]
    pixels += relief[..., None]
    return pixels


def _flood(rng: np.random.Generator, pixels: Pixels) -> Mask:
    """Paint lakes and shores into `pixels`, in about two of three scenes; return the water."""
    size = len(pixels)
    if rng.random() > 0.65:
        return np.zeros((size, size), bool)
    depth = make_noise(rng, size, 4) + 0.12 * make_noise(rng, size, 24)
    level = np.quantile(depth[::16, ::16], 1 - rng.uniform(0.2, 0.55))
    water: Mask = depth > level
    beach = (depth > level - 0.08) & ~water
    pixels[beach] += np.float32(rng.uniform(10, 35))
    ripples = make_noise(rng, size, 200) * np.float32(rng.uniform(1, 5))
    colour = np.array(jitter_colour(rng, _WATERS[rng.integers(len(_WATERS))], 8), np.float32)
    pixels[water] = colour + ripples[water][:, None]
    return water


def _build_roads(rng: np.random.Generator, pixels: Pixels, water: Mask) -> tuple[list[Road], Mask]:
    """Paint one to four bent roads across the scene; over water they are bridges or causeways."""
    size = len(pixels)
    roads: list[Road] = []
    surface, marking = Image.new("L", (size, size)), Image.new("L", (size, size))
    draw_surface, draw_marking = ImageDraw.Draw(surface), ImageDraw.Draw(marking)
    for _ in range(rng.integers(1, 5)):
        turn, offset, width = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35) * size, rng.uniform(10, 20)
        along = np.array([np.cos(turn), np.sin(turn)])
        across = np.array([-along[1], along[0]])
        steps = np.linspace(-0.75, 0.75, 5)
        nodes = [size / 2 + along * size * s + across * (offset + rng.normal(0, 0.05 * size)) for s in steps]
        corners = [(float(x), float(y)) for x, y in nodes]
        draw_surface.line(corners, fill=255, width=round(width), joint="curve")
        if width > 14:
            draw_marking.line(corners, fill=255, width=1)
        roads += [Road(a, b, float(width)) for a, b in pairwise(nodes)]
    paved = np.asarray(surface) > 0
    colour = np.array(jitter_colour(rng, _ASPHALTS[rng.integers(len(_ASPHALTS))], 8), np.float32)
    pixels[paved] = 0.25 * pixels[paved] + 0.75 * colour
    pixels[(np.asarray(marking) > 0)] += 45
    water &= ~paved
    return roads, paved


def _scatter_clutter(rng: np.random.Generator, terrain: Terrain) -> None:
    """Add trees, rocks and bright slabs without labels, which a classifier must learn to ignore."""
    size = len(terrain.pixels)
    for _ in range(rng.poisson(_CLUTTER_PER_TILE * (size / 256) ** 2)):
        x, y = rng.uniform(0, size, 2)
        if terrain.water[int(y), int(x)] or terrain.paved[int(y), int(x)]:
            continue
        drawn = (_draw_tree, _draw_tree, _draw_rock, _draw_slab)[rng.integers(4)](rng)
        stamp(terrain.pixels, drawn, x, y, rng.uniform(0, 2 * np.pi), terrain.sun)


def _draw_tree(rng: np.random.Generator) -> Sprite:
    size = rng.uniform(4, 14)
    leaves = jitter_colour(rng, (54, 76, 44), 10)
    crown = ellipse(size, size, corners=9) * rng.uniform(0.7, 1.1, (9, 1))
    light = ellipse(size / 2, size / 2, x=size / 8, corners=7)
    return Sprite((Part(crown, leaves), Part(light, shade(leaves, 1.2))), height=size / 3)


def _draw_rock(rng: np.random.Generator) -> Sprite:
    size = rng.uniform(2, 7)
    outline = ellipse(size, size * rng.uniform(0.5, 1), corners=6) * rng.uniform(0.6, 1.2, (6, 1))
    return Sprite((Part(outline, jitter_colour(rng, (150, 140, 128), 20)),), height=1)


def _draw_slab(rng: np.random.Generator) -> Sprite:
    ground = jitter_colour(rng, _GROUNDS[rng.integers(len(_GROUNDS))], 25)
    return Sprite((Part(rectangle(rng.uniform(5, 26), rng.uniform(3, 12)), ground),))

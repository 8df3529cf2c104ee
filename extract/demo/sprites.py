"""Describe objects seen from above as coloured polygons, and draw them onto an image."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.float32]
"""(H, W, 3) float32 on 0..255."""
Points = npt.NDArray[np.float64]
"""(n, 2) x and y in pixels of a tile; the object's centre is at 0, its length along x."""
Colour = tuple[int, int, int]

_OVERSAMPLING = 4
_SHADOW_DARKNESS = 0.6


@dataclass(frozen=True)
class Part:
    """One filled polygon of an object. A part without a colour cuts a hole into the parts before it."""

    points: Points
    colour: Colour | None


@dataclass(frozen=True)
class Sprite:
    """An object: its parts from the ground up, and the length of its shadow in pixels."""

    parts: tuple[Part, ...]
    height: float = 0.0


DrawSprite = Callable[[np.random.Generator], Sprite]


def rectangle(length: float, width: float, *, x: float = 0.0, y: float = 0.0, angle: float = 0.0) -> Points:
    """Return the corners of a rectangle centred on (x, y), rotated by `angle` radians."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (length / 2, width / 2)
    turned: Points = rotate(corners, angle) + np.array((x, y))
    return turned


def ellipse(length: float, width: float, *, x: float = 0.0, y: float = 0.0, corners: int = 16) -> Points:
    """Return the outline of an ellipse centred on (x, y)."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(turn) * length / 2 + x, np.sin(turn) * width / 2 + y], axis=1)


def rotate(points: Points, angle: float) -> Points:
    """Rotate points about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(points @ np.array([(cos, sin), (-sin, cos)]))


def scale(sprite: Sprite, factor: float) -> Sprite:
    """Scale an object by a factor."""
    parts = tuple(Part(part.points * factor, part.colour) for part in sprite.parts)
    return Sprite(parts, sprite.height * factor)


def jitter_colour(rng: np.random.Generator, base: npt.ArrayLike, spread: float = 12.0) -> Colour:
    """Return a colour near `base`: brightness and hue vary separately, as with paint and dirt."""
    values = np.asarray(base) + rng.normal(0, spread) + rng.normal(0, spread / 2, 3)
    red, green, blue = np.clip(np.rint(values), 0, 255).astype(int).tolist()
    return red, green, blue


def shade(colour: Colour, factor: float) -> Colour:
    """Return the colour in more or less light."""
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue


def stamp(
    pixels: Pixels, sprite: Sprite, x: float, y: float, angle: float, sun: float
) -> tuple[float, float, float, float]:
    """Draw an object and its shadow into `pixels`, in place and antialiased.

    Args:
        x, y: its centre in pixels.
        angle: its heading in radians.
        sun: the direction of shadows in radians.

    Returns:
        Left, top, right and bottom of its outline, without the shadow but with parts outside the image.
    """
    outlines = [rotate(part.points, angle) + np.array((x, y)) for part in sprite.parts]
    everything = np.concatenate(outlines)
    low, high = everything.min(axis=0), everything.max(axis=0)
    fall = sprite.height * np.array([np.cos(sun), np.sin(sun)])
    left, top = np.maximum(np.floor(np.minimum(low, low + fall)).astype(int) - 1, 0).tolist()
    right, bottom = (np.ceil(np.maximum(high, high + fall)).astype(int) + 1).tolist()
    right, bottom = min(right, pixels.shape[1]), min(bottom, pixels.shape[0])
    if left < right and top < bottom:
        region = pixels[top:bottom, left:right]
        origin = np.array([left, top])
        if sprite.height > 0:
            region *= 1 - _SHADOW_DARKNESS * _cover_shadow(region, [o - origin for o in outlines], fall)
        paint, cover = _cover_parts(region, [o - origin for o in outlines], sprite.parts)
        region *= 1 - cover
        region += paint
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _cover_shadow(region: Pixels, outlines: list[Points], fall: Points) -> Pixels:
    """Return (H, W, 1), the share of each pixel that lies in the shadow of the outlines."""
    mask = Image.new("L", _oversampled(region))
    draw = ImageDraw.Draw(mask)
    # The shadow of an upright object is its outline moved along the ground; steps of two pixels leave no visible gaps.
    steps = max(2, int(np.hypot(*fall) / 2) + 1)
    for step in np.linspace(0, 1, steps):
        for outline in outlines:
            draw.polygon(_corners(outline + fall * step), fill=255)
    return _read_cover(mask)


def _cover_parts(region: Pixels, outlines: list[Points], parts: tuple[Part, ...]) -> tuple[Pixels, Pixels]:
    """Return (H, W, 3) paint weighted by its cover, and (H, W, 1) cover on 0..1."""
    paint, mask = Image.new("RGB", _oversampled(region)), Image.new("L", _oversampled(region))
    draw_paint, draw_mask = ImageDraw.Draw(paint), ImageDraw.Draw(mask)
    for outline, part in zip(outlines, parts, strict=True):
        corners = _corners(outline)
        draw_paint.polygon(corners, fill=part.colour or (0, 0, 0))
        draw_mask.polygon(corners, fill=0 if part.colour is None else 255)
    return np.asarray(paint.reduce(_OVERSAMPLING), np.float32), _read_cover(mask)


def _read_cover(mask: Image.Image) -> Pixels:
    """Reduce a mask to (H, W, 1) on 0..1 at the image's resolution."""
    return np.asarray(mask.reduce(_OVERSAMPLING), np.float32)[..., None] / np.float32(255)


def _oversampled(region: Pixels) -> tuple[int, int]:
    return region.shape[1] * _OVERSAMPLING, region.shape[0] * _OVERSAMPLING


def _corners(outline: Points) -> list[tuple[float, float]]:
    # In Pillow integers are pixel centres; subtracting half a pixel makes them pixel corners, as in boxes.
    return [(x, y) for x, y in (outline * _OVERSAMPLING - 0.5).tolist()]

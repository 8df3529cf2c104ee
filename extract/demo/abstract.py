"""What the demo backbone was pre-trained on: twenty-four abstract shapes, none of them a class of the demo."""

import numpy as np

from .sprites import Colour, DrawSprite, Part, Points, Sprite, ellipse, jitter_colour, rectangle, rotate, scale, shade
from .vocabulary import Habitat, ObjectClass, Vocabulary


def _paint(rng: np.random.Generator) -> Colour:
    return jitter_colour(rng, rng.uniform(30, 235, 3) * 0.5 + rng.uniform(30, 235) * 0.5, 10)


def _fan(angles: list[float], radii: list[float]) -> Points:
    return np.array([(r * np.cos(a), r * np.sin(a)) for a, r in zip(angles, radii, strict=True)])


def _star(points: int, inner: float) -> Points:
    angles = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False).tolist()
    return _fan(angles, [0.5 if i % 2 == 0 else inner for i in range(2 * points)])


def _stencil(*outlines: Points) -> DrawSprite:
    """A class of one colour: these outlines, in units of its size."""

    def draw(rng: np.random.Generator) -> Sprite:
        paint = _paint(rng)
        return Sprite(tuple(Part(outline, paint) for outline in outlines), height=rng.uniform(0, 0.5))

    return _resize(draw)


def _two_tone(ground: Points, *marks: Points) -> DrawSprite:
    """A class of two colours: marks on a ground."""

    def draw(rng: np.random.Generator) -> Sprite:
        paint = _paint(rng)
        other = _paint(rng) if rng.random() < 0.5 else shade(paint, rng.choice([0.5, 0.65, 1.4]))
        parts = (Part(ground, paint), *(Part(mark, other) for mark in marks))
        return Sprite(parts, height=rng.uniform(0, 0.4))

    return _resize(draw)


def _cut(ground: Points, *holes: Points) -> DrawSprite:
    """A class of one colour with holes in it."""

    def draw(rng: np.random.Generator) -> Sprite:
        parts = (Part(ground, _paint(rng)), *(Part(hole, None) for hole in holes))
        return Sprite(parts, height=rng.uniform(0, 0.3))

    return _resize(draw)


def _resize(draw: DrawSprite) -> DrawSprite:
    """Small ones are common: sizes are even on a logarithmic scale, proportions vary a little."""

    def draw_sized(rng: np.random.Generator) -> Sprite:
        sized = scale(draw(rng), float(np.exp(rng.uniform(np.log(7), np.log(30)))))
        stretch = (1.0, rng.uniform(0.8, 1.2))
        return Sprite(tuple(Part(part.points * stretch, part.colour) for part in sized.parts), sized.height)

    return draw_sized


_BAR = rectangle(1, 0.2)
_SHAPES: dict[str, DrawSprite] = {
    "cross": _stencil(_BAR, rotate(_BAR, np.pi / 2)),
    "tee": _stencil(_BAR, rectangle(0.2, 0.7, y=0.3)),
    "ell": _stencil(_BAR, rectangle(0.2, 0.7, x=-0.4, y=0.3)),
    "fork": _stencil(rectangle(0.2, 0.9), *(rectangle(0.8, 0.14, x=0.45, y=y) for y in (-0.38, 0, 0.38))),
    "chevron": _stencil(np.array([(0.5, 0), (-0.3, 0.5), (-0.5, 0.3), (0.1, 0), (-0.5, -0.3), (-0.3, -0.5)])),
    "arrow": _stencil(rectangle(0.6, 0.16, x=-0.2), np.array([(0.5, 0), (0.05, 0.32), (0.05, -0.32)])),
    "triangle": _stencil(np.array([(0.5, 0), (-0.4, 0.42), (-0.4, -0.42)])),
    "diamond": _stencil(np.array([(0.5, 0), (0, 0.28), (-0.5, 0), (0, -0.28)])),
    "star": _stencil(_star(5, 0.2)),
    "gear": _two_tone(_star(9, 0.36), ellipse(0.35, 0.35)),
    "hourglass": _stencil(np.array([(0.5, 0.35), (0.5, -0.35), (0, 0), (-0.5, 0.35), (-0.5, -0.35), (0, 0)])),
    "dumbbell": _stencil(ellipse(0.36, 0.36, x=-0.32), ellipse(0.36, 0.36, x=0.32), rectangle(0.6, 0.12)),
    "pill": _two_tone(ellipse(1, 0.36), rectangle(0.08, 0.36)),
    "zigzag": _stencil(
        np.array([(-0.5, -0.2), (-0.2, 0.2), (0.1, -0.2), (0.4, 0.2), (0.5, 0), (0.1, -0.45), (-0.2, 0), (-0.4, -0.4)])
    ),
    "ring": _cut(ellipse(0.9, 0.9), ellipse(0.5, 0.5)),
    "frame": _cut(rectangle(0.9, 0.7), rectangle(0.56, 0.36)),
    "crescent": _cut(ellipse(0.9, 0.9), ellipse(0.75, 0.75, x=0.25)),
    "half disc": _cut(ellipse(0.9, 0.9), rectangle(0.5, 1.0, x=0.27)),
    "target": _two_tone(ellipse(0.9, 0.9), ellipse(0.4, 0.4)),
    "barred": _two_tone(rectangle(1, 0.5), *(rectangle(0.12, 0.5, x=x) for x in (-0.32, 0, 0.32))),
    "chequered": _two_tone(
        rectangle(0.9, 0.9), rectangle(0.45, 0.45, x=-0.22, y=-0.22), rectangle(0.45, 0.45, x=0.22, y=0.22)
    ),
    "dotted": _two_tone(rectangle(0.9, 0.6), ellipse(0.24, 0.24, x=-0.25), ellipse(0.24, 0.24, x=0.25)),
    "capped": _two_tone(rectangle(1, 0.4), rectangle(0.22, 0.4, x=0.39)),
    "split": _two_tone(rectangle(0.9, 0.6), np.array([(-0.45, -0.3), (0.45, 0.3), (-0.45, 0.3)])),
}

PRETRAIN = Vocabulary(
    "pretrain",
    tuple(
        ObjectClass(label_id, name, draw, Habitat.ANYWHERE, rate=0.14, extra=0.4)
        for label_id, (name, draw) in enumerate(_SHAPES.items())
    ),
)
"""Label ids count from 0 and mean nothing outside pre-training."""

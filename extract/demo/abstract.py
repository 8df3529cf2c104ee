"""Draw the 24 abstract shapes that the demo backbone is pre-trained on; none of them is a class of the demo."""

from collections.abc import Callable

import numpy as np

from .sprites import Colour, Part, Points, Sprite, ellipse, jitter_colour, rectangle, rotate, scale, shade
from .vocabulary import ObjectClass, Vocabulary

_PAINTS = [(222, 220, 214), (52, 54, 62), (176, 62, 50), (58, 92, 160), (208, 172, 62), (70, 140, 96)]
_SIZES = [(8, 14), (12, 22), (18, 36)]
_ODD_PAINT = 0.2
"""Share of objects whose colour is not that of their class."""

Draw = Callable[[Colour, np.random.Generator], Sprite]


def _fan(angles: list[float], radii: list[float]) -> Points:
    return np.array([(r * np.cos(a), r * np.sin(a)) for a, r in zip(angles, radii, strict=True)])


def _star(points: int, inner: float) -> Points:
    angles = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False).tolist()
    return _fan(angles, [0.5 if i % 2 == 0 else inner for i in range(2 * points)])


def _stencil(*outlines: Points) -> Draw:
    """Make a shape of one colour from outlines in units of its size."""
    return lambda paint, rng: Sprite(tuple(Part(outline, paint) for outline in outlines), rng.uniform(0, 0.5))


def _two_tone(ground: Points, *marks: Points) -> Draw:
    """Make a shape of two colours: marks on a ground."""

    def draw(paint: Colour, rng: np.random.Generator) -> Sprite:
        other = shade(paint, rng.choice([0.5, 0.65, 1.4]))
        return Sprite((Part(ground, paint), *(Part(mark, other) for mark in marks)), rng.uniform(0, 0.4))

    return draw


def _cut(ground: Points, *holes: Points) -> Draw:
    """Make a shape of one colour with holes."""
    parts = [Part(hole, None) for hole in holes]
    return lambda paint, rng: Sprite((Part(ground, paint), *parts), rng.uniform(0, 0.3))


def _make_class(label_id: int, name: str, draw: Draw) -> ObjectClass:
    """Make a class with a shape, a range of sizes and a usual colour, as vehicles and buildings have.

    Classes share colours and sizes, so only the shape decides. But without colour and size as hints, so small a
    transformer learns nothing in its short training.
    """
    usual, low, high = _PAINTS[label_id % len(_PAINTS)], *_SIZES[label_id // len(_PAINTS) % len(_SIZES)]

    def draw_one(rng: np.random.Generator) -> Sprite:
        odd = rng.random() < _ODD_PAINT
        paint = jitter_colour(rng, _PAINTS[rng.integers(len(_PAINTS))] if odd else usual)
        sized = scale(draw(paint, rng), float(np.exp(rng.uniform(np.log(low), np.log(high)))))
        stretch = (1.0, rng.uniform(0.8, 1.2))
        return Sprite(tuple(Part(part.points * stretch, part.colour) for part in sized.parts), sized.height)

    return ObjectClass(label_id, name, draw_one, "anywhere", rate=0.2, extra=0.4)


_BAR = rectangle(1, 0.2)
_SHAPES: dict[str, Draw] = {
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

PRETRAIN = Vocabulary("pretrain", tuple(_make_class(i, name, draw) for i, (name, draw) in enumerate(_SHAPES.items())))
"""Label ids count from 0 and mean nothing outside pre-training."""

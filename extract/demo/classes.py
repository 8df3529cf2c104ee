"""Draw the demo's seventeen xView classes, about as common or rare as in real images."""

import numpy as np

from .sprites import Colour, Part, Points, Sprite, ellipse, jitter_colour, rectangle, shade
from .vocabulary import ObjectClass, Vocabulary

_GREYS = [(225, 225, 222), (190, 192, 196), (60, 62, 68), (120, 122, 124)]
_PAINTS = [*_GREYS, (150, 40, 38), (48, 70, 130), (200, 180, 60)]
_ROOFS = [(150, 92, 74), (170, 166, 158), (112, 108, 106), (196, 190, 178), (120, 84, 66), (88, 96, 104)]
_BOXES = [(160, 62, 48), (52, 88, 130), (66, 110, 78), (188, 150, 70), (170, 170, 168), (110, 58, 52)]
_WHITE: Colour = (228, 228, 224)
_GLASS: Colour = (46, 52, 60)


def _pick(rng: np.random.Generator, colours: list[tuple[int, int, int]], spread: float = 12.0) -> Colour:
    return jitter_colour(rng, colours[rng.integers(len(colours))], spread)


def _draw_building(rng: np.random.Generator) -> Sprite:
    length, width = rng.uniform(22, 52), rng.uniform(16, 30)
    roof = _pick(rng, _ROOFS)
    parts = [Part(rectangle(length, width), roof)]
    style = rng.integers(3)
    if style == 0:  # pitched: one half in the light
        parts.append(Part(rectangle(length, width / 2, y=width / 4), shade(roof, 0.8)))
    elif style == 1:  # flat, with a wing and plant on the roof
        wing = rng.uniform(0.4, 0.8) * width
        parts.append(Part(rectangle(width * 0.6, wing, x=length * 0.3, y=width / 2 + wing / 2), roof))
        parts += [Part(rectangle(4, 3, x=x, y=2), shade(roof, 0.7)) for x in rng.uniform(-length / 3, length / 3, 3)]
    else:  # flat, with a parapet
        parts.append(Part(rectangle(length - 4, width - 4), shade(roof, 0.86)))
    return Sprite(tuple(parts), height=rng.uniform(4, 10))


def _draw_shed(rng: np.random.Generator) -> Sprite:
    length, width = rng.uniform(10, 16), rng.uniform(8, 11)
    roof = _pick(rng, [(176, 178, 180), (120, 130, 122), (140, 100, 78)])
    ribs = [Part(rectangle(0.8, width, x=x), shade(roof, 0.8)) for x in np.arange(-length / 2 + 2, length / 2, 3)]
    return Sprite((Part(rectangle(length, width), roof), *ribs), height=3)


def _draw_tent(rng: np.random.Generator) -> Sprite:
    size = rng.uniform(7, 12)
    cloth = _pick(rng, [(226, 222, 208), (150, 146, 110), (84, 110, 150)])
    square = rectangle(size, size * rng.uniform(0.8, 1.2))
    sides = [
        Part(np.array([(0.0, 0.0), square[i], square[(i + 1) % 4]]), shade(cloth, light))
        for i, light in enumerate((1.0, 0.82, 0.66, 0.86))
    ]
    return Sprite(tuple(sides), height=2)


def _draw_small_car(rng: np.random.Generator) -> Sprite:
    paint = _pick(rng, _PAINTS)
    parts = (
        Part(rectangle(9, 4.4), paint),
        Part(rectangle(2, 3.8, x=1.4), _GLASS),
        Part(rectangle(1.4, 3.6, x=-3.0), _GLASS),
    )
    return Sprite(parts, height=1.5)


def _draw_bus(rng: np.random.Generator) -> Sprite:
    paint = _pick(rng, [(224, 222, 214), (206, 160, 50), (150, 52, 48), (70, 110, 150)])
    roof = [Part(rectangle(2.4, 2.4, x=x), shade(paint, 0.72)) for x in (-5, 0.5, 5)]
    parts = (Part(rectangle(20, 5.6), paint), *roof, Part(rectangle(1, 5.2, x=9.2), _GLASS))
    return Sprite(parts, height=2.5)


def _draw_cargo_truck(rng: np.random.Generator) -> Sprite:
    cab, load = _pick(rng, _PAINTS), _pick(rng, [(206, 204, 198), (150, 140, 116), (110, 116, 112), (96, 72, 56)])
    parts = (
        Part(rectangle(12, 6, x=-3), load),
        Part(rectangle(1, 6, x=-3), shade(load, 0.8)),
        Part(rectangle(1.4, 4, x=3.6), (52, 50, 48)),
        Part(rectangle(4.4, 5.4, x=6.4), cab),
        Part(rectangle(1.2, 5, x=7.4), _GLASS),
    )
    return Sprite(parts, height=2.5)


def _draw_container(rng: np.random.Generator) -> Sprite:
    paint = _pick(rng, _BOXES)
    ribs = [Part(rectangle(0.6, 4.8, x=x), shade(paint, 0.78)) for x in np.arange(-5, 6, 2.0)]
    return Sprite((Part(rectangle(13, 5), paint), *ribs), height=2)


def _draw_tank(rng: np.random.Generator) -> Sprite:
    size = rng.uniform(13, 24)
    paint = _pick(rng, [(222, 222, 216), (170, 168, 160), (196, 186, 164)])
    parts = (
        Part(ellipse(size, size, corners=24), shade(paint, 0.78)),
        Part(ellipse(size - 2.4, size - 2.4, corners=24), paint),
        Part(rectangle(size * 0.45, 0.9, x=size * 0.22), shade(paint, 0.6)),
    )
    return Sprite(parts, height=5)


def _draw_helipad(rng: np.random.Generator) -> Sprite:
    size = rng.uniform(17, 24)
    ground = _pick(rng, [(120, 122, 122), (96, 104, 100), (150, 148, 142)])
    bars = [rectangle(size * 0.5, 1.8, y=-size * 0.17), rectangle(size * 0.5, 1.8, y=size * 0.17)]
    bars.append(rectangle(1.8, size * 0.34))
    parts = (
        Part(ellipse(size, size, corners=24), _WHITE),
        Part(ellipse(size - 2.6, size - 2.6, corners=24), ground),
        *(Part(bar, _WHITE) for bar in bars),
    )
    return Sprite(parts)


def _draw_hull(length: float, width: float) -> Points:
    """Return a boat's outline, its bow along x."""
    side = [(-0.5, -0.38), (0.1, -0.5), (0.32, -0.36), (0.5, 0.0), (0.32, 0.36), (0.1, 0.5), (-0.5, 0.38)]
    return np.array(side) * (length, width)


def _draw_motorboat(rng: np.random.Generator) -> Sprite:
    paint = _pick(rng, [(224, 224, 220), (190, 60, 50), (60, 90, 140), (210, 200, 170)])
    deck = Part(rectangle(3.6, 2.6, x=-1.6), shade(paint, 0.6))
    return Sprite((Part(_draw_hull(11, 4.4), paint), deck, Part(rectangle(1, 3.4, x=1.2), _GLASS)), height=1)


def _draw_sailboat(rng: np.random.Generator) -> Sprite:
    swing = rng.uniform(0.15, 0.7) * rng.choice([-1, 1])
    tip = np.array([-7.5 * np.cos(swing), -7.5 * np.sin(swing)])
    sail = np.array([(2.0, 0.0), (tip[0] + 2, tip[1]), (tip[0] * 0.5 + 2, tip[1] * 0.5 + 2.2 * np.sign(swing))])
    hull = _pick(rng, [(150, 120, 90), (210, 210, 206), (70, 80, 110)])
    parts = (Part(_draw_hull(13, 4.2), hull), Part(sail, jitter_colour(rng, (240, 238, 230), 5)))
    return Sprite(parts, height=5)


def _draw_barge(rng: np.random.Generator) -> Sprite:
    hull, load = _pick(rng, [(110, 72, 60), (84, 88, 92), (120, 112, 96)]), _pick(rng, _ROOFS, 18)
    holds = [Part(rectangle(5.4, 5.4, x=x), load) for x in (-6.5, -0.2, 6.1)]
    return Sprite((Part(rectangle(24, 8), hull), *holds, Part(rectangle(2, 5, x=10.6), _WHITE)), height=1.5)


def _draw_small_aircraft(rng: np.random.Generator) -> Sprite:
    paint = _pick(rng, [(230, 230, 228), (206, 206, 212), (214, 190, 120)], 8)
    wings = rectangle(3.2, 20, x=1.6)
    tail = rectangle(1.8, 7, x=-7)
    return Sprite((Part(ellipse(17, 2.8), paint), Part(wings, paint), Part(tail, shade(paint, 0.86))), height=2)


def _draw_helicopter(rng: np.random.Generator) -> Sprite:
    paint = _pick(rng, [(88, 100, 76), (206, 206, 200), (170, 60, 50), (60, 72, 100)])
    turn, blades = rng.uniform(0, np.pi), int(rng.integers(2, 4))
    rotor = [rectangle(17, 1.0, x=2, angle=turn + i * np.pi / blades) for i in range(blades)]
    parts = (
        Part(ellipse(9, 4.6, x=2), paint),
        Part(rectangle(9, 1.4, x=-6), paint),
        Part(rectangle(1.2, 4, x=-10), paint),
        *(Part(blade, (64, 64, 66)) for blade in rotor),
    )
    return Sprite(parts, height=3)


def _draw_excavator(rng: np.random.Generator) -> Sprite:
    paint = jitter_colour(rng, (206, 160, 46), 14)
    swing = rng.uniform(-0.9, 0.9)
    reach = np.array([np.cos(swing), np.sin(swing)])
    parts = (
        Part(rectangle(9, 2, y=-3), (58, 54, 50)),
        Part(rectangle(9, 2, y=3), (58, 54, 50)),
        Part(rectangle(6.4, 5, x=-0.6), paint),
        Part(rectangle(9, 1.6, x=reach[0] * 5.5, y=reach[1] * 5.5, angle=swing), shade(paint, 0.86)),
        Part(rectangle(2.4, 3, x=reach[0] * 10, y=reach[1] * 10, angle=swing), (74, 70, 66)),
    )
    return Sprite(parts, height=2)


def _draw_pylon(rng: np.random.Generator) -> Sprite:
    steel = jitter_colour(rng, (168, 170, 170), 14)
    legs = [rectangle(9, 1.0, angle=turn) for turn in (np.pi / 4, -np.pi / 4)]
    arms = [rectangle(1.0, width, x=x) for x, width in ((-2.0, 13.0), (2.0, 10.0))]
    return Sprite(tuple(Part(points, steel) for points in (*legs, *arms)), height=16)


def _draw_tower(rng: np.random.Generator) -> Sprite:
    size = rng.uniform(6, 9)
    steel = _pick(rng, [(196, 190, 182), (150, 72, 60), (120, 122, 126)])
    top = Part(ellipse(size * 0.5, size * 0.5, corners=8), shade(steel, 0.7))
    return Sprite((Part(rectangle(size, size), steel), top), height=20)


DEMO = Vocabulary(
    "demo",
    (
        ObjectClass(84, "Helipad", _draw_helipad, rate=0.035),
        ObjectClass(15, "Helicopter", _draw_helicopter, rate=0.040),
        ObjectClass(12, "Small Aircraft", _draw_small_aircraft, rate=0.050, extra=0.6),
        ObjectClass(94, "Tower", _draw_tower, rate=0.050),
        ObjectClass(93, "Pylon", _draw_pylon, rate=0.060, extra=0.3),
        ObjectClass(64, "Excavator", _draw_excavator, rate=0.070, extra=0.3),
        ObjectClass(71, "Hut/Tent", _draw_tent, rate=0.080, extra=1.5),
        ObjectClass(86, "Storage Tank", _draw_tank, rate=0.100, extra=1.2),
        ObjectClass(45, "Barge", _draw_barge, "water", rate=0.18),
        ObjectClass(42, "Sailboat", _draw_sailboat, "water", rate=0.25, extra=0.6),
        ObjectClass(41, "Motorboat", _draw_motorboat, "water", rate=0.35, extra=0.8),
        ObjectClass(72, "Shed", _draw_shed, rate=0.16, extra=0.4),
        ObjectClass(91, "Shipping Container", _draw_container, rate=0.13, extra=1.5),
        ObjectClass(19, "Bus", _draw_bus, "roadside", rate=0.16, extra=0.2),
        ObjectClass(24, "Cargo Truck", _draw_cargo_truck, "roadside", rate=0.24, extra=0.5),
        ObjectClass(73, "Building", _draw_building, rate=0.78, extra=1.6),
        ObjectClass(18, "Small Car", _draw_small_car, "roadside", rate=0.76, extra=3.0),
    ),
)
"""Label ids are xView type ids. `rate` is a share of the tiles, for boats of the tiles with water."""

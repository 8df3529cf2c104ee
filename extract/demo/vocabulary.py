"""Define vocabularies: the classes of a set of scenes. The two that exist share neither a class nor a seed."""

from dataclasses import dataclass
from typing import Literal

from .sprites import DrawSprite

Habitat = Literal["land", "water", "roadside", "anywhere"]
"""Where objects of a class are found."""


@dataclass(frozen=True)
class ObjectClass:
    """One class of objects.

    Attributes:
        label_id: id in label files.
        name: for people.
        draw: draws one object; no two are alike.
        habitat: where its objects are found.
        rate: approximate share of the tiles of its habitat that hold at least one.
        extra: average number of further objects in such a tile.
    """

    label_id: int
    name: str
    draw: DrawSprite
    habitat: Habitat = "land"
    rate: float = 0.1
    extra: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """Classes in the order of placement: large or rare ones first, while there is room. The name enters every seed."""

    name: str
    classes: tuple[ObjectClass, ...]

"""A vocabulary: the classes a set of scenes is drawn from. Two exist, and they share neither a class nor a seed."""

from dataclasses import dataclass
from enum import Enum

from .sprites import DrawSprite


class Habitat(Enum):
    """Where objects of a class are found."""

    LAND = "land"
    WATER = "water"
    ROADSIDE = "roadside"
    ANYWHERE = "anywhere"


@dataclass(frozen=True)
class ObjectClass:
    """One class of objects.

    Attributes:
        label_id: what its boxes carry.
        name: what it is called.
        draw: makes one of them; no two are alike.
        habitat: where it is found.
        rate: share of the tiles of its habitat that hold at least one, about.
        extra: how many more there are then, on average.
    """

    label_id: int
    name: str
    draw: DrawSprite
    habitat: Habitat = Habitat.LAND
    rate: float = 0.1
    extra: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """Classes, large or rare ones first: they are placed while there is room. The name is part of every seed."""

    name: str
    classes: tuple[ObjectClass, ...]

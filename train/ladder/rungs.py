"""The rungs of a ladder, from the cheapest model to the most expensive, and the record kept of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from train.errors import TrainError

RUNGS = "neighbours,linear,mlp,1,3,6,all"
NEIGHBOURS, LINEAR, MLP = "neighbours", "linear", "mlp"
_TITLES = {NEIGHBOURS: "nearest neighbours", LINEAR: "linear head", MLP: "MLP head"}

State = Literal["waiting", "running", "finished", "failed"]


@dataclass(frozen=True)
class Rung:
    """One model of a ladder.

    Attributes:
        name: `neighbours`, `linear`, `mlp` or `unfreeze-N`, also the name of its run.
        title: name to show.
        unfreeze: number of last layers to train; 0 trains on cached vectors.
    """

    name: str
    title: str
    unfreeze: int = 0


def choose_rungs(asked: str, depth: int) -> tuple[tuple[Rung, ...], tuple[str, ...]]:
    """Parse `--rungs`; return the rungs, cheapest first, and a line for the user on each one left out or merged.

    Args:
        asked: `neighbours`, `linear`, `mlp`, numbers of layers and `all`, separated by commas.
        depth: of the backbone, in layers.

    Raises:
        TrainError: a word is unknown, no rung is left, or the MLP that trained layers start from is missing.
    """
    chosen: dict[int | str, str] = {}  # rung to the word that named it first
    notes = []
    for word in filter(None, (part.strip() for part in asked.split(","))):
        key = word if word in _TITLES else _read_layers(word, depth, asked)
        if isinstance(key, int) and key > depth:
            notes.append(f"UNFREEZE={key} is left out: the backbone has {depth} layers")
        elif key in chosen:
            notes.append(f"{word} is the same rung as {chosen[key]}: it runs once")
        else:
            chosen[key] = word
    layers = sorted(key for key in chosen if isinstance(key, int))
    if not chosen:
        raise TrainError(f"--rungs {asked}: no rung is left ({'; '.join(notes) or 'none is named'}): try {RUNGS}")
    if layers and MLP not in chosen:
        raise TrainError(f"--rungs {asked}: trained layers start from the MLP head: add {MLP}")
    cached = [Rung(name, title) for name, title in _TITLES.items() if name in chosen]
    trained = [Rung(f"unfreeze-{n}", f"UNFREEZE={n}{' (all)' if n == depth else ''}", n) for n in layers]
    return (*cached, *trained), tuple(notes)


def _read_layers(word: str, depth: int, asked: str) -> int:
    if word == "all":
        return depth
    if not (word.isascii() and word.isdigit() and int(word)):
        raise TrainError(
            f"--rungs {asked}: {word} is no rung: choose from {', '.join(_TITLES)}, numbers of layers from 1, and all"
        )
    return int(word)


@dataclass
class Leg:
    """A process that ran a rung, or a part of it.

    Attributes:
        began: start time, seconds since 1970.
        seconds: duration, with start-up; None while it runs, or if the ladder itself died first.
        status: exit status; negative for a signal.
        peak_bytes: peak main memory of the process or of its largest child, whichever is more.
    """

    pid: int
    began: float
    seconds: float | None = None
    status: int | None = None
    peak_bytes: int | None = None


@dataclass
class Record:
    """The state of a rung.

    Attributes:
        error: why it failed, in one line.
        legs: processes that ran it; more than one if the ladder was resumed.
    """

    rung: Rung
    state: State = "waiting"
    error: str | None = None
    legs: list[Leg] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        """Total seconds of all legs."""
        return sum(leg.seconds or 0.0 for leg in self.legs)

    @property
    def peak_bytes(self) -> int:
        """Peak main memory over all legs."""
        return max((leg.peak_bytes or 0 for leg in self.legs), default=0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.rung), "state": self.state, "error": self.error, "legs": list(map(asdict, self.legs))}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        rung = Rung(value["name"], value["title"], value["unfreeze"])
        return cls(rung, value["state"], value["error"], [Leg(**leg) for leg in value["legs"]])

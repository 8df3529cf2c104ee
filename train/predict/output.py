"""Output formats of predictions: a CSV row, a JSON line or a GeoJSON polygon per tile."""

import csv
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TextIO

import numpy as np

from cache_schema import Status
from train.errors import TrainError
from train.model.augment import Views

from .inputs import Described

_BOUNDS = ("left", "top", "right", "bottom")


class Record(NamedTuple):
    """A row; `probs` have all digits of a float32, so that comparing them with the thresholds gives the decisions."""

    described: Described
    status: Status
    probs: list[str]
    decided: list[str]

    @property
    def bounds(self) -> dict[str, int]:
        """Edges of the window in its raster, in pixels; empty for a tile."""
        window = self.described.window
        if window is None:
            return {}
        edges = (window.left, window.top, window.left + window.width, window.top + window.height)
        return dict(zip(_BOUNDS, edges, strict=True))


def make_record(described: Described, status: Status, probs: Any, preds: Any, names: tuple[str, ...]) -> Record:
    """Make a row from (C,) float32 probabilities, NaN for an unreadable tile, and (C,) bool decisions."""
    cells = ["" if math.isnan(p) else f"{p:.9g}" for p in probs.tolist()]
    return Record(described, status, cells, [names[c] for c in np.flatnonzero(preds)])


@dataclass(frozen=True)
class Table:
    """What all rows share: class names, views, and whether any row is a window."""

    names: tuple[str, ...]
    tta: Views
    windows: bool

    @property
    def options(self) -> dict[str, str]:
        """Further columns that are the same in every row."""
        return {} if self.tta == "one" else {"tta": self.tta}


class Format(ABC):
    """Writes predictions to a stream; making one writes what comes before the first row.

    Attributes:
        rings: whether it needs the outlines of windows.
    """

    rings: ClassVar[bool] = True

    def __init__(self, stream: TextIO, table: Table) -> None:
        self._stream, self._table = stream, table

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write a row."""

    def end(self) -> None:  # noqa: B027
        """Write what comes after the last row."""


class _Csv(Format):
    """A row per tile: name, status, decided classes, then the calibrated probability of every class.

    Before the classes come a column `tta` if several views were averaged, and the edges of windows if there are any.
    """

    rings = False

    def __init__(self, stream: TextIO, table: Table) -> None:
        super().__init__(stream, table)
        self._writer = csv.writer(stream)
        self._bounds = _BOUNDS if table.windows else ()
        self._writer.writerow(["tile", "status", "preds", *table.options, *self._bounds, *table.names])

    def write(self, record: Record) -> None:
        start = [record.described.tile, record.status.name.lower(), ";".join(record.decided)]
        bounds = [record.bounds.get(name, "") for name in self._bounds]
        self._writer.writerow([*start, *self._table.options.values(), *bounds, *record.probs])


class _JsonLines(Format):
    """An object per tile: tile, status, preds (names), probs (by name), and for a window its edges and outline."""

    def write(self, record: Record) -> None:
        value = {**_begin_object(record, self._table), "probs": _read_probs(record, self._table)}
        if record.described.window is not None:
            value |= {"window": record.bounds, "ring": record.described.ring}
        self._stream.write(_dump(value) + "\n")


class _GeoJson(Format):
    """A polygon per window, with the columns of the CSV as its properties (RFC 7946)."""

    def __init__(self, stream: TextIO, table: Table) -> None:
        taken = {"tile", "status", "reason", "preds", "tta", *_BOUNDS} & set(table.names)
        if taken:
            raise TrainError(f"a class has the name of a GeoJSON property, {min(taken)!r}: write .jsonl instead")
        super().__init__(stream, table)
        self._rows = 0
        stream.write('{"type": "FeatureCollection", "features": [')

    def write(self, record: Record) -> None:
        probs = _read_probs(record, self._table) or dict.fromkeys(self._table.names)
        feature = {
            "type": "Feature",
            "id": record.described.tile,
            "geometry": {"type": "Polygon", "coordinates": [record.described.ring]},
            "properties": {**_begin_object(record, self._table), **record.bounds, **probs},
        }
        self._stream.write(("," if self._rows else "") + "\n" + _dump(feature))
        self._rows += 1

    def end(self) -> None:
        self._stream.write("\n]}\n")


def _begin_object(record: Record, table: Table) -> dict[str, Any]:
    read = record.status == Status.EMBEDDED
    return {
        "tile": record.described.tile,
        "status": record.status.name.lower(),
        **({} if read else {"reason": record.status.reason}),
        "preds": record.decided if read else None,
        **table.options,
    }


def _read_probs(record: Record, table: Table) -> dict[str, float] | None:
    if record.status != Status.EMBEDDED:
        return None
    return {name: float(cell) for name, cell in zip(table.names, record.probs, strict=True)}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


FORMATS: dict[str, type[Format]] = {".csv": _Csv, ".jsonl": _JsonLines, ".geojson": _GeoJson}

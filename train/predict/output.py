"""How predictions are written: a row for each tile as CSV, an object as JSON lines, a polygon as GeoJSON."""

import csv
import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np

from cache_schema import Status
from train.errors import TrainError
from train.model.augment import Views

from .inputs import Described

_BOUNDS = ("left", "top", "right", "bottom")


class Record(NamedTuple):
    """A row; `probs` in every digit of a float32, so that comparing with thresholds gives the decisions."""

    described: Described
    status: Status
    probs: list[str]
    decided: list[str]

    @property
    def bounds(self) -> dict[str, int]:
        """Where the window begins and ends in its raster, in pixels; nothing for a tile."""
        window = self.described.window
        if window is None:
            return {}
        edges = (window.left, window.top, window.left + window.width, window.top + window.height)
        return dict(zip(_BOUNDS, edges, strict=True))


def make_record(described: Described, status: Status, probs: Any, preds: Any, names: tuple[str, ...]) -> Record:
    """A row from (C,) float32 probabilities, NaN where there are none, and (C,) bool decisions."""
    cells = ["" if math.isnan(p) else f"{p:.9g}" for p in probs.tolist()]
    return Record(described, status, cells, [names[c] for c in np.flatnonzero(preds)])


@dataclass(frozen=True)
class Table:
    """What all rows have in common: class names, views, and whether there are windows among them."""

    names: tuple[str, ...]
    tta: Views
    windows: bool

    @property
    def used(self) -> dict[str, str]:
        return {} if self.tta == "one" else {"tta": self.tta}


class Format(Protocol):
    rings: bool
    """Whether it wants the outline of windows."""

    def __init__(self, stream: TextIO, table: Table) -> None:
        """Write what comes first."""

    def write(self, record: Record) -> None:
        """Write a row."""

    def end(self) -> None:
        """Write what comes last."""


class _Csv:
    """A row per tile: name, status, decided classes, then the calibrated probability of every class.

    Before the classes come a column `tta` if several views were averaged, and the edges of windows if there are any.
    """

    rings = False

    def __init__(self, stream: TextIO, table: Table) -> None:
        self._writer, self._table = csv.writer(stream), table
        self._bounds = _BOUNDS if table.windows else ()
        self._writer.writerow(["tile", "status", "preds", *table.used, *self._bounds, *table.names])

    def write(self, record: Record) -> None:
        start = [record.described.tile, record.status.name.lower(), ";".join(record.decided)]
        bounds = [record.bounds.get(name, "") for name in self._bounds]
        self._writer.writerow([*start, *self._table.used.values(), *bounds, *record.probs])

    def end(self) -> None:
        pass


class _JsonLines:
    """An object per tile: tile, status, preds (names), probs (by name), and of a window its edges and outline."""

    rings = True

    def __init__(self, stream: TextIO, table: Table) -> None:
        self._stream, self._table = stream, table

    def write(self, record: Record) -> None:
        value = {**_begin_object(record, self._table), "probs": _read_probs(record, self._table)}
        if record.described.window is not None:
            value |= {"window": record.bounds, "ring": record.described.ring}
        self._stream.write(_dump(value) + "\n")

    def end(self) -> None:
        pass


class _GeoJson:
    """RFC 7946: a polygon per window, with the columns of the CSV as its properties."""

    rings = True

    def __init__(self, stream: TextIO, table: Table) -> None:
        taken = {"tile", "status", "reason", "preds", "tta", *_BOUNDS} & set(table.names)
        if taken:
            raise TrainError(f"a class is called {min(taken)!r}, as a property of GeoJSON is: write .jsonl instead")
        self._stream, self._table, self._rows = stream, table, 0
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
        **table.used,
    }


def _read_probs(record: Record, table: Table) -> dict[str, float] | None:
    if record.status != Status.EMBEDDED:
        return None
    return {name: float(cell) for name, cell in zip(table.names, record.probs, strict=True)}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


FORMATS: dict[str, type[Format]] = {".csv": _Csv, ".jsonl": _JsonLines, ".geojson": _GeoJson}

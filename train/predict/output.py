"""Output formats of predictions: a CSV row, a JSON line or a GeoJSON polygon per tile."""

import csv
import json
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TextIO

import numpy as np

from cache_schema import Status
from train.errors import TrainError
from train.model.augment import Views

from .inputs import Described

_BOUNDS = ("left", "top", "right", "bottom")


class Format(ABC):
    """Writes predictions to a stream; call `begin`, then `write` for each row, then `end`.

    Probabilities have all digits of a float32, so that comparing them with the thresholds gives the decisions.

    Attributes:
        rings: whether it needs the outlines of windows.

    Args:
        names: C class names.
        tta: written to every row if several views were averaged.
        windows: whether any row is a window.
    """

    rings: ClassVar[bool] = True

    def __init__(self, stream: TextIO, names: tuple[str, ...], tta: Views, windows: bool) -> None:
        self._stream, self._names, self._windows = stream, names, windows
        self._options = {} if tta == "one" else {"tta": tta}

    def begin(self) -> None:  # noqa: B027
        """Write what comes before the first row."""

    @abstractmethod
    def write(self, described: Described, status: Status, probs: Any, preds: Any) -> None:
        """Write a row: (C,) float32 probabilities, NaN for an unreadable tile, and (C,) bool decisions."""

    def end(self) -> None:  # noqa: B027
        """Write what comes after the last row."""

    def _decided(self, preds: Any) -> list[str]:
        return [self._names[c] for c in np.flatnonzero(preds)]

    def _begin_object(self, described: Described, status: Status, preds: Any) -> dict[str, Any]:
        read = status == Status.EMBEDDED
        return {
            "tile": described.tile,
            "status": status.name.lower(),
            **({} if read else {"reason": status.reason}),
            "preds": self._decided(preds) if read else None,
            **self._options,
        }

    def _name_probs(self, status: Status, probs: Any) -> dict[str, float] | None:
        if status != Status.EMBEDDED:
            return None
        return {name: float(_format_prob(prob)) for name, prob in zip(self._names, probs.tolist(), strict=True)}


class _Csv(Format):
    """A row per tile: name, status, decided classes, then the calibrated probability of every class.

    Before the classes come a column `tta` if several views were averaged, and the edges of windows if there are any.
    """

    rings = False

    def begin(self) -> None:
        self._writer = csv.writer(self._stream)
        self._bounds = _BOUNDS if self._windows else ()
        self._writer.writerow(["tile", "status", "preds", *self._options, *self._bounds, *self._names])

    def write(self, described: Described, status: Status, probs: Any, preds: Any) -> None:
        start = [described.tile, status.name.lower(), ";".join(self._decided(preds))]
        bounds = _find_bounds(described)
        edges = [bounds.get(name, "") for name in self._bounds]
        self._writer.writerow([*start, *self._options.values(), *edges, *map(_format_prob, probs.tolist())])


class _JsonLines(Format):
    """An object per tile: tile, status, preds (names), probs (by name), and for a window its edges and outline."""

    def write(self, described: Described, status: Status, probs: Any, preds: Any) -> None:
        value = {**self._begin_object(described, status, preds), "probs": self._name_probs(status, probs)}
        if described.window is not None:
            value |= {"window": _find_bounds(described), "ring": described.ring}
        self._stream.write(_dump(value) + "\n")


class _GeoJson(Format):
    """A polygon per window, with the columns of the CSV as its properties (RFC 7946)."""

    def begin(self) -> None:
        taken = {"tile", "status", "reason", "preds", "tta", *_BOUNDS} & set(self._names)
        if taken:
            raise TrainError(f"a class has the name of a GeoJSON property, {min(taken)!r}: write .jsonl instead")
        self._stream.write('{"type": "FeatureCollection", "features": [')
        self._separator = "\n"

    def write(self, described: Described, status: Status, probs: Any, preds: Any) -> None:
        named = self._name_probs(status, probs) or dict.fromkeys(self._names)
        feature = {
            "type": "Feature",
            "id": described.tile,
            "geometry": {"type": "Polygon", "coordinates": [described.ring]},
            "properties": {**self._begin_object(described, status, preds), **_find_bounds(described), **named},
        }
        self._stream.write(self._separator + _dump(feature))
        self._separator = ",\n"

    def end(self) -> None:
        self._stream.write("\n]}\n")


def _find_bounds(described: Described) -> dict[str, int]:
    """Return the edges of a window in its raster, in pixels; nothing for a tile."""
    if (window := described.window) is None:
        return {}
    edges = (window.left, window.top, window.left + window.width, window.top + window.height)
    return dict(zip(_BOUNDS, edges, strict=True))


def _format_prob(prob: float) -> str:
    return "" if math.isnan(prob) else f"{prob:.9g}"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


FORMATS: dict[str, type[Format]] = {".csv": _Csv, ".jsonl": _JsonLines, ".geojson": _GeoJson}

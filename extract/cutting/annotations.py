"""Read xView's annotations: one GeoJSON of 600,000 features, parsed one by one and kept as five numbers each.

A feature's properties give its scene (`image_id`, such as `2355.tif`), class (`type_id`) and box in the scene
(`bounds_imcoords`, pixels, as `xmin,ymin,xmax,ymax`); its geometry is not needed. Source: Lam et al. 2018, "xView:
Objects in Context in Overhead Imagery", and the files themselves.

ijson 3.6 was tried in place of `_Scanner`: it is no faster, holds a string of any length, keeps a path per nesting
level (100,000 brackets exceed 4 GB), and ends at an integer above 64 bits anywhere in the file.
"""

import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cache_schema.taxonomy import Taxonomy
from extract.errors import AnnotationError
from extract.tiles.raster import RASTER_SUFFIXES

Boxes = npt.NDArray[np.float64]
"""(n, 5): type id, then left, top, right, bottom in pixels of the scene."""

MAX_VALUE_CHARACTERS = 16 * 2**20
"""Limit for one feature, or any other member of the file: a longer one is refused and not held in memory."""
_CHUNK_CHARACTERS = 2**20
_MAX_ID = 999_999_999
_MAX_COORDINATE = 2.0**31
_NUMBER = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_LONGEST_NUMBER = 64
_AFTER_VALUE = frozenset(" \t\r\n,:]}")
_BLANK = re.compile(r"[ \t\r\n]*")


class Defect(Enum):
    """Why a feature is dropped without a look at its scene. Users see the values, also as keys of the JSON result."""

    ARTEFACT = "ids 75 and 82, annotation artefacts"
    NO_PROPERTIES = "no properties"
    NO_SCENE = "image_id names no file"
    NO_ID = "type_id is no number"
    NO_BOUNDS = "bounds_imcoords are not four numbers"
    NO_AREA = "box is empty or inverted"
    REPEATED = "repeats another feature"


@dataclass
class Annotations:
    """The contents of an annotation file.

    Attributes:
        boxes: by scene (a file name without its suffix), in the order of the file. A scene all of whose features were
            dropped is included.
        features: number of features, with the dropped ones.
        dropped: number of dropped features by reason.
        examples: the first one dropped for each reason, such as `feature 17 of 2355.tif`.
    """

    boxes: dict[str, Boxes]
    features: int = 0
    dropped: Counter[Defect] = field(default_factory=Counter)
    examples: dict[Defect, str] = field(default_factory=dict)


class _DefectError(Exception):
    def __init__(self, defect: Defect) -> None:
        self.defect = defect


def read_annotations(path: str | Path) -> Annotations:
    """Read the boxes of every scene.

    Memory grows by about 40 bytes per feature, whatever else the features hold.

    Raises:
        AnnotationError: the file cannot be read, or is not a GeoJSON FeatureCollection.
    """
    artefacts = Taxonomy.xview().artefacts
    columns: dict[str, array[float]] = {}
    found = Annotations({})
    for feature in read_features(path):
        image_id = ""
        try:
            properties = feature.get("properties") if isinstance(feature, dict) else None
            if not isinstance(properties, dict):
                raise _DefectError(Defect.NO_PROPERTIES)
            image_id = _read_image_id(properties.get("image_id"))
            boxes = columns.setdefault(name_scene(image_id), array("d"))
            boxes.extend(_read_box(properties, artefacts))
        except _DefectError as error:
            found.dropped[error.defect] += 1
            place = f" of {image_id}" if image_id else ""
            found.examples.setdefault(error.defect, f"feature {found.features + 1:,}{place}")
        found.features += 1
    for scene, values in columns.items():
        rows = np.frombuffer(values, np.float64).reshape(-1, 5) if values else np.empty((0, 5))
        _, first = np.unique(rows, axis=0, return_index=True)
        if len(first) < len(rows):
            found.dropped[Defect.REPEATED] += len(rows) - len(first)
            found.examples.setdefault(Defect.REPEATED, f"{len(rows) - len(first)} of {scene}")
        found.boxes[scene] = rows[np.sort(first)]
    return found


def name_scene(file: str) -> str:
    """Return the scene's name: `2355.tif` -> `2355`."""
    stem, dot, suffix = file.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in RASTER_SUFFIXES else file


def _read_image_id(value: object) -> str:
    if not isinstance(value, str) or Path(value).name != value or not name_scene(value):
        raise _DefectError(Defect.NO_SCENE)
    return value


def _read_box(properties: dict[str, Any], artefacts: frozenset[int]) -> tuple[float, float, float, float, float]:
    type_id = properties.get("type_id")
    # In Python True is an int; in JSON 18.0 is an integer.
    if not isinstance(type_id, (int, float)) or isinstance(type_id, bool):
        raise _DefectError(Defect.NO_ID)
    if not 0 <= type_id <= _MAX_ID or type_id != int(type_id):
        raise _DefectError(Defect.NO_ID)
    if type_id in artefacts:
        raise _DefectError(Defect.ARTEFACT)
    bounds = properties.get("bounds_imcoords")
    fields = bounds.split(",") if isinstance(bounds, str) and len(bounds) <= 4 * _LONGEST_NUMBER else []
    if len(fields) != 4 or not all(_NUMBER.fullmatch(number) for number in fields):
        raise _DefectError(Defect.NO_BOUNDS)
    left, top, right, bottom = map(float, fields)
    if max(map(abs, (left, top, right, bottom))) > _MAX_COORDINATE:
        raise _DefectError(Defect.NO_BOUNDS)
    if right <= left or bottom <= top:
        raise _DefectError(Defect.NO_AREA)
    return float(type_id), left, top, right, bottom


def read_features(path: str | Path) -> Iterator[Any]:
    """Yield the elements of a FeatureCollection's `features` in the order of the file.

    Raises:
        AnnotationError: the file cannot be read, is not JSON, is truncated, or has no `features`.
    """
    from extract.ranks.group import shows_bars  # imports torch, which worker processes do not need

    try:
        with open(path, "rb") as file, io.TextIOWrapper(file, "utf-8-sig") as text:
            size = Path(path).stat().st_size
            with tqdm(
                total=size, unit="B", unit_scale=True, desc="labels", leave=False, disable=not shows_bars()
            ) as bar:
                for feature in _scan_collection(_Scanner(text)):
                    yield feature
                    bar.update(file.tell() - bar.n)
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}: LABELS is xView_train.geojson") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise AnnotationError(
            f"{path} is not a GeoJSON FeatureCollection ({error}): LABELS is xView_train.geojson; download it again"
        ) from error


def _scan_collection(scanner: "_Scanner") -> Iterator[Any]:
    """Yield the elements of the member `features` of the JSON object."""
    scanner.take("{")
    met = False
    while not scanner.try_take("}"):
        name = scanner.read_value()
        scanner.take(":")
        if name != "features":
            scanner.read_value()
        else:
            met = True
            scanner.take("[")
            while not scanner.try_take("]"):
                yield scanner.read_value()
                scanner.try_take(",")
        scanner.try_take(",")
    if not met:
        raise ValueError("it has no features")


class _Scanner:
    """Reads JSON values one at a time from a text that is never held in memory as a whole.

    Lenient between values: commas may be missing.
    """

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._decoder = json.JSONDecoder()
        self._buffer, self._at, self._ended = "", 0, False

    def try_take(self, mark: str) -> bool:
        """Skip blanks and then `mark`; return whether it was there."""
        while True:
            match = _BLANK.match(self._buffer, self._at)
            assert match
            self._at = match.end()
            if self._at < len(self._buffer) or self._ended:
                break
            self._read_on()
        found = self._buffer.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def take(self, mark: str) -> None:
        if not self.try_take(mark):
            raise ValueError(
                f"expected {mark} where it {'ends' if self._at == len(self._buffer) else 'says'} "
                f"{self._buffer[self._at : self._at + 10]!r}"
            )

    def read_value(self) -> Any:
        """Parse the next JSON value."""
        self.try_take(" ")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except ValueError:  # most likely the buffer ends within the value
                if self._ended:
                    raise
            else:
                # A number may continue beyond the buffer: `1` is valid, but may be the start of `1.5`.
                if self._buffer[end : end + 1] in _AFTER_VALUE or self._ended:
                    self._at = end
                    return value
            if len(self._buffer) - self._at > MAX_VALUE_CHARACTERS:
                raise ValueError(f"no end of a value within {MAX_VALUE_CHARACTERS:,} characters")
            self._read_on()

    def _read_on(self) -> None:
        more = self._text.read(_CHUNK_CHARACTERS)
        self._buffer, self._at, self._ended = self._buffer[self._at :] + more, 0, not more

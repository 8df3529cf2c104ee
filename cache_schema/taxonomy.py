"""Map raw label ids to classes.

A cache stores raw ids, and these rules apply on reading, so another class list needs no new cache. xView's annotations
use *type ids* (11-94, with gaps); tools that prepare tiles often renumber them to *class ids* (0-59). 39 numbers are
both, so a wrong guess would mislabel silently; `detect_label_ids` decides only if the ids prove one of them.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from .errors import TaxonomyError
from .layout import LABEL_ID_COLUMNS, BoolArray, UInt8Array, UInt16Array

LabelIds = Literal["type", "class"]
MAX_MEANINGLESS = 0.01
"""Largest accepted share of label lines that are malformed or name an unknown id."""


@dataclass(frozen=True, eq=False)
class RawLabels:
    """The raw ids in the label files of N tiles, in a sixteenth of the memory that counts take.

    Attributes:
        marks: (N, 16) uint8, packed by `np.packbits`: a bit for each of the 128 ids, set if the id occurs.
        totals: (128,) int64, instances of each id in all tiles.
    """

    marks: UInt8Array
    totals: npt.NDArray[np.int64]

    @classmethod
    def pack(cls, label_ids: UInt16Array) -> Self:
        """Pack (N, 128) uint16 instances per raw id."""
        return cls(np.packbits(label_ids > 0, axis=1), label_ids.sum(axis=0, dtype=np.int64))

    def find(self, ids: Sequence[int]) -> BoolArray:
        """Return (N, len(ids)) bool, the ids that occur in each tile."""
        columns = np.asarray(ids, np.intp)
        bits = (0x80 >> columns % 8).astype(np.uint8)
        return np.asarray((self.marks[:, columns // 8] & bits) != 0)


@dataclass(frozen=True)
class DecodedLabels:
    """Labels of N tiles, decoded as type ids or as class ids.

    Attributes:
        labels: (N, C) bool, class present in the tile.
        empty: (N,) bool, the label file has no lines.
        unusable: (N,) bool, the label file has lines, but names no known class: neither positive nor empty.
        artefacts: instances dropped as known annotation artefacts.
        unknown: instances by unknown id.
        malformed: lines with a malformed or too large id.
        instances: all counted lines.
    """

    labels: BoolArray
    empty: BoolArray
    unusable: BoolArray
    artefacts: int
    unknown: dict[int, int]
    malformed: int
    instances: int

    @property
    def meaningless(self) -> int:
        """Lines that are malformed or name an unknown id."""
        return sum(self.unknown.values()) + self.malformed


@dataclass(frozen=True)
class Taxonomy:
    """An ordered class list.

    Attributes:
        names: C class names, in class-id order.
        type_ids: C raw type ids, or None if labels can only hold class ids.
        artefacts: raw type ids that occur in annotations but are no classes.
    """

    names: tuple[str, ...]
    type_ids: tuple[int, ...] | None
    artefacts: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def xview(cls) -> Self:
        """Return the 60 classes of xView (Lam et al. 2018, "xView: Objects in Context in Overhead Imagery")."""
        text = resources.files(__package__).joinpath("xview_classes.csv").read_text()
        return cls._parse(text, "xview_classes.csv", frozenset({75, 82}))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a class list: CSV with the header `class_id,name` or `class_id,type_id,name`.

        Raises:
            TaxonomyError: it is unreadable, has another header, or its ids repeat, leave gaps or exceed 126.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TaxonomyError(f"cannot read the class list {path}: {error}") from error
        return cls._parse(text, str(path), frozenset())

    @classmethod
    def _parse(cls, text: str, where: str, artefacts: frozenset[int]) -> Self:
        try:
            header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
        except csv.Error as error:
            raise TaxonomyError(f"{where}: {error}") from error
        if not rows or header not in (["class_id", "name"], ["class_id", "type_id", "name"]):
            raise TaxonomyError(f"{where}: expected the header class_id,name or class_id,type_id,name, then classes")
        for row in rows:
            if len(row) != len(header):
                raise TaxonomyError(f"{where}: {','.join(row)} has {len(row)} fields, not {len(header)}")
        try:
            class_ids = [int(row[0]) for row in rows]
            type_ids = tuple(int(row[1]) for row in rows) if "type_id" in header else None
        except ValueError as error:
            raise TaxonomyError(f"{where}: {error}") from error
        if class_ids != list(range(len(rows))):
            raise TaxonomyError(f"{where}: class_id must count 0, 1, 2, … in order")
        names = tuple(row[-1].strip() for row in rows)
        if len(set(names)) != len(names) or not all(names):
            raise TaxonomyError(f"{where}: every class needs its own name")
        for ids in (class_ids, type_ids or ()):
            if len(set(ids)) != len(ids) or any(not 0 <= i < LABEL_ID_COLUMNS - 1 for i in ids):
                raise TaxonomyError(f"{where}: ids must be distinct and 0..{LABEL_ID_COLUMNS - 2}")
        return cls(names, type_ids, artefacts)

    def detect_label_ids(self, histogram: npt.NDArray[np.integer]) -> LabelIds:
        """Decide from all labels of a set whether raw ids are type ids or class ids.

        Args:
            histogram: (128,) instances per raw id, such as `RawLabels.totals`.

        Raises:
            TaxonomyError: the labels hold ids that are only type ids and ids that are only class ids, or neither.
        """
        if self.type_ids is None:
            return "class"
        class_ids = set(range(len(self)))
        seen = set(np.flatnonzero(histogram[: LABEL_ID_COLUMNS - 1]).tolist())
        only_class = sorted(seen & (class_ids - set(self.type_ids) - self.artefacts))
        only_type = sorted(seen - class_ids)
        if bool(only_class) == bool(only_type):
            why = (
                f"ids {only_class} are class ids only and {only_type} are type ids only"
                if only_class
                else "every id found is both a type id and a class id"
            )
            raise TaxonomyError(
                f"cannot tell type ids from class ids: {why}; set --label-ids type or --label-ids class\n"
                f"instances per raw id: {format_histogram(histogram)}"
            )
        return "class" if only_class else "type"

    def decode(self, raw: RawLabels, reading: LabelIds) -> DecodedLabels:
        """Decode the labels of N tiles as type ids or class ids."""
        columns, totals = list(range(len(self))), raw.totals
        if reading == "type":
            if self.type_ids is None:
                raise TaxonomyError("this class list has no type_id column: use --label-ids class")
            columns = list(self.type_ids)
        artefacts = sorted(self.artefacts) if reading == "type" else []
        known = {*columns, *artefacts, LABEL_ID_COLUMNS - 1}
        labels = raw.find(columns)
        empty = np.asarray(~raw.marks.any(axis=1))
        return DecodedLabels(
            labels=labels,
            empty=empty,
            unusable=np.asarray(~empty & ~labels.any(axis=1)),
            artefacts=int(totals[artefacts].sum()),
            unknown={i: int(n) for i, n in enumerate(totals.tolist()) if n and i not in known},
            malformed=int(totals[-1]),
            instances=int(totals.sum()),
        )


def describe_meaningless(raw: RawLabels, tiles: npt.NDArray[np.str_], decoded: DecodedLabels, reading: LabelIds) -> str:
    """Say which label lines of N tiles mean nothing, where the first of them are, and what to do."""
    rows = np.flatnonzero(raw.find([*decoded.unknown, LABEL_ID_COLUMNS - 1]).any(axis=1))[:3].tolist()
    ids = ", ".join(f"{label_id} ({count:,}x)" for label_id, count in decoded.unknown.items())
    parts = [f"no {reading} ids of this class list: {ids}"] if ids else []
    parts += (
        [f"{decoded.malformed:,} malformed or with an id above {LABEL_ID_COLUMNS - 2}"] if decoded.malformed else []
    )
    return (
        f"{decoded.meaningless / decoded.instances:.2%} of all label lines are ignored: {'; '.join(parts)} (first in "
        f"the labels of {', '.join(str(tiles[row]) for row in rows)}); above {MAX_MEANINGLESS:.0%} a run ends here: "
        "fix the files, set --label-ids, or give a --taxonomy"
    )


def refuse_meaningless(raw: RawLabels, tiles: npt.NDArray[np.str_], decoded: DecodedLabels, reading: LabelIds) -> None:
    """Check that the labels of N tiles fit the class list and the kind of ids.

    Raises:
        TaxonomyError: more than 1 % of all lines mean nothing.
    """
    if decoded.meaningless > MAX_MEANINGLESS * decoded.instances:
        raise TaxonomyError(describe_meaningless(raw, tiles, decoded, reading))


def format_histogram(histogram: npt.NDArray[np.integer]) -> str:
    """List the ids that occur and how often: `11:40 18:2213 … other:3`."""
    parts = [f"{i}:{n}" for i, n in enumerate(histogram[:-1].tolist()) if n]
    return " ".join([*parts, f"other:{int(histogram[-1])}"])

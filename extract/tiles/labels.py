"""Count the instances of each raw label id in YOLO label files."""

import re
from dataclasses import dataclass

import numpy as np

from cache_schema import LABEL_ID_COLUMNS
from cache_schema.layout import UInt16Array

MAX_LABEL_BYTES = 16 * 2**20
_ID = re.compile(rb"\d{1,9}")
# `\d+\.?\d*` would be shorter, but could split a long run of digits anywhere: quadratic time.
_NUMBER = re.compile(rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class ParsedLabels:
    """One label file.

    Attributes:
        counts: (128,) uint16 instances per raw id, capped; the last column holds larger ids and malformed lines.
        lines: lines with content.
        malformed: 1-based numbers of the malformed ones.
    """

    counts: UInt16Array
    lines: int
    malformed: tuple[int, ...]


def refuse_labels() -> ParsedLabels:
    """Return the result for a file of more than `MAX_LABEL_BYTES`: one malformed line."""
    counts = np.zeros(LABEL_ID_COLUMNS, "<u2")
    counts[-1] = 1
    return ParsedLabels(counts, 1, (1,))


def parse_labels(text: bytes) -> ParsedLabels:
    """Count instances per raw id in a YOLO label file, whose lines are `id cx cy w h`, the last four in 0..1.

    Parsing is strict ASCII, since Python's `float()` accepts `inf`, `1_0` and Arabic digits. A byte order mark,
    CRLF line ends and blank lines are accepted. A malformed line adds one to the last column and never raises.

    Source: https://docs.ultralytics.com/datasets/detect/ (the YOLO format).
    """
    counts = np.zeros(LABEL_ID_COLUMNS, np.int64)
    malformed = []
    lines = 0
    if len(text) > MAX_LABEL_BYTES:
        return refuse_labels()
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        content = line.strip(b" \t\r")
        if not content:
            continue
        lines += 1
        label_id = _parse_line(content)
        if label_id is None:
            malformed.append(number)
        counts[LABEL_ID_COLUMNS - 1 if label_id is None else min(label_id, LABEL_ID_COLUMNS - 1)] += 1
    return ParsedLabels(np.minimum(counts, np.iinfo(np.uint16).max).astype("<u2"), lines, tuple(malformed))


def _parse_line(content: bytes) -> int | None:
    """Return the raw id of one line, or None if the line is malformed."""
    fields = content.split()
    if len(fields) != 5 or _ID.fullmatch(fields[0]) is None:
        return None
    if not all(_NUMBER.fullmatch(field) and 0.0 <= float(field) <= 1.0 for field in fields[1:]):
        return None
    return int(fields[0])

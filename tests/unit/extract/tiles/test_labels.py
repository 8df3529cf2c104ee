"""YOLO label files as people and programs write them, and as they should not."""

from __future__ import annotations

import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import LABEL_ID_COLUMNS
from extract.tiles.labels import MAX_LABEL_BYTES, parse_labels
from tests.planted import fresh_seed

LAST = LABEL_ID_COLUMNS - 1
GOOD = {
    "one line": (b"18 0.5 0.5 0.1 0.1\n", {18: 1}),
    "no newline at the end": (b"18 0.5 0.5 0.1 0.1", {18: 1}),
    "CRLF": (b"18 0.5 0.5 0.1 0.1\r\n73 0 0 1 1\r\n", {18: 1, 73: 1}),
    "byte order mark": (b"\xef\xbb\xbf18 0.5 0.5 0.1 0.1\n", {18: 1}),
    "blank lines": (b"\n\n18 0 0 0 0\n \t \r\n18 0 0 0 0\n\n", {18: 2}),
    "tabs and many spaces": (b"  18\t0.5   0.5\t0.1 0.1  \n", {18: 1}),
    "edges of the range": (b"0 0 1 0.0 1.0\n0 -0.0 +1 1. .5\n", {0: 2}),
    "exponents": (b"7 5e-1 5E-1 1e0 1e-400\n", {7: 1}),
    "leading zeros of an id": (b"007 0 0 0 0\n", {7: 1}),
    "largest id with a column": (b"126 0 0 0 0\n", {126: 1}),
    "id of the last column": (b"127 0 0 0 0\n", {LAST: 1}),
    "larger id": (b"999999999 0 0 0 0\n", {LAST: 1}),
    "empty": (b"", {}),
    "only a byte order mark": (b"\xef\xbb\xbf", {}),
}
MALFORMED = {
    "nan": b"1 nan 0 0 0",
    "inf": b"1 inf 0 0 0",
    "infinity by exponent": b"1 1e400 0 0 0",
    "underscore in a number": b"1 1_0 0 0 0",
    "underscore in an id": b"1_0 0 0 0 0",
    "Arabic digits": "١ 0 0 0 0".encode(),
    "Arabic digits in a number": "1 ٠.٥ 0 0 0".encode(),
    "hexadecimal": b"1 0x1 0 0 0",
    "missing column": b"1 0 0 0",
    "extra column (a confidence)": b"1 0 0 0 0 0.9",
    "commas": b"1,0,0,0,0",
    "above the range": b"1 0 0 0 1.0001",
    "below the range": b"1 0 -0.0001 0 0",
    "pixels": b"1 120 40 15 15",
    "negative id": b"-1 0 0 0 0",
    "id with a sign": b"+1 0 0 0 0",
    "id with a point": b"1.0 0 0 0 0",
    "huge id": b"1" * 10 + b" 0 0 0 0",
    "id of many digits": b"1" * 100_000 + b" 0 0 0 0",
    "class name": b"car 0 0 0 0",
    "words": b"no labels here",
    "NUL": b"1 0 0 0 0\x00",
    "UTF-16": "1 0 0 0 0".encode("utf-16"),
    "byte order mark in the middle": b"\xef\xbb\xbf1 0 0 0 0",
    "a point alone": b"1 . 0 0 0",
    "a sign alone": b"1 + 0 0 0",
}


@pytest.mark.parametrize("text, expected", GOOD.values(), ids=GOOD)
def test_accepted(text: bytes, expected: dict[int, int]) -> None:
    parsed = parse_labels(text)
    assert {int(i): int(parsed.counts[i]) for i in np.flatnonzero(parsed.counts)} == expected
    assert (parsed.lines, parsed.malformed) == (sum(expected.values()), ())
    assert parsed.counts.dtype == np.dtype("<u2")
    assert parsed.counts.shape == (LABEL_ID_COLUMNS,)


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED)
def test_malformed_line_is_counted_and_numbered(line: bytes) -> None:
    """Among good lines, which it must not take with it."""
    parsed = parse_labels(b"18 0 0 0 0\n\n" + line + b"\n18 0 0 0 0\n")
    assert parsed.malformed == (3,)
    assert (parsed.counts[18], parsed.counts[LAST], parsed.counts.sum(), parsed.lines) == (2, 1, 3, 3)


def test_binary_junk() -> None:
    junk = np.random.default_rng(fresh_seed()).bytes(200_000)
    parsed = parse_labels(junk)
    assert parsed.counts[LAST] == parsed.lines == len(parsed.malformed)
    assert parsed.counts[:LAST].sum() == 0


def test_many_lines_are_capped_not_wrapped() -> None:
    parsed = parse_labels(b"18 0 0 0 0\n" * 66_000 + b"73 0 0 0 0\n")
    assert parsed.counts[18] == 65_535
    assert parsed.counts[73] == 1
    assert parsed.lines == 66_001


def test_file_over_the_limit_is_one_malformed_line() -> None:
    parsed = parse_labels(b"18 0 0 0 0\n" * (MAX_LABEL_BYTES // 11 + 1))
    assert (parsed.lines, parsed.malformed, parsed.counts[LAST], parsed.counts.sum()) == (1, (1,), 1, 1)


@pytest.mark.parametrize("field", [b"1" * 20_000 + b"x", b"0." + b"1" * 20_000 + b"x", b"1e" + b"1" * 20_000 + b"x"])
def test_time_is_linear_in_a_fields_length(field: bytes) -> None:
    """A pattern that can cut a run of digits anywhere took 4 s for 16,000 of them."""
    started = time.process_time()
    assert parse_labels(b"1 0 0 0 " + field).malformed == (1,)
    assert time.process_time() - started < 1


words = st.one_of(
    st.integers(-5, 200).map(lambda n: str(n).encode()),
    st.floats(width=32).map(lambda x: repr(x).encode()),
    st.floats(0, 1).map(lambda x: repr(x).encode()),
    st.binary(max_size=6),
    st.text(max_size=4).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
lines = st.lists(words, max_size=7).map(b" ".join)


@given(st.one_of(st.binary(max_size=400), st.lists(lines, max_size=30).map(b"\n".join)))
def test_never_raises_and_every_line_is_counted_once(text: bytes) -> None:
    parsed = parse_labels(text)
    assert int(parsed.counts.sum()) == parsed.lines
    assert len(parsed.malformed) <= int(parsed.counts[LAST])
    assert list(parsed.malformed) == sorted(set(parsed.malformed))
    assert all(1 <= number <= text.count(b"\n") + 1 for number in parsed.malformed)


@given(
    st.integers(0, 300),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4),
)
def test_range_is_that_of_the_numbers_python_reads(label_id: int, numbers: list[float]) -> None:
    parsed = parse_labels(" ".join([str(label_id), *map(repr, numbers)]).encode())
    accepted = all(math.isfinite(number) and 0 <= number <= 1 for number in numbers)
    assert parsed.malformed == (() if accepted else (1,))
    assert parsed.counts[min(label_id, LAST) if accepted else LAST] == 1


# Beside a parser that knows no regular expression and goes through the text byte by byte

DIGITS = b"0123456789"


def parse_slowly(text: bytes) -> tuple[Counter[int], int, list[int]]:
    """Instances by column, lines with content, numbers of malformed lines; for short texts."""
    counts: Counter[int] = Counter()
    malformed, number, fields, field, blank = [], 1, [], b"", True
    if text[:3] == b"\xef\xbb\xbf":
        text = text[3:]
    for i in range(len(text) + 1):
        byte = text[i : i + 1] or b"\n"
        if byte in b" \t\r\v\f\n":
            fields += [field] if field else []
            field = b""
        else:
            field += byte
        blank = blank and byte in b" \t\r\n"
        if byte == b"\n":
            if not blank:
                label_id = read_slowly(fields)
                counts[LAST if label_id is None else min(label_id, LAST)] += 1
                malformed += [number] if label_id is None else []
            number, fields, blank = number + 1, [], True
    return counts, sum(counts.values()), malformed


def read_slowly(fields: list[bytes]) -> int | None:
    if len(fields) != 5 or not set(fields[0]) <= set(DIGITS) or len(fields[0]) > 9:
        return None
    return int(fields[0]) if all(map(is_share, fields[1:])) else None


def is_share(field: bytes) -> bool:
    """Whether `field` is a decimal number whose nearest float64 is in 0..1."""
    mantissa, e, exponent = field.replace(b"E", b"e").partition(b"e")
    negative = mantissa[:1] == b"-"
    whole, _, part = mantissa[mantissa[:1] in (b"-", b"+") :].partition(b".")
    power = exponent[exponent[:1] in (b"-", b"+") :]
    if not set(whole + part + power) <= set(DIGITS) or not whole + part or bool(e) != bool(power):
        return False
    digits = int(whole + part)
    shift = int(power or b"0") * (-1 if exponent[:1] == b"-" else 1) - len(part)
    if digits == 0 or len(str(digits)) + shift < -400:  # far below the smallest float64
        return True
    if len(str(digits)) + shift > 2:
        return False
    nearest = float(Fraction(digits) * Fraction(10) ** shift)
    return nearest == 0 or (not negative and nearest <= 1)


IDS = b"0 7 018 126 127 128 999999999 1000000000 0000000001 +1 1.0"
NUMBERS = b"0 1 0.5 .5 1. -0 +1 1e0 5E-1 1e-400 1e99999 -1e-999 1.0000000000000001 1.000000000000001 -0.1"
JUNK = b"0x1 nan 1_0 . e 1e - car 123456789 0000000001 \xd9\xa1 \xef\xbb\xbf \x00 \x1c \x85"
pieces = st.sampled_from([*NUMBERS.split(), *JUNK.split(), b""])
separators = st.sampled_from([b" ", b"  ", b"\t", b"\r", b"\v", b"\f", b"\xa0", b""])
texts = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(IDS.split()), *[st.sampled_from(NUMBERS.split())] * 4).map(b" ".join),
        st.lists(st.tuples(separators, pieces).map(b"".join), max_size=7).map(b"".join),
        lines,
        st.text(" \t\r\v\f", max_size=3).map(str.encode),
        st.binary(max_size=20),
        st.text("01589.eE+- \t\r", max_size=30).map(str.encode),
    ),
    max_size=8,
).map(b"\n".join)


@given(texts)
def test_as_a_slow_parser_reads_it(text: bytes) -> None:
    parsed = parse_labels(text)
    counts, read, malformed = parse_slowly(text)
    assert {int(i): int(parsed.counts[i]) for i in np.flatnonzero(parsed.counts)} == counts
    assert (parsed.lines, list(parsed.malformed)) == (read, malformed)


@given(texts, texts)
def test_lines_are_independent(above: bytes, below: bytes) -> None:
    both, first, second = parse_labels(above + b"\n" + below), parse_labels(above), parse_labels(b"\n" + below)
    np.testing.assert_array_equal(both.counts, first.counts + second.counts)
    shift = above.count(b"\n")
    assert both.malformed == (*first.malformed, *(shift + number for number in second.malformed))
    assert both.lines == first.lines + second.lines

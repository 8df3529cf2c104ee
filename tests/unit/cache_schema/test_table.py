"""The tile table: what it refuses, and what its digests see."""

import hashlib
import struct
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import NO_LABEL, CacheFormatError, TileTable
from tests.caches import make_table

IDENTITY = ("tile", "size", "crc32c", "label_size", "label_crc32c")
NAMES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8), unique=True)


def make_named(names: list[str]) -> TileTable:
    zeros = np.zeros(len(names), np.int64)
    crc = zeros.astype(np.uint32)
    return TileTable(np.array(names, np.dtypes.StringDType()), zeros, crc, zeros, zeros, crc)


@given(NAMES)
def test_order_is_that_of_utf8_bytes(names: list[str]) -> None:
    ordered = sorted(names, key=str.encode)

    assert make_named(ordered).tile.tolist() == ordered
    if len(names) > 1:
        with pytest.raises(CacheFormatError, match="not sorted"):
            make_named(ordered[::-1])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(CacheFormatError, match="twice"):
        make_named(["a", "b", "b"])


def test_columns_of_different_length_are_refused() -> None:
    table = make_table(5)
    with pytest.raises(CacheFormatError, match=r"'size': 4"):
        replace(table, size=table.size[:4])


@given(NAMES, st.data())
def test_identity_digest_follows_the_written_format(names: list[str], data: st.DataObject) -> None:
    names = sorted(names, key=str.encode)
    n = len(names)
    size = data.draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n))
    crc32c = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n))
    generation = data.draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n))
    label_size = data.draw(st.lists(st.integers(-1, 2**62), min_size=n, max_size=n))
    label_crc32c = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n))
    table = TileTable(
        np.array(names, np.dtypes.StringDType()),
        np.array(size, np.int64),
        np.array(crc32c, np.uint32),
        np.array(generation, np.int64),
        np.array(label_size, np.int64),
        np.array(label_crc32c, np.uint32),
    )

    head = struct.pack("<Q", n) + b"".join(struct.pack("<I", len(x.encode())) + x.encode() for x in names)
    tile = struct.pack(f"<{n}q{n}I", *size, *crc32c) if n else b""
    label = struct.pack(f"<{n}q{n}I", *label_size, *label_crc32c) if n else b""
    pin = struct.pack(f"<{n}q", *generation)
    # struct's "<" has no padding, so the columns follow each other as they do in the format
    assert table.identity_digest() == hashlib.sha256(head + tile + label).digest()
    assert table.full_digest() == hashlib.sha256(head + tile + pin + label).digest()


@pytest.mark.parametrize("column", [field.name for field in fields(TileTable)])
def test_every_column_but_generation_is_identity(column: str) -> None:
    table = make_table(6)
    values = getattr(table, column).copy()
    values[3] = values[3] + (".x" if column == "tile" else 1)
    changed = replace(table, **{column: values})

    assert (changed.identity_digest() != table.identity_digest()) == (column in IDENTITY)
    assert changed.full_digest() != table.full_digest()


def test_names_cannot_run_into_each_other() -> None:
    assert make_named(["a", "bc"]).identity_digest() != make_named(["ab", "c"]).identity_digest()


def test_digests_do_not_depend_on_how_a_column_is_held() -> None:
    table = make_table(6)
    held = replace(table, tile=table.tile.astype("<U20"), size=table.size.astype(">i8"), crc32c=table.crc32c[::1])
    assert held.full_digest() == table.full_digest()


def test_select_keeps_columns_together() -> None:
    table = make_table(10)
    chosen = table.select(np.array([2, 4, 7]))

    assert len(chosen) == 3
    assert chosen.tile.tolist() == [table.tile[row] for row in (2, 4, 7)]
    assert chosen.crc32c.tolist() == [table.crc32c[row] for row in (2, 4, 7)]
    assert table.select(table.labelled).tile.tolist() == table.tile[table.labelled].tolist()


def test_an_empty_label_is_not_a_missing_one() -> None:
    table = replace(make_table(3), label_size=np.array([0, NO_LABEL, 12]))
    assert table.labelled.tolist() == [True, False, True]

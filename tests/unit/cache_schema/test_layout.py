"""Blocks of rows and status codes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.layout import Layout, Status, choose_block_rows


@pytest.mark.parametrize("rows, block_rows", [(1, 256), (1_000_000, 256), (1_000_001, 4096)])
def test_block_rows_by_number_of_rows(rows: int, block_rows: int) -> None:
    assert choose_block_rows(rows) == block_rows


@given(rows=st.integers(1, 10_000), block_rows=st.sampled_from([1, 7, 256, 4096]))
def test_blocks_cover_every_row_once(rows: int, block_rows: int) -> None:
    slices = list(Layout(rows, 8, ("cls",), block_rows).block_slices())

    assert slices[0].start == 0
    assert slices[-1].stop == rows
    assert all(left.stop == right.start for left, right in pairwise(slices))
    assert all(part.stop - part.start == block_rows for part in slices[:-1])
    assert 0 < slices[-1].stop - slices[-1].start <= block_rows


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_outside_is_refused(block: int) -> None:
    with pytest.raises(IndexError, match=f"block {block} of 2"):
        Layout(300, 8, ("cls",), 256).block_slice(block)


def test_status_codes_are_those_of_the_format() -> None:
    assert {status.name: int(status) for status in Status} == {
        "PENDING": 0,
        "EMBEDDED": 1,
        "UNDECODABLE": 2,
        "OVER_LIMIT": 3,
        "GONE": 4,
        "CHECKSUM_MISMATCH": 5,
    }
    assert [status.quarantined for status in Status] == [False, False, True, True, True, True]
    assert len({status.reason for status in Status}) == len(Status)

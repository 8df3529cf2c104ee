"""Compare two tables, checked against a dict; choose the version whose rows are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import NO_LABEL, CacheRoot, TileTable
from extract.earlier import Changes, compare_tables, find_earlier
from extract.errors import RunError
from tests.caches import delete, fill_cache, get_bytes, make_provenance, make_recorded, make_table, put_bytes

Identity = tuple[int, int, int, int]
"""Size, crc32c, size and crc32c of the label."""

NAMES = st.text("a_/é\U0001f600z", min_size=1, max_size=3)
IDENTITIES = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(NO_LABEL, 1), st.integers(0, 1))
STEPS = st.lists(st.tuples(st.sampled_from(["put", "remove", "relabel"]), NAMES, IDENTITIES), max_size=30)


def tabulate(rows: dict[str, Identity]) -> TileTable:
    names = sorted(rows)
    columns = np.array([rows[name] for name in names], np.int64).reshape(-1, 4).T
    return TileTable(
        tile=np.array(names, np.dtypes.StringDType()),
        size=columns[0],
        crc32c=columns[1].astype(np.uint32),
        generation=np.arange(len(names)),
        label_size=columns[2],
        label_crc32c=columns[3].astype(np.uint32),
    )


@given(before=st.dictionaries(NAMES, IDENTITIES, min_size=1), steps=STEPS)
def test_any_sequence_of_changes(before: dict[str, Identity], steps: list[tuple[str, str, Identity]]) -> None:
    after = dict(before)
    for kind, name, identity in steps:
        if kind == "put":
            after[name] = identity
        elif kind == "remove":
            after.pop(name, None)
        elif name in after:
            after[name] = (*after[name][:2], *identity[2:])
    changes = compare_tables(tabulate(before), tabulate(after))
    earlier = sorted(before)
    counts = dict.fromkeys(("new", "changed", "removed", "relabelled", "kept"), 0)
    for i, name in enumerate(sorted(after)):
        if name not in before:
            kind = "new"
        elif before[name][:2] != after[name][:2]:
            kind = "changed"
        else:
            kind = "kept" if before[name] == after[name] else "relabelled"
        counts[kind] += 1
        assert changes.row[i] == (earlier.index(name) if name in before else -1)
        assert changes.same_tile[i] == (kind in ("kept", "relabelled"))
        assert changes.same_label[i] == (name in before and before[name][2:] == after[name][2:])
    counts["removed"] = len(before.keys() - after.keys())
    assert changes.describe() == ", ".join(f"{count} {kind}" for kind, count in counts.items())


@pytest.mark.parametrize("removed", [0, 2, 3, 20])
def test_more_than_a_tenth_gone_is_refused(tmp_path: Path, removed: int) -> None:
    version = CacheRoot(str(tmp_path)).open_version(fill_cache(str(tmp_path), 20))
    nothing = np.zeros(0, bool)
    changes = Changes(np.zeros(0, np.int64), nothing, nothing, removed)
    if removed <= 2:
        changes.refuse_loss(version, "gs://b/t")
        return
    with pytest.raises(RunError, match=rf"{removed} of the 20 tiles of version {version.id} .* gone from gs://b/t: "):
        changes.refuse_loss(version, "gs://b/t")


def find(url: str, rows: int, identity: str = "crc32c", **provenance: Any) -> str | None:
    found = find_earlier(CacheRoot(url), make_table(rows), make_provenance(**provenance), identity)
    return found[0].id if found else None


def test_the_version_in_use_comes_first(tmp_path: Path) -> None:
    """Even if another one shares more rows: what it lost was accepted."""
    url = str(tmp_path)
    larger, smaller = fill_cache(url, 300), fill_cache(url, 50)
    assert find(url, 290) == smaller
    CacheRoot(url).set_current(larger)
    assert find(url, 290) == larger


def test_else_the_finished_one_that_shares_most(tmp_path: Path) -> None:
    url = str(tmp_path)
    ids = {rows: fill_cache(url, rows) for rows in (30, 60, 40)}
    fill_cache(url, 90, seal=False)
    fill_cache(url, 60, precision="bf16")
    assert find(url, 100) == ids[60]
    delete(url, "current")
    assert find(url, 100) == ids[60]


def test_nothing_is_taken_over_from_something_else(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert find(url, 20) is None, "an empty cache"
    fill_cache(url, 20, seal=False)
    assert find(url, 25) is None, "not finished"
    fill_cache(url, 20)
    assert find(url, 20) is None, "the version itself"
    assert find(url, 25, precision="bf16") is None
    assert find(url, 25, "mtime") is None, "checksums and times of change say nothing of each other"
    assert find(url, 25)


def test_a_finished_version_that_is_not_in_use_needs_no_rows(tmp_path: Path) -> None:
    """Back to a model used before: other versions next to its own do not matter."""
    url = str(tmp_path)
    fill_cache(url, 100)
    fill_cache(url, 20)
    fill_cache(url, 20, precision="bf16")
    assert find(url, 20) is None


@pytest.mark.parametrize("column", ["tile", "size", "label_crc32c"])
def test_a_damaged_table_is_not_trusted(tmp_path: Path, column: str) -> None:
    url = str(tmp_path)
    version = fill_cache(url, 20)
    chunk = f"{version}.zarr/{column}/c/0"
    data = get_bytes(url, chunk)
    assert data
    put_bytes(url, chunk, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert find(url, 25) is None


def test_nor_one_of_other_values(tmp_path: Path) -> None:
    """The table of another version, chunk by chunk, with checksums that are right."""
    url = str(tmp_path)
    version = fill_cache(url, 20)
    root = CacheRoot(url)
    other = root.create_version(
        make_table(20, generation=2).select(np.arange(20) != 3), make_provenance(), make_recorded()
    )
    root.open_version(version, read_only=False)._array("crc32c")[:] = np.arange(20)
    assert find(url, 25) is None
    assert other.id != version

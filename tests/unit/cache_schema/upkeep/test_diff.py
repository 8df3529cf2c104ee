"""Two caches side by side: what differs between them, and how far vectors moved."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import BlockValues, CacheRoot, Status, TileTable, Version, open_cache
from cache_schema.upkeep.diff import compare_versions
from tests.caches import WIDTH, delete, fill_cache, make_provenance, make_recorded, make_table

Run = Callable[..., Any]
ROWS = 700
QUARANTINED = 10


def write_cache(
    url: str,
    table: TileTable,
    *,
    scale: float = 1.0,
    quarantined: tuple[int, ...] = (),
    recorded: dict[str, Any] | None = None,
    **provenance: Any,
) -> Version:
    """A sealed version whose vectors follow from the tile's name, so that rows can be told from their neighbours."""
    root = CacheRoot(url)
    version = root.create_version(table, make_provenance(**provenance), make_recorded(**(recorded or {})))
    width = version.layout.width
    for block, rows in enumerate(version.layout.block_slices()):
        names = [int.from_bytes(str(name).encode()[-11:], "little") for name in table.tile[rows]]
        vectors = np.stack([np.random.default_rng(name % 2**63).standard_normal(width) for name in names])
        status = np.full(len(names), Status.EMBEDDED, np.uint8)
        status[[row - rows.start for row in quarantined if rows.start <= row < rows.stop]] = Status.GONE
        vectors[status != Status.EMBEDDED] = np.nan
        cls = vectors.astype(np.float16)
        pooled = {"cls": cls, "patch_mean": cls * np.float16(scale)}
        version.write_block(block, BlockValues(pooled, np.zeros((len(names), 128), np.uint16), status))
    version.seal()
    root.set_current(version.id)
    return version


def change_table(table: TileTable, **columns: Any) -> TileTable:
    """The same tiles, some columns changed: name -> (rows, value)."""
    fields = {name: np.array(value) for name, value in vars(table).items()}
    for name, (rows, value) in columns.items():
        fields[name][rows] = value
    return TileTable(**fields)


def test_a_cache_does_not_differ_from_its_copy(cache_url: str, tmp_path: Path) -> None:
    a = write_cache(str(tmp_path / "a"), make_table(ROWS), quarantined=(QUARANTINED,))
    b = write_cache(cache_url, make_table(ROWS, generation=2), quarantined=(QUARANTINED,))
    comparison = compare_versions(a, b)

    assert not comparison.differs
    assert comparison.lines == [
        f"A: {tmp_path / 'a'}, version {a.id}, 700 rows",
        f"B: {cache_url}, version {a.id}, 700 rows",
        "tiles: 0 only in A, 0 only in B, 700 in both; of these 0 changed (size, crc32c), 0 relabelled",
        "embedded, of tiles with the same bytes: 0 only in A, 0 only in B, 699 in both",
        "cls: the same in 699 tiles",
        "patch_mean: the same in 699 tiles",
        "nothing differs",
    ]


def test_everything_that_differs_is_counted(cache_url: str, tmp_path: Path) -> None:
    """The tables are shifted against each other, so every block of A meets two of B."""
    table = make_table(ROWS)
    a = write_cache(str(tmp_path / "a"), table.select(np.arange(5, ROWS)), quarantined=(100,))
    shifted = change_table(
        table.select(np.arange(0, ROWS - 3)),
        size=([20, 21], 1),
        crc32c=([22], 1),
        label_size=([30, 31, 32, 33], 9999),
        label_crc32c=([33, 34], 5),
    )
    b = write_cache(
        cache_url,
        shifted,
        scale=1.5,
        quarantined=(200, 201),
        recorded={"hardware": "H100", "libraries": {"zarr": "3.1.7", "torch": "2.13.0"}},
        precision="bf16",
        depth=5,
    )
    comparison = compare_versions(a, b)

    assert comparison.differs
    assert comparison.lines[2:] == [
        "provenance depth: 4 in A, 5 in B",
        "provenance precision: float32 in A, bf16 in B",
        "recorded hardware: CPU x86_64 in A, H100 in B",
        "recorded libraries zarr: 3.1.6 in A, 3.1.7 in B",
        "recorded libraries torch: none in A, 2.13.0 in B",
        "tiles: 3 only in A, 5 only in B, 692 in both; of these 3 changed (size, crc32c), 5 relabelled",
        "embedded, of tiles with the same bytes: 2 only in A, 1 only in B, 686 in both",
        "cls: the same in 686 tiles",
        "patch_mean: moved by 5.0e-01 of its norm (median), 5.0e-01 at most; cosine 1.000000 (median)",
    ]


def test_movement_is_measured_row_by_row(tmp_path: Path) -> None:
    """Against the definition, written out; two of three blocks are another's order of columns."""
    a = open_cache(str(tmp_path / "a"), version=fill_cache(str(tmp_path / "a"), ROWS))
    b = open_cache(str(tmp_path / "b"), version=fill_cache(str(tmp_path / "b"), ROWS, depth=5))
    writable = CacheRoot(str(tmp_path / "b")).open_version(b.id, read_only=False)
    for block in (0, 1):
        values = a.read_block(block)
        moved = {name: np.flip(vectors, axis=1) for name, vectors in values.pooled.items()}
        writable.write_block(block, BlockValues(moved, values.label_ids, values.status))
    comparison = compare_versions(a, b)

    rows = a.read_rows()
    left, right = (version.read_rows().pooled["cls"][rows.embedded].astype(float) for version in (a, b))
    distances = [float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in zip(left, right, strict=True)]
    cosines = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in zip(left, right, strict=True)]
    found = comparison.moved["cls"]
    assert found.tiles == len(left)
    assert found.largest == pytest.approx(max(distances))
    assert found.median == pytest.approx(float(np.median(distances)), abs=1e-6)
    assert found.cosine == pytest.approx(float(np.median(cosines)))


def test_other_widths_and_identities_are_not_compared(tmp_path: Path) -> None:
    a = write_cache(str(tmp_path / "a"), make_table(20))
    table = change_table(make_table(20), crc32c=(slice(None), 3), size=([4], 1))
    b = write_cache(str(tmp_path / "b"), table, width=2 * WIDTH, recorded={"identity": "mtime"})
    comparison = compare_versions(a, b)

    assert (comparison.changed, comparison.told_by) == (1, "size alone")
    assert comparison.moved == {}
    assert comparison.lines[-1] == "vectors: none to compare"
    assert "provenance width: 8 in A, 16 in B" in comparison.lines


def test_no_tile_in_common(tmp_path: Path) -> None:
    table = make_table(20)
    a = write_cache(str(tmp_path / "a"), table.select(np.arange(10)))
    b = write_cache(str(tmp_path / "b"), table.select(np.arange(10, 20)))
    comparison = compare_versions(a, b)

    assert (comparison.only_a, comparison.only_b, comparison.both) == (10, 10, 0)
    assert comparison.differs


def test_a_damaged_block_counts_as_not_embedded(cache_url: str, tmp_path: Path) -> None:
    a = write_cache(str(tmp_path / "a"), make_table(ROWS))
    b = write_cache(cache_url, make_table(ROWS))
    delete(cache_url, f"{b.id}.zarr/cls/c/1/0")
    delete(cache_url, f"{b.id}.zarr/commit/c/2/0")
    comparison = compare_versions(a, b)

    assert (comparison.embedded_a, comparison.embedded_b, comparison.embedded_both) == (444, 0, 256)
    assert comparison.differs


def test_every_block_is_read_once_and_none_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(ROWS)
    a = write_cache(str(tmp_path / "a"), table.select(np.arange(5, ROWS)))
    b = write_cache(str(tmp_path / "b"), table.select(np.arange(0, ROWS - 3)))
    asked: list[tuple[str, slice]] = []
    read_values = Version._read_values

    def note(self: Version, rows: slice, arrays: Mapping[str, Any]) -> BlockValues:
        asked.append((self.url, rows))
        return read_values(self, rows, arrays)

    monkeypatch.setattr(Version, "_read_values", note)
    compare_versions(a, b)
    expected = [(v.url, rows) for v in (a, b) for rows in v.layout.block_slices()]
    assert sorted(asked, key=str) == sorted(expected, key=str)


def test_the_command_ends_with_status_3_if_something_differs(cache_url: str, tmp_path: Path, run: Run) -> None:
    old = write_cache(cache_url, make_table(20))
    new = write_cache(cache_url, make_table(20), depth=5)
    write_cache(str(tmp_path / "b"), make_table(20), depth=5)

    same = run("diff", cache_url, str(tmp_path / "b"))
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.endswith("nothing differs\n")
    versions = run("diff", f"{cache_url}@{old.id}", cache_url)
    assert (versions.returncode, versions.stderr) == (3, "")
    assert f"A: {cache_url}, version {old.id}, 20 rows" in versions.stdout
    assert f"B: {cache_url}, version {new.id}, 20 rows" in versions.stdout
    nothing = run("diff", cache_url, str(tmp_path / "none"))
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert nothing.stderr == f"error: no cache at {tmp_path / 'none'}: run `make extract` first, or check CACHE\n"
    assert "no version 00000000000000000000 in" in run("diff", f"{cache_url}@{'0' * 20}", cache_url).stderr

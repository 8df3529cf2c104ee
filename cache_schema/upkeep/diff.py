"""Compare two versions: provenance, tiles, and the distance of their vectors."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.block import BlockValues
from cache_schema.errors import IntegrityError
from cache_schema.layout import Float16Array, Status
from cache_schema.table import TileTable
from cache_schema.version import Version

_READ_AHEAD = 4
_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Movement:
    """How far the vectors of one pooling moved, over n tiles.

    Attributes:
        tiles: n.
        median, largest: norm of the difference over the norm of A's vector.
        cosine: median cosine.
    """

    tiles: int
    median: float
    largest: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """How version A differs from version B.

    Attributes:
        names: A and B, for people.
        entries: a line for each differing field of the provenance and of `recorded`.
        only_a, only_b, both: number of tiles.
        changed, relabelled: tiles in both whose size or crc32c, or those of the label, differ.
        told_by: what the comparison of tiles is based on.
        embedded_a, embedded_b, embedded_both: tiles with the same bytes that are embedded in A only, B only, both.
        moved: by pooling; empty if the widths differ or no tile is embedded in both.
    """

    names: tuple[str, str]
    entries: tuple[str, ...]
    only_a: int
    only_b: int
    both: int
    changed: int
    relabelled: int
    told_by: str
    embedded_a: int
    embedded_b: int
    embedded_both: int
    moved: dict[str, Movement]

    @property
    def differs(self) -> bool:
        counts = (self.only_a, self.only_b, self.changed, self.relabelled, self.embedded_a, self.embedded_b)
        return bool(self.entries) or any(counts) or any(moved.largest > 0 for moved in self.moved.values())

    @property
    def lines(self) -> list[str]:
        """The comparison as lines for people."""
        lines = [f"A: {self.names[0]}", f"B: {self.names[1]}", *self.entries]
        lines.append(
            f"tiles: {self.only_a:,} only in A, {self.only_b:,} only in B, {self.both:,} in both; of these "
            f"{self.changed:,} changed ({self.told_by}), {self.relabelled:,} relabelled"
        )
        lines.append(
            f"embedded, of tiles with the same bytes: {self.embedded_a:,} only in A, {self.embedded_b:,} only in B, "
            f"{self.embedded_both:,} in both"
        )
        for name, moved in self.moved.items():
            lines.append(
                f"{name}: moved by {moved.median:.1e} of its norm (median), {moved.largest:.1e} at most; "
                f"cosine {moved.cosine:.6f} (median)"
                if moved.largest > 0
                else f"{name}: the same in {moved.tiles:,} tiles"
            )
        if not self.moved:
            lines.append("vectors: none to compare")
        return lines if self.differs else [*lines, "nothing differs"]


def compare_versions(a: Version, b: Version) -> Comparison:
    """Compare tiles by name, and vectors of tiles with the same bytes, with a few blocks in memory at a time.

    Raises:
        IntegrityError: a tile table cannot be read. A damaged block counts as not embedded.
    """
    table_a, table_b = a.read_table(), b.read_table()
    _, rows_a, rows_b = np.intersect1d(table_a.tile, table_b.tile, assume_unique=True, return_indices=True)
    # A modification time cannot be compared with a checksum; then only sizes are compared.
    comparable = a.recorded.identity == b.recorded.identity
    columns = {"tile": ("size", "crc32c"), "label": ("label_size", "label_crc32c")}
    same, same_label = (
        _agree(table_a, rows_a, table_b, rows_b, names if comparable else names[:1]) for names in columns.values()
    )
    only_a, only_b, both, moved = _compare_vectors(a, rows_a[same], b, rows_b[same])
    return Comparison(
        names=(_describe(a), _describe(b)),
        entries=(
            *_list_differences("provenance", a.provenance.to_json(), b.provenance.to_json()),
            *_list_differences("recorded", a.recorded.to_json(), b.recorded.to_json()),
        ),
        only_a=len(table_a) - len(rows_a),
        only_b=len(table_b) - len(rows_b),
        both=len(rows_a),
        changed=int((~same).sum()),
        relabelled=int((~same_label).sum()),
        told_by=f"size, {a.recorded.identity}" if comparable else "size alone",
        embedded_a=only_a,
        embedded_b=only_b,
        embedded_both=both,
        moved=moved,
    )


def _agree(a: TileTable, rows_a: _Rows, b: TileTable, rows_b: _Rows, columns: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Return (pairs,) bool: whether all these columns are equal."""
    return np.asarray(np.all([getattr(a, name)[rows_a] == getattr(b, name)[rows_b] for name in columns], axis=0))


def _list_differences(where: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Describe each differing entry in a line; nested objects entry by entry."""
    lines = []
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name, "none"), b.get(name, "none")
        if isinstance(left, dict) and isinstance(right, dict):
            lines += _list_differences(f"{where} {name}", left, right)
        elif left != right:
            lines.append(f"{where} {name}: {left} in A, {right} in B")
    return lines


def _describe(version: Version) -> str:
    unfinished = "" if version.sealed else ", not finished"
    return f"{version.url}, version {version.id}, {version.layout.rows:,} rows{unfinished}"


def _compare_vectors(a: Version, rows_a: _Rows, b: Version, rows_b: _Rows) -> tuple[int, int, int, dict[str, Movement]]:
    """Count the pairs of rows that are embedded in A only, B only and both; measure by pooling how far these moved."""
    comparable = a.layout.width == b.layout.width
    pooling = [name for name in a.layout.pooling if name in b.layout.pooling and comparable]
    distances: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in pooling}
    cosines: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in pooling}
    counts = np.zeros(3, np.int64)
    for left, i, right, j in _walk_pairs(a, rows_a, b, rows_b):
        in_a, in_b = left.status[i] == Status.EMBEDDED, right.status[j] == Status.EMBEDDED
        both = in_a & in_b
        counts += [(in_a & ~in_b).sum(), (in_b & ~in_a).sum(), both.sum()]
        for name in pooling if both.any() else ():
            distance, cosine = _measure_movement(left.pooled[name][i[both]], right.pooled[name][j[both]])
            distances[name].append(distance)
            cosines[name].append(cosine)
    moved = {}
    for name in pooling if counts[2] else ():
        distance, cosine = np.concatenate(distances[name]), np.concatenate(cosines[name])
        moved[name] = Movement(
            len(distance), float(np.median(distance)), float(distance.max()), float(np.median(cosine))
        )
    only_a, only_b, embedded = counts.tolist()
    return only_a, only_b, embedded, moved


def _measure_movement(a: Float16Array, b: Float16Array) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return for each row of (n, D) the norm of the difference over the norm of a, and the cosine; in float64."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    tiny = np.finfo(np.float16).tiny  # a vector of zeros has no norm to divide by
    norm_a, norm_b = (np.maximum(np.linalg.norm(vectors, axis=1), tiny) for vectors in (left, right))
    distance = np.linalg.norm(left - right, axis=1) / norm_a
    cosine = np.einsum("nd,nd->n", left, right) / norm_a / norm_b
    return distance.astype(np.float32), cosine.astype(np.float32)


def _walk_pairs(
    a: Version, rows_a: _Rows, b: Version, rows_b: _Rows
) -> Iterator[tuple[BlockValues, _Rows, BlockValues, _Rows]]:
    """Group ascending pairs of rows by block; yield A's block and the rows in it, then B's.

    Both tables are sorted by name, so every block is read once.
    """
    if not len(rows_a):
        return
    (blocks_a, inside_a), (blocks_b, inside_b) = (
        np.divmod(rows, version.layout.block_rows) for version, rows in ((a, rows_a), (b, rows_b))
    )
    edges = np.flatnonzero(np.diff(blocks_a) | np.diff(blocks_b)) + 1
    stream_a, stream_b = _stream_blocks(a, blocks_a), _stream_blocks(b, blocks_b)
    starts = [0, *edges.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(rows_a)], strict=True):
        if start == 0 or blocks_a[start] != blocks_a[start - 1]:
            left = next(stream_a)
        if start == 0 or blocks_b[start] != blocks_b[start - 1]:
            right = next(stream_b)
        yield left, inside_a[start:stop], right, inside_b[start:stop]


def _stream_blocks(version: Version, blocks: _Rows) -> Iterator[BlockValues]:
    """Read each of these blocks once, ascending; a few are read ahead, since a bucket answers slowly."""
    waiting: deque[Future[BlockValues]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD) as threads:
        for block in np.unique(blocks).tolist():
            waiting.append(threads.submit(_read_trusted, version, block))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_trusted(version: Version, block: int) -> BlockValues:
    """Read a block; if it is damaged or not committed, all its rows are pending."""
    try:
        return version.read_trusted(block)
    except IntegrityError:
        return BlockValues.make_blank(version.layout, version.layout.count_rows([block]))

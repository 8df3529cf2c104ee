"""A cache for notebooks: names, vectors, labels, and masks of the rows that can be used.

cache = open_cache("cache/train-vitl16-512")
x = cache["cls"][cache.usable]              # (n, D) float16, digests checked
y = cache.labels[cache.usable]              # (n, C) bool, columns named by cache.classes
"""

from collections.abc import Iterator
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import zarr

from .block import BlockValues, CacheRows
from .errors import CacheNotFoundError, IntegrityError, TaxonomyError
from .layout import POOLED_DTYPE, BoolArray, Float16Array, Status, UInt8Array, count_blocks
from .root import CacheRoot
from .table import TileTable
from .taxonomy import DecodedLabels, LabelIds, RawLabels, Taxonomy, refuse_meaningless
from .version import TakeBlock, Version


class Cache(Version):
    """One version, opened for reading, with its labels decoded by a class list.

    Everything is read on first use, and its digests are checked. Table, status and labels are kept in memory (about 500
    bytes a tile), vectors are not. The first use of status or labels reads the whole version once, a few blocks at a
    time, since the digest of a block also covers its vectors.

    Attributes:
        taxonomy: the class list.
        provenance, recorded: what the vectors were made from, see `Provenance` and `Recorded`.
    """

    def __init__(
        self, url: str, version_id: str, group: zarr.Group, taxonomy: Taxonomy, label_ids: LabelIds | None
    ) -> None:
        super().__init__(url, version_id, group)
        self.taxonomy = taxonomy
        self._label_ids = label_ids
        self._opened: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.layout.rows

    def __getitem__(self, pooling: str) -> "Embeddings":
        """Return the pooled array of that name, `cls` or `patch_mean`, not read yet.

        Raises:
            KeyError: the version holds no such array.
        """
        if pooling not in self.layout.pooling:
            raise KeyError(f"{pooling}: this cache holds {', '.join(self.layout.pooling)}")
        return Embeddings(self, pooling)

    @cached_property
    def table(self) -> TileTable:
        """The tile table, see `TileTable`."""
        return self.read_table()

    @cached_property
    def tiles(self) -> npt.NDArray[np.object_]:
        """(N,) names below TILES, ascending, such as `images/1052_3_7.png`.

        They are Python strings, since pandas, xarray and scikit-learn do not all take NumPy's StringDType.
        """
        return self.table.tile.astype(object)

    @property
    def classes(self) -> tuple[str, ...]:
        """C names of the columns of `labels`."""
        return self.taxonomy.names

    @property
    def labels(self) -> BoolArray:
        """(N, C) bool: class present in the tile. Rows without a label file are not negatives: take `usable` rows.

        Raises:
            TaxonomyError: the labels may hold type ids or class ids, or more than 1 % of all lines mean nothing.
            IntegrityError: a block does not match its digest.
        """
        return self._decoded.labels

    @property
    def status(self) -> UInt8Array:
        """(N,) uint8, see `Status`: 1 embedded, 0 not yet, 2 and up the reasons for quarantine.

        Raises:
            IntegrityError: a block does not match its digest.
        """
        return self._settled.status

    @cached_property
    def embedded(self) -> BoolArray:
        """(N,) bool: rows that have a vector. In other rows it is NaN."""
        return np.asarray(self.status == Status.EMBEDDED)

    @cached_property
    def usable(self) -> BoolArray:
        """(N,) bool: rows that trainers use, with a vector and a label file that is empty or names a known class."""
        return np.asarray(self.embedded & self.table.labelled & ~self._decoded.unusable)

    @cached_property
    def _decoded(self) -> DecodedLabels:
        raw = RawLabels.pack(self._settled.label_ids)
        reading = self._label_ids or self.taxonomy.detect_label_ids(raw.totals)
        decoded = self.taxonomy.decode(raw, reading)
        refuse_meaningless(raw, self.table.tile, decoded, reading)
        return decoded

    @cached_property
    def _settled(self) -> CacheRows:
        """Status and label ids without vectors."""
        return self._gather((), self.scan_whole)

    def scan_whole(self, take: TakeBlock, blocks: npt.ArrayLike | None = None) -> None:
        """Scan like `scan`, but raise an error where that skips a committed block.

        Raises:
            IntegrityError: a committed block cannot be read or does not match its commit.
        """
        wanted = np.flatnonzero(self._commits().any(axis=1))
        wanted = wanted if blocks is None else np.intersect1d(wanted, blocks)
        seen = []

        def note(block: int, values: BlockValues) -> None:
            take(block, values)
            seen.append(block)

        self.scan(note, blocks)
        damaged = np.setdiff1d(wanted, seen).tolist()
        if damaged:
            rows = self.layout.block_slice(damaged[0])
            raise IntegrityError(
                f"{self.url}: {count_blocks(len(damaged))} damaged, rows {rows.start} to {rows.stop - 1} first: "
                f"run `python -m cache_schema verify {self.url} --repair` and `make extract`, "
                "then open it again"
            )

    # Kept, since each is a request to a bucket, and a sealed version does not change.

    def _commits(self, blocks: slice = slice(None)) -> UInt8Array:
        if blocks == slice(None) or "_known_commits" in vars(self):
            return self._known_commits[blocks]
        return super()._commits(blocks)  # a share of the blocks, without reading the others

    @cached_property
    def _known_commits(self) -> UInt8Array:
        return super()._commits()

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = super()._open(name)
        return self._opened[name]

    def __repr__(self) -> str:
        return f"<Cache {self.url}: {'; '.join(text for _, text in self._describe())}>"

    def _repr_html_(self) -> str:
        rows = [("Cache", self.url), *self._describe()]
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
        return f"<table>{cells}</table>"

    def _describe(self) -> list[tuple[str, str]]:
        """List headings and texts from the attributes alone."""
        made, recorded = self.provenance, self.recorded
        finished = "sealed" if self.sealed else f"unfinished, {int((~self.committed()).sum())} blocks to do"
        return [
            ("Vectors", f"{len(self):,} tiles x {made.width:,} ({', '.join(made.pooling)}) float16"),
            ("Backbone", f"{recorded.backbone!r} at {made.image_size} px in {made.precision}"),
            ("Tiles", f"from {recorded.tiles!r}"),
            ("Version", f"version {self.id}, {finished}"),
        ]


class Embeddings:
    """A pooled array of a cache, read by NumPy's indexing: a number, a slice, a mask or an array of rows.

    It reads the blocks that hold these rows, and keeps only the rows. `np.asarray` reads all. A row without a vector is
    NaN: `Cache.usable` and `Cache.embedded` say which rows have one.
    """

    def __init__(self, cache: Cache, pooling: str) -> None:
        self._cache, self._pooling = cache, pooling
        self.shape = (len(cache), cache.layout.width)
        self.dtype = POOLED_DTYPE

    @property
    def ndim(self) -> int:
        return 2

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Embeddings {self._pooling} {self.shape} {self.dtype}, unread>"

    def __getitem__(self, rows: Any) -> Float16Array:
        """Read (…, D) float16, these rows of the first axis.

        Raises:
            IndexError: as in NumPy.
            IntegrityError: a block that holds one of them does not match its digest.
        """
        chosen = np.arange(len(self))[rows]
        numbers = chosen.ravel()
        vectors = np.full((len(numbers), self.shape[1]), np.nan, self.dtype)
        block_rows = self._cache.layout.block_rows
        order = np.argsort(numbers, kind="stable")
        blocks, starts = np.unique(numbers[order] // block_rows, return_index=True)
        parts = dict(zip(blocks.tolist(), np.split(order, starts[1:]), strict=False))

        def take(block: int, values: BlockValues) -> None:
            where = parts[block]
            vectors[where] = values.pooled[self._pooling][numbers[where] - block * block_rows]

        self._cache.scan_whole(take, blocks)
        return vectors.reshape(*chosen.shape, self.shape[1])

    def __iter__(self) -> Iterator[Float16Array]:
        """Read row after row, each block once."""
        for rows in self._cache.layout.block_slices():
            yield from self[rows]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


def open_cache(
    url: str | Path,
    *,
    version: str | None = None,
    allow_unsealed: bool = False,
    taxonomy: Taxonomy | str | Path | None = None,
    label_ids: LabelIds | Literal["auto"] = "auto",
) -> Cache:
    """Open the version in use of the cache at `url`, for reading.

    Args:
        url: directory or `gs://bucket/prefix`.
        version: id of another version than the one in use.
        allow_unsealed: accept a version whose extraction has not finished; its missing rows are pending.
        taxonomy: a class list or its CSV, see `Taxonomy.from_file`; None for xView's.
        label_ids: whether labels hold type ids or class ids; `auto` decides from all of them when labels are read.

    Raises:
        CacheNotFoundError: there is no finished version; the message says how much is missing.
        CacheFormatError: not a cache, or in a format that this program does not read.
        TaxonomyError: the class list cannot be used, or `label_ids` has another value.
    """
    if label_ids not in ("auto", *get_args(LabelIds)):
        raise TaxonomyError(f"label_ids {label_ids!r}: choose auto, type or class")
    if taxonomy is None:
        taxonomy = Taxonomy.xview()
    elif not isinstance(taxonomy, Taxonomy):
        taxonomy = Taxonomy.from_file(taxonomy)
    opened = _open_version(CacheRoot(str(url), read_only=True), version, allow_unsealed)
    return Cache(opened.url, opened.id, opened.group, taxonomy, None if label_ids == "auto" else label_ids)


def _open_version(root: CacheRoot, version: str | None, allow_unsealed: bool) -> Version:
    chosen = version or root.current()
    if chosen is None:
        unfinished = root.versions()
        if not unfinished:
            raise CacheNotFoundError(f"no cache at {root.url}: run `make extract` first, or check CACHE")
        if not allow_unsealed or len(unfinished) > 1:
            raise CacheNotFoundError(f"no finished version in {root.url}: {_describe_unfinished(root, unfinished)}")
        chosen = unfinished[0]
    opened = root.open_version(chosen)
    if not opened.sealed and not allow_unsealed:
        missing = _describe_unfinished(root, [chosen])
        raise CacheNotFoundError(f"version {chosen} of {root.url} is not finished: {missing}")
    return opened


def _describe_unfinished(root: CacheRoot, versions: list[str]) -> str:
    parts = []
    for version_id in versions:
        try:
            version = root.open_version(version_id)
        except CacheNotFoundError:  # its creation was interrupted
            parts.append(f"all rows are missing in {version_id}")
            continue
        missing = version.layout.count_rows(np.flatnonzero(~version.committed()).tolist())
        parts.append(f"{missing:,} of {version.layout.rows:,} rows are missing in {version_id}")
    return "; ".join(parts) + ": run `make extract` again to finish it"

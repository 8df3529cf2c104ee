"""Usable rows of a cache with their labels, and access to their vectors.

`read_labelled_cache` reads a version once, shared between the ranks; `label_rows` decides which rows are usable and
says why the others are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema import (
    LABEL_ID_COLUMNS,
    BlockValues,
    IntegrityError,
    LabelIds,
    RawLabels,
    Status,
    Taxonomy,
    TileTable,
    Version,
)
from cache_schema.cli.text import show_first
from cache_schema.layout import STATUS_DTYPE, BoolArray, UInt8Array
from cache_schema.taxonomy import describe_meaningless, refuse_meaningless
from extract.ranks.exchange import exchange, share_out
from extract.ranks.group import Ranks
from extract.tiles.scenes import find_scenes
from train.config import DataConfig
from train.errors import TrainError

from .vectors import HeldVectors, Residence, Vectors


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """n usable rows of a table and their labels.

    Attributes:
        index: (n,) int64 rows of the table.
        tiles: (n,) tile names.
        scenes: (n,) scene of each tile.
        labels: (n, C) bool.
        reading: how the raw label ids were read, as type or as class ids.
        class_ids, class_names: C each.
        notes: lines for the user: what was left out, and why.
        repeat_factors: (n,) float64, mean number of times a training epoch shows each row; None means once.
    """

    index: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.str_]
    scenes: npt.NDArray[np.str_]
    labels: BoolArray
    reading: LabelIds
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    repeat_factors: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def empty(self) -> BoolArray:
        """(n,) bool, tiles that show none of the classes."""
        return np.asarray(~self.labels.any(axis=1))

    def describe(self, chosen: Sequence[int]) -> str:
        """Name some of the n rows for an error message, by table row and tile."""
        named = [f"{self.index[i]} ({self.tiles[i]})" for i in chosen]
        return f"{'row' if len(chosen) == 1 else 'rows'} {show_first(named)}"

    def select(self, chosen: BoolArray) -> Self:
        """Return the rows where `chosen` (n,) is true."""
        return replace(
            self,
            index=self.index[chosen],
            tiles=self.tiles[chosen],
            scenes=self.scenes[chosen],
            labels=self.labels[chosen],
            repeat_factors=None if self.repeat_factors is None else self.repeat_factors[chosen],
        )


@dataclass(frozen=True, eq=False)
class LabelledCache:
    """Usable rows of one version, and its vectors.

    The table is not kept, since only tile streaming needs it: ten million rows of it take most of a gigabyte.
    """

    version: Version
    vectors: Vectors
    rows: LabelledRows

    def select(self, chosen: BoolArray) -> Self:
        """Return the same version with the rows where `chosen` is true."""
        return replace(self, rows=self.rows.select(chosen))


def read_labelled_cache(
    version: Version,
    config: DataConfig,
    residence: Residence,
    ranks: Ranks,
    *,
    allow_unsealed: bool = False,
    reading: LabelIds | None = None,
) -> LabelledCache:
    """Read labels and vectors of a version once, with its blocks shared between the ranks.

    Every rank must call this. All ranks return the same rows, or all raise.

    Args:
        version: the same on every rank.
        allow_unsealed: accept an unfinished version, without its missing rows.
        reading: how to read the raw label ids, if another cache has decided it.

    Raises:
        CacheError: the cache is damaged, or holds vectors that are not finite.
        TaxonomyError: labels fit neither reading, or too many are meaningless.
        TrainError: rows are missing, no row is embedded, or the memory budget is too small.
    """
    url = version.url
    vectors = ranks.run_everywhere(lambda: residence.place(version))
    raw, status = _scan(version, vectors, ranks)

    def label() -> LabelledRows:
        _check_status(url, status, allow_unsealed)
        return label_rows(version.read_table(), raw, status, config, reading=reading)

    rows = ranks.run_everywhere(label)
    return LabelledCache(version, vectors, replace(rows, notes=(f"cache {url}", *rows.notes)))


def _scan(version: Version, vectors: Vectors, ranks: Ranks) -> tuple[RawLabels, UInt8Array]:
    """Read raw labels and status (N,) of all rows into memory, and the vectors into `vectors`.

    Rows of a block that fails its check count as pending. Ranks exchange 17 bytes a row and 1 KiB a block, and what
    `vectors` exchanges.
    """
    layout = version.layout
    marks = np.zeros((layout.rows, LABEL_ID_COLUMNS // 8), np.uint8)
    totals = np.zeros((layout.blocks, LABEL_ID_COLUMNS), np.int64)
    status = np.full(layout.rows, Status.PENDING, STATUS_DTYPE)

    def take(block: int, values: BlockValues) -> None:
        rows = layout.block_slice(block)
        # A digest matches NaN as well, and one NaN would spoil every weight.
        for line in values.find_contradictions(layout, rows):
            url = version.url
            raise IntegrityError(
                f"{url}: {line}: `python -m cache_schema verify {url} --repair` and `make extract` redo its block"
            )
        found = RawLabels.pack(values.label_ids)
        marks[rows], totals[block], status[rows] = found.marks, found.totals, values.status
        vectors.keep(block, values)

    shares = share_out(layout.blocks, ranks.world_size)
    mine = shares[ranks.rank]
    ranks.run_everywhere(lambda: version.scan(take, range(mine.start, mine.stop)))
    of_rows = [layout.span(share) for share in shares]
    for values, parts in ((marks, of_rows), (status, of_rows), (totals, shares)):
        exchange(torch.from_numpy(values), parts, ranks)
    vectors.exchange(shares, ranks)
    return RawLabels(marks, totals.sum(axis=0)), status


def _check_status(cache: str, status: UInt8Array, allow_unsealed: bool) -> None:
    """Refuse a cache with missing rows, unless `allow_unsealed`, or without an embedded row."""
    missing, embedded = int((status == Status.PENDING).sum()), int((status == Status.EMBEDDED).sum())
    if missing and not allow_unsealed:
        raise TrainError(
            f"{missing:,} rows of {cache} are missing or damaged: `python -m cache_schema verify {cache}` "
            "names the blocks; run `make extract` again, or pass --allow-unsealed to train without them"
        )
    if not embedded:
        raise TrainError(
            f"no row of {cache} is embedded: {len(status) - missing:,} are quarantined, {missing:,} missing: see "
            f"`python -m cache_schema info {cache}`, fix the tiles and run `make extract ARGS=--retry-quarantined`"
        )


def label_rows(
    table: TileTable,
    raw: RawLabels,
    status: UInt8Array,
    config: DataConfig,
    *,
    reading: LabelIds | None = None,
) -> LabelledRows:
    """Select the usable rows of N, and decode their labels.

    Args:
        raw: contents of the label files.
        status: (N,) uint8, see `Status`.
        reading: how to read the raw ids, if known; else as `config` says.

    Raises:
        TaxonomyError: ids fit neither reading, or too many lines are meaningless.
        TrainError: the classes to exclude are unknown, or all of them.
    """
    taxonomy = Taxonomy.from_file(config.taxonomy) if config.taxonomy else Taxonomy.xview()
    if reading is None:
        reading = taxonomy.detect_label_ids(raw.totals) if config.label_ids == "auto" else config.label_ids
    decoded = taxonomy.decode(raw, reading)
    refuse_meaningless(raw, table.tile, decoded, reading)
    kept = [i for i in range(len(taxonomy)) if i not in config.exclude]
    if not kept or set(config.exclude) - set(range(len(taxonomy))):
        raise TrainError(
            f"--exclude {','.join(map(str, config.exclude))}: give class ids from 0 to {len(taxonomy) - 1}, but not all"
        )
    embedded = status == Status.EMBEDDED
    left_out = {
        "are quarantined": int((status > Status.EMBEDDED).sum()),
        "are not embedded yet": int((status == Status.PENDING).sum()),
        "have no label file": int((embedded & ~table.labelled).sum()),
        "have labels, but of no known class": int((embedded & decoded.unusable).sum()),
    }
    notes = [f"{len(table):,} rows, label ids read as {reading} ids"]
    notes += [f"{count:,} tiles {what}: left out" for what, count in left_out.items() if count]
    if decoded.artefacts:
        notes.append(f"{decoded.artefacts:,} instances of annotation artefacts dropped")
    if decoded.meaningless:
        notes.append(describe_meaningless(raw, table.tile, decoded, reading))
    index = np.flatnonzero(embedded & table.labelled & ~decoded.unusable)
    return LabelledRows(
        index=index,
        tiles=table.tile[index],
        scenes=find_scenes(table.tile[index], config.scene_regex),
        labels=decoded.labels[index[:, None], kept],
        reading=reading,
        class_ids=tuple(kept),
        class_names=tuple(taxonomy.names[i] for i in kept),
        notes=tuple(notes),
    )


def read_vectors(cache: LabelledCache, chosen: Tensor) -> Tensor:
    """Return vectors of rows of a set, (b, F) float32 on the device that holds them; see `can_look_up`.

    Args:
        cache: n rows whose vectors are held in memory.
        chosen: (b,) int64 on the CPU, positions among the n.
    """
    assert isinstance(cache.vectors, HeldVectors)
    return cache.vectors.gather(torch.from_numpy(cache.rows.index[chosen.numpy()])).float()


def can_look_up(*caches: LabelledCache) -> bool:
    """Return whether all vectors are held in memory, so that comparisons need not read the cache again."""
    return all(isinstance(cache.vectors, HeldVectors) for cache in caches)

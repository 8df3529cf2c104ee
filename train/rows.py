"""Rows of a cache with their labels: what a trainer may use, and what it leaves out and why."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from cache_schema import CacheRows, LabelIds, Status, Taxonomy, TaxonomyError, TileTable, Version, open_cache
from cache_schema.layout import BoolArray
from extract.scenes import find_scenes

from .config import DataConfig
from .errors import TrainError

MAX_MEANINGLESS = 0.01
"""Largest share of label lines that are malformed or name an unknown id."""


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """n usable rows of one version.

    Attributes:
        version: of the cache they are from.
        values: all rows of that version in memory.
        index: (n,) int64 rows of the version.
        tiles: (n,) names.
        scenes: (n,) scene of each tile.
        labels: (n, C) bool.
        reading: which ids the raw label ids were taken for.
        class_ids, class_names: C each.
        notes: lines for the user: what was left out, and why.
    """

    version: Version
    values: CacheRows
    index: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.str_]
    scenes: npt.NDArray[np.str_]
    labels: BoolArray
    reading: LabelIds
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def empty(self) -> BoolArray:
        """(n,) bool: tiles that show none of the classes."""
        return np.asarray(~self.labels.any(axis=1))

    def select(self, chosen: npt.NDArray[np.bool_]) -> Self:
        """The rows where `chosen` (n,) is true."""
        kept = {name: getattr(self, name)[chosen] for name in ("index", "tiles", "scenes", "labels")}
        return type(self)(**{**self.__dict__, **kept})


def read_labelled_rows(
    cache: str, config: DataConfig, *, allow_unsealed: bool = False, reading: LabelIds | None = None
) -> LabelledRows:
    """Open a cache, read it into memory and decide what each row's labels are.

    Args:
        cache: directory or `gs://…`.
        config: classes and label rules.
        allow_unsealed: accept an unfinished version, without its missing rows.
        reading: of the raw ids, where another cache has decided it.

    Raises:
        CacheError: the cache is missing, unfinished or damaged.
        TaxonomyError: labels that fit neither reading, or too many that mean nothing.
    """
    version = open_cache(cache, allow_unsealed=allow_unsealed)
    values = version.read_rows()
    if values.missing and not allow_unsealed:
        raise TrainError(
            f"{values.missing:,} rows of {cache} are missing or damaged: `python -m cache_schema verify {cache}` "
            "names the blocks; run `make extract` again, or pass --allow-unsealed to train without them"
        )
    taxonomy = Taxonomy.from_file(config.taxonomy) if config.taxonomy else Taxonomy.xview()
    table = version.read_table()
    if reading is None:
        histogram = values.label_ids.sum(axis=0, dtype=np.int64)
        reading = taxonomy.detect_label_ids(histogram) if config.label_ids == "auto" else config.label_ids
    decoded = taxonomy.decode(values.label_ids, reading)
    meaningless = sum(decoded.unknown.values()) + decoded.malformed
    if meaningless > MAX_MEANINGLESS * max(decoded.instances, 1):
        raise TaxonomyError(_describe_meaningless(values, table, decoded.unknown, decoded.malformed, reading))
    kept = [i for i in range(len(taxonomy)) if i not in config.exclude]
    labels = decoded.labels[:, kept]
    usable = values.embedded & table.labelled & ~decoded.unusable
    left_out = {
        "without embedding (quarantined)": int((values.status > Status.EMBEDDED).sum()),
        "not embedded yet": values.missing,
        "without a label file": int((values.embedded & ~table.labelled).sum()),
        "with labels of no known class only": int((values.embedded & decoded.unusable).sum()),
    }
    notes = [f"{cache}: {len(table):,} rows, label ids read as {reading} ids"]
    notes += [f"{count:,} tiles {what}: left out" for what, count in left_out.items() if count]
    if decoded.artefacts:
        notes.append(f"{decoded.artefacts:,} instances of annotation artefacts dropped")
    if meaningless:
        notes.append(_describe_meaningless(values, table, decoded.unknown, decoded.malformed, reading))
    index = np.flatnonzero(usable)
    return LabelledRows(
        version=version,
        values=values,
        index=index,
        tiles=table.tile[index],
        scenes=find_scenes(table.tile[index], config.scene_regex),
        labels=labels[index],
        reading=reading,
        class_ids=tuple(kept),
        class_names=tuple(taxonomy.names[i] for i in kept),
        notes=tuple(notes),
    )


def _describe_meaningless(
    values: CacheRows, table: TileTable, unknown: dict[int, int], malformed: int, reading: LabelIds
) -> str:
    """Which label lines mean nothing, where the first of them are, and what to do."""
    columns = [*unknown, values.label_ids.shape[1] - 1]
    rows = np.flatnonzero(values.label_ids[:, columns].any(axis=1))[:3].tolist()
    ids = ", ".join(f"{label_id} ({count:,}x)" for label_id, count in unknown.items())
    parts = [f"ids {ids} are no xView {reading} ids" if reading and unknown else "", f"{malformed:,} malformed lines"]
    share = (sum(unknown.values()) + malformed) / max(int(values.label_ids.sum(dtype=np.int64)), 1)
    return (
        f"{share:.2%} of all label lines are ignored: {'; '.join(p for p in parts if p)} "
        f"(first in the labels of {', '.join(str(table.tile[row]) for row in rows)}); above {MAX_MEANINGLESS:.0%} "
        "a run ends here: mend the files, set --label-ids, or give a --taxonomy"
    )

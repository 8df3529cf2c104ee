"""Check the tiles: fetch and decode a sample, and check its labels and the scenes in the names."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import comb

import numpy as np
from PIL import Image

from cache_schema import RawLabels, Status, Taxonomy, TaxonomyError, format_histogram
from cache_schema.cli.text import show_first, show_name
from cache_schema.taxonomy import MAX_MEANINGLESS
from extract.errors import TileGoneError
from extract.tiles.batch import PendingBatch, TileBatch, make_requests
from extract.tiles.scenes import MIN_SCENES, find_scenes
from extract.tiles.source import CONCURRENT_READS, Source

from .finding import Concern, Verdict
from .storage import Found

_CHANCE = 0.05
"""Probability below which so many bad tiles in a sample are not chance."""


@dataclass(frozen=True)
class Sample:
    """Tiles drawn at random, read as an extraction reads them.

    Attributes:
        batch: images, labels and problems.
        fetch_s, decode_s: seconds per tile: in one process with many reads in flight, and on one core.
        tile_bytes: decoded size of the largest tile.
    """

    batch: TileBatch
    fetch_s: float
    decode_s: float
    tile_bytes: int


def check_sample(source: Source, found: Found, size: int, seed: int, max_quarantined: float) -> Verdict[Sample]:
    """Fetch and decode `size` tiles drawn by `seed`.

    Raises:
        SourceError: an outage, refused access, a label that changed: anything that is not one tile's own fault.
    """
    drawn = np.random.default_rng(seed).choice(len(found.table), min(size, len(found.table)), replace=False)
    requests = make_requests(found.table, np.sort(drawn).tolist())
    peeking = _PeekingSource(source)
    with suppress(TileGoneError):  # opens the connection, so that no tile's time includes it
        source.read(requests[0].tile, requests[0].generation)
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        batch = PendingBatch(peeking, pool, requests).finish()
    embedded = np.flatnonzero(batch.status == Status.EMBEDDED).tolist()
    shapes = [tuple(batch.images[row].shape) for row in embedded]
    largest = max((int(np.prod(shape)) for shape in shapes), default=0)
    sample = Sample(batch, batch.fetch_s / len(batch), batch.decode_s / len(batch), largest)
    sizes = Counter(f"{width} x {height}" for height, width, _ in shapes)
    detail = (
        f"{len(embedded)} of {len(batch)} tiles drawn (--seed {seed}) are images: {_count(sizes)} px; "
        f"{_count(peeking.kinds)}; {1000 * sample.fetch_s:.1f} ms to fetch and {1000 * sample.decode_s:.1f} to decode"
    )
    concerns = [*_judge_failures(batch, len(found.table), max_quarantined)]
    if any(height != width for height, width, _ in shapes):
        concerns.append(Concern("warning", "some are not square and would be distorted", "cut square tiles"))
    return Verdict(sample, detail, concerns)


def _judge_failures(batch: TileBatch, tiles: int, max_quarantined: float) -> Iterator[Concern]:
    failed = int((batch.status > Status.EMBEDDED).sum())
    if not failed:
        return
    reasons = [show_name(problem) for problem in batch.problems if ": quarantined: " in problem]
    what = f"{failed} of {len(batch)} tiles would be quarantined: {show_first(reasons, separator='; ', limit=3)}"
    drawn_all = len(batch) == tiles
    too_many = failed > max_quarantined * tiles if drawn_all else is_no_accident(failed, len(batch), max_quarantined)
    limit = f"more than --max-quarantined {max_quarantined} ends an extraction"
    yield Concern("fail" if too_many else "warning", what, f"fix or remove such tiles: {limit}")


def is_no_accident(failed: int, drawn: int, share: float) -> bool:
    """Return whether so many failures would be unlikely (below 1 in 20) if only `share` of all tiles were bad."""
    fewer = sum(comb(drawn, k) * share**k * (1 - share) ** (drawn - k) for k in range(failed))
    return 1 - fewer < _CHANCE


class _PeekingSource:
    """A source that counts the image formats it reads, which a decoded tile no longer shows."""

    def __init__(self, source: Source) -> None:
        self.url, self.identity = source.url, source.identity
        self.list, self.read_checked = source.list, source.read_checked
        self._source = source
        self.kinds: Counter[str] = Counter()

    def read(self, name: str, generation: int) -> bytes:
        data = self._source.read(name, generation)
        if name.startswith("images/"):
            # Ignore all errors on broken files: decoding will report them.
            with warnings.catch_warnings(), suppress(Exception):
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF"))
                self.kinds[f"{image.format} {image.mode}"] += 1
        return data


def _count(counts: Counter[str]) -> str:
    """Format counts as `512 x 512 (20), 500 x 512 (4)`; a single kind without its count."""
    names = [name if len(counts) == 1 else f"{name} ({count})" for name, count in counts.most_common()]
    return show_first(names) or "none"


def check_labels(sample: Sample) -> Verdict[bool]:
    """Count the lines in the sample's label files, and name malformed ones."""
    batch = sample.batch
    malformed = [show_name(problem) for problem in batch.problems if problem.endswith(": malformed line")]
    empty = int((batch.label_ids.sum(axis=1) == 0).sum())
    detail = f"{batch.label_lines:,} lines in the label files of {len(batch)} tiles; {empty} tiles have no labels"
    # The last column counts malformed lines and ids above 126.
    share = int(batch.label_ids[:, -1].sum()) / max(batch.label_lines, 1)
    if not share:
        return Verdict(True, detail)
    what = f"{share:.1%} of lines are malformed or hold an id above 126"
    if malformed:
        what += f": {show_first(malformed, limit=3)}"
    remedy = (
        f"fix them (`id cx cy w h`, the last four between 0 and 1); above {MAX_MEANINGLESS:.0%} training refuses a set"
    )
    return Verdict(True, detail, [Concern("fail" if share > 0.5 else "warning", what, remedy)])


def check_label_ids(sample: Sample, taxonomy_file: str | None) -> Verdict[str]:
    """Decide, by the rule that training applies to the whole set, whether the sample has type ids or class ids.

    Raises:
        TaxonomyError: the class list cannot be read.
    """
    taxonomy = Taxonomy.from_file(taxonomy_file) if taxonomy_file else Taxonomy.xview()
    raw = RawLabels.pack(sample.batch.label_ids)
    seen = f"in a sample of {len(raw.marks)} tiles; instances per id: {format_histogram(raw.totals)}"
    if not raw.totals[:-1].any():
        remedy = "draw a larger --sample; training decides on the whole set"
        return Verdict("unknown", "", [Concern("warning", f"no label id {seen}", remedy)])
    try:
        reading = taxonomy.detect_label_ids(raw.totals)
    except TaxonomyError:
        # If neither reading explains all ids, both kinds are mixed, and a larger sample cannot change that.
        mixed = all(taxonomy.decode(raw, reading).unknown for reading in ("type", "class"))
        what = "type ids and class ids are mixed" if mixed else "every id is both a type id and a class id"
        remedy = "train with ARGS='--label-ids type' or 'class', whichever is meant"
        if mixed:
            remedy = f"fix the labels, or {remedy}"
        return Verdict("unknown", "", [Concern("fail" if mixed else "warning", f"{what} {seen}", remedy)])
    decoded = taxonomy.decode(raw, reading)
    classes = int(decoded.labels.any(axis=0).sum())
    detail = f"{reading} ids, {classes} of {len(taxonomy)} classes, {seen}"
    if decoded.artefacts:
        detail += f"; {decoded.artefacts:,} instances of annotation artefacts are dropped"
    unknown = sum(decoded.unknown.values())
    if not unknown:
        return Verdict(reading, detail)
    share = unknown / decoded.instances
    ids = ", ".join(f"{label_id} ({count:,}x)" for label_id, count in decoded.unknown.items())
    what = f"{share:.1%} of instances have ids that are not in this class list: {ids}"
    remedy = f"give the class list they belong to with --taxonomy; above {MAX_MEANINGLESS:.0%} training refuses a set"
    return Verdict(reading, detail, [Concern("fail" if share > 0.5 else "warning", what, remedy)])


def check_scenes(found: Found, scene_regex: str) -> Verdict[int]:
    """Check that tiles can be split by scene.

    Raises:
        ConfigError: the pattern cannot be used, or some names do not match it.
    """
    names, sizes = np.unique(find_scenes(found.table.tile, scene_regex), return_counts=True)
    examples = ", ".join(show_name(str(name)) for name in names[:3])
    detail = f"{found.at_least}{len(names):,} scenes of {sizes.min():,} to {sizes.max():,} tiles, such as {examples}"
    remedy = "give --scene-regex a pattern whose group (?P<scene>…) is the source image"
    concerns = []
    if len(names) < MIN_SCENES:
        what = f"a split by scene needs {MIN_SCENES}"
        concerns = [Concern("fail" if found.whole else "warning", what, f"{remedy}, or train with a VAL_CACHE")]
    elif len(names) == len(found.table):
        what = "every tile is its own scene: if tiles overlap, a split would leak"
        concerns = [Concern("warning", what, remedy)]
    return Verdict(len(names), detail, concerns)

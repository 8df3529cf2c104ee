"""Plan an extraction: which version of the cache it fills, and which blocks of that version are missing."""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch

from cache_schema import CacheRoot, Provenance, Recorded, Status, TileTable, Version, own_version
from extract.backbone.checkpoint import Checkpoint, find_checkpoint, follow_links
from extract.backbone.precision import DTYPES, choose_precision, multiplies_bf16
from extract.backbone.provenance import make_provenance, record_environment
from extract.ranks.group import get_job_id
from extract.tiles.listing import list_tiles
from extract.tiles.scenes import choose_whole_scenes, find_scenes
from extract.tiles.source import open_source

from .config import ExtractConfig
from .earlier import Changes, find_earlier, open_in_use


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out and every rank needs.

    Attributes:
        cache, version_id: the version to fill.
        earlier_id: another version of the cache; where a tile is the same, its row is copied from there.
        pending: blocks without a commit when the run started.
        to_do: tiles in them that no earlier version holds.
        all_tiles: tiles in the whole bucket, whatever the limit.
        notes: lines for the user.
    """

    cache: str
    version_id: str
    checkpoint: Checkpoint
    earlier_id: str | None
    pending: tuple[int, ...]
    to_do: int
    all_tiles: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Survey:
    """The version that an extraction fills, found without writing anything.

    Attributes:
        cache: URL of the cache.
        table, provenance, recorded: what the version is made from.
        earlier, changes: another version whose rows can be copied, and what changed since; both or none.
        all_tiles, notes: as of a `Plan`.
    """

    cache: str
    checkpoint: Checkpoint
    table: TileTable
    provenance: Provenance
    recorded: Recorded
    earlier: Version | None
    changes: Changes | None
    all_tiles: int
    notes: tuple[str, ...]

    @property
    def version_id(self) -> str:
        return self.provenance.version_id(self.table.identity_digest())


def make_survey(config: ExtractConfig, device: torch.device) -> Survey:
    """List the bucket and read the checkpoint's files, downloading them first if it is a hub id."""
    checkpoint = find_checkpoint(config.backbone, config.image_size)
    source = open_source(config.tiles)
    listing = list_tiles(source, unlabelled=config.unlabelled)
    table = listing.table
    notes = [f"{len(table):,} tiles under {source.url}"]
    if listing.unlabelled:
        notes.append(f"{listing.unlabelled:,} tiles without a label file left out (--unlabelled embeds them)")
    if listing.other:
        notes.append(f"{listing.other:,} objects under images/ are not PNG, JPEG or TIFF: left out")
    if config.limit is not None:
        table = table.select(choose_whole_scenes(find_scenes(table.tile, config.scene_regex), config.limit))
        notes.append(f"LIMIT={config.limit}: {len(table):,} of {len(listing.table):,} tiles, whole scenes")
    cache = config.cache_url(checkpoint.image_size)
    root = CacheRoot(cache, read_only=True)
    provenance = choose_provenance(config, checkpoint, root, table, device)
    recorded = record_environment(
        follow_links(config.backbone), source, config.batch_size, device, provenance.precision
    )
    earlier, changes = find_earlier(root, table, provenance, source.identity) or (None, None)
    if earlier and changes:
        if not config.yes:
            changes.refuse_loss(earlier, source.url)
        notes.append(f"since version {earlier.id}: {changes.describe()}")
        notes += [f"differs from the run that made it: {d}" for d in earlier.recorded.differences(recorded)]
        # Computed rows must come from batches of the same size as the kept rows.
        recorded = replace(recorded, batch_size=earlier.recorded.batch_size)
    all_tiles = len(listing.table)
    return Survey(cache, checkpoint, table, provenance, recorded, earlier, changes, all_tiles, tuple(notes))


def make_plan(config: ExtractConfig, device: torch.device, at_end: ExitStack) -> Plan:
    """Survey the bucket, and open or create the version to fill.

    An unfinished version is locked until `at_end` closes.
    """
    survey = make_survey(config, device)
    table, provenance, recorded, version_id = survey.table, survey.provenance, survey.recorded, survey.version_id
    earlier, changes, notes = survey.earlier, survey.changes, list(survey.notes)
    root = CacheRoot(survey.cache)
    if config.retry_quarantined or root.current() != version_id or not root.is_sealed(version_id):
        at_end.enter_context(own_version(root.url, version_id, job=get_job_id()))
    version = root.create_version(table, provenance, recorded)
    notes += [f"differs from the run that began this version: {d}" for d in version.recorded.differences(recorded)]
    if earlier and version.recorded.batch_size != earlier.recorded.batch_size:
        # This version was started before the earlier one was finished.
        notes.append(f"nothing is kept from {earlier.id}: a version may not mix sizes of batches")
        earlier, changes = None, None
    if config.retry_quarantined:
        notes.append(_reopen_quarantined(version, table))
    pending = tuple(np.flatnonzero(~version.committed()).tolist())
    unknown = ~changes.same_tile if changes else np.ones(len(table), bool)
    to_do = sum(int(unknown[version.layout.block_slice(block)].sum()) for block in pending)
    if pending:
        precision = provenance.precision
        notes.append(f"{to_do:,} to do in {precision} -> {survey.cache} (version {version.id})")
        if precision == "bf16" and not multiplies_bf16(device):
            notes.append("this device has no bf16 instructions: --precision float32 would be many times as fast")
    earlier_id = earlier.id if earlier else None
    return Plan(survey.cache, version.id, survey.checkpoint, earlier_id, pending, to_do, survey.all_tiles, tuple(notes))


def choose_provenance(
    config: ExtractConfig, checkpoint: Checkpoint, root: CacheRoot, table: TileTable, device: torch.device
) -> Provenance:
    """Return the provenance of the version to fill.

    Precision `auto` keeps that of a version of this table, finished or begun, whatever the device; a new version takes
    that of the version in use, so that its rows can be kept.
    """
    precision = choose_precision(device) if config.precision == "auto" else config.precision
    fastest = make_provenance(checkpoint, precision, config.pooled_arrays)
    if config.precision != "auto":
        return fastest
    there, digest = root.versions(), table.identity_digest()
    candidates = [fastest, *(replace(fastest, precision=other) for other in DTYPES)]
    in_use = open_in_use(root)
    kept = in_use.provenance if in_use and in_use.provenance in candidates else fastest
    return next((known for known in candidates if known.version_id(digest) in there), kept)


def _reopen_quarantined(version: Version, table: TileTable) -> str:
    """Remove the commits of blocks with quarantined rows, so that this run tries them again."""
    rows = np.flatnonzero(version.read_status() > Status.EMBEDDED)
    if len(rows):
        version.reopen_blocks(sorted(set((rows // version.layout.block_rows).tolist())))
        # A tile may now be the same bytes in a new generation; the sealed version kept the old one.
        version.write_generation(table.generation)
    return f"{len(rows):,} quarantined tiles are tried again"

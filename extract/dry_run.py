"""`extract run --dry-run`: tell what an extraction would do. Nothing is written, and no weights are loaded.

The weight files are read, since their sha256 is part of the version's id.
"""

from contextlib import suppress
from typing import Any

import numpy as np

from cache_schema import CacheNotFoundError, CacheRoot, Layout, Status
from cache_schema.layout import choose_block_rows, count_blocks
from extract.ranks.group import join_ranks
from extract.ranks.same_job import Asked

from .config import ExtractConfig
from .plan import Survey, make_survey
from .timing import estimate_cache_bytes

_MIB = 2**20


def describe_extraction(config: ExtractConfig) -> dict[str, Any] | None:
    """Print what `run_extraction` would do with this configuration.

    Returns:
        the same for scripts, on the main rank: `cache version tiles blocks pending_blocks to_do kept changes
        bytes_to_read cache_bytes precision image_size`; None on the others.

    Raises:
        TileprobeError: an error that would end the extraction before its first block.
    """
    with join_ranks(config.device, Asked.of("extract run --dry-run", config)) as ranks:
        lines, values = ranks.run_on_main(lambda: _describe(config, make_survey(config, ranks.device)))
    if not ranks.is_main:
        return None
    print("\n".join(lines), flush=True)
    return values


def _describe(config: ExtractConfig, survey: Survey) -> tuple[list[str], dict[str, Any]]:
    table, provenance, changes = survey.table, survey.provenance, survey.changes
    version = None
    with suppress(CacheNotFoundError):
        version = CacheRoot(survey.cache, read_only=True).open_version(survey.version_id)
    if survey.earlier and version and version.recorded.batch_size != survey.earlier.recorded.batch_size:
        changes = None  # as in `make_plan`: a version may not mix batch sizes
    rows = len(table)
    layout = version.layout if version else Layout(rows, provenance.width, provenance.pooling, choose_block_rows(rows))
    pending = ~version.committed() if version else np.ones(layout.blocks, bool)
    if version and config.retry_quarantined:
        pending[np.flatnonzero(version.read_status() > Status.EMBEDDED) // layout.block_rows] = True
    unknown = ~changes.same_tile if changes else np.ones(rows, bool)
    unknown &= np.repeat(pending, layout.block_rows)[:rows]
    to_do = int(unknown.sum())
    values: dict[str, Any] = {
        "dry_run": True,
        "cache": survey.cache,
        "version": survey.version_id,
        "exists": version is not None,
        "tiles": rows,
        "blocks": layout.blocks,
        "pending_blocks": int(pending.sum()),
        "to_do": to_do,
        "kept": rows - to_do,
        "changes": survey.changes.count() if survey.changes else None,
        "bytes_to_read": int(table.size[unknown].sum()),
        "cache_bytes": estimate_cache_bytes(rows, layout.width * len(layout.pooling)),
        "precision": provenance.precision,
        "image_size": provenance.image_size,
        "backbone": survey.recorded.backbone,
    }
    blocks = f"{values['pending_blocks']:,} of {count_blocks(layout.blocks)}"
    lines = [
        *survey.notes,
        f"would embed {to_do:,} tiles at {provenance.image_size} px in {provenance.precision} and keep "
        f"{rows - to_do:,}: {blocks} of {survey.cache} (version {survey.version_id})",
        f"would read {values['bytes_to_read'] / _MIB:,.1f} MiB of tiles, for a cache of "
        f"{values['cache_bytes'] / _MIB:,.1f} MiB",
        "dry run: nothing was written",
    ]
    return lines, values

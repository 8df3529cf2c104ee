"""python -m cache_schema info|verify CACHE"""

import json
import sys
from collections import Counter
from typing import Any

import click
import numpy as np

from .errors import IntegrityError, TileprobeError
from .layout import Status, UInt8Array
from .root import open_cache
from .taxonomy import format_histogram
from .version import Version


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look at a cache of embeddings."""


@main.command()
@click.argument("cache")
@click.option("--version", "version_id", help="Another version than the one in use.")
@click.option("--json", "as_json", is_flag=True, help="Print attributes and counts as JSON.")
def info(cache: str, version_id: str | None, as_json: bool) -> None:
    """Say what CACHE holds and what it was made from."""
    version = open_cache(cache, version=version_id, allow_unsealed=True)
    rows = version.read_rows()
    summary: dict[str, Any] = {
        "cache": cache,
        "version": version.id,
        "sealed": version.sealed,
        "rows": version.layout.rows,
        "status": _count_status(rows.status),
        "blocks": version.layout.blocks,
        "block_rows": version.layout.block_rows,
        "bytes": int(sum(array.nbytes for array in rows.pooled.values())),
        "unlabelled": int((~version.read_table().labelled).sum()),
        "label_ids": format_histogram(rows.label_ids.sum(axis=0, dtype=np.int64)),
        "provenance": version.provenance.to_json(),
        "recorded": version.recorded.to_json(),
        "other_versions": [other for other in version.root.versions() if other != version.id],
    }
    click.echo(json.dumps(summary, indent=2) if as_json else _describe(summary))


@main.command()
@click.argument("cache")
@click.option("--version", "version_id", help="Another version than the one in use.")
def verify(cache: str, version_id: str | None) -> None:
    """Recompute every digest of CACHE; ends with status 1 if anything is wrong or unfinished."""
    version = open_cache(cache, version=version_id, allow_unsealed=True)
    problems = _find_problems(version)
    for problem in problems:
        click.echo(problem)
    if problems:
        click.echo(f"{cache}: {len(problems)} problems: `make extract` redoes what is missing or damaged")
        sys.exit(1)
    stored: Any = version.group["status"]
    counts = _describe_status(_count_status(stored[:]))
    rows, blocks = version.layout.rows, version.layout.blocks
    click.echo(f"{cache}: version {version.id} is sound: {rows:,} rows ({counts}) in {blocks:,} blocks, sealed")


def _find_problems(version: Version) -> list[str]:
    """One line per block that is pending or wrong, and what the seal says."""
    problems = []
    committed = version.committed()
    for block, rows in enumerate(version.layout.block_slices()):
        wrong = version.check_block(block) if committed[block] else "is not committed"
        if wrong:
            problems.append(f"block {block} (rows {rows.start}-{rows.stop - 1}): {wrong}")
    if not version.sealed:
        problems.append("the version is not sealed")
    try:
        if version.provenance.version_id(version.read_table().identity_digest()) != version.id:
            problems.append("the tile table or the provenance is not the one this version's id was made from")
        if version.sealed and not version.check_seal():
            problems.append("the seal contradicts the table or the commits")
    except IntegrityError as error:
        problems.append(str(error))
    return problems


def _count_status(status: UInt8Array) -> dict[str, int]:
    counts = Counter(status.tolist())
    return {code.name.lower(): counts[code] for code in Status if counts[code]}


def _describe_status(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def _describe(summary: dict[str, Any]) -> str:
    provenance, recorded = summary["provenance"], summary["recorded"]
    status = _describe_status(summary["status"])
    lines = [
        ("cache", summary["cache"]),
        ("version", f"{summary['version']} ({'sealed' if summary['sealed'] else 'NOT FINISHED'})"),
        ("rows", f"{summary['rows']:,}: {status}; {summary['unlabelled']:,} without a label file"),
        (
            "vectors",
            f"{' + '.join(provenance['pooling'])}, {provenance['width']} x float16, {summary['bytes']:,} bytes",
        ),
        ("blocks", f"{summary['blocks']:,} of {summary['block_rows']} rows"),
        ("tiles", recorded["tiles"]),
        ("backbone", f"{recorded['backbone']}, {provenance['depth']} layers, {provenance['precision']}"),
        ("image size", f"{provenance['image_size']} px, {provenance['resampling']}"),
        ("mean, std", f"{provenance['mean']}, {provenance['std']}"),
        ("weights", provenance["weights_sha256"]),
        ("computed on", f"{recorded['hardware']}, batches of {recorded['batch_size']}, {recorded['attention']}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in recorded["libraries"].items())),
        ("label ids", summary["label_ids"]),
        ("other versions", ", ".join(summary["other_versions"]) or "none"),
    ]
    return "\n".join(f"{name:<15}{value}" for name, value in lines)


def run() -> None:
    """Run the command line; an error a user can act on is one line and status 1."""
    try:
        main()
    except TileprobeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()

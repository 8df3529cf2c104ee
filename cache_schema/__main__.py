"""python -m cache_schema info|verify|diff|gc"""

import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import click
import numpy as np

from cache_schema.cli.command import DONE, FOUND, Group, Outcome, heading, run_group
from cache_schema.storage.place import is_bucket
from cache_schema.upkeep.diff import compare_versions
from cache_schema.upkeep.gc import MIB, find_references, list_versions, remove_versions
from cache_schema.upkeep.lock import own_version
from cache_schema.upkeep.verify import repair_version, verify_version

from .cache import open_cache
from .errors import TileprobeError
from .layout import POOLED_DTYPE, Status, UInt8Array, count_blocks
from .root import CacheRoot
from .taxonomy import format_histogram
from .version import Version


@click.group("cache_schema", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Look after a cache of embeddings."""


@main.command(
    gives_json=True,
    examples=[
        "python -m cache_schema info cache/train-vitl16-512",
        "python -m cache_schema info gs://bucket/cache --json",
    ],
)
@click.argument("cache")
@heading("Data")
@click.option("--version", "version_id", help="Another version than the one in use.  [default: the one in use]")
def info(cache: str, version_id: str | None) -> Outcome:
    """Say what CACHE holds and what it was made from.

    Digests are not checked: verify does that.
    """
    version = open_cache(cache, version=version_id, allow_unsealed=True)
    status, label_ids = version.read_unchecked()
    numbers = version.layout.rows * version.layout.width * len(version.layout.pooling)
    summary: dict[str, Any] = {
        "cache": cache,
        "version": version.id,
        "sealed": version.sealed,
        "rows": version.layout.rows,
        "status": _count_status(status),
        "blocks": version.layout.blocks,
        "block_rows": version.layout.block_rows,
        "bytes": numbers * POOLED_DTYPE.itemsize,
        "unlabelled": int((~version.read_table().labelled).sum()),
        "label_ids": format_histogram(label_ids.sum(axis=0, dtype=np.int64)),
        "provenance": version.provenance.to_json(),
        "recorded": version.recorded.to_json(),
        "other_versions": [other for other in CacheRoot(cache, read_only=True).versions() if other != version.id],
    }
    click.echo(_describe(summary))
    return Outcome(summary)


@main.command(
    gives_json=True,
    examples=[
        "python -m cache_schema verify cache/train-vitl16-512",
        "python -m cache_schema verify cache/train-vitl16-512 --repair",
    ],
)
@click.argument("cache")
@heading("Data")
@click.option("--version", "version_id", help="Another version than the one in use.  [default: the one in use]")
@heading("Output")
@click.option("--repair", is_flag=True, help="Clear the commits of damaged blocks, so that `make extract` redoes them.")
def verify(cache: str, version_id: str | None, repair: bool) -> Outcome:
    """Recompute every digest of CACHE, and name damage by array, block and rows.

    Ends with status 3 if anything is wrong or unfinished, repaired or not: run `make extract` then. To check that the
    vectors are the right ones, run `python -m extract verify-sample`.
    """
    version = open_cache(cache, version=version_id, allow_unsealed=True)
    with own_version(cache, version.id) if repair else nullcontext():
        findings = verify_version(version)
        for line in findings.lines:
            click.echo(line)
        if repair and findings.lines:
            writable = CacheRoot(cache).open_version(version.id, read_only=False)
            click.echo("\n".join(repair_version(writable, findings)))
    if not findings.lines:
        stored: Any = version.group["status"]
        counts = _describe_status(_count_status(stored[:]))
        rows, blocks = version.layout.rows, version.layout.blocks
        click.echo(f"{cache}: version {version.id} is sound: {rows:,} rows ({counts}) in {blocks:,} blocks, sealed")
    elif findings.damaged and not repair:
        click.echo(
            f"{cache}: damaged: {count_blocks(len(findings.damaged))}: `verify --repair` lets `make extract` redo them"
        )
    elif not repair:
        click.echo(f"{cache}: no block is damaged: `make extract` repairs or finishes the rest")
    values = {
        "cache": cache,
        "version": version.id,
        "sound": not findings.lines,
        "findings": findings.lines,
        "damaged_blocks": findings.damaged,
        "repaired": repair and bool(findings.lines),
    }
    return Outcome(values, FOUND if findings.lines else DONE)


@main.command(
    gives_json=True,
    examples=[
        "python -m cache_schema diff cache/train-vitl16-512 cache/train-vitl16-224",
        "python -m cache_schema diff cache/a cache/a@0123456789abcdef0123 --json",
    ],
)
@click.argument("a")
@click.argument("b")
def diff(a: str, b: str) -> Outcome:
    """Compare cache A with cache B: provenance, tiles, and how far the vectors moved.

    A and B are CACHE, for its version in use, or CACHE@VERSION. Vectors are compared for tiles that have the same bytes
    in both. Ends with status 0 if nothing differs, 3 if something does.
    """
    comparison = compare_versions(*map(_open_named_version, (a, b)))
    click.echo("\n".join(comparison.lines))
    values = {"differs": comparison.differs, **asdict(comparison)}
    return Outcome(values, FOUND if comparison.differs else DONE)


def _check_places(ctx: click.Context, option: click.Parameter, places: tuple[str, ...]) -> tuple[str, ...]:
    """Check that the directories exist: a misspelt one would hold no runs, and their versions would be removed."""
    folder = click.Path(exists=True, file_okay=False)
    return tuple(place if is_bucket(place) else str(folder.convert(place, option, ctx)) for place in places)


@main.command(
    examples=[
        "python -m cache_schema gc cache/train-vitl16-512 --keep 2",
        "python -m cache_schema gc cache/train-vitl16-512 --runs runs --runs gs://bucket/runs --yes",
    ]
)
@click.argument("cache")
@heading("Data")
@click.option("--keep", type=click.IntRange(min=0), default=0, metavar="N", help="Keep the N newest of these too.")
@click.option(
    "--runs",
    multiple=True,
    callback=_check_places,
    metavar="PLACE",
    help="Directory or gs://bucket/prefix with runs whose versions stay; may be given again.  [default: runs]",
)
@click.option("--unsealed", is_flag=True, help="Remove unfinished versions too, unless a process writes to them.")
@heading("Output")
@click.option("--yes", is_flag=True, help="Remove the versions; without it they are only listed.")
def gc(cache: str, keep: int, runs: tuple[str, ...], unsealed: bool, yes: bool) -> None:
    """Remove versions of CACHE that are not in use and that no run was trained on.

    Unfinished versions stay, so that an extraction can finish them, and so do versions that a process writes to. Runs
    in a bucket are found only if --runs names their place.
    """
    root = CacheRoot(cache, read_only=not yes)
    references = find_references(runs or ("runs",))
    versions = list_versions(root, references, keep=keep, unsealed=unsealed)
    doomed = [version for version in versions if version.kept is None]
    click.echo("\n".join(version.describe() for version in versions))
    what = f"{len(doomed)} of {len(versions)} versions, {sum(version.bytes for version in doomed) / MIB:,.1f} MiB"
    if yes:
        remove_versions(root, doomed)
        click.echo(f"removed {what}")
    else:
        click.echo(f"{what} to remove: --yes removes them" if doomed else "nothing to remove")


def _open_named_version(name: str) -> Version:
    """Open the version in use of a cache, or the one that `CACHE@VERSION` names."""
    named = re.fullmatch(r"(.+)@([0-9a-f]{20})", name)
    cache, version_id = named.groups() if named else (name, None)
    return open_cache(cache, version=version_id, allow_unsealed=True)


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
    """Run the command line; an error that a user can act on ends it with one line and a status."""
    try:
        run_group(main)
    except TileprobeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)


if __name__ == "__main__":
    run()

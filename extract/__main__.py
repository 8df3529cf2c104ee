"""python -m extract run|tile|doctor|verify-sample|demo"""

import sys
from dataclasses import asdict
from typing import Any

import click

from cache_schema import TileprobeError
from cache_schema.cli.command import DONE, FOUND, Group, Outcome, heading, run_group
from cache_schema.cli.options import make_config, make_options
from extract.cutting.config import TileConfig
from extract.doctor.config import DoctorConfig
from extract.ranks.group import exit_with
from extract.ranks.signals import Stopped

from .config import ExtractConfig


@click.group("extract", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Tiles in a bucket to embeddings in a cache."""


@main.command(
    "run",
    params=make_options(ExtractConfig),
    gives_json=True,
    examples=[
        "python -m extract run --tiles gs://bucket/xview_tiled/train",
        "python -m extract run --tiles tiles --backbone vitl16 --image-size 224 --cache cache/small --dry-run",
        "python -m extract.launch --nproc-per-node=8 -m extract run --tiles gs://bucket/train --limit 500",
    ],
)
@heading("Output")
@click.option("--dry-run", is_flag=True, help="Print what would be embedded, kept and read; write nothing.")
def run_command(dry_run: bool, **options: Any) -> Outcome:
    """Embed every tile once and commit the vectors block by block. Run it again to continue where it stopped; after a
    change of the bucket it embeds only what is new or changed."""
    from .dry_run import describe_extraction
    from .run import run_extraction

    config = ExtractConfig(**options)
    if dry_run:
        return Outcome(describe_extraction(config) or {})
    finished = run_extraction(config)
    return Outcome(finished.values, line=finished.line) if finished else Outcome()


@main.command(
    "tile",
    params=make_options(TileConfig),
    gives_json=True,
    examples=[
        "python -m extract tile --images train_images --labels xView_train.geojson --out gs://bucket/train --dry-run",
        "python -m extract tile --images train_images --labels xView_train.geojson --out tiles --size 256 --stride 200",
    ],
)
def tile_command(**options: Any) -> Outcome:
    """Cut raw xView, scenes and one GeoJSON, into tiles and YOLO labels. Run it again to cut the scenes that are not
    there yet, or whose file or boxes have changed."""
    from extract.cutting.run import run_tiling

    if options["stride"] is None:
        options["stride"] = options["size"]
    return Outcome(run_tiling(make_config(TileConfig, options)))


@main.command(
    "doctor",
    params=make_options(DoctorConfig, without=("limit", "retry_quarantined", "profile")),
    gives_json=True,
    examples=[
        "python -m extract doctor --tiles gs://bucket/xview_tiled/train",
        "python -m extract doctor --tiles tiles --backbone vitl16 --image-size 224 --nproc 8 --price-per-hour 12",
    ],
)
def doctor_command(**options: Any) -> Outcome:
    """Check in seconds whether an extraction, and training after it, can work, and what it would take. Nothing is
    embedded or kept; the status is 3 if a check failed."""
    from extract.doctor.run import run_doctor

    findings = run_doctor(make_config(DoctorConfig, options))
    failed = any(finding.status == "fail" for finding in findings)
    return Outcome({"checks": [asdict(finding) for finding in findings]}, status=FOUND if failed else DONE)


@main.command(
    "verify-sample",
    gives_json=True,
    examples=[
        "python -m extract verify-sample cache/train-vitl16-512 --rows 64",
        "python -m extract verify-sample gs://bucket/cache --tiles gs://elsewhere/train --backbone checkpoints/vitl16",
    ],
)
@click.argument("cache")
@heading("Data")
@click.option("--rows", type=click.IntRange(min=1), default=64, metavar="N", help="Rows to embed again.")
@click.option("--seed", type=int, help="Draw the rows of an earlier sample.  [default: other rows each time]")
@click.option("--tiles", help="Where the tiles are now.  [default: where they were]")
@click.option("--version", "version_id", help="Another version than the one in use.  [default: the one in use]")
@heading("Model")
@click.option("--backbone", help="Where the checkpoint is now.  [default: as it was named]")
def verify_sample_command(cache: str, version_id: str | None, rows: int, **now: Any) -> Outcome:
    """Embed random rows of CACHE again and compare them with the stored vectors.

    Ends with status 3 if they are not what the backbone gives today. `python -m cache_schema verify` finds damage.
    """
    from .spot_check import compare_sample

    comparison = compare_sample(cache, version_id, rows, **now)
    click.echo("\n".join(comparison.lines))
    values = {"cache": cache, "agrees": comparison.agrees, "lines": comparison.lines}
    return Outcome(values, DONE if comparison.agrees else FOUND)


@main.command(
    "demo",
    context_settings={"ignore_unknown_options": True},
    examples=["python -m extract demo -- python -m extract run --tiles demo://train --backbone demo --dry-run"],
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def demo_command(command: tuple[str, ...]) -> Outcome:
    """Run COMMAND while the generated demo bucket is served on loopback.

    Every demo:// in COMMAND becomes the bucket's address.
    """
    from extract.demo.run import run_with_demo_bucket

    return Outcome(status=run_with_demo_bucket(command))


def run() -> None:
    """Run the command line; an error a user can act on is one line and its status, a signal 128 and its number."""
    try:
        run_group(main)
    except TileprobeError as error:
        exit_with(error)
    except Stopped as stop:
        sys.exit(stop.status)


if __name__ == "__main__":
    run()

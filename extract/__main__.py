"""python -m extract run|tile|doctor|verify-sample|demo"""

import sys
from typing import Any

import click

from cache_schema import TileprobeError
from cache_schema.cli.command import DONE, FOUND, Group, Outcome, heading, run_group
from extract.backbone.pooling import DEFAULT_POOLING
from extract.backbone.precision import DTYPES
from extract.ranks.group import exit_with
from extract.ranks.signals import Stopped
from extract.tiles.scenes import DEFAULT_SCENE_REGEX

from .config import ExtractConfig


@click.group("extract", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Tiles in a bucket to embeddings in a cache."""


@main.command(
    "run",
    gives_json=True,
    examples=[
        "python -m extract run --tiles gs://bucket/xview_tiled/train",
        "python -m extract run --tiles tiles --backbone vitl16 --image-size 224 --cache cache/small --dry-run",
        "python -m extract.launch --nproc-per-node=8 -m extract run --tiles gs://bucket/train --limit 500",
    ],
)
@heading("Data")
@click.option("--tiles", default="", help="gs://bucket/prefix or a directory holding images/ and labels/.")
@heading("Model")
@click.option("--backbone", default="vitl16", help="vitl16, vit7b16, demo, a checkpoint directory or a hub id.")
@click.option(
    "--image-size",
    type=int,
    help="Pixels a side, a multiple of 16.  [default: 512 for the satellite backbones, else the checkpoint's own]",
)
@heading("Output")
@click.option("--cache", help="Directory or gs://… to write to.  [default: cache/<tiles>-<backbone>-<size>]")
@heading("Model")
@click.option(
    "--precision",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    help="Dtype of weights and forward pass; auto is bf16 where the device multiplies it, else float32.",
)
@click.option("--pooling", default="+".join(DEFAULT_POOLING), help="Vectors to store of each tile, joined by +.")
@heading("Machine")
@click.option("--batch-size", type=int, default=32, help="Tiles per forward pass.")
@click.option("--workers", type=int, help="Feed processes per rank.  [default: its cores less one]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto is cuda where there is a GPU."
)
@heading("Data")
@click.option("--limit", type=int, help="A trial: whole scenes up to about this many tiles.  [default: all tiles]")
@click.option("--scene-regex", default=DEFAULT_SCENE_REGEX, help="Group (?P<scene>…) of a tile's name, for --limit.")
@click.option("--unlabelled", is_flag=True, help="Embed tiles without a label file too.")
@heading("Output")
@click.option("--max-quarantined", type=float, default=0.01, help="Largest share of unreadable tiles to accept.")
@click.option("--retry-quarantined", is_flag=True, help="Try tiles again that were quarantined before.")
@click.option("--yes", is_flag=True, help="Go on though more than a tenth of the tiles of the version in use are gone.")
@click.option("--profile", help="Write a torch profiler trace of a few batches to this file (JSON, for Perfetto).")
@click.option("--dry-run", is_flag=True, help="Print what would be embedded, kept and read; write nothing.")
def run_command(dry_run: bool, **options: Any) -> Outcome:
    """Embed every tile once and commit the vectors block by block. Run again, it goes on where it stopped; after a
    change of the bucket it embeds what is new or changed, and keeps the rest."""
    from .dry_run import describe_extraction
    from .run import run_extraction

    config = ExtractConfig(**options)
    if dry_run:
        return Outcome(describe_extraction(config) or {})
    finished = run_extraction(config)
    return Outcome(finished.values, line=finished.line) if finished else Outcome()


@main.command(
    "tile",
    gives_json=True,
    examples=[
        "python -m extract tile --images train_images --labels xView_train.geojson --out gs://bucket/train --dry-run",
        "python -m extract tile --images train_images --labels xView_train.geojson --out tiles --size 256 --stride 200",
    ],
)
@heading("Data")
@click.option("--images", default="", help="Directory of GeoTIFFs, such as xView's train_images.")
@click.option("--labels", default="", help="xView_train.geojson.")
@click.option("--size", type=int, default=512, help="Pixels a side of a tile.")
@click.option(
    "--stride", type=int, help="Pixels from one tile to the next; less than the size overlaps.  [default: the size]"
)
@click.option(
    "--min-visibility",
    type=float,
    default=0.25,
    help="Share of a box's area (of a larger one: of what a tile can show of it) that a tile must show to name it.",
)
@heading("Output")
@click.option("--out", default="", help="gs://bucket/prefix or a directory: what make extract takes as TILES.")
@click.option("--dry-run", is_flag=True, help="Say what would be cut and what would be dropped; write nothing.")
@heading("Machine")
@click.option("--workers", type=int, help="Scenes cut at a time, each in a process.  [default: cores]")
def tile_command(
    images: str,
    labels: str,
    out: str,
    size: int,
    stride: int | None,
    min_visibility: float,
    workers: int | None,
    dry_run: bool,
) -> Outcome:
    """Raw xView, scenes and one GeoJSON, to tiles and YOLO labels. Run again, it cuts the scenes that are not there
    yet, or whose file or boxes have changed."""
    from extract.cutting.cut import Cutting
    from extract.cutting.plan import TileConfig
    from extract.cutting.run import run_tiling

    cutting = Cutting(size, size if stride is None else stride, min_visibility)
    return Outcome(run_tiling(TileConfig(images, labels, out, cutting, workers, dry_run)))


_DOCTOR_ASKS = (
    *("tiles", "backbone", "image_size", "cache", "precision", "pooling", "batch_size", "workers", "device"),
    *("scene_regex", "unlabelled", "max_quarantined", "yes"),
)
"""Options of an extraction that decide whether it can work."""


@main.command(
    "doctor",
    params=[param for param in run_command.params if param.name in _DOCTOR_ASKS],
    gives_json=True,
    examples=[
        "python -m extract doctor --tiles gs://bucket/xview_tiled/train",
        "python -m extract doctor --tiles tiles --backbone vitl16 --image-size 224 --nproc 8 --price-per-hour 12",
    ],
)
@heading("Data")
@click.option("--sample", type=int, default=24, help="Tiles to fetch and decode, drawn at random.")
@click.option("--seed", type=int, default=0, help="Of that draw.")
@click.option(
    "--taxonomy",
    type=click.Path(dir_okay=False),
    help="CSV of your own classes: class_id,name or class_id,type_id,name.  [default: xView's]",
)
@heading("Machine")
@click.option("--nproc", type=int, help="Ranks the extraction will have.  [default: GPUs, else 1]")
@click.option("--price-per-hour", type=float, help="Of everything that computes, in any currency, for the estimate.")
def doctor_command(**options: Any) -> Outcome:
    """Say in seconds whether an extraction, and training after it, can work, and what it would take. Nothing is
    embedded or kept; the status is 3 if a check failed."""
    from extract.doctor.run import DoctorConfig, run_doctor

    names = DoctorConfig.__dataclass_fields__.keys() & options.keys()
    own = {name: options.pop(name) for name in names}
    findings = run_doctor(DoctorConfig(ExtractConfig(**options), **own))
    failed = any(finding.status == "fail" for finding in findings)
    return Outcome({"checks": [finding.to_json() for finding in findings]}, status=FOUND if failed else DONE)


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

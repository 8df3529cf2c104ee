"""python -m train head|sweep|finetune|ladder|evaluate|predict|report|export|triage"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cache_schema import CacheNotFoundError, TileprobeError
from cache_schema.cli.command import Group, Outcome, heading, is_given, run_group
from cache_schema.cli.options import make_config, make_options, spell_out
from extract.config import LAST_CACHE, DeviceChoice, ExtractConfig
from extract.ranks.group import exit_with
from extract.ranks.signals import Stopped
from train.ladder.rungs import RUNGS
from train.model.augment import VIEWS, Views
from train.predict.target import DEFAULT_OUT, Target
from train.sweep.grid import Grid

from .command import make_training_options
from .config import TrainConfig
from .errors import TrainError


@click.group("train", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Train, apply and judge multi-label classifiers on cached embeddings or streamed tiles."""


@main.command(
    params=make_training_options("head"),
    gives_json=True,
    examples=[
        "python -m train head --cache cache/train-vitl16-512",
        "python -m train head --val-cache cache/val-vitl16-512 --features cls+patch_mean --epochs 30",
        "python -m train head --resume --run-dir runs/head",
    ],
)
def head(**options: Any) -> Outcome:
    """Fit the head on cached embeddings: seconds, not hours."""
    return _train(options)


@main.command(
    params=make_training_options("finetune"),
    gives_json=True,
    examples=[
        "python -m train finetune --unfreeze 3 --dry-run",
        "python -m train finetune --unfreeze 6 --accumulate 4 --grad-checkpoint --cache-prefix",
        "python -m extract.launch --nproc-per-node=8 -m train finetune --unfreeze 3",
    ],
)
@heading("Output")
@click.option("--dry-run", is_flag=True, help="Print what would train, on what and in how much memory; write nothing.")
def finetune(dry_run: bool, **options: Any) -> Outcome:
    """Train the last layers and the head on streamed tiles, starting from the head of a run on cached vectors."""
    if dry_run:
        from .dry_run import describe_training

        return Outcome(describe_training(_make_config(options)) or {})
    return _train(options)


@main.command(
    params=[*make_options(Grid), *make_training_options("sweep")],
    examples=["python -m train sweep --lrs 1e-3,3e-3 --heads linear --seeds 5"],
)
@heading("Training")
@click.option("--seeds", type=int, default=3, help="Heads of each configuration; the first has --seed.")
def sweep(seeds: int, **options: Any) -> None:
    """Train heads of many settings together on cached embeddings, rank them, and keep the best."""
    from train.sweep.run import run_sweep

    grid = make_config(Grid, options)
    base = {name: value for name, value in options.items() if name not in Grid.__dataclass_fields__}
    run_sweep(_make_config(base), grid, seeds)


_OF_LADDER = ("unfreeze", "head_run", "head", "dry_run")
"""Options of a trainer that differ from rung to rung, or that no rung can have."""


@main.command(
    params=make_training_options("ladder"),
    examples=[
        "python -m train ladder --rungs linear,mlp,1,3",
        "python -m train ladder --finetune-options '--epochs 5 --batch-size 32' --nproc 8",
    ],
)
@heading("Output")
@click.option("--run-dir", "run", default="runs/ladder", help="Link to the newest ladder; the ladder is numbered.")
@heading("Training")
@click.option("--rungs", default=RUNGS, help="Models to train, separated by commas; a number N is the last N layers.")
@click.option(
    "--head-options", multiple=True, help="Further options of `train head` on its rungs, such as '--epochs 20'."
)
@click.option("--finetune-options", multiple=True, help="Further options of `train finetune` on its rungs.")
@heading("Machine")
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks of a rung.  [default: GPUs, else 1]")
@heading("Output")
@click.option("--resume", is_flag=True, help="Continue the newest ladder of --run-dir with its settings.")
@click.pass_context
def ladder(context: click.Context, /, run: str, nproc: int | None, resume: bool, **options: Any) -> None:
    """Train rung after rung on one split, from nearest neighbours to all layers: was it worth it?"""
    from train.ladder.run import LadderConfig, run_ladder

    config = None
    if not resume:
        cache = options["cache"] or _last_cache()
        shared = ("--cache", cache, *_repeat_options(context))
        of_head, of_finetune = (
            _read_rung_options(context, command, " ".join(options[f"{command.name}_options"]), shared)
            for command in (head, finetune)
        )
        config = LadderConfig(cache, options["rungs"], shared, of_head, of_finetune)
    run_ladder(run, config, nproc)


@main.command(hidden=True, params=head.params)
def neighbours(**options: Any) -> None:
    """Score nearest neighbours on the split and labels that these options give a head: the lowest rung of a ladder."""
    from train.ladder.neighbours import run_neighbours

    run_neighbours(_make_config(options))


_RUN_DIR = click.option("--run-dir", "run", default="runs/head", help="The run to use.")
_TTA = click.option(
    "--tta",
    type=click.Choice(VIEWS),
    default="one",
    help="Judge a streamed tile as it is, or by the mean logits of its eight flips and rotations: 8 x the work.",
)


@main.command(
    params=[*make_options(Target, only=("tiles", "cache")), *make_options(ExtractConfig, only=("device", "workers"))],
    gives_json=True,
    examples=[
        "python -m train evaluate --run-dir runs/head --cache cache/test-vitl16-512 --json",
        "python -m train evaluate --run-dir runs/finetune --tiles gs://bucket/xview_tiled/test",
    ],
)
@heading("Data")
@_RUN_DIR
@heading("Model")
@_TTA
def evaluate(run: str, tta: Views, device: str, workers: int | None, **target: Any) -> Outcome:
    """Score a run on labelled tiles or a cache: the figures of training and the per-class table."""
    from train.predict.evaluate import run_evaluation

    return Outcome(run_evaluation(run, make_config(Target, target), tta=tta, device=device, workers=workers) or {})


@main.command(
    params=[*make_options(Target), *make_options(ExtractConfig, only=("device", "workers"))],
    examples=[
        "python -m train predict --run-dir runs/finetune --tiles gs://bucket/other --out other.csv",
        "python -m train predict --run-dir runs/finetune --window 512 --out scene.geojson scene.tif",
        "python -m train predict --run-dir runs/finetune/export a.png more/",
    ],
    gives_json=True,
)
@click.argument("names", metavar="[INPUT]...", nargs=-1)
@heading("Data")
@_RUN_DIR
@heading("Model")
@_TTA
@heading("Output")
@click.option("--out", default=DEFAULT_OUT, help=f"FILE.csv, .jsonl or .geojson (of rasters); - is {DEFAULT_OUT}.")
def predict(run: str, out: str, tta: Views, device: str, workers: int | None, **target: Any) -> Outcome:
    """Write every tile's probabilities and decisions, and the thresholds used with them.

    INPUT is any number of image files, directories of images, gs://bucket/prefix, and GeoTIFFs, which are cut into
    windows. RUN is a run, or an export of one, which needs nothing else.
    """
    from train.predict.run import run_prediction

    values = run_prediction(run, make_config(Target, target), out, tta=tta, device=device, workers=workers)
    return Outcome(values or {})


@main.command(
    examples=["python -m train report --run-dir runs/head", "python -m train report --run-dir runs/head --no-images"]
)
@heading("Data")
@click.option("--run-dir", "run", default="runs/head", help="The run to report on.")
@heading("Output")
@click.option("--no-images", is_flag=True, help="Leave out all pictures, for imagery that may not be shared.")
def report(run: str, no_images: bool) -> None:
    """Write a run's report.html and model_card.md again, with a map of its embeddings and thumbnails of its tiles."""
    from train.report.run import run_report

    run_report(run, images=not no_images)


@main.command(examples=["python -m train export --run-dir runs/finetune --out exported"])
@heading("Data")
@click.option("--run-dir", "run", default="runs/finetune", help="The run to export.")
@heading("Output")
@click.option("--out", help="New directory to write.  [default: export, in the run]")
@click.option("--no-onnx", is_flag=True, help="Leave classifier.onnx out.")
def export(run: str, out: str | None, no_onnx: bool) -> None:
    """Write a run as a checkpoint that transformers can open, its head, and the classifier as ONNX."""
    from train.predict.export import run_export

    run_export(run, out, onnx=not no_onnx)


@main.command(
    params=make_options(ExtractConfig, only=("device",)),
    examples=["python -m train triage --run-dir runs/head --top 50"],
)
@heading("Data")
@click.option(
    "--run-dir", "run", help="Run whose settings to use.  [default: runs/head, or those of a new run on --cache]"
)
@click.option("--cache", help="Cache to judge.  [default: the run's]")
@heading("Output")
@click.option("--top", type=int, default=200, help="Number of labels to list.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("doubts.csv"), help="File to write."
)
def triage(run: str | None, cache: str | None, top: int, out: Path, device: DeviceChoice) -> None:
    """List the labels that heads trained on other scenes doubt most, as CSV. Doubt is no proof."""
    from train.folds.triage import run_triage
    from train.runs.directory import RunDirectory

    if run or not cache:
        config = RunDirectory.open(run or "runs/head").read_config()
    else:
        config = TrainConfig(cache=cache, run="runs/head")
    run_triage(replace(config, cache=cache or config.cache, device=device), out, top=top)


@main.command(examples=["python -m extract demo -- python -m train demo --tiles demo:// -- --lr 1e-3"])
@heading("Data")
@click.option("--tiles", required=True, help="Address of the demo bucket, ending in a slash.")
@click.argument("finetune_options", nargs=-1, type=click.UNPROCESSED)
def demo(tiles: str, finetune_options: tuple[str, ...]) -> None:
    """Run the three targets on the demo bucket and compare them (`make demo`)."""
    from .demo import run_demo

    run_demo(tiles, finetune_options=finetune_options)


def _repeat_options(context: click.Context) -> Iterator[str]:
    """Yield the options given to a ladder that every rung takes too, except for its cache and its own directory."""
    names = {param.name for param in head.params} - {"cache", "run", "resume"}
    given = [param for param in context.command.params if param.name in names and is_given(context, param)]
    return spell_out(given, context.params, always=names)


def _read_rung_options(
    context: click.Context, command: click.Command, text: str, shared: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the trainer's options in `text`, parsed now so that a mistake does not end the ladder hours later.

    Raises:
        TrainError: the trainer refuses them, or the ladder sets them itself.
    """
    name = f"--{command.name}-options"
    try:
        given = shlex.split(text)
        parsed = command.make_context(str(command.name), [*given])
        for param in parsed.command.params:
            if param.name in {*context.params, *_OF_LADDER} and is_given(parsed, param):
                raise TrainError(f"{name} {text}: {param.opts[0]} is for the ladder as a whole: leave it out here")
        options = command.make_context(str(command.name), [*shared, *given]).params
    except (ValueError, click.ClickException) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else error
        raise TrainError(
            f"{name} {text}: {str(reason).rstrip('.')}: see `python -m train {command.name} -h`"
        ) from error
    _make_config(options)
    return tuple(given)


def _train(options: dict[str, Any]) -> Outcome:
    from .run import run_training

    return Outcome(run_training(_make_config(options)) or {})


def _make_config(options: dict[str, Any]) -> TrainConfig:
    cache = options["cache"]
    if not cache and not options.get("resume"):  # a resumed run knows its own
        cache = _last_cache()
    config = make_config(TrainConfig, {**options, "cache": cache or ""})
    return config.like_original() if config.data.split_tiles else config


def _last_cache() -> str:
    try:
        return LAST_CACHE.read_text().strip()
    except OSError as error:
        raise CacheNotFoundError("no cache was written yet: run `make extract` first, or set CACHE") from error


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

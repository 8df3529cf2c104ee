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
from extract.config import LAST_CACHE
from extract.ranks.group import exit_with
from extract.ranks.signals import Stopped
from train.ladder.rungs import RUNGS
from train.model.augment import Views

from .config import (
    DATA,
    DEVICE,
    FINETUNE,
    PREDICT,
    RUN,
    SHARED,
    SWEEP,
    TARGET,
    TRAINING,
    DataConfig,
    TrainConfig,
    add_options,
    memory_budget,
    training_options,
)
from .errors import TrainError


@click.group("train", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Cached embeddings, or streamed tiles, to a multi-label classifier."""


@main.command(
    gives_json=True,
    examples=[
        "python -m train head --cache cache/train-vitl16-512",
        "python -m train head --val-cache cache/val-vitl16-512 --features cls+patch_mean --epochs 30",
        "python -m train head --resume --run-dir runs/head",
    ],
)
@training_options("head", TRAINING)
@memory_budget
@heading("Training")
@click.option("--folds", type=int, default=0, help="Cross-validate over as many folds of scenes as well; 0: do not.")
def head(**options: Any) -> Outcome:
    """Fit the head on cached embeddings: seconds, not hours."""
    return _train(options)


@main.command(
    gives_json=True,
    examples=[
        "python -m train finetune --unfreeze 3 --dry-run",
        "python -m train finetune --unfreeze 6 --accumulate 4 --grad-checkpoint --cache-prefix",
        "python -m extract.launch --nproc-per-node=8 -m train finetune --unfreeze 3",
    ],
)
@training_options("finetune", FINETUNE)
@heading("Output")
@click.option("--dry-run", is_flag=True, help="Print what would train, on what and in how much memory; write nothing.")
def finetune(dry_run: bool, **options: Any) -> Outcome:
    """Train the last layers and the head on streamed tiles, starting from the cached head."""
    if dry_run:
        from .dry_run import describe_training

        return Outcome(describe_training(_make_training_config(options)) or {})
    return _train(options)


@main.command(examples=["python -m train sweep --lrs 1e-3,3e-3 --heads linear --seeds 5"])
@training_options("sweep", [*SWEEP, *DATA, *SHARED])
@memory_budget
def sweep(lrs: str, weight_decays: str, losses: str, features: str, heads: str, seeds: int, **options: Any) -> None:
    """Train heads of many settings together on cached embeddings, rank them, and keep the best."""
    from train.sweep.grid import Grid
    from train.sweep.run import run_sweep

    grid = Grid(lrs=lrs, weight_decays=weight_decays, losses=losses, features=features, heads=heads)
    run_sweep(_make_config(options), grid, seeds)


_OF_LADDER = ("unfreeze", "head_run", "head", "dry_run")
"""Options of a trainer that differ from rung to rung, or that none can have."""


@main.command(
    examples=[
        "python -m train ladder --rungs linear,mlp,1,3",
        "python -m train ladder --finetune-options '--epochs 5 --batch-size 32' --nproc 8",
    ]
)
@heading("Output")
@click.option("--run-dir", "run", default="runs/ladder", help="Link to the newest ladder; the ladder is numbered.")
@heading("Training")
@click.option("--rungs", default=RUNGS, help="Separated by commas; numbers are last layers to train.")
@click.option("--head-options", multiple=True, help="More for `train head` on its rungs, such as '--epochs 20'.")
@click.option("--finetune-options", multiple=True, help="More for `train finetune` on its rungs.")
@heading("Machine")
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks of a rung.  [default: GPUs, else 1]")
@heading("Output")
@click.option("--resume", is_flag=True, help="Go on with the newest ladder of --run-dir and its settings.")
@add_options([*DATA, *RUN])
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
    """Score the nearest neighbours as a head with these options would be: the lowest rung of a ladder."""
    from train.ladder.neighbours import run_neighbours

    run_neighbours(_make_training_config(options))


@main.command(
    gives_json=True,
    examples=[
        "python -m train evaluate --run-dir runs/head --cache cache/test-vitl16-512 --json",
        "python -m train evaluate --run-dir runs/finetune --tiles gs://bucket/xview_tiled/test",
    ],
)
@add_options(TARGET)
def evaluate(run: str, tiles: str | None, cache: str | None, tta: Views, device: str, workers: int | None) -> Outcome:
    """Score a run on labelled tiles or a cache: the figures of training and the per-class table."""
    from train.predict.evaluate import run_evaluation
    from train.predict.inference import Target

    return Outcome(run_evaluation(run, Target(tiles, cache), tta=tta, device=device, workers=workers) or {})


@main.command(
    examples=[
        "python -m train predict --run-dir runs/finetune --tiles gs://bucket/other --out other.csv",
        "python -m train predict --run-dir runs/finetune --window 512 --out scene.geojson scene.tif",
        "python -m train predict --run-dir runs/finetune/export a.png more/",
    ],
    gives_json=True,
)
@click.argument("inputs", metavar="[INPUT]...", nargs=-1)
@add_options([*TARGET, *PREDICT])
def predict(
    run: str,
    inputs: tuple[str, ...],
    tiles: str | None,
    cache: str | None,
    window: int | None,
    stride: int | None,
    out: str,
    tta: Views,
    device: str,
    workers: int | None,
) -> Outcome:
    """Write every tile's probabilities and decisions, and the thresholds used beside them.

    INPUT is any number of image files, directories of images, gs://bucket/prefix, and GeoTIFFs, which are cut into
    windows. RUN is a run, or an export of one, which needs nothing else.
    """
    from train.predict.inference import Target
    from train.predict.run import run_prediction

    target = Target(tiles, cache, inputs, window, stride)
    return Outcome(run_prediction(run, target, out, tta=tta, device=device, workers=workers) or {})


@main.command(
    examples=["python -m train report --run-dir runs/head", "python -m train report --run-dir runs/head --no-images"]
)
@heading("Data")
@click.option("--run-dir", "run", default="runs/head", help="The run to report on.")
@heading("Output")
@click.option("--no-images", is_flag=True, help="Leave every picture out, for imagery that may not be shared.")
def report(run: str, no_images: bool) -> None:
    """Write a run's report.html and model_card.md anew, with a map of its embeddings and thumbnails of its tiles."""
    from train.report.run import run_report

    run_report(run, images=not no_images)


@main.command(examples=["python -m train export --run-dir runs/finetune --out exported"])
@heading("Data")
@click.option("--run-dir", "run", default="runs/finetune", help="The run to export.")
@heading("Output")
@click.option("--out", help="New directory to write.  [default: export, in the run]")
@click.option("--no-onnx", is_flag=True, help="Leave classifier.onnx out.")
def export(run: str, out: str | None, no_onnx: bool) -> None:
    """Write a run as a checkpoint that transformers opens, its head beside it, and the classifier as ONNX."""
    from train.predict.export import run_export

    run_export(run, out, onnx=not no_onnx)


@main.command(examples=["python -m train triage --run-dir runs/head --top 50"])
@heading("Data")
@click.option(
    "--run-dir", "run", help="Run whose settings to use.  [default: runs/head, or those of a new run on --cache]"
)
@click.option("--cache", help="Cache to judge.  [default: the run's]")
@heading("Output")
@click.option("--top", type=int, default=200, help="Labels to list.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("doubts.csv"), help="File to write."
)
@heading("Machine")
@DEVICE
def triage(run: str | None, cache: str | None, top: int, out: Path, device: str) -> None:
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
    """The options of a ladder's command line that every rung takes too, except for its cache and its own place."""
    names = {param.name for param in head.params} - {"cache", "run", "resume"}
    for param in context.command.params:
        if param.name in names and is_given(context, param):
            value = context.params[param.name]
            if value is not False:  # a switch that a settings file leaves off
                yield from [param.opts[0]] if value is True else [param.opts[0], str(value)]


def _read_rung_options(
    context: click.Context, command: click.Command, text: str, shared: tuple[str, ...]
) -> tuple[str, ...]:
    """The trainer's own options in `text`, tried before an hour is spent on the rungs before.

    Raises:
        TrainError: the trainer would refuse them, or the ladder sets them itself.
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
    options.pop("dry_run", None)
    _make_training_config(options)
    return tuple(given)


def _train(options: dict[str, Any]) -> Outcome:
    from .run import run_training

    return Outcome(run_training(_make_training_config(options)) or {})


def _make_training_config(options: dict[str, Any]) -> TrainConfig:
    like_original = options.pop("like_original")
    config = _make_config(options)
    return config.like_original() if like_original else config


def _make_config(options: dict[str, Any]) -> TrainConfig:
    if not options.get("resume"):  # a resumed run knows its own
        options["cache"] = options["cache"] or _last_cache()
    names = DataConfig.__dataclass_fields__.keys() & options.keys()
    data = {name: options.pop(name) for name in names}
    data["exclude"] = _parse_ids(data["exclude"])
    options["cache"] = options["cache"] or ""
    return TrainConfig(data=DataConfig(**data), **options)


def _parse_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"--exclude {text}: class ids separated by commas, such as 5,48") from error


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

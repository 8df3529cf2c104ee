"""python -m train head|sweep|finetune|ladder|evaluate|predict|export|triage"""

import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cache_schema import CacheNotFoundError, TileprobeError
from extract.config import LAST_CACHE
from extract.distributed import exit_with
from extract.scenes import DEFAULT_SCENE_REGEX
from extract.stop import Stopped

from .augment import VIEWS, Views
from .config import HEADS, DataConfig, TrainConfig
from .errors import TrainError
from .loss import LOSSES
from .memory import parse_bytes
from .rungs import RUNGS

DEFAULTS = {
    "head": {"epochs": 50, "batch_size": 1024, "lr": 1e-3, "warmup": 0.05},
    "finetune": {"epochs": 10, "batch_size": 64, "lr": 1e-4, "warmup": 0.1},
    "sweep": {"epochs": 20, "batch_size": 1024, "warmup": 0.05},
}
Command = Callable[..., Any]
Options = list[Callable[[Any], Any]]

_DATA: Options = [
    click.option("--cache", help="Cache to train on.  [default: the one written last]"),
    click.option("--val-cache", help="A validation set of its own, instead of a split of the cache."),
    click.option("--test-cache", help="A test set, scored once at the end."),
    click.option("--backbone", help="Refuse a cache of another backbone than this."),
    click.option(
        "--label-ids",
        type=click.Choice(["auto", "type", "class"]),
        default="auto",
        help="Whether labels hold xView type ids (11-94) or class ids (0-59).",
    ),
    click.option(
        "--taxonomy",
        type=click.Path(dir_okay=False),
        help="CSV of your own classes: class_id,name or class_id,type_id,name.",
    ),
    click.option("--exclude", default="", help="Class ids to leave out, separated by commas, such as 5,48."),
    click.option(
        "--empty",
        type=click.Choice(["drop", "val", "keep"]),
        default="drop",
        help="Tiles without a known object: leave out, validate on, or train on as well.",
    ),
    click.option("--scene-regex", default=DEFAULT_SCENE_REGEX, help="Group (?P<scene>…) of a tile's name."),
    click.option("--val-fraction", type=float, default=0.2, help="Share of tiles to validate on, in whole scenes."),
    click.option("--split-file", type=click.Path(dir_okay=False), help="A split.json written before."),
]
_RUN: Options = [
    click.option("--seed", type=int, default=0, help="Of split, head, order and dropout."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    click.option("--allow-unsealed", is_flag=True, help="Train on an unfinished cache, without its missing rows."),
]
_SHARED: Options = [
    click.option("--hidden", type=int, default=512, help="Width of the head's hidden layer."),
    click.option("--dropout", type=float, default=0.1, help="Of the hidden layer."),
    click.option("--amp/--no-amp", default=None, help="Autocast to bf16.  [default: where the device multiplies it]"),
    *_RUN,
]
_TRAINING: Options = [
    *_DATA,
    click.option(
        "--like-original",
        is_flag=True,
        help="Random tile split (seed 42), no empty tiles, classes 5 and 48 "
        "left out, 224 px: to compare with the original script's figures only.",
    ),
    click.option("--features", default="cls", help="cls, patch_mean or cls+patch_mean."),
    click.option("--head", type=click.Choice(HEADS), default="mlp", help="With a hidden layer, or without."),
    click.option("--weight-decay", type=float, default=0.01, help="Of AdamW."),
    click.option("--loss", type=click.Choice(LOSSES), default="focal", help="What the head is trained with."),
    click.option("--alpha", type=float, default=0.65, help="Focal loss: weight of the positives."),
    click.option("--gamma", type=float, default=2.0, help="Focal loss: how little easy examples count."),
    click.option("--gamma-pos", type=float, default=0.0, help="Asymmetric loss: the same, of the positives."),
    click.option("--gamma-neg", type=float, default=4.0, help="Asymmetric loss: the same, of the negatives."),
    click.option("--margin", type=float, default=0.05, help="Asymmetric loss: negatives below it cost nothing."),
    click.option(
        "--best-by",
        type=click.Choice(["f1_weighted", "map_macro"]),
        default="f1_weighted",
        help="What selects the best epoch.",
    ),
    click.option(
        "--class-weights",
        type=click.Choice(["none", "balanced", "effective"]),
        default="none",
        help="Weigh positives of rare classes up to 10 x: by inverse frequency, or by the effective number of tiles.",
    ),
    click.option(
        "--repeat-factor",
        type=float,
        default=0.0,
        help="Repeat tiles of classes on less than this share of tiles, such as 0.01; 0 repeats none.",
    ),
    click.option(
        "--patience",
        type=int,
        help="End after so many epochs without a better --best-by; the learning rate falls as if all --epochs came.",
    ),
    click.option("--clip-norm", type=float, help="Largest norm of a step's gradient, over all ranks and weights."),
    click.option("--deterministic", is_flag=True, help="Bit-equal runs on one machine, whatever that costs."),
    click.option("--save-every", type=int, default=1, help="Epochs between checkpoints to resume from."),
    click.option("--save-steps", type=int, default=500, help="Steps between checkpoints within an epoch; 0: none."),
    click.option("--resume", is_flag=True, help="Continue the newest run of --run-dir with its own settings."),
    *_SHARED,
]


def _training_options(command: str, options: Options) -> Callable[[Command], Command]:
    """The options of a trainer, with this command's defaults."""
    defaults = DEFAULTS[command]
    own: Options = [
        click.option(
            "--run-dir", "run", default=f"runs/{command}", help="Link to the newest run; the run itself is numbered."
        ),
        click.option("--epochs", type=int, default=defaults["epochs"]),
        click.option(
            "--batch-size",
            type=int,
            default=defaults["batch_size"],
            help="Global, whatever the ranks; halved until an epoch has 20 steps.",
        ),
        click.option("--warmup", type=float, default=defaults["warmup"], help="Share of steps that warms up."),
    ]

    if "lr" in defaults:
        own.append(click.option("--lr", type=float, default=defaults["lr"], help="Peak learning rate of the head."))

    return _add_options([*own, *options])


def _add_options(options: Options) -> Callable[[Command], Command]:
    """Several options at once, in the order that `--help` shows them."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class _Bytes(click.ParamType[int]):
    """`512M` as a number of bytes."""

    name = "bytes"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_memory_budget = click.option(
    "--memory-budget",
    type=_Bytes(),
    help="Memory a rank may hold vectors in, such as 512M; more of them are streamed.  [default: half of what is free]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Cached embeddings, or streamed tiles, to a multi-label classifier."""


@main.command()
@_training_options("head", _TRAINING)
@_memory_budget
@click.option("--folds", type=int, default=0, help="Cross-validate over as many folds of scenes as well; 0: do not.")
def head(**options: Any) -> None:
    """Fit the head on cached embeddings: seconds, not hours."""
    _train(options)


@main.command()
@_training_options("finetune", _TRAINING)
@click.option("--unfreeze", type=int, default=3, help="Last transformer layers to train; 0 is the cached path.")
@click.option("--backbone-lr", type=float, default=1e-5, help="Peak learning rate of the unfrozen layers.")
@click.option(
    "--layer-decay", type=float, default=1.0, help="Each layer's learning rate over that of the layer above it."
)
@click.option("--accumulate", type=int, default=1, help="Compute a rank's share of a batch in so many parts.")
@click.option(
    "--grad-checkpoint", is_flag=True, help="Compute trained layers twice rather than keep what they gave in memory."
)
@click.option(
    "--cache-prefix", is_flag=True, help="Keep on disk what enters the trained layers, and run the frozen ones once."
)
@click.option(
    "--scratch", type=click.Path(file_okay=False), default="cache/prefix", help="Folder of this machine for that."
)
@click.option("--yes", "large_prefix", is_flag=True, help="Keep it even where it takes more than 50 GiB.")
@click.option(
    "--views",
    type=click.Choice(VIEWS),
    default="one",
    help="Show each training tile as it is, or in one of its eight flips and rotations, drawn anew each epoch.",
)
@click.option(
    "--jitter",
    type=float,
    default=0.0,
    help="Change brightness and contrast of training tiles by up to this share, such as 0.2, and colours by half.",
)
@click.option(
    "--crop-scale",
    type=float,
    default=1.0,
    help="Enlarge a random square of at least this share of a training tile's area, 0.5 to 1. Its labels stay those of "
    "the whole tile, so a crop that loses an object is mislabelled: stay near 1.",
)
@click.option("--head-run", help="Run whose head to start from.  [default: runs/head, if it is of this cache]")
@click.option("--workers", type=int, help="Feed processes per rank.  [default: its cores less one]")
def finetune(**options: Any) -> None:
    """Train the last layers and the head on streamed tiles, starting from the cached head."""
    _train(options)


# 2 x 2 x 4 x 2 x 2 = 64: two values where one would hide a trend, the losses there are, and both kinds of head.
_SWEEP: Options = [
    click.option("--lrs", default="1e-3,3e-3", help="Peak learning rates."),
    click.option("--weight-decays", default="0.01,0.3", help="Of AdamW."),
    click.option(
        "--losses",
        default="bce,focal:0.65:2,focal:0.5:1,asymmetric",
        help="bce, focal:ALPHA:GAMMA, asymmetric:GAMMA-POS:GAMMA-NEG:MARGIN; parameters may be left out.",
    ),
    click.option("--features", default="cls,cls+patch_mean", help="Pooled arrays of the cache, joined by +."),
    click.option("--heads", default="linear,mlp", help="linear, mlp."),
    click.option("--seeds", type=int, default=3, help="Heads of each configuration; the first has --seed."),
]


@main.command()
@_training_options("sweep", [*_SWEEP, *_DATA, *_SHARED])
@_memory_budget
def sweep(lrs: str, weight_decays: str, losses: str, features: str, heads: str, seeds: int, **options: Any) -> None:
    """Train heads of many settings together on cached embeddings, rank them, and keep the best."""
    from .grid import Grid
    from .sweep import run_sweep

    grid = Grid(lrs=lrs, weight_decays=weight_decays, losses=losses, features=features, heads=heads)
    run_sweep(_make_config(options), grid, seeds)


_OF_LADDER = ("unfreeze", "head_run", "head")
"""Options of a trainer that differ from rung to rung."""


@main.command()
@click.option("--run-dir", "run", default="runs/ladder", help="Link to the newest ladder; the ladder is numbered.")
@click.option("--rungs", default=RUNGS, help="Separated by commas; numbers are last layers to train.")
@click.option("--head-options", multiple=True, help="More for `train head` on its rungs, such as '--epochs 20'.")
@click.option("--finetune-options", multiple=True, help="More for `train finetune` on its rungs.")
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks of a rung.  [default: GPUs, else 1]")
@click.option("--resume", is_flag=True, help="Go on with the newest ladder of --run-dir and its settings.")
@_add_options([*_DATA, *_RUN])
@click.pass_context
def ladder(context: click.Context, /, run: str, nproc: int | None, resume: bool, **options: Any) -> None:
    """Train rung after rung on one split, from nearest neighbours to all layers: was it worth it?"""
    from .ladder import LadderConfig, run_ladder

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
    from .nearest import run_neighbours

    run_neighbours(_make_training_config(options))


_TARGET: Options = [
    click.option("--run-dir", "run", default="runs/head", help="The run to use."),
    click.option("--tiles", help="gs://bucket/prefix or a directory."),
    click.option("--cache", help="A cache, instead of tiles."),
    click.option(
        "--tta",
        type=click.Choice(VIEWS),
        default="one",
        help="Judge a streamed tile as it is, or by the mean logits of its eight flips and rotations: 8 x the work.",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    click.option("--workers", type=int, help="Feed processes per rank.  [default: its cores less one]"),
]


@main.command()
@_add_options(_TARGET)
def evaluate(run: str, tiles: str | None, cache: str | None, tta: Views, device: str, workers: int | None) -> None:
    """Score a run on labelled tiles or a cache: the figures of training and the per-class table."""
    from .infer import Target, run_evaluation

    run_evaluation(run, Target(tiles, cache), tta=tta, device=device, workers=workers)


@main.command()
@_add_options(_TARGET)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("predictions.csv"))
def predict(
    run: str, tiles: str | None, cache: str | None, out: Path, tta: Views, device: str, workers: int | None
) -> None:
    """Write a CSV with every tile's probabilities and decisions, and the thresholds used beside it."""
    from .infer import Target, run_prediction

    run_prediction(run, Target(tiles, cache), out, tta=tta, device=device, workers=workers)


@main.command()
@click.option("--run-dir", "run", default="runs/finetune", help="The run to export.")
@click.option("--out", help="New directory to write.  [default: export, in the run]")
@click.option("--no-onnx", is_flag=True, help="Leave classifier.onnx out.")
def export(run: str, out: str | None, no_onnx: bool) -> None:
    """Write a run as a checkpoint that transformers opens, its head beside it, and the classifier as ONNX."""
    from .export import run_export

    run_export(run, out, onnx=not no_onnx)


@main.command()
@click.option(
    "--run-dir", "run", help="Run whose settings to use.  [default: runs/head, or those of a new run on --cache]"
)
@click.option("--cache", help="Cache to judge.  [default: the run's]")
@click.option("--top", type=int, default=200, help="Labels to list.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("doubts.csv"))
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
def triage(run: str | None, cache: str | None, top: int, out: Path, device: str) -> None:
    """List the labels that heads trained on other scenes doubt most, as CSV. Doubt is no proof."""
    from .rundir import RunDirectory
    from .triage import run_triage

    if run or not cache:
        config = RunDirectory.open(run or "runs/head").read_config()
    else:
        config = TrainConfig(cache=cache, run="runs/head")
    run_triage(replace(config, cache=cache or config.cache, device=device), out, top=top)


@main.command()
@click.option("--tiles", required=True, help="Address of the demo bucket, ending in a slash.")
@click.argument("finetune_options", nargs=-1, type=click.UNPROCESSED)
def demo(tiles: str, finetune_options: tuple[str, ...]) -> None:
    """Run the three targets on the demo bucket and compare them (`make demo`)."""
    from .demo import run_demo

    run_demo(tiles, finetune_options=finetune_options)


def _is_given(context: click.Context, param: click.Parameter) -> bool:
    return bool(param.name) and context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE


def _repeat_options(context: click.Context) -> Iterator[str]:
    """The options of a ladder's command line that every rung takes too, except for its cache and its own place."""
    names = {param.name for param in head.params} - {"cache", "run", "resume"}
    for param in context.command.params:
        if param.name in names and _is_given(context, param):
            value = context.params[param.name]
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
            if param.name in {*context.params, *_OF_LADDER} and _is_given(parsed, param):
                raise TrainError(f"{name} {text}: {param.opts[0]} is for the ladder as a whole: leave it out here")
        options = command.make_context(str(command.name), [*shared, *given]).params
    except (ValueError, click.ClickException) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else error
        raise TrainError(
            f"{name} {text}: {str(reason).rstrip('.')}: see `python -m train {command.name} -h`"
        ) from error
    _make_training_config(options)
    return tuple(given)


def _train(options: dict[str, Any]) -> None:
    from .run import run_training

    run_training(_make_training_config(options))


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
    """Run the command line; an error a user can act on is one line and status 1, a signal 128 and its number."""
    try:
        main(prog_name="python -m train")
    except TileprobeError as error:
        exit_with(error)
    except Stopped as stop:
        sys.exit(stop.status)


if __name__ == "__main__":
    run()

"""Options of the trainers' command lines, and their defaults."""

from collections.abc import Callable
from typing import Any

import click

from cache_schema.command_line import heading
from extract.scenes import DEFAULT_SCENE_REGEX

from .augment import VIEWS
from .config import HEADS, SCRATCH
from .loss import LOSSES
from .memory import parse_bytes

DEFAULTS = {
    "head": {"epochs": 50, "batch_size": 1024, "lr": 1e-3, "warmup": 0.05},
    "finetune": {"epochs": 10, "batch_size": 64, "lr": 1e-4, "warmup": 0.1},
    "sweep": {"epochs": 20, "batch_size": 1024, "warmup": 0.05},
}
Command = Callable[..., Any]
Options = list[Callable[[Any], Any]]

DEVICE = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto is cuda where there is a GPU."
)
DATA: Options = [
    heading("Data"),
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
RUN: Options = [
    heading("Training"),
    click.option("--seed", type=int, default=0, help="Of split, head, order and dropout."),
    heading("Machine"),
    DEVICE,
    heading("Data"),
    click.option("--allow-unsealed", is_flag=True, help="Train on an unfinished cache, without its missing rows."),
]
SHARED: Options = [
    heading("Model"),
    click.option("--hidden", type=int, default=512, help="Width of the head's hidden layer."),
    click.option("--dropout", type=float, default=0.1, help="Of the hidden layer."),
    heading("Machine"),
    click.option("--amp/--no-amp", default=None, help="Autocast to bf16.  [default: where the device multiplies it]"),
    *RUN,
]
TRAINING: Options = [
    *DATA,
    click.option(
        "--like-original",
        is_flag=True,
        help="Random tile split (seed 42), no empty tiles, classes 5 and 48 "
        "left out, 224 px: to compare with the original script's figures only.",
    ),
    heading("Model"),
    click.option("--features", default="cls", help="cls, patch_mean or cls+patch_mean."),
    click.option("--head", type=click.Choice(HEADS), default="mlp", help="With a hidden layer, or without."),
    heading("Training"),
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
        help="End after so many epochs without a better --best-by; the learning rate falls as if all --epochs came.  "
        "[default: train all of them]",
    ),
    click.option("--clip-norm", type=float, help="Largest norm of a step's gradient, over all ranks and weights."),
    click.option("--deterministic", is_flag=True, help="Bit-equal runs on one machine, whatever that costs."),
    heading("Output"),
    click.option("--save-every", type=int, default=1, help="Epochs between checkpoints to resume from."),
    click.option("--save-steps", type=int, default=500, help="Steps between checkpoints within an epoch; 0: none."),
    click.option("--resume", is_flag=True, help="Continue the newest run of --run-dir with its own settings."),
    *SHARED,
]
FINETUNE: Options = [
    *TRAINING,
    heading("Training"),
    click.option("--unfreeze", type=int, default=3, help="Last transformer layers to train; 0 is the cached path."),
    click.option("--backbone-lr", type=float, default=1e-5, help="Peak learning rate of the unfrozen layers."),
    click.option(
        "--layer-decay", type=float, default=1.0, help="Each layer's learning rate over that of the layer above it."
    ),
    click.option("--accumulate", type=int, default=1, help="Compute a rank's share of a batch in so many parts."),
    heading("Machine"),
    click.option(
        "--grad-checkpoint",
        is_flag=True,
        help="Compute trained layers twice rather than keep what they gave in memory.",
    ),
    click.option(
        "--shard",
        is_flag=True,
        help="Share out trained layers, their gradients and AdamW's moments over the ranks, where one GPU cannot hold "
        "them.",
    ),
    click.option(
        "--cache-prefix",
        is_flag=True,
        help="Keep on disk what enters the trained layers, and run the frozen ones once.",
    ),
    click.option(
        "--scratch", type=click.Path(file_okay=False), default=SCRATCH, help="Folder of this machine for that."
    ),
    click.option("--yes", "large_prefix", is_flag=True, help="Keep it even where it takes more than 50 GiB."),
    heading("Training"),
    click.option(
        "--views",
        type=click.Choice(VIEWS),
        default="one",
        help="Show each training tile as it is, or in one of its eight flips and rotations, drawn anew each epoch.",
    ),
    click.option(
        "--jitter",
        type=float,
        default=0.0,
        help="Change brightness and contrast of training tiles by up to this share, such as 0.2, and colours by half.",
    ),
    click.option(
        "--crop-scale",
        type=float,
        default=1.0,
        help="Enlarge a random square of at least this share of a training tile's area, 0.5 to 1. Its labels stay "
        "those of the whole tile, so a crop that loses an object is mislabelled: stay near 1.",
    ),
    heading("Model"),
    click.option("--head-run", help="Run whose head to start from.  [default: runs/head, if it is of this cache]"),
    heading("Machine"),
    click.option("--workers", type=int, help="Feed processes per rank.  [default: its cores less one]"),
]
# 2 x 2 x 4 x 2 x 2 = 64: two values where one would hide a trend, the losses there are, and both kinds of head.
SWEEP: Options = [
    heading("Training"),
    click.option("--lrs", default="1e-3,3e-3", help="Peak learning rates."),
    click.option("--weight-decays", default="0.01,0.3", help="Of AdamW."),
    click.option(
        "--losses",
        default="bce,focal:0.65:2,focal:0.5:1,asymmetric",
        help="bce, focal:ALPHA:GAMMA, asymmetric:GAMMA-POS:GAMMA-NEG:MARGIN; parameters may be left out.",
    ),
    heading("Model"),
    click.option("--features", default="cls,cls+patch_mean", help="Pooled arrays of the cache, joined by +."),
    click.option("--heads", default="linear,mlp", help="linear, mlp."),
    heading("Training"),
    click.option("--seeds", type=int, default=3, help="Heads of each configuration; the first has --seed."),
]
TARGET: Options = [
    heading("Data"),
    click.option("--run-dir", "run", default="runs/head", help="The run to use."),
    click.option("--tiles", help="gs://bucket/prefix or a directory."),
    click.option("--cache", help="A cache, instead of tiles."),
    heading("Model"),
    click.option(
        "--tta",
        type=click.Choice(VIEWS),
        default="one",
        help="Judge a streamed tile as it is, or by the mean logits of its eight flips and rotations: 8 x the work.",
    ),
    heading("Machine"),
    DEVICE,
    click.option("--workers", type=int, help="Feed processes per rank.  [default: its cores less one]"),
]

PREDICT: Options = [
    heading("Data"),
    click.option(
        "--window",
        type=int,
        help="Cut every local .tif into windows of so many pixels a side, best those of the tiles that RUN was trained "
        "on.  [default: 512, and only what is larger than 2048 a side]",
    ),
    click.option("--stride", type=int, help="Pixels from one window to the next.  [default: the window]"),
    heading("Output"),
    click.option(
        "--out", default="predictions.csv", help="FILE.csv, .jsonl or .geojson (of rasters); - is predictions.csv."
    ),
]


def training_options(command: str, options: Options) -> Callable[[Command], Command]:
    """The options of a trainer, with this command's defaults."""
    defaults = DEFAULTS[command]
    own: Options = [
        heading("Output"),
        click.option(
            "--run-dir", "run", default=f"runs/{command}", help="Link to the newest run; the run itself is numbered."
        ),
        heading("Training"),
        click.option("--epochs", type=int, default=defaults["epochs"], help="Times that every training tile is seen."),
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

    return add_options([*own, *options])


def add_options(options: Options) -> Callable[[Command], Command]:
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


memory_budget = add_options(
    [
        heading("Machine"),
        click.option(
            "--memory-budget",
            type=_Bytes(),
            help="Memory a rank may hold vectors in, such as 512M; more of them are streamed.  "
            "[default: half of what is free]",
        ),
    ]
)

"""Settings of a training run, checked once and frozen."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

import click

from cache_schema import LabelIds
from cache_schema.cli.command import heading
from cache_schema.cli.text import parse_bytes
from extract.ranks.same_job import PER_NODE
from extract.tiles.scenes import DEFAULT_SCENE_REGEX
from train.model.augment import MIN_CROP_SCALE, NO_AUGMENTATION, VIEWS, Augmentation, Views
from train.model.loss import LOSSES, LossConfig, LossName

from .errors import TrainError

ClassWeights = Literal["none", "balanced", "effective"]

EmptyTiles = Literal["drop", "val", "keep"]

HeadName = Literal["mlp", "linear"]

HEADS: tuple[HeadName, ...] = get_args(HeadName)

ORIGINAL_EXCLUDED = (5, 48)
"""Class ids the original script left out: Small Car and Building, present nearly everywhere."""

SCRATCH = "cache/prefix"

ORIGINAL_SEED = 42

ORIGINAL_IMAGE_SIZE = 224

MAX_RATE, MAX_DECAY = 1e30, 1e6
"""Beyond these AdamW's own factors overflow float32, which torch answers with an error of its own."""


@dataclass(frozen=True)
class DataConfig:
    """Which rows train, which validate, and what their labels mean.

    Attributes:
        label_ids: whether raw label ids are xView type ids or class ids.
        taxonomy: a class list of the user's own, None for xView's.
        exclude: class ids left out of model and metrics.
        empty: what to do with tiles that show no class: leave them out, use them for validation only, or for both.
        scene_regex: how a scene is read off a tile's name.
        val_fraction: share of tiles to validate on, in whole scenes.
        split_file: a split.json written before.
        split_tiles: split tile by tile, as the original did; neighbours leak, so only for comparison.
    """

    label_ids: LabelIds | Literal["auto"] = "auto"
    taxonomy: str | None = None
    exclude: tuple[int, ...] = ()
    empty: EmptyTiles = "drop"
    scene_regex: str = DEFAULT_SCENE_REGEX
    val_fraction: float = 0.2
    split_file: str | None = None
    split_tiles: bool = field(default=False, metadata={"option": "like_original"})

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise TrainError(f"--val-fraction {self.val_fraction}: a share between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer, on cached vectors (`unfreeze` 0) or on streamed tiles.

    Attributes:
        cache: of the training tiles; tile source, backbone and image size come from it.
        run: link to the newest run, `runs/head` -> `runs/head-003`, or `gs://bucket/prefix/head`.
        unfreeze: last transformer layers to train.
        val_cache, test_cache: sets of their own.
        features: pooled arrays the head sees, joined by `+`.
        epochs, batch_size: the batch is global, whatever the number of ranks.
        lr, backbone_lr: peak learning rates of head and layers.
        weight_decay, warmup: of AdamW; the share of steps that warms up.
        loss: what the head is trained with.
        alpha, gamma: of the focal loss.
        gamma_pos, gamma_neg, margin: of the asymmetric loss.
        head: with a hidden layer, or a linear one.
        hidden, dropout: of the hidden layer.
        best_by: metric that selects the best epoch.
        class_weights: how the positives of rare classes are weighted.
        repeat_factor: share of tiles below which a class's tiles are repeated; 0 repeats none.
        patience: epochs without a better `best_by` after which training ends; None trains all epochs.
        clip_norm: largest norm of the gradient of a step; None does not clip.
        deterministic: use deterministic algorithms only.
        save_every: epochs between checkpoints.
        save_steps: steps between checkpoints within an epoch; 0 makes none.
        accumulate: parts a rank's share of a batch is computed in.
        grad_checkpoint: compute trained layers again in the backward pass instead of keeping what they gave.
        shard: share out trained layers, their gradients and AdamW's moments over the ranks.
        cache_prefix: keep on disk what enters the trained layers, and run the frozen ones once.
        scratch: folder for that.
        large_prefix: keep it even where it takes more than 50 GiB.
        layer_decay: of a layer's learning rate from that of the layer above it.
        folds: of the cross-validation beside a head's run; 0 is none.
        amp: autocast to bf16, by default where the device multiplies it.
        views, jitter, crop_scale: what is done to streamed training tiles, see `Augmentation`.
        memory_budget: bytes a rank may hold cached vectors in, or else the buffers to stream them; None: half of what
            is free.
    """

    cache: str
    run: str
    unfreeze: int = 0
    val_cache: str | None = None
    test_cache: str | None = None
    data: DataConfig = DataConfig()
    features: str = "cls"
    epochs: int = 50
    batch_size: int = 1024
    lr: float = 1e-3
    backbone_lr: float = 1e-5
    weight_decay: float = 0.01
    warmup: float = 0.05
    alpha: float = 0.65
    gamma: float = 2.0
    hidden: int = 512
    dropout: float = 0.1
    best_by: Literal["f1_weighted", "map_macro"] = "f1_weighted"
    class_weights: ClassWeights = "none"
    repeat_factor: float = 0.0
    patience: int | None = None
    clip_norm: float | None = None
    deterministic: bool = False
    save_every: int = 1
    save_steps: int = 500
    accumulate: int = 1
    grad_checkpoint: bool = False
    shard: bool = False
    layer_decay: float = 1.0
    cache_prefix: bool = False
    scratch: str = field(default=SCRATCH, metadata=PER_NODE)
    large_prefix: bool = field(default=False, metadata={"option": "yes"})
    seed: int = 0
    amp: bool | None = None
    memory_budget: int | None = None
    device: str = field(default="auto", metadata=PER_NODE)
    workers: int | None = field(default=None, metadata=PER_NODE)
    head_run: str | None = None
    backbone: str | None = None
    allow_unsealed: bool = False
    resume: bool = False
    folds: int = 0
    head: HeadName = "mlp"
    loss: LossName = "focal"
    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    margin: float = 0.05
    views: Views = "one"
    jitter: float = 0.0
    crop_scale: float = 1.0

    def __post_init__(self) -> None:
        names = self.features.split("+")
        if "" in names or len(set(names)) < len(names):
            raise TrainError(f"--features {self.features}: name pooled arrays of the cache, each once, joined by +")
        if self.epochs < 1 or self.batch_size < 1 or self.save_every < 1:
            raise TrainError("--epochs, --batch-size and --save-every must be at least 1")
        for name, (value, fits, range_) in self._ranges().items():
            if not fits:
                raise TrainError(f"--{name} {value}: {range_}")
        if not self.unfreeze and self.make_augmentation() != NO_AUGMENTATION:
            raise TrainError(
                "--views, --jitter and --crop-scale change pixels, and cached vectors have none: "
                "set UNFREEZE=1 or more, or leave them out"
            )
        if self.shard and not self.unfreeze:
            raise TrainError(
                "--shard shares out trained layers, and UNFREEZE=0 trains none: set UNFREEZE=1 or more, or leave it out"
            )
        if self.cache_prefix and (self.jitter or self.crop_scale < 1):
            raise TrainError(
                "--cache-prefix keeps what becomes of a tile's pixels, and --jitter and --crop-scale change them in "
                "every epoch: leave out either; --views d4 goes with it"
            )
        for name in ("val_cache", "test_cache"):
            if getattr(self, name) == self.cache:
                raise TrainError(
                    f"{name.upper()} is the training cache itself: {self.cache}: set CACHE or {name.upper()}"
                )

    def _ranges(self) -> dict[str, tuple[float | None, bool, str]]:
        """By option: its value, whether that can work, and what can."""
        return {
            "lr": (self.lr, 0 < self.lr <= MAX_RATE, f"above 0, at most {MAX_RATE:g}"),
            "backbone-lr": (self.backbone_lr, 0 < self.backbone_lr <= MAX_RATE, f"above 0, at most {MAX_RATE:g}"),
            "weight-decay": (self.weight_decay, 0 <= self.weight_decay <= MAX_DECAY, f"0 to {MAX_DECAY:g}"),
            "warmup": (self.warmup, 0 <= self.warmup < 1, "a share from 0 to below 1"),
            "alpha": (self.alpha, 0 <= self.alpha <= 1, "0 to 1"),
            "gamma": (self.gamma, 0 <= self.gamma < math.inf, "0 or more"),
            "folds": (self.folds, self.folds == 0 or self.folds >= 2, "at least 2"),
            "repeat-factor": (self.repeat_factor, 0 <= self.repeat_factor <= 1, "a share of tiles, 0 to 1"),
            "patience": (self.patience or 0, self.patience is None or self.patience >= 1, "at least 1 epoch"),
            "clip-norm": (self.clip_norm or 0.0, self.clip_norm is None or 0 < self.clip_norm < math.inf, "above 0"),
            "gamma-pos": (self.gamma_pos, 0 <= self.gamma_pos < math.inf, "0 or more"),
            "gamma-neg": (self.gamma_neg, 0 <= self.gamma_neg < math.inf, "0 or more"),
            "margin": (self.margin, 0 <= self.margin < 1, "0 to below 1"),
            "jitter": (self.jitter, 0 <= self.jitter < 1, "0 to below 1"),
            "crop-scale": (
                self.crop_scale,
                MIN_CROP_SCALE <= self.crop_scale <= 1,
                f"a share of the tile's area, {MIN_CROP_SCALE:g} to 1: a smaller crop would lose most objects it is "
                "labelled with",
            ),
            "hidden": (self.hidden, self.hidden >= 1, "at least 1"),
            "dropout": (self.dropout, 0 <= self.dropout < 1, "0 to below 1"),
            "seed": (self.seed, 0 <= self.seed < 2**31, "0 to 2147483647"),
            "save-steps": (self.save_steps, self.save_steps >= 0, "0 or more"),
            "accumulate": (self.accumulate, self.accumulate >= 1, "at least 1"),
            "layer-decay": (self.layer_decay, 0 < self.layer_decay <= 1, "above 0, at most 1"),
            "workers": (self.workers or 0, (self.workers or 0) >= 0, "0 or more"),
            "memory-budget": (self.memory_budget, (self.memory_budget or 1) > 0, "bytes above 0"),
        }

    @property
    def hidden_width(self) -> int:
        """Of the head's hidden layer; 0 for a linear head."""
        return self.hidden if self.head == "mlp" else 0

    def make_loss(self) -> LossConfig:
        """The loss with its parameters, to be called with logits and labels."""
        return LossConfig(self.loss, self.alpha, self.gamma, self.gamma_pos, self.gamma_neg, self.margin)

    def make_augmentation(self) -> Augmentation:
        """What is done to the tiles of a training batch."""
        return Augmentation(self.views, self.jitter, self.crop_scale)

    def like_original(self) -> Self:
        """The original script's split and classes, for comparison with its figures only."""
        data = replace(self.data, split_tiles=True, exclude=ORIGINAL_EXCLUDED, empty="drop", val_fraction=0.2)
        return replace(self, data=data, seed=ORIGINAL_SEED)

    def resume_from(self, stored: Self) -> Self:
        """The settings of a run that goes on: its own, except for what belongs to this machine."""
        return replace(
            stored,
            run=self.run,
            resume=True,
            device=self.device,
            workers=self.workers,
            shard=self.shard,
            memory_budget=self.memory_budget or stored.memory_budget,
        )

    def on_node_of(self, own: Self) -> Self:
        """These settings, which are rank 0's, with what is the node's own in those that a rank was given.

        A rank that was not told of a scratch folder takes rank 0's, which may be that of the run it resumes.
        """
        scratch = self.scratch if own.scratch == SCRATCH else own.scratch
        return replace(self, device=own.device, workers=own.workers, scratch=scratch)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        data = {**value["data"], "exclude": tuple(value["data"]["exclude"])}
        return cls(**{**value, "data": DataConfig(**data)})


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
    click.option("--features", default="cls", help="Pooled arrays of the cache, joined by +: cls+patch_mean."),
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

"""Define the settings of a training run, checked once and frozen.

Each option is declared here once: default, range and help stand on its field, and `train/command.py` makes the command
lines from them. Fields that some of the commands lack are listed there.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from cache_schema import LabelIds
from cache_schema.cli.options import BYTES, FILE, FOLDER, INTEGERS, Range, check_ranges, option, same_option
from extract.backbone.dinov3 import POOLING
from extract.config import DeviceChoice, ExtractConfig
from extract.tiles.scenes import DEFAULT_SCENE_REGEX
from train.model.augment import MIN_CROP_SCALE, NO_AUGMENTATION, Augmentation, Views
from train.model.loss import LossConfig, LossName

from .errors import TrainError

ClassWeights = Literal["none", "balanced", "effective"]

EmptyTiles = Literal["drop", "val", "keep"]

HeadName = Literal["mlp", "linear"]

HEADS: tuple[HeadName, ...] = get_args(HeadName)

ORIGINAL_EXCLUDED = (5, 48)
"""Class ids the original script left out: Small Car and Building, which are in nearly every tile."""

SCRATCH = "cache/prefix"

ORIGINAL_SEED = 42

ORIGINAL_IMAGE_SIZE = 224

_RATES = Range(above=0, at_most=1e30)
_DECAYS = Range(at_least=0, at_most=1e6)
"""Beyond these, AdamW's own factors overflow float32, and torch fails with an error of its own."""
_COUNT = Range(at_least=1)
_NOT_NEGATIVE = Range(at_least=0)


@dataclass(frozen=True)
class DataConfig:
    """Which rows train, which validate, and what their labels mean.

    Raises:
        TrainError: a value is out of range.
    """

    label_ids: Literal["auto"] | LabelIds = option(
        "auto", group="Data", help="Whether labels hold xView type ids (11-94) or class ids (0-59)."
    )
    taxonomy: str | None = option(
        None, group="Data", type=FILE, help="CSV of your own classes: class_id,name or class_id,type_id,name."
    )
    exclude: tuple[int, ...] = option(
        (), group="Data", type=INTEGERS, help="Class ids to leave out, separated by commas, such as 5,48."
    )
    empty: EmptyTiles = option(
        "drop", group="Data", help="Tiles without a known object: leave out, validate on, or train on as well."
    )
    scene_regex: str = option(DEFAULT_SCENE_REGEX, group="Data", help="Group (?P<scene>…) of a tile's name.")
    val_fraction: float = option(
        0.2,
        group="Data",
        range=Range(above=0, below=1, text="a share {}"),
        help="Share of tiles to validate on, in whole scenes.",
    )
    split_file: str | None = option(None, group="Data", type=FILE, help="A split.json of an earlier run.")
    split_tiles: bool = option(
        False,
        name="like-original",
        group="Data",
        help="Random tile split (seed 42), no empty tiles, classes 5 and 48 left out, 224 px: only to compare with the "
        "original script's figures, since neighbouring tiles leak.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, TrainError)


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer, on cached vectors (`unfreeze` 0) or on streamed tiles.

    Raises:
        TrainError: a value is out of range, or two settings exclude each other.
    """

    cache: str = option(group="Data", help="Cache to train on.  [default: the one written last]")
    run: str = option(name="run-dir", group="Output", help="Link to the newest run; the run itself is numbered.")
    unfreeze: int = option(
        0, group="Training", help="Last transformer layers to train; 0 trains the head on cached vectors."
    )
    val_cache: str | None = option(
        None, group="Data", help="A separate validation set, instead of a split of the cache."
    )
    test_cache: str | None = option(None, group="Data", help="A test set, scored once at the end.")
    backbone: str | None = option(None, group="Data", help="Refuse a cache of another backbone than this.")
    data: DataConfig = DataConfig()
    allow_unsealed: bool = option(False, group="Data", help="Train on an unfinished cache, without its missing rows.")
    features: str = option("cls", group="Model", help="cls, patch_mean or cls+patch_mean.")
    head: HeadName = option("mlp", group="Model", help="With a hidden layer, or without.")
    hidden: int = option(512, group="Model", range=_COUNT, help="Width of the head's hidden layer.")
    dropout: float = option(0.1, group="Model", range=Range(at_least=0, below=1), help="Dropout of the hidden layer.")
    head_run: str | None = option(
        None, group="Model", help="Run whose head to start from.  [default: runs/head, if it is of this cache]"
    )
    epochs: int = option(50, group="Training", range=_COUNT, help="Times that every training tile is seen.")
    batch_size: int = option(
        1024,
        group="Training",
        range=_COUNT,
        help="Tiles of a step, over all ranks; halved until an epoch has 20 steps.",
    )
    warmup: float = option(
        0.05,
        group="Training",
        range=Range(at_least=0, below=1, text="a share from {}"),
        help="Share of steps that warms up.",
    )
    lr: float = option(1e-3, group="Training", range=_RATES, help="Peak learning rate of the head.")
    weight_decay: float = option(0.01, group="Training", range=_DECAYS, help="Weight decay of AdamW.")
    loss: LossName = option("focal", group="Training", help="Loss to train with.")
    alpha: float = option(
        LossConfig.alpha,
        group="Training",
        range=Range(at_least=0, at_most=1),
        help="Focal loss: weight of the positives.",
    )
    gamma: float = option(
        LossConfig.gamma, group="Training", range=_NOT_NEGATIVE, help="Focal loss: how little easy examples count."
    )
    gamma_pos: float = option(
        LossConfig.gamma_pos, group="Training", range=_NOT_NEGATIVE, help="Asymmetric loss: --gamma of the positives."
    )
    gamma_neg: float = option(
        LossConfig.gamma_neg, group="Training", range=_NOT_NEGATIVE, help="Asymmetric loss: --gamma of the negatives."
    )
    margin: float = option(
        LossConfig.margin,
        group="Training",
        range=Range(at_least=0, below=1),
        help="Asymmetric loss: negatives below this probability cost nothing.",
    )
    best_by: Literal["f1_weighted", "map_macro"] = option(
        "f1_weighted", group="Training", help="Figure that selects the best epoch."
    )
    class_weights: ClassWeights = option(
        "none",
        group="Training",
        help="Weight positives of rare classes up to 10 x: by inverse frequency, or by the effective number of tiles.",
    )
    repeat_factor: float = option(
        0.0,
        group="Training",
        range=Range(at_least=0, at_most=1, text="a share of tiles, {}"),
        help="Repeat tiles of classes on less than this share of tiles, such as 0.01; 0 repeats none.",
    )
    patience: int | None = option(
        None,
        group="Training",
        range=Range(at_least=1, text="{} epoch"),
        help="Stop after this many epochs without a better --best-by; the learning rate still falls as planned for all "
        "--epochs.  [default: train all of them]",
    )
    clip_norm: float | None = option(
        None,
        group="Training",
        range=Range(above=0),
        help="Largest norm of a step's gradient, over all ranks and weights.",
    )
    deterministic: bool = option(
        False, group="Training", help="Repeat runs bit for bit on one machine, at any cost in speed."
    )
    seed: int = option(
        0, group="Training", range=Range(at_least=0, at_most=2**31 - 1), help="Seed of split, head, order and dropout."
    )
    folds: int = option(
        0,
        group="Training",
        range=Range(at_least=2),
        help="Also cross-validate over this many folds of scenes; 0: do not.",
    )
    backbone_lr: float = option(1e-5, group="Training", range=_RATES, help="Peak learning rate of the unfrozen layers.")
    layer_decay: float = option(
        1.0,
        group="Training",
        range=Range(above=0, at_most=1),
        help="Each layer's learning rate, relative to that of the layer above it.",
    )
    accumulate: int = option(
        1, group="Training", range=_COUNT, help="Compute a rank's share of a batch in this many parts."
    )
    views: Views = option(
        Augmentation.views,
        group="Training",
        help="Show each training tile as it is, or in one of its eight flips and rotations, drawn anew each epoch.",
    )
    jitter: float = option(
        Augmentation.jitter,
        group="Training",
        range=Range(at_least=0, below=1),
        help="Change brightness and contrast of training tiles by up to this share, such as 0.2, and colours by half.",
    )
    crop_scale: float = option(
        Augmentation.crop_scale,
        group="Training",
        range=Range(
            at_least=MIN_CROP_SCALE,
            at_most=1,
            text="a share of the tile's area, {}: a smaller crop would lose most objects it is labelled with",
        ),
        help="Enlarge a random square of at least this share of a training tile's area, 0.5 to 1. Its labels stay "
        "those of the whole tile, so a crop that loses an object is mislabelled: stay near 1.",
    )
    save_every: int = option(1, group="Output", range=_COUNT, help="Epochs between checkpoints to resume from.")
    save_steps: int = option(
        500, group="Output", range=_NOT_NEGATIVE, help="Steps between checkpoints within an epoch; 0: none."
    )
    resume: bool = option(False, group="Output", help="Continue the newest run of --run-dir with its own settings.")
    amp: bool | None = option(
        None, group="Machine", help="Autocast to bf16.  [default: where the hardware supports it]"
    )
    device: DeviceChoice = same_option(ExtractConfig, "device")
    workers: int | None = same_option(ExtractConfig, "workers")
    memory_budget: int | None = option(
        None,
        group="Machine",
        type=BYTES,
        range=Range(above=0, text="bytes {}"),
        help="Memory a rank may hold vectors in, such as 512M; if they need more, they are streamed from disk.  "
        "[default: half of what is free]",
    )
    grad_checkpoint: bool = option(
        False,
        group="Machine",
        help="Save memory: compute activations of trained layers again in the backward pass.",
    )
    shard: bool = option(
        False,
        group="Machine",
        help="Split trained layers, their gradients and AdamW's moments over the ranks, if one GPU cannot hold them.",
    )
    cache_prefix: bool = option(
        False,
        group="Machine",
        help="Run the frozen layers once, and keep their activations, the input of the trained layers, on disk.",
    )
    scratch: str = option(SCRATCH, group="Machine", type=FOLDER, per_node=True, help="Local folder for --cache-prefix.")
    large_prefix: bool = option(False, name="yes", group="Machine", help="Let --cache-prefix take more than 50 GiB.")

    def __post_init__(self) -> None:
        unknown = set(self.features.split("+")) - set(POOLING)
        if unknown or len(set(self.features.split("+"))) != len(self.features.split("+")):
            raise TrainError(f"--features {self.features}: choose of {', '.join(POOLING)}, joined by +")
        check_ranges(self, TrainError)
        if not self.unfreeze and self.make_augmentation() != NO_AUGMENTATION:
            raise TrainError(
                "--views, --jitter and --crop-scale change pixels, and cached vectors have none: "
                "set UNFREEZE=1 or more, or leave them out"
            )
        if self.shard and not self.unfreeze:
            raise TrainError(
                "--shard splits trained layers over the ranks, and UNFREEZE=0 trains none: set UNFREEZE=1 or more, or "
                "leave it out"
            )
        if self.cache_prefix and (self.jitter or self.crop_scale < 1):
            raise TrainError(
                "--cache-prefix keeps activations from one epoch to the next, and --jitter and --crop-scale change "
                "the pixels in every epoch: leave out either; --views d4 works with it"
            )
        for name in ("val_cache", "test_cache"):
            if getattr(self, name) == self.cache:
                raise TrainError(
                    f"{name.upper()} is the training cache itself: {self.cache}: set CACHE or {name.upper()}"
                )

    @property
    def hidden_width(self) -> int:
        """Return the width of the head's hidden layer; 0 for a linear head."""
        return self.hidden if self.head == "mlp" else 0

    def make_loss(self) -> LossConfig:
        """Return the loss with its parameters, to be called with logits and labels."""
        return LossConfig(self.loss, self.alpha, self.gamma, self.gamma_pos, self.gamma_neg, self.margin)

    def make_augmentation(self) -> Augmentation:
        """Return how tiles of a training batch are augmented."""
        return Augmentation(self.views, self.jitter, self.crop_scale)

    def like_original(self) -> Self:
        """Return these settings with the original script's split and classes, only to compare with its figures."""
        data = replace(self.data, split_tiles=True, exclude=ORIGINAL_EXCLUDED, empty="drop", val_fraction=0.2)
        return replace(self, data=data, seed=ORIGINAL_SEED)

    def resume_from(self, stored: Self) -> Self:
        """Return the settings of a resumed run: those it stored, except for what belongs to this machine."""
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
        """Return rank 0's settings, with `device`, `workers` and `scratch` of another rank's `own` settings.

        A rank that was given no scratch folder takes rank 0's, which may be that of the run it resumes.
        """
        scratch = self.scratch if own.scratch == SCRATCH else own.scratch
        return replace(self, device=own.device, workers=own.workers, scratch=scratch)

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` gave; options that did not exist then have their defaults."""
        data = {**value["data"], "exclude": tuple(value["data"]["exclude"])}
        return cls(**{**value, "data": DataConfig(**data)})

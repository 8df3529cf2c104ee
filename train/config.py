"""Define the settings of a training run, checked once and frozen.

Each option is declared here once: default, range and help stand on its field, and `train/command.py` makes the command
lines from them. Fields that some of the commands lack are listed there.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from cache_schema import LabelIds
from cache_schema.cli.options import BYTES, FILE, FOLDER, REQUIRED, Range, check_ranges, option, same_option
from extract.config import DeviceChoice, ExtractConfig
from extract.tiles.scenes import DEFAULT_SCENE_REGEX
from train.model.augment import MIN_CROP_SCALE, NO_AUGMENTATION, Augmentation, Views
from train.model.loss import LossConfig, LossName
from train.model.optimizer import scale_learning_rate

from .errors import TrainError

ClassWeights = Literal["none", "balanced", "effective"]
EmptyTiles = Literal["drop", "val", "keep"]
HeadName = Literal["mlp", "linear"]
HEADS: tuple[HeadName, ...] = get_args(HeadName)

ORIGINAL_EXCLUDED = (5, 48)
"""Class ids the original script left out: Small Car and Building, which are in nearly every tile."""

ORIGINAL_SEED = 42
ORIGINAL_IMAGE_SIZE = 224
SCRATCH = "cache/prefix"

_RATES = Range(above=0, at_most=1e30)
_DECAYS = Range(at_least=0, at_most=1e6)
"""Beyond these, AdamW's own factors overflow float32, and torch raises an error that names no option."""
_COUNT = Range(at_least=1)
_NOT_NEGATIVE = Range(at_least=0)


@dataclass(frozen=True)
class DataConfig:
    """Which rows train, which validate, and what their labels mean.

    Raises:
        TrainError: a value is out of range.
    """

    label_ids: Literal["auto"] | LabelIds = option(
        "auto", "Data", "Whether labels hold xView type ids (11-94) or class ids (0-59)."
    )
    taxonomy: str | None = option(
        None, "Data", "CSV of your own classes: class_id,name or class_id,type_id,name.", type=FILE
    )
    exclude: tuple[int, ...] = option((), "Data", "Class ids to leave out, separated by commas, such as 5,48.")
    empty: EmptyTiles = option(
        "drop", "Data", "Tiles without a known object: leave out, validate on, or train on as well."
    )
    scene_regex: str = option(DEFAULT_SCENE_REGEX, "Data", "Group (?P<scene>…) of a tile's name.")
    val_fraction: float = option(
        0.2, "Data", "Share of tiles to validate on, in whole scenes.", range=Range(above=0, below=1, text="a share {}")
    )
    split_file: str | None = option(None, "Data", "A split.json of an earlier run.", type=FILE)
    split_tiles: bool = option(
        False,
        "Data",
        "Random tile split (seed 42), no empty tiles, classes 5 and 48 left out, 224 px: only to compare with the "
        "original script's figures, since neighbouring tiles leak.",
        name="like-original",
    )

    def __post_init__(self) -> None:
        check_ranges(self, TrainError)


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer, on cached vectors (`unfreeze` 0) or on streamed tiles.

    Raises:
        TrainError: a value is out of range, or two settings exclude each other.
    """

    cache: str = option(REQUIRED, "Data", "Cache to train on.  [default: the one written last]")
    run: str = option(REQUIRED, "Output", "Link to the newest run; the run itself is numbered.", name="run-dir")
    unfreeze: int = option(0, "Training", "Last transformer layers to train; 0 trains the head on cached vectors.")
    val_cache: str | None = option(None, "Data", "A separate validation set, instead of a split of the cache.")
    test_cache: str | None = option(None, "Data", "A test set, scored once at the end.")
    backbone: str | None = option(None, "Data", "Refuse a cache of another backbone than this.")
    data: DataConfig = DataConfig()
    allow_unsealed: bool = option(False, "Data", "Train on an unfinished cache, without its missing rows.")
    features: str = option("cls", "Model", "Pooled arrays of the cache, joined by +: cls+patch_mean.")
    head: HeadName = option("mlp", "Model", "With a hidden layer, or without.")
    hidden: int = option(512, "Model", "Width of the head's hidden layer.", range=_COUNT)
    dropout: float = option(0.1, "Model", "Dropout of the hidden layer.", range=Range(at_least=0, below=1))
    head_run: str | None = option(
        None, "Model", "Run whose head to start from.  [default: runs/head, if it is of this cache]"
    )
    epochs: int = option(50, "Training", "Times that every training tile is seen.", range=_COUNT)
    batch_size: int = option(
        1024, "Training", "Tiles of a step, over all ranks; halved until an epoch has 20 steps.", range=_COUNT
    )
    warmup: float = option(
        0.05, "Training", "Share of steps that warms up.", range=Range(at_least=0, below=1, text="a share from {}")
    )
    lr: float = option(1e-3, "Training", "Peak learning rate of the head.", range=_RATES)
    weight_decay: float = option(0.01, "Training", "Weight decay of AdamW.", range=_DECAYS)
    loss: LossName = option("focal", "Training", "Loss to train with.")
    alpha: float = option(
        LossConfig.alpha, "Training", "Focal loss: weight of the positives.", range=Range(at_least=0, at_most=1)
    )
    gamma: float = option(
        LossConfig.gamma, "Training", "Focal loss: how little easy examples count.", range=_NOT_NEGATIVE
    )
    gamma_pos: float = option(
        LossConfig.gamma_pos, "Training", "Asymmetric loss: --gamma of the positives.", range=_NOT_NEGATIVE
    )
    gamma_neg: float = option(
        LossConfig.gamma_neg, "Training", "Asymmetric loss: --gamma of the negatives.", range=_NOT_NEGATIVE
    )
    margin: float = option(
        LossConfig.margin,
        "Training",
        "Asymmetric loss: negatives below this probability cost nothing.",
        range=Range(at_least=0, below=1),
    )
    best_by: Literal["f1_weighted", "map_macro"] = option(
        "f1_weighted", "Training", "Figure that selects the best epoch."
    )
    class_weights: ClassWeights = option(
        "none",
        "Training",
        "Weight positives of rare classes up to 10 x: by inverse frequency, or by the effective number of tiles.",
    )
    repeat_factor: float = option(
        0.0,
        "Training",
        "Repeat tiles of classes on less than this share of tiles, such as 0.01; 0 repeats none.",
        range=Range(at_least=0, at_most=1, text="a share of tiles, {}"),
    )
    patience: int | None = option(
        None,
        "Training",
        "Stop after this many epochs without a better --best-by; the learning rate still falls as planned for all "
        "--epochs.  [default: train all of them]",
        range=Range(at_least=1, text="{} epoch"),
    )
    clip_norm: float | None = option(
        None, "Training", "Largest norm of a step's gradient, over all ranks and weights.", range=Range(above=0)
    )
    deterministic: bool = option(False, "Training", "Repeat runs bit for bit on one machine, at any cost in speed.")
    seed: int = option(
        0, "Training", "Seed of split, head, order and dropout.", range=Range(at_least=0, at_most=2**31 - 1)
    )
    folds: int = option(
        0, "Training", "Also cross-validate over this many folds of scenes; 0: do not.", range=Range(at_least=2)
    )
    backbone_lr: float = option(1e-5, "Training", "Peak learning rate of the unfrozen layers.", range=_RATES)
    layer_decay: float = option(
        1.0,
        "Training",
        "Each layer's learning rate, relative to that of the layer above it.",
        range=Range(above=0, at_most=1),
    )
    accumulate: int = option(1, "Training", "Compute a rank's share of a batch in this many parts.", range=_COUNT)
    views: Views = option(
        Augmentation.views,
        "Training",
        "Show each training tile as it is, or in one of its eight flips and rotations, drawn again each epoch.",
    )
    jitter: float = option(
        Augmentation.jitter,
        "Training",
        "Change brightness and contrast of training tiles by up to this share, such as 0.2, and colours by half.",
        range=Range(at_least=0, below=1),
    )
    crop_scale: float = option(
        Augmentation.crop_scale,
        "Training",
        f"Enlarge a random square of at least this share of a training tile's area, {MIN_CROP_SCALE:g} to 1. Its "
        "labels stay those of the whole tile, so a crop that loses an object is mislabelled: stay near 1.",
        range=Range(
            at_least=MIN_CROP_SCALE,
            at_most=1,
            text="a share of the tile's area, {}: a smaller crop would lose most objects it is labelled with",
        ),
    )
    save_every: int = option(1, "Output", "Epochs between checkpoints to resume from.", range=_COUNT)
    save_steps: int = option(500, "Output", "Steps between checkpoints within an epoch; 0: none.", range=_NOT_NEGATIVE)
    resume: bool = option(False, "Output", "Continue the newest run of --run-dir with its own settings.")
    amp: bool | None = option(None, "Machine", "Autocast to bf16.  [default: where the hardware supports it]")
    device: DeviceChoice = same_option(ExtractConfig, "device")
    workers: int | None = same_option(ExtractConfig, "workers")
    memory_budget: int | None = option(
        None,
        "Machine",
        "Memory a rank may hold vectors in, such as 512M; if they need more, they are streamed from disk.  "
        "[default: half of what is free]",
        type=BYTES,
        range=Range(above=0, text="bytes {}"),
    )
    grad_checkpoint: bool = option(
        False, "Machine", "Save memory: compute activations of trained layers again in the backward pass."
    )
    shard: bool = option(
        False,
        "Machine",
        "Split trained layers, their gradients and AdamW's moments over the ranks, if one GPU cannot hold them.",
    )
    cache_prefix: bool = option(
        False,
        "Machine",
        "Run the frozen layers once, and keep their activations, the input of the trained layers, on disk.",
    )
    scratch: str = option(SCRATCH, "Machine", "Local folder for --cache-prefix.", type=FOLDER, per_node=True)
    large_prefix: bool = option(False, "Machine", "Let --cache-prefix take more than 50 GiB.", name="yes")

    def __post_init__(self) -> None:
        names = self.features.split("+")
        if "" in names or len(set(names)) < len(names):
            raise TrainError(f"--features {self.features}: name pooled arrays of the cache, each once, joined by +")
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

    def scale_rates(self, step: int, steps: int) -> float:
        """Return the factor of the peak learning rates at one of `steps` steps."""
        return scale_learning_rate(step, steps, self.warmup)

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

"""Define the settings of an extraction, and the default places of caches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache_schema.cli.options import REQUIRED, Range, check_ranges, option
from cache_schema.storage.place import split_url
from extract.backbone.pooling import DEFAULT_POOLING, POOLINGS
from extract.backbone.precision import PrecisionChoice
from extract.tiles.scenes import DEFAULT_SCENE_REGEX

from .errors import ConfigError

CACHE_ROOT = Path("cache")
DEMO_ROOT = CACHE_ROOT / "demo"
LAST_CACHE = CACHE_ROOT / "last"
"""Names the cache that was written last, for trainers that are given none. Caches of the demo are not noted here."""

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction, checked. Each field's help says what it means.

    Raises:
        ConfigError: no tiles are given, a value is out of range, or the folder of `profile` does not exist.
    """

    tiles: str = option(REQUIRED, "Data", "gs://bucket/prefix or a directory holding images/ and labels/.")
    backbone: str = option("vitl16", "Model", "vitl16, vit7b16, demo, a checkpoint directory or a hub id.")
    image_size: int | None = option(
        None,
        "Model",
        "Pixels a side, a multiple of 16.  [default: 512 for the satellite backbones, else the checkpoint's own]",
    )
    cache: str | None = option(
        None, "Output", "Directory or gs://… to write to.  [default: cache/<tiles>-<backbone>-<size>]"
    )
    precision: PrecisionChoice = option(
        "auto", "Model", "Dtype of weights and forward pass; auto is bf16 where the hardware supports it, else float32."
    )
    pooling: str = option("+".join(DEFAULT_POOLING), "Model", "Vectors to store of each tile, joined by +.")
    batch_size: int = option(
        32, "Machine", "Tiles per forward pass.", range=Range(at_least=1, at_most=256, text="choose {}, a block's rows")
    )
    workers: int | None = option(
        None,
        "Machine",
        "Feed processes per rank.  [default: its cores less one]",
        range=Range(at_least=0, text="{}; at 0 each rank reads tiles in its own process"),
        per_node=True,
    )
    device: DeviceChoice = option("auto", "Machine", "auto is cuda where there is a GPU.", per_node=True)
    limit: int | None = option(
        None,
        "Data",
        "A trial: whole scenes up to about this many tiles.  [default: all tiles]",
        range=Range(at_least=1, text="{} tile"),
    )
    scene_regex: str = option(DEFAULT_SCENE_REGEX, "Data", "Group (?P<scene>…) of a tile's name, for --limit.")
    unlabelled: bool = option(False, "Data", "Embed tiles without a label file too.")
    max_quarantined: float = option(
        0.01,
        "Output",
        "Largest share of unreadable tiles to accept.",
        range=Range(at_least=0, at_most=1, text="a share of tiles, {}"),
    )
    retry_quarantined: bool = option(False, "Output", "Try tiles again that were quarantined before.")
    yes: bool = option(
        False, "Output", "Continue even if more than a tenth of the tiles of the version in use are gone."
    )
    profile: str | None = option(
        None,
        "Output",
        "Write a torch profiler trace of a few batches to this file (JSON, for Perfetto).",
        per_node=True,
    )

    def __post_init__(self) -> None:
        if not self.tiles:
            raise ConfigError("TILES is not set: give gs://bucket/prefix or a directory, holding images/ and labels/")
        names = self.pooled_arrays
        if not set(names) <= set(POOLINGS) or len(set(names)) < len(names):
            raise ConfigError(f"--pooling {self.pooling}: choose of {', '.join(POOLINGS)}, each once, joined by +")
        check_ranges(self, ConfigError)
        if self.profile and not Path(self.profile).absolute().parent.is_dir():
            raise ConfigError(f"--profile {self.profile}: no directory {Path(self.profile).absolute().parent}: make it")

    @property
    def pooled_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that a cache of these settings holds."""
        return tuple(self.pooling.split("+"))

    def cache_url(self, image_size: int) -> str:
        """Return where the cache goes: as asked, or `cache/<last two parts of TILES>-<backbone>-<size>[-limitN]`."""
        if self.cache:
            return self.cache.rstrip("/")
        parts = [part for part in split_url(self.tiles) if part not in ("", ".", "..")]
        name = "-".join([*parts[-2:], Path(self.backbone).name, str(image_size)])
        return str(CACHE_ROOT / (f"{name}-limit{self.limit}" if self.limit else name))


def remember_cache(cache: str) -> None:
    """Note `cache` as the one written last."""
    if DEMO_ROOT not in Path(cache).parents:
        LAST_CACHE.parent.mkdir(parents=True, exist_ok=True)
        LAST_CACHE.write_text(cache + "\n")

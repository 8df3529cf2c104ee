"""Settings of an extraction, checked once and frozen, and the default places of caches."""

from dataclasses import dataclass, field
from pathlib import Path

from extract.backbone.pooling import DEFAULT_POOLING, POOLINGS
from extract.backbone.precision import PrecisionChoice
from extract.ranks.same_job import PER_NODE
from extract.tiles.scenes import DEFAULT_SCENE_REGEX

from .errors import ConfigError

CACHE_ROOT = Path("cache")
DEMO_ROOT = CACHE_ROOT / "demo"
LAST_CACHE = CACHE_ROOT / "last"
"""Holds the name of the cache that was written last: the default for trainers. Caches of the demo are not noted."""


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction.

    Attributes:
        tiles: `gs://bucket/prefix` or a directory.
        backbone: `vitl16`, `vit7b16`, `demo`, a directory or a hub id.
        image_size: pixels a side, None for the backbone's default.
        cache: directory or `gs://…`, None for the default name.
        precision: dtype of weights and forward pass; `auto` keeps that of an existing version, and otherwise is bf16
            where the device multiplies it and float32 elsewhere.
        pooling: vectors to store of each tile: names of `POOLINGS`, joined by `+`.
        batch_size: tiles per forward pass.
        workers: feed processes per rank, None for the rank's cores less one.
        device: `auto`, `cpu` or `cuda`.
        limit: embed whole scenes up to about this many tiles.
        scene_regex: finds the scene in a tile's name (only for `limit`).
        unlabelled: embed tiles without a label object too.
        max_quarantined: largest share of quarantined tiles a finished cache may hold.
        retry_quarantined: try quarantined tiles again.
        yes: go on although more than a tenth of the rows of the version in use are gone from the bucket.
        profile: file for a torch profiler trace of a few batches.
    """

    tiles: str
    backbone: str = "vitl16"
    image_size: int | None = None
    cache: str | None = None
    precision: PrecisionChoice = "auto"
    pooling: str = "+".join(DEFAULT_POOLING)
    batch_size: int = 32
    workers: int | None = field(default=None, metadata=PER_NODE)
    device: str = field(default="auto", metadata=PER_NODE)
    limit: int | None = None
    scene_regex: str = DEFAULT_SCENE_REGEX
    unlabelled: bool = False
    max_quarantined: float = 0.01
    retry_quarantined: bool = False
    yes: bool = False
    profile: str | None = field(default=None, metadata=PER_NODE)

    def __post_init__(self) -> None:
        if not self.tiles:
            raise ConfigError("TILES is not set: give gs://bucket/prefix or a directory, holding images/ and labels/")
        names = self.pooled_arrays
        if not set(names) <= set(POOLINGS) or len(set(names)) < len(names):
            raise ConfigError(f"--pooling {self.pooling}: choose of {', '.join(POOLINGS)}, each once, joined by +")
        if not 1 <= self.batch_size <= 256:
            raise ConfigError(f"--batch-size {self.batch_size}: choose 1 to 256, a block's rows")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: choose 0 (read in the rank's own process) or more")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"LIMIT={self.limit}: choose at least 1 tile")
        if not 0 <= self.max_quarantined <= 1:
            raise ConfigError(f"--max-quarantined {self.max_quarantined}: a share between 0 and 1")
        if self.profile and not Path(self.profile).absolute().parent.is_dir():
            raise ConfigError(f"--profile {self.profile}: no directory {Path(self.profile).absolute().parent}: make it")

    @property
    def pooled_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that a cache of these settings holds."""
        return tuple(self.pooling.split("+"))

    def cache_url(self, image_size: int) -> str:
        """Return the URL of the cache: as asked, or `cache/<last two parts of TILES>-<backbone>-<size>[-limitN]`."""
        if self.cache:
            return self.cache.rstrip("/")
        parts = [part for part in self.tiles.removeprefix("gs://").split("/") if part not in ("", ".", "..")]
        name = "-".join([*parts[-2:], Path(self.backbone).name, str(image_size)])
        return str(CACHE_ROOT / (f"{name}-limit{self.limit}" if self.limit else name))


def remember_cache(cache: str) -> None:
    """Note `cache` as the one written last."""
    if DEMO_ROOT not in Path(cache).parents:
        LAST_CACHE.parent.mkdir(parents=True, exist_ok=True)
        LAST_CACHE.write_text(cache + "\n")

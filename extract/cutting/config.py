"""Define the settings of a tiling."""

from dataclasses import dataclass

from cache_schema.cli.options import REQUIRED, Range, check_ranges, option
from extract.errors import ConfigError
from extract.tiles.raster import check_grid


@dataclass(frozen=True)
class Cutting:
    """How scenes are cut.

    Raises:
        ConfigError: a value is out of range.
    """

    size: int = option(512, "Data", "Pixels a side of a tile.")
    stride: int = option(
        None, "Data", "Pixels from one tile to the next; less than the size overlaps.  [default: the size]"
    )
    min_visibility: float = option(
        0.25,
        "Data",
        "Share of a box's area (of a larger one: of what a tile can show of it) that a tile must show to name it.",
        range=Range(at_least=0, at_most=1, text="a share of a box, {}"),
    )

    def __post_init__(self) -> None:
        check_grid(self.size, self.stride)
        check_ranges(self, ConfigError)


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """What one tiling is asked to do.

    Raises:
        ConfigError: a place is not given, or a value is out of range.
    """

    images: str = option(REQUIRED, "Data", "Directory of GeoTIFFs, such as xView's train_images.")
    labels: str = option(REQUIRED, "Data", "xView_train.geojson.")
    out: str = option(REQUIRED, "Output", "gs://bucket/prefix or a directory: what make extract takes as TILES.")
    cutting: Cutting
    workers: int | None = option(
        None,
        "Machine",
        "Scenes cut at a time, each in a process.  [default: cores]",
        range=Range(at_least=1, text="{}; 1 cuts in this process"),
    )
    dry_run: bool = option(False, "Output", "Print what would be cut and what would be dropped; write nothing.")

    def __post_init__(self) -> None:
        for name, value in (("IMAGES", self.images), ("LABELS", self.labels), ("OUT", self.out)):
            if not value:
                raise ConfigError(f"{name} is not set: give IMAGES=train_images LABELS=xView_train.geojson OUT=gs://…")
        check_ranges(self, ConfigError)

"""Say what a trained model is to run on."""

from dataclasses import dataclass

from cache_schema.cli.options import option
from train.errors import TrainError

DEFAULT_OUT = "predictions.csv"


@dataclass(frozen=True, eq=False)
class Target:
    """What to run on: exactly one of `tiles`, `cache` and `names`.

    Attributes:
        names: files, directories, buckets and rasters, see `find_inputs`.

    Raises:
        TrainError: none of the three is set, or several, or settings that do not go together.
    """

    tiles: str | None = option(None, "Data", "gs://bucket/prefix or a directory.")
    cache: str | None = option(None, "Data", "A cache, instead of tiles.")
    names: tuple[str, ...] = ()
    window: int | None = option(
        None,
        "Data",
        "Cut every local .tif into windows of this many pixels a side, best the size of the tiles that RUN was "
        "trained on.  [default: 512, and only what is larger than 2048 a side]",
    )
    stride: int | None = option(None, "Data", "Pixels from one window to the next.  [default: the window]")

    def __post_init__(self) -> None:
        if (self.tiles is not None) + (self.cache is not None) + bool(self.names) != 1:
            raise TrainError("give either --tiles or --cache, or for predict files and directories (INPUT)")
        if not self.names and (self.window, self.stride) != (None, None):
            raise TrainError("--window and --stride apply to GeoTIFFs given as INPUT only: leave them out")

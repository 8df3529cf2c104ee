"""Define the settings of the doctor."""

from dataclasses import dataclass

from cache_schema.cli.options import FILE, Range, check_ranges, option
from cache_schema.storage.place import carries_credentials
from extract.config import ExtractConfig
from extract.errors import ConfigError


@dataclass(frozen=True)
class DoctorConfig:
    """What is to be examined: an extraction, as it would be asked for.

    Raises:
        ConfigError: a value is out of range, or a URL has a user or password in it.
    """

    extract: ExtractConfig
    sample: int = option(
        24, "Data", "Tiles to fetch and decode, drawn at random.", range=Range(at_least=1, text="{} tile")
    )
    seed: int = option(0, "Data", "Seed of that draw.")
    nproc: int | None = option(
        None,
        "Machine",
        "Ranks the extraction will have.  [default: GPUs, else 1]",
        range=Range(at_least=1, text="{} rank"),
    )
    taxonomy: str | None = option(
        None, "Data", "CSV of your own classes: class_id,name or class_id,type_id,name.  [default: xView's]", type=FILE
    )
    price_per_hour: float | None = option(
        None,
        "Machine",
        "Of everything that computes, in any currency, for the estimate.",
        range=Range(at_least=0, text="a price, {}"),
    )

    def __post_init__(self) -> None:
        for name, url in (("TILES", self.extract.tiles), ("CACHE", self.extract.cache or "")):
            if carries_credentials(url):  # refused before any check could show it
                raise ConfigError(f"{name} is a URL with a user or password in it: leave them out")
        check_ranges(self, ConfigError)

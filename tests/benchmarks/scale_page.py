"""Compute the tables of extract/SCALE.md; `python -m tests.benchmarks.scale_page` writes them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cache_schema.layout import LABEL_ID_COLUMNS, POOLED_DTYPE, STATUS_DTYPE

from .arithmetic import (
    CLASSES,
    DECODE_S,
    LIST_PAGE,
    LISTING_BYTES_A_ROW,
    READS_PER_S,
    STORAGE_USD_GB_MONTH,
    TABLE_BYTES_A_ROW,
    TILE_BYTES,
    TILE_FLOP,
    WRITES_PER_S,
    Cache,
    Ramp,
    Requests,
    gpu_hours,
    most_rows,
    tiles_per_s,
)

PAGE = Path(__file__).parents[2] / "extract" / "SCALE.md"
SIZES = (50_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)

Row = Sequence[str]


def _tabulate(columns: Row, rows: Sequence[Row]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    """Format a number with three significant digits, short enough for a table: `19,535`, `1.17 M`, `2 B`."""
    for scale, unit in ((1e9, " B"), (1e6, " M")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float) -> str:
    for scale, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e6:.3g} MB"


def _usd(value: float) -> str:
    return f"${value:,.2f}" if value < 100 else f"${value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _describe_hours(tiles: int, model: str) -> str:
    return _number(gpu_hours(tiles, model))


def _by_size(title: str, columns: dict[str, Callable[[int], str]]) -> str:
    rows = [[_number(tiles), *(column(tiles) for column in columns.values())] for tiles in SIZES]
    return _tabulate([title, *columns], rows)


def make_tables() -> dict[str, str]:
    """Return by name the Markdown between `<!-- NAME -->` and `<!-- end -->` in the page."""
    pace = {model: tiles_per_s(model) for model in TILE_FLOP}
    held = {rows: rows * 1024 * POOLED_DTYPE.itemsize for rows in SIZES}
    labels = LABEL_ID_COLUMNS // 8 + STATUS_DTYPE.itemsize + CLASSES
    reads, writes = Ramp(READS_PER_S), Ramp(WRITES_PER_S)
    alone = [
        ("listing, at 0.1 s a page", 0.1 / LIST_PAGE),
        ("listing, at 0.5 s a page", 0.5 / LIST_PAGE),
    ]
    return {
        "cache": _by_size(
            "tiles",
            {
                "tiles and labels, objects": lambda n: _number(2 * n),
                "tiles, bytes": lambda n: _bytes(n * TILE_BYTES),
                "rows a block": lambda n: f"{Cache(n).block_rows:,}",
                "blocks": lambda n: _number(Cache(n).blocks),
                "cache, objects": lambda n: _number(Cache(n).objects),
                "cache, bytes": lambda n: _bytes(Cache(n).bytes),
                "cache, a month": lambda n: _usd(Cache(n).bytes / 1e9 * STORAGE_USD_GB_MONTH),
            },
        ),
        "requests": _by_size(
            "tiles",
            {
                "list pages": lambda n: _number(Requests.of(Cache(n)).lists),
                "GETs of tiles and labels": lambda n: _number(Requests.of(Cache(n)).tile_reads),
                "GETs in the cache": lambda n: _number(Requests.of(Cache(n)).cache_reads),
                "PUTs": lambda n: _number(Requests.of(Cache(n)).cache_writes),
                "requests cost": lambda n: _usd(Requests.of(Cache(n)).usd),
                "reads, at 5,000 a second": lambda n: _duration(Requests.of(Cache(n)).tile_reads / READS_PER_S),
                "reads, ramped up": lambda n: _duration(reads.time(Requests.of(Cache(n)).tile_reads)),
                "writes, ramped up": lambda n: _duration(writes.time(Requests.of(Cache(n)).cache_writes)),
            },
        ),
        "compute": _by_size("tiles, H100-hours", {model: partial(_describe_hours, model=model) for model in TILE_FLOP}),
        "feed": _tabulate(
            ["of one H100", *pace],
            [
                ["tiles a second", *map(_number, pace.values())],
                ["GETs a second", *(_number(2 * rate) for rate in pace.values())],
                ["bytes a second", *(_bytes(rate * TILE_BYTES) for rate in pace.values())],
                ["cores that decode tiles", *(_number(rate * DECODE_S) for rate in pace.values())],
                ["GPUs that reach 5,000 GETs a second", *(_number(READS_PER_S / 2 / rate) for rate in pace.values())],
                ["seconds to compute a block of 256", *(_number(256 / rate) for rate in pace.values())],
                ["of 4,096", *(_number(4096 / rate) for rate in pace.values())],
            ],
        ),
        "memory": _by_size(
            "tiles",
            {
                "listing, rank 0": lambda n: _bytes(n * LISTING_BYTES_A_ROW),
                "tile table, every rank": lambda n: _bytes(n * TABLE_BYTES_A_ROW),
                "`cls` held, float16": lambda n: _bytes(held[n]),
                "`cls` and `patch_mean` held": lambda n: _bytes(2 * held[n]),
                "labels, every trainer's rank": lambda n: _bytes(n * labels),
            },
        ),
        "alone": _tabulate(
            ["what rank 0 does while the others wait", "tiles at 30 min"],
            [[what, _number(most_rows(seconds))] for what, seconds in alone],
        ),
    }


def fill_page(text: str) -> str:
    """Return the page with new tables; the text between them stays."""
    for name, table in make_tables().items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"the page has no place for the table {name}")
        text = f"{before}{start}{table}\n{rest[rest.index(end) :]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(fill_page(PAGE.read_text()))

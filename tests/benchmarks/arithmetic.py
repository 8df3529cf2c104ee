"""Compute objects, requests, bytes, hours and memory for any number of tiles.

Constants come from the packages. tests/unit/benchmarks/test_arithmetic.py compares the results with real caches, and
`scale_page` prints them.
"""

from dataclasses import dataclass

from cache_schema.layout import (
    DIGEST_BYTES,
    LABEL_ID_COLUMNS,
    LABEL_IDS_DTYPE,
    POOLED_DTYPE,
    STATUS_DTYPE,
    TABLE_CHUNK_ROWS,
    choose_block_rows,
)
from cache_schema.table import COLUMN_DTYPES
from extract.ranks.group import GROUP_TIMEOUT

# Google's published figures, sources and dates in extract/SCALE.md.
WRITES_PER_S, READS_PER_S = 1000.0, 5000.0
DOUBLING_S = 20 * 60.0
LIST_PAGE = 1000
ONE_REQUEST_BYTES = 8 * 2**20
"""google-cloud-storage uploads a larger object in two requests: the first asks for the upload address."""
CLASS_A_USD, CLASS_B_USD = 0.005 / 1000, 0.0004 / 1000
STORAGE_USD_GB_MONTH = 0.020

# Measured, see README.md in this folder. The product is an H100's; the efficiency is a CPU's.
MATMUL_FLOPS, EFFICIENCY = 798e12, 0.80
TILE_FLOP = {"vitl16 at 224": 125.5e9, "vitl16 at 512": 727e9, "vit7b16 at 224": 2.72e12, "vit7b16 at 512": 14.5e12}
TILE_BYTES = 340_000
DECODE_S = 0.002
"""Seconds to decode such a tile, a PNG of 512 px, on one core."""
LISTING_BYTES_A_ROW = 186
TABLE_BYTES_A_ROW = 93
"""Bytes per row of the tile table that each rank reads, with names of 22 bytes."""
CLASSES = 60
"""Number of bool labels that a trainer keeps per row."""

CHECKSUM_BYTES = 4
"""Bytes of checksum at the end of every chunk."""
_ARRAYS_BESIDE_POOLED = ("label_ids", "status", "commit", "tile", *COLUMN_DTYPES, "seal")


@dataclass(frozen=True)
class Cache:
    """The objects and bytes of one sealed version.

    Attributes:
        rows: N.
        width: D; 1,024 for vitl16.
        pooled: number of embedding arrays.
        name_bytes: total bytes of all names; 22 per name by default.
    """

    rows: int
    width: int = 1024
    pooled: int = 2
    name_bytes: int | None = None

    @property
    def block_rows(self) -> int:
        return choose_block_rows(self.rows)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def table_chunks(self) -> int:
        return -(-self.rows // TABLE_CHUNK_ROWS)

    @property
    def chunks_a_block(self) -> int:
        """Number of objects per block, including its commit."""
        return self.pooled + 3

    @property
    def chunks(self) -> int:
        """Number of objects that hold values: blocks, table and seal."""
        return self.blocks * self.chunks_a_block + self.table_chunks * (1 + len(COLUMN_DTYPES)) + 1

    @property
    def objects(self) -> int:
        """Number of all objects: chunks, `zarr.json` of each array and group (version, cache), `current`."""
        return self.chunks + self.pooled + len(_ARRAYS_BESIDE_POOLED) + 2 + 1

    @property
    def vector_bytes(self) -> int:
        """Bytes of a row in one embedding array."""
        return self.width * POOLED_DTYPE.itemsize

    @property
    def bytes_a_row(self) -> int:
        """Bytes per row of the arrays of blocks, without checksums and commits."""
        return self.pooled * self.vector_bytes + LABEL_ID_COLUMNS * LABEL_IDS_DTYPE.itemsize + STATUS_DTYPE.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all chunks; a short last chunk is stored at full size."""
        checksums = self.chunks_a_block * CHECKSUM_BYTES
        blocks = self.blocks * (self.block_rows * self.bytes_a_row + DIGEST_BYTES + checksums)
        chunk_rows = min(self.rows, TABLE_CHUNK_ROWS)
        columns = sum(chunk_rows * dtype.itemsize + CHECKSUM_BYTES for dtype in COLUMN_DTYPES.values())
        # vlen-utf8: a count, then a length before every string, including the padding of the last chunk.
        names = 4 + 4 * chunk_rows + CHECKSUM_BYTES
        named = 22 * self.rows if self.name_bytes is None else self.name_bytes
        return blocks + self.table_chunks * (columns + names) + named + DIGEST_BYTES + CHECKSUM_BYTES


@dataclass(frozen=True)
class Requests:
    """Number of requests of one extraction of all tiles into a cache in a bucket, without retries.

    Attributes:
        lists: pages of the listings of images/ and labels/.
        tile_reads: GETs of tiles and their labels.
        cache_reads, cache_writes: GETs and PUTs below CACHE that grow with blocks and table.
    """

    lists: int
    tile_reads: int
    cache_reads: int
    cache_writes: int

    @classmethod
    def of(cls, cache: Cache, ranks: int = 1) -> "Requests":
        """Count the requests if every tile has a label.

        Rank 0 reads every commit four times (for pending blocks, for the recheck, twice for the seal) and every block
        once. Each rank reads the tile table, rank 0 three times.
        """
        per_block = 4 + (cache.chunks_a_block - 1)
        table = cache.table_chunks * (1 + len(COLUMN_DTYPES)) * (ranks + 2)
        return cls(
            lists=2 * -(-cache.rows // LIST_PAGE),
            tile_reads=2 * cache.rows,
            cache_reads=cache.blocks * per_block + table,
            cache_writes=cache.chunks,
        )

    @property
    def usd(self) -> float:
        """Cost in US dollars. Listing and writing are class A operations, reading an object is class B."""
        return CLASS_A_USD * (self.lists + self.cache_writes) + CLASS_B_USD * (self.tile_reads + self.cache_reads)


@dataclass(frozen=True)
class Ramp:
    """Request rate that a bucket accepts if clients never exceed it: it doubles at fixed intervals.

    Attributes:
        per_s: initial requests per second.
        doubling_s: seconds until the rate has doubled; infinity for a constant rate.
    """

    per_s: float
    doubling_s: float = DOUBLING_S

    def count(self, seconds: float) -> float:
        """Return the number of requests accepted in the first `seconds`."""
        steps, rest = (0, seconds) if self.doubling_s == float("inf") else divmod(seconds, self.doubling_s)
        before = self.doubling_s * (2**steps - 1) if steps else 0.0
        return float(self.per_s * (before + 2**steps * rest))

    def time(self, requests: float) -> float:
        """Return the seconds until `requests` are accepted: the inverse of `count`."""
        left, rate, seconds = requests, self.per_s, 0.0
        while left > rate * self.doubling_s:
            left -= rate * self.doubling_s
            seconds += self.doubling_s
            rate *= 2
        return seconds + left / rate


def tiles_per_s(model: str) -> float:
    """Return the speed of one H100 whose feed keeps up."""
    return MATMUL_FLOPS * EFFICIENCY / TILE_FLOP[model]


def write_s(chunk_bytes: float, round_trip_s: float, bytes_s: float) -> float:
    """Return the seconds to write a block into a bucket: its chunks in parallel, then its commit.

    Args:
        chunk_bytes: size of the largest chunk.
        round_trip_s: seconds per request.
        bytes_s: upload speed of one request, in bytes per second.
    """
    requests = 2 if chunk_bytes > ONE_REQUEST_BYTES else 1
    return (requests + 1) * round_trip_s + chunk_bytes / bytes_s


def gpu_hours(tiles: int, model: str) -> float:
    return tiles / tiles_per_s(model) / 3600


def most_rows(seconds_a_row: float) -> float:
    """Return the number of rows for which rank 0 works alone for as long as the other ranks wait."""
    return GROUP_TIMEOUT.total_seconds() / seconds_a_row

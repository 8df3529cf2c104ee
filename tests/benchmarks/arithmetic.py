"""Scale on paper: objects, requests, bytes, hours and memory for any number of tiles, as the code makes them.

Constants that the packages have are taken from them, and what is made of them here is held against real caches by
tests/unit/benchmarks/test_arithmetic.py. `scale_page` shows it.
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
"""A larger object is sent in two requests by google-cloud-storage: the first asks where to send it."""
CLASS_A_USD, CLASS_B_USD = 0.005 / 1000, 0.0004 / 1000
STORAGE_USD_GB_MONTH = 0.020

# Measured, see README.md in this folder. The product is an H100's; the efficiency is a CPU's.
MATMUL_FLOPS, EFFICIENCY = 798e12, 0.80
TILE_FLOP = {"vitl16 at 224": 125.5e9, "vitl16 at 512": 727e9, "vit7b16 at 224": 2.72e12, "vit7b16 at 512": 14.5e12}
TILE_BYTES = 340_000
DECODE_S = 0.002
"""Of such a tile, a PNG of 512 px, on one core."""
LISTING_BYTES_A_ROW = 186
TABLE_BYTES_A_ROW = 93
"""Of the tile table as each rank reads it, with names of 22 bytes."""
CLASSES = 60
"""Bool labels of a row that a trainer keeps."""

CHECKSUM_BYTES = 4
"""Of every chunk."""
_ARRAYS_BESIDE_POOLED = ("label_ids", "status", "commit", "tile", *COLUMN_DTYPES, "seal")


@dataclass(frozen=True)
class Cache:
    """The objects and bytes of one sealed version.

    Attributes:
        rows: N.
        width: D; 1,024 of vitl16.
        pooled: arrays of embeddings.
        name_bytes: of all names together, 22 each unless given.
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
        """Objects a block is written in, its commit included."""
        return self.pooled + 3

    @property
    def chunks(self) -> int:
        """Objects that hold values: of blocks, of the table, and the seal."""
        return self.blocks * self.chunks_a_block + self.table_chunks * (1 + len(COLUMN_DTYPES)) + 1

    @property
    def objects(self) -> int:
        """All objects: chunks, a `zarr.json` per array and one per group (of the version, of the cache), `current`."""
        return self.chunks + self.pooled + len(_ARRAYS_BESIDE_POOLED) + 2 + 1

    @property
    def vector_bytes(self) -> int:
        """Of a row in one array of embeddings."""
        return self.width * POOLED_DTYPE.itemsize

    @property
    def bytes_a_row(self) -> int:
        """Of the arrays that blocks are written to, without checksums and commits."""
        return self.pooled * self.vector_bytes + LABEL_ID_COLUMNS * LABEL_IDS_DTYPE.itemsize + STATUS_DTYPE.itemsize

    @property
    def bytes(self) -> int:
        """Of the chunks; a short last one is stored as large as the others."""
        checksums = self.chunks_a_block * CHECKSUM_BYTES
        blocks = self.blocks * (self.block_rows * self.bytes_a_row + DIGEST_BYTES + checksums)
        chunk_rows = min(self.rows, TABLE_CHUNK_ROWS)
        columns = sum(chunk_rows * dtype.itemsize + CHECKSUM_BYTES for dtype in COLUMN_DTYPES.values())
        # vlen-utf8: a count, then a length before every string, those of the last chunk's padding too.
        names = 4 + 4 * chunk_rows + CHECKSUM_BYTES
        named = 22 * self.rows if self.name_bytes is None else self.name_bytes
        return blocks + self.table_chunks * (columns + names) + named + DIGEST_BYTES + CHECKSUM_BYTES


@dataclass(frozen=True)
class Requests:
    """Requests of one extraction of every tile into a cache in a bucket, nothing tried again.

    Attributes:
        lists: pages of the listings of images/ and labels/.
        tile_reads: GETs of tiles and of their labels.
        cache_reads, cache_writes: GETs and PUTs below CACHE that grow with blocks and table.
    """

    lists: int
    tile_reads: int
    cache_reads: int
    cache_writes: int

    @classmethod
    def of(cls, cache: Cache, ranks: int = 1) -> "Requests":
        """With every tile labelled. Rank 0 reads every commit four times (what is pending, the recheck, twice for the
        seal) and every block once; each rank reads the tile table, rank 0 three times in all."""
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
        """Listing and writing are operations of class A, reading an object is one of class B."""
        return CLASS_A_USD * (self.lists + self.cache_writes) + CLASS_B_USD * (self.tile_reads + self.cache_reads)


@dataclass(frozen=True)
class Ramp:
    """What a bucket takes when nobody asks for more than it is ready for: a rate that doubles every so many seconds.

    Attributes:
        per_s: requests a second at first.
        doubling_s: seconds until it is twice that; infinity for a rate that stays.
    """

    per_s: float
    doubling_s: float = DOUBLING_S

    def count(self, seconds: float) -> float:
        """Requests taken in the first so many seconds."""
        steps, rest = (0, seconds) if self.doubling_s == float("inf") else divmod(seconds, self.doubling_s)
        before = self.doubling_s * (2**steps - 1) if steps else 0.0
        return float(self.per_s * (before + 2**steps * rest))

    def time(self, requests: float) -> float:
        """Seconds until so many requests are taken: the inverse of `count`."""
        left, rate, seconds = requests, self.per_s, 0.0
        while left > rate * self.doubling_s:
            left -= rate * self.doubling_s
            seconds += self.doubling_s
            rate *= 2
        return seconds + left / rate


def tiles_per_s(model: str) -> float:
    """Of one H100, its feed keeping up."""
    return MATMUL_FLOPS * EFFICIENCY / TILE_FLOP[model]


def write_s(chunk_bytes: float, round_trip_s: float, bytes_s: float) -> float:
    """Seconds to write a block into a bucket: its chunks side by side, and then its commit.

    Args:
        chunk_bytes: of the largest chunk.
        round_trip_s: of a request.
        bytes_s: that one request uploads a second.
    """
    requests = 2 if chunk_bytes > ONE_REQUEST_BYTES else 1
    return (requests + 1) * round_trip_s + chunk_bytes / bytes_s


def gpu_hours(tiles: int, model: str) -> float:
    return tiles / tiles_per_s(model) / 3600


def most_rows(seconds_a_row: float) -> float:
    """Rows at which what rank 0 does alone takes as long as the other ranks wait before they give it up."""
    return GROUP_TIMEOUT.total_seconds() / seconds_a_row

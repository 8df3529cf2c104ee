"""Make thumbnails of tiles as data URIs, read from the cache's tile source by the code that embeds them."""

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from cache_schema import TileprobeError, TileTable
from extract.errors import TileGoneError
from extract.ranks.group import shows_bars
from extract.tiles.decode import MAX_FILE_BYTES, UndecodableTileError, decode_tile
from extract.tiles.source import Source

SIDE = 144
"""Pixels of a thumbnail's longer side."""
MOST_IMAGES = 600
MOST_BYTES = 6 * 2**20
"""Limit of all thumbnails together in the page, where base64 turns three bytes into four."""
_MOST_EACH = 12 * 2**10
_QUALITIES = (80, 60, 40, 20, 5)
_READERS = 8
"""Fewer readers than in an extraction, because a decoded tile may take 192 MB."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def read_thumbnails(source: Source, table: TileTable, rows: Sequence[int]) -> tuple[dict[str, Thumbnail], list[str]]:
    """Read tiles and turn each into a small WebP.

    Args:
        source, table: of the cache.
        rows: of the table, at most 600; duplicates are read once.

    Returns:
        pictures by tile name, and a line for each reason why others are missing.

    Raises:
        TileprobeError: the first tile cannot be reached; the others are then not tried.
    """
    wanted = list(dict.fromkeys(rows))
    limit = min(_MOST_EACH, MOST_BYTES * 3 // 4 // max(len(rows), 1))
    pictures: dict[str, Thumbnail] = {}
    problems: dict[str, list[str]] = {}

    def read(row: int) -> tuple[str, Thumbnail | None, str]:
        """Return name, picture and problem."""
        name = str(table.tile[row])
        try:
            data = source.read(name, int(table.generation[row]))
            if len(data) != table.size[row] or len(data) > MAX_FILE_BYTES:
                return name, None, "changed since the extraction"
            return name, encode_thumbnail(decode_tile(data), limit), ""
        except UndecodableTileError:
            return name, None, "cannot be decoded"
        except TileGoneError:
            return name, None, "are gone"

    def read_rest(row: int) -> tuple[str, Thumbnail | None, str]:
        try:
            return read(row)
        except TileprobeError:
            return str(table.tile[row]), None, "cannot be read any more"

    def results() -> Iterator[tuple[str, Thumbnail | None, str]]:
        # If the source is unreachable, one tile takes the whole retry deadline, and 600 tiles would take hours.
        yield from map(read, wanted[:1])
        with ThreadPoolExecutor(_READERS) as threads:
            yield from threads.map(read_rest, wanted[1:])

    for name, picture, problem in tqdm(
        results(), total=len(wanted), unit="tile", desc="thumbnails", disable=not shows_bars()
    ):
        if picture:
            pictures[name] = picture
        else:
            problems.setdefault(problem, []).append(name)
    lacking = [
        f"{len(names):,} of {len(wanted):,} tiles {problem}, such as {names[0]}" for problem, names in problems.items()
    ]
    return pictures, lacking


def encode_thumbnail(image: npt.NDArray[np.uint8], limit: int) -> Thumbnail:
    """Encode a (H, W, 3) tile as WebP, longer side 144 px, in the best quality that fits `limit` bytes."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    data = b""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=quality)
        data = stream.getvalue()
        if len(data) <= limit:
            break
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(data).decode()}", *small.size)

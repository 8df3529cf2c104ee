"""Turn the listing of a source into its tile table: find the tiles, and the label file of each.

A bucket may hold tens of millions of objects, so everything is kept in columns, and names become Python strings only
a page or a chunk at a time.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache_schema import NO_LABEL, TileTable
from extract.errors import SourceError

from .source import ListedPage, Source

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Listing:
    """The tiles found below TILES.

    Attributes:
        table: the tiles to embed, sorted by name; may be empty.
        unlabelled: number of tiles left out because they have no label object (0 if such tiles are included).
        other: number of objects under images/ that are not tiles.
    """

    table: TileTable
    unlabelled: int
    other: int


def list_tiles(source: Source, *, unlabelled: bool = False) -> Listing:
    """Make the tile table of a source from its listing alone, without reading an object.

    With `unlabelled`, tiles without a label object are included.

    Raises:
        SourceError: no tiles, or none with a label.
    """
    # A bucket lists one page after another, so two listings in parallel take half the time.
    with ThreadPoolExecutor(1) as thread:
        labels = thread.submit(lambda: list(source.list("labels")))
        images = list(source.list("images"))
        listing = build_table(images, labels.result(), unlabelled=unlabelled)
    if not len(listing.table) and listing.unlabelled:
        raise SourceError(
            f"{listing.unlabelled:,} tiles under {source.url}/images/, but none has its labels/NAME.txt: "
            "check TILES, or embed them anyway with --unlabelled"
        )
    if not len(listing.table):
        raise SourceError(f"no tiles under {source.url}/images/: check TILES")
    return listing


def list_images(source: Source) -> Listing:
    """List the images of a source, with or without labels: those below images/, or if there are none, all of them.

    Raises:
        SourceError: no images.
    """
    for folder in ("images", ""):
        tiles, other = _gather_tiles(source.list(folder))
        if len(tiles):
            tiles = _sort(tiles)
            labels = np.full(len(tiles), NO_LABEL, np.int64), np.zeros(len(tiles), np.uint32)
            table = TileTable(tiles.name, tiles.size, tiles.crc32c, tiles.generation, *labels)
            return Listing(table, 0, other)
    raise SourceError(f"no PNG, JPEG or TIFF images in {source.url}: check the path")


def build_table(images: Iterable[ListedPage], labels: Iterable[ListedPage], *, unlabelled: bool) -> Listing:
    """Find the tiles among the objects below images/, and their labels among the objects below labels/.

    Pages and names may come in any order. Names in code point order, as in a bucket's listing, are not sorted again.
    With `unlabelled`, tiles without a label object are included.
    """
    tiles, other = _gather_tiles(images)
    tiles = _sort(tiles)
    found = _sort(ListedPage.concatenate(list(labels)))
    row = find_names(tiles.name, found.name, convert=label_name)
    table = TileTable(
        tile=tiles.name,
        size=tiles.size,
        crc32c=tiles.crc32c,
        generation=tiles.generation,
        # `row` is -1 for tiles without a label, which selects the value appended here.
        label_size=np.append(found.size, np.int64(NO_LABEL))[row],
        label_crc32c=np.append(found.crc32c, np.uint32(0))[row],
    )
    left_out = 0 if unlabelled else int((row < 0).sum())
    return Listing(table.select(table.labelled) if left_out else table, left_out, other)


def label_name(tile: str) -> str:
    """Return the name of a tile's label file: `images/a/b.png` -> `labels/a/b.txt`."""
    return f"labels/{tile.split('/', 1)[1].rsplit('.', 1)[0]}.txt"


def is_tile(name: str) -> bool:
    """Return whether the name has an image suffix, in any case. `a/.png` is a hidden file without a suffix."""
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" in IMAGE_SUFFIXES and not stem.endswith("/")


def _gather_tiles(images: Iterable[ListedPage]) -> tuple[ListedPage, int]:
    """Return the tiles of all pages, and the number of other objects."""
    parts, other = [], 0
    for page in images:
        mask = np.array([is_tile(name) for name in page.name.tolist()], bool)
        parts.append(page if mask.all() else page.select(mask))
        other += len(page) - len(parts[-1])
    return ListedPage.concatenate(parts), other


def _sort(objects: ListedPage) -> ListedPage:
    if np.all(objects.name[1:] >= objects.name[:-1]):
        return objects
    return objects.select(np.argsort(objects.name, kind="stable"))


def find_names(
    tiles: npt.NDArray[np.str_], among: npt.NDArray[np.str_], *, convert: Callable[[str], str] = str
) -> npt.NDArray[np.int64]:
    """Find each tile's name in `among`.

    Args:
        tiles, among: sorted names.
        convert: turns a tile's name into the one to look for.

    Returns:
        (N,) int64 rows of `among`, -1 where the name is not in it.
    """
    found = np.empty(len(tiles), np.int64)
    for start in range(0, len(tiles), _CHUNK_ROWS):
        names = [convert(tile) for tile in tiles[start : start + _CHUNK_ROWS].tolist()]
        # Both are sorted, so a chunk needs only a narrow range of `among`. np.searchsorted would be shorter, but
        # compares two string arrays wrongly (numpy issue 31533, present in 2.4).
        first, last = bisect_left(among, min(names)), bisect_right(among, max(names))
        rows = dict(zip(among[first:last].tolist(), range(first, last), strict=True))
        found[start : start + len(names)] = [rows.get(name, -1) for name in names]
    return found

"""Which objects are tiles and which label belongs to each, against the rule in plain Python."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import NO_LABEL, CacheFormatError
from extract.tiles import listing
from extract.tiles.listing import build_table, label_name
from extract.tiles.source import ListedObject, ListedPage
from tests.planted import fresh_seed

SUFFIXES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".PNG", ".Jpg", ".txt", ".TXT", ".json", ".png.bak", ".", ""]
# Short parts that meet again and again. Some sort otherwise with another suffix (`a.jpg` < `a.k.png`, but `a.k.txt` <
# `a.txt`), or as stems, or in UTF-16; some are longer than the 15 bytes that a StringDType holds in place.
PARTS = [
    "a",
    "b",
    "a-1",
    "a 1",
    "a.k",
    "..",
    "%25",
    "A",
    "é",
    "e\u0301",
    "\uffee",
    "😀",
    "a" * 14,
    "a" * 30,
    "a" * 30 + "-",
]
STEMS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join)
NAMES = st.builds(str.__add__, STEMS | st.text(st.characters(codec="utf-8"), max_size=3), st.sampled_from(SUFFIXES))
NAMES = NAMES.filter(lambda name: not name.endswith("/"))  # folders' placeholders, which a source leaves out


def list_objects(folder: str) -> st.SearchStrategy[list[ListedObject]]:
    numbers = st.integers(0, 2**40), st.integers(0, 2**32 - 1), st.integers(0, 2**60)
    row = st.tuples(NAMES.map(f"{folder}/{{}}".format), *numbers)
    return st.lists(row, max_size=30, unique_by=lambda row: row[0])


@st.composite
def split_pages(draw: st.DrawFn, objects: list[ListedObject]) -> list[list[ListedObject]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(objects)), max_size=4)))
    return [objects[i:j] for i, j in zip([0, *cuts], [*cuts, len(objects)], strict=True)]


def make_pages(objects: list[list[ListedObject]]) -> Iterator[ListedPage]:
    return map(ListedPage.from_rows, objects)


def plain_table(
    images: list[ListedObject], labels: list[ListedObject], unlabelled: bool
) -> tuple[list[object], int, int]:
    """Rows of the table, tiles left out, objects that are no tiles."""

    def stem(name: str) -> str:
        return name.split("/", 1)[1].rsplit(".", 1)[0]

    def is_tile(name: str) -> bool:
        base, _, suffix = name.split("/")[-1].rpartition(".")
        return base != "" and suffix.lower() in {"png", "jpg", "jpeg", "tif", "tiff"}

    tiles = sorted(image for image in images if is_tile(image[0]))
    label = {stem(row[0]): (row[1], row[2]) for row in labels if row[0].endswith(".txt")}
    rows = [(*tile, *label.get(stem(tile[0]), (NO_LABEL, 0))) for tile in tiles]
    kept = [row for row in rows if unlabelled or row[4] != NO_LABEL]
    return kept, len(rows) - len(kept), len(images) - len(tiles)


def assert_follows_the_rule(
    images: list[list[ListedObject]], labels: list[list[ListedObject]], unlabelled: bool
) -> None:
    built = build_table(make_pages(images), make_pages(labels), unlabelled=unlabelled)
    columns = ("tile", "size", "crc32c", "generation", "label_size", "label_crc32c")
    rows = list(zip(*(getattr(built.table, column).tolist() for column in columns), strict=True))
    assert (rows, built.unlabelled, built.other) == plain_table(sum(images, []), sum(labels, []), unlabelled)
    assert [getattr(built.table, column).dtype for column in columns[1:]] == ["i8", "u4", "i8", "i8", "u4"]


@given(st.data(), list_objects("images"), list_objects("labels"), st.booleans(), st.booleans(), st.integers(1, 5))
def test_any_objects_in_any_pages(
    data: st.DataObject,
    images: list[ListedObject],
    labels: list[ListedObject],
    in_order: bool,
    unlabelled: bool,
    chunk: int,
) -> None:
    # Names drawn apart seldom meet: half of the tiles get a label of theirs.
    theirs = [(label_name(name), size + 1, crc32c, generation) for name, size, crc32c, generation in images[::2]]
    labels = list({row[0]: row for row in [*labels, *theirs]}.values())
    if in_order:
        images, labels = sorted(images), sorted(labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_CHUNK_ROWS", chunk)
        assert_follows_the_rule(data.draw(split_pages(images)), data.draw(split_pages(labels)), unlabelled)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("unlabelled", [True, False])
def test_several_chunks_of_tiles(in_order: bool, unlabelled: bool) -> None:
    """Tiles and labels that each lack some of the other, names long and short, over many pages."""
    rng = np.random.default_rng(fresh_seed())

    def draw_objects(folder: str, suffix: str) -> list[list[ListedObject]]:
        stems = [
            f"{'x' * (i % 23)}{i % 89}{'-_'[i % 2]}{i}" for i in rng.choice(30_000, 20_000, replace=False).tolist()
        ]
        rows = [(f"{folder}/{stem}{suffix}", *rng.integers(0, 2**32, 3).tolist()) for stem in stems]
        rows = sorted(rows) if in_order else rows
        return [rows[start : start + 1000] for start in range(0, len(rows), 1000)]

    assert_follows_the_rule(draw_objects("images", ".png"), draw_objects("labels", ".txt"), unlabelled)


@pytest.mark.parametrize("unlabelled", [True, False])
def test_labels_that_sort_otherwise_than_their_tiles(unlabelled: bool) -> None:
    images = [("images/a.jpg", 1, 2, 3), ("images/a.k.png", 4, 5, 6)]
    labels = [("labels/a.k.txt", 7, 8, 9), ("labels/a.txt", 10, 11, 12)]
    assert_follows_the_rule([images], [labels], unlabelled)


def test_no_objects() -> None:
    built = build_table([], [], unlabelled=True)
    assert (len(built.table), built.unlabelled, built.other) == (0, 0, 0)


def test_a_tile_listed_twice_is_refused() -> None:
    twice = ListedPage.from_rows([("images/1.png", 1, 2, 3)])
    with pytest.raises(CacheFormatError, match="names a tile twice"):
        build_table([twice, twice], [], unlabelled=True)

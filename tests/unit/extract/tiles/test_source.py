"""Listing and reading tiles, from a directory and from a bucket on a real server."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from google.cloud import storage

from cache_schema import NO_LABEL
from extract.errors import SourceError, TileGoneError, TransportError
from extract.tiles.listing import label_name, list_tiles
from extract.tiles.source import Source, open_source
from tests.planted import fresh_seed
from tests.tiles import Objects, upload, write_directory

Place = Callable[[Objects], Source]

ODD_NAMES = [
    "a tile 1",
    "zażółć-東京",
    "e\u0301",  # a letter and its accent, which must not be composed on the way
    "100%25",
    "a?b#c&d=e+f",
    "..",
    "a..b",
    "dots.in.name.2",
    "quote\"'",
    "back\\slash",
    "[brackets]*",
    "-leading",
    "😀",
]


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Puts objects somewhere below a prefix and opens it."""
    if request.param == "directory":
        return lambda objects: open_source(str(write_directory(tmp_path / "a" / "b", objects)))
    bucket: storage.Bucket = request.getfixturevalue("bucket")

    def fill(objects: Objects) -> Source:
        upload(bucket, objects, "a/b/")
        return open_source(f"gs://{bucket.name}/a/b/")

    return fill


def draw(*names: str) -> Objects:
    rng = np.random.default_rng(fresh_seed())
    return {name: rng.bytes(rng.integers(1, 2000)) for name in names}


def test_table_is_sorted_and_says_what_the_listing_says(place: Place) -> None:
    objects = draw(*(f"{kind}/{i}_{j}.{suffix}" for i in range(12) for j in range(2)
                     for kind, suffix in (("images", "png"), ("labels", "txt"))))  # fmt: skip
    listing = list_tiles(place(objects))
    table = listing.table
    assert table.tile.tolist() == sorted(name for name in objects if name.startswith("images/"))
    assert table.size.tolist() == [len(objects[name]) for name in table.tile]
    assert table.label_size.tolist() == [len(objects[label_name(name)]) for name in table.tile]
    assert (table.generation > 0).all()
    assert (listing.unlabelled, listing.other) == (0, 0)


def test_identity_in_a_bucket_is_the_bytes_crc32c(bucket: storage.Bucket) -> None:
    objects = draw(*(f"images/{i}.png" for i in range(20)), *(f"labels/{i}.txt" for i in range(20)))
    upload(bucket, objects)
    table = list_tiles(open_source(f"gs://{bucket.name}")).table
    for i, name in enumerate(table.tile):
        assert table.crc32c[i] == google_crc32c.value(objects[name])
        assert table.label_crc32c[i] == google_crc32c.value(objects[label_name(name)])


def test_identity_of_a_file_is_its_modification_time(tmp_path: Path) -> None:
    write_directory(tmp_path, draw("images/1.png", "images/2.png", "labels/1.txt", "labels/2.txt"))
    before = list_tiles(open_source(str(tmp_path))).table
    os.utime(tmp_path / "images/1.png", ns=(0, 1_700_000_000_123_456_789))
    after = list_tiles(open_source(str(tmp_path))).table
    assert after.generation[0] == 1_700_000_000_123_456_789
    assert (after.crc32c != before.crc32c).tolist() == [True, False]
    assert after.identity_digest() != before.identity_digest()


def test_unlabelled_tiles_are_counted_or_kept(place: Place) -> None:
    source = place(draw("images/1.png", "images/2.png", "images/3.png", "labels/2.txt", "labels/9.txt"))
    listing = list_tiles(source)
    assert (listing.table.tile.tolist(), listing.unlabelled) == (["images/2.png"], 2)
    everything = list_tiles(source, unlabelled=True)
    assert everything.table.tile.tolist() == ["images/1.png", "images/2.png", "images/3.png"]
    assert everything.unlabelled == 0
    assert everything.table.labelled.tolist() == [False, True, False]
    assert everything.table.label_size[0] == NO_LABEL


def test_an_empty_label_is_a_label(place: Place) -> None:
    source = place(draw("images/1.png") | {"labels/1.txt": b""})
    assert list_tiles(source).table.label_size.tolist() == [0]
    assert source.read("labels/1.txt", 0) == b""


def test_suffixes_and_other_files(place: Place) -> None:
    tiles = ["images/a.png", "images/b.JPG", "images/c.jpeg", "images/d.tif", "images/e.TIFF"]
    others = ["images/README.md", "images/f.png.bak", "images/.DS_Store", "images/.png", "images/noext"]
    labels = [f"labels/{letter}.txt" for letter in "abcde"]
    elsewhere = ["masks/a.png", "images.png", "imagesx/a.png", "labels/a.json"]
    listing = list_tiles(place(draw(*tiles, *others, *labels, *elsewhere)))
    assert listing.table.tile.tolist() == tiles
    assert listing.other == len(others)


def test_nested_folders_pair_with_their_own_labels(place: Place) -> None:
    objects = draw("images/x/1.png", "images/y/1.png", "images/1.png", "labels/x/1.txt", "labels/1.txt")
    listing = list_tiles(place(objects))
    assert listing.table.tile.tolist() == ["images/1.png", "images/x/1.png"]
    assert listing.table.label_size.tolist() == [len(objects["labels/1.txt"]), len(objects["labels/x/1.txt"])]


def test_tiles_of_one_stem_share_its_label(place: Place) -> None:
    assert len(list_tiles(place(draw("images/1.png", "images/1.jpg", "labels/1.txt"))).table) == 2


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_listed_and_read(place: Place, name: str) -> None:
    objects = draw(f"images/{name}.png", f"labels/{name}.txt", f"images/f {name}/1.png", f"labels/f {name}/1.txt")
    source = place(objects)
    table = list_tiles(source).table
    assert sorted(table.tile.tolist()) == sorted(n for n in objects if n.startswith("images/"))
    for row, tile in enumerate(table.tile):
        assert source.read(str(tile), int(table.generation[row])) == objects[tile]
        assert source.read(label_name(str(tile)), 0) == objects[label_name(tile)]


def test_path_segments_of_dots_are_names_in_a_bucket(bucket: storage.Bucket) -> None:
    """HTTP clients like to resolve `..`; an object's name is not a path."""
    objects = draw("images/../images/1.png", "labels/../images/1.txt", "images/./2.png", "labels/./2.txt", "1.png")
    upload(bucket, objects)
    source = open_source(f"gs://{bucket.name}")
    table = list_tiles(source).table
    assert table.tile.tolist() == ["images/../images/1.png", "images/./2.png"]
    assert [source.read(str(tile), 0) for tile in table.tile] == [objects[tile] for tile in table.tile]


def test_newline_in_a_file_name(tmp_path: Path) -> None:
    objects = draw("images/a\nb.png", "labels/a\nb.txt")
    source = open_source(str(write_directory(tmp_path, objects)))
    table = list_tiles(source).table
    assert source.read(str(table.tile[0]), 0) == objects["images/a\nb.png"]


def test_order_is_that_of_code_points(place: Place) -> None:
    """The table demands it; UTF-16 order, or a locale's, would put these otherwise."""
    names = ["Z", "a", "z", "é", "\uffee", "😀"]
    objects = draw(*(f"images/{n}.png" for n in reversed(names)), *(f"labels/{n}.txt" for n in names))
    assert list_tiles(place(objects)).table.tile.tolist() == [f"images/{n}.png" for n in names]


def test_nothing_under_images(place: Place) -> None:
    with pytest.raises(SourceError, match=r"no tiles under .*a/b/images/: check TILES"):
        list_tiles(place(draw("labels/1.txt", "pictures/1.png")))


def test_no_labels_at_all(place: Place) -> None:
    source = place(draw("images/1.png", "images/2.png"))
    with pytest.raises(SourceError, match=r"2 tiles under .*, but none has its labels/NAME.txt.*--unlabelled"):
        list_tiles(source)
    assert len(list_tiles(source, unlabelled=True).table) == 2


@pytest.mark.parametrize("url, message", [
    ("gs://", "names no bucket"),
    ("gs:///x", "names no bucket"),
    ("gs://ab/x", "names no bucket"),
    ("s3://bucket/x", "TILES is gs://bucket/prefix or a local directory"),
    ("gs://me:secret@bucket/x", "^TILES is a URL with a user or password in it: leave them out$"),
    ("https://me:secret@host/x", "^TILES is a URL with a user or password in it: leave them out$"),
    ("/no/such/directory", "no directory /no/such/directory: check TILES"),
])  # fmt: skip
def test_places_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(url)


@pytest.mark.usefixtures("gcs_server")
def test_no_such_bucket() -> None:
    with pytest.raises(SourceError, match="no bucket no-such-bucket-here for gs://.*: check the name in TILES"):
        list_tiles(open_source("gs://no-such-bucket-here/tiles"))


def test_object_that_is_gone(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = place(draw("images/1.png", "labels/1.txt"))
    table = list_tiles(source).table
    if source.url.startswith("gs://"):
        request.getfixturevalue("bucket").delete_blob("a/b/images/1.png")
    else:
        (tmp_path / "a/b/images/1.png").unlink()
    for read in (source.read, source.read_checked):
        for generation in (0, int(table.generation[0])):
            with pytest.raises(TileGoneError, match=r"a/b/images/1\.png is gone"):
                read("images/1.png", generation)


def test_changed_object_is_not_read_as_the_listed_one(bucket: storage.Bucket) -> None:
    upload(bucket, draw("images/1.png", "labels/1.txt"))
    source = open_source(f"gs://{bucket.name}")
    listed = int(list_tiles(source).table.generation[0])
    upload(bucket, {"images/1.png": b"another tile"})
    for read in (source.read, source.read_checked):
        with pytest.raises(TileGoneError):
            read("images/1.png", listed)
        assert read("images/1.png", 0) == b"another tile"
    assert list_tiles(source).table.crc32c[0] == google_crc32c.value(b"another tile")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    source = open_source(str(write_directory(tmp_path, draw("images/1.png", "labels/1.txt"))))
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "images/1.png").mkdir()
    with pytest.raises(TransportError, match=r"images/1.png: Is a directory"):
        source.read("images/1.png", 0)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_what_is_no_file_is_named_and_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    write_directory(tmp_path, draw("images/1.png", "labels/1.txt"))
    make(tmp_path / "images" / "2.png")
    with pytest.raises(SourceError, match=r"cannot list .*images/2\.png.*: not a file: remove it"):
        list_tiles(open_source(str(tmp_path)))


def test_linked_folder_is_named_and_not_passed_over(tmp_path: Path) -> None:
    write_directory(tmp_path / "set", draw("images/1.png", "labels/1.txt"))
    write_directory(tmp_path / "more", draw("images/2.png", "labels/2.txt"))
    (tmp_path / "set" / "images" / "more").symlink_to(tmp_path / "more" / "images")
    with pytest.raises(SourceError, match=r"cannot list .*images/more.*: a link to a folder: replace it"):
        list_tiles(open_source(str(tmp_path / "set")))


def test_broken_link_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path, draw("images/1.png", "labels/1.txt"))
    (tmp_path / "images/2.png").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"cannot list .*images/2\.png.*No such file"):
        list_tiles(open_source(str(tmp_path)))


def test_name_that_is_not_text_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path, draw("images/1.png", "labels/1.txt"))
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only names that are text")
    with pytest.raises(SourceError, match=r"cannot list .*\\udcff\.png"):
        list_tiles(open_source(str(tmp_path)))


def test_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path: Path) -> None:
    write_directory(tmp_path, draw("images/1.png", "labels/1.txt"))
    shutil.rmtree(tmp_path / "labels")
    (tmp_path / "labels").symlink_to("labels")  # a loop; root may list every folder, so permissions would not do
    with pytest.raises(SourceError, match="cannot list .*labels"):
        list_tiles(open_source(str(tmp_path)), unlabelled=True)


def test_source_travels_to_another_process_after_use(place: Place) -> None:
    """It holds no client: one opened here would not survive the journey."""
    objects = draw("images/1.png", "labels/1.txt")
    source = place(objects)
    list_tiles(source)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert copy.url == source.url
    assert copy.read("images/1.png", 0) == objects["images/1.png"]


def test_listing_of_several_pages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    list_blobs = storage.Bucket.list_blobs
    monkeypatch.setattr(storage.Bucket, "list_blobs", lambda *args, **named: list_blobs(*args, page_size=3, **named))
    monkeypatch.setattr("extract.tiles.source._PAGE_FILES", 3)
    names = [f"images/{i}.png" for i in range(8)]
    source = place(draw(*names))
    listed = list(source.list("images"))
    assert sorted(map(len, listed)) == [2, 3, 3]
    assert sorted(name for page in listed for name in page.name.tolist()) == names


@pytest.mark.parametrize("change, shown", [
    ({"crc32c": None}, "'name': 'a/images/1.png'"),
    ({"size": None}, "'name': 'a/images/1.png'"),
    ({"generation": None}, "'name': 'a/images/1.png'"),
    ({"name": None}, "'size': '12'"),
    ({"crc32c": "AAAA"}, "'crc32c': 'AAAA'"),
    ({"crc32c": "?"}, "'crc32c': '?'"),
    ({"size": "many"}, "'size': 'many'"),
])  # fmt: skip
def test_object_that_the_listing_does_not_describe(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], shown: str
) -> None:
    """A real bucket's listing always does; other servers may not."""
    item = {"name": "a/images/1.png", "size": "12", "crc32c": "AAAAAQ==", "generation": "7"} | change
    response = {"items": [{key: value for key, value in item.items() if value is not None}]}
    monkeypatch.setattr("google.cloud.storage._http.Connection.api_request", lambda *_, **__: response)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match="gs://bucket/a lists an object .*: upload it again or remove it") as refused:
        list(open_source("gs://bucket/a").list("images"))
    assert shown in str(refused.value)
    response["items"] = []
    assert [len(page) for page in open_source("gs://bucket/a").list("images")] == [0]


def test_folder_placeholders_of_consoles_are_no_tiles(bucket: storage.Bucket) -> None:
    upload(bucket, draw("images/1.png", "labels/1.txt") | {"images/": b"", "images/sub.png/": b""})
    listing = list_tiles(open_source(f"gs://{bucket.name}"))
    assert (listing.table.tile.tolist(), listing.other) == (["images/1.png"], 0)


def test_compressed_object_is_read_as_it_was_listed(bucket: storage.Bucket) -> None:
    """Size and checksum of the listing are those of the stored bytes, which a client likes to unpack."""
    stored = gzip.compress(b"pixels")
    blob = bucket.blob("images/1.png")
    blob.content_encoding = "gzip"
    blob.upload_from_string(stored)
    source = open_source(f"gs://{bucket.name}")
    assert source.read("images/1.png", 0) == stored
    assert source.read_checked("images/1.png", 0) == stored

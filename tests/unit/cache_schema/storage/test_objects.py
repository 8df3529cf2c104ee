"""Objects below a URL, on a real file system and the real storage server."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_schema import StorageError
from cache_schema.storage.objects import open_objects, read_object
from cache_schema.storage.place import Purpose, split_url


def test_an_object_is_replaced_only_over_what_was_found(cache_url: str) -> None:
    objects = open_objects(cache_url)
    assert objects.read("x") is None
    first = objects.replace("x", b"a longer one", None)
    assert first
    assert objects.replace("x", b"another", None) is None
    second = objects.replace("x", b"short", first)
    assert objects.read("x") == second
    assert objects.replace("x", b"late", first) is None
    if not cache_url.startswith("gs://"):  # the test server removes an object whatever condition is set
        objects.delete("x", first)
    assert objects.read("x") == second
    assert second
    objects.delete("x", second)
    assert objects.read("x") is None
    assert objects.replace("x", b"late", second) is None
    objects.delete("x", second)


def test_objects_are_written_listed_found_and_deleted(cache_url: str) -> None:
    objects = open_objects(cache_url)
    assert list(objects.list_dir("a")) == list(objects.find("x.json")) == []
    assert objects.measure_dir("a") == (0, 0.0)
    for name in ("x.json", "a/x.json", "a/b/x.json", "a/b/yx.json"):
        objects.write(name, b"old, and longer")
        objects.write(name, name.encode())
    assert objects.create("a/new", b"1")
    assert not objects.create("a/new", b"2")
    assert sorted(objects.list_dir("a")) == ["b", "new", "x.json"]
    assert sorted(objects.find("x.json")) == ["a/b/x.json", "a/x.json", "x.json"]
    size, newest = objects.measure_dir("a")
    assert size == len("a/x.json" + "a/b/x.json" + "a/b/yx.json" + "1")
    assert newest > 1.7e9
    objects.delete("a/x.json")
    objects.delete("a/x.json")
    stored = objects.read("a/b/x.json")
    assert objects.read("a/x.json") is None
    assert stored
    assert stored.data == b"a/b/x.json"
    assert read_object(f"{objects.url}/a/b/x.json", Purpose()) == b"a/b/x.json"
    with pytest.raises(FileNotFoundError):
        read_object(f"{objects.url}/a/x.json", Purpose())


def test_a_directory_holds_no_unfinished_file(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path), unfinished="elsewhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=f"{tmp_path}: Is a directory: check OUT and .*; then again"):
        open_objects(str(tmp_path), Purpose("OUT", again="then again"), unfinished="elsewhere").write("folder", b"x")
    objects.write("file", b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "file", "folder"]


@pytest.mark.parametrize("url, message", [
    ("s3://bucket/x", "^cannot open s3://bucket/x: RUN is gs://bucket/prefix or a local directory$"),
    ("https://me:secret@host/x", "^RUN is a URL with a user or password in it: leave them out$"),
    ("gs://ab/x", "names no bucket"),
])  # fmt: skip
def test_other_places_are_refused(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        open_objects(url, Purpose("RUN"))


def test_a_url_has_parts() -> None:
    assert split_url("gs://bucket/a/b/") == ["bucket", "a", "b"]
    assert split_url("a/b") == ["a", "b"]

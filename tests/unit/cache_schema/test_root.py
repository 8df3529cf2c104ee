"""Versions side by side and `current`, on disk and in a bucket."""

import json
from pathlib import Path
from typing import Any

import pytest

from cache_schema import (
    CacheFormatError,
    CacheNotFoundError,
    CacheRoot,
    StorageError,
    TileprobeError,
    Version,
    open_cache,
    root,
)
from cache_schema import (
    root as creation,
)
from tests.caches import (
    delete,
    fill_cache,
    get_bytes,
    make_provenance,
    make_recorded,
    make_table,
    make_values,
    put_bytes,
)

ROWS = 300


def create(url: str, rows: int = ROWS, **recorded: Any) -> Version:
    return CacheRoot(url).create_version(make_table(rows), make_provenance(), make_recorded(**recorded))


# Creating


def test_creating_twice_keeps_what_is_there(cache_url: str) -> None:
    first = create(cache_url)
    first.write_block(1, make_values(first.layout, 1))
    second = create(cache_url, batch_size=99, hardware="another")

    assert second.id == first.id == make_provenance().version_id(make_table(ROWS).identity_digest())
    assert second.recorded == make_recorded()
    assert second.committed().tolist() == [False, True]
    assert second.check_block(1) is None


def test_what_a_version_says_about_itself(cache_url: str) -> None:
    create(cache_url)
    version = open_cache(cache_url, allow_unsealed=True)

    assert version.provenance == make_provenance()
    assert version.recorded == make_recorded()
    assert (version.layout.rows, version.layout.block_rows, version.layout.blocks) == (ROWS, 256, 2)
    assert (version.layout.width, version.layout.pooling) == (8, ("cls", "patch_mean"))
    assert cache_url in repr(version)


@pytest.mark.parametrize("done", [0, 1, 6, 11])
def test_a_killed_creation_is_begun_anew(cache_url: str, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`done` arrays are there when the process dies."""
    other = fill_cache(cache_url, 20)
    original = creation.zarr.Group.create_array
    made: list[str] = []

    def die(self: Any, name: str, **kwargs: Any) -> Any:
        if len(made) == done:
            raise KeyboardInterrupt
        made.append(name)
        return original(self, name, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(creation.zarr.Group, "create_array", die)
        with pytest.raises(KeyboardInterrupt):
            create(cache_url)
    assert "commit" not in made
    version_id = make_provenance().version_id(make_table(ROWS).identity_digest())
    put_bytes(cache_url, f"{version_id}.zarr/cls/c/0/0", b"left over")
    with pytest.raises(CacheNotFoundError, match="not created completely: run `make extract`"):
        open_cache(cache_url, version=version_id, allow_unsealed=True)

    version = create(cache_url)
    assert version.id == version_id
    assert get_bytes(cache_url, f"{version_id}.zarr/cls/c/0/0") is None
    assert version.read_table().full_digest() == make_table(ROWS).full_digest()
    assert not version.committed().any()
    assert open_cache(cache_url).id == other, "the versions beside it are untouched"
    assert open_cache(cache_url).read_rows().missing == 0


def test_only_a_killed_creation_is_no_cache(cache_url: str) -> None:
    version_id = create(cache_url).id
    delete(cache_url, f"{version_id}.zarr/commit/zarr.json")

    with pytest.raises(CacheNotFoundError, match=f"all rows are missing in {version_id}: run `make extract`"):
        open_cache(cache_url)
    with pytest.raises(CacheNotFoundError, match="run `make extract`"):
        open_cache(cache_url, allow_unsealed=True)


# Opening


def test_no_cache_names_the_remedy_and_leaves_nothing(cache_url: str, tmp_path: Path) -> None:
    for allow_unsealed in (False, True):
        with pytest.raises(CacheNotFoundError, match=f"no cache at {cache_url}: run `make extract` first"):
            open_cache(cache_url, allow_unsealed=allow_unsealed)
    assert list(tmp_path.iterdir()) == []


def test_no_directory_has_no_versions(cache_url: str) -> None:
    nothing = CacheRoot(cache_url, read_only=True)
    assert nothing.current() is None
    assert nothing.versions() == []
    with pytest.raises(CacheNotFoundError, match=f"no version abc in {cache_url}; versions there: none"):
        nothing.open_version("abc")


def test_an_unsealed_version_is_refused_and_says_how_far_it_is(cache_url: str) -> None:
    version = create(cache_url)
    version.write_block(0, make_values(version.layout, 0))

    with pytest.raises(CacheNotFoundError) as caught:
        open_cache(cache_url)
    assert str(caught.value) == (
        f"no finished version in {cache_url}: 44 of 300 rows are missing in {version.id}: "
        "run `make extract` again to finish it"
    )
    with pytest.raises(CacheNotFoundError, match=f"version {version.id} of .* is not finished: 44 of 300 rows"):
        open_cache(cache_url, version=version.id)
    assert open_cache(cache_url, allow_unsealed=True).id == version.id


def test_two_unfinished_versions_are_not_chosen_between(cache_url: str) -> None:
    ids = [create(cache_url, rows).id for rows in (20, 30)]
    for allow_unsealed in (False, True):
        with pytest.raises(CacheNotFoundError, match=r"20 of 20 rows|30 of 30 rows") as caught:
            open_cache(cache_url, allow_unsealed=allow_unsealed)
        assert all(version_id in str(caught.value) for version_id in ids)
    assert open_cache(cache_url, version=ids[1], allow_unsealed=True).id == ids[1]


def test_current_moves_and_old_versions_stay(cache_url: str) -> None:
    old = fill_cache(cache_url, 20)
    assert CacheRoot(cache_url).current() == old
    unfinished = create(cache_url).id
    assert open_cache(cache_url).id == old
    new = fill_cache(cache_url, 20, image_size=80)

    assert json.loads(get_bytes(cache_url, "current") or b"") == {"version": new}
    assert open_cache(cache_url).id == new
    assert open_cache(cache_url, version=old).read_rows().missing == 0
    assert CacheRoot(cache_url).versions() == sorted([old, new, unfinished])


def test_a_version_that_is_not_there_names_those_that_are(cache_url: str) -> None:
    version_id = fill_cache(cache_url, 20)
    with pytest.raises(CacheNotFoundError, match=f"no version 0123 in .*; versions there: {version_id}"):
        open_cache(cache_url, version="0123")


def test_a_reopened_version_in_use_is_not_finished(cache_url: str) -> None:
    version = CacheRoot(cache_url).open_version(fill_cache(cache_url, ROWS), read_only=False)
    version.reopen_blocks([0])
    with pytest.raises(CacheNotFoundError, match="is not finished: 256 of 300 rows are missing"):
        open_cache(cache_url)


# What is no cache, or of another format


@pytest.mark.parametrize("pointer", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe"])
def test_a_broken_pointer(cache_url: str, pointer: bytes) -> None:
    fill_cache(cache_url, 20)
    put_bytes(cache_url, "current", pointer)
    with pytest.raises(CacheFormatError, match=r"current is not a version pointer .*make extract"):
        open_cache(cache_url)


def change_attributes(url: str, version_id: str, **changes: Any) -> None:
    """Members of the attribute, None to remove one."""
    key = f"{version_id}.zarr/zarr.json"
    metadata = json.loads(get_bytes(url, key) or b"")
    merged = metadata["attributes"]["tileprobe"] | changes
    metadata["attributes"]["tileprobe"] = {name: value for name, value in merged.items() if value is not None}
    put_bytes(url, key, json.dumps(metadata).encode())


def test_a_later_format_is_refused(cache_url: str) -> None:
    version_id = fill_cache(cache_url, 20)
    change_attributes(cache_url, version_id, format=2, rows="many")
    with pytest.raises(CacheFormatError, match=r"format 2, this program reads 1: update it"):
        open_cache(cache_url)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"rows": None}, "attributes are not those of format 1"),
        ({"rows": "20"}, "attributes are not those of format 1"),
        ({"rows": 0}, "attributes are not those of format 1"),
        ({"block_rows": True}, "attributes are not those of format 1"),
        ({"block_rows": 0}, "attributes are not those of format 1"),
        ({"more": 1}, "attributes are not those of format 1"),
        ({"recorded": None}, "attributes are not those of format 1"),
        ({"provenance": {}}, "provenance: missing"),
        ({"recorded": {}}, "recorded: missing"),
        ({"format": None}, "not a version of a cache"),
    ],
)
def test_attributes_are_read_strictly(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    url = str(tmp_path)
    change_attributes(url, fill_cache(url, 20), **changes)
    with pytest.raises(CacheFormatError, match=why):
        open_cache(url)


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b"{}", b'{"node_type": "array", "zarr_format": 3}', b"\xff"])
def test_broken_group_metadata(cache_url: str, metadata: bytes) -> None:
    version_id = fill_cache(cache_url, 20)
    put_bytes(cache_url, f"{version_id}.zarr/zarr.json", metadata)
    with pytest.raises(TileprobeError, match=version_id):
        open_cache(cache_url)


def test_missing_group_metadata(cache_url: str) -> None:
    version_id = fill_cache(cache_url, 20)
    delete(cache_url, f"{version_id}.zarr/zarr.json")
    with pytest.raises(CacheNotFoundError, match=f"no version {version_id}"):
        open_cache(cache_url)


def test_another_zarr_group(cache_url: str) -> None:
    root.zarr.create_group(CacheRoot(cache_url).store, path="other.zarr", attributes={"a": 1})
    with pytest.raises(CacheFormatError, match=r"other\.zarr is a Zarr group, but not a version of a cache"):
        open_cache(cache_url, version="other")


def test_a_place_of_another_kind() -> None:
    with pytest.raises(StorageError, match="s3://bucket/cache: CACHE is gs://bucket/prefix or a local directory"):
        open_cache("s3://bucket/cache")

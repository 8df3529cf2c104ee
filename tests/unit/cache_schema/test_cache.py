"""What a notebook gets of a cache, against what Zarr alone reads and what a trainer makes of the same rows."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from cache_schema import (
    LABEL_ID_COLUMNS,
    CacheNotFoundError,
    CacheRoot,
    Embeddings,
    IntegrityError,
    RawLabels,
    Status,
    Taxonomy,
    TaxonomyError,
    open_cache,
)
from tests.caches import fill_cache, get_all, make_provenance, make_recorded, make_table, make_values, put_bytes
from tests.golden.test_golden import V1
from tests.labelled import write_taxonomy
from tests.planted import fresh_seed
from train.config import DataConfig
from train.data.labels import label_rows

ROWS = 600


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three blocks, the last one short; every eleventh row of a block is quarantined, every fifth has no label."""
    url = str(tmp_path_factory.mktemp("filled") / "cache")
    fill_cache(url, ROWS)
    return url


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A class for every raw id but the last, which no class can have; the made-up labels hold all of them."""
    return write_taxonomy(tmp_path_factory.mktemp("classes") / "classes.csv", 127)


def read_plainly(url: str) -> dict[str, np.ndarray]:
    group: Any = zarr.open_group(f"{url}/{open_cache(url).id}.zarr", mode="r")
    return {name: array[:] for name, array in group.arrays()}


KEYS: dict[str, Any] = {
    "all": slice(None),
    "a slice over two blocks": slice(250, 300),
    "a slice with a step, backwards": slice(None, None, -7),
    "nothing": slice(5, 5),
    "a number": 599,
    "from the end": -1,
    "rows in any order, twice": [599, 3, 3, 256, 0],
    "a table of rows": np.array([[1, 300], [599, 0]]),
    "a mask": np.arange(ROWS) % 3 == 0,
    "no rows": np.zeros(ROWS, bool),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("pooling", ["cls", "patch_mean"])
def test_vectors_are_indexed_as_numpy_indexes_them(filled: str, pooling: str, key: str) -> None:
    plain, vectors = read_plainly(filled)[pooling], open_cache(filled)[pooling]
    np.testing.assert_array_equal(vectors[KEYS[key]], plain[KEYS[key]], strict=True)


def test_an_array_of_vectors_says_what_it_is_and_turns_into_numpys(filled: str) -> None:
    plain, vectors = read_plainly(filled)["cls"], open_cache(filled)["cls"]
    assert isinstance(vectors, Embeddings)
    assert (vectors.shape, vectors.dtype, vectors.ndim, len(vectors)) == (plain.shape, plain.dtype, 2, ROWS)
    np.testing.assert_array_equal(np.asarray(vectors), plain, strict=True)
    np.testing.assert_array_equal(np.asarray(vectors, np.float32), plain.astype(np.float32), strict=True)
    np.testing.assert_array_equal(np.stack(list(vectors)), plain, strict=True)
    for wrong in (ROWS, [0, ROWS], np.zeros(3, bool), (0, 0)):
        with pytest.raises(IndexError):
            vectors[wrong]


def test_only_blocks_that_hold_the_rows_are_read(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    version = fill_cache(url, ROWS)
    for key in get_all(url):
        if re.search(r"/cls/c/[12]/", key):
            Path(url, key).unlink()
    cache = open_cache(url)
    assert np.isfinite(cache["cls"][:9]).all(), "block 0 alone is read"
    with pytest.raises(IntegrityError, match="1 block damaged, rows 256 to 511 first: .*verify .* --repair"):
        cache["cls"][255:257]
    with pytest.raises(IntegrityError, match="2 blocks damaged"):
        cache.status  # noqa: B018
    assert cache.id == version


def test_status_labels_and_masks_are_those_of_a_trainer(tmp_path: Path) -> None:
    """Against `train.data.labels`, which decides for trainers, on labels with unknown ids, empty rows and artefacts."""
    rng, url = np.random.default_rng(fresh_seed()), str(tmp_path / "cache")
    label_ids = np.zeros((ROWS, LABEL_ID_COLUMNS), np.uint16)
    taxonomy = Taxonomy.xview()
    assert taxonomy.type_ids is not None
    label_ids[:, list(taxonomy.type_ids)] = rng.random((ROWS, 60)) < 0.1
    label_ids[rng.random(ROWS) < 0.2] = 0
    lone = rng.choice(ROWS, 20, replace=False)
    label_ids[lone] = 0
    label_ids[lone[:4], 120], label_ids[lone[4:], 75] = 1, 2  # an unknown id, an artefact
    root = CacheRoot(url)
    version = root.create_version(make_table(ROWS), make_provenance(), make_recorded())
    for block, rows in enumerate(version.layout.block_slices()):
        version.write_block(block, replace(make_values(version.layout, block), label_ids=label_ids[rows]))
    version.seal()
    root.set_current(version.id)

    cache = open_cache(url)
    expected = label_rows(make_table(ROWS), RawLabels.pack(label_ids), read_plainly(url)["status"], DataConfig())
    np.testing.assert_array_equal(np.flatnonzero(cache.usable), expected.index)
    np.testing.assert_array_equal(cache.labels[cache.usable], expected.labels, strict=True)
    np.testing.assert_array_equal(cache.tiles[cache.usable], expected.tiles)
    assert cache.classes == expected.class_names == taxonomy.names
    assert set(lone) & set(expected.index) == set(), "labels of no known class are neither positive nor empty"


def test_a_row_without_a_vector_is_masked(filled: str, classes: str) -> None:
    plain, cache = read_plainly(filled), open_cache(filled, taxonomy=classes, label_ids="class")
    np.testing.assert_array_equal(cache.status, plain["status"], strict=True)
    np.testing.assert_array_equal(cache.embedded, ~np.isnan(plain["cls"]).any(axis=1))
    assert np.isfinite(cache["cls"][cache.embedded]).all()
    assert 0 < cache.usable.sum() < cache.embedded.sum() < ROWS
    assert not (cache.usable & (plain["label_size"] == -1)).any(), "no label file is not a negative"


def test_a_wrong_class_list_is_refused(filled: str, tmp_path: Path) -> None:
    cache = open_cache(filled, taxonomy=write_taxonomy(tmp_path / "two.csv", 2))
    with pytest.raises(TaxonomyError, match=r"of all label lines are ignored.*fix the files, set --label-ids"):
        cache.labels  # noqa: B018
    with pytest.raises(TaxonomyError, match="cannot tell type ids from class ids"):
        open_cache(filled).labels  # noqa: B018
    with pytest.raises(TaxonomyError, match="label_ids 'types': choose auto, type or class"):
        open_cache(filled, label_ids="types")  # type: ignore[arg-type]
    with pytest.raises(TaxonomyError, match="cannot read the class list"):
        open_cache(filled, taxonomy=tmp_path / "none.csv")
    with pytest.raises(KeyError, match="this cache holds cls, patch_mean"):
        cache["mean"]


def test_an_unfinished_version_is_opened_only_when_asked(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    version = CacheRoot(url).create_version(make_table(ROWS), make_provenance(), make_recorded())
    version.write_block(1, make_values(version.layout, 1))
    with pytest.raises(CacheNotFoundError, match="no finished version in .*344 of 600 rows are missing"):
        open_cache(url)
    with pytest.raises(CacheNotFoundError, match="no cache at .*: run `make extract` first, or check CACHE"):
        open_cache(tmp_path)
    cache = open_cache(url, allow_unsealed=True)
    assert np.flatnonzero(cache.status != Status.PENDING).tolist() == list(range(256, 512))
    assert np.isnan(cache["cls"][~cache.embedded]).all()
    assert np.isfinite(cache["cls"][cache.embedded]).all()
    assert "unfinished, 2 blocks to do" in repr(cache)


def test_a_bucket_is_read_the_same(cache_url: str, filled: str, classes: str) -> None:
    fill_cache(cache_url, ROWS)
    here, there = (open_cache(url, taxonomy=classes, label_ids="class") for url in (filled, cache_url))
    np.testing.assert_array_equal(there["cls"][250:270], here["cls"][250:270])
    np.testing.assert_array_equal(there.usable, here.usable)


def test_what_a_notebook_shows(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    recorded = replace(make_recorded(), backbone="<b>\x1b[31m", tiles='"><script>')
    root = CacheRoot(url)
    version = root.create_version(make_table(3), make_provenance(), recorded)
    version.write_block(0, make_values(version.layout, 0))
    version.seal()
    root.set_current(version.id)
    cache = open_cache(url)
    assert repr(cache) == (
        f"<Cache {url}: 3 tiles x 8 (cls, patch_mean) float16; '<b>\\x1b[31m' at 64 px in float32; from '\"><script>'; "
        f"version {version.id}, sealed>"
    )
    html = cache._repr_html_()
    assert html.count("<tr>") == 5
    assert "&lt;b&gt;" in html
    assert "<script>" not in html
    assert repr(cache["cls"]) == "<Embeddings cls (3, 8) float16, unread>"


def test_xarray_opens_a_version_by_its_dimension_names(filled: str) -> None:
    plain, cache = read_plainly(filled), open_cache(filled)
    dataset = xarray.open_zarr(f"{filled}/{cache.id}.zarr", consolidated=False)
    assert {name: dataset[name].dims for name in plain} == {
        "cls": ("tile", "embedding"),
        "patch_mean": ("tile", "embedding"),
        "label_ids": ("tile", "raw_id"),
        "commit": ("block", "digest"),
        "seal": ("digest",),
        **dict.fromkeys(("tile", "status", "size", "crc32c", "generation", "label_size", "label_crc32c"), ("tile",)),
    }
    for name, values in plain.items():
        np.testing.assert_array_equal(dataset[name].values, values)


def test_a_cache_from_before_dimension_names_opens_too() -> None:
    (stored,) = V1.glob("*.zarr/cls/zarr.json")
    assert "dimension_names" not in json.loads(stored.read_text())
    cache = open_cache(V1)
    assert np.isnan(cache["cls"][~cache.embedded]).all()
    assert len(cache) == len(cache.tiles) == 10


def test_a_version_that_changes_under_its_reader_is_told(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    fill_cache(url, ROWS)
    cache = open_cache(url)
    cache["cls"][0]
    key = next(key for key in get_all(url) if key.endswith("status/c/1"))
    put_bytes(url, key, get_all(url)[key.replace("/1", "/0")][::-1])
    with pytest.raises(IntegrityError, match="then open it again"):
        cache["cls"][300]

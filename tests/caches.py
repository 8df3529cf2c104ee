"""Small caches with made-up values, and their chunks as bytes, on disk or in a bucket."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from cache_schema import (
    LABEL_ID_COLUMNS,
    NO_LABEL,
    BlockValues,
    CacheRoot,
    Layout,
    Provenance,
    Recorded,
    TileTable,
    Version,
)
from cache_schema import Status as S

WIDTH = 8


def make_table(rows: int, *, generation: int = 1) -> TileTable:
    """Tiles of scenes of 7; every fifth has no label object."""
    tile = sorted(f"images/{row // 7:04}_{row % 7}.png" for row in range(rows))
    number = np.arange(rows)
    labelled = number % 5 != 4
    return TileTable(
        tile=np.array(tile, np.dtypes.StringDType()),
        size=1000 + number,
        crc32c=(number * 2_654_435_761 % 2**32).astype(np.uint32),
        generation=generation * 1000 + number,
        label_size=np.where(labelled, 40 + number, NO_LABEL),
        label_crc32c=np.where(labelled, 7 * number + 1, 0).astype(np.uint32),
    )


def make_provenance(**changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "weights_sha256": "ab" * 32,
        "depth": 4,
        "width": WIDTH,
        "image_size": 64,
        "mean": (0.43, 0.411, 0.296),
        "std": (0.213, 0.156, 0.143),
        "resampling": "bilinear-antialias",
        "pooling": ("cls", "patch_mean"),
        "precision": "float32",
    }
    return Provenance(**(fields | changes))


def make_recorded(**changes: Any) -> Recorded:
    fields: dict[str, Any] = {
        "backbone": "tiny",
        "tiles": "gs://bucket/tiles",
        "identity": "crc32c",
        "batch_size": 16,
        "attention": "sdpa",
        "hardware": "CPU x86_64",
        "libraries": {"zarr": "3.1.6"},
    }
    return Recorded(**(fields | changes))


def make_values(layout: Layout, block: int, *, seed: int = 0) -> BlockValues:
    """Values of one block; every eleventh row is quarantined."""
    rows = layout.block_slice(block)
    n = rows.stop - rows.start
    rng = np.random.default_rng([seed, block])
    status = np.full(n, S.EMBEDDED, np.uint8)
    status[10::11] = S.UNDECODABLE
    pooled = {name: rng.standard_normal((n, layout.width)).astype(np.float16) for name in layout.pooling}
    for vectors in pooled.values():
        vectors[status != S.EMBEDDED] = np.nan
    label_ids = rng.integers(0, 3, (n, LABEL_ID_COLUMNS)).astype(np.uint16)
    return BlockValues(pooled, label_ids, status)


def fill_cache(url: str, rows: int, *, seal: bool = True, **provenance: Any) -> str:
    """Create a version with all its blocks written; sealed, and the one in use, unless told otherwise.

    Returns:
        its id.
    """
    root = CacheRoot(url)
    version = root.create_version(make_table(rows), make_provenance(**provenance), make_recorded())
    for block in range(version.layout.blocks):
        version.write_block(block, make_values(version.layout, block))
    if seal:
        version.seal()
        root.set_current(version.id)
    return version.id


def write_rows(
    url: str,
    tiles: np.ndarray,
    pooled: Mapping[str, np.ndarray],
    label_ids: np.ndarray,
    *,
    status: np.ndarray | None = None,
) -> str:
    """A sealed cache of made-up rows, written block by block as extraction would.

    Args:
        url: of the cache.
        tiles: (n,) names, ascending.
        pooled: (n, D) by name; rows that are not embedded become NaN.
        label_ids: (n, 128).
        status: (n,) uint8, by default all embedded.

    Returns:
        the URL.
    """
    n, number = len(tiles), np.arange(len(tiles))
    table = TileTable(
        tile=np.array(tiles, np.dtypes.StringDType()),
        size=1000 + number,
        crc32c=number.astype(np.uint32),
        generation=number + 1,
        label_size=np.full(n, 40),
        label_crc32c=number.astype(np.uint32),
    )
    status = np.full(n, S.EMBEDDED, np.uint8) if status is None else status
    embedded = (status == S.EMBEDDED)[:, None]
    stored = {name: np.where(embedded, vectors, np.nan).astype(np.float16) for name, vectors in pooled.items()}
    root = CacheRoot(url)
    width = next(iter(stored.values())).shape[1]
    version = root.create_version(table, make_provenance(width=width, pooling=tuple(stored)), make_recorded())
    for block, rows in enumerate(version.layout.block_slices()):
        values = {name: vectors[rows] for name, vectors in stored.items()}
        version.write_block(block, BlockValues(values, label_ids[rows].astype(np.uint16), status[rows]))
    version.seal()
    root.set_current(version.id)
    return url


def plant_cache(
    url: str, rows: int, *, width: int = 16, classes: int = 8, seed: int = 0, pooling: tuple[str, ...] = ("cls",)
) -> str:
    """A sealed cache of random vectors that tell their labels: a class is there where a direction of its own, and some
    noise, exceed its threshold. Scenes of 10 tiles; raw ids are class ids.

    Returns:
        the URL.
    """
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((width, classes), np.float32)
    directions /= np.linalg.norm(directions, axis=0)  # the threshold alone says how rare a class is
    thresholds = np.linspace(0.3, 1.8, classes)
    table = TileTable(
        tile=np.array([f"images/{row // 10:06}_{row % 10}.png" for row in range(rows)], np.dtypes.StringDType()),
        size=np.full(rows, 1000),
        crc32c=np.arange(rows, dtype=np.uint32),
        generation=np.arange(rows),
        label_size=np.full(rows, 40),
        label_crc32c=np.arange(rows, dtype=np.uint32),
    )
    root = CacheRoot(url)
    version = root.create_version(table, make_provenance(width=width, pooling=pooling), make_recorded())
    for block, where in enumerate(version.layout.block_slices()):
        n = where.stop - where.start
        pooled = {name: rng.standard_normal((n, width), np.float32).astype(np.float16) for name in pooling}
        scores = pooled[pooling[0]].astype(np.float32) @ directions + 0.3 * rng.standard_normal((n, classes))
        label_ids = np.zeros((n, LABEL_ID_COLUMNS), np.uint16)
        label_ids[:, :classes] = scores > thresholds
        version.write_block(block, BlockValues(pooled, label_ids, np.full(n, S.EMBEDDED, np.uint8)))
    version.seal()
    root.set_current(version.id)
    return url


def rewrite_block(url: str, block: int, values: BlockValues) -> None:
    """Past the check of what may be stored, with a commit that agrees, as another program might."""
    root = CacheRoot(url)
    version: Version = root.open_version(str(root.current()), read_only=False)
    rows = version.layout.block_slice(block)
    for name, vectors in values.pooled.items():
        version._array(name)[rows] = vectors
    version._array("label_ids")[rows] = values.label_ids
    version._array("status")[rows] = values.status
    version._array("commit")[block] = np.frombuffer(values.digest(version.layout), np.uint8)
    version.seal()


def get_bytes(url: str, key: str) -> bytes | None:
    """An object of the cache, past every check."""
    buffer = sync(CacheRoot(url).store.get(key, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


def put_bytes(url: str, key: str, data: bytes) -> None:
    sync(CacheRoot(url).store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def delete(url: str, key: str) -> None:
    sync(CacheRoot(url).store.delete(key))


def get_all(url: str) -> dict[str, bytes]:
    """Every object of the cache by its key."""

    async def keys() -> list[str]:
        return [key async for key in CacheRoot(url).store.list()]

    return {key: get_bytes(url, key) or b"" for key in sync(keys())}


def in_both_places(name: str, cases: Iterable[str], *, in_bucket: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise `cache_url` and `name`: every case in a directory, and some in a bucket, where the same code reads
    through the other store and takes many times as long."""
    pairs = [("directory", case) for case in cases] + [("bucket", case) for case in in_bucket]
    return pytest.mark.parametrize(f"cache_url, {name}", pairs, indirect=["cache_url"])

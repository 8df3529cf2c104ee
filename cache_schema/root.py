"""A cache: immutable versions and a pointer to the version in use."""

import json
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from cache_schema.storage.objects import open_objects
from cache_schema.storage.place import VIEWER, Purpose
from cache_schema.storage.store import open_store, storage_errors

from .errors import CacheFormatError, CacheNotFoundError
from .layout import ATTRIBUTE, DIGEST_BYTES, FORMAT_VERSION, TABLE_CHUNK_ROWS, Layout, choose_block_rows
from .provenance import Provenance, Recorded
from .table import COLUMN_DTYPES, TileTable
from .version import Version

_SUFFIX = ".zarr"
_CURRENT = "current"


def create_arrays(store: Store, path: str, table: TileTable, provenance: Provenance, recorded: Recorded) -> None:
    """Create all arrays of a version, and write the table.

    `commit` comes last: its presence says that creation finished. Remains of an interrupted creation are removed.
    """
    rows = len(table)
    layout = Layout(rows, provenance.width, provenance.pooling, choose_block_rows(rows))
    attributes = {
        "format": FORMAT_VERSION,
        "rows": rows,
        "block_rows": layout.block_rows,
        "provenance": provenance.to_json(),
        "recorded": recorded.to_json(),
    }
    group = zarr.create_group(store, path=path, overwrite=True, attributes={ATTRIBUTE: attributes})

    def create(name: str, shape: tuple[int, ...], chunk: int, dtype: Any, *axes: str, fill: Any = 0) -> Any:
        """Create an array in chunks of whole rows; `axes` are names for xarray, which this program does not read."""
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(chunk, *shape[1:]),
            fill_value=fill,
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=axes,
            config={"order": "C", "write_empty_chunks": True},
        )

    axes = dict.fromkeys(layout.pooling, ("tile", "embedding")) | {"label_ids": ("tile", "raw_id"), "status": ("tile",)}
    for name, (dtype, row) in layout.arrays.items():
        fill = np.nan if name in layout.pooling else 0
        create(name, (rows, *row), layout.block_rows, dtype, *axes[name], fill=fill)
    chunk = min(rows, TABLE_CHUNK_ROWS)
    create("tile", (rows,), chunk, str, "tile", fill="")[:] = table.tile
    for name, dtype in COLUMN_DTYPES.items():
        create(name, (rows,), chunk, dtype, "tile")[:] = getattr(table, name)
    create("seal", (DIGEST_BYTES,), DIGEST_BYTES, np.dtype("u1"), "digest")
    create("commit", (layout.blocks, DIGEST_BYTES), 1, np.dtype("u1"), "block", "digest")


class CacheRoot:
    """The versions of a cache, and `current`, the pointer to the version in use."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Take a directory or `gs://bucket/prefix`; nothing is created or read yet."""
        self.url = url
        self.store = open_store(url, read_only=read_only)

    def current(self) -> str | None:
        """Return the id of the version in use, None before the first one is sealed."""
        raw = self._get(_CURRENT)
        if raw is None:
            return None
        try:
            version = json.loads(raw)["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheFormatError(
                f"{self.url}/{_CURRENT} is not a version pointer ({error}): check CACHE, or remove that file "
                "and run `make extract` again"
            ) from error
        return str(version)

    def set_current(self, version_id: str) -> None:
        """Make a sealed version the one in use, with a single write."""
        value = json.dumps({"version": version_id}).encode() + b"\n"
        with storage_errors(self.url):
            sync(self.store.set(_CURRENT, default_buffer_prototype().buffer.from_bytes(value)))

    def versions(self) -> list[str]:
        """Return the ids of all versions, finished or not."""

        async def names() -> list[str]:
            return [name async for name in self.store.list_dir("")]

        with storage_errors(self.url):
            found = sync(names())
        return sorted(name.rstrip("/").removesuffix(_SUFFIX) for name in found if name.rstrip("/").endswith(_SUFFIX))

    def measure_version(self, version_id: str) -> tuple[int, float]:
        """Return the bytes of a version, and when it was last written to (Unix time)."""
        return open_objects(self.url, Purpose(role=VIEWER)).measure_dir(version_id + _SUFFIX)

    def remove_version(self, version_id: str) -> None:
        """Remove a version. The remains of an interrupted removal look like those of an interrupted creation."""
        path = version_id + _SUFFIX
        with storage_errors(self.url):
            sync(self.store.delete(f"{path}/commit/zarr.json"))
            sync(self.store.delete_dir(path))

    def open_version(self, version_id: str, *, read_only: bool = True) -> Version:
        """Open one version.

        Raises:
            CacheNotFoundError: there is no such version, or its creation was interrupted.
            CacheFormatError: it is damaged, or in a format that this program does not read.
        """
        path = version_id + _SUFFIX
        with storage_errors(self.url):
            try:
                group = zarr.open_group(self.store, path=path, mode="r" if read_only else "r+", zarr_format=3)
            except FileNotFoundError as error:
                there = ", ".join(self.versions()) or "none"
                raise CacheNotFoundError(f"no version {version_id} in {self.url}; versions there: {there}") from error
            except (ValueError, TypeError) as error:  # Zarr: metadata that is truncated or not of a group
                raise CacheFormatError(
                    f"{self.url}/{path} is damaged ({error}): remove it and run `make extract` again"
                ) from error
        version = Version(self.url, version_id, group)
        if not self._is_created(version_id):
            raise CacheNotFoundError(
                f"version {version_id} of {self.url} was not created completely: run `make extract` again"
            )
        return version

    def is_sealed(self, version_id: str) -> bool:
        """Return whether a version is finished; False if it cannot be opened or its creation was interrupted."""
        try:
            return self.open_version(version_id).sealed
        except (CacheNotFoundError, CacheFormatError):
            return False

    def create_version(self, table: TileTable, provenance: Provenance, recorded: Recorded) -> Version:
        """Open the version of this table and provenance for writing; create it if it does not exist.

        An existing version keeps its committed blocks and its `recorded`, above all the batch size;
        `Version.follow_listing` says what may change. Two processes must not create the same version at the same time.
        """
        version_id = provenance.version_id(table.identity_digest())
        if not self._is_created(version_id):
            with storage_errors(self.url):
                create_arrays(self.store, version_id + _SUFFIX, table, provenance, recorded)
        version = self.open_version(version_id, read_only=False)
        version.follow_listing(table)
        return version

    def _is_created(self, version_id: str) -> bool:
        """Return whether `commit` exists, the array that creation makes last."""
        return self._get(f"{version_id}{_SUFFIX}/commit/zarr.json") is not None

    def _get(self, key: str) -> bytes | None:
        with storage_errors(self.url):
            try:
                buffer = sync(self.store.get(key, default_buffer_prototype()))
            except FileNotFoundError:  # the whole directory is missing
                return None
        return None if buffer is None else buffer.to_bytes()

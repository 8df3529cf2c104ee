"""Versions of a cache on disk or in a bucket: create, open, write a block, read, seal.

A version is one Zarr v3 group; README.md beside this file says what lies in it and why a row can be trusted.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from .errors import CacheFormatError, CacheNotFoundError, IntegrityError, StorageError
from .layout import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    LABEL_ID_COLUMNS,
    LABEL_IDS_DTYPE,
    POOLED_DTYPE,
    STATUS_DTYPE,
    BoolArray,
    Float16Array,
    Layout,
    Status,
    UInt8Array,
    UInt16Array,
    choose_block_rows,
)
from .provenance import Provenance, Recorded
from .table import COLUMN_DTYPES, TileTable

TABLE_CHUNK_ROWS = 65_536
_SUFFIX = ".zarr"
_CURRENT = "current"
_ATTRIBUTE = "tileprobe"


@dataclass(frozen=True, eq=False)
class BlockValues:
    """The values of one block of n rows, as they are digested and stored.

    Attributes:
        pooled: per pooling (n, D) float16, NaN in rows that are not embedded.
        label_ids: (n, 128) uint16, instances per raw label id.
        status: (n,) uint8, see `Status`.
    """

    pooled: Mapping[str, Float16Array]
    label_ids: UInt16Array
    status: UInt8Array

    def digest(self, pooling: tuple[str, ...]) -> bytes:
        """sha256 over the little-endian values: pooled arrays in order, label ids, status."""
        digest = hashlib.sha256()
        for name in pooling:
            digest.update(np.ascontiguousarray(self.pooled[name], POOLED_DTYPE).tobytes())
        digest.update(np.ascontiguousarray(self.label_ids, LABEL_IDS_DTYPE).tobytes())
        digest.update(np.ascontiguousarray(self.status, STATUS_DTYPE).tobytes())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class CacheRows:
    """A whole version in memory, digests checked.

    Attributes:
        pooled: per pooling (N, D) float16.
        label_ids: (N, 128) uint16.
        status: (N,) uint8; 0 in rows whose block is missing or contradicts its digest.
    """

    pooled: dict[str, Float16Array]
    label_ids: UInt16Array
    status: UInt8Array

    @property
    def embedded(self) -> BoolArray:
        return np.asarray(self.status == Status.EMBEDDED)

    @property
    def missing(self) -> int:
        return int((self.status == Status.PENDING).sum())


class CacheRoot:
    """A cache: immutable versions side by side and one pointer, `current`, to the version in use."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """`url` is a directory or `gs://bucket/prefix`; nothing is created or read yet."""
        self.url = url
        self.store = _open_store(url, read_only)

    def current(self) -> str | None:
        """Id of the version in use, None before the first one is sealed."""
        raw = self._get(_CURRENT)
        if raw is None:
            return None
        try:
            version = json.loads(raw)["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheFormatError(f"{self.url}/{_CURRENT} is not a version pointer: {error}") from error
        return str(version)

    def set_current(self, version_id: str) -> None:
        """Point the cache at a sealed version, in one put."""
        self._set(_CURRENT, json.dumps({"version": version_id}).encode() + b"\n")

    def versions(self) -> list[str]:
        """Ids of all versions, finished or not."""

        async def names() -> list[str]:
            return [name async for name in self.store.list_dir("")]

        with _storage_errors(self.url):
            found = sync(names())
        return sorted(name.rstrip("/").removesuffix(_SUFFIX) for name in found if name.rstrip("/").endswith(_SUFFIX))

    def open_version(self, version_id: str, *, read_only: bool = True) -> "Version":
        """Open one version.

        Raises:
            CacheNotFoundError: there is no such version.
            CacheFormatError: it is not one this program reads.
        """
        path = version_id + _SUFFIX
        with _storage_errors(self.url):
            try:
                group = zarr.open_group(self.store, path=path, mode="r" if read_only else "r+")
            except FileNotFoundError as error:
                raise CacheNotFoundError(f"no version {version_id} in {self.url}") from error
        return Version(self, version_id, group)

    def create_version(self, table: TileTable, provenance: Provenance, recorded: Recorded) -> "Version":
        """Open the version of this table and provenance for writing; create it where it does not exist.

        An existing version keeps what it recorded (its batch size above all) and its committed blocks; only its
        `generation` column follows the present listing, since that column pins reads and is no part of the id.
        """
        version_id = provenance.version_id(table.identity_digest())
        if self._get(f"{version_id}{_SUFFIX}/commit/zarr.json") is None:
            with _storage_errors(self.url):
                _create_arrays(self.store, version_id + _SUFFIX, table, provenance, recorded)
        version = self.open_version(version_id, read_only=False)
        if not version.sealed and not np.array_equal(version.read_table().generation, table.generation):
            version.write_generation(table.generation)
        return version

    def _get(self, key: str) -> bytes | None:
        with _storage_errors(self.url):
            buffer = sync(self.store.get(key, default_buffer_prototype()))
        return None if buffer is None else buffer.to_bytes()

    def _set(self, key: str, value: bytes) -> None:
        with _storage_errors(self.url):
            sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(value)))


class Version:
    """One version of a cache. Reading verifies digests; writing goes block by block."""

    def __init__(self, root: CacheRoot, version_id: str, group: zarr.Group) -> None:
        self.root = root
        self.id = version_id
        self.group = group
        attributes: Any = group.attrs.asdict().get(_ATTRIBUTE)
        if not isinstance(attributes, dict) or "format" not in attributes:
            raise CacheFormatError(f"{root.url}/{version_id}{_SUFFIX} is a Zarr group, but not a version of a cache")
        if attributes["format"] != FORMAT_VERSION:
            raise CacheFormatError(
                f"{root.url}: format {attributes['format']}, this program reads {FORMAT_VERSION}: "
                "update it, or run `make extract` again"
            )
        self.provenance = Provenance.from_json(attributes["provenance"])
        self.recorded = Recorded.from_json(attributes["recorded"])
        self.layout = Layout(
            rows=attributes["rows"],
            width=self.provenance.width,
            pooling=self.provenance.pooling,
            block_rows=attributes["block_rows"],
        )

    def __repr__(self) -> str:
        return f"Version({self.root.url!r}, {self.id!r})"

    def read_table(self) -> TileTable:
        """The tile table, all columns."""
        with _storage_errors(self.root.url):
            columns: dict[str, Any] = {name: self._read(name, slice(None)) for name in ("tile", *COLUMN_DTYPES)}
        return TileTable(**columns)

    def write_generation(self, generation: npt.NDArray[np.int64]) -> None:
        with _storage_errors(self.root.url):
            self._array("generation")[:] = generation

    def committed(self) -> BoolArray:
        """(blocks,) bool: blocks with a commit record. Whether a block's values agree is `check_block`'s question."""
        return np.asarray(self._commits().any(axis=1))

    def write_block(self, block: int, values: BlockValues) -> None:
        """Write one block, then its commit record; until that last put the block counts as pending.

        Raises:
            IntegrityError: shapes or dtypes that are not the layout's, an embedding that does not fit float16
                (inf or NaN), or vectors in rows that were not embedded.
        """
        rows = self.layout.block_slice(block)
        self._refuse_unstorable(values, rows)
        with _storage_errors(self.root.url):
            for name in self.layout.pooling:
                self._array(name)[rows] = values.pooled[name]
            self._array("label_ids")[rows] = values.label_ids
            self._array("status")[rows] = values.status
            digest = np.frombuffer(values.digest(self.layout.pooling), np.uint8)
            self._array("commit")[block] = digest

    def read_block(self, block: int) -> BlockValues:
        """One block as stored, not checked against its commit.

        Raises:
            IntegrityError: a chunk of it is cut or flipped.
        """
        rows = self.layout.block_slice(block)
        return BlockValues(
            pooled={name: self._read(name, rows) for name in self.layout.pooling},
            label_ids=self._read("label_ids", rows),
            status=self._read("status", rows),
        )

    def check_block(self, block: int) -> str | None:
        """What is wrong with a committed block, None if nothing."""
        try:
            values = self.read_block(block)
            commit = self._read("commit", slice(block, block + 1))[0].tobytes()
        except IntegrityError as error:
            return str(error)
        if values.digest(self.layout.pooling) != commit:
            return "its values contradict its digest"
        try:
            self._refuse_unstorable(values, self.layout.block_slice(block))
        except IntegrityError as error:
            return str(error)
        return None

    def read_rows(self) -> CacheRows:
        """Everything into memory, in one read per array; a block that contradicts its commit reads as pending."""
        try:
            commits = self._commits()
            pooled = {name: self._read(name, slice(None)) for name in self.layout.pooling}
            label_ids, status = self._read("label_ids", slice(None)), self._read("status", slice(None))
        except IntegrityError:
            return self._read_rows_block_by_block()
        for block, rows in enumerate(self.layout.block_slices()):
            values = BlockValues({k: v[rows] for k, v in pooled.items()}, label_ids[rows], status[rows])
            if values.digest(self.layout.pooling) != commits[block].tobytes():
                status[rows] = Status.PENDING
        return CacheRows(pooled, label_ids, status)

    def _read_rows_block_by_block(self) -> CacheRows:
        """The same when some chunk cannot be read at all: only its block is lost."""
        rows = self.layout.rows
        pooled = {name: np.full((rows, self.layout.width), np.nan, POOLED_DTYPE) for name in self.layout.pooling}
        label_ids = np.zeros((rows, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE)
        status = np.zeros(rows, STATUS_DTYPE)
        for block, where in enumerate(self.layout.block_slices()):
            if self.check_block(block) is None:
                values = self.read_block(block)
                for name, array in values.pooled.items():
                    pooled[name][where] = array
                label_ids[where], status[where] = values.label_ids, values.status
        return CacheRows(pooled, label_ids, status)

    @property
    def sealed(self) -> bool:
        with _storage_errors(self.root.url):
            return bool(self._read("seal", slice(None)).any())

    def seal(self) -> None:
        """Record that every block is committed; afterwards the version never changes.

        Raises:
            IntegrityError: blocks are still pending.
        """
        pending = int((~self.committed()).sum())
        if pending:
            raise IntegrityError(f"{pending} of {self.layout.blocks} blocks are not committed: nothing to seal")
        with _storage_errors(self.root.url):
            self._array("seal")[:] = np.frombuffer(self._seal_digest(), np.uint8)

    def reopen_blocks(self, blocks: Sequence[int]) -> None:
        """Take back the seal, then the commits of `blocks`, so that the next extraction redoes them."""
        with _storage_errors(self.root.url):
            self._array("seal")[:] = 0
            for block in blocks:
                self._array("commit")[block] = 0

    def check_seal(self) -> bool:
        """Whether the seal is that of the present table and commits."""
        return bool(self._read("seal", slice(None)).tobytes() == self._seal_digest())

    def _seal_digest(self) -> bytes:
        return hashlib.sha256(self.read_table().full_digest() + self._commits().tobytes()).digest()

    def _commits(self) -> UInt8Array:
        return np.asarray(self._read("commit", slice(None)))

    def _array(self, name: str) -> zarr.Array[Any]:
        array: Any = self.group[name]
        # A chunk equal to the fill value must be written too, and Zarr does not remember that it should.
        return array.with_config({"order": "C", "write_empty_chunks": True})  # type: ignore[no-any-return]

    def _read(self, name: str, rows: slice) -> npt.NDArray[Any]:
        with _storage_errors(self.root.url):
            try:
                array: Any = self.group[name]
                return np.asarray(array[rows])
            except ValueError as error:  # what Zarr raises on a wrong checksum and on a chunk of the wrong length
                raise IntegrityError(f"array {name} cannot be read: {error}") from error

    def _refuse_unstorable(self, values: BlockValues, rows: slice) -> None:
        n = rows.stop - rows.start
        expected: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {}
        expected |= dict.fromkeys(self.layout.pooling, ((n, self.layout.width), POOLED_DTYPE))
        expected |= {"label_ids": ((n, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE), "status": ((n,), STATUS_DTYPE)}
        arrays: dict[str, npt.NDArray[Any]] = dict(values.pooled)
        arrays |= {"label_ids": values.label_ids, "status": values.status}
        for name, (shape, dtype) in expected.items():
            if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != dtype:
                raise IntegrityError(f"array {name} of a block must be {dtype} {shape}")
        embedded = np.asarray(values.status == Status.EMBEDDED)
        for name in self.layout.pooling:
            finite = np.asarray(np.isfinite(values.pooled[name]).all(axis=1))
            if not finite[embedded].all():
                first = rows.start + int(np.flatnonzero(embedded & ~finite)[0])
                raise IntegrityError(f"{name} of row {first} is not finite in float16: nothing of its block was stored")
            if finite[~embedded].any():
                raise IntegrityError(f"{name} holds vectors in rows whose status says they were not embedded")


def open_cache(url: str, *, version: str | None = None, allow_unsealed: bool = False) -> Version:
    """The version in use of the cache at `url`, for reading.

    Args:
        url: directory or `gs://bucket/prefix`.
        version: another version's id instead of the one in use.
        allow_unsealed: accept a version whose extraction has not finished; its missing rows read as pending.

    Raises:
        CacheNotFoundError: nothing finished there; says how far an unfinished extraction came.
        CacheFormatError: not a cache, or of a format this program does not read.
    """
    root = CacheRoot(url, read_only=True)
    chosen = version or root.current()
    if chosen is None:
        unfinished = root.versions()
        if not unfinished:
            raise CacheNotFoundError(f"no cache at {url}: run `make extract` first, or check CACHE")
        if not allow_unsealed or len(unfinished) > 1:
            raise CacheNotFoundError(f"no finished version in {url}: {_describe_unfinished(root, unfinished)}")
        chosen = unfinished[0]
    opened = root.open_version(chosen)
    if not opened.sealed and not allow_unsealed:
        raise CacheNotFoundError(f"version {chosen} of {url} is not finished: {_describe_unfinished(root, [chosen])}")
    return opened


def _describe_unfinished(root: CacheRoot, versions: list[str]) -> str:
    parts = []
    for version_id in versions:
        version = root.open_version(version_id)
        missing = sum(
            rows.stop - rows.start
            for rows, done in zip(version.layout.block_slices(), version.committed(), strict=True)
            if not done
        )
        parts.append(f"{missing:,} of {version.layout.rows:,} rows are missing in {version_id}")
    return "; ".join(parts) + ": run `make extract` again to finish it"


def _open_store(url: str, read_only: bool) -> Store:
    if url.startswith("gs://"):
        from .gcs import GcsStore

        return GcsStore(url, read_only=read_only)
    if "://" in url:
        raise StorageError(f"cannot open {url}: a cache is a local directory or gs://bucket/prefix")
    return LocalStore(url, read_only=read_only)


class _storage_errors:
    """Turns the operating system's refusals into an error that says what to do."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StorageError(
                f"{self.url}: {reason}: free space or choose another CACHE; what is committed stays, "
                "and the same command goes on from there"
            ) from error


def _create_arrays(store: Store, path: str, table: TileTable, provenance: Provenance, recorded: Recorded) -> None:
    """All arrays of a version, the table filled in; `commit` last, since its presence says that creation finished."""
    rows = len(table)
    layout = Layout(rows, provenance.width, provenance.pooling, choose_block_rows(rows))
    attributes = {
        "format": FORMAT_VERSION,
        "rows": rows,
        "block_rows": layout.block_rows,
        "provenance": provenance.to_json(),
        "recorded": recorded.to_json(),
    }
    group = zarr.create_group(store, path=path, overwrite=True, attributes={_ATTRIBUTE: attributes})

    def create(name: str, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...], fill: Any) -> Any:
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            fill_value=fill,
            filters=None,
            compressors=[Crc32cCodec()],
            config={"order": "C", "write_empty_chunks": True},
        )

    for name in layout.pooling:
        create(name, (rows, layout.width), POOLED_DTYPE, (layout.block_rows, layout.width), np.nan)
    create("label_ids", (rows, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE, (layout.block_rows, LABEL_ID_COLUMNS), 0)
    create("status", (rows,), STATUS_DTYPE, (layout.block_rows,), int(Status.PENDING))
    chunk = min(rows, TABLE_CHUNK_ROWS)
    create("tile", (rows,), str, (chunk,), "")[:] = table.tile
    for name, dtype in COLUMN_DTYPES.items():
        create(name, (rows,), dtype, (chunk,), 0)[:] = getattr(table, name)
    create("seal", (DIGEST_BYTES,), np.dtype("u1"), (DIGEST_BYTES,), 0)
    create("commit", (layout.blocks, DIGEST_BYTES), np.dtype("u1"), (1, DIGEST_BYTES), 0)

"""One version of a cache: write blocks, read blocks that match their digests, seal."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from cache_schema.storage.store import storage_errors

from .block import BlockValues, CacheRows
from .errors import CacheFormatError, IntegrityError
from .layout import (
    ATTRIBUTE,
    DIGEST_BYTES,
    POOLED_DTYPE,
    STATUS_DTYPE,
    BoolArray,
    Float16Array,
    Layout,
    Status,
    UInt8Array,
    UInt16Array,
    check_attributes,
)
from .provenance import Provenance, Recorded
from .table import COLUMN_DTYPES, TileTable

DIGEST_CONTRADICTED = "its values do not match its digest"
_SCAN_THREADS = 4
_SCAN_BYTES = 2**20
"""Vectors that one thread of a scan reads with one request to Zarr: several small blocks or one large one."""

TakeBlock = Callable[[int, BlockValues], None]
"""Gets a block's number and values, which it must not keep; called from several threads in any order."""


class Version:
    """One version of a cache, written and checked block by block."""

    def __init__(self, url: str, version_id: str, group: zarr.Group) -> None:
        """Read the attributes of a version from its Zarr group; `url` is that of the cache, for messages.

        Raises:
            CacheFormatError: the attributes are not those of this format.
        """
        self.url = url
        self.id = version_id
        self.group = group
        attributes = self._read_attributes()
        self.provenance = Provenance.from_json(attributes["provenance"])
        self.recorded = Recorded.from_json(attributes["recorded"])
        self.layout = Layout(
            rows=attributes["rows"],
            width=self.provenance.width,
            pooling=self.provenance.pooling,
            block_rows=attributes["block_rows"],
        )

    def __repr__(self) -> str:
        return f"Version({self.url!r}, {self.id!r})"

    # The tile table

    def read_table(self) -> TileTable:
        """Read the tile table, all columns.

        Raises:
            IntegrityError: it cannot be read.
        """
        try:
            columns: dict[str, Any] = {name: self._read(name) for name in ("tile", *COLUMN_DTYPES)}
            return TileTable(**columns)
        except (IntegrityError, CacheFormatError) as error:
            raise IntegrityError(f"tile table of {self.url}: {error}: `make extract` repairs it") from error

    def write_generation(self, generation: npt.NDArray[np.int64]) -> None:
        """Replace the column `generation` (N,) of the tile table."""
        with storage_errors(self.url):
            self._array("generation")[:] = generation

    def follow_listing(self, table: TileTable) -> None:
        """Update `generation` from the present listing, and repair a damaged tile table.

        A sealed version stays as it is. If the seal does not match the version, the seal is removed. `table` gives this
        version's id, so a difference in any other column is damage.
        """
        try:
            damaged = self.read_table().identity_digest() != table.identity_digest()
            damaged = damaged or (self.sealed and not self.check_seal())
        except IntegrityError:
            damaged = True
        if damaged:
            self.reopen_blocks([])
            with storage_errors(self.url):
                for name in ("tile", *COLUMN_DTYPES):
                    self._array(name)[:] = getattr(table, name)
        elif not self.sealed and not np.array_equal(self._read("generation"), table.generation):
            self.write_generation(table.generation)

    def record_batch_size(self, batch_size: int) -> None:
        """Record another batch size than the version was created with.

        Raises:
            IntegrityError: there are committed blocks, and the batch size changes the last digits of a vector.
        """
        if self.committed().any():
            raise IntegrityError(
                f"{self.url} holds blocks made {self.recorded.batch_size} tiles at a time, and may not mix sizes: "
                "continue where that fits, or extract into another CACHE with a smaller --batch-size"
            )
        self.recorded = replace(self.recorded, batch_size=batch_size)
        attributes = self._read_attributes()
        with storage_errors(self.url):
            self.group.attrs[ATTRIBUTE] = {**attributes, "recorded": self.recorded.to_json()}

    # Blocks

    def committed(self) -> BoolArray:
        """Return (blocks,) bool: blocks with a commit record. `check_block` says whether their values match it."""
        return np.asarray(self._commits().any(axis=1))

    def write_block(self, block: int, values: BlockValues) -> None:
        """Write one block, then its commit record; without the record the block is pending.

        The chunks are written concurrently, since each takes a round trip or two to a bucket. Meanwhile memory holds a
        second, encoded copy of all of them.

        Raises:
            IntegrityError: values that no block may hold, see `BlockValues.refuse_unstorable`.
            StorageError: a chunk cannot be written; the other writes have ended, and the block is pending.
        """
        rows = self.layout.block_slice(block)
        values.refuse_unstorable(self.layout, rows)
        with storage_errors(self.url):
            arrays = self._block_arrays
            # The end of `with` waits for all writes: none may arrive after the commit, or after an error was raised.
            with ThreadPoolExecutor(len(arrays)) as threads:
                chunks = ((arrays[name], values.arrays[name]) for name in self.layout.arrays)
                writes = [threads.submit(array.__setitem__, rows, chunk) for array, chunk in chunks]
                digest = values.digest(self.layout)
            for write in writes:
                write.result()
            arrays["commit"][block] = np.frombuffer(digest, np.uint8)

    def read_block(self, block: int) -> BlockValues:
        """Read one block without checking it against its commit.

        Raises:
            IntegrityError: one of its chunks is damaged.
        """
        return self._read_values(self.layout.block_slice(block), self._open_blocks())

    def read_trusted(self, block: int) -> BlockValues:
        """Read one block and check it against its commit.

        Raises:
            IntegrityError: it is not committed, or damaged; the message says how.
        """
        values = self.read_block(block)
        if values.digest(self.layout) != self._read("commit", slice(block, block + 1)).tobytes():
            raise IntegrityError(DIGEST_CONTRADICTED)
        contradictions = values.find_contradictions(self.layout, self.layout.block_slice(block))
        if contradictions:
            raise IntegrityError("; ".join(contradictions))
        return values

    def check_block(self, block: int) -> str | None:
        """Say what is wrong with a committed block; None if nothing is."""
        try:
            self.read_trusted(block)
        except IntegrityError as error:
            return str(error)
        return None

    def read_rows(self) -> CacheRows:
        """Read everything into memory; a block that does not match its digest is pending."""
        return self._gather(self.layout.pooling, self.scan)

    def _gather(self, pooling: tuple[str, ...], scan: Callable[[TakeBlock], None]) -> CacheRows:
        whole = CacheRows.make_blank(replace(self.layout, pooling=pooling), self.layout.rows)

        def take(block: int, values: BlockValues) -> None:
            for name, array in whole.arrays.items():
                array[self.layout.block_slice(block)] = values.arrays[name]

        scan(take)
        return whole

    def read_status(self, blocks: npt.ArrayLike | None = None) -> UInt8Array:
        """Read (N,) uint8, the status of all rows, checking every digest with a few blocks in memory at a time.

        If only some `blocks` are read, the rows of the others are pending.
        """
        status = np.zeros(self.layout.rows, STATUS_DTYPE)

        def take(block: int, values: BlockValues) -> None:
            status[self.layout.block_slice(block)] = values.status

        self.scan(take, blocks)
        return status

    def read_unchecked(self) -> tuple[UInt8Array, UInt16Array]:
        """Read status (N,) uint8 and label ids (N, 128) uint16 without the vectors, and so without checking digests.

        Rows of a block that is not committed, or whose chunk is damaged, are pending and count no labels.
        """
        rows = list(self.layout.block_slices())
        status, label_ids = (
            self._read_intact(name, rows, *self.layout.arrays[name]) for name in ("status", "label_ids")
        )
        readable = np.repeat(self.committed(), self.layout.block_rows)[: self.layout.rows] & (status != Status.PENDING)
        return np.where(readable, status, STATUS_DTYPE.type(Status.PENDING)), label_ids * readable[:, None]

    def scan(self, take: TakeBlock, blocks: npt.ArrayLike | None = None) -> None:
        """Pass every block that matches its commit to `take`, with a few blocks in memory at a time.

        Blocks that are not committed, cannot be read or do not match their commit are skipped. `blocks` holds ascending
        numbers of the blocks to read, None for all.
        """
        wanted = np.arange(self.layout.blocks) if blocks is None else np.asarray(blocks, np.intp)
        if not len(wanted):
            return
        span = slice(None) if blocks is None else slice(wanted[0], wanted[-1] + 1)
        commits = self._commits(span)[wanted - wanted[0]]
        digests = {block: commit.tobytes() for block, commit in zip(wanted.tolist(), commits, strict=True)}
        try:
            arrays = self._open_blocks()
        except IntegrityError:
            return
        committed = wanted[commits.any(axis=1)]
        together = max(1, _SCAN_BYTES // (self.layout.block_rows * self.layout.width * POOLED_DTYPE.itemsize))
        cuts = np.flatnonzero((np.diff(committed) > 1) | (np.diff(committed // together) > 0)) + 1

        runs = [run.tolist() for run in np.split(committed, cuts) if len(run)]
        # In a bucket a block takes longer to arrive than to check.
        with ThreadPoolExecutor(_SCAN_THREADS) as threads:
            for _ in threads.map(lambda blocks: self._hand_over(blocks, arrays, digests, take), runs):
                pass

    def _hand_over(
        self,
        blocks: list[int],
        arrays: Mapping[str, Any],
        digests: Mapping[int, bytes],
        take: TakeBlock,
    ) -> None:
        """Read adjacent blocks with one request, and pass those that match their commit to `take`."""
        start, stop = self.layout.block_slice(blocks[0]).start, self.layout.block_slice(blocks[-1]).stop
        try:
            values = self._read_values(slice(start, stop), arrays)
        except IntegrityError:
            if len(blocks) > 1:  # a damaged chunk must not make its neighbours unreadable
                for block in blocks:
                    self._hand_over([block], arrays, digests, take)
            return
        for block in blocks:
            rows = self.layout.block_slice(block)
            part = values.select(slice(rows.start - start, rows.stop - start))
            if part.digest(self.layout) == digests[block]:
                take(block, part)

    def open_pooled(self, names: Sequence[str]) -> Callable[[int], list[Float16Array]]:
        """Return a function that reads the vectors of a block, an array per name.

        The metadata of the arrays is read once, now. The function cannot check the commit, which also covers arrays
        that it does not read: compare its result with the values that `scan` passed on.

        Raises:
            IntegrityError: an array is missing; the function raises it if a chunk is damaged.
        """
        arrays = [self._open(name) for name in names]

        def read(block: int) -> list[Float16Array]:
            return [self._read_from(array, self.layout.block_slice(block)) for array in arrays]

        return read

    def _open_blocks(self) -> dict[str, Any]:
        return {name: self._open(name) for name in self.layout.arrays}

    def _read_values(self, rows: slice, arrays: Mapping[str, Any]) -> BlockValues:
        """Read the values of any rows from open arrays."""
        found = {name: self._read_from(array, rows) for name, array in arrays.items()}
        return BlockValues({name: found[name] for name in self.layout.pooling}, found["label_ids"], found["status"])

    # Commit records and the seal: a damaged one counts as missing, so that the next extraction writes it again

    @property
    def sealed(self) -> bool:
        """Whether the version is finished."""
        return bool(self._read_seal().any())

    def seal(self) -> None:
        """Record that every block is committed; from now on the version does not change.

        Raises:
            IntegrityError: blocks are still pending.
        """
        pending = int((~self.committed()).sum())
        if pending:
            raise IntegrityError(f"{pending} of {self.layout.blocks} blocks are not committed: nothing to seal")
        with storage_errors(self.url):
            self._array("seal")[:] = np.frombuffer(self._seal_digest(), np.uint8)

    def reopen_blocks(self, blocks: Sequence[int]) -> None:
        """Clear the seal, then the commits of `blocks`, so that the next extraction redoes them."""
        with storage_errors(self.url):
            self._array("seal")[:] = 0
            for block in blocks:
                self._array("commit")[block] = 0

    def check_seal(self) -> bool:
        """Return whether the seal matches the present table and commits."""
        return self._read_seal().tobytes() == self._seal_digest()

    def _seal_digest(self) -> bytes:
        return hashlib.sha256(self.read_table().full_digest() + self._commits().tobytes()).digest()

    def _read_seal(self) -> UInt8Array:
        try:
            return self._read("seal")
        except IntegrityError:
            return np.zeros(DIGEST_BYTES, np.uint8)

    def _commits(self, blocks: slice = slice(None)) -> UInt8Array:
        """Read the commits (n, 32) uint8 of n adjacent blocks, by default all; zeros for a block without one."""
        numbers = range(self.layout.blocks)[blocks]
        return self._read_intact("commit", [slice(i, i + 1) for i in numbers], np.dtype("u1"), (DIGEST_BYTES,))

    def _read_intact(
        self, name: str, chunks: Sequence[slice], dtype: np.dtype[Any], row: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """Read adjacent chunks of an array; a damaged one reads as zeros."""
        start, stop = (chunks[0].start, chunks[-1].stop) if chunks else (0, 0)
        try:
            return self._read(name, slice(start, stop))
        except IntegrityError:
            values = np.zeros((stop - start, *row), dtype)
        for rows in chunks:
            try:
                values[rows.start - start : rows.stop - start] = self._read(name, rows)
            except IntegrityError:
                continue
        return values

    def _read_attributes(self) -> dict[str, Any]:
        return check_attributes(self.group.attrs.asdict().get(ATTRIBUTE), self.url, self.group.path)

    # Arrays

    @cached_property
    def _block_arrays(self) -> dict[str, zarr.Array[Any]]:
        """The arrays that blocks are written to, opened once: in a bucket the metadata of each is a request."""
        return {name: self._array(name) for name in (*self.layout.arrays, "commit")}

    def _array(self, name: str) -> zarr.Array[Any]:
        array: Any = self.group[name]
        # A chunk equal to the fill value must be written too, and Zarr does not remember that it should.
        return array.with_config({"order": "C", "write_empty_chunks": True})  # type: ignore[no-any-return]

    def _read(self, name: str, rows: slice = slice(None)) -> npt.NDArray[Any]:
        return self._read_from(self._open(name), rows)

    def _open(self, name: str) -> Any:
        """Open an array for any number of reads."""
        with self._read_errors(name):
            return self.group[name]

    def _read_from(self, array: Any, rows: slice) -> npt.NDArray[Any]:
        with self._read_errors(array.basename):
            return np.asarray(array[rows])

    @contextmanager
    def _read_errors(self, name: str) -> Iterator[None]:
        with storage_errors(self.url):
            try:
                yield
            # Zarr raises ValueError for a chunk with a wrong checksum or length, KeyError for a missing array, and
            # either for damaged metadata.
            except (ValueError, KeyError) as error:
                raise IntegrityError(f"array {name} cannot be read ({error})") from error

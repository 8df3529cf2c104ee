"""One version of a cache: write a block, read what can be trusted, seal."""

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
    FORMAT_VERSION,
    POOLED_DTYPE,
    STATUS_DTYPE,
    BoolArray,
    Float16Array,
    Layout,
    UInt8Array,
)
from .provenance import Provenance, Recorded
from .table import COLUMN_DTYPES, TileTable

DIGEST_CONTRADICTED = "its values contradict its digest"
_SCAN_THREADS = 4
_SCAN_BYTES = 2**20
"""Vectors that one thread of a scan reads at once: several small blocks in one request to Zarr, or one large one."""


class Version:
    """One version of a cache. Reading verifies digests; writing goes block by block."""

    def __init__(self, url: str, version_id: str, group: zarr.Group) -> None:
        """Read the attributes of a version.

        Args:
            url: the cache that the version belongs to, for messages.
            version_id: its id.
            group: its Zarr group, open for reading or writing.

        Raises:
            CacheFormatError: the attributes are not those of this format.
        """
        self.url = url
        self.id = version_id
        self.group = group
        attributes = _read_attributes(group, url)
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
        """The tile table, all columns.

        Raises:
            IntegrityError: it cannot be read.
        """
        try:
            columns: dict[str, Any] = {name: self._read(name) for name in ("tile", *COLUMN_DTYPES)}
            return TileTable(**columns)
        except (IntegrityError, CacheFormatError) as error:
            raise IntegrityError(f"tile table of {self.url}: {error}: `make extract` mends it") from error

    def write_generation(self, generation: npt.NDArray[np.int64]) -> None:
        with storage_errors(self.url):
            self._array("generation")[:] = generation

    def follow_listing(self, table: TileTable) -> None:
        """Take over `generation` from the present listing, and mend the stored table where it is damaged.

        A sealed version stays as it is, unless its seal contradicts it: that one loses the seal, to be earned anew.

        Args:
            table: one that leads to this version's id, so what differs besides `generation` is damage.
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
        """Record another batch size than the one the version was created with.

        Raises:
            IntegrityError: there are blocks already, and a batch's size shows in its vectors' last digits.
        """
        if self.committed().any():
            raise IntegrityError(
                f"{self.url} holds blocks made {self.recorded.batch_size} tiles at a time, and may not mix sizes: "
                "go on where that fits, or extract into another CACHE with a smaller --batch-size"
            )
        self.recorded = replace(self.recorded, batch_size=batch_size)
        attributes = _read_attributes(self.group, self.url)
        with storage_errors(self.url):
            self.group.attrs[ATTRIBUTE] = {**attributes, "recorded": self.recorded.to_json()}

    # Blocks

    def committed(self) -> BoolArray:
        """(blocks,) bool: blocks with a commit record. Whether a block's values agree is `check_block`'s question."""
        return np.asarray(self._commits().any(axis=1))

    def write_block(self, block: int, values: BlockValues) -> None:
        """Write one block, then its commit record; until that last put the block counts as pending.

        The chunks are written side by side, since in a bucket each is a round trip or two; meanwhile all of them are in
        memory a second time, encoded.

        Raises:
            IntegrityError: values that no block may hold, see `BlockValues.refuse_unstorable`.
            StorageError: a chunk cannot be written; no other write is under way any more, and the block is pending.
        """
        rows = self.layout.block_slice(block)
        values.refuse_unstorable(self.layout, rows)
        chunks: dict[str, npt.NDArray[Any]] = {name: values.pooled[name] for name in self.layout.pooling}
        chunks |= {"label_ids": values.label_ids, "status": values.status}
        with storage_errors(self.url):
            arrays = self._block_arrays
            # Leaving waits for all of them: none may arrive after the commit, or after another's error was raised.
            with ThreadPoolExecutor(len(chunks)) as threads:
                writes = [threads.submit(arrays[name].__setitem__, rows, chunk) for name, chunk in chunks.items()]
                digest = values.digest(self.layout.pooling)
            for write in writes:
                write.result()
            arrays["commit"][block] = np.frombuffer(digest, np.uint8)

    def read_block(self, block: int) -> BlockValues:
        """One block as stored, not checked against its commit.

        Raises:
            IntegrityError: a chunk of it is cut or flipped.
        """
        return self._read_values(self.layout.block_slice(block))

    def read_commit(self, block: int) -> bytes:
        """The digest that one block was committed with (32 bytes), zeros where there is none.

        Raises:
            IntegrityError: it is cut or flipped.
        """
        return self._read("commit", slice(block, block + 1)).tobytes()

    def read_trusted(self, block: int) -> BlockValues:
        """One block, checked against its commit.

        Raises:
            IntegrityError: it is not committed, or damaged; the message says how.
        """
        values = self.read_block(block)
        if values.digest(self.layout.pooling) != self.read_commit(block):
            raise IntegrityError(DIGEST_CONTRADICTED)
        contradictions = values.find_contradictions(self.layout, self.layout.block_slice(block))
        if contradictions:
            raise IntegrityError("; ".join(contradictions))
        return values

    def check_block(self, block: int) -> str | None:
        """What is wrong with a committed block, None if nothing."""
        try:
            self.read_trusted(block)
        except IntegrityError as error:
            return str(error)
        return None

    def read_rows(self) -> CacheRows:
        """Everything into memory; a block that cannot be trusted reads as pending."""
        whole = BlockValues.make_blank(self.layout, self.layout.rows)

        def take(block: int, values: BlockValues) -> None:
            rows = self.layout.block_slice(block)
            for name, vectors in values.pooled.items():
                whole.pooled[name][rows] = vectors
            whole.label_ids[rows], whole.status[rows] = values.label_ids, values.status

        self.scan(take)
        return CacheRows(dict(whole.pooled), whole.label_ids, whole.status)

    def read_status(self, blocks: npt.ArrayLike | None = None) -> UInt8Array:
        """(N,) uint8, the status of `read_rows`, every digest checked with a few blocks in memory at a time.

        Args:
            blocks: ascending numbers of those to look at, None for all; rows of the others are pending.
        """
        status = np.zeros(self.layout.rows, STATUS_DTYPE)

        def take(block: int, values: BlockValues) -> None:
            status[self.layout.block_slice(block)] = values.status

        self.scan(take, blocks)
        return status

    def scan(self, take: Callable[[int, BlockValues], None], blocks: npt.ArrayLike | None = None) -> None:
        """Hand over every block that can be trusted, a few of them in memory at a time.

        A block that is not committed, cannot be read or contradicts its commit is passed over.

        Args:
            take: gets a block's number and values, which it must not keep; called from several threads, in any order.
            blocks: ascending numbers of those to read, None for all.
        """
        wanted = np.arange(self.layout.blocks) if blocks is None else np.asarray(blocks, np.intp)
        if not len(wanted):
            return
        span = slice(None) if blocks is None else slice(wanted[0], wanted[-1] + 1)
        commits = self._commits(span)[wanted - wanted[0]]
        digests = {block: commit.tobytes() for block, commit in zip(wanted.tolist(), commits, strict=True)}
        try:
            arrays = {name: self._open(name) for name in (*self.layout.pooling, "label_ids", "status")}
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
        take: Callable[[int, BlockValues], None],
    ) -> None:
        """Read blocks that lie side by side in one go, and give `take` those that agree with their commit."""
        start, stop = self.layout.block_slice(blocks[0]).start, self.layout.block_slice(blocks[-1]).stop
        try:
            values = self._read_values(slice(start, stop), arrays)
        except IntegrityError:
            if len(blocks) > 1:  # a chunk that cannot be read costs its own block alone
                for block in blocks:
                    self._hand_over([block], arrays, digests, take)
            return
        for block in blocks:
            rows = self.layout.block_slice(block)
            part = values.select(slice(rows.start - start, rows.stop - start))
            if part.digest(self.layout.pooling) == digests[block]:
                take(block, part)

    def open_pooled(self, names: Sequence[str]) -> Callable[[int], list[Float16Array]]:
        """What reads one block's vectors, an array per name, any number of times.

        An array's metadata is read now, and not with every block. Nothing is checked against the commit, which covers
        arrays that are not read: compare with what `scan` handed over.

        Raises:
            IntegrityError: an array is missing; and from reading, a chunk is missing, cut or flipped.
        """
        arrays = [self._open(name) for name in names]

        def read(block: int) -> list[Float16Array]:
            return [self._read_from(array, self.layout.block_slice(block)) for array in arrays]

        return read

    def _read_values(self, rows: slice, arrays: Mapping[str, Any] | None = None) -> BlockValues:
        """Values of any rows, from `arrays` by name where they are open already."""
        names = (*self.layout.pooling, "label_ids", "status")
        arrays = arrays or {name: self._open(name) for name in names}
        found = {name: self._read_from(arrays[name], rows) for name in names}
        return BlockValues({name: found[name] for name in self.layout.pooling}, found["label_ids"], found["status"])

    # Commit records and the seal: one that cannot be read is not there, so that the next extraction writes it anew

    @property
    def sealed(self) -> bool:
        return bool(self._read_seal().any())

    def seal(self) -> None:
        """Record that every block is committed; afterwards the version never changes.

        Raises:
            IntegrityError: blocks are still pending.
        """
        pending = int((~self.committed()).sum())
        if pending:
            raise IntegrityError(f"{pending} of {self.layout.blocks} blocks are not committed: nothing to seal")
        with storage_errors(self.url):
            self._array("seal")[:] = np.frombuffer(self._seal_digest(), np.uint8)

    def reopen_blocks(self, blocks: Sequence[int]) -> None:
        """Take back the seal, then the commits of `blocks`, so that the next extraction redoes them."""
        with storage_errors(self.url):
            self._array("seal")[:] = 0
            for block in blocks:
                self._array("commit")[block] = 0

    def check_seal(self) -> bool:
        """Whether the seal is that of the present table and commits."""
        return self._read_seal().tobytes() == self._seal_digest()

    def _seal_digest(self) -> bytes:
        return hashlib.sha256(self.read_table().full_digest() + self._commits().tobytes()).digest()

    def _read_seal(self) -> UInt8Array:
        try:
            return self._read("seal")
        except IntegrityError:
            return np.zeros(DIGEST_BYTES, np.uint8)

    def _commits(self, blocks: slice = slice(None)) -> UInt8Array:
        """(n, 32) uint8 of n blocks side by side, by default all; zeros where there is no record."""
        try:
            return self._read("commit", blocks)
        except IntegrityError:
            numbers = range(self.layout.blocks)[blocks]
            commits = np.zeros((len(numbers), DIGEST_BYTES), np.uint8)
        for i, block in enumerate(numbers):
            try:
                commits[i] = self._read("commit", slice(block, block + 1))[0]
            except IntegrityError:
                continue
        return commits

    # Arrays

    @cached_property
    def _block_arrays(self) -> dict[str, zarr.Array[Any]]:
        """What blocks are written to, opened once: in a bucket each array's metadata is a request."""
        return {name: self._array(name) for name in (*self.layout.pooling, "label_ids", "status", "commit")}

    def _array(self, name: str) -> zarr.Array[Any]:
        array: Any = self.group[name]
        # A chunk equal to the fill value must be written too, and Zarr does not remember that it should.
        return array.with_config({"order": "C", "write_empty_chunks": True})  # type: ignore[no-any-return]

    def _read(self, name: str, rows: slice = slice(None)) -> npt.NDArray[Any]:
        return self._read_from(self._open(name), rows)

    def _open(self, name: str) -> Any:
        """An array, to read from any number of times."""
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
            # Zarr raises ValueError for a wrong checksum or length of a chunk, KeyError where there is no array, and
            # either of them on broken metadata.
            except (ValueError, KeyError) as error:
                raise IntegrityError(f"array {name} cannot be read ({error})") from error


def _read_attributes(group: zarr.Group, url: str) -> dict[str, Any]:
    """What `create_arrays` wrote, refused unless it is of this program's format and whole."""
    attributes: Any = group.attrs.asdict().get(ATTRIBUTE)
    if not isinstance(attributes, dict) or "format" not in attributes:
        raise CacheFormatError(f"{url}/{group.path} is a Zarr group, but not a version of a cache: check CACHE")
    if attributes["format"] != FORMAT_VERSION:
        raise CacheFormatError(
            f"{url}: format {attributes['format']}, this program reads {FORMAT_VERSION}: "
            "update it, or run `make extract` again"
        )
    known = {"format", "rows", "block_rows", "provenance", "recorded"}
    counts = (attributes.get("rows"), attributes.get("block_rows"))
    if set(attributes) != known or not all(type(count) is int and count > 0 for count in counts):
        raise CacheFormatError(
            f"{url}/{group.path}: its attributes are not those of format {FORMAT_VERSION}: it is damaged; "
            "remove it and run `make extract` again"
        )
    return attributes

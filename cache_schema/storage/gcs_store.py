"""A Zarr store in a Google Cloud Storage bucket, for caches at `gs://bucket/prefix`.

It implements zarr.abc.store.Store of Zarr-Python 3.1 (https://zarr.readthedocs.io). The module imports Google's
libraries, so it is imported only when such a URL is opened.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.common import concurrent_map

from .gcs import GcsObjects
from .place import USER, VIEWER, Purpose

_T = TypeVar("_T")
_CONCURRENCY = 32
"""Requests in flight at a time, over all stores of this process."""


class GcsStore(Store):
    """Objects below `gs://bucket/prefix`, as a Zarr v3 store.

    Whole objects are checked against their crc32c in both directions, and sent again if they arrive damaged; ranged
    reads have no checksum. Requests are repeated for 408, 429, 5xx and broken connections until the deadline. The store
    works in any number of threads, and in forked and spawned processes, each of which makes its own client. If
    `STORAGE_EMULATOR_HOST` is set, that server is used, without credentials.

    Raises, from every method that makes a request:
        StorageError: no credentials, no such bucket, access refused, no answer before the deadline, or an object that
            kept arriving damaged.
    """

    supports_writes: bool = True
    supports_deletes: bool = True
    supports_listing: bool = True

    def __init__(self, url: str, *, read_only: bool = False, **deadlines: float) -> None:
        """Make no request yet; for `deadlines` (`deadline_s`, `first_delay_s`) see `GcsObjects`.

        Raises:
            StorageError: not a `gs://` URL, or one without a bucket.
        """
        super().__init__(read_only=read_only)
        self._deadlines = deadlines
        purpose = Purpose(role=VIEWER if read_only else USER)
        self._objects = GcsObjects(url, purpose, concurrency=_CONCURRENCY, **deadlines)
        self.url = self._objects.url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"GcsStore('{self.url}')"

    def __eq__(self, value: object) -> bool:
        return isinstance(value, GcsStore) and self.url == value.url and self.read_only == value.read_only

    def with_read_only(self, read_only: bool = False) -> "GcsStore":
        """Return a store at the same place with another `read_only`, not opened yet."""
        return GcsStore(self.url, read_only=read_only, **self._deadlines)

    async def _open(self) -> None:
        if self._is_open:
            raise ValueError("store is already open")
        await self._ensure_open()

    async def _ensure_open(self) -> None:
        """Check once that the bucket exists and may be listed.

        Unlike the inherited method, it may run in two tasks at the same time.
        """
        if not self._is_open:
            await self._run(self._objects.check_access)
            self._is_open = True

    # Reading

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the object's bytes or a part of them; None if there is no such object."""
        bounds = _to_bounds(byte_range)
        if bounds is None:
            found = await self._call(self._objects.read, key)
            data = found.data if found else None
        else:
            data = await self._call(self._objects.read_range, key, *bounds)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read several objects concurrently; the results are in the order of the requests."""
        requests = [(key, prototype, byte_range) for key, byte_range in key_ranges]
        return await concurrent_map(requests, self.get, limit=_CONCURRENCY)

    async def exists(self, key: str) -> bool:
        return await self._call(self._objects.size, key) is not None

    async def getsize(self, key: str) -> int:
        """Return the object's size in bytes; raise FileNotFoundError if there is none."""
        size = await self._call(self._objects.size, key)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        return size

    # Writing

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await self._call(self._objects.write, key, _to_bytes(value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await self._call(self._objects.create, key, _to_bytes(value))

    async def delete(self, key: str) -> None:
        self._check_writable()
        await self._call(self._objects.delete, key)

    async def delete_dir(self, prefix: str) -> None:
        """Delete all objects below a folder, or the whole store for ""."""
        self._check_writable()
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        keys = [(key,) async for key in self.list_prefix(folder)]
        await concurrent_map(keys, self.delete, limit=_CONCURRENCY)

    # Listing

    def list(self) -> AsyncIterator[str]:
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for keys in self._stream(self._objects.list_keys(prefix)):
            for key in keys:
                yield key

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self._stream(self._objects.list_dir(prefix))

    async def _stream(self, items: Iterator[_T]) -> AsyncIterator[_T]:
        """Iterate over a blocking iterator, none of whose items is None."""
        while (item := await self._call(next, items, None)) is not None:
            yield item

    async def _call(self, request: Callable[..., _T], *args: Any) -> _T:
        await self._ensure_open()
        return await self._run(request, *args)

    async def _run(self, request: Callable[..., _T], *args: Any) -> _T:
        """Run a blocking request in the connection's threads, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._objects.connection.threads, lambda: request(*args))


def _to_bounds(byte_range: ByteRequest | None) -> tuple[int, int | None] | None:
    """Convert to the first and last byte of an HTTP range, the last inclusive; a negative first counts from the end."""
    match byte_range:
        case None:
            return None
        case RangeByteRequest(start, end):
            if end <= start:
                raise ValueError(f"Unexpected byte_range, got {byte_range}: it holds no byte")
            return start, end - 1
        case OffsetByteRequest(offset):
            return offset, None
        case SuffixByteRequest(suffix):
            return -suffix, None
    raise ValueError(f"Unexpected byte_range, got {byte_range}")


def _to_bytes(value: Buffer) -> bytes:
    if not isinstance(value, Buffer):
        raise TypeError(f"a store holds Buffers, not {type(value).__name__}")
    return value.to_bytes()

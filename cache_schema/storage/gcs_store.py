"""A Zarr store in a Google Cloud Storage bucket, for caches at `gs://bucket/prefix`.

Written against zarr.abc.store.Store of Zarr-Python 3.1 (https://zarr.readthedocs.io). It is imported when such a URL is
opened, and Google's libraries with it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.common import concurrent_map

from .gcs import GcsObjects

_T = TypeVar("_T")


class GcsStore(Store):
    """Objects below `gs://bucket/prefix`, as a Zarr v3 store.

    Every whole object is checked against its crc32c in both directions, and sent again when it arrives damaged; ranged
    reads carry no checksum. Requests are repeated for 408, 429, 5xx and broken connections until the deadline. Works in
    forked and spawned processes, which each make a client of their own, and in any number of threads. With
    `STORAGE_EMULATOR_HOST` set, the server there is used, without credentials.

    Raises, from every method that makes a request:
        StorageError: no credentials, no such bucket, access refused, no answer before the deadline, or an object that
            kept arriving damaged.
    """

    supports_writes: bool = True
    supports_deletes: bool = True
    supports_listing: bool = True

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        concurrency: int = 32,
        deadline_s: float = 120.0,
        first_delay_s: float = 1.0,
    ) -> None:
        """Make no request yet.

        Args:
            url: `gs://bucket` or `gs://bucket/prefix`.
            read_only: refuse to write and delete.
            concurrency: requests in flight at a time, over all stores of this process with the same number.
            deadline_s, first_delay_s: see `GcsObjects`.

        Raises:
            StorageError: not a `gs://` URL, or one without a bucket.
        """
        super().__init__(read_only=read_only)
        self._concurrency, self._deadline_s, self._first_delay_s = concurrency, deadline_s, first_delay_s
        self._objects = GcsObjects(
            url,
            concurrency=concurrency,
            deadline_s=deadline_s,
            first_delay_s=first_delay_s,
            role="Storage Object Viewer" if read_only else "Storage Object User",
        )

    @property
    def url(self) -> str:
        """`gs://bucket/prefix`, without a slash at the end."""
        return self._objects.url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"GcsStore('{self.url}')"

    def __eq__(self, value: object) -> bool:
        return isinstance(value, GcsStore) and self.url == value.url and self.read_only == value.read_only

    def with_read_only(self, read_only: bool = False) -> "GcsStore":
        """The same place with another `read_only`, not opened yet."""
        return GcsStore(
            self.url,
            read_only=read_only,
            concurrency=self._concurrency,
            deadline_s=self._deadline_s,
            first_delay_s=self._first_delay_s,
        )

    async def _open(self) -> None:
        if self._is_open:
            raise ValueError("store is already open")
        await self._ensure_open()

    async def _ensure_open(self) -> None:
        """Check once that the bucket is there and may be listed: later, its absence looks like that of an object.

        Unlike the inherited method, two tasks may get here together.
        """
        if not self._is_open:
            await self._call(self._objects.check_access)
            self._is_open = True

    # Reading

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object's bytes, or part of them; None when there is no such object."""
        bounds = _to_bounds(byte_range)
        await self._ensure_open()
        if bounds is None:
            found = await self._call(self._objects.download, key)
            data = found[0] if found else None
        else:
            data = await self._call(self._objects.download_range, key, *bounds)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several reads at once, in the order asked for."""
        requests = [(key, prototype, byte_range) for key, byte_range in key_ranges]
        return await concurrent_map(requests, self.get, limit=self._concurrency)

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        await self._ensure_open()
        return await self._call(self._objects.size, key) is not None

    async def getsize(self, key: str) -> int:
        """The object's size in bytes; FileNotFoundError when there is none."""
        await self._ensure_open()
        size = await self._call(self._objects.size, key)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        return size

    # Writing

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, over an older one if there is one; readers see the one or the other, never a part."""
        self._check_writable()
        data = _to_bytes(value)
        await self._ensure_open()
        await self._call(self._objects.upload, key, data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless there is one."""
        await self.create(key, value)

    async def create(self, key: str, value: Buffer) -> bool:
        """Write an object unless there is one; among any number of writers of different bytes exactly one gets True.

        Returns:
            Whether the object holds these bytes. A write whose acknowledgement was lost is refused when repeated, so
            what is stored decides: put something of the caller's own, such as a random id, into the value.
        """
        self._check_writable()
        data = _to_bytes(value)
        await self._ensure_open()
        return await self._call(self._objects.create, key, data)

    async def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        self._check_writable()
        await self._ensure_open()
        await self._call(self._objects.delete, key)

    async def delete_dir(self, prefix: str) -> None:
        """Remove every object below a folder, or the whole store for ""."""
        self._check_writable()
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        keys = [(key,) async for key in self.list_prefix(folder)]
        await concurrent_map(keys, self.delete, limit=self._concurrency)

    # Listing

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin with `prefix`, whole."""
        async for names in self._stream(self._objects.list_pages(self._objects.name(prefix))):
            for name in names:
                yield name[len(self._objects.name("")) :]

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names of objects and folders directly below a folder, without slashes."""
        async for name in self._stream(self._objects.list_dir(prefix)):
            yield name

    async def _stream(self, items: Iterator[_T]) -> AsyncIterator[_T]:
        """What a blocking iterator gives; none of it is None."""
        await self._ensure_open()
        while (item := await self._call(next, items, None)) is not None:
            yield item

    async def _call(self, request: Callable[..., _T], *args: Any) -> _T:
        """Run a blocking request in the connection's threads, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._objects.connection.threads, lambda: request(*args))


def _to_bounds(byte_range: ByteRequest | None) -> tuple[int, int | None] | None:
    """First and last byte as an HTTP range has them, the last inclusive; a negative first counts from the end."""
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

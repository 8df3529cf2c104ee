"""A Zarr store in a Google Cloud Storage bucket, for caches at `gs://bucket/prefix`.

Written against zarr.abc.store.Store of Zarr-Python 3.1 (https://zarr.readthedocs.io) and google-cloud-storage 3. Only
this module and gcs_client.py import Google's libraries, and they are imported when such a URL is opened.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import google_crc32c
from google.api_core.exceptions import BadRequest, NotFound, PreconditionFailed, RequestRangeNotSatisfiable
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import ChunkedEncodingError
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.common import concurrent_map

from .errors import StorageError
from .gcs_client import AGAIN, GCS_ERRORS, connect, explain_gcs_error

_T = TypeVar("_T")

_REQUEST_TIMEOUT_S = (10.0, 60.0)  # to connect, and between two packets
_TRANSFER_ATTEMPTS = 10  # of a body that arrives damaged; at 3 damaged bodies in 10, all of them fail 1 time in 170,000
_TRANSFER_PAUSE_S = 0.2


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
        setting: str = "CACHE",
        again: str = AGAIN,
    ) -> None:
        """Make no request yet.

        Args:
            url: `gs://bucket` or `gs://bucket/prefix`.
            read_only: refuse to write and delete.
            concurrency: requests in flight at a time, over all stores of this process with the same number.
            deadline_s: seconds after which a request that keeps failing is given up.
            first_delay_s: longest pause before the first repetition, in seconds; it doubles up to a minute.
            setting: the variable that names it, for messages.
            again: what is not lost, and how to go on, for messages.

        Raises:
            StorageError: not a `gs://` URL, or one without a bucket.
        """
        super().__init__(read_only=read_only)
        scheme, _, path = url.partition("://")
        self._bucket, _, prefix = path.partition("/")
        self._prefix = prefix.strip("/")
        if scheme != "gs" or len(self._bucket) < 3:
            raise StorageError(f"{url} names no bucket: write gs://bucket/prefix")
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._first_delay_s = first_delay_s
        self._setting = setting
        self._again = again

    @property
    def url(self) -> str:
        """`gs://bucket/prefix`, without a slash at the end."""
        return f"gs://{self._bucket}/{self._prefix}".rstrip("/")

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
            setting=self._setting,
            again=self._again,
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
            await self._call(self._first_name)
            self._is_open = True

    # Reading

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object's bytes, or part of them; None when there is no such object."""
        bounds = _to_bounds(byte_range)
        await self._ensure_open()
        if bounds is None:
            found = await self._call(self._download, key)
            data = found[0] if found else None
        else:
            data = await self._call(self._download_range, key, *bounds)
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
        return await self._call(self._size, key) is not None

    async def getsize(self, key: str) -> int:
        """The object's size in bytes; FileNotFoundError when there is none."""
        await self._ensure_open()
        size = await self._call(self._size, key)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        return size

    # Writing

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, over an older one if there is one; readers see the one or the other, never a part."""
        self._check_writable()
        data = _to_bytes(value)
        await self._ensure_open()
        await self._call(self._upload, key, data, None)

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
        return await self._call(self._create, key, data)

    async def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        self._check_writable()
        await self._ensure_open()
        await self._call(self._delete, key)

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
        async for name in self._list_names(self._name(prefix), None):
            yield name[len(self._name("")) :]

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names of objects and folders directly below a folder, without slashes."""
        folder = self._name(f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else "")
        async for name in self._list_names(folder, "/"):
            child = name[len(folder) :].rstrip("/")
            if child:  # not the placeholder that consoles make for a folder
                yield child

    async def measure_dir(self, prefix: str) -> tuple[int, float]:
        """Bytes of all objects below a folder, and when the newest was written (seconds since 1970; 0 for none)."""
        await self._ensure_open()
        return await self._call(self._measure, self._name(f"{prefix.rstrip('/')}/"))

    async def _list_names(self, prefix: str, delimiter: str | None) -> AsyncIterator[str]:
        await self._ensure_open()
        pages = await self._call(self._list_pages, prefix, delimiter)
        while (page := await self._call(next, pages, None)) is not None:
            for blob in page:
                yield blob.name
            for folder in page.prefixes:
                yield folder

    # One object compared and swapped. These block, in the caller's own thread: an interpreter that ends waits for the
    # connection's threads, and must not wait for a heartbeat.

    def read_generation(self, key: str) -> tuple[bytes, int] | None:
        """The object's bytes and their generation; None when there is no such object."""
        with self._errors():
            return self._download(key)

    def replace_generation(self, key: str, data: bytes, generation: int) -> int | None:
        """Write an object over one generation of it alone (0: where there is none).

        Returns:
            The new generation; None when another was there, or when this very write was refused on its repetition
            after its acknowledgement was lost: what is there now tells.
        """
        self._check_writable()
        with self._errors():
            try:
                return self._upload(key, data, generation)
            except PreconditionFailed:
                return None

    def delete_generation(self, key: str, generation: int) -> None:
        """Remove one generation of an object, if it is the one that is there."""
        self._check_writable()
        with self._errors(), suppress(NotFound, PreconditionFailed):
            self._blob(key).delete(if_generation_match=generation, **self._options())

    # Blocking requests; they run in the connection's threads

    async def _call(self, request: Callable[..., _T], *args: Any) -> _T:
        """Run a blocking request off the event loop, and explain what goes wrong with it."""
        loop = asyncio.get_running_loop()
        with self._errors():
            return await loop.run_in_executor(connect(self._concurrency).threads, lambda: request(*args))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except GCS_ERRORS as error:
            role = "Storage Object Viewer" if self.read_only else "Storage Object User"
            explained = explain_gcs_error(error, self.url, setting=self._setting, role=role, again=self._again)
            raise StorageError(explained) from error

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _open_bucket(self) -> Any:
        return connect(self._concurrency).client().bucket(self._bucket)

    def _blob(self, key: str) -> Any:
        return self._open_bucket().blob(self._name(key))

    def _options(self) -> dict[str, Any]:
        retry = DEFAULT_RETRY.with_timeout(self._deadline_s).with_delay(initial=self._first_delay_s)
        return {"retry": retry, "timeout": _REQUEST_TIMEOUT_S}

    def _first_name(self) -> None:
        # Listing needs no right beyond what a cache needs anyway; asking for the bucket itself would.
        next(iter(self._open_bucket().list_blobs(max_results=1, fields="items(name)", **self._options())), None)

    def _download(self, key: str) -> tuple[bytes, int] | None:
        """The object's bytes and their generation."""
        for _ in range(_TRANSFER_ATTEMPTS):
            blob = self._blob(key)
            try:
                data = bytes(blob.download_as_bytes(raw_download=True, checksum="crc32c", **self._options()))
                if blob.crc32c is None or blob.generation is None:  # without a hash the library checked nothing
                    blob.reload(**self._options())
            except NotFound:
                return None
            except (DataCorruption, ChunkedEncodingError):
                pass  # unlike other faults of the transport, these are not repeated by the library
            else:
                if blob.crc32c == _compute_crc32c(data):
                    return data, blob.generation
            time.sleep(_TRANSFER_PAUSE_S)
        raise StorageError(self._describe_damage(key))

    def _download_range(self, key: str, start: int, last: int | None) -> bytes | None:
        blob = self._blob(key)
        try:
            return bytes(
                blob.download_as_bytes(start=start, end=last, raw_download=True, checksum=None, **self._options())
            )
        except NotFound:
            return None
        except RequestRangeNotSatisfiable:
            return b""  # begins behind the end; the stores that come with Zarr answer the same

    def _size(self, key: str) -> int | None:
        blob = self._blob(key)
        try:
            blob.reload(**self._options())
        except NotFound:
            return None
        return int(blob.size)

    def _upload(self, key: str, data: bytes, generation: int | None) -> int:
        """Write, over the given generation only if there is one (0: no object); returns the new generation."""
        crc32c = _compute_crc32c(data)
        for _ in range(_TRANSFER_ATTEMPTS):
            blob = self._blob(key)
            try:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    checksum="crc32c",
                    if_generation_match=generation,
                    **self._options(),
                )
            except DataCorruption:
                pass
            except BadRequest as error:
                if "crc32c" not in str(error).lower():
                    raise
            else:
                if blob.crc32c == crc32c:
                    return int(blob.generation)
                if generation is not None:
                    generation = blob.generation  # a server that does not check kept it: replace that, nothing else
            time.sleep(_TRANSFER_PAUSE_S)
        raise StorageError(self._describe_damage(key))

    def _create(self, key: str, data: bytes) -> bool:
        try:
            self._upload(key, data, 0)
        except PreconditionFailed:
            found = self._download(key)
            return found is not None and found[0] == data
        return True

    def _delete(self, key: str) -> None:
        with suppress(NotFound):  # also the answer to a repeated request whose first acknowledgement was lost
            self._blob(key).delete(**self._options())

    def _list_pages(self, prefix: str, delimiter: str | None) -> Any:
        fields = "items(name),prefixes,nextPageToken"
        blobs = self._open_bucket().list_blobs(prefix=prefix, delimiter=delimiter, fields=fields, **self._options())
        return blobs.pages

    def _measure(self, prefix: str) -> tuple[int, float]:
        fields = "items(name,size,updated),nextPageToken"
        size, newest = 0, 0.0
        for blob in self._open_bucket().list_blobs(prefix=prefix, fields=fields, **self._options()):
            size, newest = size + blob.size, max(newest, blob.updated.timestamp())
        return size, newest

    # Messages

    def _describe_damage(self, key: str) -> str:
        return (
            f"{self.url}/{key} arrived damaged {_TRANSFER_ATTEMPTS} times (its crc32c does not match): "
            f"check proxies and the network between here and the bucket; {self._again}"
        )


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


def _compute_crc32c(data: bytes) -> str:
    """As GCS writes it: base64 of four big-endian bytes."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()

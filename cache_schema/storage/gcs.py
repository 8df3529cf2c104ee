"""Objects of a Google Cloud Storage bucket, whole and checked against their crc32c.

Every method blocks the caller's thread, and repeats requests for 408, 429, 5xx and broken connections until the
deadline.
"""

import base64
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from threading import Lock
from typing import Any

import google_crc32c
from google.api_core.exceptions import (
    BadRequest,
    Forbidden,
    GoogleAPICallError,
    GoogleAPIError,
    NotFound,
    PreconditionFailed,
    RequestRangeNotSatisfiable,
    Unauthorized,
)
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud.storage import Client
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, RequestException

from cache_schema.errors import StorageError

from .place import CACHE, Purpose, Stored, is_bucket, split_url

GCS_ERRORS = (GoogleAPIError, GoogleAuthError, RequestException, ConnectionError)
"""Errors of a request for reasons outside this program."""

_REQUEST_TIMEOUT_S = (10.0, 60.0)  # to connect, and between two packets
_TRANSFER_ATTEMPTS = 10  # if 3 bodies in 10 arrive damaged, all attempts fail 1 time in 170,000
_TRANSFER_PAUSE_S = 0.2


class GcsConnection:
    """A client, and threads that wait for its answers."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._client: Any = None
        self._lock = Lock()
        self.threads = ThreadPoolExecutor(concurrency, thread_name_prefix="gcs")

    def client(self) -> Any:
        """Return the client, made on first use: the search for credentials takes time and may fail."""
        with self._lock:
            if self._client is None:
                self._client = _make_client(self._concurrency)
            return self._client


# Keyed by process: a forked child must not use the sockets, locks and threads of its parent, so it makes its own. It
# leaves the parent's entry alone, since closing that could disturb the parent's connections.
_connections: dict[tuple[int, str, int], GcsConnection] = {}


def connect(concurrency: int) -> GcsConnection:
    """Return this process's connection, with at most that many requests in flight; no request is made yet.

    `setdefault` needs no lock, which could be held forever in a forked child.
    """
    key = (os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST", ""), concurrency)
    return _connections.get(key) or _connections.setdefault(key, GcsConnection(concurrency))


def _make_client(concurrency: int) -> Any:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        # With other credentials the client would ask the metadata server of a cloud machine.
        client = Client(project=None, credentials=AnonymousCredentials())
    else:
        client = Client(project=None)
    adapter = HTTPAdapter(pool_connections=concurrency, pool_maxsize=concurrency)  # the default is 10
    for scheme in ("https://", "http://"):
        client._http.mount(scheme, adapter)
    return client


def explain_gcs_error(error: Exception, url: str, purpose: Purpose) -> str:
    """Say what one of `GCS_ERRORS` means and what to do, without its own text, which may quote a key."""
    if isinstance(error, DefaultCredentialsError):
        return (
            f"no Google credentials for {url}: run `gcloud auth application-default login`, "
            "or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )
    if isinstance(error, (Forbidden, Unauthorized)):
        return f"access to {url} refused ({error.code}): give the account the role {purpose.role} on the bucket"
    if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
        login = "run `gcloud auth application-default login`"
        return f"Google credentials were not accepted for {url}: {login}; {purpose.again}"
    if isinstance(error, NotFound):
        return f"no bucket {split_url(url)[0]} for {url}: check the name in {purpose.setting}"
    code = f" {error.code}" if isinstance(error, GoogleAPICallError) else ""
    return f"{url} kept failing ({type(error).__name__}{code}): check the network; {purpose.again}"


class GcsObjects:
    """The `Objects` below `gs://bucket/prefix`, and requests that only a bucket answers.

    Raises, from every method:
        StorageError: no credentials, no such bucket, access refused, no answer before the deadline, or an object that
            kept arriving damaged.
    """

    def __init__(
        self,
        url: str,
        purpose: Purpose = CACHE,
        *,
        concurrency: int = 32,
        deadline_s: float = 120.0,
        first_delay_s: float = 1.0,
    ) -> None:
        """Make no request yet.

        Args:
            url: `gs://bucket` or `gs://bucket/prefix`.
            purpose: what it is used for, for error messages.
            concurrency: requests in flight at a time, over all objects of this process with the same number.
            deadline_s: seconds after which a request that keeps failing is given up.
            first_delay_s: longest pause before the first repetition, in seconds; it doubles up to a minute.

        Raises:
            StorageError: not a `gs://` URL, or one without a bucket.
        """
        self.bucket, *folders = split_url(url)
        self._prefix = "/".join(folders).strip("/")
        if not is_bucket(url) or len(self.bucket) < 3:
            raise StorageError(f"{url} names no bucket: write gs://bucket/prefix")
        self._purpose = purpose
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._first_delay_s = first_delay_s
        self.url = f"gs://{self.bucket}/{self._prefix}".rstrip("/")

    @property
    def connection(self) -> GcsConnection:
        """The client and threads of this process."""
        return connect(self._concurrency)

    def name(self, key: str) -> str:
        """Return the name of an object in the bucket."""
        return f"{self._prefix}/{key}" if self._prefix else key

    # Reading

    def check_access(self) -> None:
        """Check that the bucket exists and may be listed; later, a missing bucket looks like a missing object."""
        # Listing needs the same role as reading; a request for the bucket itself would need more.
        with self._errors():
            next(iter(self._open_bucket().list_blobs(max_results=1, fields="items(name)", **self._options())), None)

    def read(self, key: str, generation: int | None = None) -> Stored | None:
        """Return the object's bytes, of the newest generation or the given one; None if there is no such object."""
        with self._errors():
            for _ in range(_TRANSFER_ATTEMPTS):
                blob = self._blob(key, generation)
                try:
                    data = bytes(blob.download_as_bytes(raw_download=True, checksum="crc32c", **self._options()))
                    if blob.crc32c is None or blob.generation is None:  # without a hash the library checked nothing
                        blob.reload(**self._options())
                except NotFound:
                    return None
                except (DataCorruption, ChunkedEncodingError):
                    pass  # unlike other network errors, the library does not repeat these
                else:
                    if blob.crc32c == _compute_crc32c(data):
                        return Stored(data, int(blob.generation))
                time.sleep(_TRANSFER_PAUSE_S)
        raise StorageError(self._describe_damage(key))

    def read_range(self, key: str, start: int, last: int | None) -> bytes | None:
        """Read bytes `start` (negative: from the end) to `last`, inclusive, unchecked; None if there is no object."""
        with self._errors():
            blob, span = self._blob(key), {"start": start, "end": last}
            try:
                return bytes(blob.download_as_bytes(**span, raw_download=True, checksum=None, **self._options()))
            except NotFound:
                return None
            except RequestRangeNotSatisfiable:
                return b""  # the range begins after the end; Zarr's own stores return the same

    def size(self, key: str) -> int | None:
        """Return the bytes of the object; None if there is none."""
        with self._errors(), suppress(NotFound):
            blob = self._blob(key)
            blob.reload(**self._options())
            return int(blob.size)
        return None

    def list_keys(self, prefix: str) -> Iterator[list[str]]:
        """List the objects whose keys begin with `prefix`, page by page."""
        for page in self._list(self.name(prefix), "items(name),nextPageToken"):
            yield [blob.name[len(self.name("")) :] for blob in page]

    def list_items(self, folder: str, fields: str) -> Iterator[list[Mapping[str, str]]]:
        """List all objects below a folder, or below the whole place for "", page by page.

        Args:
            folder: without a slash at the end.
            fields: comma-separated fields of the JSON API's object resource; a `Blob` with all of them would take three
                times as long.
        """
        prefix = self.name(f"{folder}/" if folder else "")
        for page in self._list(prefix, f"items({fields}),nextPageToken"):
            yield page.raw_page.get("items", [])

    def list_dir(self, folder: str = "") -> Iterator[str]:
        prefix = self.name(f"{folder.rstrip('/')}/" if folder.rstrip("/") else "")
        for page in self._list(prefix, "items(name),prefixes,nextPageToken", "/"):
            names = [blob.name for blob in page] + list(page.prefixes)
            # An empty name is the placeholder that consoles make for a folder.
            yield from filter(None, (name[len(prefix) :].rstrip("/") for name in names))

    def find(self, name: str) -> Iterator[str]:
        for keys in self.list_keys(""):
            yield from (key for key in keys if key.rpartition("/")[2] == name)

    def measure_dir(self, folder: str) -> tuple[int, float]:
        size, newest = 0, 0.0
        for page in self.list_items(folder, "size,updated"):
            size += sum(int(item["size"]) for item in page)
            newest = max([newest, *(datetime.fromisoformat(item["updated"]).timestamp() for item in page)])
        return size, newest

    def _list(self, prefix: str, fields: str, delimiter: str | None = None) -> Iterator[Any]:
        with self._errors():
            bucket = self._open_bucket()
            yield from bucket.list_blobs(prefix=prefix, delimiter=delimiter, fields=fields, **self._options()).pages

    # Writing

    def write(self, key: str, data: bytes) -> None:
        with self._errors():
            self._upload(key, data, None)

    def create(self, key: str, data: bytes) -> bool:
        # A write whose acknowledgement was lost is refused when it is repeated, so the stored bytes decide.
        if self.replace(key, data, None) is not None:
            return True
        found = self.read(key)
        return found is not None and found.data == data

    def replace(self, key: str, data: bytes, over: Stored | None) -> Stored | None:
        with self._errors():
            try:
                return Stored(data, self._upload(key, data, over.generation if over else 0))
            except PreconditionFailed:
                return None

    def delete(self, key: str, over: Stored | None = None) -> None:
        generation = over.generation if over else None
        # A repeated request whose first acknowledgement was lost gets NotFound, too.
        with self._errors(), suppress(NotFound, PreconditionFailed):
            self._blob(key).delete(if_generation_match=generation, **self._options())

    def _upload(self, key: str, data: bytes, generation: int | None) -> int:
        """Write over the given generation only (0: no object; None: any); return the new generation."""
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
                    generation = blob.generation  # the server stored damaged bytes: replace only these
            time.sleep(_TRANSFER_PAUSE_S)
        raise StorageError(self._describe_damage(key))

    def _open_bucket(self) -> Any:
        return self.connection.client().bucket(self.bucket)

    def _blob(self, key: str, generation: int | None = None) -> Any:
        return self._open_bucket().blob(self.name(key), generation=generation)

    def _options(self) -> dict[str, Any]:
        retry = DEFAULT_RETRY.with_timeout(self._deadline_s).with_delay(initial=self._first_delay_s)
        return {"retry": retry, "timeout": _REQUEST_TIMEOUT_S}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of a request into a StorageError that says what to do."""
        try:
            yield
        except GCS_ERRORS as error:
            raise StorageError(explain_gcs_error(error, self.url, self._purpose)) from error

    def _describe_damage(self, key: str) -> str:
        return (
            f"{self.url}/{key} arrived damaged {_TRANSFER_ATTEMPTS} times (its crc32c does not match): "
            f"check proxies and the network between here and the bucket; {self._purpose.again}"
        )


def _compute_crc32c(data: bytes) -> str:
    """Return the crc32c as GCS writes it: base64 of four big-endian bytes."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()

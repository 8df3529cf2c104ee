"""Objects of a Google Cloud Storage bucket, whole and checked: what the Zarr store, owners and runs are written with.

Every method blocks in the caller's thread, repeats requests for 408, 429, 5xx and broken connections until the
deadline, and checks whole objects against their crc32c in both directions.
"""

import base64
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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

GCS_ERRORS = (GoogleAPIError, GoogleAuthError, RequestException, ConnectionError)
"""What a request may raise for reasons outside this program."""

AGAIN = "what is committed stays, and the same command goes on from there"


class GcsConnection:
    """A client and the threads that wait for its answers."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._client: Any = None
        self._lock = Lock()
        self.threads = ThreadPoolExecutor(concurrency, thread_name_prefix="gcs")

    def client(self) -> Any:
        """The client, made on first use: looking for credentials takes time and may fail."""
        with self._lock:
            if self._client is None:
                self._client = _make_client(self._concurrency)
            return self._client


# Keyed by process: a forked child must use neither the sockets nor the locks nor the threads of its parent, so it finds
# nothing under its own id and starts afresh. The parent's entry stays in the child, untouched: closing it there could
# disturb the parent's connections.
_connections: dict[tuple[int, str, int], GcsConnection] = {}


def connect(concurrency: int) -> GcsConnection:
    """This process's connection, with that many requests in flight at most; no request is made yet.

    A lock here could be held forever in a forked child, `setdefault` needs none.
    """
    key = (os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST", ""), concurrency)
    return _connections.get(key) or _connections.setdefault(key, GcsConnection(concurrency))


def _make_client(concurrency: int) -> Any:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        # Otherwise the search for credentials asks the metadata server of a cloud machine.
        client = Client(project=None, credentials=AnonymousCredentials())
    else:
        client = Client(project=None)
    adapter = HTTPAdapter(pool_connections=concurrency, pool_maxsize=concurrency)  # its own default is 10
    for scheme in ("https://", "http://"):
        client._http.mount(scheme, adapter)
    return client


def explain_gcs_error(error: Exception, url: str, *, setting: str, role: str, again: str = AGAIN) -> str:
    """What happened and what to do; never the text of a credentials error, which may quote a key.

    Args:
        error: one of `GCS_ERRORS`.
        url: what was being read or written.
        setting: the variable that names it, `CACHE`, `TILES` or `RUN`.
        role: the role on the bucket that would do.
        again: what is not lost, and how to go on.
    """
    if isinstance(error, DefaultCredentialsError):
        return (
            f"no Google credentials for {url}: run `gcloud auth application-default login`, "
            "or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )
    if isinstance(error, (Forbidden, Unauthorized)):
        return f"access to {url} refused ({error.code}): give the account the role {role} on the bucket"
    if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
        return f"Google credentials were not accepted for {url}: run `gcloud auth application-default login`; {again}"
    if isinstance(error, NotFound):
        bucket = url.removeprefix("gs://").partition("/")[0]
        return f"no bucket {bucket} for {url}: check the name in {setting}"
    code = f" {error.code}" if isinstance(error, GoogleAPICallError) else ""
    return f"{url} kept failing ({type(error).__name__}{code}): check the network; {again}"


_REQUEST_TIMEOUT_S = (10.0, 60.0)  # to connect, and between two packets

_TRANSFER_ATTEMPTS = 10  # of a body that arrives damaged; at 3 damaged bodies in 10, all of them fail 1 time in 170,000

_TRANSFER_PAUSE_S = 0.2


class GcsObjects:
    """Objects below `gs://bucket/prefix`, in any number of threads and processes.

    Raises, from every method:
        StorageError: no credentials, no such bucket, access refused, no answer before the deadline, or an object that
            kept arriving damaged.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 32,
        deadline_s: float = 120.0,
        first_delay_s: float = 1.0,
        setting: str = "CACHE",
        role: str = "Storage Object User",
        again: str = AGAIN,
    ) -> None:
        """Make no request yet.

        Args:
            url: `gs://bucket` or `gs://bucket/prefix`.
            concurrency: requests in flight at a time, over all objects of this process with the same number.
            deadline_s: seconds after which a request that keeps failing is given up.
            first_delay_s: longest pause before the first repetition, in seconds; it doubles up to a minute.
            setting: the variable that names the place, for messages.
            role: on the bucket that would do, for messages.
            again: what is not lost, and how to go on, for messages.

        Raises:
            StorageError: not a `gs://` URL, or one without a bucket.
        """
        scheme, _, path = url.partition("://")
        self._bucket, _, prefix = path.partition("/")
        self._prefix = prefix.strip("/")
        if scheme != "gs" or len(self._bucket) < 3:
            raise StorageError(f"{url} names no bucket: write gs://bucket/prefix")
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._first_delay_s = first_delay_s
        self._setting, self._role, self._again = setting, role, again

    @property
    def url(self) -> str:
        """`gs://bucket/prefix`, without a slash at the end."""
        return f"gs://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def connection(self) -> GcsConnection:
        """This process's client and threads."""
        return connect(self._concurrency)

    def name(self, key: str) -> str:
        """The object's name in the bucket."""
        return f"{self._prefix}/{key}" if self._prefix else key

    # Reading

    def check_access(self) -> None:
        """See that the bucket is there and may be listed: later, its absence looks like that of an object."""
        # Listing needs no right beyond what reading needs anyway; asking for the bucket itself would.
        with self._errors():
            next(iter(self._open_bucket().list_blobs(max_results=1, fields="items(name)", **self._options())), None)

    def download(self, key: str) -> tuple[bytes, int] | None:
        """The object's bytes and their generation; None when there is no such object."""
        with self._errors():
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
                        return data, int(blob.generation)
                time.sleep(_TRANSFER_PAUSE_S)
        raise StorageError(self._describe_damage(key))

    def download_range(self, key: str, start: int, last: int | None) -> bytes | None:
        """Bytes from `start` (negative: from the end) to `last`, inclusive; not checked. None without an object."""
        with self._errors():
            try:
                return bytes(
                    self._blob(key).download_as_bytes(
                        start=start, end=last, raw_download=True, checksum=None, **self._options()
                    )
                )
            except NotFound:
                return None
            except RequestRangeNotSatisfiable:
                return b""  # begins behind the end; the stores that come with Zarr answer the same

    def size(self, key: str) -> int | None:
        """Bytes of the object; None when there is none."""
        blob = self._blob(key)
        with self._errors():
            try:
                blob.reload(**self._options())
            except NotFound:
                return None
        return int(blob.size)

    def list_pages(self, prefix: str, *, folders: bool = False) -> Iterator[list[str]]:
        """Names of the objects that begin with `prefix`, page by page.

        Args:
            prefix: of whole names, see `name`.
            folders: stop at the next slash, and give each folder, its slash included, instead of what is below.
        """
        delimiter = "/" if folders else None
        fields = "items(name),prefixes,nextPageToken"
        with self._errors():
            blobs = self._open_bucket().list_blobs(prefix=prefix, delimiter=delimiter, fields=fields, **self._options())
            for page in blobs.pages:
                yield [blob.name for blob in page] + list(page.prefixes)

    def list_dir(self, folder: str = "") -> Iterator[str]:
        """Names of objects and folders directly below a folder, without slashes."""
        prefix = self.name(f"{folder.rstrip('/')}/" if folder.rstrip("/") else "")
        for page in self.list_pages(prefix, folders=True):
            # An empty one is the placeholder that consoles make for a folder.
            yield from filter(None, (name[len(prefix) :].rstrip("/") for name in page))

    def measure_dir(self, folder: str) -> tuple[int, float]:
        """Bytes of all objects below a folder, and when the newest was written (seconds since 1970; 0 for none)."""
        prefix, fields = self.name(f"{folder.rstrip('/')}/"), "items(name,size,updated),nextPageToken"
        size, newest = 0, 0.0
        with self._errors():
            for blob in self._open_bucket().list_blobs(prefix=prefix, fields=fields, **self._options()):
                size, newest = size + blob.size, max(newest, blob.updated.timestamp())
        return size, newest

    # Writing

    def upload(self, key: str, data: bytes) -> None:
        """Write an object, over an older one if there is one; readers see the one or the other, never a part."""
        with self._errors():
            self._upload(key, data, None)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; among any number of writers of different bytes exactly one gets True.

        Returns:
            Whether the object holds these bytes. A write whose acknowledgement was lost is refused when repeated, so
            what is stored decides: put something of the caller's own, such as a random id, into the value.
        """
        if self.replace(key, data, 0) is not None:
            return True
        found = self.download(key)
        return found is not None and found[0] == data

    def replace(self, key: str, data: bytes, generation: int) -> int | None:
        """Write an object over one generation of it alone (0: where there is none).

        Returns:
            The new generation; None when another was there, or when this very write was refused on its repetition
            after its acknowledgement was lost: what is there now tells.
        """
        with self._errors():
            try:
                return self._upload(key, data, generation)
            except PreconditionFailed:
                return None

    def delete(self, key: str, generation: int | None = None) -> None:
        """Remove an object, or one generation if it is the one that is there; no error when there is none."""
        # A repeated request whose first acknowledgement was lost is told that there is none, too.
        with self._errors(), suppress(NotFound, PreconditionFailed):
            self._blob(key).delete(if_generation_match=generation, **self._options())

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

    def _open_bucket(self) -> Any:
        return self.connection.client().bucket(self._bucket)

    def _blob(self, key: str) -> Any:
        with self._errors():  # looking for credentials may fail
            return self._open_bucket().blob(self.name(key))

    def _options(self) -> dict[str, Any]:
        retry = DEFAULT_RETRY.with_timeout(self._deadline_s).with_delay(initial=self._first_delay_s)
        return {"retry": retry, "timeout": _REQUEST_TIMEOUT_S}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Explain what goes wrong with a request."""
        try:
            yield
        except GCS_ERRORS as error:
            explained = explain_gcs_error(error, self.url, setting=self._setting, role=self._role, again=self._again)
            raise StorageError(explained) from error

    def _describe_damage(self, key: str) -> str:
        return (
            f"{self.url}/{key} arrived damaged {_TRANSFER_ATTEMPTS} times (its crc32c does not match): "
            f"check proxies and the network between here and the bucket; {self._again}"
        )


def _compute_crc32c(data: bytes) -> str:
    """As GCS writes it: base64 of four big-endian bytes."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()

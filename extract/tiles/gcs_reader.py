"""Read a bucket's objects through obstore, whose client is written in Rust, with many requests in flight.

google-cloud-storage spends 1.3 to 2.9 ms of Python per request while it holds the GIL, obstore 0.3 ms without it.
google-cloud-storage still does listing, credentials, and the second read of a body that does not match the listing.
"""

import os
import re
from collections.abc import Callable
from functools import lru_cache
from threading import Condition
from typing import TYPE_CHECKING, TypeVar

import google.auth
import obstore
from google.api_core.exceptions import RetryError
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from obstore.auth.google import GoogleCredentialProvider
from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore

from cache_schema.storage.gcs import explain_gcs_error
from cache_schema.storage.place import VIEWER, Purpose
from extract.errors import SourceError, TileGoneError, TransportError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import GCSCredential, RetryConfig

T = TypeVar("T")

_READ_ONLY = "https://www.googleapis.com/auth/devstorage.read_only"
_DEADLINE_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 20.0
_STATUS = re.compile(r"status code: (\d{3} [\w -]+)")


class RequestGate:
    """Limits the requests in flight: fewer after a refusal, then gradually more, as TCP does (AIMD).

    A refusal halves the limit, once for all requests that were in flight with it; a round of answers adds one.
    """

    def __init__(self, limit: int) -> None:
        self._most = limit
        self._limit = float(limit)
        self._in_flight = 0
        self._cuts = 0
        self._changed = Condition()

    @property
    def limit(self) -> int:
        """The number of requests that may be in flight now."""
        return int(self._limit)

    def run(self, request: Callable[[], T]) -> T:
        """Wait for a free slot, then return the request's result. A `GenericError` counts as a refusal."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
            cuts = self._cuts
        answered = True
        try:
            return request()
        except GenericError:
            answered = False
            raise
        finally:
            with self._changed:
                self._in_flight -= 1
                if answered:
                    self._limit = min(self._most, self._limit + 1 / self._limit)
                elif cuts == self._cuts:
                    self._limit = max(1.0, self._limit / 2)
                    self._cuts += 1
                self._changed.notify_all()


class GcsReader:
    """Reads objects of one bucket; may be shared among threads, not among processes."""

    def __init__(self, bucket: str, concurrency: int) -> None:
        """Find credentials and set up the client, for at most `concurrency` requests in flight; no request is made.

        Raises:
            SourceError: no credentials.
        """
        self._bucket = bucket
        self._gate = RequestGate(concurrency)
        try:
            self._store = _open_store(bucket)
        except GoogleAuthError as error:
            raise SourceError(explain_gcs_error(error, f"gs://{bucket}", Purpose("TILES", VIEWER))) from error

    def read(self, path: str, generation: int) -> bytes:
        """Return the bytes of one object, without checking them.

        Refusals (408, 429, 5xx), resets, time-outs and truncated bodies are retried for two minutes, with jittered
        pauses that double; meanwhile fewer requests are in flight.

        Args:
            path: name of the object in the bucket.
            generation: of the object, 0 for the newest.

        Raises:
            TileGoneError: no such object or generation.
            TransportError: all retries failed.
            SourceError: access refused.
        """
        url = f"gs://{self._bucket}/{path}"
        options: GetOptions = {"version": str(generation)} if generation else {}

        def request() -> bytes:
            return obstore.get(self._store, path, options=options).bytes().to_bytes()

        try:
            try:
                return self._gate.run(request)
            except GenericError:  # built only when needed: setting up a retry takes as long as the request
                retry = Retry(
                    if_exception_type(GenericError),
                    initial=_FIRST_PAUSE_S,
                    maximum=_LONGEST_PAUSE_S,
                    timeout=_DEADLINE_S,
                )
                return retry(self._gate.run)(request)
        except FileNotFoundError as error:
            raise TileGoneError(f"{url} is gone") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise SourceError(
                f"access to {url} refused: give the account the role Storage Object Viewer on the bucket, or run "
                "`gcloud auth application-default login`; committed blocks are kept"
            ) from error
        except RetryError as error:
            # Show the status alone: obstore's text may quote the whole body of the answer.
            status = _STATUS.search(str(error.cause))
            raise TransportError(
                f"{url} kept failing ({status[1].strip() if status else 'no answer'}): check the network; "
                "committed blocks are kept, and the same command continues from there"
            ) from error


def can_name(path: str) -> bool:
    """Return whether obstore can read the path unchanged.

    It refuses `.`, `..`, empty segments and control characters, and drops a slash at either end.
    """
    return path.isprintable() and {"", ".", ".."}.isdisjoint(path.split("/"))


def open_reader(bucket: str, concurrency: int) -> GcsReader:
    """Return this process's reader of a bucket; a forked child gets a new one."""
    return _open_reader(bucket, concurrency, os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST", ""))


@lru_cache(maxsize=8)
def _open_reader(bucket: str, concurrency: int, process: int, emulator: str) -> GcsReader:
    return GcsReader(bucket, concurrency)


def _anonymous_credentials() -> "GCSCredential":
    return {"token": "anonymous", "expires_at": None}


def _open_store(bucket: str) -> GCSStore:
    # Retries inside the client would hide refusals from the gate.
    retries: RetryConfig = {"max_retries": 0}
    # Return compressed objects as they are stored: the listing gives that size and checksum.
    headers = {"Accept-Encoding": "gzip"}
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        return GCSStore(
            bucket,
            config={"base_url": emulator, "skip_signature": True},
            # Without this the client reads GOOGLE_APPLICATION_CREDENTIALS, and fails on file types it does not know.
            credential_provider=_anonymous_credentials,
            client_options={"allow_http": True, "default_headers": headers},
            retry_config=retries,
        )
    credentials, _ = google.auth.default(scopes=[_READ_ONLY])
    return GCSStore(
        bucket,
        credential_provider=GoogleCredentialProvider(credentials),
        client_options={"default_headers": headers},
        retry_config=retries,
    )

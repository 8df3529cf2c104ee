"""What torchrun's restart of the ranks leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_restarted_job_finds_nothing_of_the_attempt_before(tmp_path: Path, python_env: dict[str, str]) -> None:
    """torchrun's store outlives the attempt: a rank that takes a dead peer's address from it ends with an error."""
    script = Path(__file__).with_name("restarted.py")
    launch = ["-m", "extract.launch", "--standalone", "--nproc-per-node=1", "--max-restarts=1", str(script)]
    result = subprocess.run(
        [sys.executable, *launch],
        env=python_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["nothing", "nothing"]

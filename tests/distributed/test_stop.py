"""Rank 0 says what all have done by the time they stop, and so waits for them, but not for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rank_0_stops_last(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "extract.launch", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "tests/distributed/stopping.py", str(tmp_path)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # One that has finished is not waited for either: it waits for rank 0 where no signal reaches it.
    assert json.loads((tmp_path / "seen.json").read_text()) == {"told": True, "done": True, "untold": False}

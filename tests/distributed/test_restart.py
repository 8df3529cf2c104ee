"""What torchrun's restart of the ranks leaves behind, and whom it lets in."""

from __future__ import annotations

import socket
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


def test_a_node_joins_a_job_that_runs(tmp_path: Path, python_env: dict[str, str]) -> None:
    """The first round's node and the newcomer meet in the second: by torchrun alone both wait until they fail."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    conf = "--rdzv-conf=last_call_timeout=1,read_timeout=20"
    command = [sys.executable, "-m", "extract.launch", *meet, "--rdzv-id=joined", conf]
    command.append(str(Path(__file__).with_name("joined.py")))
    with subprocess.Popen(command, env=python_env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout
            assert first.stdout.readline() == "alone\n"
            second = subprocess.run(command, env=python_env, cwd=tmp_path, capture_output=True, timeout=60, check=False)
            assert second.returncode == 0, second.stderr
            assert first.wait(timeout=60) == 0
        finally:
            first.terminate()

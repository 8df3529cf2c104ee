"""Ctrl-C: one line, status 130, and no process left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.caches import fill_cache
from tests.e2e.command_line.commands import LAUNCH
from tests.planted import fresh_seed, plant_tiles
from tests.proxy import Proxy


def find_descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, read_bytes(str(thread)).split())
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def find_fork_servers(pid: int) -> list[int]:
    """The processes that fork feed workers; they have torch to import first."""
    return [child for child in find_descendants(pid) if b"forkserver" in read_bytes(f"/proc/{child}/cmdline")]


def blocks_ctrl_c(pid: int) -> bool:
    (mask,) = re.findall(rb"^SigBlk:\s+(\w+)", read_bytes(f"/proc/{pid}/status"), re.MULTILINE)
    return bool(int(mask, 16) & 1 << signal.SIGINT - 1)


def read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # the process is gone
        return b""


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def slow_cache(bucket: Any, proxy: Proxy) -> Iterator[str]:
    """A cache in a bucket whose every chunk arrives in pieces: to verify it takes seconds."""
    url = f"gs://{bucket.name}/cache"
    fill_cache(url, 256 * 12)
    proxy.choose_fault = lambda path: "slow" if "/c/" in path or "%2Fc%2F" in path else None
    yield url
    proxy.choose_fault = lambda path: None


def test_ctrl_c_is_one_line_and_status_130_and_leaves_nobody(
    made: Path, tmp_path: Path, slow_cache: str, proxy: Proxy, python_env: dict[str, str]
) -> None:
    """The signal goes to every process of the group, as a terminal sends it; all commands at once, to save time, and
    each as soon as it is far enough."""
    cache, many = made / "cache", ("--epochs", 5000, "--device", "cpu")
    big = plant_tiles(tmp_path / "big", per_scene=40, seed=fresh_seed())
    extracting = (
        "extract",
        "run",
        "--tiles",
        big,
        "--backbone",
        made / "checkpoint",
        "--cache",
        "c",
        "--device",
        "cpu",
    )
    commands: dict[str, tuple[tuple[object, ...], Callable[[Path], bool], str]] = {
        "verify": (
            ("cache_schema", "verify", slow_cache),
            lambda place: any("label_ids" in path and "zarr.json" not in path for path in proxy.asked),
            "stopped by SIGINT",
        ),
        "extract": (
            (*LAUNCH, 1, "-m", *extracting, "--image-size", 512, "--precision", "float32", "--workers", 1),
            lambda place: bool(find_fork_servers(started["extract"].pid)),
            r"stopped by SIGINT: \d of 2 blocks of c are committed; the same command continues from there",
        ),
        "head": (
            ("train", "head", "--cache", cache, *many),
            lambda place: (place / "runs/head/last").exists(),
            r"stopped by SIGINT: \d+ of 5000 epochs of runs/head-001 are saved; --resume continues from there",
        ),
        "finetune": (
            ("train", "finetune", "--cache", cache, *many, "--workers", 1),
            lambda place: (place / "runs/finetune/last").exists(),
            r"stopped by SIGINT: \d+ of 5000 epochs.* of runs/finetune-001 are saved; --resume continues from there",
        ),
    }
    proxy.asked.clear()
    started: dict[str, subprocess.Popen[str]] = {}

    def is_ready(name: str) -> bool:
        return commands[name][1](tmp_path / name) or started[name].poll() is not None

    for name, (arguments, _, _) in commands.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", *map(str, arguments)]
        started[name] = subprocess.Popen(
            command,
            cwd=tmp_path / name,
            env={**python_env, "STORAGE_EMULATOR_HOST": proxy.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        waiting = list(commands)
        while waiting:
            wait_for(lambda: any(map(is_ready, waiting)))
            name = next(filter(is_ready, waiting))
            waiting.remove(name)
            process, line = started[name], commands[name][2]
            family = find_descendants(process.pid)
            assert all(map(blocks_ctrl_c, find_fork_servers(process.pid))), name
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 130, f"{name}: {err}"
            assert "Traceback" not in err, f"{name}: {err}"
            said = [part for part in re.split(r"[\r\n]", err) if part.startswith(("stopped", "error"))]
            assert len(said) == 1, f"{name}: {err}"
            assert re.fullmatch(line, said[0]), said
            wait_for(lambda: all(map(is_gone, family)))  # noqa: B023
    finally:
        for process in started.values():
            for pid in find_descendants(process.pid):
                if not is_gone(pid):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.communicate()


def test_ctrl_c_while_torch_is_imported_is_one_line_too(tmp_path: Path, python_env: dict[str, str]) -> None:
    """A module that stands for torch interrupts its own import."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    env = python_env | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{python_env['PYTHONPATH']}"}
    for module in ("extract", "extract.launch", "train"):
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n"), module

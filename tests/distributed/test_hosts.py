"""Jobs on several hosts, by the command lines a user types: what they leave, and what a host that is lost costs.

Every host has its own working directory, checkpoint and `runs/`; they share a bucket alone. What is compared with was
made by one process, from the same bucket.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache_schema.__main__ import run as run_cache_command_line
from extract.demo.server import find_server_binary, import_directory, make_server_command, serve_bucket
from tests.checkpoints import make_checkpoint
from tests.hosts import SWITCH, Host, find_obstacle, join_hosts
from tests.planted import extract_cache, fresh_seed, plant_tiles, run_here
from tests.planted import train as run_train

ROOT = Path(__file__).parents[2]
BUCKET = "between-hosts"
PORT = 4443
SERVER = f"{SWITCH}:{PORT}"
TIMEOUT_S = 150
LISTENING, CONNECTED = "0A", "01"  # as the kernel writes them
SILENCE_S = 6
"""Enough for a rank that is only slow, on a machine with other work to do."""
SCENES, PER_SCENE, BLOCK = 16, 56, 256
TILES = SCENES * PER_SCENE
EXTRACT = "--batch-size 8 --workers 0 --precision float32 --device cpu"
TRAIN = ("--epochs", 3, "--batch-size", 64, "--dropout", 0, "--no-amp", "--device", "cpu")
UNFREEZE = 1

pytestmark = pytest.mark.skipif(find_server_binary() is None, reason="no server for this platform")


@dataclass(frozen=True)
class Made:
    """What one process has made.

    Attributes:
        objects: the bucket on disk, where every object is a file of its name.
        cache: of all tiles, in the bucket.
        backbone: a checkpoint.
        runs: a directory with `head`, trained on that cache, and `finetune`, which began with it.
    """

    objects: Path
    cache: str
    backbone: Path
    runs: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    root, seed = tmp_path_factory.mktemp("hosts"), fresh_seed()
    plant_tiles(root / "seed" / "tiles", scenes=SCENES, per_scene=PER_SCENE, seed=seed, size=32)
    backbone = make_checkpoint(root / "backbone", seed=seed, image_size=32)
    log, cache = root / "server.log", f"gs://{BUCKET}/cache/one"
    with serve_bucket(root / "seed", log=log, bucket=BUCKET) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.chdir(root)  # the cache names the backbone as it was named here, and every host has one by that name
        extract_cache(f"gs://{BUCKET}/tiles", cache, Path("backbone"), batch_size=8)
        for command, options in (("head", ()), ("finetune", ("--unfreeze", UNFREEZE, "--workers", 0))):
            result = run_train(root, command, "--cache", cache, *TRAIN, *options)
            assert result.status == 0, result.err
        yield Made(import_directory(root / "seed", BUCKET, log=log) / BUCKET, cache, backbone, root / "runs")


class Site:
    """Some hosts beside a bucket's server, and the processes on them."""

    def __init__(self, made: Made, folder: Path, nodes: Sequence[Host]) -> None:
        self.nodes, self._folder = nodes, folder
        for node in nodes:
            shutil.copytree(made.backbone, self.find(node) / "backbone")

    def find(self, node: Host, name: str = "") -> Path:
        """A file in a host's working directory."""
        return self._folder / node.name / name

    def start(self, target: str, nnodes: str, **variables: object) -> dict[Host, subprocess.Popen[str]]:
        """`make TARGET` on as many hosts as may join, the first being node 0."""
        told = {"NNODES": nnodes, "RDZV": "node0:29400", "NPROC": 1, "PEER_TIMEOUT": SILENCE_S}
        told |= {"VENV": "", "PYTHON": sys.executable, "LOGS": "logs"} | variables
        env = {**os.environ, "STORAGE_EMULATOR_HOST": f"http://{SERVER}", "PYTHONPATH": str(ROOT)}
        started = {}
        for rank, node in enumerate(self.nodes[: int(nnodes.rpartition(":")[2])]):
            # By rank where all must come; where they may come and go, RDZV says who is who.
            own = told if ":" in nnodes else {"NODE_RANK": rank, **told}
            command = ["make", "-f", ROOT / "Makefile", target, *(f"{name}={value}" for name, value in own.items())]
            with self.find(node, f"{target}.log").open("w") as log:
                started[node] = node.start(
                    command,
                    cwd=self.find(node),
                    env=env | ({"PET_RDZV_CONF": "last_call_timeout=8"} if ":" in nnodes else {}),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        return started

    def run(self, target: str, nnodes: str, **variables: object) -> str:
        """The same to a good end on every host; returns what node 0 said."""
        for node, process in self.start(target, nnodes, **variables).items():
            assert process.wait(timeout=TIMEOUT_S) == 0, self.read_log(node, target)
        return self.read_log(self.nodes[0], target)

    def read_log(self, node: Host, target: str) -> str:
        text = self.find(node, f"{target}.log").read_text()
        assert "Traceback" not in text, text
        assert "frame #" not in text, text
        return text


@contextmanager
def open_site(made: Made, folder: Path, count: int) -> Iterator[Site]:
    with join_hosts(count) as (*nodes, switch), (folder / "server.log").open("w") as log:
        serve = [*make_server_command(SERVER), "-backend", "filesystem", "-filesystem-root", made.objects.parent]
        server = switch.start(serve, cwd=folder, env=os.environ, stdout=log, stderr=subprocess.STDOUT)
        wait_until(lambda: has_socket(switch, LISTENING), server)
        yield Site(made, folder, nodes)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_socket(host: Host, state: str) -> bool:
    """Whether a host has a TCP socket in that state which the bucket's server is one end of."""
    lines = [line.split() for line in Path(f"/proc/{host.first}/net/tcp").read_text().splitlines()]
    return any(f":{PORT:04X}" in local + remote and found == state for _, local, remote, found, *_ in lines)


def list_blocks(made: Made, cache: str) -> dict[str, list[int]]:
    """Committed blocks of the one version of a cache: by number, the times of change of their chunks."""
    arrays = ("cls/c/{}/0", "patch_mean/c/{}/0", "label_ids/c/{}/0", "status/c/{}", "commit/c/{}/0")
    # Commits are listed first: what belongs to one was there before it.
    commits = list((made.objects / "cache" / cache).glob("*.zarr/commit/c/*/0"))
    return {
        block: [(commit.parents[3] / array.format(block)).stat().st_mtime_ns for array in arrays]
        for commit in commits
        for block in [commit.parent.name]
    }


def count_to_do(said: str) -> list[int]:
    """What an extraction says at each of its starts."""
    return [int(number.replace(",", "")) for number in re.findall(r"^([\d,]+) to do in ", said, re.MULTILINE)]


def read_cache(made: Made, cache: str) -> Any:
    folder = made.objects / "cache" / cache
    return zarr.open_group(str(folder / f"{read_json(folder / 'current')['version']}.zarr"), mode="r")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_same_cache(made: Made, cache: str) -> None:
    """Sealed, sound by `verify`, every tile in one row, and vectors within 1e-3 of their norm."""
    result = run_here(run_cache_command_line, made.runs, "verify", f"gs://{BUCKET}/cache/{cache}")
    assert result.status == 0, result.out + result.err
    arrays, expected = read_cache(made, cache), read_cache(made, "one")
    assert len(set(arrays["tile"][:].tolist())) == TILES
    for name in ("tile", "status", "label_ids", "crc32c"):
        np.testing.assert_array_equal(arrays[name][:], expected[name][:])
    for name in ("cls", "patch_mean"):
        got, wanted = (group[name][:].astype(np.float64) for group in (arrays, expected))
        distance = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert distance.max() <= 1e-3


def assert_same_run(made: Made, name: str) -> None:
    """A run in the bucket and the same by one process: losses and mAP of every epoch and of the end within 1e-3."""
    run = made.objects / "runs" / f"{name}-001"
    epochs = [
        [json.loads(line) for line in (each / "history.jsonl").read_text().splitlines()]
        for each in (made.runs / name, run)
    ]
    assert [line["epoch"] for line in epochs[1]] == [1, 2, 3]
    for one, several in zip(*epochs, strict=True):
        for figure in ("train_loss", "loss", "map_macro"):
            assert several[figure] == pytest.approx(one[figure], abs=1e-3, rel=1e-3), figure
    metrics = [read_json(each / "metrics.json") for each in (made.runs / name, run)]
    for figure in ("loss", "map_macro", "label_accuracy"):
        assert metrics[1][figure] == pytest.approx(metrics[0][figure], abs=1e-3, rel=1e-3), figure
    assert read_json(run / "split.json") == read_json(made.runs / name / "split.json")


def name_extraction(cache: str) -> Mapping[str, object]:
    return {
        "TILES": f"gs://{BUCKET}/tiles",
        "BACKBONE": "backbone",
        "CACHE": f"gs://{BUCKET}/cache/{cache}",
        "ARGS": EXTRACT,
    }


def test_a_host_cut_off_ends_the_job_and_costs_no_block(made: Made, tmp_path: Path) -> None:
    """Two hosts. Nobody is told that the cable is out; both miss the other, and the same command goes on."""
    asked = name_extraction("static")
    with open_site(made, tmp_path, 2) as site:
        started = site.start("extract", "2", **asked)
        first, cut_off = site.nodes
        wait_until(lambda: len(list_blocks(made, "static")) >= 1, started[first])
        cut_off.unplug()
        for node, process in started.items():
            assert process.wait(timeout=TIMEOUT_S) != 0
            other = 1 if node is first else 0
            line = f"error: rank {other} on node{other} has not been heard of for {SILENCE_S} s"
            assert line in site.read_log(node, "extract")
        assert not list((made.objects / "cache" / "static").glob("current"))
        kept = list_blocks(made, "static")

        cut_off.plug_in()
        said = site.run("extract", "2", **asked)
        # Fewer, or none, where what the lost host had sent arrives once its cable is back.
        assert sum(count_to_do(said)) <= TILES - sum(min(BLOCK, TILES - BLOCK * int(block)) for block in kept)
    after = list_blocks(made, "static")
    assert {block: after[block] for block in kept} == kept
    assert_same_cache(made, "static")


def test_an_elastic_extraction_goes_on_without_the_hosts_it_loses(made: Made, tmp_path: Path) -> None:
    """Of three hosts one is switched off and one cut off; the first does the rest, whichever loss it notices first."""
    with open_site(made, tmp_path, 3) as site:
        first, cut_off, off = site.nodes
        started = site.start("extract", "1:3", **name_extraction("elastic"))
        # A host that is late makes all start again; once it reads tiles, it is among them.
        wait_until(lambda: all(has_socket(node, CONNECTED) for node in site.nodes), started[first])
        wait_until(lambda: len(list_blocks(made, "elastic")) >= 1, started[first])
        cut_off.unplug()
        off.kill()
        kept = list_blocks(made, "elastic")
        assert started[first].wait(timeout=TIMEOUT_S) == 0, site.read_log(first, "extract")
        said = site.read_log(first, "extract")
    assert len(kept) < -(-TILES // BLOCK), "it was over before a host could be lost"
    assert "has not been heard of" in said or "lost touch" in said
    assert [int(line.split()[0].replace(",", "")) for line in said.splitlines() if " to do in " in line][0::2] == [
        TILES
    ]
    after = list_blocks(made, "elastic")
    assert {block: after[block] for block in kept} == kept
    assert_same_cache(made, "elastic")


def test_trainers_on_two_hosts_give_what_one_process_does(made: Made, tmp_path: Path) -> None:
    """A head on four ranks; then fine-tuning, one of whose hosts is switched off after the first epoch."""
    with open_site(made, tmp_path, 2) as site:
        first, off = site.nodes
        args = " ".join(map(str, TRAIN))
        site.run("train-head", "2", NPROC=2, CACHE=made.cache, RUN=f"gs://{BUCKET}/runs/head", ARGS=args)
        # What the local ranks after the first say is on every host's own disk.
        for node in site.nodes:
            assert len(list(site.find(node, "logs").glob("*/attempt_0/1/stdout.log"))) == 1
        assert_same_run(made, "head")
        tune = {"CACHE": made.cache, "RUN": f"gs://{BUCKET}/runs/finetune", "UNFREEZE": UNFREEZE}
        started = site.start("finetune", "2", **tune, ARGS=f"{args} --workers 0")
        saved = made.objects / "runs" / "finetune-001" / "checkpoints"
        # The first is the run's beginning.
        wait_until(lambda: len(list(saved.glob("*.json"))) >= 2, started[first])
        off.kill()
        assert started[first].wait(timeout=TIMEOUT_S) != 0
        said = site.read_log(first, "finetune")
        assert "head starts from gs://" in said
        assert "error: rank 0 lost touch with the other ranks" in said or "error: rank 1 on node1 has not been" in said
    assert not (made.objects / "runs" / "finetune-001" / "metrics.json").exists()
    again = tmp_path / "again"
    again.mkdir()
    with open_site(made, again, 2) as site:
        said = site.run("finetune", "2", **tune, ARGS="--resume --device cpu --workers 0")
    assert "resuming gs://" in said
    assert_same_run(made, "finetune")

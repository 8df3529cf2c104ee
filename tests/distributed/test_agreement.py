"""Nodes that do not belong together: one line, the same for all, and the end of every rank."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.launcher import LaunchConfig

from extract.launch import meet

TIMEOUT_S = 120
AT_ODDS = Path(__file__).with_name("at_odds.py")
EXTRACT = ("extract", "run", "--tiles", "nowhere", "--backbone", "demo", "--device", "cpu")
HEAD = ("train", "head", "--cache", "nowhere", "--device", "cpu")
EVALUATE = ("train", "evaluate", "--tiles", "nowhere", "--device", "cpu")


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def launch_nodes(
    cwd: Path, env: dict[str, str], backend: str, options: list[list[str]], *command: str
) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of a launcher a node, each with one rank and, last, with options of its own."""
    shared = [f"--rdzv-endpoint=127.0.0.1:{find_port()}", f"--rdzv-backend={backend}", "--rdzv-id=odd"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "extract.launch", "--nproc-per-node=1", *shared, *own, *command],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in options
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.terminate()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, said, strict=True)]


def ask(*arguments: object, **odd: Any) -> dict[str, Any]:
    return {"arguments": list(map(str, arguments)), **odd}


def test_ranks_refuse_what_nodes_must_have_in_common(tmp_path: Path, python_env: dict[str, str]) -> None:
    """Two nodes join one job again and again; what each case must say, of this very host on both sides."""
    here = re.escape(socket.gethostname())
    zero, one = rf"{here} \(rank 0\)", rf"{here} \(rank 1\)"
    same = "give every node the same"
    cases = {
        # Before it has joined, so that nobody could compare anything.
        rf"{one} cannot take part: --lr -1.0: above 0, at most 1e\+30": [ask(*HEAD), ask(*HEAD, "--lr", -1)],
        rf"TILES differs: {zero} has nowhere, {one} has gs://b: {same}": [
            ask(*EXTRACT),
            ask(*EXTRACT, "--tiles", "gs://b"),
        ],
        rf"IMAGE_SIZE differs: {zero} has None, {one} has 224; CACHE differs: {zero} has None, {one} has c; "
        rf"--batch-size differs: {zero} has 32, {one} has 8: {same}": [
            ask(*EXTRACT),
            ask(*EXTRACT, "--cache", "c", "--image-size", 224, "--batch-size", 8),
        ],
        rf"command differs: {zero} has extract run, {one} has train head: run the same command on every node": [
            ask(*EXTRACT),
            ask(*HEAD),
        ],
        rf"--val-fraction differs: {zero} has 0.2, {one} has 0.3; "
        rf"--lr differs: {zero} has 0.001, {one} has 0.5: {same}": [
            ask(*HEAD),
            ask(*HEAD, "--lr", 0.5, "--val-fraction", 0.3),
        ],
        rf"RUN differs: {zero} has a, {one} has b: {same}": [
            ask(*EVALUATE, "--run-dir", "a"),
            ask(*EVALUATE, "--run-dir", "b"),
        ],
        rf"torch differs: {zero} has \d\S+, {one} has 1.0; zarr differs: {zero} has 2.0, {one} has \d\S+: "
        r"install the same on every node": [
            ask(*EXTRACT, versions={"zarr": "2.0"}),
            ask(*EXTRACT, "--tiles", "gs://b", versions={"torch": "1.0"}),
        ],
        rf"the clock of {one} is (299|300|301) s behind that of {zero}, .* \(NTP\), to within 60 s": [
            ask(*EXTRACT),
            ask(*EXTRACT, clock_s=-300),
        ],
        # Clocks near enough, and what may differ: the run goes on, and finds nothing to read.
        r".*nowhere.*": [
            ask(*EXTRACT, "--workers", 0, "--profile", "trace.json"),
            ask(*EXTRACT, "--workers", 3, "--device", "auto", clock_s=30),
        ],
        rf"CACHE differs: {zero} has /a, {one} has /b: {same}": [
            ask(*EXTRACT, "--cache", "/a"),
            ask(*EXTRACT, "--cache", "/b"),
        ],
    }
    options = [["--nnodes=2", f"--node-rank={rank}"] for rank in range(2)]
    env = python_env | {"CUDA_VISIBLE_DEVICES": ""}
    (first, _, errors), (second, told, other) = launch_nodes(
        tmp_path, env, "static", options, str(AT_ODDS), json.dumps(list(cases.values()))
    )
    assert (first, second) == (1, 1), errors + other
    lines = errors.splitlines()
    assert len(lines) == len(cases), errors
    for line, expected in zip(lines, cases, strict=True):
        assert re.fullmatch(f"error: {expected}", line)
    # The other node's rank hears every word of it, and says nothing of its own but where it failed by itself.
    assert told.splitlines() == [line.replace("error:", "told:", 1) for line in lines[1:-1]]
    assert other == "error: --lr -1.0: above 0, at most 1e+30\n"


def test_launchers_end_where_nnodes_differ(tmp_path: Path, python_env: dict[str, str]) -> None:
    options = [["--nnodes=2", "--rdzv-conf=is_host=1"], ["--nnodes=3", "--rdzv-conf=is_host=0"]]
    nodes = launch_nodes(tmp_path, python_env, "c10d", options, "-m", "extract", "run", "--tiles", "nowhere")
    here = re.escape(socket.gethostname())
    for status, out, err in nodes:
        assert (status, out) == (1, ""), err
        assert re.fullmatch(rf"error: NNODES differs: it is (2|3) on {here}, (2|3) on {here}: .* the same\n", err)


def test_a_rendezvous_that_nobody_can_reach_is_one_line(tmp_path: Path, python_env: dict[str, str]) -> None:
    """A port that nobody listens at, and a host that has no address."""
    nowhere = [f"127.0.0.1:{find_port()}", "nobody.invalid:29400"] * 2
    backends = ["static", "static", "c10d", "c10d"]
    common = ["--nnodes=2", "--node-rank=1", "--rdzv-conf=timeout=2,join_timeout=2,read_timeout=2"]
    options = [
        [*common, f"--rdzv-backend={backend}", f"--rdzv-endpoint={endpoint}"]
        for backend, endpoint in zip(backends, nowhere, strict=True)
    ]
    nodes = launch_nodes(tmp_path, python_env, "c10d", options, "-m", "extract", "run", "--tiles", "nowhere")
    for endpoint, (status, out, err) in zip(nowhere, nodes, strict=True):
        assert (status, out) == (1, ""), err
        assert re.fullmatch(
            rf"error: the nodes of this job \(2\) did not all meet at {endpoint}, .* check RDZV, .*\n", err
        )


def meet_all(backend: str, nodes: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What the launchers of these nodes say, `""` if they go on: of each its NNODES and its own settings."""
    endpoint = f"127.0.0.1:{find_port()}"

    def say(node: tuple[str, dict[str, Any]]) -> str:
        least, _, most = node[0].partition(":")
        config = LaunchConfig(
            min_nodes=int(least),
            max_nodes=int(most or least),
            nproc_per_node=1,
            run_id="meeting",
            rdzv_backend=backend,
            rdzv_endpoint=endpoint,
            rdzv_configs={"timeout": "20", "join_timeout": "20", **node[1]},
            local_addr=f"host{nodes.index(node)}",
        )
        try:
            stores.append(meet(config))
        except SystemExit as end:
            return str(end)
        return ""

    stores: list[Any] = []
    with ThreadPoolExecutor(len(nodes)) as pool:
        return [*pool.map(say, nodes)]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of one process need less time to ask than nodes."""
    monkeypatch.setattr("extract.launch._HEARD_S", 0.5)


def test_fixed_nodes_meet_if_they_count_alike() -> None:
    for numbers in (["2", "2"], ["3", "2"], ["2", "3"]):
        said = meet_all("static", [(number, {"rank": rank}) for rank, number in enumerate(numbers)])
        assert said[0] == said[1]
        assert ("NNODES differs" in said[0]) == (numbers[0] != numbers[1])
    # A job of one node waits for nobody, and may be on its way when the other comes.
    assert any("NNODES differs" in line for line in meet_all("static", [("1", {"rank": 0}), ("2", {"rank": 1})]))


def test_two_nodes_of_one_number_are_told() -> None:
    said = meet_all("static", [("3", {"rank": 0}), ("3", {"rank": 1}), ("3", {"rank": 1, "again": "yes"})])
    assert len(set(said)) == 1
    assert re.fullmatch(r"error: NODE_RANK=1 is both host[12] and host[12]: number the nodes from 0 up", said[0])


def test_a_node_that_was_started_again_is_the_same() -> None:
    node = ("2", {"rank": 1})
    assert meet_all("static", [("2", {"rank": 0}), node, node]) == ["", "", ""]


def test_a_number_beyond_the_nodes_is_told() -> None:
    said = meet_all("static", [("2", {"rank": 0}), ("2", {"rank": 2})])
    assert set(said) == {"error: NODE_RANK=2 on host1 is not below NNODES=2: number the nodes from 0 up"}


def test_nodes_that_come_and_go_wait_for_nobody_and_a_stranger_is_told() -> None:
    assert meet_all("c10d", [("1:3", {"is_host": "1"})]) == [""]
    said = meet_all("c10d", [("1:3", {"is_host": "1"}), ("1:3", {"is_host": "0"}), ("1:2", {"is_host": "0"})])
    assert any("NNODES differs" in line for line in said)

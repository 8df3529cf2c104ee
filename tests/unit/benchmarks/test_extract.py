"""What the benchmarks of extraction count and choose, on their own."""

import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from extract.backbone.checkpoint import count_flop
from tests.benchmarks.__main__ import AREAS
from tests.benchmarks.extract import choose_load
from tests.benchmarks.fixtures import VITL16, Fixtures, read_run
from tests.benchmarks.processes import read_cpu_seconds, run_apart, watch_memory


def test_flop_of_vitl16() -> None:
    assert count_flop(DINOv3ViTConfig(**VITL16).to_dict(), 224) == pytest.approx(125.5e9, rel=0.01)
    assert count_flop(DINOv3ViTConfig(**VITL16).to_dict(), 512) == pytest.approx(727e9, rel=0.01)


@pytest.mark.parametrize("gated", [False, True])
def test_flop_agrees_with_what_torch_counts(gated: bool) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DINOv3ViTConfig(**shape, num_register_tokens=4, use_gated_mlp=gated)
    config._attn_implementation = "eager"  # PyTorch's counter does not see into the fused attention of the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        DINOv3ViTModel(config).eval()(pixel_values=torch.zeros(1, 3, 64, 64))
    assert count_flop(config.to_dict(), 64) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    "tile_s, batch, tiles",
    [(0.01, 32, 128), (0.11, 32, 96), (0.75, 8, 16), (5.0, 1, 2), (60.0, 1, 1)],
)
def test_load_takes_about_the_same_time_on_any_processor(tile_s: float, batch: int, tiles: int) -> None:
    load = choose_load(tile_s, seconds=12.0, most=128)
    assert (load.batch, load.tiles) == (batch, tiles)


def test_load_is_whole_batches() -> None:
    for tile_s in np.geomspace(0.001, 100, 50):
        load = choose_load(float(tile_s))
        assert load.tiles >= load.batch >= 1
        assert load.tiles % load.batch == 0


@pytest.mark.parametrize("write", ["0.1", "0"])
def test_summary_is_read(write: str) -> None:
    run = read_run(
        "cache: 2,000 embeddings, sealed (version 1)\n"
        "2,000 tiles in 12.5 s: 160 tiles/s (per rank 160), 14.0 s in all; "
        f"waiting: fetch 1.2 %, decode 0.4 %, device 98.3 %, write {write} %\n"
    )
    assert run.tiles_per_s == 160
    assert math.isclose(run.write_share, float(write) / 100)


def test_summary_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError):
        read_run("2,000 tiles under gs://bucket")


def test_process_of_its_own() -> None:
    assert run_apart(os.getpid) != os.getpid()


def test_cpu_time_counts_descendants() -> None:
    before = read_cpu_seconds(os.getpid())
    work = "import sys; sum(range(20_000_000)); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        of_child = read_cpu_seconds(child.pid)
        assert of_child >= 0.05
        ticks = 3 / os.sysconf("SC_CLK_TCK")  # of two processes, each rounded
        assert read_cpu_seconds(os.getpid()) - before >= of_child - ticks
        child.communicate()


def test_peak_memory_names_the_largest_of_the_tree() -> None:
    hold = "import sys, time; data = bytearray(%d); data[::4096] = data[::4096]; time.sleep(0.5)"
    small = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold % (200 * 2**20)!r}])"
    process = subprocess.Popen([sys.executable, "-c", small], text=True)
    peak = watch_memory(process)
    assert peak.main < 100 * 2**20
    assert peak.largest > 200 * 2**20


def test_tiles_are_whole_and_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.fixtures.TILES", 4)
    with Fixtures(tmp_path) as fixtures:
        tiles = fixtures.tiles
        assert len(tiles.names) == 4
        for path in tiles.paths(4):
            assert 250_000 < path.stat().st_size < 450_000
            assert Image.open(path).size == (512, 512)
            for line in (tiles.directory / "labels" / f"{path.stem}.txt").read_text().splitlines():
                assert all(0 <= float(share) <= 1 for share in line.split()[1:])


@pytest.mark.parametrize("module", AREAS.values())
def test_measures_have_names_for_the_command_line(module: str) -> None:
    measures = import_module(module).MEASURES
    assert measures
    assert all(name == name.lower() and " " not in name for name in measures)

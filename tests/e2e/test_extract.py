"""The extraction as its users run it: real torchrun, a real storage server, caches compared value by value."""

from __future__ import annotations

import http.client
import http.server
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from PIL import Image
from transformers import AutoModel

from cache_schema import CacheNotFoundError, CacheRoot, Status, open_cache
from extract.__main__ import run as extract_command_line
from extract.backbone.embed import TileEmbedder
from extract.backbone.precision import choose_precision
from extract.config import LAST_CACHE, ExtractConfig
from extract.errors import RunError
from extract.run import run_extraction
from extract.tiles.labels import parse_labels
from extract.tiles.listing import label_name
from extract.tiles.scenes import find_scenes
from tests.checkpoints import MEAN, STD, make_checkpoint
from tests.planted import Finished, fresh_seed, run_here
from tests.proxy import Proxy
from tests.tiles import (
    MODES,
    Objects,
    cosines,
    draw_objects,
    draw_tile,
    extract_command,
    list_tree,
    read_arrays,
    relative_differences,
    run_extract,
    upload,
    write_directory,
)

PROJECT_ROOT = Path(__file__).parents[2]
TILES, BLOCKS = 560, 3
SLOW = ("--image-size", "160", "--batch-size", "4", "--precision", "float32")
"""Settings of the runs that are stopped: a second a block, so that there is something to stop."""


@pytest.fixture(scope="module")
def env(gcs_server: str) -> dict[str, str]:
    paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "STORAGE_EMULATOR_HOST": gcs_server}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "plain": make_checkpoint(root / "plain", seed=fresh_seed()),
        "gated": make_checkpoint(root / "gated", seed=fresh_seed(), use_gated_mlp=True),
    }


@pytest.fixture(scope="module")
def make_bucket(gcs_server: str) -> Any:
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    return lambda: client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")


@pytest.fixture(scope="module")
def objects() -> Objects:
    objects = draw_objects(np.random.default_rng(fresh_seed()), TILES)
    objects["images/103_3.png"] = b"no image"  # one of 560 is within what is accepted
    return objects


@pytest.fixture(scope="module")
def tiles(make_bucket: Any, objects: Objects) -> str:
    bucket = make_bucket()
    upload(bucket, objects, "xview/train/")
    return f"gs://{bucket.name}/xview/train"


@pytest.fixture(scope="module")
def undisturbed(
    env: dict[str, str], tiles: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A cache made by one rank of torchrun without interruption, and what was printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_extract(
        "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", "vectors", *SLOW, env=env, cwd=folder, nproc=1
    )
    assert result.returncode == 0, result.stderr
    return folder / "vectors", result.stdout


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """For runs in this process, which take a tenth of the time of one that starts its own."""
    monkeypatch.chdir(tmp_path)
    defaults = {"backbone": str(checkpoints["plain"]), "device": "cpu", "workers": 0, "precision": "float32"}
    return lambda tiles, **changes: ExtractConfig(tiles=str(tiles), **(defaults | changes))


def extract(cwd: Path, *arguments: object) -> Finished:
    """`python -m extract run …` in this process."""
    return run_here(extract_command_line, cwd, "run", "--device", "cpu", "--workers", 0, *arguments)


def assert_same_cache(a: str | Path, b: str | Path) -> None:
    """The same version, every array equal; vectors to 1e-3 of their norm, their digests aside."""
    assert open_cache(str(a)).id == open_cache(str(b)).id
    mine, other = read_arrays(a), read_arrays(b)
    assert mine.keys() == other.keys()
    embedded = mine["status"] == Status.EMBEDDED
    for name in mine.keys() - {"commit", "seal"}:
        if name in ("cls", "patch_mean"):
            assert relative_differences(mine[name][embedded], other[name][embedded]).max() <= 1e-3
            assert np.isnan(mine[name][~embedded]).all()
            assert np.isnan(other[name][~embedded]).all()
        else:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


# What a cache holds


def embed_independently(checkpoint: Path, data: bytes, size: int) -> dict[str, npt.NDArray[np.float32]]:
    """Pillow decodes and resizes in float, transformers runs the model in float32; nothing of this project's own."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":
        pixels = np.stack([np.asarray(image) // 256] * 3, axis=2)
    else:
        pixels = np.asarray(image.convert("RGB"))
    channels = []
    for c in range(3):
        channel = Image.fromarray((pixels[:, :, c] / 255).astype(np.float32))
        resized = np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR))
        channels.append((resized - MEAN[c]) / STD[c])
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(torch.from_numpy(np.stack(channels)[None]).float())
    patches = output.last_hidden_state[0, 1 + model.config.num_register_tokens :]
    assert len(patches) == (size // 16) ** 2
    return {"cls": output.pooler_output[0].numpy(), "patch_mean": patches.mean(dim=0).numpy()}


@pytest.fixture(scope="module")
def varied(make_bucket: Any) -> tuple[str, Objects]:
    """Tiles of several sizes and every mode, and their labels."""
    rng = np.random.default_rng(fresh_seed())
    objects = {}
    for size in [(64, 64), (48, 48), (96, 96), (37, 91), (200, 200)]:
        for mode in MODES:
            name = f"{size[0]}x{size[1]}-{mode.replace(';', '')}_{len(objects)}"
            objects[f"images/{name}.png"] = draw_tile(rng, *size, mode=mode)
            objects[f"labels/{name}.txt"] = b"18 0.5 0.5 0.1 0.1\n" * int(rng.integers(0, 5))
    bucket = make_bucket()
    upload(bucket, objects)
    return f"gs://{bucket.name}", objects


def test_a_cache_holds_the_pooling_that_was_asked_for(varied: tuple[str, Objects], config: Any) -> None:
    """And the same vectors, whatever else is stored; a second run has nothing to do."""
    for cache, pooling in (("both", "cls+patch_mean"), ("one", "patch_mean")):
        run_extraction(config(varied[0], cache=cache, pooling=pooling))
        assert open_cache(cache).layout.pooling == tuple(pooling.split("+"))
    both, one = read_arrays("both"), read_arrays("one")
    assert both.keys() - one.keys() == {"cls"}
    np.testing.assert_array_equal(one["patch_mean"], both["patch_mean"])
    again = run_extraction(config(varied[0], cache="one", pooling="patch_mean"))
    assert again is not None
    assert again.values["computed"] == 0


@pytest.mark.parametrize("precision, least", [("float32", 0.9999), ("bf16", 0.999)])
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_embeddings_equal_an_independent_computation(
    varied: tuple[str, Objects],
    checkpoints: dict[str, Path],
    config: Any,
    kind: str,
    precision: str,
    least: float,
) -> None:
    tiles, objects = varied
    run_extraction(config(tiles, backbone=str(checkpoints[kind]), cache="vectors", precision=precision))
    arrays = read_arrays("vectors")
    assert (arrays["status"] == Status.EMBEDDED).all()
    assert arrays["tile"].tolist() == sorted(name for name in objects if name.startswith("images/"))
    expected = [embed_independently(checkpoints[kind], objects[name], 64) for name in arrays["tile"]]
    for pooling in ("cls", "patch_mean"):
        reference = np.stack([vectors[pooling] for vectors in expected])
        found = cosines(arrays[pooling], reference)
        print(f"{pooling}: least cosine {found.min():.7f}")
        assert found.min() >= least
        # Vectors that are all alike would agree whatever went wrong: a neighbour's must not pass.
        assert cosines(arrays[pooling], np.roll(reference, 1, axis=0)).max() < least
    counts = np.stack([parse_labels(objects[label_name(name)]).counts for name in arrays["tile"]])
    np.testing.assert_array_equal(arrays["label_ids"], counts)


def test_so_do_those_of_a_run_of_torchrun(
    undisturbed: tuple[Path, str], checkpoints: dict[str, Path], objects: Objects
) -> None:
    """A sample of its rows, from every block."""
    arrays = read_arrays(undisturbed[0])
    rows = [row for row in range(0, TILES, 37) if arrays["status"][row] == Status.EMBEDDED]
    expected = [embed_independently(checkpoints["plain"], objects[str(arrays["tile"][row])], 160) for row in rows]
    for pooling in ("cls", "patch_mean"):
        assert cosines(arrays[pooling][rows], [vectors[pooling] for vectors in expected]).min() >= 0.9999


def test_one_rank_and_two_make_the_same_cache(
    undisturbed: tuple[Path, str],
    tiles: str,
    checkpoints: dict[str, Path],
    env: dict[str, str],
    make_bucket: Any,
    tmp_path: Path,
) -> None:
    """The second in a bucket, where blocks are written by both."""
    cache = f"gs://{make_bucket().name}/caches/two"
    result = run_extract(
        "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", cache, *SLOW,
        env=env, cwd=tmp_path, nproc=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_cache(cache, undisturbed[0])
    version = open_cache(cache)
    assert version.layout.blocks == BLOCKS
    assert [version.check_block(block) for block in range(BLOCKS)] == [None] * BLOCKS
    assert version.check_seal()
    per_rank = re.search(r"\(per rank ([\d, ]+)\)", result.stdout)
    assert per_rank
    assert len(per_rank[1].split(",")) == 2, "both ranks took blocks"
    assert (tmp_path / LAST_CACHE).read_text() == f"{cache}\n"


def test_what_is_printed(undisturbed: tuple[Path, str], tiles: str, objects: Objects) -> None:
    cache, output = undisturbed
    lines = output.splitlines()
    version = open_cache(str(cache)).id
    assert lines[0] == f"560 tiles under {tiles}"
    assert lines[1] == f"560 to do in float32 -> vectors (version {version})"
    assert lines[2] == "48 px -> 160 px: a 15 px car becomes 50 px"
    assert lines[3] == f"vectors: 559 embeddings, sealed (version {version})"
    assert lines[4:6] == ["quarantined 1:", "  images/103_3.png: cannot be decoded as an image"]
    read = sum(parse_labels(data).lines for name, data in objects.items() if name.startswith("labels/"))
    assert lines[6] == f"{read:,} label lines read"
    assert re.fullmatch(r"560 tiles in [\d.]+ s: [\d,]+ tiles/s .*; waiting: fetch [\d.]+ %, decode .*", lines[7])


def test_a_second_run_has_nothing_to_do(
    undisturbed: tuple[Path, str], tiles: str, checkpoints: dict[str, Path]
) -> None:
    cache = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    result = extract(cache.parent, "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", "vectors", *SLOW)
    assert result.status == 0, result.err
    assert re.search(r"^0 to do, \d+ s$", result.out, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before


# Runs that are stopped


def find_descendants(pid: int) -> list[int]:
    """The process and everything it started, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def start_and_wait_for_a_commit(
    tiles: str, checkpoint: Path, env: Mapping[str, str], folder: Path, nproc: int | None, workers: int = 1
) -> subprocess.Popen[str]:
    command = extract_command(
        "--tiles", tiles, "--backbone", checkpoint, "--cache", "vectors", *SLOW, "--workers", str(workers), nproc=nproc
    )
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=env, cwd=folder, text=True, start_new_session=True, **streams)
    deadline = time.monotonic() + 90
    while not list(folder.glob("vectors/*.zarr/commit/c/*/0")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def find_commits(folder: Path) -> dict[Path, int]:
    """Everything written for committed blocks: when it was written, by path."""
    blocks = [path.parent.name for path in folder.glob("vectors/*.zarr/commit/c/*/0")]
    files = [path for path in folder.glob("vectors/*.zarr/*/c/**/*") if path.is_file()]
    chunks = [path for path in files if path.parts[path.parts.index("c") - 1] in ("cls", "label_ids", "commit")]
    return {path: path.stat().st_mtime_ns for path in chunks if path.parts[path.parts.index("c") + 1] in blocks}


def test_killed_run_is_resumed_on_another_world_size(
    undisturbed: tuple[Path, str], tiles: str, checkpoints: dict[str, Path], env: dict[str, str], tmp_path: Path
) -> None:
    process = start_and_wait_for_a_commit(tiles, checkpoints["plain"], env, tmp_path, 2, workers=0)
    for pid in find_descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)
    committed = find_commits(tmp_path)
    done = sum(path.parts[-4] == "commit" for path in committed)
    assert 1 <= done < BLOCKS
    assert not (tmp_path / "vectors/current").exists()
    with pytest.raises(CacheNotFoundError, match="rows are missing"):
        open_cache(str(tmp_path / "vectors"))

    # The same command with another batch size, which must not count: the version keeps its own.
    other = [*SLOW[:2], "--batch-size", "32", *SLOW[4:]]
    result = extract(tmp_path, "--tiles", tiles, "--backbone", checkpoints["plain"], "--cache", "vectors", *other)
    assert result.status == 0, result.err
    # Blocks are of 256, 256 and 48 rows, and which of them were done is the race's to say.
    to_do = re.search(r"^(\d+) to do in float32 -> vectors", result.out, re.MULTILINE)
    assert to_do
    assert int(to_do[1]) < TILES
    assert "differs from the run that began this version: batch_size: 4, not 32" in result.out
    assert_same_cache(tmp_path / "vectors", undisturbed[0])
    assert open_cache(str(tmp_path / "vectors")).recorded.batch_size == 4
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, "committed blocks are not redone"


@pytest.mark.parametrize("number, nproc", [(signal.SIGTERM, 2), (signal.SIGINT, None)])
def test_told_to_stop_it_says_how_far_it_came(
    tiles: str, checkpoints: dict[str, Path], env: dict[str, str], tmp_path: Path, number: int, nproc: int | None
) -> None:
    """Ctrl-C goes to every process of the terminal, what a scheduler sends to the launcher alone."""
    process = start_and_wait_for_a_commit(tiles, checkpoints["plain"], env, tmp_path, nproc)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = len(list(tmp_path.glob("vectors/*.zarr/commit/c/*/0")))
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last == (
        f"stopped by {signal.Signals(number).name}: {done} of {BLOCKS} blocks of vectors are committed; "
        "the same command goes on from there"
    )
    version_id = CacheRoot(str(tmp_path / "vectors")).versions()[0]
    version = CacheRoot(str(tmp_path / "vectors")).open_version(version_id)
    assert [version.check_block(int(block)) for block in np.flatnonzero(version.committed())] == [None] * done


# What is chosen, left out, quarantined


def test_limit_is_whole_scenes_in_a_cache_of_its_own(
    tiles: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_extraction(config(tiles, limit=45))
    cache = tmp_path / "cache/xview-train-plain-64-limit45"
    chosen = open_cache(str(cache)).read_table().tile
    everything = [f"images/{100 + i // 10}_{i % 10}.png" for i in range(TILES)]
    scenes = set(find_scenes(chosen).tolist())
    assert len(scenes) == 4
    assert sorted(chosen.tolist()) == sorted(name for name in everything if name[7:10] in scenes)
    output = capsys.readouterr().out
    assert "LIMIT=45: 40 of 560 tiles, whole scenes\n" in output
    size = 560 * (64 * 2 * 2 + 256) / 2**20
    estimate = (
        rf"all 560 tiles: about \d+ s on this hardware and {size:.0f} MiB of cache \(the same command without LIMIT\)"
    )
    assert re.search(estimate, output)
    assert (tmp_path / LAST_CACHE).read_text() == "cache/xview-train-plain-64-limit45\n"


def test_unlabelled_tiles(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = draw_objects(np.random.default_rng(fresh_seed()), 12)
    for i in (2, 7):
        del objects[f"labels/{100 + i // 10}_{i % 10}.txt"]
    objects["images/thumbs.db"] = b"?"
    write_directory(tmp_path / "tiles", objects)
    run_extraction(config("tiles", cache="a"))
    output = capsys.readouterr().out
    assert "2 tiles without a label file left out (--unlabelled embeds them)\n" in output
    assert "1 objects under images/ are not PNG, JPEG or TIFF: left out\n" in output
    run_extraction(config("tiles", cache="b", unlabelled=True))
    labelled, everything = open_cache("a"), open_cache("b")
    assert (labelled.layout.rows, everything.layout.rows) == (10, 12)
    table, rows = everything.read_table(), everything.read_rows()
    assert table.tile[~table.labelled].tolist() == ["images/100_2.png", "images/100_7.png"]
    assert rows.embedded.all()
    assert not rows.label_ids[~table.labelled].any()


def test_malformed_labels_are_named(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = draw_objects(np.random.default_rng(fresh_seed()), 6)
    objects |= {"labels/100_1.txt": b"18 0 0 0 0\n18 0 0 0 7\n", "labels/100_4.txt": b"car\n" * 8}
    write_directory(tmp_path / "tiles", objects)
    run_extraction(config("tiles", cache="a"))
    line = next(line for line in capsys.readouterr().out.splitlines() if "label lines read" in line)
    shown = ", ".join(["labels/100_1.txt:2", *(f"labels/100_4.txt:{n}" for n in range(1, 5))])
    assert line.endswith(f"malformed ones among them: {shown}, and 4 more")


def test_too_many_quarantined_then_accepted_then_mended(
    config: Any, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is mended keeps size and time of change here, so it is the same version."""
    objects = draw_objects(np.random.default_rng(fresh_seed()), 20)
    good = objects["images/100_5.png"]
    objects["images/100_5.png"] = good[:60] + bytes(100) + good[160:]
    tile = write_directory(tmp_path / "tiles", objects) / "images/100_5.png"
    changed = tile.stat().st_mtime_ns

    refused = extract(
        tmp_path, "--tiles", "tiles", "--backbone", checkpoints["plain"], "--cache", "a", "--precision", "float32"
    )
    assert refused.status == 3
    assert "Traceback" not in refused.err
    assert "error: 1 of 20 tiles are quarantined, more than --max-quarantined 0.01 allows: fix them" in refused.err
    assert "\n  images/100_5.png: cannot be decoded as an image" in refused.err
    assert not (tmp_path / "a/current").exists()
    assert not (tmp_path / LAST_CACHE).exists()
    with pytest.raises(CacheNotFoundError):
        open_cache("a")
    with pytest.raises(RunError, match="1 of 20 tiles are quarantined"):  # nor does a second run forget it
        run_extraction(config("tiles", cache="a"))

    run_extraction(config("tiles", cache="a", max_quarantined=0.05))
    output = capsys.readouterr().out
    assert "0 to do" in output
    accepted = open_cache("a")
    assert f"a: 19 embeddings, sealed (version {accepted.id})" in output
    assert np.flatnonzero(accepted.read_rows().status == Status.UNDECODABLE).tolist() == [5]
    assert np.isnan(accepted.read_rows().pooled["cls"][5]).all()

    tile.write_bytes(good)
    os.utime(tile, ns=(changed, changed))
    run_extraction(config("tiles", cache="a", max_quarantined=0.05))
    assert not open_cache("a").read_rows().embedded.all(), "not tried again unasked"
    run_extraction(config("tiles", cache="a", retry_quarantined=True))
    assert "1 quarantined tiles are tried again\n" in capsys.readouterr().out
    mended = open_cache("a")
    assert mended.id == accepted.id
    assert mended.check_seal()
    assert mended.read_rows().embedded.all()
    run_extraction(config("tiles", cache="a", retry_quarantined=True))
    assert "0 quarantined tiles are tried again\n0 to do" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_halved_before_the_first_block(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 20))
    monkeypatch.setattr(TileEmbedder, "fits", lambda self: self.batch_size <= 8)
    with pytest.raises(
        RunError, match="not even half a batch of 32 tiles of 64 px fits in memory: set a smaller --batch-size"
    ):
        run_extraction(config("tiles", cache="a"))
    run_extraction(config("tiles", cache="b", batch_size=16))
    assert "a batch of 16 tiles does not fit in memory: going on with 8\n" in capsys.readouterr().out
    assert open_cache("b").recorded.batch_size == 8
    run_extraction(config("tiles", cache="c", batch_size=8))
    assert_same_cache("b", "c")

    version = open_cache("b")
    CacheRoot("b").open_version(version.id, read_only=False).reopen_blocks([0])
    monkeypatch.setattr(TileEmbedder, "fits", lambda self: self.batch_size <= 4)
    run_extraction(config("tiles", cache="b"))
    assert open_cache("b").recorded.batch_size == 4, "with no block left, another size does no harm"


def test_a_batch_of_more_than_the_address_space_does_not_fit(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Half a petabyte: the allocator's own refusal, on any machine."""
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 4))
    command = ("--tiles", "tiles", "--backbone", checkpoints["plain"], "--image-size", 2**20, "--precision", "float32")
    result = extract(tmp_path, *command)
    assert result.status == 1
    assert result.err.count("error: not even half a batch of 32 tiles of 1048576 px fits in memory") == 1
    assert "Traceback" not in result.err


def test_profile_is_a_trace_of_a_few_batches(config: Any, tmp_path: Path) -> None:
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 40))
    run_extraction(config("tiles", cache="a", batch_size=4, profile="trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in events)
    assert len({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}) == 5


@pytest.mark.parametrize("began", ["bf16", "float32"])
def test_auto_goes_on_in_the_precision_a_version_began_in(
    began: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 5))
    run_extraction(config("tiles", cache="a", precision=began))
    assert f"5 to do in {began} -> a" in capsys.readouterr().out
    run_extraction(config("tiles", cache="a", precision="auto"))
    assert "0 to do" in capsys.readouterr().out
    run_extraction(config("tiles", cache="b", precision="auto"))
    assert open_cache("b").provenance.precision == choose_precision(torch.device("cpu"))


def test_a_changed_tile_makes_another_version(config: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    objects = draw_objects(rng, 5)
    write_directory(tmp_path / "tiles", objects)
    run_extraction(config("tiles", cache="a"))
    before = open_cache("a")
    vectors = before.read_rows().pooled["cls"]
    (tmp_path / "tiles/images/100_2.png").write_bytes(draw_tile(rng, 40))
    run_extraction(config("tiles", cache="a"))
    after = open_cache("a")
    assert after.id != before.id
    changed = relative_differences(after.read_rows().pooled["cls"], vectors) > 1e-3
    assert changed.tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(open_cache("a", version=before.id).read_rows().pooled["cls"], vectors)


def test_table_comes_from_the_listing_alone(make_bucket: Any, config: Any, proxy: Proxy) -> None:
    """A finished cache is recognised without reading one object."""
    bucket = make_bucket()
    objects = draw_objects(np.random.default_rng(fresh_seed()), 30)
    upload(bucket, objects)
    run_extraction(config(f"gs://{bucket.name}", cache="a"))
    asked = sum(Proxy.reads(path, ".png") or Proxy.reads(path, ".txt") for path in proxy.asked)
    assert asked == sum(bool(data) for data in objects.values()), "an empty label file need not be read to be known"
    proxy.asked.clear()
    run_extraction(config(f"gs://{bucket.name}", cache="a"))
    assert proxy.asked
    assert not any(Proxy.reads(path, ".png") or Proxy.reads(path, ".txt") for path in proxy.asked)


def test_a_tile_that_came_back_is_read_in_its_new_generation(make_bucket: Any, config: Any, proxy: Proxy) -> None:
    """The same bytes uploaded again: the same version, though the generation it was sealed with is gone."""
    objects = draw_objects(np.random.default_rng(fresh_seed()), 10)
    bucket = make_bucket()
    upload(bucket, objects)
    proxy.choose_fault = lambda path: 404 if Proxy.reads(path, "images/100_4.png") else None
    run_extraction(config(f"gs://{bucket.name}", cache="a", max_quarantined=0.1))
    before = open_cache("a")
    assert np.flatnonzero(before.read_rows().status == Status.GONE).tolist() == [4]
    proxy.choose_fault = lambda path: None
    upload(bucket, {"images/100_4.png": objects["images/100_4.png"]})
    run_extraction(config(f"gs://{bucket.name}", cache="a", retry_quarantined=True))
    after = open_cache("a")
    assert after.id == before.id
    assert after.read_rows().embedded.all()
    assert after.check_seal()


# Bad input: one line that names the remedy, a status, nothing written


class GatedHub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"error": "Access to this model is restricted"}).encode()
        self.send_response_only(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def gated_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


BAD_INPUT: dict[str, tuple[dict[str, str], str]] = {
    "no tiles given": ({"--tiles": ""}, r"TILES is not set: give gs://bucket/prefix or a directory"),
    "no such bucket": ({"--tiles": "gs://no-such-bucket/x"}, r"no bucket no-such-bucket .*check the name in TILES"),
    "no images/": ({"--tiles": "{tiles}/images"}, r"no tiles under .*/images/images/: check TILES"),
    "no credentials": ({"--tiles": "gs://some-bucket/x"}, r"no Google credentials .*gcloud"),
    "image size": ({"--image-size": "100"}, r"IMAGE_SIZE 100 is not a multiple of the 16 px patch: try 96 or 112"),
    "scene pattern": ({"--limit": "5", "--scene-regex": r"^(?P<scene>x.+)$"}, r"560 tile names do not fit"),
}  # fmt: skip


BAD_HUB: dict[str, tuple[str, str]] = {
    "gated model": ("vitl16", r"is gated .*https://huggingface\.co/facebook/dinov3.*HF_TOKEN"),
    "no network": ("org/model", r"cannot download org/model .*check the network"),
}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Variables of a user who has no credentials."""
    home = str(tmp_path / "home")
    return {"HF_HOME": home, "HOME": home, "CLOUDSDK_CONFIG": home, "NO_GCE_CHECK": "true"}


def assert_one_line(status: int, out: str, err: str, message: str, work: Path) -> None:
    assert status == 1
    assert out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err
    assert list_tree(work) == []


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(
    tiles: str,
    checkpoints: dict[str, Path],
    home: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    if case == "no credentials":
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    work = tmp_path / "work"
    work.mkdir()
    changes, message = BAD_INPUT[case]
    options = {"--tiles": tiles, "--backbone": str(checkpoints["plain"])} | changes
    result = extract(work, *(part.replace("{tiles}", tiles) for option in options.items() for part in option))
    assert_one_line(result.status, result.out, result.err, message, work)


@pytest.mark.parametrize("case", BAD_HUB)
def test_a_hub_without_the_model_is_one_line(
    tiles: str, env: dict[str, str], gated_hub: str, home: dict[str, str], tmp_path: Path, case: str
) -> None:
    """Processes of their own: the address of the hub is read when its library is imported."""
    work = tmp_path / "work"
    work.mkdir()
    env = {name: value for name, value in env.items() if name != "HF_TOKEN"} | home
    env |= {
        "HF_ENDPOINT": gated_hub if case == "gated model" else "http://127.0.0.1:9",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    backbone, message = BAD_HUB[case]
    result = run_extract("--tiles", tiles, "--backbone", backbone, env=env, cwd=work)
    assert_one_line(result.returncode, result.stdout, result.stderr, message, work)


def test_bad_input_under_torchrun_is_the_same_line(env: dict[str, str], tmp_path: Path) -> None:
    result = run_extract("--tiles", "./nowhere", "--backbone", "./x", env=env, cwd=tmp_path, nproc=2)
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1, result.stderr
    assert "error: no checkpoint at ./x" in result.stderr
    assert "Traceback" not in result.stderr
    assert list_tree(tmp_path) == []


def test_unknown_choice_shows_usage(tmp_path: Path) -> None:
    result = extract(tmp_path, "--tiles", "x", "--precision", "fp8")
    assert result.status == 2
    assert "Usage: python -m extract run" in result.err
    assert "Traceback" not in result.err

"""Training on two ranks, stopped and resumed, and failing on one: the same figures, the same files, one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import rasterio
import torch
import torch.distributed as dist
import zarr
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from rasterio.transform import Affine
from safetensors.numpy import load_file

from cache_schema import TileprobeError, open_cache
from extract.backbone.checkpoint import find_checkpoint
from extract.ranks.group import Ranks
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source
from tests.caches import plant_cache, rewrite_block
from tests.checkpoints import MEAN, STD, make_checkpoint
from tests.distributed.read_between import read as read_caches
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from tests.proxy import Proxy
from train.config import DataConfig
from train.data.batches import draw_epoch, epoch_order
from train.data.labels import LabelledCache, read_labelled_cache
from train.data.rare import compute_repeat_factors
from train.data.streaming import StreamedTiles
from train.data.vectors import Residence
from train.model.augment import Augmentation

TIMEOUT_S = 120
IN_TURN = Path(__file__).with_name("in_turn.py")
HEAD = ("--epochs", 2, "--batch-size", 8, "--dropout", 0, "--no-amp", "--device", "cpu")
DROPPING = ("--epochs", 10, "--batch-size", 8, "--save-steps", 3, "--device", "cpu")
VECTORS = ("--epochs", 2, "--batch-size", 64, "--dropout", 0, "--no-amp", "--device", "cpu")
CONVEX = ("--head", "linear", "--loss", "bce", "--weight-decay", 0, "--epochs", 12, "--lr", 0.05)
"""Where training goes to whatever the order of the rows: click takes the last value of an option."""
PLANTED = 8
"""Classes that made-up vectors tell: see `plant_cache`."""
STREAMED = ("--memory-budget", "64K")
STILL = ("--lr", 1e-12)
"""Steps too small to change a weight."""
CONTROLLED = (
    *("--epochs", 30, "--batch-size", 8, "--dropout", 0, "--no-amp", "--device", "cpu", "--run-dir", "runs/controlled"),
    *("--class-weights", "balanced", "--repeat-factor", 0.5, "--clip-norm", 0.005, "--patience", 1),
)
PREDICT = ("--tta", "d4", "--device", "cpu", "--workers", 0)
NAMED = ("--window", 8, "--out", "named.jsonl", "--device", "cpu", "--workers", 0)
AUGMENTED = ("--views", "d4", "--jitter", 0.3, "--crop-scale", 0.7)
FINETUNE = ("--epochs", 2, "--unfreeze", 2, "--batch-size", 4, "--dropout", 0, "--no-amp", "--device", "cpu")


COPIES = ("held", "streamed")
READS = {
    "held": 1 << 20,
    "streamed": 64 << 10,
    **dict.fromkeys(["nan", "cut", "unknown", "apart-{rank}", "lacking-{rank}"], 1 << 20),
}
"""Caches that two ranks read between them, and bytes for their vectors: two copies of `vectors` in a bucket, and others
that cannot serve."""


@dataclass(frozen=True)
class InBucket:
    """Copies of `vectors` in a bucket that is seen through a proxy."""

    url: str
    proxy: Proxy

    def find(self, made: Path, name: str) -> str:
        """Where a cache of `READS` is."""
        return f"{self.url}/{name}" if name in COPIES else str(made / name)

    def count_reads(self, copy: str, array: str) -> dict[int, int]:
        """How often the chunk of each block was read."""
        chunk = re.compile(rf"/{copy}/\w+\.zarr/{array}/c/(\d+)[^?]*\?.*alt=media")
        return Counter(int(found[1]) for path in self.proxy.asked if (found := chunk.search(unquote(path))))


@pytest.fixture(scope="module")
def in_bucket(made: Path, gcs_server: str) -> Iterator[InBucket]:
    client = storage.Client(project="tests", credentials=AnonymousCredentials())
    bucket = client.create_bucket(f"test-{uuid.uuid4().hex[:16]}")
    for path in filter(Path.is_file, (made / "vectors").rglob("*")):
        for copy in COPIES:
            bucket.blob(f"{copy}/{path.relative_to(made / 'vectors')}").upload_from_filename(path)
    with Proxy(gcs_server).serve() as proxy:
        yield InBucket(f"gs://{bucket.name}", proxy)


def spoil_copies(root: Path) -> None:
    """Of nine blocks the last five are rank 1's: one of them with a vector that is not finite, or without its labels;
    in another cache, one of rank 0's with labels that mean nothing. And caches of each rank's own: rank 1 has another,
    or none."""
    for name in ("nan", "cut", "unknown"):
        shutil.copytree(root / "vectors", root / name)
    values = open_cache(root / "nan").read_block(6)
    values.pooled["cls"][3, 2] = np.nan
    rewrite_block(str(root / "nan"), 6, values)
    values = open_cache(root / "unknown").read_block(2)
    values.label_ids[:, -1] = 1
    rewrite_block(str(root / "unknown"), 2, values)
    (chunk,) = (root / "cut").glob("*.zarr/label_ids/c/7/0")
    chunk.write_bytes(b"cut")
    for name in ("apart-0", "lacking-0"):
        (root / name).symlink_to("vectors")
    plant_cache(str(root / "apart-1"), 300)


def torchrun(ranks: int, *arguments: object) -> list[str]:
    launch = [sys.executable, "-m", "extract.launch", "--standalone", f"--nproc-per-node={ranks}", "-m", "train"]
    return [*launch, *map(str, arguments)]


def run_in_turn(cwd: Path, env: dict[str, str], *commands: tuple[object, ...]) -> str:
    """What commands print that run one after the other on two ranks of one job."""
    launch = [sys.executable, "-m", "extract.launch", "--standalone", "--nproc-per-node=2", str(IN_TURN)]
    text = json.dumps([list(map(str, command)) for command in commands])
    status, out, err = run_to_end([*launch, text], cwd, env)
    assert status == 0, out + err
    assert "Traceback" not in err
    return out


def run_to_end(command: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
    with started(command, cwd, env) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


@contextmanager
def started(command: list[str], cwd: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate(timeout=TIMEOUT_S)


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 for the launcher, its ranks (torchrun gives each a session of its own) and their feed workers."""
    for pid in [*find_descendants(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def find_descendants(pid: int) -> list[int]:
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread is gone
            children += [int(child) for child in path.read_text().split()]
    return children + [grandchild for child in children for grandchild in find_descendants(child)]


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 tiles: 49 train, so that the last batch of 4 or 8 has one row; 17 validate, for one rank and two unequally."""
    root = tmp_path_factory.mktemp("ranks")
    seed = fresh_seed()
    plant_tiles(root / "tiles", scenes=6, per_scene=11, seed=seed)
    extract_cache(root / "tiles", root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    tiles = sorted(f"images/{path.name}" for path in (root / "tiles" / "images").iterdir())
    shown = [tile for tile in tiles if (root / "tiles" / "labels" / f"{Path(tile).stem}.txt").read_text()]
    plant_cache(str(root / "vectors"), 2_100, seed=seed)  # nine blocks, 66K
    plant_cache(str(root / "others"), 200, seed=seed + 1)  # one block, so that a rank of two has none
    spoil_copies(root)
    # 35 x 35 windows of 8 pixels: more batches than two ranks put in order at once, and more rows than a batch has.
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 280, 280), dtype=np.uint8)
    placed: dict[str, Any] = {"crs": "EPSG:32633", "transform": Affine(0.3, 0, 500_000, 0, -0.3, 5_000_000)}
    with rasterio.open(root / "scene.tif", "w", "GTiff", 280, 280, 3, dtype="uint8", **placed) as raster:
        raster.write(pixels)
    (root / "split.json").write_text(
        json.dumps({"train": shown[:49], "val": [t for t in tiles if t not in shown[:49]]})
    )
    return root


def data(made: Path) -> tuple[object, ...]:
    return ("--cache", made / "cache", "--split-file", made / "split.json", "--empty", "keep")


@pytest.fixture(scope="module")
def both(made: Path, in_bucket: InBucket, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Working directories of the same runs, head and fine-tuned, on one rank and on two; the two also predict with the
    one's model, and train a head with dropout that another test stops and resumes. The two fine-tune from the prefix
    cache and in parts. Heads on made-up vectors are trained in memory on one rank, streamed on two. Then the two read
    caches between them, see `READS`."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    head = ("head", *data(made), *HEAD, "--folds", 2)
    finetune = ("finetune", *data(made), *FINETUNE, "--views", "d4", "--head-run", one / "runs" / "head")
    vectors = ("head", "--cache", made / "vectors", *VECTORS, "--run-dir")
    held = ((*vectors, "runs/vectors", *CONVEX), (*vectors, "runs/still", *STILL))
    controlled = ("head", *data(made), *CONTROLLED)
    prefix = (*finetune, "--workers", 0, "--cache-prefix", "--run-dir", "runs/prefix")
    shuffled = (*vectors, "runs/shuffled", *CONVEX, "--seed", 1, "--split-file", one / "runs/vectors/split.json")
    for command in (head, (*finetune, "--workers", 0), prefix, controlled, *held, shuffled):
        result = run_train(one, *command)
        assert result.status == 0, result.err
    predict = ("predict", "--run-dir", one / "runs" / "finetune", "--tiles", made / "tiles", *PREDICT)
    named = ("predict", "--run-dir", one / "runs" / "head", *name_inputs(made), *NAMED)
    whole = ("head", *data(made), *DROPPING, "--run-dir", "runs/whole")
    streamed = ((*command, *STREAMED) for command in held)
    in_parts = (*finetune, "--cache-prefix", "--accumulate", 2, "--grad-checkpoint")
    places = {name: in_bucket.find(made, name) for name in READS}
    reads = (("read", two / name, place, made / "others", READS[name]) for name, place in places.items())
    env = make_env() | {"STORAGE_EMULATOR_HOST": in_bucket.proxy.url}
    out = run_in_turn(two, env, head, in_parts, predict, named, whole, controlled, *streamed, *reads)
    assert out.count("vectors stay in the cache") == 2
    return one, two


def read_alone(made: Path) -> LabelledCache:
    residence = Residence(("cls",), torch.device("cpu"), size=0, budget=0, batch_size=16, held=True)
    return read_labelled_cache(open_cache(str(made / "cache")), DataConfig(empty="keep"), residence, Ranks.alone())


def make_env() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture
def env() -> dict[str, str]:
    return make_env()


def compute_logits(made: Path, run: Path) -> np.ndarray:
    """Validation logits from the files of a run and of the cache alone."""
    version = read(made / "cache" / "current")["version"]
    arrays = zarr.open_group(str(made / "cache" / f"{version}.zarr"), mode="r")
    row_of = {str(name): row for row, name in enumerate(arrays["tile"][:])}
    rows = [row_of[name] for name in read(run / "split.json")["val"]]
    inputs = arrays["cls"][:][rows].astype(np.float64)
    t = {name: tensor.astype(np.float64) for name, tensor in load_file(run / "best" / "model.safetensors").items()}
    hidden = np.maximum(inputs @ t["head.0.weight"].T + t["head.0.bias"], 0)
    return hidden @ t["head.3.weight"].T + t["head.3.bias"]


def test_two_ranks_train_the_head_that_one_does(both: tuple[Path, Path], made: Path) -> None:
    one, two = (root / "runs" / "head" for root in both)
    assert read(one / "split.json") == read(two / "split.json")
    assert len(read(one / "split.json")["train"]) % 8 == 1
    assert len(read(one / "split.json")["val"]) % 2 == 1
    first, second = read_history(one), read_history(two)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["lr"] == a["lr"]
    logits = [compute_logits(made, run) for run in (one, two)]
    assert np.linalg.norm(logits[1] - logits[0]) <= 1e-5 * np.linalg.norm(logits[0])
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5 * np.abs(logits[0]).max())


def test_two_ranks_stream_every_row_once(both: tuple[Path, Path]) -> None:
    """The weights stay as they are, so the losses are means over all rows, in whatever order and on whichever rank."""
    held, streamed = (read_history(root / "runs" / "still") for root in both)
    for a, b in zip(held, streamed, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["map_macro"] == pytest.approx(a["map_macro"], abs=1e-5)


def test_two_ranks_that_stream_train_what_one_does_in_memory(both: tuple[Path, Path], made: Path) -> None:
    """In another order: validation loss within 2 % (1 % seen over seeds), and logits that differ no more than those of
    one rank that shuffles by another seed do, twice over (1.3 times seen)."""
    held, streamed = (read_history(root / "runs" / "vectors") for root in both)
    assert held[0]["loss"] > 1.5 * held[-1]["loss"]
    assert streamed[-1]["loss"] == pytest.approx(held[-1]["loss"], rel=0.02)
    assert streamed[0]["train_loss"] != held[0]["train_loss"]
    vectors = open_cache(made / "vectors")["cls"][:].astype(np.float64)

    def compute_last(run: Path) -> np.ndarray:
        tensors = load_file(run / "last" / "model.safetensors")
        logits: np.ndarray = vectors @ tensors["head.0.weight"].T + tensors["head.0.bias"]
        return logits[:, :PLANTED]  # no row shows the other classes: the minimum of their loss is at infinity

    wanted, shuffled, found = map(
        compute_last, [both[0] / "runs/vectors", both[0] / "runs/shuffled", both[1] / "runs/vectors"]
    )
    assert np.linalg.norm(found - wanted) <= 2 * np.linalg.norm(shuffled - wanted)


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_know_what_one_does_of_a_cache_they_read_between_them(
    both: tuple[Path, Path], made: Path, name: str, rank: int
) -> None:
    """Bit for bit; streamed vectors are whatever the rank reads, and takes for what the other found in its share."""
    known = np.load(both[1] / f"{name}-{rank}.npz")
    alone = read_caches(str(made / "vectors"), str(made / "others"), READS[name], Ranks.alone())
    assert set(known) == set(alone)
    for key, expected in alone.items():
        np.testing.assert_array_equal(known[key], expected, strict=True)
    for side, cache in (("train", "vectors"), ("val", "others")):
        rows = open_cache(made / cache).read_rows()
        np.testing.assert_array_equal(known[f"{side}_index"], np.arange(len(rows.status)))
        np.testing.assert_array_equal(known[f"{side}_labels"], rows.label_ids[:, :60] > 0)
        np.testing.assert_array_equal(known[f"{side}_vectors"], rows.pooled["cls"], strict=True)


def test_two_ranks_read_each_chunk_once_between_them(both: tuple[Path, Path], in_bucket: InBucket) -> None:
    """Streamed vectors are read a second and a third time here, by either rank, to see that both can check them."""
    for copy, name, times in [
        *((copy, name, 1) for copy in COPIES for name in ("label_ids", "status", "commit")),
        ("held", "cls", 1),
        ("streamed", "cls", 3),
    ]:
        assert in_bucket.count_reads(copy, name) == dict.fromkeys(range(9), times), (copy, name)


@pytest.mark.parametrize(
    "name, said",
    [
        ("nan", f"array cls of row {6 * 256 + 3} is not finite"),
        ("cut", "256 rows of"),
        ("unknown", r"% of all label lines are ignored: 256 malformed"),
        ("apart", r"apart-1 holds version \w+ for rank 0 and \w+ for another rank: give every node the same cache"),
        ("lacking", "no cache at .*lacking-1: run `make extract` first"),
    ],
)
def test_what_one_rank_finds_ends_all_with_the_line_of_one_process(
    both: tuple[Path, Path], made: Path, name: str, said: str
) -> None:
    """One rank alone finds it, or counts it, and rank 0 says it."""
    lines = [str(np.load(path)["error"]) for path in sorted(both[1].glob(f"{name}*.npz"))]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert re.search(said, lines[0])
    if (made / name).is_dir():
        with pytest.raises(TileprobeError) as alone:
            read_caches(str(made / name), str(made / "others"), READS[name], Ranks.alone())
        assert str(alone.value) == lines[0]


def test_weights_repeats_clipping_and_patience_do_not_depend_on_the_ranks(both: tuple[Path, Path]) -> None:
    """Every step is clipped, by the norm of the gradient over all ranks; both ranks stop after the same epoch."""
    first, second = (read_history(root / "runs" / "controlled") for root in both)
    assert 2 <= len(first) == len(second) < 30
    for a, b in zip(first, second, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert (b["lr"], b["train_tiles"], b["clipped_share"]) == (a["lr"], a["train_tiles"], a["clipped_share"])
        assert a["train_tiles"] > 49
    assert first[0]["clipped_share"] > 0.5


@pytest.mark.parametrize("rank", [0, 1])
def test_repeated_tiles_are_streamed_as_often_as_they_are_drawn(made: Path, rank: int) -> None:
    """The rank's share of each batch, pixels and labels of the very rows."""
    cache = read_alone(made)
    rows = replace(cache.rows, repeat_factors=compute_repeat_factors(cache.rows.labels, 0.7))
    ranks = Ranks(rank, 2, 2, torch.device("cpu"), dist.HashStore())
    feed = TileFeed(open_source(str(made / "tiles")), workers=0)
    checkpoint = find_checkpoint(str(made / "checkpoint"))
    tiles = StreamedTiles(replace(cache, rows=rows), feed, checkpoint, ranks, dtype=torch.float32, eval_batch=16)
    order = draw_epoch(rows, 3, 1)
    assert len(order) > len(rows) + 5
    batches = list(tiles.iterate_epoch(batch_size=16, seed=3, epoch=1))
    alone = Ranks.alone()
    pixels = torch.cat(
        list(StreamedTiles(cache, feed, checkpoint, alone, dtype=torch.float32, eval_batch=16).iterate_share())
    )
    for batch, whole in zip(batches, order.split(16), strict=True):
        assert batch.rows.tolist() == whole[rank::2].tolist()
        assert batch.global_size == len(whole)
        assert torch.equal(batch.labels, torch.from_numpy(rows.labels)[batch.rows])
        assert torch.equal(batch.inputs, pixels[batch.rows])


@pytest.mark.parametrize("rank", [0, 1])
def test_tiles_are_augmented_by_their_row_to_train_on_and_never_to_be_scored(made: Path, rank: int) -> None:
    cache = read_alone(made)
    feed, checkpoint = TileFeed(open_source(str(made / "tiles")), workers=0), find_checkpoint(str(made / "checkpoint"))
    ranks = Ranks(rank, 2, 2, torch.device("cpu"), dist.HashStore())
    options: dict[str, Any] = {"dtype": torch.float32, "eval_batch": 16}
    plain = StreamedTiles(cache, feed, checkpoint, ranks, **options)
    augmentation = Augmentation("d4", 0.3, 0.7)
    tiles = StreamedTiles(cache, feed, checkpoint, ranks, **options, augmentation=augmentation)
    epochs = ({"batch_size": 13, "seed": 3, "epoch": epoch} for epoch in (0, 1))
    for epoch in epochs:
        for batch, other in zip(tiles.iterate_epoch(**epoch), plain.iterate_epoch(**epoch), strict=True):
            assert torch.equal(batch.rows, other.rows)
            assert torch.equal(batch.labels, other.labels)
            draws = {"seed": 3, "epoch": epoch["epoch"], "mean": MEAN, "std": STD}
            assert torch.equal(batch.inputs, augmentation.apply(other.inputs, other.rows, **draws))
            assert (batch.inputs != other.inputs).flatten(1).any(dim=1).all()
    for scored, other_scored in zip(tiles.iterate_share(), plain.iterate_share(), strict=True):
        assert torch.equal(scored, other_scored)


@pytest.mark.parametrize("run", ["head", "finetune"])
def test_metrics_are_those_of_one_rank(both: tuple[Path, Path], run: str) -> None:
    """The model is the same to rounding, so every count is; loss and thresholds to the tolerance of the loss."""
    tolerance = 1e-5 if run == "head" else 1e-3
    one, two = (read(root / "runs" / run / "metrics.json") for root in both)
    rows = [(one, two), *zip(one["per_class"], two["per_class"], strict=True)]
    for a, b in rows:
        for name in set(a) - {"per_class", "intervals", "variants", "calibration", "reliability", "baselines"}:
            if isinstance(a[name], float):
                assert b[name] == pytest.approx(a[name], rel=tolerance, abs=tolerance), name
            else:
                assert b[name] == a[name], name
    assert two["calibration"] == pytest.approx(one["calibration"], rel=1e-3, abs=1e-3)


def test_two_ranks_cross_validate_as_one_does(both: tuple[Path, Path]) -> None:
    one, two = (load_file(root / "runs" / "head" / "out_of_fold.safetensors") for root in both)
    for name in ("row", "fold"):
        np.testing.assert_array_equal(one[name], two[name])
    largest = np.abs(one["logits"]).max()
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-5, atol=1e-5 * largest)


def test_from_the_prefix_cache_training_is_what_it_is_streamed(both: tuple[Path, Path]) -> None:
    """In eight views. Only the last batch has another shape, filled up before it goes through the frozen layers: losses
    within 1e-5."""
    streamed, kept = (read_history(both[0] / "runs" / name) for name in ("finetune", "prefix"))
    for a, b in zip(streamed, kept, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_two_ranks_fine_tune_what_one_does(both: tuple[Path, Path]) -> None:
    """Adam divides by the gradient's own size, so a rounding difference in a tiny gradient moves a weight by up to a
    step: losses agree within 1e-4 relative, weights within 4 % of what training moved them. The last batch has one
    row, so one rank has none. Tiles are augmented, each in the same way on whichever rank it is."""
    one, two = (root / "runs" / "finetune" for root in both)
    assert len(read(one / "split.json")["train"]) % 4 == 1
    for a, b in zip(read_history(one), read_history(two), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    first, second = (load_file(run / "last" / "model.safetensors") for run in (one, two))
    start = load_file(both[0] / "runs" / "head" / "best" / "model.safetensors")
    for name, tensor in start.items():
        moved = np.linalg.norm(first[name] - tensor)
        assert moved > 0
        assert np.linalg.norm(second[name] - first[name]) <= 0.04 * moved, name


def test_two_ranks_predict_what_one_does(both: tuple[Path, Path], made: Path) -> None:
    one, two = both
    target = ("--run-dir", "runs/finetune", "--tiles", made / "tiles", *PREDICT)
    alone = run_train(one, "predict", *target)
    assert alone.status == 0, alone.err
    first, second = ([line.split(",") for line in (r / "predictions.csv").read_text().splitlines()] for r in (one, two))
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert len(first) == 67
    at = first[0].index("Building")
    probs = [np.array([[float(cell) for cell in row[at:]] for row in table[1:]]) for table in (first, second)]
    np.testing.assert_allclose(*probs, atol=1e-5)


def name_inputs(made: Path) -> tuple[Path, ...]:
    return made / "tiles" / "images" / "s01_1.png", made / "scene.tif", made / "tiles"


def test_two_ranks_write_the_rows_of_named_inputs_in_order(both: tuple[Path, Path], made: Path) -> None:
    """The same file but for the last digits of probabilities."""
    alone = run_train(both[0], "predict", "--run-dir", "runs/head", *name_inputs(made), *NAMED)
    assert alone.status == 0, alone.err
    first, second = ([json.loads(line) for line in (r / "named.jsonl").read_text().splitlines()] for r in both)
    assert len(first) == len(second) == 1 + 35 * 35 + 66
    for a, b in zip(first, second, strict=True):
        assert list(a.pop("probs").values()) == pytest.approx(list(b.pop("probs").values()), abs=1e-5)
        assert a == b
    assert first[1]["tile"] == f"{made / 'scene.tif'}#0_0"
    assert sorted(path.name for path in both[1].iterdir() if path.name.startswith("named")) == [
        "named-thresholds.csv", "named.jsonl"
    ]  # fmt: skip


# Stopped and resumed


def start_and_kill(command: list[str], cwd: Path, env: dict[str, str], run: Path, *, epochs: int, of: int) -> None:
    """kill -9 once history has that many lines."""
    with started(command, cwd, env) as process:
        wait_until(lambda: count_lines(run / "history.jsonl") >= epochs, process)
        kill_group(process)
    assert epochs <= count_lines(run / "history.jsonl") < of, "it was over before it could be stopped"
    assert not (run / "metrics.json").exists()


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert (resumed / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    assert read(resumed / "metrics.json") == read(whole / "metrics.json")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert (resumed / "report.html").is_file()


def test_killed_runs_resume_to_the_same_history(
    both: tuple[Path, Path], made: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """With dropout and augmentation. A head on two ranks, resumed on two: byte for byte what it would have been.
    Fine-tuning on one, resumed on one: likewise; a copy of it, resumed on two, goes on to the end."""
    head, finetune = tmp_path / "runs" / "head", tmp_path / "runs" / "finetune"
    start_and_kill(torchrun(2, "head", *data(made), *DROPPING), tmp_path, env, head, epochs=2, of=10)
    options = ("--epochs", 6, "--unfreeze", 2, "--batch-size", 16, "--save-steps", 5, "--device", "cpu", "--workers", 0)
    arguments = ("finetune", *data(made), *options, *AUGMENTED, "--head-run", both[0] / "runs" / "head")
    alone = [sys.executable, "-m", "train", *map(str, arguments)]
    # The first epoch may be killed before its checkpoint is there; of the second on, there is one.
    start_and_kill(alone, tmp_path, env, finetune, epochs=2, of=6)
    copy = Path(shutil.copytree(tmp_path, tmp_path.with_name("copy"), symlinks=True))

    resume = ("--resume", "--device", "cpu")
    there = ("finetune", *resume, "--workers", 0, "--run-dir", copy / "runs" / "finetune")
    out = run_in_turn(tmp_path, env, ("head", *resume), there)
    assert re.search(r"resuming runs/head-001 after epoch \d+ of 10", out)
    assert_same_run(head, both[1] / "runs" / "whole")
    assert len(read_history(copy / "runs" / "finetune")) == 6

    result = run_train(tmp_path, "finetune", *resume, "--workers", 0)
    assert result.status == 0, result.err
    assert "mAP of the starting head" not in result.out  # it does not start any more
    result = run_train(tmp_path, *arguments, "--run-dir", "runs/whole")
    assert result.status == 0, result.err
    assert_same_run(finetune, tmp_path / "runs" / "whole")


def test_a_run_that_is_asked_to_stop_resumes_to_the_same_history(
    made: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "head"
    arguments = ("head", *data(made), "--epochs", 30, "--batch-size", 8, "--save-every", 2, "--device", "cpu")
    with started([sys.executable, "-m", "train", *map(str, arguments)], tmp_path, env) as process:
        wait_until(lambda: count_lines(run / "history.jsonl") >= 5, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT_S) != 0
    assert 5 <= count_lines(run / "history.jsonl") < 30, "it was over before it could be stopped"
    result = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    match = re.search(r"after epoch (\d+) of 30", result.out)
    assert match
    assert int(match[1]) % 2 == 0
    assert run_train(tmp_path, *arguments, "--run-dir", "runs/whole").status == 0
    assert_same_run(run, tmp_path / "runs" / "whole")


def test_a_damaged_last_checkpoint_costs_an_epoch_not_the_run(made: Path, tmp_path: Path) -> None:
    arguments = ("head", *data(made), "--epochs", 4, "--device", "cpu")
    assert run_train(tmp_path, *arguments).status == 0
    run = tmp_path / "runs" / "head"
    history = (run / "history.jsonl").read_bytes()
    weights = run / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    assert "resuming runs/head-001 after epoch 3 of 4" in result.out
    assert (run / "history.jsonl").read_bytes() == history


# Failing on one rank


def test_an_error_on_one_rank_ends_the_job_with_one_line(made: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """A tile goes away while the job runs, one that rank 1 alone is going to read."""
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    epochs, batch = 12, 8
    names = read(made / "split.json")["train"]
    reader = [{row: i % batch % 2 for i, row in enumerate(epoch_order(len(names), 0, e).tolist())} for e in range(8)]
    # Epoch 1 has its line when the tile goes; what is prefetched by then may be read yet.
    victim = next(row for row in range(len(names)) if all(order[row] == 1 for order in reader[2:5]))
    options = ("--split-file", made / "split.json", "--empty", "keep", "--batch-size", batch, "--epochs", epochs)
    command = torchrun(2, "finetune", "--cache", cache, *options, "--workers", 0, "--device", "cpu")
    with started(command, tmp_path, env) as process:
        wait_until(lambda: count_lines(tmp_path / "runs" / "finetune" / "history.jsonl") >= 1, process)
        (tiles / names[victim]).unlink()
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode not in (0, None)
    assert "Traceback" not in out + err, err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1, err
    assert errors[0].endswith(
        f"error: {names[victim]} was listed but is gone, but the cache holds its embedding: run `make extract` again"
    )

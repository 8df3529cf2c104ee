"""Two ranks train, evaluate and predict what one does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import zarr
from safetensors.numpy import load_file

from cache_schema import TileprobeError, open_cache
from extract.backbone.checkpoint import find_checkpoint
from extract.ranks.group import Ranks
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source
from tests.checkpoints import MEAN, STD
from tests.distributed.read_between import read as read_caches
from tests.distributed.train_ranks.ranks import (
    COPIES,
    NAMED,
    PLANTED,
    PREDICT,
    READS,
    InBucket,
    name_inputs,
    read,
    read_history,
)
from tests.planted import train as run_train
from train.config import DataConfig
from train.data.batches import draw_epoch
from train.data.labels import LabelledCache, read_labelled_cache
from train.data.rare import compute_repeat_factors
from train.data.streaming import StreamedTiles
from train.data.vectors import Residence
from train.model.augment import Augmentation


def read_alone(made: Path) -> LabelledCache:
    residence = Residence(("cls",), torch.device("cpu"), size=0, budget=0, batch_size=16, held=True)
    return read_labelled_cache(open_cache(str(made / "cache")), DataConfig(empty="keep"), residence, Ranks.alone())


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

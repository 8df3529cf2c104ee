"""Every Python example of the texts, run in order as it stands there, on a cache that the real extraction made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import Status, open_cache
from tests.checkpoints import make_checkpoint
from tests.markdown import ROOT, TEXTS, read_blocks
from tests.planted import CLASSES, extract_cache, fresh_seed, plant_tiles

CACHE = "cache/xview_tiled-train-vitl16-512"
UNREADABLE, UNLABELLED = "images/s03_4.png", "images/s05_1.png"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as after `make extract`: two blocks, a tile that cannot be read, one without a label file."""
    root, seed = tmp_path_factory.mktemp("work"), fresh_seed()
    tiles = plant_tiles(root / "tiles", scenes=30, per_scene=9, seed=seed, empty=4)
    (tiles / UNREADABLE).write_bytes(b"no image")
    (tiles / "labels" / "s05_1.txt").unlink()
    (root / "cache").mkdir()
    extract_cache(tiles, root / CACHE, make_checkpoint(root / "vitl16", seed=seed), unlabelled=True)
    return root


@pytest.fixture(scope="module")
def examples(work: Path) -> dict[str, dict[str, Any]]:
    """By text: the names its examples leave, which is what a user would look at next."""
    left = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for text in TEXTS:
            names: dict[str, Any] = {"__name__": "example"}
            for block in read_blocks(text):
                if block.language == "python":
                    exec(compile(block.text, block.where, "exec"), names)
            left[text] = names
    return left


def test_no_text_lost_its_examples(examples: dict[str, dict[str, Any]]) -> None:
    without = {"train/README.md", "tests/benchmarks/README.md"}
    assert {text for text, names in examples.items() if len(names) > 2} == set(TEXTS) - without


def test_examples_use_what_can_be_used_and_nothing_else(work: Path, examples: dict[str, dict[str, Any]]) -> None:
    """No NaN, no row without a label file; labels counted from the files, vectors read by Zarr alone."""
    cache, names = open_cache(work / CACHE), examples["cache_schema/README.md"]
    used = [str(tile) for tile in cache.tiles if str(tile) not in (UNREADABLE, UNLABELLED)]
    assert len(cache) == 270
    assert len(used) == len(names["x"]) == len(names["y"]) == 268
    assert np.isfinite(names["x"]).all()
    plain = dict(zip(cache.tiles.tolist(), np.asarray(cache.group["cls"][:]), strict=True))  # type: ignore[index]
    np.testing.assert_array_equal(names["x"], [plain[tile] for tile in used])
    class_of = {type_id: class_id for class_id, type_id, _ in CLASSES.values()}
    for tile, row in zip(used, names["y"], strict=True):
        lines = (work / "tiles" / tile.replace("images", "labels").replace(".png", ".txt")).read_text().splitlines()
        assert set(np.flatnonzero(row)) == {class_of[int(line.split()[0])] for line in lines}


def test_examples_of_every_library_hold_the_same(examples: dict[str, dict[str, Any]]) -> None:
    names = examples["cache_schema/README.md"]
    x, y = names["x"].astype(np.float32), names["y"]
    np.testing.assert_allclose(names["mean"], x.mean(axis=0), atol=1e-5)
    assert names["count"] == len(x)
    assert not set(names["scenes"][names["train"]]) & set(names["scenes"][names["val"]])
    assert 0.3 < names["mean_ap"] <= 1, "the planted squares are seen"
    streamed = np.concatenate([vectors.numpy() for vectors, _ in names["batches"]])
    order, expected = np.lexsort(streamed.T), np.lexsort(names["x"].T)
    np.testing.assert_array_equal(streamed[order], names["x"][expected])
    streamed_labels = np.concatenate([labels.numpy() for _, labels in names["batches"]])
    np.testing.assert_array_equal(streamed_labels[order], y[expected])
    np.testing.assert_array_equal(names["frame"].iloc[:, :60].to_numpy(bool), y)
    per_scene = np.array([y[names["scenes"] == scene].mean(axis=0) for scene in names["per_scene"].index])
    np.testing.assert_allclose(names["per_scene"].to_numpy(), per_scene)
    np.testing.assert_array_equal(names["lazy"]["status"].values[: len(x)], Status.EMBEDDED)
    assert names["dataset"].sizes == {"tile": len(x), "embedding": x.shape[1], "class": 60}


# What a text says is to be added to the program

PROGRAM = """
import json, torch
from extract.backbone.checkpoint import find_checkpoint
from tests.planted import train
from train.model.loss import LossConfig

logits = torch.tensor([[-3.0, 0.5]], requires_grad=True)
loss = LossConfig("poly", alpha=2.0)(logits, torch.tensor([[True, False]]))
loss.sum().backward()
done = train({work!r}, "head", "--cache", {cache!r}, "--loss", "poly", "--epochs", 2, "--device", "cpu")
assert done.status == 0, done.err
swept = train({work!r}, "sweep", "--cache", {cache!r}, "--losses", "bce,poly:1", "--lrs", "1e-3", "--weight-decays",
              "0.01", "--features", "cls", "--heads", "linear", "--seeds", 1, "--epochs", 2, "--device", "cpu")
assert swept.status == 0, swept.err
found = find_checkpoint("vitb16")
with open({work!r} + "/runs/head/config.json") as stream:
    named = json.load(stream)["config"]["loss"]
print(json.dumps([loss.tolist(), named, "poly:1" in swept.out, found.width, found.image_size]))
"""


def apply_diff(root: Path, diff: str) -> None:
    """Change files below `root` as a diff without line numbers says: what a hunk removes is there exactly once."""
    head, *hunks = diff.split("@@\n")
    path = root / head.splitlines()[1].removeprefix("+++ b/")
    text = path.read_text()
    for hunk in hunks:
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert text.count(before) == 1, f"{path.name} does not hold once:\n{before}"
        text = text.replace(before, after)
    path.write_text(text)


def test_a_loss_and_a_backbone_added_as_the_texts_say_work(work: Path, tmp_path: Path) -> None:
    for package in ("cache_schema", "extract", "train", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "unit", "e2e", "faults", "golden", "benchmarks")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    diffs = [block.text for text in TEXTS for block in read_blocks(text) if block.language == "diff"]
    assert len(diffs) == 2
    for diff in diffs:
        apply_diff(tmp_path, diff)
    # The hub's own cache, as a download leaves it, so that no network is needed.
    hub = tmp_path / "hub" / "hub" / "models--facebook--dinov3-vitb16-pretrain-lvd1689m"
    shutil.copytree(work / "vitl16", hub / "snapshots" / "0123")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    program = PROGRAM.format(work=str(tmp_path), cache=str(work / CACHE))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses, named, swept, width, size = json.loads(done.stdout.splitlines()[-1])
    p = 1 / (1 + np.exp([3.0, 0.5]))  # of the truth
    np.testing.assert_allclose(losses, [-np.log(p) + 2 * (1 - p)], rtol=1e-5)
    assert (named, swept, width, size) == ("poly", True, 64, 64)

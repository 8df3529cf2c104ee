"""Tiles of another data set, as DOTA's usual tools cut, name and label them, through every command: `--taxonomy`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cache_schema import open_cache
from extract.tiles.scenes import find_scenes
from tests.checkpoints import make_checkpoint
from tests.planted import CLASSES, extract_cache, fresh_seed, plant_tiles, train

NAMES = (
    *("plane", "baseball diamond", "bridge", "ground track field", "small vehicle", "large vehicle", "ship"),
    *("tennis court", "basketball court", "storage tank", "soccer field", "roundabout", "harbor", "swimming pool"),
    "helicopter",
)
SHOWN = (0, 4, 6, 9, 14)
"""What stands for the five planted classes: among them ids that xView lists as type ids, or not at all."""
SCENE = "^(?P<scene>[^_]+)__"
OPTIONS = ("--device", "cpu", "--taxonomy", "classes.csv", "--scene-regex", SCENE)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiles` named `P0003__1__0___4.png`, their class list, and their cache by the real extraction."""
    root, seed = tmp_path_factory.mktemp("dota"), fresh_seed()
    tiles = plant_tiles(root / "tiles", scenes=12, per_scene=8, seed=seed, prefix="P00", ids="class", empty=3)
    renumbered = dict(zip((class_id for class_id, _, _ in CLASSES.values()), SHOWN, strict=True))
    for folder in ("images", "labels"):
        for path in (tiles / folder).iterdir():
            scene, tile = path.stem.split("_")
            path.rename(path.with_name(f"{scene}__1__0___{tile}{path.suffix}"))
    for path in (tiles / "labels").iterdir():
        lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
        path.write_text("".join(f"{renumbered[int(raw)]} {rest}\n" for raw, rest in lines))
    (root / "classes.csv").write_text("class_id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(NAMES)))
    extract_cache(tiles, root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    done = train(root, "head", "--cache", "cache", *OPTIONS, "--epochs", 3)
    assert done.status == 0, done.err
    assert "label ids read as class ids" in done.out
    assert "of no known class" not in done.out
    return root


def read_truth(root: Path) -> dict[str, set[str]]:
    """Names of the classes by tile, off the label files."""
    return {
        f"images/{path.stem}.png": {NAMES[int(line.split()[0])] for line in path.read_text().splitlines()}
        for path in (root / "tiles" / "labels").iterdir()
    }


def read_metrics(run: Path) -> dict[str, dict[str, object]]:
    metrics = json.loads((run / "metrics.json").read_text())
    assert [entry["name"] for entry in metrics["per_class"]] == list(NAMES)
    return {entry["name"]: entry for entry in metrics["per_class"]}


def test_a_head_knows_the_classes_and_keeps_scenes_apart(work: Path) -> None:
    classes = read_metrics(work / "runs" / "head")
    assert {name for name, entry in classes.items() if entry["ap"] is not None} == {NAMES[i] for i in SHOWN}
    split = json.loads((work / "runs" / "head" / "split.json").read_text())
    train_scenes, val_scenes = ({name.split("/")[1].split("__")[0] for name in split[side]} for side in split)
    assert not train_scenes & val_scenes
    assert len(train_scenes | val_scenes) == 12


def test_figures_are_counted_from_the_label_files(work: Path) -> None:
    truth, split = read_truth(work), json.loads((work / "runs" / "head" / "split.json").read_text())
    for name, entry in read_metrics(work / "runs" / "head").items():
        assert entry["support"] == sum(name in truth[tile] for tile in split["val"])


def test_predictions_name_the_classes(work: Path) -> None:
    done = train(work, "predict", "--tiles", "tiles", "--device", "cpu", "--workers", 0)
    assert done.status == 0, done.err
    with (work / "predictions.csv").open() as stream:
        header, *rows = csv.reader(stream)
    assert len(rows) == 96
    assert [name for name in NAMES if any(name in column for column in header)] == list(NAMES)


def test_a_sweep_and_finetuning_take_the_class_list_too(work: Path) -> None:
    small = ("--lrs", "1e-3", "--weight-decays", "0.01", "--losses", "bce", "--features", "cls", "--seeds", 1)
    swept = train(work, "sweep", "--cache", "cache", *OPTIONS, *small, "--epochs", 2)
    assert swept.status == 0, swept.err
    assert "--taxonomy classes.csv" in swept.out, "the command that reproduces the winner"
    tuned = train(work, "finetune", "--cache", "cache", *OPTIONS, "--epochs", 1, "--unfreeze", 1, "--workers", 0)
    assert tuned.status == 0, tuned.err
    for run in ("sweep", "finetune"):
        assert {n for n, entry in read_metrics(work / "runs" / run).items() if entry["support"]} == {
            NAMES[i] for i in SHOWN
        }
    scored = train(
        work, "evaluate", "--run-dir", "runs/finetune", "--tiles", "tiles", "--device", "cpu", "--workers", 0
    )
    assert scored.status == 0, scored.err
    assert "storage tank" in scored.out
    assert "Storage Tank" not in scored.out


def test_the_report_names_the_classes(work: Path) -> None:
    report = (work / "runs" / "head" / "report.html").read_text()
    assert all(name in report for name in NAMES)
    assert "Helicopter" not in report


def test_a_notebook_reads_the_same_labels(work: Path) -> None:
    cache, truth = open_cache(work / "cache", taxonomy=work / "classes.csv"), read_truth(work)
    expected = np.array([[name in truth[str(tile)] for name in NAMES] for tile in cache.tiles])
    np.testing.assert_array_equal(cache.labels, expected)
    assert cache.usable.all()
    assert len(np.unique(find_scenes(cache.tiles, SCENE))) == 12


def test_without_the_class_list_a_run_is_refused(work: Path) -> None:
    done = train(work, "head", "--cache", "cache", "--device", "cpu", "--scene-regex", SCENE, "--label-ids", "type")
    assert done.status == 1
    assert len(done.errors) == 1
    assert "of all label lines are ignored" in done.errors[0]
    assert "--taxonomy" in done.errors[0]


def test_a_class_list_that_changed_after_training_scores_nothing(work: Path) -> None:
    classes = work / "classes.csv"
    before = classes.read_text()
    try:
        classes.write_text(before.replace("4,small vehicle", "4,ship").replace("6,ship", "6,small vehicle"))
        done = train(work, "evaluate", "--run-dir", "runs/head", "--cache", "cache", "--device", "cpu")
    finally:
        classes.write_text(before)
    assert (done.status, len(done.errors)) == (1, 1)
    assert "classes.csv does not name the classes that runs/head" in done.errors[0]

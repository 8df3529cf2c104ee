"""`train predict` on the tiles of a cache: every row of the table, and what it refuses."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache_schema import Taxonomy
from tests.e2e.train.recompute import UNREADABLE, assert_refused, compute_logits, read, sigmoid
from tests.planted import train as run_train


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return header, rows


@pytest.mark.parametrize("run", ["head", "finetune"])
@pytest.mark.parametrize("target", ["cache", "tiles"])
def test_predictions(trained: Path, made: Path, tmp_path: Path, run: str, target: str) -> None:
    out = tmp_path / "deep" / "predictions.csv"
    result = run_train(
        trained, "predict", "--run-dir", f"runs/{run}", f"--{target}", made / target, "--out", out, "--workers", 0,
        "--device", "cpu",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert f"117 tiles -> {out}" in result.out
    assert "1 of them could not be read" in result.out
    header, rows = read_csv(out)
    names = list(Taxonomy.xview().names)
    assert header == ["tile", "status", "preds", *names]
    tiles = sorted(f"images/{path.name}" for path in (made / "tiles" / "images").iterdir())
    assert [row[0] for row in rows] == tiles
    _, thresholds = read_csv(out.with_name("predictions-thresholds.csv"))
    assert [(row[0], row[1]) for row in thresholds] == [(str(i), name) for i, name in enumerate(names)]
    limits = [float(row[2]) for row in thresholds]
    tuned = [row["threshold"] for row in read(trained / "runs" / run / "metrics.json")["per_class"]]
    assert limits == pytest.approx(tuned, abs=1e-7)
    readable = [row for row in rows if row[0] != UNREADABLE]
    for row in readable:
        assert row[1] == "embedded"
        decided = [name for name, p, limit in zip(names, row[3:], limits, strict=True) if float(p) >= limit]
        assert row[2] == ";".join(decided)
    assert any(row[2] for row in readable)
    (blank,) = [row for row in rows if row[0] == UNREADABLE]
    assert blank[1:] == ["undecodable", "", *[""] * 60]
    if run == "head":  # the streamed vectors are those of the cache up to float16, that is to some 1e-3 of a logit
        temperature = read(trained / "runs" / "head" / "best" / "checkpoint.json")["temperature"]
        logits = compute_logits(made / "cache", trained / "runs" / "head", [row[0] for row in readable])
        expected = sigmoid(logits / temperature)
        found = np.array([[float(cell) for cell in row[3:]] for row in readable])
        np.testing.assert_allclose(found, expected, atol=1e-6 if target == "cache" else 2e-3 / min(temperature, 1))


def test_predictions_of_both_runs_differ(trained: Path, made: Path, tmp_path: Path) -> None:
    tables = []
    for run in ("head", "finetune"):
        arguments = ("--run-dir", f"runs/{run}", "--tiles", made / "test-tiles", "--workers", 0, "--device", "cpu")
        assert run_train(trained, "predict", *arguments, "--out", tmp_path / f"{run}.csv").status == 0
        tables.append([[float(cell) for cell in row[3:]] for row in read_csv(tmp_path / f"{run}.csv")[1]])
    assert np.abs(np.subtract(*tables)).max() > 1e-3


def test_predicting_needs_no_labels_and_survives_any_name(trained: Path, made: Path, tmp_path: Path) -> None:
    odd = ['a,b "c".png', "line\nbreak_1.png", "ünï;code_2.png", "=1+1.png"]
    (tmp_path / "tiles" / "images").mkdir(parents=True)
    for name in odd:
        shutil.copy(made / "tiles" / "images" / "s01_1.png", tmp_path / "tiles" / "images" / name)
    out = tmp_path / "p.csv"
    arguments = (
        "--run-dir",
        "runs/head",
        "--tiles",
        tmp_path / "tiles",
        "--out",
        out,
        "--workers",
        0,
        "--device",
        "cpu",
    )
    result = run_train(trained, "predict", *arguments)
    assert result.status == 0, result.err
    header, rows = read_csv(out)
    assert [row[0] for row in rows] == sorted(f"images/{name}" for name in odd)
    assert all(len(row) == len(header) for row in rows)
    probs = np.array([[float(cell) for cell in row[3:]] for row in rows])
    np.testing.assert_allclose(probs, probs[:1].repeat(4, axis=0), atol=1e-5)  # the same picture four times


def test_predictions_that_cannot_be_written_are_an_error(trained: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("--run-dir", "runs/head", "--cache", made / "val-cache", "--out", tmp_path / "file" / "p.csv")
    assert_refused(run_train(trained, "predict", *arguments), "choose another --out")

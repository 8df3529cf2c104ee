"""The whole way through a bucket."""

from __future__ import annotations

import re
from pathlib import Path

from google.cloud import storage

from tests.e2e.train.recompute import QUICK, assert_figures, assert_refused, compute_logits, names_shown, read
from tests.planted import extract_cache
from tests.planted import train as run_train


def test_the_whole_way_through_a_bucket(bucket: storage.Bucket, made: Path, tmp_path: Path) -> None:
    for path in sorted((made / "tiles").rglob("*")):
        if path.is_file():
            bucket.blob(f"set/{path.relative_to(made / 'tiles').as_posix()}").upload_from_filename(str(path))
    tiles = f"gs://{bucket.name}/set"
    cache = extract_cache(tiles, f"gs://{bucket.name}/cache", made / "checkpoint")
    result = run_train(tmp_path, "head", "--cache", cache, *QUICK)
    assert result.status == 0, result.err
    run = tmp_path / "runs" / "head"
    names, labels = names_shown(made / "tiles", read(run / "split.json")["val"])
    assert_figures(read(run / "metrics.json"), compute_logits(made / "cache", run, names), labels)
    arguments = ("--cache", cache, "--epochs", 1, "--workers", 0, "--unfreeze", 1, "--device", "cpu")
    result = run_train(tmp_path, "finetune", *arguments)
    assert result.status == 0, result.err
    assert "validates on the split of that run" in result.out
    result = run_train(tmp_path, "evaluate", "--run-dir", "runs/finetune", "--tiles", f"{tiles}/", "--workers", 0)
    assert result.status == 0, result.err
    assert "warning: " in result.out
    shown = names_shown(made / "tiles", read(run / "split.json")["train"])[0]
    used, unused = shown[0], next(name for name in read(run / "split.json")["train"] if name not in shown)
    other = str(made / "tiles" / shown[1])
    # Step 0 embeds rows that training leaves out, too, and one of them that has changed is no fault of the rest.
    bucket.blob(f"set/{unused}").upload_from_filename(other)
    result = run_train(tmp_path, "finetune", *arguments)
    assert result.status == 0, result.err
    bucket.blob(f"set/{used}").upload_from_filename(other)
    assert_refused(
        run_train(tmp_path, "finetune", *arguments), rf"0 tiles gone, 1 changed \(such as {re.escape(used)}\)"
    )

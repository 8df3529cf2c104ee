"""What commands print as JSON, quietly and verbosely, and their statuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache_schema import CacheRoot, open_cache
from cache_schema.cli.command import Group, Outcome
from tests.caches import fill_cache
from tests.e2e.command_line.commands import QUICK, cache_schema, extract, read_json
from tests.planted import train as run_train


def test_json_of_a_head_is_what_its_files_hold(made: Path, work: Path) -> None:
    result = run_train(work, "head", "--cache", made / "cache", "--val-cache", made / "cache", *QUICK, "--json")
    assert (result.status, result.out) == (1, ""), "an error leaves stdout empty"
    result = run_train(work, "head", "--cache", made / "cache", *QUICK, "--json")
    assert result.status == 0, result.err
    values, run = read_json(result.out), work / "runs" / "head-002"
    assert values["run"] == "runs/head-002"
    assert values["metrics"] == json.loads((run / "metrics.json").read_text())
    assert "run: runs/head-002" in result.err, "what is for people is on stderr"
    scored = run_train(work, "evaluate", "--cache", made / "cache", "--device", "cpu", "--json")
    assert scored.status == 0, scored.err
    values = read_json(scored.out)
    assert values["run"] == "runs/head-002"
    assert f"{values['map_macro']:.4f}" in scored.err
    assert len(values["per_class"]) == 60


def test_json_of_an_extraction_and_of_what_looks_at_it(made: Path, tmp_path: Path) -> None:
    arguments = ("--tiles", made / "tiles", "--backbone", made / "checkpoint", "--cache", "c", "--workers", 0)
    result = extract(tmp_path, "run", *arguments, "--precision", "float32", "--batch-size", 16, "--json")
    assert result.status == 0, result.err
    values = read_json(result.out)
    assert {name: values[name] for name in ("cache", "rows", "embedded", "quarantined", "computed", "kept")} == {
        "cache": "c",
        "rows": 60,
        "embedded": 60,
        "quarantined": 0,
        "computed": 60,
        "kept": 0,
    }
    info = read_json(cache_schema(tmp_path, "info", "c", "--json").out)
    assert (info["version"], info["rows"]) == (values["version"], 60)
    assert read_json(cache_schema(tmp_path, "verify", "c", "--json").out)["sound"] is True
    same = cache_schema(tmp_path, "diff", "c", made / "cache", "--json")
    assert (same.status, read_json(same.out)["differs"]) == (0, False)
    next(tmp_path.glob("c/*.zarr/cls/c/0/0")).write_bytes(b"x")
    damaged = cache_schema(tmp_path, "verify", "c", "--json")
    assert (damaged.status, read_json(damaged.out)["damaged_blocks"]) == (3, [0])
    fill_cache(str(tmp_path / "other"), 30)
    other = cache_schema(tmp_path, "diff", made / "cache", "other", "--json")
    assert (other.status, read_json(other.out)["differs"]) == (3, True)


def test_no_nan_reaches_json(capsys: pytest.CaptureFixture[str]) -> None:
    group = Group("train", context_settings={"help_option_names": ["--help"]})

    @group.command(gives_json=True)
    def odd() -> Outcome:
        print("for people")
        return Outcome({"a": math.nan, "b": [1.5, (-math.inf,)], "c": {"d": math.inf}}, status=3)

    with pytest.raises(SystemExit) as stop:
        group.main(["odd", "--json"], standalone_mode=False)
    printed = capsys.readouterr()
    assert stop.value.code == 3
    assert read_json(printed.out) == {"a": None, "b": [1.5, [None]], "c": {"d": None}}
    assert printed.err == "for people\n"


def test_quiet_leaves_the_last_line_and_verbose_adds_blocks_and_tracebacks(made: Path, tmp_path: Path) -> None:
    arguments = ("run", "--tiles", made / "tiles", "--backbone", made / "checkpoint", "--workers", 0, "--cache")
    quiet = extract(tmp_path, *arguments, "q", "--quiet")
    assert quiet.status == 0
    assert re.fullmatch(r"q: 60 embeddings, sealed \(version [0-9a-f]{20}\)\n", quiet.out)
    assert quiet.err == "", "no progress bar either"
    verbose = extract(tmp_path, *arguments, "v", "--verbose")
    assert "extract.writer: block 0: 60 rows committed in " in verbose.err
    assert "extract.run: rows 0-31: fetched in " in verbose.err
    usual = extract(tmp_path, *arguments, "u")
    assert "extract.writer" not in usual.err, "the log is as it was"
    assert "tile/s" in usual.err
    for option, lines in (("--verbose", "Traceback"), ("--quiet", None)):
        failed = extract(tmp_path, "run", "--tiles", "nowhere", "--backbone", made / "checkpoint", option)
        assert failed.status == 1
        assert len(failed.errors) == 1
        assert ("Traceback" in failed.err) == bool(lines), failed.err
        assert failed.out == ""
    assert extract(tmp_path, *arguments, "x", "-q", "-v").status == 2


def test_quiet_head_names_its_run(made: Path, work: Path) -> None:
    result = run_train(work, "head", "--cache", made / "cache", *QUICK, "-q")
    assert (result.status, result.out, result.err) == (
        0,
        "run: runs/head-002 (best/, metrics.json, report.html, model_card.md)\n",
        "",
    )


def test_too_many_quarantined_tiles_are_status_3(made: Path, tmp_path: Path) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    (tiles / "images/s00_0.png").write_bytes(b"no image")
    arguments = ("run", "--tiles", "tiles", "--backbone", made / "checkpoint", "--workers", 0, "--json")
    result = extract(tmp_path, *arguments)
    assert (result.status, result.out) == (3, "")
    assert "1 of 60 tiles are quarantined" in result.err
    result = extract(tmp_path, *arguments, "--max-quarantined", 0.1)
    assert (result.status, read_json(result.out)["quarantined"]) == (0, 1)


def test_versions_hold_what_they_held(made: Path) -> None:
    """Nothing above has written to the cache that all of it read."""
    version = open_cache(str(made / "cache"))
    assert CacheRoot(str(made / "cache")).versions() == [version.id]
    assert np.isfinite(version.read_rows().pooled["cls"]).all()

"""The three command lines as their user meets them: help, settings, what goes where, dry runs, statuses, Ctrl-C."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from cache_schema import CacheRoot, open_cache
from cache_schema.__main__ import run as run_cache_schema
from cache_schema.cli.command import HEADINGS, STATUSES, Command, Group, Outcome
from extract.__main__ import run as run_extract
from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from tests.caches import fill_cache
from tests.checkpoints import make_checkpoint
from tests.planted import Finished, extract_cache, fresh_seed, plant_tiles, run_here
from tests.planted import train as run_train
from tests.proxy import Proxy

GROUPS: dict[str, Group] = {
    name: importlib.import_module(f"{name}.__main__").main for name in ("cache_schema", "extract", "train")
}
COMMANDS = [
    pytest.param(group, command, id=f"{group.name} {command.name}")
    for group in GROUPS.values()
    for command in group.commands.values()
    if not command.hidden
]
LAUNCH = ("extract.launch", "--standalone", "--nproc-per-node")
QUICK = ("--device", "cpu", "--epochs", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 12 scenes, a checkpoint, their cache, and a head trained on it in `work`."""
    root = tmp_path_factory.mktemp("made")
    seed = fresh_seed()
    plant_tiles(root / "tiles", per_scene=5, seed=seed)
    extract_cache(root / "tiles", root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    (root / "work").mkdir()
    head = run_train(root / "work", "head", "--cache", root / "cache", *QUICK)
    assert head.status == 0, head.err
    return root


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "work", tmp_path / "work", symlinks=True))


def extract(cwd: Path, *arguments: object) -> Finished:
    return run_here(run_extract, cwd, *arguments)


def cache_schema(cwd: Path, *arguments: object) -> Finished:
    return run_here(run_cache_schema, cwd, *arguments)


def snapshot(root: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file, folder and link below `root`: when it changed, and what it holds."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


def read_json(text: str) -> Any:
    """JSON proper: Python would take NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


# Help


@pytest.mark.parametrize("group, command", COMMANDS)
def test_every_option_has_a_heading_a_text_and_its_default(group: Group, command: Command) -> None:
    with click.Context(group, info_name=f"python -m {group.name}") as above:
        context = click.Context(command, parent=above, info_name=command.name)
        text = command.get_help(context)
    sections = dict(re.findall(r"^(\S.*?):\n((?:^(?: .*)?\n)+)", text + "\n", re.MULTILINE))
    found = 0
    for param in command.get_params(context):
        if not isinstance(param, click.Option):
            continue
        found += 1
        name = max(param.opts, key=len)
        (title,) = [
            title for title in HEADINGS if re.search(rf"^  (-\w, )?{name}[ ,/\n]", sections.get(title, ""), re.M)
        ]
        own = re.split(r"^  (?=-)", sections[title], flags=re.MULTILINE)
        (entry,) = [entry for entry in own if re.match(rf"(-\w, )?{name}[ ,/\n]", entry)]
        assert param.help, f"{name} has no text"
        assert title != "Command line" or name in ("--json", "--settings", "--quiet", "--verbose", "--help"), name
        if not param.is_flag and not param.required:
            assert re.search(r"\[default:\s|;\s*default:", entry), f"{name} shows no default: {entry}"
    assert found == sum(isinstance(param, click.Option) for param in command.params) + 4 + command.gives_json
    assert "Examples" in sections


def parse_example(arguments: list[str]) -> None:
    """Parse a command line as its command would, and what it runs in turn; nothing is run."""
    assert arguments[:2] == ["python", "-m"], arguments
    if arguments[2] == "extract.launch":
        arguments = arguments[arguments.index("-m", 3) - 1 :]
    group, rest = GROUPS[arguments[2]], arguments[3:]
    command = group.commands[rest[0]]
    parsed = command.make_context(rest[0], rest[1:])
    if command.name == "demo" and group.name == "extract":
        parse_example(list(parsed.params["command"]))


@pytest.mark.parametrize("group, command", COMMANDS)
def test_every_example_is_a_command_line(
    group: Group, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert command.examples
    for example in command.examples:
        assert f"-m {group.name} {command.name}" in example
        parse_example(shlex.split(example))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_groups_help_has_the_table_of_statuses(group: Group) -> None:
    text = group.get_help(click.Context(group, info_name=f"python -m {group.name}"))
    for status, meaning in STATUSES:
        assert re.search(rf"^  {re.escape(status)}\s+{meaning[:30]}", text, re.MULTILINE)


def test_a_misspelt_name_gets_the_nearest(tmp_path: Path) -> None:
    for mistyped, meant in (
        (("haed",), "'head'"),
        (("head", "--epohcs", 1), "--epochs"),
        (("head", "--jsn"), "--json"),
    ):
        result = run_train(tmp_path, *mistyped)
        assert result.status == 2
        assert re.search(rf"Did you mean {meant}|did you mean .*{meant}|{meant}", result.err.splitlines()[-1])


# Settings


def test_line_over_environment_over_file_over_default(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tileprobe.toml").write_text(
        f'[train]\ncache = "{made / "cache"}"\ndevice = "cpu"\n'
        "[train.head]\nepochs = 2\nhidden = 16\nlr = 0.5\namp = false\nexclude = 5\nweight-decay = 0.25\n"
    )
    monkeypatch.setenv("TILEPROBE_TRAIN_HEAD_LR", "0.004")
    monkeypatch.setenv("TILEPROBE_TRAIN_HEAD_HIDDEN", "24")
    result = run_train(tmp_path, "head", "--hidden", 32)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "runs/head/config.json").read_text())["config"]
    expected = {"hidden": 32, "lr": 0.004, "epochs": 2, "weight_decay": 0.25, "amp": False, "dropout": 0.1}
    assert {name: config[name] for name in expected} == expected
    assert config["data"]["exclude"] == [5]
    told = result.out.splitlines()[0]
    assert told.startswith("settings: ")
    assert set(told.removeprefix("settings: ").split(", ")) == {
        "--lr 0.004 (TILEPROBE_TRAIN_HEAD_LR)",
        *(
            f"--{name} {value} (tileprobe.toml)"
            for name, value in (("epochs", 2), ("weight-decay", 0.25), ("exclude", 5))
        ),
        f"--cache {made / 'cache'} (tileprobe.toml)",
        "--device cpu (tileprobe.toml)",
        "--amp false (tileprobe.toml)",
    }
    other = tmp_path / "other.toml"
    other.write_text("[train.head]\nhidden = 0\n")
    result = run_train(tmp_path, "head", "--settings", other)
    assert "error: --hidden 24" not in result.err, "the variable is over this file, too"
    monkeypatch.delenv("TILEPROBE_TRAIN_HEAD_HIDDEN")
    monkeypatch.setenv("TILEPROBE_SETTINGS", str(other))
    result = run_train(tmp_path, "head", "--cache", made / "cache")
    assert result.errors == ["error: --hidden 0: at least 1"], result.err


def test_under_torchrun_what_is_wrong_is_said_once(tmp_path: Path, python_env: dict[str, str]) -> None:
    (tmp_path / "tileprobe.toml").write_text("[extract.run]\nbatchsize = 4\n")
    command = [sys.executable, "-m", *LAUNCH, "2", "-m", "extract", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=python_env, capture_output=True, text=True, timeout=120)
    message = "error: tileprobe.toml: [extract.run] has no batchsize; the nearest name is batch-size\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


# JSON, quiet, verbose


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


# Dry runs


def test_a_dry_extraction_writes_nothing_and_says_what_the_real_one_does(made: Path, tmp_path: Path) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    arguments = ("run", "--tiles", "tiles", "--backbone", made / "checkpoint", "--workers", 0, "--precision", "float32")

    def foretell(*more: object) -> Any:
        before = snapshot(tmp_path)
        dry = extract(tmp_path, *arguments, *more, "--dry-run", "--json")
        assert dry.status == 0, dry.err
        assert snapshot(tmp_path) == before
        assert dry.err.endswith("dry run: nothing was written\n")
        return read_json(dry.out)

    def do(*more: object) -> Any:
        return read_json(extract(tmp_path, *arguments, *more, "--json").out)

    dry = foretell()
    real = do()
    assert (dry["cache"], dry["version"], dry["to_do"]) == (real["cache"], real["version"], real["computed"])
    sizes = [path.stat().st_size for path in (tiles / "images").iterdir()]
    assert (dry["tiles"], dry["blocks"], dry["pending_blocks"], dry["bytes_to_read"]) == (60, 1, 1, sum(sizes))
    assert dry["changes"] is None
    dry = foretell()
    assert (dry["exists"], dry["to_do"], dry["kept"], dry["pending_blocks"], dry["bytes_to_read"]) == (
        True,
        0,
        60,
        0,
        0,
    )

    shutil.copy(tiles / "images/s00_0.png", tiles / "images/s99_0.png")
    (tiles / "labels/s99_0.txt").write_text("")
    shutil.copy(tiles / "images/s00_0.png", tiles / "images/s00_1.png")
    (tiles / "labels/s00_2.txt").write_text("73 0.5 0.5 0.25 0.25\n")
    (tiles / "labels/s11_4.txt").unlink()
    dry = foretell()
    assert dry["changes"] == {"new": 1, "changed": 1, "removed": 1, "relabelled": 1, "kept": 57}
    assert dry["bytes_to_read"] == sum((tiles / f"images/{name}.png").stat().st_size for name in ("s99_0", "s00_1"))
    real = do()
    assert (
        (dry["version"], dry["to_do"], dry["kept"])
        == (real["version"], real["computed"], real["kept"])
        == (
            real["version"],
            *(2, 58),
        )
    )


def test_a_dry_extraction_meets_the_same_errors(made: Path, tmp_path: Path) -> None:
    for tiles, message in (("nowhere", "nowhere"), ("", "TILES is not set")):
        result = extract(tmp_path, "run", "--tiles", tiles, "--backbone", made / "checkpoint", "--dry-run")
        assert result.status == 1
        assert message in result.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_fine_tuning_writes_nothing_and_says_what_the_real_one_does(made: Path, work: Path) -> None:
    options = ("--cache", made / "cache", "--unfreeze", 2, "--workers", 0, *QUICK)
    before, cache = snapshot(work), snapshot(made)
    dry = run_train(work, "finetune", *options, "--dry-run", "--json")
    assert dry.status == 0, dry.err
    assert (snapshot(work), snapshot(made)) == (before, cache)
    values = read_json(dry.out)
    real = run_train(work, "finetune", *options)
    assert real.status == 0, real.err
    trained = re.search(r"training (\d+) tensors \(([\d,]+) parameters\)", real.out)
    assert trained
    assert values["training"]["backbone_parameters"] == int(trained[2].replace(",", ""))
    in_head = [tensor.numel() for tensor in read_head(work / "runs/head/best/model.safetensors")]
    assert values["training"]["head_parameters"] == sum(in_head)
    assert values["training"]["tensors"] == int(trained[1]) + len(in_head)
    split = json.loads((work / "runs/finetune/split.json").read_text())
    rows = values["split"]
    assert (rows["val"], rows["test"]) == (len(split["val"]), 0)
    assert values["batch_size"] == json.loads((work / "runs/finetune/config.json").read_text())["config"]["batch_size"]
    assert values["steps_per_epoch"] == math.ceil(rows["train"] / values["batch_size"])
    assert values["head_run"] == "runs/head-001"
    assert values["step_zero"] is True
    assert "step 0 can run" in dry.err
    assert "step 0: " in real.out


def read_head(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("features, recompute", [("cls", False), ("cls+patch_mean", False), ("cls", True)])
def test_the_estimate_of_memory_is_what_autograd_keeps(
    made: Path, work: Path, amp: bool, features: str, recompute: bool
) -> None:
    """Counted by autograd's own hooks; the layers of this checkpoint are narrower for their width than real ones."""
    options = ("--cache", made / "cache", "--unfreeze", 3, "--device", "cpu", "--amp" if amp else "--no-amp")
    more = ("--grad-checkpoint",) if recompute else ()
    dry = run_train(work, "finetune", *options, *more, "--features", features, "--dry-run", "--json")
    memory = read_json(dry.out)["memory"]
    checkpoint = find_checkpoint(str(made / "checkpoint"))
    backbone = Backbone.load(checkpoint, precision="float32", device=torch.device("cpu"))
    backbone.unfreeze_last(3, checkpointing=recompute)
    backbone.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > checkpoint.width**2 * 2:  # not a weight's bf16 copy
            kept[storage.data_ptr()] = storage
        return tensor

    hidden = torch.zeros(256, checkpoint.tokens, checkpoint.width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=amp):
        backbone.run_suffix(hidden, features.split("+"))
    counted = sum(storage.nbytes() for storage in kept.values()) * memory["tiles_at_once"] / 256
    one_layer = (46 if amp else 76) * checkpoint.tokens * checkpoint.width * memory["tiles_at_once"] if recompute else 0
    assert (memory["activations"] - one_layer) / counted == pytest.approx(1, abs=0.35)
    assert memory["total"] == memory["weights"] + memory["trained"] + memory["activations"]


def test_a_dry_run_of_what_is_no_new_fine_tuning_is_refused(made: Path, work: Path) -> None:
    for options, message in (
        (("--resume",), "leave --resume out"),
        (("--unfreeze", 0), "UNFREEZE=0"),
        (("--unfreeze", 9), "4 layers"),
    ):
        result = run_train(work, "finetune", "--cache", made / "cache", *options, "--device", "cpu", "--dry-run")
        assert result.status == 1
        assert message in result.errors[0]


# Statuses


def test_too_many_quarantined_tiles_are_status_3(made: Path, tmp_path: Path) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    (tiles / "images/s00_0.png").write_bytes(b"no image")
    arguments = ("run", "--tiles", "tiles", "--backbone", made / "checkpoint", "--workers", 0, "--json")
    result = extract(tmp_path, *arguments)
    assert (result.status, result.out) == (3, "")
    assert "1 of 60 tiles are quarantined" in result.err
    result = extract(tmp_path, *arguments, "--max-quarantined", 0.1)
    assert (result.status, read_json(result.out)["quarantined"]) == (0, 1)


# Ctrl-C


def find_descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, read_bytes(str(thread)).split())
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def find_fork_servers(pid: int) -> list[int]:
    """The processes that fork feed workers; they have torch to import first."""
    return [child for child in find_descendants(pid) if b"forkserver" in read_bytes(f"/proc/{child}/cmdline")]


def blocks_ctrl_c(pid: int) -> bool:
    (mask,) = re.findall(rb"^SigBlk:\s+(\w+)", read_bytes(f"/proc/{pid}/status"), re.MULTILINE)
    return bool(int(mask, 16) & 1 << signal.SIGINT - 1)


def read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # the process is gone
        return b""


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def slow_cache(bucket: Any, proxy: Proxy) -> Iterator[str]:
    """A cache in a bucket whose every chunk arrives in pieces: to verify it takes seconds."""
    url = f"gs://{bucket.name}/cache"
    fill_cache(url, 256 * 12)
    proxy.choose_fault = lambda path: "slow" if "/c/" in path or "%2Fc%2F" in path else None
    yield url
    proxy.choose_fault = lambda path: None


def test_ctrl_c_is_one_line_and_status_130_and_leaves_nobody(
    made: Path, tmp_path: Path, slow_cache: str, proxy: Proxy, python_env: dict[str, str]
) -> None:
    """The signal goes to every process of the group, as a terminal sends it; all commands at once, to save time, and
    each as soon as it is far enough."""
    cache, many = made / "cache", ("--epochs", 5000, "--device", "cpu")
    big = plant_tiles(tmp_path / "big", per_scene=40, seed=fresh_seed())
    extracting = (
        "extract",
        "run",
        "--tiles",
        big,
        "--backbone",
        made / "checkpoint",
        "--cache",
        "c",
        "--device",
        "cpu",
    )
    commands: dict[str, tuple[tuple[object, ...], Callable[[Path], bool], str]] = {
        "verify": (
            ("cache_schema", "verify", slow_cache),
            lambda place: any("label_ids" in path and "zarr.json" not in path for path in proxy.asked),
            "stopped by SIGINT",
        ),
        "extract": (
            (*LAUNCH, 1, "-m", *extracting, "--image-size", 512, "--precision", "float32", "--workers", 1),
            lambda place: bool(find_fork_servers(started["extract"].pid)),
            r"stopped by SIGINT: \d of 2 blocks of c are committed; the same command goes on from there",
        ),
        "head": (
            ("train", "head", "--cache", cache, *many),
            lambda place: (place / "runs/head/last").exists(),
            r"stopped by SIGINT: \d+ of 5000 epochs of runs/head-001 are saved; --resume goes on from there",
        ),
        "finetune": (
            ("train", "finetune", "--cache", cache, *many, "--workers", 1),
            lambda place: (place / "runs/finetune/last").exists(),
            r"stopped by SIGINT: \d+ of 5000 epochs.* of runs/finetune-001 are saved; --resume goes on from there",
        ),
    }
    proxy.asked.clear()
    started: dict[str, subprocess.Popen[str]] = {}

    def is_ready(name: str) -> bool:
        return commands[name][1](tmp_path / name) or started[name].poll() is not None

    for name, (arguments, _, _) in commands.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", *map(str, arguments)]
        started[name] = subprocess.Popen(
            command,
            cwd=tmp_path / name,
            env={**python_env, "STORAGE_EMULATOR_HOST": proxy.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        waiting = list(commands)
        while waiting:
            wait_for(lambda: any(map(is_ready, waiting)))
            name = next(filter(is_ready, waiting))
            waiting.remove(name)
            process, line = started[name], commands[name][2]
            family = find_descendants(process.pid)
            assert all(map(blocks_ctrl_c, find_fork_servers(process.pid))), name
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 130, f"{name}: {err}"
            assert "Traceback" not in err, f"{name}: {err}"
            said = [part for part in re.split(r"[\r\n]", err) if part.startswith(("stopped", "error"))]
            assert len(said) == 1, f"{name}: {err}"
            assert re.fullmatch(line, said[0]), said
            wait_for(lambda: all(map(is_gone, family)))  # noqa: B023
    finally:
        for process in started.values():
            for pid in find_descendants(process.pid):
                if not is_gone(pid):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.communicate()


def test_ctrl_c_while_torch_is_imported_is_one_line_too(tmp_path: Path, python_env: dict[str, str]) -> None:
    """A module that stands for torch interrupts its own import."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    env = python_env | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{python_env['PYTHONPATH']}"}
    for module in ("extract", "extract.launch", "train"):
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n"), module


def test_versions_hold_what_they_held(made: Path) -> None:
    """Nothing above has written to the cache that all of it read."""
    version = open_cache(str(made / "cache"))
    assert CacheRoot(str(made / "cache")).versions() == [version.id]
    assert np.isfinite(version.read_rows().pooled["cls"]).all()

"""Settings from a file and from the environment: which wins, what is unknown, what is no value of an option."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from cache_schema.cli.settings import SettingsError, isolate, read_settings

HEAD = {
    "epochs": click.Option(["--epochs"], type=int),
    "run-dir": click.Option(["--run-dir", "run"]),
    "lr": click.Option(["--lr"], type=float),
    "device": click.Option(["--device"], type=click.Choice(["cpu", "cuda"])),
    "resume": click.Option(["--resume"], is_flag=True),
    "amp": click.Option(["--amp/--no-amp"], default=None),
    "also": click.Option(["--also"], multiple=True),
}
TUNE = {"unfreeze": click.Option(["--unfreeze"], type=int), "device": HEAD["device"]}
OPTIONS = {"head": HEAD, "fine-tune": TUNE}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str | None, environment: dict[str, str] | None = None, command: str = "head") -> dict[str, object]:
    if text is not None:
        Path("tileprobe.toml").write_text(text)
    found = read_settings("train", command, OPTIONS, None, environment or {})
    return {name: (setting.value, setting.origin) for name, setting in found.items()}


def test_nothing_said_is_nothing_set() -> None:
    assert read(None) == {}
    assert read("") == {}
    assert read("[extract.run]\nwhatever = 1\n") == {}, "another package's table is for that to judge"


def test_a_commands_table_over_the_packages_and_the_environment_over_both() -> None:
    text = '[train]\ndevice = "cuda"\nlr = 0.5\n[train.head]\nlr = 1e-3\nrun-dir = "runs/x"\n'
    text += "[train.fine-tune]\nunfreeze = 2\n"
    file = "tileprobe.toml"
    assert read(text) == {"device": ("cuda", file), "lr": ("0.001", file), "run": ("runs/x", file)}
    variables = {
        "TILEPROBE_TRAIN_HEAD_LR": "7",
        "TILEPROBE_TRAIN_HEAD_RUN_DIR": "y",
        "TILEPROBE_TRAIN_FINE_TUNE_UNFREEZE": "1",
    }
    assert read(None, variables) == {
        "device": ("cuda", file),
        "lr": ("7", "TILEPROBE_TRAIN_HEAD_LR"),
        "run": ("y", "TILEPROBE_TRAIN_HEAD_RUN_DIR"),
    }
    assert read(None, variables, "fine-tune") == {
        "device": ("cuda", file),
        "unfreeze": ("1", "TILEPROBE_TRAIN_FINE_TUNE_UNFREEZE"),
    }


def test_switches_lists_and_numbers() -> None:
    text = '[train.head]\nresume = true\namp = false\nalso = ["--a 1", "--b"]\nepochs = 3\nrun-dir = 5\n'
    assert {name: value for name, (value, _) in read(text).items()} == {  # type: ignore[misc]
        "resume": True,
        "amp": False,
        "also": ["--a 1", "--b"],
        "epochs": "3",
        "run": "5",
    }
    variables = {
        "TILEPROBE_TRAIN_HEAD_RESUME": "off",
        "TILEPROBE_TRAIN_HEAD_AMP": "Yes",
        "TILEPROBE_TRAIN_HEAD_ALSO": "--a 1",
    }
    assert {name: value for name, (value, _) in read("", variables).items()} == {  # type: ignore[misc]
        "resume": False,
        "amp": True,
        "also": ["--a 1"],
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("[trian.head]\n", r"tileprobe.toml: no table \[trian\]; the nearest name is train"),
        ("[train.haed]\n", r"tileprobe.toml: no table \[train.haed\]; the nearest name is head"),
        ("[train.head]\nepoch = 1\n", r"tileprobe.toml: \[train.head\] has no epoch; the nearest name is epochs"),
        ("[train.fine-tune]\nunfreze = 1\n", r"\[train.fine-tune\] has no unfreze; the nearest name is unfreeze"),
        ("[train]\ndevcie = 'cpu'\n", r"\[train\] has no devcie; the nearest name is device"),
        ("train = 3\n", r"train is a table: write \[train\]"),
        ("[train.head]\nepochs = 2.5\n", r"\[train.head\] epochs = 2.5: '2.5' is not a valid integer"),
        ("[train.head]\nepochs = true\n", r"\[train.head\] epochs = True: must be one string or number"),
        ("[train.head]\nepochs = [1, 2]\n", r"\[train.head\] epochs = \[1, 2\]: must be one string or number"),
        ("[train.head]\nresume = 'yes'\n", r"\[train.head\] resume = yes: must be true or false"),
        ("[train.head]\nalso = [1, [2]]\n", r"\[train.head\] also = .*: must be strings or numbers"),
        ("[train]\ndevice = 'tpu'\n", r"\[train\] device = tpu: 'tpu' is not one of 'cpu', 'cuda'"),
        ("[train\n", "tileprobe.toml is not TOML: .*line 1"),
        ("a = 1\na = 2\n", "tileprobe.toml is not TOML: "),
    ],
)
def test_what_cannot_be_meant_is_one_line(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        read(text)
    assert "\n" not in refused.value.message
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "variable, value, message",
    [
        (
            "TILEPROBE_TRAIN_HEAD_EPOHCS",
            "1",
            "TILEPROBE_TRAIN_HEAD_EPOHCS in .* nearest name is TILEPROBE_TRAIN_HEAD_EPOCHS",
        ),
        ("TILEPROBE_TRAIN_HEAD_EPOCHS", "many", "TILEPROBE_TRAIN_HEAD_EPOCHS = many: 'many' is not a valid integer"),
        ("TILEPROBE_TRAIN_HEAD_RESUME", "maybe", "TILEPROBE_TRAIN_HEAD_RESUME = maybe: must be true or false"),
    ],
)
def test_so_is_a_variable(variable: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(None, {variable: value})
    assert read(None, {"TILEPROBE_EXTRACT_RUN_ANY": "1", "OTHER": "2"}) == {}


def test_a_file_of_another_name_is_read_instead() -> None:
    Path("tileprobe.toml").write_text("not TOML")
    Path("mine.toml").write_text("[train.head]\nepochs = 4\n")
    assert read_settings("train", "head", OPTIONS, "mine.toml", {})["epochs"].origin == "mine.toml"
    with pytest.raises(SettingsError, match="gone.toml cannot be read: No such file"):
        read_settings("train", "head", OPTIONS, "gone.toml", {})


def test_an_isolated_environment_sets_nothing() -> None:
    Path("tileprobe.toml").write_text("[train.head]\nepochs = 4\n")
    environment = isolate({"TILEPROBE_TRAIN_HEAD_LR": "3", "PATH": "/bin"})
    assert environment == {"PATH": "/bin", "TILEPROBE_SETTINGS": os.devnull}
    assert read_settings("train", "head", OPTIONS, environment["TILEPROBE_SETTINGS"], environment) == {}

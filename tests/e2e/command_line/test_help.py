"""Help, examples, and where a setting comes from."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cache_schema.cli.command import HEADINGS, STATUSES, Command, Group
from tests.e2e.command_line.commands import COMMANDS, GROUPS, LAUNCH
from tests.planted import train as run_train


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

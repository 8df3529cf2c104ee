"""A run's directory is numbered, never written over, and linked to from its plain name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from train.config import DataConfig, TrainConfig
from train.errors import TrainError
from train.runs.directory import RunDirectory


def test_runs_are_numbered_and_the_link_moves(tmp_path: Path) -> None:
    link = tmp_path / "runs" / "head"
    for number in (1, 2, 3):
        run = RunDirectory.create(str(link))
        assert run.path.name == f"head-{number:03d}"
        assert os.readlink(link) == run.path.name
        (run.path / "mine").write_text(str(number))
    assert [(tmp_path / "runs" / f"head-{n:03d}" / "mine").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    assert sorted(path.name for path in link.parent.iterdir()) == ["head", "head-001", "head-002", "head-003"]


def test_numbers_are_never_used_again(tmp_path: Path) -> None:
    link = str(tmp_path / "head")
    for _ in range(3):
        RunDirectory.create(link)
    (tmp_path / "head-002").rmdir()
    (tmp_path / "head").unlink()
    (tmp_path / "head-fast-009").mkdir()  # another name's
    (tmp_path / "other-041").mkdir()
    assert RunDirectory.create(link).path.name == "head-004"
    (tmp_path / "head-1234").mkdir()
    assert RunDirectory.create(link).path.name == "head-1235"


def test_a_link_to_a_removed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "head").symlink_to("head-001")
    assert RunDirectory.create(str(tmp_path / "head")).path.name == "head-001"
    assert (tmp_path / "head").is_dir()


def test_a_directory_in_the_links_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "precious").write_text("x")
    with pytest.raises(TrainError, match="choose another RUN"):
        RunDirectory.create(str(tmp_path / "head"))
    assert [path.name for path in tmp_path.rglob("*")] == ["head", "precious"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"cannot make a run directory for .*file/head"):
        RunDirectory.create(str(tmp_path / "file" / "head"))


def test_a_run_is_opened_by_its_link_and_by_its_number(tmp_path: Path) -> None:
    config = TrainConfig(cache="c", run="r", data=DataConfig(exclude=(5,)))
    created = RunDirectory.create(str(tmp_path / "head"))
    created.write_json("config.json", {"config": config.to_json(), "version": "abc"})
    for name in ("head", "head-001"):
        run = RunDirectory.open(str(tmp_path / name))
        assert run.path.name == "head-001"
        assert run.read_config() == config
        assert run.read_version() == "abc"
    with pytest.raises(TrainError, match=r"no run at .*make train-head"):
        RunDirectory.open(str(tmp_path / "finetune"))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"config": {}}', '{"config": {"data": {"exclude": [], "x": 1}}}'])
def test_settings_of_another_release_are_an_error(tmp_path: Path, text: str) -> None:
    run = RunDirectory.create(str(tmp_path / "head"))
    (run.path / "config.json").write_text(text)
    with pytest.raises(TrainError, match=r"config\.json"):
        run.read_config()
    with pytest.raises(TrainError, match=r"config\.json"):
        run.read_version()


def test_history_is_cut_to_whole_epochs(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "head"))
    assert run.read_history() == []
    lines = [{"epoch": epoch, "loss": 0.1 + 0.2 * epoch, "f1": None} for epoch in range(1, 5)]
    for line in lines:
        run.append_history(line)
    assert run.read_history() == lines
    whole = run.history.read_bytes()
    with run.history.open("a") as stream:
        stream.write('{"epoch": 5, "lo')  # a run that was killed while it wrote
    run.cut_history(4)
    assert run.history.read_bytes() == whole
    run.cut_history(2)
    assert run.read_history() == lines[:2]
    assert whole.startswith(run.history.read_bytes())
    run.append_history(lines[2])
    assert run.read_history() == lines[:3]
    run.cut_history(0)
    assert run.read_history() == []


def test_a_json_file_is_replaced_whole(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "head"))
    run.write_json("metrics.json", {"a": 1})
    run.write_json("metrics.json", {"name": "Gebäude"})
    assert json.loads((run.path / "metrics.json").read_text()) == {"name": "Gebäude"}
    with pytest.raises(TypeError):
        run.write_json("metrics.json", {"a": object()})
    assert json.loads((run.path / "metrics.json").read_text()) == {"name": "Gebäude"}

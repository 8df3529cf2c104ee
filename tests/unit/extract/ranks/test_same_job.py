"""What nodes may not differ in, and what is said of it."""

from __future__ import annotations

import random
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from extract.config import ExtractConfig
from extract.ranks.same_job import (
    MAX_CLOCK_S,
    Asked,
    Member,
    decline,
    digest_source,
    find_difference,
    find_wrong_clock,
    settle,
)
from train.config import SCRATCH, DataConfig, TrainConfig

OWN = {"workers", "device"}
EXTRACT, TRAIN = ExtractConfig("tiles"), TrainConfig("cache", "run")


def members(*settings: dict[str, str]) -> list[Member]:
    return [Member(f"node{rank // 2}", {"settings": each}) for rank, each in enumerate(settings)]


@pytest.mark.parametrize(("config", "own"), [(EXTRACT, {*OWN, "profile"}), (TRAIN, {*OWN, "scratch"})])
def test_nodes_may_differ_in_what_is_about_themselves_alone(config: Any, own: set[str]) -> None:
    """Every field, one at a time, set to what no check of a value sees."""
    for field in fields(config):
        changed = replace(config)
        object.__setattr__(changed, field.name, DataConfig(exclude=(7,)) if field.name == "data" else "other")
        same = Asked.of("command", config) == Asked.of("command", changed)
        assert same == (field.name in own), field.name


def test_settings_have_the_names_that_users_know() -> None:
    """Those of the options there are, or of make's variables."""
    from extract.__main__ import main as extract
    from train.__main__ import main as train

    commands = [group.commands[name] for group, name in ((extract, "run"), (train, "head"), (train, "finetune"))]
    options = {option for command in commands for parameter in command.params for option in parameter.opts}
    for config in (EXTRACT, TRAIN):
        for name in Asked.of("command", config).settings:
            option = "--run-dir" if name == "RUN" else f"--{name.lower().lstrip('-').replace('_', '-')}"
            assert option in options, name


def test_who_has_what_is_named_once_for_all_its_ranks() -> None:
    said = find_difference(members({"TILES": "a"}, {"TILES": "a"}, {"TILES": "b"}, {"TILES": "b"}, {"TILES": "a"}))
    assert said == (
        "TILES differs: node0 (rank 0 and 2 more) has a, node1 (rank 2 and 1 more) has b: give every node the same"
    )
    assert find_difference(members({"TILES": "a"}, {"TILES": "a"})) == ""
    # A setting that another release does not have.
    said = find_difference(members({}, {"--new": "1"}))
    assert said.startswith("--new differs: node0 (rank 0) has none, node0 (rank 1) has 1: ")


def test_a_line_stays_a_line() -> None:
    rng = random.Random()
    many = [{f"--{name}": str(rng.random()) for name in range(40)} for _ in range(300)]
    many[0]["--0"] = "x" * 100_000
    said = find_difference(members(*many))
    assert "\n" not in said
    assert len(said) < 2_500
    assert "35 more differ" in said
    assert "(100,000 characters)" in said


def test_what_comes_first_is_told_alone() -> None:
    """Another release has other settings, and another command has all others."""
    kinds = ("versions", "command", "settings", "device")
    for first in range(len(kinds)):
        odd = {kind: {kind: str(position >= first)} for position, kind in enumerate(kinds)}
        said = find_difference([Member("a", {kind: {kind: "False"} for kind in kinds}), Member("b", odd)])
        assert said.startswith(f"{kinds[first]} differs: a (rank 0) has False, b (rank 1) has True: ")
        assert said.count("differs") == 1


def test_a_rank_that_does_not_come_is_missed_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.ranks.same_job.JOIN_TIMEOUT", timedelta(seconds=1))
    store, me = dist.HashStore(), Member("node", {})
    with ThreadPoolExecutor(2) as pool:
        said = [*pool.map(lambda rank: settle(store, rank, 4, me), (0, 1))]
    assert said[0] == said[1]
    assert said[0] is not None
    assert said[0].startswith("2 of 4 ranks, including rank 2, did not join within")


def test_rank_0_that_ends_before_it_joins_says_why() -> None:
    store = dist.HashStore()
    decline(store, 0, "no such option")
    assert (
        settle(store, 1, 2, Member("node1", {})) == f"{socket.gethostname()} (rank 0) cannot take part: no such option"
    )


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_clock_is_wrong_above_the_limit(sign: int) -> None:
    several = members({}, {}, {})
    assert find_wrong_clock(several, [0.0, sign * MAX_CLOCK_S, 1.0]) == ""
    said = find_wrong_clock(several, [0.0, 1.0, sign * (MAX_CLOCK_S + 1)])
    assert said.startswith(
        f"the clock of node1 (rank 2) is 61 s {'ahead of' if sign > 0 else 'behind'} that of node0 (rank 0)"
    )


def test_a_node_keeps_its_own_of_what_rank_0_resolves() -> None:
    main = replace(TRAIN, device="cpu", workers=3, scratch="/rank0", epochs=7)
    own = main.on_node_of(replace(TRAIN, device="cuda", workers=1, scratch="/own", epochs=9))
    assert own == replace(main, device="cuda", workers=1, scratch="/own")
    assert main.on_node_of(replace(TRAIN, scratch=SCRATCH)).scratch == "/rank0"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Three packages, one of them with a subfolder."""
    for name in ("cache_schema/cache.py", "extract/ranks/group.py", "train/run.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("value = 1\n")
    return tmp_path


@pytest.mark.parametrize("change", ["edit", "rename", "add"])
def test_a_change_anywhere_in_a_checkout_changes_its_digest(checkout: Path, change: str) -> None:
    before, path = digest_source(checkout), checkout / "extract" / "ranks" / "group.py"
    assert digest_source(checkout) == before
    if change == "edit":
        path.write_text("value = 2\n")
    elif change == "rename":
        path.rename(path.with_name("ranks.py"))
    else:
        (path.parent / "deeper").mkdir()
        (path.parent / "deeper" / "empty.py").touch()
    assert digest_source(checkout) != before


@pytest.mark.parametrize("package", ["cache_schema", "extract", "train"])
def test_a_package_without_files_has_no_digest(checkout: Path, package: str) -> None:
    """A digest of nothing would be the same for all checkouts."""
    (checkout / package).rename(checkout / "elsewhere")
    with pytest.raises(RuntimeError, match=f"found no source files of {package} below"):
        digest_source(checkout)


def test_this_checkout_has_a_digest() -> None:
    """The packages are found where this module lies, whatever its depth."""
    assert digest_source() == digest_source(Path(__file__).parents[4])

"""The measures of two hosts where there can be none."""

from pathlib import Path

import pytest

from tests.benchmarks import scale_hosts
from tests.benchmarks.fixtures import Fixtures


def test_a_machine_that_cannot_have_hosts_says_so_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_hosts, "find_obstacle", lambda: "network namespaces are not permitted here: EPERM")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    with Fixtures(tmp_path) as fixtures:
        figures = scale_hosts.measure_hosts(fixtures)
    assert [figure.name.partition(":")[0] for figure in figures] == ["extract", "train-head", "finetune"]
    assert [figure.bound.limit for figure in figures] == [0.9, 0.85, 0.85]
    assert {figure.detail for figure in figures} == {"network namespaces are not permitted here: EPERM"}
    assert not any(figure.values or figure.met for figure in figures)

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with Fixtures(tmp_path) as fixtures:
        assert {figure.detail for figure in scale_hosts.measure_hosts(fixtures)} == {"this machine has one core"}

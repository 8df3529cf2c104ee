"""Packages, open files and shared memory."""

from __future__ import annotations

import pytest
import torch

from extract.doctor.machine import check_open_files, check_packages, check_shared_memory


def test_packages_are_those_that_are_asked_for() -> None:
    verdict = check_packages()
    assert verdict.concerns == []
    assert f"torch {torch.__version__}" in verdict.detail


@pytest.mark.parametrize("workers, few", [(1, False), (10**6, True)])
def test_open_files(workers: int, few: bool) -> None:
    verdict = check_open_files(workers)
    assert [concern.status for concern in verdict.concerns] == (["warning"] if few else [])
    assert all("ulimit -n" in concern.remedy for concern in verdict.concerns)


@pytest.mark.parametrize("batch_bytes, workers, small", [(100, 2, False), (2**50, 2, True), (2**50, 0, False)])
def test_shared_memory(batch_bytes: int, workers: int, small: bool) -> None:
    verdict = check_shared_memory(workers, 1, batch_bytes)
    assert [concern.status for concern in verdict.concerns] == (["fail"] if small else [])
    assert all("--shm-size" in concern.remedy for concern in verdict.concerns)

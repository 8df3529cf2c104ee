"""Deterministic algorithms are switched on and off again."""

from __future__ import annotations

import pytest
import torch

from train.loop.determinism import deterministic_algorithms


def test_determinism_is_switched_on_and_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for wanted in (True, False):
        with deterministic_algorithms(wanted):
            assert torch.are_deterministic_algorithms_enabled() is wanted
            assert torch.backends.cudnn.benchmark is False
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), deterministic_algorithms(True):
        _ = 1 / 0
    assert not torch.are_deterministic_algorithms_enabled()

"""Seeds are the same every run and another for each test, unless `TEST_SEED` asks for others."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.seeds import choose_test_seed, draw_for, fresh_seed


def draw(name: str) -> list[float]:
    with draw_for(name):
        return [fresh_seed(), fresh_seed(), random.random(), np.random.random(), float(torch.rand(1))]


def test_a_name_always_draws_the_same_and_another_name_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_SEED", raising=False)
    first = draw("a")
    assert len(set(first)) == len(first)
    assert draw("a") == first
    assert not set(draw("b")) & set(first)
    monkeypatch.setenv("TEST_SEED", "7")
    assert not set(draw("a")) & set(first)


def test_drawing_for_a_fixture_leaves_the_tests_own_seeds_alone() -> None:
    with draw_for("test"):
        alone = [fresh_seed(), fresh_seed()]
    with draw_for("test"):
        first = fresh_seed()
        with draw_for("fixture"):
            fresh_seed()
        assert [first, fresh_seed()] == alone


def test_random_is_a_number_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SEED", "random")
    number = choose_test_seed()
    assert int(number) < 2**31
    assert choose_test_seed() == number
    monkeypatch.setenv("TEST_SEED", "many")
    with pytest.raises(SystemExit, match="TEST_SEED=many: give a number, or `random`"):
        choose_test_seed()

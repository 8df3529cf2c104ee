"""Any sequence of changes, stops and damage: the cache in the end equals a fresh extraction."""

from __future__ import annotations

from tests.planted import fresh_seed

from .merge_machine import run_merge_machine


def test_any_sequence_ends_as_a_fresh_extraction() -> None:
    (row,) = run_merge_machine(2, fresh_seed())
    assert row["survived"] == row["tried"] == 2

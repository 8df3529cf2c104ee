"""The arithmetic of paired runs, the table and the file."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.measure import Bound, Figure, divide_rounds, format_table, run_rounds, write_figures


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    results = run_rounds("title", {"a": lambda: run("a"), "b": lambda: run("b")}, rounds=3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert results == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_median_of_ratios_is_not_ratio_of_medians() -> None:
    figure = Figure("f", Bound(">=", 1), divide_rounds([1.0, 2.0, 9.0], [1.0, 4.0, 3.0]))
    assert figure.values == (1.0, 0.5, 3.0)
    assert figure.value == 1.0


def test_rounds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError):
        divide_rounds([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "sense, value, met", [(">=", 2, True), (">=", 1.99, False), ("<=", 2, True), ("<=", 2.01, False)]
)
def test_bound_includes_its_limit(sense: str, value: float, met: bool) -> None:
    assert Figure("f", Bound(sense, 2.0), (value,)).met is met  # type: ignore[arg-type]


def test_file_lists_figures_those_not_run_too(tmp_path: Path) -> None:
    ran = Figure("ran", Bound(">=", 0.5), (0.6, 0.4, 0.7), detail="how")
    skipped = Figure("skipped", Bound("<=", 1.0), (), detail="why not")
    write_figures(tmp_path / "bench" / "area.json", [ran, skipped])
    first, second = json.loads((tmp_path / "bench" / "area.json").read_text())
    assert first.items() >= {"name": "ran", "value": 0.6, "bound": 0.5, "met": True, "low": 0.4, "high": 0.7}.items()
    assert second.items() >= {"name": "skipped", "value": None, "bound": 1.0, "met": False, "detail": "why not"}.items()


def test_table_names_every_figure_and_says_which_bound_is_missed() -> None:
    figures = [
        Figure("reached", Bound(">=", 0.5), (0.6, 0.7, 0.8)),
        Figure("not reached", Bound("<=", 0.5), (0.6,)),
        Figure("not possible", Bound("<=", 0.5), (), detail="one core"),
    ]
    lines = format_table("area", figures).splitlines()
    met, missed, not_run = (next(line for line in lines if line.startswith(figure.name)) for figure in figures)
    assert met.split()[1:] == ["0.7", "0.6", "-", "0.8", ">=", "0.5", "met"]
    assert missed.endswith("MISSED")
    assert not_run.endswith("NOT RUN")
    assert any("one core" in line for line in lines)

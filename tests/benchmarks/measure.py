"""Compute ratios that can be compared between machines, check their bounds, and format them.

The speed of a machine varies, most of all if it is shared. Contenders therefore take turns, A B A B …; each pair of
turns gives one ratio, and the figure is the median of the ratios.
"""

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from tqdm import tqdm

ROUNDS = 5
"""Number of turns per contender."""
_NAME_COLUMNS = 72


@dataclass(frozen=True)
class Bound:
    """Required value of a figure: `Bound(">=", 0.9)`."""

    sense: Literal[">=", "<="]
    limit: float

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.sense == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: numerator over denominator, in words.
        bound: the required value.
        values: one per round; empty if this machine cannot run it, and then `detail` says why.
        unit: unit of the values.
        detail: what was run, and its size.
    """

    name: str
    bound: Bound
    values: tuple[float, ...]
    unit: str = "ratio"
    detail: str = ""

    @property
    def value(self) -> float | None:
        """Median of the values."""
        return median(self.values) if self.values else None

    @property
    def met(self) -> bool:
        """Whether the bound is met; False if there is no value."""
        return self.value is not None and self.bound.is_met(self.value)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound.limit,
            "met": self.met,
            "sense": self.bound.sense,
            "low": min(self.values, default=None),
            "high": max(self.values, default=None),
            "unit": self.unit,
            "detail": self.detail,
        }


def run_rounds(title: str, contenders: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[Any]]:
    """Run the contenders in turns; a progress bar names the current one.

    Returns:
        the results of each contender, one per round.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    with tqdm(total=rounds * len(contenders), desc=title, unit="run") as bar:
        for _ in range(rounds):
            for name, run in contenders.items():
                bar.set_postfix_str(name)
                results[name].append(run())
                bar.update()
    return results


def divide_rounds(over: Sequence[float], under: Sequence[float]) -> tuple[float, ...]:
    """Divide the results of each round."""
    return tuple(a / b for a, b in zip(over, under, strict=True))


def format_table(title: str, figures: Iterable[Figure]) -> str:
    """Format a table: median, range, bound, whether it was met, and the detail below."""
    rows = [(title, "median", "min - max", "bound", "")]
    for figure in figures:
        value, values = figure.value, figure.values
        cells = (
            "-" if value is None else f"{value:.4g}",
            f"{min(values):.4g} - {max(values):.4g}" if len(values) > 1 else "",
            str(figure.bound),
            "met" if figure.met else "MISSED" if values else "NOT RUN",
        )
        first, *more = textwrap.wrap(figure.name, _NAME_COLUMNS)
        details = textwrap.wrap(figure.detail, _NAME_COLUMNS - 4, initial_indent="    ", subsequent_indent="    ")
        rows += [(first, *cells), *((line, "", "", "", "") for line in (*more, *details))]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def write_figures(path: Path, figures: Iterable[Figure]) -> None:
    """Write a JSON list with `name`, `value` (null if it could not run), `bound`, `met` and details."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([figure.to_json() for figure in figures], indent=2) + "\n")

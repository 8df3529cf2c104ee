"""Draw plots as inline SVG, coloured by the page's style sheet, so they follow its dark mode and print well.

To a screen reader every plot is one image, described by its `text`; a table next to it holds the numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """The data coordinates of a plot of `width` x `height`, and the margins around them."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 360
    height: int = 240
    left: int = 46
    right: int = 10
    top: int = 12
    bottom: int = 36

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def draw_frame(self, x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Markup:
        """Draw grid lines, ticks and names of the two axes."""
        floor, right = self.height - self.bottom, self.width - self.right
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="end" x="{self.left - 6}" y="{y + 4:.1f}">{tick:g}</text>')
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            parts.append(f'<text class="mid" x="{x:.1f}" y="{floor + 16}">{tick:g}</text>')
        parts.append(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
        parts.append(
            f'<text class="mid" x="{(self.left + right) / 2:.1f}" y="{self.height - 4}">{escape(x_label)}</text>'
        )
        middle = (self.top + floor) / 2
        if y_label:
            parts.append(f'<text class="mid" transform="rotate(-90)" x="{-middle:.1f}" y="11">{escape(y_label)}</text>')
        return Markup("".join(parts))

    def draw_line(self, points: Points, name: str) -> Markup:
        """Draw a line through the points, in the style of the class `name`; a single point becomes a dot."""
        places = [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points]
        if len(places) == 1:
            return self.draw_dot(*points[0], name)
        return Markup(f'<polyline class="line {name}" points="{" ".join(places)}"/>')

    def draw_dot(self, x: float, y: float, name: str, radius: float = 3.5) -> Markup:
        return Markup(f'<circle class="dot {name}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"/>')


def make_svg(axes: Axes, text: str, *parts: Markup) -> Markup:
    """Join the parts into one image; `text` describes it."""
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        axes.width, axes.height, text, Markup("").join(parts)
    )


def choose_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_history(
    history: Sequence[Mapping[str, Any]],
    series: Mapping[str, tuple[str, str]],
    best: int | None,
    y_label: str,
    text: str,
) -> Markup | None:
    """Draw figures of every epoch as lines, and the best epoch as an upright line.

    Args:
        history: a dictionary for each epoch.
        series: a name and a class of the style sheet for each key of the history.
        best: the epoch to mark.

    Returns:
        None if there is nothing to draw.
    """
    lines = {key: [(line["epoch"], line[key]) for line in history if line.get(key) is not None] for key in series}
    values = [y for points in lines.values() for _, y in points]
    if not values:
        return None
    first, last = history[0]["epoch"], history[-1]["epoch"]
    # A diverged epoch would flatten all others.
    high = min(max(values), 4 * float(np.quantile(values, 0.9))) or 1.0
    axes = Axes((first, max(last, first + 1)), (0, high * 1.05))
    x_ticks = [tick for tick in choose_ticks(first, max(last, first + 1)) if tick == int(tick)]
    parts = [axes.draw_frame("epoch", y_label, x_ticks, choose_ticks(0, high * 1.05, 4))]
    if best is not None:
        x = axes.x(best)
        parts.append(Markup(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top}" y2="{axes.y(0):.1f}"/>'))
    for key, (_, name) in series.items():
        if lines[key]:
            parts.append(axes.draw_line([(x, min(y, high * 1.05)) for x, y in lines[key]], name))
    return make_svg(axes, text, *parts)


def draw_intervals(rows: Sequence[Mapping[str, Any]], text: str) -> Markup:
    """Draw a line for each figure: the model's value as a dot with its interval, and the baselines' values.

    Args:
        rows: `name`, `value`, `interval` (None if unknown) and `baselines`, pairs of a class of the style sheet and a
            value.
    """
    known = [
        value for row in rows for value in (row["value"], *(row["interval"] or ()), *(v for _, v in row["baselines"]))
    ]
    high = min(1.0, max([0.1, *known]) * 1.08)
    axes = Axes((0, high), (0, len(rows)), height=36 * len(rows) + 40, left=86)
    parts = [axes.draw_frame("", "", choose_ticks(0, high), [])]
    for i, row in enumerate(reversed(rows)):
        y = axes.y(i + 0.5)
        parts.append(Markup('<text class="end" x="78" y="{:.1f}">{}</text>').format(y + 4, row["name"]))
        parts.append(
            Markup(f'<line class="grid" x1="{axes.left}" x2="{axes.width - axes.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        )
        if row["interval"]:
            low, top = (axes.x(value) for value in row["interval"])
            parts.append(Markup(f'<line class="bar" x1="{low:.1f}" x2="{top:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'))
        parts += [draw_marker(name, axes.x(value), y) for name, value in row["baselines"]]
        parts.append(axes.draw_dot(row["value"], i + 0.5, "own", 4))
    return make_svg(axes, text, *parts)


def draw_marker(name: str, x: float, y: float) -> Markup:
    """Draw a marker with the shape of its class: `b0` a diamond, `b1` a triangle, `b2` a square."""
    shapes = {"b0": ((0, -6), (6, 0), (0, 6), (-6, 0)), "b1": ((0, -6), (5.5, 5), (-5.5, 5))}
    corners = shapes.get(name, ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)))
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return Markup(f'<polygon class="marker {name}" points="{points}"/>')


def draw_precision_recall(
    recall: npt.NDArray[np.float64], precision: npt.NDArray[np.float64], operating: tuple[float, float], text: str
) -> Markup:
    """Draw a small precision-recall curve with a dot at the threshold of `predict`."""
    axes = Axes((0, 1), (0, 1), width=160, height=150, left=30, right=8, top=8, bottom=30)
    return make_svg(
        axes,
        text,
        axes.draw_frame("recall", "", (0, 0.5, 1), (0, 0.5, 1)),
        axes.draw_line(list(zip(recall.tolist(), precision.tolist(), strict=True)), "own"),
        axes.draw_dot(*operating, "point"),
    )


def draw_reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]], text: str) -> Markup:
    """Draw the share of positives against the mean probability, before and after the temperature."""
    axes = Axes((0, 1), (0, 1), height=300)
    ticks = (0, 0.2, 0.4, 0.6, 0.8, 1)
    parts = [axes.draw_frame("mean probability", "share that is present", ticks, ticks)]
    parts.append(axes.draw_line([(0, 0), (1, 1)], "ideal"))
    for name, side in bins.items():
        points = [(part["prob"], part["positive"]) for part in side if part["count"]]
        if points:
            parts.append(axes.draw_line(points, name))
            parts += [axes.draw_dot(x, y, name, 3) for x, y in points]
    return make_svg(axes, text, *parts)


def draw_map(points: npt.NDArray[np.float64], kinds: Sequence[str], titles: Sequence[str], text: str) -> Markup:
    """Draw (n, 2) points as n dots, each with a class of the style sheet and a title shown on hover."""
    axes = Axes((0, 1), (0, 1), width=640, height=460, left=8, right=8, top=8, bottom=8)
    low, high = points.min(axis=0), points.max(axis=0)
    unit = (points - low) / np.where(high > low, high - low, 1)
    dots = [
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.6"><title>{}</title></circle>').format(
            kind, axes.x(x), axes.y(y), title
        )
        for (x, y), kind, title in zip(unit.tolist(), kinds, titles, strict=True)
    ]
    return make_svg(axes, text, *dots)

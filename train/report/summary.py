"""Make the sections on the run as a whole: its figures, calibration and training."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from train.metrics.figures import FIGURES, KEY_FIGURES, Figure, format_value

from . import plots
from .facts import Facts, Json

SHOWN = (
    *("f1_weighted", "f1_weighted_tuned", "f1_macro", "f1_micro", "map_macro", "precision_weighted", "recall_weighted"),
    *("label_accuracy", "accuracy", "loss"),
)
"""The figures of the table of averages."""

CARDS = ("map_macro", "f1_weighted", "f1_macro", "f1_weighted_tuned")
"""The figures at the top of the page."""

HISTORY = ("train_loss", "loss", *KEY_FIGURES)
"""The figures shown for every epoch."""


def make_result(title: str, metrics: Json) -> dict[str, Any]:
    """Collect what the page shows of one set of tiles and its metrics.json."""
    return {
        "title": title,
        "id": title.lower(),
        "metrics": metrics,
        "columns": {"all classes": metrics, **metrics["variants"]},
        "baselines": metrics.get("baselines") or {},
        "plot": _draw_intervals(title, metrics),
        "classes": rank_classes(metrics["per_class"]),
        "reliability": _make_reliability(title, metrics),
    }


def _draw_intervals(title: str, metrics: Json) -> Markup | None:
    baselines = list((metrics.get("baselines") or {}).values())
    rows = [
        {
            "name": FIGURES[key].title,
            "value": metrics[key],
            "interval": metrics["intervals"].get(key),
            "baselines": [(f"b{i}", b[key]) for i, b in enumerate(baselines) if b[key] is not None],
        }
        for key in KEY_FIGURES
        if metrics[key] is not None
    ]
    described = "; ".join(
        f"{row['name']} {format_value(row['value'])}"
        + (f", 95 % interval {row['interval'][0]:.3f} to {row['interval'][1]:.3f}" if row["interval"] else "")
        for row in rows
    )
    return plots.draw_intervals(rows, f"{title} figures with intervals: {described}.") if rows else None


def rank_classes(per_class: Sequence[Json]) -> list[Json]:
    """Sort the classes by falling support; each gets its column and the alphabetical rank that the page sorts by."""
    names = sorted(range(len(per_class)), key=lambda c: per_class[c]["name"].casefold())
    ranks = {c: rank for rank, c in enumerate(names)}
    rows = [{**row, "column": c, "rank": ranks[c]} for c, row in enumerate(per_class)]
    return sorted(rows, key=lambda row: -row["support"])


def _make_reliability(title: str, metrics: Json) -> dict[str, Any] | None:
    if "reliability" not in metrics:
        return None
    bins, errors = metrics["reliability"], metrics["calibration"]
    ece = FIGURES["ece"]
    text = (
        f"{title}: reliability diagram. {ece.title.capitalize()} {ece.format(errors['ece_before'])} "
        f"before and {ece.format(errors['ece_after'])} after the temperature; on the diagonal it would be 0."
    )
    edges = [(i / len(bins["before"]), (i + 1) / len(bins["before"])) for i in range(len(bins["before"]))]
    return {
        "plot": plots.draw_reliability(bins, text),
        "rows": list(zip(edges, bins["before"], bins["after"], strict=True)),
    }


def describe_verdict(facts: Facts) -> str:
    """Compare mAP with that of the best baseline, claiming no more than the interval does."""
    value, interval = facts.metrics["map_macro"], facts.metrics["intervals"].get("map_macro")
    baselines = {
        name: b["map_macro"] for name, b in (facts.metrics.get("baselines") or {}).items() if b["map_macro"] is not None
    }
    if value is None or not baselines:
        return ""
    name = max(baselines, key=lambda key: baselines[key])
    text = f"The best baseline by {FIGURES['map_macro'].title}, the {name}, reaches {baselines[name]:.3f}"
    if not interval:
        return f"{text}."
    low, high = interval
    where = "below" if baselines[name] < low else "above" if baselines[name] > high else "within"
    advice = ": on these tiles the two cannot be told apart by it" if where == "within" else ""
    return f"{text}, {where} the model's interval{advice}."


def draw_history(facts: Facts) -> list[dict[str, Any]]:
    """Draw two panels: the figures that training minimises, and those that it should raise."""
    if not facts.history:
        return []
    last = facts.history[-1]
    best = "" if facts.epoch is None else f" The best epoch is {facts.epoch}."
    figures = [FIGURES[key] for key in HISTORY]
    panels = []
    for title, label, shown in (
        ("Loss", FIGURES["loss"].title, [figure for figure in figures if not figure.higher_is_better]),
        ("Validation figures", "", [figure for figure in figures if figure.higher_is_better]),
    ):
        series = {figure.key: (name_in_history(figure), f"s{i}") for i, figure in enumerate(shown)}
        ends = ", ".join(f"{series[figure.key][0]} {figure.format(last.get(figure.key))}" for figure in shown)
        text = f"{title} over {len(facts.history)} epochs; at the end {ends}.{best}"
        drawn = plots.draw_history(facts.history, series, facts.epoch, label, text)
        if drawn is not None:
            panels.append({"title": title, "plot": drawn, "series": list(series.values())})
    return panels


def name_in_history(figure: Figure) -> str:
    """Return the title of a figure in a history line, where `loss` stands next to the training loss."""
    return f"validation {figure.title}" if figure.key == "loss" else figure.title

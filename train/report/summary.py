"""Sections on the run as a whole: its figures, calibration and training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.metrics.audit import LeakAudit
from train.metrics.evaluation import COMPARED

from . import plots
from .facts import Evidence, Facts, Json

FIGURES = (
    ("F1 weighted", "f1_weighted"),
    ("F1 weighted, tuned thresholds", "f1_weighted_tuned"),
    ("F1 macro", "f1_macro"),
    ("F1 micro", "f1_micro"),
    ("mAP", "map_macro"),
    ("precision weighted", "precision_weighted"),
    ("recall weighted", "recall_weighted"),
    ("label accuracy", "label_accuracy"),
    ("subset accuracy", "accuracy"),
    ("loss", "loss"),
)
INTERVALS = (("weighted F1", "f1_weighted"), ("macro F1", "f1_macro"), ("mAP", "map_macro"))


def format_figure(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def make_result(title: str, metrics: Json, evidence: Evidence | None) -> dict[str, Any]:
    """One set of tiles and everything that metrics.json says of it."""
    columns = {"all classes": metrics, **metrics["variants"]}
    intervals = metrics["intervals"]
    cards = [
        {"name": name, "value": metrics[key], "interval": intervals.get(key)}
        for name, key in (("mAP", "map_macro"), *INTERVALS[:2], ("weighted F1, tuned", "f1_weighted_tuned"))
    ]
    baselines = metrics.get("baselines") or {}
    names = {name: f"b{i}" for i, name in enumerate(baselines)}
    rows = [
        {
            "name": name,
            "value": metrics[key],
            "interval": intervals.get(key),
            "baselines": [(names[b], figures[key]) for b, figures in baselines.items() if figures[key] is not None],
        }
        for name, key in INTERVALS
        if metrics[key] is not None
    ]
    described = "; ".join(
        f"{row['name']} {format_figure(row['value'])}"
        + (f", 95 % interval {row['interval'][0]:.3f} to {row['interval'][1]:.3f}" if row["interval"] else "")
        for row in rows
    )
    return {
        "title": title,
        "id": title.lower(),
        "cards": cards,
        "tiles": None if evidence is None else len(evidence),
        "scenes": None if evidence is None else evidence.scenes,
        "columns": list(columns),
        "figures": [
            {
                "name": name,
                "key": key,
                "cells": [column[key] for column in columns.values()],
                "interval": intervals.get(key),
            }
            for name, key in FIGURES
        ],
        "baselines": [
            {"name": name, "marker": names[name], "basis": b["basis"], "cells": [b[key] for _, key in COMPARED]}
            for name, b in baselines.items()
        ],
        "own": [metrics[key] for _, key in COMPARED],
        "compared": [name for name, _ in COMPARED],
        "plot": plots.draw_intervals(rows, f"{title} figures with intervals: {described}.") if rows else None,
        "classes": rank_classes(metrics["per_class"]),
        "calibration": metrics["calibration"],
        "reliability": _make_reliability(title, metrics),
    }


def rank_classes(per_class: Sequence[Json]) -> list[Json]:
    """Rows by falling support, each with its column and the rank of its name, by which the page sorts."""
    names = sorted(range(len(per_class)), key=lambda c: per_class[c]["name"].casefold())
    ranks = {c: rank for rank, c in enumerate(names)}
    rows = [{**row, "column": c, "rank": ranks[c]} for c, row in enumerate(per_class)]
    return sorted(rows, key=lambda row: -row["support"])


def _make_reliability(title: str, metrics: Json) -> dict[str, Any] | None:
    if "reliability" not in metrics:
        return None
    bins, errors = metrics["reliability"], metrics["calibration"]
    text = (
        f"{title}: reliability diagram. Expected calibration error {format_figure(errors['ece_before'], 4)} before and "
        f"{format_figure(errors['ece_after'], 4)} after the temperature; the diagonal would be 0."
    )
    edges = [(i / len(bins["before"]), (i + 1) / len(bins["before"])) for i in range(len(bins["before"]))]
    return {
        "plot": plots.draw_reliability(bins, text),
        "rows": list(zip(edges, bins["before"], bins["after"], strict=True)),
    }


def describe_verdict(facts: Facts) -> str:
    """mAP beside the best baseline, without claiming what the interval does not."""
    value, interval = facts.metrics["map_macro"], facts.metrics["intervals"].get("map_macro")
    baselines = {
        name: b["map_macro"] for name, b in (facts.metrics.get("baselines") or {}).items() if b["map_macro"] is not None
    }
    if value is None or not baselines:
        return ""
    name = max(baselines, key=lambda key: baselines[key])
    text = f"The best baseline by mAP, the {name}, reaches {baselines[name]:.3f}"
    if not interval:
        return f"{text}."
    low, high = interval
    where = "below" if baselines[name] < low else "above" if baselines[name] > high else "within"
    advice = ": on these tiles the two cannot be told apart by it" if where == "within" else ""
    return f"{text}, {where} the model's interval{advice}."


def describe_audit(audit: Json | None) -> str:
    return LeakAudit(**audit).describe() if audit else ""


def draw_history(facts: Facts) -> list[dict[str, Any]]:
    """Two panels: what is minimised, and what is wanted."""
    if not facts.history:
        return []
    last = facts.history[-1]
    best = "" if facts.epoch is None else f" The best epoch is {facts.epoch}."
    panels = []
    for title, label, series in (
        ("Loss", "loss", {"train_loss": ("training", "s0"), "loss": ("validation", "s1")}),
        (
            "Validation figures",
            "",
            {"f1_weighted": ("F1 weighted", "s0"), "f1_macro": ("F1 macro", "s1"), "map_macro": ("mAP", "s2")},
        ),
    ):
        ends = ", ".join(f"{name} {format_figure(last.get(key), 4)}" for key, (name, _) in series.items())
        text = f"{title} over {len(facts.history)} epochs; at the end {ends}.{best}"
        drawn = plots.draw_history(facts.history, series, facts.epoch, label, text)
        if drawn is not None:
            panels.append({"title": title, "plot": drawn, "series": list(series.values())})
    return panels

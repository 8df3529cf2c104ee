"""report.html: one file that opens offline, asks nothing of any network, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..audit import LeakAudit
from ..evaluation import COMPARED
from ..rundir import RunDirectory
from . import plots
from .analysis import RECALLS, choose_extremes, draw_curve, list_beside, list_swaps
from .card import write_card
from .commands import list_commands
from .embeddings import EmbeddingMap
from .facts import Evidence, Facts, Json, format_json
from .licences import find_licences
from .tiles import MOST_IMAGES

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
_MOST_OF_A_KIND = 3
_MAP_COLOURS = 8
MOST_DOUBTS = 200


@dataclass(frozen=True)
class LeftOut:
    """A part that the report lacks, and why."""

    part: str
    why: str


@dataclass(frozen=True, eq=False)
class Extras:
    """What takes more than the run directory.

    Attributes:
        uris: thumbnails as data URIs, by tile.
        map: of validation tiles, None without one.
        doubts: lines of doubts.csv.
        left_out: what could not be had.
    """

    uris: Mapping[str, str] = field(default_factory=dict)
    map: EmbeddingMap | None = None
    doubts: Sequence[Mapping[str, str]] = ()
    left_out: Sequence[LeftOut] = ()


_AT_THE_END = "a run's end reads neither tiles nor vectors again: `make report` does"
NO_EXTRAS = Extras(left_out=(LeftOut("thumbnails", _AT_THE_END), LeftOut("map of the embeddings", _AT_THE_END)))


def write_report(run: RunDirectory, facts: Facts | None = None, extras: Extras = NO_EXTRAS) -> None:
    """Write report.html and model_card.md from what the run directory holds.

    Args:
        run: a finished run.
        facts: what it holds, where that was read already.
        extras: further parts.

    Raises:
        TrainError: the run is not finished, or one of its files cannot be read.
    """
    facts = facts or Facts.read(run)
    (run.path / "report.html").write_text(render_page(facts, extras), encoding="utf-8")
    write_card(facts)


def render_page(facts: Facts, extras: Extras) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("train.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": _figure, "share": lambda value: f"{100 * value:.0f} %"}
    style, script = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    evidence = facts.evidence
    left_out = list(extras.left_out)
    if evidence is None:
        left_out.append(LeftOut("curves, errors and tiles of each class", facts.lacking))
    if "reliability" not in facts.metrics:
        left_out.append(LeftOut("reliability diagram", "metrics.json is an earlier release's"))
    results = [make_result("Validation", facts.metrics, evidence)]
    if facts.test_metrics:
        results.append(make_result("Test", facts.test_metrics, None))
    return environment.get_template("report.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        facts=facts,
        results=results,
        left_out=left_out,
        verdict=_describe_verdict(facts),
        audit=_describe_audit(facts.audit),
        history=_draw_history(facts),
        classes=_make_classes(facts, extras) if evidence is not None else [],
        swaps=_list_swaps(facts) if evidence is not None else [],
        recalls=RECALLS,
        map=_make_map(facts, extras.map) if extras.map and evidence is not None else None,
        doubts=extras.doubts,
        uris=extras.uris,
        commands=list_commands(facts),
        licences=find_licences(facts),
        settings=format_json(facts.settings["config"]),
        marker=plots.draw_marker,
    )


def _figure(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def make_result(title: str, metrics: Json, evidence: Evidence | None) -> dict[str, Any]:
    """One set of tiles and everything that metrics.json says of it."""
    columns = {"all classes": metrics, **metrics["variants"]}
    intervals = metrics["intervals"]
    cards = [
        {"name": name, "value": metrics[key], "interval": intervals.get(key)}
        for name, key in (("mAP", "map_macro"), *INTERVALS[:2], ("weighted F1, tuned thresholds", "f1_weighted_tuned"))
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
        f"{row['name']} {_figure(row['value'])}"
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
            {"name": name, "key": key, "cells": [column[key] for column in columns.values()], "interval": intervals.get(key)}
            for name, key in FIGURES
        ],
        "baselines": [
            {"name": name, "marker": names[name], "basis": b["basis"], "cells": [b[key] for _, key in COMPARED]}
            for name, b in baselines.items()
        ],
        "own": [metrics[key] for _, key in COMPARED],
        "compared": [name for name, _ in COMPARED],
        "plot": plots.draw_intervals(rows, f"{title} figures with intervals: {described}.") if rows else None,
        "classes": _rank_classes(metrics["per_class"]),
        "calibration": metrics["calibration"],
        "reliability": _make_reliability(title, metrics),
    }


def _rank_classes(per_class: Sequence[Json]) -> list[Json]:
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
        f"{title}: reliability diagram. Expected calibration error {_figure(errors['ece_before'], 4)} before and "
        f"{_figure(errors['ece_after'], 4)} after the temperature; the diagonal would be 0."
    )
    edges = [(i / len(bins["before"]), (i + 1) / len(bins["before"])) for i in range(len(bins["before"]))]
    return {"plot": plots.draw_reliability(bins, text), "rows": list(zip(edges, bins["before"], bins["after"], strict=True))}


def _describe_verdict(facts: Facts) -> str:
    """mAP beside the best baseline, without claiming what the interval does not."""
    value, interval = facts.metrics["map_macro"], facts.metrics["intervals"].get("map_macro")
    baselines = {name: b["map_macro"] for name, b in (facts.metrics.get("baselines") or {}).items() if b["map_macro"] is not None}
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


def _describe_audit(audit: Json | None) -> str:
    return LeakAudit(**audit).describe() if audit else ""


def _draw_history(facts: Facts) -> list[dict[str, Any]]:
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
        ends = ", ".join(f"{name} {_figure(last.get(key), 4)}" for key, (name, _) in series.items())
        text = f"{title} over {len(facts.history)} epochs; at the end {ends}.{best}"
        drawn = plots.draw_history(facts.history, series, facts.epoch, label, text)
        if drawn is not None:
            panels.append({"title": title, "plot": drawn, "series": list(series.values())})
    return panels


def count_of_a_kind(classes: int) -> int:
    """Tiles shown of each of the three kinds of a class, so that all of them are 600 at most."""
    return max(1, min(_MOST_OF_A_KIND, MOST_IMAGES // (3 * max(classes, 1))))


def _make_classes(facts: Facts, extras: Extras) -> list[dict[str, Any]]:
    """What is known of each class beside its figures, by falling support."""
    evidence = facts.evidence
    assert evidence is not None
    labels, preds, names = evidence.labels, evidence.preds, facts.class_names
    missed, false = list_beside(labels & ~preds, labels, preds), list_beside(~labels & preds, labels, preds)
    most = count_of_a_kind(len(names))
    made = []
    for row in _rank_classes(facts.metrics["per_class"]):
        c = row["column"]
        curve = draw_curve(evidence.probs[:, c], labels[:, c], preds[:, c])
        extremes = choose_extremes(evidence.calibrated[:, c], labels[:, c], preds[:, c], most=most)
        kinds = (("Found", "found", extremes.found), ("Missed", "missed", extremes.missed), ("False alarm", "false", extremes.false))
        drawn = None
        if curve is not None:
            text = (
                f"Precision-recall curve of {row['name']}: average precision {_figure(row['ap'])}; the decision has "
                f"recall {curve.operating[0]:.2f} and precision {curve.operating[1]:.2f}."
            )
            drawn = plots.draw_precision_recall(*curve.thin(), curve.operating, text)
        made.append(
            {
                **row,
                "plot": drawn,
                "at": [] if curve is None else [curve.read_at(recall) for recall in RECALLS],
                "beside": [("missed", missed[c]), ("falsely predicted", false[c])],
                "tiles": [
                    (kind, style, [_make_tile(evidence, names, i, c, extras.uris) for i in chosen])
                    for kind, style, chosen in kinds
                    if chosen
                ],
            }
        )
    return made


def _make_tile(evidence: Evidence, names: Sequence[str], i: int, c: int, uris: Mapping[str, str]) -> dict[str, Any]:
    tile = str(evidence.tiles[i])
    truth, said = (", ".join(names[d] for d in np.flatnonzero(side[i])) or "nothing" for side in (evidence.labels, evidence.preds))
    return {"name": tile, "uri": uris.get(tile), "prob": float(evidence.calibrated[i, c]), "truth": truth, "said": said}


def _list_swaps(facts: Facts) -> list[tuple[str, str, int]]:
    assert facts.evidence is not None
    names = facts.class_names
    return [(names[c], names[d], tiles) for c, d, tiles in list_swaps(facts.evidence.labels, facts.evidence.preds)]


def _make_map(facts: Facts, drawn: EmbeddingMap) -> dict[str, Any]:
    """The map coloured by each tile's rarest class, and for every class what is true and what is said of each point."""
    evidence = facts.evidence
    assert evidence is not None
    names = facts.class_names
    labels, preds = evidence.labels[drawn.chosen], evidence.preds[drawn.chosen]
    support = evidence.labels.sum(axis=0)
    rarest = np.where(labels.any(axis=1), np.where(labels, support, support.max() + 1).argmin(axis=1), -1)
    counts = np.bincount(rarest[rarest >= 0], minlength=len(names))
    coloured = [c for c in np.argsort(-counts, kind="stable")[:_MAP_COLOURS].tolist() if counts[c]]
    kind = {c: f"k{i}" for i, c in enumerate(coloured)}
    titles = [
        f"{evidence.tiles[i]}: {', '.join(names[d] for d in np.flatnonzero(row)) or 'nothing'}"
        for i, row in zip(drawn.chosen.tolist(), labels, strict=True)
    ]
    text = f"Map of {len(titles):,} validation tiles: near points have alike vectors. Choose a class above to colour it by."
    codes = labels.astype(np.int8) + 2 * preds
    return {
        "plot": plots.draw_map(drawn.points, [kind.get(c, "kx") for c in rarest.tolist()], titles, text),
        "method": drawn.method,
        "legend": [(names[c], kind[c], int(counts[c])) for c in coloured],
        "others": int(len(rarest) - counts[coloured].sum()),
        "classes": [
            (names[c], "".join(map(str, codes[:, c].tolist())))
            for c in np.argsort(-support, kind="stable").tolist()
            if codes[:, c].any()
        ],
    }

"""Write report.html: one file that opens offline, loads nothing from the network and runs only its own script."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from train.metrics.audit import LeakAudit
from train.metrics.figures import COMPARED, FIGURES, KEY_FIGURES, format_value
from train.runs.directory import RunDirectory

from . import plots
from .analysis import RECALLS
from .card import write_card
from .classes import make_classes, make_map_section, name_swaps
from .commands import list_commands
from .embeddings import EmbeddingMap
from .facts import Facts
from .licences import find_licences
from .summary import CARDS, HISTORY, SHOWN, describe_verdict, draw_history, make_result, name_in_history
from .tiles import Thumbnail

MOST_DOUBTS = 200


class LeftOut(NamedTuple):
    """A part that is not in the report, and why."""

    part: str
    why: str


@dataclass(frozen=True, eq=False)
class Extras:
    """The parts of a report that need more than the run directory.

    Attributes:
        pictures: thumbnails by tile.
        map: of validation tiles; None if there is none.
        doubts: lines of doubts.csv.
        left_out: parts that could not be made.
    """

    pictures: Mapping[str, Thumbnail] = field(default_factory=dict)
    map: EmbeddingMap | None = None
    doubts: Sequence[Mapping[str, str]] = ()
    left_out: Sequence[LeftOut] = ()


_AT_THE_END = "not made at the end of a run, which does not reread tiles and vectors: use `make report`"
NO_EXTRAS = Extras(left_out=(LeftOut("thumbnails", _AT_THE_END), LeftOut("map of the embeddings", _AT_THE_END)))


def write_report(run: RunDirectory, facts: Facts | None = None, extras: Extras = NO_EXTRAS) -> None:
    """Write report.html and model_card.md of a finished run, from `facts` if its files were read already.

    Raises:
        TrainError: the run is not finished, or one of its files cannot be read.
    """
    facts = facts or Facts.read(run)
    (run.path / "report.html").write_text(render_page(facts, extras), encoding="utf-8")
    write_card(facts)


def render_page(facts: Facts, extras: Extras) -> str:
    """Return the whole page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("train.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": format_value,
        "name_in_history": name_in_history,
        "share": lambda value: f"{100 * value:.0f}\u00a0%",
    }
    style, script = (
        resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("style.css", "script.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    evidence = facts.evidence
    left_out = list(extras.left_out)
    if evidence is None:
        left_out.append(LeftOut("curves, errors and tiles of each class", facts.lacking))
    if "reliability" not in facts.metrics:
        left_out.append(LeftOut("reliability diagram", "metrics.json is from an earlier release"))
    results = [make_result("Validation", facts.metrics)]
    if facts.test_metrics:
        results.append(make_result("Test", facts.test_metrics))
    return environment.get_template("report.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        facts=facts,
        figures=FIGURES,
        key_figures=KEY_FIGURES,
        cards=CARDS,
        averages=SHOWN,
        compared=COMPARED,
        history_keys=HISTORY,
        results=results,
        left_out=left_out,
        verdict=describe_verdict(facts),
        audit=LeakAudit(**facts.audit).describe() if facts.audit else "",
        history=draw_history(facts),
        classes=make_classes(facts, extras.pictures) if evidence is not None else [],
        swaps=name_swaps(facts) if evidence is not None else [],
        recalls=RECALLS,
        map=make_map_section(facts, extras.map) if extras.map and evidence is not None else None,
        doubts=extras.doubts,
        pictures=extras.pictures,
        commands=list_commands(facts),
        licences=find_licences(facts),
        settings=json.dumps(facts.settings["config"], indent=2, ensure_ascii=False),
        marker=plots.draw_marker,
    )

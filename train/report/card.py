"""model_card.md: a model card as the Hugging Face hub reads them, YAML first (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import re

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from .commands import list_commands
from .facts import Facts
from .licences import DINOV3_URL, XVIEW_SITE, XVIEW_URL, Licences, find_licences

_SCORED = (("f1", "F1 weighted", "f1_weighted"), ("f1", "F1 macro", "f1_macro"), ("mAP", "mAP", "map_macro"))
_MARKUP = re.compile(r"([\\`*_\[\]()#|<>~&$])")


def write_card(facts: Facts) -> None:
    """Write model_card.md beside the report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("train.report", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": escape_markdown,
        "note": _link_notes,
        "figure": lambda value: "n/a" if value is None else f"{value:.3f}",
    }
    licences = find_licences(facts)
    text = environment.get_template("model_card.md.jinja").render(
        facts=facts, front=_make_front(facts, licences), licences=licences, commands=list_commands(facts)
    )
    (facts.run.path / "model_card.md").write_text(text, encoding="utf-8")


def escape_markdown(text: object) -> str:
    """Text from outside as Markdown that shows it on one line, and nothing else: a class may be named `|<script>`."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _link_notes(note: str) -> str:
    """A note on licences, where the addresses that this program knows stay links."""
    text = escape_markdown(note)
    for url in (DINOV3_URL, XVIEW_SITE, XVIEW_URL):
        text = text.replace(escape_markdown(url), f"<{url}>")
    return text


def _make_front(facts: Facts, licences: Licences) -> str:
    """The YAML between the dashes."""
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="multi-label classification of tiles",
            dataset_type="tiles",
            dataset_name="tiles of this run",
            dataset_split=name,
            metric_type=kind,
            metric_name=title,
            metric_value=round(metrics[key], 4),
        )
        for name, metrics in (("validation", facts.metrics), ("test", facts.test_metrics))
        if metrics is not None
        for kind, title, key in _SCORED
        if metrics[key] is not None
    ]
    data = ModelCardData(
        base_model=licences.base_model,
        license="other" if licences.name else None,
        license_name=licences.name,
        license_link=licences.link,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["remote-sensing", "multi-label", "tileprobe"],
        model_name=facts.run.path.name,
        eval_results=results,
    )
    return data.to_yaml()

"""Write model_card.md in the format of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards)."""

import re

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from train.metrics.figures import FIGURES, KEY_FIGURES, format_value

from .commands import list_commands
from .facts import Facts
from .licences import DINOV3_URL, XVIEW_SITE, XVIEW_URL, Licences, find_licences

_MARKUP = re.compile(r"([\\`*_\[\]()#|<>~&$])")


def write_card(facts: Facts) -> None:
    """Write model_card.md next to the report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("train.report", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape_markdown, "note": _link_notes, "figure": format_value}
    licences = find_licences(facts)
    text = environment.get_template("model_card.md.jinja").render(
        facts=facts,
        figures=FIGURES,
        shown=(*KEY_FIGURES, "f1_weighted_tuned"),
        front=_make_front(facts, licences),
        licences=licences,
        commands=list_commands(facts),
    )
    (facts.run.path / "model_card.md").write_text(text, encoding="utf-8")


def escape_markdown(text: object) -> str:
    """Escape text so that Markdown shows it as it is, on one line: a class may be named `|<script>`."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _link_notes(note: str) -> str:
    """Escape a note on licences, but keep the known addresses as links."""
    text = escape_markdown(note)
    for url in (DINOV3_URL, XVIEW_SITE, XVIEW_URL):
        text = text.replace(escape_markdown(url), f"<{url}>")
    return text


def _make_front(facts: Facts, licences: Licences) -> str:
    """Return the YAML between the dashes."""
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="multi-label classification of tiles",
            dataset_type="tiles",
            dataset_name="tiles of this run",
            dataset_split=name,
            metric_type="mAP" if key == "map_macro" else "f1",
            metric_name=FIGURES[key].title,
            metric_value=round(metrics[key], 4),
        )
        for name, metrics in (("validation", facts.metrics), ("test", facts.test_metrics))
        if metrics is not None
        for key in KEY_FIGURES
        if metrics[key] is not None
    ]
    return ModelCardData(
        base_model=licences.base_model,
        license="other" if licences.name else None,
        license_name=licences.name,
        license_link=licences.link,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["remote-sensing", "multi-label", "tileprobe"],
        model_name=facts.run.path.name,
        eval_results=results,
    ).to_yaml()

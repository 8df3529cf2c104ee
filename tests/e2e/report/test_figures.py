"""The figures of a report are those of the run's files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import ModelCard
from sklearn.metrics import precision_recall_curve

from tests.e2e.report.pages import COLUMNS, NAMES, Made, Open, copy_runs, read_rows, show, texts
from tests.planted import CLASSES
from tests.planted import train as run_train


def test_its_figures_are_those_of_metrics_json(made: Made, open_page: Open) -> None:
    page = open_page()
    for side, file in (("validation", "metrics.json"), ("test", "test_metrics.json")):
        metrics = made.read(file)
        keys = page.eval_on_selector_all(f"#averages-{side} tbody tr", "rows => rows.map(row => row.dataset.key)")
        columns = [metrics, *metrics["variants"].values()]
        assert len(columns) > 1
        for key, row in zip(keys, read_rows(page, f"#averages-{side}"), strict=True):
            interval = metrics["intervals"].get(key)
            spread = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            own, *others = [show(column[key], 4) for column in columns]
            assert row[1:] == [own, spread, *others], key
        assert {"f1_weighted", "f1_weighted_tuned", "f1_macro", "map_macro", "loss"} <= set(keys)
        compared = ("f1_weighted", "f1_weighted_tuned", "f1_macro", "f1_micro", "map_macro")
        found = read_rows(page, f"#baselines-{side}")
        models = {"this model": metrics, **metrics["baselines"]}
        assert [row[:-1] for row in found] == [
            [name, *(show(figures[key], 4) for key in compared)] for name, figures in models.items()
        ]
        per_class = {row["name"]: row for row in metrics["per_class"]}
        rows = read_rows(page, f"#classes-{side}")
        assert len(rows) == len(per_class) == 60
        for name, *cells in rows:
            row = per_class[name]
            assert cells == [*(show(row[key]) for key in COLUMNS[1:5]), f"{row['support']}", show(row["threshold"])]
        calibration = metrics["calibration"]
        index = ("validation", "test").index(side)
        assert texts(page, ".ece")[2 * index :][:2] == [show(calibration[f"ece_{k}"], 4) for k in ("before", "after")]
    cards = texts(page, "#summary .value")
    metrics = made.read("metrics.json")
    assert cards[:4] == [show(metrics[k]) for k in ("map_macro", "f1_weighted", "f1_macro", "f1_weighted_tuned")]


def test_reliability_is_that_of_the_logits(made: Made, open_page: Open) -> None:
    """Bins of the plain sigmoid, counted one by one."""
    logits, labels, _ = made.evidence()
    rows = read_rows(open_page(), "#reliability-validation")
    probs = (1 / (1 + np.exp(-logits))).ravel()
    assert len(rows) == 15
    for number, row in enumerate(rows):
        inside = (probs >= number / 15) & ((probs < (number + 1) / 15) | (number == 14))
        expected = [f"{inside.sum():,}"]
        expected += (
            [show(probs[inside].mean()), show(labels.ravel()[inside].mean())] if inside.any() else ["n/a", "n/a"]
        )
        assert row[1:4] == expected
    assert sum(int(row[4].replace(",", "")) for row in rows) == labels.size


def test_curves_are_scikit_learns(made: Made, open_page: Open) -> None:
    logits, labels, _ = made.evidence()
    names = [row["name"] for row in made.read("metrics.json")["per_class"]]
    page = open_page()
    rows = {row[0]: row[1:] for row in read_rows(page, "#curve-numbers")}
    shown = np.flatnonzero(labels.any(axis=0))
    assert set(rows) == {names[c] for c in shown} == set(texts(page, "#curves li a"))
    for c in shown:
        precision, recall, _ = precision_recall_curve(labels[:, c], logits[:, c])
        # From the highest threshold down, the first whose recall is enough.
        expected = [precision[np.flatnonzero(recall >= r / 10 - 1e-9)[-1]] for r in range(1, 11)]
        assert rows[names[c]] == [show(value) for value in expected]


def test_errors_by_co_occurrence_are_counted_one_by_one(made: Made, open_page: Open) -> None:
    _, labels, preds = made.evidence()
    names = [row["name"] for row in made.read("metrics.json")["per_class"]]
    page = open_page()
    seen = 0
    for c in np.flatnonzero(labels.any(axis=0) | preds.any(axis=0)).tolist():
        for number, wrong in enumerate((labels[:, c] & ~preds[:, c], ~labels[:, c] & preds[:, c])):
            companions = page.locator(f"#class-{c} .companions").nth(number)
            tiles = re.search(r"on ([\d,]+) tile|Never", companions.text_content() or "")
            assert tiles is not None
            assert int((tiles[1] or "0").replace(",", "")) == wrong.sum()
            for row in companions.locator("tbody tr").all():
                name, *cells = row.locator("th, td").all_text_contents()
                d = names.index(name)
                assert d != c
                expected = []
                for side in (labels[:, d], preds[:, d]):
                    there = sum(bool(a and b) for a, b in zip(wrong, side, strict=True))
                    expected += [f"{there}{100 * there / wrong.sum():.0f}\u00a0%", f"{100 * side.mean():.0f}\u00a0%"]
                assert cells == expected
                seen += 1
    assert seen
    swaps = {
        (names[c], names[d]): str(int((labels[:, c] & ~preds[:, c] & preds[:, d] & ~labels[:, d]).sum()))
        for c in range(60)
        for d in range(60)
    }
    shown = [tuple(row) for row in read_rows(page, "#swaps")]
    assert all(swaps[missed, predicted] == tiles != "0" for missed, predicted, tiles in shown)


def test_lost_logits_leave_the_rest(made: Made, open_page: Open, tmp_path: Path) -> None:
    run = copy_runs(made, tmp_path)
    (run / "val_logits.safetensors").write_bytes(b"cut")
    finished = run_train(tmp_path, "report")
    assert finished.status == 0, finished.err
    assert "left out: thumbnails and map: the run has no readable val_logits.safetensors" in finished.out
    page = open_page(run / "report.html")
    assert "Curves, errors and tiles of each class" in page.inner_text(".lacking")
    assert len(read_rows(page, "#classes-validation")) == 60
    page.locator("#classes-validation thead th button").first.click()
    page.fill("#filter", "other")
    page.wait_for_function("document.querySelector('#filtered').textContent.startsWith('55 of 60')")


def test_the_model_card_is_one(made: Made) -> None:
    path = made.run / "model_card.md"
    card = ModelCard.load(path)
    metrics, test = made.read("metrics.json"), made.read("test_metrics.json")
    found = {(e.dataset_split, e.metric_name): e.metric_value for e in card.data.eval_results}
    for split, figures in (("validation", metrics), ("test", test)):
        for name, key in (("weighted F1", "f1_weighted"), ("macro F1", "f1_macro"), ("mAP", "map_macro")):
            assert found[split, name] == round(figures[key], 4)
    text = path.read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pipeline_tag"] == "image-classification"
    assert "license_name" not in front  # a checkpoint of one's own
    low, high = metrics["intervals"]["map_macro"]
    assert f"| mAP | {metrics['map_macro']:.3f} | {low:.3f} to {high:.3f} |" in text
    for section in ("Intended use", "Data", "Figures", "Classes and thresholds", "Limits", "Licences"):
        assert f"\n## {section}\n" in text
    assert "Check the licence of your own imagery" in text
    assert not re.search(r"<(script|img|b|i)\b", text)
    rows = [line for line in text.splitlines() if re.search(r"\| \d+ \| ", line)]
    assert len(rows) == 60
    # A class named `a | b` is one cell: only bars that are not escaped divide cells.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert len(CLASSES) == len(NAMES)

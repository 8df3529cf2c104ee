"""Thumbnails are those of their tiles, and what cannot be shown is named."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.e2e.report.pages import Made, Open, copy_runs, find_shown, texts
from tests.planted import train as run_train


def test_thumbnails_are_those_of_their_tiles(made: Made, open_page: Open) -> None:
    page = open_page()
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.eval_on_selector_all(
        "img", "all => all.every(e => e.complete && String(e.naturalWidth) === e.getAttribute('width'))"
    )
    sources = page.eval_on_selector_all("img", "all => all.map(e => [e.alt, e.src])")
    assert len(sources) > 20
    for alt, source in sources:
        name = re.match(r"Tile (images/.+?\.png): ", alt)
        assert name is not None, alt
        tile = np.asarray(Image.open(made.root / "tiles" / name[1]).convert("RGB"), float)
        small = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))), float)
        assert small.shape == tile.shape  # 64 px are few enough
        correlation = np.corrcoef(small.mean(axis=2).ravel(), tile.mean(axis=2).ravel())[0, 1]
        assert correlation > 0.7, alt
    assert page.locator("#doubts img").count() > 0


def test_best_and_worst_tiles_are_the_extremes(made: Made, open_page: Open) -> None:
    logits, labels, preds = made.evidence()
    split = np.array(made.read("split.json")["val"])
    tiles = split[load_file(made.run / "val_logits.safetensors")["labels"].any(axis=1)]
    page = open_page()
    for c in (3, 5, 6, 48, 55):
        for style, chosen, sign in (
            ("found", labels & preds, -1),
            ("missed", labels & ~preds, 1),
            ("false", ~labels & preds, -1),
        ):
            rows = np.flatnonzero(chosen[:, c])
            expected = tiles[rows[np.argsort(sign * logits[rows, c], kind="stable")][:3]].tolist()
            assert texts(page, f"#class-{c} .{style} .name") == expected


def test_without_images_there_is_not_a_pixel(made: Made, open_page: Open, tmp_path: Path) -> None:
    run = copy_runs(made, tmp_path)
    finished = run_train(tmp_path, "report", "--no-images")
    assert finished.status == 0, finished.err
    assert "left out: thumbnails: --no-images" in finished.out
    path = run / "report.html"
    text = path.read_text()
    assert "data:" not in text.replace("img-src data:", "").replace("data-", "")
    assert "base64" not in text
    page = open_page(path)
    assert page.locator("img").count() == 0
    assert page.locator("#map .plot circle").count() > 10  # drawn from vectors
    assert "--no-images" in page.inner_text(".lacking")
    at_end = (made.root / "at-the-end.html").read_text()
    assert "base64," not in at_end
    assert "make report" in at_end


def test_what_cannot_be_had_is_named(made: Made, open_page: Open, tmp_path: Path) -> None:
    run = copy_runs(made, tmp_path)
    settings = run / "config.json"
    settings.write_text(settings.read_text().replace(str(made.root / "tiles-cache"), str(tmp_path / "no-cache")))
    (run / "doubts.csv").write_text("tile,class\n")
    finished = run_train(tmp_path, "report")
    assert finished.status == 0, finished.err
    assert re.search("left out: thumbnails and map: .*no-cache", finished.out)
    assert "left out: label doubts: " in finished.out
    said = open_page(run / "report.html").inner_text(".lacking")
    assert "its header is not the one that" in said
    assert "no-cache" in said


def test_tiles_that_changed_or_went_are_counted(made: Made, tmp_path: Path) -> None:
    """The tiles are where the cache says, in the module's own directory, and are put back."""
    run = copy_runs(made, tmp_path)
    names = find_shown(run / "report.html")
    gone, cut, broken = names[:3]
    paths = {name: made.root / "tiles" / name for name in (gone, cut, broken)}
    kept = {name: path.read_bytes() for name, path in paths.items()}
    try:
        paths[gone].unlink()
        paths[cut].write_bytes(kept[cut][:-1])
        paths[broken].write_bytes(bytes(len(kept[broken])))
        finished = run_train(tmp_path, "report")
        assert finished.status == 0, finished.err
        for reason in ("are gone", "changed since the extraction", "cannot be decoded"):
            assert re.search(rf"left out: some thumbnails: 1 of \d+ tiles {reason}, such as ", finished.out)
        assert set(names) - set(find_shown(run / "report.html")) == {gone, cut, broken}
        (made.root / "tiles").rename(made.root / "moved")
        finished = run_train(tmp_path, "report")
        (made.root / "moved").rename(made.root / "tiles")
        assert re.search("left out: thumbnails: no directory .*/tiles: check TILES", finished.out)
    finally:
        for name, path in paths.items():
            path.write_bytes(kept[name])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (
            lambda run: (run / "metrics.json").unlink(),
            "has no metrics.json: it was stopped before its end: continue it",
        ),
        (lambda run: (run / "metrics.json").write_text("{}"), "metrics.json is from another release"),
        (lambda run: (run / "config.json").unlink(), "no run at runs/head: train one first"),
        (lambda run: (run / "split.json").write_text("["), "split.json cannot be read"),
    ],
)
def test_a_run_that_cannot_be_reported_on(
    made: Made, tmp_path: Path, spoil: Callable[[Path], None], error: str
) -> None:
    spoil(copy_runs(made, tmp_path))
    finished = run_train(tmp_path, "report")
    assert finished.status == 1
    (line,) = finished.errors
    assert error in line
    assert finished.err.splitlines() == [line]


def test_a_run_in_a_bucket_is_to_be_copied_first(tmp_path: Path) -> None:
    finished = run_train(tmp_path, "report", "--run-dir", "gs://bucket/runs/head")
    assert finished.status == 1
    assert "gcloud storage cp -r" in finished.errors[0]

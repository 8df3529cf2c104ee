"""report.html in a real browser, and the command that writes it; classes and tiles of the run have hostile names."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from safetensors.numpy import load_file
from sklearn.metrics import precision_recall_curve

from tests.checkpoints import make_checkpoint
from tests.planted import CLASSES, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train

NAMES = {
    3: "<script>alert(1)</script>",
    5: '"><img src=x onerror=alert(2)>',
    6: "</script><b>Bus & 'Co'",
    48: "Bäume {{ 7*7 }} $a$ | `x` | [y](javascript:z)",
    55: "plain, with a comma",
}
PREFIX = "s<i>\"&'"
COLUMNS = ("name", "ap", "f1", "precision", "recall", "support", "threshold")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A working directory with a finished run, its tiles and cache."""

    root: Path

    @property
    def run(self) -> Path:
        return (self.root / "runs" / "head").resolve()

    def read(self, name: str) -> Any:
        return json.loads((self.run / name).read_text())

    def evidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits, labels and decisions of the validation tiles that count, by this test's own arithmetic."""
        kept = load_file(self.run / "val_logits.safetensors")
        metrics = self.read("metrics.json")
        shown = kept["labels"].any(axis=1)
        logits, labels = kept["logits"][shown].astype(np.float64), kept["labels"][shown]
        probs = 1 / (1 + np.exp(-logits / metrics["calibration"]["temperature"]))
        return logits, labels, probs >= np.array([row["threshold"] for row in metrics["per_class"]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("report")
    seed = fresh_seed()
    backbone = make_checkpoint(root / "checkpoint", seed=seed)
    for name, scenes in (("tiles", 12), ("test", 4)):
        plant_tiles(root / name, scenes=scenes, per_scene=9, seed=seed, prefix=PREFIX + name[:1], ids="class")
        extract_cache(root / name, root / f"{name}-cache", backbone)
    with (root / "classes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["class_id", "name"])
        writer.writerows((i, NAMES.get(i, f"other {i:02}")) for i in range(60))
    caches = ("--cache", root / "tiles-cache", "--test-cache", root / "test-cache")
    options = ("--taxonomy", root / "classes.csv", "--epochs", 4, "--folds", 2, "--lr", 0.003, "--device", "cpu")
    for command in (
        ("head", *caches, *options),
        ("triage", "--run-dir", "runs/head", "--out", "runs/head/doubts.csv", "--device", "cpu"),
    ):
        finished = run_train(root, *command)
        assert finished.status == 0, finished.err
    shutil.copy(root / "runs/head/report.html", root / "at-the-end.html")
    finished = run_train(root, "report")
    assert finished.status == 0, finished.err
    assert "left out" not in finished.out
    assert [path.name for path in root.glob("runs/head-001/*.tmp")] == []
    return Made(root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on this machine to open the report in")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, made: Made) -> Iterator[Open]:
    """Opens a report; in the end no page may have logged, asked for, or asked the user anything."""
    noise: list[str] = []
    contexts = []

    def open_it(path: Path | None = None, *, width: int = 1280, anchor: str = "", **options: Any) -> Page:
        options = {"reduced_motion": "reduce", **options}
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
        url = f"file://{path or made.run / 'report.html'}"
        page.on("request", lambda request: request.url.split("#")[0] == url or request.url.startswith("data:")
                or noise.append(request.url))  # fmt: skip
        page.goto(url + anchor)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert noise == []


def texts(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def show(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def read_rows(page: Page, selector: str) -> list[list[str]]:
    rows: list[list[str]] = page.eval_on_selector_all(
        f"{selector} tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )
    return rows


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


@pytest.mark.parametrize("column", range(7))
def test_every_column_sorts_both_ways(made: Made, open_page: Open, column: int) -> None:
    per_class = made.read("metrics.json")["per_class"]
    page = open_page()
    before = [row[0] for row in read_rows(page, "#classes-validation")]
    rows = {row["name"]: row for row in per_class}
    key = COLUMNS[column]
    value = {name: name.casefold() if key == "name" else row[key] for name, row in rows.items()}
    header = page.locator("#classes-validation thead th").nth(column)
    assert header.get_attribute("aria-sort") == ("descending" if key == "support" else "none")  # as it comes
    if key != "name":  # or the classes without figures would be last from the start
        page.click("#classes-validation thead th button")
        before = [row[0] for row in read_rows(page, "#classes-validation")]
    first = "ascending" if key == "name" else "descending"
    for wanted in (first, "descending" if first == "ascending" else "ascending"):
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == wanted
        known = [name for name in before if value[name] is not None]
        before = sorted(known, key=lambda name: value[name], reverse=wanted == "descending") + [
            name for name in before if value[name] is None
        ]
        assert [row[0] for row in read_rows(page, "#classes-validation")] == before
    assert page.locator("#classes-validation [aria-sort=none]").count() == 6
    assert page.locator("#classes-test [aria-sort=none]").count() == 6  # another table stays as it is


def test_filtering_goes_through_all_sections(made: Made, open_page: Open) -> None:
    page = open_page()
    rows = made.read("metrics.json")["per_class"]

    def visible(selector: str) -> int:
        return int(page.eval_on_selector_all(selector, "all => all.filter(e => !e.hidden).length"))

    page.fill("#filter", "OTHER 1")
    wanted = [row for row in rows if "other 1" in row["name"]]
    assert len(wanted) == 10
    assert visible("#classes-validation tbody tr") == visible("details.class") == 10
    assert visible("#curves li") == 0
    assert page.inner_text("#filtered").startswith("10 of 60 classes")
    page.fill("#filter", "<script")
    assert texts(page, "#classes-validation tbody tr:not([hidden]) th") == [
        row["name"] for row in rows if "<script" in row["name"]
    ]
    page.fill("#filter", "")
    page.check("#present")
    present = sum(row["support"] > 0 for row in rows)
    assert visible("#classes-validation tbody tr") == visible("#curves li") == present < 60
    page.uncheck("#present")
    assert page.inner_text("#filtered") == "All 60 classes."


def test_it_is_worked_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.focus("#filter")
    page.keyboard.type("s")
    reached: list[str] = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
        if reached[-1] == "F1":
            break
    assert reached[-1] == "F1", reached
    style = page.evaluate("(e => [e.outlineStyle, e.outlineWidth])(getComputedStyle(document.activeElement))")
    assert style[0] == "solid"
    assert float(style[1].removesuffix("px")) >= 2
    header = page.locator("#classes-validation thead th").nth(2)
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Space")
    assert header.get_attribute("aria-sort") == "ascending"
    page.fill("#filter", "")  # which might hide the third class
    page.focus("details.class:nth-of-type(3) summary")
    page.keyboard.press("Enter")
    assert page.locator("details.class:nth-of-type(3)").get_attribute("open") is not None
    for scrolled in page.locator(".scroll").all():
        assert scrolled.get_attribute("tabindex") == "0"
        assert scrolled.get_attribute("aria-label")


def test_a_link_opens_its_class(made: Made, open_page: Open) -> None:
    page = open_page(anchor="#class-55")
    assert page.locator("#class-55").get_attribute("open") is not None
    assert page.locator("#class-59").get_attribute("open") is None
    page.click("#classes-validation a[href='#class-3']")
    page.wait_for_function("document.querySelector('#class-3').open")
    page.click("#open")
    assert page.locator("details.class[open]").count() == 60
    page.click("#close")
    assert page.locator("details.class[open]").count() == 0


@pytest.mark.parametrize("width", [375, 320])
def test_no_page_scrolls_sideways_on_a_phone(open_page: Open, width: int) -> None:
    page = open_page(width=width, is_mobile=True, device_scale_factor=2)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.eval_on_selector_all(
        "main svg.plot text",
        "all => all.map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)",
    )
    assert min(sizes) > 8
    assert page.evaluate("getComputedStyle(document.body).fontSize") == "16px"


def test_print_shows_everything(open_page: Open) -> None:
    page = open_page(width=718)
    page.fill("#filter", "no such class")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    for selector in (".controls", ".buttons", "nav"):
        assert page.eval_on_selector_all(selector, "all => all.every(e => getComputedStyle(e).display === 'none')")
    hidden = page.eval_on_selector_all(
        "main tr, main li, main img, main details, main svg.plot, main pre, main h3, main p:not(.controls p, .buttons)",
        "all => all.filter(e => !e.checkVisibility({contentVisibilityAuto: true}) || !e.getBoundingClientRect().height)"
        ".map(e => e.outerHTML.slice(0, 80))",
    )
    assert hidden == []
    assert page.locator("main details:not([open])").count() > 50


CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const under = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
      if (colour[3] > 0) throw new Error("half transparent");
    }
    throw new Error("no ground");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
    if (!e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    found.push([rgba(e instanceof SVGElement ? style.fill : style.color), under(e), e.outerHTML.slice(0, 80)]);
  }
  return found;
}
"""


def luminance(colour: list[int]) -> float:
    """Of WCAG 2.2."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_for_everyone(open_page: Open, scheme: Any) -> None:
    page = open_page(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    found = page.evaluate(CONTRAST)
    assert len(found) > 1000
    grounds = {tuple(ground) for _, ground, _ in found}
    assert all((luminance(list(ground)) > 0.5) == (scheme == "light") for ground in grounds)
    for ink, ground, where in found:
        high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (where, ink, ground)


def test_it_has_structure_for_screen_readers(open_page: Open) -> None:
    page = open_page()
    for landmark in ("header", "nav[aria-label]", "main", "footer", "[role=search]"):
        assert page.locator(f"{landmark}").count() >= 1, landmark
    assert page.locator("h1").count() == page.locator("main").count() == 1
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(e => Number(e.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for image in page.locator("img").all():
        assert len(image.get_attribute("alt") or "") > 20
    for drawing in page.locator("svg").all():
        if drawing.get_attribute("aria-hidden") != "true":
            assert drawing.get_attribute("role") == "img"
            assert len(drawing.get_attribute("aria-label") or "") > 20
    unnamed = page.eval_on_selector_all("input, select", "all => all.filter(e => !e.labels.length).length")
    assert unnamed == 0
    assert page.eval_on_selector_all("table", "all => all.every(e => e.querySelector('th[scope=col]'))")
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    anchors = page.eval_on_selector_all("a[href^='#']", "all => all.map(e => e.getAttribute('href').slice(1))")
    assert set(anchors) <= set(ids)
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize(("wish", "behaviour"), [("reduce", "auto"), ("no-preference", "smooth")])
def test_motion_is_for_those_who_like_it(open_page: Open, wish: Any, behaviour: str) -> None:
    page = open_page(reduced_motion=wish)
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


def test_errors_by_co_occurrence_are_counted_one_by_one(made: Made, open_page: Open) -> None:
    _, labels, preds = made.evidence()
    names = [row["name"] for row in made.read("metrics.json")["per_class"]]
    page = open_page()
    seen = 0
    for c in np.flatnonzero(labels.any(axis=0) | preds.any(axis=0)).tolist():
        for number, wrong in enumerate((labels[:, c] & ~preds[:, c], ~labels[:, c] & preds[:, c])):
            beside = page.locator(f"#class-{c} .beside").nth(number)
            tiles = re.search(r"on ([\d,]+) tile|Never", beside.text_content() or "")
            assert tiles is not None
            assert int((tiles[1] or "0").replace(",", "")) == wrong.sum()
            for row in beside.locator("tbody tr").all():
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


def test_the_map_is_coloured_by_any_class(made: Made, open_page: Open) -> None:
    _, labels, preds = made.evidence()
    names = [row["name"] for row in made.read("metrics.json")["per_class"]]
    page = open_page()
    dots = page.locator("#map .plot circle")
    assert dots.count() == len(labels)  # few enough to draw all of them
    first = page.eval_on_selector_all("#map .plot circle", "all => all.map(e => e.getAttribute('class'))")
    for c in (3, 48):
        page.select_option("#colour", label=names[c])
        kinds = page.eval_on_selector_all("#map .plot circle", "all => all.map(e => e.getAttribute('class'))")
        assert kinds == [
            f"c{int(label) + 2 * int(said)}" for label, said in zip(labels[:, c], preds[:, c], strict=True)
        ]
        for kind in ("c0", "c1", "c2", "c3"):
            assert page.locator(f"[data-count={kind}]").text_content() == str(kinds.count(kind))
        assert page.is_visible("#by-class")
        assert not page.is_visible("#by-rarest")
    page.select_option("#colour", value="")
    assert page.eval_on_selector_all("#map .plot circle", "all => all.map(e => e.getAttribute('class'))") == first


def test_names_from_outside_are_text(made: Made, open_page: Open) -> None:
    page = open_page()
    assert page.locator("script").count() == 1
    assert page.locator("b").all_text_contents() == [*["truth", "predicted"] * (page.locator("b").count() // 2)]
    assert page.locator("img:not([src^='data:image/webp;base64,'])").count() == 0
    assert page.eval_on_selector_all(
        "*", "all => all.every(e => [...e.attributes].every(a => !a.name.startsWith('on')))"
    )
    shown = texts(page, "#classes-validation tbody th")
    assert set(NAMES.values()) <= set(shown)
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content") or ""
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline'; script-src 'sha256-" in policy
    assert "script-src 'unsafe" not in policy


def test_the_policy_runs_no_other_script(made: Made, browser: Browser, tmp_path: Path) -> None:
    text = (made.run / "report.html").read_text()
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        text.replace("</body>", "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x'></body>")
    )
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"file://{spoilt}")
    assert page.title() != "run"
    assert len([line for line in said if "Content Security Policy" in line]) == 2
    page.close()


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


def copy_runs(made: Made, root: Path) -> Path:
    """The run directories alone, to be spoilt; cache and tiles stay where they are."""
    shutil.copytree(made.root / "runs", root / "runs", symlinks=True)
    return root / "runs/head-001"


def find_shown(report: Path) -> list[str]:
    """Tiles with a thumbnail, each once, in the page's order."""
    found = re.findall(r'alt="Tile (images/\S+?\.png): shows', report.read_text())
    return [html.unescape(name) for name in dict.fromkeys(found)]


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

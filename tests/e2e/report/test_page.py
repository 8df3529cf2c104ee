"""A report is used with mouse, keyboard, phone, printer and screen reader, and runs no foreign script."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.e2e.report.pages import COLUMNS, NAMES, Made, Open, read_rows, texts


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

"""A finished run with hostile names, and its report in a real browser."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.checkpoints import make_checkpoint
from tests.e2e.report.pages import NAMES, PREFIX, Made, Open
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="session")
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

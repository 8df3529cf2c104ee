"""Licences follow from names, and Markdown from outside stays in its cell."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.train.report.made_up import make_run
from train.report import write_report
from train.report.card import escape_markdown
from train.report.facts import Facts
from train.report.licences import DINOV3_URL, find_licences


@pytest.mark.parametrize(
    ("backbone", "tiles", "base", "said"),
    [
        ("vitl16", "gs://b/xView_tiled/train", "facebook/dinov3-vitl16-pretrain-sat493m", "CC BY-NC-SA 4.0"),
        (
            "facebook/dinov3-vits16-pretrain-lvd1689m",
            "x",
            "facebook/dinov3-vits16-pretrain-lvd1689m",
            "your own imagery",
        ),
        ("runs/finetune/export", "gs://b/mine", None, "your own imagery"),
        ("demo", "gs://tileprobe-demo/train", None, "drawn by this package's demo"),
    ],
)
def test_licences_follow_from_names(
    tmp_path: Path, rng: np.random.Generator, backbone: str, tiles: str, base: str | None, said: str
) -> None:
    run = make_run(tmp_path, rng)
    settings = run.read_json("config.json")
    settings["recorded"] |= {"backbone": backbone, "tiles": tiles}
    run.write_json("config.json", settings)
    found = find_licences(Facts.read(run))
    assert found.base_model == base
    assert said in found.imagery
    assert (DINOV3_URL in found.backbone) == (backbone != "demo")
    write_report(run)
    card = (run.path / "model_card.md").read_text()
    assert (f"base_model: {base}" in card) == (base is not None)
    assert ("license_name: dinov3-license" in card) == (base is not None)


@given(st.text(max_size=60))
def test_markdown_from_outside_stays_in_its_cell(text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]*_]", escaped.replace("\\\\", ""))
    assert "<" not in escaped

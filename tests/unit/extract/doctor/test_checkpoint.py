"""A backbone that is not here, or does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from extract.doctor.checkpoint import check_backbone
from extract.doctor.estimate import check_speed, choose_batch
from extract.doctor.storage import check_layout
from extract.doctor.tiles import check_sample
from extract.tiles.source import open_source
from tests.unit.extract.doctor.test_cache import find_cpu


def test_a_backbone_that_is_not_here_is_derived_from_its_flop(made: Path) -> None:
    device = replace(find_cpu(), flop_s=1e9)
    weights = check_backbone(str(made / "small"), None, device).value
    source = open_source(str(made / "tiles"))
    sample = check_sample(source, check_layout(source, unlabelled=False).value, 8, 0, 0.01).value
    far = check_speed(replace(weights, download=1), device, sample, 32, 1)
    assert far.value.backbone_s == pytest.approx(weights.checkpoint.flop / 0.8e9)
    assert "derived" in far.detail
    assert "measured in batches of 32" in check_speed(weights, device, sample, 32, 1).detail
    assert "derived" in check_speed(weights, replace(device, flop_s=1.0), sample, 32, 1).detail
    assert [choose_batch(s, 32) for s in (1e-3, 0.5, 1.0, 3.0)] == [32, 5, 2, 0]


def test_weights_that_do_not_fit(made: Path) -> None:
    device = find_cpu()
    crowd = replace(device, ranks=replace(device.ranks, local_world_size=10**9))
    assert check_backbone(str(made / "small"), None, device).concerns == []
    (concern,) = check_backbone(str(made / "small"), None, crowd).concerns
    assert concern.status == "fail"
    assert "do not fit" in concern.detail

"""What an extraction would do, and whether there is room for it."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import pytest

from cache_schema import CacheRoot, TileprobeError, open_cache
from extract.config import ExtractConfig
from extract.doctor.cache import Pending, check_space, check_version
from extract.doctor.checkpoint import check_backbone
from extract.doctor.finding import Verdict
from extract.doctor.machine import Device, check_device
from extract.doctor.storage import check_layout
from extract.tiles.source import open_source


@lru_cache
def find_cpu() -> Device:
    """This machine's, measured once."""
    return check_device(ExtractConfig(tiles="x", device="cpu", precision="float32"), None).value


def ask(root: Path, cache: str = "cache", **options: object) -> Verdict[Pending]:
    settings = {"tiles": str(root / "tiles"), "backbone": str(root / "small"), "precision": "float32", **options}
    config = ExtractConfig(device="cpu", **settings)  # type: ignore[arg-type]
    source = open_source(config.tiles)
    device = find_cpu()
    weights = check_backbone(config.backbone, None, device).value
    found = check_layout(source, unlabelled=False).value
    return check_version(config, str(root / cache), source, found, weights, device)


def test_what_an_extraction_would_do(own: Path) -> None:
    version = open_cache(str(own / "cache"))
    assert ask(own).detail == f"version {version.id} is finished: an extraction has nothing to do"
    assert ask(own).value == Pending(0, 0)
    assert ask(own, "other").detail == f"a new version {version.id}; no versions there"
    bf16 = ask(own, precision="bf16")
    assert "1 version there; the one in use differs in precision: float32, not bf16" in bf16.detail
    assert bf16.value == Pending(32, 32)
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        shutil.copy(own / "tiles" / folder / f"s00_0.{suffix}", own / "tiles" / folder / f"s99_0.{suffix}")
    grown = ask(own)
    assert f"since version {version.id}: 1 new, 0 changed, 0 removed, 0 relabelled, 32 kept" in grown.detail
    assert grown.value == Pending(1, 33)
    for path in (own / "tiles").glob("*/s0[0-2]_*"):
        path.unlink()
    with pytest.raises(TileprobeError, match=r"12 of the 32 tiles .*--yes"):
        ask(own)
    assert "12 removed" in ask(own, yes=True).detail


def test_a_version_that_is_begun(own: Path) -> None:
    root = CacheRoot(str(own / "cache"))
    version = root.open_version(open_cache(root.url).id, read_only=False)
    version.reopen_blocks([0])
    begun = ask(own)
    assert begun.detail.startswith(f"version {version.id} is unfinished: 0 of 1 block committed")
    assert begun.value == Pending(32, 32)
    (own / "cache" / f"{version.id}.zarr/commit/zarr.json").unlink()
    assert ask(own).detail == f"version {version.id} was not created completely, and starts again"


def test_room_for_the_cache(tmp_path: Path) -> None:
    """Rows of 2 vectors of float16 and 128 counts of uint16."""
    free = shutil.disk_usage(tmp_path).free
    row = 2 * 2 * 4096 + 2 * 128
    for rows, status in {free // row // 4: None, free // row * 24 // 25: "warning", free // row * 2: "fail"}.items():
        verdict = check_space(str(tmp_path / "none/yet"), Pending(0, rows), 2 * 4096)
        assert [concern.status for concern in verdict.concerns] == ([status] if status else [])
        assert verdict.value == rows * row
    assert check_space("gs://some-bucket/x", Pending(0, 10**12), 2 * 4096).concerns == ()

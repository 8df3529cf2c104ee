"""What is chosen, left out and quarantined."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import CacheNotFoundError, CacheRoot, Status, open_cache
from extract.backbone.embed import TileEmbedder
from extract.backbone.precision import choose_precision
from extract.config import LAST_CACHE
from extract.errors import RunError
from extract.run import run_extraction
from extract.tiles.scenes import find_scenes
from tests.e2e.extract.extraction import TILES, assert_same_cache, extract
from tests.planted import fresh_seed
from tests.proxy import Proxy
from tests.tiles import (
    draw_objects,
    draw_tile,
    relative_differences,
    upload,
    write_directory,
)


def test_limit_is_whole_scenes_in_a_cache_of_its_own(
    tiles: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_extraction(config(tiles, limit=45))
    cache = tmp_path / "cache/xview-train-plain-64-limit45"
    chosen = open_cache(str(cache)).read_table().tile
    everything = [f"images/{100 + i // 10}_{i % 10}.png" for i in range(TILES)]
    scenes = set(find_scenes(chosen).tolist())
    assert len(scenes) == 4
    assert sorted(chosen.tolist()) == sorted(name for name in everything if name[7:10] in scenes)
    output = capsys.readouterr().out
    assert "LIMIT=45: 40 of 560 tiles, whole scenes\n" in output
    size = 560 * (64 * 2 * 2 + 256) / 2**20
    estimate = (
        rf"all 560 tiles: about \d+ s on this hardware and {size:.0f} MiB of cache \(the same command without LIMIT\)"
    )
    assert re.search(estimate, output)
    assert (tmp_path / LAST_CACHE).read_text() == "cache/xview-train-plain-64-limit45\n"


def test_unlabelled_tiles(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = draw_objects(np.random.default_rng(fresh_seed()), 12)
    for i in (2, 7):
        del objects[f"labels/{100 + i // 10}_{i % 10}.txt"]
    objects["images/thumbs.db"] = b"?"
    write_directory(tmp_path / "tiles", objects)
    run_extraction(config("tiles", cache="a"))
    output = capsys.readouterr().out
    assert "2 tiles without a label file left out (--unlabelled embeds them)\n" in output
    assert "1 objects under images/ are not PNG, JPEG or TIFF: left out\n" in output
    run_extraction(config("tiles", cache="b", unlabelled=True))
    labelled, everything = open_cache("a"), open_cache("b")
    assert (labelled.layout.rows, everything.layout.rows) == (10, 12)
    table, rows = everything.read_table(), everything.read_rows()
    assert table.tile[~table.labelled].tolist() == ["images/100_2.png", "images/100_7.png"]
    assert rows.embedded.all()
    assert not rows.label_ids[~table.labelled].any()


def test_malformed_labels_are_named(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = draw_objects(np.random.default_rng(fresh_seed()), 6)
    objects |= {"labels/100_1.txt": b"18 0 0 0 0\n18 0 0 0 7\n", "labels/100_4.txt": b"car\n" * 8}
    write_directory(tmp_path / "tiles", objects)
    run_extraction(config("tiles", cache="a"))
    line = next(line for line in capsys.readouterr().out.splitlines() if "label lines read" in line)
    shown = ", ".join(["labels/100_1.txt:2", *(f"labels/100_4.txt:{n}" for n in range(1, 5))])
    assert line.endswith(f"malformed ones among them: {shown}, and 4 more")


def test_too_many_quarantined_then_accepted_then_mended(
    config: Any, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repaired file keeps its size and modification time here, so it is the same version."""
    objects = draw_objects(np.random.default_rng(fresh_seed()), 20)
    good = objects["images/100_5.png"]
    objects["images/100_5.png"] = good[:60] + bytes(100) + good[160:]
    tile = write_directory(tmp_path / "tiles", objects) / "images/100_5.png"
    changed = tile.stat().st_mtime_ns

    refused = extract(
        tmp_path, "--tiles", "tiles", "--backbone", checkpoints["plain"], "--cache", "a", "--precision", "float32"
    )
    assert refused.status == 3
    assert "Traceback" not in refused.err
    assert "error: 1 of 20 tiles are quarantined, more than --max-quarantined 0.01 allows: fix them" in refused.err
    assert "\n  images/100_5.png: cannot be decoded as an image" in refused.err
    assert not (tmp_path / "a/current").exists()
    assert not (tmp_path / LAST_CACHE).exists()
    with pytest.raises(CacheNotFoundError):
        open_cache("a")
    with pytest.raises(RunError, match="1 of 20 tiles are quarantined"):  # nor does a second run forget it
        run_extraction(config("tiles", cache="a"))

    run_extraction(config("tiles", cache="a", max_quarantined=0.05))
    output = capsys.readouterr().out
    assert "0 to do" in output
    accepted = open_cache("a")
    assert f"a: 19 embeddings, sealed (version {accepted.id})" in output
    assert np.flatnonzero(accepted.read_rows().status == Status.UNDECODABLE).tolist() == [5]
    assert np.isnan(accepted.read_rows().pooled["cls"][5]).all()

    tile.write_bytes(good)
    os.utime(tile, ns=(changed, changed))
    run_extraction(config("tiles", cache="a", max_quarantined=0.05))
    assert not open_cache("a").read_rows().embedded.all(), "not tried again unasked"
    run_extraction(config("tiles", cache="a", retry_quarantined=True))
    assert "1 quarantined tiles are tried again\n" in capsys.readouterr().out
    fixed = open_cache("a")
    assert fixed.id == accepted.id
    assert fixed.check_seal()
    assert fixed.read_rows().embedded.all()
    run_extraction(config("tiles", cache="a", retry_quarantined=True))
    assert "0 quarantined tiles are tried again\n0 to do" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_halved_before_the_first_block(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 20))
    monkeypatch.setattr(TileEmbedder, "fits", lambda self: self.batch_size <= 8)
    with pytest.raises(
        RunError, match="not even half a batch of 32 tiles of 64 px fits in memory: set a smaller --batch-size"
    ):
        run_extraction(config("tiles", cache="a"))
    run_extraction(config("tiles", cache="b", batch_size=16))
    assert "a batch of 16 tiles does not fit in memory: continuing with 8\n" in capsys.readouterr().out
    assert open_cache("b").recorded.batch_size == 8
    run_extraction(config("tiles", cache="c", batch_size=8))
    assert_same_cache("b", "c")

    version = open_cache("b")
    CacheRoot("b").open_version(version.id, read_only=False).reopen_blocks([0])
    monkeypatch.setattr(TileEmbedder, "fits", lambda self: self.batch_size <= 4)
    run_extraction(config("tiles", cache="b"))
    assert open_cache("b").recorded.batch_size == 4, "with no block left, another size does no harm"


def test_a_batch_of_more_than_the_address_space_does_not_fit(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Half a petabyte: the allocator's own refusal, on any machine."""
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 4))
    command = ("--tiles", "tiles", "--backbone", checkpoints["plain"], "--image-size", 2**20, "--precision", "float32")
    result = extract(tmp_path, *command)
    assert result.status == 1
    assert result.err.count("error: not even half a batch of 32 tiles of 1048576 px fits in memory") == 1
    assert "Traceback" not in result.err


def test_profile_is_a_trace_of_a_few_batches(config: Any, tmp_path: Path) -> None:
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 40))
    run_extraction(config("tiles", cache="a", batch_size=4, profile="trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("scaled_dot_product" in event.get("name", "") for event in events)
    assert len({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}) == 5


@pytest.mark.parametrize("began", ["bf16", "float32"])
def test_auto_goes_on_in_the_precision_a_version_began_in(
    began: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_directory(tmp_path / "tiles", draw_objects(np.random.default_rng(fresh_seed()), 5))
    run_extraction(config("tiles", cache="a", precision=began))
    assert f"5 to do in {began} -> a" in capsys.readouterr().out
    run_extraction(config("tiles", cache="a", precision="auto"))
    assert "0 to do" in capsys.readouterr().out
    run_extraction(config("tiles", cache="b", precision="auto"))
    assert open_cache("b").provenance.precision == choose_precision(torch.device("cpu"))


def test_a_changed_tile_makes_another_version(config: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    objects = draw_objects(rng, 5)
    write_directory(tmp_path / "tiles", objects)
    run_extraction(config("tiles", cache="a"))
    before = open_cache("a")
    vectors = before.read_rows().pooled["cls"]
    (tmp_path / "tiles/images/100_2.png").write_bytes(draw_tile(rng, 40))
    run_extraction(config("tiles", cache="a"))
    after = open_cache("a")
    assert after.id != before.id
    changed = relative_differences(after.read_rows().pooled["cls"], vectors) > 1e-3
    assert changed.tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(open_cache("a", version=before.id).read_rows().pooled["cls"], vectors)


def test_table_comes_from_the_listing_alone(make_bucket: Any, config: Any, proxy: Proxy) -> None:
    """A finished cache is recognised without reading one object."""
    bucket = make_bucket()
    objects = draw_objects(np.random.default_rng(fresh_seed()), 30)
    upload(bucket, objects)
    run_extraction(config(f"gs://{bucket.name}", cache="a"))
    asked = sum(Proxy.reads(path, ".png") or Proxy.reads(path, ".txt") for path in proxy.asked)
    assert asked == sum(bool(data) for data in objects.values()), "an empty label file need not be read to be known"
    proxy.asked.clear()
    run_extraction(config(f"gs://{bucket.name}", cache="a"))
    assert proxy.asked
    assert not any(Proxy.reads(path, ".png") or Proxy.reads(path, ".txt") for path in proxy.asked)


def test_a_tile_that_came_back_is_read_in_its_new_generation(make_bucket: Any, config: Any, proxy: Proxy) -> None:
    """The same bytes uploaded again: the same version, though the generation it was sealed with is gone."""
    objects = draw_objects(np.random.default_rng(fresh_seed()), 10)
    bucket = make_bucket()
    upload(bucket, objects)
    proxy.choose_fault = lambda path: 404 if Proxy.reads(path, "images/100_4.png") else None
    run_extraction(config(f"gs://{bucket.name}", cache="a", max_quarantined=0.1))
    before = open_cache("a")
    assert np.flatnonzero(before.read_rows().status == Status.GONE).tolist() == [4]
    proxy.choose_fault = lambda path: None
    upload(bucket, {"images/100_4.png": objects["images/100_4.png"]})
    run_extraction(config(f"gs://{bucket.name}", cache="a", retry_quarantined=True))
    after = open_cache("a")
    assert after.id == before.id
    assert after.read_rows().embedded.all()
    assert after.check_seal()

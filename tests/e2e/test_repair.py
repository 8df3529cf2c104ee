"""A damaged cache, repaired and extracted again: only the damaged blocks are computed, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest

from cache_schema import BlockValues, CacheRoot, Version, open_cache
from cache_schema.upkeep.verify import repair_version, verify_version
from extract.errors import RunError
from tests.caches import get_all
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles


def test_an_extraction_after_a_repair_computes_only_the_damaged_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = fresh_seed()
    tiles = plant_tiles(tmp_path / "tiles", scenes=30, per_scene=18, seed=seed)  # blocks of 256, 256 and 28 rows
    backbone = make_checkpoint(tmp_path / "backbone", seed=seed)
    cache = extract_cache(tiles, tmp_path / "cache", backbone)
    version = open_cache(cache)
    folder = tmp_path / "cache" / f"{version.id}.zarr"
    undisturbed = get_all(cache)
    label_ids, status = folder / "label_ids/c/0/0", folder / "status/c/2"
    label_ids.write_bytes(label_ids.read_bytes()[:-5])
    status.unlink()
    (folder / "size/c/0").write_bytes(b"")

    findings = verify_version(version)
    assert findings.damaged == (0, 2)
    assert findings.table_damaged
    said = repair_version(CacheRoot(cache).open_version(version.id, read_only=False), findings)
    assert said == [
        "cleared the seal and the commits of 2 blocks (284 rows)",
        "`make extract` repairs the tile table from the listing",
        f"to redo what is missing, run the `make extract` that made it: TILES={tiles} BACKBONE={backbone} "
        f"CACHE={cache} IMAGE_SIZE=64",
    ]

    written: list[int] = []
    write_block = Version.write_block

    def note(self: Version, block: int, values: BlockValues) -> Any:
        written.append(block)
        return write_block(self, block, values)

    monkeypatch.setattr(Version, "write_block", note)
    capsys.readouterr()
    extract_cache(tiles, cache, backbone)
    assert "284 to do in float32" in capsys.readouterr().out
    assert written == [0, 2]
    assert get_all(cache) == undisturbed
    assert verify_version(open_cache(cache)).lines == ()


def test_an_extraction_that_finds_damage_computes_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a power loss leaves of files that were renamed, but not yet on the disk."""
    seed = fresh_seed()
    tiles = plant_tiles(tmp_path / "tiles", scenes=30, per_scene=18, seed=seed)
    backbone = make_checkpoint(tmp_path / "backbone", seed=seed)
    cache = extract_cache(tiles, tmp_path / "cache", backbone)
    undisturbed = get_all(cache)
    folder = tmp_path / "cache" / f"{open_cache(cache).id}.zarr"
    for sealed in (True, False):
        (folder / "status/c/2").unlink()
        (folder / "patch_mean/c/0/0").write_bytes(b"")
        if not sealed:
            (folder / "seal/c/0").unlink()
            (tmp_path / "cache/current").unlink()
        capsys.readouterr()
        extract_cache(tiles, cache, backbone)
        said = capsys.readouterr().out
        assert "computed again: 2 blocks" in said
        assert "284 tiles in" in said
        assert get_all(cache) == undisturbed


def test_a_disk_that_keeps_damaging_blocks_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    tiles = plant_tiles(tmp_path / "tiles", scenes=5, per_scene=4, seed=seed)
    backbone = make_checkpoint(tmp_path / "backbone", seed=seed)
    write_block = Version.write_block

    def write_and_lose(self: Version, block: int, values: BlockValues) -> None:
        write_block(self, block, values)
        (tmp_path / "cache" / f"{self.id}.zarr/status/c/{block}").unlink()

    monkeypatch.setattr(Version, "write_block", write_and_lose)
    with pytest.raises(RunError, match="cache: damaged again just after being written: 1 block: check its disk"):
        extract_cache(tiles, tmp_path / "cache", backbone)


def test_a_write_lost_while_damage_is_mended_is_mended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has computed the block once when it finds it wanting for the second time."""
    seed = fresh_seed()
    tiles = plant_tiles(tmp_path / "tiles", scenes=5, per_scene=4, seed=seed)
    backbone = make_checkpoint(tmp_path / "backbone", seed=seed)
    cache = extract_cache(tiles, tmp_path / "cache", backbone)
    undisturbed, folder = get_all(cache), tmp_path / "cache" / f"{open_cache(cache).id}.zarr"
    (folder / "label_ids/c/0/0").write_bytes(b"")
    write_block, lost = Version.write_block, iter([True])

    def write_and_lose_once(self: Version, block: int, values: BlockValues) -> None:
        write_block(self, block, values)
        if next(lost, False):
            (folder / f"cls/c/{block}/0").unlink()

    monkeypatch.setattr(Version, "write_block", write_and_lose_once)
    extract_cache(tiles, cache, backbone)
    assert next(lost, None) is None
    assert get_all(cache) == undisturbed

"""`python -m extract verify-sample`: rows that are embedded again, and its messages when the vectors differ."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache_schema import BlockValues, CacheRoot, ProvenanceError, open_cache
from extract.spot_check import MIN_COSINE, Comparison, compare_sample
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles

LINE = re.compile(
    r"(\w+): (\d+) rows, (\d+) of them bit for bit; cosine (\S+) at least, (\S+) in the median .*largest difference "
    r"(\S+)"
)


def read_line(line: str) -> re.Match[str]:
    match = LINE.match(line)
    assert match, line
    return match


@dataclass
class Made:
    """Tiles, a checkpoint, and the cache of them."""

    tiles: Path
    backbone: Path
    cache: str

    def compare(self, rows: int = 300, *, seed: int = 1, backbone: Path | None = None) -> Comparison:
        version_id = CacheRoot(self.cache).versions()[0]
        checkpoint = str(backbone or self.backbone)
        return compare_sample(self.cache, version_id, rows, seed=seed, tiles=str(self.tiles), backbone=checkpoint)


@pytest.fixture(scope="module", params=["float32", "bf16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """270 tiles in two blocks, the last batch of each a short one, and one tile unreadable."""
    root, seed = tmp_path_factory.mktemp("sample"), fresh_seed()
    tiles = plant_tiles(root / "tiles", scenes=27, per_scene=10, seed=seed)
    (tiles / "images/s03_3.png").write_bytes(b"no image")
    backbone = make_checkpoint(root / "small", seed=seed)
    options = {"precision": request.param, "batch_size": 24, "max_quarantined": 0.1}
    return Made(tiles, backbone, extract_cache(tiles, root / "cache", backbone, **options))


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """A copy that a test may harm."""
    for path in (made.tiles, made.backbone, Path(made.cache)):
        shutil.copytree(path, tmp_path / path.name)
    return Made(tmp_path / "tiles", tmp_path / "small", str(tmp_path / "cache"))


def test_every_row_comes_back_bit_for_bit(made: Made) -> None:
    whole = made.compare()
    assert whole.agrees
    assert whole.lines[0] == "sample of 269 rows, seed 1 (--seed 1 draws them again)"
    for line, pooling in zip(whole.lines[1:], ("cls", "patch_mean"), strict=True):
        assert read_line(line).groups() == (pooling, "269", "269", "1.000000", "1.000000", "0.0e+00")


def test_a_few_rows_come_back_bit_for_bit(made: Made) -> None:
    """With most of a batch left blank; the seed alone says which."""
    few = made.compare(20, seed=fresh_seed())
    assert [read_line(line).groups()[1:3] for line in few.lines[1:]] == [("20", "20")] * 2
    assert made.compare(20, seed=5) == made.compare(20, seed=5)


@pytest.mark.parametrize("harm", ["one vector of another tile", "noise on all"])
def test_vectors_of_something_else_are_found(own: Made, harm: str) -> None:
    """Their digests are right, so that nothing else can notice."""
    version = open_cache(own.cache)
    writable = CacheRoot(own.cache).open_version(version.id, read_only=False)
    values = writable.read_block(0)
    vectors = values.pooled["cls"].copy()
    rng = np.random.default_rng(fresh_seed())
    if harm == "one vector of another tile":
        vectors[7] = -vectors[200]  # small networks of random weights see little difference between tiles
    else:
        vectors += (0.3 * np.nanstd(vectors.astype(np.float32)) * rng.standard_normal(vectors.shape)).astype(
            vectors.dtype
        )
    writable.write_block(0, BlockValues({**values.pooled, "cls": vectors}, values.label_ids, values.status))
    writable.seal()
    compared = own.compare()
    precision = version.provenance.precision
    assert not compared.agrees
    assert float(read_line(compared.lines[1])[4]) < MIN_COSINE[precision][1]
    assert read_line(compared.lines[2])[4] == "1.000000"
    assert compared.lines[3].startswith("these are not the vectors that this backbone gives for these tiles")


@pytest.mark.parametrize("made", ["float32"], indirect=True)
def test_tiles_that_changed_or_went_away_are_named(own: Made) -> None:
    (own.tiles / "images/s01_1.png").unlink()
    changed = own.tiles / "images/s02_2.png"
    os.utime(changed, ns=(0, 10**18))  # its bytes are those it had, but nothing of a local listing says so
    compared = own.compare()
    assert compared.agrees
    assert compared.lines[0].startswith("sample of 269 rows")
    assert compared.lines[1:3] == (
        "1 tiles changed since, and are not compared: images/s02_2.png",
        "1 tiles went away since, and are not compared: images/s01_1.png",
    )
    assert read_line(compared.lines[3])[2] == "267"


@pytest.mark.parametrize("made", ["float32"], indirect=True)
def test_another_checkpoint_is_refused_by_name(own: Made, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=fresh_seed())
    with pytest.raises(ProvenanceError, match=rf"{other} is not what made .* \(weights_sha256: .*--backbone"):
        own.compare(backbone=other)
    own.backbone.rename(tmp_path / "moved")
    assert own.compare(5, backbone=tmp_path / "moved").agrees


@pytest.mark.parametrize("made", ["float32"], indirect=True)
def test_the_command(made: Made, python_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "extract", "verify-sample", made.cache, "--rows", "30"]
    done = subprocess.run(command, env=python_env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"sample of 30 rows, seed \d+ \(--seed \d+ draws them again\)", lines[0])
    assert [read_line(line)[1] for line in lines[1:]] == ["cls", "patch_mean"]


@pytest.mark.parametrize("made", ["float32"], indirect=True)
def test_of_an_unfinished_version_the_rows_that_are_there_are_drawn(own: Made) -> None:
    version_id = CacheRoot(own.cache).versions()[0]
    CacheRoot(own.cache).open_version(version_id, read_only=False).reopen_blocks([0])
    compared = own.compare()
    assert compared.agrees
    assert compared.lines[0].startswith("sample of 14 rows")
    CacheRoot(own.cache).open_version(version_id, read_only=False).reopen_blocks([1])
    compared = own.compare()
    assert not compared.agrees, "nothing was compared"
    assert compared.lines[1] == "no row is left to compare: check TILES, or choose more rows"

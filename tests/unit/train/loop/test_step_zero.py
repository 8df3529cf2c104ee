"""Step 0 passes on an untouched cache and refuses, naming causes, when the stored vectors are not what is streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_schema import BlockValues, CacheRoot, ProvenanceError, Version, open_cache
from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.provenance import find_cached_checkpoint
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles
from train.errors import StepZeroError
from train.loop.step_zero import StepZero

CPU = torch.device("cpu")
Edit = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiles`, `checkpoint` and a float32 and a bf16 cache; one tile cannot be read."""
    root = tmp_path_factory.mktemp("step-zero")
    seed = fresh_seed()
    backbone = make_checkpoint(root / "checkpoint", seed=seed)
    tiles = plant_tiles(root / "tiles", scenes=5, per_scene=9, seed=seed)
    (tiles / "images" / "s00_3.png").write_bytes(b"not a picture")
    for precision in ("float32", "bf16"):
        extract_cache(tiles, root / precision, backbone, precision=precision, max_quarantined=0.1)
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy of the float32 cache, to be spoilt."""
    return Path(shutil.copytree(made / "float32", tmp_path / "cache"))


def edit_vectors(cache: Path, edit: Edit, name: str = "cls") -> None:
    """Rewrite stored vectors through the store, digests included, as another extraction would have."""
    found = open_cache(str(cache))
    version = CacheRoot(str(cache)).open_version(found.id, read_only=False)
    values = version.read_block(0)
    pooled = dict(values.pooled)
    embedded = values.status == 1
    pooled[name] = pooled[name].copy()
    pooled[name][embedded] = edit(pooled[name][embedded].astype(np.float64)).astype(np.float16)
    version.write_block(0, BlockValues(pooled, values.label_ids, values.status))


def record(cache: Path, **changes: object) -> None:
    """Alter what a version says of the environment it was made in."""
    version = CacheRoot(str(cache)).open_version(open_cache(str(cache)).id, read_only=False)
    attributes = version.group.attrs["tileprobe"]
    version.group.attrs["tileprobe"] = {**attributes, "recorded": {**attributes["recorded"], **changes}}


def prepare(cache: Path) -> tuple[StepZero, Backbone, Version]:
    version = open_cache(str(cache))
    checkpoint = find_cached_checkpoint(version)
    source = open_source(version.recorded.tiles)
    backbone = Backbone.load(checkpoint, precision=version.provenance.precision, device=CPU)
    return StepZero(version, source, TileFeed(source, workers=0), checkpoint), backbone, version


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_untouched_cache_is_reproduced(made: Path, precision: str) -> None:
    step_zero, backbone, _ = prepare(made / precision)
    line = step_zero.check_reproduction(backbone)
    assert line.startswith("step 0: 44 rows streamed again differ from the cache by at most ")  # 45 less the unreadable
    assert float(line.split(" at most ")[1].split()[0]) <= 1e-3
    backbone.unfreeze_last(2)
    line = step_zero.check_training_precision(backbone, amp=False)
    assert float(line.rsplit(" ", 1)[1]) > 0.999


@pytest.mark.parametrize("name", ["cls", "patch_mean"])
def test_vectors_of_other_weights_are_refused(cache: Path, name: str) -> None:
    rng = np.random.default_rng(fresh_seed())
    edit_vectors(cache, lambda rows: rng.normal(size=rows.shape), name)
    step_zero, backbone, _ = prepare(cache)
    with pytest.raises(StepZeroError, match=r"more than 1e-03; .*: nothing that is recorded: .*make extract"):
        step_zero.check_reproduction(backbone)
    with pytest.raises(StepZeroError, match=r"below 0\.999"):
        step_zero.check_training_precision(backbone, amp=False)


def test_one_row_that_differs_is_enough(cache: Path) -> None:
    def move_one(rows: np.ndarray) -> np.ndarray:
        rows[17] *= 1.02
        return rows

    edit_vectors(cache, move_one)
    step_zero, backbone, _ = prepare(cache)
    with pytest.raises(StepZeroError, match="streamed embeddings differ"):
        step_zero.check_reproduction(backbone)


def test_rounding_is_let_through(cache: Path) -> None:
    edit_vectors(cache, lambda rows: rows * (1 + 4e-4))
    step_zero, backbone, _ = prepare(cache)
    step_zero.check_reproduction(backbone)


def test_other_hardware_and_libraries_are_named(cache: Path) -> None:
    version = open_cache(str(cache))
    libraries = {**version.recorded.libraries, "torch": "2.0.0"}
    record(cache, hardware="NVIDIA H100", libraries=libraries)
    # What is recorded is worth a name, not a refusal, as long as the vectors agree.
    step_zero, backbone, _ = prepare(cache)
    step_zero.check_reproduction(backbone)
    edit_vectors(cache, lambda rows: rows * 1.01)
    step_zero, backbone, _ = prepare(cache)
    with pytest.raises(StepZeroError, match=r"hardware: NVIDIA H100, not CPU.*libraries: .*2\.0\.0"):
        step_zero.check_reproduction(backbone)


def test_another_checkpoint_in_its_place_is_refused(made: Path, tmp_path: Path) -> None:
    """The cache is copied with a checkpoint of its own, which is then replaced."""
    backbone = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
    cache = extract_cache(made / "tiles", tmp_path / "cache", backbone, max_quarantined=0.1)
    find_cached_checkpoint(open_cache(cache))
    make_checkpoint(backbone, seed=fresh_seed() + 1)
    with pytest.raises(ProvenanceError, match=r"is not what made .*weights_sha256: .* not .*make extract"):
        find_cached_checkpoint(open_cache(cache))
    shutil.rmtree(backbone)
    shutil.copytree(made / "checkpoint", backbone)
    processor = (backbone / "preprocessor_config.json").read_text().replace("0.43", "0.44")
    (backbone / "preprocessor_config.json").write_text(processor)
    assert find_checkpoint(str(backbone)).mean[0] == 0.44
    with pytest.raises(ProvenanceError, match="mean: "):
        find_cached_checkpoint(open_cache(cache))

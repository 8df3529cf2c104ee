"""Poolings and families of backbones are tables: what a new row needs, and what happens without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache_schema import CacheRoot
from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.family import FAMILIES, Family, find_family
from extract.backbone.pooling import POOLINGS, Pooling, count_tokens_read
from extract.backbone.provenance import find_cached_checkpoint, make_provenance
from extract.errors import BackboneError
from tests.caches import make_recorded, make_table
from tests.checkpoints import make_checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def take_registers(tokens: Tensor, first_patch: int) -> Tensor:
    return tokens[:, 1:first_patch].mean(dim=1)


def test_a_new_pooling_is_one_row_of_the_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLINGS, "registers", Pooling(take_registers, reads=5))
    backbone = Backbone.load(find_checkpoint(str(path)), precision="float32", device=torch.device("cpu"))
    pixels = torch.randn(2, 3, 64, 64)
    pooled = backbone(pixels, ("registers", "cls"))
    assert {name: vectors.shape for name, vectors in pooled.items()} == {"registers": (2, 64), "cls": (2, 64)}
    backbone.unfreeze_last(1)  # whose last layer then computes the first five tokens only
    torch.testing.assert_close(backbone(pixels, ("registers", "cls")), pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names, reads",
    [(("cls",), 1), (("patch_mean",), None), (("cls", "patch_mean"), None)],
)
def test_tokens_that_poolings_read(names: tuple[str, ...], reads: int | None) -> None:
    assert count_tokens_read(names) == reads


def test_an_old_cache_stays_usable_when_the_table_grows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pooling is what it recorded, not what this release would store by default."""
    provenance = make_provenance(find_checkpoint(str(path)), "float32", ("cls", "patch_mean"))
    version = CacheRoot(str(tmp_path / "cache")).create_version(
        make_table(3), provenance, make_recorded(backbone=str(path))
    )
    monkeypatch.setitem(POOLINGS, "registers", Pooling(take_registers))
    monkeypatch.setattr("extract.config.DEFAULT_POOLING", tuple(POOLINGS))
    assert find_cached_checkpoint(version).path == path


def test_a_pooling_of_another_release_is_named(path: Path) -> None:
    with pytest.raises(BackboneError, match="no pooling 'patch_max' in this release: it has cls, patch_mean"):
        make_provenance(find_checkpoint(str(path)), "float32", ("cls", "patch_max"))


def test_a_checkpoint_without_a_family_is_told_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "other_vit", Family("other ViT", layers=("layer",)))
    with pytest.raises(BackboneError, match="here is a 'vit' checkpoint: BACKBONE must be a DINOv3 ViT or other ViT"):
        find_family("here", "vit")

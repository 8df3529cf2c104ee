"""The backbone against transformers' own forward pass, and what trains of it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.errors import BackboneError
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed

CPU = torch.device("cpu")
LAYERS, REGISTERS = 4, 4


@pytest.fixture(scope="module", params=["plain", "gated"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / request.param
    return make_checkpoint(path, seed=fresh_seed(), use_gated_mlp=request.param == "gated")


def load(path: Path, precision: Any = "float32") -> Backbone:
    return Backbone.load(find_checkpoint(str(path)), precision=precision, device=CPU)


def trained_of(backbone: Backbone) -> list[torch.nn.Parameter]:
    return [parameter for parameter in backbone.parameters() if parameter.requires_grad]


def draw_pixel_values(size: int = 64, batch: int = 3) -> torch.Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("size", [64, 96])
def test_pooled_equals_the_librarys_forward(checkpoint: Path, size: int) -> None:
    """Within 1e-5: the same operations in float32, in another order for the final norm."""
    pixels = draw_pixel_values(size)
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(pixels)
    patches = expected.last_hidden_state[:, -((size // 16) ** 2) :]
    assert expected.last_hidden_state.shape[1] == 1 + REGISTERS + patches.shape[1]
    with torch.no_grad():
        pooled = load(checkpoint)(pixels)
    torch.testing.assert_close(pooled["cls"], expected.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled["patch_mean"], patches.mean(dim=1), rtol=0, atol=1e-5)


def test_patch_mean_leaves_out_cls_and_registers(checkpoint: Path) -> None:
    """They would move it by far more than the tolerance above."""
    pixels = draw_pixel_values()
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(checkpoint).eval()(pixels).last_hidden_state
        patch_mean = load(checkpoint)(pixels)["patch_mean"]
    for first in (0, 1, REGISTERS):
        assert (tokens[:, first:].mean(dim=1) - patch_mean).abs().max() > 1e-3


def test_bf16_is_near_float32_and_pools_in_float32(checkpoint: Path) -> None:
    pixels = draw_pixel_values()
    with torch.no_grad():
        exact, rounded = load(checkpoint)(pixels), load(checkpoint, "bf16")(pixels)
    for name, vectors in rounded.items():
        assert vectors.dtype == torch.float32
        assert (vectors != vectors.bfloat16().float()).any()
        assert cosine_similarity(vectors, exact[name]).min() > 0.999


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rope_frequencies_stay_float32(checkpoint: Path, precision: str) -> None:
    """Rounded to bf16 they would shift every position."""
    backbone = load(checkpoint, precision)
    frequencies = backbone.vit.rope_embeddings.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, load(checkpoint).vit.rope_embeddings.inv_freq, rtol=0, atol=0)
    assert (frequencies != frequencies.bfloat16().float()).any()
    assert backbone.dtype == {"float32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_train_leaves_frozen_parts_in_eval(checkpoint: Path) -> None:
    """In training mode DINOv3 draws a jitter of its positions, which would make frozen features random."""
    backbone = load(checkpoint)
    pixels = draw_pixel_values()
    with torch.no_grad():
        before = backbone(pixels)["cls"]
        backbone.train()
        again = backbone(pixels)["cls"]
    assert not any(module.training for module in backbone.modules())
    torch.testing.assert_close(again, before, rtol=0, atol=0)
    backbone.unfreeze_last(2)
    backbone.train()
    training = {name for name, module in backbone.named_modules() if module.training}
    assert training
    assert all(name.startswith(("vit.model.layer.2", "vit.model.layer.3")) for name in training)
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixels)["cls"], before, rtol=0, atol=1e-5)


def test_suffix_runs_in_float32_over_a_bf16_prefix(plain: Path) -> None:
    backbone = load(plain, "bf16")
    backbone.unfreeze_last(2)
    pixels = draw_pixel_values()
    assert backbone.run_prefix(pixels).dtype == torch.bfloat16
    assert {p.dtype for p in backbone.layers[-1].parameters()} == {torch.float32}
    assert {p.dtype for p in backbone.layers[0].parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert cosine_similarity(backbone(pixels)["cls"], load(plain)(pixels)["cls"]).min() > 0.999


@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_unfreeze_last_names_exactly_those_tensors(checkpoint: Path, layers: int) -> None:
    backbone = load(checkpoint)
    expected = {
        name
        for name, _ in Backbone.outline(find_checkpoint(str(checkpoint))).named_parameters()
        if name.startswith(tuple(f"vit.model.layer.{i}." for i in range(LAYERS - layers, LAYERS)))
        or name in ("vit.norm.weight", "vit.norm.bias")
    }
    names = backbone.unfreeze_last(layers)
    assert len(names) == len(set(names))
    assert set(names) == expected
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == expected
    assert len(expected) > 10 * layers


def test_gradients_reach_those_tensors_and_no_other(checkpoint: Path) -> None:
    backbone = load(checkpoint)
    names = set(backbone.unfreeze_last(2))
    sum(vectors.square().sum() for vectors in backbone(draw_pixel_values()).values()).backward()  # type: ignore[union-attr]
    assert {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cls_alone_is_that_of_the_whole_with_its_gradients(checkpoint: Path, checkpointing: bool) -> None:
    """The last layer leaves out what only other tokens need, and nothing that CLS needs.

    Within 1e-5 of the norm of all gradients: float32 sums of another order.
    """
    seed = fresh_seed()
    pixels, weights = draw_pixel_values(), torch.randn(64, generator=torch.Generator().manual_seed(seed))
    found = []
    for pooling in (("cls",), ("patch_mean", "cls")):
        backbone = load(checkpoint)
        backbone.unfreeze_last(2, checkpointing=checkpointing)
        backbone.train()
        pooled = backbone(pixels, pooling)
        assert tuple(pooled) == pooling
        (pooled["cls"] @ weights).square().sum().backward()
        found.append((pooled["cls"].detach(), torch.cat([p.grad.flatten() for p in trained_of(backbone)])))
    (alone, gradients), (whole, expected) = found
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)
    assert (gradients - expected).norm() < 1e-5 * expected.norm()


def test_an_unfrozen_backbone_is_let_go_when_the_last_name_is(checkpoint: Path) -> None:
    """No part refers to itself: a large model is not to stay in memory until garbage is collected."""
    backbone = load(checkpoint)
    backbone.unfreeze_last(2)
    held = [weakref.ref(layer) for layer in backbone.layers]
    gc.collect()
    gc.disable()
    try:
        del backbone
        assert [layer() for layer in held] == [None] * LAYERS
    finally:
        gc.enable()


def test_a_frozen_backbone_gives_the_same_bits_whatever_is_asked_for(checkpoint: Path) -> None:
    pixels, backbone = draw_pixel_values(), load(checkpoint)
    assert torch.equal(backbone(pixels, ("cls",))["cls"], backbone(pixels)["cls"])


def test_nothing_trains_before_it_is_asked(checkpoint: Path) -> None:
    backbone = load(checkpoint)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(draw_pixel_values())["cls"].requires_grad


@pytest.mark.parametrize("layers", [-1, 0, LAYERS + 1])
def test_impossible_number_of_layers(plain: Path, layers: int) -> None:
    backbone = load(plain)
    with pytest.raises(BackboneError, match=rf"UNFREEZE={layers}: this backbone has {LAYERS} layers"):
        backbone.unfreeze_last(layers)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())

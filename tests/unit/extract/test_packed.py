"""Packed layers against plain ones and against float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel

from extract.backbone import Backbone, find_checkpoint
from extract.packed import PackedLinear, can_pack, pack, unpack
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed

CPU = torch.device("cpu")
HALF_ULP = 2.0**-8
"""Of a bf16 number: rounding moves it by at most this share of it."""

pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this CPU does not multiply bf16")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(fresh_seed())


@pytest.mark.parametrize("rows", [(1,), (3, 17), (2, 201)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_has_the_bits_of_the_plain_one(rows: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(96, 160, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(*rows, 96).bfloat16()
    with torch.inference_mode():
        assert torch.equal(PackedLinear(linear)(inputs), linear(inputs))


@pytest.mark.parametrize("name, apply", [("gelu", functional.gelu), ("silu", functional.silu)])
def test_an_activated_product_is_rounded_once(name: str, apply: object) -> None:
    """Products of bf16 are exact in float64; sums of 96 of them, and the activation, err by far less than rounding."""
    assert callable(apply)
    linear = nn.Linear(96, 160, dtype=torch.bfloat16)
    inputs = torch.randn(64, 96).bfloat16()
    with torch.inference_mode():
        exact = apply(functional.linear(inputs.double(), linear.weight.double(), linear.bias.double()))
        found = PackedLinear(linear, name)(inputs).double()
        twice = apply(linear(inputs)).double()
    torch.testing.assert_close(found, exact, rtol=1.02 * HALF_ULP, atol=1e-5)
    assert (found - exact).norm() < 0.9 * (twice - exact).norm()


@pytest.mark.parametrize("shape", [{}, {"use_gated_mlp": True, "hidden_act": "silu"}, {"hidden_act": "relu"}])
def test_a_layer_is_as_near_to_float32_as_the_plain_one_and_comes_back_whole(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    """Also with an activation that oneDNN does not apply."""
    model = AutoModel.from_pretrained(make_checkpoint(tmp_path, **shape)).eval()
    half = model.model.layer[1].bfloat16()
    exact, packed = copy.deepcopy(half).float(), copy.deepcopy(half)
    pack(packed, model.config.hidden_act)
    assert not [module for module in packed.modules() if isinstance(module, nn.Linear)]
    torch.manual_seed(fresh_seed())  # again, after that of the checkpoint
    hidden, pixels = torch.randn(3, 21, model.config.hidden_size).bfloat16(), torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        rope = model.rope_embeddings(pixels)
        wanted = exact(hidden.float(), position_embeddings=rope)
        in_half = tuple(part.bfloat16() for part in rope)
        errors = [
            (layer(hidden, position_embeddings=in_half).float() - wanted).norm() / wanted.norm()
            for layer in (packed, half)
        ]
    assert 0 < errors[0] < 1.05 * errors[1] < 0.02
    unpack(packed)
    assert str(packed) == str(half)
    assert not any(module.training for module in packed.modules())
    torch.testing.assert_close(packed.state_dict(), half.state_dict(), rtol=0, atol=0)


def test_a_backbone_in_bf16_is_packed_but_for_what_trains(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    backbone = Backbone.load(find_checkpoint(str(path)), precision="bf16", device=CPU)

    def count_packed() -> list[int]:
        return [sum(isinstance(module, PackedLinear) for module in layer.modules()) for layer in backbone.layers]

    assert count_packed() == [6, 6, 6, 6]
    backbone.unfreeze_last(3)
    assert count_packed() == [6, 0, 0, 0]
    expected = AutoModel.from_pretrained(path, dtype=torch.bfloat16).model.layer[1:].float().state_dict()
    torch.testing.assert_close(backbone.trained.state_dict(), expected, rtol=0, atol=0)


def test_float32_stays_as_it_is() -> None:
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)

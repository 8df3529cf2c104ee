"""Packed layers against torch's own, and what malloc does with freed memory."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.onednn import ONEDNN, SDPA, PackedLinear, attend, can_pack, choose_attention, pack, unpack
from extract.backbone.precision import DTYPES, Precision
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed

CPU = torch.device("cpu")
HALF_ULP = 2.0**-8
"""Of a bf16 number: rounding moves it by at most this share of it."""

pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="layers stay plain on this processor")
needs_bf16 = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this CPU does not multiply bf16")
IN_BOTH = [pytest.param(torch.bfloat16, 0.02, marks=needs_bf16), (torch.float32, 2e-6)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(fresh_seed())


@needs_bf16
@pytest.mark.parametrize("rows", [(1,), (3, 17), (2, 201)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_has_the_bits_of_the_plain_one(rows: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(96, 160, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(*rows, 96).bfloat16()
    with torch.inference_mode():
        assert torch.equal(PackedLinear(linear)(inputs), linear(inputs))


@needs_bf16
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


def draw_heads(batch: int, heads: int, tokens: int, width: int) -> list[torch.Tensor]:
    """Queries and keys as rotary embeddings leave them, values as a projection does; scores of up to some 10."""
    query, key = (torch.randn(batch, heads, tokens, width).mul(1.5).bfloat16() for _ in range(2))
    return [query, key, torch.randn(batch, tokens, heads, width).bfloat16().transpose(1, 2)]


@needs_bf16
@pytest.mark.parametrize("shape", [(3, 5, 21, 16), (2, 16, 201, 64), (1, 3, 1029, 128)])
def test_attention_is_rounded_where_flash_attention_rounds(shape: tuple[int, int, int, int]) -> None:
    """Scores in bf16 would err by 9e-3 of the norm: here the weights and the result are rounded, and nothing else."""
    heads = draw_heads(*shape)
    exact = functional.scaled_dot_product_attention(*(part.double() for part in heads), scale=0.11).transpose(1, 2)
    with torch.inference_mode():
        found, weights = attend(nn.Module(), *heads, None, scaling=0.11)
    assert (found.dtype, found.shape, weights) == (torch.bfloat16, exact.shape, None)
    assert (found - exact).norm() < 0.75 * HALF_ULP * exact.norm()


@needs_bf16
def test_attention_of_a_tile_does_not_depend_on_its_batch_or_the_threads() -> None:
    heads, threads = draw_heads(3, 4, 201, 64), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(attend(nn.Module(), *heads, None, scaling=0.125)[0])
    finally:
        torch.set_num_threads(threads)
    found.append(
        torch.cat([attend(nn.Module(), *(part[i : i + 1] for part in heads), None, scaling=0.125)[0] for i in range(3)])
    )
    assert all(torch.equal(other, found[0]) for other in found[1:])


@needs_bf16
def test_products_of_others_are_not_rounded() -> None:
    """Where oneDNN takes the permission; it does not on every CPU, so it is the permission that is looked at."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    attend(nn.Module(), *draw_heads(1, 2, 21, 16), None, scaling=0.25)
    assert setting.fp32_precision == before != "bf16"
    narrow = draw_heads(1, 2, 21, 8)
    with pytest.raises(RuntimeError):
        attend(nn.Module(), *draw_heads(1, 2, 21, 16)[:1], *narrow[1:], None, scaling=0.25)
    assert setting.fp32_precision == before


@pytest.mark.parametrize("shape", [{}, {"use_gated_mlp": True, "hidden_act": "silu"}, {"hidden_act": "relu"}])
@pytest.mark.parametrize("dtype, limit", IN_BOTH)
def test_a_layer_is_as_near_to_float64_as_the_plain_one_and_comes_back_whole(
    tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype, limit: float
) -> None:
    """Also with an activation that oneDNN does not apply."""
    model = AutoModel.from_pretrained(make_checkpoint(tmp_path, **shape)).eval()
    plain = model.model.layer[1].to(dtype)
    exact, packed = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    pack(packed, model.config.hidden_act)
    assert not [module for module in packed.modules() if isinstance(module, nn.Linear)]
    assert packed.attention.config._attn_implementation == choose_attention(CPU, dtype)
    assert plain.attention.config._attn_implementation == SDPA
    torch.manual_seed(fresh_seed())  # again, after that of the checkpoint
    hidden, pixels = torch.randn(3, 21, model.config.hidden_size).to(dtype), torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        rope = model.rope_embeddings(pixels)
        wanted = exact(hidden.double(), position_embeddings=tuple(part.double() for part in rope))
        rounded = tuple(part.to(dtype) for part in rope)
        errors = [
            (layer(hidden, position_embeddings=rounded) - wanted).norm() / wanted.norm() for layer in (packed, plain)
        ]
    assert 0 < errors[0] < limit
    # Float32 is summed in another order, by another library; here all of the error is rounding to bf16.
    assert dtype == torch.float32 or errors[0] < 1.05 * errors[1]
    unpack(packed)
    assert str(packed) == str(plain)
    assert packed.attention.config._attn_implementation == SDPA
    assert not any(module.training for module in packed.modules())
    torch.testing.assert_close(packed.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=needs_bf16), "float32"])
def test_a_backbone_is_packed_but_for_what_trains(tmp_path: Path, precision: Precision) -> None:
    path, dtype = make_checkpoint(tmp_path), DTYPES[precision]
    backbone = Backbone.load(find_checkpoint(str(path)), precision=precision, device=CPU)

    def count_packed() -> list[int]:
        return [sum(isinstance(module, PackedLinear) for module in layer.modules()) for layer in backbone.layers]

    assert count_packed() == [6, 6, 6, 6]
    backbone.unfreeze_last(3)
    assert count_packed() == [6, 0, 0, 0]
    assert [layer.attention.config._attn_implementation for layer in backbone.layers] == [
        choose_attention(CPU, dtype), SDPA, SDPA, SDPA
    ]  # fmt: skip
    assert backbone.vit.config._attn_implementation == SDPA
    expected = AutoModel.from_pretrained(path, dtype=dtype).model.layer[1:].float().state_dict()
    torch.testing.assert_close(backbone.trained.state_dict(), expected, rtol=0, atol=0)


def test_only_what_was_tried_is_packed() -> None:
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("meta"), torch.bfloat16)
    assert choose_attention(CPU, torch.float32) == SDPA


@needs_bf16
def test_amx_keeps_the_attention_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx})
        assert choose_attention(CPU, torch.bfloat16) == (SDPA if amx else ONEDNN)


ACTIVATION = 48 << 20
SCRIPT = f"""
import resource, sys
import torch
from extract.backbone.onednn import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
fill = lambda: torch.ones({ACTIVATION}, dtype=torch.uint8)
for _ in range(20):  # until the holes that other memory leaves between them are as long as one
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc has rules of its own")
def test_an_activation_takes_the_pages_of_the_one_before() -> None:
    def count_first_touches(what: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=True, timeout=60
        )
        return int(run.stdout)

    pages = 10 * ACTIVATION // 4096
    assert count_first_touches("by itself") > 0.9 * pages  # or this test shows nothing
    assert count_first_touches("keep") < 0.01 * pages

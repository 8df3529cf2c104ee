"""bf16 where the device has instructions for it, float32 elsewhere."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from extract.backbone.precision import choose_precision, multiplies_bf16

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists() or platform.machine() != "x86_64", reason="asks the kernel of an x86-64 Linux")
def test_the_kernel_names_the_same_instructions() -> None:
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    assert multiplies_bf16(CPU) == bool({"amx_bf16", "avx512_bf16"} & set(flags))


@pytest.mark.parametrize("capabilities, precision", [
    ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
    ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
    ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
    ({"neon": True, "bf16": True}, "bf16"),
    ({"neon": True, "fp16_arith": True}, "float32"),
])  # fmt: skip
def test_instructions_decide(capabilities: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(CPU) == precision

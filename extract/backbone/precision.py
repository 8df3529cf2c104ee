"""Choose the number format of the backbone: bf16 if the device has instructions for it, else float32."""

from typing import Literal

import torch

Precision = Literal["bf16", "float32"]
PrecisionChoice = Literal["auto"] | Precision
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}

_CPU_BF16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16")
"""Instruction sets that multiply bf16, as PyTorch names them on x86-64 and on ARM."""


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16 products.

    Without them PyTorch falls back to scalar code: a 1024-cubed product took 180 times as long as in float32 on an
    AVX2 CPU (torch 2.13).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPU_BF16)


def choose_precision(device: torch.device) -> Precision:
    """Return the fastest precision that keeps embeddings accurate."""
    return "bf16" if multiplies_bf16(device) else "float32"

"""Bit-equal runs on one machine (`--deterministic`).

Order, dropout and first weights follow from the seed in any run, and so does every sum on a CPU with the same number
of threads. On CUDA some kernels add in whatever order their blocks end in; here they give way to slower ones that do
not, and an operation that has no such kernel is an error. See "Reproducibility" in PyTorch's notes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Have torch use deterministic algorithms only, where `wanted`; the settings are as they were afterwards."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # Read when cuBLAS is first used; without it torch refuses a product on CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]

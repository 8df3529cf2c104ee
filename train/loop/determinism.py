"""Bit-equal runs on one machine (`--deterministic`).

Order, dropout and initial weights follow from the seed in any run, and so does every sum on a CPU with the same number
of threads. On CUDA some kernels add in the order in which their blocks happen to end. Here slower, deterministic ones
take their place, and an operation without such a kernel raises an error. See "Reproducibility" in PyTorch's notes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Make torch use deterministic algorithms only, if `wanted`; restore the settings afterwards."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # cuBLAS reads this on first use; without it torch refuses matrix products on CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]

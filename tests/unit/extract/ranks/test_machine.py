"""What malloc does with freed memory, seen from the pages that a process touches for the first time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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

"""Seeds of what tests draw: by default the same in every run, and another for each test.

A seed follows from the name of the test, or of the fixture, that asks for it. So a test draws the same whether it runs
alone or with others, in any order and in any file. `TEST_SEED=12345` changes all of them; `TEST_SEED=random` draws such
a number, and prints it so that the run can be repeated.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

FIXED = "0"
_drawing_for = ""
_drawn = 0


def choose_test_seed() -> str:
    """Return the number in `TEST_SEED`; for `random` draw one and put it there, where child processes find it.

    Raises:
        SystemExit: it is neither `random` nor a number.
    """
    asked = os.environ.get("TEST_SEED") or FIXED
    if asked == "random":
        asked = str(random.SystemRandom().randrange(2**31))
        os.environ["TEST_SEED"] = asked
    if not asked.isdecimal():
        raise SystemExit(f"TEST_SEED={asked}: give a number, or `random`")
    return asked


def fresh_seed() -> int:
    """Return the next seed of the present test or fixture, 0 to 2**31 - 1."""
    global _drawn
    _drawn += 1
    text = f"{os.environ.get('TEST_SEED') or FIXED} {_drawing_for} {_drawn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % 2**31


@contextmanager
def draw_for(name: str) -> Iterator[None]:
    """Draw the seeds of `name` inside, and seed the global generators of Python, NumPy and torch for it."""
    global _drawing_for, _drawn
    before = _drawing_for, _drawn
    _drawing_for, _drawn = name, 0
    seed = fresh_seed()
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    try:
        yield
    finally:
        _drawing_for, _drawn = before

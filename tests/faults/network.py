"""A network that harms every third request, and an extraction across it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.cloud.storage.retry import DEFAULT_RETRY

import cache_schema.root
from cache_schema import Status, open_cache
from cache_schema.storage.gcs_store import GcsStore
from tests.caches import get_all
from tests.planted import extract_cache
from tests.proxy import Fault, Proxy

SHARE = 0.3
BLOCK_ROWS = 32
"""Instead of 256, so that an extraction of a hundred tiles writes several blocks."""
_ANSWERS: tuple[Fault, ...] = (503, 429, "reset", "slow")
_BODIES: tuple[Fault, ...] = (*_ANSWERS, "cut", "flip")
_WRITES: tuple[Fault, ...] = (503, 429, "reset", "lost")
_BURST = 3


class RandomFaults:
    """Harms about three requests in ten, as fits what is asked; a 503 comes in bursts."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._burst = 0

    def __call__(self, path: str) -> Fault:
        if self._burst:
            self._burst -= 1
            return 503
        if self._rng.random() >= SHARE:
            return None
        # Nothing tells a listing with a flipped bit from another one, but its transport: there it stays whole.
        kinds = _WRITES if path.startswith("/upload/") else _ANSWERS if path.startswith("/storage/") else _BODIES
        fault = kinds[self._rng.integers(len(kinds))]
        if fault == 503 and self._rng.random() < 0.2:
            self._burst = _BURST
        return fault


def extract_in_small_blocks(tiles: str, cache: Path | str, backbone: Path, **options: Any) -> str:
    """An extraction in this process, blocks of `BLOCK_ROWS`, first pauses between attempts of some milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_schema.root, "choose_block_rows", lambda rows: BLOCK_ROWS)
        defaults = GcsStore.__init__.__kwdefaults__
        assert defaults
        patch.setitem(defaults, "first_delay_s", 0.05)
        patch.setattr("extract.tiles.gcs_reader._FIRST_PAUSE_S", 0.02)
        patch.setattr(DEFAULT_RETRY, "_initial", 0.05)  # a listing's
        return extract_cache(tiles, cache, backbone, **options)


def run_network_faults(tiles: str, undisturbed: str, cache: str, backbone: Path, proxy: Proxy, seed: int) -> list[Any]:
    """Extract `tiles` across random faults, and compare with a cache made without any.

    Returns:
        a row for each kind of fault: `fault`, `tried`, `survived`.

    Raises:
        AssertionError: the caches differ in a bit, a row is quarantined, or faults were not met.
    """
    asked = len(proxy.asked)
    proxy.met.clear()
    proxy.choose_fault = RandomFaults(seed)
    try:
        extract_in_small_blocks(tiles, cache, backbone)
    finally:
        proxy.choose_fault = lambda path: None
    met, asked = Counter(map(str, proxy.met)), len(proxy.asked) - asked
    assert (open_cache(cache).read_status() == Status.EMBEDDED).all()
    assert get_all(cache) == get_all(undisturbed)
    assert sum(met.values()) >= 0.25 * asked, (met, asked)
    wanted = {*_BODIES, *(_WRITES if cache.startswith("gs://") else ())}
    assert {str(fault) for fault in wanted} <= met.keys(), met
    names = {"reset": "connection reset", "lost": "acknowledgement lost", "cut": "body cut", "flip": "bit flipped"}
    names["slow"] = "slow body"
    return [{"fault": f"extract: {names.get(f, f)}", "tried": n, "survived": n} for f, n in sorted(met.items())]

"""Tokens kept on disk: the bits that were computed, whatever happened meanwhile, and nothing the disk cannot hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cache_schema import open_cache
from cache_schema.cli.text import format_bytes
from extract.backbone.checkpoint import Checkpoint, find_checkpoint
from extract.backbone.precision import DTYPES
from extract.ranks.group import Ranks, join_ranks
from tests.caches import plant_cache
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from train.data.prefix import LARGE, PrefixCache, check_room
from train.errors import TrainError

ROWS = 600
FREE_ROWS = np.array([3, 599, 40, 41, 42, 300, 301, 7, 7, 513])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return find_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("prefix") / "checkpoint")))


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_cache(plant_cache(str(tmp_path_factory.mktemp("vectors") / "cache"), ROWS, seed=3))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with join_ranks("cpu") as joined:
        yield joined


class Computed:
    """Random bits for every row, and a note of the rows that were asked for; NaNs and infinities among them."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, *, stop_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(fresh_seed())
        width = checkpoint.width * dtype.itemsize
        shape = (ROWS, checkpoint.tokens, width)
        bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.tokens = bits.view(dtype)
        self.asked: list[int] = []
        self._stop_after = stop_after

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        for number, rows in enumerate(batches):
            if number == self._stop_after:
                raise TrainError("an outage")
            self.asked += rows.tolist()
            yield self.tokens[torch.from_numpy(rows)]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rows_come_back_bit_for_bit(
    tmp_path: Path, version: Any, checkpoint: Checkpoint, ranks: Ranks, precision: str
) -> None:
    version = copy(version)
    version.provenance = replace(version.provenance, precision=precision)
    prefix = PrefixCache(str(tmp_path), version, checkpoint, 2)
    computed = Computed(checkpoint, prefix.dtype)
    assert prefix.find_missing(FREE_ROWS).tolist() == sorted(set(FREE_ROWS.tolist()))
    assert prefix.fill(FREE_ROWS, computed, batch=4, ranks=ranks) == 9
    assert computed.asked == sorted(set(FREE_ROWS.tolist()))
    again = PrefixCache(str(tmp_path), version, checkpoint, 2)
    for rows in (FREE_ROWS, FREE_ROWS[::-1].copy(), FREE_ROWS[:0]):
        got = again.read(rows)
        assert (got.dtype, tuple(got.shape)) == (prefix.dtype, (len(rows), checkpoint.tokens, checkpoint.width))
        np.testing.assert_array_equal(bits_of(got), bits_of(computed.tokens[torch.from_numpy(rows)]))
    # Another run over more rows computes those that are new, and rows nobody asked for take no room.
    more = np.concatenate([FREE_ROWS, [100]])
    assert again.fill(more, computed, batch=4, ranks=ranks) == 1
    assert computed.asked[9:] == [100]
    held = (prefix.folder / "tokens").stat()
    assert held.st_size == ROWS * prefix.slot_bytes
    assert held.st_blocks * 512 < held.st_size / 4


def test_what_was_kept_before_a_failure_is_not_computed_again(
    tmp_path: Path, version: Any, checkpoint: Checkpoint, ranks: Ranks
) -> None:
    prefix = PrefixCache(str(tmp_path), version, checkpoint, 1)
    wanted = np.arange(0, 200)
    failing = Computed(checkpoint, prefix.dtype, stop_after=40)
    with pytest.raises(TrainError, match="an outage"):
        prefix.fill(wanted, failing, batch=3, ranks=ranks)
    missing = prefix.find_missing(wanted)
    assert missing.tolist() == list(range(96, 200)), "two rounds of 16 batches are on the disk"
    rest = Computed(checkpoint, prefix.dtype)
    prefix.fill(wanted, rest, batch=3, ranks=ranks)
    assert rest.asked == missing.tolist()
    got = prefix.read(wanted)
    np.testing.assert_array_equal(bits_of(got[:96]), bits_of(failing.tokens[:96]))
    np.testing.assert_array_equal(bits_of(got[96:]), bits_of(rest.tokens[96:200]))


def test_other_layers_or_versions_have_folders_of_their_own(
    tmp_path: Path, version: Any, checkpoint: Checkpoint, ranks: Ranks
) -> None:
    one, two = (PrefixCache(str(tmp_path), version, checkpoint, layers) for layers in (1, 2))
    one.fill(FREE_ROWS, Computed(checkpoint, one.dtype), batch=4, ranks=ranks)
    assert len(one.find_missing(FREE_ROWS)) == 0
    assert len(two.find_missing(FREE_ROWS)) == 9
    other = open_cache(plant_cache(str(tmp_path / "other"), ROWS + 1))
    assert len(PrefixCache(str(tmp_path), other, checkpoint, 1).find_missing(FREE_ROWS)) == 9


@pytest.mark.parametrize("name", ["tokens", "done", "provenance.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_folder_that_is_not_whole_is_filled_anew(
    tmp_path: Path, version: Any, checkpoint: Checkpoint, ranks: Ranks, name: str, damage: str
) -> None:
    prefix = PrefixCache(str(tmp_path), version, checkpoint, 1)
    prefix.fill(FREE_ROWS, Computed(checkpoint, prefix.dtype), batch=4, ranks=ranks)
    file = prefix.folder / name
    if damage == "cut":
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1)
    else:
        file.unlink()
    again = PrefixCache(str(tmp_path), version, checkpoint, 1)
    computed = Computed(checkpoint, prefix.dtype)
    assert again.fill(FREE_ROWS, computed, batch=4, ranks=ranks) == 9
    np.testing.assert_array_equal(bits_of(again.read(FREE_ROWS)), bits_of(computed.tokens[torch.from_numpy(FREE_ROWS)]))


def test_ranks_of_a_machine_share_the_work(tmp_path: Path, version: Any, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Each as if alone, one after the other: what the first left is what the second finds missing."""
    prefix = PrefixCache(str(tmp_path), version, checkpoint, 1)
    wanted = np.arange(0, 50)
    computed = Computed(checkpoint, prefix.dtype)
    second = Ranks(1, 2, 2, torch.device("cpu"), dist.HashStore())
    prefix._lay_out()
    assert prefix.fill(wanted, computed, batch=4, ranks=second) == 24
    assert computed.asked == [row for row in range(50) if row // 4 % 2 == 1]
    assert prefix.find_missing(wanted).tolist() == [row for row in range(50) if row // 4 % 2 == 0]


def test_what_the_disk_cannot_hold_is_refused_beforehand(tmp_path: Path, version: Any, checkpoint: Checkpoint) -> None:
    scratch = tmp_path / "not" / "there"
    vast = replace(checkpoint, tokens=2**40)
    with pytest.raises(TrainError, match=r"9 tiles takes .*G more in .*, where .* are free: make room, .*--scratch"):
        check_room([(PrefixCache(str(scratch), version, vast, 1), FREE_ROWS)], agreed=True)
    row = checkpoint.width * DTYPES[version.provenance.precision].itemsize
    large = PrefixCache(str(scratch), version, replace(checkpoint, tokens=LARGE // row // 9 + 1), 1)
    with pytest.raises(TrainError, match="more than 50G: add --yes"):
        check_room([(large, FREE_ROWS)], agreed=False)
    assert "the prefix cache of 9 tiles takes 50.1G more" in check_room([(large, FREE_ROWS)], agreed=True)
    small = PrefixCache(str(scratch), version, checkpoint, 1)
    assert f"{format_bytes(checkpoint.tokens * row)} a tile" in check_room([(small, FREE_ROWS)], agreed=False)
    assert not scratch.exists()


FULL = """
import resource, sys
import numpy as np
from cache_schema import open_cache
from extract.backbone.checkpoint import find_checkpoint
from extract.ranks.group import join_ranks
from tests.unit.train.data.test_prefix import Computed
from train.errors import TrainError
from train.data.prefix import PrefixCache

scratch, cache, checkpoint = sys.argv[1:4]
found = find_checkpoint(checkpoint)
prefix = PrefixCache(scratch, open_cache(cache), found, 1)
with join_ranks("cpu") as ranks:
    prefix.fill(np.arange(40), Computed(found, prefix.dtype), batch=2, ranks=ranks)
    with open(prefix.folder / "tokens", "rb+") as file:
        limit = 50 * prefix.slot_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        prefix.fill(np.arange(100), Computed(found, prefix.dtype), batch=2, ranks=ranks)
    except TrainError as error:
        print(error)
    print(len(prefix.find_missing(np.arange(40))))
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, version: Any, checkpoint: Checkpoint) -> None:
    """A limit on file size, which a write fails on as on a full disk; in a separate process, since it is for good."""
    command = [sys.executable, "-c", FULL, str(tmp_path), version.url, str(checkpoint.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[4])
    assert done.returncode == 0, done.stderr
    message, missing = done.stdout.splitlines()[-2:]
    assert message.startswith(f"cannot write the prefix cache in {tmp_path}")
    assert message.endswith("--cache-prefix; its contents are kept")
    assert missing == "0"

"""A directory of tiles that changes while its cache is extracted, stopped and damaged, in any order.

Whenever an extraction has come to its end, the cache must be what a fresh extraction of the present directory writes.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from zarr.storage import LocalStore

import cache_schema.root
from cache_schema import CacheRoot, Status, TileTable, Version, open_cache
from cache_schema.upkeep.verify import verify_version
from extract.errors import SourceError
from extract.ranks.signals import Stopped
from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache
from tests.tiles import cosines, draw_tile, read_arrays

BLOCK_ROWS = 4
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
STEPS = 20
_POOLED = ("cls", "patch_mean")
_NUMBERS = st.sets(st.integers(0, 13), min_size=1, max_size=4)

Arrays = dict[str, npt.NDArray[Any]]
Content = tuple[str, int]
"""A tile's name and its time of change, which stands for its bytes."""
Files = dict[str, tuple[bytes, int]]
"""Bytes and time of change (ns) by name."""


@dataclass(frozen=True)
class Cut:
    """Where a run loses touch with its store.

    Attributes:
        key: regular expression for the keys that count.
        nth: the put that is meant, of those.
        kind: the process ends before it or after it, or goes on though this one put was lost.
    """

    key: str
    nth: int
    kind: Literal["before", "after", "lost"]


_BLOCK_PUTS = st.sampled_from([r"/cls/c/", r"/patch_mean/c/", r"/label_ids/c/", r"/status/c/", r"/commit/c/"])
_CUTS = st.one_of(
    st.builds(Cut, _BLOCK_PUTS, st.integers(1, 4), st.sampled_from(["before", "after", "lost"])),
    st.builds(
        Cut, st.just("/zarr.json$|/tile/c/|/crc32c/c/"), st.integers(1, 15), st.sampled_from(["before", "after"])
    ),
    st.builds(Cut, st.just("/seal/c/"), st.integers(1, 2), st.sampled_from(["before", "after"])),
    st.builds(Cut, st.just("^current$"), st.just(1), st.just("before")),
)


@contextmanager
def cut_puts(cut: Cut) -> Iterator[None]:
    """Within, a directory's puts meet what `cut` says; of a process that ended none arrives any more."""
    put, met, ended = LocalStore.set, 0, False

    async def set_(self: LocalStore, key: str, value: Any) -> None:
        nonlocal met, ended
        met += (counts := re.search(cut.key, key) is not None)
        meant = counts and met == cut.nth
        if meant and cut.kind == "lost":
            return
        if ended or (meant and cut.kind == "before"):
            ended = True
            raise Stopped(signal.SIGTERM)
        await put(self, key, value)
        if meant:
            ended = True
            raise Stopped(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "set", set_)
        yield


class MergeMachine(RuleBasedStateMachine):
    """What is expected follows from two things alone: a fresh extraction, and marks on vectors that were finished.

    After each comparison the vectors of the cache are marked: the last bit of each number is set. So a row that was
    taken over can be told from one that was computed, and both from what they ought to be.
    """

    root: ClassVar[Path]
    backbone: ClassVar[Path]
    ended: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        folder = Path(tempfile.mkdtemp(dir=self.root))
        self.folder, self.tiles, self.cache = folder, folder / "tiles", folder / "cache"
        self.clock, self.stale = 0, False
        self.earlier: list[Files] = []
        self.fresh: dict[bytes, tuple[str, Arrays]] = {}
        self.finished: dict[Content, set[bytes]] = defaultdict(set)
        self.computable: dict[bytes, set[Content]] = defaultdict(set)
        self.damaged: set[tuple[str, int]] = set()

    def teardown(self) -> None:
        """Whatever the last step was, the next extraction must come to a good end."""
        if sys.exc_info()[0] is None:
            self.extract()
            type(self).ended += 1
        shutil.rmtree(self.folder)

    # The directory

    @initialize(numbers=st.sets(st.integers(0, 13), min_size=6))
    def begin(self, numbers: set[int]) -> None:
        self.put("labelled tiles", numbers)

    @rule(what=st.sampled_from(["tiles", "labelled tiles", "broken"]), numbers=_NUMBERS)
    def put(self, what: str, numbers: set[int]) -> None:
        """New ones, or other bytes in old ones."""
        for number in sorted(numbers):
            tile = draw_tile(np.random.default_rng(self.clock), 16)
            self._write(f"images/{number:02}.png", b"no image" if what == "broken" else tile)
        if what == "labelled tiles":
            self.label(numbers)

    @rule(numbers=_NUMBERS)
    def label(self, numbers: set[int]) -> None:
        for number in sorted(numbers):
            self._write(f"labels/{number:02}.txt", _draw_label(self.clock))

    @rule(what=st.sampled_from(["images/{:02}.png", "labels/{:02}.txt"]), numbers=_NUMBERS)
    def remove(self, what: str, numbers: set[int]) -> None:
        self.stale = True
        for number in numbers:
            (self.tiles / what.format(number)).unlink(missing_ok=True)

    @precondition(lambda self: self.earlier)
    @rule(ago=st.integers(1, 3))
    def put_back(self, ago: int) -> None:
        """The directory of an earlier extraction, times of change and all."""
        if ago < len(self.earlier):
            shutil.rmtree(self.tiles)
            for name, (data, changed) in self.earlier[-1 - ago].items():
                self._write(name, data, changed)

    def _write(self, name: str, data: bytes, changed: int | None = None) -> None:
        self.stale = True
        self.clock += changed is None
        changed = changed or 10**18 + self.clock
        path = self.tiles / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(changed, changed))

    # The cache

    @precondition(lambda self: self.earlier)
    @rule(
        version=st.integers(0, 3),
        block=st.integers(0, 5),
        array=st.sampled_from([*_POOLED, "label_ids", "status", "commit"]),
        kind=st.sampled_from(["empty", "cut", "missing", "swapped"]),
    )
    def damage(self, version: int, block: int, array: str, kind: str) -> None:
        """A file of a finished block, as a lost machine leaves it."""
        files = sorted(self.cache.glob(f"*.zarr/{array}/c/*")) if version else self._find_in_use(array)
        files = [path / "0" if path.is_dir() else path for path in files]
        files = [path for path in files if path.is_file()]
        if not files:
            return
        number = (version * 7 + block) % len(files)
        path, other = files[number], files[number - 1]
        if kind == "missing":
            path.unlink()
        else:
            data = path.read_bytes()
            path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "swapped": other.read_bytes()}[kind])
        self.stale = True
        parts = path.relative_to(self.cache).parts
        self.damaged.add((parts[0].removesuffix(".zarr"), int(parts[3])))

    def _find_in_use(self, array: str) -> list[Path]:
        return sorted(self.cache.glob(f"{CacheRoot(str(self.cache)).current()}.zarr/{array}/c/*"))

    @precondition(lambda self: self.stale)
    @rule()
    def extract(self) -> None:
        self._run(None)

    @precondition(lambda self: self.stale)
    @rule(cut=_CUTS)
    def extract_cut(self, cut: Cut) -> None:
        self._run(cut)

    def _run(self, cut: Cut | None) -> None:
        try:
            table = list_tiles(open_source(str(self.tiles))).table
        except SourceError:  # no tile has a label
            with pytest.raises(SourceError):
                self._extract(self.cache)
            return
        digest, in_use = table.identity_digest(), CacheRoot(str(self.cache)).current()
        before = _read_files(self.cache / f"{in_use}.zarr")
        known = self._find_intact(in_use) if in_use else set()
        self.computable[digest] |= {content for content in _list_contents(table) if content not in known}
        with cut_puts(cut) if cut else nullcontext():
            try:
                self._extract(self.cache)
                stopped = False
            except Stopped:
                stopped = True
        if stopped:
            assert cut
            assert CacheRoot(str(self.cache)).current() == in_use, "until the new version is sealed"
        else:
            self._check_finished(digest)
            self.stale = False
        if in_use and _open(self.cache, in_use).read_table().identity_digest() != digest:
            assert _read_files(self.cache / f"{in_use}.zarr") == before, "the version in use was written to"

    def _extract(self, cache: Path) -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            extract_cache(self.tiles, cache, self.backbone, batch_size=3, yes=True, max_quarantined=1.0)

    def _find_intact(self, version_id: str) -> set[Content]:
        """What the next version is to take over from this one."""
        version = _open(self.cache, version_id)
        contents = _list_contents(version.read_table())
        blocks = [b for b in range(version.layout.blocks) if (version_id, b) not in self.damaged]
        return {content for block in blocks for content in contents[version.layout.block_slice(block)]}

    def _check_finished(self, digest: bytes) -> None:
        version = open_cache(str(self.cache))
        assert verify_version(version).lines == ()
        if digest not in self.fresh:
            fresh = self.folder / f"fresh-{len(self.fresh)}"
            self._extract(fresh)
            self.fresh[digest] = open_cache(str(fresh)).id, read_arrays(fresh)
        expected_id, expected = self.fresh[digest]
        assert version.id == expected_id
        arrays = read_arrays(self.cache)
        _assert_equal(arrays, expected)
        self._check_origin(version, arrays, digest)
        self._mark(version)
        self.damaged = {place for place in self.damaged if place[0] != version.id}
        self.earlier.append(_read_files(self.tiles))

    def _check_origin(self, version: Version, arrays: Arrays, digest: bytes) -> None:
        """What could be taken over was, bit for bit; all else was computed."""
        bits = _read_bits(arrays)
        marked = (bits & 1).all(axis=1)
        for row, content in enumerate(_list_contents(version.read_table())):
            if arrays["status"][row] != Status.EMBEDDED:
                continue
            if marked[row]:
                assert bits[row].tobytes() in self.finished[content], f"{content} was taken over from something else"
            else:
                assert content in self.computable[digest], f"{content} was computed, and is known"

    def _mark(self, version: Version) -> None:
        version = CacheRoot(str(self.cache)).open_version(version.id, read_only=False)
        version.reopen_blocks(range(version.layout.blocks))
        contents = _list_contents(version.read_table())
        for block, rows in enumerate(version.layout.block_slices()):
            values = version.read_block(block)
            embedded = values.status == Status.EMBEDDED
            for vectors in values.pooled.values():
                vectors.view(np.uint16)[embedded] |= 1
            version.write_block(block, values)
            bits = _read_bits(values.pooled)
            for content, held in zip(contents[rows], bits, strict=True):
                self.finished[content].add(held.tobytes())
        version.seal()


def _draw_label(seed: int) -> bytes:
    """Up to five lines, some of them malformed."""
    ids = np.random.default_rng(seed).choice(["18", "73", "126", "200", "car"], seed % 6)
    return "".join(f"{label_id} 0.5 0.5 0.1 0.1\n" for label_id in ids).encode()


def _open(cache: Path, version_id: str) -> Version:
    return CacheRoot(str(cache)).open_version(version_id)


def _list_contents(table: TileTable) -> list[Content]:
    return list(zip(map(str, table.tile), table.generation.tolist(), strict=True))


def _read_bits(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint16]:
    """(n, all numbers of a row), of both poolings beside each other."""
    return np.concatenate([np.ascontiguousarray(arrays[name]).view(np.uint16) for name in _POOLED], axis=1)


def _read_files(folder: Path) -> Files:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def _assert_equal(arrays: Arrays, fresh: Arrays) -> None:
    assert arrays.keys() == fresh.keys()
    for name in fresh.keys() - {"commit", "seal", *_POOLED}:
        np.testing.assert_array_equal(arrays[name], fresh[name], err_msg=name)
    embedded = fresh["status"] == Status.EMBEDDED
    for name in _POOLED:
        assert np.isnan(arrays[name][~embedded]).all()
        assert (cosines(arrays[name][embedded], fresh[name][embedded]) >= 0.9999).all(), name


def run_merge_machine(examples: int, seed: int) -> list[dict[str, Any]]:
    """Draw so many sequences of steps and go through each.

    Returns:
        a row: `fault`, `tried`, `survived`.

    Raises:
        AssertionError: a cache differs from a fresh one; notes name the steps.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_schema.root, "choose_block_rows", lambda rows: BLOCK_ROWS)
        backbone = make_checkpoint(Path(folder) / "backbone", seed=seed, image_size=32, **_SMALL)

        @hypothesis.seed(seed)
        class Machine(MergeMachine):
            pass

        Machine.root, Machine.backbone = Path(folder), backbone
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate],  # to shrink what was found takes minutes
                suppress_health_check=list(HealthCheck),
            ),
        )
    return [{"fault": "bucket changed, stopped and damaged in any order", "tried": examples, "survived": Machine.ended}]

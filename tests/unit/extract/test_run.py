"""Which rank does what: every row of every pending block once, whatever the number of ranks and their speed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import cache_schema.root
from cache_schema import NO_LABEL, BlockValues, CacheRoot, Status, Version
from extract.backbone.checkpoint import find_checkpoint
from extract.draw import BlockDraw
from extract.plan import Plan
from extract.tiles.batch import LabelBatch, make_requests
from extract.tiles.source import open_source
from extract.timing import Timing
from tests.caches import make_provenance, make_recorded, make_table
from tests.checkpoints import make_checkpoint

SHAPES = [(1, 4), (8, 4), (37, 4), (37, 1), (30, 7), (5, 256)]
"""Rows, and rows of a block."""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Version, Plan]]:
    """A new version of each shape, all blocks pending."""
    folder = tmp_path_factory.mktemp("caches")
    checkpoint = find_checkpoint(str(make_checkpoint(folder / "backbone")), None)
    plans = []
    for number, (rows, block_rows) in enumerate(SHAPES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_schema.root, "choose_block_rows", lambda rows, n=block_rows: n)
            root = CacheRoot(str(folder / str(number)))
            version = root.create_version(make_table(rows), make_provenance(), make_recorded())
        pending = tuple(range(version.layout.blocks))
        plans.append((version, Plan(root.url, version.id, checkpoint, None, pending, rows, rows, ())))
    return plans


@dataclass
class Begun:
    """Takes the place of the writer: what it was told to expect."""

    missing: dict[int, int] = field(default_factory=dict)

    def begin(self, block: int, values: BlockValues) -> None:
        assert block not in self.missing
        self.missing[block] = int((values.status == Status.PENDING).sum())


@dataclass
class KnownRows:
    """Takes the place of an earlier version's rows."""

    known: set[int]

    def copy(self, rows: slice, values: BlockValues) -> LabelBatch:
        values.status[[row in self.known for row in range(rows.start, rows.stop)]] = Status.EMBEDDED
        return LabelBatch(values.label_ids[:0], 0, ())


@given(data=st.data(), ranks=st.integers(1, 6), batch_size=st.integers(1, 9))
@settings(max_examples=40)
def test_every_pending_row_is_drawn_once(
    plans: list[tuple[Version, Plan]], data: st.DataObject, ranks: int, batch_size: int
) -> None:
    version, plan = data.draw(st.sampled_from(plans))
    pending = tuple(data.draw(st.lists(st.sampled_from(plan.pending), unique=True), "pending"))
    known = data.draw(st.sets(st.integers(0, version.layout.rows - 1)), "rows that an earlier version knows")
    writers, store = [Begun() for _ in range(ranks)], dist.HashStore()
    streams = {}
    for rank, writer in enumerate(writers):
        todo, source = replace(plan, pending=pending), open_source(plan.cache)
        draw = BlockDraw(version, todo, source, writer, Timing())  # type: ignore[arg-type]
        draw._earlier = KnownRows(known)  # type: ignore[assignment]
        streams[rank] = draw.draw_batches(lambda amount: store.add("block", amount), batch_size)
    drawn: list[list[list[int]]] = [[] for _ in writers]
    while streams:
        rank = data.draw(st.sampled_from(sorted(streams)), "whose turn it is")
        batch = next(streams[rank], None)
        if batch is None:
            del streams[rank]
        else:
            drawn[rank].append([request.row for request in batch])

    begun = [block for writer in writers for block in writer.missing]
    assert sorted(begun) == sorted(pending), "each by one rank"
    for writer, batches in zip(writers, drawn, strict=True):
        # A rank works through its blocks in the order they were planned in, and through rows in theirs.
        assert list(writer.missing) == [block for block in pending if block in writer.missing]
        rows = [
            [row for row in range(part.start, part.stop) if row not in known]
            for part in map(version.layout.block_slice, writer.missing)
        ]
        assert list(writer.missing.values()) == [len(of_block) for of_block in rows]
        assert batches == [part[i : i + batch_size] for part in rows for i in range(0, len(part), batch_size)]


TABLE = make_table(60)


@given(st.lists(st.integers(0, len(TABLE) - 1)), st.booleans())
def test_a_request_says_what_the_table_says(rows: list[int], labels: bool) -> None:
    requests = make_requests(TABLE, rows, labels=labels)
    assert [request.row for request in requests] == rows
    for column in ("tile", "size", "crc32c", "generation", "label_crc32c"):
        assert [getattr(request, column) for request in requests] == getattr(TABLE, column)[rows].tolist()
    sizes = TABLE.label_size[rows].tolist() if labels else [NO_LABEL] * len(rows)
    assert [request.label_size for request in requests] == sizes

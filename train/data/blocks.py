"""Batches of cached vectors that do not fit in memory: blocks in random order, through a shuffle buffer.

In every epoch each rank reads its own share of the blocks, each block once, ahead of the step that needs it, and draws
batches at random from the rows in the buffer. Labels of all rows stay in memory; only vectors are streamed. The order
of rows depends on seed, epoch, number of ranks and memory budget, and on nothing else: a resumed run repeats it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.layout import Float16Array
from extract.ranks.group import Ranks

from .batches import Batch, Tiles
from .labels import LabelledRows
from .vectors import BlockVectors

T = TypeVar("T")
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One rank's part of an epoch.

    Attributes:
        blocks: blocks to read, in this order.
        sizes: (steps,) rows of this rank in every global batch; may be 0.
        global_sizes: (steps,) rows of every global batch, over all ranks.
    """

    blocks: list[int]
    sizes: list[int]
    global_sizes: list[int]


def plan_epoch(counts: Counts, *, batch_size: int, rank: int, world_size: int, seed: int, epoch: int) -> EpochPlan:
    """Plan which blocks `rank` reads and how many of its rows go into each batch; all ranks have the same steps.

    n rows make ceil(n / batch_size) batches, as in memory, but of equal size instead of a short last one: each rank
    spreads its rows evenly over all of them. A batch may therefore exceed `batch_size` by up to world_size - 1 rows.
    Every row appears exactly once.

    Args:
        counts: (blocks,) used rows of each block.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(counts))
    owned = deal_blocks(counts, order[counts[order] > 0], world_size)
    steps = -(-int(counts.sum()) // batch_size)
    edges = np.arange(steps + 1, dtype=np.int64)
    totals = [int(counts[blocks].sum()) for blocks in owned]
    sizes = np.stack([np.diff(edges * total // max(steps, 1)) for total in totals])
    return EpochPlan(owned[rank], sizes[rank].tolist(), sizes.sum(axis=0).tolist())


def deal_blocks(counts: Counts, order: npt.NDArray[np.int64], world_size: int) -> list[list[int]]:
    """Give each block of `order` to the rank with the fewest rows so far: shares differ by at most one block's rows."""
    owned: list[list[int]] = [[] for _ in range(world_size)]
    rows = [0] * world_size
    for block in order.tolist():
        rank = rows.index(min(rows))
        owned[rank].append(block)
        rows[rank] += int(counts[block])
    return owned


class ShuffleBuffer:
    """A buffer of `capacity` rows with vectors of length `width`, to draw from at random without replacement."""

    def __init__(self, capacity: int, width: int, rng: np.random.Generator) -> None:
        # NumPy copies whole rows; PyTorch's index_copy_ goes by element, and took longer than a step of training.
        self._rows = np.empty(capacity, np.int64)
        self._vectors = np.empty((capacity, width), np.float16)
        self._rng = rng
        self._filled = 0

    @property
    def room(self) -> int:
        return len(self._rows) - self._filled

    def add(self, rows: Counts, parts: Sequence[Float16Array]) -> None:
        """Add (k,) row numbers and their vectors, one (k, D) array per feature; there must be room for them."""
        end = self._filled + len(rows)
        self._rows[self._filled : end] = rows
        np.concatenate(parts, axis=1, out=self._vectors[self._filled : end])
        self._filled = end

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Remove `size` random rows, of at least as many, and close the gaps; return row numbers and vectors."""
        drawn = self._rng.choice(self._filled, size, replace=False)
        rows, vectors = self._rows[drawn], self._vectors[drawn]
        self._filled -= size
        left = np.ones(size, bool)
        left[drawn[drawn >= self._filled] - self._filled] = False
        moved, holes = np.flatnonzero(left) + self._filled, drawn[drawn < self._filled]
        self._rows[holes] = self._rows[moved]
        self._vectors[holes] = self._vectors[moved]
        return torch.from_numpy(rows), torch.from_numpy(vectors)


class BlockTiles(Tiles):
    """n labelled rows of a cache, ascending, whose vectors are streamed; ranks share its blocks."""

    def __init__(self, rows: LabelledRows, vectors: BlockVectors, ranks: Ranks) -> None:
        super().__init__(rows, ranks)
        self._vectors = vectors
        self._labels = self._labels.to(ranks.device)
        layout = vectors.layout
        # Used rows of a block are consecutive: they run from the block's edge to the next one.
        self._edges = np.searchsorted(rows.index, np.arange(layout.blocks + 1) * layout.block_rows)
        self._counts = np.diff(self._edges)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of every global batch, see `plan_epoch`; read and drop those before `first_step`."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        plan = plan_epoch(self._counts, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, epoch=epoch)
        rng = np.random.default_rng([seed, epoch, rank])
        capacity = min(self._vectors.memory.buffer_rows, sum(plan.sizes))
        buffer = ShuffleBuffer(capacity, self._vectors.width, rng)
        coming = self._read_ahead(plan.blocks)
        waiting = deque(self._counts[plan.blocks].tolist())
        for step, (size, global_size) in enumerate(zip(plan.sizes, plan.global_sizes, strict=True)):
            while waiting and waiting[0] <= buffer.room:
                buffer.add(*next(coming))
                waiting.popleft()
            rows, vectors = buffer.draw(size)
            if step < first_step:
                continue
            labels = self._labels.index_select(0, rows.to(self._labels.device))
            yield Batch(send(vectors, self._ranks.device), labels, rows, global_size)

    @property
    def share(self) -> Tensor:
        return torch.cat([torch.arange(0), *(torch.from_numpy(self._find_rows(block)) for block in self._evaluated)])

    def iterate_share(self) -> Iterator[Tensor]:
        """Yield the vectors of the rows in `share`, a block at a time."""
        joined = (np.concatenate(parts, axis=1) for _, parts in self._read_ahead(self._evaluated))
        return (send(torch.from_numpy(vectors), self._ranks.device) for vectors in joined)

    @property
    def _evaluated(self) -> list[int]:
        return deal_blocks(self._counts, np.flatnonzero(self._counts), self._ranks.world_size)[self._ranks.rank]

    def _find_rows(self, block: int) -> Counts:
        return np.arange(self._edges[block], self._edges[block + 1])

    def _read_ahead(self, blocks: Sequence[int]) -> Iterator[tuple[Counts, list[Float16Array]]]:
        return map_ahead(self._read, blocks, self._vectors.memory.ahead)

    def _read(self, block: int) -> tuple[Counts, list[Float16Array]]:
        """Read the used rows of a block and their vectors, one array per feature.

        Joining the features here would take the memory of one more block in each thread.
        """
        rows = self._find_rows(block)
        parts = self._vectors.read(block)
        if len(rows) < len(parts[0]):
            # With NumPy: PyTorch would start a thread pool in each of these threads.
            kept = self.rows.index[rows] - block * self._vectors.layout.block_rows
            parts = [part[kept] for part in parts]
        return rows, parts


def map_ahead(work: Callable[[int], T], items: Sequence[int], ahead: int) -> Iterator[T]:
    """Yield the results of `work` in order, keeping up to `ahead` of them running or ready in threads."""
    with ThreadPoolExecutor(ahead, thread_name_prefix="blocks") as threads:
        under_way: deque[Future[T]] = deque()
        for item in items:
            under_way.append(threads.submit(work, item))
            if len(under_way) == ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device, through page-locked memory on CUDA so that the host does not wait."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)

"""How much memory cached vectors may take, and how streaming divides it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from cache_schema import Layout
from cache_schema.cli.text import format_bytes
from extract.ranks.group import Ranks
from extract.ranks.machine import find_free_memory
from train.errors import TrainError

_MAX_AHEAD = 8


def agree_on_budget(ranks: Ranks) -> int:
    """Return the bytes that every rank can hold vectors in: the smallest budget of all ranks."""
    least = torch.tensor(choose_budget(ranks.device, ranks.local_world_size), device=ranks.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def choose_budget(device: torch.device, local_ranks: int = 1) -> int:
    """Return half of the free memory, in bytes.

    On CUDA that is the device's memory or the rank's part of the host's, whichever is less: vectors are held on the
    device and shuffled on the host.
    """
    free = find_free_memory() // local_ranks
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free // 2


def report_device_peak(device: torch.device) -> dict[str, int]:
    """Return the peak bytes of tensors on a GPU for timings.jsonl; nothing on a CPU, where the system reports it."""
    return {"device_peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


@dataclass(frozen=True)
class StreamingMemory:
    """A memory budget divided for streaming. Half of it is left for labels, names and batches.

    Attributes:
        buffer_rows: rows in the shuffle buffer, a quarter of the budget.
        ahead: blocks read ahead, at most a quarter of the budget.
    """

    buffer_rows: int
    ahead: int

    @classmethod
    def divide(cls, budget: int, layout: Layout, features: int, batch_size: int) -> "StreamingMemory":
        """Divide a budget for rows of `features` pooled arrays.

        Raises:
            TrainError: it is too small; the message names the smallest budget that works.
        """
        row = features * layout.width * 2
        block = 2 * layout.block_rows * row  # encoded and decoded
        # The buffer must hold a whole batch while the next block does not fit yet.
        least_rows = batch_size + 1 + layout.block_rows
        least = 4 * max(row * least_rows, block)
        if budget < least:
            raise TrainError(
                f"--memory-budget {format_bytes(budget)} is too small to stream blocks of {layout.block_rows:,} rows "
                f"and batches of {batch_size:,}: give at least {format_bytes(least)}"
            )
        return cls(buffer_rows=budget // 4 // row, ahead=min(_MAX_AHEAD, budget // 4 // block))

"""How much memory vectors may take: what a user asks for, what is free, and what streaming makes of it."""

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
    """Bytes that every rank can hold vectors in, the same for all of them."""
    least = torch.tensor(choose_budget(ranks.device, ranks.local_world_size), device=ranks.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def choose_budget(device: torch.device, local_ranks: int = 1) -> int:
    """Half of the memory that is free: on CUDA the device's or a rank's part of the host's, whichever is less, since
    vectors are held on the one and shuffled in the other."""
    free = find_free_memory() // local_ranks
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free // 2


def report_device_peak(device: torch.device) -> dict[str, int]:
    """For a line of timings.jsonl: most bytes of tensors on a GPU since the process began; nothing on a CPU, where the
    system tells whoever started the process."""
    return {"device_peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


@dataclass(frozen=True)
class StreamingMemory:
    """What streaming makes of a budget. Half of it stays for what else there is of the rows: labels, names, batches.

    Attributes:
        buffer_rows: rows to draw batches from, a quarter of the budget.
        ahead: blocks that are being read or wait, a quarter of the budget at most.
    """

    buffer_rows: int
    ahead: int

    @classmethod
    def divide(cls, budget: int, layout: Layout, features: int, batch_size: int) -> "StreamingMemory":
        """Divide a budget for rows of `features` pooled arrays.

        Raises:
            TrainError: it is too small for the least there is to hold; the message names what is enough.
        """
        row = features * layout.width * 2
        block = 2 * layout.block_rows * row  # as it arrived, and decoded
        # A batch must be there whole while a block that does not fit yet waits.
        least_rows = batch_size + 1 + layout.block_rows
        least = 4 * max(row * least_rows, block)
        if budget < least:
            raise TrainError(
                f"--memory-budget {format_bytes(budget)} is too small to stream blocks of {layout.block_rows:,} rows "
                f"and batches of {batch_size:,}: give at least {format_bytes(least)}"
            )
        return cls(buffer_rows=budget // 4 // row, ahead=min(_MAX_AHEAD, budget // 4 // block))

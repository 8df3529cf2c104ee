"""Let the ranks of a job read a cache together: each reads a share of the blocks and sends it to the others.

A job reads each block and computes each digest only once. Sending a block through the process group is cheaper than
reading and checking it again, and does not load the bucket.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from .group import Ranks

PIECE_BYTES = 64 << 20
"""Bytes sent at once. With nccl, an array in main memory takes that much GPU memory while it is sent."""


def share_out(blocks: int, world_size: int) -> list[slice]:
    """Divide the blocks into one contiguous share per rank; shares differ by one block at most.

    Contiguous shares let a rank read several small blocks at once, and the first failing rank has the first error.
    """
    edges = [blocks * rank // world_size for rank in range(world_size + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def exchange(values: Tensor, shares: Sequence[slice], ranks: Ranks) -> None:
    """Send every rank's share of `values` to all other ranks; all ranks must call this.

    Args:
        values: (n, …) contiguous, same shape and dtype on every rank; completed in place.
        shares: the rows that each rank has filled; together they cover all n.
    """
    if ranks.world_size == 1:
        return
    step = max(1, PIECE_BYTES // max(1, values[:1].nbytes))
    for owner, share in enumerate(shares):
        for start in range(share.start, share.stop, step):
            piece = values[start : min(start + step, share.stop)]
            sent = piece.to(ranks.device)
            dist.broadcast(sent, src=owner)
            if sent.device != piece.device:
                piece.copy_(sent)

"""A cache that the ranks of a job read together: who reads what, and how what each found gets to all.

A job asks storage for each block once, and computes each digest once. What a rank read then goes to the others through
the process group: less work than to read and check it again, and no rank more to wait on the bucket.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from .group import Ranks

PIECE_BYTES = 64 << 20
"""What is sent at once. Where ranks talk through GPUs, an array in main memory takes that much of one."""


def share_out(blocks: int, world_size: int) -> list[slice]:
    """The blocks that each rank reads: side by side, so that small ones can be read several at a time and the first
    rank with an error has the first of the errors; shares differ by one block at most."""
    edges = [blocks * rank // world_size for rank in range(world_size + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def exchange(values: Tensor, shares: Sequence[slice], ranks: Ranks) -> None:
    """Give every rank what the others hold; all of them must call this.

    Args:
        values: (n, …) contiguous, of one shape and dtype on every rank; completed in place.
        shares: the part of the n that each rank has filled; together they are all.
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

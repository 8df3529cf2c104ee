"""Pooling: from the tokens of a tile to the vectors that a cache stores, one function per name.

A version of a cache keeps the names of its pooled arrays; everything that embeds tiles for it takes them from there.
To add a pooling, add a row to `POOLINGS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from extract.errors import BackboneError


@dataclass(frozen=True)
class Pooling:
    """One way to pool tokens.

    Attributes:
        pool: from tokens (B, T, D) float32 after the final norm, and the index of the first patch token, to (B, D).
            Tokens are CLS, the registers, then the patches.
        reads: number of leading tokens that `pool` reads; None for all.
    """

    pool: Callable[[Tensor, int], Tensor]
    reads: int | None = None


POOLINGS = {
    "cls": Pooling(lambda tokens, first_patch: tokens[:, 0], reads=1),
    "patch_mean": Pooling(lambda tokens, first_patch: tokens[:, first_patch:].mean(dim=1)),
}

DEFAULT_POOLING = ("cls", "patch_mean")
"""What an extraction stores unless it is asked for something else."""


def count_tokens_read(names: Sequence[str]) -> int | None:
    """Return how many leading tokens these poolings read; None for all.

    Raises:
        BackboneError: there is no pooling of one of the names.
    """
    unknown = [name for name in names if name not in POOLINGS]
    if unknown:
        raise BackboneError(f"there is no pooling {unknown[0]!r} in this release: it has {', '.join(POOLINGS)}")
    reads = [POOLINGS[name].reads for name in names]
    return None if None in reads else max(filter(None, reads))


def pool_tokens(tokens: Tensor, names: Sequence[str], first_patch: int) -> dict[str, Tensor]:
    """Pool tokens (B, T, D) float32 after the final norm: (B, D) float32 for each of `names`."""
    return {name: POOLINGS[name].pool(tokens, first_patch) for name in names}

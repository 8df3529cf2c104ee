"""End training on every rank when a loss is no longer finite, and name the tiles it came from."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from extract.ranks.group import Ranks
from train.errors import TrainError

CHECK_STEPS = 20
"""Steps between two checks: each check waits for the device and for the other ranks."""


class _Step(NamedTuple):
    """One step, counted from 1 over all epochs: the rows of this rank, and whether the loss of each is finite."""

    number: int
    rows: Tensor
    finite: Tensor


class FiniteLosses:
    """Collects which losses are finite, and checks them every `CHECK_STEPS` steps.

    Args:
        ranks: all of which must call `note` and `check` equally often.
        describe: makes the error from the number of a step and the rows of its batch whose loss is not finite.
    """

    def __init__(self, ranks: Ranks, describe: Callable[[int, list[int]], TrainError]) -> None:
        self._ranks = ranks
        self._describe = describe
        self._steps: list[_Step] = []

    def note(self, number: int, rows: Tensor, finite: Tensor) -> None:
        """Take one step: its number, and of its rows (b,) whether the loss is finite, (b,) bool.

        Raises:
            TrainError: as `check`, if this step makes one due.
        """
        self._steps.append(_Step(number, rows, finite))
        if len(self._steps) == CHECK_STEPS:
            self.check()

    def check(self) -> None:
        """Check the steps noted since the last check.

        Raises:
            TrainError: a loss of any rank is not finite. From that step on everything is NaN, so the earliest step of
                all ranks is named.
        """
        steps, self._steps = self._steps, []
        finite = torch.cat([step.finite for step in steps]).all() if steps else torch.ones((), dtype=torch.bool)
        agreed = finite.to(self._ranks.device, torch.int32)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if agreed:
            return
        mine = next(((step.number, _find_bad_rows(step)) for step in steps if not step.finite.all()), None)
        found: list[tuple[int, list[int]] | None] = [None] * self._ranks.world_size
        dist.all_gather_object(found, mine)
        first = min(number for number, _ in filter(None, found))
        rows = sorted(row for number, part in filter(None, found) if number == first for row in part)

        def refuse() -> None:
            raise self._describe(first, rows)

        self._ranks.run_everywhere(refuse)


def _find_bad_rows(step: _Step) -> list[int]:
    rows: list[int] = step.rows[~step.finite.cpu()].tolist()
    return rows

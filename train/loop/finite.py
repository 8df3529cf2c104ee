"""End training on every rank when a loss is no longer finite, and name the tiles it came from."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from extract.ranks.group import Ranks
from train.errors import TrainError

CHECK_STEPS = 20
"""Steps between two checks: each check waits for the device and for the other ranks."""


class FiniteLosses:
    """Collects which losses are finite, and checks them every `CHECK_STEPS` steps.

    Args:
        ranks: all of which must call `note` and `check` equally often.
        describe: makes the error from the number of a step and the rows of its batch whose loss is not finite.
    """

    def __init__(self, ranks: Ranks, describe: Callable[[int, list[int]], TrainError]) -> None:
        self._ranks = ranks
        self._describe = describe
        self._steps: list[tuple[int, Tensor, Tensor]] = []

    def note(self, number: int, rows: Tensor, finite: Tensor) -> None:
        """Take one step.

        Args:
            number: of the step, counted from 1 over all epochs.
            rows: (b,) int64, this rank's rows.
            finite: (b,) bool, whether the loss of each is finite.

        Raises:
            TrainError: as `check`, if this step makes one due.
        """
        self._steps.append((number, rows, finite))
        if len(self._steps) == CHECK_STEPS:
            self.check()

    def check(self) -> None:
        """Check the steps noted since the last check.

        Raises:
            TrainError: a loss of any rank is not finite. From that step on everything is NaN, so the earliest step of
                all ranks is named.
        """
        steps, self._steps = self._steps, []
        finite = torch.cat([part for _, _, part in steps]).all() if steps else torch.ones((), dtype=torch.bool)
        agreed = finite.to(self._ranks.device, torch.int32)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if agreed:
            return
        bad = ((number, rows[~part.cpu()].tolist()) for number, rows, part in steps if not part.all())
        found: list[tuple[int, list[int]] | None] = [None] * self._ranks.world_size
        dist.all_gather_object(found, next(bad, None))
        first = min(number for number, _ in filter(None, found))
        rows = sorted(row for number, part in filter(None, found) if number == first for row in part)

        def refuse() -> None:
            raise self._describe(first, rows)

        self._ranks.run_everywhere(refuse)

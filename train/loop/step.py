"""One optimiser step over a global batch, in as many parts as memory asks for."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from extract.backbone.precision import multiplies_bf16
from extract.ranks.group import Ranks
from train.config import TrainConfig
from train.data.batches import Batch, split_evenly
from train.data.rare import weigh_positives
from train.errors import TrainError
from train.model.classifier import Classifier, TrainedPart
from train.model.loss import LossConfig
from train.model.optimizer import make_optimizer
from train.model.shards import is_sharded, shard_trained

_OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive", "could not create a memory object")


class StepResult(NamedTuple):
    """What one rank saw of a step; all of it stays on the device.

    Attributes:
        summed: the loss of its rows and all classes, added up.
        finite: (b,) bool, which of its rows have a finite loss.
        clipped: whether the gradient was longer than `clip_norm`.
    """

    summed: Tensor
    finite: Tensor
    clipped: Tensor


class TrainStep:
    """Forward, backward and update of what a classifier trains.

    Args:
        classifier: trained in place.
        config: of loss, rates, clipping and parts.
        class_weights: (C,) on the device, of the positives; None leaves them alone.
        ranks: over which gradients are averaged.
    """

    def __init__(self, classifier: Classifier, config: TrainConfig, class_weights: Tensor | None, ranks: Ranks) -> None:
        self._classifier = classifier
        self._config = config
        self._class_weights = class_weights
        self._ranks = ranks
        self._amp = use_amp(config.amp, ranks.device)
        self._loss: LossConfig = config.make_loss()
        self._part: nn.Module = classifier
        if config.shard and ranks.world_size > 1:
            shard_trained(classifier, ranks)
        elif ranks.world_size > 1:
            # With a size given, the first bucket is as large as the others: a head goes out in one message, not two.
            self._part = DistributedDataParallel(TrainedPart(classifier), forward_sync_buffers=False, bucket_cap_mb=25)
        self.optimizer = make_optimizer(  # of the shards, where there are any
            classifier,
            lr=config.lr,
            backbone_lr=config.backbone_lr,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )

    def close(self) -> None:
        """Let go of DDP.

        It must go before the process group does. Were it the group's last owner, the group's threads would be joined
        with the GIL held, and one that needs the GIL to free a tensor would never end (torch 2.13, gloo).
        """
        self._part = nn.Identity()

    def run(self, batch: Batch, scale: float) -> StepResult:
        """Train on this rank's share of a global batch.

        Args:
            batch: the share.
            scale: of every group's peak learning rate.

        Raises:
            TrainError: the share does not fit in memory; names the largest that does.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        self.optimizer.zero_grad(set_to_none=True)
        parts = split_batch(batch, self._config.accumulate, self._ranks)
        losses = []
        for part in parts:
            with nullcontext() if part is parts[-1] else self._without_sync():
                reason = None
                try:
                    losses.append(self._accumulate(part))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    reason = (str(error).splitlines() or ["MemoryError"])[0]
                # Not while the exception is there, which holds on to all that the failed attempt had computed.
                if reason is not None:
                    raise self._find_what_fits(part, reason)
        clipped = self._clip()
        self.optimizer.step()
        together = torch.cat(losses)
        return StepResult(together.sum(), together.isfinite().all(dim=1), clipped)

    def _accumulate(self, part: Batch) -> Tensor:
        """Add a part's gradient to that of the parts before; returns its losses (b, C), detached."""
        # No weight is used twice: autocast's cache would only hold on to the copies of all layers.
        with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._amp, cache_enabled=False):
            logits = self._part(self._classifier.encode(part.inputs))
        losses = self._loss(logits, part.labels.float())
        if self._class_weights is not None:
            losses = weigh_positives(losses, part.labels, self._class_weights)
        # DDP and FSDP average over ranks: scaled like this the gradient is that of the mean over the global batch.
        (losses.sum() * self._ranks.world_size / (part.global_size * part.labels.shape[1])).backward()
        return losses.detach()

    def _without_sync(self) -> AbstractContextManager[None]:
        """Keep a part's gradient on this rank: the last part sends all of it at once.

        Not where layers are sharded: what each part adds goes to its shard, or every rank would hold whole gradients.
        """
        return self._part.no_sync() if isinstance(self._part, DistributedDataParallel) else nullcontext()

    def _clip(self) -> Tensor:
        if self._config.clip_norm is None:
            return torch.zeros((), dtype=torch.bool, device=self._ranks.device)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._config.clip_norm)
        whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return whole > self._config.clip_norm

    def _find_what_fits(self, part: Batch, reason: str) -> TrainError:
        """What to do about too little memory, found by trying ever smaller parts."""
        size = f"{len(part.inputs):,} tiles at once do not fit in memory"
        if is_sharded(self._classifier):  # no rank can try alone
            return TrainError(
                f"{size} ({reason}): --accumulate {2 * self._config.accumulate} trains the same batches in parts of "
                "half that size; --grad-checkpoint needs less memory for each, a larger NPROC for the weights"
            )
        self.optimizer.zero_grad(set_to_none=True)
        fits = len(part.inputs)
        while fits := fits // 2:
            try:
                with self._without_sync():
                    self._accumulate(Batch(part.inputs[:fits], part.labels[:fits], part.rows[:fits], part.global_size))
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            finally:
                self.optimizer.zero_grad(set_to_none=True)
        if not fits:
            return TrainError(f"{size}, and not even 1 does ({reason}): lower --unfreeze, or add --grad-checkpoint")
        # The share of the largest batch, however many parts it is in now.
        share = -(-self._config.batch_size // self._ranks.world_size)
        return TrainError(
            f"{size}, {fits:,} do: --accumulate {-(-share // fits)} trains the same batches of "
            f"{self._config.batch_size:,} in parts of that size; --grad-checkpoint needs less memory for each"
        )


def split_batch(batch: Batch, parts: int, ranks: Ranks) -> list[Batch]:
    """A share in up to `parts` parts of even size, as many on every rank; gradients over them add up to that of the
    share."""
    size = max(1, -(-batch.global_size // (ranks.world_size * parts)))
    inputs, labels, rows = (
        split_evenly(of_share, batch.global_size, size, ranks) for of_share in (batch.inputs, batch.labels, batch.rows)
    )
    return [Batch(*part, batch.global_size) for part in zip(inputs, labels, rows, strict=True)]


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what an allocation failed for; on the CPU neither PyTorch nor oneDNN has an exception for it."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return True
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def use_amp(asked: bool | None, device: torch.device) -> bool:
    """Return whether to autocast to bf16: as asked; with None, where the device multiplies bf16."""
    return multiplies_bf16(device) if asked is None else asked

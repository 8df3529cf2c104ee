"""Do one optimiser step over a global batch, in as many parts as memory requires."""

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
from train.errors import TrainError, first_line
from train.model.classifier import Classifier, TrainedPart
from train.model.optimizer import make_optimizer
from train.model.shards import is_sharded, shard_trained

_OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive", "could not create a memory object")


class StepResult(NamedTuple):
    """Result of a step on one rank; all of it stays on the device.

    Attributes:
        summed: loss summed over the rank's rows and all classes.
        finite: (b,) bool, whether the loss of each of its rows is finite.
        clipped: whether the norm of the gradient exceeded `clip_norm`.
    """

    summed: Tensor
    finite: Tensor
    clipped: Tensor


class TrainStep:
    """Computes forward pass, backward pass and update of the trained part of a classifier.

    Args:
        classifier: trained in place.
        config: loss, learning rates, clipping and number of parts.
        class_weights: (C,) on the device, weights of the positives; None for 1.
        ranks: gradients are averaged over them.
    """

    def __init__(self, classifier: Classifier, config: TrainConfig, class_weights: Tensor | None, ranks: Ranks) -> None:
        self._classifier = classifier
        self._config = config
        self._class_weights = class_weights
        self._ranks = ranks
        self._amp = use_amp(config.amp, ranks.device)
        self._loss = config.make_loss()
        self._part: nn.Module = classifier
        if config.shard and ranks.world_size > 1:
            shard_trained(classifier, ranks)
        elif ranks.world_size > 1:
            # With a given size the first bucket is as large as the others: a head is sent in one message, not two.
            self._part = DistributedDataParallel(TrainedPart(classifier), forward_sync_buffers=False, bucket_cap_mb=25)
        self.optimizer = make_optimizer(  # of the shards, where there are any
            classifier,
            lr=config.lr,
            backbone_lr=config.backbone_lr,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )

    def close(self) -> None:
        """Release DDP; must be called before the process group is destroyed.

        If DDP were the last owner of the group, the group's threads would be joined with the GIL held, and a thread
        that needs the GIL to free a tensor would never end (torch 2.13, gloo).
        """
        self._part = nn.Identity()

    def run(self, batch: Batch, scale: float) -> StepResult:
        """Train on this rank's share of a global batch, with `scale` times the peak learning rate of every group.

        Raises:
            TrainError: the share does not fit in memory; the message names the largest that does.
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
                    reason = first_line(error)
                # Only after the exception is gone: it keeps all that the failed attempt had computed.
                if reason is not None:
                    raise self._find_what_fits(part, reason)
        clipped = self._clip()
        self.optimizer.step()
        together = torch.cat(losses)
        return StepResult(together.sum(), together.isfinite().all(dim=1), clipped)

    def _accumulate(self, part: Batch) -> Tensor:
        """Add the gradient of a part to those of earlier parts; return its losses (b, C), detached."""
        # No weight is used twice, so autocast's cache would only keep copies of all layers.
        with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._amp, cache_enabled=False):
            logits = self._part(self._classifier.encode(part.inputs))
        losses = self._loss(logits, part.labels.float())
        if self._class_weights is not None:
            losses = weigh_positives(losses, part.labels, self._class_weights)
        # DDP and FSDP average over ranks: this factor makes it the gradient of the mean over the global batch.
        (losses.sum() * self._ranks.world_size / (part.global_size * part.labels.shape[1])).backward()
        return losses.detach()

    def _without_sync(self) -> AbstractContextManager[None]:
        """Keep a part's gradient on this rank; the last part sends the sum.

        With sharded layers each part sends its own gradient, or every rank would hold whole gradients.
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
        """Return the error for too little memory; find a size that fits by trying smaller and smaller parts."""
        size = f"{len(part.inputs):,} tiles at once do not fit in memory"
        if is_sharded(self._classifier):  # one rank cannot try alone
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
        # The share of a full batch, however many parts it is divided into now.
        share = -(-self._config.batch_size // self._ranks.world_size)
        return TrainError(
            f"{size}, {fits:,} do: --accumulate {-(-share // fits)} trains the same batches of "
            f"{self._config.batch_size:,} in parts of that size; --grad-checkpoint needs less memory for each"
        )


def split_batch(batch: Batch, parts: int, ranks: Ranks) -> list[Batch]:
    """Divide a share into up to `parts` parts of even size, equally many on every rank.

    The gradients of the parts add up to that of the share.
    """
    size = max(1, -(-batch.global_size // (ranks.world_size * parts)))
    inputs, labels, rows = (
        split_evenly(of_share, batch.global_size, size, ranks) for of_share in (batch.inputs, batch.labels, batch.rows)
    )
    return [Batch(*part, batch.global_size) for part in zip(inputs, labels, rows, strict=True)]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed. On the CPU neither PyTorch nor oneDNN has its own exception for that."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return True
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def use_amp(asked: bool | None, device: torch.device) -> bool:
    """Return whether to autocast to bf16: as asked; with None, where the device multiplies bf16."""
    return multiplies_bf16(device) if asked is None else asked

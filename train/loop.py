"""The training loop, the same for cached vectors and streamed tiles."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cache_schema.layout import BoolArray
from extract.distributed import Ranks
from extract.precision import multiplies_bf16

from .batches import Batch, Tiles
from .checkpoint import CheckpointMeta, LoadedCheckpoint, save_checkpoint, sync
from .config import TrainConfig
from .errors import CheckpointError, TrainError
from .evaluation import predict_logits, score_epoch
from .memory import report_device_peak
from .model import Classifier
from .rarest import average_rarest, find_rarest
from .rows import LabelledRows
from .rundir import RunDirectory
from .sampling import count_epoch
from .weights import compute_class_weights, weigh_positives

MIN_EPOCH_STEPS = 20
CHECK_STEPS = 20
"""Steps after which the losses are looked at: each look waits for the device and for the other ranks."""


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """Tiles to select the best epoch by.

    Attributes:
        tiles: their inputs, empty ones included.
        rows: their labels and scenes.
        counted: (n,) bool, the rows of the main figures.
    """

    tiles: Tiles
    rows: LabelledRows
    counted: BoolArray


@dataclass
class EpochTiming:
    """Seconds of one epoch: in all, waiting for batches, and validating."""

    train_s: float = 0.0
    wait_s: float = 0.0
    val_s: float = 0.0


def choose_batch_size(rows: int, asked: int) -> int:
    """The asked global batch, halved until an epoch has 20 steps."""
    size = asked
    while size > 1 and rows / size < MIN_EPOCH_STEPS:
        size //= 2
    return size


def scale_learning_rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of all steps, then half a cosine down to zero (Loshchilov & Hutter 2017)."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Trainer:
    """Trains one classifier and leaves its files in a run directory."""

    def __init__(
        self,
        classifier: Classifier,
        train: Tiles,
        val: ValidationSet,
        config: TrainConfig,
        meta: CheckpointMeta,
        run: RunDirectory,
        ranks: Ranks,
    ) -> None:
        self.classifier = classifier
        self.config = config
        self._train = train
        self._val = val
        self._meta = meta
        self._run = run
        self._ranks = ranks
        self._amp = use_amp(config, ranks)
        self._loss = config.make_loss()
        self._optimizer = make_optimizer(classifier, config)
        self._model: nn.Module = classifier
        if ranks.world_size > 1:
            self._model = DistributedDataParallel(classifier, forward_sync_buffers=False)
        self._epoch = 0
        self._best: float | None = None
        self._best_epoch: int | None = None
        # Repeated tiles make epochs longer, and not all of them alike.
        self._epoch_tiles = [count_epoch(train.rows, config.seed, epoch) for epoch in range(config.epochs)]
        *self._first_steps, self._steps = accumulate(
            (math.ceil(tiles / config.batch_size) for tiles in self._epoch_tiles), initial=0
        )
        self._rarest = find_rarest(train.rows.labels, val.rows.labels[val.counted])
        self._clipped = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._class_weights: torch.Tensor | None = None
        if config.class_weights != "none":
            weights = compute_class_weights(train.rows.labels, config.class_weights)
            self._class_weights = torch.from_numpy(weights).to(ranks.device)

    def restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Go on after the epoch a checkpoint was saved at."""
        if checkpoint.optimizer is None:
            raise CheckpointError("this checkpoint holds no optimiser state: it cannot be resumed")
        load_tensors(self.classifier, checkpoint.tensors)
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self._epoch, self._best, self._best_epoch = (
            checkpoint.meta.epoch,
            checkpoint.meta.best,
            checkpoint.meta.best_epoch,
        )

    def fit(self, note: Callable[[str], None]) -> None:
        """Train the remaining epochs; `best/` and `last/` and a history line an epoch are left in the run directory.

        Raises:
            TrainError: the loss is no longer finite; it names the rows.
            CheckpointError: a checkpoint cannot be written.
        """
        try:
            self._fit(note)
        finally:
            # DDP must go before the process group does. Were it the group's last owner, the group's threads would be
            # joined with the GIL held, and one that needs the GIL to free a tensor would never end (torch 2.13, gloo).
            self._model = self.classifier

    def _fit(self, note: Callable[[str], None]) -> None:
        over = self._is_over()
        with tqdm(
            total=sum(self._epoch_tiles),
            initial=sum(self._epoch_tiles[: self._epoch]),
            unit="tile",
            desc="train",
            disable=not self._ranks.is_main,
        ) as bar:
            while not over:
                timing = EpochTiming()
                trained = self._train_epoch(bar, timing)
                started = time.perf_counter()
                logits = predict_logits(self.classifier, self._val.tiles, self._ranks, amp=self._amp)
                self._epoch += 1
                # What fails on rank 0 alone ends every rank.
                over = self._ranks.run_on_main(partial(self._close_epoch, logits, trained, timing, started, bar, note))
        if self._epoch < self.config.epochs:
            note(
                f"stopped early, after epoch {self._epoch} of {self.config.epochs}: no better {self.config.best_by} "
                f"for {self.config.patience} epochs"
            )

    def _is_over(self) -> bool:
        """Rank 0, and any rank just restored: whether no epoch is left, or patience with the last ones is over."""
        if self._epoch == self.config.epochs:
            return True
        patience = self.config.patience
        return patience is not None and self._epoch - (self._best_epoch or self._epoch) >= patience

    def _train_epoch(self, bar: "tqdm[Any]", timing: EpochTiming) -> dict[str, float]:
        """Train one epoch; its mean loss over all ranks, and what the options in use did, for the history."""
        config, started = self.config, time.perf_counter()
        seed_dropout(config.seed, self._epoch, self._ranks.rank)
        self.classifier.train()
        batches = self._train.iterate_epoch(batch_size=config.batch_size, seed=config.seed, epoch=self._epoch)
        first = step = self._first_steps[self._epoch]
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        self._clipped.zero_()
        classes = len(self._meta.class_ids)
        unchecked: list[_StepRows] = []
        for batch in _time_waits(batches, timing):
            self._set_learning_rate(scale_learning_rate(step, self._steps, config.warmup))
            summed, finite = self._train_step(batch, classes)
            total += summed
            bar.update(batch.global_size)
            step += 1
            unchecked.append(_StepRows(step, batch.rows, finite))
            if len(unchecked) == CHECK_STEPS:
                self._refuse_not_finite(unchecked)
                unchecked.clear()
        self._refuse_not_finite(unchecked)
        dist.all_reduce(total)
        timing.train_s = time.perf_counter() - started
        tiles = self._epoch_tiles[self._epoch]
        figures = {"train_loss": float(total) / (tiles * classes)}
        if config.repeat_factor:
            figures["train_tiles"] = tiles
        if config.clip_norm is not None:
            figures["clipped_share"] = int(self._clipped) / (step - first)
        return figures

    def _refuse_not_finite(self, steps: list["_StepRows"]) -> None:
        """End training on every rank if one of them met a loss that is not finite, and name the rows it came from.

        From the step after it on everything is NaN, so the earliest step of all ranks is the one to name.
        """
        finite = torch.cat([step.finite for step in steps]).all() if steps else torch.ones((), dtype=torch.bool)
        agreed = finite.to(self._ranks.device, torch.int32)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if agreed:
            return
        mine = next(((step.number, step.bad_rows()) for step in steps if not step.finite.all()), None)
        found: list[tuple[int, list[int]] | None] = [None] * self._ranks.world_size
        dist.all_gather_object(found, mine)
        first = min(number for number, _ in filter(None, found))
        rows = sorted(row for number, part in filter(None, found) if number == first for row in part)

        def refuse() -> None:
            raise TrainError(
                f"the loss is not finite in epoch {self._epoch + 1}, step {first:,} of {self._steps:,}, for "
                f"{self._train.rows.describe(rows)} of a batch of {self.config.batch_size:,}: lower --lr, train "
                "without --amp, or check these tiles; the checkpoints are as they were"
            )

        self._ranks.run_everywhere(refuse)

    def _train_step(self, batch: Batch, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; returns this rank's summed loss, detached, and which of its rows have a finite one."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._amp):
            logits = self._model(batch.inputs)
        losses = self._loss(logits, batch.labels.float())
        if self._class_weights is not None:
            losses = weigh_positives(losses, batch.labels, self._class_weights)
        summed = losses.sum()
        # DDP averages over ranks: scaled like this the gradient is that of the mean over the global batch.
        (summed * self._ranks.world_size / (batch.global_size * classes)).backward()
        if self.config.clip_norm is not None:
            parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
            self._clipped += nn.utils.clip_grad_norm_(parameters, self.config.clip_norm) > self.config.clip_norm
        self._optimizer.step()
        return summed.detach(), losses.detach().isfinite().all(dim=1)

    def _set_learning_rate(self, scale: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def _close_epoch(
        self,
        logits: torch.Tensor | None,
        trained: dict[str, float],
        timing: EpochTiming,
        started: float,
        bar: "tqdm[Any]",
        note: Callable[[str], None],
    ) -> bool:
        """Rank 0: score the validation rows, leave all in the run directory, and say if this was the last epoch."""
        assert logits is not None
        # The very last step of an epoch can spoil the weights after its loss was still finite.
        spoilt = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if spoilt:
            raise TrainError(
                f"the model gives NaN or infinity after epoch {self._epoch}, for {self._val.rows.describe(spoilt)} of "
                f"{len(logits):,} validation tiles: lower --lr, or train without --amp; the checkpoints are as they "
                "were"
            )
        metrics = score_epoch(logits, self._val.rows, self._val.counted, loss=self._loss)
        timing.val_s = time.perf_counter() - started
        self._record(trained, metrics, timing, bar, note)
        return self._is_over()

    def _record(
        self,
        trained: dict[str, float],
        metrics: dict[str, Any],
        timing: EpochTiming,
        bar: "tqdm[Any]",
        note: Callable[[str], None],
    ) -> None:
        """Rank 0: history, best and last checkpoints, one line for the user."""
        figures = {name: value for name, value in metrics.items() if name != "per_class"}
        figures |= average_rarest(metrics, self._rarest)
        self._run.append_history(
            {"epoch": self._epoch, "lr": self._optimizer.param_groups[0]["lr"], **trained, **figures}
        )
        figures_of_cost = {**timing.__dict__, **report_device_peak(self._ranks.device)}
        self._run.append_timing({"epoch": self._epoch, **figures_of_cost, "tiles": self._epoch_tiles[self._epoch - 1]})
        loss = trained["train_loss"]
        value = metrics[self.config.best_by]
        if value is None:
            raise TrainError("no validation tile shows any class: no epoch can be the best; give a larger VAL_CACHE")
        if self._best is None or value > self._best:
            self._best, self._best_epoch = value, self._epoch
            self._save(self._run.best)
        if self._epoch % self.config.save_every == 0 or self._is_over():
            sync(self._run.history)  # a checkpoint that outlived its history line could not be resumed
            self._save(self._run.last, optimizer=True)
            self._run.upload()
        bar.set_postfix_str(
            f"loss {loss:.4f}, F1 weighted {metrics['f1_weighted']:.3f}, mAP {metrics['map_macro']:.3f}", refresh=False
        )
        note(
            f"epoch {self._epoch}/{self.config.epochs}: loss {loss:.4f}, val F1 weighted {metrics['f1_weighted']:.4f}, "
            f"mAP {metrics['map_macro']:.4f}; {timing.train_s:.2f} s, {len(self._train) / timing.train_s:,.0f} "
            f"tiles/s, {100 * timing.wait_s / timing.train_s:.0f} % of it waiting for tiles"
        )

    def _save(self, directory: Any, *, optimizer: bool = False) -> None:
        meta = self._meta.at_epoch(self._epoch, self._best, self._best_epoch)
        state = self._optimizer.state_dict() if optimizer else None
        save_checkpoint(directory, self.classifier.trained_tensors(), meta, state)


def seed_dropout(seed: int, epoch: int, rank: int) -> None:
    """Make the epoch's draws depend on seed, epoch and rank alone, so that a resumed run repeats them."""
    torch.manual_seed((seed * 1_000_003 + epoch) * 8_191 + rank)


def use_amp(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether to autocast: as asked, else where the device multiplies bf16."""
    return multiplies_bf16(ranks.device) if config.amp is None else config.amp


def make_optimizer(classifier: Classifier, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what requires gradients: the head at `lr`, unfrozen layers at `backbone_lr`."""
    groups = [{"params": list(classifier.head.parameters()), "peak_lr": config.lr}]
    if classifier.backbone is not None:
        layers = [parameter for parameter in classifier.backbone.parameters() if parameter.requires_grad]
        groups += [{"params": layers, "peak_lr": config.backbone_lr}] if layers else []
    # Fused, a step over the head takes a quarter to a seventh of the time on 2 cores.
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def load_tensors(classifier: Classifier, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into the classifier.

    Raises:
        CheckpointError: a name or a shape that this classifier does not have.
    """
    state = classifier.state_dict()
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} {tuple(tensor.shape)} does not fit this model: the checkpoint belongs to another one"
            )
    classifier.load_state_dict(dict(tensors), strict=False)


@dataclass(frozen=True, eq=False)
class _StepRows:
    """Of one step, counted from 1 over all epochs: this rank's rows and whether the loss of each is finite."""

    number: int
    rows: torch.Tensor
    finite: torch.Tensor

    def bad_rows(self) -> list[int]:
        rows: list[int] = self.rows[~self.finite.cpu()].tolist()
        return rows


def _time_waits(batches: Iterator[Batch], timing: EpochTiming) -> Iterator[Batch]:
    """The same batches, with the seconds spent waiting for each counted."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        timing.wait_s += time.perf_counter() - started
        if batch is None:
            return
        yield batch

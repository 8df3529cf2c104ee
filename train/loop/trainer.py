"""Train a classifier epoch by epoch; the loop is the same for cached vectors and streamed tiles."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from extract.ranks.group import Ranks
from train.config import TrainConfig
from train.data.batches import Batch, Tiles
from train.data.memory import report_device_peak
from train.data.rare import compute_class_weights, find_rarest
from train.errors import CheckpointError, TrainError
from train.metrics.evaluation import score_epoch
from train.metrics.figures import FIGURES
from train.metrics.scores import average_rarest
from train.model.classifier import Classifier
from train.model.shards import gather_state, gather_tensors, load_tensors, send_state
from train.runs.checkpoint import Begun, CheckpointMeta, LoadedCheckpoint, save_checkpoint, sync
from train.runs.directory import RunDirectory

from .finite import FiniteLosses
from .schedule import Schedule
from .step import TrainStep, use_amp
from .validation import ValidationSet, predict_logits

_Tensors = dict[str, torch.Tensor]
_Optimizer = dict[str, Any] | None


@dataclass
class EpochTiming:
    """Seconds of one epoch: in all, waiting for batches, and validating."""

    train_s: float = 0.0
    wait_s: float = 0.0
    val_s: float = 0.0


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
        self._amp = use_amp(config.amp, ranks.device)
        self._loss = config.make_loss()
        self._epoch = 0
        self._begun = Begun()
        self._best: float | None = None
        self._best_epoch: int | None = None
        self._schedule = Schedule(train.rows, seed=config.seed, epochs=config.epochs, batch_size=config.batch_size)
        self._rarest = find_rarest(train.rows.labels, val.rows.labels[val.counted])
        weights = None
        if config.class_weights != "none":
            computed = compute_class_weights(train.rows.labels, config.class_weights)
            weights = torch.from_numpy(computed).to(ranks.device)
        self._step = TrainStep(classifier, config, weights, ranks)

    def restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Continue after the epoch, or the step within it, at which a checkpoint was saved.

        Rank 0 has the whole checkpoint, the other ranks its outline.

        Raises:
            CheckpointError: it holds no optimiser state, or belongs to another model.
        """
        if checkpoint.optimizer is None:
            raise CheckpointError("this checkpoint holds no optimiser state: it cannot be resumed")
        load_tensors(self.classifier, checkpoint.tensors, self._ranks)
        send_state(checkpoint.optimizer, self._step.optimizer, self._ranks)
        meta = checkpoint.meta
        self._epoch, self._best, self._best_epoch, self._begun = meta.epoch, meta.best, meta.best_epoch, meta.begun

    def fit(self, note: Callable[[str], None]) -> None:
        """Train the remaining epochs; write `best/`, `last/` and one history line per epoch to the run directory.

        Raises:
            TrainError: the loss is no longer finite; the message names the tiles.
            CheckpointError: a checkpoint cannot be written.
        """
        try:
            self._fit(note)
        finally:
            self._step.close()

    def _fit(self, note: Callable[[str], None]) -> None:
        over = self._is_over()
        with tqdm(
            total=sum(self._schedule.tiles),
            initial=self._schedule.count_tiles(self._epoch, self._begun.steps),
            unit="tile",
            desc="train",
            disable=not self._ranks.draws_bars,
        ) as bar:
            while not over:
                timing = EpochTiming()
                trained = self._train_epoch(bar, timing)
                started = time.perf_counter()
                logits = predict_logits(self.classifier, self._val.tiles, self._ranks, amp=self._amp)
                self._epoch += 1
                # An error on rank 0 ends every rank.
                closed = self._ranks.run_on_main(partial(self._close_epoch, logits, trained, timing, started))
                if closed.best or closed.due:
                    tensors, optimizer = self._gather(optimizer=closed.due)
                    self._ranks.run_on_main(partial(self._save_epoch, closed, tensors, optimizer))
                self._tell(closed, trained["train_loss"], timing, bar, note)
                over = closed.over
        if self._epoch < self.config.epochs:
            note(
                f"stopped early, after epoch {self._epoch} of {self.config.epochs}: no better "
                f"{FIGURES[self.config.best_by].title} for {self.config.patience} epochs"
            )

    def _is_over(self) -> bool:
        """Return whether no epoch is left or patience has run out; valid on rank 0, and on any rank just restored."""
        if self._epoch == self.config.epochs:
            return True
        patience = self.config.patience
        return patience is not None and self._epoch - (self._best_epoch or self._epoch) >= patience

    def _train_epoch(self, bar: "tqdm[Any]", timing: EpochTiming) -> dict[str, float]:
        """Train the rest of an epoch; return the mean loss over all ranks, and what the options in use did."""
        config, started = self.config, time.perf_counter()
        self.classifier.train()
        steps, done = self._schedule.number_steps(self._epoch), self._begun.steps
        batches = self._train.iterate_epoch(
            batch_size=config.batch_size, seed=config.seed, epoch=self._epoch, first_step=done
        )
        total = torch.tensor(self._begun.summed_loss, dtype=torch.float64, device=self._ranks.device)
        if not self._ranks.is_main:
            total.zero_()  # the sum restored from a checkpoint counts once
        clipped = torch.tensor(self._begun.clipped, device=self._ranks.device)
        losses = FiniteLosses(self._ranks, self._describe_not_finite)
        for taken, batch in enumerate(_time_waits(batches, timing), start=done):
            # Seed once the batch is there: a DataLoader draws a number when it starts.
            if taken == done or (config.save_steps and taken % config.save_steps == 0):
                seed_dropout(config.seed, self._epoch, self._ranks.rank, taken)
            step = steps[taken]
            result = self._step.run(batch, config.scale_rates(step, self._schedule.steps))
            total += result.summed
            clipped += result.clipped
            bar.update(batch.global_size)
            losses.note(step + 1, batch.rows, result.finite)
            if config.save_steps and (taken + 1) % config.save_steps == 0 and taken + 1 < len(steps):
                losses.check()
                self._save_begun(taken + 1, total, clipped)
        losses.check()
        dist.all_reduce(total)
        self._begun = Begun()
        timing.train_s = time.perf_counter() - started
        tiles = self._schedule.tiles[self._epoch]
        figures = {"train_loss": float(total) / (tiles * len(self._meta.class_ids))}
        if config.repeat_factor:
            figures["train_tiles"] = tiles
        if config.clip_norm is not None:
            figures["clipped_share"] = int(clipped) / len(steps)
        return figures

    def _save_begun(self, steps: int, total: torch.Tensor, clipped: torch.Tensor) -> None:
        """Save `last/` after so many steps of an epoch."""
        everywhere = total.clone()
        dist.all_reduce(everywhere)
        self._begun = Begun(steps, float(everywhere), int(clipped))
        tensors, optimizer = self._gather(optimizer=True)

        def save() -> None:
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise TrainError(
                    f"the weights are no longer finite in epoch {self._epoch + 1}, after step {steps:,}: lower --lr, "
                    "or train without --amp; the checkpoints are as they were"
                )
            self._save(self._run.last, tensors, optimizer)
            self._run.upload()

        self._ranks.run_on_main(save)

    def _describe_not_finite(self, step: int, rows: list[int]) -> TrainError:
        return TrainError(
            f"the loss is not finite in epoch {self._epoch + 1}, step {step:,} of {self._schedule.steps:,}, for "
            f"{self._train.rows.describe(rows)} of a batch of {self.config.batch_size:,}: lower --lr, train "
            "without --amp, or check these tiles; the checkpoints are as they were"
        )

    def _close_epoch(
        self, logits: torch.Tensor | None, trained: dict[str, float], timing: EpochTiming, started: float
    ) -> "_ClosedEpoch":
        """On rank 0, score the validation rows and write the figures; return what is to be saved."""
        assert logits is not None
        # The last step of an epoch can spoil the weights although its loss was still finite.
        spoilt = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if spoilt:
            raise TrainError(
                f"the model gives NaN or infinity after epoch {self._epoch}, for {self._val.rows.describe(spoilt)} of "
                f"{len(logits):,} validation tiles: lower --lr, or train without --amp; the checkpoints are as they "
                "were"
            )
        metrics = score_epoch(logits, self._val.rows, self._val.counted, loss=self._loss)
        timing.val_s = time.perf_counter() - started
        figures = {name: value for name, value in metrics.items() if name != "per_class"}
        figures |= average_rarest(metrics, self._rarest)
        self._run.append_history(
            {"epoch": self._epoch, "lr": self._step.optimizer.param_groups[0]["lr"], **trained, **figures}
        )
        cost = {**timing.__dict__, **report_device_peak(self._ranks.device)}
        self._run.append_timing({"epoch": self._epoch, **cost, "tiles": self._schedule.tiles[self._epoch - 1]})
        value = metrics[self.config.best_by]
        if value is None:
            raise TrainError("no validation tile shows any class: no epoch can be the best; give a larger VAL_CACHE")
        best = self._best is None or value > self._best
        if best:
            self._best, self._best_epoch = value, self._epoch
        over = self._is_over()
        return _ClosedEpoch(metrics, best, over or self._epoch % self.config.save_every == 0, over)

    def _save_epoch(self, closed: "_ClosedEpoch", tensors: _Tensors, optimizer: _Optimizer) -> None:
        """On rank 0, write the checkpoints that are due."""
        if closed.best:
            self._save(self._run.best, tensors, None)
        if closed.due:
            sync(self._run.history)  # without its history line a checkpoint cannot be resumed
            self._save(self._run.last, tensors, optimizer)
            self._run.upload()

    def _tell(
        self, closed: "_ClosedEpoch", loss: float, timing: EpochTiming, bar: "tqdm[Any]", note: Callable[[str], None]
    ) -> None:
        """Print one line about the epoch."""
        shown = FIGURES["loss"].describe(loss)
        scored = [(FIGURES[key], closed.metrics[key]) for key in ("f1_weighted", "map_macro")]
        bar.set_postfix_str(
            ", ".join([shown, *(figure.describe(value, digits=3) for figure, value in scored)]), refresh=False
        )
        note(
            f"epoch {self._epoch}/{self.config.epochs}: {shown}, val "
            f"{', '.join(figure.describe(value) for figure, value in scored)}; {timing.train_s:.2f} s, "
            f"{len(self._train) / timing.train_s:,.0f} tiles/s, {100 * timing.wait_s / timing.train_s:.0f} % of it "
            "waiting for tiles"
        )

    def _gather(self, *, optimizer: bool) -> tuple[_Tensors, _Optimizer]:
        """Gather what rank 0 saves; every rank must call this."""
        tensors = gather_tensors(self.classifier.trained_tensors(), self._ranks)
        return tensors, gather_state(self._step.optimizer, self._ranks) if optimizer else None

    def _save(self, directory: Path, tensors: _Tensors, optimizer: _Optimizer) -> None:
        meta = self._meta.at_epoch(self._epoch, self._best, self._best_epoch, self._begun)
        save_checkpoint(directory, tensors, meta, optimizer)


def seed_dropout(seed: int, epoch: int, rank: int, steps: int = 0) -> None:
    """Seed dropout from these four numbers alone, so that a resumed run repeats its draws."""
    torch.manual_seed(((seed * 1_000_003 + epoch) * 8_191 + rank) ^ (steps << 40))


@dataclass(frozen=True, eq=False)
class _ClosedEpoch:
    """An epoch: its metrics, whether it is the best so far, whether `last/` is due, and whether training is over."""

    metrics: dict[str, Any]
    best: bool
    due: bool
    over: bool


def _time_waits(batches: Iterator[Batch], timing: EpochTiming) -> Iterator[Batch]:
    """Yield the batches; count the seconds spent waiting for each."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        timing.wait_s += time.perf_counter() - started
        if batch is None:
            return
        yield batch

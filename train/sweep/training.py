"""Train the heads of a sweep in passes: each batch of a pass is read once, and every head of the pass trains on it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from cache_schema.layout import BoolArray
from train.config import TrainConfig
from train.data.batches import Tiles
from train.loop.trainer import seed_dropout
from train.loop.validation import ValidationSet
from train.metrics.figures import KEY_FIGURES
from train.metrics.intervals import score_resamples
from train.metrics.scores import Float64Array
from train.model.classifier import Head, draw_dropout, join_features

from .grid import describe_loss
from .ranking import CountArray, HeadResult, assign_folds, choose_epochs, score_counts
from .stacked_heads import Stack, StackedHeads

STATE_BYTES = 2 << 30
"""Memory of all heads of a pass, with gradients, moments and best epochs; further heads train in further passes."""
ACTIVATION_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Memory of the widest layer of a stack: fits in a CPU's cache, and is enough to keep a GPU busy."""
_COPIES = 6  # parameters, gradients, two moments, best epoch's parameters and their replacement

Members = tuple[TrainConfig, ...]
MakeHead = Callable[[TrainConfig], Head]


def plan_passes(
    configs: Sequence[TrainConfig], seeds: Sequence[int], make_head: MakeHead, device: torch.device
) -> list[list[Members]]:
    """Decide which heads train together; return for each pass its stacks, and for each stack its members.

    A pass has one seed, since heads of one seed see the same batches. A stack has one shape, with members grouped by
    loss.

    Args:
        configs: configurations with the first seed.
        seeds: seeds to train each configuration with.
        make_head: makes an initial head; called once per shape, on the meta device.
    """
    passes: list[list[Members]] = [[]]
    room = STATE_BYTES
    for _, group in groupby(sorted(configs, key=_order), _shape):
        members = tuple(group)
        with torch.device("meta"):
            tensors = list(make_head(members[0]).parameters())
        state = _COPIES * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        layer = members[0].batch_size * len(tensors[0]) * tensors[0].element_size()
        for stack in _split(members, max(1, min(ACTIVATION_BYTES[device.type] // layer, STATE_BYTES // state))):
            if passes[-1] and len(stack) * state > room:
                passes.append([])
                room = STATE_BYTES
            room -= len(stack) * state
            passes[-1].append(stack)
    return [
        [tuple(replace(config, seed=seed) for config in stack) for stack in stacks]
        for seed in seeds
        for stacks in passes
    ]


def _shape(config: TrainConfig) -> tuple[str, int]:
    return config.features, config.hidden_width


def _order(config: TrainConfig) -> tuple[str, int, str]:
    return *_shape(config), describe_loss(config)


def _split(members: Members, most: int) -> list[Members]:
    """Split members into as few stacks of at most `most` as possible, of about equal size."""
    size = math.ceil(len(members) / math.ceil(len(members) / most))
    return [members[start : start + size] for start in range(0, len(members), size)]


@dataclass(frozen=True, eq=False)
class Folds:
    """Validation rows in folds of scenes.

    Attributes:
        weights: (n, K) float32 on the device: 1 in the row's fold; all 0 for a row left out of the main figures.
        labels: (n, C) bool on the device.
        support: (K, C) number of positives.
    """

    weights: Tensor
    labels: Tensor
    support: CountArray

    @classmethod
    def make(cls, val: ValidationSet, seed: int, device: torch.device) -> "Folds":
        """Assign the rows of the main figures to folds."""
        fold = assign_folds(val.rows.scenes[val.counted], seed)
        weights = np.zeros((len(val.rows), int(fold.max()) + 1), np.float32)
        weights[np.flatnonzero(val.counted), fold] = 1
        support = np.stack([val.rows.labels[column > 0].sum(axis=0) for column in weights.T])
        return cls(torch.from_numpy(weights).to(device), torch.from_numpy(val.rows.labels).to(device), support)


@dataclass(frozen=True, eq=False)
class Progress:
    """Results of the M members of a stack so far.

    Attributes:
        history: per epoch (M, K, 2, C) counts, see `score_counts`.
        sound: (M,) bool, members whose logits were always finite.
        value: (M,) highest weighted F1.
        tensors: stacked parameters of that epoch.
    """

    history: tuple[CountArray, ...]
    sound: BoolArray
    value: Float64Array
    tensors: dict[str, Tensor]

    @classmethod
    def begin(cls, stack: Stack) -> Self:
        members = len(stack.configs)
        return cls((), np.ones(members, bool), np.full(members, -np.inf), {})

    def after(self, counts: CountArray, finite: BoolArray, heads: StackedHeads, support: CountArray) -> "Progress":
        """Return the results after one more epoch; members at a new best keep their current tensors."""
        sound = self.sound & finite
        value, _ = score_counts(counts.sum(axis=1), support.sum(axis=0))
        better = (value > self.value) & sound
        tensors = {
            name: _choose(better, now.detach(), self.tensors.get(name, now)) for name, now in heads.tensors.items()
        }
        return Progress((*self.history, counts), sound, np.where(better, value, self.value), tensors)


def _choose(chosen: BoolArray, new: Tensor, old: Tensor) -> Tensor:
    """Take the chosen members (M, …) from `new` and the others from `old`; always a copy: `new` keeps changing."""
    where = torch.from_numpy(chosen).to(new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(where, new, old.detach())


class SweepPass:
    """Trains the heads of one seed, epoch by epoch, all of them on each batch.

    Attributes:
        members: number of heads.
        progress: of each stack, as of the last finished epoch.

    Args:
        stacks: the members of each stack.
        train, val: rows with all `joined` features.
        joined: names of the pooled arrays, in the order of the inputs' columns.
        make_head: makes the initial head of a shape and seed.
        amp: autocast to bf16 in training.
    """

    def __init__(
        self,
        stacks: Sequence[Members],
        train: Tiles,
        val: ValidationSet,
        folds: Folds,
        joined: tuple[str, ...],
        make_head: MakeHead,
        *,
        amp: bool,
    ) -> None:
        device = folds.labels.device
        self.members = sum(map(len, stacks))
        self._config = stacks[0][0]
        self._stacks = [Stack(members, make_head(members[0]), device, amp=amp) for members in stacks]
        self._train, self._val, self._folds, self._joined, self._amp = train, val, folds, joined, amp
        self.progress = [Progress.begin(stack) for stack in self._stacks]

    @property
    def seed(self) -> int:
        return self._config.seed

    @property
    def epochs(self) -> int:
        """Number of finished epochs."""
        return len(self.progress[0].history)

    def train(self, bar: "tqdm[Any]") -> None:
        """Train every epoch; `progress` stays consistent if a signal interrupts."""
        while self.epochs < self._config.epochs:
            self._train_epoch(bar)
            counted = self._count()
            self.progress = [
                progress.after(counts, finite, stack.heads, self._folds.support)
                for progress, stack, (counts, finite) in zip(self.progress, self._stacks, counted, strict=True)
            ]

    def _train_epoch(self, bar: "tqdm[Any]") -> None:
        config, epoch = self._config, self.epochs
        steps = math.ceil(len(self._train) / config.batch_size)
        seed_dropout(config.seed, epoch, 0)
        hidden = max(stack.hidden for stack in self._stacks)
        batches = self._train.iterate_epoch(batch_size=config.batch_size, seed=config.seed, epoch=epoch)
        for step, batch in enumerate(batches, start=epoch * steps):
            scale = config.scale_rates(step, config.epochs * steps)
            mask = None
            if hidden and config.dropout:
                # The same draw as the dropout of a single head of that width.
                shape, dtype = (len(batch.inputs), hidden), torch.bfloat16 if self._amp else torch.float32
                mask = draw_dropout(shape, config.dropout, device=batch.inputs.device, dtype=dtype)
            views = self._take_features(batch.inputs)
            for stack in self._stacks:
                stack.train_step(views[stack.features], batch.labels, mask, scale)
            bar.update(batch.global_size * self.members)

    def _take_features(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the (B, F) float32 columns for each choice of features."""
        parts = dict(zip(self._joined, inputs.float().chunk(len(self._joined), dim=1), strict=True))
        choices = {stack.features for stack in self._stacks}
        return {choice: join_features(parts, tuple(choice.split("+"))) for choice in choices}

    @torch.inference_mode()
    def _count(self) -> list[tuple[CountArray, BoolArray]]:
        """Count hits and decisions by fold, (M, K, 2, C) per stack, and check that all logits are finite, (M,)."""
        totals: list[Tensor] = [torch.zeros(())] * len(self._stacks)
        finite: list[Tensor] = [torch.ones((), dtype=torch.bool)] * len(self._stacks)
        for rows, views in self._iterate_val():
            weights, labels = self._folds.weights[rows], self._folds.labels[rows]
            for i, stack in enumerate(self._stacks):
                logits = stack.heads(views[stack.features])
                preds = logits.sigmoid() >= 0.5
                decided = torch.stack([preds & labels, preds], dim=2).float()
                totals[i] = totals[i] + torch.einsum("bk,mbsc->mksc", weights, decided).double()
                finite[i] = finite[i] & logits.isfinite().all(dim=(1, 2))
        return [
            (total.cpu().numpy().astype(np.int64), known.cpu().numpy())
            for total, known in zip(totals, finite, strict=True)
        ]

    def _iterate_val(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield validation rows and their features, at most a training batch at once."""
        start = 0
        for share in self._val.tiles.iterate_share():
            for inputs in share.split(self._config.batch_size):
                yield slice(start, start + len(inputs)), self._take_features(inputs)
                start += len(inputs)

    def collect(self, *, keep: bool) -> tuple[list[HeadResult], list[TrainConfig]]:
        """Return the results of sound heads, with tensors if `keep`, and the configurations of those that diverged."""
        results, failed = [], []
        for stack, progress in zip(self._stacks, self.progress, strict=True):
            history = np.stack(progress.history)
            for m, config in enumerate(stack.configs):
                if not progress.sound[m]:
                    failed.append(config)
                    continue
                best = {name: tensor[m : m + 1] for name, tensor in progress.tensors.items()}
                figures = self._score(StackedHeads(best), stack.features)
                weighted, _ = score_counts(history[:, m].sum(axis=1), self._folds.support.sum(axis=0))
                others, own = choose_epochs(history[:, m], self._folds.support)
                tensors = {name: tensor[0].cpu().clone() for name, tensor in best.items()} if keep else None
                results.append(HeadResult(config, int(weighted.argmax()) + 1, figures, others, own, tensors))
        return results, failed

    @torch.inference_mode()
    def _score(self, heads: StackedHeads, features: str) -> dict[str, float]:
        """Score a single head on the rows of the main figures."""
        val = self._val
        logits = torch.cat([heads(views[features])[0].cpu() for _, views in self._iterate_val()])
        probs: npt.NDArray[np.float32] = logits.sigmoid().numpy()[val.counted]
        whole = np.zeros(len(probs), np.intp), np.ones((1, 1))
        scores = score_resamples(probs, val.rows.labels[val.counted], *whole)
        return {key: float(scores[key][0]) for key in KEY_FIGURES}

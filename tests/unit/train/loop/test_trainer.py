"""The loop against one written out here: schedule, batches, loss, best epoch, checkpoints, and resuming."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.ranks.group import Ranks, join_ranks
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from tests.vectors import make_meta
from train.config import TrainConfig
from train.data.batches import Batch, epoch_order
from train.data.labels import LabelledRows
from train.errors import CheckpointError, TrainError
from train.loop.schedule import MIN_EPOCH_STEPS, choose_batch_size
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.model.classifier import Classifier, Head
from train.model.optimizer import make_optimizer, scale_learning_rate
from train.model.shards import load_tensors
from train.runs.checkpoint import load_checkpoint
from train.runs.directory import RunDirectory
from train.runs.resume import load_last

WIDTH, CLASSES = 6, 4


@pytest.mark.parametrize("steps, warmup", [(1, 0.0), (7, 0.05), (100, 0.05), (1000, 0.1), (10, 0.9)])
def test_the_rate_rises_in_a_line_then_falls_as_half_a_cosine(steps: int, warmup: float) -> None:
    scales = [scale_learning_rate(step, steps, warmup) for step in range(steps)]
    rising = max(1, round(warmup * steps))
    assert scales[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)], abs=1e-12)
    falling = [0.5 * (1 + math.cos(math.pi * i / (steps - rising))) for i in range(steps - rising)]
    assert scales[rising:] == pytest.approx(falling, abs=1e-12)
    assert max(scales) == 1.0
    assert min(scales) > 0  # no step is wasted


@pytest.mark.parametrize(
    "rows, asked, expected",
    [
        (100_000, 1024, 1024),
        (20_480, 1024, 1024),
        (20_479, 1024, 512),
        (640, 64, 32),
        (1, 1024, 1),
        (0, 8, 1),
        (5, 3, 1),
    ],
)
def test_the_batch_is_halved_until_an_epoch_has_enough_steps(rows: int, asked: int, expected: int) -> None:
    chosen = choose_batch_size(rows, asked)
    assert chosen == expected
    assert chosen == 1 or rows / chosen >= MIN_EPOCH_STEPS
    assert choose_batch_size(rows, chosen) == chosen  # so a resumed run keeps it


def test_layers_and_head_have_rates_of_their_own(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    backbone = Backbone.load(find_checkpoint(str(path)), precision="float32", device=torch.device("cpu"))
    rates = {"lr": 3e-4, "backbone_lr": 2e-5, "layer_decay": 1.0, "weight_decay": 0.03}
    classifier = Classifier(Head(64, CLASSES, hidden=8, dropout=0.0), backbone, ("cls",))
    assert [group["peak_lr"] for group in make_optimizer(classifier, **rates).param_groups] == [3e-4]
    backbone.unfreeze_last(2)
    optimizer = make_optimizer(classifier, **rates)
    head, *layers = optimizer.param_groups
    assert (head["peak_lr"], *(layer["peak_lr"] for layer in layers)) == (3e-4, 2e-5, 2e-5)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}
    assert [id(p) for p in head["params"]] == [id(p) for p in classifier.head.parameters()]
    expected = {id(p) for p in backbone.parameters() if p.requires_grad}
    assert len(expected) > 30
    assert {id(p) for layer in layers for p in layer["params"]} == expected


def test_each_layer_below_the_last_learns_more_slowly(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    backbone = Backbone.load(find_checkpoint(str(path)), precision="float32", device=torch.device("cpu"))
    backbone.unfreeze_last(3)
    classifier = Classifier(Head(64, CLASSES, hidden=8, dropout=0.0), backbone, ("cls",))
    rates = {"lr": 3e-4, "backbone_lr": 2e-5, "layer_decay": 0.5, "weight_decay": 0.01}
    rate_of = {
        id(parameter): group["peak_lr"]
        for group in make_optimizer(classifier, **rates).param_groups
        for parameter in group["params"]
    }
    for module, rate in zip((*backbone.layers[1:], backbone.vit.norm), (5e-6, 1e-5, 2e-5, 2e-5), strict=True):
        assert {rate_of.pop(id(parameter)) for parameter in module.parameters()} == {rate}
    assert set(rate_of.values()) == {3e-4}


def test_tensors_of_another_model_are_refused() -> None:
    classifier = Classifier(Head(WIDTH, CLASSES, hidden=8, dropout=0.0), None, ("cls",))
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    for tensors in ({"head.0.weight": torch.zeros(8, WIDTH + 1)}, {"backbone.vit.norm.weight": torch.zeros(3)}):
        with pytest.raises(CheckpointError, match="does not fit this model"):
            load_tensors(classifier, {"head.0.bias": torch.ones(8), **tensors})
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    load_tensors(classifier, {"head.0.bias": torch.ones(8)})
    assert classifier.state_dict()["head.0.bias"].tolist() == [1.0] * 8


class Rows:
    """Random rows in memory, in the loop's own order."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(rows, WIDTH, generator=generator)
        self.drawn: list[int] = []
        self.labels = self.inputs @ torch.randn(WIDTH, CLASSES, generator=generator) > 0.7
        self.rows = LabelledRows(
            index=100 + np.arange(rows),
            tiles=np.array([f"t{i}" for i in range(rows)]),
            scenes=np.array([f"s{i % 4}" for i in range(rows)]),
            labels=self.labels.numpy(),
            reading="type",
            class_ids=tuple(range(CLASSES)),
            class_names=tuple(f"class {c}" for c in range(CLASSES)),
            notes=(),
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for rows in epoch_order(len(self), seed, epoch).split(batch_size)[first_step:]:
            self.drawn.append(len(rows))
            yield Batch(self.inputs[rows], self.labels[rows], rows, len(rows))

    @property
    def share(self) -> torch.Tensor:
        return torch.arange(len(self))

    def iterate_share(self) -> Iterator[torch.Tensor]:
        yield from self.inputs.split(10)


def make_trainer(
    tmp_path: Path, ranks: Ranks, seed: int, *, init: int | None = None, **options: Any
) -> tuple[Trainer, Rows, Rows]:
    train, val = Rows(47, seed), Rows(23, seed)
    run = RunDirectory.create(str(tmp_path / "head"))
    settings: dict[str, Any] = {
        "epochs": 4,
        "batch_size": 8,
        "lr": 0.02,
        "hidden": 8,
        "dropout": 0.0,
        "seed": 5,
        "amp": False,
    }
    config = TrainConfig(cache="c", run=str(tmp_path / "head"), **(settings | options))
    meta = make_meta(val.rows, config)
    torch.manual_seed(seed if init is None else init)
    classifier = Classifier(Head(WIDTH, CLASSES, hidden=8, dropout=config.dropout), None, ("cls",))
    counted = np.ones(len(val), bool)
    return Trainer(classifier, train, ValidationSet(val, val.rows, counted), config, meta, run, ranks), train, val


def reference_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Lin et al. 2017, with alpha 0.65 on the positives and gamma 2, from probabilities."""
    probs = logits.sigmoid()
    right = torch.where(labels, probs, 1 - probs)
    weight = torch.where(labels, 0.65, 0.35)
    return -(weight * (1 - right) ** 2 * right.log()).mean()


def test_training_equals_a_loop_written_out(tmp_path: Path) -> None:
    """Float32 here and there: 4 epochs of 6 steps agree within 1e-5."""
    seed = fresh_seed()
    with join_ranks("cpu") as ranks:
        trainer, train, val = make_trainer(tmp_path, ranks, seed)
        trainer.fit(print)
    torch.manual_seed(seed)
    head = Head(WIDTH, CLASSES, hidden=8, dropout=0.0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.01)
    lines, states = [], []
    for epoch in range(4):
        total = 0.0
        for i, rows in enumerate(epoch_order(47, 5, epoch).split(8)):
            optimizer.param_groups[0]["lr"] = 0.02 * scale_learning_rate(epoch * 6 + i, 24, 0.05)
            loss = reference_loss(head(train.inputs[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        val_loss = reference_loss(head(val.inputs), val.labels).item()
        lines.append((epoch + 1, optimizer.param_groups[0]["lr"], total / 47, val_loss))
        states.append({name: tensor.clone() for name, tensor in head.state_dict().items()})
    run = RunDirectory(tmp_path / "head-001")
    history = run.read_history()
    written = [(line["epoch"], line["lr"], line["train_loss"], line["loss"]) for line in history]
    np.testing.assert_allclose(written, lines, rtol=1e-5, atol=1e-7)
    last, best = load_checkpoint(run.last), load_checkpoint(run.best)
    for name, tensor in states[-1].items():
        np.testing.assert_allclose(last.tensors[f"head.{name}"], tensor, atol=1e-5)
    # The best epoch is the first with the highest value, and its weights are those of that epoch.
    scores = [line["f1_weighted"] for line in history]
    expected = int(np.argmax(scores)) + 1
    assert best.meta.epoch == best.meta.best_epoch == last.meta.best_epoch == expected
    assert best.meta.best == last.meta.best == max(scores)
    for name, tensor in states[expected - 1].items():
        np.testing.assert_allclose(best.tensors[f"head.{name}"], tensor, atol=1e-5)


def test_the_best_epoch_is_by_what_was_asked_for(tmp_path: Path) -> None:
    with join_ranks("cpu") as ranks:
        trainer, _, _ = make_trainer(tmp_path, ranks, fresh_seed(), best_by="map_macro", epochs=6)
        trainer.fit(print)
    run = RunDirectory(tmp_path / "head-001")
    scores = [line["map_macro"] for line in run.read_history()]
    assert load_checkpoint(run.best).meta.best == max(scores)
    assert load_checkpoint(run.best).meta.epoch == int(np.argmax(scores)) + 1


class StopHereError(Exception):
    """Stands for a run that ends before its time."""


@pytest.mark.parametrize("stop, save_every, resumes_at", [(1, 1, 1), (3, 1, 3), (5, 2, 4), (4, 3, 3)])
def test_a_resumed_run_writes_the_same_history(tmp_path: Path, stop: int, save_every: int, resumes_at: int) -> None:
    """With dropout: its draws must not depend on what came before."""
    seed, options = fresh_seed(), {"dropout": 0.3, "epochs": 6, "save_every": save_every}
    with join_ranks("cpu") as ranks:
        whole, _, _ = make_trainer(tmp_path / "whole", ranks, seed, **options)
        whole.fit(print)
        stopped, _, _ = make_trainer(tmp_path / "stopped", ranks, seed, **options)

        def note(line: str) -> None:
            if line.startswith(f"epoch {stop}/"):
                raise StopHereError

        with pytest.raises(StopHereError):
            stopped.fit(note)
        torch.rand(17)
        run = RunDirectory(tmp_path / "stopped" / "head-001")
        checkpoint, _ = load_last(run.path)
        assert checkpoint.meta.epoch == resumes_at
        run.cut_history(resumes_at)
        again, _, _ = make_trainer(tmp_path / "again", ranks, seed, init=seed + 1, **options)
        again._run = run
        again.restore(checkpoint)
        again.fit(print)
    first, second = tmp_path / "whole" / "head-001", run.path
    assert (first / "history.jsonl").read_bytes() == (second / "history.jsonl").read_bytes()
    for name in ("best", "last"):
        a, b = load_checkpoint(first / name), load_checkpoint(second / name)
        assert a.meta == b.meta
        assert all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())


@pytest.mark.parametrize("stop_after, save_steps, epoch, steps", [(3, 2, 0, 2), (11, 2, 1, 4), (13, 5, 2, 0)])
def test_a_run_stopped_within_an_epoch_goes_on_from_there(
    tmp_path: Path, stop_after: int, save_steps: int, epoch: int, steps: int
) -> None:
    """Epochs of 6 steps, with dropout and clipping; what was trained before the checkpoint is not trained again."""
    seed, options = fresh_seed(), {"dropout": 0.3, "save_steps": save_steps, "clip_norm": 0.1}
    with join_ranks("cpu") as ranks:
        whole, _, _ = make_trainer(tmp_path / "whole", ranks, seed, **options)
        whole.fit(print)
        stopped, _, _ = make_trainer(tmp_path / "stopped", ranks, seed, **options)
        step, taken = stopped._step.run, iter(range(stop_after))

        def run(*args: Any) -> Any:
            if next(taken, None) is None:
                raise StopHereError
            return step(*args)

        stopped._step.run = run  # type: ignore[method-assign]
        with pytest.raises(StopHereError):
            stopped.fit(print)
        torch.rand(17)
        directory = RunDirectory(tmp_path / "stopped" / "head-001")
        checkpoint, _ = load_last(directory.path)
        assert (checkpoint.meta.epoch, checkpoint.meta.begun.steps) == (epoch, steps)
        directory.cut_history(epoch)
        again, train, _ = make_trainer(tmp_path / "again", ranks, seed, init=seed + 1, **options)
        again._run = directory
        again.restore(checkpoint)
        again.fit(print)
    assert len(train.drawn) == 4 * 6 - 6 * epoch - steps
    first, second = tmp_path / "whole" / "head-001", directory.path
    assert (first / "history.jsonl").read_bytes() == (second / "history.jsonl").read_bytes()
    a, b = load_checkpoint(first / "last"), load_checkpoint(second / "last")
    assert a.meta == b.meta
    assert all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())


def test_a_checkpoint_without_optimiser_state_cannot_be_resumed(tmp_path: Path) -> None:
    with join_ranks("cpu") as ranks:
        trainer, _, _ = make_trainer(tmp_path, ranks, 0, epochs=1)
        trainer.fit(print)
        with pytest.raises(CheckpointError, match="cannot be resumed"):
            trainer.restore(load_checkpoint(tmp_path / "head-001" / "best"))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rows(tmp_path: Path, value: float) -> None:
    """In the third epoch: the rows of the first bad batch alone, not the NaN that follows it everywhere."""
    seed, run = fresh_seed(), RunDirectory(tmp_path / "head-001")
    with join_ranks("cpu") as ranks:
        trainer, train, _ = make_trainer(tmp_path, ranks, seed)
        iterate, order = train.iterate_epoch, epoch_order(47, 5, 2)
        bad = [int(order[8 * 2 + 1]), int(order[8 * 2 + 6])]  # in the third batch
        kept: dict[str, bytes] = {}

        def spoil_the_third(*, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
            if epoch == 2:
                kept.update({str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()})
                train.inputs[bad] = value
            return iterate(batch_size=batch_size, seed=seed, epoch=epoch)

        train.iterate_epoch = spoil_the_third  # type: ignore[method-assign]
        named = ", ".join(f"{100 + row} (t{row})" for row in sorted(bad))
        message = f"not finite in epoch 3, step 15 of 24, for rows {named} of a batch of 8: lower --lr"
        with pytest.raises(TrainError, match=re.escape(message)):
            trainer.fit(print)
    assert {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == kept
    assert load_checkpoint(run.last).meta.epoch == 2


def test_weights_spoilt_by_an_epochs_last_step_end_the_run(tmp_path: Path) -> None:
    with join_ranks("cpu") as ranks:
        trainer, _, val = make_trainer(tmp_path, ranks, 0)
        val.inputs[2] = torch.nan  # as if from the weights: the training loss stays finite
        message = r"NaN or infinity after epoch 1, for row 102 \(t2\) of 23 validation tiles: lower --lr"
        with pytest.raises(TrainError, match=message):
            trainer.fit(print)
    assert not (tmp_path / "head-001" / "history.jsonl").exists()


def test_a_validation_set_without_positives_cannot_choose_an_epoch(tmp_path: Path) -> None:
    with join_ranks("cpu") as ranks:
        trainer, _, val = make_trainer(tmp_path, ranks, 0)
        val.labels[:] = False
        with pytest.raises(TrainError, match="larger VAL_CACHE"):
            trainer.fit(print)

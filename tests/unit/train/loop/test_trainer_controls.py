"""Weights, repeats, clipping and early stopping in the loop: against one written out here, and resumed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.ranks.group import Ranks, join_ranks
from tests.planted import fresh_seed
from tests.vectors import hold, make_meta, plant_vectors
from train.config import TrainConfig
from train.data.batches import count_epoch, draw_epoch
from train.data.cached import open_cached_tiles
from train.data.labels import LabelledCache, LabelledRows
from train.data.rare import compute_class_weights, compute_repeat_factors
from train.loop.determinism import deterministic_algorithms
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.model.classifier import Classifier, Head
from train.model.optimizer import scale_learning_rate
from train.runs.checkpoint import load_checkpoint
from train.runs.directory import RunDirectory
from train.runs.resume import load_last

WIDTH, CLASSES, BATCH = 16, 8, 32
CONTROLS = {"class_weights": "balanced", "repeat_factor": 0.2, "clip_norm": 0.01, "dropout": 0.2}


def make_cache(seed: int, rows: int, *, threshold: float = 0.0) -> LabelledCache:
    vectors, labels = plant_vectors(np.random.default_rng(seed), rows, width=WIDTH)
    labelled = LabelledRows(
        index=np.arange(rows),
        tiles=np.array([f"t{i}" for i in range(rows)]),
        scenes=np.array([f"s{i % 6}" for i in range(rows)]),
        labels=labels,
        reading="type",
        class_ids=tuple(range(CLASSES)),
        class_names=tuple(f"class {c}" for c in range(CLASSES)),
        notes=(),
    )
    if threshold:
        labelled = replace(labelled, repeat_factors=compute_repeat_factors(labels, threshold))
    nothing: Any = None
    return LabelledCache(nothing, hold(vectors), labelled)


def make_head(seed: int, dropout: float = 0.0) -> Head:
    torch.manual_seed(seed)
    return Head(WIDTH, CLASSES, hidden=12, dropout=dropout)


def make_trainer(root: Path, ranks: Ranks, seed: int, *, init: int | None = None, **options: Any) -> Trainer:
    run = RunDirectory.create(str(root / "head"))
    settings: dict[str, Any] = {
        "epochs": 5,
        "batch_size": BATCH,
        "lr": 0.02,
        "hidden": 12,
        "dropout": 0.0,
        "seed": 5,
        "amp": False,
    }
    config = TrainConfig(cache="c", run=str(root / "head"), **(settings | options))
    train, val = make_cache(seed, 150, threshold=config.repeat_factor), make_cache(seed + 1, 60)
    meta = make_meta(val.rows, config)
    classifier = Classifier(make_head(seed if init is None else init, config.dropout), None, ("cls",))
    tiles, val_tiles = (open_cached_tiles(cache, ranks) for cache in (train, val))
    validation = ValidationSet(val_tiles, val.rows, np.ones(60, bool))
    return Trainer(classifier, tiles, validation, config, meta, run, ranks)


def test_weights_repeats_and_clipping_equal_a_loop_written_out(tmp_path: Path) -> None:
    """Float32 here and there: 5 epochs agree within 1e-4."""
    seed, clip = fresh_seed(), 0.02
    options = {"class_weights": "effective", "repeat_factor": 0.2, "clip_norm": clip}
    with join_ranks("cpu") as ranks:
        make_trainer(tmp_path, ranks, seed, **options).fit(print)
    cache = make_cache(seed, 150, threshold=0.2)
    inputs, labels = cache.vectors.gather(torch.arange(150)).float(), torch.from_numpy(cache.rows.labels)
    weights = torch.from_numpy(compute_class_weights(cache.rows.labels, "effective"))
    head = make_head(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.01)
    orders = [draw_epoch(cache.rows, 5, epoch) for epoch in range(5)]
    steps, step, expected = sum(math.ceil(len(order) / BATCH) for order in orders), 0, []
    for order in orders:
        total, clipped = 0.0, []
        for rows in order.split(BATCH):
            optimizer.param_groups[0]["lr"] = 0.02 * scale_learning_rate(step, steps, 0.05)
            probs = head(inputs[rows]).sigmoid()
            positive = -0.65 * weights * (1 - probs) ** 2 * probs.log()
            loss = torch.where(labels[rows], positive, -0.35 * probs**2 * (1 - probs).log()).mean()
            optimizer.zero_grad()
            loss.backward()
            gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
            norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
            for gradient in gradients:
                gradient *= min(1.0, clip / norm)
            clipped.append(norm > clip)
            optimizer.step()
            total, step = total + loss.item() * len(rows), step + 1
        lr = optimizer.param_groups[0]["lr"]
        expected.append((total / len(order), lr, len(order), sum(clipped) / len(clipped)))
    assert len({row[2] for row in expected}) > 1
    history = RunDirectory(tmp_path / "head-001").read_history()
    keys = ("train_loss", "lr", "train_tiles", "clipped_share")
    np.testing.assert_allclose([[line[key] for key in keys] for line in history], expected, rtol=1e-4)
    last = load_checkpoint(tmp_path / "head-001" / "last")
    for name, tensor in head.state_dict().items():
        np.testing.assert_allclose(last.tensors[f"head.{name}"], tensor, atol=1e-4)
    timings = RunDirectory(tmp_path / "head-001").read_timings()
    assert [line["tiles"] for line in timings] == [len(order) for order in orders]


def test_without_the_options_history_has_no_trace_of_them(tmp_path: Path) -> None:
    with join_ranks("cpu") as ranks:
        make_trainer(tmp_path, ranks, fresh_seed(), epochs=1).fit(print)
    (line,) = RunDirectory(tmp_path / "head-001").read_history()
    assert not {"train_tiles", "clipped_share"} & set(line)
    rarest = [line["f1_macro_rarest"], line["map_macro_rarest"]]
    assert rarest == pytest.approx([line["f1_macro"], line["map_macro"]])  # there are but eight classes


@pytest.mark.parametrize("save_every", [1, 4])
def test_training_ends_when_patience_does(tmp_path: Path, save_every: int) -> None:
    """The best epoch is the first with the highest figure, so an equal one does not count as better."""
    said: list[str] = []
    with join_ranks("cpu") as ranks:
        make_trainer(tmp_path, ranks, fresh_seed(), epochs=60, patience=3, save_every=save_every).fit(said.append)
    run = RunDirectory(tmp_path / "head-001")
    history = run.read_history()
    scores = [line["f1_weighted"] for line in history]
    best = int(np.argmax(scores)) + 1
    assert len(history) == best + 3 < 60
    # Not before: at no earlier epoch was the best one three back.
    assert all(epoch - 1 - int(np.argmax(scores[:epoch])) < 3 for epoch in range(1, len(scores)))
    last = load_checkpoint(run.last)
    assert (last.meta.epoch, last.meta.best_epoch) == (len(history), best)
    assert said[len(history) :] == [
        f"stopped early, after epoch {len(history)} of 60: no better weighted F1 for 3 epochs"
    ]
    # The cosine is that of all 60 epochs.
    steps = math.ceil(150 / BATCH)
    rates = [0.02 * scale_learning_rate(steps * (i + 1) - 1, steps * 60, 0.05) for i in range(len(history))]
    assert [line["lr"] for line in history] == rates


class StopHereError(Exception):
    """Stands for a run that ends before its time."""


@pytest.mark.parametrize("save_every, stop", [(2, "middle"), (1, "end")])
def test_resumed_with_every_option_it_is_an_undisturbed_run(tmp_path: Path, save_every: int, stop: str) -> None:
    seed, options = fresh_seed(), {**CONTROLS, "epochs": 40, "patience": 2, "save_every": save_every}
    with join_ranks("cpu") as ranks, deterministic_algorithms(True):
        make_trainer(tmp_path / "whole", ranks, seed, **options).fit(print)
        whole = RunDirectory(tmp_path / "whole" / "head-001")
        epochs = len(whole.read_history())
        last = epochs if stop == "end" else epochs - 1
        stopped = make_trainer(tmp_path / "stopped", ranks, seed, **options)
        tell = stopped._tell

        def record(*args: Any) -> None:
            tell(*args)
            if stopped._epoch == last:
                raise StopHereError

        stopped._tell = record  # type: ignore[method-assign]
        with pytest.raises(StopHereError):
            stopped.fit(print)
        run = RunDirectory(tmp_path / "stopped" / "head-001")
        checkpoint, _ = load_last(run.path)
        assert checkpoint.meta.epoch == last - (last % save_every if stop == "middle" else 0)
        run.cut_history(checkpoint.meta.epoch)
        torch.rand(17)
        again = make_trainer(tmp_path / "again", ranks, seed, init=seed + 1, **options)
        again._run = run
        again.restore(checkpoint)
        again.fit(print)
    assert epochs < 40
    assert run.history.read_bytes() == whole.history.read_bytes()
    for name in ("best", "last"):
        file = Path(name, "model.safetensors")
        assert (run.path / file).read_bytes() == (whole.path / file).read_bytes()
    assert load_checkpoint(run.last).meta == load_checkpoint(whole.last).meta


def test_the_bar_counts_repeated_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with join_ranks("cpu") as ranks:
        make_trainer(tmp_path, ranks, 1, epochs=2, repeat_factor=0.3).fit(print)
    rows = make_cache(1, 150, threshold=0.3).rows
    total = sum(count_epoch(rows, 5, epoch) for epoch in range(2))
    assert total > 300
    assert f"{total}/{total} " in capsys.readouterr().err

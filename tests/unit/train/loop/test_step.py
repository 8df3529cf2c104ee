"""One training step against the whole graph written out with transformers alone, in one part and in many."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.ranks.group import Ranks, join_ranks
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from train.config import TrainConfig
from train.data.batches import Batch
from train.loop.step import TrainStep, split_batch
from train.model.classifier import Classifier, Head

CLASSES = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("step") / "checkpoint", seed=fresh_seed())


def make_batch(seed: int, rows: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 64, 64, generator=generator)
    labels = torch.rand(rows, CLASSES, generator=generator) < 0.4
    return Batch(pixels, labels, torch.arange(rows), rows)


def make_classifier(checkpoint: Path, seed: int, unfreeze: int, **options: Any) -> Classifier:
    found = find_checkpoint(str(checkpoint))
    backbone = Backbone.load(found, precision="float32", device=torch.device("cpu"))
    backbone.unfreeze_last(unfreeze, **options)
    torch.manual_seed(seed)
    return Classifier(Head(128, CLASSES, hidden=16, dropout=0.0), backbone, ("cls", "patch_mean")).train()


def compute_plainly(checkpoint: Path, head: Head, batch: Batch, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of every tensor of the model as transformers has it, all of it in one graph; the loss from its formula
    (Lin et al. 2017)."""
    vit = AutoModel.from_pretrained(checkpoint, dtype=dtype).eval()
    head = head.to(dtype)
    tokens = vit(batch.inputs.to(dtype)).last_hidden_state
    logits = head(torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1))
    probs = logits.sigmoid()
    right = torch.where(batch.labels, probs, 1 - probs)
    loss = -(torch.where(batch.labels, 0.65, 0.35) * (1 - right) ** 2 * right.log()).mean()
    loss.backward()
    found = {f"backbone.vit.{name}": tensor.grad for name, tensor in vit.named_parameters()}
    found |= {f"head.{name}": tensor.grad for name, tensor in head.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def is_on_a_kink(checkpoint: Path, seed: int) -> bool:
    """Whether a hidden unit of the head is so near zero for a row that float32 may take ReLU's other side, and with it
    another gradient."""
    torch.manual_seed(seed)
    first = Head(128, CLASSES, hidden=16, dropout=0.0)[0].double()
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(checkpoint, dtype=torch.float64).eval()(make_batch(seed).inputs.double())[0]
        hidden = first(torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1))
    return bool(hidden.abs().min() < 1e-5)


@pytest.mark.parametrize(
    "unfreeze, accumulate, checkpointing", [(1, 1, False), (3, 3, False), (3, 1, True), (4, 4, True), (4, 1, False)]
)
def test_gradients_are_those_of_the_whole_graph(
    checkpoint: Path, unfreeze: int, accumulate: int, checkpointing: bool
) -> None:
    """Float32 against the whole graph in float64: within 1e-5 of each tensor's norm, cosine above 0.999."""
    seed = fresh_seed()
    while is_on_a_kink(checkpoint, seed):
        seed += 1
    batch = make_batch(seed)
    classifier = make_classifier(checkpoint, seed, unfreeze, checkpointing=checkpointing)
    config = TrainConfig(cache="c", run="r", unfreeze=unfreeze, accumulate=accumulate, amp=False, batch_size=7)
    with join_ranks("cpu") as ranks:
        step = TrainStep(classifier, config, None, ranks)
        result = step.run(batch, scale=0.0)
    torch.manual_seed(seed)
    twin = Head(128, CLASSES, hidden=16, dropout=0.0)
    expected = compute_plainly(checkpoint, twin, batch, dtype=torch.float64)
    trained = {name: tensor.grad for name, tensor in classifier.named_parameters() if tensor.requires_grad}
    assert {grad is None for name, grad in trained.items()} == {False}
    assert len(trained) > 15 * unfreeze
    largest = max(grad.norm().item() for grad in expected.values())
    for name, grad in trained.items():
        assert grad is not None
        want, got = expected[name], grad.double()
        # A key's bias moves every score of a row alike, which softmax takes no notice of: its gradient is rounding.
        if want.norm() < 1e-9 * largest:
            assert got.norm() < 1e-6 * largest
            continue
        assert (got - want).norm() <= 1e-5 * want.norm(), name
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    assert result.finite.tolist() == [True] * 7
    assert not result.clipped


@pytest.mark.parametrize(
    "rows, global_size, ranks, parts, sizes",
    [
        *((7, 7, 1, 3, [3, 3, 1]), (8, 8, 1, 2, [4, 4]), (2, 2, 1, 5, [1, 1])),
        *((3, 5, 2, 3, [1, 1, 1]), (2, 5, 2, 3, [1, 1, 0]), (0, 1, 2, 3, [0]), (0, 1, 2, 1, [0])),
        *((0, 0, 1, 3, [0]), (9, 10, 2, 1, [9]), (9, 10, 2, 2, [5, 4]), (1, 10, 2, 2, [1, 0])),
    ],
)
def test_a_share_is_split_evenly(rows: int, global_size: int, ranks: int, parts: int, sizes: list[int]) -> None:
    """On every rank into as many parts, whatever its share, and no row is lost."""
    batch = replace(make_batch(fresh_seed(), rows), global_size=global_size)
    split = split_batch(batch, parts, Ranks(0, ranks, ranks, torch.device("cpu"), dist.HashStore()))
    assert [len(part.inputs) for part in split] == sizes
    assert {part.global_size for part in split} == {batch.global_size}
    assert torch.equal(torch.cat([part.inputs for part in split]), batch.inputs)
    assert torch.equal(torch.cat([part.labels for part in split]), batch.labels)
    assert torch.equal(torch.cat([part.rows for part in split]), batch.rows)


def test_frozen_layers_keep_nothing_for_the_backward_pass(checkpoint: Path) -> None:
    classifier = make_classifier(checkpoint, fresh_seed(), 1)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tokens = classifier.encode(make_batch(0).inputs)
        assert not saved
        assert not tokens.requires_grad
        classifier.classify(tokens)
    assert saved


def test_checkpointing_keeps_less(checkpoint: Path) -> None:
    def count(checkpointing: bool) -> int:
        classifier = make_classifier(checkpoint, 1, 4, checkpointing=checkpointing)
        tokens = classifier.encode(make_batch(0).inputs)
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            classifier.classify(tokens)
        return sum(saved.values())

    assert count(True) < 0.5 * count(False)


TOO_LARGE = """
import resource, sys, torch
from pathlib import Path
from extract.ranks.group import join_ranks
from tests.unit.train.loop.test_step import make_batch, make_classifier
from train.config import TrainConfig
from train.errors import TrainError
from train.loop.step import TrainStep

torch.set_num_threads(1)
checkpoint, rows, parts, room = Path(sys.argv[1]), *map(int, sys.argv[2:])
with join_ranks("cpu") as ranks:
    config = TrainConfig(cache="c", run="r", unfreeze=4, amp=False, batch_size=rows, accumulate=parts)
    step = TrainStep(make_classifier(checkpoint, 1, 4), config, None, ranks)
    step.run(make_batch(0, 2), 1.0)
    batch = make_batch(0, rows)
    size = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
    try:
        step.run(batch, 1.0)
        print("trained")
    except TrainError as error:
        print(error)
"""


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(checkpoint: Path) -> None:
    """A real limit on memory, in a process of its own; what is named then trains under the same limit."""

    def run(rows: int, parts: int) -> str:
        command = [sys.executable, "-c", TOO_LARGE, str(checkpoint), str(rows), str(parts), str(150 << 20)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[4])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    message = run(512, 1)
    assert message.startswith("512 tiles at once do not fit in memory, ")
    assert "--grad-checkpoint" in message
    parts = int(message.split("--accumulate ")[1].split()[0])
    fits = int(message.split("in memory, ")[1].split()[0])
    assert 2 <= parts == -(-512 // fits)
    assert run(512, parts) == "trained"

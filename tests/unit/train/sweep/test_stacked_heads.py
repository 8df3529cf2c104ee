"""A stack's members against heads trained one by one with torch's own layers, dropout and AdamW."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.planted import fresh_seed
from train.config import TrainConfig
from train.loop.trainer import seed_dropout
from train.model.classifier import Head, draw_dropout
from train.sweep.stacked_heads import Stack

WIDTH, CLASSES, ROWS, STEPS = 12, 5, 37, 12
CPU = torch.device("cpu")


def make_members(head: str, **options: Any) -> list[TrainConfig]:
    """Rates, decays and losses of all kinds; those of one loss next to each other."""
    base = TrainConfig(**{"cache": "c", "run": "r", "head": head, "hidden": 16, "dropout": 0.3, **options})
    return [
        replace(base, lr=lr, weight_decay=decay, **loss)
        for loss in ({"loss": "bce"}, {"gamma": 2.0}, {"alpha": 0.4, "gamma": 1.0}, {"loss": "asymmetric"})
        for lr, decay in ((1e-2, 0.0), (1e-2, 0.5), (3e-3, 0.5))
    ]


def make_head(config: TrainConfig, seed: int) -> Head:
    torch.manual_seed(seed)
    return Head(WIDTH, CLASSES, hidden=config.hidden_width, dropout=config.dropout)


@pytest.mark.parametrize("head, dropout", [("mlp", 0.0), ("mlp", 0.3), ("linear", 0.3)])
def test_members_equal_heads_trained_alone(head: str, dropout: float) -> None:
    """12 steps in float32, with changing rates: parameters within 1e-5, and logits too."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(rows, WIDTH, generator=generator), torch.rand(rows, CLASSES, generator=generator) < 0.3)
        for rows in [ROWS] * (STEPS - 1) + [3]
    ]
    members = make_members(head, dropout=dropout)
    stack = Stack(members, make_head(members[0], seed), CPU, amp=False)
    seed_dropout(seed, 4, 0)
    for step, (inputs, labels) in enumerate(batches):
        shape = (len(inputs), stack.hidden)
        mask = draw_dropout(shape, dropout, device=CPU, dtype=torch.float32) if stack.hidden and dropout else None
        stack.train_step(inputs, labels, mask, (step + 1) / STEPS)
    together = stack.heads(batches[0][0])
    for m, config in enumerate(members):
        alone = make_head(config, seed)
        optimizer = torch.optim.AdamW(alone.parameters(), weight_decay=config.weight_decay)
        seed_dropout(seed, 4, 0)
        alone.train()
        for step, (inputs, labels) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = config.lr * ((step + 1) / STEPS)
            optimizer.zero_grad()
            config.make_loss()(alone(inputs), labels).mean().backward()
            optimizer.step()
        alone.eval()
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(stack.heads.tensors[name][m], tensor, rtol=0, atol=1e-5, msg=f"{config}: {name}")
        torch.testing.assert_close(together[m], alone(batches[0][0]), rtol=0, atol=1e-4)

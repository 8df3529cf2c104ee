"""The head's shape and arithmetic, and which tensors of a classifier train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from train.model.classifier import Classifier, Dropout, Head, draw_dropout, join_features


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def test_the_head_is_two_layers_with_a_relu_between() -> None:
    torch.manual_seed(fresh_seed())
    head = Head(10, 3, hidden=7, dropout=0.5).eval()
    inputs = torch.randn(5, 10)
    w1, b1, w2, b2 = (tensor.double() for tensor in head.state_dict().values())
    expected = torch.clamp(inputs.double() @ w1.T + b1, min=0) @ w2.T + b2
    assert [tuple(tensor.shape) for tensor in (w1, b1, w2, b2)] == [(7, 10), (7,), (3, 7), (3,)]
    np.testing.assert_allclose(head(inputs).detach().numpy(), expected.numpy(), atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(fresh_seed())
    classifier = Classifier(Head(10, 3, hidden=64, dropout=0.5), None, ("cls",))
    inputs = torch.randn(5, 10)
    classifier.eval()
    assert torch.equal(classifier(inputs), classifier(inputs))
    classifier.train()
    assert not torch.equal(classifier(inputs), classifier(inputs))


@pytest.mark.parametrize("p", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_what_it_should_at_random(p: float, dtype: torch.dtype) -> None:
    """Counts of single values, of pairs side by side and of columns, within 6 deviations of the binomial's."""
    torch.manual_seed(fresh_seed())
    factors = draw_dropout((999, 501), p, device=torch.device("cpu"), dtype=dtype)
    assert factors.dtype == dtype
    kept = factors != 0
    torch.testing.assert_close(
        factors[kept].float(), torch.full_like(factors[kept].float(), 1 / (1 - p)), rtol=4e-3, atol=0
    )

    def check(found: torch.Tensor, share: float) -> None:
        deviation = (share * (1 - share) / found.numel()) ** 0.5
        assert abs(found.double().mean().item() - share) <= 6 * deviation

    check(kept, 1 - p)
    for lag in (1, 2, 3, 4, 501):
        # Overlapping pairs hang together, so every second of them.
        flat = kept.flatten()
        check((flat[:-lag] & flat[lag:])[:: lag + 1], (1 - p) ** 2)
    for column in range(4):  # the four values of one draw
        check(kept.flatten()[column::4], 1 - p)
    assert not torch.equal(kept, draw_dropout((999, 501), p, device=torch.device("cpu"), dtype=dtype) != 0)


def test_dropout_lets_gradients_through_where_it_lets_values() -> None:
    torch.manual_seed(fresh_seed())
    hidden = torch.rand(7, 13) + 1
    hidden.requires_grad_()
    layer = Dropout(0.5)
    found = layer(hidden)
    found.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(found, hidden * hidden.grad)
    assert set(hidden.grad.unique().tolist()) == {0.0, 2.0}
    assert layer.eval()(hidden) is hidden
    assert Dropout(0.0)(hidden) is hidden


def test_cached_vectors_of_half_precision_give_float32_logits() -> None:
    classifier = Classifier(Head(10, 3, hidden=7, dropout=0.0), None, ("cls",))
    assert classifier(torch.randn(5, 10).half()).dtype == torch.float32


def test_features_are_joined_in_order() -> None:
    pooled = {"cls": torch.zeros(2, 3), "patch_mean": torch.ones(2, 3)}
    assert join_features(pooled, ("cls", "patch_mean"))[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert join_features(pooled, ("patch_mean", "cls"))[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert join_features(pooled, ("patch_mean",)) is pooled["patch_mean"]


def test_without_unfrozen_layers_only_the_head_trains(checkpoint_path: Path) -> None:
    backbone = Backbone.load(find_checkpoint(str(checkpoint_path)), precision="float32", device=torch.device("cpu"))
    classifier = Classifier(Head(64, 3, hidden=7, dropout=0.0), backbone, ("cls",))
    assert set(classifier.trained_tensors()) == {
        f"head.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")
    }


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_unfrozen_layers_the_final_norm_and_the_head_train(checkpoint_path: Path, precision: str) -> None:
    backbone = Backbone.load(find_checkpoint(str(checkpoint_path)), precision=precision, device=torch.device("cpu"))
    backbone.unfreeze_last(2)
    classifier = Classifier(Head(128, 3, hidden=7, dropout=0.0), backbone, ("cls", "patch_mean"))
    trained = classifier.trained_tensors()
    outside = {name for name in classifier.state_dict() if not name.startswith(("head.", "backbone.vit.norm."))}
    last = {id(tensor) for layer in backbone.layers[-2:] for tensor in layer.parameters()}
    names = {name for name, tensor in classifier.named_parameters() if id(tensor) in last}
    assert names
    assert set(trained) & outside == names
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    # What is frozen keeps its precision, and nothing but the trained tensors receives a gradient.
    pixels = torch.randn(2, 3, 64, 64)
    classifier.train()
    classifier(pixels).sum().backward()
    assert {name for name, tensor in classifier.named_parameters() if tensor.grad is not None} == set(trained)
    frozen = {tensor.dtype for name, tensor in classifier.named_parameters() if name not in trained}
    assert frozen == {torch.float32 if precision == "float32" else torch.bfloat16}


@pytest.mark.parametrize("features, seen_by_last", [(("cls",), 1), (("patch_mean",), 21), (("cls", "patch_mean"), 21)])
def test_the_last_layer_computes_no_token_that_is_not_read(
    checkpoint_path: Path, features: tuple[str, ...], seen_by_last: int
) -> None:
    backbone = Backbone.load(find_checkpoint(str(checkpoint_path)), precision="float32", device=torch.device("cpu"))
    backbone.unfreeze_last(2)
    classifier = Classifier(Head(64 * len(features), 3, hidden=7, dropout=0.0), backbone, features)
    seen: list[int] = []
    for layer in backbone.trained:
        layer.mlp.register_forward_hook(lambda mlp, inputs, output: seen.append(output.shape[1]))
    classifier(torch.randn(2, 3, 64, 64))
    assert seen == [21, seen_by_last]


def test_an_empty_batch_passes_through_with_gradients_of_zero(checkpoint_path: Path) -> None:
    """A rank without a row in the last batch must still take part in it."""
    backbone = Backbone.load(find_checkpoint(str(checkpoint_path)), precision="float32", device=torch.device("cpu"))
    backbone.unfreeze_last(1)
    classifier = Classifier(Head(64, 3, hidden=7, dropout=0.1), backbone, ("cls",)).train()
    logits = classifier(torch.empty(0, 3, 64, 64))
    assert logits.shape == (0, 3)
    logits.sum().backward()
    for name, tensor in classifier.named_parameters():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert not tensor.grad.any(), name


def test_a_checkpoint_of_vitl16_with_three_layers_takes_about_150_mb() -> None:
    """On the meta device: the shape of the real model, without its weights."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        backbone = Backbone(DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4, **shape)))
        classifier = Classifier(Head(1024, 60, hidden=512, dropout=0.1), backbone, ("cls",))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 303_129_600
    backbone.unfreeze_last(3)
    size = sum(4 * tensor.numel() for tensor in classifier.trained_tensors().values())
    assert 150e6 < size < 155e6

"""The ONNX file of a model too large for one, and what onnxruntime's check refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from tests.checkpoints import make_checkpoint
from tests.planted import fresh_seed
from train.errors import TrainError
from train.model.classifier import Classifier, Head
from train.predict.onnx import MAX_DIFFERENCE, check_onnx, relative_difference, write_onnx

SIZE = 32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """A file whose weights lie next to it, as the 7B's do; pixel values, and torch's logits of them."""
    root, seed = tmp_path_factory.mktemp("onnx"), fresh_seed()
    checkpoint = find_checkpoint(str(make_checkpoint(root / "checkpoint", seed=seed, use_gated_mlp=True)), SIZE)
    backbone = Backbone.load(checkpoint, precision="float32", device=torch.device("cpu"))
    backbone.unpack()
    classifier = Classifier(Head(64, 7, hidden=0, dropout=0.0), backbone, ("patch_mean",)).eval()
    pixels = torch.randn(4, 3, SIZE, SIZE)
    write_onnx(classifier, root / "classifier.onnx", pixels[:2], inline_bytes=100_000)
    with torch.inference_mode():
        return root / "classifier.onnx", pixels, classifier(pixels)


def test_large_weights_lie_beside_the_graph(written: tuple[Path, Tensor, Tensor], tmp_path: Path) -> None:
    path, pixels, logits = written
    weights = path.with_name("classifier.onnx.data")
    assert path.stat().st_size < 100_000 < weights.stat().st_size
    assert check_onnx(path, pixels, logits, batches=(4, 1, 3)) <= MAX_DIFFERENCE
    # Found next to the graph wherever both are: an export is renamed when it is whole.
    for file in (path, weights):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights.rename(weights.with_suffix(".away"))
    try:
        check_onnx(tmp_path / path.name, pixels, logits, batches=(2,))
        with pytest.raises(TrainError, match=r"onnxruntime .* cannot run classifier.onnx"):
            check_onnx(path, pixels, logits, batches=(2,))
    finally:
        weights.with_suffix(".away").rename(weights)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another logit": lambda logits: logits + 0.01 * (torch.arange(28).view(4, 7) == 2),
    "not a number": lambda logits: logits.clone().index_fill_(0, torch.tensor([0]), float("nan")),
    "another order": lambda logits: logits.flip(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_logits_are_refused_in_one_line(
    written: tuple[Path, Tensor, Tensor], change: Callable[[Tensor], Tensor]
) -> None:
    path, pixels, logits = written
    with pytest.raises(TrainError, match="differ from torch's by .*--no-onnx") as caught:
        check_onnx(path, pixels, change(logits), batches=(4,))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph_is_refused_in_one_line(written: tuple[Path, Tensor, Tensor], tmp_path: Path) -> None:
    _, pixels, logits = written
    for content in (b"", b"no graph at all"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(TrainError, match=r"cannot run bad.onnx") as caught:
            check_onnx(tmp_path / "bad.onnx", pixels, logits, batches=(1,))
        assert "\n" not in str(caught.value)


def test_the_difference_is_relative_to_the_largest_value_or_one() -> None:
    assert relative_difference(torch.tensor([9.0]), torch.tensor([8.0]), of=torch.tensor([-64.0, 1.0])) == 1 / 64
    assert relative_difference(torch.tensor([0.5]), torch.tensor([0.25]), of=torch.tensor([0.5])) == 0.25

"""Write a whole classifier as one ONNX graph, and check with onnxruntime that it computes the same logits as torch.

The exporter is torch's current one (`dynamo=True`, the default since 2.9); the TorchScript exporter is deprecated.
The packages come with the `onnx` extra.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from train.errors import TrainError, first_line
from train.model.classifier import Classifier, join_features

MAX_DIFFERENCE = 1e-4
"""Tolerance of the logits, relative to the largest or 1: all layers sum float32 values in another order."""
INLINE_BYTES = 2_000_000_000
"""Protobuf files are limited to 2 GiB: weights of a larger model go to a separate file, `classifier.onnx.data`."""


def require_onnx() -> None:
    """Check that the ONNX packages are installed, before any work is done.

    Raises:
        TrainError: one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TrainError(
            f"ONNX needs a package that is not installed ({error.name}): pip install 'tileprobe[onnx]', "
            "or export with --no-onnx"
        ) from error


class _PixelsToLogits(nn.Module):
    """The classifier without its branch for empty batches, with which tracing would fix the batch size."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.backbone, self.head, self.features = classifier.backbone, classifier.head, classifier.features

    def forward(self, pixel_values: Tensor) -> Tensor:
        assert self.backbone is not None
        logits: Tensor = self.head(join_features(self.backbone(pixel_values, self.features), self.features))
        return logits


def write_onnx(classifier: Classifier, path: Path, pixels: Tensor, *, inline_bytes: int = INLINE_BYTES) -> None:
    """Write `pixel_values` (B, 3, S, S) float32 -> `logits` (B, C) float32, for any B of at least 1.

    Args:
        classifier: has a float32 backbone, is in eval mode and on the CPU.
        pixels: (2 or more, 3, S, S) float32 to trace with; S is fixed in the graph.
        inline_bytes: if the weights are larger, they go to a file next to it.

    Raises:
        TrainError: the exporter cannot express this model.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in classifier.parameters())
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about parts of torchvision that are not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _PixelsToLogits(classifier).eval(),
                (pixels,),
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # stack traces with paths of this machine: over half of a small file
            program.save(path, external_data=size > inline_bytes)
    except torch.onnx.OnnxExporterError as error:
        raise TrainError(
            f"torch {torch.__version__} cannot write this model as ONNX ({first_line(error)}): "
            "use the versions of constraints.txt, or export with --no-onnx"
        ) from error
    finally:
        log.setLevel(level)


def check_onnx(path: Path, pixels: Tensor, expected: Tensor, *, batches: Sequence[int]) -> float:
    """Run the file with onnxruntime in batches of several lengths and compare with torch.

    Args:
        pixels: (N, 3, S, S) float32.
        expected: (N, C) float32, torch's logits for them.
        batches: batch sizes to try, each on the first of the N tiles.

    Returns:
        the largest difference of a logit, relative to the largest logit or 1.

    Raises:
        TrainError: the difference exceeds `MAX_DIFFERENCE`, or onnxruntime cannot run the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = [session.run(["logits"], {"pixel_values": pixels[:length].numpy()})[0] for length in batches]
    except Exception as error:  # a dozen kinds without a common base class
        raise TrainError(
            f"onnxruntime {onnxruntime.__version__} cannot run {path.name} ({first_line(error)}): "
            "use the versions of constraints.txt, or export with --no-onnx"
        ) from error
    worst = max(relative_difference(torch.from_numpy(logits), expected[: len(logits)], of=expected) for logits in found)
    if not worst <= MAX_DIFFERENCE:
        raise TrainError(
            f"the logits of {path.name} differ from torch's by {worst:.1e} of the largest, more than "
            f"{MAX_DIFFERENCE:.0e}: use the versions of constraints.txt, or export with --no-onnx"
        )
    return worst


def relative_difference(found: Tensor, expected: Tensor, *, of: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value in `of` or 1; NaN if any value is."""
    return float((found - expected).abs().max() / of.abs().max().clamp(min=1))

"""A whole classifier as one ONNX graph, and onnxruntime's word that it computes what torch does.

The exporter is torch's present one (`dynamo=True`, the default since 2.9); the older one, over TorchScript, is
deprecated. The packages are the `onnx` extra: nothing else needs them.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from train.errors import TrainError
from train.model.classifier import Classifier, join_features

MAX_DIFFERENCE = 1e-4
"""Of logits, over the largest of them or 1: float32 sums in another order, through all layers."""
INLINE_BYTES = 2_000_000_000
"""A protobuf file ends at 2 GiB: the weights of a larger model go to a file of their own, `classifier.onnx.data`."""


def require_onnx() -> None:
    """Look for the packages before any work is done.

    Raises:
        TrainError: one is not installed.
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
    """The classifier without its case for a rank that has no rows, at which tracing would fix the batch's length."""

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
        classifier: with a float32 backbone, in eval mode, on the CPU.
        path: of the file.
        pixels: (2 or more, 3, S, S) float32 to trace with; S becomes the graph's own.
        inline_bytes: more weights than this go to a file beside it.

    Raises:
        TrainError: the exporter cannot express this model.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in classifier.parameters())
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it names the parts of torchvision that are not installed
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
                node.metadata_props.clear()  # stack traces with paths of this machine, more than half of a small file
            program.save(path, external_data=size > inline_bytes)
    except torch.onnx.OnnxExporterError as error:
        raise TrainError(
            f"torch {torch.__version__} cannot write this model as ONNX ({_first_line(error)}): "
            "use the versions of constraints.txt, or export with --no-onnx"
        ) from error
    finally:
        log.setLevel(level)


def check_onnx(path: Path, pixels: Tensor, expected: Tensor, *, batches: Sequence[int]) -> float:
    """Run the file with onnxruntime in batches of several lengths and compare with torch.

    Args:
        path: what `write_onnx` wrote.
        pixels: (N, 3, S, S) float32.
        expected: (N, C) float32, torch's logits of them.
        batches: how many of the N to run at once, from the first on, one length after the other.

    Returns:
        the largest difference of a logit, over the largest logit or 1.

    Raises:
        TrainError: it is more than `MAX_DIFFERENCE`, or onnxruntime refuses the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = [session.run(["logits"], {"pixel_values": pixels[:length].numpy()})[0] for length in batches]
    except Exception as error:  # of a dozen kinds without a base of their own
        raise TrainError(
            f"onnxruntime {onnxruntime.__version__} refuses {path.name} ({_first_line(error)}): "
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
    """The largest absolute difference, over the largest absolute value in `of` or 1; NaN where a value is."""
    return float((found - expected).abs().max() / of.abs().max().clamp(min=1))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

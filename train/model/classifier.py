"""The classifier: one shape for cached vectors and for streamed tiles."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from extract.backbone.dinov3 import Backbone


class Head(nn.Sequential):
    """Linear(D, hidden) - ReLU - Dropout - Linear(hidden, C): (B, D) embeddings to (B, C) logits.

    Without a hidden layer (`hidden` 0) it is Linear(D, C), and `dropout` has nothing to act on.
    """

    def __init__(self, width: int, classes: int, *, hidden: int, dropout: float) -> None:
        if hidden:
            super().__init__(nn.Linear(width, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, classes))
        else:
            super().__init__(nn.Linear(width, classes))


class Dropout(nn.Module):
    """Zeroes each value with probability `p` in training and scales the others up, which keeps the mean.

    Srivastava et al. 2014, "Dropout".
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or not self.p:
            return hidden
        return hidden * draw_dropout(hidden.shape, self.p, device=hidden.device, dtype=hidden.dtype)


def draw_dropout(shape: Sequence[int], p: float, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the factors of dropout for values of this shape: 0, or 1 over the share that is kept.

    On the CPU each value takes 16 random bits, four values a draw: PyTorch's own dropout draws a double for each, which
    took a sixth of the head's step on 2 cores. `p` is rounded to a multiple of 2**-16.
    """
    if device.type != "cpu":
        return functional.dropout(torch.ones(shape, device=device, dtype=dtype), p)
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count].view(*shape)
    dropped = min(round(p * 2**16), 2**16 - 1)
    return (bits >= dropped - 2**15).to(dtype).mul_(2**16 / (2**16 - dropped))


class Classifier(nn.Module):
    """Computes logits from cached embeddings (no backbone) or from pixel values (with one).

    It runs two parts: `encode`, which never carries gradients, and `classify`, which holds everything that is trained.

    Args:
        head: takes vectors of the width of all features.
        backbone: None on the cached path.
        features: names of pooled arrays, joined in this order.
    """

    def __init__(self, head: nn.Module, backbone: Backbone | None, features: tuple[str, ...]) -> None:
        super().__init__()
        self.head = head
        self.backbone = backbone
        self.features = features

    def forward(self, inputs: Tensor) -> Tensor:
        """Turn (B, F) float embeddings, (B, 3, S, S) pixel values or (B, T, D) tokens into (B, C) logits."""
        return self.classify(self.encode(inputs))

    def encode(self, inputs: Tensor) -> Tensor:
        """Turn pixel values into the tokens (B, T, D) after the frozen layers; return other inputs unchanged."""
        if self.backbone is None or inputs.ndim != 4:
            return inputs
        with torch.no_grad():
            return _fill_up(inputs, self.backbone.run_prefix)

    def classify(self, encoded: Tensor) -> Tensor:
        """Turn the result of `encode` into (B, C) logits, with gradients for everything that is trained."""
        return _fill_up(encoded, self._classify)

    def _classify(self, encoded: Tensor) -> Tensor:
        if self.backbone is not None:
            encoded = join_features(self.backbone.run_suffix(encoded, self.features), self.features)
        # Metrics use float32 logits on every device: rounded by autocast, many would tie.
        with nullcontext() if self.training else torch.autocast(encoded.device.type, enabled=False):
            logits: Tensor = self.head(encoded.float())
        return logits

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, those of head and unfrozen layers, by their name in this module."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name in trained}


class TrainedPart(nn.Module):
    """The trained part of a classifier as a separate module: (B, ...) encoded inputs to (B, C) logits.

    DDP wraps only this, so it neither broadcasts the frozen layers nor tracks them.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        backbone = classifier.backbone
        self.modules_trained = nn.ModuleList([classifier.head, *(backbone.list_trained() if backbone else ())])
        self._classify = classifier.classify  # a bound method: the frozen layers are not part of this module

    def forward(self, encoded: Tensor) -> Tensor:
        return self._classify(encoded)


def join_features(pooled: Mapping[str, Tensor], features: tuple[str, ...]) -> Tensor:
    """Join pooled arrays of (B, D) to (B, len(features) x D)."""
    return torch.cat([pooled[name] for name in features], dim=1) if len(features) > 1 else pooled[features[0]]


def _fill_up(rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `compute(rows)`, also for a rank without rows in the last batch: attention cannot reshape an empty tensor.

    An empty result stays attached to every weight (zero gradients), as DDP requires.
    """
    # Clone the empty result: hooks on the gradient of a view may be lost.
    return compute(rows) if len(rows) else compute(rows.new_zeros(1, *rows.shape[1:]))[:0].clone()

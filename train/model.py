"""The classifier: one shape for cached vectors and for streamed tiles."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from extract.backbone import Backbone


class Head(nn.Sequential):
    """Linear(D, hidden) - ReLU - Dropout - Linear(hidden, C): (B, D) embeddings to (B, C) logits.

    Without a hidden layer (`hidden` 0) it is Linear(D, C), and `dropout` has nothing to act on.
    """

    def __init__(self, width: int, classes: int, *, hidden: int, dropout: float) -> None:
        if hidden:
            super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes))
        else:
            super().__init__(nn.Linear(width, classes))


class Classifier(nn.Module):
    """Logits from cached embeddings (no backbone) or from pixel values (with one).

    Args:
        head: of the features' width.
        backbone: None on the cached path.
        features: names of pooled arrays, joined in this order.
    """

    def __init__(self, head: nn.Module, backbone: Backbone | None, features: tuple[str, ...]) -> None:
        super().__init__()
        self.head = head
        self.backbone = backbone
        self.features = features

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, F) float embeddings, or (B, 3, S, S) pixel values, to (B, C) logits."""
        if self.backbone is not None and not len(inputs):
            # A rank without a row in the last batch: transformers' attention cannot reshape nothing.
            return self(inputs.new_zeros(1, *inputs.shape[1:]))[:0]  # type: ignore[no-any-return]
        embeddings = inputs if self.backbone is None else join_features(self.backbone(inputs), self.features)
        logits: Tensor = self.head(embeddings.float())
        return logits

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changes: the head's tensors and those of unfrozen layers, by their name in this module."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name in trained}


def join_features(pooled: Mapping[str, Tensor], features: tuple[str, ...]) -> Tensor:
    """(B, len(features) x D) from pooled arrays of (B, D)."""
    return torch.cat([pooled[name] for name in features], dim=1) if len(features) > 1 else pooled[features[0]]

"""The focal loss the head is trained with, one value per tile and class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def focal_loss(logits: Tensor, labels: Tensor, *, alpha: float = 0.65, gamma: float = 2.0) -> Tensor:
    """Focal loss of every logit, unreduced: `-alpha_t (1 - p_t)**gamma log(p_t)`.

    Lin, Goyal, Girshick, He, Dollár: "Focal Loss for Dense Object Detection", ICCV 2017, equation 5, with the
    independent sigmoid of multi-label classification. `p_t` is the probability given to the truth. At `gamma` 0 it is
    binary cross-entropy weighted by `alpha`.

    Args:
        logits: (B, C), any floating dtype, before the sigmoid.
        labels: (B, C), bool or 0/1 of any dtype. Soft labels are not supported: anything but 0 counts as 1.
        alpha: weight of the positives, in 0..1; negatives weigh `1 - alpha`.
        gamma: focusing exponent, >= 0.

    Returns:
        (B, C) float32. It is not averaged, so that ranks with unequal shares can divide by the global count.

    Raises:
        ValueError: shapes differ, or `alpha` or `gamma` is out of range.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in shape")
    if not 0.0 <= alpha <= 1.0 or gamma < 0.0:
        raise ValueError(f"alpha must lie in 0..1 and gamma must not be negative: got alpha {alpha}, gamma {gamma}")
    # Half precision loses the small probabilities and turns 0 * log(0) into NaN.
    with torch.autocast(device_type=logits.device.type, enabled=False):
        positive = labels != 0
        logits = logits.float()
        margin = torch.where(positive, logits, -logits)
        weight = torch.where(positive, alpha, 1.0 - alpha)
        # sigmoid(-margin) is 1 - p_t without the cancellation, and underflows to 0 when the margin is large; its floor
        # keeps the derivative of a fractional power finite there, where 0 * inf would be NaN.
        missing = torch.sigmoid(-margin).clamp_min(torch.finfo(torch.float32).tiny)
        return -weight * missing.pow(gamma) * functional.logsigmoid(margin)

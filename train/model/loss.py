"""Losses for training a head: pure functions of logits and labels, one value per tile and class."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["focal", "bce", "asymmetric"]
LOSS_PARAMETERS: dict[LossName, tuple[str, ...]] = {
    "bce": (),
    "focal": ("alpha", "gamma"),
    "asymmetric": ("gamma_pos", "gamma_neg", "margin"),
}
"""The parameters in `LossConfig` that each loss takes, in the order in which `--losses` of a sweep names them."""


@dataclass(frozen=True)
class LossConfig:
    """A loss and its parameters; a call with (B, C) logits and labels returns (B, C) float32, unreduced.

    Attributes:
        name: of one of the functions below.
        alpha, gamma: of the focal loss.
        gamma_pos, gamma_neg, margin: of the asymmetric loss.
    """

    name: LossName = "focal"
    alpha: float = 0.65
    gamma: float = 2.0
    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    margin: float = 0.05

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        values = {parameter: getattr(self, parameter) for parameter in LOSS_PARAMETERS[self.name]}
        return _FUNCTIONS[self.name](logits, labels, **values)


def focal_loss(
    logits: Tensor, labels: Tensor, *, alpha: float = LossConfig.alpha, gamma: float = LossConfig.gamma
) -> Tensor:
    """Compute the focal loss of every logit, unreduced: `-alpha_t (1 - p_t)**gamma log(p_t)`.

    Lin, Goyal, Girshick, He, Dollár: "Focal Loss for Dense Object Detection", ICCV 2017, equation 5, with the
    independent sigmoid of multi-label classification. `p_t` is the probability given to the truth. At `gamma` 0 it is
    binary cross-entropy weighted by `alpha`.

    Args:
        logits: (B, C), any floating dtype, before the sigmoid.
        labels: (B, C), bool or 0/1 of any dtype. Soft labels are not supported: every value but 0 counts as 1.
        alpha: weight of the positives, in 0..1; negatives weigh `1 - alpha`.
        gamma: focusing exponent, >= 0.

    Returns:
        (B, C) float32. It is not averaged, so that ranks with unequal shares can divide by the global count.

    Raises:
        ValueError: shapes differ, or `alpha` or `gamma` is out of range.
    """
    _check_shapes(logits, labels)
    if not 0.0 <= alpha <= 1.0 or gamma < 0.0:
        raise ValueError(f"alpha must lie in 0..1 and gamma must not be negative: got alpha {alpha}, gamma {gamma}")
    # Half precision loses small probabilities and turns 0 * log(0) into NaN.
    with torch.autocast(device_type=logits.device.type, enabled=False):
        positive = labels != 0
        logits = logits.float()
        margin = torch.where(positive, logits, -logits)
        weight = torch.where(positive, alpha, 1.0 - alpha)
        # sigmoid(-margin) is 1 - p_t without cancellation. It underflows to 0 where the margin is large; the floor
        # keeps the derivative of a fractional power finite there, where 0 * inf would be NaN.
        missing = torch.sigmoid(-margin).clamp_min(torch.finfo(torch.float32).tiny)
        return -weight * missing.pow(gamma) * functional.logsigmoid(margin)


def bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the binary cross-entropy of every logit, unreduced: `-log(p_t)`.

    Arguments, result and errors are those of `focal_loss`.
    """
    _check_shapes(logits, labels)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        logits = logits.float()
        return -functional.logsigmoid(torch.where(labels != 0, logits, -logits))


def asymmetric_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma_pos: float = LossConfig.gamma_pos,
    gamma_neg: float = LossConfig.gamma_neg,
    margin: float = LossConfig.margin,
) -> Tensor:
    """Compute the asymmetric loss of every logit, unreduced; easy negatives count less than easy positives, or nothing.

    Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter, Zelnik-Manor: "Asymmetric Loss For Multi-Label Classification",
    ICCV 2021, equations 4 to 7, with the parameters the paper uses for MS-COCO: `-(1 - p)**gamma_pos log(p)` where the
    class is present and `-p_m**gamma_neg log(1 - p_m)` with `p_m = max(p - margin, 0)` where it is not. The gradient
    is that of the formula: the exponents take part in it.

    Args:
        logits, labels: as for `focal_loss`.
        gamma_pos, gamma_neg: focusing exponents, >= 0.
        margin: probability below which a negative costs nothing, in 0..1 without 1.

    Returns:
        (B, C) float32.

    Raises:
        ValueError: shapes differ, or a parameter is out of range.
    """
    _check_shapes(logits, labels)
    if gamma_pos < 0.0 or gamma_neg < 0.0 or not 0.0 <= margin < 1.0:
        raise ValueError(
            "gamma_pos and gamma_neg must not be negative and margin must lie in 0..1 without 1: got "
            f"{gamma_pos}, {gamma_neg} and {margin}"
        )
    with torch.autocast(device_type=logits.device.type, enabled=False):
        positive = labels != 0
        logits = logits.float()
        signed = torch.where(positive, logits, -logits)
        log_right = functional.logsigmoid(signed)
        if margin:
            # 1 - p_m is 1 - p + margin, at most 1.
            shifted = torch.logaddexp(log_right, log_right.new_tensor(math.log(margin))).clamp_max(0.0)
            log_right = torch.where(positive, log_right, shifted)
        # The floor has the same purpose as in `focal_loss`.
        tiny = torch.finfo(torch.float32).tiny
        wrong = (torch.sigmoid(-signed) - torch.where(positive, 0.0, margin)).clamp_min(tiny)
        return -torch.where(positive, wrong.pow(gamma_pos), wrong.pow(gamma_neg)) * log_right


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if logits.shape != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in shape")


_FUNCTIONS: dict[LossName, Callable[..., Tensor]] = {
    "bce": bce_loss,
    "focal": focal_loss,
    "asymmetric": asymmetric_loss,
}

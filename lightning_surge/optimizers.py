"""Which law an optimizer obeys, and what its state already knows about the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch.optim import Optimizer

__all__ = ["OptimizerKind", "lr_scales", "optimizer_kind", "stability_constant"]

OptimizerKind = Literal["sign", "gradient", "unknown"]

# By class name, so that the same algorithm from another package is recognised too. All of these divide by a
# running size of the gradient, or take its sign outright: an update's length does not grow with the gradient.
SIGN_OPTIMIZERS = frozenset(
    {
        "Adafactor",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "Adan",
        "LAMB",
        "Lamb",
        "Lion",
        "NAdam",
        "RAdam",
        "RMSprop",
        "SignSGD",
        "SparseAdam",
    }
)
GRADIENT_OPTIMIZERS = frozenset({"ASGD", "SGD"})


def _heavy_ball(beta: float) -> float:
    return (2.0 + 2.0 * beta) / (1.0 - beta)


def _nesterov(beta: float) -> float:
    return (2.0 + 2.0 * beta) / ((1.0 - beta) * (1.0 + 2.0 * beta))


# What the learning rate times the sharpness of the preconditioned Hessian must stay below, as a function of
# beta_1. By exact class name along the ancestry: variants keep their averages in other forms.
STABILITY: dict[str, Callable[[float], float]] = {
    "Adam": _heavy_ball,
    "AdamW": _heavy_ball,
    "RAdam": _heavy_ball,
    "NAdam": _nesterov,
}


def optimizer_kind(optimizer: Optimizer) -> OptimizerKind:
    """Whether an optimizer steps along the sign of the gradient or along the gradient.

    Subclasses count as what they derive from; quantised and fused variants (`AdamW8bit`, `FusedAdam`)
    are recognised by the name they contain.

    Args:
        optimizer: the raw torch optimizer.

    Returns:
        `"sign"`, `"gradient"`, or `"unknown"`.

    Example:
        >>> import torch
        >>> optimizer_kind(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
        'sign'
        >>> optimizer_kind(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))]))
        'unknown'

    References:
        Li et al. 2024, arXiv:2405.14578, section 2, for Adam-style updates as sign updates.
    """
    for kind in type(optimizer).__mro__:
        name = kind.__name__
        if name in SIGN_OPTIMIZERS or "Adam" in name or "Lion" in name:
            return "sign"
        if name in GRADIENT_OPTIMIZERS:
            return "gradient"
    return "unknown"


def lr_scales(lrs: Sequence[float]) -> list[float]:
    """Each parameter group's learning rate relative to the largest.

    Args:
        lrs: learning rates of the groups.

    Returns:
        Numbers from 0 to 1; all 1 where every learning rate is 0, as in the first step of a warm-up.

    Example:
        >>> lr_scales([0.1, 0.05]), lr_scales([0.0, 0.0])
        ([1.0, 0.5], [1.0, 1.0])
    """
    largest = max(lrs)
    return [lr / largest for lr in lrs] if largest > 0.0 else [1.0] * len(lrs)


def stability_constant(optimizer: Optimizer) -> float:
    r"""`C` of Adam's edge of stability `C / lambda_max(P^-1/2 H P^-1/2)`.

    For momentum that averages, as Adam's does, `(2 + 2 beta) / (1 - beta)`; in Nesterov's form
    `(2 + 2 beta) / ((1 - beta)(1 + 2 beta))`.

    Args:
        optimizer: the raw torch optimizer.

    Returns:
        The constant, without unit.

    Raises:
        ValueError: for an optimizer whose edge is not known, or groups of different momentum.

    Example:
        >>> import torch
        >>> round(stability_constant(torch.optim.AdamW([torch.ones(1)], betas=(0.9, 0.999))), 6)
        38.0

    References:
        Cohen et al. 2022, arXiv:2207.14484, section 3 (38 for beta_1 = 0.9); Cohen et al. 2021,
        arXiv:2103.00065, for the threshold of Nesterov's form without averaging.
    """
    names = [kind.__name__ for kind in type(optimizer).__mro__]
    name = next((name for name in names if name in STABILITY), None)
    if name is None or any(group.get("amsgrad", False) for group in optimizer.param_groups):
        raise ValueError(
            f"Expected one of {', '.join(STABILITY)} without amsgrad for objective='edge', got "
            f"{type(optimizer).__name__}: its edge of stability cannot be told at other batch sizes. Use "
            "objective='progress'."
        )
    momenta = {float(group["betas"][0]) for group in optimizer.param_groups}
    if len(momenta) > 1:
        raise ValueError(
            f"Expected one beta_1 for objective='edge', got {sorted(momenta)}: give all parameter groups the "
            "same betas, or use objective='progress'."
        )
    return STABILITY[name](momenta.pop())

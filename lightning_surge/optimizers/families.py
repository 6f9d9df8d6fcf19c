"""What an optimizer steps along and how far, and how its weight decay enters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lightning_surge.measure.direction import GRADIENT, ORTHOGONAL, SIGN, Direction

DECOUPLED = ("adamw", "adafactor", "lion", "muon", "sgdw")


def lr_scales(lrs: Sequence[float]) -> list[float]:
    """Each parameter group's learning rate relative to the largest; 1 where all are 0, as in a warm-up."""
    largest = max(lrs)
    return [lr / largest for lr in lrs] if largest > 0.0 else [1.0] * len(lrs)


def parameter_scales(optimizer: Optimizer, group: Mapping[str, Any]) -> list[float]:
    """How far a learning rate of 1 moves a coordinate of each parameter of a group; 1 but for Adafactor.

    Adafactor's steps are relative: its learning rate is multiplied by the root mean square of the parameter
    (Shazeer and Stern 2018, arXiv:1804.04235, section 8).
    """
    parameters = group["params"]
    relative = any(kind.__name__.lower() == "adafactor" for kind in type(optimizer).__mro__)
    if not relative or not parameters or not group.get("scale_parameter", True):
        return [1.0] * len(parameters)
    epsilon = group.get("eps")
    least = float(
        (epsilon[1] if isinstance(epsilon, (tuple, list)) else None) or group.get("eps_scale", 1e-3)
    )
    norms = torch.stack([torch.linalg.vector_norm(p.detach().float()).cpu() for p in parameters]).tolist()
    return [max(least, norm / math.sqrt(p.numel())) for norm, p in zip(norms, parameters, strict=True)]


def largest_lr(optimizer: Optimizer) -> float:
    """The learning rate above which the optimizer takes no more notice of it in its coming step.

    Infinite, but for torch's Adafactor, which uses `min(lr, 1 / sqrt(t))` at step `t`.
    """
    if not isinstance(optimizer, torch.optim.Adafactor):
        return math.inf
    # Of the parameter that has been trained longest.
    steps = next((float(state["step"]) for state in optimizer.state.values() if "step" in state), 0.0)
    return 1.0 / math.sqrt(steps + 1.0)


def decay_follows_lr(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a parameter group's weight decay takes `lr * weight_decay` of the weights at every step.

    So does decoupled decay, and SGD's without momentum, where the two forms are one (Loshchilov and Hutter
    2019, arXiv:1711.05101, Propositions 1 and 2).
    """
    if group.get("fixed_decay", False) or group.get("unscaled_wd", False):
        return False
    for option in ("decoupled_weight_decay", "weight_decouple"):
        if option in group:
            return bool(group[option])
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    if any(name.startswith("sgd") for name in names) and group.get("momentum", 0.0) == 0.0:
        return True
    return any(part in name for name in names for part in DECOUPLED)


class Family(NamedTuple):
    """What is known of an optimizer.

    Attributes:
        why: the reason, as the end of a sentence about the optimizer.
        direction: what it steps along; None if that cannot be measured, so that only rules that measure
            nothing apply.
        names: of classes, in lower case, with spaces between them.
        fragments: parts of such names, for variants (`AdamW8bit`, `FusedAdam`).
        scalable: whether a learning rate written for one step acts on that step.
        known: whether the optimizer was recognised.
    """

    why: str
    direction: Direction | None = None
    names: str = ""
    fragments: tuple[str, ...] = ()
    scalable: bool = True
    known: bool = True


# By class name, so that the same algorithm from another package is recognised too. The first that matches
# counts: `MuonWithAuxAdam` is no Adam.
FAMILIES = (
    Family("takes its learning rate for the sizes of its first steps only", names="rprop", scalable=False),
    Family(
        "takes the learning rate that it finds at one step for the next one, so a factor comes a step late",
        names="asgd",
        scalable=False,
    ),
    Family("evens out the singular values of whole matrices", ORTHOGONAL, fragments=("muon",)),
    Family(
        "steps by whole matrices, evening out their singular values or axes, not coordinate by coordinate",
        names="soap dion scion scionlight kron psgd splus spectralsphere adago conda racs alice fira apollo",
        fragments=("shampoo", "galore"),
    ),
    Family(
        "finds the size of its steps itself, so its learning rate is no distance",
        names="adadelta",
        fragments=("dadapt", "prodigy"),
    ),
    Family("steps from a point other than the one at which it takes gradients", fragments=("schedulefree",)),
    Family(
        "divides whole tensors by one size, so that layers count otherwise than in a measurement",
        names="lars larc novograd nvnovograd adammini adam_mini fromage nero",
        fragments=("lamb", "lars"),
    ),
    Family(
        "divides by an estimate of the curvature, so its steps go along neither sign nor gradient",
        names="lbfgs adahessian",
    ),
    Family(
        "divides by a running size of the gradient, or takes its sign",
        SIGN,
        "adamax adan signsgd tiger",
        ("adam", "lion", "adafactor", "adagrad", "rmsprop"),
    ),
    Family("steps along the gradient", GRADIENT, "sgd sgdw sgd8bit sgd32bit fusedsgd"),
)
# Most optimizers that nobody has heard of are variants of Adam. Whoever meets one is told.
UNKNOWN = Family("is not known here", SIGN, known=False)


def optimizer_family(optimizer: Optimizer) -> Family:
    """What is known of an optimizer, from its class and its options.

    Subclasses count as what they derive from; quantised and fused variants (`AdamW8bit`, `FusedAdam`) are
    recognised by the name they contain.

    References:
        Li et al. 2024, arXiv:2405.14578, section 2, for Adam-style updates as sign updates; Bernstein and
        Newhouse 2024, arXiv:2409.20325, for Muon's and Shampoo's as the same in the spectral norm.
    """
    for kind in type(optimizer).__mro__:
        name = kind.__name__.lower()
        for family in FAMILIES:
            if name in family.names.split() or any(fragment in name for fragment in family.fragments):
                return _with_options(family, optimizer)
    return UNKNOWN


def _with_options(family: Family, optimizer: Optimizer) -> Family:
    groups = optimizer.param_groups
    if family.direction and any(group.get("maximize", False) for group in groups):
        return Family("climbs, with maximize=True, where measurements assume a descent")
    if family.direction is SIGN and any(group.get("centered", False) for group in groups):
        return Family(
            "divides, with centered=True, by the deviation alone: its steps grow with the gradient's mean"
        )
    return family


def direction_of(optimizer: Optimizer) -> Direction:
    """What measurements are taken along; the sign where the family has none, and nothing is measured."""
    return optimizer_family(optimizer).direction or SIGN

"""Which law an optimizer obeys: a table of class names, with the reasons."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch.optim import Optimizer

__all__ = ["Family", "OptimizerKind", "optimizer_family", "optimizer_kind"]

OptimizerKind = Literal["sign", "gradient", "unmeasured", "unscalable", "unknown"]


class Family(NamedTuple):
    """What is known of an optimizer.

    Attributes:
        kind: `"sign"`: an update's length does not grow with the gradient, coordinate by coordinate;
            `"gradient"`: it is the gradient; `"unmeasured"`: it takes neither of these directions, so only
            rules that measure nothing apply; `"unscalable"`: a learning rate written for one step does not
            act on that step; `"unknown"`.
        why: the reason, as the end of a sentence about the optimizer.
        names: of classes, in lower case.
        fragments: parts of such names, for variants (`AdamW8bit`, `FusedAdam`).
    """

    kind: OptimizerKind
    why: str
    names: frozenset[str] = frozenset()
    fragments: tuple[str, ...] = ()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By class name, so that the same algorithm from another package is recognised too. The first that matches
# counts: `MuonWithAuxAdam` is no Adam.
FAMILIES = (
    Family("unscalable", "takes its learning rate for the sizes of its first steps only", _names("rprop")),
    Family(
        "unscalable",
        "takes the learning rate that it finds at one step for the next one, so a factor comes a step late",
        _names("asgd"),
    ),
    Family(
        "unmeasured",
        "steps by whole matrices, evening out their singular values or axes, not coordinate by coordinate",
        _names(
            "soap dion scion scionlight kron psgd splus spectralsphere adago conda racs alice fira apollo"
        ),
        ("muon", "shampoo", "galore"),
    ),
    Family(
        "unmeasured",
        "finds the size of its steps itself, so its learning rate is no distance",
        _names("adadelta"),
        ("dadapt", "prodigy"),
    ),
    Family(
        "unmeasured",
        "steps from a point other than the one at which it takes gradients",
        fragments=("schedulefree",),
    ),
    Family(
        "unmeasured",
        "divides whole tensors by one size, so that layers count otherwise than in a measurement",
        _names("lars larc novograd nvnovograd adammini adam_mini fromage nero"),
        ("lamb", "lars"),
    ),
    Family(
        "unmeasured",
        "divides by an estimate of the curvature, so its steps go along neither sign nor gradient",
        _names("lbfgs adahessian"),
    ),
    Family(
        "sign",
        "divides by a running size of the gradient, or takes its sign",
        _names("adamax adan signsgd tiger"),
        ("adam", "lion", "adafactor", "adagrad", "rmsprop"),
    ),
    Family("gradient", "steps along the gradient", _names("sgd sgdw sgd8bit sgd32bit fusedsgd")),
)
UNKNOWN = Family("unknown", "is not known here")


def optimizer_family(optimizer: Optimizer) -> Family:
    """What is known of an optimizer, from its class and its options.

    Subclasses count as what they derive from; quantised and fused variants (`AdamW8bit`, `FusedAdam`)
    are recognised by the name they contain.

    Args:
        optimizer: the raw torch optimizer.

    Returns:
        Its kind, and the reason.

    Example:
        >>> import torch
        >>> optimizer_family(torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))])).why
        'takes its learning rate for the sizes of its first steps only'

    References:
        Li et al. 2024, arXiv:2405.14578, section 2, for Adam-style updates as sign updates; Bernstein and
        Newhouse 2024, arXiv:2409.20325, for Muon's and Shampoo's as the same in the spectral norm.
    """
    for kind in type(optimizer).__mro__:
        name = kind.__name__.lower()
        for family in FAMILIES:
            if name in family.names or any(fragment in name for fragment in family.fragments):
                return _with_options(family, optimizer)
    return UNKNOWN


def _with_options(family: Family, optimizer: Optimizer) -> Family:
    groups = optimizer.param_groups
    if family.kind in ("sign", "gradient") and any(group.get("maximize", False) for group in groups):
        return Family("unmeasured", "climbs, with maximize=True, where measurements assume a descent")
    if family.kind == "sign" and any(group.get("centered", False) for group in groups):
        return Family(
            "unmeasured",
            "divides, with centered=True, by the deviation alone: its steps grow with the gradient's mean",
        )
    return family


def optimizer_kind(optimizer: Optimizer) -> OptimizerKind:
    """Whether an optimizer steps along the sign of the gradient or along the gradient.

    Args:
        optimizer: the raw torch optimizer.

    Returns:
        The kind of its `Family`.

    Example:
        >>> import torch
        >>> optimizer_kind(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
        'sign'
        >>> optimizer_kind(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))]))
        'unmeasured'
    """
    return optimizer_family(optimizer).kind

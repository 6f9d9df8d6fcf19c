"""Which objective is followed where the user chose none: the edge of stability, if it can be measured."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_surge.callbacks.checks import check_edge
from lightning_surge.callbacks.settings import DEFAULT_OBJECTIVE, WITHOUT_EDGE

__all__ = ["objective_at_start", "objective_when_clipped"]


def objective_at_start(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, index: int | None
) -> str:
    """The default objective, or the one for where the edge cannot be measured, with a message that says why.

    Args:
        trainer: at `on_fit_start`, with its optimizers.
        pl_module: the module to train.
        name: of the callback, for messages.
        index: of the optimizer; None for the only one.

    Returns:
        Key of `OBJECTIVES`.
    """
    try:
        check_edge(trainer, pl_module, index)
    except MisconfigurationException as error:
        rank_zero_info(f"{name} follows objective={WITHOUT_EDGE!r}, not the default. {error}")
        return WITHOUT_EDGE
    return DEFAULT_OBJECTIVE


def objective_when_clipped(name: str, *, may_choose: bool) -> str:
    """What to follow in place of the edge once gradients turn out to be clipped, with a message.

    Args:
        name: of the callback, for messages.
        may_choose: whether the user has left the choice to the callback, which else stays with the edge.

    Returns:
        Key of `OBJECTIVES`.
    """
    why = "gradients are changed between manual_backward and the step, as by clipping"
    if may_choose:
        rank_zero_info(
            f"{name} follows objective={WITHOUT_EDGE!r}, not the default: {why}, and "
            "Adam's averages then do not tell the edge of stability."
        )
        return WITHOUT_EDGE
    rank_zero_warn(
        f"Expected no gradient clipping for objective='edge', but {why}: no edge of stability "
        "can be told. Use objective='progress'."
    )
    return DEFAULT_OBJECTIVE

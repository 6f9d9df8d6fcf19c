"""What cannot be combined with the callback: refused with a remedy, before any time is spent on training."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNBase
from torch.optim import Optimizer

from lightning_surge.callbacks.hosts import overrides
from lightning_surge.callbacks.processes import check_processes
from lightning_surge.callbacks.settings import REFERENCE_RULES
from lightning_surge.moments import LEAST_BETA_1
from lightning_surge.optimizer_families import optimizer_family
from lightning_surge.optimizers import decay_follows_lr, has_coupled_decay, stability_constant

__all__ = [
    "check_edge",
    "check_optimizer",
    "check_trainer",
    "check_weight_decay",
    "clips_gradients",
    "rounds_products",
    "served_optimizer",
    "trained_optimizers",
]

# The others compute with copies of the weights in 8 or 16 bits.
FULL_PRECISION = ("32-true", "64-true")


def check_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, *, measures: bool, repeats_step: bool
) -> None:
    """Refuse a Trainer or module that the callback cannot serve.

    Args:
        trainer: at `setup`.
        pl_module: the module to train.
        name: of the callback, for messages.
        measures: whether gradients will be measured.
        repeats_step: whether probes will call `training_step`.

    Raises:
        MisconfigurationException: with the rule, what was found, and the remedy.
    """
    check_processes(trainer, name, measures=measures)
    if not pl_module.automatic_optimization and repeats_step:
        raise MisconfigurationException(
            f"{name} cannot repeat the training_step of {type(pl_module).__name__}, which optimizes "
            "manually: pass loss_fn=, a function of (module, batch) that returns the mean loss which the "
            "optimizer minimises."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"{name} must see every batch, got training_step(dataloader_iter) in "
            f"{type(pl_module).__name__}: take the batch as an argument."
        )


def served_optimizer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, index: int | None
) -> Optimizer:
    """The optimizer whose learning rate the callback sets.

    Args:
        trainer: at `on_fit_start`, with its optimizers.
        pl_module: the module to train.
        name: of the callback, for messages.
        index: its place in what `configure_optimizers` returns; None for the only one.

    Returns:
        The raw torch optimizer.

    Raises:
        MisconfigurationException: if there is none, or no saying which.
    """
    trained = trained_optimizers(trainer.optimizers)
    found = f"{len(trained)} from configure_optimizers of {type(pl_module).__name__}"
    if index is None and len(trained) > 1:
        raise MisconfigurationException(
            f"{name} needs to know which optimizer it serves, got {found}: pass one "
            f"{name}(optimizer=i, loss_fn=...) for each that is to be served, i counting from 0, with the "
            "loss that this optimizer minimises."
        )
    if not trained:
        raise MisconfigurationException(
            f"{name} needs an optimizer, got {found}: return one that holds the parameters to train."
        )
    if index is None:
        return trained[0]
    if not 0 <= index < len(trainer.optimizers) or trainer.optimizers[index] not in trained:
        raise MisconfigurationException(
            f"Expected 0 <= optimizer < {len(trainer.optimizers)} of one with parameters, got "
            f"optimizer={index} and {found}: use its place in what configure_optimizers returns."
        )
    return trainer.optimizers[index]


def check_optimizer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, law: str, index: int | None = None
) -> None:
    """Refuse optimizers that the law is not about, and name one that is not known.

    Args:
        trainer: at `on_fit_start`, with its optimizers.
        pl_module: the module to train.
        name: of the callback, for messages.
        law: the callback's.
        index: of the optimizer; None for the only one.

    Raises:
        MisconfigurationException: with the rule, what was found, and the remedy.
    """
    optimizer = served_optimizer(trainer, pl_module, name, index)
    kind, why, *_ = optimizer_family(optimizer)
    _check_lr(optimizer, name)
    if kind == "unscalable":
        raise MisconfigurationException(
            f"{name} writes a learning rate for one step, got {type(optimizer).__name__}, which {why}: use "
            "another optimizer, as SGD or AdamW."
        )
    if law in REFERENCE_RULES:
        return
    if kind == "unmeasured":
        raise MisconfigurationException(
            f"law={law!r} measures along the sign of the gradient or along the gradient, got "
            f"{type(optimizer).__name__}, which {why}: pass law='sqrt', 'linear' or 'constant', which "
            "measure nothing, or use another optimizer, as AdamW or SGD."
        )
    if kind == "unknown":
        rank_zero_warn(
            f"{name} does not know {type(optimizer).__name__}: it is treated as an Adam-style optimizer, "
            "whose steps do not grow with the gradient. If they do, pass law='sqrt' or another rule."
        )
    if kind == "gradient" and law.startswith("theorem"):
        raise MisconfigurationException(
            f"law={law!r} is about sign-like updates, got {type(optimizer).__name__}: use "
            "law='measured', which takes the gradient-noise law for it."
        )
    if kind == "gradient" and clips_gradients(trainer, pl_module):
        rank_zero_warn(
            f"law={law!r} takes the steps of {type(optimizer).__name__} to be the gradient's, got clipping: "
            "while most steps are clipped their length is the same at every batch size, and the factor too "
            "large. Pass law='sqrt' if they are."
        )
    _check_parameters(optimizer, name)


def _check_lr(optimizer: Optimizer, name: str) -> None:
    """Refuse optimizers that have no learning rate to multiply."""
    kind = type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        if group.get("relative_step", False) or group.get("lr") is None:
            raise MisconfigurationException(
                f"{name} multiplies the learning rate, got parameter group {index} of {kind} with "
                f"lr={group.get('lr')} and relative_step={group.get('relative_step', False)}, which leaves "
                "it to the optimizer: pass lr= (and relative_step=False, warmup_init=False) and a scheduler."
            )


def check_weight_decay(optimizer: Optimizer, name: str) -> None:
    """Refuse `scale_weight_decay=False` where `lr * weight_decay` is not what decays per step.

    Args:
        optimizer: the one that is trained with.
        name: of the callback, for messages.

    Raises:
        MisconfigurationException: with the rule, what was found, and the remedy.
    """
    for index, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay", 0.0)
        if decay == 0.0 or decay_follows_lr(optimizer, group):
            continue
        raise MisconfigurationException(
            "scale_weight_decay=False keeps lr * weight_decay, which is the decay per step only where that "
            f"is decoupled, got parameter group {index} of {type(optimizer).__name__} with weight_decay="
            f"{float(decay):g}, whose decay is part of the gradient: {name} cannot take the factor off again "
            "after averages, momentum or a division. Use AdamW, SGD without momentum, or an option such as "
            "decoupled_weight_decay=True, or leave scale_weight_decay=True."
        )


def check_edge(trainer: pl.Trainer, pl_module: pl.LightningModule, index: int | None = None) -> None:
    """Refuse what keeps Adam's edge of stability at other batch sizes from being told.

    Args:
        trainer: at `on_fit_start`, with its optimizers.
        pl_module: the module to train.
        index: of the optimizer; None for the only one.

    Raises:
        MisconfigurationException: with the rule, what was found, and the remedy.
    """
    optimizer = served_optimizer(trainer, pl_module, "objective='edge'", index)
    try:
        stability_constant(optimizer)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    name = type(optimizer).__name__
    if has_coupled_decay(optimizer):
        raise MisconfigurationException(
            f"Expected decoupled weight decay for objective='edge', got {name}, whose averages hold the "
            "decay too: use AdamW or decoupled_weight_decay=True, weight_decay=0, or objective='progress'."
        )
    beta_1, beta_2 = optimizer.param_groups[0]["betas"][:2]
    if any(tuple(group["betas"][:2]) != (beta_1, beta_2) for group in optimizer.param_groups):
        raise MisconfigurationException(
            "Expected the same betas in all parameter groups for objective='edge', got several: one batch "
            "size is followed through one pair of averages. Use objective='progress'."
        )
    if beta_1 <= LEAST_BETA_1:
        raise MisconfigurationException(
            f"Expected beta_1 > 1/3 for objective='edge', got {name} with beta_1={beta_1}: its averages then "
            "hardly tell the mean gradient from its noise. Use objective='progress'."
        )
    if str(trainer.precision) not in FULL_PRECISION:
        raise MisconfigurationException(
            f"Expected precision='32-true' or higher for objective='edge', got {trainer.precision!r}: its "
            "secants are so short that 16-bit copies of the weights would not move. Use objective='progress'."
        )
    schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
    schedulers = (one for one in schedulers if getattr(one, "optimizer", optimizer) is optimizer)
    if any(getattr(one, "cycle_momentum", False) for one in schedulers):
        raise MisconfigurationException(
            "Expected a constant beta_1 for objective='edge', got a scheduler with cycle_momentum=True: "
            "Adam's averages then do not tell the gradient from its noise. Pass cycle_momentum=False, or use "
            "objective='progress'."
        )
    if clips_gradients(trainer, pl_module):
        raise MisconfigurationException(
            "Expected no gradient clipping for objective='edge', got gradient_clip_val="
            f"{trainer.gradient_clip_val} or an own configure_gradient_clipping: Adam's averages of clipped "
            "gradients do not tell those at other batch sizes. Use objective='progress'."
        )
    if _on_gpu(optimizer) and rounds_products(pl_module):
        raise MisconfigurationException(
            "Expected float32 products for objective='edge', got TF32, which rounds the weights to 10 bits: "
            "its secants are so short that most would not move. Call "
            "torch.set_float32_matmul_precision('highest') and set torch.backends.cudnn.allow_tf32 = False, "
            "or use objective='progress'."
        )


def _on_gpu(optimizer: Optimizer) -> bool:
    """Whether a parameter is on a CUDA device."""
    return any(p.device.type == "cuda" for group in optimizer.param_groups for p in group["params"])


def rounds_products(pl_module: pl.LightningModule) -> bool:
    """Whether a GPU multiplies this module's float32 numbers in TF32, which keeps 10 bits."""
    convolves = any(isinstance(module, (_ConvNd, RNNBase)) for module in pl_module.modules())
    try:
        return torch.get_float32_matmul_precision() != "highest" or (
            convolves and torch.backends.cudnn.allow_tf32
        )
    except RuntimeError:
        # Somebody used the newer switches, which the older ones cannot always sum up.
        matmul: Any = torch.backends.cuda.matmul
        convolution: Any = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (unknown to mypy)
        return matmul.fp32_precision == "tf32" or (convolves and convolution.fp32_precision == "tf32")


def clips_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether the optimizer sees other gradients than the loss's."""
    return bool(trainer.gradient_clip_val) or overrides(pl_module, "configure_gradient_clipping")


def _check_parameters(optimizer: Optimizer, name: str) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.device.type == "mps":
                raise MisconfigurationException(
                    f"{name} sums in float64, which device 'mps' does not have: use accelerator='cpu', or "
                    "law='sqrt', which measures nothing."
                )
            if torch.finfo(parameter.dtype).eps > torch.finfo(torch.float32).eps:
                raise MisconfigurationException(
                    f"Expected float32 parameters, got dtype {parameter.dtype}, which cannot hold the "
                    "small moves that measure curvature: keep float32 parameters "
                    "(precision='bf16-mixed' or '16-mixed' does, which computes in 16 bits all the same), or "
                    "pass law='sqrt', law='linear' or law='constant', which measure nothing."
                )


def trained_optimizers(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """The real ones: Lightning stands in an optimizer without parameters where there is none."""
    return [optimizer for optimizer in optimizers if any(group["params"] for group in optimizer.param_groups)]

"""The loss that training minimises, once more for the same batch and without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_surge.measure.batches import shared_copy
from lightning_surge.measure.distributed import RankError, Ranks
from lightning_surge.measure.replay import Chunk, TraceError, no_trace

LossFn = Callable[[pl.LightningModule, Any], Tensor]
"""Mean loss of a batch, given the module and the batch."""


T = TypeVar("T")


class RepeatedLoss:
    """Computes the loss of a batch as Lightning does, in the middle of a training, and survives failures.

    Args:
        give_up: called with what keeps a measurement from being taken.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loss_fn: LossFn | None,
        ranks: Ranks,
        give_up: Callable[[Exception], None],
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._loss_fn = loss_fn
        self._ranks = ranks
        self._give_up = give_up
        # Whether the latest repetition has left no trace: until then parameters are copied.
        self._clean = False

    def __call__(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, as a fresh graph."""
        batch = shared_copy(batch)
        if self._loss_fn is not None:
            with self._trainer.precision_plugin.train_step_context():
                loss: Any = self._loss_fn(self._module, batch)
        else:
            indexed = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
            arguments = (batch, batch_idx) if indexed else (batch,)
            if self._ranks.count > 1:
                # Around the wrapper, whose forward pass would prepare a reduction.
                with self._trainer.precision_plugin.train_step_context():
                    loss = self._module.training_step(*arguments)
            else:
                loss = self._trainer.strategy.training_step(*arguments)
            if isinstance(loss, Mapping):
                loss = loss.get("loss")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"Expected a loss tensor from {'loss_fn' if self._loss_fn else 'training_step'}, "
                f"got {type(loss).__name__}: return the mean loss of the batch"
            )
        return loss

    def uses_batch_statistics(self) -> bool:
        """Whether a BatchNorm layer of the module normalizes by the examples of the batch at hand."""
        layers = (layer for layer in self._module.modules() if isinstance(layer, _BatchNorm))
        return any(layer.training or layer.running_mean is None for layer in layers)

    def together(self, work: Callable[[], T]) -> T | None:
        """Run what may fail, and go on only if it failed on no process."""
        try:
            result = work()
            self._ranks.meet()
        except RankError as error:
            self._give_up(error)
        except Exception as error:
            self._ranks.meet(failed=True, final=isinstance(error, TraceError))
            self._give_up(error)
        else:
            return result
        return None

    def without_trace(self, work: Callable[[], T], parameters: Sequence[Tensor]) -> T | None:
        """The same for what must leave no trace in training."""

        def isolated() -> T:
            with self._isolated(parameters):
                return work()

        return self.together(isolated)

    @contextmanager
    def _isolated(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """No trace in the module, its gradients, the random streams, or the logs."""
        trainer, loggers = self._trainer, self._trainer.loggers
        named: dict[str, Tensor] = dict(self._module.named_parameters())
        known = set(map(id, named.values()))
        named |= {
            f"parameter {i} of the optimizer": p for i, p in enumerate(parameters) if id(p) not in known
        }
        others = (*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs))
        first, self._clean = not self._clean, False
        try:
            with no_trace(list(self._module.modules()), named, others=others, copies=first):
                # Instance attributes hide the methods; they vanish with every other trace.
                vars(self._module)["log"] = vars(self._module)["log_dict"] = lambda *args, **kwargs: None
                self._trainer.loggers = [DummyLogger() for _ in loggers]
                yield
            self._clean = True
        finally:
            self._trainer.loggers = loggers

    @property
    def scale(self) -> float:
        """Factor that a gradient scaler puts on the loss in training."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def scale_for(self, chunks: Sequence[Chunk], mean_batch: float) -> float:
        """Factor that the losses of slices may carry, so that no example weighs more than in training.

        A scaler goes to where gradients of whole windows nearly overflow. Those of a slice are means over
        fewer examples. A power of two leaves every digit as it is.
        """
        scale = self.scale
        if scale == 1.0:
            return scale
        (smallest,) = self._ranks.least(-max(piece.size for chunk in chunks for piece in chunk.pieces))
        largest = -smallest
        window = max(mean_batch, largest) * self._trainer.accumulate_grad_batches
        share = min(chunk.size for chunk in chunks) / window
        return scale * 2.0 ** min(math.floor(math.log2(share)), 0)

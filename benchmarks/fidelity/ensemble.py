"""Many copies of one network trained at once, each with a learning rate and batches of its own.

A grid of small models is bound by the cost of calling operators, so copies that differ only in their numbers
are stacked and share the calls (`torch.func.vmap`). Adam is elementwise: on the stack it is Adam for each
copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks.fidelity.workloads import Batch, Workload, draw

__all__ = ["Ensemble", "Snapshot", "shared_batch"]

# Examples of all copies together in one vectorised call: beyond it the arithmetic costs, not the calls.
EXAMPLES_PER_CALL = 256
EPS = 1e-8


class Snapshot(NamedTuple):
    """One training at one moment: weights and buffers, and Adam's averages by parameter name."""

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int


class Ensemble:
    """Copies of a workload's network, one from each snapshot, trained with Adam."""

    def __init__(self, workload: Workload, snapshots: Sequence[Snapshot], betas: tuple[float, float]) -> None:
        self.workload = workload
        self.copies = len(snapshots)
        self._skeleton = copy.deepcopy(workload.network()).to("meta")
        networks = []
        for snapshot in snapshots:
            network = workload.network()
            network.load_state_dict(snapshot.weights)
            networks.append(network)
        self.parameters, self.buffers = stack_module_state(networks)
        self.parameters = {name: tensor.detach() for name, tensor in self.parameters.items()}
        self._names = list(self.parameters)
        self._exp_avg = [torch.stack([s.exp_avg[name] for s in snapshots]) for name in self._names]
        self._exp_avg_sq = [torch.stack([s.exp_avg_sq[name] for s in snapshots]) for name in self._names]
        steps = torch.tensor([snapshot.step for snapshot in snapshots], dtype=torch.float64)
        # What is left in each average of the zeros that it began with: the product of the betas of its steps.
        self._left = [beta**steps for beta in betas]
        self.use_betas(*(torch.full_like(steps, beta) for beta in betas))
        self._gradient = vmap(grad(self._loss), randomness="error")

    def use_betas(self, beta_1: Tensor, beta_2: Tensor) -> None:
        """Adam's decay rates of every copy from the next step on."""
        self._betas = (beta_1.double(), beta_2.double())

    def _loss(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch) -> Tensor:
        def network(*inputs: Tensor) -> Tensor:
            return functional_call(self._skeleton, (parameters, buffers), inputs)  # type: ignore[no-any-return]

        return self.workload.loss(network, batch)  # type: ignore[arg-type]

    def step(self, batch: Batch, lr: Tensor) -> None:
        """One Adam step of every copy, on tensors of shape `(copies, batch size, ...)`."""
        size = batch[0].shape[1]
        group = max(1, EXAMPLES_PER_CALL // size)
        gradients: dict[str, list[Tensor]] = {name: [] for name in self._names}
        for start in range(0, self.copies, group):
            part = slice(start, start + group)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # kernels without a batching rule fall back to a loop
                found = self._gradient(
                    {name: tensor[part] for name, tensor in self.parameters.items()},
                    {name: tensor[part] for name, tensor in self.buffers.items()},
                    tuple(tensor[part] for tensor in batch),
                )
            for name in self._names:
                gradients[name].append(found[name])
        self._adam([torch.cat(gradients[name]) for name in self._names], lr)

    @torch.no_grad()
    def _adam(self, gradients: list[Tensor], lr: Tensor) -> None:
        self._left = [left * beta for left, beta in zip(self._left, self._betas, strict=True)]
        of_copy = (1.0 - self._betas[0], self._betas[1], 1.0 - self._betas[1])
        of_copy += (lr / (1.0 - self._left[0]), (1.0 - self._left[1]).sqrt())
        for name, gradient, first, second in zip(
            self._names, gradients, self._exp_avg, self._exp_avg_sq, strict=True
        ):
            shape = (-1, *[1] * (first.dim() - 1))
            new_1, beta_2, new_2, step_size, root = (value.to(first.dtype).view(shape) for value in of_copy)
            first.lerp_(gradient, new_1)
            second.mul_(beta_2).addcmul_(gradient, gradient * new_2)
            divisor = second.sqrt().div_(root).add_(EPS)
            self.parameters[name].sub_(first.div(divisor).mul_(step_size))

    @torch.no_grad()
    def losses(self, sample: Batch, chunk: int = 1024) -> Tensor:
        """Loss of every copy on one sample, with BatchNorm's running statistics as in use after training."""
        network = self.workload.network().eval()
        result = torch.zeros(self.copies)
        for index in range(self.copies):
            state = {
                name: tensor[index] for name, tensor in (*self.parameters.items(), *self.buffers.items())
            }
            network.load_state_dict(state)
            parts = zip(*(tensor.split(chunk) for tensor in sample), strict=True)
            result[index] = sum(
                float(self.workload.loss(network, part)) * len(part[0]) for part in parts
            ) / len(sample[0])
        return result


def shared_batch(data: Batch, size: int, generators: Sequence[torch.Generator], copies: int) -> Batch:
    """A fresh batch for each generator, each seen by so many copies in a row, which then compare alike.

    Tensors have the shape `(generators times copies, size, ...)`.
    """
    drawn = [draw(data, size, generator) for generator in generators]
    return tuple(torch.stack(tensors).repeat_interleave(copies, 0) for tensors in zip(*drawn, strict=True))

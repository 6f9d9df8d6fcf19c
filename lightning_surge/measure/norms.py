"""Gradient noise from gradients that training computes anyway: no pass is added, no weight moved.

The gradient of a step is a sum `g = sum_k a_k g_k` over chunks: the micro-batches of an accumulation window,
of each data-parallel process. Chunk k is a mean over `n_k` independent examples, so for any factors and sizes

    E |g|^2 - sum_k a_k^2 |g_k|^2 = ((sum_k a_k)^2 - sum_k a_k^2) |G|^2
    E |g_k|^2                     = |G|^2 + tr Sigma / n_k

Both left sides are norms that pass by. Sums over many windows are kept, ratios are taken at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_surge.measure.distributed import Ranks
from lightning_surge.measure.gradients import dense, squared_norm
from lightning_surge.measure.records import ChunkStatistics, Measurement

__all__ = ["NormSums", "WindowNorms", "gradient_norms"]

# Windows whose norms are left on the device before they are read, which waits for it.
UNREAD_WINDOWS = 64


@dataclass(frozen=True)
class NormSums:
    """Sums over windows, each weighted by the square of its examples, as pairs of examples count.

    Attributes:
        cross: `n^2 (|g|^2 - sum_k a_k^2 |g_k|^2)`.
        pairs: `n^2 ((sum_k a_k)^2 - sum_k a_k^2)`, pairs of examples in different chunks.
        spread: `sum_k n_k |g_k|^2`.
        examples: in all windows.
        chunks: in all windows.
        windows: how many there were.

    Example:
        Two one-example chunks with gradients (3, 0) and (1, 0), and their mean (2, 0):

        >>> sums = NormSums.of_window(total=4.0, own=[9 / 4, 1 / 4], sizes=[1, 1], factors=[0.5, 0.5])
        >>> sums.measurement().statistics
        ChunkStatistics(batch_size=2.0, grad_sq=3.0, trace_cov=2.0, alignments=())
    """

    cross: float = 0.0
    pairs: float = 0.0
    spread: float = 0.0
    examples: float = 0.0
    chunks: float = 0.0
    windows: float = 0.0

    @classmethod
    def of_window(
        cls, total: float, own: Sequence[float], sizes: Sequence[float], factors: Sequence[float]
    ) -> NormSums:
        """The sums of one window, from `|g|^2`, all `a_k^2 |g_k|^2`, `n_k` and `a_k`."""
        return cls.of_message(_sums(total, list(zip(own, sizes, factors, strict=True))))

    @classmethod
    def of_message(cls, message: Sequence[float]) -> NormSums:
        """The sums of one window; nothing from a single chunk, or from gradients that are not finite."""
        total, own, spread, factors, squares, examples, chunks = message
        if chunks < 2 or not (math.isfinite(total) and math.isfinite(spread)):
            return cls()
        pairs = examples**2 * (factors**2 - squares)
        return cls(examples**2 * (total - own), pairs, spread, examples, chunks, 1.0)

    def __add__(self, other: NormSums) -> NormSums:
        return NormSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def measurement(self) -> Measurement:
        """What the windows tell of the noise; there must have been one."""
        grad_sq = self.cross / self.pairs
        trace_cov = (self.spread - grad_sq * self.examples) / self.chunks
        per_window = ChunkStatistics(self.examples / self.windows, grad_sq, trace_cov, ())
        chunks = max(2, round(self.chunks / self.windows))
        return Measurement(per_window, (), 0.0, chunks, pairs=self.pairs)


def _sums(total: float, rows: Sequence[tuple[float, float, float]]) -> tuple[float, ...]:
    """What `NormSums.of_message` takes, from `|g|^2` and rows of `a_k^2 |g_k|^2`, `n_k` and `a_k`."""
    own, sizes, factors = (sum(row[i] for row in rows) for i in range(3))
    spread = sum(n * r / a**2 for r, n, a in rows)
    return total, own, spread, factors, sum(a**2 for _, _, a in rows), sizes, float(len(rows))


class GradientNorms(ABC):
    """How a strategy hands out gradients: one subclass for each way.

    Args:
        ranks: the processes that measure together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._parameters: Sequence[Tensor] = ()

    @abstractmethod
    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A micro-batch's backward pass is about to start."""

    @abstractmethod
    def end(self) -> Tensor:
        """`|a_k g_k|^2` of that pass, which has ended, with `.grad` left as it would be without this."""

    @abstractmethod
    def release(self) -> None:
        """Let go of everything, wherever a pass has failed."""

    def total(self) -> Tensor:
        """`|g|^2` of what has accumulated."""
        return squared_norm([parameter.grad for parameter in self._parameters])

    def message(self, window: Window) -> tuple[float, ...]:
        """Numbers of a window of which the processes send each other the sum."""
        return window.sums(1.0 / self.ranks.count)

    def sums(self, message: Sequence[float]) -> NormSums:
        """What a summed message says of the window."""
        return NormSums.of_message(message)


class StashedNorms(GradientNorms):
    """Sets aside what has accumulated during a pass: one more gradient-sized buffer while it runs.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> (3 * weight).sum().backward()
        >>> norms = StashedNorms(Ranks())
        >>> norms.begin([weight]); (4 * weight).sum().backward(); norms.end().item()
        16.0
        >>> weight.grad, norms.total().item()
        (tensor([7.]), 49.0)
    """

    _stashed: Sequence[Tensor | None] = ()

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Set the accumulated gradients aside."""
        self._parameters = parameters
        stashed = [parameter.grad for parameter in parameters]
        if any(gradient is not None for gradient in stashed):
            self._stashed = stashed
            for parameter in parameters:
                parameter.grad = None

    def end(self) -> Tensor:
        """Read what has come, then add it as autograd would have added it."""
        square = self._square()
        self.release()
        return square

    def _square(self) -> Tensor:
        return squared_norm([parameter.grad for parameter in self._parameters])

    def release(self) -> None:
        """Put back what was set aside."""
        stashed, self._stashed = self._stashed, ()
        if not stashed:
            return
        totals, own = [], []
        for parameter, before in zip(self._parameters, stashed, strict=True):
            if before is None:
                continue
            if parameter.grad is not None:
                totals.append(before)
                own.append(parameter.grad)
            parameter.grad = before
        if not totals:
            return
        with torch.no_grad():
            if any(gradient.is_sparse for gradient in (*totals, *own)):
                for total, gradient in zip(totals, own, strict=True):
                    total.add_(gradient)
            else:
                torch._foreach_add_(totals, own)


class ShardedNorms(StashedNorms):
    """The same where each process has a piece of gradients that arrive summed over all (FSDP2).

    A micro-batch of all processes together is one chunk, so its numbers are summed before they are used.
    """

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Set the accumulated pieces aside."""
        super().begin(parameters)
        self._shares = [1.0 / self._holders(parameter) for parameter in parameters]

    def _holders(self, parameter: Tensor) -> int:
        """Processes that hold the same piece."""
        if not isinstance(parameter, DTensor):
            return self.ranks.count
        mesh = parameter.device_mesh
        return math.prod(
            mesh.size(dimension)
            for dimension, placement in enumerate(parameter.placements)
            if not isinstance(placement, Shard)
        )

    def _square(self) -> Tensor:
        return squared_norm([parameter.grad for parameter in self._parameters], self._shares)

    def total(self) -> Tensor:
        """`|g|^2` of the piece, as far as it is this process's share."""
        return self._square()

    def message(self, window: Window) -> tuple[float, ...]:
        """Of every micro-batch its own numbers, since they enter nonlinearly."""
        total, own, sizes, factors = window.read()
        empty = [0.0] * (window.micro_batches - len(own))
        factors = [factor / self.ranks.count for factor in factors]
        return total, *own, *empty, *sizes, *empty, *factors, *empty

    def sums(self, message: Sequence[float]) -> NormSums:
        """Of micro-batches that hold examples."""
        total, rows = message[0], len(message) // 3
        parts = (message[1 + part * rows : 1 + (part + 1) * rows] for part in range(3))
        chunks = [row for row in zip(*parts, strict=True) if row[1] > 0.0]
        return NormSums.of_window(total, *map(list, zip(*chunks, strict=True))) if chunks else NormSums()


class HookedNorms(GradientNorms):
    """Sees a process's own gradients pass by before anything accumulates or reduces them.

    Data parallelism makes `.grad` the reducer's: on the last micro-batch of a window it turns what is local
    into a mean over all processes. The one communication hook that there is stays the user's.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> (3 * weight).sum().backward()
        >>> norms = HookedNorms(Ranks())
        >>> norms.begin([weight]); (4 * weight).sum().backward(); norms.end().item()
        16.0
        >>> weight.grad, norms.total().item()
        (tensor([7.]), 49.0)
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._hooks: list[Any] = []
        self._norms: dict[int, Tensor] = {}

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Hang a hook on every parameter."""
        self._parameters = parameters
        self._hooks = [p.register_hook(self._hook(i)) for i, p in enumerate(parameters)]  # type: ignore[no-untyped-call]

    def _hook(self, index: int) -> Any:
        def see(gradient: Tensor) -> None:
            own = dense(gradient.detach())
            norm = torch.linalg.vector_norm(own, dtype=torch.promote_types(own.dtype, torch.float32))
            # Under reentrant checkpointing a tied weight's gradient comes in parts: their norms say nothing.
            self._norms[index] = norm if index not in self._norms else norm * math.nan

        return see

    def end(self) -> Tensor:
        """What has passed by."""
        norms = list(self._norms.values())
        self.release()
        if not norms:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([norm.to(norms[0].device) for norm in norms]).double().square_().sum()

    def release(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._norms = [], {}


def gradient_norms(ranks: Ranks, parameters: Sequence[Tensor]) -> GradientNorms:
    """The way that fits a strategy and the parameters.

    Args:
        ranks: the processes that measure together.
        parameters: that the optimizer moves.
    """
    if ranks.sharded:
        return ShardedNorms(ranks)
    # Who hooks into accumulation must find what has accumulated.
    watched = any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters)
    return HookedNorms(ranks) if ranks.count > 1 or watched else StashedNorms(ranks)


@dataclass
class Window:
    """The norms of an accumulation window, on the device, and what they mean.

    Attributes:
        micro_batches: that the window will have.
        scale: square of the factor on the loss beyond the `factors`.
    """

    micro_batches: int
    scale: float = 1.0
    own: list[Tensor] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    total: Tensor | None = None

    def read(self) -> tuple[float, list[float], list[float], list[float]]:
        """The numbers, of the loss itself; those of no window where they are not complete."""
        # An optimizer that asks for the same gradients again has overwritten what was summed.
        if self.total is None or len(self.own) > self.micro_batches:
            return 0.0, [], [], []
        device = self.total.device
        values = torch.stack([self.total, *(norm.to(device) for norm in self.own)]).tolist()
        total, *own = (value / self.scale for value in values)
        return total, own, self.sizes, self.factors

    def sums(self, share: float) -> tuple[float, ...]:
        """What `NormSums.of_message` takes, of one of several processes with a share in the total."""
        total, own, sizes, factors = self.read()
        rows = zip(own, sizes, factors, strict=True)
        kept = [(r * share**2, n, a * share) for r, n, a in rows if n > 0.0 and a > 0.0]
        return _sums(total * share, kept)


class WindowNorms:
    """Follows accumulation windows, and keeps what their norms say until a measurement is made of it.

    Args:
        ranks: the processes that measure together.

    Attributes:
        windows: since the last measurement.
        examples: in those windows.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._norms: GradientNorms = StashedNorms(ranks)
        self._parameters: Sequence[Tensor] = ()
        self._window: Window | None = None
        self._unread: list[Window] = []
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self._sums, self._unread = NormSums(), []
        self.windows, self.examples = 0, 0.0

    def follow(self, parameters: Sequence[Tensor], *, afresh: bool) -> None:
        """Take the norms of these parameters' gradients from now on, and forget those of others."""
        self.close()
        if afresh:
            self._begin_afresh()
        self._parameters = parameters
        self._norms = gradient_norms(self._ranks, parameters)

    @property
    def is_open(self) -> bool:
        """Whether a window is followed."""
        return self._window is not None

    def open(self, micro_batches: int) -> None:
        """A window of so many micro-batches begins."""
        self.close()
        self._window = Window(micro_batches)

    def close(self) -> None:
        """Forget the window in hand, whose step is skipped or fails."""
        self._norms.release()
        self._window = None

    def before_backward(self) -> None:
        """A micro-batch's backward pass is about to start."""
        self._norms.begin(self._parameters)

    def after_backward(self, size: float, factor: float, scale: float, *, last: bool) -> None:
        """A micro-batch's backward pass has ended.

        Args:
            size: examples in it, of this process; 0 for one that weighs nothing.
            factor: by which its mean gradient is multiplied in the step's, on this process.
            scale: factor on the loss in this and every other micro-batch of the window.
            last: whether no other one comes before the step.
        """
        window, norms = self._window, self._norms
        assert window is not None
        window.own.append(norms.end())
        window.sizes.append(size)
        window.factors.append(factor)
        if last:
            window.scale, window.total = scale**2, norms.total()

    def message(self) -> tuple[float, ...]:
        """What several processes tell each other of the window that ends."""
        return () if self._window is None else self._norms.message(self._window)

    def end(self, message: Sequence[float], examples: float) -> None:
        """Add the window that ends.

        Args:
            message: sum of all processes'; empty in a process alone.
            examples: behind the step.
        """
        assert self._window is not None
        if message:
            self._sums += self._norms.sums(message)
        else:
            self._unread.append(self._window)
            if len(self._unread) >= UNREAD_WINDOWS:
                self._read()
        self.windows, self.examples = self.windows + 1, self.examples + examples
        self._window = None

    def _read(self) -> None:
        for window in self._unread:
            self._sums += NormSums.of_message(window.sums(1.0))
        self._unread = []

    def take(self) -> Measurement | None:
        """Make a measurement of the windows so far, and start afresh; None if they say nothing."""
        self._read()
        sums = self._sums
        self._begin_afresh()
        return sums.measurement() if sums.pairs > 0.0 else None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. Waits for the device."""
        self._read()
        return {"sums": list(astuple(self._sums)), "windows": self.windows, "examples": self.examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of `state_dict`.

        Raises:
            ValueError: if a value is none that it can have; this object is of no use then.
            KeyError: if one is missing.
        """
        sums = [float(value) for value in state["sums"]]
        windows, examples = state["windows"], float(state["examples"])
        fits = (
            len(sums) == 6 and all(map(math.isfinite, (*sums, examples))) and min(*sums[1:], examples) >= 0.0
        )
        if not fits or type(windows) is not int or windows < 0:
            raise ValueError(
                f"Expected finite sums over windows, got {state}: load what state_dict returned."
            )
        self._sums, self.windows, self.examples = NormSums(*sums), windows, examples

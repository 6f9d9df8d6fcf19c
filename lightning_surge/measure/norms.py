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
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_surge.checking.state import REMEDY
from lightning_surge.measure.distributed import Ranks
from lightning_surge.measure.gradients import squared_norm
from lightning_surge.measure.records import ChunkStatistics, Measurement

T = TypeVar("T")

# In place of a norm that could not be taken.
UNKNOWN = torch.tensor(math.nan, dtype=torch.float64)
# Windows whose norms are left on the device before they are read, which waits for it.
UNREAD_WINDOWS = 64


class Row(NamedTuple):
    """A chunk of a window: `a_k^2 |g_k|^2`, `n_k` and `a_k`."""

    square: float
    size: float
    factor: float


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
    """

    cross: float = 0.0
    pairs: float = 0.0
    spread: float = 0.0
    examples: float = 0.0
    chunks: float = 0.0
    windows: float = 0.0

    @classmethod
    def of_window(cls, total: float, rows: Sequence[Row]) -> NormSums:
        """The sums of one window, from `|g|^2` and its chunks."""
        return cls.of_message(message_of(total, rows))

    @classmethod
    def of_message(cls, message: Sequence[float]) -> NormSums:
        """The same from `message_of`; nothing from a single chunk, or gradients that are not finite."""
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


def message_of(total: float, rows: Sequence[Row]) -> tuple[float, ...]:
    """Numbers that say what `NormSums` needs of a window, and may be summed over processes before."""
    rows = [row for row in rows if row.size > 0.0 and row.factor > 0.0]
    own, sizes, factors = (math.fsum(row[i] for row in rows) for i in range(3))
    spread = math.fsum(row.size * row.square / row.factor**2 for row in rows)
    return total, own, spread, factors, math.fsum(row.factor**2 for row in rows), sizes, float(len(rows))


class Window:
    """An accumulation window: norms on the device, and what they mean."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.own: list[tuple[Tensor, float, float]] = []
        self.total: Tensor | None = None
        self.scale = 1.0  # factor on the loss beyond that of each row

    def read(self, share: float) -> tuple[float, list[Row]]:
        """The numbers, of the loss itself; NaN, which says nothing, where they are not complete.

        A share of a process is taken off the total, and off the factors.
        """
        # An optimizer that asks for the same gradients again has overwritten what was summed.
        if self.total is None or len(self.own) > self.micro_batches:
            return math.nan, []
        device = self.total.device
        squares = [self.total, *(square.to(device) for square, _, _ in self.own)]
        total, *own = (value / self.scale**2 for value in torch.stack(squares).tolist())
        rows = [
            Row(square * share**2, size, factor * share)
            for square, (_, size, factor) in zip(own, self.own, strict=True)
        ]
        return total * share, rows


class GradientNorms(ABC):
    """Norms of what each backward pass of a window adds to the gradients, and what processes tell of them.

    Attributes:
        failure: what prevented a norm from being taken, if something did. Such a norm is NaN, so that its
            window says nothing, and processes still send each other messages of one length.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.failure: str | None = None
        self._parameters: Sequence[Tensor] = ()
        self._shares: Sequence[float] | None = None

    @abstractmethod
    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A micro-batch's backward pass is about to start."""

    @abstractmethod
    def end(self) -> Tensor:
        """`|a_k g_k|^2` of that pass, with `.grad` left as it would be without this."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the gradients, wherever a pass has failed."""

    def total(self) -> Tensor:
        """`|g|^2` of what has accumulated; of a piece, as far as it is this process's share."""
        gradients = [parameter.grad for parameter in self._parameters]
        return self._tried(lambda: squared_norm(gradients, self._shares), UNKNOWN)

    def _tried(self, work: Callable[[], T], otherwise: T) -> T:
        """What the work returns, or something else where it fails, of too little memory perhaps."""
        try:
            return work()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".partition("\n")[0]
            return otherwise

    def message(self, window: Window) -> tuple[float, ...]:
        """Numbers of a window of which the processes send each other the sum."""
        return message_of(*self.read(window, 1.0 / self.ranks.count))

    def read(self, window: Window, share: float = 1.0) -> tuple[float, list[Row]]:
        """`Window.read`, or what says nothing where it fails."""
        nothing: tuple[float, list[Row]] = math.nan, []
        return self._tried(lambda: window.read(share), nothing)

    def sums(self, message: Sequence[float]) -> NormSums:
        """What a summed message says of the window."""
        return NormSums.of_message(message)


class StashedNorms(GradientNorms):
    """Sets aside what has accumulated during a pass: one more gradient-sized buffer while it runs."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._stashed: Sequence[Tensor | None] = ()

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A micro-batch's backward pass is about to start."""
        self._parameters = parameters
        stashed = [parameter.grad for parameter in parameters]
        if any(gradient is not None for gradient in stashed):
            self._stashed = stashed
            for parameter in parameters:
                parameter.grad = None

    def end(self) -> Tensor:
        """`|a_k g_k|^2` of that pass, with `.grad` left as it would be without this."""
        square = self.total()
        self.release()
        return square

    def release(self) -> None:
        """Put back what was set aside, added to as autograd would have done, wherever a pass has failed."""
        stashed, self._stashed = self._stashed, ()
        totals, own = [], []
        for parameter, before in zip(self._parameters if stashed else (), stashed, strict=True):
            if before is None:
                continue
            if parameter.grad is not None and before.is_sparse and not parameter.grad.is_sparse:
                parameter.grad = parameter.grad + before
                continue
            if parameter.grad is not None:
                totals.append(before)
                own.append(parameter.grad)
            parameter.grad = before
        with torch.no_grad():
            if any(gradient.is_sparse for gradient in (*totals, *own)):
                for total, gradient in zip(totals, own, strict=True):
                    total.add_(gradient)
            elif totals:
                torch._foreach_add_(totals, own)


class ShardedNorms(StashedNorms):
    """The same where each process has a piece of gradients that arrive summed over all (FSDP2).

    A micro-batch of all processes together is one chunk, so its numbers are summed before they are used.
    """

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """A micro-batch's backward pass is about to start."""
        super().begin(parameters)
        self._shares = [1.0 / self._holders(parameter) for parameter in parameters]

    def _holders(self, parameter: Tensor) -> int:
        """Processes that hold the same piece."""
        if not isinstance(parameter, DTensor):
            return self.ranks.count
        whole = enumerate(parameter.placements)
        return math.prod(parameter.device_mesh.size(i) for i, p in whole if not isinstance(p, Shard))

    def message(self, window: Window) -> tuple[float, ...]:
        """Of every micro-batch its own numbers, since they enter nonlinearly."""
        total, rows = self.read(window)
        rows = [row._replace(factor=row.factor / self.ranks.count) for row in rows]
        rows += [Row(0.0, 0.0, 0.0)] * (window.micro_batches - len(rows))
        return total, *(value for row in rows for value in row)

    def sums(self, message: Sequence[float]) -> NormSums:
        """Of the micro-batches of all processes."""
        total, *values = message
        return NormSums.of_window(total, [Row(*values[i : i + 3]) for i in range(0, len(values), 3)])


class HookedNorms(GradientNorms):
    """Sees a process's own gradients pass by before anything accumulates or reduces them.

    Data parallelism makes `.grad` the reducer's: on the last micro-batch of a window it turns what is local
    into a mean over all processes. The one communication hook that there is stays the user's.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._hooks: list[Any] = []
        self._squares: dict[int, Tensor] = {}

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Hang a hook on every parameter."""
        self._parameters = parameters
        self._hooks = [p.register_hook(self._hook(i)) for i, p in enumerate(parameters) if p.requires_grad]  # type: ignore[no-untyped-call]

    def _hook(self, index: int) -> Any:
        def see(gradient: Tensor) -> None:
            square = self._tried(lambda: squared_norm([gradient]), UNKNOWN)
            # Under reentrant checkpointing a tied weight's gradient comes in parts: their norms say nothing.
            self._squares[index] = UNKNOWN if index in self._squares else square

        return see

    def end(self) -> Tensor:
        """What has passed by."""
        squares = list(self._squares.values()) or [torch.zeros((), dtype=torch.float64)]
        self.release()
        device = squares[0].device
        return self._tried(lambda: torch.stack([square.to(device) for square in squares]).sum(), UNKNOWN)

    def release(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._squares = [], {}


def gradient_norms(ranks: Ranks, parameters: Sequence[Tensor]) -> GradientNorms:
    """The way that fits the strategy and the parameters."""
    if ranks.sharded:
        return ShardedNorms(ranks)
    # Who hooks into accumulation must find what has accumulated.
    watched = any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters)
    return HookedNorms(ranks) if ranks.count > 1 or watched else StashedNorms(ranks)


class WindowNorms:
    """Follows accumulation windows, and keeps what their norms say until a measurement is made of it.

    Attributes:
        windows: since the last measurement.
        examples: in those windows.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._window: Window | None = None
        self.attach(ranks)
        self._begin_afresh()

    def attach(self, ranks: Ranks) -> None:
        """Take hold of a run of these processes; sums of windows before it are kept."""
        self._ranks = ranks
        self._norms: GradientNorms = StashedNorms(ranks)
        self._parameters: Sequence[Tensor] = ()

    def _begin_afresh(self) -> None:
        self._sums = NormSums()
        self._unread: list[Window] = []
        self.windows, self.examples = 0, 0.0

    def follow(self, parameters: Sequence[Tensor], *, afresh: bool) -> None:
        """Take the norms of these parameters' gradients from now on, and forget those of others."""
        self.close()
        if afresh:
            self._begin_afresh()
        self._parameters = parameters
        self._norms = gradient_norms(self._ranks, parameters)

    def take_failure(self) -> str | None:
        """What has prevented a norm from being taken since the last call, if something has."""
        failure, self._norms.failure = self._norms.failure, None
        return failure

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
        """A micro-batch's backward pass has ended; `last` if no other one comes before the step.

        It has `size` examples of this process, whose mean gradient enters the step's times `factor`. `scale`
        is a factor on the loss in every micro-batch of the window besides.
        """
        window = self._window
        assert window is not None
        window.own.append((self._norms.end(), size, factor))
        if last:
            window.scale, window.total = scale, self._norms.total()

    def message(self) -> tuple[float, ...]:
        """What several processes tell each other of the window that ends."""
        return () if self._window is None else self._norms.message(self._window)

    def end(self, message: Sequence[float], examples: float) -> None:
        """Add the window that ends, with so many examples.

        The message is the sum of all processes'; empty in a process alone.
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
            self._sums += NormSums.of_window(*self._norms.read(window))
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
        """Take over the state of `state_dict`, or raise an error and be of no use."""
        sums = [float(value) for value in state["sums"]]
        windows, examples = state["windows"], float(state["examples"])
        fits = len(sums) == 6 and all(map(math.isfinite, (*sums, examples)))
        if not fits or min(*sums[1:], examples) < 0.0 or type(windows) is not int or windows < 0:
            raise ValueError(f"Expected finite sums over windows, got {state}: {REMEDY}.")
        self._sums, self.windows, self.examples = NormSums(*sums), windows, examples

"""Chunk gradients in, unbiased statistics of the gradient out.

A *chunk* is a group of examples and its *chunk gradient* the mean of their gradients, all
taken at one point of parameter space. Chunks come from anywhere (slices of a batch,
micro-batches of an accumulation window); this module sees tensors and sizes only.

Chunks arrive one at a time and are folded into running sums, whatever their number. They take turns:

* one makes a *direction*, the step that an optimizer would take from it;
* the next one, which shares no example with it, says what that direction is worth.

The former add up to the *prefix*, whose direction is that of a large batch, the latter to the *reference*, an
estimate of the true gradient. That separation is what makes the alignment unbiased: a sign dotted with a
gradient that went into it tends to a function of the batch size alone as soon as noise dominates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_surge.measure.direction import SIGN, Direction
from lightning_surge.measure.distributed import local
from lightning_surge.measure.records import ChunkStatistics, SizedValue

# Elementwise arithmetic on whole gradients works through blocks of this many elements, so that its
# temporaries stay small beside a gradient even where one parameter holds most of the model.
BLOCK_ELEMENTS = 1 << 20


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk tensors of one shape together, in flat blocks of at most `BLOCK_ELEMENTS` elements.

    Of a sharded tensor, the piece of this process.
    """
    flat = [local(tensor).detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK_ELEMENTS):
        yield tuple(tensor[start : start + BLOCK_ELEMENTS] for tensor in flat)


class ChunkStream:
    r"""Folds chunk gradients into `|G|^2`, `tr Sigma` and alignments, in two buffers.

    With chunk sizes `n_k`, `n = sum n_k` and `g = sum n_k g_k / n`, taking expectations of
    `sum n_k |g_k|^2` and `|g|^2` and solving gives, for equal and unequal sizes alike,

        tr Sigma = (sum_k n_k |g_k|^2 - n |g|^2) / (K - 1)
        |G|^2    = |g|^2 - tr Sigma / n

    Both are unbiased because `E|g_k|^2 = |G|^2 + tr Sigma / n_k` for independent examples. The
    alignment `N(b)` is the direction of a chunk dotted with the chunk after it, averaged over such pairs, and
    for the largest size the direction of the whole prefix dotted with the whole reference; both are unbiased
    because the examples are independent. `scales` are learning rates relative to the run's: a step moves
    parameter `i` by `lr * scales[i] * V_i`.

    Example:
        Two one-example chunks with gradients (3, 0) and (1, 0): the mean is (2, 0), so
        `tr Sigma = (9 + 1 - 2 * 4) / 1 = 2` and `|G|^2 = 4 - 2 / 2 = 3`, which is also the
        product of the two independent gradients.

        >>> stream = ChunkStream([torch.zeros(2)])
        >>> stream.add([torch.tensor([3.0, 0.0])], size=1)
        False
        >>> stream.add([torch.tensor([1.0, 0.0])], size=1)
        True
        >>> stream.statistics()._replace(alignments=())
        ChunkStatistics(batch_size=2.0, grad_sq=3.0, trace_cov=2.0, alignments=())

    References:
        McCandlish et al. 2018, arXiv:1812.06162, Appendix A.1, for two sizes; the form for
        arbitrary sizes is derived above.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        scales: Sequence[float] | None = None,
        direction: Direction = SIGN,
    ) -> None:
        self.scales = [1.0] * len(parameters) if scales is None else list(scales)
        assert direction.of is not None, "refused where training is set up"
        self._step = direction.of
        self.prefix = [zeros(parameter) for parameter in parameters]
        self.reference = [zeros(parameter) for parameter in parameters]
        self.prefix_size = self.reference_size = 0.0
        # The chunk that makes a direction, a sum over its examples.
        self.latest: list[Tensor] = []
        self.latest_size = 0.0
        self.sizes: list[float] = []
        self._squares: list[Tensor] = []
        self._pairs: list[tuple[float, float, Tensor]] = []

    @property
    def in_reference(self) -> bool:
        """Whether the next chunk belongs to the reference."""
        return len(self.sizes) % 2 == 1

    def add(self, gradient: Sequence[Tensor | None], size: float) -> bool:
        """Fold in the next chunk; `gradient` is read, not kept."""
        require_size(size)
        complete = self.in_reference
        self._squares.append(squared_norm(gradient))
        if complete:
            self._pairs.append((self.latest_size, size, self._along(self.latest, gradient, self.latest_size)))
            add_scaled(self.reference, gradient, size)
            self.reference_size += size
        else:
            self.latest, self.latest_size = [torch.zeros_like(total) for total in self.prefix], size
            add_scaled(self.latest, gradient, size)
            add_scaled(self.prefix, gradient, size)
            self.prefix_size += size
        self.sizes.append(size)
        return complete

    def latest_direction(self) -> Iterator[Tensor]:
        """Walk the scaled direction of the latest chunk that makes one, in flat blocks."""
        return self._walk(self.latest, self.latest_size)

    def prefix_direction(self) -> Iterator[Tensor]:
        """Walk the scaled direction of the prefix, in flat blocks."""
        return self._walk(self.prefix, self.prefix_size)

    def _walk(self, total: Sequence[Tensor], size: float) -> Iterator[Tensor]:
        for tensor, scale in zip(total, self.scales, strict=True):
            for (block,) in blocks(tensor):
                yield self._step(block / size).mul(scale)

    def _along(self, total: Sequence[Tensor], other: Sequence[Tensor | None], size: float) -> Tensor:
        """`sum_i scale_i V_i . other_i` with the direction `V` of a sum over `size` examples."""
        result = torch.zeros((), dtype=torch.float64, device=total[0].device)
        for tensor, gradient, scale in zip(total, other, self.scales, strict=True):
            if gradient is not None:
                for block, grad_block in blocks(tensor, dense(gradient)):
                    result += scale * torch.dot(self._step(block / size), grad_block.to(block.dtype))
        return result

    def statistics(self) -> ChunkStatistics:
        """The debiased statistics of all chunks added."""
        if not self._pairs:
            raise ValueError(
                f"Expected at least 2 chunks, got {len(self.sizes)}: noise shows only as a difference "
                "between chunks, so split the batch into at least 2 slices or pool 2 batches."
            )
        mean_sq = self._mean_squared_norm(self.reference_size + self.prefix_size)
        whole = self._along(self.prefix, self.reference, self.prefix_size).item() / self.reference_size
        alignments = [SizedValue(float(self.prefix_size), whole)]
        if len(self.sizes) > 2:
            alignments.insert(0, weighted_mean([(b, n, value.item()) for b, n, value in self._pairs]))
        # The reverse pair is free: the direction of the reference against the prefix.
        reverse = self._along(self.reference, self.prefix, self.reference_size).item() / self.prefix_size
        alignments.append(SizedValue(float(self.reference_size), reverse))
        norms = debiased_norms(self.sizes, [square.item() for square in self._squares], mean_sq)
        return norms._replace(alignments=tuple(alignments))

    def _mean_squared_norm(self, size: float) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.reference[0].device)
        for reference, prefix in zip(self.reference, self.prefix, strict=True):
            for reference_block, prefix_block in blocks(reference, prefix):
                mean = (reference_block + prefix_block) / size
                total += torch.dot(mean, mean)
        return float(total.item())


def debiased_norms(sizes: Sequence[float], squares: Sequence[float], mean_sq: float) -> ChunkStatistics:
    """`|G|^2` and `tr Sigma`, as derived in `ChunkStream`, from norms alone."""
    size = float(sum(sizes))
    weighted = sum(n * square for n, square in zip(sizes, squares, strict=True))
    trace_cov = (weighted - size * mean_sq) / (len(sizes) - 1)
    return ChunkStatistics(size, mean_sq - trace_cov / size, trace_cov, ())


def pairs_of(sizes: Sequence[float]) -> float:
    """Pairs of examples in different chunks, ordered: `n^2 - sum_k n_k^2`."""
    return float(sum(sizes) ** 2 - sum(size**2 for size in sizes))


def require_size(size: float) -> None:
    """Refuse what is no number of examples."""
    if not (size > 0 and math.isfinite(size)):
        raise ValueError(
            f"Expected a positive, finite chunk size, got size={size}: "
            "check batch_size_fn, which must count the examples of every slice."
        )


def weighted_mean(rows: Sequence[tuple[float, float, float]]) -> SizedValue:
    """Mean size and mean value of rows of size, weight and value."""
    total = sum(weight for _, weight, _ in rows)
    return SizedValue(
        sum(weight * size for size, weight, _ in rows) / total,
        sum(weight * value for _, weight, value in rows) / total,
    )


def zeros(parameter: Tensor) -> Tensor:
    """A buffer for sums of a parameter's gradients: in float32 at least, whatever the gradients are in."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(local(parameter).shape, dtype=dtype, device=parameter.device)


def dense(gradient: Tensor) -> Tensor:
    """The same gradient, or this process's piece of it, as an ordinary strided tensor."""
    return gradient.to_dense() if gradient.is_sparse else local(gradient)


def add_scaled(total: Sequence[Tensor], gradient: Sequence[Tensor | None], size: float) -> None:
    """Add `size * gradient` to a sum; None counts as zero."""
    for accumulated, grad in zip(total, gradient, strict=True):
        if grad is not None:
            accumulated.add_(local(grad.detach()), alpha=size)


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """`left . right`."""
    pairs = (pair for tensors in zip(left, right, strict=True) for pair in blocks(*tensors))
    return sum(float(torch.dot(a.double(), b.double())) for a, b in pairs)


def squared_norm(gradients: Sequence[Tensor | None], shares: Sequence[float] | None = None) -> Tensor:
    """`|g|^2` as a float64 scalar on the device, from gradients of any dtype."""
    found = [(dense(gradient.detach()), i) for i, gradient in enumerate(gradients) if gradient is not None]
    if not found:
        return torch.zeros((), dtype=torch.float64)
    tensors = [tensor for tensor, _ in found]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype)
    squares = torch.stack([norm.to(tensors[0].device) for norm in norms]).double().square_()
    if shares is not None:
        squares *= torch.tensor([shares[i] for _, i in found], dtype=torch.float64, device=squares.device)
    return squares.sum()

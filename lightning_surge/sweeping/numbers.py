"""Numbers of a sweep: grids as they are typed, and how a batch is cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["accumulation_for", "parse_numbers"]


def accumulation_for(batch_size: int, *, largest: int | None, replicas: int = 1) -> int:
    """Micro-batches per optimizer step: as few equal ones as fit.

    Args:
        batch_size: examples per optimizer step.
        largest: examples that a micro-batch may have; None for any number.
        replicas: data-parallel replicas that share a step.

    Returns:
        The number, a divisor of the replica's share.

    Raises:
        ValueError: if the replicas cannot share the batch.

    Example:
        >>> accumulation_for(96, largest=40)  # three of 32
        3
    """
    share, rest = divmod(batch_size, replicas)
    if rest or not share:
        raise ValueError(
            f"Expected batch sizes that {replicas} replicas can share, got {batch_size}: use multiples of "
            f"{replicas}."
        )
    if largest is None:
        return 1
    if largest < 1:
        raise ValueError(f"Expected max_micro_batch_size >= 1, got {largest}.")
    return next(parts for parts in range(math.ceil(share / largest), share + 1) if share % parts == 0)


def parse_numbers(words: Sequence[str], name: str, *, whole: bool = False) -> tuple[float, ...]:
    """Numbers, and ranges `first:last:count` in equal ratios.

    Args:
        words: as typed.
        name: of the argument, for messages.
        whole: whether only whole numbers will do; those of ranges are rounded.

    Returns:
        Increasing, each once. Ranges are rounded to six digits, so that two sweeps mean the same number.

    Raises:
        ValueError: if a word is neither, or a number is not positive and finite.

    Example:
        >>> parse_numbers(["1e-3:1e-1:5", "1"], "lrs")
        (0.001, 0.00316228, 0.01, 0.0316228, 0.1, 1.0)
        >>> parse_numbers(["16:128:4"], "batch_sizes", whole=True)
        (16, 32, 64, 128)
    """
    numbers: set[float] = set()
    for word in words:
        try:
            numbers.update(_numbers_in(word, whole))
        except (ValueError, OverflowError) as error:
            kind = "positive whole numbers" if whole else "positive numbers"
            example = "16:1024:4" if whole else "1e-4:1e-1:7"
            raise ValueError(
                f"Expected {name} to be {kind} or ranges first:last:count, got {word!r}: write {example} "
                f"for numbers in equal ratios."
            ) from error
    return tuple(sorted(numbers))


def _numbers_in(word: str, whole: bool) -> list[float]:
    parts = word.split(":")
    if len(parts) == 1:
        numbers: list[float] = [int(word)] if whole else [float(word)]
    else:
        if len(parts) != 3:
            raise ValueError(word)
        first, last, count = float(parts[0]), float(parts[1]), int(parts[2])
        if count < 2 or not 0 < first < last < math.inf:
            raise ValueError(word)
        ratio = (last / first) ** (1 / (count - 1))
        exact = [first * ratio**index for index in range(count)]
        numbers = [round(number) if whole else float(f"{number:.6g}") for number in exact]
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(word)
    return numbers

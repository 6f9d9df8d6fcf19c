"""Which cells a sweep wants, which learning rate was best, how long the rest will take: pure functions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from lightning_surge.sweep.cells import Cell, Grid, Record

__all__ = ["Best", "accumulation_for", "best_lr", "parse_numbers", "planned", "remaining_seconds"]


# Between a learning rate and the next one where the grid has only one.
RATIO = math.sqrt(10)


class Best(NamedTuple):
    """The best learning rate of a batch size.

    Attributes:
        batch_size: examples per optimizer step.
        lr: the one.
        loss: mean over the seeds at the end of training.
        target: the loss that had to be reached; None if the loss at the end was compared.
        steps: mean over the seeds of the steps to the target; None without one, or where it was not reached.
        edge: whether all other learning rates that were tried lie on one side.
    """

    batch_size: int
    lr: float
    loss: float
    target: float | None
    steps: float | None
    edge: Literal["lowest", "highest"] | None


class _Score(NamedTuple):
    """Smaller is better: fewer steps to the target, then a smaller loss."""

    steps: float
    loss: float


WORST = _Score(math.inf, math.inf)


def _scores(records: Iterable[Record], batch_size: int, target: float | None) -> dict[float, _Score]:
    """By learning rate, over the seeds; one seed that diverges spoils it."""
    outcomes = defaultdict(list)
    for cell, outcome in records:
        if cell.batch_size == batch_size and outcome.is_answer:
            outcomes[cell.lr].append(outcome)
    scores = {}
    for lr, group in outcomes.items():
        losses = [math.inf if outcome.loss is None else outcome.loss for outcome in group]
        steps = [0.0]
        if target is not None:
            steps = [
                math.inf if entry.steps is None or outcome.loss is None else entry.steps
                for outcome in group
                for entry in outcome.reached or ()
                if entry.target == target
            ]
        scores[lr] = _Score(fmean(steps) if steps else math.inf, fmean(losses))
        if scores[lr].loss == math.inf:
            scores[lr] = WORST
    return scores


def best_lr(records: Iterable[Record], batch_size: int, target: float | None = None) -> Best | None:
    """The best learning rate of a batch size.

    Args:
        records: finished cells of any batch size. Cells that were killed, ran out of memory or failed
            say nothing; a learning rate that diverged with one seed is worse than any that did not.
        batch_size: examples per optimizer step.
        target: compare the steps to this loss, and the loss at the end only among equals; None compares the
            loss at the end.

    Returns:
        It; None where no learning rate gave a loss.

    Example:
        >>> from lightning_surge.sweep.cells import Outcome
        >>> losses = {0.001: 0.5, 0.01: 0.3}
        >>> records = [Record(Cell(8, lr, 0), Outcome("finished", loss)) for lr, loss in losses.items()]
        >>> best = best_lr(records, 8)
        >>> best.lr, best.edge
        (0.01, 'highest')
    """
    scores = _scores(records, batch_size, target)
    if not scores or min(scores.values()) == WORST:
        return None
    lr = min(scores, key=lambda lr: (scores[lr], lr))
    edge: Literal["lowest", "highest"] | None = None
    if lr == max(scores):
        edge = "highest"
    elif lr == min(scores):
        edge = "lowest"
    steps = scores[lr].steps if target is not None and scores[lr].steps < math.inf else None
    return Best(batch_size, lr, scores[lr].loss, target, steps, edge)


def _beyond(
    records: Collection[Record], batch_size: int, lrs: Sequence[float], target: float | None
) -> float | None:
    """The learning rate to try next, beyond the edge where the best one is; None if it has neighbours."""
    lrs = sorted(lrs)
    below = lrs[1] / lrs[0] if len(lrs) > 1 else RATIO
    above = lrs[-1] / lrs[-2] if len(lrs) > 1 else RATIO
    best = best_lr(records, batch_size, target)
    if best is not None:
        # Learning rates that failed count as tried: trying them again, or beyond them, is no use.
        if best.lr == lrs[-1]:
            return float(f"{lrs[-1] * above:.6g}")
        return float(f"{lrs[0] / below:.6g}") if best.lr == lrs[0] else None
    diverged = any(cell.batch_size == batch_size and outcome.is_answer for cell, outcome in records)
    return float(f"{lrs[0] / below:.6g}") if diverged else None


def planned(
    grid: Grid, records: Collection[Record], *, refine: int = 0, targets: Sequence[float] = ()
) -> list[Cell]:
    """All cells that a sweep wants, those among them that are finished too.

    With `refine` a batch size whose cells are all finished, and whose best learning rate has none beyond
    it, gets one more, in the ratio of the last two. The answer depends on the grid and the records only, so
    that a sweep that was killed goes on as if it had not been.

    Args:
        grid: as asked for.
        records: finished cells.
        refine: largest number of learning rates to add to a batch size.
        targets: losses, each of which has a best learning rate of its own; none for the loss at the end.

    Returns:
        Them, in the order to run them.

    Example:
        >>> from lightning_surge.sweep.cells import Outcome
        >>> losses = {0.001: 0.5, 0.002: 0.3}
        >>> records = [Record(Cell(8, lr, 0), Outcome("finished", loss)) for lr, loss in losses.items()]
        >>> [cell.lr for cell in planned(Grid((8,), (0.001, 0.002), (0,)), records, refine=1)]
        [0.001, 0.002, 0.004]
    """
    cells = grid.cells()
    done = {record.cell for record in records}
    for batch_size in grid.batch_sizes:
        lrs = list(grid.lrs)
        for _ in range(refine):
            tried = {Cell(batch_size, lr, seed) for lr in lrs for seed in grid.seeds}
            if not tried <= done:
                break
            known = [record for record in records if record.cell in tried]
            found = (_beyond(known, batch_size, lrs, target) for target in targets or (None,))
            lr = next((lr for lr in found if lr is not None), None)
            if lr is None:
                break
            lrs.append(lr)
            cells += [Cell(batch_size, lr, seed) for seed in grid.seeds]
    return cells


def remaining_seconds(
    records: Iterable[Record], left: Mapping[Cell, float], examples: Mapping[int, int], processes: int
) -> float | None:
    """How long the rest will take, from the seconds per example of finished cells.

    Cells of the same batch size tell most: small batches take longer per example.

    Args:
        records: cells that ran on this machine.
        left: cells to finish, with the seconds that they have been running.
        examples: of a cell, by batch size.
        processes: cells that run at a time.

    Returns:
        Seconds; None before anything finished.

    Example:
        >>> from lightning_surge.sweep.cells import Outcome
        >>> records = [Record(Cell(8, 0.1, 0), Outcome("finished", 1.0, 10, 80, seconds=4.0))]
        >>> remaining_seconds(records, {Cell(8, 0.2, 0): 1.0, Cell(8, 0.3, 0): 0.0}, {8: 80}, processes=1)
        7.0
    """
    spent: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for cell, outcome in records:
        if outcome.status == "finished" and outcome.examples:
            spent[cell.batch_size].append((outcome.seconds, outcome.examples))
    if not spent:
        return None
    everything = [entry for entries in spent.values() for entry in entries]
    needed = []
    for cell, elapsed in left.items():
        entries = spent.get(cell.batch_size, everything)
        rate = sum(seconds for seconds, _ in entries) / sum(count for _, count in entries)
        needed.append(max(0.0, rate * examples[cell.batch_size] - elapsed))
    # However many processes there are, the longest cell has to be waited for.
    return max(sum(needed) / max(1, processes), max(needed, default=0.0))


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

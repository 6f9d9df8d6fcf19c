"""The cells of a sweep: what they share, what each said, which are wanted, which learning rate was best."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

from lightning_surge.checking.state import save

# Between a learning rate and the next one where the grid has only one.
RATIO = math.sqrt(10)
WORST = (math.inf, math.inf)


class SweepError(ValueError):
    """The sweep cannot begin or go on: rule, value, remedy."""


class Cell(NamedTuple):
    """One training run: examples per optimizer step, learning rate of the configuration, seed."""

    batch_size: int
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"batch_size={self.batch_size} lr={self.lr:g} seed={self.seed}"


class Reached(NamedTuple):
    """When the loss first reached a target: optimizer steps, and the examples behind them; None if never."""

    target: float
    steps: int | None
    examples: int | None


@dataclass(frozen=True)
class Outcome:
    """What a cell said."""

    # Its loss became infinite or NaN where it diverged; a signal from outside killed it.
    status: Literal["finished", "diverged", "out_of_memory", "killed", "failed"]
    loss: float | None = None  # None unless it finished
    steps: int = 0
    examples: int = 0
    reached: tuple[Reached, ...] = ()
    message: str = ""
    seconds: float = 0.0  # of wall time, with the start of its process

    @property
    def is_answer(self) -> bool:
        """Whether the cell told how good its learning rate is. One that was killed did not."""
        return self.status in ("finished", "diverged")


@dataclass(frozen=True)
class SweepSettings:
    """What is the same in all cells; the options of `lightning-surge sweep`, whose `--help` explains them.

    `config_digest` is of what the configuration says, with all defaults; `files_digest` of its files as they
    are, to notice an edit while the sweep runs; cells go without the callbacks `left_out`.
    """

    configs: Sequence[str]
    config_digest: str = ""
    files_digest: str = ""
    left_out: Sequence[str] = ()
    batch_size_key: str = ""
    lr_key: str = ""
    steps_keys: Sequence[str] = ()
    examples_keys: Sequence[str] = ()
    overrides: Sequence[str] = ()
    examples: int | None = None
    steps: int | None = None
    metric: str = "val_loss"
    maximize: bool = False
    targets: Sequence[float] = ()
    stop_at_target: bool = False
    checks: int = 10
    smoothing: float | None = None
    max_micro_batch_size: int | None = None
    replicas: int = 1
    batch_size_fn: str | None = None
    model_class: str | None = None
    data_class: str | None = None
    cli_class: str | None = None

    def steps_of(self, batch_size: int) -> int:
        """Optimizer steps of a cell: as many as take its examples, rounded, at least one."""
        return self.steps or max(1, round((self.examples or 0) / batch_size))

    def examples_of(self, batch_size: int) -> int:
        """Examples of a cell."""
        return self.steps_of(batch_size) * batch_size

    def micro_batches_of(self, batch_size: int) -> int:
        """Micro-batches per step of each replica: as few equal ones as fit."""
        share, rest = divmod(batch_size, self.replicas)
        if rest or not share:
            raise ValueError(
                f"Expected batch sizes that {self.replicas} replicas can share, got {batch_size}: use "
                f"multiples of {self.replicas}."
            )
        least = math.ceil(share / (self.max_micro_batch_size or share))
        return next(parts for parts in range(least, share + 1) if share % parts == 0)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change within a sweep. Files may move and be formatted anew."""
        values: dict[str, Any] = save(self)
        del values["configs"], values["files_digest"], values["left_out"]
        return values


class Grid(NamedTuple):
    """Every batch size with every learning rate and every seed."""

    batch_sizes: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def cells(self) -> list[Cell]:
        """All of them; the whole grid of one seed comes before the next seed."""
        return [Cell(size, lr, seed) for seed in self.seeds for size in self.batch_sizes for lr in self.lrs]


class Best(NamedTuple):
    """The best learning rate of a batch size; losses and steps are means over the seeds."""

    batch_size: int
    lr: float
    loss: float  # at the end of training
    target: float | None  # the loss that had to be reached; None if the loss at the end was compared
    steps: float | None  # to the target; None without one, or where it was not reached
    edge: str | None  # "lowest" or "highest" of those that were tried


def _score(outcomes: Sequence[Outcome], target: float | None, sign: int) -> tuple[float, float]:
    """Of a learning rate, over the seeds; smaller is better: steps to the target, then the loss."""
    losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
    if len(losses) < len(outcomes):
        return WORST  # one seed that diverges spoils it
    steps = [entry.steps for outcome in outcomes for entry in outcome.reached if entry.target == target]
    reached = [each for each in steps if each is not None]
    missed = target is not None and (not reached or len(reached) < len(steps))
    return math.inf if missed else fmean(reached or [0]), sign * fmean(losses)


def best_lr(
    records: Mapping[Cell, Outcome], batch_size: int, target: float | None = None, *, maximize: bool = False
) -> Best | None:
    """The best learning rate of a batch size by steps to `target`, or the final loss; None without any."""
    groups = defaultdict(list)
    for cell, outcome in records.items():
        if cell.batch_size == batch_size and outcome.is_answer:
            groups[cell.lr].append(outcome)
    sign = -1 if maximize else 1
    scores = {lr: _score(outcomes, target, sign) for lr, outcomes in groups.items()}
    lr = min(scores, key=lambda lr: (scores[lr], lr), default=0.0)
    steps, loss = scores.get(lr, WORST)
    if loss == math.inf:
        return None
    edge = "highest" if lr == max(scores) else "lowest" if lr == min(scores) else None
    counted = None if target is None or steps == math.inf else steps
    return Best(batch_size, lr, sign * loss, target, counted, edge)


def planned(
    grid: Grid,
    records: Mapping[Cell, Outcome],
    *,
    refine: int = 0,
    targets: Collection[float] = (),
    maximize: bool = False,
) -> list[Cell]:
    """All cells that a sweep wants, in the order to run them, those that are finished too.

    A batch size whose cells are all finished, and whose best learning rate (for the loss, or for one of the
    targets) has none beyond it, gets one more in the ratio of the last two, and up to `refine` of them. All
    depends on the grid and the records only: every worker, and a sweep that was killed, plans the same.
    """
    cells = grid.cells()
    for size in grid.batch_sizes:
        lrs = list(grid.lrs)
        for _ in range(refine):
            tried = {Cell(size, lr, seed) for lr in lrs for seed in grid.seeds}
            if not tried <= records.keys():
                break
            known = {cell: records[cell] for cell in tried}
            bests = (best_lr(known, size, target, maximize=maximize) for target in targets or (None,))
            lr = next((lr for best in bests if (lr := _beyond(known, sorted(lrs), best)) is not None), None)
            if lr is None:
                break
            lrs.append(lr)
            cells += [Cell(size, lr, seed) for seed in grid.seeds]
    return cells


def _beyond(records: Mapping[Cell, Outcome], lrs: Sequence[float], best: Best | None) -> float | None:
    """The learning rate to try next, beyond the edge where the best one is; None if it has neighbours."""
    below, above = (lrs[1] / lrs[0], lrs[-1] / lrs[-2]) if len(lrs) > 1 else (RATIO, RATIO)
    # Learning rates that failed count as tried: trying them again, or beyond them, is no use.
    if best is not None and best.lr == lrs[-1]:
        return float(f"{lrs[-1] * above:.6g}")
    all_diverged = best is None and any(outcome.is_answer for outcome in records.values())
    at_the_bottom = best is not None and best.lr == lrs[0]
    return float(f"{lrs[0] / below:.6g}") if all_diverged or at_the_bottom else None


def parse_numbers(words: Sequence[str], name: str, *, whole: bool = False) -> tuple[float, ...]:
    """Numbers, and ranges `first:last:count` in equal ratios, separated by spaces or commas; increasing.

    Those of ranges are rounded to six digits, or `whole` numbers, so that two sweeps mean the same number.
    """
    numbers: set[float] = set()
    for word in words:
        try:
            for part in word.rstrip(",").split(","):
                if whole and part.startswith("0"):
                    raise ValueError(word)  # 1,024 is one number with a separator, not two
                numbers.update(_numbers_in(part, whole))
        except (ValueError, OverflowError) as error:
            kind, example = ("whole ", "16:1024:4") if whole else ("", "1e-4:1e-1:7")
            raise ValueError(
                f"Expected {name} to be positive {kind}numbers or ranges first:last:count, got {word!r}: "
                f"write {example} for numbers in equal ratios."
            ) from error
    return tuple(sorted(numbers))


def _numbers_in(word: str, whole: bool) -> list[float]:
    ends = word.split(":")
    if len(ends) == 1:
        numbers: list[float] = [int(word) if whole else float(word)]
    else:
        first, last, count = float(ends[0]), float(ends[1]), int(ends[2] if len(ends) == 3 else 0)
        if count < 2 or not 0 < first < last < math.inf:
            raise ValueError(word)
        exact = [first * (last / first) ** (index / (count - 1)) for index in range(count)]
        numbers = [round(number) if whole else float(f"{number:.6g}") for number in exact]
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(word)
    return numbers

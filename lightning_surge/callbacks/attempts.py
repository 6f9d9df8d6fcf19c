"""What may fail on one process while all of them measure, and then ends on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from torch import Tensor

from lightning_surge.ranks import RankError, Ranks

__all__ = ["Attempts"]

T = TypeVar("T")


class Attempts:
    """Runs parts of a measurement, and survives their failure.

    Args:
        ranks: the processes that measure together.
        isolated: makes a context that leaves no trace, given the parameters that are measured.
        give_up: told of every failure, on each process.

    Example:
        >>> from contextlib import nullcontext
        >>> attempts = Attempts(Ranks(), lambda parameters: nullcontext(), lambda error: print(repr(error)))
        >>> attempts.together(lambda: 1 / 2)
        0.5
        >>> attempts.together(lambda: 1 / 0)
        ZeroDivisionError('division by zero')
    """

    def __init__(
        self,
        ranks: Ranks,
        isolated: Callable[[Sequence[Tensor]], AbstractContextManager[None]],
        give_up: Callable[[Exception], None],
    ) -> None:
        self._ranks = ranks
        self._isolated = isolated
        self._give_up = give_up

    def together(self, work: Callable[[], T]) -> T | None:
        """Run what may fail, and go on only if it failed on no process.

        Args:
            work: whose collectives begin with a meeting, so that a process that fails is met at the next one.

        Returns:
            What it returned; None if it failed.
        """
        try:
            result = work()
            self._ranks.meet()
        except RankError as error:
            self._give_up(error)
        except Exception as error:
            self._ranks.meet(failed=True)
            self._give_up(error)
        else:
            return result
        return None

    def without_trace(self, work: Callable[[], T], parameters: Sequence[Tensor]) -> T | None:
        """The same for what must leave no trace in training.

        Args:
            work: as in `together`.
            parameters: that are measured.
        """

        def isolated() -> T:
            with self._isolated(parameters):
                return work()

        return self.together(isolated)

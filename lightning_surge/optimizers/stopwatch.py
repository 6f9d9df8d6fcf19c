"""What the hooks of the package cost: the time that passes inside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Stopwatch:
    """Adds up the time inside `timed` methods of the objects that share it, nested ones once.

    Attributes:
        clock: tells seconds.
        seconds: so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.running = False


def timed(
    method: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """Let a method run on the `_stopwatch` of its object."""

    @wraps(method)
    def run(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        watch: Stopwatch = self._stopwatch
        if watch.running:
            return method(self, *args, **kwargs)
        watch.running, begin = True, watch.clock()
        try:
            return method(self, *args, **kwargs)
        finally:
            watch.seconds += watch.clock() - begin
            watch.running = False

    return run

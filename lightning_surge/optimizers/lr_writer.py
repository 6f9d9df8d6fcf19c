"""Put a factor on an optimizer's learning rates for its update alone.

Schedulers, callbacks and the user's own code all read and write `param_groups`, at any time. A factor that
they can see compounds: `lr *= 0.9` in a hook would decay the factor too. So it is there only while nobody but
the optimizer runs. An optimizer's step calls a closure first (Lightning's runs the forward and backward pass,
`on_before_optimizer_step` and clipping in it), and reads its groups afterwards. The step's pre-hook wraps the
closure: the factor is put on when the closure has returned, and the post-hook takes it off. Under a gradient
scaler the closure has run before the step, which gets none: there the pre-hook itself puts the factor on. A
step that never comes never had a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_surge.optimizers.stopwatch import Stopwatch, timed

DecayFactor = Callable[[Mapping[str, Any]], float | None]
"""The factor on a parameter group's `lr * weight_decay`; None for the learning rate's own."""


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each parameter group as a float; waits for the device of a tensor."""
    return [float(group["lr"]) for group in optimizer.param_groups]


class FactorInUpdate:
    """Multiplies the learning rates of an optimizer while it updates the parameters, and at no other time.

    Args:
        optimizer: the raw torch optimizer. A tensor learning rate is multiplied in place, once if groups
            share it.
        decide: called at every step when the gradients are complete, with `early=False`, or with `early=True`
            before the closure has run; returns the factor, None to leave the learning rate as it is.
        after: called when a step has been taken and the learning rates are the schedule's again.
        decay_factor: asked after `decide`; `weight_decay` is written for the update so that a decay that
            torch multiplies with the learning rate gets this factor. None leaves it to the learning rate.
        tell: called once if the optimizer reads its learning rate before it calls the closure. Such an
            optimizer is served before.
        watch: adds up the time spent here.

    Attributes:
        scheduled: learning rate of each group as the latest update found it, a float or a tensor of its own.
        used: learning rate of each group that the latest update read, likewise.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> factor = FactorInUpdate(optimizer, lambda early: 2.0)
        >>> def closure():
        ...     weight.grad = torch.ones(1)
        ...     return optimizer.param_groups[0]["lr"]
        >>> optimizer.step(closure), weight.item(), optimizer.param_groups[0]["lr"], factor.used
        (0.25, 0.5, 0.25, [0.5])
        >>> factor.remove()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decide: Callable[..., float | None],
        *,
        after: Callable[[], object] | None = None,
        decay_factor: DecayFactor | None = None,
        tell: Callable[[], object] | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scheduled: list[Any] = []
        self.used: list[Any] = []
        self._decide = decide
        self._after = after
        self._decay_factor = decay_factor
        self._tell = tell
        self._stopwatch = watch or Stopwatch()
        self._undo: list[Callable[[], object]] = []
        self._groups: list[dict[str, Any]] | None = None
        # Whether the optimizer reads its groups before the closure; None until its first step has shown it.
        self._early: bool | None = None
        self._served = False
        self._before_hook = optimizer.register_step_pre_hook(self._before_step)
        self._after_hook = optimizer.register_step_post_hook(self._after_step)
        # Whoever moves a schedule in a hook of the optimizer's must not find the factor: it is off before the
        # other hooks after a step.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._after_hook.id, last=False)

    def come_last(self) -> None:
        """Put the factor on after whatever other pre-hooks do. Not while a step is under way."""
        hooks: Any = self.optimizer._optimizer_step_pre_hooks
        if next(reversed(hooks)) != self._before_hook.id:
            hooks.move_to_end(self._before_hook.id)

    def restore(self) -> None:
        """Take the factor off, where an update that raised an error has left it on."""
        self._stop_watching()
        while self._undo:
            self._undo.pop()()

    def remove(self) -> None:
        """Leave the optimizer as it was found."""
        self.restore()
        self._before_hook.remove()
        self._after_hook.remove()

    # ------------------------------------------------------------------ one step

    @timed
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.restore()
        self._served = False
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if not callable(closure):
            self._put_on(early=False)
            return None

        def wrapped() -> Any:
            self.restore()  # an optimizer may ask for the gradients several times
            result = closure()
            self._put_on(early=False)
            return result

        if self._early is None:
            self._watch()
        elif self._early:
            self._put_on(early=True)
        if positional:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    @timed
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()
        if self._after is not None:
            self._after()

    @timed
    def _put_on(self, *, early: bool) -> None:
        factor = self._decide(early=early)
        groups = self.optimizer.param_groups
        if not self._served:
            self.scheduled = [_own(group["lr"]) for group in groups]
        decay_factor = self._decay_factor
        if factor is not None and (factor != 1.0 or decay_factor is not None):
            shared: set[int] = set()
            for group in groups:
                before = _readable(group["lr"])
                self._scale(group, "lr", factor, shared)
                if decay_factor and group.get("weight_decay") and (decay := decay_factor(group)) is not None:
                    # By what was really written: a tensor may hold fewer digits.
                    used = None if before is None else _readable(group["lr"])
                    kept = before / used if before and used else 1.0 if before == 0.0 else 1.0 / factor
                    self._scale(group, "weight_decay", decay * kept, shared)
        if not self._served:
            self.used = [_own(group["lr"]) for group in groups]
        # What an early reader has read stays what it was, whatever is written afterwards.
        self._served = self._served or early

    def _scale(self, group: dict[str, Any], key: str, factor: float, shared: set[int]) -> None:
        value = group[key]
        if factor == 1.0:
            return
        if not isinstance(value, Tensor):
            group[key] = value * factor
            self._undo.append(lambda: group.__setitem__(key, value))
        elif id(value) not in shared:
            shared.add(id(value))
            before = value.clone()
            value.mul_(factor)
            self._undo.append(lambda: value.copy_(before))

    # ------------------------------------------------------------------ the first step

    def _watch(self) -> None:
        """Stand in for the groups until the closure is called, to see whether they are read before."""
        groups = self.optimizer.param_groups
        self._groups = list(groups)
        groups[:] = [_WatchedGroup(group, self._read_early) for group in groups]

    def _read_early(self) -> None:
        if self._groups is not None:
            self._stop_watching(early=True)
            self._put_on(early=True)
            if self._tell is not None:
                self._tell()

    def _stop_watching(self, *, early: bool = False) -> None:
        if self._groups is not None:
            self.optimizer.param_groups[: len(self._groups)] = self._groups
            self._groups, self._early = None, early


class _WatchedGroup(dict[str, Any]):
    """Tells when a parameter group's learning rate is read; what is read and written is the group's own."""

    def __init__(self, group: dict[str, Any], read: Callable[[], None]) -> None:
        super().__init__(group)
        self._group = group
        self._read = read

    def __getitem__(self, key: str) -> Any:
        if key == "lr":
            self._read()
        return self._group[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._group else default

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._group[key] = value


def _readable(lr: Any) -> float | None:
    """A learning rate that can be read without waiting for a device."""
    return None if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)


def _own(lr: Any) -> Any:
    """A learning rate that later writes leave alone, without waiting for the device."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr

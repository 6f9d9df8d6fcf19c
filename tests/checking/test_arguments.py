"""Every public constructor and function refuses a bad argument by name, or keeps it as a plain value."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import lightning_surge
from lightning_surge import BatchSizeScheduler, SurgeLRCallback, laws, runs, schedules, tables
from lightning_surge.callbacks.settings import LAWS
from lightning_surge.checking.arguments import choice, number, switch, whole
from lightning_surge.schedules import ConstantSize, Progress
from lightning_surge.tables import RunTable
from tests.drawn import through_a_checkpoint
from tests.logged_runs import as_log, rows

ROOT = Path(__file__).parents[2]
HUGE = 10**400
BAD: dict[str, list[Any]] = {
    "whole": ["16", math.nan, math.inf, HUGE, True, 2.5, np.float64(3.0), 1 + 0j, [4], -1, None],
    "number": ["16", math.nan, math.inf, HUGE, True, np.True_, 1 + 0j, [4.0], torch.ones(2), -1e-9, None],
    "switch": ["False", 0, 1.0, [], np.float64(1.0), None],
    "choice": ["sqart", 3, True, ["step"], None],
    "function": ["len", 3, True],
}
NUMPY = {"whole": np.int64, "number": np.float64}


def clock() -> Any:
    return StepLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), 1)


def grid() -> RunTable:
    best = np.repeat([0.004, 0.005, 0.004], 3)
    lrs = best * np.tile([0.5, 1.0, 2.0], 3)
    return RunTable("loss", np.repeat([8.0, 32.0, 128.0], 3), lrs, np.log(lrs / best) ** 2)


SIZE = ConstantSize(8)
RAMP = {"start": 8, "end": 16, "duration": 4}
LIMITS = {"multiple_of": 4, "minimum": 8, "maximum": 16}
MEASURED = {"alignment_limit": 2, "alignment_scale": 300, "noise_curvature": 1, "signal_curvature": 1}
SGD = laws.SGDLaw(max_lr=1, noise_scale=100)
RULE = {"base_lr": 0.1, "base_batch_size": 16}
# What is called with which valid arguments; every other one has its default.
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    SurgeLRCallback: {"base_batch_size": 16, "probe_every": 4, "probe_examples": 8, "optimizer": 1},
    SurgeLRCallback(16).lr_scale: {"batch_size": 64},
    BatchSizeScheduler: {"schedule": SIZE, "micro_batch_size": 4, "max_micro_batch_size": 8},
    lightning_surge.BatchSizeWarmup: {"start": 8, "end": 16, "num_steps": 4, "micro_batch_size": 4},
    schedules.Seesaw: {"start": 8, "maximum": 64, "multiple_of": 4},
    schedules.ScheduledBatchSampler: {"sampler": range(9), "batch_size": 4},
    schedules.by_examples: {"scheduler": clock(), "examples_per_step": 16},
    schedules.by_examples(clock(), 16).advance: {"examples": 4},
    ConstantSize: {"size": 8, **LIMITS},
    schedules.LinearRamp: RAMP | LIMITS,
    schedules.GeometricRamp: RAMP | LIMITS,
    schedules.CosineRamp: RAMP | LIMITS,
    schedules.Milestones: {"sizes": {0: 8}, **LIMITS},
    schedules.Phase: {"begin": 0, "end": 4, "schedule": SIZE},
    schedules.Phases: {"phases": [schedules.Phase(0, None, SIZE)]},
    schedules.AccumulatedSchedule: {"schedule": SIZE, "micro_batch_size": 4, "examples_per_epoch": 16},
    schedules.SampledSchedule: {"schedule": SIZE, "largest_micro_batch": 4, "examples_per_epoch": 16},
    schedules.plan_windows: {"schedule": SIZE, "begin": Progress(), "examples": 16, "largest": 4},
    schedules.total_steps: {"schedule": SIZE, "examples": 16},
    schedules.total_examples: {"schedule": SIZE, "steps": 4},
    laws.MeasuredLaw: MEASURED,
    laws.SGDLaw: {"max_lr": 0.1, "noise_scale": 300},
    laws.Theorem3Law: {"noise_scale": 300, "peak_lr": 0.1},
    laws.ConstantLaw: RULE,
    laws.SqrtLaw: RULE,
    laws.LinearLaw: RULE,
    laws.steps_needed: {"batch_size": 16, "critical_batch_size": 300, "min_steps": 10},
    laws.examples_needed: {"batch_size": 16, "critical_batch_size": 300, "min_examples": 3000},
    **{getattr(law, name): {"batch_size": 16}
       for law in (SGD, laws.MeasuredLaw(**MEASURED))
       for name in ("lr", "gain", "alignment", "isotropic_lr")},
    runs.run_state: {"run": as_log(rows()), "step": 30},
    runs.plot_run: {"run": as_log(rows()), "base_batch_size": 16},
    tables.fit_grid: {"table": grid(), "bootstrap": 0},
    tables.valleys: {"table": grid()},
    tables.read_tables: {"source": ROOT / "examples/tables/perceptron_adam.csv"},
}  # fmt: skip
# Public names without an argument that is checked here.
NO_NUMBERS = {
    *("ExactResume", "Law", "RunLog", "RunLogError", "Schedule"),
    *("advise", "draw_fits", "fit_tradeoff", "read_run"),
}
# Records that are returned, and functions that hand all their arguments on to one of the above.
ELSEWHERE = {
    "Advice", "Caveat", "Columns", "Estimate", "FittedLaw", "GridFit", "HeldOut", "Interval", "LawFit",
    "Optimum", "Option", "Peak", "Progress", "RunState", "RunTable", "Series", "TradeoffFit",
    "Unfitted", "Valley", "alignment_ratio", "progress_ratio", "step_ratio",
    "describe", "document", "read_table",
}  # fmt: skip


def kinds(call: Callable[..., Any]) -> Iterator[tuple[str, str, bool]]:
    """Arguments by their annotations: the name, which check is its, and whether it may be None."""
    owner = call.__init__ if inspect.isclass(call) else call  # type: ignore[misc]
    hints = get_type_hints(owner, localns={"Figure": Any})  # imported for type checkers only
    for name in inspect.signature(call).parameters:
        hint = hints.get(name)
        union = get_origin(hint) in (Union, UnionType)
        options = set(get_args(hint)) if union else {hint}
        for option in options - {NoneType}:
            if option in (int, float, bool):
                kind = {int: "whole", float: "number", bool: "switch"}[option]
            elif get_origin(option) is Literal and option != Literal[False] and bool not in options:
                kind = "choice"
            elif getattr(get_origin(option), "__name__", "") == "Callable":
                kind = "function"
            else:
                continue
            yield name, kind, NoneType in options


ARGUMENTS = [(call, *kind) for call in CALLS for kind in kinds(call)]


def label(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__qualname__", "")


def consumed(made: Any) -> Any:
    return list(made) if inspect.isgenerator(made) else made


@pytest.mark.parametrize(("call", "name", "kind", "optional"), ARGUMENTS, ids=label)
def test_a_bad_argument_is_named(call: Callable[..., Any], name: str, kind: str, optional: bool) -> None:
    assert consumed(call(**CALLS[call])) is not CALLS
    for bad in BAD[kind]:
        if not (bad is None and optional):
            with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
                consumed(call(**(CALLS[call] | {name: bad})))


def values(one: Any, seen: set[int]) -> Iterator[Any]:
    """Everything that this package's objects hold."""
    if id(one) in seen:
        return
    seen.add(id(one))
    if isinstance(one, Mapping):
        yield from (deep for pair in one.items() for part in pair for deep in values(part, seen))
    elif isinstance(one, (list, tuple)):
        yield from (deep for part in one for deep in values(part, seen))
    elif type(one).__module__.startswith("lightning_surge") and hasattr(one, "__dict__"):
        yield from values(vars(one), seen)
    else:
        yield one


@pytest.mark.parametrize("call", [call for call in CALLS if inspect.isclass(call)], ids=label)
@pytest.mark.parametrize("wrapped", [True, False], ids=["0-d", "scalar"])
def test_numbers_of_numpy_are_kept_as_plain_ones(call: Callable[..., Any], wrapped: bool) -> None:
    numpy = dict(CALLS[call])
    for name, kind, _ in kinds(call):
        if kind in NUMPY and numpy.get(name) is not None:
            scalar = NUMPY[kind](numpy[name])
            numpy[name] = torch.tensor(scalar) if wrapped else scalar
    found = [one for one in values(call(**numpy), set()) if isinstance(one, (np.generic, torch.Tensor))]
    assert found == []


def test_the_table_has_every_public_name() -> None:
    called = ELSEWHERE | {getattr(call, "__name__", "") for call in CALLS}
    for package in (lightning_surge, schedules, laws, runs, tables):
        public = {name: getattr(package, name) for name in package.__all__ if name not in called}
        found = {name for name, one in public.items() if inspect.isroutine(one) or inspect.isclass(one)}
        assert found <= NO_NUMBERS


def test_choices_in_the_signature_are_those_that_are_checked() -> None:
    hints = get_type_hints(SurgeLRCallback.__init__)
    assert get_args(hints["law"]) == LAWS
    assert get_args(get_args(hints["objective"])[0]) == tuple(laws.OBJECTIVES)


def test_a_checkpoint_of_callbacks_made_of_numpy_numbers_can_be_loaded() -> None:
    surge = SurgeLRCallback(
        np.int64(16), max_overhead=np.float32(0.1), probe_every=np.int32(3), half_life=np.float64(8),  # type: ignore[arg-type]
        lr_scale_bounds=(np.float64(0.5), np.float64(2)), max_drift_per_step=np.float64(0.1),
    )  # fmt: skip
    rule = schedules.Seesaw(np.int64(16), np.int64(64))  # type: ignore[arg-type]
    states = [surge.state_dict(), BatchSizeScheduler(rule, micro_batch_size=np.int64(4)).state_dict()]  # type: ignore[arg-type]
    assert repr(through_a_checkpoint(states)) == repr(states)


class TestChecks:
    """What a wrong call cannot tell: the words of the messages."""

    @pytest.mark.parametrize(
        ("check", "arguments", "message"),
        [
            (number, {"least": 0}, "Expected 0 <= x < inf, got x='a': remedy."),
            (number, {}, "Expected 0 < x < inf, got x='a': remedy."),
            (number, {"least": 1e-6, "most": 1e12}, "Expected 1e-06 <= x <= 1e+12, got x='a': remedy."),
            (number, {"above": 1, "below": 2}, "Expected 1 < x < 2, got x='a': remedy."),
            (whole, {}, "Expected a whole number x >= 1, got x='a': remedy."),
            (switch, {}, "Expected x=True or False, got x='a': remedy."),
        ],
    )
    def test_say_rule_value_and_remedy(
        self, check: Callable[..., Any], arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            check("x", "a", "remedy", **arguments)
        assert str(caught.value) == message

    def test_of_choices(self) -> None:
        with pytest.raises(ValueError, match=r"^Expected x to be one of a, b, got x='c'\.$"):
            choice("x", "c", ("a", "b"))

    @pytest.mark.parametrize(("bound", "value"), [("least", 2), ("most", 2), ("above", 1), ("below", 3)])
    def test_of_numbers_at_their_bounds(self, bound: str, value: float) -> None:
        assert number("x", 2, "", **{bound: value}) == 2
        if bound in ("above", "below"):
            with pytest.raises(ValueError, match="got x="):
                number("x", value, "", **{bound: value})

    def test_of_numbers_that_are_too_long_to_be_shown(self) -> None:
        with pytest.raises(ValueError, match=r"whole number x < 2\*\*63, got x=1000.{0,200}\.\.\.: remedy"):
            whole("x", HUGE, "remedy")
        with pytest.raises(ValueError, match="got x=a value of type int: remedy"):
            whole("x", 10**5000, "remedy")

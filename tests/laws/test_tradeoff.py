import inspect
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.laws.tradeoff import TradeoffFit, examples_needed, fit_tradeoff, steps_needed
from tests.drawn import decades, many

CRITICAL, MIN_STEPS = decades(1, 5), decades(1, 6)


@many
@given(decades(-1, 7), CRITICAL, MIN_STEPS)
def test_steps_and_examples_lie_on_the_hyperbola(
    batch_size: float, critical: float, min_steps: float
) -> None:
    min_examples = critical * min_steps
    steps = steps_needed(batch_size, critical_batch_size=critical, min_steps=min_steps)
    examples = examples_needed(batch_size, critical_batch_size=critical, min_examples=min_examples)
    assert examples == pytest.approx(batch_size * steps, rel=1e-9)
    assert (steps / min_steps - 1) * (examples / min_examples - 1) == pytest.approx(1, rel=1e-6)


@many
@given(CRITICAL, MIN_STEPS, st.lists(decades(-1, 1), min_size=2, max_size=6, unique_by=lambda x: round(x, 1)))
def test_fit_recovers_the_curve(critical: float, min_steps: float, multiples: list[float]) -> None:
    steps = [min_steps * (1 + 1 / multiple) for multiple in multiples]
    examples = [critical * min_steps * (1 + multiple) for multiple in multiples]
    fit = fit_tradeoff(steps, examples)
    assert fit == pytest.approx(TradeoffFit(critical, min_steps, critical * min_steps), rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "examples", "message"),
    [
        ([4000], [400_000], "at least 2 runs with different examples, got 1: add other"),
        ([], [], "at least 2 runs with different examples, got 0: add other"),
        ([4000, 4000], [400_000, 400_000], "different examples, got 1: add other"),
        ([4000, 1500, 1200], [400_000, 900_000], "got 3 steps and 2 examples: pass one pair"),
        ([4000, 0], [400_000, 900_000], "0 < steps[1] < inf, got steps[1]=0: pass one count"),
        ([4000, 1500], [math.inf, 900_000], "got examples[0]=inf: pass one count"),
        ([1500, 4000], [400_000, 900_000], "got 1/S against 1/E with slope=300, intercept=-8.33e-05: check"),
        ([4000, 4000], [400_000, 900_000], "slope=0, intercept=0.00025: check"),
    ],
)
def test_fit_refuses_data_without_a_tradeoff(steps: list[float], examples: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_tradeoff(steps, examples)


@pytest.mark.parametrize("call", [steps_needed, examples_needed])
def test_zeros_are_refused(call: Callable[..., float]) -> None:
    for name in inspect.signature(call).parameters:
        with pytest.raises(ValueError, match=f"Expected 0 < {name} < inf, got {name}=0: "):
            call(**dict.fromkeys(inspect.signature(call).parameters, 1) | {name: 0})

"""What an advice says, in words and as a document for programs: what `lightning-surge advise` prints."""

from __future__ import annotations

import math
from typing import Any

from lightning_surge.checking.answers import aligned, plain
from lightning_surge.runs.advice import Advice, Caveat, Interval, Option


def describe(advice: Advice) -> str:
    """The answer in words: what to go on with, what doubling costs, and why not to trust it."""
    state, peak = advice.state, advice.peak_batch_size
    rows = [["batch size", "learning rate", "steps", "examples", ""]]
    for one in advice.options:
        marks = {"now": state.batch_size, "suggested": advice.suggested}
        marked = ", ".join(mark for mark, size in marks.items() if size == one.batch_size)
        rows.append(
            [_number(one.batch_size), *map(_with_interval, (one.lr, one.steps, one.examples)), marked]
        )
    table = ["  " + line for line in aligned(rows, left=range(5))]
    chosen, doubled = (_option(advice, size) for size in (advice.suggested, 2.0 * state.batch_size))
    surge = f"{_with_interval(peak)} examples; beyond it the best learning rate of a step falls"
    if math.isinf(peak.value):
        surge = "none: the learning rate never falls with the batch size"
    lines = [
        f"At step {state.step:,}: {_number(state.batch_size)} examples per step, learning rate "
        f"{state.lr_used:.3g} (scheduled {state.lr_scheduled:.3g}), {state.num_measurements} measurements.",
        "",
        f"Go on with     {_number(advice.suggested)} examples per step, learning rate "
        f"{_with_interval(chosen.lr)}: {_with_interval(chosen.lr_scale)} times the scheduled one",
        f"Critical size  {_with_interval(advice.critical_batch_size)} examples, for the next step: it then "
        "gains half of what an unlimited batch would",
        f"Peak size      {surge}",
        f"Doubling       costs {_change(doubled.examples)} more examples and saves "
        f"{_change(doubled.steps)} of the steps to the same loss",
        "",
        *table,
        "  Steps and examples to the same loss, over those at the present size, if the critical size stayed.",
        "  In brackets one standard error to both sides.",
    ]
    lines += ["", "Do not trust it blindly:"] if advice.caveats else []
    return "\n".join([*lines, *(f"  - {caveat_text(caveat, advice)}" for caveat in advice.caveats)])


def document(advice: Advice) -> dict[str, Any]:
    """The same for `json.dumps`, with None where a number is not finite."""
    answer: dict[str, Any] = plain(advice)
    answer["caveats"] = {one.name.lower(): caveat_text(one, advice) for one in advice.caveats}
    answer["state"]["reason"] = advice.state.reason.text
    answer["state"]["law"]["kind"] = type(advice.state.law).__name__
    return answer


def caveat_text(caveat: Caveat, advice: Advice) -> str:
    """Why not to trust an advice."""
    state, lr = advice.state, _option(advice, advice.suggested).lr.value
    share = state.lr_scheduled / state.lr_scheduled_max if state.lr_scheduled_max > 0 else 0.0
    smallest, largest = map(_number, state.measured)
    return str(caveat.value).format(state=state, lr=lr, share=share, smallest=smallest, largest=largest)


def _option(advice: Advice, size: float) -> Option:
    return next(option for option in advice.options if option.batch_size == size)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "infinite"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _with_interval(interval: Interval) -> str:
    value, low, high = interval
    if math.isnan(value) or low == high:
        return _number(value)
    ends = "error not known" if math.isinf(high) else f"{_number(low)} to {_number(high)}"
    return f"{_number(value)} ({ends})"


def _change(ratio: Interval) -> str:
    """A ratio as a share more or less."""
    value, *ends = (abs(one - 1.0) for one in ratio)
    low, high = sorted(ends)
    return f"{value:.0%}" if low == high else f"{value:.0%} ({low:.0%} to {high:.0%})"

"""Checks of arguments: numbers, switches, choices and functions.

Every public constructor and function uses these four, so that a wrong argument fails where it is passed. The
error says the rule, the value and a remedy. What is returned is plain: a NumPy scalar in the state of a
callback would make a checkpoint unreadable for `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")

# Longest text of a value in a message.
LONGEST = 200
# Counts fit into 64 bits, as in tensors and files.
LARGEST = 2**63 - 1


def number(
    name: str,
    value: Any,
    remedy: str,
    *,
    above: float = 0.0,
    least: float | None = None,
    below: float = math.inf,
    most: float | None = None,
) -> float:
    """A finite number between bounds, as a plain `int` or `float`.

    The lower bound is `above` it, or `least` itself, the upper one likewise. `bool`, NaN and integers that no
    float can hold are refused. `name` and `remedy`, what to pass instead, are for the message.
    """
    found = _plain(value)
    if found is not None:
        high_enough = found > above if least is None else found >= least
        if high_enough and (found < below if most is None else found <= most):
            return found
    low = f"{above:g} <" if least is None else f"{least:g} <="
    high = f"< {below:g}" if most is None else f"<= {most:g}"
    raise ValueError(f"Expected {low} {name} {high}, got {name}={shown(value)}: {remedy}.")


def whole(name: str, value: Any, remedy: str, *, least: int = 1) -> int:
    """A whole number of at least `least`, as a plain `int`.

    A float is refused even if it is integral: a size computed in floats has often lost its rounding.
    """
    found = _plain(value)
    if isinstance(found, int) and least <= found <= LARGEST:
        return found
    too_large = isinstance(value, Integral) and not isinstance(value, bool) and int(value) > LARGEST
    rule = f"{name} < 2**63" if too_large else f"{name} >= {least}"
    raise ValueError(f"Expected a whole number {rule}, got {name}={shown(value)}: {remedy}.")


def switch(name: str, value: Any, remedy: str = "") -> bool:
    """True or False; no other value is taken for one of them, such as the text "False" of a configuration."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"Expected {name}=True or False, got {name}={shown(value)}{_because(remedy)}.")


def choice(name: str, value: Any, choices: Collection[str], remedy: str = "") -> str:
    """One of a few words."""
    if isinstance(value, str) and value in choices:
        return str(value)
    words = ", ".join(choices)
    raise ValueError(f"Expected {name} to be one of {words}, got {name}={shown(value)}{_because(remedy)}.")


def function(name: str, value: Any, remedy: str = "", *, of: str = "") -> Any:
    """Something to call; `of` says with what."""
    if callable(value):
        return value
    rule = f"a function of {of}" if of else "a function"
    raise ValueError(f"Expected {name} to be {rule}, got {name}={shown(value)}{_because(remedy)}.")


def optional(check: Callable[..., T], name: str, value: Any, *rule: Any, **bounds: Any) -> T | None:
    """None, for an argument whose default it is, or what `check` returns."""
    return None if value is None else check(name, value, *rule, **bounds)


def store(owner: object, **values: Any) -> None:
    """Set attributes of a frozen dataclass, in its `__post_init__`, to their plain values."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def shown(value: Any) -> str:
    """A value as messages show it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # as of an integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}..."


def _plain(value: Any) -> int | float | None:
    """A number without the type of NumPy or torch; None for anything else, and for what no float can hold."""
    if type(value) is float:
        return value  # laws are made by the thousand where they are fitted
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return int(value) if isinstance(value, Integral) else as_float


def _because(remedy: str) -> str:
    return f": {remedy}" if remedy else ""

"""State in checkpoints: a dataclass of plain values, saved as a dict and checked when it is restored.

A checkpoint can be damaged, or written by somebody's own code, and what is restored goes on to multiply
learning rates. So each part that has a state describes it once, as a dataclass with type hints and, where
numbers have bounds, a `__post_init__` that checks them. The two functions here do the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_surge.checking.arguments import number, shown

T = TypeVar("T")

AnyFloat = Annotated[float, "NaN and infinities, too"]
"""Hint of a number that may be NaN or infinite, as one that is not known yet."""

REMEDY = "load what state_dict returned"


class DamagedStateError(ValueError):
    """State that no `state_dict` of this version returned."""


def save(value: Any) -> Any:
    """What a checkpoint holds of a value: dicts, lists, numbers and strings, which every loader reads."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: save(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [save(one) for one in value]
    if isinstance(value, dict):
        return {key: save(one) for key, one in value.items()}
    return value.value if isinstance(value, Enum) else value


def restore(kind: type[T], state: object, versions: Collection[int] = ()) -> T:
    """A dataclass or named tuple made of what `save` returned, every value checked against its type hint.

    Hints may be `int`, `float` (finite, unless it is `AnyFloat`), `bool`, `str`, enumerations, a union of one
    type with `None`, tuples, lists, dicts by name, dataclasses and named tuples of these, and any other class
    for an instance of it. A missing entry has its default, and an entry without a field is left out. The name
    of an entry may begin with an underscore that its field lacks. With `versions` its entry "version" must be
    one of them.
    """
    found = state.get("version") if isinstance(state, Mapping) else None
    if versions and (type(found) is not int or found not in versions):
        raise DamagedStateError(
            f"Expected state of version {max(versions)} in the checkpoint, got {found!r}."
        )
    try:
        restored: T = _record(kind, state, kind.__name__)
    except (ValueError, ArithmeticError) as error:
        raise DamagedStateError(str(error)) from error
    return restored


def _record(kind: Any, state: object, place: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    if is_dataclass(kind):
        needed = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
    else:
        needed = [name for name in kind._fields if name not in kind._field_defaults]
        if isinstance(state, (list, tuple)) and len(state) <= len(kind._fields):
            state = dict(zip(kind._fields, state, strict=False))
    if not isinstance(state, Mapping):
        raise _damaged(place, "a dict", state)
    values = {}
    for name, hint in hints.items():
        key = name if name in state else f"_{name}"
        if key in state:
            values[name] = _value(hint, state[key], f"{place}.{name}")
        elif name in needed:
            raise ValueError(f"Expected {place} with {name!r}, got {sorted(map(str, state))}: {REMEDY}.")
    return kind(**values)


def _value(hint: Any, value: Any, place: str) -> Any:
    origin, hints = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (one,) = set(hints) - {NoneType}
        return None if value is None else _value(one, value, place)
    if origin in (tuple, list):
        alike = len(hints) == 1 or hints[-1] is Ellipsis
        if not isinstance(value, (list, tuple)) or not (alike or len(value) == len(hints)):
            raise _damaged(place, "a list" if alike else f"a list of {len(hints)}", value)
        each = (hints[0],) * len(value) if alike else hints
        return origin(_value(each[at], one, f"{place}[{at}]") for at, one in enumerate(value))
    if origin is dict:
        if not (isinstance(value, dict) and all(isinstance(key, hints[0]) for key in value)):
            raise _damaged(place, "a dict by name", value)
        return {key: _value(hints[1], one, f"{place}[{key!r}]") for key, one in value.items()}
    if hint is Any or (hint is AnyFloat and isinstance(value, float)):
        return value
    if hint in (float, AnyFloat):
        return number(place, value, REMEDY, above=-math.inf)
    if is_dataclass(hint) or hasattr(hint, "_fields"):
        return _record(hint, value, place)
    if issubclass(hint, Enum):
        return hint(value)
    if not isinstance(value, hint) or (hint is int and (isinstance(value, bool) or abs(value) >= 2**63)):
        raise _damaged(place, f"of type {hint.__name__}", value)
    return value


def _damaged(place: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"Expected {place} to be {rule}, got {shown(value)}: {REMEDY}.")

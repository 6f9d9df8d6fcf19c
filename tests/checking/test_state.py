"""What is restored is what was saved, or nothing: any other value in its place is refused by name."""

import copy
import json
import math
import re
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_surge.checking.arguments import number
from lightning_surge.checking.state import REMEDY, AnyFloat, DamagedStateError, restore, save


class Kind(IntEnum):
    GOOD = 1
    BAD = 2


class Pair(NamedTuple):
    size: float
    value: float = 0.5


@dataclass(frozen=True)
class Part:
    share: float

    def __post_init__(self) -> None:
        number("share", self.share, REMEDY, least=0, most=1)


@dataclass(frozen=True)
class State:
    steps: int
    rate: float
    unknown: AnyFloat
    off: bool
    reason: str | None
    kind: Kind
    part: Part
    pairs: list[Pair]
    betas: tuple[float, float]
    sizes: tuple[int, ...]
    metrics: dict[str, float] = field(default_factory=dict)


WHOLE = State(
    3, 0.5, math.nan, False, None, Kind.BAD, Part(0.25), [Pair(4.0), Pair(8.0, 1.0)], (0.9, 0.99), (1, 2),
    {"a": 1.0},
)  # fmt: skip
BAD: dict[tuple[Any, ...], list[Any]] = {
    ("steps",): [2.5, 2.0, True, "3", None, 2**63, np.int64(3)],
    ("rate",): ["0.5", math.nan, math.inf, True, None, 10**400, 1j],
    ("unknown",): ["nan", None, [], True],
    ("off",): [0, "False", None],
    ("reason",): [3, ["text"]],
    ("kind",): [3, "GOOD", None],
    ("part",): [[0.25], None, {}, {"share": 1.5}, {"share": None}],
    ("part", "share"): [-0.1, math.nan],
    ("pairs",): [None, {"size": 4.0}, 4.0],
    ("pairs", 0): [[], [1.0, 2.0, 3.0], ["4"], None, {"value": 1.0}],
    ("betas",): [[0.9], [0.9, 0.99, 0.5], None, [0.9, "0.99"]],
    ("sizes", 1): [1.0, None],
    ("metrics",): [[], {3: 1.0}, {"a": None}],
}


def with_(path: tuple[Any, ...], value: Any) -> Any:
    """A saved state with another value at one place."""
    state = copy.deepcopy(save(WHOLE))
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return state


def test_what_is_saved_is_plain_and_restored_as_it_was() -> None:
    saved = save(WHOLE)
    assert repr(json.loads(json.dumps(saved))) == repr(saved)
    assert repr(restore(State, saved)) == repr(WHOLE)


def test_names_may_begin_with_an_underscore_and_others_are_left_out() -> None:
    saved = {f"_{name}": value for name, value in save(WHOLE).items()}
    assert repr(restore(State, saved | {"version": 2})) == repr(WHOLE)


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in BAD.items() for value in values]
)
def test_a_damaged_entry_is_named(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(DamagedStateError) as caught:
        restore(State, with_(path, value))
    # An enumeration's own message names its class, a dataclass's own check its field.
    names = rf"State\.{path[0]}|{path[-1]}|Kind|share"
    assert re.search(names, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", [name for name in save(WHOLE) if name != "metrics"])
def test_a_missing_entry_is_named_and_one_with_a_default_has_that(name: str) -> None:
    saved = save(WHOLE)
    del saved[name]
    with pytest.raises(DamagedStateError, match=rf"Expected State with '{name}', got \['betas'|\['kind'"):
        restore(State, saved)
    assert restore(State, save(WHOLE) | {"pairs": [[4.0]]}).pairs == [Pair(4.0, 0.5)]
    assert restore(State, {n: v for n, v in save(WHOLE).items() if n != "metrics"}).metrics == {}


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(PLAIN, st.lists, max_leaves=3), st.sampled_from(sorted(BAD)))
def test_nothing_else_is_raised(value: Any, path: tuple[Any, ...]) -> None:
    try:
        restored = restore(State, with_(path, value))
    except DamagedStateError:
        return
    # What is accepted is of the types that the hints say.
    assert repr(restore(State, save(restored))) == repr(restored)


@pytest.mark.parametrize("state", [None, [1, 2], "state", 7])
def test_what_is_no_state_at_all(state: Any) -> None:
    with pytest.raises(DamagedStateError, match="Expected State to be a dict, got"):
        restore(State, state)

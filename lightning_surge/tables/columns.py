"""Which column of a table is the batch size, the learning rate, and so on.

Names are compared without case, separators, units in brackets and the prefixes of loggers and configuration
files, so that `Batch Size`, `params.lr`, `config/optimizer.lr` and `val/loss` are known. A role goes to the
one column that can have it; where none or several can, all such roles are told at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_surge.tables.values import WORDS

if TYPE_CHECKING:
    import pandas as pd


class Columns(NamedTuple):
    """Names of a table's columns; a column that is None is found by the usual names of its role."""

    batch_size: str | None = None  # examples behind one optimizer step
    lr: str | None = None
    loss: str | None = None  # at the end
    steps: str | None = None  # optimizer steps to the target
    examples: str | None = None  # examples to the target
    seed: str | None = None  # label that runs with the same seed share
    target: str | None = None  # loss to reach
    status: str | None = None  # how the run ended, in a word


OUTCOMES = ("loss", "steps", "examples")
NAMES = {role: names.split() for role, names in WORDS["roles"].items()}
FALLBACKS = {role: names.split() for role, names in WORDS["fallbacks"].items()}
PREFIXES, ACCURACIES = frozenset(WORDS["prefixes"].split()), frozenset(WORDS["accuracies"].split())
RESULTS = ACCURACIES | frozenset(WORDS["results"].split())
SIMILAR = 0.6
"""Share of equal letters from which a name is a close match."""
FEWEST_LRS = 3
"""Learning rates of a batch size among which a best one can be told."""


def _plain(name: str) -> str:
    """A name in lower case with single underscores, without brackets unless they hold a number."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.sub(r"[(\[][^)\]\d]*[)\]]", "", name))
    return re.sub(r"[\W_]+", "_", name).strip("_").lower()


def _forms(name: str) -> set[str]:
    """A name, and what is left of it without prefixes and the suffixes of loggers."""
    forms = [_plain(name)]
    # Folders of settings may be in each other, as Ray's config/train_loop_config/lr.
    words = _plain(re.sub(r".*(config|cfg|params)[/.]", "", name)).split("_")
    forms.append("_".join(words))
    while len(words) > 1 and words[0] in PREFIXES:
        words = words[1:]
        forms.append("_".join(words))
    return {shorter for form in forms for shorter in (form, re.sub(r"_(value|epoch)$", "", form))}


def shown(names: Sequence[Any], most: int = 12) -> str:
    """Names in quotes, separated by commas, and dots for those after the first `most`."""
    return ", ".join(repr(str(name)) for name in names[:most]) + (", ..." if len(names) > most else "")


def as_text(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Columns as text, empty where a value is missing."""
    found = frame[list(names)].astype(object)
    return found.map(lambda value: str(value).strip()).where(found.notna(), "")


def find_column(frame: pd.DataFrame, name: str, option: str) -> str:
    """The column that a user means by what was written for an option; a ValueError if none, or several.

    Case, separators and prefixes may differ from the column's name.
    """
    columns = [str(column) for column in frame.columns]
    fits = ([c for c in columns if c == name], [c for c in columns if _plain(name) in _forms(c)])
    found = fits[0] or fits[1]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"Expected {option} to name one column of {shown(columns)}, got {name!r}"
        f"{_close(columns, [_plain(name)])}: write it in full."
    )


def _close(columns: Sequence[str], wanted: Sequence[str]) -> str:
    """Which columns have names that resemble one of those wanted, in brackets; nothing if none."""
    found = [name for name in columns if get_close_matches(_plain(name), wanted, cutoff=SIMILAR)]
    return f" (close: {shown(found, 4)})" if found else ""


def find_columns(
    frame: pd.DataFrame, named: Columns, source: str, *, measure: str | None = None, maximize: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Columns by role, and notes on those that go by another name than the documented one.

    A ValueError if a role that is needed, given the measure, has no column, or a role has several.
    """
    asked = {role: name for role, name in named._asdict().items() if name is not None}
    found = {
        role: find_column(frame, name, f"--{role.replace('_', '-')}-column") for role, name in asked.items()
    }
    free = [name for name in frame.columns if name not in found.values()]
    text = as_text(frame, *free)
    blank = [name for name in free if not text[name].any()]
    free = [name for name in free if name not in blank]
    problems: dict[str, str] = {}
    for role in (role for role in Columns._fields if role not in found):
        candidates = _candidates(text[free], role, maximize)
        if not candidates and role in ("batch_size", "lr", "loss"):
            candidates = _candidates(text[blank], role, maximize)
        if (
            role == "steps"
            and "loss" in found
            and not any(_forms(name) & set(NAMES[role]) for name in candidates)
        ):
            continue  # steps by the name of a counter, beside a loss
        if len(candidates) == 1:
            found[role] = candidates[0]
        elif candidates:
            problems[role] = f"{role} may be {shown(candidates)}"
    # One outcome is enough; a loss that may be several columns counts before steps that nobody named.
    outcomes = [role for role in OUTCOMES if measure is None or (role == "loss") == (measure == "loss")]
    settled = asked.keys() & outcomes or ("loss" not in problems and found.keys() & outcomes)
    problems = {
        r: text for r, text in problems.items() if r not in OUTCOMES or (r in outcomes and not settled)
    }
    needed = ["batch_size", "lr"] + ([] if settled or problems.keys() & set(OUTCOMES) else outcomes[:1])
    for role in needed:
        if role not in found and role not in problems:
            wanted = [*NAMES[role], *(ACCURACIES if role == "loss" else ())]
            close = _close([name for name in free if name not in found.values()], wanted)
            what = " or ".join(outcomes) if role in OUTCOMES else role
            problems[role] = f"{what} has no column{close}"
    if problems:
        options = " ".join(f"--{role.replace('_', '-')}-column NAME" for role in problems)
        larger = " (and --maximize if larger is better)" if "loss" in problems and not maximize else ""
        raise ValueError(
            f"Expected one column for each role in {source!r}, got {shown(list(frame.columns))}: "
            f"{'; '.join(problems.values())}. Pass {options}{larger}."
        )
    notes = [
        f"{role} from {name!r}" for role, name in found.items() if role not in asked and name.lower() != role
    ]
    return found, ["columns: " + ", ".join(notes)] if notes else []


def _candidates(text: pd.DataFrame, role: str, maximize: bool) -> list[str]:
    """Columns that can have a role; of those with equal values only one."""
    columns = list(text.columns)
    usual = [name for name in columns if _forms(name) & set(NAMES[role])]
    if role == "loss" and maximize:
        larger = [name for name in columns if set(_plain(name).split("_")) & ACCURACIES]
        usual = [name for name in larger if "train" not in _plain(name)] or larger or usual
    found = usual or [name for name in columns if _forms(name) & set(FALLBACKS.get(role, ()))]
    found.sort(key=lambda column: _plain(column) != role)
    different = [
        c for place, c in enumerate(found) if not any(text[c].equals(text[b]) for b in found[:place])
    ]
    # Where a mistake would not change what is compared, a column by the documented name is enough.
    exact = bool(different) and role not in ("batch_size", "lr", "loss") and _plain(different[0]) == role
    return different[:1] if exact else different


def settings_within(
    frame: pd.DataFrame, cell: Sequence[str], roles: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Settings in which runs differ that are taken for seeds or for one grid, and a few that tell them apart.

    Such runs have the columns of a `cell` in common, the batch size and the learning rate first; or each
    value of the setting has learning rates of its own at every batch size. What has a role is no setting.
    """
    free = [
        name for name in frame.columns if name not in roles and not set(_plain(name).split("_")) & RESULTS
    ]
    if not free:
        return [], []
    text = as_text(frame, *cell, *free)

    def told_apart(among: Sequence[str], names: Sequence[str]) -> int:
        return len(text[[*among, *names]].drop_duplicates())

    # With nearly as many values as rows it is a result, or a name.
    free = [name for name in free if 1 < text[name].nunique() <= len(text) / 2]

    def has_grids(name: str) -> bool:
        """Whether each of its values could be fitted by itself, and no learning rate has two of them."""
        lrs = text.groupby([cell[0], name])[cell[1]].nunique()
        whole = len(lrs) == text[cell[0]].nunique() * text[name].nunique() and lrs.min() >= FEWEST_LRS
        return bool(whole) and told_apart(cell[:2], [name]) == told_apart(cell[:2], [])

    differing = [n for n in free if told_apart(cell, [n]) > told_apart(cell, []) or has_grids(n)]
    # Told apart at every learning rate of a batch size, or a valley would be one of several models.
    apart: list[str] = []
    while told_apart(cell[:1], apart) < told_apart(cell[:1], differing):
        left = [name for name in differing if name not in apart]
        apart.append(
            max(left, key=lambda name: (told_apart(cell[:1], [*apart, name]), -text[name].nunique()))
        )
    return differing, apart

"""Which column of a table is the batch size, the learning rate, and so on, and the numbers in its cells.

Names are compared without case, separators, units in brackets and the prefixes of loggers and configuration
files, so that `Batch Size`, `params.lr`, `config/optimizer.lr` and `val/loss` are known. A role goes to the
one column that can have it; where none or several can, all such roles are told at once.

Numbers are written as `16K`, `1,024`, `0,001` or `3e-4`. What a comma means is decided for a whole column,
since `1,024` alone does not tell.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Sequence
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

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


WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
"""How other programs name what a table holds."""
FAILED = frozenset(WORDS["failed"].split()) | {"", "not reached"}
"""What stands, in lower case, for a number that a failed run does not have."""
UNITS = {"k": 1e3, "K": 1e3, "M": 1e6}
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
OUTCOMES = ("loss", "steps", "examples")
NAMES = {role: names.split() for role, names in WORDS["roles"].items()}
FALLBACKS = {role: names.split() for role, names in WORDS["fallbacks"].items()}
PREFIXES, ACCURACIES = frozenset(WORDS["prefixes"].split()), frozenset(WORDS["accuracies"].split())
RESULTS = ACCURACIES | frozenset(WORDS["results"].split())
SIMILAR = 0.6  # share of equal letters from which a name is a close match
FEWEST_LRS = 3  # learning rates of a batch size among which a best one can be told


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
    """The column that an option means; case, separators and prefixes may differ from the column's name."""
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
    """Columns by role, and notes on those that go by another name than the documented one."""
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
        # Beside a loss, what has the name of a counter is no outcome.
        fallbacks = [] if role == "steps" and "loss" in found else FALLBACKS.get(role, [])
        candidates = _candidates(text[free], role, fallbacks, maximize)
        if not candidates and role in ("batch_size", "lr", "loss"):
            candidates = _candidates(text[blank], role, fallbacks, maximize)
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


def _candidates(text: pd.DataFrame, role: str, fallbacks: Sequence[str], maximize: bool) -> list[str]:
    """Columns that can have a role; of those with equal values only one."""
    columns = list(text.columns)
    usual = [name for name in columns if _forms(name) & set(NAMES[role])]
    if role == "loss" and maximize:
        larger = [name for name in columns if set(_plain(name).split("_")) & ACCURACIES]
        usual = [name for name in larger if "train" not in _plain(name)] or larger or usual
    found = usual or [name for name in columns if _forms(name) & set(fallbacks)]
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


def has_decimal_commas(column: pd.Series[Any]) -> bool:
    """Whether some comma of a column can only stand in front of a fraction."""
    texts = [value.strip() for value in column.tolist() if isinstance(value, str) and "," in value]
    return any(re.fullmatch(r"[\d.,eE+-]+", text) and not THOUSANDS.fullmatch(text) for text in texts)


def numbers(
    column: pd.Series[Any], *, commas: bool = False
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The numbers of a column, NaN for blanks and the words of a failed run; and where there is neither.

    With `commas`, one that may stand for thousands or in front of a fraction does the latter.
    """
    decimal = commas or has_decimal_commas(column)
    cells = zip(column.tolist(), column.isna().tolist(), strict=True)
    read = [math.nan if missing else number(value, decimal) for value, missing in cells]
    unread = np.array([value is None for value in read], dtype=bool)
    return np.array(read, dtype=np.float64), unread


def number(value: Any, decimal: bool = False) -> float | None:
    """One cell; None if it is no number."""
    unit = 1.0
    if isinstance(value, str):
        value = value.strip()
        if value.lower() in FAILED:
            return math.nan
        if decimal and value.count(",") == 1:
            value = value.replace(".", "").replace(",", ".")
        elif THOUSANDS.fullmatch(value):
            value = value.replace(",", "")
        if (last := value[-1]) in UNITS:
            value, unit = value[:-1], UNITS[last]
    elif isinstance(value, bool) or not isinstance(value, (int, float, Decimal, np.number)):
        return None
    try:
        return float(value) * unit
    except (ValueError, OverflowError):
        return None

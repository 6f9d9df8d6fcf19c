"""Numbers as tables have them: `16K`, `1,024`, `0,001`, `3e-4`; and the words of a run that has none.

What a comma means is decided for a whole column, since `1,024` alone does not tell.
"""

from __future__ import annotations

import math
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd


WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
"""How other programs name what a table holds."""
FAILED = frozenset(WORDS["failed"].split()) | {"", "not reached"}
"""What stands, in lower case, for a number that a failed run does not have."""
UNITS = {"k": 1e3, "K": 1e3, "M": 1e6}
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")


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
    read = [math.nan if missing else _number(value, decimal) for value, missing in cells]
    unread = np.array([value is None for value in read], dtype=bool)
    return np.array(read, dtype=np.float64), unread


def _number(value: Any, decimal: bool) -> float | None:
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

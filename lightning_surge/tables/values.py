"""Numbers as people write them: `16K`, `1,024`, `0,001`, `3e-4`, `3 x 10^-4`, `2^-7`, `1.23 ± 0.02`, `None`.

What a comma means is decided for a whole column, since `1,024` alone does not tell.
"""

from __future__ import annotations

import math
import re
import sys
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
UNITS = {
    "": 1.0,
    "%": 0.01,
    "k": 1e3,
    "K": 1e3,
    "M": 1e6,
    "B": 1e9,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
}
NUMBER = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:[*x\u00d7\u00b7]10(?:\^|\*\*)?\(?([+-]?\d+)\)?)?([kKMBGT]i?|%)?"
)
POWER = re.compile(r"(\d+)(?:\^|\*\*)\(?([+-]?\d+)\)?")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
RAISED = "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
SPELLINGS = str.maketrans("\u2212" + RAISED, "--0123456789", "{}'_$~\u2248")
"""The typographic minus sign, raised digits and their minus sign; and what is left out."""


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
    import pandas

    if pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column):
        values = column.to_numpy(np.float64, na_value=math.nan)
        return values, np.zeros(values.shape, bool)
    decimal = commas or has_decimal_commas(column)
    read = [number(value, decimal=decimal) for value in column.tolist()]
    unread = np.array([value is None for value in read], dtype=bool)
    return np.array([math.nan if value is None else value for value in read], dtype=np.float64), unread


def number(value: Any, *, decimal: bool = False) -> float | None:
    """One cell; None if it is no number, NaN if it is missing."""
    if not isinstance(value, str):
        if value is None or type(value).__name__ in ("NAType", "NaTType"):
            return math.nan
        if not isinstance(value, (int, float, Decimal, np.number)) or isinstance(value, bool):
            return None
        return float(min(max(value, -sys.float_info.max), sys.float_info.max))
    try:
        return float(value)
    except ValueError:
        pass
    text = value.strip().lower()
    if text in FAILED:
        return math.nan
    text = re.split(r"±|\+/?-(?!\d*[eE])|\\pm|\(\d", value.translate(SPELLINGS).replace("\\times", "x"))[
        0
    ].strip()
    if decimal and text.count(",") == 1:
        text = text.replace(".", "").replace(",", ".")
    elif THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"\s", "", text)
    try:
        if found := POWER.fullmatch(text):
            return math.pow(float(found[1]), float(found[2]))
        if found := NUMBER.fullmatch(text):
            return float(found[1]) * 10.0 ** int(found[2] or 0) * UNITS[found[3] or ""]
    except (ValueError, OverflowError, KeyError):
        pass
    return None

"""How answers look: columns of text for people, and what JSON can hold for programs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> list[str]:
    """Columns of equal width, to the right but for those named."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in cells))
    return [line.rstrip() for line in lines]


def plain(value: Any) -> Any:
    """What JSON can hold: records by the names of their fields, null for numbers that are not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

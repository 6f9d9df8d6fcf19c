"""What of a checkpoint a run can go on with, and what is wrong with the rest."""

from __future__ import annotations

from typing import Any

from lightning_surge.laws import require_number

__all__ = ["STATE_VERSION", "VersionError", "require_version", "saved_base", "what_is_wrong"]

STATE_VERSION = 2
# What nobody counts in a batch: a base batch size beyond this, or below its inverse, is damage.
LARGEST_BASE = 1e12


class VersionError(ValueError):
    """State that another release has written, or none at all."""


def require_version(state: Any) -> None:
    """Refuse what this release has not written.

    Args:
        state: of the callback, as a checkpoint has it.

    Raises:
        VersionError: with what was expected and found.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version != STATE_VERSION:
        raise VersionError(f"Expected state of version {STATE_VERSION} in the checkpoint, got {version!r}")


def saved_base(state: dict[str, Any]) -> float | None:
    """The base batch size in a checkpoint.

    Args:
        state: of the callback.

    Returns:
        Examples; None if no step had fixed it.

    Raises:
        ValueError: if it is none that anybody counts.
        KeyError: if it is missing.

    Example:
        >>> saved_base({"base_batch_size": 16.0})
        16.0
    """
    base: float | None = state["base_batch_size"]
    if base is None:
        return None
    require_number("base_batch_size", base, "load what state_dict returned")
    if not 1.0 / LARGEST_BASE < base < LARGEST_BASE:
        raise ValueError(f"Expected base_batch_size < {LARGEST_BASE:g}, got base_batch_size={base}.")
    return base


def what_is_wrong(error: Exception) -> str:
    """Why state could not be loaded, as the first words of a message.

    Args:
        error: that loading it raised.

    Example:
        >>> what_is_wrong(KeyError("history"))
        "Expected whole state in the checkpoint, got what cannot be read: KeyError: 'history'"
    """
    if isinstance(error, VersionError):
        return str(error)
    found = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
    return f"Expected whole state in the checkpoint, got what cannot be read: {found}"

"""How many examples, or tokens, a batch holds."""

import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size

__all__ = ["BatchCounter"]


class BatchCounter:
    """Counts with the user's function, or along the leading dimension of the first tensor.

    Args:
        batch_size_fn: counts the examples, or tokens, in a batch; None for the leading dimension.
        owner: name of the callback, for messages.

    Raises:
        ValueError: if `batch_size_fn` is no function.

    Example:
        >>> import torch
        >>> BatchCounter(None, "Callback")((torch.zeros(8, 3), torch.zeros(8)))
        8.0
    """

    def __init__(self, batch_size_fn: Callable[[Any], float] | None, owner: str) -> None:
        if batch_size_fn is not None and not callable(batch_size_fn):
            raise ValueError(
                f"Expected batch_size_fn to be a function or None, got batch_size_fn={batch_size_fn!r}."
            )
        self._function = batch_size_fn or extract_batch_size
        self._owner = owner

    def __call__(self, batch: Any) -> float:
        """Examples in a batch.

        Raises:
            MisconfigurationException: if the batch holds nothing that can be counted.
            ValueError: if the count is not positive and finite.
        """
        try:
            size = self._function(batch)
        except MisconfigurationException as error:
            raise MisconfigurationException(
                f"{self._owner} cannot tell how many examples a {type(batch).__name__} holds: pass "
                "batch_size_fn=, a function that counts them."
            ) from error
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(
                f"Expected batch_size_fn to count a positive, finite number of examples, got {size}: it must "
                "count what one batch of the training DataLoader holds."
            )
        return float(size)

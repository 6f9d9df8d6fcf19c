"""The random streams of a process, in a form that every checkpoint can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from lightning_surge.measure.replay import RandomState


def to_portable(state: RandomState) -> dict[str, Any]:
    """Captured streams as tensors, numbers and strings, which `torch.load(weights_only=True)` reads."""
    version, words, gauss = state.python
    states = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": state.torch,
        "cuda": list(state.cuda),
    }
    if isinstance(state.numpy, tuple):  # else the user has replaced NumPy's global generator
        name, key, position, has_gauss, gauss = state.numpy
        words = torch.from_numpy(key.astype(np.int64))
        numpy = {"name": name, "words": words, "position": position, "has_gauss": has_gauss, "gauss": gauss}
        states["numpy"] = numpy
    return states


def from_portable(states: dict[str, Any]) -> RandomState:
    """What `to_portable` was given; without the CUDA devices that this process does not have."""
    python, numpy = states["python"], RandomState.capture().numpy
    if (saved := states.get("numpy")) is not None:
        words = saved["words"].numpy().astype(np.uint32)
        numpy = (saved["name"], words, saved["position"], saved["has_gauss"], saved["gauss"])
    return RandomState(
        (python["version"], tuple(python["words"].tolist()), python["gauss"]),
        numpy,
        states["torch"],
        states["cuda"][: torch.cuda.device_count()],
    )


class ResumableDataset(Dataset[Any]):
    """A map-style dataset whose workers go on with their random numbers when a run is resumed in mid-epoch.

    A worker process of a loader has random streams of its own, which nobody saves. torchdata's
    ``StatefulDataLoader`` keeps a state of the dataset of each worker, though: here, those streams. Needed
    only with ``num_workers > 0`` and a dataset that draws random numbers.

    Args:
        dataset: the one to wrap.

    Example:
        >>> dataset = ResumableDataset(["a", "b"])
        >>> len(dataset), dataset[1]
        (2, 'b')
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        """All examples of a batch, at once if the dataset can."""
        if callable(fetch := getattr(self.dataset, "__getitems__", None)):
            return list(fetch(indices))
        return [self.dataset[index] for index in indices]

    def state_dict(self) -> dict[str, Any]:
        """The streams of the worker that asks; nothing in the main process, where they are saved anyway."""
        return {} if get_worker_info() is None else to_portable(RandomState.capture())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let this worker go on where the saved one was."""
        if state and get_worker_info() is not None:
            from_portable(state).restore()

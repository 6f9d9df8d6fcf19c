"""What a sweep consists of: its settings, its cells, and what each cell said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_surge.checking.state import save

__all__ = ["Cell", "Outcome", "Reached", "SweepError", "SweepSettings"]


class SweepError(Exception):
    """The sweep cannot begin or go on: rule, value, remedy."""


class Cell(NamedTuple):
    """One training run: examples per optimizer step, learning rate of the configuration, seed."""

    batch_size: int
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"batch_size={self.batch_size} lr={self.lr:g} seed={self.seed}"


class Reached(NamedTuple):
    """When the loss first reached a target: optimizer steps, and the examples behind them; None if never."""

    target: float
    steps: int | None
    examples: int | None


@dataclass(frozen=True)
class Outcome:
    """What a cell said.

    It `diverged` if its loss became infinite or NaN, and was `killed` by a signal from outside. `loss` is
    None unless it finished; `seconds` is wall time, with the start of its process.
    """

    status: Literal["finished", "diverged", "out_of_memory", "killed", "failed"]
    loss: float | None = None
    steps: int = 0
    examples: int = 0
    reached: tuple[Reached, ...] = ()
    message: str = ""
    seconds: float = 0.0

    @classmethod
    def from_json(cls, values: Mapping[str, Any], seconds: float = 0.0) -> Outcome:
        """The outcome that `dataclasses.asdict` was asked for, as JSON keeps it."""
        reached = tuple(Reached(*entry) for entry in values["reached"])
        return cls(**{**values, "reached": reached, "seconds": seconds})

    @property
    def is_answer(self) -> bool:
        """Whether the cell told how good its learning rate is. One that was killed did not."""
        return self.status in ("finished", "diverged")


@dataclass(frozen=True)
class SweepSettings:
    """What is the same in all cells; the options of `lightning-surge sweep`, whose `--help` explains them.

    `config_digest` is of what the configuration says, with all defaults; `files_digest` of its files as they
    are, to notice an edit while the sweep runs.
    """

    configs: tuple[str, ...]
    config_digest: str = ""
    files_digest: str = ""
    batch_size_key: str = ""
    lr_key: str = ""
    steps_keys: tuple[str, ...] = ()
    examples_keys: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    examples: int | None = None
    steps: int | None = None
    metric: str = "val_loss"
    maximize: bool = False
    targets: tuple[float, ...] = ()
    stop_at_target: bool = False
    checks: int = 10
    smoothing: float | None = None
    max_micro_batch_size: int | None = None
    replicas: int = 1
    batch_size_fn: str | None = None
    model_class: str | None = None
    data_class: str | None = None
    cli_class: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SweepSettings:
        """The settings that `dataclasses.asdict` was asked for, as JSON keeps them."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def steps_of(self, batch_size: int) -> int:
        """Optimizer steps of a cell: as many as take its examples, rounded, at least one."""
        return self.steps or max(1, round((self.examples or 0) / batch_size))

    def examples_of(self, batch_size: int) -> int:
        """Examples of a cell."""
        return self.steps_of(batch_size) * batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change within a sweep. Files may move and be formatted anew."""
        values: dict[str, Any] = save(self)
        del values["configs"], values["files_digest"]
        return values

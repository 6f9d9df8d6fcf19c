"""What a sweep consists of: cells, what is the same in all of them, and what each one said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

__all__ = [
    "Cell",
    "CellSpec",
    "Grid",
    "Outcome",
    "Reached",
    "Record",
    "Status",
    "SweepError",
    "SweepSettings",
]

Status = Literal["finished", "diverged", "out_of_memory", "killed", "failed"]
"""How a cell ended. Diverged: its loss was no number any more. Killed: by a signal from outside."""


class SweepError(Exception):
    """The sweep cannot begin or go on: rule, value, remedy."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training run of the grid.

    Attributes:
        batch_size: examples per optimizer step.
        lr: the learning rate that the configuration gets.
        seed: of `seed_everything`.
    """

    batch_size: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """For progress lines.

        Example:
            >>> Cell(16, 1e-3, 0).name
            'batch_size=16 lr=0.001 seed=0'
        """
        return f"batch_size={self.batch_size} lr={self.lr:g} seed={self.seed}"

    @property
    def slug(self) -> str:
        """For names of files."""
        return f"b{self.batch_size}-lr{self.lr:g}-seed{self.seed}"


class Reached(NamedTuple):
    """When the loss first was at most a target.

    Attributes:
        target: the loss.
        steps: optimizer steps until then; None if it never was.
        examples: examples behind them; None if it never was.
    """

    target: float
    steps: int | None
    examples: int | None


@dataclass(frozen=True)
class Outcome:
    """What a cell said.

    Attributes:
        status: how it ended.
        loss: at its end; None unless finished.
        steps: optimizer steps taken.
        examples: examples behind them, as counted.
        seconds: wall time, with the start of its process.
        reached: one entry for each target.
        message: what went wrong, in a line.
    """

    status: Status
    loss: float | None = None
    steps: int = 0
    examples: int = 0
    seconds: float = 0.0
    reached: tuple[Reached, ...] = ()
    message: str = ""

    def __post_init__(self) -> None:
        # Read back from files that a kill, or an editor, may have damaged.
        if self.status not in get_args(Status):
            raise ValueError(f"Expected a status of {', '.join(get_args(Status))}, got {self.status!r}.")
        if (self.loss is None) == (self.status == "finished"):
            raise ValueError(f"Expected a loss from finished cells only, got {self.status}, {self.loss}.")

    @property
    def is_answer(self) -> bool:
        """Whether the cell told how good its learning rate is. One that was killed did not."""
        return self.status in ("finished", "diverged")


class Record(NamedTuple):
    """A cell and what it said."""

    cell: Cell
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        """Plain values, for one line of a file."""
        return {**asdict(self.cell), **asdict(self.outcome)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_json` was asked for.

        Raises:
            KeyError, TypeError, ValueError: if it was not.

        Example:
            >>> record = Record(Cell(16, 0.001, 0), Outcome("finished", 0.5, 10, 160))
            >>> Record.from_json(record.to_json()) == record
            True
        """
        cell = Cell(int(values["batch_size"]), float(values["lr"]), int(values["seed"]))
        rest = {field.name: values[field.name] for field in fields(Outcome)}
        return cls(cell, Outcome(**{**rest, "reached": tuple(Reached(*entry) for entry in rest["reached"])}))


@dataclass(frozen=True)
class Grid:
    """Every batch size with every learning rate and every seed.

    Attributes:
        batch_sizes: examples per optimizer step, increasing.
        lrs: learning rates, increasing.
        seeds: in order of importance.
    """

    batch_sizes: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def cells(self) -> list[Cell]:
        """All of them; the whole grid of one seed comes before the next seed.

        Example:
            >>> [cell.slug for cell in Grid((8, 16), (0.1,), (0, 1)).cells()]
            ['b8-lr0.1-seed0', 'b16-lr0.1-seed0', 'b8-lr0.1-seed1', 'b16-lr0.1-seed1']
        """
        return [Cell(size, lr, seed) for seed in self.seeds for size in self.batch_sizes for lr in self.lrs]


@dataclass(frozen=True)
class SweepSettings:
    """What is the same in all cells and shapes what they say.

    Attributes:
        configs: paths of the configuration files, later ones on top.
        config_digest: of what they say, with all defaults.
        files_digest: of the files as they are, to notice an edit while the sweep runs.
        batch_size_key: where the configuration holds the examples per micro-batch.
        lr_key: where it holds the learning rate.
        steps_keys: further places that get the optimizer steps of the cell.
        examples_keys: further places that get its examples.
        overrides: further `key=value` for every cell.
        examples: per cell; None if `steps` is given.
        steps: optimizer steps per cell; None if `examples` is given.
        metric: name of the loss.
        targets: losses whose first reaching is recorded, decreasing.
        stop_at_target: whether a cell ends when it has reached all of them.
        checks: validations per cell.
        smoothing: examples over which a training loss is averaged; None for a fiftieth of the cell's.
        max_micro_batch_size: examples that fit into memory; None for any number.
        replicas: data-parallel replicas of each cell.
        batch_size_fn: dotted path of a function that counts the examples in a batch; None for the default.
        model_class: dotted path, for configurations without a `class_path` of the model.
        data_class: the same for the data.
        cli_class: dotted path of an own LightningCLI.
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

    def steps_of(self, batch_size: int) -> int:
        """Optimizer steps of a cell: as many as take its examples, rounded, at least one.

        Example:
            >>> SweepSettings(("run.yaml",), examples=1000).steps_of(64)  # 15.6
            16
        """
        if self.steps is not None:
            return self.steps
        assert self.examples is not None
        return max(1, round(self.examples / batch_size))

    def examples_of(self, batch_size: int) -> int:
        """Examples of a cell."""
        return self.steps_of(batch_size) * batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change within a sweep. Files may move and be formatted anew."""
        # As JSON reads it back, where tuples are lists.
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del values["configs"], values["files_digest"]
        return values

    @property
    def digest(self) -> str:
        """Of the identity: twelve hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]


class CellSpec(NamedTuple):
    """All that the process of one cell needs to know."""

    settings: SweepSettings
    cell: Cell

    def to_json(self) -> str:
        """For a file."""
        return json.dumps({"settings": asdict(self.settings), "cell": asdict(self.cell)})

    @classmethod
    def from_json(cls, text: str) -> CellSpec:
        """The specification that `to_json` was asked for."""
        values = json.loads(text)
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values["settings"].items()
        }
        return cls(SweepSettings(**settings), Cell(**values["cell"]))

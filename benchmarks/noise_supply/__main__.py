"""Measure how soon the noise scale is known, and how well for one percent of the passes.

    python -m benchmarks.noise_supply                # ten minutes on one core
    python -m benchmarks.noise_supply --streams 2    # to see that it works; writes nothing

Every stream is a training through Lightning whose noise is known: the loss is linear, so the gradient of an
example is the example, `mu + x` with `|mu| = 1` and the eigenvalues of x's covariance in proportion to 1/i.
Such noise has the effective dimension 34, where a real network's has some tens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fidelity.markdown import targets_table
from benchmarks.results import commit, measured_at, target, write
from benchmarks.trainer import quiet_trainer
from lightning_surge import SurgeLRCallback

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.noise_supply"
WIDTH = 1000
STREAMS = 40


@dataclass(frozen=True)
class Cell:
    """Trainings of one kind.

    Attributes:
        noise_scale: the true `tr Sigma / |G|^2`, examples.
        examples: trained on.
        batch_size: of a micro-batch of one process.
        bound: on the median of `error`.
        error: `"share"` of the truth, or octaves: `"log2"`.
    """

    noise_scale: float
    examples: int
    batch_size: int
    bound: float
    error: str
    accumulation: int = 1
    processes: int = 1

    def error_of(self, found: float) -> float:
        """Of an estimate; infinite if nothing is known."""
        if not 0.0 < found < math.inf:
            return math.inf
        return (
            abs(found / self.noise_scale - 1.0)
            if self.error == "share"
            else abs(math.log2(found / self.noise_scale))
        )


CELLS = {
    "accumulation 4, 62": Cell(62.0, 1_000, 8, 0.20, "share", accumulation=4),
    "two processes, 62": Cell(62.0, 1_000, 16, 0.20, "share", processes=2),
    "one process at 1 %, 62": Cell(62.0, 81_920, 32, 0.15, "log2"),
    "one process at 1 %, 1146": Cell(1146.0, 81_920, 32, 0.50, "log2"),
}


class Linear(pl.LightningModule):
    """Its gradient is the mean of the examples, wherever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(WIDTH))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean product with the weight."""
        return (batch[0] @ self.weight).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def examples(cell: Cell, seed: int) -> Tensor:
    """Independent draws with the noise scale of the cell."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    eigenvalues = 1.0 / torch.arange(1, WIDTH + 1)
    noise = torch.randn(cell.examples, WIDTH, generator=generator)
    return mean / mean.norm() + noise * (cell.noise_scale * eigenvalues / eigenvalues.sum()).sqrt()


def stream(cell: Cell, seed: int, rank: int = 0, **options: Any) -> dict[str, Any]:
    """One training with the callback at its defaults, and what it knows at the end."""
    rows = examples(cell, seed)[rank :: cell.processes]
    callback = SurgeLRCallback(base_batch_size=16, custom_scalars=False)
    trainer = quiet_trainer(
        [callback],
        max_epochs=1,
        accumulate_grad_batches=cell.accumulation,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(Linear(), DataLoader(TensorDataset(rows), batch_size=cell.batch_size))
    known = callback.history.num_measurements > 0
    return {
        "seed": seed,
        "noise_scale": callback.history.stats().noise_scale if known else math.nan,
        "measurements": callback.history.num_measurements,
        "overhead": callback.overhead,
    }


def work(rank: int, name: str, port: int, path: str, seeds: Sequence[int]) -> None:
    """One of several processes, with every stream."""
    cell = CELLS[name]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(cell.processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options = {"devices": cell.processes, "strategy": "ddp"}
    records = [stream(cell, seed, rank, **options) for seed in seeds]
    if rank == 0:
        Path(path).write_text(json.dumps(records))


def measured(name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The streams of a cell."""
    cell = CELLS[name]
    if cell.processes == 1:
        return [stream(cell, seed) for seed in seeds]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/found.json"
        arguments = (name, port, path, seeds)
        start_processes(work, arguments, cell.processes, start_method="fork")  # type: ignore[no-untyped-call]
        records: list[dict[str, Any]] = json.loads(Path(path).read_text())
    return records


def summarised(streams: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per cell: the median error, and the quartiles beside it."""
    rows = []
    for name, records in streams.items():
        cell = CELLS[name]
        errors = sorted(cell.error_of(record["noise_scale"] or math.nan) for record in records)
        unit = "share of the truth" if cell.error == "share" else "|log2|"
        what = f"B_simple after {cell.examples:,} examples, {name}: median error, {unit}"
        quartiles = [round(errors[len(errors) * k // 4], 4) for k in (1, 3)]
        rows.append(
            target(
                what, statistics.median(errors), cell.bound, COMMAND, quartiles=quartiles, streams=len(errors)
            )
        )
    return rows


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=STREAMS, help="fewer write nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    now, streams = {"commit": commit()}, {}
    for name in CELLS:
        streams[name] = [record | now for record in measured(name, range(options.streams))]
        (row,) = summarised({name: streams[name]})
        print(f"{row['value']:.3f} (at most {row['bound']}), {row['name']}", flush=True)
    if options.streams >= STREAMS:
        summary = summarised(streams)
        write(RESULTS, summary, streams=streams)
        page = f"{targets_table(summary)}\n\n{measured_at(itertools.chain(*streams.values()))}\n"
        (RESULTS / "table.md").write_text(page)


if __name__ == "__main__":
    main()

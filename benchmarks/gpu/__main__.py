"""Measure the callback on one data-centre GPU: time, memory, agreement with the CPU. At most eight minutes.

    python -m benchmarks.gpu             # writes benchmarks/gpu/results, with the GPU's name
    python -m benchmarks.gpu --shrink    # a tiny model on the CPU, to see that it works; writes nothing

A transformer of 124 million parameters trains on random tokens, with and without the callback: wall time of
ordinary steps, peak memory, and milliseconds of one measurement. A small one is measured on both devices, and
trained in a dry run and without a callback, which must leave equal weights and random streams.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fidelity.markdown import targets_table
from benchmarks.results import target, write
from benchmarks.trainer import quiet_trainer
from lightning_surge import SurgeLRCallback

RESULTS = Path(__file__).parent / "results"
COMMAND = "make bench-gpu"
NEVER = 10**9


class Shape(NamedTuple):
    """Of a decoder-only transformer, its micro-batches, and how long it trains."""

    vocabulary: int = 50257
    width: int = 768
    layers: int = 12
    heads: int = 12
    context: int = 256
    batch: int = 16
    steps: int = 30
    dropout: float = 0.0


FULL = Shape()
TINY = Shape(vocabulary=64, width=16, layers=2, heads=2, context=8, batch=8, steps=6)


class Cell(NamedTuple):
    """One way to train."""

    precision: Any
    accumulation: int = 1
    fused: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """In words."""
        options = [", fused AdamW"] * self.fused + [", torch.compile"] * self.compiled
        return f"{self.precision}, accumulation {self.accumulation}{''.join(options)}"


CELLS = (
    Cell("bf16-mixed"),
    Cell("bf16-mixed", accumulation=4),
    Cell("bf16-true"),
    Cell("bf16-true", accumulation=4),
    Cell("bf16-mixed", fused=True),
    Cell("bf16-mixed", fused=True, compiled=True),
)


class Transformer(pl.LightningModule):
    """Predicts the next token; the output shares the embedding's weights."""

    def __init__(self, shape: Shape, *, fused: bool = False, lr: float = 1e-4) -> None:
        super().__init__()
        self.fused, self.lr = fused, lr
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        layer = nn.TransformerEncoderLayer(
            shape.width,
            shape.heads,
            4 * shape.width,
            shape.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        tokens = batch[0]
        x = self.tokens(tokens[:, :-1]) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        x = self.norm(self.layers(x, mask=mask, is_causal=True))
        return F.cross_entropy((x @ self.tokens.weight.T).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=self.fused or None)


class Clock(pl.Callback):
    """When each batch has ended, the device waited for."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(
    shape: Shape, callback: SurgeLRCallback | None, cell: Cell, accelerator: str = "auto", lr: float = 1e-4
) -> tuple[Transformer, list[float], int]:
    """Seconds per optimizer step after the first few, and bytes at the peak."""
    pl.seed_everything(0, verbose=False)
    examples = shape.batch * cell.accumulation * shape.steps
    tokens = torch.randint(shape.vocabulary, (examples, shape.context + 1))
    model = Transformer(shape, fused=cell.fused, lr=lr)
    if cell.compiled:
        model.layers = torch.compile(model.layers)  # type: ignore[assignment]
    clock = Clock()
    callbacks = [clock] if callback is None else [callback, clock]
    trainer = quiet_trainer(
        callbacks,
        accelerator=accelerator,
        precision=cell.precision,
        accumulate_grad_batches=cell.accumulation,
        max_epochs=1,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(model, DataLoader(TensorDataset(tokens), batch_size=shape.batch))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    ends = clock.ends[cell.accumulation - 1 :: cell.accumulation]
    return model, [after - before for before, after in pairwise(ends)][shape.steps // 3 :], peak


def overhead(shape: Shape, cell: Cell) -> dict[str, Any]:
    """Of one cell: an ordinary step and a measurement against a step without the callback."""
    examples = shape.batch * cell.accumulation
    try:
        model, plain, bytes_plain = train(shape, None, cell)
        _, ordinary, bytes_ordinary = train(shape, SurgeLRCallback(examples, probe_every=NEVER), cell)
        callback = SurgeLRCallback(examples, probe_every=1)
        _, measured, bytes_measured = train(shape, callback, cell)
    except MisconfigurationException as error:
        return {"name": cell.name, "refused": str(error)}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # A measurement ends one window of several, and makes it the longest.
    slow = sorted(measured)[-max(2 * callback.history.num_measurements // 3, 1) :]
    step, usual, busy = (statistics.median(each) for each in (plain, ordinary, slow))
    return {
        "name": cell.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": 1e3 * step,
        "ordinary": usual / step - 1.0,
        "buffers_between": (bytes_ordinary - bytes_plain) / size,
        "measurement_ms": 1e3 * (busy - usual),
        "buffers_during": (bytes_measured - bytes_plain) / size,
        "measurements": callback.history.num_measurements,
    }


def agreement(shape: Shape) -> float:
    """Largest relative difference between the devices' statistics of the same batch at the same weights."""
    found = []
    for accelerator in ("cpu", "auto"):
        callback = SurgeLRCallback(shape.batch, probe_every=1, dry_run=True)
        train(shape._replace(steps=12), callback, Cell("32-true"), accelerator, lr=0.0)
        assert callback.history.latest is not None
        found.append(callback.history.latest.statistics[1:3])
    return max(abs(one / other - 1.0) for one, other in zip(*found, strict=True))


def traces(shape: Shape) -> float:
    """1 if a dry run leaves other weights or random streams than no callback."""
    ends = []
    for callback in (None, SurgeLRCallback(shape.batch, probe_every=1, dry_run=True)):
        model, _, _ = train(shape._replace(dropout=0.1), callback, Cell("32-true"))
        streams = [torch.get_rng_state()]
        streams += torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        ends.append([*model.state_dict().values(), *streams])
    return float(not all(torch.equal(one, other) for one, other in zip(*ends, strict=True)))


def summarised(cells: list[dict[str, Any]], difference: float, trace: float) -> list[dict[str, Any]]:
    """One row per target."""
    rows = [
        target("statistics, largest relative difference between GPU and CPU", difference, 1e-3, COMMAND),
        target("a dry run leaves a trace in weights or random streams", trace, 0.0, COMMAND),
    ]
    for cell in (cell for cell in cells if "refused" not in cell):
        name = cell["name"]
        rows.append(target(f"{name}: ordinary step, more time", cell["ordinary"], 0.02, COMMAND))
        for when, bound in (("between", 1.0), ("during", 4.0)):
            text = f"{name}: memory {when} measurements, in parameter-sized buffers"
            rows.append(target(text, cell[f"buffers_{when}"], bound, COMMAND))
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shrink", action="store_true", help="a tiny model on the CPU, nothing written")
    options = parser.parse_args()
    if not (options.shrink or torch.cuda.is_available()):
        sys.exit("benchmarks.gpu needs a CUDA GPU, and torch sees none: use --shrink to try it on the CPU.")
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    cells = []
    for cell in CELLS:
        # Fused and compiled kernels need a compiler, or a GPU.
        chosen = cell._replace(compiled=False) if options.shrink else cell
        cells.append(overhead(TINY if options.shrink else FULL, chosen))
        print(cells[-1], flush=True)
    small = TINY._replace(width=64, vocabulary=256)
    summary = summarised(cells, agreement(small), traces(small))
    if options.shrink:
        print(targets_table(summary))
    else:
        write(RESULTS, summary, cells=cells)


if __name__ == "__main__":
    main()

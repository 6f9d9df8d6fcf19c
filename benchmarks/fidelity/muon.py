"""Whether the measured law would serve Muon: one step along the orthogonalised gradient of a batch.

Muon's step is the orthogonalised momentum of every weight matrix, whose length does not grow with the
gradient. A step gains `N(B) = <G, orth(g_B)>`, at most the nuclear norm of `G`. Does it saturate at the noise
scale `tr Sigma / |G|^2` of the matrices, which the callback measures? The factor of the default follows `N`
alone. Where curvature is known too, the law is fitted to two batch sizes and judged by line searches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

from benchmarks.fidelity.analysis import Record, Row, difference, log2, pick, summary
from benchmarks.fidelity.held import law_through
from benchmarks.fidelity.markdown import number, table
from benchmarks.fidelity.one_step import DIRECTIONS, gradient_of, searched
from benchmarks.fidelity.switch import fixed_sample
from benchmarks.fidelity.training import PHASES, Study
from benchmarks.fidelity.workloads import BASE_BATCH_SIZE, WORKLOADS, draw

MUON_SIZES = (4, 16, 64, 256, 1024)
FITTED = (BASE_BATCH_SIZE, 16 * BASE_BATCH_SIZE)


def matrices(study: Study) -> list[bool]:
    """Which parameters Muon serves: matrices within the network, neither embeddings nor the output."""
    return [
        parameter.ndim == 2 and name.startswith("blocks")
        for name, parameter in study.network.named_parameters()
    ]


def orthogonal(gradient: Tensor) -> Tensor:
    """The step of torch's Muon with `adjust_lr_fn="match_rms_adamw"`, over its 0.2: entries of about 1."""
    step = _zeropower_via_newtonschulz(gradient, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7)
    return step.to(gradient.dtype) * math.sqrt(max(gradient.shape))


def trained(workload: str, phase: str, seed: int) -> Study:
    """The base batch size to a phase with Muon, and AdamW for what is no matrix, at one learning rate."""
    torch.manual_seed(seed)
    study = Study(WORKLOADS[workload], (0.9, 0.95))
    parameters, served, lr = list(study.network.parameters()), matrices(study), study.workload.lr
    inner = list(itertools.compress(parameters, served))
    others = list(itertools.compress(parameters, (not yes for yes in served)))
    optimizers = [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PHASES[phase]):
        batch = draw(study.workload.data(), BASE_BATCH_SIZE, generator)
        for parameter, gradient in zip(parameters, gradient_of(study, batch), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return study


def muon(workload: str, phase: str, seed: int) -> dict[str, Any]:
    """By batch size: the best step along orthogonalised gradients, and their share of the nuclear norm.

    Besides, the noise scale of the matrices' gradients.
    """
    study = trained(workload, phase, seed)
    served = matrices(study)

    def direction(gradient: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(gradient, served, strict=True)
        return [orthogonal(one) if yes else torch.zeros_like(one) for one, yes in pairs]

    sample = fixed_sample(study.workload)
    full = gradient_of(study, sample)
    inner = itertools.compress(full, served)
    most = sum(float(torch.linalg.matrix_norm(one, "nuc")) * math.sqrt(max(one.shape)) for one in inner)
    generator = torch.Generator().manual_seed(88_000 + seed)
    steps, scale = {}, math.nan
    for size in MUON_SIZES:
        batches = [draw(study.workload.data(), size, generator) for _ in range(DIRECTIONS[size])]
        gradients = [gradient_of(study, one) for one in batches]
        found = searched(study, [direction(gradient) for gradient in gradients], sample, full)
        steps[str(size)] = found | {"share": found["alignment"] / most}
        if size == BASE_BATCH_SIZE:
            inner = [list(itertools.compress(gradient, served)) for gradient in gradients]
            scale = noise_scale(inner, list(itertools.compress(full, served)), size, len(sample[0]))
    return {"orthogonal": steps, "noise_scale": scale}


def noise_scale(
    gradients: Sequence[Sequence[Tensor]], full: Sequence[Tensor], size: int, examples: int
) -> float:
    """`tr Sigma / |G|^2`, from gradients of batches and one of so many other examples."""
    distances = [[one - other for one, other in zip(gradient, full, strict=True)] for gradient in gradients]
    spread = sum(float(one.square().sum()) for distance in distances for one in distance) / len(gradients)
    trace = spread / (1 / size + 1 / examples)
    return trace / (sum(float(one.square().sum()) for one in full) - trace / examples)


def fitted_scale(steps: Mapping[str, Any]) -> float:
    """B_phi of `N(B) = limit / sqrt(1 + B_phi / B)` through two sizes; 0 where N does not grow."""
    small, large = FITTED
    quotient = (steps[str(small)]["alignment"] / steps[str(large)]["alignment"]) ** 2
    return max(1.0 - quotient, 0.0) / max(quotient / small - 1 / large, 1e-9)


def judged(record: Mapping[str, Any]) -> list[Row]:
    """By size, log2 of what a law says over what is true, of `N` and of the lr, over the base's.

    Of `N` by the noise scale, too.
    """
    steps, known = record["orthogonal"], record["noise_scale"]
    scale, base, rows = fitted_scale(steps), steps[str(BASE_BATCH_SIZE)], []
    law = law_through(steps, FITTED, scale)
    for size in MUON_SIZES if law is not None else ():
        step = steps[str(size)]
        row: Row = {"batch_size": size, "scale": scale, "known": known, "share": step["share"]}
        for field, said in (("alignment", law.alignment), ("lr", law.lr)):
            row[f"true {field}"] = difference(log2(step[field]), log2(base[field]))
            row[field] = difference(math.log2(said(size) / said(BASE_BATCH_SIZE)), row[f"true {field}"])
        saturation = 0.5 * math.log2((1 + known / BASE_BATCH_SIZE) / (1 + known / size))
        row["by norms"] = difference(saturation, row["true alignment"])
        rows.append(row)
    return rows


def muon_table(records: Mapping[str, Sequence[Record]]) -> str:
    """What a step gains by batch size, and how far the fitted law misses it and the best step."""
    rows = [row for record in records["muon"] for row in judged(record)]

    def median(field: str, sizes: tuple[int, ...], digits: int = 2) -> str:
        return number(summary(row[field] for row in pick(rows, batch_size=sizes)).median, digits)

    fields = ("share", "by norms", "alignment", "true lr", "lr")
    lines = [[size, *(median(field, (size,)) for field in fields)] for size in MUON_SIZES]
    others = tuple(size for size in MUON_SIZES if size not in FITTED)
    beyond = tuple(size for size in MUON_SIZES if size != BASE_BATCH_SIZE)
    by_norms, small, large = median("by norms", beyond), *FITTED
    note = (
        f"{len(records['muon'])} points of training with Muon; medians. With the noise scale of the "
        f"matrices, {median('known', FITTED, 0)} examples, the law misses N(B) / N({small}), which the "
        f"default's factor follows, by {by_norms} octaves. Fitted at B = {small} and {large}, with "
        f"curvature, it has a scale of {median('scale', FITTED, 0)} and misses N by "
        f"{median('alignment', others)} and the ratio of the best steps by {median('lr', others)} elsewhere."
    )
    headers = [
        "B",
        "N(B) over the nuclear norm",
        "error of N(B) / N(16), by norms",
        "error, fitted",
        "|log2| of the ratio of the best steps",
        "error, fitted",
    ]
    return f"{note}\n\n{table(headers, lines)}"

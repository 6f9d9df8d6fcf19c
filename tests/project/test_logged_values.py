"""docs/logged-values.md and what trainings log are the same."""

import re
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import SGD

from lightning_surge import BatchSizeWarmup, SurgeLRCallback
from lightning_surge.callbacks.logging import law_metrics
from lightning_surge.laws.base import Law, MeasuredLaw
from lightning_surge.laws.objectives import OBJECTIVES, RETIRED
from lightning_surge.laws.theorems import Theorem3Law
from lightning_surge.policy.estimates import EstimatedLaw, estimate, fit_sign_law
from lightning_surge.policy.history import NoiseHistory
from lightning_surge.policy.reasons import Reason
from lightning_surge.runs.log_files import read_run
from tests.drawn import history_of, record
from tests.trainings import MakeOptimizer, Regression, adamw, regression_data, trained, two_groups, with_lr

PAGE = (Path(__file__).parents[2] / "docs" / "logged-values.md").read_text()
DOCUMENTED = set(re.findall(r"^\| `(surge/[^`]+)` \|", PAGE, re.MULTILINE))
SETTINGS: dict[str, Any] = {"probe_every": 2, "probe_examples": 64}


@pytest.fixture
def fitted(tmp_path: Path) -> Callable[..., Any]:
    """The run and its callback, after a short training."""

    def fit(
        callback: SurgeLRCallback, *others: pl.Callback, make: MakeOptimizer = adamw, steps: int = 30
    ) -> Any:
        logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
        trained(Regression(make), regression_data(16 * steps, 16), callback, *others, logger=logger)
        return read_run(str(logger.log_dir)), callback

    return fit


def keys(run: Any) -> set[str]:
    """Logged keys, with the ends of groups as the page writes them."""
    found = {key for key in run.series if key.startswith("surge/")}
    suffixed = {
        key: "/".join(key.split("/")[:2])
        for key in found
        if re.match(r"surge/lr_(scheduled|predicted|used)", key)
    }
    return {f"{suffixed[key]}/<group>" if key in suffixed else key for key in found}


@pytest.mark.slow
def test_every_key_is_documented_and_every_documented_key_is_logged(fitted: Callable[..., Any]) -> None:
    step, _ = fitted(SurgeLRCallback(4, objective="step", **SETTINGS), BatchSizeWarmup(16, 32, 20))
    plain, _ = fitted(SurgeLRCallback(4, **SETTINGS), make=with_lr(SGD, 0.001))
    groups, _ = fitted(SurgeLRCallback(4, **SETTINGS), make=two_groups)
    theorem, _ = fitted(SurgeLRCallback(4, law="theorem3", **SETTINGS))
    logged = keys(step) | keys(plain) | keys(groups) | keys(theorem)
    # Which form of Theorem 3 comes out is for the data to say.
    for law in (
        Theorem3Law(noise_scale=8.0, peak_lr=0.1),
        Theorem3Law(noise_scale=torch.inf, peak_lr=torch.inf, sqrt_coefficient=0.1),
    ):
        logged |= law_metrics(NoiseHistory(8.0), sure(law), 16.0).keys()
    assert logged == DOCUMENTED


def sure(law: Law) -> EstimatedLaw:
    return EstimatedLaw(law, ((law, 0.5), (law, 0.5)), num_measurements=2)


def test_the_law_of_a_training_can_be_made_again(fitted: Callable[..., Any]) -> None:
    run, callback = fitted(SurgeLRCallback(4, objective="step", **SETTINGS))
    record = callback.law_history[-1]
    law = run.law_at(run.last_step)
    assert isinstance(law, MeasuredLaw)
    assert law.lr(16.0) == pytest.approx(record.law.lr(16.0), rel=1e-5)
    assert run.at("law/largest_measured", run.last_step) == pytest.approx(record.law.reach[1])
    assert run.at("lr_scale_doubled", run.last_step) == pytest.approx(
        OBJECTIVES["step"](record.law, 32.0, 4.0), rel=1e-5
    )
    assert run.at("examples", run.last_step) == 16.0 * (run.last_step + 1)
    assert run.base_batch_size == 4.0


def test_reasons_are_documented_as_they_are() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)
    assert [(int(code), name, text) for code, name, text in rows] == [
        (int(reason), reason.name, reason.text) for reason in Reason
    ]


def test_objectives_are_documented_in_their_order() -> None:
    (row,) = re.findall(r"^\| `surge/objective` .*$", PAGE, re.MULTILINE)
    codes = dict(enumerate(OBJECTIVES)) | RETIRED
    assert re.findall(r"(\d) (?:was )?`(\w+)`", row) == [(str(code), name) for code, name in codes.items()]
    assert len(codes) == len(OBJECTIVES) + len(RETIRED)


def test_codes_stay() -> None:
    """They are in logs that exist."""
    assert {reason.name: int(reason) for reason in Reason} == {
        "MEASURED": 0, "RULE": 1, "NOTHING_MEASURED": 2, "UNCERTAIN": 3, "BOUNDED_ABOVE": 4,
        "BOUNDED_BELOW": 5,
        "RISING": 6, "NO_LAW_HERE": 7, "UNRESOLVED": 8, "NO_LAW": 10, "NO_EDGE": 11, "MEASURING_FAILED": 12,
        "FITTING_FAILED": 13,
        "AVERAGES_UNREADABLE": 14, "GRADIENTS_ZERO": 15, "PARAMETERS_CHANGED": 16,
    }  # fmt: skip
    assert list(OBJECTIVES) == ["step", "alignment", "progress"]
    assert RETIRED == {3: "edge"}


def test_a_failed_measurement_is_logged_as_such(fitted: Callable[..., Any]) -> None:
    def broken(module: pl.LightningModule, batch: Any) -> Tensor:
        raise RuntimeError("not today")

    with pytest.warns(UserWarning, match="not today"):
        run, callback = fitted(SurgeLRCallback(4, loss_fn=broken, **SETTINGS), steps=8)
    assert run.at("held_because", run.last_step) == Reason.MEASURING_FAILED
    assert callback.decision.reason == "held: measuring failed with RuntimeError"


def test_what_a_clamp_made_is_not_logged() -> None:
    """All of the curvature is the signal's, and noise hides the gradient."""
    alignments, curvatures = ((16.0, 1.0), (64.0, 1.2)), ((16.0, 1.0), (64.0, 100.0))
    history = history_of([record(-1.0, 48.0, alignments, curvatures)] * 2)
    law = estimate(history, fit_sign_law)
    assert (law.critical_batch_size, law.peak, history.stats().noise_scale) == (0.0, (0.0, inf), inf)
    logged = law_metrics(history, law, 64.0)
    assert all(isfinite(value) for value in logged.values())
    left_out = {"noise_scale", "critical_batch_size", "peak_batch_size", "peak_lr"}
    assert not left_out & {key.removeprefix("surge/") for key in logged}
    assert {"surge/grad_sq", "surge/lr_optimal", "surge/law/noise_curvature"} <= logged.keys()


def test_an_error_that_is_not_known_is_not_logged() -> None:
    """As after a single measurement."""
    history = history_of([record(2.0, 48.0, ((16.0, 1.0), (64.0, 1.2)), ((16.0, 1.0), (64.0, 2.0)))])
    logged = law_metrics(history, estimate(history, fit_sign_law), 64.0)
    assert {"surge/noise_scale", "surge/lr_optimal"} <= logged.keys()
    assert not any(key.endswith("_standard_error") for key in logged)

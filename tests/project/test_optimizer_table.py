"""Every optimizer of torch: what docs/support.md says of it is what it does."""

import inspect
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_surge import SurgeLRCallback
from lightning_surge.optimizers.families import optimizer_family
from tests.trainings import flat, make_trainer

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
EVERY = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
)
ROWS = {
    name: (law, objectives)
    for name, law, objectives in re.findall(
        r"^\| `(\w+)` \| ([\w ]+) \| ([\w, ]+) \|", PAGE.read_text(), re.MULTILINE
    )
}
SCALED = [name for name in EVERY if ROWS.get(name, ("", ""))[1] != "none"]
MEASURED = [name for name in EVERY if ROWS.get(name, ("refused", ""))[0] != "refused"]


class Linear(pl.LightningModule):
    """One matrix, which all optimizers take; sparse where they ask for it."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.name, self.options = name, options
        self.layer: nn.Module = nn.Linear(4, 3, bias=False)
        if name == "SparseAdam":
            self.layer = nn.Embedding(7, 3, sparse=True)
        self.calls = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        if self.name == "SparseAdam":
            return (self.layer(batch[:, 0].abs().mul(3).long().clamp(max=6)) - batch[:, 1:]).square().mean()
        return (self.layer(batch) - batch[:, 1:]).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return getattr(torch.optim, self.name)(list(self.parameters()), **({"lr": 0.01} | self.options))

    @property
    def weights(self) -> Tensor:
        return flat(self.parameters())


def data(count: int = 24, batch_size: int = 4) -> DataLoader[Any]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=batch_size)  # type: ignore[arg-type]


def test_every_optimizer_of_torch_has_a_row() -> None:
    assert set(EVERY) <= set(ROWS), "write a row of docs/support.md, and a family in optimizer_families.py"


@pytest.mark.parametrize("name", EVERY)
def test_the_row_says_what_the_code_says(name: str) -> None:
    optimizer = Linear(name).configure_optimizers()
    law, objectives = ROWS[name]
    family = optimizer_family(optimizer)
    assert family.known
    assert law == (family.direction.name if family.direction else "refused")
    assert (objectives == "none") is not family.scalable
    assert (objectives == "rules only") == (family.direction is None and family.scalable)


def forms(name: str) -> list[dict[str, Any]]:
    known = inspect.signature(getattr(torch.optim, name)).parameters
    rows: list[dict[str, Any]] = [{}]
    # capturable steps exist on accelerators only.
    rows += [{form: True} for form in ("foreach", "fused") if form in known]
    if "foreach" in known and name != "Adafactor":
        # The forms that loop over parameters take a learning rate that is a tensor, but Adafactor's.
        rows.append({"lr": torch.tensor(0.01), "foreach": False})
    if name in ("SGD", "RMSprop"):
        rows.append({"momentum": 0.9, **({"nesterov": True} if name == "SGD" else {})})
    return rows


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in SCALED for options in forms(name)])
def test_the_learning_rate_written_is_the_one_that_moves_the_weights(
    name: str, options: dict[str, Any]
) -> None:
    if "weight_decay" in inspect.signature(getattr(torch.optim, name)).parameters:
        options = options | {"weight_decay": 0.1}
    lr = options.get("lr", 0.01)
    scaled, doubled = Linear(name, **options), Linear(name, **(options | {"lr": 2 * lr}))
    make_trainer(SurgeLRCallback(2, "linear")).fit(scaled, data())
    make_trainer().fit(doubled, data())
    assert torch.equal(scaled.weights, doubled.weights)
    assert not torch.equal(scaled.weights, Linear(name).weights)


def refused(callback: SurgeLRCallback, module: Linear, message: str) -> None:
    """Before the first step."""
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callback).fit(module, data())
    assert module.calls == 0


@pytest.mark.parametrize("name", [name for name in EVERY if name not in SCALED])
def test_where_a_written_learning_rate_does_not_act_every_law_is_refused(name: str) -> None:
    refused(SurgeLRCallback(2, "sqrt"), Linear(name), f"got {name}, which takes .*: use another optimizer")


@pytest.mark.parametrize(("name", "late"), [("Rprop", False), ("ASGD", True)])
def test_a_learning_rate_for_one_step_indeed_does_not_act_on_it(name: str, late: bool) -> None:
    def run(lrs: list[float]) -> list[float]:
        weight = nn.Parameter(torch.ones(1))
        optimizer = getattr(torch.optim, name)([weight], lr=0.01)
        path = []
        for step, lr in enumerate(lrs):
            optimizer.param_groups[0]["lr"] = lr
            weight.grad = torch.full((1,), 1.0 + step)
            optimizer.step()
            path.append(weight.item())
        return path

    plain, written = run([0.01] * 5), run([0.01, 0.01, 0.04, 0.01, 0.01])
    assert written[:3] == plain[:3]
    assert (written[3] != plain[3]) is late


@pytest.mark.parametrize("name", [name for name in SCALED if name not in MEASURED])
def test_where_neither_direction_is_taken_measuring_is_refused_with_the_reason(name: str) -> None:
    for law in ("measured", "theorem3"):
        module = Linear(name)
        why = re.escape(optimizer_family(module.configure_optimizers()).why)
        refused(SurgeLRCallback(2, law), module, f"got {name}, which {why}: pass law='sqrt'")


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_measured_gives_a_law(name: str) -> None:
    callback = SurgeLRCallback(4, probe_every=1, probe_examples=16)
    make_trainer(callback).fit(Linear(name), data(96))
    assert callback.settings.objective == ("alignment" if ROWS[name][0] == "gradient" else "progress")
    assert callback.history.num_measurements >= 4
    assert callback.law is not None


@pytest.mark.parametrize("options", [{"objective": "step"}, {"log_peak": True}], ids=str)
def test_curvature_is_not_measured_along_whole_matrices(options: dict[str, Any]) -> None:
    message = "got Muon, which evens out .*: use objective='progress'"
    refused(SurgeLRCallback(4, **options), Linear("Muon"), message)


@pytest.mark.parametrize("name", EVERY)
def test_the_length_of_an_update_grows_with_the_gradient_where_the_law_says_so(name: str) -> None:
    def moved(factor: float) -> Tensor:
        module = Linear(name)
        optimizer = module.configure_optimizers()
        (weight,) = module.parameters()
        generator = torch.Generator().manual_seed(0)
        # The first steps of RAdam are along the gradient, and not asked about.
        for step in range(12):
            if step == 8:
                weight.data.fill_(0.5)
                before = weight.detach().clone()
            gradient = factor * (1.0 + torch.randn(weight.shape, generator=generator))
            weight.grad = gradient.to_sparse(1) if name == "SparseAdam" else gradient
            optimizer.step(*([lambda: torch.zeros(())] if name == "LBFGS" else []))
        return weight.detach() - before

    if name == "LBFGS":
        return  # its length is that of a minimum's distance
    # Powers of two, so that nothing but the epsilons differs; those are small beside gradients of 1,024.
    small, large = moved(1024.0), moved(1024.0 * 16)
    expected = 16.0 * small if ROWS[name][0] == "gradient" or name == "ASGD" else small
    assert torch.allclose(large, expected, rtol=2e-3, atol=1e-6)


def test_adafactor_says_when_its_learning_rate_is_capped() -> None:
    with pytest.warns(UserWarning, match=r"uses min\(lr, 1 / sqrt\(step\)\): .* used, 0.8, is above 0.7"):
        make_trainer(SurgeLRCallback(2, "linear")).fit(Linear("Adafactor", lr=0.4), data())


@pytest.mark.parametrize(("lr", "relative_step"), [(None, True), (None, False), (0.1, True)])
def test_an_optimizer_that_keeps_its_learning_rate_to_itself_is_refused(
    lr: float | None, relative_step: bool
) -> None:
    class Adafactor(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": lr, "relative_step": relative_step, "eps": (1e-30, 1e-3)})

    module = Linear("SGD")
    module.configure_optimizers = lambda: Adafactor(module.parameters())  # type: ignore[assignment,method-assign]
    refused(SurgeLRCallback(2, "sqrt"), module, f"got parameter group 0 of Adafactor with lr={lr}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable steps exist on accelerators only")
@pytest.mark.parametrize(
    "name", [n for n in SCALED if "capturable" in inspect.signature(getattr(torch.optim, n)).parameters]
)
def test_capturable_steps_take_the_learning_rate_written(name: str) -> None:
    def options(lr: float) -> dict[str, Any]:
        return {"lr": torch.tensor(lr, device="cuda"), "capturable": True}

    scaled, doubled = Linear(name, **options(0.01)), Linear(name, **options(0.02))
    make_trainer(SurgeLRCallback(2, "linear"), accelerator="cuda").fit(scaled, data())
    make_trainer(accelerator="cuda").fit(doubled, data())
    assert torch.equal(scaled.weights, doubled.weights)

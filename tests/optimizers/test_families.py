"""Recognising what an optimizer steps along, and how its weight decay enters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from lightning_surge.measure.direction import GRADIENT, ORTHOGONAL, SIGN, Direction
from lightning_surge.optimizers.families import (
    decay_follows_lr,
    direction_of,
    largest_lr,
    lr_scales,
    optimizer_family,
    parameter_scales,
)


def foreign(name: str, base: type[Optimizer] = Optimizer, **options: object) -> Optimizer:
    """An optimizer class of another package, of which only the name is known."""
    kind = type(name, (base,), {})
    parameters = [nn.Parameter(torch.ones(1))]
    return kind(parameters, {"lr": 0.1} | options) if base is Optimizer else kind(parameters, lr=0.1)


class TestKind:
    @pytest.mark.parametrize(
        ("direction", "names"),
        [
            (SIGN, "Lion SignSGD Adan FusedAdam AdamW8bit PagedLion8bit DeepSpeedCPUAdam AdamP NAdamW"),
            (SIGN, "RMSpropTF Tiger StableAdamW Adagrad8bit AdafactorBigVision"),
            (GRADIENT, "SGDW SGD8bit FusedSGD"),
            (ORTHOGONAL, "Muon MuonWithAuxAdam AdaMuon DistributedMuon"),
        ],
    )
    def test_updates_of_other_packages(self, direction: Direction, names: str) -> None:
        for name in names.split():
            assert direction_of(foreign(name)) is direction, name

    @pytest.mark.parametrize(
        ("names", "why"),
        [
            ("Shampoo SOAP Dion SCION Kron GaLoreAdamW", "whole matrices"),
            ("DAdaptAdam DAdaptLion Prodigy", "finds the size of its steps"),
            ("AdamWScheduleFree ScheduleFreeAdamW", "steps from a point"),
            ("Lamb LAMB8bit Lars AdamMini", "whole tensors by one size"),
            ("LBFGS AdaHessian", "estimate of the curvature"),
        ],
    )
    def test_updates_along_neither(self, names: str, why: str) -> None:
        for name in names.split():
            family = optimizer_family(foreign(name))
            assert family.direction is None, name
            assert why in family.why

    @pytest.mark.parametrize("name", ["Sophia", "Custom", "Lookahead"])
    def test_unknown_names(self, name: str) -> None:
        assert not optimizer_family(foreign(name)).known

    def test_subclasses_count_as_what_they_derive_from(self) -> None:
        assert direction_of(foreign("Mine", torch.optim.AdamW)) is SIGN
        assert direction_of(foreign("Mine", torch.optim.SGD)) is GRADIENT
        # The nearest name decides.
        assert direction_of(foreign("SignSGD", torch.optim.SGD)) is SIGN

    def test_options_that_change_the_direction(self) -> None:
        weights = [nn.Parameter(torch.ones(1))]
        for climbing in (torch.optim.AdamW(weights, maximize=True), torch.optim.SGD(weights, maximize=True)):
            assert optimizer_family(climbing).direction is None
            assert "maximize=True" in optimizer_family(climbing).why
        assert "centered=True" in optimizer_family(torch.optim.RMSprop(weights, centered=True)).why


class TestScales:
    @given(
        lrs=st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=5),
        factor=st.floats(0.1, 10),
    )
    def test_are_relative_to_the_largest(self, lrs: list[float], factor: float) -> None:
        scales = lr_scales(lrs)
        if max(lrs) == 0.0:
            assert scales == [1.0] * len(lrs)
        else:
            assert max(scales) == 1.0
            assert [scale * max(lrs) for scale in scales] == pytest.approx(lrs)
            if min(filter(None, lrs)) > 1e-200:
                assert lr_scales([factor * lr for lr in lrs]) == pytest.approx(scales)


class TestAdafactor:
    def test_steps_as_far_as_its_scales_say(self) -> None:
        weights = [nn.Parameter(torch.full((2, 8), value)) for value in (0.5, 0.0)]
        optimizer = torch.optim.Adafactor(weights, lr=0.01, weight_decay=0.0)
        # A weight of zero moves too, by the second of its epsilons.
        scales = parameter_scales(optimizer, optimizer.param_groups[0])
        assert scales == [0.5, 1e-3]
        for weight in weights:
            weight.grad = torch.full_like(weight, 3.0)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        for weight, old, scale in zip(weights, before, scales, strict=True):
            assert (old - weight).detach().numpy() == pytest.approx(0.01 * scale, rel=1e-4)

    def test_of_other_packages_by_their_options(self) -> None:
        plain = foreign("Adafactor", eps=(1e-30, 1e-3), scale_parameter=False)
        scaled = foreign("Adafactor", eps=1e-30, eps_scale=4.0)
        assert parameter_scales(plain, plain.param_groups[0]) == [1.0]
        assert parameter_scales(scaled, scaled.param_groups[0]) == [4.0]

    def test_caps_its_learning_rate(self) -> None:
        weight = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.Adafactor([weight], lr=1.0, weight_decay=0.0)
        assert largest_lr(torch.optim.AdamW([weight])) == math.inf
        weight.grad = torch.ones(4)
        for step in range(1, 10):
            assert largest_lr(optimizer) == pytest.approx(step**-0.5)
            weight.data.fill_(1.0)
            optimizer.step()
            assert float(1.0 - weight.detach().mean()) == pytest.approx(step**-0.5, rel=1e-4)


class TestDecay:
    @pytest.mark.parametrize(
        "name", ["AdamW8bit", "PagedAdamW", "NAdamW", "Lion", "SGDW", "Adafactor", "MuonWithAuxAdam"]
    )
    def test_decoupled_by_name(self, name: str) -> None:
        optimizer = foreign(name, weight_decay=0.1, momentum=0.9)
        assert decay_follows_lr(optimizer, optimizer.param_groups[0])

    def test_decoupled_by_option(self) -> None:
        for options, follows in (
            ({"decoupled_weight_decay": True}, True),
            ({"weight_decouple": True}, True),
            ({"weight_decouple": True, "fixed_decay": True}, False),
            ({"weight_decouple": False}, False),
            ({}, False),
        ):
            optimizer = foreign("Custom", weight_decay=0.1, **options)
            assert decay_follows_lr(optimizer, optimizer.param_groups[0]) is follows

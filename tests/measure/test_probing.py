"""Batches at hand into chunks, losses into gradients, and the check that cutting changes nothing."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_surge.measure.batches import BatchError, split_leading_dimension
from lightning_surge.measure.probing import Prober, silenced
from lightning_surge.measure.replay import Piece


def make(
    loss: Callable[[nn.Module, Tensor], Tensor], *, split: bool = True, model: nn.Module | None = None
) -> tuple[Prober, nn.Module]:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    prober = Prober(
        list(model.parameters()),
        compute_loss=lambda batch, _: loss(model, batch),
        backward=lambda value: value.backward(),
        batch_size_fn=len,
        split_batch=split_leading_dimension if split else None,
        uses_batch_statistics=lambda: any(isinstance(one, nn.BatchNorm1d) for one in model),
        silenced=partial(silenced, model),
    )
    return prober, model


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batch(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator, dtype=torch.float64)


def pieces(*lengths: int) -> list[Piece]:
    return [Piece(batch(size, seed), seed, float(size)) for seed, size in enumerate(lengths)]


class TestChunks:
    @pytest.mark.parametrize(
        ("lengths", "base", "split", "wanted"),
        [
            # One batch is cut into slices, a few are cut each, many are grouped.
            ((32,), 4.0, True, [[4]] * 8),
            ((16, 16), 4.0, True, [[4]] * 8),
            ((8, 8, 8), 4.0, True, [[2], [3], [3]] * 3),
            ((2,) * 10, 100.0, True, [[2, 2], [2, 2, 2]] * 2),
            ((8, 8), 1.0, False, [[8], [8]]),
        ],
    )
    def test_batches_are_cut_or_grouped(
        self, lengths: tuple[int, ...], base: float, split: bool, wanted: list[list[int]]
    ) -> None:
        prober, _ = make(mean_loss, split=split)
        whole = pieces(*lengths)
        chunks = prober.chunks(whole, base)
        assert [[piece.size for piece in chunk.pieces] for chunk in chunks] == wanted
        parts = [piece for chunk in chunks for piece in chunk.pieces]
        assert torch.equal(torch.cat([p.batch for p in parts]), torch.cat([piece.batch for piece in whole]))
        assert [piece.batch_idx for piece in parts] == sorted(piece.batch_idx for piece in parts)

    @pytest.mark.parametrize("lengths", [(8, 8, 1), (8, 1), (1, 8), (16, 3)])
    def test_a_short_last_batch_is_right_and_not_skipped(self, lengths: tuple[int, ...]) -> None:
        prober, _ = make(mean_loss)
        chunks = prober.chunks(pieces(*lengths), base_batch_size=2)
        assert sum(chunk.size for chunk in chunks) == sum(lengths)
        assert len(chunks) >= 3  # two sizes of direction

    def test_a_batch_that_cannot_be_cut_says_so(self) -> None:
        prober, _ = make(mean_loss)
        with pytest.raises(BatchError, match="split_batch="):
            prober.chunks([Piece("text", 0, 8.0)], base_batch_size=1)

    def test_slices_are_counted_by_batch_size_fn(self) -> None:
        prober = Prober(
            [],
            compute_loss=lambda *_: torch.zeros(()),
            backward=lambda _: None,
            batch_size_fn=lambda part: float(part.sum()),
            split_batch=split_leading_dimension,
        )
        parts = prober.cut(Piece(torch.arange(4.0), 7, 6.0), 2)
        assert [(part.size, part.batch_idx) for part in parts] == [(1.0, 7), (5.0, 7)]

    @pytest.mark.parametrize(("split", "num_slices"), [(True, 1), (False, 4)])
    def test_nothing_to_cut(self, split: bool, num_slices: int) -> None:
        prober, _ = make(mean_loss, split=split)
        (piece,) = pieces(8)
        assert prober.cut(piece, num_slices) == [piece]


class TestReplay:
    @pytest.mark.parametrize("scale", [1.0, 1024.0])
    def test_adds_the_weighted_gradient(self, scale: float) -> None:
        prober, model = make(mean_loss)
        prober.loss_scale = scale
        (piece,) = pieces(8)
        wanted = torch.autograd.grad(mean_loss(model, piece.batch), list(model.parameters()))
        with torch.no_grad():
            prober.replay(piece, 0.25)
            prober.replay(piece, -1.0)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, -0.75 * scale * gradient)


def sum_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().sum()


def contrastive(model: nn.Module, inputs: Tensor) -> Tensor:
    """Every example is compared with the others of its batch."""
    outputs = model(inputs)
    return nn.functional.cross_entropy(10 * outputs @ outputs.T, torch.arange(len(outputs)))


class RandomNoise(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.draw(inputs.detach())


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": torch.randn_like,
    "mask": lambda x: -x * (torch.rand_like(x) < 0.15),
    "numpy": lambda x: torch.from_numpy(np.random.default_rng().normal(size=x.shape)),
    "choice": lambda x: x * torch.tensor([-2.0, 0.0])[torch.randint(2, x.shape)],
}


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0) if self.training else inputs


class TestSlicesAgree:
    @pytest.mark.parametrize("size", [8, 7])
    def test_a_mean_over_examples(self, size: int) -> None:
        prober, model = make(mean_loss)
        assert prober.slices_agree(*pieces(size), num_slices=4) == (True, True, 2.0 * size)
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("loss", [sum_loss, contrastive])
    def test_sums_and_losses_that_couple_examples(self, loss: Callable[..., Tensor], dropout: float) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(3, 4), nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 1)
        prober, model = make(loss, model=nn.Sequential(*layers).double())
        assert prober.slices_agree(*pieces(8), num_slices=4) == (False, False, 6.0 * 8)
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize(
        ("layers", "passes"),
        [
            ((nn.Dropout(0.3), nn.BatchNorm1d(4)), 2.0),
            ((RandomNoise(torch.randn_like), nn.BatchNorm1d(4)), 2.0),
            ((Statistics(), nn.Dropout(0.3)), 6.0),
        ],
    )
    def test_batch_statistics(self, layers: tuple[nn.Module, ...], passes: float) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
        prober, _ = make(mean_loss, model=model)
        assert prober.slices_agree(*pieces(8), num_slices=4) == (False, False, passes * 8)

    @pytest.mark.parametrize(
        ("layer", "most"),
        [
            *((layer, 4.0) for layer in (nn.Dropout(0.3), nn.Dropout(0.9), nn.AlphaDropout(0.3))),
            (nn.TransformerEncoderLayer(64, 2, 8, dropout=0.5, batch_first=True), 4.0),
            *((RandomNoise(draw), 18.0) for draw in DRAWS.values()),
        ],
    )
    def test_random_numbers_are_forgiven(
        self, layer: nn.Module, most: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_surge.measure.probing.TOLERATED_MISMATCH", 1e-20)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 64), layer, nn.Tanh(), nn.Linear(64, 1)).double()
        prober, _ = make(mean_loss, model=model)
        torch.manual_seed(0)
        piece = Piece(torch.randn(32, 5, 3, dtype=torch.float64), 0, 32.0)
        found = prober.slices_agree(piece, num_slices=4)
        assert (found.agrees, found.exact) == (True, False)
        assert min(most, 6.0) * 32 <= found.passes <= most * 32
        # The passes that told them from a mismatch draw numbers that nobody else misses.
        state = torch.get_rng_state()
        torch.manual_seed(0)
        torch.randn(32, 5, 3, dtype=torch.float64)
        for part in (piece, *prober.cut(piece, 4)):
            prober.replay(part, 1.0)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("factor", [math.nan, math.inf])
    def test_gradients_that_are_no_numbers_say_nothing(self, factor: float) -> None:
        prober, _ = make(lambda model, inputs: factor * mean_loss(model, inputs))
        with pytest.raises(ArithmeticError, match="Expected finite gradients, got some that are not"):
            prober.slices_agree(*pieces(8), num_slices=4)

    def test_a_loss_without_any_gradient(self) -> None:
        prober, _ = make(lambda model, inputs: 0.0 * model(inputs).mean())
        assert prober.slices_agree(*pieces(8), num_slices=4)[0]

    def test_a_model_that_computes_no_loss_out_of_training_is_compared_in_it_the_next_time(self) -> None:
        def loss(model: nn.Module, inputs: Tensor) -> Tensor:
            if not model.training:
                raise TypeError("boxes, and no loss")
            return mean_loss(model, inputs)

        prober, model = make(loss)
        model.insert(1, nn.Dropout(0.5))
        with pytest.raises(TypeError, match="boxes"):
            prober.slices_agree(*pieces(8), num_slices=4)
        assert all(module.training for module in model.modules())
        assert prober.slices_agree(*pieces(8), num_slices=4).agrees
        with silenced(recurrent := nn.LSTM(2, 2, 2, dropout=0.5)):
            assert recurrent.training  # cuDNN wants it

    def test_parameters_that_only_slices_reach(self) -> None:
        def loss(model: Any, inputs: Tensor) -> Tensor:
            # The last layer is used for short batches only.
            hidden = model[0](inputs)
            return (model[2](hidden) if len(inputs) < 8 else hidden).square().mean()

        prober, _ = make(loss)
        assert not prober.slices_agree(*pieces(8), num_slices=4)[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("width", [4, 32])
    @pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.Dropout(0.5), *map(RandomNoise, DRAWS.values())])
    def test_of_fifty_networks_no_mean_is_accused(self, layer: nn.Module, width: int) -> None:
        def accused(loss: Callable[..., Tensor], seed: int) -> bool:
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(3, width), layer, nn.Tanh(), nn.Linear(width, 1)).double()
            return not make(loss, model=model)[0].slices_agree(*pieces(16), num_slices=8).agrees

        losses = mean_loss, sum_loss, contrastive
        means, sums, couplings = (sum(accused(loss, seed) for seed in range(50)) for loss in losses)
        assert means == 0
        noise = getattr(layer, "draw", None)
        assert (sums, couplings) == (50, 50) or noise is not None
        assert sums >= 45 or noise is not DRAWS["mask"]

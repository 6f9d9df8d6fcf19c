"""Batches at hand into chunks, losses into gradients, and the check that cutting changes nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_surge.measure.batches import BatchError, split_leading_dimension
from lightning_surge.measure.probing import Noiseless, Prober
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


def divided_by_its_size(inputs: Tensor) -> Tensor:
    noise = torch.randn_like(inputs)
    return inputs * noise / noise.std()


def one_of(*choices: float) -> Callable[[Tensor], Tensor]:
    """Times a factor chosen at random for every number."""
    factors = torch.tensor(choices, dtype=torch.float64)

    def draw(inputs: Tensor) -> Tensor:
        chosen = torch.multinomial(torch.ones(len(factors)), inputs.numel(), replacement=True)
        return inputs * factors[chosen].view_as(inputs)

    return draw


def until_small(inputs: Tensor) -> Tensor:
    while (draw := torch.rand(1, dtype=torch.float64)) > 0.1:
        pass
    return inputs * draw


GAUSSIAN: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.randn_like,
    lambda x: torch.randn(x.shape, dtype=x.dtype),
    lambda x: torch.zeros_like(x).normal_(),
    lambda x: torch.normal(x, 0.3),
    lambda x: torch.normal(0.0, 1.0, x.shape).double(),
    lambda x: torch.distributions.Normal(x, 0.3).sample(),
)
UNIFORM: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.rand_like,
    lambda x: x * (torch.rand(x.shape) < 0.5),
    lambda x: torch.zeros_like(x).uniform_(-1.0, 2.0),
    lambda x: torch.distributions.Uniform(-1.0, 2.0).sample(x.shape).double(),
    lambda x: torch.randint(7, x.shape).double(),
    lambda x: torch.randint(-1, 7, x.shape).double(),
    lambda x: torch.randint_like(x, -1, 7),
    lambda x: nn.functional.gumbel_softmax(x),
    until_small,
)
MASKS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x * torch.bernoulli(torch.full_like(x, 0.3)),
    lambda x: x * torch.bernoulli(x, 0.3),
    lambda x: x * torch.zeros_like(x).bernoulli_(torch.full_like(x, 0.3)),
    lambda x: x * torch.distributions.Bernoulli(0.3).sample(x.shape),
)


class TestNoiseless:
    @pytest.mark.parametrize(
        ("draw", "wanted"),
        [
            (lambda x: torch.rand(2), (0.5, 0.118)),
            (lambda x: x.uniform_(-1.0, 2.0), (0.5, -0.646)),
            (lambda x: torch.randint(7, (2,)), (3.0, 0.0)),
            (lambda x: torch.randint(3, 9, (2,)), (6.0, 3.0)),
            (lambda x: torch.randint_like(x, -4, 3), (-1.0, -4.0)),
            (lambda x: torch.normal(x, 5.0), (0.3, 0.3)),
            (lambda x: torch.zeros(2).bernoulli_(x), (1.0, 1.0)),
            (lambda x: torch.zeros(2).bernoulli_(), (1.0, 1.0)),
            (lambda x: torch.bernoulli(x - 0.3), (0.0, 0.0)),
        ],
    )
    def test_every_number_of_a_draw_is_the_same(self, draw: Any, wanted: tuple[float, float]) -> None:
        for _ in range(2):
            with Noiseless():
                drawn = [draw(torch.full((2,), 0.3)).tolist() for _ in wanted]
            assert drawn == [pytest.approx([number] * 2, abs=1e-3) for number in wanted]


class TestSlicesAgree:
    @pytest.mark.parametrize("size", [8, 7])
    def test_a_mean_over_examples(self, size: int) -> None:
        prober, model = make(mean_loss)
        assert prober.slices_agree(*pieces(size), num_slices=4) == (True, True, 2.0 * size)
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("loss", [sum_loss, contrastive])
    def test_sums_and_losses_that_couple_examples(self, loss: Callable[..., Tensor], dropout: float) -> None:
        layers = nn.Linear(3, 4), nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 1)
        prober, model = make(loss, model=nn.Sequential(*layers).double())
        assert prober.slices_agree(*pieces(8), num_slices=4) == (False, False, 5.0 * 8)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_batch_statistics(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
        prober, _ = make(mean_loss, model=model)
        assert not prober.slices_agree(*pieces(8), num_slices=4)[0]

    @pytest.mark.parametrize(
        ("layer", "passes"),
        [
            # Half is the default of the operator that drops, and is not handed to it.
            *((nn.Dropout(p), 4.0) for p in (0.3, 0.5, 0.9)),
            (nn.AlphaDropout(0.3), 4.0),
            (nn.TransformerEncoderLayer(64, 2, 8, dropout=0.5, batch_first=True), 4.0),
            *((RandomNoise(draw), 4.0) for draw in GAUSSIAN + UNIFORM + MASKS),
            (RandomNoise(one_of(-1.0, 1.0)), 7.0),  # by repeating it
            (RandomNoise(divided_by_its_size), 9.0),  # as it is not a number without
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_random_numbers_are_forgiven(
        self, layer: nn.Module, passes: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_surge.measure.probing.TOLERATED_MISMATCH", 1e-20)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 64), layer, nn.Tanh(), nn.Linear(64, 1)).double()
        prober, _ = make(mean_loss, model=model)
        torch.manual_seed(0)
        piece = Piece(torch.randn(32, 5, 3, dtype=torch.float64), 0, 32.0)
        assert prober.slices_agree(piece, num_slices=4) == (True, False, passes * 32)
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

    def test_a_loss_that_is_a_multiple_of_its_noise_is_compared_with_it(self) -> None:
        prober, _ = make(lambda model, inputs: (torch.randn(len(inputs), 1) * model(inputs)).mean())
        assert prober.slices_agree(*pieces(8), num_slices=4) == (True, False, 9.0 * 8)

    def test_parameters_that_only_slices_reach(self) -> None:
        def loss(model: Any, inputs: Tensor) -> Tensor:
            # The last layer is used for short batches only.
            hidden = model[0](inputs)
            return (model[2](hidden) if len(inputs) < 8 else hidden).square().mean()

        prober, _ = make(loss)
        assert not prober.slices_agree(*pieces(8), num_slices=4)[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("width", [4, 32])
    @pytest.mark.parametrize(
        "layer",
        [nn.Dropout(0.1), nn.Dropout(0.5), *(RandomNoise(draws[1]) for draws in (GAUSSIAN, UNIFORM, MASKS))],
        ids=["dropout", "much_dropout", "gaussian", "uniform", "mask"],
    )
    @pytest.mark.parametrize(("loss", "accused"), [(mean_loss, 0), (sum_loss, 50), (contrastive, 50)])
    def test_of_fifty_networks_all_or_none_are_accused(
        self, loss: Callable[..., Tensor], accused: int, layer: nn.Module, width: int
    ) -> None:
        def disagrees(seed: int) -> bool:
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(3, width), layer, nn.Tanh(), nn.Linear(width, 1)).double()
            prober = make(loss, model=model)[0]
            return not prober.slices_agree(Piece(batch(8, seed), 0, 8.0), num_slices=4).agrees

        assert sum(map(disagrees, range(50))) == accused

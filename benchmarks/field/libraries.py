"""Small trainings, each with the models, batches and optimizers of one library.

Data are made up or come with the library, and weights are random: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.trainer import quiet_trainer

__all__ = ["EXAMPLES", "LIBRARIES", "Library"]

STEPS = 24
EXAMPLES = 16
ROWS = 96


class Library(NamedTuple):
    """What is trained with a library."""

    package: str
    model: str
    fit: Callable[[list[Any]], object]  # `STEPS` steps of `EXAMPLES` examples with the callbacks given
    count: Callable[[Any], float] | None = None  # `batch_size_fn=`, if the callback asks for it


def trainer(callbacks: list[Any], **options: Any) -> pl.Trainer:
    return quiet_trainer(callbacks, max_steps=STEPS, **options)


def other_options(callbacks: list[Any]) -> dict[str, Any]:
    """The same for a Trainer of the other of Lightning's two packages, which some libraries are made for."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"callbacks": callbacks, "max_steps": STEPS, "accelerator": "cpu", "devices": 1}
    return options | dict.fromkeys(quiet, False)


class Training(pl.LightningModule):
    """A model of a library that brings none of its own for Lightning, as its documentation trains it."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._optimizer, self._loss = model, optimizer, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(self.model, batch)
        self.log("train_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.model.parameters())


# ---------------------------------------------------------------------- graphs


def chemprop(callbacks: list[Any]) -> None:
    from chemprop import data, models
    from chemprop import nn as layers

    generator = np.random.default_rng(0)
    smiles = [
        "C" * (1 + index % 7) + "O" * (index % 2) + "c1ccccc1" * (index % 3 == 0) for index in range(ROWS)
    ]
    points = [data.MoleculeDatapoint.from_smi(one, generator.normal(size=1)) for one in smiles]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=EXAMPLES, seed=0)
    message_passing = layers.BondMessagePassing(d_h=32, depth=2)
    predictor = layers.RegressionFFN(input_dim=32, hidden_dim=32)
    model = models.MPNN(message_passing, layers.MeanAggregation(), predictor, warmup_epochs=1)
    trainer(callbacks, max_epochs=STEPS * EXAMPLES // ROWS).fit(model, loader)


def torch_geometric(callbacks: list[Any]) -> None:
    from torch_geometric.data.lightning import LightningDataset
    from torch_geometric.datasets import FakeDataset
    from torch_geometric.nn import GIN, global_mean_pool

    data = FakeDataset(num_graphs=ROWS, avg_num_nodes=12, num_channels=8, num_classes=2, task="graph")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nodes = model(batch.x, batch.edge_index)
        return F.cross_entropy(global_mean_pool(nodes, batch.batch), batch.y)

    model = GIN(8, 32, num_layers=2, out_channels=2, norm="layer_norm")
    module = Training(model, partial(torch.optim.AdamW, lr=1e-3), loss)
    trainer(callbacks).fit(module, datamodule=LightningDataset(data, batch_size=EXAMPLES, num_workers=0))


# ---------------------------------------------------------------------- images


class Images(Dataset[Any]):
    """Noise, with classes, in the form of torchvision's data sets."""

    def __init__(self) -> None:
        self.transform: Any = None
        self.data = torch.rand(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from torchvision.transforms.functional import to_pil_image

        return self.transform(to_pil_image(self.data[index])), index % 4


def backbone() -> nn.Module:
    layers = nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)


def views(transform: Any) -> DataLoader[Any]:
    from lightly.data import LightlyDataset

    data = LightlyDataset.from_torch_dataset(Images(), transform=transform)
    return DataLoader(data, batch_size=EXAMPLES, shuffle=True, drop_last=True)


def lightly_simclr(callbacks: list[Any]) -> None:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    criterion = NTXentLoss()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        first, second = batch[0]
        return criterion(model(first), model(second))

    model = nn.Sequential(backbone(), SimCLRProjectionHead(16, 16, 8))
    module = Training(model, partial(torch.optim.SGD, lr=0.06, momentum=0.9), loss)
    trainer(callbacks).fit(module, views(SimCLRTransform(input_size=16)))


def lightly_moco(callbacks: list[Any]) -> None:
    """A teacher that follows the student inside `training_step`, and a memory bank in a buffer."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform

    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(64, 8))
    student = nn.Sequential(backbone(), MoCoProjectionHead(16, 16, 8))
    teacher = nn.Sequential(backbone(), MoCoProjectionHead(16, 16, 8))
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        query, key = batch[0]
        update_momentum(model[0], model[1], m=0.99)  # type: ignore[index]
        return criterion(model[0](query), model[1](key).detach())  # type: ignore[index]

    module = Training(nn.ModuleList([student, teacher]), partial(torch.optim.SGD, lr=0.06), loss)
    module.criterion = criterion
    trainer(callbacks).fit(module, views(MoCoV2Transform(input_size=16)))


def lightly_classifier(callbacks: list[Any]) -> None:
    from lightly.utils.benchmarking import LinearClassifier
    from pytorch_lightning import Trainer
    from torchvision.transforms import ToTensor

    module = LinearClassifier(backbone(), EXAMPLES, feature_dim=16, num_classes=4, topk=(1, 2))
    Trainer(**other_options(callbacks)).fit(module, views(ToTensor()))


# ---------------------------------------------------------------------- text


def transformers(callbacks: list[Any], optimizer: Callable[..., Any] | None = None) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
        get_linear_schedule_with_warmup,
    )

    words = ["[PAD]", "[UNK]", *(f"word{index}" for index in range(30))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words[2:], generator.integers(4, 12))) for _ in range(ROWS)]
    rows = [fast(text) | {"labels": index % 2} for index, text in enumerate(texts)]
    loader: DataLoader[Any] = DataLoader(
        rows, EXAMPLES, shuffle=True, collate_fn=DataCollatorWithPadding(fast)
    )  # type: ignore[arg-type]

    def scheduled(parameters: Any) -> Any:
        adamw = torch.optim.AdamW(parameters, lr=1e-3)
        schedule = get_linear_schedule_with_warmup(adamw, 5, STEPS)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=2, **shape))
    module = Training(model, optimizer or scheduled, lambda model, batch: model(**batch).loss)
    trainer(callbacks).fit(module, loader)


def transformers_adafactor(callbacks: list[Any]) -> None:
    from transformers.optimization import Adafactor

    options = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
    transformers(callbacks, partial(Adafactor, **options))


# ---------------------------------------------------------------------- time series


def pytorch_forecasting(callbacks: list[Any]) -> None:
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.data.examples import generate_ar_data

    table = generate_ar_data(n_series=8, timesteps=40, seed=0)
    columns = {"time_idx": "time_idx", "group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
    data = TimeSeriesDataSet(table, target="value", max_encoder_length=12, max_prediction_length=4, **columns)
    sizes = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4}
    model = TemporalFusionTransformer.from_dataset(data, learning_rate=1e-3, log_interval=-1, **sizes)
    loader = data.to_dataloader(train=True, batch_size=EXAMPLES, num_workers=0)
    trainer(callbacks, gradient_clip_val=0.1).fit(model, loader)


def darts(callbacks: list[Any]) -> None:
    from darts.models import NBEATSModel
    from darts.utils.timeseries_generation import sine_timeseries

    sizes = {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 16, "batch_size": EXAMPLES}
    model = NBEATSModel(12, 4, random_state=0, pl_trainer_kwargs=other_options(callbacks), **sizes)
    model.fit(sine_timeseries(length=400).astype(np.float32), epochs=10)


# ---------------------------------------------------------------------- tables


def scvi(callbacks: list[Any]) -> None:
    from anndata import AnnData
    from scvi import settings
    from scvi.model import SCVI

    settings.seed = 0  # of its own split into training and validation
    data = AnnData(np.random.default_rng(0).poisson(2.0, size=(ROWS, 30)).astype(np.float32))
    SCVI.setup_anndata(data)
    model = SCVI(data, n_hidden=16, n_latent=4)
    model.train(batch_size=EXAMPLES, train_size=1.0, max_epochs=-1, **other_options(callbacks))


BERT, TFT = "BertForSequenceClassification", "TemporalFusionTransformer"
LIBRARIES = {
    "chemprop": Library("chemprop", "MPNN", chemprop, lambda batch: len(batch.bmg)),
    "torch_geometric": Library("torch-geometric", "GIN, LightningDataset", torch_geometric),
    "SimCLR": Library("lightly", "SimCLR", lightly_simclr),
    "MoCo": Library("lightly", "MoCo", lightly_moco),
    "classifier": Library("lightly", "LinearClassifier", lightly_classifier),
    "transformers": Library("transformers", BERT, transformers),
    "Adafactor": Library("transformers", BERT, transformers_adafactor),
    "pytorch-forecasting": Library("pytorch-forecasting", TFT, pytorch_forecasting),
    "darts": Library("darts", "NBEATSModel", darts),
    "scvi-tools": Library("scvi-tools", "SCVI", scvi),
}

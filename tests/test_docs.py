"""What the pages say is what is committed and what runs."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from benchmarks.publish import PAGES, filled
from lightning_surge import SurgeLRCallback
from lightning_surge.clocks import ExamplesClock

ROOT = Path(__file__).parent.parent
TEXTS = ("README.md", "docs/architecture.md", "docs/batch-sizes.md", "docs/support.md", "docs/theory.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- results: " in text
    assert filled(text) == text, "run: python -m benchmarks.publish"


def test_the_first_code_of_the_readme_builds_a_trainer() -> None:
    code = blocks("README.md")[0]
    names: dict[str, object] = {}
    exec(
        code.replace("trainer.fit(model)\n", "").replace(
            "Trainer(", "Trainer(accelerator='cpu', logger=False, "
        ),
        names,
    )
    trainer = names["trainer"]
    assert isinstance(trainer, pl.Trainer)
    assert any(isinstance(callback, SurgeLRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def test_the_schedule_of_the_readme_has_the_steps_of_the_ramp() -> None:
    names: dict[str, Any] = {}
    for code in blocks("README.md")[2:4]:
        exec(code, names)
    # At least what the largest batches alone would take, at most what the smallest would.
    assert 4_000_000 // 512 < names["steps"] < 4_000_000 // 16


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_the_code_on_batch_sizes_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {"dataset": list(range(64)), "model": torch.nn.Linear(2, 1)}
    for code in blocks("docs/batch-sizes.md"):
        exec(code, names)
    # 1,600 steps from 16 up to 256 and 400 up to 512 hold 305,000 examples; the rest go at 512.
    assert 2000 < names["steps"] < 1_000_000 // 256
    assert isinstance(names["scheduler"]["scheduler"], ExamplesClock)


def test_every_code_block_compiles() -> None:
    for page in TEXTS:
        for code in blocks(page):
            compile(code, page, "exec")


def test_pages_name_files_that_exist() -> None:
    for page in TEXTS:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), link

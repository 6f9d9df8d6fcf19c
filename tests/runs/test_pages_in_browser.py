"""What a browser makes of the page, and of TensorBoard's charts. Skipped where there is no browser.

`make check-html` and `make check-tensorboard` run these. CHECK_BROWSER_PYTHON names another Python that has
one, CHECK_SCREENSHOT a file for a picture of what was seen.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_surge.callbacks.logging import tensorboard_layout
from lightning_surge.runs.pages import run_page
from tests.browser import NO_BROWSER
from tests.logged_runs import as_log, rows, write_events

PYTHON = os.environ.get("CHECK_BROWSER_PYTHON", sys.executable)
HERE = importlib.util.find_spec("PyQt6") is not None
pytestmark = pytest.mark.skipif(
    not HERE and sys.executable == PYTHON,
    reason="no browser: pip install PyQt6-WebEngine",
)


def browse(url: str, script: str, screenshot: Path) -> dict[str, Any]:
    found = subprocess.run(
        [PYTHON, str(Path(__file__).parents[1] / "browser.py"), url, script, str(screenshot)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if found.returncode == NO_BROWSER:
        pytest.skip(f"no browser: {found.stderr.strip()[-300:]}")
    assert found.returncode == 0, found.stderr
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def test_the_page_draws_every_chart_without_a_complaint(tmp_path: Path) -> None:
    table = rows()
    table[30]["surge/held_because"] = 12.0
    table[40]["surge/peak_batch_size"] = float("inf")
    page = tmp_path / "run.html"
    page.write_text(run_page(as_log(table), title="a run"), encoding="utf-8")
    script = """({
        titles: [...document.querySelectorAll('.annotation-text')].map(one => one.textContent),
        curves: [...document.querySelectorAll('.scatterlayer path.js-line')].map(one => one.getBBox().width),
        bars: document.querySelectorAll('.barlayer .point').length,
        axes: [...document.querySelectorAll('.ytitle, .y2title, .y4title')].map(one => one.textContent),
        loaded: performance.getEntriesByType('resource').length,
    })"""
    screenshot = Path(os.environ.get("CHECK_SCREENSHOT", tmp_path / "run.png"))
    found = browse(page.as_uri(), script, screenshot)
    assert found["console"] == []
    answer = found["answer"]
    assert "Learning rate" in answer["titles"]
    assert "The factor and the law" in answer["titles"]
    assert answer["axes"] == [
        "learning rate (per step)", "batch size (examples)",
        "learning rate over the one at B = 60 (factor R)",
    ]  # fmt: skip
    # Three learning rates, batch size, peak, critical, a law and sqrt scaling: all have a width on the page.
    assert sum(width > 100 for width in answer["curves"]) >= 8
    assert answer["bars"] == 3
    assert answer["loaded"] == 0
    assert screenshot.stat().st_size > 10_000


def test_tensorboard_shows_the_charts(tmp_path: Path) -> None:
    write_events(tmp_path / "run", rows())
    with SummaryWriter(str(tmp_path / "run"), filename_suffix=".layout") as writer:
        writer.add_custom_scalars(tensorboard_layout({"": [""]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port),
         "--host", "127.0.0.1", "--load_fast", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        assert any(re.search("Press CTRL", line) for line in server.stderr)
        screenshot = Path(os.environ.get("CHECK_SCREENSHOT", tmp_path / "tensorboard.png"))
        # The charts live in a frame of the page, in shadow trees.
        script = """(() => {
            const inside = (one) => one.shadowRoot || one.contentDocument;
            const text = (node) => [...node.childNodes].map((one) => one.nodeType === 3 ? one.textContent
                : text(one) + (inside(one) ? text(inside(one)) : '')).join(' ');
            return text(document);
        })()"""
        found = browse(f"http://127.0.0.1:{port}/#custom_scalars", script, screenshot)
        for title in ("learning rates", "batch size against peak", "noise", "overhead"):
            assert title in found["answer"], found["answer"][-500:]
        # Every chart has found what it draws.
        assert found["answer"].count("Matches (") == 4
        assert "Matches (0)" not in found["answer"]
    finally:
        server.terminate()
        server.communicate()

"""`lightning-surge fit` from the outside: what is printed, drawn and refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lightning_surge.cli import main
from lightning_surge.cli.fit import LAW_NAMES
from lightning_surge.laws.base import MeasuredLaw
from lightning_surge.tables.law_fits import LAWS

ROOT = Path(__file__).parents[2]
LAW = MeasuredLaw(alignment_limit=1.0, alignment_scale=200.0, noise_curvature=100.0, signal_curvature=900.0)
"""Its peak is 1/600 at B = 25, its critical batch size 20."""
LAW_OF = {"loss": "measured", "steps": "adam_eq22"}
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?")
Run = Callable[..., tuple[int, str, str]]


def sweep(path: Path, *, seeds: int = 2, lost: str = "", scale: float = 1.0) -> Path:
    """Steps to two targets, exact but for a shift that a seed's runs share."""
    lines = ["batch_size,lr,seed,target,steps"]
    for target, factor in ((2.5, 1), (1.5, 3)):
        for size in (4, 16, 64, 256, 1024):
            for step in range(-3, 4):
                for seed in range(seeds):
                    best = LAW.lr(size)
                    lr = best * 2 ** (step + 0.3)
                    shape = 1 + 0.2 * (step + 0.3) ** 2 + 0.01 * seed * scale * (-1) ** step
                    steps = factor * 1000 * (1 + 20 / size) * shape
                    lines.append(f"{size},{lr!r},{seed},{target},{steps if str(size) != lost else ''}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        try:
            status = main(["fit", *map(str, words)])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


class TestText:
    def test_optima_laws_peak_and_critical_batch_size(self, run: Run, tmp_path: Path) -> None:
        laws = ["--law", "measured", "--law", "constant"]
        status, out, err = run(sweep(tmp_path / "runs.csv"), "--bootstrap", 20, "--target", "2.5", *laws)
        assert (status, err) == (0, "")
        assert "runs.csv: 140 runs" in out
        assert "Best learning rates to the loss 2.5" in out
        (row,) = re.findall(r"^ +64 +(\S+) +(\[.*\]) +(\S+) +inside$", out, re.MULTILINE)
        assert float(row[0]) == pytest.approx(LAW.lr(64), rel=0.1)
        assert re.search(r"^\* measured +0\.\d+ +lr_limit 0\.\d+ \[", out, re.MULTILINE)
        assert re.search(r"^  constant +0\.\d+ +base_lr", out, re.MULTILINE)
        assert re.search(r"^measured: peak lr 0\.001\d+ \[.*\] at B = \d+\S* \[", out, re.MULTILINE)
        assert re.search(r"^Critical batch size by Eq. 22: \d+\S* \[.*fewest steps", out, re.MULTILINE)
        assert "Intervals (95%): 20 repetitions with the scatter of the seeds" in out
        assert "1.5" not in out.split("Laws")[0].split("batch size")[0]

    def test_every_target_has_a_part(self, run: Run, tmp_path: Path) -> None:
        status, out, _ = run(sweep(tmp_path / "runs.csv", seeds=1), "--bootstrap", 0, "--law", "adam")
        assert status == 0
        assert re.findall(r"to the loss (\S+)", out) == ["2.5", "1.5"]
        assert "none asked for" in out

    def test_an_edge_is_flagged_with_what_to_do(self, run: Run, tmp_path: Path) -> None:
        path = sweep(tmp_path / "runs.csv", seeds=1)
        # At B = 1024 only learning rates below the best one are left.
        lines = path.read_text().splitlines()
        kept = [
            line
            for line in lines
            if not (line.startswith("1024,") and float(line.split(",")[1]) > LAW.lr(1024))
        ]
        path.write_text("\n".join(kept))
        _, out, _ = run(path, "--bootstrap", 0, "--law", "adam", "--target", 2.5)
        assert re.search(r"1024 .* edge high: .*largest one tried.*: extend the grid upwards", out)

    def test_one_seed_is_said(self, run: Run, tmp_path: Path) -> None:
        _, out, _ = run(
            sweep(tmp_path / "runs.csv", seeds=1), "--bootstrap", 20, "--law", "adam", "--target", 2.5
        )
        assert "scatter of the learning rates around each law: no learning rate has two seeds" in out


class TestJSON:
    def test_the_keys_that_the_page_documents(self, run: Run, tmp_path: Path) -> None:
        _, out, _ = run(
            sweep(tmp_path / "runs.csv"), "--bootstrap", 20, "--seed", 3, "--target", 2.5, "--json"
        )
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        page = (ROOT / "docs" / "fitting.md").read_text()
        documented = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.MULTILINE))
        assert set(paths(found)) == documented

    def test_the_numbers_are_those_of_the_fit(self, run: Run, tmp_path: Path) -> None:
        laws = ["--law", "measured", "--law", "sqrt"]
        path = sweep(tmp_path / "runs.csv", scale=0.0)
        _, out, _ = run(path, "--bootstrap", 20, "--target", 2.5, "--json", *laws)
        found = json.loads(out)
        assert (found["version"], found["runs"], found["measure"], found["bootstrap"]) == (
            1,
            140,
            "steps",
            20,
        )
        (fit,) = found["fits"]
        assert (fit["target"], fit["error"], fit["best"], fit["ties"]) == (2.5, None, "measured", [])
        assert [each["batch_size"] for each in fit["optima"]] == [4, 16, 64, 256, 1024]
        for each in fit["optima"]:
            assert each["lr"] == pytest.approx(LAW.lr(each["batch_size"]), rel=0.1)
            assert each["interval"][0] <= each["lr"] <= each["interval"][1]
        assert fit["tradeoff"]["critical_batch_size"]["value"] == pytest.approx(20, rel=0.05)
        measured, sqrt = fit["laws"]
        assert measured["peak_batch_size"]["value"] == pytest.approx(25, rel=0.2)
        # No JSON has infinity: null is a peak that no batch size reaches.
        assert sqrt["peak_batch_size"] == {"value": None, "interval": [None, None]}

    def test_a_target_without_a_fit_is_an_entry(self, run: Run, tmp_path: Path) -> None:
        path = sweep(tmp_path / "runs.csv", seeds=1)
        text = re.sub(r"^((?:64|256|1024),.*,1\.5,).*$", r"\1", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
        status, out, _ = run(path, "--bootstrap", 0, "--json", "--law", "adam")
        assert status == 0
        fits = json.loads(out)["fits"]
        assert fits[0]["error"] is None
        assert fits[1]["target"] == 1.5
        assert "got 2 of 5 batch sizes" in fits[1]["error"]


def paths(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys; lists and the names of parameters are passed through."""
    if isinstance(value, list):
        return [path for each in value for path in paths(each, prefix)] or [prefix]
    if isinstance(value, dict) and set(value) == {"value", "interval"}:
        return [prefix]
    if isinstance(value, dict) and prefix.endswith(("parameters", "tradeoff")):
        return [prefix]
    if isinstance(value, dict):
        return [path for key, each in value.items() for path in paths(each, f"{prefix}.{key}".strip("."))]
    return [prefix]


class TestFigure:
    def test_png_and_svg(self, run: Run, tmp_path: Path) -> None:
        path = sweep(tmp_path / "runs.csv")
        for name in ("fit.png", "fit.svg"):
            words = ["--law", "adam", "--target", 2.5, "--bootstrap", 20]
            status, out, err = run(path, *words, "--figure", tmp_path / name)
            assert (status, err) == (0, "")
            assert "Best learning rates" in out
        png = (tmp_path / "fit.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png[-8:-4] == b"IEND"
        assert ElementTree.parse(tmp_path / "fit.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"

    @pytest.mark.parametrize(
        ("name", "message"),
        [("fit.jpg", r"endings \.png, \.svg, \.pdf, got"), ("no/fit.png", "in an existing directory, got")],
    )
    def test_what_cannot_be_drawn_is_refused_before_the_fit(
        self, run: Run, tmp_path: Path, name: str, message: str
    ) -> None:
        status, out, err = run(tmp_path / "no table.csv", "--figure", tmp_path / name)
        assert (status, out) == (2, "")
        assert re.search(message, err)


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["{runs}", "--lr-column", "eta"], "Expected a column 'eta'"),
            (["{directory}"], "Expected a file, got the directory"),
            (["{directory}/none.csv"], "Expected an existing file"),
            (["{runs}", "--target", "9"], r"Expected --target among 2\.5, 1\.5, got 9: choose"),
            (["{runs}", "--law", "cubic"], "invalid choice: 'cubic'"),
            (["{runs}", "--bootstrap", "-1"], "expected a number >= 0, got -1"),
            (["{runs}", "--bootstrap", "x"], "invalid _count value|expected a number"),
            (["{runs}", "--measure", "loss"], "Expected a column 'loss'"),
            ([], "the following arguments are required: table"),
        ],
    )
    def test_status_2_and_one_clear_message(
        self, run: Run, tmp_path: Path, words: list[str], message: str
    ) -> None:
        runs = sweep(tmp_path / "runs.csv", seeds=1)
        status, out, err = run(*[word.format(runs=runs, directory=tmp_path) for word in words])
        assert (status, out) == (2, "")
        assert re.search(message, err)
        assert "Traceback" not in err

    def test_too_little_data_says_what_is_missing(self, run: Run, tmp_path: Path) -> None:
        path = sweep(tmp_path / "runs.csv", seeds=1)
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if not line.startswith(("4,", "16,", "1024,"))))
        status, out, err = run(path)
        assert (status, out) == (2, "")
        assert err.count("Expected 3 batch sizes with an optimum inside their grid, got 2 of 2") == 2
        assert "target 2.5: " in err

    @pytest.mark.parametrize(
        "row",
        [
            "8,1,1e308",
            "8,1e-320,1",
            "1e300,1,1",
            "8,1,-1e308",
            "8,0.1,5e-324",
            "1e-29,1e29,1e29",
            "8,1,1",
            "",
        ],
    )
    @pytest.mark.parametrize("column", ["loss", "steps"])
    def test_numbers_out_of_this_world(self, run: Run, tmp_path: Path, row: str, column: str) -> None:
        path = tmp_path / "runs.csv"
        good = "".join(f"{b},{lr},{abs(lr - 2) + 1 + 9 / b}\n" for b in (2, 16, 64, 256) for lr in (1, 2, 4))
        path.write_text(f"batch_size,lr,{column}\n{good}{row}\n")
        status, out, err = run(path, "--bootstrap", 0, "--json", "--law", LAW_OF[column])
        assert status in (0, 2)
        assert bool(out) == (status == 0)
        assert err.startswith("lightning-surge: Expected") == (status == 2)

    def test_too_many_targets(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "runs.csv"
        path.write_text("batch_size,lr,steps,target\n" + "".join(f"8,1,9,{i}\n" for i in range(30)))
        status, _, err = run(path)
        assert status == 2
        assert "Expected at most 24 targets, got 30: choose some with --target" in err

    def test_targets_need_their_column(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "runs.csv"
        path.write_text("batch_size,lr,loss\n8,1,1\n")
        status, _, err = run(path, "--target", 2)
        assert status == 2
        assert "Expected a table with a column of targets" in err


def test_laws_by_name_are_those_that_can_be_fitted() -> None:
    assert tuple(LAWS) == LAW_NAMES


def test_help_is_there_without_torch_or_lightning() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['lightning-surge', 'fit', '--help']\n"
        "try:\n    runpy.run_module('lightning_surge', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'plotly', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "lightning-surge fit sweep.csv" in done.stdout


def test_the_program_fits_without_torch(tmp_path: Path) -> None:
    path = sweep(tmp_path / "runs.csv", seeds=1)
    code = (
        "import sys\nfrom lightning_surge.cli import main\n"
        f"status = main(['fit', {str(path)!r}, '--law', 'adam', '--bootstrap', '0'])\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)\nsys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Best learning rates" in done.stdout


def test_the_page_is_what_the_program_prints(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Commands of docs/fitting.md run; where the page shows their output, it is that."""
    page = (ROOT / "docs" / "fitting.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```console\n\$ lightning-surge fit (.*?)\n(.*?)```", page, re.DOTALL)
    assert blocks
    for words, shown in blocks:
        status, out, err = run(*shlex.split(words))
        assert status == 0, err
        # The last digit of a quantile may differ from one processor to the next.
        assert NUMBER.sub("#", out).split() == NUMBER.sub("#", shown).split()
        lines = [[line for line in text.splitlines() if line.strip()] for text in (out, shown)]
        for printed, told in zip(*lines, strict=True):
            numbers = [[float(each) for each in NUMBER.findall(line)] for line in (printed, told)]
            if "at the end of the range searched" in told:
                # Such parameters lie on a ridge of equal misfit, on which rounding picks a place. How well
                # the law predicts is another matter.
                numbers = [found[:1] for found in numbers]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.02), told
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, names)
    assert names["target"] == pytest.approx(2.177, abs=1e-3)
    assert 64 < names["peak"].batch_size < 256

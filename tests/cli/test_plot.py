from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from lightning_surge.cli import main
from tests.logged_runs import lawless, rows, several_optimizers, two_groups, write_csv, write_events


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_csv(tmp_path / "run", rows())
    return tmp_path / "run"


class TestFormats:
    @pytest.mark.parametrize("name", ["", "metrics.csv"])
    def test_png_beside_the_logs_unless_said_otherwise(self, run, capsys, name):
        assert main(["plot", str(run / name)]) == 0
        assert (run / "surge.png").read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out == f"{run / 'surge.png'}\n"

    def test_svg_names_units(self, run, tmp_path):
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            assert main(["plot", str(run), "--output", str(tmp_path / "a.svg"), "--x", "examples"]) == 0
        text = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
        for label in ("learning rate (per step)", "batch size (examples)", "examples trained", str(run)):
            assert label in text

    @pytest.mark.parametrize(
        "table", [lawless(num_measurements=None, peak_batch_size=None, critical_batch_size=None), rows((7,))]
    )
    def test_a_rule_that_measures_nothing_and_a_single_step_are_drawn(self, tmp_path, table):
        write_csv(tmp_path, table)
        assert main(["plot", str(tmp_path)]) == 0


class TestGroups:
    """Parameter groups, optimizers, and parameter groups of optimizers; `advise` chooses as `plot` does."""

    NESTED = several_optimizers({"opt1": ("decay", "rest")})

    @pytest.mark.parametrize(
        ("table", "group", "said"),
        [
            (two_groups(), None, "showing the parameter group body of body, head\n"),
            (two_groups(), "head", ""),
            (several_optimizers(), None, "showing the optimizer opt0 of opt0, opt1\n"),
            (several_optimizers(), "opt1", ""),
            (NESTED, "opt1", "showing the parameter group opt1/decay of opt1/decay, opt1/rest\n"),
            (NESTED, "opt1/rest", ""),
        ],
    )
    def test_the_first_is_shown_and_said_unless_one_is_chosen(self, tmp_path, capsys, table, group, said):
        write_csv(tmp_path, table)
        for command in ("plot", "advise"):
            assert main([command, str(tmp_path), *(["--group", group] if group else [])]) == 0
            assert capsys.readouterr().err == (f"lightning-surge: {said}" if said else "")

    def test_advice_is_of_the_one_chosen(self, tmp_path, capsys):
        write_events(tmp_path, several_optimizers())
        for name, size in (("opt0", 60.0), ("opt1", 120.0)):
            assert main(["advise", str(tmp_path), "--group", name, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["state"]["batch_size"] == size

    @pytest.mark.parametrize(
        ("table", "rule"),
        [
            (two_groups(), "one of body, head"),
            (rows(), "no --group"),
            (NESTED, "one of opt0, opt1, opt1/decay, opt1/rest"),
        ],
    )
    def test_one_that_is_not_there_is_refused(self, tmp_path, capsys, table, rule):
        write_csv(tmp_path, table)
        for command, wrong in (("plot", "tail"), ("advise", "opt")):
            assert main([command, str(tmp_path), "--group", wrong]) == 2
            assert f"Expected {rule}, got --group {wrong}" in capsys.readouterr().err


class TestRefusing:
    @pytest.mark.parametrize(
        ("changes", "words", "message"),
        [
            (
                {},
                ["--output", "a.html"],
                "end in .png or .svg, got --output a.html: rename it, or use T",
            ),
            ({}, ["--output", "no/a.png"], "make its directory first"),
            ({"examples": None}, ["--x", "examples"], "'surge/examples'"),
            ({"base_batch_size": None}, [], "base_batch_size=nan"),
        ],
    )
    def test_what_cannot_be_drawn(self, tmp_path, monkeypatch, capsys, changes, words, message):
        monkeypatch.chdir(tmp_path)
        write_csv(tmp_path, rows(**changes))
        assert main(["plot", ".", *words]) == 2
        out, error = capsys.readouterr()
        assert (out, error.startswith("lightning-surge: Expected")) == ("", True)
        assert message in error

"""`lightning-surge plot` and `lightning-surge advise` from the outside."""

import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from lightning_surge.cli import main
from lightning_surge.runs.advice import Caveat, advise
from lightning_surge.runs.report import caveat_text
from tests.logged_runs import LAW, lawless, rows, several_optimizers, two_groups, write_csv, write_events
from tests.runs.test_advice import STATE


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


def test_the_table_of_the_advice(run, capsys):
    assert main(["advise", str(run)]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    lr = 1e-3 * LAW.lr(120) / LAW.lr(60)
    # What comes before is on docs/reading-a-run.md, word for word.
    assert [" ".join(line.split()) for line in out.splitlines()][7:] == [
        "batch size learning rate steps examples",
        "60 0.001 1 1 now, suggested",
        f"120 {lr:.3g} (0.000921 to 0.00113) 0.75 (0.731 to 0.773) 1.5 (1.46 to 1.55)",
        "Steps and examples to the same loss, over those at the present size, if the critical size stayed.",
        "In brackets one standard error to both sides.",
    ]


def test_what_was_asked_for_is_in_the_table(run, capsys):
    assert main(["advise", str(run), "--batch-size", "15", "1000"]) == 0
    out = capsys.readouterr().out
    sizes = [line.split()[0] for line in out.splitlines() if line.startswith("  ")][1:5]
    assert sizes == ["15", "60", "120", "1,000"]
    assert "only sizes from 30 to 120 examples were measured" in out


def test_the_advice_as_json(run, capsys):
    assert main(["advise", str(run), "--json", "--batch-size", "240"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["critical_batch_size"] == {"value": 60.0, "low": 50.0, "high": 70.0}
    assert answer["suggested"] == 60.0
    assert answer["state"]["law"] == {
        "alignment_limit": 2.0, "alignment_scale": 300.0, "noise_curvature": 1.0, "signal_curvature": 1.0,
        "kind": "MeasuredLaw",
    }  # fmt: skip
    assert answer["state"]["reason"] == "measured"
    assert [option["batch_size"] for option in answer["options"]] == [60.0, 120.0, 240.0]
    assert answer["options"][1]["steps"]["value"] == 0.75
    assert answer["caveats"] == {}


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path, capsys):
    """r = 1 / 4: there is no peak."""
    write_csv(tmp_path, rows(**{"law/signal_curvature": 1 / 16, "critical_batch_size_standard_error": None}))

    def refuse(constant):
        raise AssertionError(constant)

    assert main(["advise", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert answer["peak_batch_size"] == {"value": None, "low": 0.0, "high": None}
    assert list(answer["caveats"]) == ["uncertain", "approach"]
    assert main(["advise", str(tmp_path)]) == 0
    assert "none: the learning rate never falls with the batch size" in capsys.readouterr().out


def test_a_hold_and_an_ended_schedule_are_told(tmp_path, capsys):
    table = rows()
    table[50] |= {"surge/held_because": 12.0, "surge/lr_scheduled": 1e-6}
    write_csv(tmp_path, table)
    assert main(["advise", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "the last law is held: measuring failed" in out
    assert "the schedule is at 0.1% of its largest learning rate" in out
    assert main(["advise", str(tmp_path), "--step", "40"]) == 0
    assert "Do not trust" not in capsys.readouterr().out


@pytest.mark.parametrize("caveat", Caveat)
def test_every_caveat_has_words(caveat):
    assert len(caveat_text(caveat, advise(STATE))) > 20


ENDING = "end in .png, .svg, .pdf and be in an existing directory, got 'a.html': rename it"
LOGGED = ("objective", "held_because", "base_batch_size", "lr_scale_predicted", "lr_scheduled")


@pytest.mark.parametrize(
    ("command", "changes", "words", "message"),
    [
        ("plot", {}, ["--output", "a.html"], ENDING),
        ("plot", {}, ["--output", "no/a.png"], "got 'no/a.png': rename it, or make the directory"),
        ("plot", {"examples": None}, ["--x", "examples"], "'surge/examples'"),
        ("plot", {"base_batch_size": None}, [], "base_batch_size=nan"),
        ("advise", {}, ["--step", "3"], "Expected 10 <= step <= 50, got step=3"),
        ("advise", {}, ["--batch-size", "0"], "got batch_size=0.0: count the examples"),
        # As of another version.
        *(("advise", {name: None}, [], f"'surge/{name}'") for name in LOGGED),
    ],
)
def test_what_cannot_be_answered_is_refused(tmp_path, monkeypatch, capsys, command, changes, words, message):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path, rows(**changes))
    assert main([command, ".", *words]) == 2
    out, error = capsys.readouterr()
    assert (out, error.startswith("lightning-surge: Expected")) == ("", True)
    assert message in error

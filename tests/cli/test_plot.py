from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lightning_surge.cli import main
from tests.logged_runs import rows, several_optimizers, write_csv, write_events


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_csv(tmp_path / "run", rows())
    return tmp_path / "run"


def two_groups() -> dict[int, dict[str, float]]:
    table = rows()
    for row in table.values():
        for name in ("lr_scheduled", "lr_used", "lr_predicted"):
            value = row.pop(f"surge/{name}")
            row |= {f"surge/{name}/body": value, f"surge/{name}/head": 2 * value}
    return table


class TestFormats:
    def test_png_beside_the_logs_unless_said_otherwise(self, run, capsys):
        assert main(["plot", str(run)]) == 0
        assert (run / "surge.png").read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out == f"{run / 'surge.png'}\n"

    def test_a_picture_of_a_file_goes_beside_the_file(self, run):
        assert main(["plot", str(run / "metrics.csv")]) == 0
        assert (run / "surge.png").exists()

    def test_svg_names_units(self, run, tmp_path):
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none"}):
            assert main(["plot", str(run), "--output", str(tmp_path / "a.svg"), "--x", "examples"]) == 0
        text = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
        for label in ("learning rate (per step)", "batch size (examples)", "examples trained", str(run)):
            assert label in text

    def test_html_needs_nothing_but_itself(self, run, tmp_path):
        """Elements as a parser sees them: plotly's own code is full of strings that look like some."""
        tags = []

        class Elements(HTMLParser):
            def handle_starttag(self, tag, attributes):
                tags.append((tag, dict(attributes)))

        assert main(["plot", str(run), "--output", str(tmp_path / "a.html"), "--title", "Mine"]) == 0
        page = (tmp_path / "a.html").read_text()
        Elements().feed(page)
        assert {tag for tag, _ in tags} == {"html", "head", "meta", "body", "div", "script", "style"}
        assert not any({"src", "href"} & attributes.keys() for _, attributes in tags)
        assert "Mine" in page

    def test_html_holds_the_numbers_that_were_logged(self, run, tmp_path):
        main(["plot", str(run), "--output", str(tmp_path / "a.html"), "--x", "examples"])
        page = (tmp_path / "a.html").read_text()
        start = page.rindex("Plotly.newPlot(")
        traces, end = json.JSONDecoder().raw_decode(page, page.index("[", start))
        layout, _ = json.JSONDecoder().raw_decode(page, page.index("{", end))
        names = [trace["name"] for trace in traces if "name" in trace]
        for name in ("scheduled", "used", "predicted by the law", "peak batch size", "batch size in force"):
            assert name in names
        assert "critical ± 1 standard error" in names
        assert "step 10: peak at B = 100" in names
        found = [axis for key, axis in layout.items() if re.match("[xy]axis", key)]
        axes = [axis["title"]["text"] for axis in found if "title" in axis]
        assert axes.count("examples trained") == 3
        assert {"learning rate (per step)", "batch size (examples)", "batch size B (examples)"} <= set(axes)

    @pytest.mark.parametrize("ending", [".png", ".html"])
    def test_both_draw_a_rule_that_measures_nothing(self, tmp_path, ending):
        names = ("lr_scheduled", "lr_used", "lr_predicted", "batch_size", "base_batch_size", "held_because")
        table = {
            step: {f"surge/{name}": row[f"surge/{name}"] for name in names} for step, row in rows().items()
        }
        write_csv(tmp_path, table)
        assert main(["plot", str(tmp_path), "--output", str(tmp_path / f"a{ending}")]) == 0


class TestGroups:
    def test_the_first_is_shown_and_said(self, tmp_path, capsys):
        write_csv(tmp_path, two_groups())
        assert main(["plot", str(tmp_path)]) == 0
        assert "showing the parameter group body of body, head" in capsys.readouterr().err

    def test_another_can_be_chosen(self, tmp_path, capsys):
        write_csv(tmp_path, two_groups())
        assert main(["plot", str(tmp_path), "--group", "head"]) == 0
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(("table", "has"), [(two_groups(), "one of body, head"), (rows(), "no --group")])
    def test_one_that_is_not_there_is_refused(self, tmp_path, capsys, table, has):
        write_csv(tmp_path, table)
        assert main(["plot", str(tmp_path), "--group", "tail"]) == 2
        assert f"Expected {has}" in capsys.readouterr().err


class TestSeveralOptimizers:
    @pytest.mark.parametrize("ending", [".png", ".svg", ".html"])
    def test_the_first_is_shown_and_said(self, tmp_path, capsys, ending):
        write_csv(tmp_path, several_optimizers())
        assert main(["plot", str(tmp_path), "--output", str(tmp_path / f"a{ending}")]) == 0
        assert "showing the optimizer opt0 of opt0, opt1\n" in capsys.readouterr().err

    @pytest.mark.parametrize("write", [write_csv, write_events])
    @pytest.mark.parametrize("command", ["plot", "advise"])
    def test_either_can_be_chosen(self, tmp_path, capsys, write, command):
        write(tmp_path, several_optimizers())
        for name in ("opt0", "opt1"):
            assert main([command, str(tmp_path), "--group", name]) == 0
            assert capsys.readouterr().err == ""

    def test_advice_is_of_the_one_chosen(self, tmp_path, capsys):
        write_csv(tmp_path, several_optimizers())
        for name, size in (("opt0", 60.0), ("opt1", 120.0)):
            assert main(["advise", str(tmp_path), "--group", name, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["state"]["batch_size"] == size

    @pytest.mark.parametrize("command", ["plot", "advise"])
    def test_groups_of_an_optimizer(self, tmp_path, capsys, command):
        write_csv(tmp_path, several_optimizers({"opt1": ("decay", "rest")}))
        assert main([command, str(tmp_path), "--group", "opt1"]) == 0
        said = "showing the parameter group opt1/decay of opt1/decay, opt1/rest\n"
        assert said in capsys.readouterr().err
        assert main([command, str(tmp_path), "--group", "opt1/rest"]) == 0
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("command", ["plot", "advise"])
    def test_the_names_are_offered(self, tmp_path, capsys, command):
        write_csv(tmp_path, several_optimizers({"opt1": ("decay", "rest")}))
        for wrong in ("opt2", "opt", "decay"):
            assert main([command, str(tmp_path), "--group", wrong]) == 2
            error = capsys.readouterr().err
            assert f"Expected one of opt0, opt1, opt1/decay, opt1/rest, got --group {wrong}" in error


class TestRefusing:
    def refused(self, capsys, *arguments):
        assert main(["plot", *map(str, arguments)]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith("lightning-surge: Expected") or "pip install" in error
        return error

    def test_a_run_that_is_not_there(self, tmp_path, capsys):
        assert "does not exist" in self.refused(capsys, tmp_path / "nowhere")

    def test_a_run_that_logged_nothing_of_ours(self, tmp_path, capsys):
        write_events(tmp_path, {1: {"train_loss": 1.0}})
        assert "no key that begins with 'surge/'" in self.refused(capsys, tmp_path)

    def test_an_ending_that_says_no_format(self, run, capsys):
        assert "end in .png, .svg, .html, got --output a.pdf" in self.refused(
            capsys, run, "--output", "a.pdf"
        )

    def test_a_place_that_is_not_there(self, run, capsys):
        error = self.refused(capsys, run, "--output", run / "no" / "a.png")
        assert "make its directory first" in error

    def test_examples_that_were_not_logged(self, tmp_path, capsys):
        write_csv(tmp_path, rows(examples=None))
        assert "'surge/examples'" in self.refused(capsys, tmp_path, "--x", "examples")

    def test_logs_without_a_base(self, tmp_path, capsys):
        write_csv(tmp_path, rows(base_batch_size=None))
        assert "base_batch_size=nan" in self.refused(capsys, tmp_path)

    @pytest.mark.parametrize(
        ("ending", "module", "extra"),
        [("png", "matplotlib.figure", "plot"), ("html", "plotly.subplots", "html")],
    )
    def test_without_the_extra(self, run, capsys, monkeypatch, ending, module, extra):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"lightning-surge[{extra}]" in self.refused(capsys, run, "--output", run / f"a.{ending}")

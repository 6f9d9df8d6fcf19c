"""What every command owes a shell."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_surge.cli import COMMANDS, main
from tests.logged_runs import rows, write_csv

pytestmark = pytest.mark.slow  # every command is a process


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_csv(tmp_path / "rün", rows())
    return tmp_path / "rün"


def shell(words, **environment):
    found = subprocess.run(
        [sys.executable, "-m", "lightning_surge", *map(str, words)],
        capture_output=True, text=True, env=os.environ | environment, timeout=120,
    )  # fmt: skip
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("words", "message", "help_of"),
    [
        ([], "the following arguments are required: COMMAND", ""),
        (["plt"], "argument COMMAND: invalid choice: 'plt'", ""),
        (["plot"], "the following arguments are required: RUN", " plot"),
        (["plot", "x", "--x", "weeks"], "argument --x: invalid choice: 'weeks'", " plot"),
        (["plot", "x", "--colour", "red"], "unrecognized arguments: --colour red", " plot"),
        (["advise", "x", "--step", "1e3"], "argument --step: invalid int value: '1e3'", " advise"),
    ],
)
def test_usage_errors_are_one_line_and_a_hint(capsys, words, message, help_of):
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"lightning-surge: {message}")
    assert error.endswith(f"; see lightning-surge{help_of} --help\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_option_can_be_abbreviated(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command.name, "--help"])
    assert stop.value.code == 0
    assert "usage: lightning-surge" in capsys.readouterr().out
    # Whatever else is missing is complained of first, so that all that can be read is --help.
    assert main([command.name, "--hel"]) == 2


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-surge {version('lightning-surge')}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["advise", "RUN"]])
def test_a_full_disk_is_one_line(run, words, unbuffered):
    words = [str(run) if word == "RUN" else word for word in words]
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "lightning_surge", *words], stdout=full, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, timeout=120,
        )  # fmt: skip
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "and an output that can be written, got [Errno 28]" in line


def test_an_error_that_nobody_foresaw_says_where(run, monkeypatch, capsys):
    monkeypatch.setattr("lightning_surge.cli.runs.advise", lambda *_: int("x"))
    assert main(["advise", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-surge: ValueError in {__file__}, line ")
    assert line.endswith(": invalid literal for int() with base 10: 'x'")


def test_an_encoding_that_cannot_is_one_line(run):
    code, out, error = shell(["plot", run], PYTHONIOENCODING="ascii")
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith(
        r"lightning-surge: Expected an output that can hold '\xfc', got one in ascii: set PYTHON"
    )
    assert shell(["plot", run], PYTHONIOENCODING="utf-8:surrogateescape")[0] == 0


def test_a_reader_that_has_seen_enough_is_no_error(run):
    words = f"'{sys.executable}' -m lightning_surge advise '{run}' --json | true; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_shell_completes_options(tmp_path):
    pytest.importorskip("argcomplete")
    line = "lightning-surge plot --o"
    (written := tmp_path / "completions").touch()
    code, _, _ = shell(
        [], _ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n", COMP_LINE=line, COMP_POINT=str(len(line)),
        _ARGCOMPLETE_STDOUT_FILENAME=str(written),
    )  # fmt: skip
    assert (code, written.read_text().split()) == (0, ["--output"])

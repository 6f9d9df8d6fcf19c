"""docs/reading-a-run.md: its commands and its code run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_surge.cli import main
from tests.logged_runs import rows, write_csv

PAGE = (Path(__file__).parents[2] / "docs" / "reading-a-run.md").read_text()


@pytest.fixture(autouse=True)
def _a_run_in_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "lightning_logs" / "version_0", rows())
    monkeypatch.chdir(tmp_path)


def test_commands_run_and_print_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    sessions = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))
    commands = re.findall(r"^\$ lightning-surge (.*)\n((?:(?!\$).*\n)*)", sessions, re.MULTILINE)
    assert len(commands) == 6
    for command, printed in commands:
        assert main(shlex.split(command)) == 0
        out = capsys.readouterr().out
        assert out == printed or not printed, command
        for place in re.findall(r"--output (\S+)", command):
            assert Path(place).stat().st_size > 10_000


def test_the_answer_on_the_page_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"^    At step .*?\n\n(?:    .*\n)+", PAGE, re.MULTILINE)
    assert main(["advise", "lightning_logs"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(re.sub("^    ", "", shown, flags=re.MULTILINE))

"""`lightning-surge fit` from the outside: what is printed, drawn and refused."""

import csv
import gzip
import json
import random
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
from lightning_surge.laws.base import MeasuredLaw

ROOT = Path(__file__).parents[2]
LAW = MeasuredLaw(alignment_limit=1.0, alignment_scale=200.0, noise_curvature=100.0, signal_curvature=900.0)
"""Its peak is 1/600 at B = 25, its critical batch size 20."""
LAW_OF = {"loss": "measured", "steps": "adam_eq22"}
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
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


def models(path: Path) -> Path:
    """The shape of a public table: seventeen sizes of model, each with its own best learning rates."""
    lines = ["h,numl,lr,bs,ti,loss,smooth loss,exp_name,N"]
    for size in range(17):
        for batch in (32, 128, 512):
            for step in range(-2, 3):
                lr = 2.0 ** (step - size / 4) * (batch / 32) ** 0.5 / 100
                loss, steps = 3 - size / 10 + 0.1 * step**2, 10_000 * (size + 1) // batch
                name = f"h{size}_lr{lr}_bs{batch}"
                lines.append(
                    f"{256 + size},{size % 5},{lr},{batch},{steps},{loss},{loss + 0.01},{name},{10**8 + size}"
                )
    path.write_text("\n".join(lines))
    return path


class TestText:
    def test_the_answer_is_five_lines_above_its_tables(self, run: Run, tmp_path: Path) -> None:
        words = ["--bootstrap=20", "--target=2.5", "--law=measured", "--law=constant", "--at=4K", "--at=8"]
        status, out, err = run(sweep(tmp_path / "runs.csv"), *words)
        assert (status, err) == (0, "")
        head, _, *answer, _, title = out.splitlines()[:9]
        assert head == f"{tmp_path}/runs.csv: 140 runs"
        patterns = (
            r"Best law: measured \(measured-law form\), within a factor of 1\.0\d on average at .*\.",
            r"No other law comes within its error\.",
            r"Peak: lr 0\.001\d+ \[.*\] at B = \d+\S* \[.*\]; critical batch size \d+.*\.",
            r"Learning rate at B = 4,000: 0\.001\d+ \[.*\], outside the 4 to 1,024 tried; at B = 8: 0.*\.",
            r"Next: use it.*\.",
        )
        for line, pattern in zip(answer, patterns, strict=True):
            assert re.fullmatch(pattern, line), line
        assert title == "Best learning rates to the loss 2.5"
        (row,) = re.findall(r"^ +64 +(\S+) +(\[.*\]) +(\S+) +inside$", out, re.MULTILINE)
        assert float(row[0]) == pytest.approx(LAW.lr(64), rel=0.1)
        assert re.search(r"^\* measured +0\.\d+ +lr_limit 0\.\d+ \[", out, re.MULTILINE)
        assert re.search(r"^  constant +0\.\d+ +base_lr", out, re.MULTILINE)
        assert re.search(r"^Eq. 22: critical batch size \d+\S* \[.*fewest steps", out, re.MULTILINE)
        assert "Intervals (95%): 20 repetitions with the scatter of the seeds" in out

    def test_an_edge_and_a_lone_seed_are_flagged_with_what_to_do(self, run: Run, tmp_path: Path) -> None:
        path = sweep(tmp_path / "runs.csv", seeds=1)
        # At B = 1,024 only learning rates below the best one are left.
        rows = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text("\n".join(",".join(r) for r in rows if r[0] != "1024" or float(r[1]) < LAW.lr(1024)))
        _, out, _ = run(path, "--bootstrap", 20, "--law", "adam", "--law", "sgd", "--target", 2.5)
        assert re.search(r"1,024 .* edge high: .*largest one tried.*: add larger ones", out)
        assert re.search(r"^Next: at B = 1,024 the best learning rate is the largest", out, re.MULTILINE)
        assert "scatter of the learning rates around each law: no learning rate has two seeds" in out

    def test_sizes_of_model_in_one_table(self, run: Run, tmp_path: Path) -> None:
        path = models(tmp_path / "runs.csv")
        status, out, err = run(path, "--bootstrap", 0, "--law", "sqrt")
        assert (status, out) == (2, "")
        assert "averaged as if they were seeds: pass --by h for a fit of each" in err
        assert re.search(r"runs that differ in 'h', 'numl', 'ti', 'N' are", err)
        status, out, _ = run(path, "--bootstrap", 0, "--law", "sqrt", "--by", "N", "--at", 128)
        rows = re.findall(r"^(\d+) +15 +3 of 3 +sqrt +0\.000 +(\S+) +base_lr (\S+)$", out, re.MULTILINE)
        assert [int(size) for size, *_ in rows] == [10**8 + size for size in range(17)]
        for size, (_, at, base) in enumerate(rows):
            assert float(base) == pytest.approx(2 ** (-size / 4) / 100, rel=0.01)
            assert float(at) == pytest.approx(2 * float(base), rel=0.01)
        assert "Next: --where N=VALUE says more of one of them." in out
        _, out, _ = run(path, "--bootstrap", 0, "--law", "sqrt", "--where", f"N={10**8 + 2}")
        assert "base_lr 0.00707" in out
        assert "Note: columns: batch_size from 'bs'" in out

    def test_targets_and_one_without_a_fit_are_rows(self, run: Run, tmp_path: Path) -> None:
        path = sweep(tmp_path / "runs.csv", seeds=1)
        text = re.sub(r"^((?:64|256|1024),.*,1\.5,).*$", r"\1", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
        status, out, _ = run(path, "--bootstrap", 0, "--law", "adam")
        assert status == 0
        assert re.search(r"^ +2\.5 +35 +5 of 5 +adam", out, re.MULTILINE)
        assert re.search(r"^ +1\.5 .* none .*got 2 of 5$", out, re.MULTILINE)
        fits = json.loads(run(path, "--bootstrap", 0, "--json", "--law", "adam")[1])["fits"]
        assert [fit["error"] is None for fit in fits] == [True, False]

    @pytest.mark.parametrize("option", [[], ["--maximize"]])
    def test_larger_is_better(self, run: Run, tmp_path: Path, option: list[str]) -> None:
        path = tmp_path / "runs.csv"
        rows = (
            (b, 1e-3 * (b / 16) ** 0.5 * 2.0**k, 0.9 - 0.02 * k * k)
            for b in (16, 64, 256)
            for k in range(-3, 4)
        )
        path.write_text("bs,lr,loss\n" + "".join(f"{b},{lr},{accuracy}\n" for b, lr, accuracy in rows))
        status, out, err = run(path, "--bootstrap", 0, "--law", "sqrt", *option)
        if option:
            assert status == 0
            assert re.search(r"^ +256 +0\.004 +- +0\.9 +inside$", out, re.MULTILINE)
        else:
            assert status == 2
            assert "Every optimum is at an end: pass --maximize if larger values are better" in err


class TestJSON:
    def test_the_keys_that_the_page_documents(self, run: Run, tmp_path: Path) -> None:
        _, out, _ = run(
            sweep(tmp_path / "runs.csv"), "--bootstrap", 20, "--seed", 3, "--target", 2.5, "--json", "--at", 8
        )
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        page = (ROOT / "docs" / "fitting.md").read_text()
        rows = re.findall(r"^\| (the document|`fits[a-z_.]*`) \| (.*?) \|", page, re.MULTILINE)
        documented = {
            f"{place[1:-1]}.{key}" if place.startswith("`") else key
            for place, keys in rows
            for key in re.findall(r"`(\w+)`", keys)
        }
        assert set(paths(found)) == documented


def paths(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys; lists and the names of parameters are passed through."""
    if isinstance(value, list):
        return [path for each in value for path in paths(each, prefix)] or [prefix]
    if isinstance(value, dict) and set(value) == {"value", "interval"}:
        return [prefix]
    if isinstance(value, dict) and prefix.endswith(("parameters", "tradeoff", "group")):
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
            assert "Best law: adam" in out
        png = (tmp_path / "fit.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png[-8:-4] == b"IEND"
        assert ElementTree.parse(tmp_path / "fit.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"

    @pytest.mark.parametrize(
        ("name", "message"),
        [("fit.jpg", r"to end in \.png, \.svg, \.pdf"), ("no/fit.png", "in an existing directory, got")],
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
            (["{runs}", "--lr-column", "eta"], "Expected --lr-column to name one column of .*, got 'eta'"),
            (["{runs}", "--where", "lr"], "expected COLUMN=VALUE, got 'lr'"),
            (["{runs}", "--at", "0"], "expected a batch size >= 1, got '0'"),
            (["{runs}", "--at", "0.5"], "expected a batch size >= 1, got '0.5'"),
            (["{directory}"], "Expected a file, got the directory"),
            (["{directory}/none.csv"], "Expected an existing file"),
            (["{runs}", "--target", "9"], r"Expected --target among 2\.5, 1\.5, got 9: choose"),
            (["{runs}", "--law", "cubic"], "invalid choice: 'cubic'"),
            (
                ["{runs}", "--bootstrap", "-1"],
                "target 2.5: Expected a whole number bootstrap >= 0, got bootstrap=-1",
            ),
            (["{runs}", "--measure", "loss"], "loss has no column"),
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

    @pytest.mark.parametrize(
        ("columns", "rows", "words", "message"),
        [
            (
                "loss",
                [f"{b},{lr},{abs(lr - 2) + 1}" for b in (2, 16, 64) for lr in (1, 2, 4)],
                ["--bootstrap=0", "--law=adam_eq22", "--json"],
                "that can be fitted to 3 batch sizes, got laws=adam_eq22: name others",
            ),
            (
                "steps,target",
                [f"8,1,9,{i}" for i in range(70)],
                [],
                "Expected at most 64 fits, got 70: choose with --target",
            ),
            ("loss", ["8,1,1"], ["--target=2"], "Expected a table with a column of targets"),
        ],
    )
    def test_what_the_table_cannot_tell_is_named(
        self, run: Run, tmp_path: Path, columns: str, rows: list[str], words: list[str], message: str
    ) -> None:
        (tmp_path / "runs.csv").write_text("\n".join([f"batch_size,lr,{columns}", *rows]))
        status, out, err = run(tmp_path / "runs.csv", *words)
        assert (status, out) == (2, "")
        assert message in err

    @pytest.mark.parametrize(
        "row",
        ["8,1,1e308", "8,1e-320,1", "1e300,1,1", "8,1,-1e308", "8,0.1,5e-324", "1e-29,1e29,1e29", "8,1,1"],
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

    @pytest.mark.slow
    def test_damage_gets_a_message_and_never_a_traceback(self, run: Run, tmp_path: Path) -> None:
        """Five hundred tables, each cut, spliced or overwritten at a few places."""
        chance = random.Random(0)
        text = sweep(tmp_path / "good.csv", seeds=1).read_text()
        rows = list(csv.DictReader(text.splitlines()))
        forms = [text, json.dumps(rows), "\n".join(map(json.dumps, rows)), text.translate({44: ";", 46: ","})]
        originals = [form.encode() for form in forms] + [gzip.compress(text.encode()), text.encode("utf-16")]
        words = [
            ",", ";", "#", "{", "[]", "0", "-1", '"', "±", "NaN", "None", "inf", "true", "1e999", "16K",
            "1,024", "loss", "batch_size",
        ]  # fmt: skip
        words += ["\n", "\n\n", "\t", "\x00"]
        words += ["9" * 400, "\udcff"]
        outcomes = []
        for index in range(500):
            data = bytearray(originals[index % len(originals)])
            for _ in range(chance.randint(1, 2)):
                place = chance.randrange(min(len(data), chance.choice((60, *[len(data)] * 5))))
                length = chance.choice((0, 1, 1, 1, 5, len(data) // 3))
                data[place : place + length] = chance.choice(words).encode(errors="surrogateescape")
            (tmp_path / "bad").write_bytes(data)
            status, out, err = run(tmp_path / "bad", "--bootstrap", 0, "--law", "constant", "--json")
            outcomes.append(status)
            assert status in (0, 2)
            assert bool(out) == (status == 0)
            assert status == 0 or re.match(
                r"lightning-surge: (target \S+: )?Expected .*[.]$", err.strip(), re.DOTALL
            )
        assert 20 < outcomes.count(0) < 480


def test_help_and_a_fit_are_there_without_torch_or_lightning(tmp_path: Path) -> None:
    path = sweep(tmp_path / "runs.csv", seeds=1)
    code = (
        "import runpy, sys\nfrom lightning_surge.cli import main\n"
        "sys.argv = ['lightning-surge', 'fit', '--help']\n"
        "try:\n    runpy.run_module('lightning_surge', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"status = main(['fit', {str(path)!r}, '--law', 'adam', '--bootstrap', '0'])\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)\nsys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "lightning-surge fit sweep.csv" in done.stdout
    assert "best law" in done.stdout


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
            numbers = [
                [float(each.replace(",", "")) for each in NUMBER.findall(line)] for line in (printed, told)
            ]
            if "at the end of the range searched" in told:
                # Such parameters lie on a ridge of equal misfit, on which rounding picks a place. How well
                # the law predicts is another matter.
                numbers = [found[:1] for found in numbers]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.02), told

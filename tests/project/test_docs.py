"""What the pages say is what is committed and what runs."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_surge
from benchmarks.publish import PAGES, filled, named
from lightning_surge import SurgeLRCallback
from lightning_surge.cli import COMMANDS, main
from lightning_surge.policy.reasons import Reason
from lightning_surge.schedules.by_examples import ExamplesClock
from tests.code_blocks import blocks, run
from tests.logged_runs import rows, write_csv
from tests.trainings import Regression, make_trainer, regression_data

ROOT = Path(__file__).parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
TEXTS = ["README.md", "CONTRIBUTING.md", "examples/README.md", *DOCS]
PACKAGE = Path(lightning_surge.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

# What a page takes for granted, in the page's own words: everything else its code has to make itself.
PRELUDES = {
    "docs/batch-sizes.md": "import torch; dataset = list(range(64)); model = torch.nn.Linear(2, 1)",
    # In the root of the repository.
    "docs/fitting.md": f"from os import symlink; symlink({str(ROOT / 'examples')!r}, 'examples')",
    # After a run, and with its logger.
    "docs/reading-a-run.md": """
from pathlib import Path
from unittest.mock import Mock
from tests.logged_runs import rows, write_csv

write_csv(Path("lightning_logs/version_0"), rows())
logger = Mock()
""",
}


@pytest.fixture
def names_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_rng_and_threads_afterwards: None
) -> Any:
    """Runs the blocks of a page in one namespace and an empty directory; returns what is in it then."""
    monkeypatch.chdir(tmp_path)

    def run_page(page: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": Path(page).stem}
        exec(PRELUDES.get(page, ""), names)
        for block in blocks(page):
            printed = run(block.code, names, page)
            if block.output is not None:
                assert shape(printed) == shape(block.output)
        return names

    return run_page


def shape(output: str) -> list[str]:
    """The different lines of an output, without their numbers, which depend on the machine."""
    return list(dict.fromkeys(re.sub(r" *[-+]?\d[\d.]*", " #", line) for line in output.splitlines()))


# ---------------------------------------------------------------------- code


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page)])
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, names_after: Any) -> None:
    names = names_after(page)
    check = globals().get(f"check_{Path(page).stem.replace('-', '_')}")
    if check is not None:
        check(names)


def check_tutorial(names: dict[str, Any]) -> None:
    """What the text says about its numbers."""
    # Measured scaling repairs most of what the larger batch has lost.
    losses = {name: float(names[name].callback_metrics["val_loss"]) for name in ("before", "after")}
    assert losses["after"] < 0.8 * losses["before"]
    assert names["trainer"].global_step < names["EPOCHS"] * 1536 // 16


def check_batch_sizes(names: dict[str, Any]) -> None:
    # 1,600 steps from 16 up to 256 and 400 up to 512 hold 305,000 examples; the rest go at 512.
    assert 2000 < names["steps"] < 1_000_000 // 256
    assert isinstance(names["scheduler"]["scheduler"], ExamplesClock)


def check_tokens(names: dict[str, Any]) -> None:
    # All lines once; their last byte has no target.
    assert names["ramp"].examples == sum(len(line) - 1 for line in names["lines"])
    assert names["surge"].history.num_measurements > 0


def check_own_loss(names: dict[str, Any]) -> None:
    # Every step has left one entry, and no measurement has.
    assert len(names["SEEN"]) == len(names["data"].train) // 32
    assert names["surge"].history.num_measurements > 0


def check_resuming(names: dict[str, Any]) -> None:
    assert torch.equal(names["uninterrupted"], names["resumed"])


def check_gan(names: dict[str, Any]) -> None:
    # Both were measured, each on its own.
    assert names["generator"].history.num_measurements > 0
    assert names["discriminator"].history.num_measurements > 0
    assert names["generator"].history is not names["discriminator"].history


def check_fitting(names: dict[str, Any]) -> None:
    # The row of adam in the output above, and its peak.
    assert f"{names['target']:.4f}" == "2.1772"
    assert f"{names['peak'].lr:.4f} {names['peak'].batch_size:.1f}" == "0.0137 91.1"


def check_reading_a_run(names: dict[str, Any]) -> None:
    assert Path("run.png").stat().st_size > 0
    assert set(names["layout"]) == {"mine", "surge"}


def check_data_parallel(names: dict[str, Any]) -> None:
    trainer = names["make_trainer"](num_ranks=3)
    assert trainer.num_devices == 3
    assert trainer.world_size == 3


class WithData(Regression):
    """A module that brings its data, as the README's."""

    def train_dataloader(self) -> Any:
        return regression_data(2048, 16)


def test_the_code_of_the_readme_runs_from_top_to_bottom() -> None:
    # The first block needs a model and a Trainer that writes nothing, the second a callback that measured.
    names: dict[str, Any] = {"model": WithData()}
    quiet = "Trainer(max_steps=4, accelerator='cpu', logger=False, enable_progress_bar=False, "
    quiet += "enable_checkpointing=False, enable_model_summary=False, "
    codes = [block.code.replace("Trainer(\n", quiet + "\n") for block in blocks("README.md")]
    run(codes[0], names, "README.md")
    assert names["trainer"].global_step == 4
    names["callback"] = callback = SurgeLRCallback(base_batch_size=16, objective="step", probe_every=4)
    make_trainer(callback).fit(WithData())
    for code in codes[1:]:
        run(code, names, "README.md")
    # At least what the largest batches alone would take, at most what the smallest would.
    assert 4_000_000 // 512 < names["steps"] < 4_000_000 // 16


@pytest.mark.parametrize("page", TEXTS)
def test_every_code_block_compiles(page: str) -> None:
    for block in blocks(page):
        compile(block.code, page, "exec")


# ---------------------------------------------------------------------- commands, tables, links


def commands_of(page: str) -> str:
    """What a page sets in the type of a terminal, but for Python."""
    text = (ROOT / page).read_text()
    indented = re.findall(r"(?m)^    .*$", text)
    fenced = re.findall(r"^```(?!python)\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*indented, *fenced, *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("page", TEXTS)
def test_commands_exist(page: str) -> None:
    commands = commands_of(page)
    assert set(re.findall(r"(?m)(?:^|/| )make ([a-z][a-z-]*)", commands)) <= TARGETS
    for module in set(re.findall(r"python -m ([\w.]+)", commands)):
        assert importlib.util.find_spec(module) is not None, module
    called = set(re.findall(r"(?m)(?:^\s*|bin/)lightning-surge ([a-z]\w*)", commands))
    called |= set(re.findall(r"python -m lightning_surge ([a-z]\w*)", commands))
    assert called <= {command.name for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert filled(text) == text, "run: python -m benchmarks.publish"


def test_a_section_is_what_is_under_its_heading() -> None:
    page = "benchmarks/fidelity/results/report.md"
    text = (ROOT / page).read_text()
    headings = re.findall(r"(?m)^## (\S+)$", text)
    assert "\n".join(f"## {heading}\n\n{named(f'{page}#{heading}')}" for heading in headings) == text
    with pytest.raises(LookupError, match="heading '## nothing'"):
        named(f"{page}#nothing")


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_numbers_in_the_text_are_those_of_the_committed_results(page: str) -> None:
    told = set(re.findall(r"(?<![\d./:])\d+\.(?:\d{3,}|\d+ %)", (ROOT / page).read_text()))
    committed = " ".join(path.read_text() for path in (ROOT / "benchmarks").glob("*/results/*.md"))
    assert len(told) >= 8
    assert {number for number in told if not re.search(rf"(?<![\d.]){number}(?!\d)", committed)} == set()


def test_the_readme_is_short_and_names_the_versions_of_the_project() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    assert len(text.encode()) <= 14_000
    bounds = dict(re.findall(r"(\w+)>=(\d+\.\d+)", " ".join(PROJECT["dependencies"])))
    claimed = f"Python {', '.join(PYTHONS)} · torch >= {bounds['torch']} · "
    assert f"{claimed}lightning >= {bounds['lightning']} · {PROJECT['license']}\n" in text


def test_the_documentation_stays_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "docs").rglob("*.*")) <= 170_000


def configured(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class that a configuration names, as jsonargparse or Hydra read it, with its arguments."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node["class_path"], node.get("init_args", {})
        if "_target_" in node:
            yield node["_target_"], {name: value for name, value in node.items() if name != "_target_"}
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from configured(child)


@pytest.mark.parametrize("page", [page for page in DOCS if "```yaml" in (ROOT / page).read_text()])
def test_configurations_name_classes_and_arguments_that_exist(page: str) -> None:
    texts = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    named_classes = [pair for text in texts for pair in configured(yaml.safe_load(text))]
    assert named_classes
    for name, arguments in named_classes:
        package, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(package or "lightning_surge.schedules"), attribute)
        inspect.signature(found).bind_partial(**arguments)


@pytest.mark.parametrize("page", TEXTS)
def test_pages_name_files_that_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), link


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"(?m)^ +- [^#\n]*?: (\S+\.md)$", nav))
    outside = {"CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"}
    assert listed - outside == {Path(page).name for page in DOCS}
    assert outside <= listed


def test_the_reference_lists_public_names_and_no_more() -> None:
    listed = re.findall(r"(?m)^::: lightning_surge\.([\w.]+)$", (ROOT / "docs/api.md").read_text())
    public = set(lightning_surge.__all__)
    for name in ("schedules", "laws", "runs", "tables"):
        package = importlib.import_module(f"lightning_surge.{name}")
        # A constant has no signature and no docstring of its own.
        public |= {f"{name}.{n}" for n in package.__all__ if n not in public and not n.isupper()}
    assert sorted(listed) == sorted(public)


def names_in_code() -> set[str]:
    """Every word of the project's Python files, their own names and those of what is installed with it."""
    found: set[str] = set()
    for folder in ("lightning_surge", "tests", "benchmarks", "examples", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"\w+", path.read_text()))
            found.add(path.stem)
    return found


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_identifiers_name_what_exists(page: str) -> None:
    """In backticks: a path that exists, a command that make knows, or names that occur in the code."""
    text = re.sub(r"(?s)```.*?```", "", (ROOT / page).read_text())
    known = names_in_code()
    missing = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if "/" in quoted and re.fullmatch(r"[\w./-]+", quoted):
            places = (ROOT / quoted, PACKAGE / quoted)
            if not any(place.exists() for place in places):
                missing.append(quoted)
        elif re.fullmatch(r"[\w.]+(\(\))?", quoted):
            missing += [word for word in re.findall(r"[A-Za-z_]\w*", quoted) if word not in known]
    assert missing == []


def test_the_workflow_runs_targets_that_exist_on_every_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {"make lint", "make test-fast", "make test", "make docs"} <= set(steps)
    assert {step.removeprefix("make ") for step in steps} <= TARGETS
    assert workflow["jobs"]["test-fast"]["strategy"]["matrix"]["python"] == PYTHONS


def test_the_version_is_one_number() -> None:
    version, citation = PROJECT["version"], (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    (date,) = re.findall(r"date-released: (\S+)", citation)
    releases = re.findall(r"(?m)^## \[(.*?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text())
    dated = [(number, day) for number, day in releases if number != "Unreleased"]
    assert not dated or dated[0] == (version, date)


# ---------------------------------------------------------------------- messages

SPEAKERS = {"MisconfigurationException", "warn", "rank_zero_info", "warnings.warn", "Obstacle", "self._warn"}


def template(message: ast.expr) -> str:
    """A message with `…` for its values; nothing for one that was put together elsewhere."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    texts = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
    return "" if texts == ["…"] else re.sub(r"\s+", " ", "".join(map(str, texts)))


def templates() -> dict[str, str]:
    """Every message of the package, and where it is."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in SPEAKERS:
                found[template(node.args[0])] = f"{path.name}:{node.lineno}"
    return {text: place for text, place in found.items() if text}


def quotes() -> list[str]:
    """The first column of the tables of messages, up to the reasons."""
    text = (ROOT / "docs" / "messages.md").read_text().partition("## Why the factor")[0]
    return re.findall(r"(?m)^\| `([^`]+)` \|", text)


def begins(quote: str, message: str) -> bool:
    """Whether a message begins as quoted, where `…` in the quote may stand for several words too."""
    pattern = ".+?".join(re.escape(part) for part in quote.split("…"))
    return re.match(pattern, message) is not None


def test_every_message_is_explained() -> None:
    said = quotes()
    missing = {text: place for text, place in templates().items() if not any(begins(q, text) for q in said)}
    assert missing == {}, "explain them in docs/messages.md"


def test_every_explanation_is_of_a_message() -> None:
    messages = templates()
    assert [quote for quote in quotes() if not any(begins(quote, text) for text in messages)] == []
    assert all(len(quote.replace("…", "").split()) >= 3 for quote in quotes())


def test_every_reason_is_explained() -> None:
    explained = (ROOT / "docs" / "messages.md").read_text().partition("## Why the factor")[2]
    assert [reason.text for reason in Reason if f"`{reason.text}`" not in explained] == []


def test_messages_of_the_command_line_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "messages.md").read_text()
    section = page.partition("## On the command line")[2].partition("\n## ")[0]
    quoted = re.findall(r"^- `([^`]+)`:", section, re.MULTILINE)
    assert len(quoted) == len(re.findall(r"^- ", section, re.MULTILINE)) > 10
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    texts = [template(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]
    assert [quote for quote in quoted if not any(quote.rstrip("… ") in text for text in texts)] == []


# ---------------------------------------------------------------------- commands of a page


@pytest.fixture
def reading_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """docs/reading-a-run.md, in a directory with a run."""
    write_csv(tmp_path / "lightning_logs" / "version_0", rows())
    monkeypatch.chdir(tmp_path)
    return (ROOT / "docs" / "reading-a-run.md").read_text()


def test_commands_run_and_print_what_the_page_says(
    reading_a_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = "".join(re.findall(r"```console\n(.*?)```", reading_a_run, re.DOTALL))
    commands = re.findall(r"^\$ lightning-surge (.*)\n((?:(?!\$).*\n)*)", sessions, re.MULTILINE)
    assert len(commands) == 6
    for command, printed in commands:
        assert main(shlex.split(command)) == 0
        out = capsys.readouterr().out
        assert out == printed or not printed, command
        for place in re.findall(r"--output (\S+)", command):
            assert Path(place).stat().st_size > 10_000


def test_the_answer_on_the_page_is_the_answer(reading_a_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"^    At step .*?\n\n(?:    .*\n)+", reading_a_run, re.MULTILINE)
    assert main(["advise", "lightning_logs"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(re.sub("^    ", "", shown, flags=re.MULTILINE))

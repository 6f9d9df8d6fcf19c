"""Data flows one way: read off the imports of every room."""

import ast
from pathlib import Path

import pytest

import lightning_surge

ROOT = Path(lightning_surge.__file__).parent
# A room may import rooms of earlier rows only. A new room has to find its row here.
ROWS = [
    [
        "batches", "budget", "clocks", "grid_tables", "laws", "log_files", "lr_writer",
        "optimizer_families", "optimizers", "reasons", "replay", "schedules", "shards", "sweeping",
        "sweeping.cells", "sweeping.numbers",
    ],
    [
        "edge", "gradients", "objectives", "optima", "ranks", "sweeping.losses",
        "sweeping.planning", "sweeping.pool", "sweeping.table", "theorems", "tradeoff", "windows",
    ],
    ["curvature", "deposits", "families", "micro_batches", "moments", "run_logs", "sampling"],
    ["advice", "charts", "law_fits", "measuring", "sharpness"],
    ["coordinates", "noise", "plots", "probing", "repetitions"],
    ["estimates", "fitting", "pages"],
    ["fit_figure", "follow_peak", "policy"],
    ["callbacks.attempts", "callbacks.repeated_loss"],
    ["callbacks.counting", "callbacks.hosts", "callbacks.loss_scaling", "callbacks.pace"],
    ["callbacks.loader_states", "callbacks.random_streams"],
    ["callbacks.obstacles"],
    ["callbacks.saved_state", "callbacks.step_examples"],
    ["callbacks.resuming"],
    ["callbacks.loaders"],
    ["callbacks.processes"],
    ["callbacks.batch_size_checks"],
    ["callbacks.batch_size_scheduler", "callbacks.logging", "callbacks.settings"],
    [
        "callbacks.cutting", "callbacks.instruments", "callbacks.live", "callbacks.measuring_plan",
        "callbacks.pooling",
    ],
    ["callbacks.checks", "callbacks.measurer"],
    [
        "callbacks.learner", "callbacks.lr_hooks", "callbacks.order",
        "callbacks.step_log",
    ],
    ["callbacks.surge_lr"],
    ["callbacks.batch_size_warmup"],
    ["callbacks", "callbacks.sweep_config"],
    ["callbacks.loss_recorder"],
    ["callbacks.sweep_cell"],
    [""],
    ["cli.command"],
    ["cli.sweep_progress"],
    ["cli.fit_report", "cli.plot"],
    ["cli.advise", "cli.fit"],
    ["cli.sweep_report"],
    ["cli.sweep"],
    ["cli"],
    ["__main__"],
]  # fmt: skip
ALONE = [
    "batches", "budget", "clocks", "grid_tables", "laws", "lr_writer", "optimizer_families", "reasons",
    "replay", "schedules", "shards",
]  # fmt: skip
ROW_OF = {room: index for index, row in enumerate(ROWS) for room in row}


def room_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {room_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(room: str) -> set[str]:
    """Absolute names of everything a file imports, inside functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(FILES[room].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} line {node.lineno}: imports are absolute here"
            names.add(node.module or "")
            # `from lightning_surge import laws` names a room too.
            names |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}".removeprefix("lightning_surge.") in FILES
            }
    return names


def packages_of(room: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(room)}


def rooms_of(room: str) -> set[str]:
    names = {name for name in imports_of(room) if name.partition(".")[0] == "lightning_surge"}
    return {name.removeprefix("lightning_surge").removeprefix(".") for name in names}


def test_every_room_has_a_row() -> None:
    assert sorted(FILES) == sorted(ROW_OF)
    assert sum(map(len, ROWS)) == len(ROW_OF)


@pytest.mark.parametrize("room", FILES)
def test_a_room_imports_earlier_rows_only(room: str) -> None:
    imported = rooms_of(room)
    assert imported <= set(FILES)
    assert {name for name in imported if ROW_OF[name] >= ROW_OF[room]} == set()


def test_there_are_no_cycles() -> None:
    """Not by the rows, but by taking away rooms that import nothing that is left."""
    left = {room: rooms_of(room) for room in FILES}
    while free := [room for room, imported in left.items() if not imported & left.keys()]:
        for room in free:
            del left[room]
    assert left == {}


def test_rows_are_no_later_than_the_imports_demand() -> None:
    """Each room below the callbacks stands in the row right after the last one that it imports."""
    rows = ROWS[: next(index for index, row in enumerate(ROWS) if row[0].startswith("callbacks"))]
    for row in rows:
        for room in row:
            assert ROW_OF[room] == max((ROW_OF[name] + 1 for name in rooms_of(room)), default=0), room


@pytest.mark.parametrize("room", ALONE)
def test_rooms_that_stand_alone(room: str) -> None:
    assert rooms_of(room) == set()


def test_the_graph_between_measuring_and_deciding() -> None:
    assert rooms_of("curvature") == {"gradients", "shards"}
    assert rooms_of("measuring") == {"curvature", "gradients", "ranks", "replay"}
    assert rooms_of("noise") == {"gradients", "measuring"}
    assert rooms_of("sharpness") == {"curvature", "gradients", "shards"}
    assert rooms_of("estimates") == {"edge", "laws", "noise", "theorems"}
    assert rooms_of("policy") == {"estimates", "laws", "objectives", "reasons"}


@pytest.mark.parametrize("room", FILES)
def test_only_callbacks_import_lightning(room: str) -> None:
    hosts = packages_of(room) & {"lightning", "lightning_fabric", "pytorch_lightning"}
    assert not hosts or room.startswith("callbacks.")


FLOATS = [
    "policy", "laws", "edge", "theorems", "tradeoff", "estimates", "noise", "schedules", "budget",
    "objectives", "reasons", "log_files", "run_logs", "charts", "plots", "pages", "advice", "grid_tables",
    "optima", "families", "law_fits", "repetitions", "fitting", "fit_figure",
    *(room for room in FILES if room.startswith(("sweeping", "cli"))),
]  # fmt: skip
DRAWING = {"plots": "matplotlib", "fit_figure": "matplotlib", "pages": "plotly"}


@pytest.mark.parametrize("room", FLOATS)
def test_rooms_of_floats_import_no_torch(room: str) -> None:
    assert packages_of(room) & {"torch", "torchmetrics", "lightning"} == set()


@pytest.mark.parametrize("room", FILES)
def test_only_rooms_that_draw_import_what_they_draw_with(room: str) -> None:
    drawn_with = {DRAWING[room]} if room in DRAWING else set()
    assert packages_of(room) & {"matplotlib", "plotly"} == drawn_with


@pytest.mark.parametrize(("room", "package"), DRAWING.items())
def test_rooms_that_draw_import_what_they_draw_with_when_they_draw(room: str, package: str) -> None:
    tree = ast.parse(FILES[room].read_text())
    checking = [node for node in tree.body if isinstance(node, ast.If)]
    assert all(ast.unparse(node.test) == "TYPE_CHECKING" for node in checking)
    eager = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(package in ast.unparse(node) for node in eager)

"""Data flows one way: read off the imports of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_surge

ROOT = Path(lightning_surge.__file__).parent
# A package imports itself and those before it.
PACKAGES = [
    "checking", "laws", "measure", "optimizers", "policy", "schedules", "callbacks", "runs", "tables",
    "sweep", "cli",
]  # fmt: skip
# Folders within one, likewise: those before it, and what is named.
LARGEST_FOLDER = 13
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports_of(module: str) -> set[str]:
    """Absolute names of everything a module imports, inside functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: imports are absolute here"
            names.add(node.module or "")
            names |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}".removeprefix("lightning_surge.") in MODULES
            }
    return names


def libraries_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module)}


def modules_of(module: str) -> set[str]:
    names = {name for name in imports_of(module) if name.partition(".")[0] == "lightning_surge"}
    return {name.removeprefix("lightning_surge").removeprefix(".") for name in names}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_top_level_holds_packages_only() -> None:
    tops = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert tops == {*PACKAGES, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda p: p.name)
def test_a_folder_can_be_taken_in(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= LARGEST_FOLDER


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in PACKAGES])
def test_a_package_imports_itself_and_those_before_it(module: str) -> None:
    imported = modules_of(module)
    assert imported <= set(MODULES)
    earlier = {*PACKAGES[: PACKAGES.index(package_of(module)) + 1], ""}
    assert {name for name in imported if package_of(name) not in earlier} == set()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_outside_imports_the_top(module: str) -> None:
    """Its names lead to every package, so a module within would import the later ones through it."""
    assert "" not in modules_of(module) or package_of(module) in ("cli", "sweep", "__main__")


def test_no_module_imports_itself_in_a_circle() -> None:
    """By taking away modules that import nothing that is left."""
    left = {module: modules_of(module) - {module} for module in MODULES}
    # A package's `__init__` collects names of its modules, which do not import it.
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("module", MODULES)
def test_only_callbacks_and_sweeps_import_lightning(module: str) -> None:
    hosts = libraries_of(module) & {"lightning", "lightning_fabric", "pytorch_lightning"}
    assert not hosts or package_of(module) in ("callbacks", "sweep")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["checking", "laws", "policy", "runs", "tables", "cli"])
def test_packages_of_floats_import_no_torch(package: str) -> None:
    names = [name for name in MODULES if package_of(name) == package]
    code = "; ".join(f"import lightning_surge.{name}" for name in names)
    found = "{'torch', 'lightning', 'matplotlib', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys; {code}; assert not {found}, {found}"], check=True)

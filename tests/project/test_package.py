"""The names of the package, which are imported when they are first asked for."""

import ast
from pathlib import Path

import pytest

import lightning_surge
from lightning_surge import SurgeLRCallback


def test_every_public_name_is_there_and_listed() -> None:
    for name in lightning_surge.__all__:
        assert getattr(lightning_surge, name).__name__ == name
        assert name in dir(lightning_surge)
        # Asked for once, it is a plain attribute.
        assert name in vars(lightning_surge)


def test_type_checkers_see_the_same_names_from_the_same_rooms() -> None:
    tree = ast.parse(Path(lightning_surge.__file__).read_text())
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("lightning_surge.")
        for node in checking.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == lightning_surge._PACKAGES
    assert sorted(seen) == sorted(lightning_surge.__all__)


def test_other_names_are_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_surge' has no attribute 'SurgeLR'"):
        lightning_surge.SurgeLR  # noqa: B018
    assert not hasattr(lightning_surge, "__path_hooks__")


def test_what_is_retired_says_what_to_use_and_what_is_unknown_is_named() -> None:
    with pytest.raises(ValueError, match=r"no anchor, got anchor='law', which is retired: leave it out"):
        SurgeLRCallback(16, anchor="law")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got objective='edge', which is retired: use objective='progress'"):
        SurgeLRCallback(16, objective="edge")  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="FollowPeak is retired: use a ramp"):
        from lightning_surge import FollowPeak
    with pytest.raises(ImportError, match="FollowPeak is retired: use a ramp"):
        from lightning_surge.schedules import FollowPeak  # noqa: F401
    with pytest.raises(TypeError, match="unexpected keyword argument 'base_batchsize'"):
        SurgeLRCallback(base_batchsize=16)  # type: ignore[arg-type]

"""Names users may import, and how tools see them."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
import types
import typing
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import pytest

import collective_scope


_PUBLIC = [name for name in collective_scope.__all__ if not inspect.ismodule(getattr(collective_scope, name))]
_each_public_name = pytest.mark.parametrize("name", _PUBLIC)


def _modules() -> list[types.ModuleType]:
    names = [each.name for each in pkgutil.walk_packages(collective_scope.__path__, "collective_scope.")]
    return [collective_scope, *(pkgutil.resolve_name(name) for name in names if not name.endswith("pytest_plugin"))]


def _methods(cls: type) -> list[Any]:
    found = []
    for name, member in vars(cls).items():
        if isinstance(member, property):
            found.append(member.fget)
        elif isinstance(member, classmethod | staticmethod):
            found.append(member.__func__)
        elif inspect.isfunction(member) and not name.startswith("__"):
            found.append(member)
    return found


def test_all_lists_exactly_what_is_public_and_is_sorted() -> None:
    """`__all__` has every public name and nothing else, in order."""
    # Python puts the sub-package there; nothing in it is promised.
    internal = {"annotations", "agreement"}
    exposed = [name for name in vars(collective_scope) if not name.startswith("_") and name not in internal]

    assert sorted(exposed) == collective_scope.__all__


def test_star_import_gives_all_of_it() -> None:
    """`from collective_scope import *` works."""
    names: dict[str, Any] = {}
    exec("from collective_scope import *", names)  # noqa: S102  (the only way to import a star)

    assert set(collective_scope.__all__) <= set(names)


@_each_public_name
def test_public_object_says_it_is_from_the_package(name: str) -> None:
    """Messages and reprs name the module from which users import."""
    assert "collective_scope" == getattr(collective_scope, name).__module__


@_each_public_name
def test_public_object_has_documentation(name: str) -> None:
    """Each public object, and each public method of it, is documented."""
    value = getattr(collective_scope, name)
    members = [each for each in _methods(value) if not each.__name__.startswith("_")] if isinstance(value, type) else []

    assert [] == [each.__qualname__ for each in [value, *members] if not inspect.getdoc(each)]


@_each_public_name
def test_public_object_has_annotations_that_can_be_resolved(name: str) -> None:
    """`typing.get_type_hints()` works on each public object: documentation tools and attrs need it."""
    value = getattr(collective_scope, name)

    assert isinstance(typing.get_type_hints(value), dict)
    if isinstance(value, type):
        for method in _methods(value):
            assert isinstance(typing.get_type_hints(method), dict)


def test_package_has_the_version_of_its_distribution() -> None:
    """The version is where tools and bug reports look for it."""
    assert version("collective_scope") == collective_scope.__version__


def test_package_documentation_speaks_of_public_names_only() -> None:
    """The first page that help() shows is for users: no private module is on it."""
    assert [] == re.findall(r"\b_\w+", collective_scope.__doc__ or "_")


def test_package_is_typed() -> None:
    """Type checkers look for the marker file."""
    assert files("collective_scope").joinpath("py.typed").is_file()


@pytest.mark.parametrize("module", _modules(), ids=lambda module: module.__name__)
def test_doctests_of_each_module_pass(module: types.ModuleType) -> None:
    """Examples in docstrings do what they say."""
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)

    assert 0 == results.failed


def test_doctest_of_the_scope_is_found() -> None:
    """The scope's own example is among those that run."""
    found = doctest.DocTestFinder().find(collective_scope.collective_scope, "collective_scope")

    assert any(each.examples for each in found)

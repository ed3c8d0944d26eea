"""A scope as a decorator: one scope a call, the function otherwise unchanged."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from collective_scope import CollectiveScope, collective_scope, current_scope
from tests.ranks import run_script


_scopes: list[CollectiveScope] = []
"""The scopes in which decorated functions of this module ran, in order of their entry."""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    _scopes.clear()


@collective_scope(timeout=5.0)
def _add(a: int, b: int = 2, *, c: int = 3) -> int:
    """Add."""
    _scopes.append(current_scope())
    return a + b + c


@pytest.fixture(name="number")
def _number() -> int:
    return 7


@pytest.mark.parametrize("factor", [2, 3])
@collective_scope()
def test_decorated_test_function_gets_fixtures_and_parameters(number: int, factor: int, tmp_path: Path) -> None:
    """Pytest finds the fixtures and parameters of a decorated test, and it runs inside of a scope."""
    assert (7, True) == (number, tmp_path.is_dir())
    assert factor in (2, 3)
    assert current_scope().name == "test_decorated_test_function_gets_fixtures_and_parameters"


class TestMethods:
    """Methods are functions, too."""

    @collective_scope(name="method")
    def test_decorated_method_gets_self_and_fixtures(self, number: int) -> None:
        """A decorated method of a test class gets its instance and its fixtures."""
        assert isinstance(self, TestMethods)
        assert 7 == number
        assert "method" == current_scope().name


def test_decorated_function_keeps_signature_name_and_documentation() -> None:
    """To its callers and to tools, a decorated function looks as before."""
    assert "(a: 'int', b: 'int' = 2, *, c: 'int' = 3) -> 'int'" == str(inspect.signature(_add))
    assert ("_add", "Add.", __name__) == (_add.__name__, _add.__doc__, _add.__module__)


def test_decorated_function_passes_arguments_and_result() -> None:
    """Arguments go in and the result comes out."""
    assert [6, 9, 15] == [_add(1), _add(1, 5), _add(1, b=5, c=9)]


def test_decorated_function_each_call_has_a_scope_of_its_own() -> None:
    """Calls do not share a scope; each ends with its call."""
    _add(1)
    _add(1)
    first, second = _scopes

    assert first is not second
    assert all(scope.verdict is not None and scope.verdict.ok for scope in _scopes)
    assert ["<CollectiveScope '_add', left, cleanups=0>"] * 2 == list(map(repr, _scopes))


def test_decorated_function_cleanups_given_run_in_each_call() -> None:
    """Cleanups given to the decorator run once per call; those registered inside belong to their call."""
    calls: list[str] = []

    @collective_scope(cleanups=[lambda: calls.append("given")])
    def work() -> None:
        current_scope().cleanup(calls.append, "registered")

    work()
    work()

    assert ["registered", "given"] * 2 == calls


def test_decorated_function_error_surfaces_unchanged_and_the_next_call_works() -> None:
    """A failed call cleans up and raises its own error; the function can be called again."""
    error = ValueError("no")
    calls: list[str] = []

    @collective_scope()
    def work(*, failing: bool) -> str:
        current_scope().cleanup(calls.append, "cleanup")
        if failing:
            raise error
        return "value"

    with pytest.raises(ValueError, match=r"^no$") as caught:
        work(failing=True)

    assert error is caught.value
    assert "value" == work(failing=False)
    assert ["cleanup", "cleanup"] == calls


def test_decorated_function_recursion_nests_scopes() -> None:
    """A decorated function may call itself."""
    depths: list[int] = []

    @collective_scope(name="recursive")
    def count(depth: int) -> int:
        scope = current_scope()
        scope.cleanup(depths.append, depth)
        below = count(depth - 1) if depth else 0
        assert scope is current_scope()
        return below + 1

    assert 4 == count(3)
    assert [0, 1, 2, 3] == depths


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(None, "test_decorated_function_scope_is_called_after_it.work", id="default"),
        pytest.param("given", "given", id="given"),
    ],
)
def test_decorated_function_scope_is_called_after_it(name: str | None, expected: str) -> None:
    """Without a name, the scope is called like the function."""

    @collective_scope(name=name)
    def work() -> str:
        return current_scope().name

    assert expected == work()


def test_decorated_function_group_is_looked_up_at_each_call() -> None:
    """A group given as a function is asked for when the call begins, so it need not exist before."""
    asked: list[int] = []

    def group() -> None:
        asked.append(1)

    @collective_scope(group)
    def work() -> int:
        return len(asked)

    assert [] == asked

    before = work()

    assert before >= 1
    assert work() > before


async def _coroutine() -> None:
    """Do nothing, later."""


def _generator() -> Iterator[int]:
    yield 1


async def _async_generator() -> AsyncIterator[int]:
    yield 1


class _Method:
    async def method(self) -> None:
        """Do nothing, later."""

    async def __call__(self) -> None:
        """Do nothing, later."""


class _GeneratorObject:
    def __call__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("fn", "kind", "name"),
    [
        pytest.param(_coroutine, "coroutine", "_coroutine", id="coroutine"),
        pytest.param(functools.partial(_coroutine), "coroutine", "_coroutine", id="partial-of-coroutine"),
        pytest.param(_Method().method, "coroutine", "_Method.method", id="coroutine-method"),
        pytest.param(_Method(), "coroutine", "_Method", id="object-with-a-coroutine"),
        pytest.param(_GeneratorObject(), "generator", "_GeneratorObject", id="object-with-a-generator"),
        pytest.param(_generator, "generator", "_generator", id="generator"),
        pytest.param(_async_generator, "generator", "_async_generator", id="async-generator"),
    ],
)
def test_decorator_function_that_returns_before_its_body_runs_is_refused(
    fn: Callable[..., Any], kind: str, name: str
) -> None:
    """A coroutine or generator function is refused when it is decorated: its body would run after the scope."""
    with pytest.raises(TypeError, match=rf"^collective_scope\(\) cannot decorate the .*{kind} function {name}: "):
        collective_scope()(fn)


@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda decorated: decorated(3), id="called-with-an-argument"),
        pytest.param(lambda decorated: decorated(), id="called-without-arguments"),
    ],
)
def test_decorator_without_parentheses_is_an_error_at_the_first_call(misuse: Callable[[Any], object]) -> None:
    """A function that was decorated without parentheses cannot be called without an error."""

    def work(*_: int) -> None:
        """Do nothing."""

    with pytest.raises(TypeError, match=r"did you forget the parentheses\?$"):
        misuse(collective_scope(work))


def test_decorator_on_a_class_is_refused() -> None:
    """A class would become a function, and its tests would be gone."""
    with pytest.raises(TypeError, match=r"decorates functions \(got the class _Method\); decorate its methods$"):
        collective_scope()(_Method)


def test_decorator_on_something_else_asks_for_the_parentheses() -> None:
    """A non-function is refused, with the usual mistake."""
    with pytest.raises(TypeError, match=r"decorates functions \(got 3\); did you forget the parentheses\?$"):
        collective_scope()(3)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "register",
    [
        pytest.param(lambda scope: scope.cleanup(int), id="cleanup"),
        pytest.param(lambda scope: scope.collective_cleanup(int), id="collective_cleanup"),
        pytest.param(lambda scope: scope.after_barrier(int), id="after_barrier"),
        pytest.param(lambda scope: scope.hold(object()), id="hold"),
    ],
)
def test_decorator_scope_with_something_registered_is_refused(register: Callable[[CollectiveScope], object]) -> None:
    """A scope with cleanups of its own does not decorate: they would run in no call."""
    calls: list[str] = []
    scope = collective_scope(name="s", cleanups=[lambda: calls.append("given")])
    register(scope)
    with pytest.raises(RuntimeError, match=r"^scope 's' has cleanups of its own and decorates _add: give them as "):
        scope(_add)
    with scope:
        """Its cleanups run here."""

    assert ["given"] == calls


def test_decorator_scope_itself_can_still_be_used_as_a_block() -> None:
    """Decorating does not use a scope up."""
    scope = collective_scope()
    scope(lambda: None)()
    with scope:
        pass

    assert scope.verdict is not None
    assert scope.verdict.ok


_FAILING_TEST = """
from collective_scope import collective_scope, current_scope

def broken():
    raise ValueError("in a cleanup")

@collective_scope()
def worker():
    current_scope().cleanup(broken)

def test_worker():
    worker()
"""


def test_pytest_shows_the_users_lines_only(tmp_path: Path) -> None:
    """In a failure under pytest, the call and what raised follow each other, without frames of the scope between them."""
    path = tmp_path / "test_worker.py"
    path.write_text(_FAILING_TEST)

    # The line of progress ends, by default, in as many spaces as its path leaves room for, and would count as one of these.
    options = ("--tb=short", "--show-capture=no", "-o", "console_output_style=classic", "-p", "no:cacheprovider")
    result = run_script("-m", "pytest", *options, path, expect_exit=1)

    assert [
        "test_worker.py:12: in test_worker",
        "    worker()",
        "test_worker.py:5: in broken",
        '    raise ValueError("in a cleanup")',
        "E   ValueError: in a cleanup",
    ] == [line.rpartition("/")[2] for line in result.stdout.splitlines() if "    " in line or " in " in line][:5]

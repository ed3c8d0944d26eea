"""The stack of cleanups: order, names, references."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collective_scope._cleanups import Cleanup, CleanupStack, describe, keep_for_ever


class _Manager:
    def destroy(self) -> None:
        pass

    def __call__(self) -> None:
        pass

    @functools.lru_cache  # noqa: B019  (its instances live as long as the process)
    def cached(self) -> None:
        pass


def _wrapped() -> None:
    pass


@functools.wraps(_wrapped)
def _wrapper() -> None:
    pass


def _local(name: str) -> Cleanup:
    return Cleanup(lambda: None, name, "file.py:1")


def _collective(name: str) -> Cleanup:
    return Cleanup(lambda: None, name, "file.py:1", collective=True)


def _stack(*cleanups: Cleanup) -> CleanupStack:
    stack = CleanupStack()
    for cleanup in cleanups:
        stack.push(cleanup)
    return stack


def _run_all(stack: CleanupStack) -> list[str]:
    """Run what is there from the top; return the names in that order."""
    names = []
    while (cleanup := stack.top()) is not None:
        names.append(cleanup.name)
        cleanup.run()
    return names


def test_stack_top_is_the_last_registered_that_has_not_begun() -> None:
    """Cleanups come to the top last registered first."""
    stack = _stack(_local("a"), _collective("b"), _local("c"))

    assert ["c", "b", "a"] == _run_all(stack)
    assert (0, None) == (len(stack), stack.top())


def test_stack_top_is_there_until_it_has_begun() -> None:
    """An interrupt between looking and running loses no cleanup; one that raises is not run again."""
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    stack = _stack(Cleanup(fail, "a", "file.py:1"))
    first, second = stack.top(), stack.top()

    assert first is second is not None
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert stack.top() is None
    assert [1] == calls


def test_stack_cleanup_registered_by_another_comes_next() -> None:
    """A cleanup that is registered while another one runs is at the top then, and is not lost with that."""
    stack = _stack(_local("a"))
    stack.push(Cleanup(lambda: stack.push(_local("registered by b")), "b", "file.py:1"))

    assert ["b", "registered by b", "a"] == _run_all(stack)


def test_stack_collective_lists_in_the_order_of_running() -> None:
    """Collective cleanups are listed as they would run, local ones left out."""
    a, c, d = _collective("a"), _collective("c"), _collective("d")

    assert [("d", d), ("c", c), ("a", a)] == list(_stack(a, _local("b"), c, d).collective().items())


def test_stack_equal_names_are_counted_from_the_first_registered() -> None:
    """Of equal names, the one registered first keeps its name, so that ranks which have more of them share it."""
    assert ["a #3", "b", "a #2", "a"] == list(_stack(*map(_collective, ("a", "a", "b", "a"))).collective())


@given(st.lists(st.sampled_from(["a", "a #2", "a #3", "b", ""])))
def test_stack_collective_names_whatever_they_are_lose_no_cleanup(names: list[str]) -> None:
    """Every collective cleanup is listed once, also where a given name looks like a counted one."""
    cleanups = [_collective(name) for name in names]

    assert cleanups[::-1] == list(_stack(*cleanups).collective().values())


def test_stack_collective_cleanup_that_has_begun_is_not_listed() -> None:
    """Only cleanups not begun are left, also below the top."""
    a, b = _collective("a"), _collective("b")
    a.begun = True

    assert ["b"] == list(_stack(a, b).collective())


def test_stack_cleanup_that_has_run_stays_alive_until_clear() -> None:
    """A cleanup's object outlives its run, and goes with the stack."""
    manager = _Manager()
    reference = weakref.ref(manager)
    stack = _stack(Cleanup(manager.destroy, "destroy", "file.py:1"))
    del manager

    assert ["destroy"] == _run_all(stack)
    assert reference() is not None

    stack.clear()

    assert reference() is None


def test_kept_object_is_never_freed() -> None:
    """An object kept for ever has no owner, and is still there. It can be kept twice."""
    manager = _Manager()
    reference = weakref.ref(manager)
    keep_for_ever(manager, manager)
    del manager
    gc.collect()

    assert reference() is not None


def test_cleanup_str_names_it_and_where_it_was_registered() -> None:
    """A cleanup is told by its name and the place of its registration."""
    assert "cleanup 'free' (registered at test.py:12)" == str(Cleanup(print, "free", "test.py:12"))


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        pytest.param(_stack, "_stack", id="function"),
        pytest.param(_Manager().destroy, "_Manager.destroy", id="bound-method"),
        pytest.param(functools.partial(_Manager().destroy), "_Manager.destroy", id="partial"),
        pytest.param(functools.partial(functools.partial(print, 1), 2), "print", id="partial-of-partial"),
        pytest.param(functools.partial(_wrapper), "_wrapped", id="partial-of-wrapper"),
        pytest.param(_Manager(), "_Manager", id="instance"),
        pytest.param(_Manager, "_Manager", id="class"),
        pytest.param(_wrapper, "_wrapped", id="wrapper"),
        pytest.param(_Manager().cached, "_Manager.cached", id="cached-method"),
        pytest.param([].clear, "list.clear", id="builtin-method"),
    ],
)
def test_describe_any_callable_names_what_it_calls(fn: Callable[..., object], name: str) -> None:
    """A callable is named as its owner would name it."""
    assert name == describe(fn)


def test_describe_inner_function_leaves_locals_out() -> None:
    """A function within a function is named without the marker of its scope."""

    def inner() -> None:
        pass

    assert "test_describe_inner_function_leaves_locals_out.inner" == describe(inner)

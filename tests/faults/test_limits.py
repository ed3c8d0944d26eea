"""Far more of everything than anybody needs: cleanups, characters, nesting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import attrs
import pytest

from collective_scope import CollectiveScope, PeerFailedError, ScopeMismatchError, collective_scope
from tests.ranks import RankPool, values


# Far more than any of this takes on a busy machine.
_LONG_S = 60.0

_MANY_CLEANUPS = 10_000
_DEEP = 200

_NAMES = {
    "newline": "first\nsecond",
    "nul": "before\0after",
    "emoji": "ranks 👩‍🚀🚀",
    "lone-surrogate": "half \ud83d",
    "slashes": "../../life/0",
    "empty": "",
    "megabyte": "x" * 1_000_000,
}


@attrs.frozen
class Left:
    """How a rank left a scope: what it raised, the text of that, and whether all was well everywhere."""

    error: str
    text: str
    is_ok: bool


def _leave(scope: CollectiveScope, body: Callable[[CollectiveScope], object] = lambda _: None) -> Left:
    error = None
    try:
        with scope:
            body(scope)
    except (ValueError, PeerFailedError, ScopeMismatchError) as raised:
        error = raised
    is_ok = scope.verdict is not None and scope.verdict.ok
    return Left("" if error is None else type(error).__name__, str(error), is_ok)


def _leave_next() -> Left:
    return _leave(collective_scope(name="next", timeout=_LONG_S))


def _clean_up_much(rank: int, world_size: int) -> tuple[Left, bool, Left]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[int] = []

    def body(scope: CollectiveScope) -> None:
        for number in range(_MANY_CLEANUPS):
            scope.cleanup(ran.append, number)

    left = _leave(collective_scope(name="many", timeout=_LONG_S), body)
    return left, ran == list(reversed(range(_MANY_CLEANUPS))), _leave_next()


def test_cleanups_ten_thousand_run_once_each_in_order(rank_pools: Callable[[int], RankPool]) -> None:
    """Ten thousand cleanups of one scope all run, last registered first."""
    for left, is_in_order, after in values(rank_pools(2).run(_clean_up_much)):
        assert left.is_ok
        assert is_in_order
        assert after.is_ok


def _fail_to_clean_up_much(rank: int, world_size: int) -> tuple[int, str, Left]:  # noqa: ARG001  (given to every function of a rank)
    def fail(number: int) -> None:
        msg = f"{number} " + "x" * 1_000
        raise ValueError(msg)

    scope = collective_scope(name="many", timeout=_LONG_S)
    count, text = 0, ""
    try:
        with scope:
            for number in range(1_000 if rank == 1 else 0):
                scope.cleanup(fail, number)
    except ExceptionGroup as group:
        count = len(group.exceptions)
    except PeerFailedError as error:
        text = str(error)
    return count, text, _leave_next()


def test_cleanups_a_thousand_that_raise_are_all_raised_and_told(rank_pools: Callable[[int], RankPool]) -> None:
    """The rank raises each of its thousand errors, and its peer is told of the first ones, and how many more there are."""
    (_, text, after_0), (count, _, after_1) = values(rank_pools(2).run(_fail_to_clean_up_much))

    assert 1_000 == count
    assert "ValueError: 999 xxx" in text
    assert "and 979 more" in text
    assert after_0.is_ok
    assert after_1.is_ok


def _clean_up_together(rank: int, world_size: int) -> tuple[Left, int]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[int] = []

    def body(scope: CollectiveScope) -> None:
        for number in range(_DEEP):
            scope.collective_cleanup(ran.append, number)

    return _leave(collective_scope(name="together", timeout=_LONG_S), body), len(ran)


def test_cleanups_collective_two_hundred_run_in_lockstep(rank_pools: Callable[[int], RankPool]) -> None:
    """Two hundred collective cleanups run, each after an agreement of its own."""
    for left, count in values(rank_pools(2).run(_clean_up_together)):
        assert left.is_ok
        assert _DEEP == count


def _use_name(rank: int, world_size: int, name: str) -> tuple[Left, Left, Left, list[str], Left]:
    ran: list[str] = []

    def register(scope: CollectiveScope) -> None:
        scope.collective_cleanup(ran.append, "together", name=name, fingerprint=lambda: name)

    def fail(_: CollectiveScope) -> None:
        if rank == 1:
            raise ValueError(name)

    healthy = _leave(collective_scope(name=name, timeout=_LONG_S), register)
    failing = _leave(collective_scope(name=name, timeout=_LONG_S), fail)
    different = _leave(collective_scope(name=name + "!" * rank, timeout=_LONG_S))
    assert world_size == 2
    return healthy, failing, different, ran, _leave_next()


@pytest.mark.parametrize("name", _NAMES)
def test_name_of_any_text_is_compared_and_told(name: str, rank_pools: Callable[[int], RankPool]) -> None:
    """Scopes, cleanups, fingerprints and messages may be any text: ranks that agree agree, others are told apart."""
    results = values(rank_pools(2).run(_use_name, _NAMES[name]))

    for healthy, _, different, ran, after in results:
        assert healthy.is_ok
        assert ["together"] == ran
        assert "ScopeMismatchError" == different.error
        assert after.is_ok
    assert ["PeerFailedError", "ValueError"] == [failing.error for _, failing, _, _, _ in results]


def _raise(error: BaseException) -> None:
    raise error


def _nest(rank: int, world_size: int, failing: int | None) -> tuple[list[int], str, int, float, Left]:  # noqa: ARG001  (given to every function of a rank)
    cleaned: list[int] = []
    start = time.monotonic()
    error: BaseException | None = None
    try:
        with contextlib.ExitStack() as stack:
            for depth in range(_DEEP):
                scope = stack.enter_context(collective_scope(name=f"depth {depth}", timeout=_LONG_S))
                scope.cleanup(cleaned.append, depth)
            if rank == failing:
                _raise(ValueError("innermost"))
    except (ValueError, PeerFailedError) as raised:
        error = raised
    took_s = time.monotonic() - start
    notes = sum(map(len, getattr(error, "__notes__", ())))
    return cleaned, type(error).__name__, notes, took_s, _leave_next()


@pytest.mark.parametrize("failing", [None, 1])
def test_scopes_two_hundred_nested_all_clean_up(failing: int | None, rank_pools: Callable[[int], RankPool]) -> None:
    """Two hundred scopes within each other leave in order, also when the innermost body raises on one rank."""
    results = values(rank_pools(2).run(_nest, failing))

    for cleaned, _, notes, _, after in results:
        assert list(reversed(range(_DEEP))) == cleaned
        assert after.is_ok
        # One error does not become a book on its way out.
        assert notes < 1_000_000
    assert (["NoneType"] * 2 if failing is None else ["PeerFailedError", "ValueError"]) == [each[1] for each in results]

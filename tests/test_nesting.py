"""
Scopes within scopes: a failure around a scope ends that for all, and all stay in step.

First over real processes, cell by cell; then, where the order of things matters, with ranks that are threads.
"""

# ruff: noqa: PT012  (it is the end of a block that raises)

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import attrs
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from collective_scope import (
    BarrierTimeoutError,
    CollectiveScopeError,
    PeerFailedError,
    ScopeMismatchError,
    Verdict,
    collective_scope,
)
from tests.ranks import RankPool, Sequencer, here, values
from tests.stores import RankGroup, interrupted_when, is_waiting, meet


LONG_S = 120.0
"""A timeout that no test may reach."""

_error = ValueError("no")


# Over real processes


@attrs.frozen
class Cell:
    """
    A failure in an outer scope, within which all ranks go through two nested ones.

    Attributes:
        how: Error of the failing rank.
        where: Where it does: before the nested scopes, between them, in the body of the second, or after them.
        who: The rank that fails.
        is_caught: Whether all ranks catch what a nested scope raises, if it is an ordinary error, and go on.
        cleanup: Whether the outer scope has a collective cleanup, on all ranks or only on those that did not fail.
        world_size: Number of ranks.
    """

    how: Literal["raises", "skips", "exits", "interrupts"]
    where: Literal["before", "between", "inside", "after"]
    who: int
    is_caught: bool
    cleanup: Literal["none", "agreed", "missing"] = "none"
    world_size: int = 2

    def __str__(self) -> str:
        """Return an id for pytest."""
        caught = "caught" if self.is_caught else "not-caught"
        return f"{self.world_size}-{self.who}-{self.how}-{self.where}-{caught}-cleanup:{self.cleanup}"


_ERRORS: dict[str, type[BaseException]] = {
    "raises": ValueError,
    "skips": pytest.skip.Exception,
    "exits": SystemExit,
    "interrupts": KeyboardInterrupt,
}


@attrs.frozen
class Seen:
    """
    One rank's view.

    Attributes:
        outer: Error of the outer scope.
        is_own: Whether that is the very object that the rank itself raised.
        inner: Error of each nested scope.
        ran: The bodies and cleanups that ran, in order.
        outer_verdict: The outer scope's verdict on all ranks.
        inner_verdicts: Verdicts of nested ones.
        following: Verdict of the next scope.
    """

    outer: str
    is_own: bool
    inner: tuple[str, ...]
    ran: tuple[str, ...]
    outer_verdict: Verdict
    inner_verdicts: tuple[Verdict, ...]
    following: Verdict


def _run_cell(rank: int, world_size: int, cell: Cell) -> Seen:  # noqa: ARG001  (given to every function of a rank)
    own = _ERRORS[cell.how](f"on {rank}")
    ran: list[str] = []
    inner: list[str] = []
    inner_verdicts: list[Any] = []
    # Only a bug would make anybody wait for so long.
    scope_of = functools.partial(collective_scope, timeout=20.0, failure_timeout=20.0)
    outer = scope_of(name="outer")
    surfaced: BaseException | None = None

    def fail(*, if_it_is: bool) -> None:
        if rank == cell.who and if_it_is:
            raise own

    def nest(number: int) -> None:
        scope = scope_of(name="inner", cleanups=[functools.partial(ran.append, f"cleanup {number}")])
        try:
            with scope:
                ran.append(f"body {number}")
                scope.collective_cleanup(ran.append, f"collective {number}", name="c")
                fail(if_it_is=cell.where == "inside" and number == 1)
            inner.append("")
        except BaseException as error:
            inner.append(type(error).__name__)
            if error is own or not cell.is_caught:
                raise
        finally:
            inner_verdicts.append(scope.verdict)

    try:
        with outer:
            outer.cleanup(ran.append, "outer cleanup")
            if cell.cleanup == "agreed":
                outer.collective_cleanup(ran.append, "outer collective", name="c")
            fail(if_it_is=cell.where == "before")
            nest(0)
            fail(if_it_is=cell.where == "between")
            nest(1)
            fail(if_it_is=cell.where == "after")
            if cell.cleanup == "missing":
                outer.collective_cleanup(ran.append, "outer collective", name="c")
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = error
    with scope_of(name="inner") as following:
        pass
    assert outer.verdict is not None
    assert following.verdict is not None
    return Seen(
        type(surfaced).__name__,
        surfaced is own,
        tuple(inner),
        tuple(ran),
        outer.verdict,
        tuple(inner_verdicts),
        following.verdict,
    )


def _expected(cell: Cell, rank: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Say what the contract promises to *rank*: what surfaces of the outer scope, of the nested ones, and what ran."""
    fails = rank == cell.who
    broken = {"before": 0, "between": 1, "inside": 1, "after": 2}[cell.where]  # the nested scope that fails
    is_whole = cell.where == "inside"  # all are in it
    ran: list[str] = []
    inner: list[str] = []
    for number in range(2):
        if number < broken or (number == broken and (is_whole or not fails)):
            ran.append(f"body {number}")
            ran += [f"collective {number}"] * (number < broken or is_whole)
            ran.append(f"cleanup {number}")
            inner.append("" if number < broken else _ERRORS[cell.how].__name__ if fails else "PeerFailedError")
        elif not fails and cell.is_caught:
            ran.append(f"cleanup {number}")  # cleanups given to a scope run, also if it is refused
            inner.append("PeerFailedError")
    if cell.cleanup == "agreed":
        ran.append("outer collective")
    surfaces = _ERRORS[cell.how].__name__ if fails else "PeerFailedError"
    return surfaces, tuple(inner), (*ran, "outer cleanup")


def _cells() -> Iterator[Cell]:
    hows: list[Any] = list(_ERRORS)
    wheres: list[Any] = ["before", "between", "inside", "after"]
    for how, where, who, is_caught in itertools.product(hows, wheres, (0, 1), (False, True)):
        yield Cell(how, where, who, is_caught)
    cleanups: list[Any] = ["agreed", "missing"]
    for where, cleanup, is_caught in itertools.product(wheres, cleanups, (False, True)):
        yield Cell("raises", where, 1, is_caught, cleanup)
        yield Cell("raises", where, 2, is_caught, cleanup, world_size=4)


@pytest.mark.parametrize("cell", [*_cells()], ids=str)
def test_scope_nested_whatever_goes_wrong_keeps_the_contract(cell: Cell, rank_pools: Callable[[int], RankPool]) -> None:
    """Wherever a rank fails, its peers learn of it in the scope they are in; one verdict a scope; the next one works."""
    pool = rank_pools(cell.world_size)
    try:
        results = values(pool.run(_run_cell, cell, timeout=60.0))
        _check(cell, results)
    except BaseException:
        pool.close()
        raise


def _check(cell: Cell, results: list[Seen]) -> None:
    for rank, seen in enumerate(results):
        surfaces, inner, ran = _expected(cell, rank)
        assert (surfaces, inner) == (seen.outer, seen.inner)
        assert sorted(ran) == sorted(seen.ran)
        assert [each for each in ran if "collective" not in each] == [e for e in seen.ran if "collective" not in e]
        assert seen.is_own == (rank == cell.who)
        assert seen.following.ok
        assert seen.outer_verdict.complete
        assert cell.who in seen.outer_verdict.failures
        is_whole = cell.is_caught or cell.where == "after"
        assert is_whole == ([cell.who] == list(seen.outer_verdict.failures))
        is_registered = cell.is_caught or cell.where == "after"  # by those that did not fail
        assert (cell.cleanup == "missing" and is_registered) == bool(seen.outer_verdict.cleanups)
    for get in (lambda seen: seen.outer_verdict, lambda seen: seen.following):
        assert all(get(seen) == get(results[0]) for seen in results)
    healthy = [seen for rank, seen in enumerate(results) if rank != cell.who]
    for verdicts in zip(*(seen.inner_verdicts for seen in healthy), strict=True):
        assert all(verdict == verdicts[0] for verdict in verdicts)
        outside = verdicts[0].outside
        assert outside in ({}, {cell.who: "outer"})
        assert ("inside" == cell.where and verdicts[0].complete) or bool(outside) != verdicts[0].ok


def _worker_that_makes_the_group(rank: int, world_size: int) -> Any:
    verdicts: list[Verdict] = []

    @collective_scope(timeout=20.0)
    def worker() -> None:
        here().init_process_group()
        # A scope that found its group at the exit only is known by its error.
        if rank == 1:
            raise _error
        with collective_scope(name="inner", timeout=20.0):
            pass

    try:
        worker()
    except (ValueError, PeerFailedError) as error:
        verdicts += [
            each.verdict
            for each in (error, *getattr(error, "collective_scope_errors", ()))
            if error is not each or rank != 1
        ]
    with collective_scope(name="inner", timeout=20.0) as following:
        pass
    dist.destroy_process_group()
    return verdicts, following.verdict, world_size


def test_scope_in_one_that_was_entered_without_a_group_ends_with_it() -> None:
    """A worker function that makes the group itself is known, to the scopes within, as the one around them."""
    with RankPool(3, init=False) as pool:
        results = values(pool.run(_worker_that_makes_the_group, timeout=60.0))

    for rank, (verdicts, following, _) in enumerate(results):
        assert following.ok
        if rank != 1:
            inner, outer = verdicts
            assert {1: outer.scope} == inner.outside
            assert outer.complete


def _worker_that_fails_twice(rank: int, world_size: int) -> Any:  # noqa: ARG001  (given to every function of a rank)
    inner = collective_scope(name="inner", timeout=20.0)
    try:
        with collective_scope(name="outer", timeout=20.0):
            here().init_process_group()
            with contextlib.suppress(ValueError, PeerFailedError), inner:
                if rank == 1:
                    raise _error
            if rank == 1:
                raise _error
    except PeerFailedError as error:
        orders = [verdict.failures[1].order for verdict in (inner.verdict, error.verdict) if verdict is not None]
        return 0 < orders[0] < orders[1]
    except ValueError:
        return None
    finally:
        dist.destroy_process_group()


def test_scope_without_a_group_failing_after_one_within_it_failed_comes_after_that() -> None:
    """Both are the first on the group, and still two failures, of which one was first."""
    with RankPool(3, init=False) as pool:
        assert [True, None, True] == values(pool.run(_worker_that_fails_twice, timeout=60.0))


def _worker_that_is_the_driver_on_rank_0(rank: int, world_size: int) -> Any:
    with collective_scope(name="driver", timeout=20.0) if rank == 0 else contextlib.nullcontext():
        here().init_process_group()
        scopes = [collective_scope(name=name, timeout=20.0) for name in ("first", "second")]
        for scope in scopes:
            with scope:
                pass
        dist.destroy_process_group()
    return [scope.verdict for scope in scopes], world_size


def test_scope_in_one_of_the_driver_only_is_the_same_as_on_the_others() -> None:
    """A scope that one rank's process is in before it makes the group, and after that is gone, is nothing to its peers."""
    with RankPool(3, init=False) as pool:
        results = values(pool.run(_worker_that_is_the_driver_on_rank_0, timeout=60.0))

    for verdicts, _ in results:
        assert [("first", True), ("second", True)] == [(each.scope, each.ok) for each in verdicts]


def _worker_that_calls_itself(rank: int, world_size: int, made_at: int) -> Any:
    raised: list[str] = []

    @collective_scope(timeout=20.0)
    def worker(depth: int) -> None:
        if depth == made_at:
            here().init_process_group()
            if rank == 1:
                raise _error
        if depth < world_size - 1:
            leave(depth + 1)

    def leave(depth: int) -> None:
        try:
            worker(depth)
        except (ValueError, PeerFailedError) as error:
            raised.append(type(error).__name__)
            raise

    with contextlib.suppress(ValueError, PeerFailedError):
        leave(0)
    with collective_scope(name="next", timeout=20.0) as following:
        pass
    dist.destroy_process_group()
    return raised, following.verdict


@pytest.mark.parametrize("made_at", range(3))
def test_scope_of_a_function_that_calls_itself_ends_with_the_others_wherever_the_group_is_made(made_at: int) -> None:
    """Scopes of one name, entered with a group or without, are told apart: each ends once, on all ranks alike."""
    with RankPool(3, init=False) as pool:
        results = values(pool.run(_worker_that_calls_itself, made_at, timeout=60.0))

    for rank, (raised, following) in enumerate(results):
        assert following.ok
        assert raised == ((made_at + 1) * ["ValueError"] if rank == 1 else 3 * ["PeerFailedError"])


# Where the order of things matters


def _scope(group: RankGroup, name: str, **options: Any) -> Any:
    return collective_scope(group, name=name, **{"timeout": LONG_S, "failure_timeout": LONG_S, **options})  # type: ignore[arg-type]  # options of any type


def _next_ones(group: RankGroup) -> list[str]:
    """Go through two more scopes, the names of which have been used; return what became of them."""
    verdicts = []
    for name in ("inner", "outer"):
        with _scope(group, name) as scope:
            pass
        verdicts.append(str(scope.verdict))
    return verdicts


_HEALTHY = [
    "scope 'inner', 3 of 3 ranks arrived, ok",
    "scope 'outer', 3 of 3 ranks arrived, ok",
]


def test_scope_whose_rank_failed_in_one_around_it_raises_peer_failed_on_the_others() -> None:
    """A rank that fails before it comes to a nested scope ends that, by name, and then the outer one, for all alike."""
    ran: list[str] = []

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        inner = _scope(group, "inner")
        with pytest.raises((ValueError, PeerFailedError)) as caught, _scope(group, "outer") as outer:
            if rank == 1:
                raise _error
            with inner:
                inner.collective_cleanup(ran.append, "inner", name="c")
                outer.cleanup(ran.append, "outer")
        return caught.value, inner.verdict, outer.verdict, _next_ones(group)

    results = meet(3, run)

    raised, told = results[1][0], results[0][0]
    assert raised is _error
    for rank in (0, 2):
        assert isinstance(results[rank][0], PeerFailedError)
        assert {1: "body"} == {r: outcome.phase for r, outcome in results[rank][0].failures.items()}
        assert {1: "outer"} == results[rank][1].outside
        assert "inner" == results[rank][1].scope
    assert str(told).startswith("rank 1 of 3 failed in scope 'outer', around scope 'inner': ValueError: no\n")
    assert any("Not run, because the ranks could not agree" in note for note in told.__notes__)
    assert ["outer", "outer"] == ran
    assert results[1][1] is None
    assert results[0][1] == results[2][1]
    assert all(verdict == results[0][2] for _, _, verdict, _ in results)
    assert [0, 1, 2] == sorted(results[0][2].failures)
    assert [_HEALTHY] * 3 == [result[3] for result in results]


def test_scope_after_a_caught_failure_around_it_is_refused() -> None:
    """A rank that catches a nested scope's error and goes on starts no further body that waits for the failed rank."""
    bodies: list[tuple[int, int]] = []

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        texts = []
        with pytest.raises((ValueError, PeerFailedError)) as caught, _scope(group, "outer") as outer:
            for i in range(4):
                if (rank, i) == (1, 1):
                    raise _error
                try:
                    with _scope(group, "inner"):
                        bodies.append((i, rank))
                except PeerFailedError as error:
                    texts.append("The body of this scope was not run." in str(error))
        return type(caught.value), texts, outer.verdict, _next_ones(group)

    results = meet(3, run)

    assert [PeerFailedError, ValueError, PeerFailedError] == [kind for kind, *_ in results]
    assert [[False, True, True], [], [False, True, True]] == [texts for _, texts, *_ in results]
    assert [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)] == sorted(bodies)
    assert all(verdict == results[0][2] for _, _, verdict, _ in results)
    assert [1] == sorted(results[0][2].failures)
    assert [_HEALTHY] * 3 == [result[3] for result in results]


def test_scope_ranks_that_failed_at_different_depths_meet_at_each_scope_that_they_share() -> None:
    """One fails outermost, one in the middle, one is innermost: each scope has one verdict on all that were in it."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        scopes = [_scope(group, name) for name in ("a", "b", "c")]
        with pytest.raises((ValueError, PeerFailedError)) as caught, scopes[0]:
            if rank == 2:
                raise _error
            with scopes[1]:
                if rank == 1:
                    raise _error
                with scopes[2]:
                    pass
        _next_ones(group)
        return type(caught.value), [scope.verdict for scope in scopes]

    results = meet(3, run)

    assert [PeerFailedError, ValueError, ValueError] == [kind for kind, _ in results]
    for i, ranks in enumerate(([0, 1, 2], [0, 1], [0])):
        verdicts = [results[rank][1][i] for rank in ranks]
        # If those around it failed first, its verdict is that of the scope that is over.
        assert verdicts[0].scope in ("a", "ab", "bc")[i]
        assert all(verdict == verdicts[0] for verdict in verdicts)
        assert not verdicts[0].ok
    assert results[2][1][1:] == [None, None]


def test_scope_whose_rank_fails_around_it_after_it_has_ended_does_not_wait_for_that_rank() -> None:
    """One failure around it ends a nested scope; who fails there later is in the verdict of the outer one only."""

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> Any:
        outer, inner = _scope(group, "outer"), _scope(group, "inner")
        with contextlib.suppress(ValueError, PeerFailedError), outer:
            if rank == 1:
                sequencer.wait_for("inner has ended")
            if rank:
                raise _error
            try:
                with inner:
                    pass
            finally:
                sequencer.announce("inner has ended")
        return inner.verdict, outer.verdict, _next_ones(group)

    results = meet(3, run)

    (inner, *_), *_ = results
    assert ({2: "outer"}, {0, 2}) == (inner.outside, set(inner.outcomes))
    for _, outer, following in results:
        assert (True, {0, 1, 2}) == (outer.complete, set(outer.failures))
        assert following == _HEALTHY


def test_scope_whose_rank_gave_up_around_it_ends_with_that_verdict() -> None:
    """A body that outlasts the wait of a rank that failed around it: its rank learns so, and is waited for at the next."""
    events: list[str] = []

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> Any:
        inner = _scope(group, "inner")
        with (
            pytest.raises((ValueError, BarrierTimeoutError)) as caught,
            _scope(group, "outer", failure_timeout=0.2) as outer,
        ):
            if rank == 1:
                raise _error
            try:
                with inner:
                    sequencer.wait_for("rank 1 has given up")
            except BarrierTimeoutError as error:
                with pytest.raises(BarrierTimeoutError) as refused, _scope(group, "inner"):
                    events.append("in a refused body")
                assert "The body of scope 'inner' was not run." in refused.value.__notes__
                assert error.missing == refused.value.missing == (0, 2)  # noqa: PT017  (one of several)
                events.append(f"{rank} out")
                raise
        if rank == 1:
            sequencer.announce("rank 1 has given up")
        with _scope(group, "next"):
            events.append(f"{rank} in the next")
        return caught.value, inner.verdict, outer.verdict, _next_ones(group)

    results = meet(3, run)

    assert results[1][0] is _error
    assert all(verdict == results[0][2] for _, _, verdict, _ in results)
    assert results[0][2] == results[0][1] == results[2][1]
    assert 1 == sum("In addition" in note for note in results[0][0].__notes__)  # the outer scope adds nothing
    assert {"0 out", "2 out"} == set(events[:2])
    assert {"0 in the next", "1 in the next", "2 in the next"} == set(events[2:])
    assert [_HEALTHY] * 3 == [result[3] for result in results]


def test_scope_whose_rank_failed_around_one_that_had_timed_out_meets_its_peers() -> None:
    """A rank that fails after its peers gave up on it, in a scope to which it had not come, is met at the outer one."""

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> Any:
        with pytest.raises((ValueError, BarrierTimeoutError)) as caught, _scope(group, "outer") as outer:
            if rank == 1:
                sequencer.wait_for("the others have given up")
                raise _error
            with _scope(group, "inner", timeout=1.0) as inner:
                inner.after_barrier(sequencer.announce, "the others have given up", even_if_missing=True)
        return caught.value, outer.verdict, _next_ones(group)

    results = meet(3, run)

    assert results[1][0] is _error
    assert (1,) == results[0][0].missing
    assert all(verdict == results[0][1] for _, verdict, _ in results)
    assert results[0][1].complete
    assert [_HEALTHY] * 3 == [result[2] for result in results]


def test_scope_interrupted_at_the_barrier_ends_those_within_it() -> None:
    """Ctrl-C at the barrier of the outer scope, after a failure there: those within it do not wait for this rank."""
    store = dist.HashStore()
    groups = [RankGroup(store, rank, 2) for rank in (0, 1)]
    is_interrupted = threading.Event()
    raised: list[Any] = []

    def peer() -> None:
        inner = _scope(groups[1], "inner")
        try:
            with _scope(groups[1], "outer") as outer, inner:
                is_interrupted.wait(LONG_S)
        except PeerFailedError as error:
            raised.extend((error, inner.verdict, outer.verdict))

    thread = threading.Thread(target=peer)
    thread.start()
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: is_waiting(store, 0)),
        _scope(groups[0], "outer"),
    ):
        raise _error
    is_interrupted.set()
    thread.join(LONG_S)

    error, inner_verdict, outer_verdict = raised
    assert error.verdict == inner_verdict == outer_verdict
    assert "rank 0 stopped waiting at the barrier" in str(error)


@pytest.mark.parametrize("fails", [False, True])
def test_scope_that_one_rank_left_out_is_a_mismatch_for_those_in_it(*, fails: bool) -> None:
    """A rank that skips the nested scope is at another one; where it waits, it learns that its peer found that."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        inner = _scope(group, "inner")
        with pytest.raises((ScopeMismatchError, PeerFailedError, ValueError)) as caught:  # noqa: SIM117  (the inner one is what raises)
            with _scope(group, "another" if rank and fails else "outer", failure_timeout=0.2):
                if rank and fails:
                    raise _error
                if not rank:
                    with inner:
                        pass
        told = [caught.value, *getattr(caught.value, "collective_scope_errors", ())]
        return [type(error) for error in told], inner.verdict

    (first, verdict), (second, _) = meet(2, run)

    assert {0: "inner", 1: "another" if fails else "outer"} == verdict.names
    assert ScopeMismatchError is first[0]
    assert second[0] is (ValueError if fails else PeerFailedError)


# Any program


@attrs.frozen
class _Node:
    """
    A scope of a program that all ranks run.

    Attributes:
        children: The scopes within it.
        catches: Whether what a child raises is caught in its body.
        fails: Rank and number of the child before which it fails.
    """

    children: tuple[_Node, ...]
    catches: bool
    fails: tuple[tuple[int, int], ...]


def _nodes(children: st.SearchStrategy[_Node] | None = None) -> st.SearchStrategy[_Node]:
    return st.builds(
        _Node,
        children=st.just(()) if children is None else st.lists(children, max_size=3).map(tuple),
        catches=st.booleans(),
        fails=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=2).map(tuple),
    )


class _BodyError(Exception):
    pass


def _run_node(node: _Node, path: str, rank: int, group: RankGroup, seen: dict[str, tuple[Verdict, bool]]) -> None:
    scope, has_begun = _scope(group, path), False
    try:
        with scope:
            has_begun = True
            for i, child in enumerate(node.children):
                if (rank, i) in node.fails:
                    raise _BodyError
                try:
                    _run_node(child, f"{path}.{i}", rank, group, seen)
                except (_BodyError, CollectiveScopeError):
                    if not node.catches:
                        raise
            if any(each == rank and number >= len(node.children) for each, number in node.fails):
                raise _BodyError
    finally:
        seen[path] = scope.verdict, has_begun


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_nodes(_nodes(_nodes())), min_size=1, max_size=2))
@example(
    # At its third child, rank 0 is outside as well: the verdict of the second one must not stand for it.
    [_Node((_Node((), catches=False, fails=()),) * 3, catches=True, fails=((0, 2), (1, 0)))]
)
def test_scope_any_nesting_gives_one_verdict_to_all_that_were_in_it_and_the_next_one_works(nodes: list[_Node]) -> None:
    """However deep a body fails, and whatever is caught: one verdict a scope, and a healthy one afterwards."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        seen: dict[str, tuple[Verdict, bool]] = {}
        raised = []
        for number, node in enumerate(nodes):
            try:
                _run_node(node, str(number), rank, group, seen)
                raised.append(False)
            except (_BodyError, CollectiveScopeError):
                raised.append(True)
        with _scope(group, "last") as last:
            pass
        return seen, raised, last.verdict

    results = meet(3, run)

    assert 1 == len({tuple(raised) for _, raised, _ in results})
    assert all(last == results[0][2] for *_, last in results)
    for path in set[str]().union(*(seen for seen, *_ in results)):
        who = [rank for rank, (seen, *_) in enumerate(results) if path in seen]
        verdicts = [results[rank][0][path][0] for rank in who]
        assert all(verdict == verdicts[0] for verdict in verdicts)
        # Its own, or that of a scope around it that was over first.
        assert f"{path}.".startswith(f"{verdicts[0].scope}.")
        who = [rank for rank, (seen, *_) in enumerate(results) if verdicts[0].scope in seen]
        # No rank is lost or mistaken for being elsewhere, and one that failed around the scope is said to be outside.
        assert (verdicts[0].lost, verdicts[0].names, verdicts[0].reason) == ((), {}, "")
        assert set(verdicts[0].outside) <= set(verdicts[0].missing)
        assert verdicts[0].outside or not verdicts[0].missing
        assert set(verdicts[0].outcomes) - set(who) == set(verdicts[0].outside)
        assert verdicts[0].outside or who == [0, 1, 2]
    for number in range(len(nodes)):
        verdict = results[0][0][str(number)][0]
        assert verdict.complete
        assert verdict.ok != results[0][1][number]

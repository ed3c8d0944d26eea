"""A loop of subtests: what becomes of each, on every rank alike, and what is printed and written."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import sys
import unittest
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO
from xml.etree import ElementTree as ET

import attrs
import pytest
import torch
import torch.distributed as dist

from collective_scope import (
    Outcome,
    RenewableGroup,
    SubtestResult,
    Subtests,
    Verdict,
    collective_scope,
    current_scope,
)
from collective_scope._failures import errors_of
from collective_scope._notes import NOT_RUN
from collective_scope._report import LOST_ADVICE
from collective_scope._subtest_result import ExpectedFailure, ends_loop, judge_subtest
from collective_scope._subtests_report import summary, write_junit
from collective_scope.agreement.process import Place, Process
from collective_scope.agreement.records import OK
from collective_scope.agreement.text import type_name
from tests.ranks import RankPool, here, run_ranks, values


@pytest.fixture(scope="module", name="pool")
def _pool() -> Iterator[RankPool]:
    with RankPool(2, init=False, host="parent") as pool:
        yield pool


def _sum_of_ranks() -> float:
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return float(value.item())


@attrs.define
class Seen:
    """A loop as one rank saw it: id, status, reason and error of each subtest; the end; the printed text."""

    results: list[tuple[str, str, str, str]]
    end: str
    members: list[str]
    printed: str
    made: int
    notes: str = ""


def _play(rank: int, world_size: int, name: str, bodies: Mapping[str, Callable[[], Any]], **options: Any) -> Seen:
    """Go through a loop of subtests on a renewable group."""
    store = dist.PrefixStore(name, here().new_store())
    world = RenewableGroup(store=store, rank=rank, world_size=world_size)
    printed = io.StringIO()
    end: BaseException | None = None
    options = {"timeout": 30, "failure_timeout": 30} | options
    subtests = Subtests(world, file=printed, **options)
    try:
        with subtests:
            for id_, body in bodies.items():
                with subtests.test(id_):
                    body()
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        end = error
    world.destroy()
    results = [(r.id, r.status, r.reason, "" if r.error is None else type(r.error).__name__) for r in subtests.results]
    members = [f"{type(e).__name__}: {e}" for e in end.exceptions] if isinstance(end, BaseExceptionGroup) else []
    notes = "\n".join(getattr(end, "__notes__", []))
    return Seen(
        results, "" if end is None else f"{type(end).__name__}: {end}", members, printed.getvalue(), world.made, notes
    )


def _raise(error: BaseException) -> None:
    raise error


def _statuses(seen: Seen) -> dict[str, str]:
    return {id_: status for id_, status, *_ in seen.results}


# Outcome of each


def _mixed(rank: int, world_size: int) -> Seen:
    def one_fails() -> None:
        if rank == 1:
            msg = "before its collectives"
            raise ValueError(msg)
        _sum_of_ranks()

    def all_fail() -> None:
        msg = f"on rank {rank}"
        raise AssertionError(msg)

    bodies = {
        "good": _sum_of_ranks,
        "one fails": one_fails,
        "after it": _sum_of_ranks,
        "all fail": all_fail,
        "all skip": lambda: _raise(unittest.SkipTest("needs 8 ranks")),
        "one skips": lambda: _raise(unittest.SkipTest("mine")) if rank == 1 else _sum_of_ranks(),
        "expected": lambda: _raise(ExpectedFailure("issue 12")),
        "last": _sum_of_ranks,
    }
    return _play(rank, world_size, "mixed", bodies, rerun="run-one {id}")


def test_subtests_of_every_kind_end_alike_on_every_rank(pool: RankPool) -> None:
    """A failure or a skip of one rank fails the subtest on all; the ones after it pass."""
    first, second = values(pool.run(_mixed, timeout=60.0))

    assert [row[:3] for row in first.results] == [row[:3] for row in second.results]
    assert {
        "good": "passed",
        "one fails": "failed",
        "after it": "passed",
        "all fail": "failed",
        "all skip": "skipped",
        "one skips": "failed",
        "expected": "xfailed",
        "last": "passed",
    } == _statuses(first)
    reasons = {id_: reason for id_, _, reason, _ in first.results if reason}
    assert {"all skip": "needs 8 ranks", "one skips": "only rank 1 skipped it", "expected": "issue 12"} == reasons


def test_subtests_that_failed_end_in_a_group_of_what_each_rank_raised(pool: RankPool) -> None:
    """Each rank's own exceptions are in it, in the order of the subtests."""
    first, second = values(pool.run(_mixed, timeout=60.0))

    assert first.end.startswith("ExceptionGroup: 3 of 8 subtests failed")
    assert second.end.startswith("ExceptionGroup: 3 of 8 subtests failed")
    assert "ValueError: before its collectives" == second.members[0]
    assert first.members[0].startswith("RuntimeError: "), "what gloo raised when the group was revoked"
    assert "AssertionError: on rank 0" == first.members[1]
    assert "AssertionError: on rank 1" == second.members[1]


def test_subtests_at_the_end_say_each_cause_first_and_only_on_rank_0(pool: RankPool) -> None:
    """The cause, the line of the body, the command that runs it again; then the counts."""
    first, second = values(pool.run(_mixed, timeout=60.0))

    assert "" == second.printed
    lines = first.printed.splitlines()
    assert ".F.FsFx." == lines[0]
    at = lines.index("FAILED one fails")
    assert "  rank 1, body: ValueError: before its collectives" == lines[at + 1]
    assert lines[at + 2].strip().startswith(__file__), lines[at + 2]
    assert "  again: run-one one fails" in lines[at:]
    assert "FAILED one skips: only rank 1 skipped it" in lines
    assert lines[-1].startswith("3 passed, 3 failed, 1 skipped, 1 xfailed in "), lines[-1]
    assert any(line.startswith("slowest: ") for line in lines)


# Ends


def _ended_by(rank: int, world_size: int, error: type[BaseException]) -> Seen:
    bodies = {
        "good": _sum_of_ranks,
        "ended": lambda: _raise(error("enough")) if rank == 0 else _sum_of_ranks(),
        "never": _sum_of_ranks,
    }
    return _play(rank, world_size, f"ended-{error.__name__}", bodies)


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
def test_subtests_when_a_rank_is_interrupted_end_on_all_ranks(error: type[BaseException], pool: RankPool) -> None:
    """An interrupt of one rank ends the loop on all; the rest is not gone through."""
    first, second = values(pool.run(_ended_by, error, timeout=60.0))

    assert {"good": "passed", "ended": "failed"} == _statuses(first) == _statuses(second)
    assert f"{error.__name__}: enough" == first.end
    assert second.end.startswith("RuntimeError: "), "what gloo raised when the group was revoked"
    assert f"{error.__name__}: enough" in second.notes


def _kept(rank: int, world_size: int, kind: str) -> Seen:
    def raises() -> None:
        if rank == 1 and kind == "raises":
            with pytest.raises(ValueError, match="none"):
                pass
        if rank == 1 and kind == "group":
            msg = "two"
            raise BaseExceptionGroup(msg, [asyncio.CancelledError(), ValueError()])
        if kind == "xfail":
            pytest.xfail("known")
        if rank == 1 and kind == "exit":
            sys.exit(3)
        _sum_of_ranks()

    return _play(rank, world_size, f"kept-{kind}", {"a": raises, "b": _sum_of_ranks})


@pytest.mark.parametrize(
    ("kind", "status"), [("raises", "failed"), ("group", "failed"), ("exit", "failed"), ("xfail", "xfailed")]
)
def test_subtests_after_an_error_that_is_no_exception_go_on_on_every_rank(
    kind: str, status: str, pool: RankPool
) -> None:
    """Errors of pytest.raises and pytest.xfail, a group, and an exit are results, and are in the group at the end."""
    first, second = values(pool.run(_kept, kind, timeout=60.0))

    assert {"a": status, "b": "passed"} == _statuses(first) == _statuses(second)
    if status == "failed":
        assert first.end.startswith("ExceptionGroup: 1 of 2 subtests failed"), first.end
        assert second.end.startswith("BaseExceptionGroup: 1 of 2 subtests failed"), second.end
        assert 1 == len(second.members)


def _make_raises(rank: int, world_size: int, name: str) -> Seen:
    error = {"Failed": pytest.fail.Exception, "KeyboardInterrupt": KeyboardInterrupt}[name]

    def make(store: dist.Store) -> None:  # noqa: ARG001  (given to all)
        if rank == 1 or name == "Failed":
            msg = "in make"
            raise error(msg)

    store = dist.PrefixStore(f"make-raises-{name}", here().new_store())
    world = RenewableGroup(make, store=store, rank=rank, world_size=world_size, destroy=int)
    return _run_three(world)


def _run_three(world: Any, **options: Any) -> Seen:
    """Go through three subtests that do nothing."""
    printed, end = io.StringIO(), None
    subtests = Subtests(world, file=printed, **({"timeout": 30, "failure_timeout": 30} | options))
    try:
        with subtests:
            for id_ in "abc":
                subtests.run(id_, int)
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        end = f"{type(error).__name__}: {error}".splitlines()[0]
    results = [(r.id, r.status, r.reason, "" if r.error is None else type(r.error).__name__) for r in subtests.results]
    return Seen(results, end or "", [], printed.getvalue(), 0)


def test_subtests_interrupted_at_an_entry_end_on_all_ranks_with_the_subtest_listed(pool: RankPool) -> None:
    """The rank raises its interrupt, the peer what it was told of it; both list the subtest."""
    first, second = values(pool.run(_make_raises, "KeyboardInterrupt", timeout=60.0))

    assert "KeyboardInterrupt: in make" == second.end
    assert first.end.startswith("PeerFailedError: rank 1 of 2 failed in scope 'a'"), first.end
    assert {"a": "not run"} == _statuses(first) == _statuses(second)
    assert "not run: 1 subtest, because rank 1, making the group: KeyboardInterrupt: in make" in first.printed
    assert "the loop ended with subtest 'a'" in first.printed


def test_subtests_of_which_the_entry_fails_by_pytest_go_on_on_every_rank(pool: RankPool) -> None:
    """An error of pytest that making the group raises is kept as any other."""
    first, second = values(pool.run(_make_raises, "Failed", timeout=60.0))

    assert {"a": "not run", "b": "not run", "c": "not run"} == _statuses(first) == _statuses(second)
    assert second.end.startswith("BaseExceptionGroup: 0 of 3 subtests failed, and 3 did not run")


def _make_skips(rank: int, world_size: int) -> Seen:
    def make(store: dist.Store) -> None:  # noqa: ARG001  (given to all)
        pytest.skip("no device")

    store = dist.PrefixStore("make-skips", here().new_store())
    return _run_three(RenewableGroup(make, store=store, rank=rank, world_size=world_size, destroy=int))


def test_subtests_that_every_rank_skips_at_the_entry_are_skipped(pool: RankPool) -> None:
    """Where all ranks skip while they make the group, nothing has failed."""
    for seen in values(pool.run(_make_skips, timeout=60.0)):
        assert {"a": "skipped", "b": "skipped", "c": "skipped"} == _statuses(seen)
        assert "" == seen.end


@pytest.mark.parametrize(
    ("outcome", "ends"),
    [
        (Outcome("body", "KeyboardInterrupt"), True),
        (Outcome("body", type_name(asyncio.CancelledError())), True),
        (Outcome("body", type_name(pytest.exit.Exception(""))), True),
        (Outcome("body", "ValueError", also=("cleanup 'a': KeyboardInterrupt: 3",)), True),
        (Outcome("body", "ValueError", also=("cleanup 'a': SystemError: 3",)), False),
        (Outcome("body", "concurrent.futures._base.CancelledError"), False),
        (Outcome("body", "Failed"), False),
    ],
    ids=["interrupt", "cancelled", "exit-of-pytest", "later", "later-error", "future", "failed"],
)
def test_subtest_of_which_a_peer_tells_an_interrupt_ends_the_loop(outcome: Outcome, *, ends: bool) -> None:
    """The verdict decides, whatever this rank raised."""
    verdict = Verdict("scope", 2, (0, 1), outcomes={1: outcome})

    assert ends == ends_loop(ValueError(), verdict)


def test_subtest_interrupted_at_the_barrier_ends_the_loop() -> None:
    """Without a verdict nothing is known of the peers: an error that is no Exception ends the loop."""
    assert ends_loop(pytest.fail.Exception("timeout"), None)
    assert not ends_loop(ValueError(), None)


class _Large:
    """An object that a body makes."""


def test_subtests_that_failed_keep_nothing_of_their_bodies() -> None:
    """The frames of the errors that are kept, and of what comes with them, refer to nothing any more."""
    subtests, _ = _subtests()
    kept: list[weakref.ref[_Large]] = []

    def inner() -> None:
        large = _Large()
        kept.append(weakref.ref(large))
        msg = "inner"
        raise ValueError(msg)

    def body() -> None:
        large = _Large()
        kept.append(weakref.ref(large))
        current_scope().cleanup(inner)
        try:
            inner()
        except ValueError as error:
            msg = "outer"
            raise RuntimeError(msg) from error

    with pytest.raises(ExceptionGroup), subtests:
        subtests.run("a", body)
        assert [None] * 3 == [ref() for ref in kept]


def _count_descriptors(rank: int, world_size: int) -> list[int]:
    store = dist.PrefixStore("descriptors", here().new_store())
    world = RenewableGroup(store=store, rank=rank, world_size=world_size, grace=0.0)
    counts: list[int] = []

    def body() -> None:
        if rank == 1:
            msg = "before its collectives"
            raise ValueError(msg)
        group = dist.group.WORLD  # which this frame keeps
        dist.all_reduce(torch.ones(1), group=group)

    with pytest.raises(ExceptionGroup), Subtests(world, file=io.StringIO(), timeout=30) as subtests:
        for number in range(8):
            subtests.run(str(number), body)
            counts.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208  (names, not paths)
    world.destroy()
    return counts


def test_subtests_that_were_revoked_do_not_keep_the_connections_of_their_groups(pool: RankPool) -> None:
    """However many subtests fail, a process has the descriptors of one group, or two."""
    for counts in values(pool.run(_count_descriptors, timeout=60.0)):
        assert counts[-1] <= counts[1] + 2, counts


def _skip_early(rank: int, world_size: int) -> tuple[Seen, list[str]]:
    ran: list[str] = []

    def fails() -> None:
        ran.append("a")
        msg = "wrong"
        raise ValueError(msg)

    bodies: dict[str, Callable[[], Any]] = {"a": fails, "b": lambda: ran.append("b"), "c": lambda: ran.append("c")}
    return _play(rank, world_size, "max-failures", bodies, max_failures=1), ran


def test_subtests_beyond_max_failures_are_not_run(pool: RankPool) -> None:
    """After max_failures no body runs, and the report says why."""
    for seen, ran in values(pool.run(_skip_early, timeout=60.0)):
        assert {"a": "failed", "b": "not run", "c": "not run"} == _statuses(seen)
        assert ["a"] == ran
        assert "1 subtest has failed, and max_failures=1" == seen.results[1][2]
    assert (
        "not run: 2 subtests, because 1 subtest has failed" in values(pool.run(_skip_early, timeout=60.0))[0][0].printed
    )


def _fail_after_the_barrier(rank: int, world_size: int) -> Seen:
    def body() -> None:
        if rank == 0:
            current_scope().after_barrier(_raise, ValueError("after the barrier"))

    return _play(rank, world_size, "after", {"a": body, "b": _sum_of_ranks, "c": _sum_of_ranks}, max_failures=1)


def test_subtests_with_an_error_after_the_barrier_go_on_on_every_rank(pool: RankPool) -> None:
    """No peer knows of it, so it does not count against max_failures; its rank raises it at the end."""
    first, second = values(pool.run(_fail_after_the_barrier, timeout=60.0))

    assert {"a": "failed", "b": "passed", "c": "passed"} == _statuses(first)
    assert {"a": "passed", "b": "passed", "c": "passed"} == _statuses(second)
    assert ["ValueError: after the barrier"] == first.members


def _destroy_in_a_body(_rank: int, _world_size: int, folder: str) -> tuple[list[str], list[str], str]:
    printed = io.StringIO()
    subtests = Subtests(dist.group.WORLD, file=printed, timeout=30)
    with pytest.raises(ExceptionGroup) as caught, subtests:
        subtests.run("a", _raise, AssertionError("the failure"))
        subtests.run("b", dist.destroy_process_group)
        subtests.run("c", int)
    subtests.write_junit(f"{folder}/junit.xml")
    statuses = [result.status for result in subtests.results]
    return statuses, [f"{type(e).__name__}: {e}" for e in caught.value.exceptions], printed.getvalue()


def test_subtests_of_which_a_body_destroys_the_group_end_with_what_failed(tmp_path: Path) -> None:
    """Neither the summary nor the file needs the group; rank 0 is still rank 0."""
    with RankPool(2, host="parent") as pool:
        first, second = values(pool.run(_destroy_in_a_body, str(tmp_path), timeout=60.0))

    for statuses, members, _ in (first, second):
        assert ["failed", "passed", "not run"] == statuses
        assert "AssertionError: the failure" == members[0]
        assert members[1].startswith("ValueError: group was destroyed")
    assert "1 passed, 1 failed, 1 not run" in first[2]
    assert "" == second[2]
    assert 3 == len(ET.parse(tmp_path / "junit.xml").getroot()[0])  # noqa: S314  (our own file)


def _over_budget(rank: int, _world_size: int) -> tuple[Seen, list[str], float]:
    ran: list[str] = []
    late = dist.PrefixStore("late", here().new_store())

    def one_is_late() -> None:
        ran.append("a")
        if rank == 1:
            late.wait(["come"])  # comes when the other has given up

    def others() -> None:
        ran.append("b")

    printed = io.StringIO()
    subtests = Subtests(budget=0.2, file=printed, timeout=2, failure_timeout=2)
    end = ""
    try:
        with subtests:
            for id_, body in (("a", one_is_late), ("b", others), ("c", others)):
                with subtests.test(id_):
                    body()
                late.set("come", "")
    except ExceptionGroup as group:
        end = str(group)
    results = [(r.id, r.status, r.reason, "" if r.error is None else type(r.error).__name__) for r in subtests.results]
    return Seen(results, end, [], printed.getvalue(), 0), ran, subtests.results[0].waited


def test_subtests_that_have_waited_longer_than_their_budget_are_not_run() -> None:
    """Once the ranks have waited for longer than the budget, no body runs."""
    with RankPool(2, host="parent") as pool:
        seen = values(pool.run(_over_budget, timeout=60.0))

    for each, ran, waited in seen:
        assert {"a": "failed", "b": "not run", "c": "not run"} == _statuses(each), each
        assert waited >= 1
        assert ["a"] == ran
        assert "more than budget=0 s" in each.results[1][2]
    assert f"waited for: rank 1 {seen[0][2]:.0f} s\n" in seen[0][0].printed


def _go_on_with_a_dead_group(rank: int, _world_size: int) -> tuple[dict[str, str], str, list[tuple[str, bool]]]:
    group = dist.new_group(timeout=timedelta(seconds=4))
    logged: list[tuple[str, bool]] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append((record.getMessage(), bool(record.exc_info)))  # type: ignore[method-assign]  # replaced on purpose
    logging.getLogger("collective_scope").addHandler(handler)

    def body(*, fails: bool) -> None:
        if fails:
            msg = "before its collectives"
            raise ValueError(msg)
        dist.all_reduce(torch.ones(1), group=group)

    subtests = Subtests(group, file=io.StringIO(), timeout=30, failure_timeout=30)
    try:
        with pytest.raises(ExceptionGroup), subtests:
            for id_ in ("a", "b", "c", "d"):
                subtests.run(id_, body, fails=id_ == "a" and rank == 1)
        with pytest.raises(RuntimeError), collective_scope(group, name="later"):
            body(fails=False)
    finally:
        logging.getLogger("collective_scope").removeHandler(handler)
    return {r.id: r.status for r in subtests.results}, subtests.results[-1].reason, logged


def test_subtests_on_a_group_that_is_dead_are_not_run() -> None:
    """After a timeout gloo never works again: that is said in full once, then in a line, and the rest is not run."""
    with RankPool(2, host="parent") as pool:
        seen = values(pool.run(_go_on_with_a_dead_group, timeout=60.0))

    for statuses, reason, logged in seen:
        assert {"a": "failed", "b": "failed", "c": "not run", "d": "not run"} == statuses
        assert "the group was dead when subtest 'b' came to use it, and cannot be renewed" == reason
        (line, is_in_full) = logged[-1]
        assert "failed in scope 'later', body; its peers are told: its group is dead since scope '" in line
        assert not is_in_full
        assert sum("is dead since" not in line and is_in_full for line, is_in_full in logged) <= 2


# On one rank


def _subtests(**options: Any) -> tuple[Subtests, io.StringIO]:
    printed = io.StringIO()
    return Subtests(file=printed, **options), printed


def test_subtests_without_torch_distributed_go_on_after_a_failure() -> None:
    """One process without a group has the same loop, and a line for each subtest if verbose."""
    subtests, printed = _subtests(verbose=True)

    with pytest.raises(ExceptionGroup) as caught, subtests:
        with subtests.test("a"):
            msg = "wrong"
            raise ValueError(msg)
        with subtests.test("b"):
            pass

    assert [ValueError] == [type(error) for error in caught.value.exceptions]
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("a FAILED ")
    assert lines[1].startswith("b PASSED ")


def test_subtests_all_passed_raise_nothing() -> None:
    """A loop in which all passed ends quietly, with a count."""
    subtests, printed = _subtests()

    with subtests:
        result = subtests.run("a", divmod, 7, 2)

    assert ("a", "passed", None) == (result.id, result.status, result.error)
    assert printed.getvalue().splitlines()[-1].startswith("1 passed in ")


def test_subtests_of_nothing_say_so() -> None:
    """A selection that selects nothing is not taken for success in silence."""
    subtests, printed = _subtests()

    with subtests:
        pass

    assert printed.getvalue().startswith("no subtests in ")


def test_subtests_left_by_an_error_of_the_loop_let_it_through() -> None:
    """An error outside of any subtest is not hidden by the failures before it."""
    subtests, _ = _subtests()

    with pytest.raises(ZeroDivisionError), subtests:
        with subtests.test("a"):
            msg = "wrong"
            raise ValueError(msg)
        _raise(ZeroDivisionError())


def test_subtest_has_the_scope_of_its_body() -> None:
    """The body finds its scope, registers cleanups, and they run; afterwards there is none."""
    subtests, _ = _subtests()
    ran: list[str] = []

    with subtests, subtests.test("a") as subtest:
        assert current_scope() is subtest.scope
        subtest.scope.cleanup(ran.append, "cleanup")

    assert ["cleanup"] == ran
    with pytest.raises(RuntimeError, match="subtest 'a' is not running"):
        _ = subtest.scope


def test_subtest_that_is_not_run_leaves_the_tracer_of_a_debugger_alone() -> None:
    """A body is skipped without a trace in ``sys.settrace``."""
    subtests, _ = _subtests(max_failures=1)

    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with pytest.raises(ExceptionGroup), subtests:
            for _number in range(3):
                with subtests.test("a"):
                    _raise(ValueError())
        after = sys.gettrace()
    finally:
        sys.settrace(before)

    assert tracer is after


def _by_exit_stack(subtests: Subtests) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(subtests.test("b"))
        pytest.fail("the body has run")


def _by_context_manager(subtests: Subtests) -> None:
    @contextlib.contextmanager
    def case() -> Iterator[None]:
        with subtests.test("b"):
            yield

    with case():
        pytest.fail("the body has run")


class _Case:
    """A context manager that enters a subtest in its own."""

    def __init__(self, subtests: Subtests) -> None:
        self._subtest = subtests.test("b")

    def __enter__(self) -> None:
        self._subtest.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        return self._subtest.__exit__(kind, error, tb)


def _by_class(subtests: Subtests) -> None:
    with _Case(subtests):
        pytest.fail("the body has run")


@pytest.mark.parametrize("enter", [_by_exit_stack, _by_context_manager, _by_class])
def test_subtest_refused_where_no_block_can_be_left_out_says_what_to_use(enter: Callable[[Subtests], None]) -> None:
    """The error is public, names the reason, and leaves no tracer behind; the subtest is in the results."""
    subtests, printed = _subtests(max_failures=1)
    before = sys.gettrace()

    with pytest.raises(RuntimeError) as caught, subtests:
        subtests.run("a", _raise, ValueError())
        enter(subtests)

    assert before is sys.gettrace()
    assert "subtest 'b' does not run (1 subtest has failed, and max_failures=1)" in str(caught.value)
    assert "use subtests.run(id, fn)" in str(caught.value)
    assert ["failed", "not run"] == [result.status for result in subtests.results]
    assert "1 failed, 1 not run" in printed.getvalue()


@pytest.mark.parametrize("enter", [_by_exit_stack, _by_context_manager, _by_class])
def test_subtest_that_is_not_refused_runs_by_whatever_it_is_entered(enter: Callable[[Subtests], None]) -> None:
    """Only a block that is left out needs a plain with statement."""
    subtests, _ = _subtests()

    with pytest.raises(BaseExceptionGroup) as caught, subtests:
        enter(subtests)

    assert ["the body has run"] == [str(error) for error in caught.value.exceptions]


def test_subtest_refused_among_other_context_managers_leaves_its_block_out() -> None:
    """A with statement of several, in a function that is traced, enters none of those that follow."""
    subtests, _ = _subtests(max_failures=1)
    ran: list[str] = []

    with pytest.raises(ExceptionGroup), subtests:
        subtests.run("a", _raise, ValueError())
        frame = sys._getframe()  # noqa: SLF001  (documented)
        before = frame.f_trace, frame.f_trace_opcodes
        with contextlib.nullcontext(), subtests.test("b") as _, _Case(subtests):
            ran.append("b")
        assert before == (frame.f_trace, frame.f_trace_opcodes)

    assert [] == ran


def test_subtests_skip_and_xfail_end_the_body() -> None:
    """Both end the body with their status and reason."""
    subtests, _ = _subtests()

    with subtests:
        with subtests.test("a"):
            subtests.skip("no device")
        with subtests.test("b"):
            subtests.xfail("known")

    assert [("skipped", "no device"), ("xfailed", "known")] == [(r.status, r.reason) for r in subtests.results]


def test_subtest_skipped_for_a_reason_that_reads_like_a_dead_group_lets_the_next_one_run() -> None:
    """A closed connection is what a skip speaks of, not what became of the group."""
    with Subtests(file=io.StringIO()) as subtests:
        with subtests.test("a"):
            subtests.skip("no peer: [gloo/transport/tcp/pair.cc:544] Connection closed by peer")
        with subtests.test("b"):
            pass

    assert ["skipped", "passed"] == [result.status for result in subtests.results]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0}, r"budget must be positive seconds \(got 0\)"),
        ({"budget": "300"}, r"budget must be seconds as a number \(got '300'\)"),
        ({"budget": timedelta(1)}, r"budget must be seconds as a number \(got datetime.timedelta\(days=1\)\)"),
        ({"max_failures": 1.5}, r"max_failures must be a whole number or None \(got 1.5\)"),
        ({"max_failures": True}, r"max_failures must be a whole number or None \(got True\)"),
        ({"max_failures": 0}, r"max_failures must be at least 1 \(got 0\)"),
        (
            {"rerun": "run {x} {id}"},
            r"rerun must be a text in which \{id\} is the only field \(got 'run \{x\} \{id\}'\)",
        ),
        ({"rerun": "awk '{print}"}, "rerun must be a text in which"),
        ({"timeout": -1}, r"timeout must be positive and finite \(got -1\)"),
        ({"patience": 1}, "unexpected keyword argument 'patience'"),
        ({"name": "x"}, "multiple values for keyword argument 'name'"),
        ({"rerun": "run {"}, "rerun must be a text in which"),
        ({"rerun": "run {}"}, "rerun must be a text in which"),
    ],
    ids=[
        "budget",
        "text",
        "timedelta",
        "half",
        "yes",
        "max_failures",
        "two-fields",
        "braces",
        "of-a-scope",
        "unknown",
        "given-already",
        "half-a-field",
        "no-name",
    ],
)
def test_subtests_with_a_wrong_option_say_the_rule_and_the_value(options: dict[str, Any], told: str) -> None:
    """A wrong option is refused before anything runs."""
    with pytest.raises((TypeError, ValueError), match=told):
        Subtests(**options)


# Where it is printed


def _fail_in_one(file: TextIO | None, **options: Any) -> list[str]:
    """Go through a loop in which one subtest fails; return the errors in the group at its end."""
    with pytest.raises(ExceptionGroup) as caught, Subtests(file=file, **options) as subtests:
        subtests.run("größe \udcff", int, "no number \ud800")
        subtests.run("b", int)
    return [type(error).__name__ for error in caught.value.exceptions]


class _Broken(io.StringIO):
    """A pipe that nobody reads, or a terminal that is gone."""

    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, _text: str) -> NoReturn:
        raise BrokenPipeError

    def flush(self) -> NoReturn:
        raise BrokenPipeError


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "utf-16"])
def test_subtests_with_characters_that_the_output_lacks_escape_them(encoding: str, *, verbose: bool) -> None:
    """Neither an ASCII log nor half of a surrogate pair ends the loop or hides what failed."""
    raw = io.BytesIO()

    assert ["ValueError"] == _fail_in_one(io.TextIOWrapper(raw, encoding), verbose=verbose)

    text, name = raw.getvalue().decode(encoding), "gr\\xf6\\xdfe" if encoding == "ascii" else "größe"
    assert f"FAILED {name} \\udcff\n" in text
    assert "1 passed, 1 failed" in text


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_subtests_of_which_nobody_reads_the_output_go_on_without(
    monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, verbose: bool
) -> None:
    """A broken pipe costs the output, not the loop."""
    monkeypatch.setattr(_Broken, "is_terminal", is_terminal)

    assert ["ValueError"] == _fail_in_one(_Broken(), verbose=verbose)


def test_subtests_with_a_closed_output_or_none_go_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have no standard output, or have closed it."""
    closed = io.StringIO()
    closed.close()
    assert ["ValueError"] == _fail_in_one(closed)
    monkeypatch.setattr(sys, "stdout", None)
    assert ["ValueError"] == _fail_in_one(None)


# Judgements


def _verdict(outcomes: Mapping[int, Outcome], world_size: int = 2, missing: tuple[int, ...] = ()) -> Verdict:
    arrived = tuple(rank for rank in range(world_size) if rank not in missing)
    return Verdict("scope", world_size, arrived, outcomes=dict(outcomes), missing=missing)


FAILED = Outcome("body", "ValueError", "wrong", order=2)
SKIPPED = Outcome("body", "unittest.case.SkipTest", "no device", order=3)
XFAILED = Outcome("body", type_name(pytest.xfail.Exception("")), "no device", order=4)


@pytest.mark.parametrize(
    ("outcomes", "status", "reason"),
    [
        ({0: FAILED, 1: SKIPPED}, "failed", ""),
        ({1: FAILED, 0: attrs.evolve(SKIPPED, order=1)}, "failed", "only rank 0 skipped it"),
        ({0: SKIPPED, 1: SKIPPED}, "skipped", "no device"),
        ({0: SKIPPED}, "failed", "only rank 0 skipped it"),
        ({0: XFAILED, 1: XFAILED}, "xfailed", "no device"),
        ({0: XFAILED}, "failed", "only rank 0 let it fail as expected"),
    ],
    ids=["failed-first", "skipped-first", "all-skip", "one-skips", "all-xfail", "one-xfails"],
)
def test_subtest_judged_by_all_ranks_fails_unless_all_agree(
    outcomes: dict[int, Outcome], status: str, reason: str
) -> None:
    """The verdict decides: the same status and reason on every rank, whatever the rank itself raised."""
    error = unittest.SkipTest("no device")

    assert (status, reason) == judge_subtest(error, _verdict(outcomes))


def test_summary_of_a_subtest_that_lost_a_rank_names_that_first() -> None:
    """A rank that is gone has told nothing, and is the cause of what the others raise."""
    outcome = Outcome("body", "RuntimeError", "Connection closed by peer", order=1)
    verdict = Verdict("scope", 3, (0,), outcomes={0: outcome}, missing=(2,), lost=(1,))
    result = SubtestResult("a", "failed", verdict=verdict)

    lines = summary([result], 1.0, "").splitlines()

    assert ["FAILED a", "  rank 1 is gone"] == lines[:2]
    assert "  rank 0, body: RuntimeError: Connection closed by peer (a consequence)" == lines[2]
    assert "  rank 2 did not come" == lines[3]
    assert (0, outcome) == result.cause


def test_summary_of_a_subtest_whose_error_is_what_the_verdict_says_has_it_once() -> None:
    """A rank that waited in vain raises what every rank can tell from the verdict."""
    verdict = _verdict({1: OK}, missing=(0,))
    (error,) = errors_of(verdict, 1)

    text = summary([SubtestResult("a", "failed", error=error, verdict=verdict)], 1.0, "")

    assert 1 == text.count("rank 0 of 2 missing")


def test_summary_of_a_subtest_in_which_kill_after_ended_ranks_has_the_line_of_each() -> None:
    """Each of these ranks was somewhere, and none of them is known to be the cause."""
    frames = '  File "/suite/body.py", line {}, in test\n    work()\n'
    outcomes = {
        rank: Outcome("kill_after", "TimeoutError", "not left within 6.0 s", frames.format(11 + rank), order=rank + 1)
        for rank in range(2)
    }
    result = SubtestResult("a", "failed", verdict=Verdict("a", 3, (2,), outcomes={**outcomes, 2: OK}, lost=(0, 1)))

    lines = summary([result], 1.0, "").splitlines()

    assert ["    /suite/body.py:11", "    /suite/body.py:12"] == [line for line in lines if "body.py" in line]


def test_summary_of_subtests_that_ranks_came_to_apart_says_once_at_which_they_are() -> None:
    """A rank that left one subtest out is apart from then on; the first subtest says how that began."""
    results = [
        SubtestResult(id_, "not run", "ranks arrived at different scopes", verdict=verdict)
        for id_, verdict in (
            ("a", attrs.evolve(_verdict({0: OK, 1: OK}), names={0: "a", 1: "b"})),
            ("b", attrs.evolve(_verdict({0: OK, 1: OK}), names={0: "b", 1: "c"})),
        )
    ]

    assert summary(results, 1.0, "").splitlines()[:3] == [
        "not run: 2 subtests, because ranks arrived at different scopes",
        "  ranks:    0 (scope 'a')",
        "            1 (scope 'b')",
    ]


def test_summary_on_a_rank_that_its_peers_gave_up_on_says_where_it_was() -> None:
    """Its own error came of that, and names neither rank nor line."""
    place = Place(Process("node", 7), phase="in the body of scope 'scope'", frames='  File "body.py", line 12\n')
    verdict = attrs.evolve(_verdict({1: OK}, missing=(0,)), where={0: place})
    error = RuntimeError("Connection closed by peer")

    text = summary([SubtestResult("a", "failed", error=error, verdict=verdict)], 1.0, "")

    assert text.startswith("FAILED a\n  rank 0 of 2 missing at the exit of scope 'scope'\n")
    assert 'File "body.py", line 12' in text
    assert "\n  RuntimeError: Connection closed by peer\n" in text


# Files


def _write_files(rank: int, world_size: int, folder: str) -> list[str]:
    store = dist.PrefixStore(f"files-{Path(folder).name}", here().new_store())
    world = RenewableGroup(store=store, rank=rank, world_size=world_size)
    subtests = Subtests(world, file=io.StringIO(), timeout=30)
    with pytest.raises(ExceptionGroup), subtests:
        for number in range(4):
            with subtests.test(f"subtest-{number}") as subtest:
                subtest.scope.cleanup(int)
                if number == 1 and rank == 1:
                    msg = "a <tag> & \x00 a zero"
                    raise ValueError(msg)
                if number == 2:
                    subtests.skip("no device")
                _sum_of_ranks()
    subtests.write_junit(f"{folder}/junit.xml")
    subtests.write_trace(f"{folder}/trace.json")
    world.destroy()
    return [type(result.error).__name__ for result in subtests.results if result.error is not None]


def test_subtests_write_what_ci_servers_and_perfetto_read(pool: RankPool, tmp_path: Path) -> None:
    """JUnit XML has each subtest with its cause; the trace has a track for each rank."""
    values(pool.run(_write_files, str(tmp_path), timeout=60.0))

    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]  # noqa: S314  (our own file)
    assert {"tests": "4", "failures": "1", "skipped": "1", "errors": "0"}.items() <= suite.attrib.items()
    failure = suite[1].find("failure")
    assert failure is not None
    assert "rank 1, body: ValueError: a <tag> & " in failure.attrib["message"]
    assert "Traceback" in (failure.text or "")

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"rank 0", "rank 1"} == names
    happened = {(event["name"], event["pid"]) for event in events if event["ph"] == "i"}
    assert {("subtest-1: failed", 1), ("subtest-1: failed", 0)} <= happened
    assert {("subtest-1: revoked", 1), ("subtest-1: revoked", 0)} <= happened
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in slices)
    for rank in (0, 1):
        mine = [event for event in slices if event["pid"] == rank]
        assert [f"subtest-{number}" for number in range(4)] == [e["name"] for e in mine if e["cat"] == "body"]
        assert {"body", "waiting", "cleanup", "renewal"} <= {event["cat"] for event in mine}


def test_junit_of_subtests_of_which_none_failed_and_some_did_not_run_is_not_green(tmp_path: Path) -> None:
    """A rank that is lost between two subtests fails none of them; those that read failures and errors must see it."""
    passed, lost = SubtestResult("a", "passed"), [SubtestResult(id_, "not run", "rank 1 is gone") for id_ in "bc"]
    write_junit([passed, *lost], str(tmp_path / "junit.xml"), "suite")

    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]  # noqa: S314  (our own file)
    assert {"failures": "0", "errors": "1", "skipped": "1"}.items() <= suite.attrib.items()
    error = suite[1].find("error")
    assert error is not None
    assert "not run: rank 1 is gone" == error.attrib["message"]


def test_junit_of_names_that_xml_cannot_say_can_be_read(tmp_path: Path) -> None:
    """Characters that XML cannot hold are left out, also of the names of a suite and of a subtest."""
    write_junit([SubtestResult("a\x00b\ud800 <&>")], str(tmp_path / "junit.xml"), "suite\x1b")

    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]  # noqa: S314  (our own file)
    assert ("suite", "ab <&>") == (suite.attrib["name"], suite[0].attrib["name"])


def test_summary_names_cleanups_that_did_not_run() -> None:
    """A collective cleanup that a revocation has cost is in the summary, as on the exception."""
    error = ValueError("no")
    error.add_note(f"{NOT_RUN}cleanup 'free' (registered at a.py:1).")
    outcome = Outcome("body", "ValueError", "no", order=1)
    result = SubtestResult("a", "failed", error=error, verdict=Verdict("scope", 2, (0, 1), outcomes={0: outcome}))

    assert f"  {NOT_RUN}cleanup 'free' (registered at a.py:1)." in summary([result], 1.0, "").splitlines()


def test_subtests_on_one_rank_write_a_trace_without_a_store(tmp_path: Path) -> None:
    """A trace needs no peers."""
    subtests, _ = _subtests()
    with subtests, subtests.test("a"):
        pass

    subtests.write_trace(str(tmp_path / "trace.json"))

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert ["a"] == [event["name"] for event in events if event.get("cat") == "body"]


def test_subtest_refused_by_every_rank_tells_why(pool: RankPool) -> None:
    """If the group cannot be made on one rank, the subtest is not run on any; the next one tries again."""
    for seen in values(pool.run(_make_fails, timeout=60.0)):
        assert ["not run", "passed"] == [status for _, status, *_ in seen.results]
        assert "rank 1, making the group: OSError: cannot be made" == seen.results[0][2]


def _make_fails(rank: int, world_size: int) -> Seen:
    tries: list[int] = []

    def make(store: dist.Store) -> None:
        tries.append(rank)
        if len(tries) == 1 and rank == 1:
            msg = "cannot be made"
            raise OSError(msg)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    def destroy() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    store = dist.PrefixStore("make-fails", here().new_store())
    world = RenewableGroup(make, store=store, rank=rank, world_size=world_size, destroy=destroy)
    subtests = Subtests(world, file=io.StringIO(), timeout=30, failure_timeout=30)
    with pytest.raises(ExceptionGroup), subtests:
        for id_ in ("a", "b"):
            subtests.run(id_, _sum_of_ranks)
    world.destroy()
    results = [(r.id, r.status, r.reason, "" if r.error is None else type(r.error).__name__) for r in subtests.results]
    return Seen(results, "", [], "", world.made)


def test_summary_shows_the_line_that_raised_and_not_one_of_a_note() -> None:
    """A note may quote the stack of another rank, further from the left."""
    traceback = (
        'Traceback (most recent call last):\n  File "/suite/body.py", line 11, in body\n    fail()\n'
        'ValueError: no\nIn addition: a rank is missing\n                 File "/suite/body.py", line 12, in body\n'
    )
    outcome = Outcome("body", "ValueError", "no", traceback, order=1)
    result = SubtestResult("a", "failed", verdict=Verdict("scope", 1, (0,), outcomes={0: outcome}))

    assert "    /suite/body.py:11" in summary([result], 1.0, "").splitlines()


def _end_in(rank: int, world_size: int) -> tuple[str, str]:
    world = RenewableGroup(store=dist.PrefixStore("end", here().new_store()), rank=rank, world_size=world_size)
    printed, end = io.StringIO(), ""
    try:
        with Subtests(world, file=printed, timeout=30) as subtests:
            for name in "abc":
                with subtests.test(name):
                    if name == "b" and rank == 1:
                        _raise(KeyboardInterrupt())
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        end = type(error).__name__
    world.destroy()
    return end, printed.getvalue()


def _leave_one_out(rank: int, world_size: int) -> tuple[list[str], list[str], str]:
    world = RenewableGroup(store=dist.PrefixStore("one out", here().new_store()), rank=rank, world_size=world_size)
    printed = io.StringIO()
    subtests = Subtests(world, file=printed, timeout=30)
    with pytest.raises(ExceptionGroup), subtests:
        for name in "abc" if rank == 0 else "acd":  # as many on each, so that none waits at the end
            subtests.run(name, int)
            if (rank, name) == (0, "b"):
                here().announce("rank 0 has seen where rank 1 is")
            elif (rank, name) == (1, "c"):
                here().wait_for("rank 0 has seen where rank 1 is")
    world.destroy()
    phases = [phase for _, phase in subtests.results[0].history]
    return [result.status for result in subtests.results], phases, printed.getvalue()


def test_subtests_of_which_one_rank_leaves_one_out_are_refused_from_then_on(pool: RankPool) -> None:
    """The ranks stay apart; the report says where. A rank that meets the others when the group is made is at the entry."""
    (first, phases, printed), (second, _, _) = values(pool.run(_leave_one_out, timeout=60.0))

    assert ["passed", "not run", "not run"] == first == second
    assert "  ranks:    0 (scope 'b')\n            1 (scope 'c')\n" in printed
    assert [
        "at the entry of",
        "in making the group of",
        "at the entry of",
        "in the body of",
        "at the barrier of",
    ] == phases


def _send_more_than_is_received(rank: int, world_size: int) -> tuple[str, str]:
    world = RenewableGroup(store=dist.PrefixStore("shapes", here().new_store()), rank=rank, world_size=world_size)
    printed = io.StringIO()
    with pytest.raises(ExceptionGroup), Subtests(world, file=printed, timeout=30, failure_timeout=30) as subtests:
        with subtests.test("shapes"):
            if rank == 0:
                dist.send(torch.ones(32), 1)
            else:
                dist.recv(torch.ones(16), 0)
        subtests.run("next", int)
    return subtests.results[1].status, printed.getvalue()


def test_subtests_of_which_gloo_aborts_a_rank_point_to_its_stderr_and_refuse_the_rest() -> None:
    """A rank whose shape differs ends without a word to its peers; gloo has said why on the rank's own stderr."""
    first, second = run_ranks(
        2, _send_more_than_is_received, init=False, host="parent", expect_exit={1: -signal.SIGABRT}
    )

    status, printed = first.unwrap()
    assert "not run" == status
    assert "lost:     1" in printed
    assert LOST_ADVICE.splitlines()[0] in printed
    assert "gloo" in second.stderr


def test_subtests_that_an_interrupt_ends_early_say_that_the_rest_has_not_run(pool: RankPool) -> None:
    """An interrupt on one rank ends the loop on all; the count does not look like that of a whole loop."""
    (first, printed), (second, _) = values(pool.run(_end_in, timeout=60.0))

    assert ("PeerFailedError", "KeyboardInterrupt") == (first, second)
    assert "the loop ended with subtest 'b': later subtests have not run, and are not counted" in printed


def _fail_within(rank: int, world_size: int) -> str:
    world = RenewableGroup(store=dist.PrefixStore("within", here().new_store()), rank=rank, world_size=world_size)
    printed = io.StringIO()
    try:
        with Subtests(world, file=printed, timeout=30) as subtests, subtests.test("a"), collective_scope(name="within"):
            if rank == 1:
                msg = "true cause"
                raise ValueError(msg)
    except ExceptionGroup:
        pass
    world.destroy()
    return printed.getvalue()


def test_subtests_with_a_scope_that_fails_within_show_its_cause_first(pool: RankPool) -> None:
    """Whichever rank leaves the inner scope first, the error of the rank that failed is at the top."""
    printed, _ = values(pool.run(_fail_within, timeout=60.0))

    assert "FAILED a\n  rank 1, body: ValueError: true cause" in printed


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        """As a terminal says."""
        return True


def _three_on_a_terminal() -> str:
    printed = _Terminal()
    with Subtests(file=printed) as subtests:
        for number in range(3):
            with subtests.test(f"number {number}"):
                pass
    return printed.getvalue()


def test_subtests_on_a_terminal_have_a_bar_of_tqdm() -> None:
    """Where tqdm is installed, its bar counts the subtests and shows which was the last."""
    printed = _three_on_a_terminal()

    assert "3subtest" in printed
    assert "number 2" in printed
    assert "3 passed" in printed.splitlines()[-1]


def test_subtests_on_a_terminal_without_tqdm_have_a_character_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but torch and attrs is needed."""
    monkeypatch.setitem(sys.modules, "tqdm", None)

    assert "...\n3 passed" in _three_on_a_terminal()

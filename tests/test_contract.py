"""
The contract, cell by cell, over real processes.

A cell says what goes wrong in one scope: in the body, in local cleanups, with the
collective one, and on which ranks. The view each rank must have is derived by a small
oracle written from the contract, not from the code; a dozen cells are spelled out by
hand, and hold the oracle to account as well.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import attrs
import pytest

from collective_scope import (
    CleanupMismatchError,
    CollectiveScope,
    CollectiveScopeError,
    PeerFailedError,
    Verdict,
    collective_scope,
)
from tests.ranks import RankPool, values


Who = Literal["nobody", "first", "last", "all"]

# A bug shows as a wrong answer; only a hang would get near these.
_SCOPE_TIMEOUT_S = 15.0
_CELL_TIMEOUT_S = 40.0

_BODY_ERRORS: dict[str, type[BaseException]] = {
    "raises": ValueError,
    "skips": pytest.skip.Exception,
    "exits": SystemExit,
    "interrupts": KeyboardInterrupt,
}


@attrs.frozen
class Cell:
    """
    The failures in one scope.

    The scope registers, in this order, the local cleanup ``first``, the collective
    cleanup ``destroy``, and the local cleanups ``second`` and ``third``.

    Attributes:
        body: How the body ends on the ranks of *body_on*.

        body_on: Those ranks.

        local: Whether no local cleanup raises on the ranks of *local_on*, or ``second``
            does, or ``third`` and ``first`` do.

        local_on: Those ranks.

        collective: Whether there is no collective cleanup, or all agree on it, or rank 0
            lacks it, or has another fingerprint, or raises in it.

        world_size: Number of ranks.
    """

    body: Literal["ok", "raises", "skips", "exits", "interrupts"] = "ok"
    body_on: Who = "nobody"
    local: Literal["ok", "one", "two"] = "ok"
    local_on: Who = "nobody"
    collective: Literal["none", "agreed", "missing", "differs", "raises"] = "none"
    world_size: int = 2

    def __str__(self) -> str:
        """Return an id for pytest."""
        body = self.body if self.body == "ok" else f"{self.body}-{self.body_on}"
        local = self.local if self.local == "ok" else f"{self.local}-{self.local_on}"
        return f"{self.world_size}-body:{body}-local:{local}-collective:{self.collective}"


@attrs.frozen
class Seen:
    """
    One scope as one rank sees it.

    Attributes:
        surfaces: Error of the scope, as ``Type: message`` if it is this rank's own, as
            ``Type`` if it is the library's; empty if none.

        ran: Steps, in order.

        members: Its members, if it is an exception group.

        attached: Errors attached to it, as in *surfaces*; of the library's errors only
            those that do not depend on which rank was first.
    """

    surfaces: str
    ran: str
    members: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()


# The oracle


def _ranks(who: Who, world_size: int) -> set[int]:
    return {
        "nobody": set[int](),
        "first": {0},
        "last": {world_size - 1},
        "all": set(range(world_size)),
    }[who]


def _own_errors(cell: Cell, rank: int) -> list[str]:
    """Return what is raised on *rank*, in the order in which it is."""
    body = rank in _ranks(cell.body_on, cell.world_size)
    local = rank in _ranks(cell.local_on, cell.world_size)
    raised = [
        (body, _BODY_ERRORS[cell.body].__name__ if body else "", "body"),
        (local and cell.local == "two", "LookupError", "third"),
        (local and cell.local == "one", "LookupError", "second"),
        (cell.collective == "raises" and rank == 0, "OSError", "destroy"),
        (local and cell.local == "two", "LookupError", "first"),
    ]
    return [f"{kind}: {what} on {rank}" for happens, kind, what in raised if happens]


def _expected(cell: Cell, rank: int) -> Seen:
    """Say what the contract promises to *rank*."""
    own = _own_errors(cell, rank)
    is_disagreed = cell.collective in {"missing", "differs"}
    is_healthy = not any(_own_errors(cell, peer) for peer in range(cell.world_size))
    destroy = ["destroy"] if cell.collective in {"agreed", "raises"} else []
    ran = " ".join(["body", "third", "second", *destroy, "first"])
    ours = ["CleanupMismatchError"] if is_disagreed else []
    if not own:
        surfaces, *rest = [*([] if is_healthy else ["PeerFailedError"]), *ours, ""]
        return Seen(surfaces, ran, attached=tuple(filter(None, rest)))
    if rank in _ranks(cell.body_on, cell.world_size) or len(own) == 1:
        return Seen(own[0], ran, attached=(*own[1:], *ours))
    return Seen("ExceptionGroup", ran, members=tuple(own), attached=tuple(ours))


def _failing(cell: Cell) -> list[int]:
    return [rank for rank in range(cell.world_size) if _own_errors(cell, rank)]


# The subject


@attrs.frozen
class Observed:
    """
    One scope as one rank saw it, and all else that is of interest.

    Attributes:
        seen: Facts of the contract.

        is_own_object: Whether the error that surfaced is the object the body raised.

        has_peers_attached: Whether a `PeerFailedError` is attached to this rank's own.

        failures: Ranks that the raised `PeerFailedError` names.

        notes: Notes of what surfaced.

        attached: All attached errors, as ``(type, message)``.

        verdict: The scope's verdict on all ranks.

        next_verdict: The same, of the scope after it.
    """

    seen: Seen
    is_own_object: bool
    has_peers_attached: bool
    failures: tuple[int, ...]
    notes: tuple[str, ...]
    attached: tuple[tuple[str, str], ...]
    verdict: Verdict | None
    next_verdict: Verdict | None


def _text(error: BaseException) -> str:
    name = type(error).__name__
    return (
        name
        if isinstance(error, CollectiveScopeError | BaseExceptionGroup)
        else f"{_BODY_ERRORS['skips'].__name__ if name == 'Skipped' else name}: {error}"
    )


def _raise(error: BaseException) -> None:
    raise error


def _register(scope: CollectiveScope, cell: Cell, rank: int, ran: list[str]) -> None:
    def local(name: str, *, raises: bool) -> None:
        def run() -> None:
            ran.append(name)
            if raises and rank in _ranks(cell.local_on, cell.world_size):
                msg = f"{name} on {rank}"
                raise LookupError(msg)

        scope.cleanup(run)

    def destroy() -> None:
        ran.append("destroy")
        if cell.collective == "raises" and rank == 0:
            msg = f"destroy on {rank}"
            raise OSError(msg)

    local("first", raises=cell.local == "two")
    if cell.collective not in {"none", "missing"} or (cell.collective == "missing" and rank > 0):
        differs = cell.collective == "differs" and rank == 0
        scope.collective_cleanup(destroy, fingerprint=lambda: 1 if differs else 2)
    local("second", raises=cell.local == "one")
    local("third", raises=cell.local == "two")


def _run_cell(rank: int, world_size: int, cell: Cell) -> Observed:
    ran: list[str] = []
    own = surfaced = None
    if rank in _ranks(cell.body_on, world_size):
        own = _BODY_ERRORS[cell.body](f"body on {rank}")
    scope = collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S, failure_timeout=_SCOPE_TIMEOUT_S)
    try:
        with scope:
            _register(scope, cell, rank, ran)
            ran.append("body")
            if own is not None:
                _raise(own)
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = error
    with collective_scope(name="next", timeout=_SCOPE_TIMEOUT_S) as following:
        pass
    members = surfaced.exceptions if isinstance(surfaced, BaseExceptionGroup) else ()
    attached = getattr(surfaced, "collective_scope_errors", ())
    has_peers_attached = any(isinstance(error, PeerFailedError) for error in attached)
    return Observed(
        Seen(
            "" if surfaced is None else _text(surfaced),
            " ".join(ran),
            tuple(map(_text, members)),
            tuple(_text(error) for error in attached if not isinstance(error, PeerFailedError)),
        ),
        is_own_object=own is not None and surfaced is own,
        has_peers_attached=has_peers_attached,
        failures=tuple(surfaced.failures) if isinstance(surfaced, PeerFailedError) else (),
        notes=tuple(getattr(surfaced, "__notes__", ())),
        attached=tuple((type(error).__name__, str(error)) for error in attached),
        verdict=scope.verdict,
        next_verdict=following.verdict,
    )


@pytest.fixture(name="run")
def _run(rank_pools: Callable[[int], RankPool]) -> Callable[..., list[Any]]:
    """Return a way to run a function on all ranks; after a failure, the next one gets fresh ones."""

    def run(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        return values(rank_pools(world_size).run(fn, *args, timeout=_CELL_TIMEOUT_S))

    def run_or_close(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            observed = run(world_size, fn, *args)
        except BaseException:
            rank_pools(world_size).close()
            raise
        if any(isinstance(o, Observed) and not (o.next_verdict and o.next_verdict.ok) for o in observed):
            rank_pools(world_size).close()
        return observed

    return run_or_close


def _check(cell: Cell, observed: list[Observed]) -> None:
    """Hold what all ranks saw against the oracle and against each other."""
    failing = _failing(cell)
    verdict = observed[0].verdict

    assert [_expected(cell, rank) for rank in range(cell.world_size)] == [o.seen for o in observed]
    assert verdict is not None
    assert [verdict] * cell.world_size == [o.verdict for o in observed]
    assert failing == sorted(verdict.failures)
    assert (not failing and cell.collective not in {"missing", "differs"}) == verdict.ok
    assert verdict.complete
    orders = {rank: outcome.order for rank, outcome in verdict.failures.items()}
    assert len(failing) == len(set(orders.values()) - {0})
    for rank, each in enumerate(observed):
        assert (rank in _ranks(cell.body_on, cell.world_size)) == each.is_own_object
        assert each.failures in {(), tuple(failing)}
        # On a rank that failed itself, a peer's failure is news if it came first.
        is_after_another = any(orders[peer] < orders[rank] for peer in failing) if rank in failing else False
        assert is_after_another == each.has_peers_attached
        for kind, message in each.attached:
            assert any(f"{kind}: {message}" in note for note in each.notes)
        lacks = cell.collective == "missing" and rank == 0
        is_skipped = cell.collective in {"missing", "differs"} and not lacks
        assert is_skipped == any("destroy" in note for note in each.notes if note.startswith("Not run"))
        assert each.next_verdict is not None
        assert each.next_verdict.ok


def _two_rank_cells() -> Iterator[Cell]:
    bodies: list[tuple[Any, Any]] = [("ok", "nobody"), *itertools.product(_BODY_ERRORS, ("last", "all"))]
    locals_: list[tuple[Any, Any]] = [
        ("ok", "nobody"),
        *itertools.product(("one", "two"), ("first", "last", "all")),
    ]
    collectives: list[Any] = ["none", "agreed", "missing", "differs", "raises"]
    for (body, body_on), (local, local_on), collective in itertools.product(bodies, locals_, collectives):
        yield Cell(body, body_on, local, local_on, collective)


def _four_rank_cells() -> Iterator[Cell]:
    for cell in _two_rank_cells():
        if cell.body in {"ok", "raises"} and (cell.local, cell.local_on) in {
            ("ok", "nobody"),
            ("one", "first"),
            ("two", "all"),
        }:
            yield attrs.evolve(cell, world_size=4)


@pytest.mark.parametrize("cell", [*_two_rank_cells(), *_four_rank_cells()], ids=str)
def test_scope_whatever_goes_wrong_keeps_the_contract(cell: Cell, run: Callable[..., list[Observed]]) -> None:
    """Each rank raises what it must, ran what it must, and all hold one verdict."""
    _check(cell, run(cell.world_size, _run_cell, cell))


_LOCAL = "body third second first"
_ALL = "body third second destroy first"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        pytest.param(Cell(), [Seen("", _LOCAL), Seen("", _LOCAL)], id="nothing"),
        pytest.param(
            Cell(collective="agreed"),
            [Seen("", _ALL), Seen("", _ALL)],
            id="nothing-with-collective",
        ),
        pytest.param(
            Cell("raises", "last"),
            [Seen("PeerFailedError", _LOCAL), Seen("ValueError: body on 1", _LOCAL)],
            id="body-raises-on-one",
        ),
        pytest.param(
            Cell("raises", "all", collective="agreed"),
            [Seen("ValueError: body on 0", _ALL), Seen("ValueError: body on 1", _ALL)],
            id="body-raises-on-all",
        ),
        pytest.param(
            Cell("skips", "all"),
            [Seen("Skipped: body on 0", _LOCAL), Seen("Skipped: body on 1", _LOCAL)],
            id="body-skips-on-all",
        ),
        pytest.param(
            Cell("skips", "last"),
            [Seen("PeerFailedError", _LOCAL), Seen("Skipped: body on 1", _LOCAL)],
            id="body-skips-on-one",
        ),
        pytest.param(
            Cell("exits", "last", "one", "last"),
            [
                Seen("PeerFailedError", _LOCAL),
                Seen("SystemExit: body on 1", _LOCAL, attached=("LookupError: second on 1",)),
            ],
            id="exit-outlives-cleanup-error",
        ),
        pytest.param(
            Cell("interrupts", "last", collective="agreed"),
            [Seen("PeerFailedError", _ALL), Seen("KeyboardInterrupt: body on 1", _ALL)],
            id="interrupt-runs-collective",
        ),
        pytest.param(
            Cell("ok", "nobody", "two", "last", "agreed"),
            [
                Seen("PeerFailedError", _ALL),
                Seen("ExceptionGroup", _ALL, ("LookupError: third on 1", "LookupError: first on 1")),
            ],
            id="two-cleanup-errors-are-a-group",
        ),
        pytest.param(
            Cell("ok", "nobody", "one", "first"),
            [Seen("LookupError: second on 0", _LOCAL), Seen("PeerFailedError", _LOCAL)],
            id="one-cleanup-error-is-itself",
        ),
        pytest.param(
            Cell(collective="missing"),
            [Seen("CleanupMismatchError", _LOCAL), Seen("CleanupMismatchError", _LOCAL)],
            id="collective-missing-on-one",
        ),
        pytest.param(
            Cell("raises", "last", "two", "last", "differs"),
            [
                Seen("PeerFailedError", _LOCAL, attached=("CleanupMismatchError",)),
                Seen(
                    "ValueError: body on 1",
                    _LOCAL,
                    attached=("LookupError: third on 1", "LookupError: first on 1", "CleanupMismatchError"),
                ),
            ],
            id="everything-at-once",
        ),
        pytest.param(
            Cell(collective="raises", world_size=4),
            [Seen("OSError: destroy on 0", _ALL), *[Seen("PeerFailedError", _ALL)] * 3],
            id="collective-raises-on-one-of-four",
        ),
    ],
)
def test_scope_cell_by_hand_is_seen_as_written(
    cell: Cell, expected: list[Seen], run: Callable[..., list[Observed]]
) -> None:
    """Cells written by hand come out as written. The oracle says the same."""
    assert expected == [_expected(cell, rank) for rank in range(cell.world_size)]
    assert expected == [o.seen for o in run(cell.world_size, _run_cell, cell)]


# Details a table hides


def _raise_deep_inside() -> None:
    msg = "12 of 4096 elements differ"
    raise AssertionError(msg)


def _tell_of_failure(rank: int, world_size: int) -> tuple[Any, str, Any] | None:  # noqa: ARG001  (given to every function of a rank)
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S) as scope:
            if rank == 1:
                scope.cleanup(_raise, LookupError("later"))
                _raise_deep_inside()
    except PeerFailedError as error:
        return error.failures[1], str(error), error.verdict == scope.verdict
    except AssertionError:
        pass
    return None


def test_scope_peer_failure_arrives_with_phase_type_message_traceback(run: Callable[..., list[Any]]) -> None:
    """A healthy rank learns where and how its peer failed, and what failed after that."""
    (outcome, text, is_same), nothing = run(2, _tell_of_failure)

    assert nothing is None
    assert is_same
    assert ("body", "AssertionError", "12 of 4096 elements differ") == (
        outcome.phase,
        outcome.type_name,
        outcome.message,
    )
    assert "in _raise_deep_inside" in outcome.traceback
    assert 1 == len(outcome.also)
    assert "LookupError: later" in outcome.also[0]
    assert "rank 1 of 2 failed" in text.splitlines()[0]
    assert "in _raise_deep_inside" in text
    assert "LookupError: later" in text


def _two_collective(rank: int, world_size: int) -> tuple[str, str, Any]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[str] = []
    surfaced = ""
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S) as scope:
            scope.cleanup(ran.append, "bottom")
            scope.collective_cleanup(ran.append, "shared", name="shared")
            if rank == 0:
                scope.collective_cleanup(ran.append, "alone", name="alone")
            scope.cleanup(ran.append, "between")
            scope.collective_cleanup(ran.append, "also shared", name="also shared")
            scope.cleanup(ran.append, "top")
    except CleanupMismatchError as error:
        surfaced = str(error)
    return " ".join(ran), surfaced, scope.verdict


def test_scope_one_of_three_collective_missing_runs_the_other_two(run: Callable[..., list[Any]]) -> None:
    """Shared cleanups run on all ranks, in order. A missing one runs on none and is reported."""
    (ran_0, text_0, verdict_0), (ran_1, text_1, verdict_1) = run(2, _two_collective)

    assert "top also shared between shared bottom" == ran_0 == ran_1
    assert text_0 == text_1
    assert "alone" in text_0
    assert verdict_0 == verdict_1
    assert not verdict_0.ok
    assert {0: ("also shared", "alone", "shared"), 1: ("also shared", "shared")} == {
        rank: tuple(name for name, _ in pairs) for rank, pairs in verdict_0.cleanups.items()
    }


def _in_another_order(rank: int, world_size: int) -> tuple[list[str], str, bool]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[str] = []
    surfaced = ""
    names = ["a", "b"] if rank == 0 else ["b", "a"]
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S) as scope:
            for name in names:
                scope.collective_cleanup(ran.append, name, name=name)
    except CleanupMismatchError as error:
        surfaced = type(error).__name__
    with collective_scope(name="next", timeout=_SCOPE_TIMEOUT_S) as following:
        pass
    return ran, surfaced, following.verdict is not None and following.verdict.ok


def test_scope_collective_cleanups_in_another_order_run_nowhere(run: Callable[..., list[Any]]) -> None:
    """If no order is right for all ranks, none of the cleanups runs, and all ranks say so."""
    assert [([], "CleanupMismatchError", True)] * 2 == run(2, _in_another_order)


def _fingerprint_raises(rank: int, world_size: int, raising: list[int]) -> tuple[list[str], str, Any]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[str] = []
    surfaced = ""
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S) as scope:
            fingerprint = (lambda: _raise(LookupError("no print"))) if rank in raising else (lambda: None)
            scope.collective_cleanup(ran.append, "destroy", name="destroy", fingerprint=fingerprint)
            scope.cleanup(ran.append, "top")
    except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = type(error).__name__
    return ran, surfaced, scope.verdict


def test_scope_fingerprint_that_raises_on_one_rank_counts_as_disagreement(run: Callable[..., list[Any]]) -> None:
    """The rank raises what its fingerprint raised, nobody runs the cleanup, nobody hangs."""
    (ran_0, surfaced_0, verdict_0), (ran_1, surfaced_1, verdict_1) = run(2, _fingerprint_raises, [0])

    assert (["top"], ["top"]) == (ran_0, ran_1)
    assert ("LookupError", "PeerFailedError") == (surfaced_0, surfaced_1)
    assert verdict_0 == verdict_1
    assert [0] == sorted(verdict_0.failures)
    assert verdict_0.cleanups


def test_scope_fingerprint_that_raises_on_all_ranks_raises_on_all(run: Callable[..., list[Any]]) -> None:
    """The error of a fingerprint surfaces on every rank, whatever becomes of the cleanup."""
    results = run(2, _fingerprint_raises, [0, 1])

    assert ["LookupError"] * 2 == [surfaced for _, surfaced, _ in results]
    assert results[0][0] == results[1][0]


def _interrupted_cleanup(rank: int, world_size: int, body: str) -> tuple[str, str, list[str]]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[str] = []
    surfaced: BaseException | None = None
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S) as scope:
            scope.cleanup(ran.append, "first")
            if rank == 0:
                scope.cleanup(_raise, KeyboardInterrupt("in cleanup"))
            scope.cleanup(ran.append, "last")
            if body == "raises":
                _raise(ValueError("body"))
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = error
    attached = getattr(surfaced, "collective_scope_errors", ())
    return type(surfaced).__name__, " ".join(type(error).__name__ for error in attached), ran


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param("ok", ["KeyboardInterrupt", "PeerFailedError"], id="body-ok"),
        pytest.param("raises", ["KeyboardInterrupt", "ValueError"], id="body-raises"),
    ],
)
def test_scope_interrupt_in_a_cleanup_surfaces_after_the_rest_ran(
    body: str,
    expected: list[str],
    run: Callable[..., list[Any]],
) -> None:
    """An interrupt in a cleanup is kept until all others ran, then goes on as itself."""
    results = run(2, _interrupted_cleanup, body)

    assert expected == [surfaced for surfaced, _, _ in results]
    assert [["last", "first"]] * 2 == [ran for _, _, ran in results]
    assert body == "ok" or "ValueError" in results[0][1]


class _RaisingHandler(logging.Handler):
    """A handler that does what pytest's does with a record it cannot format."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002  (given to every handler)
        """Raise."""
        msg = "the log is broken"
        raise RuntimeError(msg)


def _with_a_broken_log(rank: int, world_size: int) -> tuple[str, bool, list[str], bool]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[str] = []
    surfaced: BaseException | None = None
    own = ValueError("body")
    handler = _RaisingHandler()
    logger = logging.getLogger("collective_scope")
    logger.addHandler(handler)
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S, failure_timeout=1.0) as scope:
            scope.cleanup(ran.append, "first")
            if rank == 1:
                _raise(own)
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = error
    finally:
        logger.removeHandler(handler)
    with collective_scope(name="next", timeout=2.0) as following:
        pass
    return type(surfaced).__name__, surfaced is own, ran, following.verdict is not None and following.verdict.ok


def test_scope_log_handler_that_raises_changes_nothing(run: Callable[..., list[Any]]) -> None:
    """A broken log costs neither the cleanups, nor the barrier, nor the body's own error."""
    assert [("PeerFailedError", False, ["first"], True), ("ValueError", True, ["first"], True)] == run(
        2, _with_a_broken_log
    )


def _after_barrier(rank: int, world_size: int, how: str) -> tuple[str, list[str]]:  # noqa: ARG001  (given to every function of a rank)
    ran: list[str] = []
    surfaced: BaseException | None = None
    try:
        with collective_scope(name="cell", timeout=_SCOPE_TIMEOUT_S) as scope:
            scope.after_barrier(ran.append, "after 1")
            if how == "after raises" and rank == 1:
                scope.after_barrier(_raise, LookupError("after"))
            scope.after_barrier(ran.append, "after 2")
            scope.cleanup(ran.append, "cleanup")
            scope.collective_cleanup(ran.append, "destroy")
            if how == "body raises" and rank == 1:
                _raise(ValueError("body"))
    except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = error
    return type(surfaced).__name__, ran


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        pytest.param("ok", ["NoneType", "NoneType"], id="ok"),
        pytest.param("body raises", ["PeerFailedError", "ValueError"], id="body-raises"),
        pytest.param("after raises", ["NoneType", "LookupError"], id="after-raises"),
    ],
)
def test_scope_after_barrier_runs_last_and_once_on_every_path(
    how: str, expected: list[str], run: Callable[..., list[Any]]
) -> None:
    """Calls registered for after the barrier run after all cleanups, last registered first."""
    results = run(2, _after_barrier, how)

    assert expected == [surfaced for surfaced, _ in results]
    assert [["destroy", "cleanup", "after 2", "after 1"]] * 2 == [ran for _, ran in results]

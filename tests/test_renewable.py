"""One bad subtest costs one subtest: ranks that are stuck come back, and the next subtest runs in the same processes."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, RevokedInterrupt, _renewable, collective_scope, current_scope
from collective_scope._groups import find
from collective_scope.agreement.clock import monotonic
from tests.carry_on import Event, defects, figures, plan, run, world_of
from tests.ranks import RankPool, here, values
from tests.stores import LONG_S, wait_until


Run = Callable[..., list[Any]]


@pytest.fixture(scope="module", name="run_on")
def _run_on() -> Iterator[Run]:
    """Return a way to run a function on a number of ranks without a group, in processes that stay."""
    pools: dict[int, RankPool] = {}

    def run_on(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        pool = pools.setdefault(world_size, RankPool(world_size, init=False, host="parent"))
        return values(pool.run(fn, *args, timeout=90.0))

    yield run_on
    for pool in pools.values():
        pool.close()


def _store(name: str) -> dist.Store:
    return dist.PrefixStore(name, here().new_store())


# Any failures


def _carry_on(rank: int, world_size: int, seed: int, count: int, failing: int) -> list[Event]:
    torch.set_num_threads(1)
    world = world_of(_store(f"carry-on-{seed}"), rank, world_size)
    events = run(world, plan(seed, count, failing, world_size))
    world.destroy()
    return events


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_world_after_any_failures_has_exactly_these_and_right_numbers(
    world_size: int, run_on: Run, request: pytest.FixtureRequest
) -> None:
    """Of twenty subtests, the eight that fail on one rank fail on every rank, with the cause; the others are right."""
    seed = world_size + 100 * hash(request.node.name)
    failures = plan(seed, 20, 8, world_size)

    events = run_on(world_size, _carry_on, seed, 20, 8)

    assert [] == defects(failures, events)
    measured = figures(failures, events, grace=0.5)
    print(f"{world_size} ranks: {measured}")
    assert max(measured.freed) < 0.3 + 5.0
    assert max(measured.next_body) < 0.5 + 5.0
    # A failure after the last collective strands nobody, and costs no renewal.
    assert 1 + sum(failure.how not in ("", "after") for failure in failures[:-1]) == measured.renewals


# Kinds of groups


def _sum_of_ranks(group: Any = None) -> float:
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value, group=group)
    return float(value.item())


def _in_scopes(world: RenewableGroup, bodies: list[Callable[[], Any]], **options: Any) -> list[tuple[str, Any]]:
    """Run each body in a scope; return what it raised, or returned."""
    seen: list[tuple[str, Any]] = []
    for number, body in enumerate(bodies):
        result: Any = None
        try:
            with collective_scope(world, name=f"scope-{number}", **{"timeout": 30, "failure_timeout": 30, **options}):
                result = body()
        except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
            seen.append((type(error).__name__, str(error)))
        else:
            seen.append(("", result))
    return seen


def _fail_on(rank: int, failing: int, then: Callable[[], Any]) -> Callable[[], Any]:
    def body() -> Any:
        if rank == failing:
            msg = "before its collectives"
            raise ValueError(msg)
        return then()

    return body


def _default_only(rank: int, world_size: int) -> Any:
    world = RenewableGroup(store=_store("default"), rank=rank, world_size=world_size)
    seen = _in_scopes(world, [_sum_of_ranks, _fail_on(rank, 1, _sum_of_ranks), _sum_of_ranks])
    world.destroy()
    return seen, world.made


def _mesh(rank: int, world_size: int) -> Any:
    def make(store: dist.Store) -> Any:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        return dist.init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))

    world = RenewableGroup(make, store=_store("mesh"), rank=rank, world_size=world_size)

    def work() -> float:
        return _sum_of_ranks(world.value.get_group("tp"))

    seen = _in_scopes(world, [work, _fail_on(rank, 0, work), work])
    world.destroy()
    return seen, world.made


def _sub_group_of_its_own(rank: int, world_size: int) -> Any:
    def make(store: dist.Store) -> Any:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        return dist.new_group(list(range(world_size)))

    world = RenewableGroup(make, store=_store("both"), rank=rank, world_size=world_size)
    seen = _in_scopes(
        world,
        [
            lambda: _sum_of_ranks(world.value),
            _fail_on(rank, 1, lambda: _sum_of_ranks(world.value)),
            lambda: [_sum_of_ranks(world.value), _sum_of_ranks()],
        ],
    )
    world.destroy()
    return seen, world.made


def _sub_group_only(rank: int, world_size: int) -> Any:
    dist.init_process_group("gloo", store=_store("stays"), rank=rank, world_size=world_size)
    default = id(dist.group.WORLD)
    world = RenewableGroup(
        lambda _: dist.new_group(list(range(world_size))), store=_store("sub"), rank=rank, world_size=world_size
    )
    seen = _in_scopes(
        world,
        [
            lambda: _sum_of_ranks(world.value),
            _fail_on(rank, 1, lambda: _sum_of_ranks(world.value)),
            lambda: [_sum_of_ranks(world.value), _sum_of_ranks(), id(dist.group.WORLD) == default],
        ],
    )
    world.destroy()
    dist.destroy_process_group()
    return seen, world.made


@pytest.mark.parametrize(
    ("program", "failing", "last"),
    [
        pytest.param(_default_only, 1, 1.0, id="default-group"),
        pytest.param(_mesh, 0, 1.0, id="device-mesh"),
        pytest.param(_sub_group_of_its_own, 1, [1.0, 1.0], id="default-group-that-returns-a-sub-group"),
        pytest.param(_sub_group_only, 1, [1.0, 1.0, True], id="sub-group-only"),
    ],
)
def test_world_of_each_kind_is_made_again_after_a_failure(
    program: Callable[..., Any], failing: int, last: Any, run_on: Run
) -> None:
    """Any group or mesh `make` built is destroyed and built again. The rest stays."""
    results = run_on(2, program)

    for rank, (seen, made) in enumerate(results):
        assert 2 == made
        assert [("", 1.0), ("", last)] == [tuple(seen[0]), tuple(seen[2])]
        assert seen[1][0] == ("ValueError" if rank == failing else "RuntimeError")


def _make_fails_once(rank: int, world_size: int) -> Any:
    attempts = []

    def make(store: dist.Store) -> None:
        attempts.append(1)
        if rank == 1 and len(attempts) == 1:
            msg = "no memory for the group"
            raise MemoryError(msg)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    world = RenewableGroup(make, store=_store("fails once"), rank=rank, world_size=world_size)
    seen = _in_scopes(world, [_sum_of_ranks, _sum_of_ranks])
    dist.destroy_process_group()
    return seen, len(attempts)


def _make_fails_at_its_end(rank: int, world_size: int) -> Any:
    attempts = []

    def make(store: dist.Store) -> None:
        attempts.append(1)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        if rank == 1 and len(attempts) == 1:
            msg = "after its part"
            raise MemoryError(msg)

    world = RenewableGroup(make, store=_store("fails at its end"), rank=rank, world_size=world_size)
    seen = _in_scopes(world, [_sum_of_ranks, _sum_of_ranks])
    world.destroy()
    return seen, len(attempts)


def _make_enters_a_scope(rank: int, world_size: int) -> Any:
    def make(store: dist.Store) -> None:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        if not refused:
            with pytest.raises(RuntimeError) as refusal, collective_scope(world, name="inner"):
                pass
            refused.append(str(refusal.value))
        with collective_scope(name="on the new one"):
            _sum_of_ranks()

    refused: list[str] = []
    world = RenewableGroup(make, store=_store("enters a scope"), rank=rank, world_size=world_size)
    seen = _in_scopes(world, [_sum_of_ranks, _sum_of_ranks])
    world.destroy()
    return seen, refused


def _fails_before_a_long_collective_cleanup(rank: int, world_size: int) -> Any:
    world = RenewableGroup(store=_store("long cleanup"), rank=rank, world_size=world_size, grace=0.1)
    ran: list[float] = []

    def clean_up() -> None:
        found = find(world)
        assert found is not None
        assert found[0].barrier is not None
        control, until = found[0].barrier.control, monotonic() + 0.1  # the grace
        if rank == 0:  # until its control thread has looked after that, and all the more its peer's
            for _ in range(3):
                looked = control.heard_at
                assert wait_until(lambda before=looked: control.heard_at > max(before, until))
        ran.append(_sum_of_ranks())

    def body() -> None:
        current_scope().collective_cleanup(clean_up)
        _sum_of_ranks()
        _fail_on(rank, 1, int)()

    seen = _in_scopes(world, [body, _sum_of_ranks])
    world.destroy()
    return [error for error, _ in seen], ran, world.made


def _calls_back(rank: int, world_size: int) -> Any:
    calls: list[tuple[int, bool]] = []

    def make(store: dist.Store) -> None:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        world.on_revoke(lambda: calls.append((world.made, threading.current_thread() is threading.main_thread())))

    world = RenewableGroup(make, store=_store("calls back"), rank=rank, world_size=world_size)
    fails = [_fail_on(rank, each, _sum_of_ranks) for each in (1, 0)]
    seen = _in_scopes(world, [_sum_of_ranks, fails[0], _sum_of_ranks, fails[1], _sum_of_ranks])
    world.destroy()
    return [value for error, value in seen if not error], calls


def test_world_that_is_revoked_calls_what_make_has_registered_once_on_each_rank(run_on: Run) -> None:
    """For communicators that torch does not know: on a thread of its own, and not that of an earlier make."""
    for sums, calls in run_on(2, _calls_back):
        assert [1.0, 1.0, 1.0] == sums
        assert [(1, False), (2, False)] == [tuple(call) for call in calls]


def test_world_that_is_revoked_takes_every_step_though_what_make_has_registered_raises() -> None:
    """Each communicator is made to fail, whatever the function of another one raises; the first error comes out."""
    calls: list[str] = []

    def fails() -> None:
        calls.append("fails")
        msg = "closed before"
        raise OSError(msg)

    def make(_: dist.Store) -> None:
        world.on_revoke(fails)
        world.on_revoke(lambda: calls.append("next"))

    world = RenewableGroup(make, store=dist.HashStore(), rank=0, world_size=1, destroy=calls.clear)
    with collective_scope(world), pytest.raises(OSError, match=r"^closed before$"):
        world.revoke(is_at_work=True)

    assert ["fails", "next"] == calls


def test_world_whose_make_fails_on_one_rank_is_tried_again_at_the_next_scope(run_on: Run) -> None:
    """All ranks refuse the body and say why, also those that were waiting for the failed one; the next scope works."""
    results = run_on(2, _make_fails_once)

    for rank, (seen, attempts) in enumerate(results):
        assert 2 == attempts
        assert ("", 1.0) == tuple(seen[1])
        assert seen[0][0] in (
            ("MemoryError",) if rank == 1 else ("PeerFailedError", "DistNetworkError", "RuntimeError")
        )


def test_world_whose_make_fails_on_one_rank_after_its_part_is_made_again_on_all(run_on: Run) -> None:
    """A rank that has made its part makes it again with the others, although nothing went wrong there."""
    for seen, attempts in run_on(2, _make_fails_at_its_end):
        assert seen[0][0] in ("MemoryError", "PeerFailedError")
        assert ("", 1.0) == tuple(seen[1])
        assert 2 == attempts


def test_world_whose_make_enters_a_scope_on_it_is_refused_that_at_once(run_on: Run) -> None:
    """It would have to be made for that scope. A scope on what has been made so far is as good as anywhere."""
    for seen, refused in run_on(2, _make_enters_a_scope):
        assert ["scope 'inner' cannot be entered on a group that is being made, for scope 'scope-0'"] == refused
        assert [("", 1.0), ("", 1.0)] == [tuple(each) for each in seen]


def test_world_runs_collective_cleanups_of_any_length_after_a_failure_to_which_all_came(run_on: Run) -> None:
    """Once all ranks have come to the exit, the failure leaves none of them stuck: nothing is revoked for it later."""
    for errors, ran, made in run_on(2, _fails_before_a_long_collective_cleanup):
        assert [1.0] == ran
        assert errors[0] in ("ValueError", "PeerFailedError")
        assert "" == errors[1]
        assert 1 == made


def _compute() -> None:
    while True:
        pass


_WAYS_TO_GO_ON: dict[str, Callable[[], object]] = {
    "computes": _compute,
    "waits-for-a-lock": lambda: threading.Event().wait(),
    "sleeps": lambda: time.sleep(LONG_S),
    "reads": lambda: os.read(os.pipe()[0], 1),
}


def _interrupted_body(rank: int, world_size: int, how: str) -> Any:
    world = RenewableGroup(store=_store(f"interrupted-{how}"), rank=rank, world_size=world_size)
    seen: list[str] = []

    def wait_for_ever() -> None:
        try:
            _WAYS_TO_GO_ON[how]()
        except Exception:  # noqa: BLE001  (kept, and looked at by the test)
            seen.append("Exception")
        except BaseException as interrupt:
            seen.append(type(interrupt).__name__)
            raise
        finally:
            seen.append("finally")

    surfaced = _in_scopes(world, [_fail_on(rank, 1, wait_for_ever), _sum_of_ranks])
    dist.destroy_process_group()
    return seen, surfaced


@pytest.mark.parametrize("how", _WAYS_TO_GO_ON)
def test_world_interrupts_a_body_that_goes_on(how: str, run_on: Run) -> None:
    """A body that goes on in Python is ended by an interrupt that `except Exception` does not catch."""
    (seen, surfaced), (_, failed) = run_on(2, _interrupted_body, how)

    assert [RevokedInterrupt.__name__, "finally"] == seen
    assert "PeerFailedError" == surfaced[0][0]
    assert "before its collectives" in surfaced[0][1]
    ended = "0 (body failed, after the group was revoked: collective_scope.RevokedInterrupt: ended at "
    assert re.search(rf"{re.escape(ended)}\S*test_renewable\.py:\d+, in ", surfaced[0][1])
    assert "ValueError" == failed[0][0]
    assert ("", 1.0) == tuple(surfaced[1]) == tuple(failed[1])


def _beyond_the_timeout(rank: int, world_size: int, how: str) -> tuple[list[tuple[str, Any]], float]:
    world = RenewableGroup(store=_store(f"beyond-{how}"), rank=rank, world_size=world_size)

    def wait() -> None:
        if rank == 1:
            _WAYS_TO_GO_ON[how]()
        if rank == 2:
            _sum_of_ranks()

    since = time.monotonic()
    seen = _in_scopes(world, [wait, _sum_of_ranks], timeout=1.0)
    took = time.monotonic() - since
    dist.destroy_process_group()
    return seen, took


@pytest.mark.parametrize("how", _WAYS_TO_GO_ON)
def test_world_frees_ranks_that_their_peers_have_given_up_on(how: str, run_on: Run) -> None:
    """A rank that does not come within the timeout costs its scope and no other, whatever it does in Python."""
    results = run_on(3, _beyond_the_timeout, how)

    for rank, (seen, took) in enumerate(results):
        assert took < 1.0 + 5.0, results
        assert seen[0][0] == ("RuntimeError" if rank == 2 else "BarrierTimeoutError")
        assert rank == 2 or "ranks 1 and 2 of 3 missing" in seen[0][1]
        assert ("", 3.0) == tuple(seen[1])


def _ends_by_itself(rank: int, world_size: int) -> Any:
    world = RenewableGroup(store=_store("by itself"), rank=rank, world_size=world_size)

    def wait() -> None:
        here().new_store().wait(["never"], timedelta(seconds=2.5))  # native code that no signal ends

    seen = _in_scopes(world, [_fail_on(rank, 1, wait), _sum_of_ranks])
    dist.destroy_process_group()
    return seen


def test_world_lets_a_body_out_that_ends_by_itself_while_it_is_being_interrupted(run_on: Run) -> None:
    """An interrupt that comes as the body's own error leaves it does not keep the scope from its exit."""
    waiting, failed = run_on(2, _ends_by_itself)

    assert waiting[0][0] in {"DistStoreError", "PeerFailedError"}, waiting
    assert "ValueError" == failed[0][0]
    assert ("", 1.0) == tuple(waiting[1]) == tuple(failed[1])


def _nested_wait(rank: int, world_size: int) -> Any:
    world = RenewableGroup(store=_store("nested"), rank=rank, world_size=world_size)

    def body() -> None:
        if rank == 1:
            msg = "before the inner scope"
            raise ValueError(msg)
        with collective_scope(None, name="inner, on the default group", timeout=30, failure_timeout=30):
            pass

    seen = _in_scopes(world, [body, _sum_of_ranks])
    dist.destroy_process_group()
    return seen


def test_world_frees_a_rank_that_waits_in_a_scope_of_another_group(run_on: Run) -> None:
    """A rank that waits at an inner scope on a group of the world's own is not left there when that is revoked."""
    waiting, failed = run_on(2, _nested_wait)

    assert "ValueError" == failed[0][0]
    assert waiting[0][0]
    assert ("", 1.0) == tuple(waiting[1]) == tuple(failed[1])


def _quarantine(rank: int, world_size: int) -> Any:
    world = RenewableGroup(store=_store("quarantine"), rank=rank, world_size=world_size)
    ran: list[str] = []
    try:
        with collective_scope(world, name="revoked", timeout=30, failure_timeout=30) as scope:
            scope.collective_cleanup(ran.append, "collective", name="c")
            scope.cleanup(ran.append, "local")
            _fail_on(rank, 1, _sum_of_ranks)()
    except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
        notes = error.__notes__
    with collective_scope(world, name="next", timeout=30):
        pass
    dist.destroy_process_group()
    assert scope.verdict is not None
    return ran, scope.verdict.revoked, any("Not run" in note for note in notes)


def test_world_that_was_revoked_runs_no_collective_cleanup(run_on: Run) -> None:
    """On a group that does not work any more no collective runs; what is local does."""
    assert [(["local"], True, True)] * 2 == run_on(2, _quarantine)


def test_renewable_group_arguments_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message states the rule and the value, before anything was changed."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    store = dist.HashStore()

    with pytest.raises(ValueError, match=r"which lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        RenewableGroup()
    with pytest.raises(ValueError, match=r"^rank must be at least 0 and less than world_size \(got 2 of 2\)$"):
        RenewableGroup(store=store, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"^grace must be at least 0 and finite \(got -1\)$"):
        RenewableGroup(store=store, rank=0, world_size=2, grace=-1)
    with pytest.raises(TypeError, match=r"^grace must be seconds as a number, or a timedelta \(got '1'\)$"):
        RenewableGroup(store=store, rank=0, world_size=2, grace="1")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match=r"^make must be callable \(got 3\)$"):
        RenewableGroup(3, store=store, rank=0, world_size=2)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match=r"^world_size must be an integer \(got 2.0\)$"):
        RenewableGroup(store=store, rank=0, world_size=2.0)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match=r"^store must be a torch.distributed.Store \(got 'x'\)$"):
        RenewableGroup(store="x", rank=0, world_size=2)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match=r"^fn must be callable \(got 3\)$"):
        RenewableGroup(store=store, rank=0, world_size=2).on_revoke(3)  # type: ignore[arg-type]  # wrong on purpose


def test_renewable_group_of_one_rank_is_made_at_the_first_scope() -> None:
    """A world of one has no peers, and a group all the same."""
    made: list[int] = []
    world = RenewableGroup(lambda _: made.append(1), store=dist.HashStore(), rank=0, world_size=1, destroy=made.clear)

    for _ in range(2):
        with collective_scope(world, name="alone") as scope:
            assert [1] == made
    assert scope.verdict is not None
    assert scope.verdict.ok


def test_world_whose_destroy_does_not_come_back_says_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destroy of torch waits for work in flight, for ever; one of this library does not."""
    monkeypatch.setattr(_renewable, "DESTROY_S", 0.1)
    stuck = threading.Event()
    world = RenewableGroup(lambda _: None, store=dist.HashStore(), rank=0, world_size=1, destroy=stuck.wait)
    with collective_scope(world):
        pass

    with pytest.raises(TimeoutError, match=r"^destroying the group took longer than 0 s$"):
        world.destroy()

    stuck.set()


def test_world_whose_destroy_fails_says_how() -> None:
    """The error reaches the rank that destroys, though another thread has met it."""

    def destroy() -> None:
        msg = "no such communicator"
        raise LookupError(msg)

    world = RenewableGroup(lambda _: None, store=dist.HashStore(), rank=0, world_size=1, destroy=destroy)
    with collective_scope(world):
        pass

    with pytest.raises(LookupError, match="no such communicator"):
        world.destroy()


def test_world_that_cannot_be_made_after_a_destroy_that_failed_says_both() -> None:
    """The error of a destroy on a revoked group is no failure by itself, and may be why the next make fails."""
    made: list[int] = []

    def make(_: dist.Store) -> None:
        made.append(1)
        if len(made) > 1:
            msg = "there is one already"
            raise ValueError(msg)

    def destroy() -> None:
        msg = "no such communicator"
        raise LookupError(msg)

    world = RenewableGroup(make, store=dist.HashStore(), rank=0, world_size=1, destroy=destroy)
    with collective_scope(world):
        pass
    world.revoke(is_at_work=False)

    with pytest.raises(ValueError, match="there is one already") as raised, collective_scope(world):
        pass

    assert ["Destroying the revoked group had failed: LookupError: no such communicator"] == raised.value.__notes__


def _stuck_at_the_store(rank: int, world_size: int, how: str) -> list[tuple[str, Any]]:
    def make(store: dist.Store) -> dist.Store:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        return store

    world = RenewableGroup(make, store=_store(f"stuck at the store, {how}"), rank=rank, world_size=world_size)

    def wait() -> Any:
        return _sum_of_ranks(dist.new_group()) if how == "new_group" else world.value.get("never")

    seen = _in_scopes(world, [_sum_of_ranks, _fail_on(rank, 1, wait), lambda: _sum_of_ranks(dist.new_group())])
    world.destroy()
    return seen


@pytest.mark.parametrize("how", ["new_group", "get"])
def test_world_frees_a_rank_that_waits_at_the_store_of_the_group(how: str, run_on: Run) -> None:
    """A body that makes a group waits for its peers at the store, which has no other end than its time limit."""
    freed, failed = run_on(2, _stuck_at_the_store, how)

    assert ["", "DistNetworkError", ""] == [error for error, _ in freed]
    assert ["", "ValueError", ""] == [error for error, _ in failed]


def _made_before(rank: int, world_size: int) -> tuple[str, list[str]]:
    dist.init_process_group("gloo", store=_store("made before"), rank=rank, world_size=world_size)
    world = RenewableGroup(store=_store("made before, again"), rank=rank, world_size=world_size)
    try:
        with collective_scope(world, timeout=30, failure_timeout=30):
            pass
    except ValueError as error:
        return str(error), error.__notes__
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return "", []


def test_world_that_comes_after_a_default_group_of_the_program_says_which_call_is_too_much(run_on: Run) -> None:
    """The call that fails is in the library; the one to leave out came before the first scope."""
    for said, notes in run_on(2, _made_before):
        assert "initialize the default process group twice" in said
        assert notes[0].startswith("There was a default group before the RenewableGroup came to make its own")


def _destroyed_by_a_body_that_passes(rank: int, world_size: int) -> list[tuple[str, Any]]:
    world = RenewableGroup(store=_store("destroyed by a body that passes"), rank=rank, world_size=world_size)
    seen = _in_scopes(world, [_sum_of_ranks, dist.destroy_process_group, _sum_of_ranks, _sum_of_ranks])
    world.destroy()
    return seen


def test_world_that_a_body_has_destroyed_costs_one_scope(run_on: Run) -> None:
    """A test that tidies up too much breaks the next one, which says so; the one after that has a group again."""
    for seen in run_on(2, _destroyed_by_a_body_that_passes):
        assert ["", "", "ValueError", ""] == [error for error, _ in seen]
        assert "Default process group has not been initialized" in seen[2][1]


def _group_made_by_a_body(rank: int, world_size: int) -> tuple[list[tuple[str, Any]], float]:
    world = RenewableGroup(store=_store("group of a body"), rank=rank, world_size=world_size)
    own = []

    def make_and_use() -> float:
        own.append(dist.new_group())
        return _sum_of_ranks(own[0])

    started = time.monotonic()
    seen = _in_scopes(
        world,
        [make_and_use, _fail_on(rank, 1, lambda: _sum_of_ranks(own[0])), _sum_of_ranks],
    )
    world.destroy()
    return seen, time.monotonic() - started


def test_world_frees_a_rank_that_is_stuck_in_a_group_that_a_body_has_made(run_on: Run) -> None:
    """Suites make groups in their setup, outside of make; a rank that is stuck in one comes back as well."""
    for seen, seconds in run_on(2, _group_made_by_a_body):
        assert ("", 1.0) == tuple(seen[0])
        assert seen[1][0] in {"RuntimeError", "ValueError"}
        assert ("", 1.0) == tuple(seen[2])
        assert seconds < 0.5 + 0.3 + 2 * 0.5 + 5.0  # the grace, the way back, two makings


def _group_destroyed_by_a_body(rank: int, world_size: int, how: str) -> list[tuple[str, Any]]:
    world = RenewableGroup(store=_store(f"destroyed by a body, {how}"), rank=rank, world_size=world_size)
    kept: list[Any] = []

    def use() -> float:
        group = dist.new_group([0, 1])
        kept.append(group)  # which keeps its connections
        if how == "cleanup" and rank < 2:
            current_scope().cleanup(dist.destroy_process_group, group)
        try:
            if rank == 1 and len(kept) == 2:
                msg = "before its collectives"
                raise ValueError(msg)
            return _sum_of_ranks(group) if rank < 2 else 1.0
        finally:
            if how == "finally" and rank < 2:
                dist.destroy_process_group(group)

    seen = _in_scopes(world, [use] * 4)
    dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("how", ["finally", "cleanup"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_world_frees_a_rank_that_is_stuck_in_a_group_that_its_peer_has_destroyed(
    how: str, world_size: int, run_on: Run
) -> None:
    """A rank that fails, and destroys the sub-group that its body made, costs one scope."""
    results = run_on(world_size, _group_destroyed_by_a_body, how)

    for rank, seen in enumerate(results):
        assert seen[1][0] == ("RuntimeError", "ValueError", "PeerFailedError")[rank], seen
        assert [("", 1.0)] * 3 == [tuple(seen[number]) for number in (0, 2, 3)], seen


def _time_limit_of_its_own(rank: int, world_size: int, how: str) -> list[tuple[str, Any]]:
    store = _store(f"time limit, {how}")

    def make(own: dist.Store) -> None:
        limit = timedelta(seconds=3)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world_size, timeout=limit)

    world = RenewableGroup(make, store=store, rank=rank, world_size=world_size)

    def fail() -> None:
        if how == "sleeps" and rank == 1:
            here().wait_for("limit")
        elif how == "sleeps":
            try:
                _sum_of_ranks()
            finally:
                here().announce("limit")
        else:
            dist.recv(torch.zeros(1), src=1 - rank)  # each waits for the other

    seen = _in_scopes(world, [_sum_of_ranks, fail, _sum_of_ranks, _sum_of_ranks])
    world.destroy()
    return seen


@pytest.mark.parametrize("how", ["deadlock", "sleeps"])
def test_world_whose_group_ended_by_its_own_time_limit_is_made_again(how: str, run_on: Run) -> None:
    """If all ranks come back by themselves, nobody is stuck, but no collective works on that group any more."""
    for seen in run_on(2, _time_limit_of_its_own, how):
        assert seen[1][0] in ("RuntimeError", "PeerFailedError"), seen
        assert [("", 1.0)] * 3 == [tuple(seen[number]) for number in (0, 2, 3)], seen


def _two_worlds(rank: int, world_size: int) -> list[float]:
    sums = []
    for _ in range(2):
        world = RenewableGroup(store=_store("two worlds"), rank=rank, world_size=world_size)
        with collective_scope(world, timeout=30):
            sums.append(_sum_of_ranks())
        world.destroy()
        del world
    return sums


def test_world_after_another_one_on_the_same_store_is_made_afresh(run_on: Run) -> None:
    """Keys left in the store by an earlier world, such as addresses of its connections, mislead no later one."""
    assert [[1.0, 1.0], [1.0, 1.0]] == run_on(2, _two_worlds)

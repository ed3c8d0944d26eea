"""The faults: what each rank does, and what each is to see."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers itself

from collective_scope import collective_scope
from tests._rank import freeze, here, thaw
from tests.faults._play import PEACE, Actor, Expect, Fault, meet
from tests.hosts import set_cable


__all__ = ["FAULTS"]


# 1. The body raises


def _raise_in_body(me: Actor) -> None:
    if me.is_culprit:
        me.wait_for_peers()
        me.begin()
        error = (ValueError, KeyError, RuntimeError, OSError)[me.rank]
        msg = f"rank {me.rank} gives up"
        raise error(msg)


def _raise_beside_collective(me: Actor) -> None:
    if me.is_culprit:
        me.begin()
        msg = f"rank {me.rank} gives up"
        raise KeyError(msg)
    dist.all_reduce(torch.ones(1))


# 2. A cleanup raises


def _give_up(me: Actor) -> None:
    if me.is_culprit:
        me.begin()
        msg = f"rank {me.rank} gives up"
        raise OSError(msg)


def _give_up_last(me: Actor) -> None:
    me.wait_for_peers()
    _give_up(me)


def _raise_in_cleanup(me: Actor) -> None:
    if me.is_culprit:
        me.scope.cleanup(_give_up_last, me)


def _raise_in_collective_cleanup(me: Actor) -> None:
    me.scope.collective_cleanup(_give_up, me)


# 3. It takes forever


def _sleep_forever(me: Actor) -> None:
    paths = me.release_paths()
    me.begin()
    # Whenever it is asked where it is, this is one of the innermost frames.
    while not all(map(os.path.exists, paths)):
        time.sleep(0.01)


def _sleep_in_body(me: Actor) -> None:
    if me.is_culprit:
        _sleep_forever(me)


def _sleep_in_cleanup(me: Actor) -> None:
    if me.is_culprit:
        me.scope.cleanup(_sleep_forever, me)


def _sleep_if_culprit(me: Actor) -> None:
    if me.is_culprit:
        _sleep_forever(me)


def _sleep_in_collective_cleanup(me: Actor) -> None:
    me.scope.collective_cleanup(_sleep_if_culprit, me)


# 4. It holds the GIL in native code


def _spin_in_native_code(me: Actor) -> None:
    if me.is_culprit:
        me.wait_for_peers()
        me.begin()
        sum(itertools.repeat(0))


def _kill_culprits(me: Actor) -> None:
    for rank in me.fault.culprits:
        os.kill(me.pid(rank), signal.SIGKILL)


# 5. It is blocked in a collective


def _enter_collective_alone(me: Actor) -> None:
    if me.is_culprit:
        me.begin()
        dist.all_reduce(torch.ones(1))


def _enter_collective_too(me: Actor) -> None:  # noqa: ARG001 - any rank does
    dist.all_reduce(torch.ones(1))


# 6. to 9. Signals, and the end of the process


def _do(me: Actor, what: Callable[[Actor], object]) -> None:
    """Do it in the body, while all others wait."""
    if me.is_culprit:
        me.wait_for_peers()
        me.begin()
        what(me)


def _kill(me: Actor) -> None:
    me.begin()
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_body(me: Actor) -> None:
    _do(me, _kill)


def _kill_in_body_and_reap(me: Actor) -> None:
    if me.is_culprit:
        me.begin()
        _kill(me)
    # A survivor that looks while the parent is about to reap learns from the system how the process ended.
    me.wait_until_reaped()


def _kill_beside_collective(me: Actor) -> None:
    if me.is_culprit:
        _kill(me)
    dist.all_reduce(torch.ones(1))


def _kill_in_cleanup(me: Actor) -> None:
    if me.is_culprit:
        me.scope.cleanup(_do, me, _kill)


def _kill_if_culprit(me: Actor) -> None:
    if me.is_culprit:
        _kill(me)


def _kill_in_collective_cleanup(me: Actor) -> None:
    me.scope.collective_cleanup(_kill_if_culprit, me)


def _kill_while_waiting(me: Actor) -> None:
    """Kill one of the ranks that wait for a slow one."""
    if me.is_culprit:
        me.once_waiting(lambda: _kill(me))
    elif me.rank == me.world_size - 1:
        me.wait_for_begin()
        time.sleep(1.5)


def _kill_on_arrival(me: Actor) -> None:
    """Kill the last rank to arrive, when it has been counted and nobody has been told so."""
    if not me.is_culprit:
        me.once_waiting(lambda: here().announce(f"waits-{me.rank}"))
        return
    for rank in me.fault.survivors(me.world_size):
        here().wait_for(f"waits-{rank}")

    add = dist.PrefixStore.add

    def add_and_die(store: dist.PrefixStore, key: str, amount: int) -> int:
        add(store, key, amount)
        _kill(me)
        raise AssertionError

    dist.PrefixStore.add = add_and_die  # type: ignore[method-assign]  # however it goes on from there


def _kill_after_barrier(me: Actor) -> None:
    if me.is_culprit:
        me.scope.after_barrier(_kill, me)


def _stop(me: Actor) -> None:  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_in_body(me: Actor) -> None:
    _do(me, _stop)


def _thaw_culprits(me: Actor) -> None:
    me.wait_for_release()
    for rank in me.fault.culprits:
        thaw(me.pid(rank))


def _freeze_store(me: Actor) -> None:
    """Let rank 1 be the last to come, and find that the store has stopped."""
    if me.rank == 1:
        for rank in range(me.world_size):
            if rank != 1:
                here().wait_for(f"arriving-{rank}")
        me.begin()
        freeze(me.pid("store"))


def _thaw_store(me: Actor) -> None:
    me.wait_for_release()
    thaw(me.pid("store"))


def _exit_hard(me: Actor) -> None:
    _do(me, lambda _: os._exit(0))


def _exit_0(me: Actor) -> None:
    _do(me, lambda _: sys.exit(0))


def _exit_3(me: Actor) -> None:
    _do(me, lambda _: sys.exit(3))


def _segfault(me: Actor) -> None:
    _do(me, lambda _: ctypes.string_at(0))


def _abort(me: Actor) -> None:
    _do(me, lambda _: os.abort())


def _interrupt(me: Actor) -> None:  # noqa: ARG001 - as all of these
    os.kill(os.getpid(), signal.SIGINT)


def _begin_and_interrupt(me: Actor) -> None:
    me.begin()
    _interrupt(me)


def _interrupt_in_body(me: Actor) -> None:
    _do(me, _interrupt)


def _interrupt_twice(me: Actor) -> None:
    if me.is_culprit:
        me.scope.cleanup(_interrupt, me)
    _do(me, _interrupt)


def _interrupt_while_waiting(me: Actor) -> None:
    if me.is_culprit:
        me.once_waiting(lambda: _begin_and_interrupt(me))
    elif me.rank == 0:
        me.wait_until_left(me.fault.culprits[0])


def _interrupt_twice_while_waiting(me: Actor) -> None:
    """Interrupt the body, and then the wait for a peer that does not come."""
    if me.is_culprit:
        me.once_waiting(lambda: _interrupt(me))
        _begin_and_interrupt(me)
    elif me.rank == 0:
        me.wait_until_left(me.fault.culprits[0])


# 10. The body is skipped


def _skip(me: Actor) -> None:
    _do(me, lambda _: pytest.skip("not on this rank"))


# 11. The ranks are at different places


def _differ_in_name(me: Actor) -> None:
    me.begin()
    with collective_scope(name=f"part {me.rank % 2}", timeout=me.fault.timeout):
        pass


def _enter_one_more(me: Actor) -> None:
    if me.is_culprit:
        me.begin()
        with collective_scope(name="one more", timeout=me.fault.timeout):
            pass


def _nest_differently(me: Actor) -> None:
    me.begin()
    names = ("one", "two") if me.rank == 1 else ("two", "one")
    with (
        collective_scope(name=names[0], timeout=me.fault.timeout),
        collective_scope(name=names[1], timeout=me.fault.timeout),
    ):
        pass


def _enter_on_another_group(me: Actor) -> None:
    """Have odd ranks go through a scope of their own, while even ranks wait for all."""
    odd = dist.new_group(list(range(1, me.world_size, 2)))
    me.begin()
    with collective_scope(odd if me.rank % 2 else None, name="part", timeout=me.fault.timeout):
        pass


# 12. The group goes


def _destroy_group(me: Actor) -> None:  # noqa: ARG001
    dist.destroy_process_group()


def _renew_group(me: Actor) -> None:
    group = dist.group.WORLD
    assert group is not None
    store = group.get_group_store()
    dist.destroy_process_group()
    del group
    prefix = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=prefix, rank=me.rank, world_size=me.world_size)


def _renew_group_on_same_keys(me: Actor) -> None:
    dist.destroy_process_group()
    # gloo would take the addresses of the group before for its own; "fake" has none.
    dist.init_process_group(
        "fake", store=meet(me.fault, me.rank, me.world_size), rank=me.rank, world_size=me.world_size
    )


# 13. The rank that hosts the store leaves at once


def _nothing(me: Actor) -> None:
    me.begin()


# 15. The cable between two hosts


def _pull_cable_in_body(me: Actor) -> None:
    """Pull it when everybody is in the body."""
    here().announce(f"in-body-{me.rank}")
    if me.rank == 0:
        for rank in range(me.world_size):
            here().wait_for(f"in-body-{rank}")
        set_cable("down")
        me.begin()
    here().wait_for("fault-0")


def _pull_cable_at_barrier(me: Actor) -> None:
    """Pull it when the ranks of the other host have arrived, and those of this one have not."""
    if me.is_culprit:
        me.once_waiting(lambda: here().announce(f"waits-{me.rank}"))
        return
    if me.rank == 0:
        for rank in me.fault.culprits:
            here().wait_for(f"waits-{rank}")
        set_cable("down")
        me.begin()
    here().wait_for("fault-0")


def _put_cable_back(me: Actor) -> None:
    me.wait_for_release()
    if me.rank == 0:
        for rank in me.fault.culprits:
            here().wait_for(f"tried-{rank}")
        set_cable("up")


def _pull_and_put_back(me: Actor) -> None:
    """Pull it while everybody is in the body, and put it back when all are waiting, or trying to."""
    _pull_cable_in_body(me)
    if me.rank == 0:
        me.scope.cleanup(threading.Thread(target=_put_back_later, daemon=True).start)


def _put_back_later() -> None:
    time.sleep(1.0)  # The wait is the fault.
    set_cable("up")


_FAILED = 0.3
_LOST = 1.0
_LATE = 3.0  # the timeout and a second


def _failed(ranks: tuple[int, ...] = (1,), *says: str, within: float = _FAILED) -> Expect:
    return Expect("PeerFailedError", ranks, says, within)


def _missing(*says: str, ranks: tuple[int, ...] | None = (1,), within: float = _LATE) -> Expect:
    return Expect("BarrierTimeoutError", ranks, says, within)


def _lost(*says: str, ranks: tuple[int, ...] = (1,), within: float = _LOST) -> Expect:
    return Expect("PeerLostError", ranks, says, within)


def _gone(how: str) -> dict[str, Any]:
    """Return what all rows share in which a rank is gone."""
    return {
        "survivor": _lost("rank 1 of", how),
        "next_survivor": _lost("rank 1 of", how),
        "next_culprit": None,
        "after": False,
    }


def _straggler(*says: str) -> dict[str, Any]:
    """Return what all rows share in which a rank comes back when nobody waits any more."""
    return {
        "survivor": _missing("rank 1 of", *says),
        "culprit": _missing("rank 1 of", *says, within=20.0),
        "next_survivor": _missing("rank 1 of", *says, within=2.0),
        "next_culprit": _missing("rank 1 of", *says),
    }


_SLOW: dict[str, Any] = {
    "store": "slow",
    "timeout": 4.0,
    "failure_timeout": 3.0,
    "next_timeout": 4.0,
    "next_survivor": Expect(within=3.0),
    "next_culprit": Expect(within=3.0),
    "peace": Expect(within=3.0),
    "extra_s": 10.0,
    "world_sizes": (2,),
}

_CUT_S = 4.0

_HOSTS: dict[str, Any] = {
    "store": "hosts",
    "timeout": _CUT_S,
    "failure_timeout": 3.0,
    "next_timeout": 4.0,
    "after_timeout": 40.0,
    "heartbeat_timeout": 2.5,
    "extra_s": 40.0,
    "world_sizes": (4,),
    "compare": False,
}

_MISPLACED = Expect("ScopeMismatchError", says=("All ranks of a group must go through the same scopes",), within=0.3)

FAULTS = (
    Fault(
        "body raises on one rank",
        _raise_in_body,
        _failed((1,), "KeyError: 'rank 1 gives up'", "in _raise_in_body"),
        culprit=Expect("KeyError"),
    ),
    Fault(
        "body raises on one rank, over a file",
        _raise_in_body,
        _failed((1,), "KeyError: 'rank 1 gives up'", "in _raise_in_body"),
        culprit=Expect("KeyError"),
        store="file",
    ),
    Fault(
        "body raises on two ranks",
        _raise_in_body,
        _failed((1, 2), "KeyError: 'rank 1 gives up'", "RuntimeError: rank 2 gives up"),
        culprits=(1, 2),
        culprit=(Expect("KeyError"), Expect("RuntimeError")),
        world_sizes=(4,),
    ),
    Fault(
        "body raises on all ranks",
        _raise_in_body,
        PEACE,
        culprits=(0, 1, 2, 3),
        culprit=(Expect("ValueError"), Expect("KeyError"), Expect("RuntimeError"), Expect("OSError")),
        world_sizes=(4,),
    ),
    Fault(
        "body raises, peers are in a collective",
        _raise_beside_collective,
        Expect("RuntimeError", says=("PeerFailedError: rank 1 of", "KeyError: 'rank 1 gives up'"), within=3.0),
        culprit=Expect("KeyError", says=("BarrierTimeoutError",), within=2.5),
        group_timeout=2.0,
        next_timeout=2.0,
    ),
    Fault(
        "local cleanup raises",
        _raise_in_cleanup,
        _failed((1,), "OSError: rank 1 gives up", "cleanup '_give_up_last'"),
        culprit=Expect("OSError"),
    ),
    Fault(
        "collective cleanup raises on one rank",
        _raise_in_collective_cleanup,
        _failed((1,), "OSError: rank 1 gives up", "cleanup '_give_up'"),
        culprit=Expect("OSError"),
    ),
    Fault(
        "sleeps in the body",
        _sleep_in_body,
        **_straggler("in the body of scope 'fault'", "in _sleep_forever"),
    ),
    Fault(
        "sleeps in the body, over a file",
        _sleep_in_body,
        **_straggler("in the body of scope 'fault'", "in _sleep_forever"),
        store="file",
        world_sizes=(2,),
    ),
    Fault(
        "sleeps in a cleanup",
        _sleep_in_cleanup,
        **_straggler("in cleanup '_sleep_forever' (registered at ", "_faults.py:", "in _sleep_forever"),
    ),
    Fault(
        "sleeps in a collective cleanup",
        _sleep_in_collective_cleanup,
        **_straggler("in cleanup '_sleep_if_culprit' (registered at ", "_faults.py:", "in _sleep_forever"),
    ),
    Fault(
        "holds the GIL in native code",
        _spin_in_native_code,
        survivor=_missing("rank 1 of", "no answer for", "native code"),
        next_survivor=_missing("rank 1 of", "no answer for", "native code", within=2.0),
        next_culprit=None,
        release=_kill_culprits,
        after=False,
        exits={1: -signal.SIGKILL},
    ),
    Fault(
        "blocked in a collective that its peers never enter",
        _enter_collective_alone,
        **_straggler("in the body of scope 'fault'", "in _enter_collective_alone", "dist.all_reduce(torch.ones(1))"),
        release=_enter_collective_too,
    ),
    Fault("SIGKILL in the body", _kill_in_body, **_gone("killed by SIGKILL"), exits={1: -signal.SIGKILL}),
    Fault(
        "SIGKILL in the body, a peer is in a collective",
        _kill_beside_collective,
        **_gone("killed by SIGKILL")
        | {"survivor": Expect("RuntimeError", says=("PeerLostError: rank 1 of", "killed by SIGKILL"), within=_LOST)},
        exits={1: -signal.SIGKILL},
        world_sizes=(2,),
    ),
    Fault(
        "SIGKILL in the body of the first scope",
        _kill_in_body,
        **_gone("killed by SIGKILL"),
        exits={1: -signal.SIGKILL},
        first=True,
    ),
    Fault(
        "SIGKILL in the body, reaped at once",
        _kill_in_body_and_reap,
        **_gone("gone"),
        exits={1: -signal.SIGKILL},
        world_sizes=(2,),
        reaped="at once",
    ),
    Fault(
        "SIGKILL in the body, over a file",
        _kill_in_body,
        **_gone("killed by SIGKILL"),
        exits={1: -signal.SIGKILL},
        store="file",
        world_sizes=(2,),
    ),
    Fault("SIGKILL in a cleanup", _kill_in_cleanup, **_gone("killed by SIGKILL"), exits={1: -signal.SIGKILL}),
    Fault(
        "SIGKILL in a collective cleanup",
        _kill_in_collective_cleanup,
        **_gone("killed by SIGKILL"),
        exits={1: -signal.SIGKILL},
    ),
    Fault(
        "SIGKILL while waiting for a slow rank",
        _kill_while_waiting,
        **_gone("killed by SIGKILL"),
        exits={1: -signal.SIGKILL},
        world_sizes=(4,),
    ),
    Fault(
        "SIGKILL on arrival",
        _kill_on_arrival,
        # It has arrived and it has gone: either is true, if all say the same.
        **{**_gone("killed by SIGKILL"), "survivor": attrs.evolve(_lost("rank 1 of"), or_peace=True)},
        exits={1: -signal.SIGKILL},
        compare=False,
    ),
    Fault(
        "SIGKILL after the barrier",
        _kill_after_barrier,
        **{**_gone("killed by SIGKILL"), "survivor": PEACE},
        exits={1: -signal.SIGKILL},
        compare=False,
    ),
    Fault(
        "SIGKILL of the store's host in the body",
        _kill_in_body,
        _lost("rank 0 of", "The group's store (hosted by rank 0) is gone", ranks=(0,)),
        culprits=(0,),
        next_survivor=_lost("rank 0 of", "hosted by rank 0", ranks=(0,)),
        next_culprit=None,
        after=False,
        alike=False,
        exits={0: -signal.SIGKILL},
    ),
    Fault(
        "SIGKILL of the store's host while waiting",
        _kill_while_waiting,
        _lost("rank 0 of", "The group's store (hosted by rank 0) is gone", ranks=(0,)),
        culprits=(0,),
        next_survivor=_lost("rank 0 of", "hosted by rank 0", ranks=(0,)),
        next_culprit=None,
        after=False,
        alike=False,
        exits={0: -signal.SIGKILL},
    ),
    Fault(
        "SIGSTOP, continued after the deadline",
        _stop_in_body,
        survivor=_missing("rank 1 of", "no answer for", "(stopped)"),
        culprit=_missing("rank 1 of", "(stopped)", within=20.0),
        next_survivor=_missing("rank 1 of", "(stopped)", within=2.0),
        next_culprit=_missing("rank 1 of", "(stopped)"),
        release=_thaw_culprits,
    ),
    Fault(
        "SIGSTOP, continued before the deadline",
        _stop_in_body,
        Expect(within=2.0),
        culprit=PEACE,
        thaw_s=1.0,
    ),
    Fault(
        "SIGSTOP of the store's host, continued after the deadline",
        _stop_in_body,
        _missing("The group's store (hosted by rank 0) has not answered for", ranks=None),
        culprits=(0,),
        culprit=_missing(ranks=None, within=20.0),
        next_survivor=_missing("has not answered for", ranks=None, within=2.0),
        next_culprit=_missing(ranks=None, within=20.0),
        release=_thaw_culprits,
        alike=False,
    ),
    Fault(
        "SIGSTOP of the store's host, continued before the deadline",
        _stop_in_body,
        Expect(within=2.0),
        culprits=(0,),
        culprit=PEACE,
        thaw_s=1.0,
        frozen=0,
    ),
    Fault(
        "SIGSTOP of the store's own process, continued after the deadline",
        _freeze_store,
        _missing("The group's store (hosted outside of the group) has not answered for", ranks=None),
        culprits=(),
        next_survivor=_missing("has not answered for", ranks=None, within=2.0),
        release=_thaw_store,
        store="process",
        alike=False,
    ),
    Fault(
        "SIGSTOP of the store's own process, continued before the deadline",
        _freeze_store,
        Expect(within=2.0),
        culprits=(),
        store="process",
        thaw_s=1.0,
        frozen="store",
    ),
    Fault("os._exit(0)", _exit_hard, **_gone("exit code 0")),
    Fault(
        "sys.exit(0)",
        _exit_0,
        _failed((1,), "SystemExit: 0"),
        culprit=Expect("SystemExit"),
        next_survivor=_lost("exit code 0", within=2.0),
        next_culprit=None,
        after=False,
    ),
    Fault(
        "sys.exit(3)",
        _exit_3,
        _failed((1,), "SystemExit: 3"),
        culprit=Expect("SystemExit"),
        next_survivor=_lost("exit code 3", within=2.0),
        next_culprit=None,
        after=False,
        exits={1: 3},
    ),
    Fault("segmentation fault", _segfault, **_gone("killed by SIGSEGV"), exits={1: -signal.SIGSEGV}),
    Fault("abort()", _abort, **_gone("killed by SIGABRT"), exits={1: -signal.SIGABRT}),
    Fault(
        "SIGINT to one rank in its body",
        _interrupt_in_body,
        _failed((1,), "KeyboardInterrupt"),
        culprit=Expect("KeyboardInterrupt"),
    ),
    Fault(
        "SIGINT to one rank while it waits",
        _interrupt_while_waiting,
        _failed((1,), "KeyboardInterrupt", "rank 1 stopped waiting at the barrier"),
        culprit=Expect("KeyboardInterrupt"),
    ),
    Fault(
        "SIGINT to all ranks",
        _interrupt_in_body,
        PEACE,
        culprits=(0, 1, 2, 3),
        culprit=Expect("KeyboardInterrupt"),
        world_sizes=(4,),
    ),
    Fault(
        "SIGINT twice, in the body and in a cleanup",
        _interrupt_twice,
        _failed((1,), "KeyboardInterrupt"),
        culprit=Expect("KeyboardInterrupt"),
    ),
    Fault(
        "SIGINT twice, in the body and while it waits",
        _interrupt_twice_while_waiting,
        _failed((1,), "KeyboardInterrupt"),
        culprit=Expect("KeyboardInterrupt"),
    ),
    Fault(
        "pytest.skip on one rank",
        _skip,
        _failed((1,), "Skipped: not on this rank"),
        culprit=Expect("Skipped"),
    ),
    Fault(
        "pytest.skip on all ranks",
        _skip,
        PEACE,
        culprits=(0, 1),
        culprit=Expect("Skipped"),
        world_sizes=(2,),
    ),
    Fault(
        "scopes of different names",
        _differ_in_name,
        PEACE,
        culprits=(0, 1, 2, 3),
        culprit=_MISPLACED,
        world_sizes=(4,),
        compare=False,
    ),
    Fault(
        "one scope more on one rank",
        _enter_one_more,
        _MISPLACED,
        culprit=_MISPLACED,
        next_survivor=_MISPLACED,
        next_culprit=None,
        after=False,
        compare=False,
    ),
    Fault(
        "scopes nested differently",
        _nest_differently,
        PEACE,
        culprits=(0, 1),
        culprit=_MISPLACED,
        world_sizes=(2,),
        compare=False,
    ),
    Fault(
        "scopes over different groups",
        _enter_on_another_group,
        _MISPLACED,
        culprits=(1, 3),
        culprit=_MISPLACED,
        next_survivor=_lost("ranks 1 and 3 of 4 lost", ranks=(1, 3)),
        next_culprit=_MISPLACED,
        after=False,
        world_sizes=(4,),
        compare=False,
    ),
    Fault(
        "a rank believes in one rank more",
        _nothing,
        _missing("rank 1 of 2 missing"),
        culprit=_missing("ranks 0 and 2 of 3 missing", ranks=(0, 2)),
        next_survivor=_missing("rank 1 of 2 missing", within=2.0),
        next_culprit=_missing("ranks 0 and 2 of 3 missing", ranks=(0, 2), within=2.0),
        after=False,
        alike=False,
        claims={1: 3},
        first=True,
        store="process",  # rank 0 is through with the next scope a moment before rank 1, and ends
        world_sizes=(2,),
        compare=False,
    ),
    Fault("group destroyed in the body", _destroy_group, PEACE, culprits=(), compare=False),
    Fault("group made anew in the body", _renew_group, PEACE, culprits=(), compare=False),
    Fault(
        "the store's host ends right after the scope",
        _nothing,
        PEACE,
        culprits=(0,),
        culprit=PEACE,
        next_survivor=_lost("rank 0 of", "hosted by rank 0", ranks=(0,), within=2.0),
        next_culprit=None,
        after=False,
        alike=False,
        compare=False,
    ),
    # 14. The store is slow: each call takes 0.2 s, and a round takes four.
    Fault("healthy, over a slow store", _nothing, Expect(within=3.0), culprits=(), **_SLOW),
    Fault(
        "body raises on one rank, over a slow store",
        _raise_in_body,
        _failed((1,), "KeyError: 'rank 1 gives up'", "in _raise_in_body", within=4.0),
        culprit=Expect("KeyError", within=4.0),
        **_SLOW,
    ),
    Fault(
        "sleeps in the body, over a slow store",
        _sleep_in_body,
        survivor=_missing("rank 1 of", within=5.0),
        culprit=_missing("rank 1 of", within=20.0),
        **{
            **_SLOW,
            "next_survivor": _missing("rank 1 of", within=5.0),
            "next_culprit": _missing("rank 1 of", within=20.0),
        },
    ),
    # The store is torchrun's, and so are the processes that these fork.
    Fault(
        "body raises on one rank, under torchrun",
        _raise_in_body,
        _failed((1,), "KeyError: 'rank 1 gives up'", "in _raise_in_body"),
        culprit=Expect("KeyError"),
        store="torchrun",
    ),
    Fault(
        "sleeps in the body, under torchrun",
        _sleep_in_body,
        **_straggler("in the body of scope 'fault'", "in _sleep_forever"),
        store="torchrun",
        world_sizes=(2,),
    ),
    Fault(
        "SIGKILL of rank 0 in the body, under torchrun",
        _kill_in_body,
        **{
            **_gone("killed by SIGKILL"),
            "survivor": _lost("rank 0 of", "killed by SIGKILL", ranks=(0,)),
            "next_survivor": _lost("rank 0 of", ranks=(0,)),
        },
        culprits=(0,),
        exits={0: -signal.SIGKILL},
        store="torchrun",
    ),
    Fault(
        "SIGINT to one rank while it waits, under torchrun",
        _interrupt_while_waiting,
        _failed((1,), "KeyboardInterrupt", "rank 1 stopped waiting at the barrier"),
        culprit=Expect("KeyboardInterrupt"),
        store="torchrun",
        world_sizes=(2,),
    ),
    Fault(
        "one scope more on one rank, under torchrun",
        _enter_one_more,
        _MISPLACED,
        culprit=_MISPLACED,
        next_survivor=_MISPLACED,
        next_culprit=None,
        after=False,
        store="torchrun",
        world_sizes=(2,),
        compare=False,
    ),
    Fault(
        "group made anew in the body, under torchrun",
        _renew_group,
        PEACE,
        culprits=(),
        store="torchrun",
        compare=False,
    ),
    Fault(
        "group made anew on the same keys, under torchrun",
        _renew_group_on_same_keys,
        PEACE,
        culprits=(),
        store="torchrun",
        compare=False,
    ),
    # 15. and 16. Two hosts: ranks 0 and 1 on the one with the store, 2 and 3 on one whose clocks are ahead.
    Fault(
        "healthy, on two hosts",
        _nothing,
        PEACE,
        culprits=(),
        **_HOSTS,
    ),
    Fault(
        "body raises on one rank, on two hosts",
        _raise_in_body,
        _failed((2,), "RuntimeError: rank 2 gives up", "in _raise_in_body"),
        culprits=(2,),
        culprit=Expect("RuntimeError"),
        **_HOSTS,
    ),
    Fault(
        "sleeps in the body, on two hosts",
        _sleep_in_body,
        survivor=_missing(
            "rank 2 of", "in the body of scope 'fault' for 4", "in _sleep_forever", ranks=(2,), within=_CUT_S + 1
        ),
        culprits=(2,),
        culprit=_missing("rank 2 of", ranks=(2,), within=20.0),
        next_survivor=_missing("rank 2 of", "in _sleep_forever", ranks=(2,), within=5.0),
        next_culprit=_missing("rank 2 of", ranks=(2,)),
        **_HOSTS,
    ),
    Fault(
        "SIGKILL of all ranks of the other host",
        _kill_in_body,
        _lost("ranks 2 and 3 of", "no answer", "the machine cannot be reached", ranks=(2, 3), within=3.5),
        culprits=(2, 3),
        next_survivor=_lost("ranks 2 and 3 of", ranks=(2, 3), within=3.5),
        next_culprit=None,
        after=False,
        exits={2: -signal.SIGKILL, 3: -signal.SIGKILL},
        **_HOSTS,
    ),
    Fault(
        "cable pulled in the body, put back after the deadline",
        _pull_cable_in_body,
        _lost("ranks 2 and 3 of", ranks=(2, 3), within=3.5),
        culprits=(2, 3),
        culprit=_missing("has not answered for", ranks=None, within=_CUT_S + 1),
        next_survivor=_lost("ranks 2 and 3 of", ranks=(2, 3), within=3.5),
        next_culprit=_missing("has not answered for", ranks=None, within=5.0),
        release=_put_cable_back,
        **_HOSTS,
    ),
    Fault(
        "cable pulled at the barrier, put back after the deadline",
        _pull_cable_at_barrier,
        PEACE,
        culprits=(2, 3),
        culprit=_missing("has not answered for", ranks=None, within=_CUT_S + 1),
        next_survivor=_lost("ranks 2 and 3 of", ranks=(2, 3), within=3.5),
        next_culprit=_missing("has not answered for", ranks=None, within=5.0),
        release=_put_cable_back,
        **_HOSTS,
    ),
    Fault(
        "cable pulled in the body, put back before the deadline",
        _pull_and_put_back,
        Expect(within=3.0),
        culprits=(),
        **_HOSTS,
    ),
)

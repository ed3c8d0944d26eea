"""The faults: what each rank does, and what each is to see."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import itertools
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist

from collective_scope import CollectiveScope, collective_scope
from collective_scope._kill import HELD_S
from collective_scope.agreement.watch import BEATS_S
from tests._rank import freeze, here, thaw
from tests.faults._play import PROMPT_S, QUIETLY, Actor, Expect, Fault, ForkedError, meet
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
        time.sleep(0.01)  # A file cannot be waited for.


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


def _enter_collective_too(me: Actor) -> None:  # noqa: ARG001  (given to every function of a rank)
    dist.all_reduce(torch.ones(1))


# 6. to 9. Signals, and the end of the process


def _do(me: Actor, what: Callable[[Actor], object]) -> None:
    """Do it in the body, while all others wait."""
    if me.is_culprit:
        me.wait_for_peers()
        me.begin()
        what(me)


def _kill(me: Actor) -> None:
    if me.fault.first:
        me.wait_until_known()
    me.begin()
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_body(me: Actor) -> None:
    _do(me, _kill)


def _kill_host(me: Actor) -> None:
    """Have the first culprit kill all of them, so quickly that none can tell of another."""
    if not me.is_culprit:
        return
    me.wait_for_peers()
    first, *others = me.fault.culprits
    if me.rank != first:
        me.begin()
        here().wait_for("never")
    for rank in others:
        here().wait_for(f"fault-{rank}")
    pids = [me.pid(rank) for rank in others]
    me.begin()
    for pid in (*pids, os.getpid()):
        os.kill(pid, signal.SIGKILL)


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
        time.sleep(1.5)  # The wait of the others is the fault.


def _kill_on_arrival(me: Actor) -> None:
    """Kill the last rank to arrive, when it has been counted and nobody has been told so."""
    if not me.is_culprit:
        me.once_waiting(lambda: here().announce(f"waits-{me.rank}"))
        return
    for rank in me.fault.survivors(me.world_size):
        here().wait_for(f"waits-{rank}")

    add = dist.TCPStore.add

    def add_and_die(store: dist.TCPStore, key: str, amount: int) -> int:
        count = add(store, key, amount)
        if key.endswith("/exit/n") and amount:
            _kill(me)
        return count

    dist.TCPStore.add = add_and_die  # type: ignore[method-assign]  # there is no other moment


def _kill_after_barrier(me: Actor) -> None:
    if me.is_culprit:
        me.scope.after_barrier(_kill, me)


def _stop(me: Actor) -> None:  # noqa: ARG001  (given to every function of a rank)
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


def _interrupt(me: Actor) -> None:  # noqa: ARG001  (given to every function of a rank)
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


def _destroy_group(me: Actor) -> None:  # noqa: ARG001  (given to every function of a rank)
    dist.destroy_process_group()


def _destroy_group_and_sleep(me: Actor) -> None:
    if me.is_culprit:
        dist.destroy_process_group()
        _sleep_forever(me)


def _use_and_destroy_group(me: Actor) -> None:  # noqa: ARG001  (given to every function of a rank)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def _make_group_four_times(me: Actor) -> None:
    """Make the group on the same port again and again; the last time, it stays."""
    for life in range(4):
        gc.collect()
        # torch itself does not stand a rank that connects while another one is still at the old server.
        me.meet(f"life {life}")
        dist.init_process_group("gloo")
        if life < 3:
            with collective_scope(name="short", timeout=me.fault.timeout):
                _use_and_destroy_group(me)


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
    # gloo would take the addresses of the group before for its own; this one has none.
    dist.init_process_group(
        "idle", store=meet(me.fault, me.rank, me.world_size), rank=me.rank, world_size=me.world_size
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
    """Put it back when all have given up; until the other host has come back, further scopes are refused."""
    me.wait_for_release()
    if me.rank == 0:
        for rank in me.fault.culprits:
            here().wait_for(f"tried-{rank}")
        me.wait_until_back(me.fault.culprits, lambda: set_cable("up"))
        here().announce("back")
    here().wait_for("back")


def _pull_and_put_back(me: Actor) -> None:
    """Pull it while everybody is in the body, and put it back when all are waiting, or trying to."""
    _pull_cable_in_body(me)
    if me.rank == 0:
        me.scope.cleanup(threading.Thread(target=_put_back_later, daemon=True).start)


def _put_back_later() -> None:
    time.sleep(1.0)  # The wait is the fault.
    set_cable("up")


# 17. The process lacks something


def _use_up_file_descriptors(me: Actor) -> None:
    """Have none left while waiting for the peers, which are late."""
    if not me.is_culprit:
        me.wait_for_begin()
        time.sleep(1.0)  # The culprit's library looks at its peers meanwhile; the wait is the fault.
        return
    fds: list[int] = []

    def use_up() -> None:
        me.begin()
        with contextlib.suppress(OSError):
            while True:
                fds.append(os.open(os.devnull, os.O_RDONLY))

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    me.once_waiting(use_up)
    me.scope.after_barrier(_close_all, fds)


def _close_all(fds: list[int]) -> None:
    assert len(fds) > 100
    for fd in fds:
        os.close(fd)


# 18. All ranks are in their bodies, and the log says what there is to say


class _Announcer(logging.Handler):
    """Announces what is waited for by all once it is logged here."""

    def __init__(self, words: str, name: str) -> None:
        super().__init__()
        self._words, self._name = words, name

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        print(text, file=sys.stderr, flush=True)  # as without a handler
        if self._words in text:
            here().announce(self._name)


def _announce_when_logged(me: Actor, words: str) -> None:
    logging.getLogger("collective_scope").addHandler(_Announcer(words, f"said-{me.rank}"))


def _stay_until_said(ranks: Iterable[int]) -> None:
    for rank in ranks:
        here().wait_for(f"said-{rank}")


def _stay_in_body(me: Actor) -> None:
    """Stay until one rank has said where all are."""
    _announce_when_logged(me, "no rank of")
    me.begin()
    _stay_until_said([0])


def _kill_lowest_and_stay_in_body(me: Actor) -> None:
    """Do the same, with the lowest rank dead."""
    _announce_when_logged(me, "no rank of")
    if me.is_culprit:
        _kill(me)
    _stay_until_said([1])


def _kill_while_all_are_in_bodies(me: Actor) -> None:
    """Kill one when all are in their bodies; each other one stays until it has been told."""
    _announce_when_logged(me, "lost while")
    me.meet("in the body")
    if me.is_culprit:
        _kill(me)
    _stay_until_said([me.rank])


# 19. There is too much to say


def _register_far_too_much(me: Actor) -> None:
    me.begin()
    for number in range(1_500):
        me.scope.collective_cleanup(
            _nothing, me, name=f"{number} " + "é" * 200, fingerprint=lambda: "ü" * 900 + str(me.rank)
        )


# 20. The scope is used against the rules


def _enter_on_two_threads(me: Actor) -> None:
    if me.is_culprit:
        me.wait_for_peers()
        me.begin()
        with ThreadPoolExecutor(1) as executor:
            executor.submit(_enter_and_leave, me).result()


def _enter_and_leave(me: Actor) -> None:
    with collective_scope(name="beside", timeout=me.fault.timeout):
        pass


def _fork_in_body(me: Actor) -> None:
    if me.is_culprit:
        me.begin()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is the fault
            child = os.fork()
        if child == 0:
            raise ForkedError
        assert 0 == os.waitpid(child, 0)[1]


def _leave_out_of_order(me: Actor) -> None:
    inner = collective_scope(name="inner", timeout=me.fault.timeout)
    if me.is_culprit:
        me.begin()
        _left_open.append(inner)
        inner.__enter__()  # a generator that is not closed does this
    else:
        with inner:
            pass


_left_open: list[CollectiveScope] = []


# 21. The process is ended for it


def _sleep_under_capture(me: Actor) -> None:
    """Sleep where nothing that is written to `sys.stderr` is seen, as under pytest."""
    if me.is_culprit:
        sys.stderr = io.StringIO()
        _sleep_forever(me)


_LATE = 2.0 + 1.0 + PROMPT_S  # the timeout of these rows, and a second

_TIMES_OUT: dict[str, Any] = {"timeout": 2.0, "failure_timeout": 1.5, "next_timeout": 1.0}
"""Of rows in which ranks wait in vain."""

_FOR_ITS_TIMEOUT = re.compile(r"in the body of scope 'fault' for [2-7]\.\d s")
"""Where a rank is for which the others have waited, by its own clock: the timeout of these rows, and up to 5 s more."""


def _failed(ranks: tuple[int, ...] = (1,), *says: str, within: float = PROMPT_S) -> Expect:
    return Expect("PeerFailedError", ranks, says, within)


def _missing(*says: str | re.Pattern[str], ranks: tuple[int, ...] | None = (1,), within: float = _LATE) -> Expect:
    return Expect("BarrierTimeoutError", ranks, says, within)


def _lost(*says: str, ranks: tuple[int, ...] = (1,), within: float = PROMPT_S) -> Expect:
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
        "next_survivor": _missing("rank 1 of", *says),
        "next_culprit": _missing("rank 1 of", *says),
        **_TIMES_OUT,
    }


_SLOW: dict[str, Any] = {
    "store": "slow",
    "next_survivor": Expect(within=8.0),
    "next_culprit": Expect(within=8.0),
    "quietly": Expect(within=8.0),
    "extra_s": 10.0,
    "world_sizes": (2,),
}

_HOSTS: dict[str, Any] = {
    "store": "hosts",
    "after_timeout": 40.0,
    "extra_s": 40.0,
    "world_sizes": (4,),
    "compare": False,
}

_SILENT_S = 2.5

_CUT_OFF: dict[str, Any] = _HOSTS | {
    "timeout": 8.0,
    "failure_timeout": 8.0,
    "next_timeout": 8.0,
    "heartbeat_timeout": _SILENT_S,
    # The longer the cable is out, the longer it takes the kernel to find that it is back.
    "culprit_timeout": 3.0,
}
"""Of rows in which the other host is silent for long, which has to be seen before the timeout."""

_SILENT = _lost("ranks 2 and 3 of", ranks=(2, 3), within=BEATS_S + _SILENT_S + PROMPT_S)

_MISMATCH = "All ranks of a group must go through the same scopes"

_MISPLACED = Expect("ScopeMismatchError", says=(_MISMATCH,))

_MISPLACED_OR_TOLD = Expect(
    "ScopeMismatchError",
    says=(_MISMATCH,),
    # A rank that has seen it, and has failed around the scope, may be seen before the mismatch itself.
    otherwise=Expect("PeerFailedError", says=("ScopeMismatchError",)),
)

FAULTS = (
    Fault(
        "body raises on one rank",
        _raise_in_body,
        _failed((1,), "KeyError: 'rank 1 gives up'", "in _raise_in_body"),
        culprit=Expect("KeyError"),
        world_sizes=(2, 4),
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
        QUIETLY,
        culprits=(0, 1, 2, 3),
        culprit=(Expect("ValueError"), Expect("KeyError"), Expect("RuntimeError"), Expect("OSError")),
        world_sizes=(4,),
    ),
    Fault(
        "body raises, peers are in a collective",
        _raise_beside_collective,
        Expect("RuntimeError", says=("PeerFailedError: rank 1 of", "KeyError: 'rank 1 gives up'"), within=10.0),
        culprit=Expect("KeyError", says=("BarrierTimeoutError",), within=8.0),
        group_timeout=4.0,
        failure_timeout=1.0,
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
        world_sizes=(2, 4),
        ends_in_full=True,
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
        next_survivor=_missing("rank 1 of", "no answer for", "native code"),
        next_culprit=None,
        **_TIMES_OUT,
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
    Fault(
        "SIGKILL in the body",
        _kill_in_body,
        **_gone("killed by SIGKILL"),
        exits={1: -signal.SIGKILL},
        world_sizes=(2, 4),
    ),
    Fault(
        "SIGKILL in the body, a peer is in a collective",
        _kill_beside_collective,
        **_gone("killed by SIGKILL")
        | {"survivor": Expect("RuntimeError", says=("PeerLostError: rank 1 of", "killed by SIGKILL"), within=PROMPT_S)},
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
        **{**_gone("killed by SIGKILL"), "survivor": attrs.evolve(_lost("rank 1 of"), otherwise=QUIETLY)},
        exits={1: -signal.SIGKILL},
        compare=False,
    ),
    Fault(
        "SIGKILL after the barrier",
        _kill_after_barrier,
        **{**_gone("killed by SIGKILL"), "survivor": QUIETLY},
        exits={1: -signal.SIGKILL},
        compare=False,
    ),
    Fault(
        "SIGKILL of the store's host in the body",
        _kill_in_body,
        _lost("rank 0 of", "The group's store (served by rank 0) is gone", ranks=(0,)),
        culprits=(0,),
        next_survivor=_lost("rank 0 of", "served by rank 0", ranks=(0,)),
        next_culprit=None,
        after=False,
        alike=False,
        exits={0: -signal.SIGKILL},
    ),
    Fault(
        "SIGKILL of the store's host while waiting",
        _kill_while_waiting,
        _lost("rank 0 of", "The group's store (served by rank 0) is gone", ranks=(0,)),
        culprits=(0,),
        next_survivor=_lost("rank 0 of", "served by rank 0", ranks=(0,)),
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
        next_survivor=_missing("rank 1 of", "(stopped)"),
        next_culprit=_missing("rank 1 of", "(stopped)"),
        release=_thaw_culprits,
        **_TIMES_OUT,
        ends_in_full=True,
    ),
    Fault(
        "SIGSTOP, continued before the deadline",
        _stop_in_body,
        Expect(within=8.0),
        culprit=QUIETLY,
        thaw_s=1.0,
    ),
    Fault(
        "SIGSTOP of the store's host, continued after the deadline",
        _stop_in_body,
        _missing("The group's store (served by rank 0) has not answered for", ranks=None),
        culprits=(0,),
        culprit=_missing(ranks=None, within=20.0),
        next_survivor=_missing("has not answered for", ranks=None),
        next_culprit=_missing(ranks=None, within=20.0),
        release=_thaw_culprits,
        alike=False,
        **_TIMES_OUT,
        ends_in_full=True,
    ),
    Fault(
        "SIGSTOP of the store's host, continued before the deadline",
        _stop_in_body,
        Expect(within=8.0),
        culprits=(0,),
        culprit=QUIETLY,
        thaw_s=1.0,
        frozen=0,
    ),
    Fault(
        "SIGSTOP of the store's own process, continued after the deadline",
        _freeze_store,
        _missing("has not answered for", ranks=None),
        culprits=(),
        next_survivor=_missing("has not answered for", ranks=None),
        release=_thaw_store,
        store="process",
        alike=False,
        **_TIMES_OUT,
    ),
    Fault(
        "SIGSTOP of the store's own process, continued before the deadline",
        _freeze_store,
        Expect(within=8.0),
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
        next_survivor=_lost("exit code 0"),
        next_culprit=None,
        after=False,
        ends_in_full=True,
    ),
    Fault(
        "sys.exit(3)",
        _exit_3,
        _failed((1,), "SystemExit: 3"),
        culprit=Expect("SystemExit"),
        next_survivor=_lost("exit code 3"),
        next_culprit=None,
        after=False,
        exits={1: 3},
        ends_in_full=True,
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
        world_sizes=(2, 4),
    ),
    Fault(
        "SIGINT to all ranks",
        _interrupt_in_body,
        QUIETLY,
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
        QUIETLY,
        culprits=(0, 1),
        culprit=Expect("Skipped"),
        world_sizes=(2,),
    ),
    Fault(
        "scopes of different names",
        _differ_in_name,
        QUIETLY,
        culprits=(0, 1, 2, 3),
        culprit=_MISPLACED_OR_TOLD,
        world_sizes=(4,),
        compare=False,
    ),
    Fault(
        "one scope more on one rank",
        _enter_one_more,
        _failed((1,), "ScopeMismatchError", _MISMATCH),
        culprit=_MISPLACED,
        compare=False,
    ),
    Fault(
        "scopes nested differently",
        _nest_differently,
        QUIETLY,
        culprits=(0, 1),
        culprit=_MISPLACED_OR_TOLD,
        world_sizes=(2,),
        compare=False,
    ),
    Fault(
        "scopes over different groups",
        _enter_on_another_group,
        _MISPLACED,
        culprits=(1, 3),
        culprit=_failed((0, 2), "ScopeMismatchError", _MISMATCH),
        world_sizes=(4,),
        compare=False,
    ),
    Fault(
        "a rank believes in one rank more",
        _nothing,
        _missing("rank 1 of 2 missing"),
        culprit=_missing("ranks 0 and 2 of 3 missing", ranks=(0, 2)),
        next_survivor=_missing("rank 1 of 2 missing"),
        next_culprit=_missing("ranks 0 and 2 of 3 missing", ranks=(0, 2)),
        after=False,
        alike=False,
        claims={1: 3},
        first=True,
        **_TIMES_OUT,
        store="process",  # rank 0 is through with the next scope before rank 1, and ends
        world_sizes=(2,),
        compare=False,
    ),
    Fault("group destroyed in the body", _destroy_group, QUIETLY, culprits=(), compare=False),
    Fault("group made anew in the body", _renew_group, QUIETLY, culprits=(), compare=False),
    Fault(
        "the store's host ends right after the scope",
        _nothing,
        QUIETLY,
        culprits=(0,),
        culprit=QUIETLY,
        next_survivor=_lost("rank 0 of", "served by rank 0", ranks=(0,)),
        next_culprit=None,
        after=False,
        alike=False,
        compare=False,
        ends_in_full=True,
    ),
    Fault(
        "group destroyed after the scope by a rank that sleeps then",
        _nothing,
        QUIETLY,
        culprit=QUIETLY,
        between=_destroy_group_and_sleep,
        next_survivor=_missing("rank 1 of", "has destroyed its group after scope 'fault'"),
        next_culprit=None,
        after=False,
        compare=False,
        **_TIMES_OUT,
    ),
    Fault(
        "group destroyed in the body, and made again on the same port four times",
        _use_and_destroy_group,
        QUIETLY,
        culprits=(),
        between=_make_group_four_times,
        store="env",
        compare=False,
    ),
    Fault(
        "no file descriptors left on one rank",
        _use_up_file_descriptors,
        Expect(within=8.0),
        culprit=Expect(within=8.0),
        compare=False,
    ),
    Fault(
        "all ranks are in their bodies for long",
        _stay_in_body,
        QUIETLY,
        culprits=(),
        warn_after=0.6,
        logs={
            0: (
                "no rank of",
                "has come to the exit of scope 'fault'",
                "in _stay_until_said",
                "where:    0  ",
                "\n            1  ",
            )
        },
        compare=False,
        world_sizes=(2, 4),
    ),
    Fault(
        "all ranks are in their bodies for long, the lowest one is dead",
        _kill_lowest_and_stay_in_body,
        _lost("rank 0 of", "killed by SIGKILL", ranks=(0,)),
        culprits=(0,),
        next_survivor=_lost("rank 0 of", ranks=(0,)),
        next_culprit=None,
        after=False,
        exits={0: -signal.SIGKILL},
        warn_after=0.6,
        logs={1: ("no rank of", "in _stay_until_said", "where:    1  ")},
        store="process",
        compare=False,
    ),
    Fault(
        "SIGKILL while all ranks are in their bodies",
        _kill_while_all_are_in_bodies,
        **_gone("killed by SIGKILL"),
        exits={1: -signal.SIGKILL},
        logs={rank: (f"lost while rank {rank} has been in scope 'fault'", "killed by SIGKILL") for rank in (0, 2, 3)},
        compare=False,
    ),
    Fault(
        "verdict over 8 MiB",
        _register_far_too_much,
        QUIETLY,
        culprits=(0, 1, 2, 3),
        culprit=Expect("CleanupMismatchError", says=("ranks disagree on the collective cleanups",), within=20.0),
        world_sizes=(4,),
        compare=False,
    ),
    Fault(
        "two threads on one group",
        _enter_on_two_threads,
        _failed(
            (1,), "RuntimeError: scope 'beside' cannot be entered: another thread of this process is in scope 'fault'"
        ),
        culprit=Expect("RuntimeError", says=("a rank is one thread at a time",)),
        compare=False,
    ),
    Fault(
        "a forked child leaves the body by an exception",
        _fork_in_body,
        QUIETLY,
        culprit=QUIETLY,
        compare=False,
    ),
    Fault(
        "scope left before one within it",
        _leave_out_of_order,
        Expect("PeerFailedError", says=("RuntimeError: scope 'fault' was left before scope 'inner'",)),
        culprit=Expect("RuntimeError", says=("reverse order in which they were entered",)),
        compare=False,
    ),
    Fault(
        "kill_after ends a rank that sleeps in its body",
        _sleep_under_capture,
        _lost("rank 1 of", "exit code 124", "not left within 1.0 s; its process was ended"),
        next_survivor=_lost("rank 1 of", "exit code 124"),
        next_culprit=None,
        after=False,
        exits={1: 124},
        kill_after=1.0,
        logs={1: ("scope 'fault' was not left within kill_after=1.0 s", "in _sleep_forever", "rank 0: ")},
        compare=False,
    ),
    Fault(
        "kill_after ends a rank that holds the GIL in native code",
        _spin_in_native_code,
        _lost("rank 1 of", "exit code 124", within=1.0 + HELD_S + PROMPT_S),
        next_survivor=_lost("rank 1 of", "exit code 124"),
        next_culprit=None,
        after=False,
        exits={1: 124},
        kill_after=1.0,
        logs={1: ("in _spin_in_native_code",)},
        compare=False,
    ),
    # 14. The store is slow: each call takes 0.1 s.
    Fault("healthy, over a slow store", _nothing, Expect(within=8.0), culprits=(), **_SLOW),
    Fault(
        "body raises on one rank, over a slow store",
        _raise_in_body,
        _failed((1,), "KeyError: 'rank 1 gives up'", "in _raise_in_body", within=10.0),
        culprit=Expect("KeyError", within=10.0),
        **_SLOW,
    ),
    Fault(
        "sleeps in the body, over a slow store",
        _sleep_in_body,
        survivor=_missing("rank 1 of", within=12.0),
        culprit=_missing("rank 1 of", within=20.0),
        **_SLOW
        | {
            "timeout": 3.0,
            "failure_timeout": 2.0,
            "next_timeout": 3.0,
            "next_survivor": _missing("rank 1 of", within=12.0),
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
        _failed((1,), "ScopeMismatchError", _MISMATCH),
        culprit=_MISPLACED,
        store="torchrun",
        world_sizes=(2,),
        compare=False,
    ),
    Fault(
        "group made anew in the body, under torchrun",
        _renew_group,
        QUIETLY,
        culprits=(),
        store="torchrun",
        compare=False,
    ),
    Fault(
        "group made anew on the same keys, under torchrun",
        _renew_group_on_same_keys,
        QUIETLY,
        culprits=(),
        store="torchrun",
        compare=False,
    ),
    # 15. and 16. Two hosts: ranks 0 and 1 on the one with the store, 2 and 3 on one whose clocks are ahead.
    Fault(
        "healthy, on two hosts",
        _nothing,
        QUIETLY,
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
        survivor=_missing("rank 2 of", _FOR_ITS_TIMEOUT, "in _sleep_forever", ranks=(2,)),
        culprits=(2,),
        culprit=_missing("rank 2 of", ranks=(2,), within=20.0),
        next_survivor=_missing("rank 2 of", "in _sleep_forever", ranks=(2,)),
        next_culprit=_missing("rank 2 of", ranks=(2,)),
        **_HOSTS | _TIMES_OUT,
    ),
    Fault(
        "SIGKILL of all ranks of the other host",
        _kill_host,
        attrs.evolve(_SILENT, says=("ranks 2 and 3 of", "no answer", "the machine cannot be reached")),
        culprits=(2, 3),
        next_survivor=_SILENT,
        next_culprit=None,
        after=False,
        exits={2: -signal.SIGKILL, 3: -signal.SIGKILL},
        **_CUT_OFF,
    ),
    Fault(
        "cable pulled in the body, put back after the deadline",
        _pull_cable_in_body,
        _SILENT,
        culprits=(2, 3),
        culprit=_missing("has not answered for", ranks=None, within=3.0 + PROMPT_S),
        next_survivor=_SILENT,
        next_culprit=_missing("has not answered for", ranks=None, within=3.0 + PROMPT_S),
        release=_put_cable_back,
        **_CUT_OFF,
    ),
    Fault(
        "cable pulled at the barrier, put back after the deadline",
        _pull_cable_at_barrier,
        QUIETLY,
        culprits=(2, 3),
        culprit=_missing("has not answered for", ranks=None, within=3.0 + PROMPT_S),
        next_survivor=_SILENT,
        next_culprit=_missing("has not answered for", ranks=None, within=3.0 + PROMPT_S),
        release=_put_cable_back,
        **_CUT_OFF,
    ),
    Fault(
        "cable pulled in the body, put back before the deadline",
        _pull_and_put_back,
        Expect(within=8.0),
        culprits=(),
        **_HOSTS,
    ),
)

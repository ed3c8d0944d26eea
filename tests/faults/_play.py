"""
The inside of a rank that takes part in a fault.

A rank process of the harness stays as it is: for each fault it forks a child, which
has torch imported already, makes a group of its own, plays its part, and ends as
Python processes end. The parent owns the child's bound: it asks for stacks and kills.

A part consists of three scopes: the one in which the fault happens, the next one on
the same group, and, where everybody lives on, one after all have come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import pickle
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import attrs
import torch
import torch.distributed as dist

from collective_scope import Verdict, collective_scope
from collective_scope.agreement.stacks import no_collection
from tests._rank import LOOPBACK, here


__all__ = [
    "LONG_S",
    "PROMPT_S",
    "QUIETLY",
    "Actor",
    "Ending",
    "Expect",
    "Fault",
    "ForkedError",
    "Mechanism",
    "Part",
    "Performance",
    "find_port",
    "meet",
    "perform",
]

Mechanism = Literal["scope", "barrier", "monitored_barrier"]

GRACE_S = 8.0
"""How long after the last deadline of its scopes a process may live."""

LONG_S = 20.0
"""The timeout of scopes that are not supposed to time out. Above every time in which something has to be known."""

PROMPT_S = 6.0
"""In which what is known at once has to be known: a second, and five more for a busy machine."""

SLOW_S = 0.1
"""How long a reply of a slow store is under way."""

# Seconds by which the monotonic clock of this host is ahead, if it is one of `tests.hosts`.
_AHEAD_S = float(os.environ.get("TESTS_MONOTONIC_OFFSET_S", "0"))

_POLL_S = 0.01
_STACKS_S = 0.5
_FIRST_S = 60.0  # Anything that is no part of the fault.


@attrs.frozen
class Expect:
    """
    The end of a scope as a rank is to see it.

    Attributes:
        error: Qualified name of the exception's class; empty if the scope is left quietly.

        ranks: The ranks that the error names, as missing, lost or failed; ``None`` if it names none.

        says: Parts of its text, or patterns that are found in it.

        within: Seconds from the fault, or from the rank's arrival if that is later.

        otherwise: An end as good, if all that are alike see it.
    """

    error: str = ""
    ranks: tuple[int, ...] | None = None
    says: tuple[str | re.Pattern[str], ...] = ()
    within: float = PROMPT_S
    otherwise: Expect | None = None


QUIETLY = Expect()


@attrs.frozen
class Fault:
    """
    Something that goes wrong, and what every rank is to make of it.

    Attributes:
        name: Its name in the table.

        act: The body of the first scope, on every rank.

        survivor: How survivors see it.

        culprits: Ranks on which something goes wrong.

        culprit: Their ends: all the same, or one each; ``None`` if they do not live to tell.

        next_survivor: How survivors see the next scope; ``None`` if they do not enter it.

        next_culprit: Likewise.

        between: Every rank calls it between the first scope and the next.

        release: A survivor calls it after its next scope, so that culprits come back.

        after: Whether everybody comes back for a third scope, which then works.

        quietly: A quiet end; where everything takes long, that takes longer.

        alike: Whether all survivors get the same verdict, which takes a store.

        exits: Exit codes, other than 0, or minus the signal.

        world_sizes: Sizes to do it with.

        store: The meeting place: rank 0, a process of its own, the same with replies
            that take `SLOW_S`, a file, the agent of a torchrun that plays it, or that of
            one on the first of two hosts with as many ranks. With ``"env"``, rank 0 serves it as long as
            there is a default group, as programs without a launcher have it.

        logs: Text that ranks write to their standard error, by rank. Ranks not named write nothing of all this.

        claims: How many ranks there are, by those that are wrong about it. The group then
            has no communicator, which would not start.

        thaw_s: Seconds from the fault to the moment at which a stopped process goes on.

        frozen: That process: a rank, or the store's.

        timeout: Of the first scope, in seconds. The table is made with 2 instead of `LONG_S`.

        failure_timeout: Of the first scope. Of the others, it is as long as their timeout.

        culprit_timeout: Of the first two scopes, on culprits; ``None`` if they are as patient as the others.

        next_timeout: Of the next scope.

        after_timeout: Of the one after that.

        heartbeat_timeout: Of the first two, in seconds; then, hosts that were cut off get their time.

        warn_after: Of all scopes, in seconds.

        kill_after: Of the first scope, on culprits.

        group_timeout: Of the group's collectives, in seconds; ``None`` is torch's.

        extra_s: Seconds that the fault itself takes.

        reaped: When the parents of culprits ask how these ended.

        first: Whether the fault happens in the first scope of the group; otherwise one went well.

        ends_in_full: Whether processes that live to their end take down the C++ of torch too.

        compare: Whether the same can be done with a bare barrier.
    """

    name: str
    act: Callable[[Actor], object]
    survivor: Expect
    culprits: tuple[int, ...] = (1,)
    culprit: Expect | tuple[Expect, ...] | None = None
    next_survivor: Expect | None = QUIETLY
    next_culprit: Expect | None = QUIETLY
    between: Callable[[Actor], object] | None = None
    release: Callable[[Actor], object] | None = None
    quietly: Expect = QUIETLY
    alike: bool = True
    exits: Mapping[int, int] = attrs.field(factory=dict)
    after: bool = True
    world_sizes: tuple[int, ...] = (3,)
    store: Literal["rank0", "process", "slow", "file", "torchrun", "hosts", "env"] = "rank0"
    logs: Mapping[int, tuple[str, ...]] = attrs.field(factory=dict)
    claims: Mapping[int, int] = attrs.field(factory=dict)
    thaw_s: float | None = None
    frozen: int | Literal["store"] = 1
    timeout: float = LONG_S
    failure_timeout: float = LONG_S
    culprit_timeout: float | None = None
    next_timeout: float = LONG_S
    after_timeout: float = LONG_S
    heartbeat_timeout: float = 30.0
    warn_after: float | None = 10.0
    kill_after: float | None = None
    group_timeout: float | None = None
    extra_s: float = 0.0
    reaped: Literal["late", "at once"] = "late"
    first: bool = False
    ends_in_full: bool = False
    compare: bool = True

    def survivors(self, world_size: int) -> tuple[int, ...]:
        """Return the ranks on which nothing goes wrong."""
        return tuple(rank for rank in range(world_size) if rank not in self.culprits)

    @property
    def bound_s(self) -> float:
        """Longest life of a process, counted from when its group is there."""
        return self.timeout + 2 * (self.next_timeout + 1.0) + 1.0 + self.extra_s + (self.thaw_s or 0.0) + GRACE_S

    def expected(self, rank: int, number: int) -> Expect | None:
        """Return what *rank* is to see in the scope *number*, counted from 0; ``None`` if it is not there."""
        if rank not in self.culprits:
            return (self.survivor, self.next_survivor, self.quietly)[number]
        if self.culprit is None:
            return None
        first = self.culprit
        if isinstance(first, tuple):
            first = first[self.culprits.index(rank)]
        return (first, self.next_culprit, self.quietly)[number]


@attrs.frozen
class Ending:
    """
    How a scope ended on one rank. Times are seconds of the clock that all processes share.

    Attributes:
        error: Qualified name of what it raised; empty if it did not.

        text: ``str()`` of that, and its notes.

        traceback: Formatted, for whoever reads of a failed test.

        verdict: The scope's verdict.

        began: When the scope was entered.

        arrived: When the last cleanup was through.

        ended: When the scope was left.

        entered: Whether the body ran.
    """

    error: str
    text: str
    traceback: str = attrs.field(repr=False)
    verdict: Verdict | None
    began: float
    arrived: float
    ended: float
    entered: bool


@attrs.frozen
class Part:
    """
    The view of one rank.

    Attributes:
        endings: How its scopes ended.

        cleanups: Numbers of the local cleanups that ran, by scope, in this order.
    """

    endings: tuple[Ending, ...]
    cleanups: tuple[tuple[int, ...], ...]


@attrs.frozen
class Performance:
    """
    The outcome of one rank's process.

    Attributes:
        exit: Its exit code, or minus the signal that killed it.

        outlived: Whether it had to be killed.

        lived_s: Seconds it lived, from when its group was there.

        part: Its view; ``None`` if it did not live to tell.

        faulted: When its part of the fault began; ``None`` if it had none.

        log: Its text on its standard error.
    """

    exit: int
    outlived: bool
    lived_s: float
    part: Part | None
    faulted: float | None
    log: str = attrs.field(repr=False)


@attrs.define(eq=False)
class Actor:
    """One rank, as a fault's functions see it."""

    fault: Fault
    rank: int
    world_size: int
    mechanism: Mechanism
    scope: Any = None
    endings: list[Ending] = attrs.field(factory=list)
    cleanups: list[list[int]] = attrs.field(factory=list)
    arrived: float = 0.0
    pid_of_rank: int = attrs.field(factory=os.getpid)

    # For the functions of faults.

    @property
    def is_culprit(self) -> bool:
        """Whether something goes wrong on this rank."""
        return self.rank in self.fault.culprits

    def begin(self) -> None:
        """Note that the fault happens now."""
        _write(f"fault-{self.rank}", repr(_now()))

    def wait_for_peers(self) -> None:
        """Return when all survivors are on their way into the barrier."""
        for rank in self.fault.survivors(self.world_size):
            here().wait_for(f"arriving-{rank}")

    def meet(self, name: str) -> None:
        """Let all ranks come here."""
        here().announce(f"{name} {self.rank}")
        for rank in range(self.world_size):
            here().wait_for(f"{name} {rank}")

    def release_paths(self) -> list[str]:
        """Return what is there once all survivors have given up on the first scope, and have tried the next."""
        return [str(_path(f"tried-{rank}")) for rank in self.fault.survivors(self.world_size)]

    def wait_for_release(self) -> None:
        """Return when that is so."""
        for rank in self.fault.survivors(self.world_size):
            here().wait_for(f"tried-{rank}")

    def wait_for_begin(self) -> None:
        """Return when the fault has happened."""
        for rank in self.fault.culprits:
            here().wait_for(f"fault-{rank}")

    def wait_until_known(self) -> None:
        """Return when the store has which process this rank is: until then its peers cannot see that it ends."""
        while self.mechanism == "scope" and self._record(self._view(), self.rank) is None:
            time.sleep(_POLL_S)  # A key cannot be waited for until it changes.

    def wait_until_left(self, rank: int) -> None:
        """Return when *rank* has left the first scope."""
        here().wait_for(f"left-fault-{rank}")

    def wait_until_reaped(self) -> None:
        """Return when the parents of the culprits have asked how these ended."""
        for rank in self.fault.culprits:
            here().wait_for(f"ended-{rank}")

    def pid(self, who: int | str) -> int:
        """Return the process id of a rank, or of the store's process."""
        here().wait_for(f"pid-{who}")
        return int(_read(f"pid-{who}"))

    def wait_until_back(self, ranks: Iterable[int], reconnect: Callable[[], object]) -> None:
        """Call *reconnect*; return when *ranks*, which were silent until then, are heard of and wait in the last scope."""
        from collective_scope.agreement.store_thread import base_of, peek  # noqa: PLC0415  (as below)

        view = self._view()
        store = base_of(view)

        def beat(rank: int) -> bytes:
            return peek(store, f"collective_scope/beat/{self._record(view, rank).process.key}")

        before = {rank: beat(rank) for rank in ranks}
        reconnect()
        for rank in ranks:
            while beat(rank) == before[rank] or not self._record(view, rank).scope.endswith(" after"):
                time.sleep(_POLL_S)  # A key cannot be waited for until it changes.

    def once_waiting(self, act: Callable[[], object]) -> None:
        """Have a thread of this process call *act* once the main thread waits at the barrier."""
        threading.Thread(target=self._when_waiting, args=(act,), daemon=True).start()

    def _when_waiting(self, act: Callable[[], object]) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while True:
            with no_collection():
                frame = sys._current_frames().get(main)  # noqa: SLF001 - documented, for this purpose
                names = {each.f_code.co_name for each, _ in traceback.walk_stack(frame)}
            if names & {"_await", "barrier", "monitored_barrier"} and self._has_told():
                act()
                return
            time.sleep(_POLL_S)  # A frame cannot be waited for.

    def _has_told(self) -> bool:
        """Whether the store knows that this rank has arrived."""
        if self.mechanism != "scope":
            return True
        record = self._record(self._view(), self.rank)
        return record is not None and record.arrived and record.stage == "exit"

    @staticmethod
    def _view() -> Any:
        """Return a client of the default group's store."""
        group = dist.group.WORLD
        assert group is not None
        return group.get_group_store().clone()  # type: ignore[attr-defined]  # missing in torch's stubs

    @staticmethod
    def _record(view: Any, rank: int) -> Any:
        """Return what *rank* has told."""
        from collective_scope.agreement.records import Record  # noqa: PLC0415  (no other part is to look inside)
        from collective_scope.agreement.store_thread import base_of, peek  # noqa: PLC0415  (imported where it is needed)

        life = peek(view, f"life of {dist.get_world_size()}").decode()
        return Record.decode(peek(base_of(view), f"collective_scope/{life}/rank/{rank}"))

    # The play around them.

    def play(self) -> None:
        """Go through the scopes."""
        if self.mechanism == "scope" and not self.fault.first:
            with collective_scope(name="before", timeout=_FIRST_S):
                pass
            # The store may be killed next: not before all have read the verdict.
            here().announce(f"before-{self.rank}")
            for rank in range(self.world_size):
                here().wait_for(f"before-{rank}")
        self._go_through("fault", self._patience(self.fault.timeout), lambda: self.fault.act(self))
        if self.mechanism == "scope":
            self._go_on()
        else:
            self._release_after_plain_barrier()
        here().announce(f"through-{self.rank}")
        if not self.is_culprit or self.fault.after:
            # One of these may host the store.
            for rank in self.fault.survivors(self.world_size):
                here().wait_for(f"through-{rank}")

    def _go_on(self) -> None:
        """Go through the scopes after the first one."""
        if self.fault.between is not None:
            self.fault.between(self)
        expect = self.fault.expected(self.rank, 1)
        if expect is None:
            return
        if expect.error == "PeerLostError" and not self.fault.after:
            for rank in self.fault.culprits:
                here().wait_for(f"dead-{rank}")
        timeout = self._patience(self.fault.next_timeout)
        self._go_through("next", timeout, _nothing if expect.error else self._use_group)
        here().announce(f"tried-{self.rank}")
        if not self.is_culprit and self.fault.release is not None:
            self.fault.release(self)
        if self.fault.after:
            # Until the stragglers are back, each further scope is refused at once.
            for rank in range(self.world_size):
                here().wait_for(f"left-next-{rank}")
            self._go_through("after", self.fault.after_timeout, self._use_group)

    def _release_after_plain_barrier(self) -> None:
        here().announce(f"tried-{self.rank}")
        if not self.is_culprit and self.fault.release is not None:
            # A bare barrier that timed out has closed the group's connections.
            with contextlib.suppress(RuntimeError):
                self.fault.release(self)

    def _use_group(self) -> None:
        if dist.is_initialized() and dist.get_backend() == "gloo" and self.fault.group_timeout is None:
            total = torch.ones(1)
            dist.all_reduce(total)
            assert self.world_size == int(total)

    def _go_through(self, name: str, timeout: float, body: Callable[[], object]) -> None:
        """Go through a scope, and leave word of how it ended."""
        error: BaseException | None = None
        entered = False
        began = self.arrived = _now()
        number = len(self.cleanups)
        self.cleanups.append([])
        scope = self._new_scope(name, timeout)
        try:
            with scope as self.scope:
                entered = True
                self.scope.cleanup(self._arrive)  # the last one to run
                for each in range(3):
                    self.scope.cleanup(self.cleanups[number].append, each)
                body()
        except BaseException as raised:  # noqa: BLE001  (kept, and looked at by the test)
            error = raised
        if os.getpid() != self.pid_of_rank:
            # A child that was forked in the body: nothing of this is to have happened to it.
            os._exit(0 if isinstance(error, ForkedError) and not self.cleanups[number] else 1)
        ended = _now()
        here().announce(f"left-{name}-{self.rank}")
        verdict = getattr(error, "verdict", None) or getattr(scope, "verdict", None)
        ending = Ending(
            error=type(error).__qualname__ if error is not None else "",
            text="\n".join([str(error), *getattr(error, "__notes__", ())]) if error is not None else "",
            traceback="".join(traceback.format_exception(error)) if error is not None else "",
            verdict=verdict,
            began=began,
            arrived=self.arrived,
            ended=ended,
            entered=entered,
        )
        self.endings.append(ending)
        # Now: it may not live to tell later.
        _write(f"part-{self.rank}", pickle.dumps(Part(tuple(self.endings), tuple(map(tuple, self.cleanups)))))

    def _patience(self, timeout: float) -> float:
        limit = self.fault.culprit_timeout
        return timeout if limit is None or not self.is_culprit else limit

    def _arrive(self) -> None:
        self.arrived = _now()
        here().announce(f"arriving-{self.rank}")

    def _new_scope(self, name: str, timeout: float) -> Any:
        if self.mechanism == "scope":
            # In the last one, ranks that were cut off have time to come back.
            seconds = LONG_S if name == "after" else self.fault.heartbeat_timeout
            os.environ["COLLECTIVE_SCOPE_HEARTBEAT_TIMEOUT"] = str(seconds)
            return collective_scope(
                name=name,
                timeout=timeout,
                failure_timeout=min(timeout, self.fault.failure_timeout) if name == "fault" else timeout,
                warn_after=self.fault.warn_after,
                kill_after=self.fault.kill_after if name == "fault" and self.is_culprit else None,
            )
        barrier = dist.barrier if self.mechanism == "barrier" else dist.monitored_barrier
        # Without it, the latter would wait for half an hour, whatever the group's own limit is.
        return _plain_scope(partial(barrier, timeout=timedelta(seconds=timeout)))


class ForkedError(Exception):
    """Raised in a child that a body has forked, to leave that body."""


class _PlainScope:
    """Today's usual code, with the same methods."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def cleanup(self, fn: Callable[..., object], *args: Any) -> None:
        self.calls.append(lambda: fn(*args))

    def collective_cleanup(self, fn: Callable[..., object], *args: Any, **_: Any) -> None:
        self.cleanup(fn, *args)


@contextlib.contextmanager
def _plain_scope(barrier: Callable[[], object]) -> Iterator[_PlainScope]:
    scope = _PlainScope()
    try:
        yield scope
    finally:
        while scope.calls:
            scope.calls.pop()()
        barrier()


def _nothing() -> None:
    pass


def _now() -> float:
    """Return the seconds of a clock that all processes share."""
    return time.monotonic() - _AHEAD_S


# The processes


def perform(rank: int, _: int, fault: Fault, world_size: int, mechanism: Mechanism = "scope") -> Performance | None:
    """Fork a child that plays *rank*'s part, and see how it ends. The pool may have more ranks than needed."""
    if rank >= world_size:
        return None
    servers: list[int] = []
    if rank == 0 and fault.store in ("process", "slow"):
        servers = [_fork(_serve, fault), *([_fork(_delay)] if fault.store == "slow" else [])]
        _write("pid-store", str(servers[0]))
    child = _fork(_play, fault, rank, world_size, mechanism)
    _write(f"pid-{rank}", str(child))
    try:
        return _watch(child, fault, rank, world_size)
    finally:
        if servers:
            # Peers may still need it.
            for other in range(world_size):
                here().wait_for(f"ended-{other}")
            for server in servers:
                os.kill(server, signal.SIGKILL)
                os.waitpid(server, 0)


def _fork(fn: Callable[..., NoReturn], *args: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    # Inherited objects need not be looked through when this process ends: that took 0.3 of the 0.5 s of its end.
    gc.freeze()
    try:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        fn(*args)
    except BaseException:  # noqa: BLE001  (kept, and looked at by the test)
        traceback.print_exc()
    finally:
        os._exit(70)


def _watch(child: int, fault: Fault, rank: int, world_size: int) -> Performance:
    pidfd = os.pidfd_open(child)
    started = _wait_until(lambda: _flag(f"ready-{rank}"), pidfd, time.monotonic() + _FIRST_S)
    deadline = started + fault.bound_s
    if fault.thaw_s is not None and rank == (0 if fault.frozen == "store" else fault.frozen):
        _wait_until(lambda: any(_flag(f"fault-{each}") for each in range(world_size)), pidfd, deadline)
        _wait_until(None, pidfd, time.monotonic() + fault.thaw_s)
        os.kill(int(_read(f"pid-{fault.frozen}")), signal.SIGCONT)
    _wait_until(None, pidfd, deadline)
    ended = time.monotonic()
    outlived = not _has_ended(pidfd)
    if not outlived:
        here().announce(f"dead-{rank}")
    if outlived:
        os.kill(child, signal.SIGUSR1)
        os.kill(child, signal.SIGCONT)
        _wait_until(None, pidfd, ended + _STACKS_S)
        os.kill(child, signal.SIGKILL)
    elif rank in fault.culprits and fault.reaped == "late":
        # Until then the system can tell how it ended.
        survivors = fault.survivors(world_size)
        while not all(_flag(f"ended-{each}") for each in survivors) and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # A file cannot be waited for.
    _, status = os.waitpid(child, 0)
    os.close(pidfd)
    here().announce(f"ended-{rank}")
    return Performance(
        exit=os.waitstatus_to_exitcode(status),
        outlived=outlived,
        lived_s=ended - started,
        part=pickle.loads(_path(f"part-{rank}").read_bytes()) if _flag(f"part-{rank}") else None,
        faulted=float(_read(f"fault-{rank}")) if _flag(f"fault-{rank}") else None,
        log=_without_noise(_path(f"log-{rank}").read_text(errors="replace")),
    )


def _wait_until(is_so: Callable[[], bool] | None, pidfd: int, deadline: float) -> float:
    """Return the time when it is so, the process has ended, or it is too late."""
    while not (is_so is not None and is_so()) and time.monotonic() < deadline:
        pause = _POLL_S if is_so is not None else max(0.0, deadline - time.monotonic())
        if select.select([pidfd], [], [], pause)[0]:
            break
    return time.monotonic()


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


class _Idle(dist.ProcessGroup):
    """A communicator that does nothing."""


dist.Backend.register_backend("idle", lambda _store, rank, size, _timeout: _Idle(rank, size), devices=["cpu"])


def _play(fault: Fault, rank: int, world_size: int, mechanism: Mechanism) -> NoReturn:
    log = os.open(_path(f"log-{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 2)
    os.close(log)
    options: dict[str, Any] = {"rank": rank, "world_size": fault.claims.get(rank, world_size)}
    if fault.group_timeout is not None:
        options["timeout"] = timedelta(seconds=fault.group_timeout)
    if fault.store == "env":
        find_port(rank, world_size)
    else:
        options["store"] = meet(fault, rank, world_size)
    # Ranks that do not agree on their number could not connect.
    dist.init_process_group("idle" if fault.claims else "gloo", **options)
    del options
    _write(f"ready-{rank}", "")
    actor = Actor(fault, rank, world_size, mechanism)
    actor.play()
    if mechanism != "scope":
        os._exit(0)
    code = max(fault.exits.get(rank, 0), 0)
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    del actor
    if not fault.ends_in_full:
        # Once Python has taken itself down, as it does for everybody. The rest took half of a process's time.
        libc = ctypes.CDLL(None)
        libc.on_exit(libc["_exit"], None)
    ctypes.pythonapi.Py_Exit(code)
    raise AssertionError


def find_port(rank: int, world_size: int) -> None:
    """Set the environment for ``env://``, with a port that is free."""
    if rank == 0:
        with socket.create_server((LOOPBACK, 0)) as listener:
            _write("port", str(listener.getsockname()[1]))
    here().wait_for("port")
    os.environ |= {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": _read("port"),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }


def meet(fault: Fault, rank: int, world_size: int) -> dist.Store:
    """Return a client of the store at which the ranks of *fault* meet; it can be called again."""
    if fault.store == "file":
        return dist.FileStore(str(here().directory / "filestore"), world_size)
    if fault.store in ("torchrun", "hosts"):
        # One agent, one store, many faults.
        store, *_ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=_FIRST_S))))
        return dist.PrefixStore(here().directory.name, store)
    if fault.store == "rank0" and rank == 0:
        return _host("port")
    here().wait_for("port")
    return dist.TCPStore(LOOPBACK, int(_read("port")), wait_for_workers=False)


def _host(name: str) -> dist.TCPStore:
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    _write(name, str(store.port))
    return store


def _serve(fault: Fault) -> NoReturn:
    store = _host("port" if fault.store == "process" else "port-behind")
    signal.pause()
    raise AssertionError(store)


def _delay() -> NoReturn:
    """Pass on at once what clients send to the store, and late what it replies."""
    here().wait_for("port-behind")
    asyncio.run(_pass_on(int(_read("port-behind"))))
    raise AssertionError


async def _pass_on(port: int) -> None:
    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        store, to_store = await asyncio.open_connection(LOOPBACK, port)
        await asyncio.gather(_pipe(client, to_store, 0.0), _pipe(store, to_client, SLOW_S))

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    _write("port", str(server.sockets[0].getsockname()[1]))
    await server.serve_forever()


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay_s: float) -> None:
    """Copy; each piece arrives *delay_s* after it came, the next one does not wait for that."""
    loop = asyncio.get_running_loop()
    while piece := await source.read(1 << 16):
        loop.call_later(delay_s, sink.write, piece)
    loop.call_later(delay_s, sink.close)


def _without_noise(text: str) -> str:
    """Take out what torch says, once in each process, because it is kept from asking the DNS."""
    return "".join(line for line in text.splitlines(keepends=True) if "client socket cannot be retrieved" not in line)


# Notes that processes leave each other. Whole, or not there.


def _path(name: str) -> Path:
    return here().directory / f"flag-{name}"


def _write(name: str, content: str | bytes) -> None:
    new = here().directory / f"new-{name}"
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.rename(_path(name))


def _read(name: str) -> str:
    return _path(name).read_text()


def _flag(name: str) -> bool:
    return _path(name).exists()

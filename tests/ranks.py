"""
Run a function on every rank, and never wait longer than told.

`run_threads()` has the ranks as threads of this process, on one ``HashStore``.
`run_ranks()` has them as processes of their own, `RankPool` keeps such processes.
`run_script()` and `run_torchrun()` run a program.

Processes of ranks are forked from one that has imported torch and done nothing else, which
takes a fraction of the two seconds that a new one would need.

The harness owns the deadline. When it runs out, each process left is asked for its
stacks and killed, and the test fails with all of that. No process outlives a call.
Linux only: it relies on ``/proc`` and on process file descriptors.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import re
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import attrs
import torch.distributed as dist

from collective_scope.agreement.stacks import no_collection
from tests._rank import (
    LOOPBACK,
    RaisedError,
    RankContext,
    Report,
    StoreKind,
    freeze,
    here,
    host_store,
    process_state,
    thaw,
)


__all__ = [
    "RaisedError",
    "RankContext",
    "RankPool",
    "RankResult",
    "RanksError",
    "ScriptResult",
    "Sequencer",
    "ThreadResult",
    "busy_cores",
    "freeze",
    "here",
    "process_state",
    "run_ranks",
    "run_script",
    "run_threads",
    "run_torchrun",
    "standstills",
    "thaw",
    "values",
]

Host = Literal["rank0", "parent", "process"]

# Importing torch takes a process two seconds of one core, and a busy machine longer.
_STARTUP_TIMEOUT_S = 180.0
_EXIT_TIMEOUT_S = 60.0
_STACKS_TIMEOUT_S = 3.0
_SHOWN_CHARACTERS = 20_000
_MARK = "TESTS_RANKS_MARK"
_NO_DNS = re.compile(r"^.*The hostname of the client socket cannot be retrieved\. err=-3\n", re.MULTILINE)
_SITE = Path(__file__).parent / "_site"

# Stacks can be had before torch is imported, and of a process that holds the GIL.
# Imports are garbage neither now nor at exit: not looking at them saves a third
# of a process. gc.unfreeze() in a rank function undoes that.
_BOOTSTRAP = """
import faulthandler, gc, json, signal, sys
faulthandler.enable()
faulthandler.register(signal.SIGUSR1, all_threads=True)
path, control = map(json.loads, sys.argv[1:])
sys.path[:] = path
gc.disable()
import collective_scope, pytest
from tests._rank import main, nurse
gc.freeze()
gc.enable()
# Returns in each process that was forked, with what that is to do.
if (child := nurse(control)) is not None:
    main(*child)
"""

# Variables of a launcher must not reach the ranks of a test.
_LAUNCHER_VARIABLES = (
    "GROUP_",
    "LOCAL_",
    "MASTER_",
    "RANK",
    "ROLE_",
    "TORCHELASTIC_",
    "WORLD_SIZE",
)


class RanksError(AssertionError):
    """Raised when ranks did not end as expected, with all that is known of them."""


@attrs.frozen
class RankResult:
    """
    The outcome of one rank process.

    Attributes:
        rank: Its number, from 0.

        pid: Its process id.

        exit: Its exit code, or minus the signal that killed it, or ``None`` if it
            lives on in a pool.

        value: Result of the function.

        error: Its exception.

        returned: Whether the function returned.

        elapsed_s: Seconds the function took, or until the process ended.

        stdout: Its output there.

        stderr: Its output there.
    """

    rank: int
    pid: int
    exit: int | None
    value: Any
    error: RaisedError | None
    returned: bool
    elapsed_s: float
    stdout: str = attrs.field(repr=False)
    stderr: str = attrs.field(repr=False)

    def unwrap(self) -> Any:
        """Return the value; without one, raise `RanksError` with all of the rest."""
        __tracebackhide__ = True
        if not self.returned:
            raise RanksError(str(self))
        return self.value

    def __str__(self) -> str:
        """Tell everything."""
        if self.error is not None:
            what = "raised"
        elif self.returned:
            what = "returned"
        else:
            what = "said nothing"
        head = f"rank {self.rank}, pid {self.pid}: {what}, {_exit_text(self.exit)}"
        sections = {
            "error": self.error.text if self.error is not None else "",
            "stdout": self.stdout,
            "stderr": self.stderr,
        }
        return _with_sections(f"{head}, after {self.elapsed_s:.1f} s", sections)


@attrs.frozen
class ScriptResult:
    """
    The outcome of a program.

    Attributes:
        exit: Its exit code, or minus the signal that killed it.

        stdout: Output of it and its children.

        stderr: Output of it and its children.

        elapsed_s: Seconds from start to end.
    """

    exit: int
    stdout: str = attrs.field(repr=False)
    stderr: str = attrs.field(repr=False)
    elapsed_s: float


@attrs.frozen
class ThreadResult:
    """
    The outcome of one rank thread.

    Attributes:
        rank: Its number, from 0.

        value: Result of the function.

        error: The exception object it raised.

        elapsed_s: Seconds the function took.
    """

    rank: int
    value: Any
    error: BaseException | None
    elapsed_s: float

    def unwrap(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


def values(results: Iterable[RankResult | ThreadResult]) -> list[Any]:
    """Return what each rank returned; raise if one did not return."""
    __tracebackhide__ = True
    return [result.unwrap() for result in results]


# Ranks as threads


@attrs.define(eq=False)
class Sequencer:
    """
    Puts steps of several threads in order, without sleeping.

    Each wait ends with a `TimeoutError` at *deadline* (monotonic seconds).

    Example:
        >>> with sequencer.step(0):
        ...     store.set("key", "value")
    """

    deadline: float
    _next: int = attrs.field(default=0, init=False)
    _announced: set[str] = attrs.field(factory=set, init=False)
    _changed: threading.Condition = attrs.field(factory=threading.Condition, init=False, repr=False)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run the block as step *number*, counted from 0, after all lower ones."""
        self._wait(lambda: self._next == number, f"step {number}")
        try:
            yield
        finally:
            with self._changed:
                self._next = number + 1
                self._changed.notify_all()

    def announce(self, name: str) -> None:
        """Let everyone past ``wait_for(name)``."""
        with self._changed:
            self._announced.add(name)
            self._changed.notify_all()

    def wait_for(self, name: str) -> None:
        """Block until some thread announced *name*."""
        self._wait(lambda: name in self._announced, repr(name))

    def _wait(self, is_reached: Callable[[], bool], what: str) -> None:
        with self._changed:
            timeout = max(0.0, self.deadline - time.monotonic())
            if not self._changed.wait_for(is_reached, timeout):
                msg = f"{what} was not reached in time (steps done: {self._next})"
                raise TimeoutError(msg)


def run_threads(
    world_size: int,
    fn: Callable[[int, dist.HashStore, Sequencer], Any],
    *,
    timeout: float = 30.0,
) -> tuple[ThreadResult, ...]:
    """
    Call ``fn(rank, store, sequencer)`` in one thread per rank, on one ``HashStore``.

    Args:
        world_size: Number of ranks.

        fn: Function to call. Its error is part of the result.

        timeout: Seconds for all of it.

    Raises:
        RanksError: If a thread is left when *timeout* runs out, with the stacks of
            all threads. Threads cannot be killed; they end with the process.
    """
    __tracebackhide__ = True
    store = dist.HashStore()
    sequencer = Sequencer(time.monotonic() + timeout)
    results: dict[int, ThreadResult] = {}

    def run(rank: int) -> None:
        value, raised = None, None
        started = time.monotonic()
        try:
            value = fn(rank, store, sequencer)
        except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
            raised = error
        elapsed_s = time.monotonic() - started
        results[rank] = ThreadResult(rank, value, raised, elapsed_s)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, sequencer.deadline - time.monotonic()))
    left = [thread.name for thread in threads if thread.is_alive()]
    if left:
        names = ", ".join(left)
        msg = f"not done after {timeout:.1f} s: {names}\n{_stacks_of_threads()}"
        raise RanksError(msg)

    return tuple(results[rank] for rank in range(world_size))


def _stacks_of_threads() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    with no_collection():
        return "\n".join(
            f"--- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()  # noqa: SLF001 - the way to
        )


# Ranks as processes


@attrs.define(eq=False)
class _Nursery:
    """The process from which those of all ranks are forked. It ends when this one does."""

    _control: socket.socket | None = attrs.field(default=None, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def fork(self, env: Mapping[str, str], fds: Collection[int]) -> tuple[int, int, int]:
        """
        Fork a process that runs `tests._rank.main`.

        Args:
            env: All of its environment.

            fds: Its connection, its standard output, its standard error, and perhaps a listening socket.

        Returns:
            Its process id, its process file descriptor, and one that its exit code is read from.
        """
        with self._lock:
            if self._control is None:
                self._control = self._start()
            socket.send_fds(self._control, [json.dumps([sys.path, dict(env)]).encode()], list(fds))
            message, (pidfd, status), *_ = socket.recv_fds(self._control, 100, 2)
        return int(message), pidfd, status

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, *map(json.dumps, (sys.path, theirs.fileno()))],
                stdin=subprocess.DEVNULL,
                env=_environment(uuid.uuid4().hex, {}),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the harness alone.
            )
        atexit.register(popen.wait, _EXIT_TIMEOUT_S)
        atexit.register(ours.close)  # Called first, and tells it to end.
        return ours


_nursery = _Nursery()


@attrs.define(eq=False)
class _Process:
    """A process that runs `tests._rank.main`."""

    name: str
    pid: int
    connection: Connection
    pidfd: int
    stdout: Path
    stderr: Path
    exit: int | None = None
    ended: float = 0.0
    _status: int = -1
    _seen: dict[Path, int] = attrs.field(factory=dict)

    @classmethod
    def start(cls, name: str, directory: Path, env: Mapping[str, str], listener: int | None) -> _Process:
        ours, theirs = Pipe()
        stdout, stderr = directory / f"{name}.stdout", directory / f"{name}.stderr"
        with theirs, stdout.open("wb") as out, stderr.open("wb") as err:
            fds = [theirs.fileno(), out.fileno(), err.fileno()] + ([] if listener is None else [listener])
            pid, pidfd, status = _nursery.fork(env, fds)
        return cls(name, pid, ours, pidfd, stdout, stderr, status=status)

    def send(self, *message: Any) -> None:
        # A process that is gone is noticed by its pidfd.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def has_spoken(self) -> bool:
        """Receive a message, if there is one."""
        try:
            if not self.connection.poll():
                return False
            self.connection.recv()
        except (EOFError, ConnectionResetError):
            return False  # Now only the end of the process is left to see.
        return True

    def is_running(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def has_ended(self) -> bool:
        if self.is_running():
            return False
        self.note_exit()
        return True

    def note_exit(self) -> None:
        if self.exit is None:
            self.exit = int(os.read(self._status, 100) or -signal.SIGKILL)
            self.ended = time.monotonic()

    def kill(self) -> None:
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.note_exit()

    def close(self) -> None:
        self.kill()
        self.connection.close()
        os.close(self.pidfd)
        os.close(self._status)

    def forget_output(self) -> None:
        """Let `read()` return only what is written from now on."""
        self._seen = {path: path.stat().st_size for path in (self.stdout, self.stderr)}

    def read(self, path: Path) -> str:
        return _without_our_noise(path.read_bytes()[self._seen.get(path, 0) :].decode(errors="replace"))

    def describe(self) -> str:
        sections = {
            "stdout": self.read(self.stdout),
            "stderr": self.read(self.stderr),
        }
        state = _exit_text(self.exit)
        return _with_sections(f"{self.name}, pid {self.pid}: {state}", sections)


@attrs.define(eq=False)
class RankPool:
    """
    Rank processes that stay, with their group, to run one function after another.

    They start with the first `run()`. Once one of them has ended, or had to be
    killed, all are replaced by fresh ones at the next `run()`.
    To be used, and closed, in one thread.

    Args:
        world_size: Number of ranks.

        backend: As for ``init_process_group()``.

        store: How the ranks meet: an explicit ``TCPStore``, a ``FileStore``, or
            ``env://`` with a ``TCPStore``.

        host: Server of a ``TCPStore``: rank 0, this process, or one of its own,
            whose process id is ``here().store_pid``.

        init: Whether to make the default group. Without it, rank functions may use
            ``here().init_process_group()``, or ``env://``.

        group_timeout_s: Time limit of the group's collectives, in seconds;
            ``None`` is torch's.

        env: Environment variables for the ranks, added to those here.

        quiet: Whether `run()` prints nothing. Pytest shows a thread's output with
            whichever test is running.

    Example:
        >>> with RankPool(2) as pool:
        ...     assert [1, 1] == values(pool.run(sum_of_ranks))
        ...     pool.run(one_more_function, "with", "arguments")
    """

    world_size: int
    backend: str = "gloo"
    store: StoreKind = "tcp"
    host: Host = "rank0"
    init: bool = True
    group_timeout_s: float | None = None
    env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    quiet: bool = False
    _ranks: list[_Process] = attrs.field(factory=list, init=False, repr=False)
    _servers: list[_Process] = attrs.field(factory=list, init=False, repr=False)
    _own_server: dist.Store | None = attrs.field(default=None, init=False, repr=False)
    _directory: Path | None = attrs.field(default=None, init=False, repr=False)
    _mark: str = attrs.field(factory=lambda: uuid.uuid4().hex, init=False, repr=False)
    _count: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.store == "file" and self.host != "rank0":
            msg = f"a file has no host (got {self.host!r})"
            raise ValueError(msg)

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks; empty when there are none."""
        return tuple(process.pid for process in self._ranks)

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        expect_exit: Mapping[int, int] | None = None,
        abandon: Collection[int] = (),
        last: bool = False,
    ) -> tuple[RankResult, ...]:
        """
        Call ``fn(rank, world_size, *args)`` on every rank.

        Args:
            fn: A function that can be pickled: at the top level of a module.

            args: Simple data.

            timeout: Seconds for *fn*. Starting the processes is not counted.

            expect_exit: For ranks that end on the way: their exit code, or minus the
                signal. All others must report a value or an exception.

            abandon: Ranks that nobody waits for: they are killed once all others are
                through.

            last: Let each rank end as soon as it has reported.

        Raises:
            RanksError: If a rank did not end as expected, or not in time.
        """
        __tracebackhide__ = True
        if fn.__module__ == "__main__":
            msg = f"{fn.__qualname__} must be in a module that ranks can import"
            raise ValueError(msg)
        expected = dict(expect_exit or {})
        is_done = False
        try:
            directory = self._prepare(fn, args)
            started = time.monotonic()
            deadline = started + timeout
            for process in self._ranks:
                process.send("run", str(directory), last)
            awaited = [p for i, p in enumerate(self._ranks) if i not in abandon]
            task = f"{fn.__qualname__}() after {timeout:.1f} s"
            self._receive(awaited, deadline, task)
            if last:
                self._wait_for_exit(awaited, deadline, f"the end of {task}")
            for rank in abandon:
                self._ranks[rank].kill()
                expected.setdefault(rank, -signal.SIGKILL)
            results = self._results(directory, started, expected, last=last)
            is_done = True
        finally:
            if last or not is_done or any(p.exit is not None for p in self._ranks):
                self._discard()

        return results

    def close(self) -> None:
        """End the processes, in the orderly way."""
        __tracebackhide__ = True
        try:
            for process in self._ranks:
                process.send("quit")
            deadline = time.monotonic() + _EXIT_TIMEOUT_S
            self._wait_for_exit(self._ranks, deadline, "the end of the pool")
            codes = [process.exit for process in self._ranks]
            if any(codes):
                self._fail(f"ranks ended with {codes}")
        finally:
            self._discard()

    # Starting

    def _prepare(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Path:
        """Return the directory for one function, on ranks that are ready for it."""
        __tracebackhide__ = True
        if any(not process.is_running() for process in self._ranks):
            for process in self._ranks:
                process.kill()
            self._discard()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="ranks-"))
            self._start(self._directory)
        self._count += 1
        directory = self._directory / str(self._count)
        directory.mkdir()
        (directory / "function").write_bytes(pickle.dumps((fn, args)))
        for process in self._ranks:
            process.forget_output()

        return directory

    def _start(self, directory: Path) -> None:
        __tracebackhide__ = True
        deadline = time.monotonic() + _STARTUP_TIMEOUT_S
        env = _environment(self._mark, self.env)
        if self.store == "env" and self.host != "rank0":
            env["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        # The port is ours from the start: bound to loopback, and passed on open.
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            if self.host == "parent":
                self._own_server = host_store(port, listener.detach())
            elif self.host == "process":
                server = _Process.start("store", directory, env, listener.fileno())
                self._servers.append(server)
                server.send("serve", port)
            for rank in range(self.world_size):
                is_host = rank == 0 and self.host == "rank0" and self.store != "file"
                fd = listener.fileno() if is_host else None
                process = _Process.start(f"rank-{rank}", directory, env, fd)
                self._ranks.append(process)
        for rank, process in enumerate(self._ranks):
            context = RankContext(
                rank=rank,
                world_size=self.world_size,
                pids=self.pids,
                store_pid=next((s.pid for s in self._servers), None),
                backend=self.backend,
                store=self.store,
                port=port,
                init=self.init,
                group_timeout_s=self.group_timeout_s,
                directory=directory / "0",
            )
            process.send("set up", context)
        everyone = [*self._servers, *self._ranks]
        self._receive(everyone, deadline, f"the start after {_STARTUP_TIMEOUT_S:.0f} s")
        if any(process.exit is not None for process in everyone):
            self._fail("a rank ended before it was ready")

    # Waiting

    def _receive(self, processes: Iterable[_Process], deadline: float, task: str) -> None:
        """Wait until each of *processes* has sent a message or ended."""
        __tracebackhide__ = True
        pending = {process for process in processes if process.exit is None}
        with selectors.DefaultSelector() as selector:
            for process in pending:
                selector.register(process.connection, selectors.EVENT_READ, process)
                selector.register(process.pidfd, selectors.EVENT_READ, process)
            while pending:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    self._expire(pending, task)
                for process in {key.data for key, _ in events}:
                    # In this order: the last words of a process count.
                    if process.has_spoken() or process.has_ended():
                        pending.discard(process)
                        selector.unregister(process.pidfd)
                    if process.connection in selector.get_map():
                        selector.unregister(process.connection)

    def _wait_for_exit(self, processes: Iterable[_Process], deadline: float, task: str) -> None:
        __tracebackhide__ = True
        for process in processes:
            if process.exit is None:
                with selectors.DefaultSelector() as selector:
                    selector.register(process.pidfd, selectors.EVENT_READ)
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        left = [p for p in processes if p.is_running()]
                        self._expire(left, task)
                process.note_exit()

    def _expire(self, left: Iterable[_Process], task: str) -> NoReturn:
        """Ask who is left for stacks, kill all, fail."""
        __tracebackhide__ = True
        names = ", ".join(sorted(process.name for process in left))
        everyone = [*self._ranks, *self._servers]
        alive = [p for p in everyone if p.is_running()]
        states = {process.name: process_state(process.pid) for process in alive}
        _dump_stacks({p.pid: p.stderr for p in alive})
        for process in everyone:
            process.kill()
        self._fail(f"not done with {task}: {names}; states then: {states}")

    def _fail(self, what: str) -> NoReturn:
        __tracebackhide__ = True
        everyone = (process.describe() for process in (*self._ranks, *self._servers))
        raise RanksError("\n".join([what, *everyone]))

    # Ending

    def _results(
        self,
        directory: Path,
        started: float,
        expected: Mapping[int, int],
        *,
        last: bool,
    ) -> tuple[RankResult, ...]:
        """Read the reports; fail if a rank did not end as *expected*."""
        __tracebackhide__ = True
        results, defects = [], []
        for rank, process in enumerate(self._ranks):
            report = _load_report(directory / f"report-{rank}")
            if report is not None and report.defect is not None:
                defects.append(f"rank {rank} {report.defect}")
            wanted = expected.get(rank, 0 if last else None)
            if process.exit != wanted:
                defects.append(f"rank {rank}: {_exit_text(process.exit)}, expected: {_exit_text(wanted)}")
            result = RankResult(
                rank=rank,
                pid=process.pid,
                exit=process.exit,
                value=report.value if report is not None else None,
                error=report.error if report is not None else None,
                returned=report is not None and report.error is None and report.defect is None,
                elapsed_s=report.elapsed_s if report is not None else process.ended - started,
                stdout=process.read(process.stdout),
                stderr=process.read(process.stderr),
            )
            results.append(result)
        text = "\n".join(map(str, results))
        if defects:
            raise RanksError("\n".join([*defects, text]))
        if not self.quiet:
            print(text)  # pytest shows it if the test fails.
        return tuple(results)

    def _discard(self) -> None:
        """Leave nothing behind; the next `run()` starts afresh."""
        processes = (*self._ranks, *self._servers)
        for process in processes:
            process.close()
        _kill_marked(self._mark, {process.pid for process in processes})
        self._ranks, self._servers, self._own_server = [], [], None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    store: StoreKind = "tcp",
    host: Host = "rank0",
    init: bool = True,
    group_timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    expect_exit: Mapping[int, int] | None = None,
    abandon: Collection[int] = (),
) -> tuple[RankResult, ...]:
    """
    Call ``fn(rank, world_size, *args)`` in one new process per rank.

    Each process ends as soon as it has reported, after destroying the group that the
    harness made. Arguments are those of `RankPool` and `RankPool.run()`.
    """
    __tracebackhide__ = True
    pool = RankPool(
        world_size,
        backend=backend,
        store=store,
        host=host,
        init=init,
        group_timeout_s=group_timeout_s,
        env=env or {},
    )
    return pool.run(
        fn,
        *args,
        timeout=timeout,
        expect_exit=expect_exit,
        abandon=abandon,
        last=True,
    )


def _load_report(path: Path) -> Report | None:
    if not path.exists():
        return None
    try:
        report = pickle.loads(path.read_bytes())
    except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
        defect = (
            "returned something that cannot be unpickled, or was killed while it did"
            f" ({type(error).__name__}: {error}); return simple data"
        )
        return Report(0.0, defect=defect)
    assert isinstance(report, Report)
    return report


# Programs


def run_script(
    *command: str | Path,
    python: str = sys.executable,
    prefix: Iterable[str] = (),
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    expect_exit: int | None = 0,
) -> ScriptResult:
    """
    Run Python with the arguments *command*, and all that it starts.

    Args:
        command: For example a path and its arguments, or ``"-m"`` and a module.

        python: Which one; by default this one.

        prefix: A command that runs the one that follows it, somewhere else.

        timeout: Seconds from start to end.

        env: Environment variables, added to those here.

        cwd: Working directory; by default this one.

        expect_exit: Required exit code; ``None`` accepts any.

    Raises:
        RanksError: If it was not done in time, with the stacks of all its Python
            processes, or ended with another code.
    """
    __tracebackhide__ = True
    mark = uuid.uuid4().hex
    # The folder holds a sitecustomize that lets each Python process show its stacks.
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(_SITE), *([inherited] if inherited else [])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), **(env or {})}
    started = time.monotonic()
    with (
        tempfile.NamedTemporaryFile() as stdout,
        tempfile.NamedTemporaryFile() as stderr,
    ):
        popen = subprocess.Popen(
            [*prefix, python, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_environment(mark, variables),
            cwd=cwd,
            start_new_session=True,
        )
        what = None
        try:
            popen.wait(timeout)
        except subprocess.TimeoutExpired:
            what = f"not done after {timeout:.1f} s"
            _dump_stacks(dict.fromkeys(_marked(mark), Path(stderr.name)))
        finally:
            popen.kill()
            code = popen.wait(_EXIT_TIMEOUT_S)
            _kill_marked(mark)
        sections = {
            name: _without_our_noise(Path(file.name).read_text(errors="replace"))
            for name, file in (("stdout", stdout), ("stderr", stderr))
        }
    if what is None and expect_exit is not None and code != expect_exit:
        what = f"{_exit_text(code)}, expected: {_exit_text(expect_exit)}"
    if what is not None:
        line = " ".join(map(str, command))
        raise RanksError(_with_sections(f"{line}: {what}", sections))

    return ScriptResult(code, **sections, elapsed_s=time.monotonic() - started)


def run_torchrun(
    *command: str | Path,
    world_size: int = 2,
    rdzv_endpoint: str | None = None,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    expect_exit: int | None = 0,
) -> ScriptResult:
    """
    Run a script, or ``"-m"`` and a module, under ``torchrun`` on this host.

    Args:
        command: The script and its arguments.

        world_size: Number of ranks.

        rdzv_endpoint: ``host:port`` of the rendezvous; by default ``--standalone``.

        timeout: As the rest, see `run_script()`.

        env: See there.

        cwd: See there.

        expect_exit: See there.
    """
    __tracebackhide__ = True
    meeting = (
        ["--standalone"]
        if rdzv_endpoint is None
        else [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={rdzv_endpoint}",
            f"--rdzv-id={uuid.uuid4().hex}",
        ]
    )
    return run_script(
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world_size}",
        f"--local-addr={LOOPBACK}",
        *meeting,
        *command,
        timeout=timeout,
        env=env,
        cwd=cwd,
        expect_exit=expect_exit,
    )


@contextlib.contextmanager
def busy_cores(count: int | None = None) -> Iterator[None]:
    """Keep *count* cores busy during the block; by default all that this process may use."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count or len(os.sched_getaffinity(0))):
            command = [sys.executable, "-I", "-S", "-c", code]
            processes.append(subprocess.Popen(command, start_new_session=True))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def standstills(root: int, seconds: float) -> Iterator[None]:
    """Let process *root* and all below it stand still now and then, for up to *seconds*, during the block."""
    command = [sys.executable, "-I", Path(__file__).with_name("_standstill.py"), str(root), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield  # then the input is closed, which ends it when nothing is stopped


# Looking at processes, and ending them


def _environment(mark: str, added: Mapping[str, str]) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_VARIABLES)}
    ours = {
        _MARK: mark,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # Output before a kill is kept.
        # A TCPStore asks the DNS for the name of each client, on the thread that serves all
        # of them; a lost reply would stop it for five seconds. With this, nobody is asked.
        "RES_OPTIONS": "attempts:0",
    }
    return {**inherited, **ours, **added}


def _without_our_noise(text: str) -> str:
    """Take out what torch says, once in each process, because we keep it from asking the DNS."""
    return _NO_DNS.sub("", text)


def _marked(mark: str, sessions: Collection[int] = ()) -> list[int]:
    """Find what we started by its environment, wherever it has moved since, and what was forked by its session."""
    needle = f"{_MARK}={mark}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # Others' processes, and those that end while we look, are not ours.
            with contextlib.suppress(OSError):
                is_marked = needle in (entry / "environ").read_bytes().split(b"\0")
                if is_marked or int((entry / "stat").read_text().rpartition(")")[2].split()[3]) in sessions:
                    pids.append(int(entry.name))
    return pids


def _kill_marked(mark: str, sessions: Collection[int] = ()) -> None:
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    while pids := _marked(mark, sessions):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            msg = f"processes {pids} survived SIGKILL"
            raise RanksError(msg)
        time.sleep(0.005)  # They are not our children: nothing to wait on.


def _dump_stacks(stderr_by_pid: Mapping[int, Path]) -> None:
    """Have each process write its stacks, and wait until it seems to have done so."""
    sizes = {path: path.stat().st_size for path in stderr_by_pid.values()}
    before = dict(sizes)
    for pid in stderr_by_pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
            # A stopped process would keep its stacks to itself.
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + _STACKS_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(0.2)  # The end of a dump is not announced.
        now = {path: path.stat().st_size for path in sizes}
        if now == sizes and all(now[path] > before[path] for path in now):
            return
        sizes = now


def _exit_text(code: int | None) -> str:
    if code is None:
        return "no exit"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _with_sections(head: str, sections: Mapping[str, str]) -> str:
    lines = [head]
    for name, text in sections.items():
        if text:
            shown = text[-_SHOWN_CHARACTERS:]
            cut = len(text) - len(shown)
            lines.append(f"--- {name}" + (f" (first {cut} left out)" if cut else ""))
            lines.append(shown.rstrip("\n"))
    return "\n".join(lines)

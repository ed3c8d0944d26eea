"""
The inside of a rank: what runs in each process that `tests.ranks` starts.

A rank function finds its surroundings with `here()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import attrs
import torch.distributed as dist


LOOPBACK = "127.0.0.1"

StoreKind = Literal["tcp", "file", "env"]


@attrs.frozen
class RaisedError:
    """
    An exception that a rank function raised, as text.

    Attributes:
        type_name: Qualified name of its class.

        module: Module of its class.

        message: ``str()`` of it.

        notes: Texts attached with ``add_note()``.

        text: The formatted traceback, causes and contexts included.

        members: The exceptions within, if it was an exception group.
    """

    type_name: str
    module: str
    message: str
    notes: tuple[str, ...] = attrs.field(default=(), repr=False)
    text: str = attrs.field(default="", repr=False)
    members: tuple[RaisedError, ...] = ()

    @classmethod
    def from_exception(cls, error: BaseException) -> RaisedError:
        """Describe *error*, whatever its ``__str__`` does."""
        try:
            message = str(error)
        except Exception:  # noqa: BLE001  (kept, and looked at by the test)
            message = "<unprintable>"
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()

        return cls(
            type_name=type(error).__qualname__,
            module=type(error).__module__,
            message=message,
            notes=tuple(getattr(error, "__notes__", ())),
            text="".join(traceback.format_exception(error)),
            members=tuple(map(cls.from_exception, members)),
        )


@attrs.frozen
class Report:
    """
    The report of a rank on one function.

    Attributes:
        elapsed_s: Seconds the function took.

        value: Its result.

        error: Its exception.

        defect: Why the harness could not do its part, in words.
    """

    elapsed_s: float
    value: Any = None
    error: RaisedError | None = None
    defect: str | None = None

    def dump(self) -> bytes:
        """Pickle the report; an unpicklable value becomes a defect."""
        try:
            return pickle.dumps(self)
        except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
            defect = (
                f"returned a {type(self.value).__qualname__} that cannot be pickled"
                f" ({type(error).__name__}: {error}); return simple data"
            )
            return pickle.dumps(Report(self.elapsed_s, defect=defect))


@attrs.define
class RankContext:
    """
    The surroundings of a rank function.

    Attributes:
        rank: This rank, counted from 0.

        world_size: Number of ranks.

        pids: Process id of each rank.

        store_pid: Process id of the store's server, if it has its own process.

        backend: As for ``init_process_group()``.

        store: How the ranks meet.

        port: Where the store's server listens, on loopback.

        init: Whether the harness makes the default group.

        group_timeout_s: Time limit of the group's collectives; ``None`` is torch's.

        directory: A directory that all ranks of this function share.
    """

    rank: int
    world_size: int
    pids: tuple[int, ...]
    store_pid: int | None
    backend: str
    store: StoreKind
    port: int
    init: bool
    group_timeout_s: float | None
    directory: Path
    _hosted: dist.Store | None = None

    def announce(self, name: str) -> None:
        """Let everyone past ``wait_for(name)``; bypasses the group's store."""
        self._flag(name).touch()

    def wait_for(self, name: str, timeout: float = 60.0) -> None:
        """Block until some rank announced *name*, at most *timeout* seconds."""
        deadline, pause = time.monotonic() + timeout, 0.001
        flag = self._flag(name)
        while not flag.exists():
            if time.monotonic() > deadline:
                msg = f"nobody announced {name!r} within {timeout:.1f} s"
                raise TimeoutError(msg)
            time.sleep(pause)  # A file cannot be waited for.
            pause = min(0.02, 1.2 * pause)

    def new_store(self) -> dist.Store:
        """Return this rank's client of the store that all ranks share."""
        if self.store == "file":
            path = self.directory.parent / "filestore"
            return dist.FileStore(str(path), self.world_size)
        if self._hosted is not None:
            return self._hosted
        return dist.TCPStore(LOOPBACK, self.port, wait_for_workers=False)

    def init_process_group(self, prefix: str = "", **options: Any) -> None:
        """
        Make the default group, as the harness does with ``init=True``.

        Args:
            prefix: For all keys of the group, except over ``env://``. Give each group
                its own: gloo would take an earlier group's addresses for its own.

            options: As for ``torch.distributed.init_process_group()``.
        """
        if self.group_timeout_s is not None:
            options.setdefault("timeout", timedelta(seconds=self.group_timeout_s))
        if self.store == "env":
            dist.init_process_group(self.backend, init_method="env://", **options)
        else:
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore(prefix, self.new_store()),
                rank=self.rank,
                world_size=self.world_size,
                **options,
            )

    def set_up(self, listener: int | None) -> None:
        """Host the store if it is this rank's to host, then meet the others."""
        if self.store == "env":
            os.environ |= {
                "LOCAL_RANK": str(self.rank),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(self.port),
                "RANK": str(self.rank),
                "WORLD_SIZE": str(self.world_size),
            }
        if listener is not None:
            self._hosted = host_store(self.port, listener)
        if self.init:
            self.init_process_group()
        if self.store == "env" and self.init:
            # The server now lives exactly as long as the group, as it does for users.
            self._hosted = None

    def _flag(self, name: str) -> Path:
        return self.directory / f"flag-{quote(name, safe='')}"


_context: RankContext | None = None


def here() -> RankContext:
    """Return the surroundings of the rank function that is running."""
    if _context is None:
        msg = "here() works inside a rank process only"
        raise RuntimeError(msg)
    return _context


def enter(context: RankContext) -> None:
    """Let `here` return *context*, in a process that the harness did not start."""
    global _context  # noqa: PLW0603 - one rank per process
    _context = context


def process_state(pid: int) -> str:
    """Return the state of a process, one letter, as ``ps`` shows it, or "gone"."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return stat.rpartition(")")[2].split()[0]


def freeze(pid: int) -> None:
    """Stop another process, and return once all of it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    while any(process_state(int(task.name)) not in {"T", "Z", "gone"} for task in Path(f"/proc/{pid}/task").iterdir()):
        time.sleep(0.001)  # Not our child, perhaps: nothing to wait on.


def thaw(pid: int) -> None:
    """Let a process that was frozen go on."""
    os.kill(pid, signal.SIGCONT)


def host_store(port: int, listener: int) -> dist.TCPStore:
    """
    Serve a TCPStore on the socket *listener*, which already listens on *port*.

    Multi-tenant, so that ``env://`` in the same process finds this server.
    """
    return dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener,
    )


def nurse(control_fd: int) -> tuple[int, int | None] | None:
    """
    Fork a process for each request, and pass on its exit code, until the harness is gone.

    Returns:
        In each of those processes, the arguments of `main`; in this one None, at the end.
    """
    control = socket.socket(fileno=control_fd)
    children: dict[int, tuple[int, int]] = {}
    while True:
        ready, _, _ = select.select([control, *children], [], [])
        for pidfd in set(ready) - {control}:
            pid, status = children.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # The harness is gone, or does not care any more.
                os.write(status, str(code).encode())
            os.close(status)
            os.close(pidfd)
        if control not in ready:
            continue
        message, fds, *_ = socket.recv_fds(control, 1 << 20, 4, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return None
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            control.close()
            for pidfd, (_, status) in children.items():
                os.close(pidfd)
                os.close(status)
            return _grow_up(parent, fds, *json.loads(message))
        for fd in fds:
            os.close(fd)
        reader, writer = os.pipe()
        pidfd = os.pidfd_open(pid)
        socket.send_fds(control, [str(pid).encode()], [pidfd, reader])
        os.close(reader)
        children[pidfd] = pid, writer


def _grow_up(parent: int, fds: list[int], path: list[str], env: dict[str, str]) -> tuple[int, int | None]:
    """Become a process of its own, as far as a forked one can; return the arguments of `main`."""
    _die_with_parent(parent)
    os.setsid()
    connection, stdout, stderr, *listener = fds
    for fd, target in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = path
    return connection, listener[0] if listener else None


def main(connection_fd: int, listener: int | None) -> None:
    """Do what the harness says until it says quit or is gone."""
    global _context  # noqa: PLW0603 - one rank per process
    # Started from a background job, the process inherits "ignore".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection = Connection(connection_fd)
    # The harness is gone: nobody left to tell.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            match connection.recv():
                case ("serve", int(port)) if listener is not None:
                    server = host_store(port, listener)
                    connection.send("ready")
                    connection.recv()
                    del server
                    return
                case ("set up", RankContext() as context):
                    _context = context
                    context.set_up(listener)
                    connection.send("ready")
                case ("run", str(directory), bool(last)):
                    _run(here(), Path(directory))
                    connection.send("done")
                    if last:
                        break
                case _:
                    break
    if _context is not None and _context.init and dist.is_initialized():
        dist.destroy_process_group()


def _run(context: RankContext, directory: Path) -> None:
    context.directory = directory
    started = time.monotonic()
    try:
        fn, args = pickle.loads((directory / "function").read_bytes())
    except Exception:  # noqa: BLE001  (kept, and looked at by the test)
        report = Report(0.0, defect=f"could not load it:\n{traceback.format_exc()}")
    else:
        report = _call(fn, (context.rank, context.world_size, *args), started)
    sys.stdout.flush()
    sys.stderr.flush()
    # By file: a rank that is stopped halfway must not leave the harness reading.
    (directory / f"report-{context.rank}").write_bytes(report.dump())


def _call(fn: Callable[..., Any], args: tuple[Any, ...], started: float) -> Report:
    try:
        value = fn(*args)
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        elapsed_s = time.monotonic() - started
        return Report(elapsed_s, error=RaisedError.from_exception(error))
    return Report(time.monotonic() - started, value=value)


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when *parent* ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # It has ended before.

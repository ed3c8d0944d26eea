"""
Where faults are played: side by side, for most of the time of a fault is waiting.

A stage has a few lanes, each a thread with a pool of rank processes of its own.
Faults under torchrun, and those on two hosts, are played one after the other by the
workers of one torchrun a host, which takes a lane for as long; those on hosts are slow,
so there are several pairs of hosts.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import attrs
import pytest

from tests.faults._play import Ending, Fault, Mechanism, Performance, perform
from tests.hosts import HostsError, two_hosts
from tests.ranks import RankPool, run_script, run_torchrun, values


__all__ = ["Play", "Played", "Stage", "delay"]

_MOST_RANKS = 4
_SLACK_S = 60.0  # For what is no part of a fault, on a busy machine.

_MODULE = ("-m", "tests.faults._under_torchrun")


@attrs.frozen(eq=False)
class Play:
    """A fault to be played."""

    fault: Fault
    world_size: int
    mechanism: Mechanism = "scope"


@attrs.frozen
class Played:
    """
    A fault's outcome.

    Attributes:
        performances: One for each rank.

        output: Output of the processes that play them.
    """

    performances: list[Performance]
    output: str = attrs.field(default="", repr=False)


_Job = Callable[[RankPool], None]
_Batch = list[tuple[Play, Future[Played]]]


@attrs.define(eq=False)
class Stage:
    """
    Plays faults, *lanes* of them at a time.

    Example:
        >>> with Stage(lanes=2) as stage:
        ...     played = [future.result() for future in stage.put(plays)]
    """

    lanes: int
    _jobs: SimpleQueue[_Job | None] = attrs.field(factory=SimpleQueue, init=False)
    _threads: list[threading.Thread] = attrs.field(factory=list, init=False)
    _futures: list[Future[Played]] = attrs.field(factory=list, init=False)
    _errors: list[BaseException] = attrs.field(factory=list, init=False)

    def __enter__(self) -> Self:
        """Start the lanes."""
        self._threads = [
            threading.Thread(target=self._work, name=f"lane {number}", daemon=True) for number in range(self.lanes)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Play no more; wait for what is being played, which has its own bound."""
        for future in self._futures:
            future.cancel()
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        if self._errors:
            msg = "lanes could not be closed"
            raise BaseExceptionGroup(msg, self._errors)

    def put(self, plays: Iterable[Play]) -> list[Future[Played]]:
        """Have *plays* played, in this order, except those by the workers of torchrun, which are played first."""
        plays = list(plays)
        futures: list[Future[Played]] = [Future() for _ in plays]
        self._futures += futures
        batches: dict[tuple[str, int], _Batch] = defaultdict(list)
        jobs: list[_Job] = []
        counts: Counter[str] = Counter()
        for play, future in zip(plays, futures, strict=True):
            if play.fault.store in _LAUNCHERS:
                number = counts[play.fault.store] % _LAUNCHES[play.fault.store]
                counts[play.fault.store] += 1
                batches[play.fault.store, number].append((play, future))
            else:
                jobs.append(lambda pool, play=play, future=future: _play(pool, play, future))  # type: ignore[misc]  # mypy has no type for defaults of a lambda
        for (store, _), batch in batches.items():
            launch = _LAUNCHERS[store]
            jobs.insert(0, lambda _, launch=launch, batch=batch: _play_all(launch, batch))  # type: ignore[misc]  # mypy has no type for defaults of a lambda
        for job in jobs:
            self._jobs.put(job)
        return futures

    def _work(self) -> None:
        try:
            with RankPool(_MOST_RANKS, init=False, quiet=True) as pool:
                while (job := self._jobs.get()) is not None:
                    job(pool)
        except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
            self._errors.append(error)


def _play(pool: RankPool, play: Play, future: Future[Played]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        results = pool.run(perform, play.fault, play.world_size, play.mechanism, timeout=play.fault.bound_s + _SLACK_S)
        performances = [each for each in values(results) if each is not None]
        future.set_result(Played(performances, "\n".join(map(str, results))))
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        future.set_exception(error)


def _play_all(launch: Callable[[int, Path, float], str], batch: _Batch) -> None:
    """Play a whole batch with what *launch* starts."""
    batch = [(play, future) for play, future in batch if future.set_running_or_notify_cancel()]
    if not batch:
        return
    with tempfile.TemporaryDirectory(prefix="torchrun-") as name:
        directory = Path(name)
        (directory / "plan").write_bytes(pickle.dumps([attrs.astuple(play, recurse=False) for play, _ in batch]))
        error: BaseException | None = None
        output = ""
        try:
            output = launch(_MOST_RANKS, directory, _SLACK_S + sum(play.fault.bound_s + 5.0 for play, _ in batch))
        except BaseException as raised:  # noqa: BLE001  (kept, and looked at by the test)
            error = raised
        for number, (play, future) in enumerate(batch):
            paths = [directory / str(number) / f"performance-{rank}" for rank in range(play.world_size)]
            if error is not None and not all(path.exists() for path in paths):
                future.set_exception(error)
            else:
                future.set_result(Played([pickle.loads(path.read_bytes()) for path in paths], output))


def _launch_torchrun(world_size: int, directory: Path, timeout: float) -> str:
    return run_torchrun(*_MODULE, directory, world_size=world_size, timeout=timeout).stderr


def _launch_on_two_hosts(world_size: int, directory: Path, timeout: float) -> str:
    """Start a torchrun on each of two hosts; the first one serves the store, and has the lower ranks."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except HostsError as error:
            msg = f"no two hosts here: {error}"
            raise pytest.skip.Exception(msg) from error
        runs = []
        executor = stack.enter_context(ThreadPoolExecutor(len(hosts)))
        for number, host in enumerate(hosts):
            arguments = [
                "-m",
                "torch.distributed.run",
                f"--nnodes={len(hosts)}",
                f"--nproc-per-node={world_size // len(hosts)}",
                f"--local-addr={host.address}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={hosts[0].address}:29400",
                f"--rdzv-conf=is_host={number == 0}",
                f"--rdzv-id={directory.name}",
            ]
            run = executor.submit(
                run_script, *arguments, *_MODULE, directory, prefix=host.prefix, env=host.env, timeout=timeout
            )
            runs.append(run)
        errors = [error for run in runs if (error := run.exception()) is not None]
        if errors:
            msg = "on two hosts"
            raise BaseExceptionGroup(msg, errors)
        return "\n".join(f"--- {host.address}\n{run.result().stderr}" for host, run in zip(hosts, runs, strict=True))


_LAUNCHERS = {"torchrun": _launch_torchrun, "hosts": _launch_on_two_hosts}
_LAUNCHES = {"torchrun": 1, "hosts": 2}


def delay(performances: list[Performance], ending: Ending) -> float:
    """Return the seconds from the fault, or from the rank's arrival if that was later, to the end of its scope."""
    faulted = [each.faulted for each in performances if each.faulted is not None]
    return ending.ended - max([ending.arrived, *([min(faulted)] if faulted else [])])

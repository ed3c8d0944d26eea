"""
A pool of ranks that stay, and are started again when one is lost.

The parent serves the store, starts the ranks, hands them subtests by name, and prints one report. A
subtest that fails costs that subtest: `RenewableGroup` frees the ranks that are stuck. A rank that
is lost costs its subtest, too: all ranks are started again, and the rest runs.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import time
import unittest
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import attrs
import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, SubtestResult, Subtests


HOST = "127.0.0.1"

LATE_S = 15.0
"""How long after `kill_after` the parent ends a rank that is still there."""

LAST_WORDS_S = 5.0
"""How long ranks have, once a peer is lost, to say what they saw."""

MARKS = {"passed": ".", "skipped": "s", "xfailed": "x"}


class Pool:
    """
    Processes that run subtests together, one after another.

    Args:
        world_size: Number of ranks.
        make: As for `RenewableGroup`, and importable. RANK, LOCAL_RANK and WORLD_SIZE are in the environment.
        kill_after: Longest time of a subtest, in seconds. A rank that is stuck for longer is ended.
        env: Environment variables of the ranks.
        verbose: Whether to print a line for each subtest instead of a character.
        options: Passed on to each `collective_scope`.

    Attributes:
        starts: How many times the ranks have been started.
    """

    def __init__(
        self,
        world_size: int,
        make: Callable[[dist.Store], object] | None = None,
        *,
        kill_after: float = 120.0,
        env: Mapping[str, str] | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        self.world_size, self.starts = world_size, 0
        self._given = (make, dict(env or {}), {"kill_after": kill_after, **options})
        self._patience, self._verbose = kill_after + LATE_S, verbose
        self._count, self._column = 0, 0
        self._ranks: list[tuple[Any, Connection]] = []
        # The store lives here, so that no rank's end takes it away from the others.
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        # Ranks are forks of a process that has imported torch: 0.1 s each instead of 2 s.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._send(None)
        self._end(LAST_WORDS_S if kind is None else 0.0)  # after Ctrl-C, ranks may be in a subtest
        self._print("")

    def run(
        self, name: str, fn: Callable[..., object], /, *args: Any, ranks: int = 0, report: Subtests | None = None
    ) -> SubtestResult:
        """
        Run ``fn(*args)`` on all ranks as the subtest *name*; return what became of it.

        Args:
            name: The subtest's name.
            fn: Importable. `collective_scope.current_scope` returns its scope.
            args: Its arguments; can be pickled.
            ranks: How many ranks take part, the lowest ones. A change costs a new group. 0: all.
            report: Where to keep the result, if not only here.

        Raises:
            ValueError: If the pool has not so many ranks.
        """
        if not 0 <= ranks <= self.world_size:
            msg = f"ranks must be at least 0 and at most {self.world_size} (got {ranks!r})"
            raise ValueError(msg)
        order = (name, fn, args, ranks or self.world_size)
        result = self._run(order)
        if result.status == "not run":  # for what an earlier subtest has left behind: new ranks have nothing of it
            result = self._run(order)
        if report is not None:
            report.results.append(result)
            line = f"{name} {result.status.upper()} {result.seconds:.2f} s\n"
            self._print(line if self._verbose else MARKS.get(result.status, "F"))
        return result

    def check(self, name: str, fn: Callable[..., object], /, *args: Any, ranks: int = 0) -> None:
        """
        Run a subtest like `run`, for pytest.

        Raises:
            RuntimeError: If it failed, with what each rank says of it, the first failure first.
            unittest.SkipTest: If all ranks skipped it, or let it fail as expected.
        """
        result = self.run(name, fn, *args, ranks=ranks)
        if result.status in ("failed", "not run"):
            raise RuntimeError(explain(result))
        if result.status != "passed":
            raise unittest.SkipTest(result.reason)

    def restart(self) -> None:
        """End the ranks; the next subtest gets new ones. For what a process can begin once only, such as NVSHMEM."""
        self._send(None)
        self._end(LAST_WORDS_S)

    def _run(self, order: tuple[Any, ...]) -> SubtestResult:
        if not self._ranks:
            self._start()
        began = time.monotonic()
        self._count += 1
        self._send((self._count, *order))
        results, lost = self._collect()
        result = next(filter(None, results.values()), SubtestResult(order[0]))
        if lost:
            endings = "; ".join(f"rank {number} {ending}" for number, ending in sorted(lost.items()))
            result.status, result.reason = "failed", f"{endings}; all ranks are started again"
            result.seconds = time.monotonic() - began
        if lost or result.status == "not run":
            self._end(0.0)
        if result.status in ("failed", "not run"):
            result.error = RuntimeError(f"{result.id} {result.status}")
        return result

    def _send(self, order: object) -> None:
        for _, pipe in self._ranks:
            with suppress(OSError):  # the rank is gone, which is seen when its answer is awaited
                pipe.send(order)

    def _collect(self) -> tuple[dict[int, SubtestResult | None], dict[int, str]]:
        """Return what the ranks answer, and how those ended that do not; print what they log."""
        results: dict[int, SubtestResult | None] = {}
        lost: dict[int, str] = {}
        until, has_failed = time.monotonic() + self._patience, False
        while left := [number for number in range(self.world_size) if number not in results and number not in lost]:
            ends = [end for number in left for end in (self._ranks[number][1], self._ranks[number][0].sentinel)]
            ready = wait(ends, max(0.0, until - time.monotonic()))
            for number in left:
                process, pipe = self._ranks[number]
                try:
                    message = pipe.recv() if pipe in ready else None
                except (EOFError, OSError):
                    lost[number] = ending_of(process)
                    continue
                if isinstance(message, logging.LogRecord):
                    text = message.getMessage()
                    if message.levelno >= logging.ERROR:  # of failures, the first in full: the rest mostly follows
                        text, has_failed = text.partition("\n")[0] if has_failed else text, True
                    self._print(f"[rank {number}] {text}\n")
                elif message is not None:
                    results[number] = message[0]
                elif process.sentinel in ready:
                    lost[number] = ending_of(process)
                elif not ready:
                    process.kill()
                    lost[number] = "did not answer, and was killed"
            if lost:
                until = min(until, time.monotonic() + LAST_WORDS_S)
        return results, lost

    def _start(self) -> None:
        self.starts += 1
        for number in range(self.world_size):
            ours, theirs = self._context.Pipe()
            place = (number, self.world_size, self._store.port, self.starts)
            process = self._context.Process(target=be_a_rank, args=(theirs, place, *self._given), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _end(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for process, pipe in self._ranks:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []

    def _print(self, text: str) -> None:
        """Print a line or a character; a line, or nothing, first ends a row of characters."""
        is_line = len(text) != 1
        print("\n" * (is_line and self._column > 0), text, sep="", end="", flush=True)
        self._column = 0 if is_line else self._column + 1


class ToParent(QueueHandler):
    """Sends what a rank logs to the parent."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send it."""
        with suppress(OSError):  # the parent is gone
            self.queue.send(record)


def be_a_rank(
    pipe: Any, place: tuple[int, int, int, int], make: Any, env: dict[str, str], options: dict[str, Any]
) -> None:
    """Run what the parent sends, until it sends None or is gone."""
    rank, world_size, port, start = place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), **env})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    to_parent = ToParent(pipe)
    logging.basicConfig(format="%(message)s", handlers=[to_parent], force=True)
    store = dist.TCPStore(HOST, port, is_master=False)
    world: RenewableGroup | None = None
    size = 0
    with suppress(EOFError):
        while (order := pipe.recv()) is not None:
            number, name, fn, args, ranks = order
            if ranks != size:
                if world is not None:
                    world.destroy()
                os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
                own = dist.PrefixStore(f"start {start}, subtest {number}", store)
                world = RenewableGroup(make, store=own, rank=rank, world_size=ranks) if rank < ranks else None
                size = ranks
            result = None
            if world is not None:
                subtests = Subtests(world, file=io.StringIO(), **options)
                with suppress(BaseException):  # a SystemExit, which is in the result, does not end this process
                    subtests.run(name, fn, *args)
                result = attrs.evolve(subtests.results[0], error=None)  # an error may be anything, and not be pickled
            to_parent.acquire()
            pipe.send((result,))
            to_parent.release()
        if world is not None:
            world.destroy()


def explain(result: SubtestResult) -> str:
    """Say what each rank tells of a failed subtest, the first failure first."""
    ordered = sorted(result.failures.items(), key=lambda each: each[1].order or float("inf"))
    texts = [f"rank {rank}, {outcome.phase}:\n{outcome.traceback}" for rank, outcome in ordered]
    return "\n".join(filter(None, [f"{result.id} {result.status}", result.reason, *texts]))


def ending_of(process: Any) -> str:
    """Say how a process has ended."""
    process.join(LAST_WORDS_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return "was ended by kill_after (exit code 124)" if code == 124 else f"ended with exit code {code}"

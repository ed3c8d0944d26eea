"""A loop of subtests in the same processes, of which one that fails costs one."""

from __future__ import annotations

import logging
import sys
import unittest
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO

from . import _groups, _kill
from ._api import collective_scope
from ._subtest import Subtest
from ._subtest_result import ExpectedFailure, SubtestResult
from ._subtests_report import Output, Progress, lost, summary, write_junit, write_trace
from ._torch import has_closed
from .agreement.clock import monotonic


logger = logging.getLogger("collective_scope")

BUDGET_S = 300.0


class Subtests:
    """
    A loop of subtests on a group, each in a scope of its own.

    A failure, here or on a peer, is kept on every rank alike, and the loop goes on. Rank 0 prints a
    character or a line for each, and at the end what failed, the cause first. On a `RenewableGroup`,
    a subtest that fails before its collectives costs that subtest; on any other, a rank that is
    stuck in a collective costs all that follow.

        with Subtests(world) as subtests:
            for config in configs:
                with subtests.test(config.id()):
                    run(config)

    Collective:
        Every rank of *group* goes through the same subtests.

    Args:
        group: As for `collective_scope`.

        budget: Seconds of waiting for ranks that do not come, over all subtests; after that the rest does not run.

        max_failures:
            How many subtests may fail before the rest does not run. An error after the barrier does
            not count: no peer knows of it. Default: any number.

        verbose: Whether to print a line for each subtest instead of a character.

        rerun: The command that runs one subtest again, with ``{id}`` in it; other braces are doubled.

        file: Where rank 0 prints; what cannot be written is dropped. Default: standard output.

        options: Passed on to each `collective_scope`; ``meet_at_entry`` is on.

    Raises:
        TypeError: If an argument has a wrong type, or *options* has what `collective_scope` does not know.
        ValueError: If one makes no sense.
        ExceptionGroup: At the end of the block, on every rank, if subtests failed: what this rank raised in each.
            A BaseExceptionGroup, if not all of that are of class Exception, such as what ``pytest.fail`` raises.

    A ``KeyboardInterrupt``, ``GeneratorExit``, ``asyncio.CancelledError`` or ``pytest.exit`` on one rank ends the
    loop on all: that rank raises it, and the others what it has made of their subtest. An interrupt that comes
    after the barrier, or between two subtests, is not told to the peers, and ends the loop on its rank. A
    ``SystemExit`` is a failure like any other, as in pytest and unittest.

    Attributes:
        results: What became of each subtest so far.
    """

    def __init__(
        self,
        group: _groups.GroupLike = None,
        *,
        budget: float = BUDGET_S,
        max_failures: int | None = None,
        verbose: bool = False,
        rerun: str = "",
        file: TextIO | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(budget, int | float) or isinstance(budget, bool):
            msg = f"budget must be seconds as a number (got {budget!r})"
            raise TypeError(msg)
        if max_failures is not None and (not isinstance(max_failures, int) or isinstance(max_failures, bool)):
            msg = f"max_failures must be a whole number or None (got {max_failures!r})"
            raise TypeError(msg)
        if not budget > 0:
            msg = f"budget must be positive seconds (got {budget!r})"
            raise ValueError(msg)
        if max_failures is not None and max_failures < 1:
            msg = f"max_failures must be at least 1 (got {max_failures!r})"
            raise ValueError(msg)
        try:
            rerun.format(id="")
        except (AttributeError, LookupError, ValueError) as error:
            msg = f"rerun must be a text in which {{id}} is the only field (got {rerun!r})"
            raise ValueError(msg) from error
        self.results: list[SubtestResult] = []
        self._group = group
        self._rank, self._is_renewable, self._is_found = 0, False, False
        self._budget, self._max_failures, self._rerun = budget, max_failures, rerun
        self._options = {"meet_at_entry": True, **options}
        collective_scope(group, name="", **self._options)  # refuses what makes no sense
        self._file, self._verbose = file, verbose
        self._progress: Progress | None = None
        self._running = ""
        """The subtest that has begun and not ended."""
        self._dead_since = ""
        """The first subtest whose collectives could not work, because its group was dead before."""
        self._started = monotonic()

    def __enter__(self) -> Self:
        _kill.last_words.append(self._sum_up)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _kill.last_words.remove(self._sum_up)
        self._sum_up(is_early=error is not None)
        failed = [result for result in self.results if result.status in ("failed", "not run")]
        if failed and error is None:
            errors = [result.error for result in failed if result.error is not None]
            not_run = sum(result.status == "not run" for result in failed)
            also = f", and {not_run} did not run" if not_run else ""
            msg = f"{len(failed) - not_run} of {len(self.results)} subtests failed{also}"
            raise BaseExceptionGroup(msg, errors)

    def test(self, id: str) -> Subtest:  # noqa: A002  (what it is)
        """
        Return a context manager that runs its block as the subtest *id*.

        The block does not run if the subtest is refused: a rank has not come back, or the budget is spent. Python
        can leave out the block of a plain ``with`` statement only. With `contextlib.ExitStack`, and in a generator
        such as a ``@contextmanager`` function or a fixture, use `run`.

        Raises:
            RuntimeError: At the entry, if the subtest is refused and its block cannot be left out.
        """
        return Subtest(self, str(id))

    def run(self, id: str, fn: Callable[..., object], /, *args: Any, **kwargs: Any) -> SubtestResult:  # noqa: A002  (positional only)
        """
        Run ``fn(*args, **kwargs)`` as the subtest *id*; return what became of it.

        Raises:
            BaseException: An interrupt, as `Subtests` says.
        """
        subtest = self.test(id)
        with subtest:  # which does not come to its block if it is refused
            fn(*args, **kwargs)
        return subtest.result

    def skip(self, reason: str) -> NoReturn:
        """
        Skip the subtest that is running. All ranks must; if only some do, it has failed.

        Raises:
            unittest.SkipTest: Always.
        """
        raise unittest.SkipTest(reason)

    def xfail(self, reason: str) -> NoReturn:
        """
        Let the subtest that is running fail as expected. All ranks must; if only some do, it has failed.

        Raises:
            unittest.SkipTest: Always, one of a class of its own.
        """
        raise ExpectedFailure(reason)

    def write_junit(self, path: str, name: str = "subtests") -> None:
        """
        Write the format that CI servers read. Every rank may call it; the lowest rank that is left writes.

        Raises:
            OSError: If the file cannot be written.
        """
        if self._speaks:
            write_junit(self.results, path, name)

    def write_trace(self, path: str) -> None:
        """
        Write a Chrome trace, which https://ui.perfetto.dev opens: one track a rank, with body, cleanups and waiting.

        Collective:
            Every rank calls it; rank 0 writes the file.

        Raises:
            OSError: On rank 0, if the file cannot be written.
        """
        found = _groups.find(self._group)
        write_trace(self.results, path, found[0].barrier if found is not None else None)

    def _sum_up(self, *, is_early: bool = True) -> None:
        """Print what became of the subtests, on rank 0; *is_early* if there may be more."""
        if self._speaks:
            self._get_progress().end()
            ended = f"with subtest {self.results[-1].id!r}" if is_early and self.results else ""
            ended = f"in subtest {self._running!r}, which is not counted either" if self._running else ended
            text = summary(self.results, monotonic() - self._started, self._rerun, ended)
            self._output.write(f"{text}\n")

    # Called by a subtest.

    def _look_up(self) -> None:
        """Learn this rank, as soon as there is a group; once that is known, a body may destroy the group."""
        if self._is_found:
            return
        try:
            found = _groups.find(self._group)
        except Exception:  # each subtest is refused for it, and tells it
            logger.debug("the group of the subtests cannot be had", exc_info=True)
            return
        if found is not None:
            barrier, self._is_found = found[0].barrier, True
            self._rank = 0 if barrier is None else barrier.rank
            self._is_renewable = found[0].renewal is not None

    @property
    def _speaks(self) -> bool:
        """Whether this rank is the lowest that is left."""
        self._look_up()
        return self._rank == min(set(range(self._rank + 1)) - lost(self.results), default=self._rank)

    @property
    def _output(self) -> Output:
        return Output(sys.stdout if self._file is None else self._file)

    def _get_progress(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(self._output, verbose=self._verbose)
        return self._progress

    def _why_not(self) -> str:
        """Return why no more subtests are run; empty if they are. The same on every rank."""
        self._look_up()
        waited = sum(result.waited for result in self.results)
        failures = sum(result.status == "failed" and not result.is_told_ok for result in self.results)
        if self._dead_since:
            return f"the group was dead when subtest {self._dead_since!r} came to use it, and cannot be renewed"
        if waited > self._budget:
            return f"ranks have waited {waited:.0f} s for others, more than budget={self._budget:.0f} s"
        if self._max_failures is not None and failures >= self._max_failures:
            have = "subtest has" if failures == 1 else "subtests have"
            return f"{failures} {have} failed, and max_failures={self._max_failures}"
        return ""

    def _note(self, result: SubtestResult) -> None:
        self._running = ""
        self.results.append(result)
        self._look_up()
        cause = result.cause
        # If a closed connection is what failed first, no rank of this subtest has made it so.
        if cause is not None and result.status == "failed" and has_closed(cause[1].message) and not self._is_renewable:
            self._dead_since = self._dead_since or result.id
        if self._rank == 0:
            self._get_progress().note(result)

"""
Cost of one failure in a loop of subtests, by the harness that runs the loop.

Every harness runs the same 20 subtests over gloo. In 8 of them one rank raises before, between or after its two
all-reduces; the others check the sums. The harnesses:

* ``subtests``: `Subtests` on a `RenewableGroup`.
* ``barrier``: ``dist.barrier()`` in a ``finally``, and a process group with a timeout of 5 s.
* ``continuous``: PyTorch's ``MultiProcContinuousTest``, from the installed torch, with the same timeout.
* ``inprocess``: NVIDIA's ``inprocess.Wrapper`` around the whole loop, with the same timeout. The wrapper calls the loop
  again; the loop, which is ours, has the ranks agree on the subtest that failed, and goes on after it.
* ``inprocess quick``: the same, but the wrapper looks for faults every 50 ms, not every second, and does not wait a
  second for more of them.

A verdict is right if a subtest without a failure passes, or one with a failure fails, and a rank names what was
injected. ``right``: a subtest counts as failed if it fails on any rank, as a reader of all logs sees it. ``on all``: so
many have the same, right verdict on every rank. ``seconds`` are from the first body to the end of the loop, without
imports and the start of processes. ``restarts`` are processes that were started in the course of the loop.

It needs an environment in which all of them are installed. A harness that is not has a row that says why. One command:

    python3 -m venv /tmp/compare-env &&
    /tmp/compare-env/bin/pip install -q -e . torch==2.13.0 numpy expecttest nvidia-resiliency-ext==0.4.1 &&
    /tmp/compare-env/bin/python -m tests.benchmarks.compare_carry_on [--ranks 2 4] [--seed 11] [--harness NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from tests.carry_on import Event, Failure, defects, plan

from collective_scope import RenewableGroup, SubtestResult, Subtests


COUNT, FAILING = 20, 8
TIMEOUT = timedelta(seconds=5)
DEADLINE_S = 400.0
LOOPBACK = "127.0.0.1"
VARIABLE = "COMPARE_CARRY_ON"
"""Where ranks, and the workers that PyTorch's harness spawns, find what they are part of."""


def plan_of(seed: int, world_size: int) -> list[Failure]:
    """Return what goes wrong in each subtest; before, between and after come in turn."""
    hows = itertools.cycle(("before", "between", "after"))
    failures = plan(seed, COUNT, FAILING, world_size)
    return [attrs.evolve(failure, how=next(hows)) if failure.how else failure for failure in failures]


def cause_of(failure: Failure) -> str:
    return f"injected {failure.how} on rank {failure.rank}"


def body(rank: int, world_size: int, number: int, failure: Failure) -> float:
    """Run one subtest on one rank; return the sum that it got."""

    def fail_if(how: str) -> None:
        if (failure.rank, failure.how) == (rank, how):
            raise ValueError(cause_of(failure))

    value = torch.full((8,), float(rank + number))
    fail_if("before")
    dist.all_reduce(value.clone())
    fail_if("between")
    dist.all_reduce(value)
    fail_if("after")
    total = float(value[0].item())
    assert total == sum(peer + number for peer in range(world_size)), f"wrong sum: {total}"
    return total


# Harness diaries


@attrs.frozen
class Diary:
    """Notes of one rank, or of the process that judges for all, on each subtest; kept if the process is killed."""

    folder: Path
    name: str

    def note(self, number: int, verdict: str, told: str = "") -> None:
        """Say that subtest *number* has ``began``, ``passed`` or ``failed``; the last word stands."""
        line = {"number": number, "verdict": verdict, "told": told, "pid": os.getpid(), "time": time.monotonic()}
        with (self.folder / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def told(error: BaseException) -> str:
    """Return all that a log would have of *error*, with what it replaced."""
    return "".join(traceback.format_exception(error))


# The harnesses; each runs on every rank, but for `run_continuous`, which starts its ranks itself


@attrs.frozen
class Place:
    """Where one rank of a harness is."""

    rank: int
    world_size: int
    store: dist.Store
    failures: list[Failure]
    folder: Path

    @property
    def diary(self) -> Diary:
        """The rank's diary."""
        return Diary(self.folder, f"rank-{self.rank}")

    def init(self, store: dist.Store) -> None:
        """Make the default group."""
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT)

    def run(self, number: int) -> float:
        """Run the body of subtest *number*."""
        self.diary.note(number, "began")
        return body(self.rank, self.world_size, number, self.failures[number])

    def remark(self, text: str) -> None:
        """Add *text* to the table; rank 0 does."""
        if self.rank == 0:
            (self.folder / "remark").write_text(text)


def run_subtests(place: Place) -> None:
    world = RenewableGroup(store=place.store, rank=place.rank, world_size=place.world_size)
    sums = [0.0] * len(place.failures)
    subtests = Subtests(world, file=io.StringIO())
    with contextlib.suppress(ExceptionGroup), subtests:  # its parts are in the results
        for number in range(len(place.failures)):
            with subtests.test(f"subtest-{number}"):
                sums[number] = place.run(number)
            result = subtests.results[number]
            causes = [failure.message for failure in result.failures.values()]
            place.diary.note(number, result.status, "\n".join(causes))
    world.destroy()
    place.remark(f"the group was made {world.made} times")
    events = [event_of(result, value, world.made) for result, value in zip(subtests.results, sums, strict=True)]
    place.store.set(f"events/{place.rank}", json.dumps([attrs.asdict(event) for event in events]))
    everybody = [json.loads(place.store.get(f"events/{rank}")) for rank in range(place.world_size)]
    # The library's tests ask this of a run: the cause is named first, on every rank, and numbers are right.
    found = defects(place.failures, [[Event(**event) for event in own] for own in everybody])
    assert not found, found


def event_of(result: SubtestResult, value: float, made: int) -> Event:
    """Return *result* as the tests have it."""
    error = "" if result.error is None else f"{type(result.error).__name__}: {str(result.error).splitlines()[0]}"
    first = min(result.failures.values(), key=lambda outcome: outcome.order or 10**9, default=None)
    times = dict.fromkeys(("began", "raised", "body_ended", "ended"), 0.0)
    return Event(error, "" if first is None else first.message, value, made=made, **times)


def run_barrier(place: Place) -> None:
    place.init(place.store)
    for number in range(len(place.failures)):
        try:
            try:
                place.run(number)
            finally:
                dist.barrier()
        except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
            place.diary.note(number, "failed", told(error))
        else:
            place.diary.note(number, "passed")
    dist.destroy_process_group()


def run_inprocess(place: Place, **options: Any) -> None:
    from nvidia_resiliency_ext import inprocess  # noqa: PLC0415  (optional)

    # State across restarts: the subtest that this rank has come to, whether it is in it, and what it raised there.
    at, is_in, raised, calls = 0, False, "", itertools.count()

    @inprocess.Wrapper(**options)
    def suite() -> None:
        nonlocal at, is_in, raised
        call = next(calls)
        fresh = dist.PrefixStore(f"call-{call}", place.store)
        if call:
            fresh.set(str(place.rank), json.dumps([at, is_in, raised]))
            peers = [json.loads(fresh.get(str(rank))) for rank in range(place.world_size)]
            # A rank that has come to a subtest has seen all ranks at the end of the one before.
            furthest = max(number for number, _, _ in peers)
            for number in range(at, furthest):
                place.diary.note(number, "passed")
            texts = [text for number, was_in, text in peers if number == furthest and was_in]
            if texts:
                place.diary.note(furthest, "failed", "\n".join(texts))
            at, is_in, raised = furthest + bool(texts), False, ""
        place.init(fresh)
        while at < len(place.failures):
            is_in = True
            try:
                place.run(at)
                dist.barrier()
            except Exception as error:
                raised = told(error)
                raise
            place.diary.note(at, "passed")
            at, is_in = at + 1, False
        dist.destroy_process_group()

    suite()
    place.remark(f"the loop was called {next(calls)} times")


def make_suite(failures: list[Failure], folder: Path, world_size: int) -> type[unittest.TestCase]:
    """Return the subtests as a class of PyTorch's harness."""
    from torch.testing._internal.common_distributed import MultiProcContinuousTest  # noqa: PLC0415  (slow)

    ranks = world_size

    class ContinuousSuite(MultiProcContinuousTest):  # type: ignore[misc]  # torch has no types for it
        world_size = ranks
        timeout = TIMEOUT

        @classmethod
        def backend_str(cls) -> str:
            return "gloo"

    def method_of(number: int) -> Callable[[Any], None]:
        def test(self: Any) -> None:
            Diary(folder, f"worker-{self.rank}").note(number, "began")
            body(self.rank, self.world_size, number, failures[number])

        return test

    for number in range(len(failures)):
        setattr(ContinuousSuite, f"test_{number:02}", method_of(number))
    ContinuousSuite.__qualname__ = "ContinuousSuite"  # its workers look it up there
    return ContinuousSuite


if VARIABLE in os.environ and (_given := json.loads(os.environ[VARIABLE]))["name"] == "continuous":
    _size = _given["world_size"]
    ContinuousSuite = make_suite(plan_of(_given["seed"], _size), Path(_given["folder"]), _size)


def run_continuous(place: Place) -> None:
    diary = Diary(place.folder, "all")
    names = [f"test_{number:02}" for number in range(len(place.failures))]
    suite = unittest.TestSuite(ContinuousSuite(name) for name in names)
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    numbers = {name: number for number, name in enumerate(names)}
    verdicts = dict.fromkeys(range(len(names)), ("passed", ""))
    for verdict, tests in (("failed", result.errors + result.failures), ("not run", result.skipped)):
        for test, text in tests:
            verdicts[numbers[test.id().rpartition(".")[2]]] = (verdict, text)
    for number, verdict in verdicts.items():
        diary.note(number, *verdict)


HARNESSES: dict[str, Callable[[Place], None]] = {
    "subtests": run_subtests,
    "barrier": run_barrier,
    "continuous": run_continuous,
    "inprocess": run_inprocess,
    "inprocess quick": functools.partial(
        run_inprocess, monitor_thread_interval=timedelta(milliseconds=50), last_call_wait=timedelta(0)
    ),
}
NEEDS = {
    "continuous": "torch.testing._internal.common_distributed",
    "inprocess": "nvidia_resiliency_ext.inprocess",
    "inprocess quick": "nvidia_resiliency_ext.inprocess",
}


# Running one


def play(name: str, rank: int, world_size: int, seed: int) -> None:
    """Be one rank of a harness."""
    torch.set_num_threads(1)
    given = json.loads(os.environ[VARIABLE])
    store = dist.PrefixStore("compare", dist.TCPStore(LOOPBACK, given["port"], wait_for_workers=False))
    if name != "continuous":  # of which this is the only process so far
        store.set(f"ready/{rank}", "")
        store.wait([f"ready/{peer}" for peer in range(world_size)])  # the imports are not to be counted
    folder = Path(given["folder"])
    HARNESSES[name](Place(rank, world_size, store, plan_of(seed, world_size), folder))
    (folder / f"end-{rank}").write_text(str(time.monotonic()))


HEAD = "| harness | ranks | right | on all | seconds | restarts | remark |\n|---|---|---|---|---|---|---|"


def run_harness(name: str, world_size: int, seed: int) -> str:
    """Run one harness in processes of its own; return a line of the table: what came of it, or why it cannot be run."""
    if name in NEEDS:
        command = [sys.executable, "-W", "ignore", "-c", f"import {NEEDS[name]}"]
        trial = subprocess.run(command, capture_output=True, text=True, check=False)
        if trial.returncode:
            return f"| {name} | {world_size} | | | | | cannot be run: {trial.stderr.strip().splitlines()[-1]} |"
    with socket.create_server((LOOPBACK, 0)) as probe:
        master_port = probe.getsockname()[1]  # of the store that NVIDIA's wrapper makes for itself
    server = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = {"name": name, "folder": temporary, "port": server.port, "seed": seed, "world_size": world_size}
        variables = {
            VARIABLE: json.dumps(given),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(master_port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "RES_OPTIONS": "attempts:0",  # a TCPStore asks the DNS for the names of its clients
        }
        processes = []
        for rank in range(1 if name == "continuous" else world_size):
            command = [sys.executable, "-m", "tests.benchmarks.compare_carry_on", "--play", name, str(rank)]
            command += ["--ranks", str(world_size), "--seed", str(seed)]
            env = os.environ | variables | {"RANK": str(rank)}
            with (folder / f"log-{rank}").open("w") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        remarks = wait_for(processes)
        if remarks:
            print(*(path.read_text() for path in folder.glob("log-*")), sep="\n", file=sys.stderr)
        return row_of(Notes(name, world_size, plan_of(seed, world_size), folder), remarks)


def wait_for(processes: list[subprocess.Popen[bytes]]) -> list[str]:
    """Wait until all have ended, and kill those that have not in time; return what went wrong."""
    deadline = time.monotonic() + DEADLINE_S
    remarks = []
    for rank, process in enumerate(processes):
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            remarks.append(f"rank {rank} was killed after {DEADLINE_S:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            if code:
                remarks.append(f"rank {rank} ended with exit code {code}")
    return remarks


@attrs.frozen
class Notes:
    """The written notes of a harness's ranks."""

    name: str
    world_size: int
    failures: list[Failure]
    folder: Path

    def lines(self) -> dict[str, list[dict[str, Any]]]:
        """Return what each has said."""
        paths = self.folder.glob("*.jsonl")
        return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}

    def is_right(self, number: int, words: list[dict[str, Any]]) -> tuple[bool, bool]:
        """Say whether the verdict on subtest *number* is right, of all ranks together, and of each."""
        verdicts, failure = {word["verdict"] for word in words}, self.failures[number]
        if not failure.how:
            return (verdicts == {"passed"},) * 2
        is_named = any(cause_of(failure) in word["told"] for word in words)
        return is_named and "failed" in verdicts, is_named and verdicts == {"failed"}


def row_of(notes: Notes, remarks: list[str]) -> str:
    """Return a line of the table."""
    lines = notes.lines()
    begins = [line for own in lines.values() for line in own if line["verdict"] == "began"]
    judges = ["all"] if notes.name == "continuous" else [f"rank-{rank}" for rank in range(notes.world_size)]
    # The last word of each on each subtest.
    words = [{line["number"]: line for line in lines.get(judge, [])} for judge in judges]
    nothing = {"verdict": "nothing", "told": ""}
    rights = [
        notes.is_right(number, [own.get(number, nothing) for own in words]) for number in range(len(notes.failures))
    ]
    right, on_all = (sum(column) for column in zip(*rights, strict=True))
    ends = [float(path.read_text()) for path in notes.folder.glob("end-*")]
    seconds = max(ends, default=time.monotonic()) - min((line["time"] for line in begins), default=time.monotonic())
    restarts = len({line["pid"] for line in begins}) - notes.world_size
    remarks += [path.read_text() for path in notes.folder.glob("remark")]
    cells = (notes.name, notes.world_size, right, on_all, f"{seconds:.1f}", restarts, "; ".join(remarks))
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare what one failure costs a loop of subtests.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--harness", nargs="+", choices=HARNESSES, default=list(HARNESSES))
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        name, rank = arguments.play
        play(name, int(rank), arguments.ranks[0], arguments.seed)
        return
    for world_size in arguments.ranks:
        failures = plan_of(arguments.seed, world_size)
        told_plan = ", ".join(f"{n} {each.how} {each.rank}" for n, each in enumerate(failures) if each.how)
        print(f"{world_size} ranks; subtests that fail, how, and on which rank: {told_plan}")
    print(f"torch {torch.__version__}", HEAD, sep="\n\n", flush=True)
    for world_size in arguments.ranks:
        for name in arguments.harness:
            print(run_harness(name, world_size, arguments.seed), flush=True)


if __name__ == "__main__":
    main()

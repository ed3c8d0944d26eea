"""
Write the table of faults: what each rank saw, and after how long, with a scope and without.

Each fault is played by the same processes with the same limits in three ways: with
``collective_scope``, with ``dist.barrier()`` in a ``finally``, and with
``dist.monitored_barrier()`` there.

Run: ``python -m tests.faults.table [--runs 3] [--lanes 4] [--only WORDS]``
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from concurrent.futures import Future
from pathlib import Path

import attrs
import pytest
import torch

from tests.faults._faults import FAULTS
from tests.faults._play import GRACE_S, LONG_S, Ending, Fault, Mechanism, Performance
from tests.faults._stage import Play, Played, Stage, delay


_NOTHING = "-"

MECHANISMS: tuple[Mechanism, ...] = ("scope", "barrier", "monitored_barrier")

TITLES = (
    "| fault | with a scope | s | with `dist.barrier()` | s | with `monitored_barrier()` | s |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)

TARGET = Path(__file__).parent / "README.md"

HEAD = """\
# What goes wrong, and what each rank sees of it

Written by `python -m tests.faults.table`, which plays every fault with real processes over gloo on one machine
({machine}): with a scope, with `dist.barrier()` in the `finally` that people write today, and with
`dist.monitored_barrier()` there; runs of each: {runs}. All three have the same `timeout=`, 2 s for most.

* **What each rank saw** is the exception that left the scope, with the ranks that it names, or how the process ended.
  `hangs`: still there {grace:.0f} seconds after the last deadline, and killed by the harness.
* **s** is the time to detection: seconds from the fault, or from the rank's own arrival if that was later, until the
  last of the ranks on which nothing went wrong knew; the median of the runs.
* A dash: the fault has no such equivalent, or there is nothing to detect.

An interrupt at each line of the library in turn has a test of its own, [`test_interrupts.py`](../test_interrupts.py), and
far more cleanups, characters and scopes than anybody needs are in [`test_limits.py`](test_limits.py).

That the ranks name the right peers, run each cleanup once, end in time and can or cannot go on is asserted by
[`test_faults.py`](test_faults.py), with other numbers of ranks too.

"""


def main() -> int:
    """Play all faults and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--only", default="", help="play only faults whose name contains this; other rows stay")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    keys = [
        (fault.name, mechanism)
        for _ in range(args.runs)
        for fault in faults
        for mechanism in MECHANISMS
        if mechanism == "scope" or fault.compare
    ]
    by_name = {fault.name: fault for fault in faults}
    cells: dict[tuple[str, Mechanism], list[tuple[str, float | None]]] = {}
    with Stage(args.lanes) as stage:
        futures = stage.put(
            Play(_with_times_of_table(by_name[name]), min(by_name[name].world_sizes), how) for name, how in keys
        )
        for number, (key, future) in enumerate(zip(keys, futures, strict=True)):
            cells.setdefault(key, []).append(_cell(by_name[key[0]], future))
            print(f"{number + 1} of {len(keys)}: {key[0]}, {key[1]}: {cells[key][-1]}", flush=True)
    rows = _rows_so_far() | {fault.name: _row(fault, cells) for fault in faults}
    lines = [*HEAD.format(machine=f"torch {torch.__version__}", runs=args.runs, grace=GRACE_S).splitlines(), *TITLES]
    lines += [rows[fault.name] for fault in FAULTS]
    TARGET.write_text("\n".join(lines) + "\n")
    return 0


def _with_times_of_table(fault: Fault) -> Fault:
    """Return *fault* with limits that a bare barrier, which runs into them, is compared with."""
    times = {"timeout": 2.0, "failure_timeout": 1.5, "next_timeout": 1.0}
    return attrs.evolve(fault, **{name: s for name, s in times.items() if getattr(fault, name) == LONG_S})


def _cell(fault: Fault, future: Future[Played]) -> tuple[str, float | None]:
    """Return what the ranks saw in one run, and when they knew."""
    try:
        performances = future.result().performances
    except pytest.skip.Exception as skipped:
        return f"not played: {skipped}", None
    texts: dict[str, list[int]] = {}
    for rank, performance in enumerate(performances):
        texts.setdefault(_seen(performance), []).append(rank)
    saw = "; ".join(f"{', '.join(map(str, ranks))}: {text}" for text, ranks in texts.items())
    witnesses = fault.survivors(len(performances)) or range(len(performances))
    endings = [_first(performances[rank]) for rank in witnesses]
    known = [delay(performances, ending) for ending in endings if ending is not None and ending.error]
    return saw, max(known) if len(known) == len(witnesses) else None


def _first(performance: Performance) -> Ending | None:
    return performance.part.endings[0] if performance.part is not None and performance.part.endings else None


def _seen(performance: Performance) -> str:
    ending = _first(performance)
    if performance.outlived:
        return "hangs" if ending is None else f"{_told(ending)}, then hangs"
    if ending is None:
        how = performance.exit
        return f"killed by {signal.Signals(-how).name}" if how < 0 else f"gone, exit code {how}"
    return _told(ending)


def _told(ending: Ending) -> str:
    if not ending.error:
        return "leaves quietly"
    verdict = ending.verdict
    if verdict is None:
        return ending.error
    failed = tuple(verdict.failures) if ending.error == "PeerFailedError" else ()
    missing = verdict.missing if ending.error == "BarrierTimeoutError" else ()
    named = {"failed": failed, "lost": verdict.lost if ending.error == "PeerLostError" else (), "missing": missing}
    words = [f"{word} {', '.join(map(str, ranks))}" for word, ranks in named.items() if ranks]
    return f"{ending.error} ({'; '.join(words)})" if words else ending.error


def _rows_so_far() -> dict[str, str]:
    lines = TARGET.read_text().splitlines() if TARGET.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def _row(fault: Fault, cells: dict[tuple[str, Mechanism], list[tuple[str, float | None]]]) -> str:
    columns = [column for mechanism in MECHANISMS for column in _columns(cells.get((fault.name, mechanism), []))]
    return f"| {' | '.join([fault.name, *columns])} |"


def _columns(runs: list[tuple[str, float | None]]) -> tuple[str, str]:
    """Condense the runs of one fault: all that was seen, the most frequent first, and the median time."""
    if not runs:
        return _NOTHING, _NOTHING
    saw = [text for text, _ in runs]
    different = sorted(set(saw), key=lambda text: -saw.count(text))
    known = [seconds for _, seconds in runs if seconds is not None]
    return "<br>or ".join(different), f"{statistics.median(known):.2f}" if len(known) == len(runs) else _NOTHING


if __name__ == "__main__":
    sys.exit(main())

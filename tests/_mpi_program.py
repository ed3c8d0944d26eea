"""Each rank of `test_mpi` runs this under mpirun. Prints one JSON line a rank."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from collective_scope import collective_scope


COMM = MPI.COMM_WORLD
PATIENCE_S = 10.0
RANK = COMM.Get_rank()
SIZE = COMM.Get_size()


def _name_of_error(run: Callable[[], object]) -> list[Any]:
    try:
        run()
    except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
        return [type(error).__name__, str(error)]
    return ["", ""]


def healthy() -> Any:
    ran: list[str] = []
    with collective_scope(COMM, name="healthy") as scope:
        scope.cleanup(ran.append, "local")
        scope.collective_cleanup(ran.append, "collective", name="c")
    assert scope.verdict is not None
    return [scope.verdict.ok, scope.verdict.world_size, ran]


def failing() -> Any:
    def run() -> None:
        with collective_scope(COMM, name="failing"):
            if RANK == SIZE - 1:
                msg = "on the last rank"
                raise ValueError(msg)

    return _name_of_error(run)


def differing() -> Any:
    def run() -> None:
        with collective_scope(COMM, name="differing") as scope:
            scope.collective_cleanup(lambda: None, name="c", fingerprint=lambda: RANK == 0)

    return _name_of_error(run)


def late() -> Any:
    def run() -> None:
        with collective_scope(COMM, name="late", timeout=2):
            if RANK == SIZE - 1:
                released.wait(30)

    released = threading.Event()
    if RANK == SIZE - 1:
        # Released when the others have given up, over a communicator of their own.
        threading.Thread(target=lambda: (OTHER.recv(source=0), released.set())).start()
    result = _name_of_error(run)
    if RANK == 0:
        OTHER.send("go", dest=SIZE - 1)
    return result


def beside_barriers() -> Any:
    """Barriers of the body's own do not pair with ours."""
    with collective_scope(COMM, name="beside") as scope:
        for _ in range(RANK == 0):
            request = COMM.Ibarrier()
        if RANK:
            request = COMM.Ibarrier()
    request.Wait()
    assert scope.verdict is not None
    return scope.verdict.ok


def freed() -> Any:
    with collective_scope(COMM, name="before"):
        pass
    before = threading.active_count()
    for _ in range(20):
        copy = COMM.Dup()
        with collective_scope(copy, name="copy"):
            pass
        copy.Free()
    until = time.monotonic() + PATIENCE_S
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)  # Free() waits for the threads for half a second.
    return threading.active_count() - before


def outside() -> Any:
    part = COMM.Split(0 if RANK == 0 else MPI.UNDEFINED)
    ran: list[str] = []
    with collective_scope(part, name="outside") as scope:
        scope.cleanup(ran.append, "local")
    assert scope.verdict is not None
    return [scope.verdict.world_size, ran]


OTHER = COMM.Dup()
CASES = {each.__name__: each for each in (healthy, failing, differing, late, beside_barriers, freed, outside)}

if __name__ == "__main__":
    results = {name: case() for name, case in CASES.items()}
    sys.stdout.write(json.dumps([RANK, results]) + "\n")
    sys.stdout.flush()

"""Where a thread is, in the few lines that tell it: its body's, the two innermost, and who waits for a collective."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType

import pytest
import torch.distributed as dist
from torch.distributed.elastic.utils.store import barrier

from collective_scope.agreement import stacks
from collective_scope.agreement.stacks import where_is
from tests.stores import PATIENCE_S, wait_until


class _Parked:
    """A thread that is in a few functions, until it is let go."""

    def __init__(self) -> None:
        self.is_there, self._go = threading.Event(), threading.Event()

    def body(self, depth: int) -> None:
        self._wrapper(depth)

    def _wrapper(self, depth: int) -> None:
        self._deeper(depth)

    def _deeper(self, depth: int) -> None:
        if depth:
            self._deeper(depth - 1)
        else:
            self._almost()

    def _almost(self) -> None:
        self._innermost()

    def _innermost(self) -> None:
        self.is_there.set()
        self._go.wait(PATIENCE_S)

    def let_go(self) -> None:
        self._go.set()


@contextlib.contextmanager
def _thread(fn: Callable[..., object], *args: object, name: str = "other") -> Iterator[int]:
    thread = threading.Thread(target=fn, args=args, name=name)
    thread.start()
    assert thread.ident is not None
    try:
        yield thread.ident
    finally:
        thread.join(PATIENCE_S)


@contextlib.contextmanager
def _parked(depth: int = 3) -> Iterator[int]:
    parked = _Parked()
    with _thread(parked.body, depth) as ident:
        assert parked.is_there.wait(PATIENCE_S)
        try:
            yield ident
        finally:
            parked.let_go()


def _await_peers(store: dist.Store) -> None:
    barrier(store, 2, "peers")


@contextlib.contextmanager
def _in_a_collective(name: str) -> Iterator[int]:
    """Run a thread that waits in ``torch.distributed``, until the peer that it waits for has come."""
    store = dist.HashStore()
    with _thread(_await_peers, store, name=name) as ident:
        # Frames of a thread that is on its way there are a moving target.
        assert wait_until(lambda: store.num_keys() > 0 and "_await_peers" in where_is(ident))
        last: list[str] = []

        def is_still() -> bool:
            last.append(where_is(ident))
            return len(last) > 5 and len({*last[-5:]}) == 1

        assert wait_until(is_still)
        try:
            yield ident
        finally:
            barrier(store, 2, "peers")


def _functions(text: str) -> list[str]:
    return [line.rpartition(" in ")[2] for line in text.splitlines() if line.startswith('  File "')]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(_Parked.body.__code__, ["body", "_almost", "_innermost"], id="body"),
        pytest.param(_Parked._almost.__code__, ["_almost", "_innermost"], id="body-among-the-innermost"),  # noqa: SLF001  (a class of this file)
        pytest.param(_Parked._innermost.__code__, ["_innermost"], id="body-is-the-innermost"),  # noqa: SLF001  (a class of this file)
        pytest.param(None, ["_almost", "_innermost"], id="not-known"),
        pytest.param(_functions.__code__, ["_almost", "_innermost"], id="left"),
    ],
)
def test_thread_is_shown_at_its_body_and_the_two_innermost_lines(body: CodeType | None, expected: list[str]) -> None:
    """The line of the test's own function is shown, however deep the thread is below it, and no wrapper's."""
    with _parked() as ident:
        text = where_is(ident, body)

    assert expected == _functions(text)
    assert "self._go.wait(PATIENCE_S)" in text
    assert "threading.py" not in text


def test_body_that_calls_itself_is_shown_where_it_was_entered_last() -> None:
    """Of a function that calls itself, the innermost call is the one with the scope."""
    with _parked() as ident:
        text = where_is(ident, _Parked._deeper.__code__)  # noqa: SLF001  (a class of this file)

    assert ["_deeper", "_almost", "_innermost"] == _functions(text)
    assert "self._almost()" in text.splitlines()[1]


def test_thread_that_waits_while_it_handles_an_exception_names_it() -> None:
    """A rank that has failed, and waits in ``finally`` for peers that wait elsewhere, says how it failed."""
    parked = _Parked()

    def body() -> None:
        with contextlib.suppress(ValueError):
            try:
                msg = "shapes differ"
                raise ValueError(msg)
            finally:
                parked.body(0)

    with _thread(body) as ident:
        assert parked.is_there.wait(PATIENCE_S)
        text = where_is(ident, body.__code__)
        parked.let_go()

    assert ["body", "_almost", "_innermost"] == _functions(text)
    assert "  while it handles ValueError: shapes differ" == text.splitlines()[-1]


def test_thread_that_has_ended_is_nowhere() -> None:
    """A thread that is gone has no place, and asking for it raises nothing."""
    with _thread(int) as ident:
        pass

    assert "" == where_is(ident)


def test_other_thread_that_waits_for_a_collective_is_shown_too() -> None:
    """A thread that waits in torch.distributed is named, with its own lines; one that does something else is not."""
    with _parked() as ident, _parked(), _in_a_collective("poller"):
        text = where_is(ident, _Parked.body.__code__)
    first, _, second = text.partition("  in thread poller:\n")

    assert ["body", "_almost", "_innermost"] == _functions(first)
    assert "_await_peers" == _functions(second)[-1]
    assert "torch" not in second
    assert 1 == text.count("in thread")


def test_thread_in_a_collective_of_its_own_is_shown_once_at_the_line_that_called_it() -> None:
    """The frames of torch say less than the line that called them."""
    with _in_a_collective("main"), _in_a_collective("the one") as ident:
        text = where_is(ident)

    assert "_await_peers" == _functions(text.partition("  in thread ")[0])[-1]
    assert "barrier(store, 2, " in text
    assert "in thread the one" not in text


def test_threads_and_frames_of_the_library_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the control thread in a call of torch's, nor a frame of ours within the user's, is ever shown."""
    with _parked() as ident, _in_a_collective("collective_scope-control"):
        assert "in thread" not in where_is(ident)
        # As if the functions here were the library's.
        monkeypatch.setattr(stacks, "OURS", __file__)
        text = where_is(ident)

    assert [] == [name for name in _functions(text) if name in ("body", "_almost", "_innermost")]


def test_thread_that_waits_in_the_library_is_shown_in_its_own_program_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank at the barrier, neither the frames of a runner that has called the library are shown nor Python's."""
    with _parked() as ident:
        monkeypatch.setattr(stacks, "OURS", threading.__file__)  # as if the functions that wait were the library's
        assert ["_almost", "_innermost"] == _functions(where_is(ident))
        monkeypatch.setattr(stacks, "is_runner", __file__.__eq__)  # as if those here were pytest's
        text = where_is(ident)

    assert "" == text


_LOOKER = """
import gc, random, sys, threading, time
from collective_scope.agreement.stacks import where_is
from collective_scope._kill import stacks

alive = 0

class Garbage:
    def __init__(self):
        global alive
        alive += 1
        self.me = self

    def __del__(self):  # run by whichever thread collects; lets the others go on
        global alive
        alive -= 1
        time.sleep(1e-5)

functions = []
for size in range(12):  # frames of many sizes, full of floats: what lies where a frame was is no frame
    exec(
        f"def f(n, {', '.join(f'a{i}=1.5*{i}' for i in range(3 * size))}):\\n"
        f"    b, c = n * 1.25, [n] * {size}\\n"
        f"    return b if n <= 0 else b + random.choice(functions)(n - 1)\\n"
        f"functions.append(f)"
    )

def run():
    while True:
        functions[0](random.randrange(5, 40))
        if alive < 20:
            Garbage()

threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
sys.setswitchinterval(1e-4)
gc.set_threshold(10)
threshold = gc.get_threshold()
end = time.monotonic() + 5.0
count = 0
while time.monotonic() < end:
    where_is(threading.get_ident())  # looks at all threads, and shows the shortest stack
    count += 1
    if not count % 1000:
        assert "in f" in stacks()
assert gc.get_threshold() == threshold
print("looked", count, "times", flush=True)
import os
os._exit(0)
"""


def test_thread_that_runs_is_looked_at_while_others_leave_garbage_and_the_interpreter_survives() -> None:
    """A collector that runs between two frames, and lets the thread go on, would leave frames that are none."""
    done = subprocess.run([sys.executable, "-c", _LOOKER], capture_output=True, text=True, timeout=60, check=False)

    assert 0 == done.returncode, done.stderr[-2000:]
    assert done.stdout.startswith("looked ")


def test_process_forked_while_a_thread_is_looked_at_has_its_garbage_collector() -> None:
    """A fork waits until the collector may run again."""
    threshold, looking, go = gc.get_threshold(), threading.Event(), threading.Event()

    def look() -> None:
        with stacks.no_collection():
            looking.set()
            go.wait(PATIENCE_S)

    def let_go() -> None:
        # The fork below holds the interpreter until it waits for the lock.
        go.set()

    with _thread(look):
        assert looking.wait(PATIENCE_S)
        assert 0 == gc.get_threshold()[0]
        with _thread(let_go):
            child = os.fork()
        if child == 0:
            os._exit(gc.get_threshold() != threshold)
        assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert threshold == gc.get_threshold()

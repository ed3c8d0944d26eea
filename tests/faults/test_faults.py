"""Each fault ends in time, on every rank, with the same true account of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults._faults import FAULTS
from tests.faults._play import Ending, Expect, Fault, Mechanism, Performance, perform
from tests.ranks import RankPool, values


@pytest.fixture(scope="module", name="pool")
def _pool() -> Iterator[RankPool]:
    """Return processes that fork the ranks of each fault."""
    with RankPool(4, init=False) as pool:
        yield pool


@pytest.mark.parametrize(
    ("fault", "world_size"),
    [pytest.param(fault, n, id=f"{fault.name}-{n}") for fault in FAULTS for n in fault.world_sizes],
)
def test_fault_is_survived_in_time_and_told_alike(pool: RankPool, fault: Fault, world_size: int) -> None:
    """Every rank ends in time, survivors raise what is stated, each cleanup ran once, and the next scope works or refuses."""
    performances = play(pool, fault, world_size)

    defects = defects_of(fault, performances)
    assert not defects, "\n".join(defects)


def play(pool: RankPool, fault: Fault, world_size: int, mechanism: Mechanism = "scope") -> list[Performance]:
    """Have *world_size* ranks of the pool play *fault*."""
    results = values(pool.run(perform, fault, world_size, mechanism, timeout=fault.bound_s + 60))
    return [result for result in results if result is not None]


def delay(performances: list[Performance], ending: Ending) -> float:
    """Return the seconds from the fault, or from the rank's arrival if that was later, to the end of its scope."""
    faulted = [each.faulted for each in performances if each.faulted is not None]
    return ending.ended - max([ending.arrived, *([min(faulted)] if faulted else [])])


def defects_of(fault: Fault, performances: list[Performance]) -> list[str]:
    """Say what is not as it should be."""
    world_size = len(performances)
    defects = []
    for rank in range(world_size):
        defects += [f"rank {rank} {defect}" for defect in _defects_of_rank(fault, rank, performances)]
    if fault.alike:
        survivors = [performances[rank].part for rank in fault.survivors(world_size)]
        for number in range(3):
            endings = [part.endings[number] for part in survivors if part is not None and len(part.endings) > number]
            verdicts = [ending.verdict for ending in endings]
            if any(verdict != verdicts[0] for verdict in verdicts):
                defects.append(f"survivors have different verdicts on scope {number}: {verdicts}")
    return defects


def _defects_of_rank(fault: Fault, rank: int, performances: list[Performance]) -> Iterator[str]:
    it = performances[rank]
    if it.outlived:
        yield f"outlived its bound of {fault.bound_s:.1f} s"
    elif it.exit != fault.exits.get(rank, 0):
        yield f"ended with {it.exit} instead of {fault.exits.get(rank, 0)}"
    expected = [fault.expected(rank, number) for number in range(3 if fault.after else 2)]
    awaited = [expect for expect in expected if expect is not None]
    endings = it.part.endings if it.part is not None else ()
    if len(awaited) != len(endings):
        yield f"told of {len(endings)} scopes instead of {len(awaited)}"
    for number, (expect, ending) in enumerate(zip(awaited, endings, strict=False)):
        for defect in _defects(expect, ending, performances):
            yield f"in scope {number}: {defect}"
    for number, (ending, cleanups) in enumerate(zip(endings, it.part.cleanups if it.part else (), strict=False)):
        if cleanups != ((2, 1, 0) if ending.entered else ()):
            yield f"in scope {number} ran the cleanups {cleanups}"


def _defects(expect: Expect, ending: Ending, performances: list[Performance]) -> list[str]:
    if ending.error != expect.error:
        return [f"raised {ending.error or 'nothing'} instead of {expect.error or 'nothing'}:\n{ending.traceback}"]
    defects = []
    verdict = ending.verdict
    if expect.ranks is not None and verdict is not None:
        named = {"PeerLostError": verdict.lost, "BarrierTimeoutError": verdict.missing}
        ranks = named.get(ending.error, tuple(sorted(verdict.failures)))
        if ranks != expect.ranks:
            defects.append(f"named {ranks} instead of {expect.ranks}")
    missed = [words for words in expect.says if words not in ending.text]
    if missed:
        defects.append(f"does not say {missed}:\n{ending.text}")
    took = delay(performances, ending)
    if took > expect.within:
        defects.append(f"took {took:.2f} s instead of {expect.within:.2f} s")
    return defects

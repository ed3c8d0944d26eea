"""Each fault ends in time, on every rank, with the same true account of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.faults._faults import FAULTS
from tests.faults._play import Ending, Expect, Fault, Performance
from tests.faults._stage import Play, Played, Stage, delay


@pytest.fixture(scope="module", name="played")
def _played(request: pytest.FixtureRequest) -> Iterator[Callable[[pytest.Item], Played]]:
    """Return what became of the fault of a test. All that are to be tested are played from the start."""
    items = [item for item in request.session.items if "fault" in getattr(item, "fixturenames", ())]
    with Stage(request.config.getoption("--lanes")) as stage:
        params = [item.callspec.params for item in items]  # type: ignore[attr-defined]  # parametrized, all of them
        futures = stage.put([Play(each["fault"], each["world_size"]) for each in params])
        by_item: dict[pytest.Item, Future[Played]] = dict(zip(items, futures, strict=True))
        yield lambda item: by_item[item].result()


@pytest.mark.parametrize(
    ("fault", "world_size"),
    [pytest.param(fault, n, id=f"{fault.name}-{n}") for fault in FAULTS for n in fault.world_sizes],
)
def test_fault_is_survived_in_time_and_told_alike(
    fault: Fault,
    world_size: int,
    played: Callable[[pytest.Item], Played],
    request: pytest.FixtureRequest,
) -> None:
    """Every rank ends in time, survivors raise what is stated, each cleanup ran once, and the next scope works or refuses."""
    result = played(request.node)
    print(
        result.output,
        *(f"--- log of rank {rank}\n{each.log}" for rank, each in enumerate(result.performances)),
        sep="\n",
    )
    assert world_size == len(result.performances)

    defects = defects_of(fault, result.performances)
    if defects:
        pytest.fail("\n".join(defects), pytrace=False)


def test_table_has_a_row_for_each_fault() -> None:
    """The table in README.md was written for the faults that there are, in their order."""
    rows = (Path(__file__).parent / "README.md").read_text().splitlines()[2:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")]

    assert ["fault", "---", *(fault.name for fault in FAULTS)] == names


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
    wanted = {
        words: owner == rank for owner, texts in fault.logs.items() for words in texts if owner < len(performances)
    }
    wanted |= dict.fromkeys(fault.logs.get(rank, ()), True)
    for words, is_to_be in wanted.items():
        if (words in it.log) != is_to_be:
            yield f"has logged{' not' if is_to_be else ''} {words!r}"


def _defects(expect: Expect, ending: Ending, performances: list[Performance]) -> list[str]:
    if ending.error != expect.error and expect.otherwise is not None:
        expect = expect.otherwise
    if ending.error != expect.error:
        return [f"raised {ending.error or 'nothing'} instead of {expect.error or 'nothing'}:\n{ending.traceback}"]
    defects = []
    verdict = ending.verdict
    if expect.ranks is not None and verdict is not None:
        named = {"PeerLostError": verdict.lost, "BarrierTimeoutError": verdict.missing}
        ranks = named.get(ending.error, tuple(sorted(verdict.failures)))
        if ranks != expect.ranks:
            defects.append(f"named {ranks} instead of {expect.ranks}")
    patterns = [words if isinstance(words, re.Pattern) else re.compile(re.escape(words)) for words in expect.says]
    missed = [pattern.pattern for pattern in patterns if not pattern.search(ending.text)]
    if missed:
        defects.append(f"does not say {missed}:\n{ending.text}")
    took = delay(performances, ending)
    if took > expect.within:
        defects.append(f"took {took:.2f} s instead of {expect.within:.2f} s")
    return defects

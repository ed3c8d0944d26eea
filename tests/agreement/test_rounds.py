"""Paths, the count of a round, and the verdict: pure functions, over all that may come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import attrs
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from collective_scope import Outcome
from collective_scope.agreement.process import Place, Process
from collective_scope.agreement.records import OK, Listed, Record
from collective_scope.agreement.rounds import (
    ARRIVED,
    NAME_LIMIT,
    REPORT,
    agree,
    all_ok,
    cap,
    ends_early,
    failures_in_order,
    has_all,
    is_around,
    is_uneventful,
    judge,
    late_path,
    name_of,
    path_of,
    relation,
    scopes_around,
    still_refused,
)
from collective_scope.agreement.wire import encode_verdict


_FAILED = Outcome("body", "ValueError", "no", order=1)

_names = st.text(st.characters(exclude_categories=()), max_size=20)


# Paths


@given(st.lists(st.tuples(st.integers(0, 12), _names), min_size=1, max_size=4), st.integers(0, 3))
def test_path_of_any_names_gives_them_back_and_knows_what_is_around(scopes: list[tuple[int, str]], late: int) -> None:
    """A scope's path gives back its name, whatever that is, and the paths of the scopes around it."""
    paths: list[str] = []
    for number, name in scopes:
        paths.append(path_of(paths[-1] if paths else "", number, name, late))

    assert [name for _, name in scopes] == [name_of(path) for path in paths]
    assert paths[:-1] == scopes_around(paths[-1])
    assert all(is_around(outer, inner) and not is_around(inner, outer) for outer, inner in itertools.pairwise(paths))
    assert paths[-1].isprintable()
    assert scopes[0][1] == name_of(late_path(late, scopes[0][1]))


@given(st.lists(st.tuples(st.integers(0, 12), _names, st.integers(0, 3)), min_size=2, max_size=2, unique=True))
def test_path_of_different_scopes_is_different(scopes: list[tuple[int, str, int]]) -> None:
    """Two scopes never share a key."""
    assert 2 == len({path_of("", number, name, late) for number, name, late in scopes})


@given(_names, _names)
def test_cap_keeps_names_short_and_apart(one: str, other: str) -> None:
    """A name that is too long is shortened; two that differ somewhere in the middle still do."""
    padding = "x" * NAME_LIMIT
    long, longer = (f"begin{padding}{name}{padding}end" for name in (one, other))

    assert one == cap(one)
    assert len(cap(long)) <= NAME_LIMIT
    assert cap(long).startswith("begin")
    assert cap(long).endswith("end")
    assert (cap(long) == cap(longer)) == (one == other)


# Where a peer is


def _walk(path: str, tree: Any, exits: int) -> Iterator[tuple[str, str]]:
    """Return the rounds of the scope at *path*, and of those within it, in the order in which a rank comes to them."""
    yield path, "entry"
    for number, each in enumerate(tree):
        yield from _walk(path_of(path, number, "s"), each, exits)
    yield from ((path, "exit" if number == 1 else f"exit {number}") for number in range(1, exits + 1))


_trees = st.recursive(st.just(()), lambda trees: st.lists(trees, max_size=3).map(tuple), max_leaves=5)
_programs = st.lists(st.none() | _trees, min_size=1, max_size=4)
"""The scopes that are in no other one; None is the end of one that finds its group only there."""


def _rounds(program: list[Any], exits: int) -> list[tuple[str, str]]:
    rounds: list[tuple[str, str]] = []
    entered = late = 0
    for tree in program:
        if tree is None:
            rounds.append((late_path(late, "late"), "exit"))
            entered, late = 0, late + 1
        else:
            rounds += _walk(path_of("", entered, "s", late), tree, exits)
            entered += 1
    return rounds


@given(_programs, st.integers(1, 3), st.data())
def test_relation_of_ranks_in_one_program_says_whether_the_peer_will_come(
    program: list[Any], exits: int, data: st.DataObject
) -> None:
    """A peer will come to a round unless it has arrived at a later one, or failed on its way to a later one."""
    rounds = _rounds(program, exits)
    theirs_at, mine_at = (data.draw(st.integers(0, len(rounds) - 1)) for _ in range(2))
    has_failed = rounds[theirs_at][1] != "entry" and data.draw(st.booleans())  # a rank fails in its body or later
    mine = Record(*rounds[mine_at], True)  # noqa: FBT003  (a field of a record, or a setting)
    theirs = Record(*rounds[theirs_at], not has_failed, _FAILED if has_failed else OK)

    assert (theirs_at == mine_at) == (relation(theirs, mine) == "here")
    assert (theirs_at > mine_at) == ends_early(theirs, mine)


def _at(scope: str = "0 scope", stage: str = "exit", *, arrived: bool = True, **rest: Any) -> Record:
    return Record(scope, stage, arrived, **rest)


@pytest.mark.parametrize(
    ("theirs", "relations"),
    [
        pytest.param(_at("0 a/0 b"), ("here", "within", "within"), id="deeper"),
        pytest.param(_at("0 a"), ("around", "here", "within"), id="outer"),
        pytest.param(_at("0 a", "entry"), ("behind", "behind", "within"), id="outer-entry"),
        pytest.param(_at("0 other"), ("elsewhere", "elsewhere", "within"), id="other-name"),
        pytest.param(_at("1 a"), ("elsewhere", "elsewhere", "within"), id="next"),
        pytest.param(_at("0 a/0 x"), ("elsewhere", "within", "within"), id="other-inner-name"),
        pytest.param(_at("^0 late"), ("around", "around", "here"), id="late"),
        pytest.param(_at("1.0 a"), ("elsewhere", "elsewhere", "elsewhere"), id="after-late"),
        pytest.param(Record(), ("behind", "behind", "behind"), id="nowhere-yet"),
    ],
)
def test_relation_seen_from_an_inner_an_outer_and_a_late_scope(theirs: Record, relations: tuple[str, ...]) -> None:
    """Where a peer is depends on where one waits: within a scope, at its end, or at one that found its group there."""
    assert relations == tuple(relation(theirs, mine) for mine in (_at("0 a/0 b"), _at("0 a"), _at("^0 late")))


# The count


@pytest.mark.parametrize("world_size", [1, 2, 17_000, 2**20])
def test_count_of_any_world_size_up_to_a_million_does_not_overflow(world_size: int) -> None:
    """However many ranks fail, the count of a store tells whether all have come, and that there is something to tell."""
    store = dist.HashStore()
    peers = world_size - 1
    published = store.add("n", peers * REPORT)
    almost = store.add("n", peers * ARRIVED)
    last = store.add("n", ARRIVED + REPORT)

    assert last == world_size * (ARRIVED + REPORT) < 2**63
    assert not has_all(published, world_size)
    assert not has_all(almost, world_size)
    assert has_all(last, world_size)
    assert not is_uneventful(last)
    assert is_uneventful(world_size * ARRIVED)
    assert not is_uneventful(world_size * ARRIVED + REPORT)


# Judging


_outcomes = st.sampled_from([OK, _FAILED, Outcome("body", "KeyError", "1", order=3)])
_lists = st.sampled_from([(), (("a", "", ""),), (("a", "1", "x"), ("b", "", ""))])
_records = st.builds(
    Record,
    scope=st.sampled_from(["", "0 scope", "0 scope/0 inner", "1 scope", "0 other", "^0 late"]),
    stage=st.sampled_from(["entry", "exit", "exit 2"]),
    arrived=st.booleans(),
    outcome=_outcomes,
    cleanups=_lists,
)


@given(
    st.dictionaries(st.integers(0, 4), _records),
    _records.filter(lambda record: bool(record.scope)),
    st.booleans(),
    st.sets(st.integers(0, 4)),
    st.permutations(range(5)),
)
def test_judge_whatever_was_told_puts_each_rank_in_exactly_one_list(
    told: dict[int, Record],
    mine: Record,
    all_arrived: bool,  # noqa: FBT001  (parametrized)
    lost: set[int],
    order: list[int],
) -> None:
    """Every rank has arrived, or is missing, or lost; the order in which records were read does not matter."""
    shuffled = {rank: told[rank] for rank in order if rank in told}
    verdict, again = (judge(each, mine, 5, all_arrived=all_arrived, lost=lost) for each in (told, shuffled))

    assert list(range(5)) == sorted([*verdict.arrived, *verdict.missing, *verdict.lost])
    assert all(tuple(sorted(ranks)) == ranks for ranks in (verdict.arrived, verdict.missing, verdict.lost))
    assert verdict.complete == (len(verdict.arrived) == 5)
    assert encode_verdict(verdict) == encode_verdict(again)


def test_judge_all_arrived_is_ok_and_complete() -> None:
    """Where all have come and none told anything, the verdict is the one that needs no judging."""
    verdict = judge({0: _at()}, _at(), 2, all_arrived=True)

    assert all_ok(_at(), 2) == verdict
    assert (True, True, False, (0, 1)) == (verdict.ok, verdict.complete, verdict.pending, verdict.arrived)
    assert {0: OK, 1: OK} == verdict.outcomes
    assert ("scope", 2, "exit") == (verdict.scope, verdict.world_size, verdict.stage)


def test_judge_failure_of_arrived_rank_is_complete_but_not_ok() -> None:
    """A failed rank that arrived is not missing; its failure is told."""
    verdict = judge({0: _at(), 1: _at(outcome=_FAILED)}, _at(), 2)

    assert (False, True, ()) == (verdict.ok, verdict.complete, verdict.missing)
    assert {1: _FAILED} == verdict.failures


@pytest.mark.parametrize(
    ("records", "missing", "outcomes"),
    [
        pytest.param({2: _at()}, (0, 1, 3), {2: OK}, id="nothing-told"),
        pytest.param({2: _at(), 0: _at(stage="entry")}, (0, 1, 3), {2: OK}, id="record-of-an-earlier-round"),
        pytest.param({2: _at(), 0: _at("0 scope/1 inner")}, (0, 1, 3), {2: OK}, id="record-of-a-scope-within"),
        pytest.param(
            {2: _at(), 1: _at(outcome=_FAILED, arrived=False)},
            (0, 1, 3),
            {1: _FAILED, 2: OK},
            id="failure-published-but-not-arrived",
        ),
        pytest.param({2: _at(), 3: _at(), 1: _at()}, (0,), {1: OK, 2: OK, 3: OK}, id="rank-0"),
    ],
)
def test_judge_rank_that_did_not_arrive_is_missing(
    records: dict[int, Record], missing: tuple[int, ...], outcomes: dict[int, Outcome]
) -> None:
    """Missing are, sorted, the ranks that did not arrive at this round; what they told counts all the same."""
    verdict = judge(records, _at(), 4, timeout=1.5)

    assert (missing, 1.5, False, False) == (verdict.missing, verdict.timeout, verdict.complete, verdict.ok)
    assert (outcomes, {}, {}) == (verdict.outcomes, verdict.names, verdict.outside)


@pytest.mark.parametrize(
    ("other", "there"),
    [
        pytest.param(_at("0 other"), "other", id="name"),
        pytest.param(_at(stage="exit 2"), "scope (exit 2)", id="stage"),
    ],
)
def test_judge_rank_at_another_place_is_a_mismatch(other: Record, there: str) -> None:
    """Ranks at different places are named with them; a rank that came to neither is missing, without a name."""
    verdict = judge({0: _at(), 2: other}, _at(), 3)

    assert {0: "scope", 2: there} == verdict.names
    assert ((0,), (1, 2), False) == (verdict.arrived, verdict.missing, verdict.complete)


@pytest.mark.parametrize(
    ("mine", "other", "names"),
    [
        pytest.param("0 scope", "1 scope", {0: "scope (no. 1)", 1: "scope (no. 2)"}, id="of-a-loop"),
        pytest.param("0 a/1 s", "1 a/1 s", {0: "a (no. 1) / s (no. 2)", 1: "a (no. 2) / s (no. 2)"}, id="within"),
    ],
)
def test_judge_ranks_at_scopes_of_one_name_are_told_apart_by_their_numbers(
    mine: str, other: str, names: dict[int, str]
) -> None:
    """A mismatch whose names are all the same would contradict itself."""
    verdict = judge({0: _at(mine), 1: _at(other)}, _at(mine), 3)

    assert names == verdict.names
    assert ((0,), (1, 2), False) == (verdict.arrived, verdict.missing, verdict.complete)


@pytest.mark.parametrize("arrived", [True, False], ids=["waits-there", "is-on-its-way"])
def test_judge_failure_around_this_scope_is_told_as_such_and_is_no_mismatch(arrived: bool) -> None:  # noqa: FBT001  (parametrized)
    """A rank that failed in a scope around this one will not come: its failure is told, with the place."""
    mine = _at("0 outer/0 inner")
    verdict = judge({0: mine, 1: _at("0 outer", outcome=_FAILED, arrived=arrived)}, mine, 2)

    assert ("inner", {1: "outer"}, {}) == (verdict.scope, verdict.outside, verdict.names)
    assert ({0: OK, 1: _FAILED}, (1,)) == (verdict.outcomes, verdict.missing)


def test_judge_place_of_a_rank_that_arrived_or_is_unknown_is_left_out() -> None:
    """The verdict says where the ranks are that did not come, and only those."""
    places = {rank: Place(Process("host", rank)) for rank in range(3)}
    verdict = judge({0: _at()}, _at(), 4, where=places, lost=[2])

    assert {1: places[1], 2: places[2]} == verdict.where


def test_judge_reason_ends_a_round_early() -> None:
    """A round that was ended for a reason is incomplete, also if all have come."""
    verdict = judge({0: _at(), 1: _at()}, _at(), 2, reason="rank 0 stopped waiting")

    assert ((), False, False) == (verdict.missing, verdict.complete, verdict.ok)


def test_judge_equal_cleanups_are_agreed_and_pending() -> None:
    """Collective cleanups that all ranks have are agreed on, in order."""
    cleanups = (("b", "2", "two"), ("a", "", ""))
    verdict = judge({0: _at(cleanups=cleanups), 1: _at(cleanups=cleanups)}, _at(), 2, all_arrived=True)

    assert (("b", "a"), True, {}, True) == (verdict.agreed, verdict.pending, verdict.cleanups, verdict.ok)


@pytest.mark.parametrize(
    ("here", "there", "agreed"),
    [
        pytest.param((("a", "", ""),), (), (), id="missing-on-one-rank"),
        pytest.param((("b", "", ""), ("a", "", "")), (("a", "", ""),), ("a",), id="one-shared"),
        pytest.param((("b", "1", "x"), ("a", "", "")), (("b", "2", "x"), ("a", "", "")), ("a",), id="digest-differs"),
        pytest.param((("b", "", ""), ("a", "", "")), (("a", "", ""), ("b", "", "")), (), id="order-differs"),
    ],
)
def test_judge_different_cleanups_are_told_by_rank(
    here: tuple[Listed, ...], there: tuple[Listed, ...], agreed: tuple[str, ...]
) -> None:
    """Where collective cleanups differ, the verdict says which rank has which, and what is shared."""
    # A rank that has none need not have told anything.
    records = {0: _at(cleanups=here)} | ({1: _at(cleanups=there)} if there else {})
    verdict = judge(records, _at(), 2, all_arrived=True)

    assert {0: tuple((n, s) for n, _, s in here), 1: tuple((n, s) for n, _, s in there)} == verdict.cleanups
    assert (agreed, True, True, False) == (verdict.agreed, verdict.pending, verdict.complete, verdict.ok)


def test_still_refused_entry_has_the_ranks_of_the_one_before() -> None:
    """Ranks are listed as in the refusal before; the scope is this one, and nobody has waited for it."""
    earlier = judge({1: _at(stage="entry")}, _at(stage="entry"), 3, lost=[2], timeout=4.0)
    verdict = still_refused(earlier, _at("5 later", "entry"))

    assert ("later", "entry", 0.0) == (verdict.scope, verdict.stage, verdict.timeout)
    assert ((1,), (0,), (2,)) == (verdict.arrived, verdict.missing, verdict.lost)


# Agreeing


_unique_lists = st.lists(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["", "1"]), st.just("")), unique_by=lambda each: each[0]
    ).map(tuple),
    max_size=4,
)


@given(_unique_lists, st.randoms())
def test_agree_what_is_returned_all_ranks_can_run_in_that_order(lists: list[tuple[Listed, ...]], random: Any) -> None:
    """Agreed cleanups are on every rank, in that order, with one fingerprint, from whichever rank one begins."""
    agreed = agree(lists)

    assert agreed == agree(random.sample(lists, len(lists)))
    for each in lists:
        assert list(agreed) == [name for name, *_ in each if name in agreed]
    assert len({frozenset(pair for pair in each if pair[0] in agreed) for each in lists}) <= 1


@given(st.lists(st.sampled_from("abcd"), unique=True), st.integers(1, 4))
def test_agree_equal_lists_are_agreed_in_full(names: list[str], ranks: int) -> None:
    """Ranks with equal lists run all of them."""
    assert tuple(names) == agree([tuple((name, "", "") for name in names)] * ranks)


# The first cause


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=5, unique=True), st.integers(0, 2))
def test_failures_in_order_begin_with_the_one_published_first(orders: list[int], unpublished: int) -> None:
    """The first cause is at the top; failures that were never published come last, well ranks not at all."""
    failed = [attrs.evolve(_FAILED, order=order) for order in orders] + [attrs.evolve(_FAILED, order=0)] * unpublished
    outcomes = dict(enumerate([*failed, OK]))

    assert [*sorted(orders), *[0] * unpublished] == [
        outcome.order for _, outcome in cast("list[tuple[int, Outcome]]", failures_in_order(outcomes))
    ]


def test_failures_in_order_begin_with_the_rank_that_kept_others_waiting_if_they_know_no_other_cause() -> None:
    """A rank that hangs is interrupted after its peers have run into a time limit; with a true cause it comes last."""
    timed_out = attrs.evolve(_FAILED, type_name="RuntimeError", message="Timed out waiting 4000ms", order=1)
    hung = attrs.evolve(_FAILED, type_name="collective_scope.RevokedInterrupt", message="ended at a.py:3", order=2)

    assert [1, 0] == [rank for rank, _ in failures_in_order({0: timed_out, 1: hung})]
    assert [0, 2, 1] == [
        rank for rank, _ in failures_in_order({0: timed_out, 1: hung, 2: attrs.evolve(_FAILED, order=3)})
    ]


def test_failures_in_order_end_with_those_that_pass_on_a_peers() -> None:
    """A rank that has heard of a failure in a scope within may tell of it before the rank that failed."""
    passed_on = attrs.evolve(_FAILED, type_name="collective_scope.PeerFailedError", order=1)
    outcomes = {0: passed_on, 1: attrs.evolve(_FAILED, order=2), 2: attrs.evolve(_FAILED, order=0)}

    assert [1, 2, 0] == [rank for rank, _ in failures_in_order(outcomes)]

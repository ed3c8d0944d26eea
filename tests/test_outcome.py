"""Records and verdicts: what travels arrives, whatever it says."""

from __future__ import annotations

import json
import threading
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collective_scope._outcome import (
    MESSAGE_LIMIT,
    OK,
    TRACEBACK_LIMIT,
    Outcome,
    Record,
    Verdict,
    agree,
    judge,
    message_of,
    one_line,
    shorten,
    type_name,
)
from collective_scope._process import Process


# Surrogates included: file names that are not UTF-8 have them.
_texts = st.text(st.characters(exclude_categories=()), max_size=20)
_names = _texts
_pairs = st.lists(st.tuples(_names, _texts), max_size=3).map(tuple)
_outcomes = st.just(OK) | st.builds(
    Outcome,
    phase=_texts,
    type_name=_texts,
    message=_texts,
    traceback=_texts,
    order=st.integers(0, 2**40),
    also=st.lists(_texts, max_size=2),
)
_ranks = st.integers(0, 70_000)
_records = st.builds(
    Record,
    round=st.integers(0, 2**40),
    stage=_texts,
    scope=_texts,
    sequence=st.integers(0),
    outcome=_outcomes.filter(lambda outcome: not outcome.ok or outcome == OK),
    cleanups=_pairs,
    arrived=st.booleans(),
    process=st.builds(Process, host=_texts, pid=st.integers(0), start=st.integers(0), machine=_texts),
)
_verdicts = st.builds(
    Verdict,
    scope=_texts,
    sequence=st.integers(0),
    world_size=st.integers(1),
    stage=_texts,
    outcomes=st.dictionaries(_ranks, _outcomes, max_size=3),
    missing=st.lists(_ranks, max_size=3),
    lost=st.lists(_ranks, max_size=3),
    names=st.dictionaries(_ranks, st.tuples(_texts, st.integers(0)), max_size=3),
    cleanups=st.dictionaries(_ranks, _pairs, max_size=3),
    agreed=st.lists(_texts, max_size=3),
    pending=st.booleans(),
    timeout=st.floats(0, 1e9),
    reason=_texts,
    global_ranks=st.lists(_ranks, max_size=3),
)


class _TwoArgumentError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class _LockedError(Exception):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class _MuteError(Exception):
    def __str__(self) -> str:
        msg = "no words"
        raise LookupError(msg)


def _raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301  (it shall have a traceback)
    except BaseException as caught:  # noqa: BLE001
        return caught


def _sent(outcome: Outcome) -> Outcome:
    """Return what a peer reads of *outcome*."""
    text = Record(0, "exit", "scope", 0, outcome).encode().encode()
    verdict = judge({0: Record.decode(text)}, Record(0, "exit", "scope", 0), 1)
    return Verdict.decode(verdict.encode().encode()).outcomes[0]


# Travelling


@given(_records)
def test_record_any_content_round_trips(record: Record) -> None:
    """A record arrives as it was sent, and as text that any store takes."""
    text = record.encode()

    assert record == Record.decode(text.encode("ascii"))
    assert "\0" not in text


@given(_verdicts)
def test_verdict_any_content_round_trips(verdict: Verdict) -> None:
    """A verdict is read as it was written, with the types it was written with."""
    read = Verdict.decode(verdict.encode().encode("ascii"))

    assert verdict == read
    assert repr(verdict) == repr(read)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({}, "scope 'x', 2 of 2 ranks arrived, ok"),
        ({"outcomes": {1: Outcome("body", "ValueError"), 0: OK}}, "scope 'x', 2 of 2 ranks arrived, failed: 1"),
        ({"arrived": (1,), "missing": (0,)}, "scope 'x', 1 of 2 ranks arrived, missing: 0"),
        ({"arrived": (0,), "lost": (1,), "reason": "gone"}, "scope 'x', 1 of 2 ranks arrived, lost: 1"),
        ({"arrived": (0,), "reason": "rank 1 gave up"}, "scope 'x', 1 of 2 ranks arrived, rank 1 gave up"),
    ],
)
def test_verdict_as_text_is_a_line(what: dict[str, Any], text: str) -> None:
    """Printed, a verdict says how it went, without the tracebacks it has."""
    assert text == str(Verdict(**{"scope": "x", "sequence": 0, "world_size": 2, "arrived": (0, 1), **what}))


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        pytest.param(_TwoArgumentError(3, "words"), f"{__name__}._TwoArgumentError", "3: words", id="two-arguments"),
        pytest.param(_LockedError(), f"{__name__}._LockedError", "locked", id="holds-a-lock"),
        pytest.param(_MuteError(), f"{__name__}._MuteError", "<its str() raised LookupError>", id="str-raises"),
        pytest.param(ValueError(), "ValueError", "", id="no-message"),
        pytest.param(ValueError("two\nlines\r\nand\x1cmore"), "ValueError", "two\nlines\r\nand\x1cmore", id="newlines"),
        pytest.param(ValueError("a\0b"), "ValueError", "a\0b", id="nul"),
        pytest.param(ValueError("🙂 é"), "ValueError", "🙂 é", id="emoji"),
        pytest.param(ValueError("file \udc80"), "ValueError", "file \udc80", id="lone-surrogate"),
        pytest.param(KeyboardInterrupt(), "KeyboardInterrupt", "", id="keyboard-interrupt"),
        pytest.param(SystemExit(3), "SystemExit", "3", id="system-exit"),
        pytest.param(json.JSONDecodeError("bad", "doc", 1), "json.decoder.JSONDecodeError", None, id="json-error"),
    ],
)
def test_outcome_of_foreign_exception_arrives(error: BaseException, name: str, message: str | None) -> None:
    """Type, message and traceback of any exception arrive, without the exception."""
    outcome = Outcome.of(_raised(error), "body", order=4)

    assert outcome == _sent(outcome)
    assert ("body", name, str(error) if message is None else message, 4) == (
        outcome.phase,
        outcome.type_name,
        outcome.message,
        outcome.order,
    )
    assert f'File "{__file__}"' in outcome.traceback
    assert not outcome.ok


def test_outcome_of_a_megabyte_of_message_keeps_both_ends_and_the_place() -> None:
    """Of a huge message, the beginning, the end, and where it was raised arrive."""
    outcome = _sent(Outcome.of(_raised(ValueError(f"begin{'x' * 2**20}end")), "body"))

    assert outcome.message.startswith("begin")
    assert outcome.message.endswith("end")
    assert len(outcome.message) < MESSAGE_LIMIT + 100
    assert len(outcome.traceback) < TRACEBACK_LIMIT + 100
    assert "in _raised" in outcome.traceback


def test_outcome_of_deep_recursion_keeps_its_end() -> None:
    """The traceback of a recursion without end is cut, and ends with the error."""

    def recurse(depth: int) -> int:
        return recurse(depth + 1) + len(str(locals()))

    with pytest.raises(RecursionError) as caught:
        recurse(0)
    outcome = Outcome.of(caught.value, "body")

    assert len(outcome.traceback) < TRACEBACK_LIMIT + 100
    assert "RecursionError" in outcome.traceback.splitlines()[-1]


def test_outcome_of_chained_error_has_cause_and_notes() -> None:
    """Causes and notes are part of what peers read."""
    error = ValueError("effect")
    error.__cause__ = KeyError("the cause")
    error.add_note("a note")

    text = Outcome.of(error, "body").traceback

    assert "the cause" in text
    assert "a note" in text


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        pytest.param(OK, "ok", id="ok"),
        pytest.param(Outcome("body", "ValueError", "no"), "body failed: ValueError: no", id="failed"),
        pytest.param(Outcome("body", "ValueError", ""), "body failed: ValueError", id="no-message"),
        pytest.param(Outcome("cleanup 'a'", "E", "1\n 2\t3"), "cleanup 'a' failed: E: 1 2 3", id="lines"),
    ],
)
def test_outcome_str_is_one_line_that_names_phase_type_and_message(outcome: Outcome, text: str) -> None:
    """An outcome reads as one line."""
    assert text == str(outcome)


# Judging


def _record(**changes: Any) -> Record:
    return attrs.evolve(Record(3, "exit", "scope", 7), **changes)


_FAILED = Outcome("body", "ValueError", "no", order=1)


def test_judge_all_arrived_is_ok_and_complete() -> None:
    """Where all arrived and none failed, the verdict is ok."""
    verdict = judge({0: _record(), 1: _record()}, _record(), 2)

    assert (True, True, False) == (verdict.ok, verdict.complete, verdict.pending)
    assert {0: OK, 1: OK} == verdict.outcomes
    assert ("scope", 7, 2, "exit") == (verdict.scope, verdict.sequence, verdict.world_size, verdict.stage)


def test_judge_failure_of_arrived_rank_is_complete_but_not_ok() -> None:
    """A failed rank that arrived is not missing; its failure is told."""
    verdict = judge({0: _record(), 1: _record(outcome=_FAILED)}, _record(), 2)

    assert (False, True, ()) == (verdict.ok, verdict.complete, verdict.missing)
    assert {1: _FAILED} == verdict.failures


@pytest.mark.parametrize(
    ("records", "missing", "outcomes"),
    [
        pytest.param({2: _record()}, (0, 1, 3), {2: OK}, id="nothing-told"),
        pytest.param({2: _record(), 0: _record(round=2)}, (0, 1, 3), {2: OK}, id="record-of-an-earlier-round"),
        pytest.param({2: _record(), 0: _record(round=4)}, (0, 1, 3), {2: OK}, id="record-of-a-later-round"),
        pytest.param(
            {2: _record(), 1: _record(outcome=_FAILED, arrived=False)},
            (0, 1, 3),
            {1: _FAILED, 2: OK},
            id="failure-published-but-not-arrived",
        ),
        pytest.param({2: _record(), 3: _record(), 1: _record()}, (0,), {1: OK, 2: OK, 3: OK}, id="rank-0"),
    ],
)
def test_judge_who_did_not_arrive_is_missing(
    records: dict[int, Record], missing: tuple[int, ...], outcomes: dict[int, Outcome]
) -> None:
    """Missing are, sorted, the ranks that did not arrive at this round; what they told counts all the same."""
    verdict = judge(records, _record(), 4, timeout=1.5)

    assert (missing, 1.5, False, False) == (verdict.missing, verdict.timeout, verdict.complete, verdict.ok)
    assert outcomes == verdict.outcomes


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"scope": "other"}, id="name"),
        pytest.param({"sequence": 8}, id="sequence"),
        pytest.param({"stage": "exit 2"}, id="stage"),
    ],
)
def test_judge_different_places_are_a_mismatch_and_nobody_is_missing(other: dict[str, Any]) -> None:
    """Ranks at different places are named with them; nobody was waited for, so nobody is missing."""
    verdict = judge({0: _record(), 2: _record(**other)}, _record(), 3)

    if "stage" in other:  # then that is what tells the places apart
        assert verdict.names == {0: ("scope (exit)", 7), 2: (f"scope ({other['stage']})", 7)}
    else:
        assert verdict.names == {0: ("scope", 7), 2: (other.get("scope", "scope"), other.get("sequence", 7))}
    assert ((), False) == (verdict.missing, verdict.complete)


def test_judge_place_of_a_rank_that_only_published_is_no_mismatch() -> None:
    """A failure published from elsewhere tells an outcome, not a place."""
    verdict = judge({0: _record(), 1: _record(scope="other", outcome=_FAILED, arrived=False)}, _record(), 2)

    assert ({}, (1,)) == (verdict.names, verdict.missing)


@pytest.mark.parametrize("judges", [0, 1])
@pytest.mark.parametrize(("outer", "inner"), [(4, 5), (0, 0)], ids=["on-a-group", "that-made-the-group"])
def test_judge_failure_around_the_scope_of_others_ends_that_whoever_judges(judges: int, outer: int, inner: int) -> None:
    """The innermost scope is the one that none of the others is in, also where its sequence does not tell."""
    records = {
        0: _record(scope="inner", sequence=inner, enclosing=((outer, "outer"),)),
        1: _record(scope="outer", sequence=outer, outcome=_FAILED),
    }

    verdict = judge(records, records[judges], 2)

    assert ("inner", inner, {1: "outer"}, {}) == (verdict.scope, verdict.sequence, verdict.outside, verdict.names)


def test_judge_reason_ends_a_round_without_missing_ranks() -> None:
    """A round that was ended for a reason is incomplete, and calls nobody missing."""
    verdict = judge({0: _record()}, _record(), 2, reason="rank 0 stopped waiting")

    assert ((), False, "rank 0 stopped waiting") == (verdict.missing, verdict.complete, verdict.reason)


def test_judge_equal_cleanups_are_agreed_and_pending() -> None:
    """Collective cleanups that all ranks have are agreed on, in order."""
    cleanups = (("b", "2"), ("a", ""))
    verdict = judge({0: _record(cleanups=cleanups), 1: _record(cleanups=cleanups)}, _record(), 2)

    assert (("b", "a"), True, {}, True) == (verdict.agreed, verdict.pending, verdict.cleanups, verdict.ok)


@pytest.mark.parametrize(
    ("here", "there", "agreed"),
    [
        pytest.param((("a", ""),), (), (), id="missing-on-one-rank"),
        pytest.param((("b", ""), ("a", "")), (("a", ""),), ("a",), id="one-shared"),
        pytest.param((("b", "1"), ("a", "")), (("b", "2"), ("a", "")), ("a",), id="fingerprint-differs"),
        pytest.param((("b", ""), ("a", "")), (("a", ""), ("b", "")), (), id="order-differs"),
    ],
)
def test_judge_different_cleanups_are_told_by_rank(
    here: tuple[tuple[str, str], ...], there: tuple[tuple[str, str], ...], agreed: tuple[str, ...]
) -> None:
    """Where collective cleanups differ, the verdict says who has which, and what is shared."""
    verdict = judge({0: _record(cleanups=here), 1: _record(cleanups=there)}, _record(), 2)

    assert {0: here, 1: there} == verdict.cleanups
    assert (agreed, True, True, False) == (verdict.agreed, verdict.pending, verdict.complete, verdict.ok)


@given(st.permutations(range(4)), st.lists(_records, min_size=4, max_size=4))
def test_judge_any_order_of_records_gives_the_same_verdict(order: list[int], records: list[Record]) -> None:
    """The verdict does not depend on the order in which records were read."""
    told = dict(enumerate(records))
    shuffled = {rank: told[rank] for rank in order}

    assert judge(told, records[0], 5).encode() == judge(shuffled, records[0], 5).encode()


# Agreeing

_unique_lists = st.lists(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["", "1"])), unique_by=lambda pair: pair[0]).map(tuple),
    max_size=4,
)


@given(_unique_lists)
def test_agree_what_is_returned_all_ranks_can_run_in_that_order(lists: list[tuple[tuple[str, str], ...]]) -> None:
    """Agreed cleanups are on every rank, in that order, with one fingerprint."""
    agreed = agree(lists)

    for each in lists:
        assert list(agreed) == [name for name, _ in each if name in agreed]
    assert len({frozenset(pair for pair in each if pair[0] in agreed) for each in lists}) <= 1


@given(_unique_lists, st.randoms())
def test_agree_order_of_ranks_does_not_matter(lists: list[tuple[tuple[str, str], ...]], random: Any) -> None:
    """The agreement is the same from whichever rank one begins."""
    shuffled = random.sample(lists, len(lists))

    assert agree(lists) == agree(shuffled)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.just("")), unique=True).map(tuple), st.integers(1, 4))
def test_agree_equal_lists_are_agreed_in_full(pairs: tuple[tuple[str, str], ...], ranks: int) -> None:
    """Ranks with equal lists run all of them."""
    assert tuple(name for name, _ in pairs) == agree([pairs] * ranks)


# Words


def test_type_name_of_builtin_and_main_has_no_module() -> None:
    """The class is named as a traceback names it."""
    main = type("LocalError", (Exception,), {"__module__": "__main__"})

    assert ["ValueError", "LocalError", "json.decoder.JSONDecodeError"] == [
        type_name(ValueError()),
        type_name(main()),
        type_name(json.JSONDecodeError("", "", 0)),
    ]


def test_message_of_raising_str_says_so() -> None:
    """An exception that cannot say anything is told with the reason."""
    assert "<its str() raised LookupError>" == message_of(_MuteError())


@given(st.text(max_size=1000))
def test_one_line_any_message_is_one_readable_line(message: str) -> None:
    """Whatever the message, its summary is one line of bounded length."""
    text = one_line("Error", message)

    assert len(text.splitlines()) == 1
    assert text.startswith("Error")
    assert len(text) < 260


@given(st.text(max_size=100), st.integers(2, 60))
def test_shorten_any_text_keeps_both_ends_within_the_limit(text: str, limit: int) -> None:
    """A text within the limit is unchanged; a longer one keeps its ends and says how long it was."""
    short = shorten(text, limit)

    if len(text) <= limit:
        assert text == short
    else:
        half = limit // 2
        assert short.startswith(text[:half])
        assert short.endswith(text[-half:])
        assert f"{len(text)} characters" in short
        assert len(short) <= limit + 50

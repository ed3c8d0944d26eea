"""Records and verdicts: what travels arrives, whatever it says."""

from __future__ import annotations

import json
import threading
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collective_scope.agreement.process import Place, Process
from collective_scope.agreement.records import OK, Outcome, Record, Verdict
from collective_scope.agreement.text import MESSAGE_LIMIT, TRACEBACK_LIMIT
from collective_scope.agreement.wire import VERDICT_LIMIT, decode_verdict, encode_verdict


# Surrogates included: file names that are not UTF-8 have them.
_texts = st.text(st.characters(exclude_categories=()), max_size=20)
_listed = st.lists(st.tuples(_texts, _texts, _texts), max_size=3).map(tuple)
_pairs = st.lists(st.tuples(_texts, _texts), max_size=3).map(tuple)
_seconds = st.floats(0, 1e9)
_outcomes = st.just(OK) | st.builds(
    Outcome,
    phase=_texts.filter(bool),
    type_name=_texts,
    message=_texts,
    traceback=_texts,
    order=st.integers(0, 2**40),
    also=st.lists(_texts, max_size=2),
)
_processes = st.builds(
    Process, host=_texts, pid=st.integers(0), start=st.integers(0), machine=_texts, serves=st.booleans()
)
_places = st.builds(
    Place,
    process=_processes,
    state=_texts,
    scope=_texts,
    phase=_texts,
    seconds=_seconds,
    frames=_texts,
    silence=_seconds,
)
_ranks = st.integers(0, 70_000)
_sorted_ranks = st.lists(_ranks, max_size=3).map(sorted).map(tuple)
_records = st.builds(
    Record,
    scope=_texts,
    stage=_texts,
    arrived=st.booleans(),
    outcome=_outcomes,
    cleanups=_listed,
    process=_processes,
    place=st.none() | _places,
    answered=st.integers(0, 2**40),
    last_word=_texts,
)
_verdicts = st.builds(
    Verdict,
    scope=_texts,
    world_size=st.integers(1),
    arrived=_sorted_ranks,
    missing=_sorted_ranks,
    lost=_sorted_ranks,
    outcomes=st.dictionaries(_ranks, _outcomes, max_size=3),
    where=st.dictionaries(_ranks, _places, max_size=3),
    names=st.dictionaries(_ranks, _texts, max_size=3),
    outside=st.dictionaries(_ranks, _texts, max_size=3),
    cleanups=st.dictionaries(_ranks, _pairs, max_size=3),
    agreed=st.lists(_texts, max_size=3).map(tuple),
    timeout=_seconds,
    reason=_texts,
    stage=_texts,
    pending=st.booleans(),
    global_ranks=_sorted_ranks,
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
        raise error  # noqa: TRY301  (raised into the scope under test)
    except BaseException as caught:  # noqa: BLE001  (kept, and looked at by the test)
        return caught


def _sent(outcome: Outcome) -> Outcome:
    """Return what a peer reads of *outcome*, first as a record, then as part of the verdict."""
    record = Record.decode(Record("0 scope", "exit", True, outcome).encode())  # noqa: FBT003  (a field of a record, or a setting)
    assert record is not None
    return decode_verdict(encode_verdict(Verdict("scope", 1, (0,), outcomes={0: record.outcome})), record, 1).outcomes[
        0
    ]


# Travelling


@given(_records)
def test_record_any_content_round_trips(record: Record) -> None:
    """A record arrives as it was sent."""
    assert record == Record.decode(record.encode())


@pytest.mark.parametrize("text", [b"", b"?", b"seat 0123", b"ok"], ids=repr)
def test_record_of_something_else_is_none(text: bytes) -> None:
    """Text in place of a record, such as a seat or nothing, is not taken for one."""
    assert Record.decode(text) is None


@given(_verdicts)
def test_verdict_any_content_round_trips(verdict: Verdict) -> None:
    """A verdict is read as it was written, with the types it was written with."""
    read = decode_verdict(encode_verdict(verdict), Record(), 1)

    assert verdict == read
    assert attrs.asdict(verdict) == attrs.asdict(read)
    assert [type(each) for each in attrs.astuple(verdict, recurse=False)] == [
        type(each) for each in attrs.astuple(read, recurse=False)
    ]


@pytest.mark.parametrize(
    "verdict",
    [
        pytest.param(
            Verdict(
                "s",
                20,
                tuple(range(20)),
                outcomes={
                    rank: Outcome("body", "E", "🙂" * MESSAGE_LIMIT, "🙂" * TRACEBACK_LIMIT, rank, ["é" * 200] * 21)
                    for rank in range(20)
                },
            ),
            id="long-failures-that-are-not-ascii",
        ),
        pytest.param(
            Verdict(
                "s", 50_000, tuple(range(50_000)), outcomes=dict.fromkeys(range(50_000), Outcome("body", "E", "no"))
            ),
            id="failures-on-all-of-many-ranks",
        ),
        pytest.param(
            Verdict(
                "s",
                50_000,
                missing=tuple(range(50_000)),
                where=dict.fromkeys(
                    range(50_000), Place(Process("host", 7, 8, "m"), phase="in it", frames="f\n" * 100)
                ),
            ),
            id="places-of-many-ranks",
        ),
        pytest.param(
            Verdict(
                "s",
                20,
                tuple(range(20)),
                cleanups={rank: tuple((f"c{i}", f"{rank}" * 500) for i in range(1000)) for rank in range(20)},
            ),
            id="different-cleanups-with-long-fingerprints",
        ),
    ],
)
def test_verdict_however_much_there_is_to_say_stays_within_the_limit_of_a_store(verdict: Verdict) -> None:
    """A verdict is never longer than a store takes; what is left out is detail, never a rank."""
    text = encode_verdict(verdict)
    read = decode_verdict(text, Record(), 1)

    assert len(text) <= VERDICT_LIMIT < 8 * 2**20
    assert (verdict.arrived, verdict.missing, verdict.lost) == (read.arrived, read.missing, read.lost)
    assert (verdict.ok, verdict.complete) == (read.ok, read.complete)
    assert set(verdict.failures) == set(read.failures)


# Verdicts as text


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
    """Printed, a verdict says how it went, without the tracebacks and the wire format that it has."""
    verdict = Verdict(**{"scope": "x", "world_size": 2, "arrived": (0, 1), **what})

    assert (text, f"<Verdict: {text}>") == (str(verdict), repr(verdict))


# Outcomes


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
    outcome = Outcome.of(_raised(error), "body")

    assert outcome == _sent(outcome)
    assert ("body", name, str(error) if message is None else message) == (
        outcome.phase,
        outcome.type_name,
        outcome.message,
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


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        pytest.param(OK, "ok", id="ok"),
        pytest.param(Outcome("body", "ValueError", "no"), "body failed: ValueError: no", id="failed"),
        pytest.param(Outcome("body", "ValueError", ""), "body failed: ValueError", id="no-message"),
        pytest.param(
            Outcome("body", "unittest.case.SkipTest", "no GPU"),
            "body skipped: unittest.case.SkipTest: no GPU",
            id="skip",
        ),
        pytest.param(Outcome("cleanup 'a'", "E", "1\n 2\t3"), "cleanup 'a' failed: E: 1 2 3", id="lines"),
    ],
)
def test_outcome_str_is_one_line_that_names_phase_type_and_message(outcome: Outcome, text: str) -> None:
    """An outcome reads as one line."""
    assert text == str(outcome)

"""Exceptions as text: whatever an exception's methods do, there is something to read."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collective_scope.agreement.text import (
    TRACEBACK_LIMIT,
    message_of,
    one_line,
    shorten,
    traceback_of,
    type_name,
)


class _MuteError(Exception):
    def __str__(self) -> str:
        msg = "no words"
        raise LookupError(msg)


class _NotesError(Exception):
    @property
    def __notes__(self) -> list[str]:
        msg = "no notes"
        raise LookupError(msg)


class _GroupError(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        msg = "no members"
        raise LookupError(msg)


def _raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301  (raised into the scope under test)
    except BaseException as caught:  # noqa: BLE001  (kept, and looked at by the test)
        return caught


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


@pytest.mark.parametrize(
    ("error", "name"),
    [
        pytest.param(_NotesError("x"), "_NotesError", id="notes-raise"),
        pytest.param(_GroupError("x", [ValueError()]), "_GroupError", id="members-raise"),
    ],
)
def test_traceback_of_error_that_cannot_be_formatted_says_where_and_why(error: Exception, name: str) -> None:
    """Of an exception that traceback.format_exception() cannot take, place, class and the reason are left."""
    text = traceback_of(_raised(error))

    assert "in _raised" in text
    if sys.version_info >= (3, 13) and name == _NotesError.__name__:
        assert text.endswith(f"{__name__}.{name}: x\nIgnored error getting __notes__: LookupError('no notes')\n")
    else:
        assert text.endswith(f"{__name__}.{name}: <it cannot be formatted: that raised LookupError>\n")


def test_traceback_of_chained_error_has_cause_notes_and_end() -> None:
    """Causes and notes are part of what peers read, also where the whole is too long."""
    error = ValueError("effect")
    error.__cause__ = KeyError("the cause")
    error.add_note("a note")
    short = traceback_of(error)
    error.__cause__ = KeyError("x" * 2 * TRACEBACK_LIMIT)
    long = traceback_of(error)

    assert "the cause" in short
    assert short.endswith("ValueError: effect\na note\n")
    assert long.endswith("ValueError: effect\na note\n")
    assert len(long) < TRACEBACK_LIMIT + 100


@given(st.text(max_size=1000))
def test_one_line_any_message_is_one_readable_line(message: str) -> None:
    """The summary of any message is one line of bounded length."""
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

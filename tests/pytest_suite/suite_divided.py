"""Ranks of which each does something else. There is no such thing on one process."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from .conftest import all_reduce, is_last


def test_skips_on_one_rank() -> None:
    """Only some ranks skip: a failure."""
    if is_last():
        pytest.skip("only here")


@pytest.fixture(name="skips")
def _skips() -> None:
    if is_last():
        pytest.skip("only in this setup")


@pytest.mark.usefixtures("skips")
def test_skips_in_the_setup_of_one_rank() -> None:
    """Only some ranks skip: an error."""


def test_xfails_in_the_body_of_one_rank() -> None:
    """One rank says that it fails as expected: then the test has."""
    if is_last():
        pytest.xfail("only here")


def test_raises_different_errors() -> None:
    """All ranks report the failure that was first; the others are in the list."""
    total = all_reduce(1.0)
    if is_last():
        raise ValueError("of the last rank")  # noqa: EM101, TRY003  (looked for in the report)
    raise TypeError(f"of another rank, {total}")  # noqa: EM102, TRY003  (looked for in the report)


def test_subtests_fail_on_different_ranks(subtests: pytest.Subtests) -> None:
    """All ranks report all of them."""
    for rank in range(dist.get_world_size()):
        with subtests.test(f"of rank {rank}"):
            assert rank != dist.get_rank()


def test_has_too_much_to_tell() -> None:
    """A report that is too long for the verdict arrives as text that is cut."""
    if is_last():
        print("\n".join(f"line {number}" for number in range(20_000)))
        raise ValueError("at the end" + " of many words" * 5_000)


class UnprintableError(Exception):
    """An exception that cannot be shown."""

    def __str__(self) -> str:
        """Fail."""
        raise RuntimeError


def test_raises_what_cannot_be_shown() -> None:
    """The failure arrives all the same."""
    if is_last():
        raise UnprintableError


def test_passes_at_the_end() -> None:
    """The ranks are still together."""
    assert all_reduce(1.0) == dist.get_world_size()

"""Tests that fail on the last rank; as that is the only one of one process, the outcomes are the same there."""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import pytest

from collective_scope import CollectiveScope

from .conftest import all_reduce, is_last


def fail_on_last_rank(where: str) -> None:
    """Raise on the last rank."""
    if is_last():
        print(f"printed by the last rank, {where}")
        raise ValueError(f"on the last rank, {where}")  # noqa: EM102, TRY003  (looked for in the report)


@pytest.fixture(name="fails")
def _fails(request: pytest.FixtureRequest) -> Iterator[None]:
    where = request.param
    if where == "setup before":
        fail_on_last_rank(where)
    all_reduce(1.0)
    if where == "setup after":
        fail_on_last_rank(where)
    yield
    if where == "teardown before":
        fail_on_last_rank(where)
    all_reduce(1.0)
    if where == "teardown after":
        fail_on_last_rank(where)


@pytest.mark.parametrize("fails", ["setup before", "setup after", "teardown before", "teardown after"], indirect=True)
@pytest.mark.usefixtures("fails")
def test_fixture_fails() -> None:
    """The setup or the teardown fails before, or after, a collective."""
    all_reduce(1.0)


def test_fails_before_collectives(collective_scope: CollectiveScope) -> None:
    """The peers are stuck, and the group is revoked, so that no collective cleanup can run."""
    collective_scope.collective_cleanup(all_reduce, 1.0)
    fail_on_last_rank("before collectives")
    all_reduce(1.0)


def test_passes_after_that() -> None:
    """The group works again."""
    assert all_reduce(1.0) > 0


def test_fails_after_collectives() -> None:
    """The peers have passed."""
    all_reduce(1.0)
    fail_on_last_rank("after collectives")


def test_fails_between_collectives() -> None:
    """The peers are stuck in the second."""
    all_reduce(1.0)
    fail_on_last_rank("between collectives")
    all_reduce(1.0)


@pytest.mark.xfail(reason="on one rank", strict=True)
def test_xfails_before_collectives() -> None:
    """One rank fails as expected; then the test has."""
    fail_on_last_rank("as expected")
    all_reduce(1.0)


@pytest.mark.xfail(reason="on one rank", strict=True, raises=ValueError)
def test_xfails_after_collectives() -> None:
    """One rank fails as expected; that the others pass is no failure."""
    all_reduce(1.0)
    fail_on_last_rank("as expected")


@pytest.mark.xfail(reason="on one rank", strict=False, raises=TypeError)
def test_xfails_with_another_error() -> None:
    """One rank fails in another way than expected."""
    all_reduce(1.0)
    fail_on_last_rank("not as expected")


def test_cleanup_fails(collective_scope: CollectiveScope) -> None:
    """A cleanup fails on one rank."""
    collective_scope.cleanup(fail_on_last_rank, "in a cleanup")
    all_reduce(1.0)


def test_subtest_fails(subtests: pytest.Subtests) -> None:
    """A subtest fails on one rank."""
    for number in range(3):
        with subtests.test(f"number {number}"):
            all_reduce(1.0)
            if number == 1:
                fail_on_last_rank("in a subtest")


class Case(unittest.TestCase):
    """Of unittest."""

    def test_fails_before_collectives(self) -> None:
        """The peers are stuck."""
        fail_on_last_rank("in a TestCase")
        all_reduce(1.0)

    def test_subtest_fails(self) -> None:
        """A subtest fails on one rank."""
        for number in range(3):
            with self.subTest(f"number {number}"):
                all_reduce(1.0)
                if number == 1:
                    fail_on_last_rank("in a subtest of unittest")


def test_passes_at_the_end() -> None:
    """The group works again."""
    assert all_reduce(1.0) > 0

"""Features of pytest, with a collective here and there; the outcomes are those of one process."""

from __future__ import annotations

import logging
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from collective_scope import CollectiveScope, current_scope

from .conftest import all_reduce


def test_passes() -> None:
    """A test without collectives."""


@pytest.mark.parametrize("value", range(10))
def test_sum_of_each_value(value: int) -> None:
    """Parameters make tests of their own."""
    assert value * dist.get_world_size() == all_reduce(value)


@pytest.mark.parametrize(("left", "right"), [pytest.param(1, 2, id="small"), pytest.param(3, 4, id="large")])
@pytest.mark.parametrize("sign", [1, -1])
def test_sum_of_several_parameters(left: int, right: int, sign: int) -> None:
    """Parameters multiply."""
    assert sign * (left + right) * dist.get_world_size() == all_reduce(sign * left) + all_reduce(sign * right)


def test_fixture_with_a_collective(total: float) -> None:
    """A setup may need all ranks."""
    assert dist.get_world_size() == total


def test_body_fails() -> None:
    """All ranks fail alike."""
    value = all_reduce(1.0)
    print("printed before the failure")
    assert 0 == value


def test_body_raises_a_group_of_exceptions() -> None:
    """All ranks raise several exceptions."""
    message = "two at once"
    raise ExceptionGroup(message, [ValueError("one"), TypeError("two")])


def test_raises_is_not_a_failure() -> None:
    """An expected error does not reach the scope."""
    with pytest.raises(ValueError, match="expected"):
        raise ValueError("expected")  # noqa: EM101  (looked for in the report)


# Skipped, and expected to fail


@pytest.mark.skip(reason="by a marker")
def test_skipped_by_a_marker() -> None:
    """Never runs."""
    raise AssertionError


@pytest.mark.skipif("True", reason="by a condition")
def test_skipped_by_a_condition() -> None:
    """Never runs."""
    raise AssertionError


def test_skipped_in_the_body() -> None:
    """All ranks skip."""
    pytest.skip("in the body")


@pytest.fixture(name="skipping")
def _skipping() -> None:
    pytest.skip("in the setup")


@pytest.mark.usefixtures("skipping")
def test_skipped_in_the_setup() -> None:
    """Never runs."""
    raise AssertionError


def test_skipped_for_want_of_a_module() -> None:
    """All ranks skip."""
    pytest.importorskip("a_module_that_does_not_exist")


@pytest.mark.xfail(reason="fails on all ranks")
def test_xfail_that_fails() -> None:
    """All ranks fail as expected."""
    assert all_reduce(1.0) < 0


@pytest.mark.xfail(reason="passes on all ranks", strict=False)
def test_xfail_that_passes() -> None:
    """All ranks pass, unexpectedly."""


@pytest.mark.xfail(reason="passes on all ranks", strict=True)
def test_xfail_that_passes_and_must_not() -> None:
    """All ranks pass, which is a failure."""


@pytest.mark.xfail(raises=ValueError, reason="of this class")
def test_xfail_of_the_right_class() -> None:
    """All ranks raise what is expected."""
    raise ValueError


@pytest.mark.xfail(raises=ValueError, reason="of another class")
def test_xfail_of_another_class() -> None:
    """All ranks raise something else."""
    raise TypeError


@pytest.mark.xfail(run=False, reason="would hang")
def test_xfail_that_does_not_run() -> None:
    """Never runs."""
    raise AssertionError


def test_xfail_in_the_body() -> None:
    """All ranks say so in the body."""
    pytest.xfail("in the body")


# Fixtures of each scope

_order: list[str] = []


@pytest.fixture(scope="session", name="of_session")
def _of_session() -> Iterator[str]:
    _order.append("session")
    yield "session"
    all_reduce(1.0)


@pytest.fixture(scope="module", name="of_module")
def _of_module(of_session: str) -> Iterator[str]:
    _order.append("module")
    yield f"{of_session} module"
    all_reduce(1.0)


@pytest.fixture(scope="class", name="of_class")
def _of_class(of_module: str) -> Iterator[str]:
    _order.append("class")
    yield f"{of_module} class"
    all_reduce(1.0)


@pytest.fixture(name="of_function")
def _of_function(of_class: str) -> Iterator[str]:
    _order.append("function")
    yield f"{of_class} function"
    all_reduce(1.0)


class TestClass:
    """Methods are tests, too."""

    count = 0

    def setup_method(self) -> None:
        """Run before each."""
        all_reduce(1.0)

    def test_fixtures_of_all_scopes(self, of_function: str) -> None:
        """Each scope was set up once."""
        assert "session module class function" == of_function
        assert ["session", "module", "class", "function"] == _order

    def test_fixtures_that_are_there_already(self, of_function: str) -> None:
        """Only the fixture of the function is set up again."""
        assert "session module class function" == of_function
        assert "function" == _order[-1]

    @pytest.mark.parametrize("name", ["one", "two"])
    def test_parameters_of_a_method(self, name: str, tmp_path: Path) -> None:
        """Each rank has a folder of its own."""
        (tmp_path / name).write_text(str(dist.get_rank()))
        assert [str(dist.get_rank())] == [path.read_text() for path in tmp_path.iterdir()]


@pytest.fixture(name="broken_setup")
def _broken_setup() -> None:
    raise RuntimeError("setup")  # noqa: EM101  (looked for in the report)


@pytest.mark.usefixtures("broken_setup")
def test_setup_fails() -> None:
    """Never runs; all ranks report an error."""
    raise AssertionError


@pytest.fixture(name="broken_teardown")
def _broken_teardown() -> Iterator[None]:
    yield
    raise RuntimeError("teardown")  # noqa: EM101  (looked for in the report)


@pytest.mark.usefixtures("broken_teardown")
def test_teardown_fails() -> None:
    """Passes; then all ranks report an error."""


@pytest.mark.usefixtures("broken_teardown")
def test_body_and_teardown_fail() -> None:
    """Fails twice."""
    raise AssertionError


# Classes of unittest


class Case(unittest.TestCase):
    """Methods of a TestCase, whose exceptions pytest does not see either."""

    def setUp(self) -> None:
        """Run before each."""
        self.total = all_reduce(1.0)

    def tearDown(self) -> None:
        """Run after each."""
        all_reduce(1.0)

    def test_passes(self) -> None:
        """Passes."""
        self.assertEqual(dist.get_world_size(), self.total)  # noqa: PT009  (a test of unittest)

    def test_fails(self) -> None:
        """Fails on all ranks."""
        self.assertEqual(0, self.total)  # noqa: PT009  (a test of unittest)

    def test_skips(self) -> None:
        """Skips on all ranks."""
        self.skipTest("by unittest")

    @unittest.expectedFailure
    def test_fails_as_expected(self) -> None:
        """Fails on all ranks as expected."""
        self.fail("expected")

    @unittest.expectedFailure
    def test_passes_unexpectedly(self) -> None:
        """Passes on all ranks, which is a failure."""

    def test_subtests(self) -> None:
        """One of three subtests fails on all ranks."""
        for number in range(3):
            with self.subTest(number=number):
                self.assertNotEqual(1, number)  # noqa: PT009  (a test of unittest)


# Subtests of pytest


def test_subtests_pass(subtests: pytest.Subtests) -> None:
    """All pass."""
    for number in range(3):
        with subtests.test("sum", number=number):
            assert number * dist.get_world_size() == all_reduce(number)


def test_subtests_fail(subtests: pytest.Subtests) -> None:
    """One of three fails on all ranks."""
    for number in range(3):
        with subtests.test("sum", number=number):
            assert 1 != number


def test_subtests_and_body_fail(subtests: pytest.Subtests) -> None:
    """A subtest fails, and then the body."""
    with subtests.test("skipped"):
        pytest.skip("in a subtest")
    with subtests.test("fails"):
        raise AssertionError
    raise ValueError("after the subtests")  # noqa: EM101, TRY003  (looked for in the report)


# Captured by tests


def test_capsys(capsys: pytest.CaptureFixture[str]) -> None:
    """A test captures what it prints."""
    print("captured")
    assert "captured\n" == capsys.readouterr().out


def test_caplog(caplog: pytest.LogCaptureFixture) -> None:
    """A test captures what it logs."""
    logging.getLogger("suite").warning("logged")
    assert ["logged"] == caplog.messages


def test_warning() -> None:
    """A test warns."""
    import warnings  # noqa: PLC0415  (imported where it is needed)

    warnings.warn("of a test", UserWarning, stacklevel=1)


# The scope


def test_scope_is_there(collective_scope: CollectiveScope) -> None:
    """The fixture is the scope of the test, which is the current one."""
    assert collective_scope is current_scope()
    assert "suite_features.py::test_scope_is_there (call)" in collective_scope.name


_ran: list[str] = []


@pytest.fixture(name="registers")
def _registers(collective_scope: CollectiveScope) -> Iterator[None]:
    collective_scope.collective_cleanup(_ran.append, "collective, of the setup")
    yield
    _ran.append("end of the fixture")


def test_scope_registers(registers: None, collective_scope: CollectiveScope) -> None:  # noqa: ARG001  (given to every function of a rank)
    """Cleanups of the setup and of the body run when the body is over, and before fixtures are torn down."""
    collective_scope.cleanup(_ran.append, "of the body")
    assert [] == _ran


def test_scope_has_run_its_cleanups() -> None:
    """Cleanups of the test before this one ran last registered first."""
    assert ["of the body", "collective, of the setup", "end of the fixture"] == _ran


def test_cleanup_fails(collective_scope: CollectiveScope) -> None:
    """A cleanup that fails on all ranks is a failure of the test."""
    collective_scope.cleanup(int, "no number")


@pytest.fixture(name="registers_and_breaks")
def _registers_and_breaks(collective_scope: CollectiveScope) -> None:
    collective_scope.cleanup(_ran.append, "of a setup that failed")
    raise RuntimeError("setup")  # noqa: EM101  (looked for in the report)


@pytest.mark.usefixtures("registers_and_breaks")
def test_setup_registers_and_fails() -> None:
    """Never runs."""
    raise AssertionError


def test_cleanup_of_a_setup_that_failed_has_run() -> None:
    """It runs with the teardown."""
    assert "of a setup that failed" == _ran[-1]

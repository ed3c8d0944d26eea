"""Values accepted as a group, and whose barrier each gets."""

from __future__ import annotations

import dataclasses
import gc
import logging
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from collective_scope import PeerFailedError, _membership, _mpi, _torch, collective_scope, current_scope
from collective_scope._groups import find
from tests.ranks import RankPool, Sequencer, run_ranks, run_threads, values
from tests.stores import LONG_S, PATIENCE_S, RankGroup, meet, wait_until


@pytest.fixture(name="store")
def _store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture(name="world")
def _world(store: dist.Store) -> Iterator[dist.ProcessGroup]:
    """Make a default group of this process alone."""
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


class _Communicator:
    """``COMM_SELF`` of mpi4py, as a scope sees it."""

    def __init__(self) -> None:
        self._attribute: Any = None

    def Get_rank(self) -> int:  # noqa: N802  (a name of mpi4py's)
        return 0

    def Get_size(self) -> int:  # noqa: N802  (a name of mpi4py's)
        return 1

    def Get_attr(self, _key: int) -> Any:  # noqa: N802  (a name of mpi4py's)
        return self._attribute

    def Set_attr(self, _key: int, value: Any) -> None:  # noqa: N802  (a name of mpi4py's)
        self._attribute = value

    def Ibcast(self, *_: Any) -> NoReturn:  # noqa: N802  (a name of mpi4py's)
        raise AssertionError

    @staticmethod
    def Create_keyval(**_: Any) -> int:  # noqa: N802  (a name of mpi4py's)
        return 0


# Of the module in which the class of a communicator is, a scope uses these.
COMM_NULL, Comm = _Communicator(), _Communicator


def _mesh() -> Any:
    return init_device_mesh("cpu", (1,))


def _mesh_2d() -> Any:
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))


@pytest.fixture(autouse=True)
def _own_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the attribute of `_Communicator` for this test only."""
    monkeypatch.setattr(_mpi, "_keyvals", [])


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(lambda: None, id="none"),
        pytest.param(lambda: dist.group.WORLD, id="process-group"),
        pytest.param(lambda: dist.new_group([0]), id="new-group"),
        pytest.param(_mesh, id="mesh"),
        pytest.param(lambda: _mesh_2d()["tp"], id="slice-of-a-mesh"),
        pytest.param(lambda: _mesh_2d()._flatten(), id="flattened-mesh"),  # noqa: SLF001  (torch has no public name for it)
        pytest.param(lambda: SimpleNamespace(cpu_group=dist.group.WORLD, device_group=None), id="coordinator"),
        pytest.param(lambda: RankGroup(dist.HashStore(), 0, 1), id="store-rank-and-world-size"),
        pytest.param(lambda: dist.ProcessGroup(dist.HashStore(), 0, 1), id="made-by-hand"),
        pytest.param(_Communicator, id="communicator"),
        pytest.param(lambda: COMM_NULL, id="no-communicator"),
        pytest.param(lambda: dist.GroupMember.NON_GROUP_MEMBER, id="non-group-member"),
    ],
)
@pytest.mark.parametrize("deferred", [False, True], ids=["itself", "function"])
@pytest.mark.usefixtures("world")
def test_group_each_accepted_kind_gives_a_scope(group: Callable[[], Any], *, deferred: bool) -> None:
    """Each kind of group, and a function that returns it, gives a scope; a rank alone in it leaves quietly."""
    calls: list[str] = []
    with collective_scope(group if deferred else group()) as scope:
        scope.cleanup(calls.append, "local")
        scope.collective_cleanup(calls.append, "collective")

    assert ["collective", "local"] == calls
    assert scope.verdict is not None
    assert (True, 1) == (scope.verdict.ok, scope.verdict.world_size)


class _StoreInPython(dist.Store):
    """A store without a ``clone()`` of its own."""


@pytest.mark.parametrize(
    "group",
    [
        pytest.param("cuda:0", id="text"),
        pytest.param([0, 1], id="list"),
        pytest.param(object(), id="object"),
        pytest.param(1, id="number"),
        pytest.param(lambda: "cuda:0", id="function-that-returns-text"),
        pytest.param(lambda: lambda: None, id="function-that-returns-a-function"),
        pytest.param(SimpleNamespace(cpu_group="cuda:0", device_group=None), id="coordinator-of-text"),
        pytest.param(SimpleNamespace(cpu_group=None), id="half-a-coordinator"),
    ],
)
def test_group_of_another_kind_is_refused_with_what_is_accepted(group: Any) -> None:
    """Other objects are refused at entry, with a list of valid ones."""
    with pytest.raises(TypeError) as caught, collective_scope(group):
        pytest.fail("the body ran")

    for accepted in ("None", "ProcessGroup", "DeviceMesh", "cpu_group", "world_size", "mpi4py", "function"):
        assert accepted in str(caught.value)
    assert "(got " in str(caught.value)


@pytest.mark.parametrize(
    "store", [pytest.param(None, id="none"), pytest.param(_StoreInPython(), id="one-that-cannot-be-cloned")]
)
def test_group_with_peers_and_no_store_to_clone_is_refused_with_both_named(store: Any) -> None:
    """Ranks that cannot meet are told so at entry, and which group and store that is."""
    group = RankGroup(store, 0, 2)
    with pytest.raises(TypeError) as caught, collective_scope(group):
        pytest.fail("the body ran")

    assert f"group {group!r} has 2 ranks and no store that can be cloned (got {store!r})" == str(caught.value)


@pytest.mark.usefixtures("world")
def test_group_mesh_of_two_dimensions_is_refused_with_the_remedy() -> None:
    """A mesh of several dimensions is not one group; the error says how to get one."""
    with pytest.raises(ValueError, match=r"one dimension \(got 2: \('dp', 'tp'\)\); pass mesh\['name'\].*_flatten"):
        find(_mesh_2d())


def test_group_of_text_is_taken_for_a_forgotten_name() -> None:
    """The usual mistake is named."""
    with pytest.raises(TypeError, match=r"group must be .* \(got 'my test', a str\); did you mean name='my test'\?$"):
        find("my test")


def test_group_none_without_torch_distributed_runs_cleanups_without_barrier() -> None:
    """A program without torch.distributed cleans up, and is alone."""
    calls: list[int] = []
    with collective_scope() as scope:
        scope.cleanup(calls.append, 1)

    assert [1] == calls
    assert scope.verdict is not None
    assert (True, 1) == (scope.verdict.ok, scope.verdict.world_size)


def test_group_function_that_returns_none_at_the_entry_is_called_again_at_the_exit() -> None:
    """A function that finds its group only after the body has made it gives the scope that group, as None does."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[int, list[str]]:
        ran: list[str] = []
        made: list[RankGroup] = []

        @collective_scope(lambda: made[0] if made else None, name="late", timeout=LONG_S)
        def work() -> None:
            current_scope().cleanup(ran.append, f"cleanup of {rank}")
            made.append(group)
            if rank == 1:
                raise ValueError

        with pytest.raises(ValueError if rank == 1 else PeerFailedError):
            work()
        with collective_scope(group, name="next", timeout=LONG_S) as scope:
            pass
        assert scope.verdict is not None
        return scope.verdict.world_size, ran

    assert [(2, ["cleanup of 0"]), (2, ["cleanup of 1"])] == meet(2, run)


def test_group_function_that_fails_at_the_exit_is_an_error_after_the_cleanups() -> None:
    """A function that finds no group at entry and raises at the exit does not cost any cleanup."""
    answers = iter([None])
    calls: list[int] = []

    with pytest.raises(StopIteration), collective_scope(lambda: next(answers)) as scope:
        scope.cleanup(calls.append, 1)

    assert [1] == calls
    assert scope.verdict is not None
    assert "lookup of the group" == scope.verdict.failures[0].phase


def test_group_destroyed_before_entry_is_refused(world: dist.ProcessGroup) -> None:
    """A group that is no more is refused before the body starts."""
    dist.destroy_process_group()

    with pytest.raises(ValueError, match=r"^group was destroyed"), collective_scope(world):
        pytest.fail("the body ran")


@pytest.mark.parametrize("group", [pytest.param(None, id="none"), pytest.param(_Communicator(), id="communicator")])
@pytest.mark.usefixtures("world")
def test_group_destroyed_in_the_body_is_said_where_it_matters(group: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A scope whose group the body destroyed cleans up, ends, and says so; other groups do not care."""
    calls: list[int] = []
    with collective_scope(group, name="s") as scope:
        scope.cleanup(calls.append, 1)
        dist.destroy_process_group()

    assert [1] == calls
    assert scope.verdict is not None
    assert scope.verdict.ok
    expected = [] if group is not None else ["scope 's': the process group was destroyed in the body"]
    assert expected == [message.split(";")[0] for message in caplog.messages]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_group_asked_for_again_has_the_same_barrier_until_it_is_gone(store: dist.Store) -> None:
    """All scopes of a group count on one barrier; another group has its own; with a group goes its place."""
    gc.collect()
    before = set(_membership._controls)  # noqa: SLF001  (looked into on purpose)
    group, other = RankGroup(store, 0, 2), RankGroup(store, 1, 2)
    first, again, others = find(group)[0], find(group)[0], find(other)[0]

    assert first is again
    assert first is not others
    assert first.barrier.control is others.barrier.control

    control = first.barrier.control
    del group, other, first, again, others
    gc.collect()

    assert wait_until(lambda: control.broken is not None)
    # A thread a store would be left otherwise.
    assert set(_membership._controls) <= before  # noqa: SLF001  (looked into on purpose)


@pytest.mark.parametrize(
    ("variable", "ranks", "server"),
    [
        pytest.param(None, [0, 1], 0, id="global-rank-0"),
        pytest.param(None, [2, 0], None, id="global-rank-0-is-this-one-and-it-does-not"),
        pytest.param(None, [2, 1, 0], 2, id="global-rank-0-is-rank-2-here"),
        pytest.param(None, [1, 2], None, id="global-rank-0-is-not-here"),
        pytest.param("False", [0, 1], 0, id="launched-without-agent-store"),
        pytest.param("True", [0, 1], None, id="agent"),
    ],
)
def test_group_host_of_a_tcp_store_elsewhere_is_taken_for_global_rank_0_or_the_agent(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, ranks: list[int], server: int | None
) -> None:
    """Until all have met, the rank that hosts the store is guessed from its place in the group."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", variable)
    store = dist.PrefixStore("a", dist.PrefixStore("b", dist.TCPStore("127.0.0.1", 0, 1, is_master=True)))

    assert server == _membership._guess_server(store, ranks, 1)  # noqa: SLF001  (looked into on purpose)


def test_group_host_of_a_tcp_store_knows_that_it_is() -> None:
    """The rank in whose process the store lives needs no guess, whichever it is."""
    store = dist.PrefixStore("a", dist.TCPStore("127.0.0.1", 0, 1, is_master=True))

    membership = _membership.make(object(), store, 1, 2, None)

    try:
        assert 1 == membership.barrier.part.server
    finally:
        _membership.end(membership)


def test_group_store_that_no_rank_serves_has_no_host(store: dist.Store) -> None:
    """Where no process serves the store, no rank needs to stay."""
    assert None is _membership._guess_server(dist.PrefixStore("a", store), [0, 1], 0)  # noqa: SLF001  (looked into on purpose)


def test_store_whose_server_is_gone_is_not_asked_for_minutes() -> None:
    """A store at which no process listens is called gone at once; torch would go on trying."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
    del server

    with pytest.raises(RuntimeError, match=r"^the group's store at 127\.0\.0\.1, port \d+, is gone: "):
        _membership._clone(lambda: client)  # noqa: SLF001  (every thread connects with it)


def test_store_that_is_cut_off_for_a_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be reached now may be back before torch gives up."""

    def cut_off(*_: object) -> NoReturn:
        msg = "no route to host"
        raise OSError(msg)

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(socket, "create_connection", cut_off)
    _membership._clone(lambda: server).set("key", "value")  # noqa: SLF001  (as above)

    assert b"value" == server.get("key")


# The accelerator


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        pytest.param(None, [], id="none"),
        pytest.param(SimpleNamespace(is_initialized=lambda: True), [1], id="in-use"),
        pytest.param(SimpleNamespace(is_initialized=lambda: False), [], id="untouched"),
        pytest.param(SimpleNamespace(), [1], id="cannot-tell"),
    ],
)
@pytest.mark.parametrize("synchronize", [True, False], ids=["asked", "not-asked"])
def test_accelerator_that_is_used_is_waited_for_before_the_cleanups(
    monkeypatch: pytest.MonkeyPatch, module: Any, expected: list[int], *, synchronize: bool
) -> None:
    """The scope waits for an accelerator that this process has used, and does not wake one that it has not."""
    calls: list[Any] = []
    monkeypatch.setattr(_torch, "accelerator", lambda: module)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append(1))
    with collective_scope(synchronize=synchronize) as scope:
        scope.cleanup(calls.append, "cleanup")

    assert [*(expected if synchronize else []), "cleanup"] == calls


def test_accelerator_error_is_kept_and_the_cleanups_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous error that comes out at the wait is an error of this rank; cleanups run."""
    calls: list[int] = []

    def synchronize() -> None:
        msg = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(msg)

    monkeypatch.setattr(_torch, "accelerator", SimpleNamespace)
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match=r"^CUDA error"), collective_scope() as scope:
        scope.cleanup(calls.append, 1)

    assert [1] == calls
    assert scope.verdict is not None
    assert "synchronize" == scope.verdict.failures[0].phase


# Ranks that are threads


def _leave(group: Any, fn: Callable[..., object] = int, *args: Any, fails: bool) -> str:
    """Go through a scope of two ranks with a collective cleanup; return how this rank left it."""
    scope = collective_scope(group, name="s", timeout=LONG_S, failure_timeout=LONG_S)
    try:
        with scope:
            scope.collective_cleanup(fn, *args)
            if fails:
                raise ValueError  # noqa: TRY301  (raised into the scope under test)
    except (ValueError, PeerFailedError) as error:
        return type(error).__name__
    return "ok" if scope.verdict is not None and scope.verdict.arrived == (0, 1) else "alone"


@dataclasses.dataclass
class _Stateless:
    """A dataclass like vLLM's ``StatelessProcessGroup``, so that two are compared by their fields."""

    rank: int
    world_size: int
    store: dist.Store


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda store, rank: _Stateless(rank, 2, store), id="as-in-vllm"),
        pytest.param(lambda store, rank: dist.ProcessGroup(store, rank, 2), id="made-by-hand"),
        pytest.param(lambda store, rank: dist.ProcessGroup(dist.PrefixStore("p", store), rank, 2), id="with-a-prefix"),
    ],
)
def test_group_that_torch_does_not_know_joins_its_ranks(make: Callable[[dist.Store, int], Any]) -> None:
    """A group that only has a store joins its ranks, tells of a failure, and is in step for the next scope."""

    def run(rank: int, own: RankGroup, _: Sequencer) -> list[str]:
        group = make(own.store, rank)
        return [_leave(group, fails=name == "failing" and rank == 1) for name in ("first", "failing", "next")]

    assert [["ok", "PeerFailedError", "ok"], ["ok", "ValueError", "ok"]] == meet(2, run, timeout=PATIENCE_S)


def _be_ranks_as_threads(_rank: int, _world_size: int) -> list[tuple[float, list[str]]]:
    # torch's own tests do the same; it changes torch for the whole process.
    import torch.testing._internal.distributed.multi_threaded_pg as threaded  # noqa: PLC0415  (imported where it is needed)

    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # noqa: SLF001, FBT003  (torch has no public name for it)
    threaded._install_threaded_pg()  # noqa: SLF001  (torch has no public name for it)

    def be(rank: int, store: dist.HashStore, _: Sequencer) -> tuple[float, list[str]]:
        dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
        total = torch.ones(1)
        lefts = [_leave(None, dist.all_reduce, total, fails=rank == 1), _leave(None, fails=False)]
        return float(total), lefts

    return values(run_threads(2, be))


def test_group_of_threads_is_one_of_ranks_like_any_other() -> None:
    """Ranks that are threads of one process, in torch's own group for them, have their verdict and their lockstep."""
    (result,) = run_ranks(1, _be_ranks_as_threads, init=False)

    assert [(2.0, ["PeerFailedError", "ok"]), (2.0, ["ValueError", "ok"])] == result.unwrap()


# Ranks that are processes


def _leave_each_kind_of_group(rank: int, world_size: int) -> list[Any]:
    """Go through a scope on each kind of group that spans both ranks, then on parts of the world."""
    assert dist.group.WORLD is not None
    mesh = init_device_mesh("cpu", (world_size,))
    turned = dist.new_group([1, 0], use_local_synchronization=False)
    square = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "tp"))
    coordinator = SimpleNamespace(cpu_group=dist.group.WORLD, device_group=dist.group.WORLD)
    stateless = RankGroup(dist.PrefixStore("stateless", dist.group.WORLD.get_group_store()), rank, world_size)
    groups: list[Any] = [None, dist.group.WORLD, mesh, square["dp"], square._flatten(), turned, coordinator, stateless]  # noqa: SLF001  (torch has no public name for it)
    told: list[Any] = []
    for group in groups:
        for given in (group, lambda group=group: group):
            with collective_scope(given, name="s", timeout=30.0) as scope:
                pass
            assert scope.verdict is not None
            told.append((scope.verdict.ok, sorted(scope.verdict.outcomes)))
    # Rank 1 is outside of the first group; for it, cleanups run and there is no barrier.
    alone = dist.new_group([0])
    with collective_scope(alone, timeout=30.0) as scope:
        pass
    assert scope.verdict is not None
    return [*told, (scope.verdict.ok, sorted(scope.verdict.outcomes))]


def test_group_each_kind_over_two_ranks_leaves_together(rank_pools: Callable[[int], RankPool]) -> None:
    """Every kind of group joins its ranks in one verdict, and a rank outside of a group is a world of one."""
    told = values(rank_pools(2).run(_leave_each_kind_of_group))

    assert [[*[(True, [0, 1])] * 16, (True, [0])]] * 2 == told


def _fail_in_a_subgroup(rank: int, world_size: int) -> str | None:
    group = dist.new_group([world_size - 1, 1])
    if rank not in (1, world_size - 1):
        return None
    try:
        with collective_scope(group, name="s", timeout=30.0):
            if rank == world_size - 1:
                msg = "no"
                raise ValueError(msg)  # noqa: TRY301  (raised into the scope under test)
    except Exception as error:  # noqa: BLE001  (kept, and looked at by the test)
        return str(error).splitlines()[0]
    return "quietly"


def test_group_part_of_the_world_is_told_with_global_ranks(rank_pools: Callable[[int], RankPool]) -> None:
    """In a subgroup, ranks are counted within it, and named with their global rank."""
    texts = values(rank_pools(4).run(_fail_in_a_subgroup))

    assert [None, None] == [texts[0], texts[2]]
    assert "no" == texts[3]
    assert texts[1].endswith("(global rank 3) of 2 failed in scope 's': ValueError: no")


def test_function_that_returns_no_group_at_entry_and_exit_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A module global that nobody has set in a new process is an easy mistake, and a scope without peers is no barrier."""
    with collective_scope(lambda: None, name="alone"):
        pass

    assert ["alone" in text and "returned None" in text for text in caplog.messages] == [True]


def test_scope_without_a_group_in_a_process_alone_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing is distributed, a scope is a stack of cleanups."""
    with collective_scope(name="alone"):
        pass

    assert [] == caplog.messages

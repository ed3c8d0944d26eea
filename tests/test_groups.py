"""What may be passed as a group, and whose barrier it gets."""

from __future__ import annotations

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

from collective_scope import _groups, _scope, collective_scope
from collective_scope._barrier import Barrier
from collective_scope._groups import find_barrier
from tests.ranks import RankPool, values


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
    def Barrier(self) -> None:  # noqa: N802
        pass


def _mesh() -> Any:
    return init_device_mesh("cpu", (1,))


def _mesh_2d() -> Any:
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(lambda: None, id="none"),
        pytest.param(lambda: dist.group.WORLD, id="process-group"),
        pytest.param(lambda: dist.new_group([0]), id="new-group"),
        pytest.param(_mesh, id="mesh"),
        pytest.param(lambda: _mesh_2d()["tp"], id="slice-of-a-mesh"),
        pytest.param(lambda: _mesh_2d()._flatten(), id="flattened-mesh"),  # noqa: SLF001
        pytest.param(lambda: SimpleNamespace(cpu_group=dist.group.WORLD, device_group=None), id="coordinator"),
        pytest.param(_Communicator, id="communicator"),
        pytest.param(lambda: dist.GroupMember.NON_GROUP_MEMBER, id="non-group-member"),
    ],
)
@pytest.mark.parametrize("deferred", [False, True], ids=["itself", "function"])
@pytest.mark.usefixtures("world")
def test_group_each_accepted_kind_gives_a_scope(group: Callable[[], Any], *, deferred: bool) -> None:
    """Each kind of group, and a function that returns it, gives a scope that ends in peace."""
    calls: list[int] = []
    with collective_scope(group if deferred else group()) as scope:
        scope.cleanup(calls.append, 1)

    assert [1] == calls
    assert scope.verdict is not None
    assert (True, 1) == (scope.verdict.ok, scope.verdict.world_size)


@pytest.mark.usefixtures("world")
def test_group_without_this_rank_runs_collective_cleanups_too() -> None:
    """A rank outside of the group is a world of one: nobody is left to agree with."""
    calls: list[str] = []
    with collective_scope(dist.GroupMember.NON_GROUP_MEMBER) as scope:  # type: ignore[arg-type]  # an object, to the stub
        scope.cleanup(calls.append, "local")
        scope.collective_cleanup(calls.append, "collective")

    assert ["collective", "local"] == calls


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
    """What is no group is refused at entry, with the list of what is."""
    ran: list[int] = []
    with pytest.raises(TypeError) as caught, collective_scope(group):
        ran.append(1)

    assert [] == ran
    for accepted in ("None", "ProcessGroup", "DeviceMesh", "cpu_group", "device_group", "Barrier", "function"):
        assert accepted in str(caught.value)
    assert "(got " in str(caught.value)


@pytest.mark.usefixtures("world")
def test_group_mesh_of_two_dimensions_is_refused_with_the_remedy() -> None:
    """A mesh of several dimensions is not one group; the error says how to get one."""
    with pytest.raises(ValueError, match=r"one dimension \(got 2: \('dp', 'tp'\)\); pass mesh\['name'\].*_flatten"):
        find_barrier(_mesh_2d())


def test_group_none_without_torch_distributed_runs_cleanups_without_barrier() -> None:
    """A program without torch.distributed cleans up, and is alone."""
    calls: list[int] = []
    with collective_scope() as scope:
        scope.cleanup(calls.append, 1)

    assert [1] == calls
    assert scope.verdict is not None
    assert (True, 1) == (scope.verdict.ok, scope.verdict.world_size)


def test_group_made_in_the_body_is_found_at_the_exit(store: dist.Store) -> None:
    """Without a default group at entry, the one that the body creates is used."""
    try:
        with collective_scope() as scope:
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        found = find_barrier(None)
    finally:
        dist.destroy_process_group()

    assert scope.verdict is not None
    assert scope.verdict.ok
    assert found is not None
    assert 1 == found[0].scopes


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


def test_group_destroyed_and_dropped_takes_its_store_with_it(store: dist.Store) -> None:
    """A barrier does not keep the store of a destroyed group alive, and says so when asked for it."""
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = find_barrier(None)
    dist.destroy_process_group()
    assert found is not None
    barrier = found[0]
    assert isinstance(barrier, Barrier)

    assert isinstance(barrier.connect(), dist.Store)

    del found
    gc.collect()

    with pytest.raises(RuntimeError, match="the group was destroyed"):
        barrier.connect()


def test_group_asked_for_again_has_the_same_barrier(world: dist.ProcessGroup) -> None:
    """All scopes of a group count on one barrier; another group has its own."""
    (first, _), (again, _), (other, _) = (
        find_barrier(world) or (None, None),
        find_barrier(None) or (None, None),
        find_barrier(dist.new_group([0])) or (None, None),
    )

    assert first is again
    assert first is not other
    communicator = _Communicator()
    assert find_barrier(communicator)[0] is find_barrier(communicator)[0]  # type: ignore[index]


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
    monkeypatch.setattr(_groups, "serves_store", lambda _: False)
    store = dist.PrefixStore("a", dist.PrefixStore("b", dist.TCPStore("127.0.0.1", 0, 1, is_master=True)))

    assert server == _groups._server(store, ranks, 1)  # noqa: SLF001


def test_group_host_of_a_tcp_store_knows_that_it_is() -> None:
    """The rank in whose process the store lives needs no guess, whichever it is."""
    store = dist.PrefixStore("a", dist.TCPStore("127.0.0.1", 0, 1, is_master=True))

    assert 1 == _groups._server(store, [0, 1], 1)  # noqa: SLF001


def test_group_store_that_no_rank_serves_has_no_host(store: dist.Store) -> None:
    """Where nobody serves the store, nobody needs to stay."""
    assert None is _groups._server(dist.PrefixStore("a", store), [0, 1], 0)  # noqa: SLF001


def test_group_of_text_is_taken_for_a_forgotten_name() -> None:
    """The usual mistake is named."""
    with pytest.raises(TypeError, match=r"group must be .* \(got 'my test', a str\); did you mean name='my test'\?$"):
        find_barrier("my test")  # type: ignore[arg-type]


def test_failure_of_a_body_that_made_the_group_is_logged_with_the_rank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Although there was no group at the entry, the log says which rank failed."""

    def fail() -> None:
        with collective_scope(name="s"):
            monkeypatch.setattr(dist, "is_initialized", lambda: True)
            monkeypatch.setattr(dist, "get_rank", lambda: 1)
            monkeypatch.setattr(dist, "get_world_size", lambda: 2)
            try:
                raise LookupError
            finally:
                monkeypatch.setattr(_scope, "find_barrier", lambda _: None)

    with pytest.raises(LookupError):
        fail()

    assert caplog.messages[0].startswith("rank 1 of 2 failed in scope 's', body")


# The accelerator


@pytest.mark.parametrize(
    ("device", "module", "expected"),
    [
        pytest.param(None, None, [], id="none"),
        pytest.param("cuda", SimpleNamespace(is_initialized=lambda: True), [1], id="in-use"),
        pytest.param("cuda", SimpleNamespace(is_initialized=lambda: False), [], id="untouched"),
        pytest.param("mps", SimpleNamespace(), [1], id="cannot-tell"),
    ],
)
@pytest.mark.parametrize("synchronize", [True, False], ids=["asked", "not-asked"])
def test_accelerator_that_is_used_is_waited_for_before_the_cleanups(
    monkeypatch: pytest.MonkeyPatch, device: str | None, module: Any, expected: list[int], *, synchronize: bool
) -> None:
    """The scope waits for an accelerator that this process has used, and does not wake one that it has not."""
    calls: list[Any] = []
    found = torch.device(device) if device is not None else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append(1))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    with collective_scope(synchronize=synchronize) as scope:
        scope.cleanup(calls.append, "cleanup")

    assert [*(expected if synchronize else []), "cleanup"] == calls


def test_accelerator_error_is_kept_and_the_cleanups_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous error that comes out at the wait is an error of this rank; cleanups run."""
    calls: list[int] = []

    def synchronize() -> None:
        msg = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"^CUDA error"), collective_scope() as scope:
        scope.cleanup(calls.append, 1)

    assert [1] == calls
    assert scope.verdict is not None
    assert "synchronize" == scope.verdict.failures[0].phase


# Two ranks


def _leave_each_kind_of_group(rank: int, world_size: int) -> list[Any]:  # noqa: ARG001
    """Go through a scope on each kind of group that spans both ranks, then on parts of the world."""
    assert dist.group.WORLD is not None
    mesh = init_device_mesh("cpu", (world_size,))
    turned = dist.new_group([1, 0], use_local_synchronization=False)
    square = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "tp"))
    coordinator = SimpleNamespace(cpu_group=dist.group.WORLD, device_group=dist.group.WORLD)
    told: list[Any] = []
    groups: list[Any] = [None, dist.group.WORLD, mesh, square["dp"], square._flatten(), turned, coordinator]  # noqa: SLF001
    for group in groups:
        for given in (group, lambda group=group: group):
            with collective_scope(given, name="s", timeout=30.0, group_barrier=True) as scope:
                pass
            assert scope.verdict is not None
            told.append((scope.verdict.ok, sorted(scope.verdict.outcomes), scope.verdict.stage))
    # Rank 1 is outside of the first group; for it, cleanups run and there is no barrier.
    alone = dist.new_group([0])
    with collective_scope(alone, timeout=30.0) as scope:
        pass
    assert scope.verdict is not None
    return [*told, (scope.verdict.ok, sorted(scope.verdict.outcomes), scope.verdict.stage)]


def test_group_each_kind_over_two_ranks_leaves_together(rank_pools: Callable[[int], RankPool]) -> None:
    """Every kind of group joins its ranks in one verdict, and its communicator can be proven in step."""
    told = values(rank_pools(2).run(_leave_each_kind_of_group))

    assert [[*[(True, [0, 1], "exit 2")] * 14, (True, [0], "exit")]] * 2 == told


def _fail_in_a_subgroup(rank: int, world_size: int) -> str | None:
    group = dist.new_group([world_size - 1, 1])
    if rank not in (1, world_size - 1):
        return None
    try:
        with collective_scope(group, name="s", timeout=30.0):
            if rank == world_size - 1:
                msg = "no"
                raise ValueError(msg)  # noqa: TRY301
    except Exception as error:  # noqa: BLE001
        return str(error).splitlines()[0]
    return "in peace"


def test_group_part_of_the_world_is_told_with_global_ranks(rank_pools: Callable[[int], RankPool]) -> None:
    """In a subgroup, ranks are counted within it, and named with their global rank."""
    texts = values(rank_pools(3).run(_fail_in_a_subgroup))

    assert texts[0] is None
    assert "no" == texts[2]
    assert texts[1].endswith("(global rank 2) of 2 failed in scope 's': ValueError: no")


def test_store_whose_server_is_gone_is_not_asked_for_minutes() -> None:
    """What nobody listens to is said at once; torch would go on trying."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
    del server

    with pytest.raises(RuntimeError, match=r"^the group's store at 127\.0\.0\.1, port \d+, is gone: "):
        _groups._clone(lambda: client)  # noqa: SLF001  (what every thread connects with)


def test_store_that_is_cut_off_for_a_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be reached now may be back before torch gives up."""

    def cut_off(*_: object) -> NoReturn:
        msg = "no route to host"
        raise OSError(msg)

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(socket, "create_connection", cut_off)
    _groups._clone(lambda: server).set("key", "value")  # noqa: SLF001  (as above)

    assert b"value" == server.get("key")

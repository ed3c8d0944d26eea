"""A suite in which ranks fail before, between and after their collectives; for gloo and NCCL, any number of ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, collective_scope


How = Literal["", "before", "between", "after", "loop", "queue", "poll"]

HOWS: tuple[How, ...] = ("before", "between", "after", "loop", "queue", "poll")

TIMEOUT_S = 60.0


@attrs.frozen
class Failure:
    """
    The failure of one subtest.

    Attributes:
        how: Where the failing rank raises: before, between or after its collectives; or before
            them, while its peers loop over collectives, put them into the device's queue without
            waiting for any, or poll something.
        rank: That rank.
    """

    how: How = ""
    rank: int = -1


@attrs.frozen
class Event:
    """
    One subtest as one rank saw it. Times are of the clock that all processes of a machine share.

    Attributes:
        error: Type and message of what the scope raised; empty if nothing.
        cause: The first failure that it names, of whatever rank.
        value: Result of the collective.
        began: When the body began.
        raised: When this rank raised, if it did.
        body_ended: When its body ended.
        ended: When the scope was left.
        made: How many times the group had been made.
    """

    error: str
    cause: str
    value: float
    began: float
    raised: float
    body_ended: float
    ended: float
    made: int


def plan(seed: int, count: int, failing: int, world_size: int, hows: Sequence[How] = HOWS) -> list[Failure]:
    """Return what goes wrong in each of *count* subtests, the same for the same *seed*."""
    generator = random.Random(seed)  # noqa: S311  (nobody has to be kept from guessing)
    chosen = generator.sample(range(count), failing)
    return [
        Failure(generator.choice(hows), generator.randrange(world_size)) if number in chosen else Failure()
        for number in range(count)
    ]


def world_of(store: dist.Store, rank: int, world_size: int, **options: Any) -> RenewableGroup:
    """Return a group that can be made again: the default one, and a sub-group of all ranks in which the bodies work."""
    is_gpu = torch.cuda.is_available()

    def make(fresh: dist.Store) -> dist.ProcessGroup:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo", store=fresh, rank=rank, world_size=world_size
        )
        group = dist.new_group(list(range(world_size)))
        assert group is not None
        return group

    def destroy() -> None:
        if dist.is_initialized():  # an abort has taken it out of torch's books
            dist.destroy_process_group()

    return RenewableGroup(make, store=store, rank=rank, world_size=world_size, destroy=destroy, **options)


def run(world: RenewableGroup, failures: list[Failure]) -> list[Event]:
    """Go through the subtests on one rank."""
    return [_subtest(world, f"subtest-{number}", number, failure) for number, failure in enumerate(failures)]


def _subtest(world: RenewableGroup, name: str, number: int, failure: Failure) -> Event:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.full((8,), float(world.rank + number), device=device)
    times = {"began": 0.0, "raised": 0.0, "body_ended": 0.0}
    error: BaseException | None = None
    scope = collective_scope(world, name=name, timeout=TIMEOUT_S, failure_timeout=TIMEOUT_S)
    try:
        with scope:
            times["began"] = time.monotonic()
            scope.cleanup(lambda: times.update(body_ended=time.monotonic()))
            _body(world, scope.group, value, failure, times)
    except Exception as raised:  # noqa: BLE001  (kept, and looked at by the test)
        error = raised
    failures = {} if scope.verdict is None else scope.verdict.failures
    first = min(failures.values(), key=lambda outcome: outcome.order or 10**9, default=None)
    return Event(
        error="" if error is None else f"{type(error).__name__}: {str(error).splitlines()[0]}",
        cause="" if first is None else first.message,
        value=float(value[0].item()) if error is None else 0.0,
        ended=time.monotonic(),
        made=world.made,
        **times,
    )


def _body(world: RenewableGroup, group: Any, value: torch.Tensor, failure: Failure, times: dict[str, float]) -> None:
    def fail() -> None:
        times["raised"] = time.monotonic()
        msg = f"injected {failure.how} on rank {failure.rank}"
        raise ValueError(msg)

    fails = world.rank == failure.rank
    if fails and failure.how in ("before", "loop", "queue", "poll"):
        fail()
    while failure.how == "loop":
        copy = value.clone()
        dist.all_reduce(copy, group=group)
        copy.sum().item()
    while failure.how == "queue":
        dist.all_reduce(value.clone(), group=group)
    while failure.how == "poll":
        time.sleep(0.001)  # a body waits for a flag like this
    dist.all_reduce(value.clone(), group=group)
    if fails and failure.how == "between":
        fail()
    dist.all_reduce(value, group=group)
    if value.is_cuda:
        torch.cuda.synchronize()
    if fails and failure.how == "after":
        fail()


def defects(failures: list[Failure], events: list[list[Event]]) -> list[str]:
    """Say what is not as it should be: exactly the injected failures, on every rank, and right numbers elsewhere."""
    found = []
    world_size = len(events)
    for number, failure in enumerate(failures):
        right = float(sum(rank + number for rank in range(world_size)))
        for rank, own in enumerate(events):
            event, where = own[number], f"rank {rank} in subtest {number} ({failure.how} on {failure.rank})"
            if not failure.how and (event.error or event.value != right):
                found.append(f"{where}: {event.error or f'{event.value} instead of {right}'}")
            if failure.how and not event.error:
                found.append(f"{where}: passed")
            if failure.how and event.cause != f"injected {failure.how} on rank {failure.rank}":
                found.append(f"{where}: names {event.cause!r} as the cause")
            if rank == failure.rank and not event.error.startswith("ValueError: injected"):
                found.append(f"{where}: raised {event.error}")
    return found


@attrs.frozen
class Figures:
    """
    How long it took, in seconds, for each failure that stranded ranks.

    Attributes:
        freed: From the end of the grace until the last stuck rank's body has ended.
        next_body: From then until the next body has begun on all ranks.
        renewals: How many times the group was made, the first one included.
    """

    freed: list[float]
    next_body: list[float]
    renewals: int

    def __str__(self) -> str:
        """Give the median and the worst."""
        freed, next_body = sorted(self.freed), sorted(self.next_body)
        return (
            f"freed {freed[len(freed) // 2]:.3f} s, worst {freed[-1]:.3f}; next body {next_body[len(next_body) // 2]:.3f} s,"
            f" worst {next_body[-1]:.3f}; made {self.renewals} times"
        )


def figures(failures: list[Failure], events: list[list[Event]], grace: float) -> Figures:
    """Measure how long stuck ranks took to come back, and the next body to begin."""
    freed, next_body = [], []
    for number, failure in enumerate(failures[:-1]):
        if failure.how in ("", "after"):
            continue
        back = max(own[number].body_ended for own in events)
        freed.append(back - (events[failure.rank][number].raised + grace))
        next_body.append(max(own[number + 1].began for own in events) - back)
    return Figures(freed, next_body, events[0][-1].made)

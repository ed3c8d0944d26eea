"""
TransformerEngine's persistent pool: rank 0 reads requests, all ranks run them, a gather is verdict and barrier in one.

In the real one, the parent writes requests to a pipe, waits 90 s for each answer, and starts the
ranks again when there is none.
"""

import os

import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests
from examples.adopt.common import SIZES, TIMEOUT, WORLD_SIZE, check, launch, say


def before() -> None:
    requests, rank = iter(SIZES), int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=TIMEOUT)
    while True:
        try:
            request = [next(requests, None) if rank == 0 else None]
            dist.broadcast_object_list(request)
            if request[0] is None:
                break
            check(request[0])
            outcome = f"{request[0]} passed"
        except Exception as error:  # noqa: BLE001  (told)
            outcome = f"failed: {error}"
        answer = [""] * WORLD_SIZE if rank == 0 else None
        dist.gather_object(outcome, answer)
        if rank == 0:
            say(f"answers {answer}")
    dist.destroy_process_group()


def after() -> None:
    requests, rank = iter(SIZES), int(os.environ["RANK"])
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        while True:
            with subtests.test("request") as subtest:
                request = [next(requests, None) if rank == 0 else None]
                dist.broadcast_object_list(request)
                if request[0] is None:
                    break
                check(request[0])
            answer = subtest.result
            if rank == 0:
                say(f"answers {answer.status}, {[o.message for o in answer.failures.values()]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)

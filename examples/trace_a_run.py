"""
A run to look at: a straggler, a failure before the collectives, and the renewal of the group.

Run it with ``python examples/trace_a_run.py run.json run.png``. Four ranks go through six subtests.
In "slow", rank 2 is late at the barrier, and its peers wait there. In "fails", rank 1 raises before its
all-reduce; its peers sit in theirs until the group is revoked; then the group is made again.
https://ui.perfetto.dev opens run.json. The picture needs matplotlib, and is left out without its name.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import RenewableGroup, Subtests


WORLD_SIZE = 4
SUBTESTS = ("sum-0", "slow", "sum-1", "fails", "sum-2", "sum-3")
SLOW_RANK, FAILING_RANK = 2, 1

BODY, STUCK, WAITING, RENEWAL, FAILURE = "#7fb2e5", "#c9d6e2", "#f6d58a", "#2e9e5b", "#c62828"


def subtest(name: str, rank: int) -> None:
    time.sleep(0.15)  # the work that would be here
    if name == "fails" and rank == FAILING_RANK:
        msg = "shapes differ"
        raise ValueError(msg)
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    if name == "slow" and rank == SLOW_RANK:
        time.sleep(0.4)
    assert total.item() == sum(range(WORLD_SIZE))


def main(rank: int, world_size: int, port: int, path: str) -> None:
    logging.basicConfig(level=logging.CRITICAL)  # the report says it all
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    world = RenewableGroup(store=store, rank=rank, world_size=world_size)
    subtests = Subtests(world)
    try:
        with subtests:
            for name in SUBTESTS:
                subtests.run(name, subtest, name, rank)
    except ExceptionGroup:
        subtests.write_trace(path)  # all ranks call it, and rank 0 writes
    world.destroy()


def draw(trace: str, picture: str) -> None:
    """Draw one track a rank, from the first making of the group to the last barrier."""
    import matplotlib as mpl  # noqa: PLC0415  (not needed for the trace)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  (imported where it is needed)

    events = [event for event in json.loads(Path(trace).read_text())["traceEvents"] if event["ph"] == "X"]
    zero = min(event["ts"] for event in events if event["cat"] == "renewal")
    spans = [(each, (each["ts"] - zero) / 1e6, each["dur"] / 1e6) for each in events if each["ts"] >= zero]
    bodies = {
        (each["name"], each["pid"]): (start, start + took) for each, start, took in spans if each["cat"] == "body"
    }
    failed_at, freed_at = bodies["fails", FAILING_RANK][1], bodies["fails", 0][1]
    end = max(start + took for _, start, took in spans)

    plt.rcParams.update({"font.size": 11, "hatch.color": "#8fa3b5", "hatch.linewidth": 0.8})
    figure, axes = plt.subplots(figsize=(11, 4.1), dpi=120, layout="constrained")
    for each, start, took in spans:
        row = (each["pid"] - 0.36, 0.72)
        if each["cat"] == "body":
            axes.broken_barh([(start, took)], row, facecolors=BODY, edgecolor="white", linewidth=0.5)
            if each["name"] == "fails" and each["pid"] != FAILING_RANK:
                axes.broken_barh([(failed_at, start + took - failed_at)], row, facecolors=STUCK, hatch="///")
        else:
            axes.broken_barh([(start, took)], row, facecolors=RENEWAL if each["cat"] == "renewal" else WAITING)
    label_subtests(axes, bodies, end)
    label_events(axes, bodies, failed_at, freed_at, [start for each, start, _ in spans if each["cat"] == "renewal"])
    axes.set_yticks(range(WORLD_SIZE), [f"rank {rank}" for rank in range(WORLD_SIZE)])
    axes.set(xlim=(-0.02, end + 0.01), ylim=(WORLD_SIZE + 0.1, -0.95), xlabel="seconds")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    patches = [
        mpl.patches.Patch(facecolor=BODY, label="body of a subtest"),
        mpl.patches.Patch(facecolor=WAITING, label="waits for its peers, at the barrier"),
        mpl.patches.Patch(facecolor=STUCK, hatch="///", label="stuck in all_reduce"),
        mpl.patches.Patch(facecolor=RENEWAL, label="makes the group"),
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(picture)


def label_subtests(axes: Any, bodies: dict[tuple[str, int], tuple[float, float]], end: float) -> None:
    """Write the name of each subtest above its part of the tracks."""
    starts = [bodies[name, 0][0] for name in SUBTESTS]
    for name, start, stop in zip(SUBTESTS, starts, [*starts[1:], end], strict=True):
        color = FAILURE if name == "fails" else "black"
        axes.text((start + stop) / 2, -0.62, f'"{name}"', ha="center", va="center", color=color)
        axes.vlines(start, -0.75, WORLD_SIZE - 0.55, color="#999999", linewidth=0.7, linestyle=":")


def label_events(
    axes: Any, bodies: dict[tuple[str, int], tuple[float, float]], failed_at: float, freed_at: float, made: list[float]
) -> None:
    """Write into the tracks what happens in them."""
    late = bodies["slow", SLOW_RANK]
    axes.text(sum(late) / 2, SLOW_RANK, "the straggler", ha="center", va="center")
    axes.plot([failed_at], [FAILING_RANK], marker="X", color=FAILURE, markersize=13, markeredgecolor="white", zorder=5)
    axes.text(failed_at + 0.03, FAILING_RANK, "raises ValueError", va="center", color=FAILURE, fontweight="bold")
    for text, at, x in (
        ("the group is revoked:\nthe stuck ranks are free", freed_at, freed_at - 0.06),
        ("it is made again:\nthe next subtest runs", max(made), max(made) + 0.06),
    ):
        axes.annotate(
            text,
            (at, WORLD_SIZE - 0.62),
            (x, WORLD_SIZE - 0.22),
            ha="right" if x < at else "left",
            va="center",
            arrowprops={"arrowstyle": "->", "color": "#444444"},
        )


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (WORLD_SIZE, server.port, sys.argv[1]), nprocs=WORLD_SIZE)
    if len(sys.argv) > 2:
        draw(sys.argv[1], sys.argv[2])

"""Command line: ``python -m examples.test_moe_layer --help``."""

from __future__ import annotations

import argparse
import sys

import torch

from collective_scope import Subtests

from .config import BACKENDS, PARALLEL_COMBOS, MoETestConfig
from .launch import make_pool, parallel_launch_with_config
from .mutations import MUTATIONS
from .selection import default_device_type, explain_invalid, select, select_ids
from .worker import Break, BrokenOnPurposeError, Options


RERUN = "python -m examples.test_moe_layer --subtests '{id}'"


def main() -> int:
    args = parse_args()
    configs = choose(args)
    if args.list:
        print("\n".join(config.id() for config in configs))
        return 0
    if not configs:
        print("nothing to run")
        return 1
    breaks = tuple(args.breaks or ())
    if len(sys.argv) == 1:  # shown without being asked: what one failure costs
        breaks = (example_of_a_break(configs),)
    for each in breaks:
        if each.id not in {config.id() for config in configs}:
            print(f"--break: {each.id} is not among the {len(configs)} configurations to run", file=sys.stderr)
            return 2
        print(f"--break: rank {each.rank} will fail {each.when} its collectives in {each.id}")
    report = Subtests(rerun=RERUN)
    try:
        with report, make_pool(args.device, dict(args.env or ()), verbose=args.verbose > 0) as pool:
            parallel_launch_with_config(pool, configs, Options(breaks, args.control), report)
    except ExceptionGroup:
        pass  # the report says it all; what it means for the exit code is said below
    return judge(report, breaks, args.control)


def example_of_a_break(configs: list[MoETestConfig]) -> Break:
    """Choose a configuration in the middle of the largest layout, and a rank that its peers will wait for."""
    largest = [config for config in configs if config.world_size == configs[-1].world_size]
    return Break(largest[len(largest) // 2].id(), 1, "before")


def judge(report: Subtests, breaks: tuple[Break, ...], control: str | None) -> int:
    """Return the exit code: 0 if exactly those configurations failed that were broken on purpose, with that cause."""
    option, cause, asked = "--break", BrokenOnPurposeError.__name__, {each.id for each in breaks}
    if control:
        option, cause, asked = "--control", AssertionError.__name__, {result.id for result in report.results}
    causes = {
        result.id: {outcome.type_name.rpartition(".")[2] for outcome in result.failures.values()}
        for result in report.results
        if result.status != "passed"
    }
    missed = sorted(asked - {id_ for id_, names in causes.items() if cause in names})
    for id_ in missed:
        print(f"did not fail as asked for by {option}: {id_}")
    if missed or causes.keys() != asked:
        return 1
    if asked:
        print(f"as asked for by {option}: {len(asked)} of {len(report.results)} failed, and no other")
    return 0


def choose(args: argparse.Namespace) -> list[MoETestConfig]:
    """Apply what the command line says, and print what it leaves out."""
    capability = args.capability
    if capability == "native":
        capability = torch.cuda.get_device_capability() if args.device == "cuda" else (0, 0)
    if args.subtests:
        configs, skipped = select_ids(args.subtests.split(","), args.device, capability)
    else:
        layouts, backends = args.layout or list(PARALLEL_COMBOS), args.backend or list(BACKENDS)
        if not args.backend:  # nothing tells whether DeepEP was built with NVSHMEM, which its low latency kernels need
            backends.remove("deep_ep_low_latency")
            print("skipped: deep_ep_low_latency runs if it is named with --backend", file=sys.stderr)
        configs, skipped = select(layouts, backends, args.device, full=args.full, capability=capability)
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    if args.verbose > 1:
        print(*explain_invalid(args.verbose, capability), sep="\n", file=sys.stderr)
    return configs


def read_capability(text: str) -> str | tuple[int, int]:
    """Read ``native`` or a version such as ``9.0``."""
    if text == "native":
        return text
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def read_variable(text: str) -> tuple[str, str]:
    """Read ``NAME=VALUE``."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        msg = f"must be NAME=VALUE (got {text!r})"
        raise argparse.ArgumentTypeError(msg)
    return name, value


def read_break(text: str) -> Break:
    """Read a failure to inject."""
    try:
        return Break.from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.test_moe_layer",
        description="Test a mixture-of-experts layer, split over processes.",
        epilog="Without any argument: the quick set, with one configuration broken on one rank.",
    )
    parser.add_argument("--full", action="store_true", help="everything, not the quick set")
    parser.add_argument("--subtests", metavar="ID,ID", help="run exactly these; vLLM's ids are understood")
    parser.add_argument("--layout", action="append", choices=PARALLEL_COMBOS, help="repeatable")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device_type())
    parser.add_argument(
        "--capability",
        type=read_capability,
        metavar="X.Y|native",
        help="leave out what a device of this compute capability would have to emulate",
    )
    parser.add_argument("--env", action="append", type=read_variable, metavar="NAME=VALUE", help="for all ranks")
    parser.add_argument(
        "--break",
        dest="breaks",
        action="append",
        type=read_break,
        metavar="CONFIG:RANK:before|after",
        help="have one rank fail before or after its collectives; this must be the only failure",
    )
    parser.add_argument("--control", choices=MUTATIONS, help="make one rank's numbers wrong: everything must fail")
    parser.add_argument("--list", action="store_true", help="print ids, run nothing")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="a line each; -vv: what is invalid and why; -vvv: and which"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

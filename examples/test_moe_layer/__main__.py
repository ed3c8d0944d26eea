"""Command line: ``python -m examples.test_moe_layer --help``."""

from __future__ import annotations

import argparse
import sys

from .backends import why_unavailable
from .config import BACKENDS, LAYOUTS, Config
from .mutations import MUTATIONS
from .suite import (
    default_device_type,
    explain_invalid,
    raise_if_failed,
    run_suite,
    select,
    select_ids,
    summary,
    why_too_large,
)
from .worker import Options


def main() -> int:
    args = parse_args()
    configs = choose(args)
    if args.list:
        print("\n".join(config.id for config in configs))
        return 0
    if not configs:
        print("nothing to run")
        return 1
    options = Options(device_type=args.device, verbosity=args.verbose, mutation=args.control)
    reports = run_suite(configs, options)
    print(summary(reports))
    try:
        raise_if_failed(reports)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def choose(args: argparse.Namespace) -> list[Config]:
    """Apply what the command line says, and print what it leaves out."""
    layouts = [LAYOUTS[name] for name in args.layout or LAYOUTS]
    backends = args.backend or list(BACKENDS)
    if args.subtests:
        configs, skipped = select_ids(args.subtests.split(","), args.device)
    else:
        configs = select(layouts, backends, args.device, full=args.full)
        skipped = [why_unavailable(name, args.device) or "" for name in backends]
        skipped += [why_too_large(layout, args.device) or "" for layout in layouts]
    for reason in filter(None, skipped):
        print(f"skipped: {reason}", file=sys.stderr)
    if args.verbose > 1:
        print(*explain_invalid(args.verbose), sep="\n", file=sys.stderr)
    return configs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.test_moe_layer",
        description="Test a mixture-of-experts layer, split over processes.",
    )
    parser.add_argument("--full", action="store_true", help="everything, not the quick set")
    parser.add_argument("--subtests", metavar="ID,ID", help="run exactly these")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="repeatable")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device_type())
    parser.add_argument("--control", choices=MUTATIONS, help="break one rank: everything must fail")
    parser.add_argument("--list", action="store_true", help="print ids, run nothing")
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="a line each; -vv: tracebacks, and what is invalid and why; -vvv: and which",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""How the package is built: what its own tables and lists of modules, keys and threads say is so."""

from __future__ import annotations

import ast
import graphlib
import re
import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

import collective_scope
from collective_scope import agreement
from collective_scope.agreement.records import Outcome
from tests.stores import HookedStore, Rank, at_once, is_waiting, wait_until


SOURCE = Path(collective_scope.__file__).parent
MODULES = {path: ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
FILES = {name.removesuffix(".__init__"): path for path, name in MODULES.items()}
TABLE = agreement.__doc__ or ""

FAILED = Outcome("body", "ValueError", "no", "Traceback ...")


def _imports(name: str) -> set[str]:
    """Return the modules of the package that one of them imports, without those that only type checkers see."""
    found = set()
    tree = ast.parse(FILES[name].read_text())
    unseen = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in unseen:
            package = MODULES[FILES[name]].split(".")[: -node.level]
            module = ".".join([*package, *([node.module] if node.module else [])])
            found |= {module} if node.module else {".".join([*package, each.name]) for each in node.names}
    return found & set(FILES)


def test_modules_of_the_package_import_each_other_in_no_circle() -> None:
    """Each can be read after those that it imports."""
    graph = {name: _imports(name) for name in FILES if name != "__init__"}

    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError
    assert "_entry" in graph["_scope"]  # it does see imports


def test_modules_of_the_agreement_import_only_from_those_listed_before_them() -> None:
    """The agreement can be read in the order that its docstring gives, and needs nothing of the package around it."""
    lines = re.findall(r"^\* (``.*?):", TABLE, re.MULTILINE)
    order = [re.findall(r"``(\w+)``", line) for line in lines]
    listed = {f"agreement.{name}" for line in order for name in line}

    assert {name for name in FILES if name.startswith("agreement.")} == listed
    before: set[str] = set()
    for line in order:
        before |= {f"agreement.{name}" for name in line}
        for name in line:
            assert _imports(f"agreement.{name}") <= before


def test_file_of_the_package_has_at_most_300_lines() -> None:
    """A file can be read in one go."""
    assert [] == [name for name, path in FILES.items() if len(path.read_text().splitlines()) > 300]


def _kind(key: str) -> str:
    """Return the row of the table that *key* is in; keys of a group come without what they all begin with."""
    rules = {
        r"life of \d+": "life of {n}",
        r"rank/\d+": "{life}/rank/{r}",
        r".*/n": "{life}/{round}/n",
        r".*/v": "{life}/{round}/v",
        r"collective_scope/news": "news",
        r"collective_scope/news/\d+": "news/{k}",
        r"collective_scope/beat/\S+": "beat/{process}",
    }
    return next((kind for pattern, kind in rules.items() if re.fullmatch(pattern, key)), key)


def test_keys_that_ranks_use_are_those_of_the_table_and_seven_kinds(rank_on: Callable[..., Rank]) -> None:
    """Whatever happens, from the first join until the host of the store has left, is told in seven kinds of key."""
    base, used = dist.HashStore(), set[str]()
    store = HookedStore(base, lambda _, key: used.add(_kind(key)))
    ranks = [rank_on(store, rank, 2, serves=rank == 0) for rank in range(2)]
    at_once(*(rank.arrive for rank in ranks))
    at_once(ranks[0].arrive, lambda: ranks[1].arrive(outcome=FAILED))
    ranks[0].arrive("2 scope", timeout=0.5)  # rank 1 is asked where it is
    ranks[1].arrive("2 scope")
    at_once(*(lambda rank=rank: rank.arrive("3 scope", "entry") for rank in ranks))
    for rank in ranks:
        rank.barrier.leave("has destroyed its group")
    at_once(*(rank.control.close for rank in reversed(ranks)))
    assert wait_until(lambda: all(rank.control.broken for rank in ranks))
    rows = re.findall(r"^(\S+(?: of \S+)?)  +\S", TABLE.split("Keys, below")[1], re.MULTILINE)

    assert {row for row in rows if row != "key" and "=" not in row} == used
    assert len(used) == 7


def test_rank_that_waits_has_three_threads(rank_on: Callable[..., Rank]) -> None:
    """Its own, one that makes its store calls, and one that looks, answers and warns."""
    before = set(threading.enumerate())
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    seen: list[str] = []

    def look() -> None:
        assert wait_until(lambda: is_waiting(store, 0))
        seen.extend(thread.name for thread in set(threading.enumerate()) - before)
        rank_on(store, 1, 2).arrive()

    at_once(rank.arrive, look)
    ours = sorted(name for name in seen if name.startswith("collective_scope"))

    assert ["collective_scope-control", "collective_scope-store"] == ours
    assert len(seen) == len(ours) + 2  # the threads that are the rank and its peer here

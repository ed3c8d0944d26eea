"""Two hosts on one are told apart as machines are, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, HostsError, two_hosts
from tests.ranks import run_script


_TELL = """
import json, os, pathlib, sys, time
from collective_scope.agreement.process import me
print(json.dumps([me().host, me().machine, time.monotonic(), time.time(), os.listdir("/sys/class/net")]))
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():  # the kernel may give the namespace of a process that has ended to the next one
    time.sleep(0.01)  # a file cannot be waited for
"""


def _ask(host: Host, *flags: Path) -> Any:
    return json.loads(run_script("-c", _TELL, *map(str, flags), prefix=host.prefix, env=host.env).stdout)


def _namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=20)  # noqa: S607  (the system's own)
    return {line.split()[0] for line in done.stdout.splitlines()}


def test_two_hosts_have_names_machines_and_clocks_of_their_own(tmp_path: Path) -> None:
    """The library's clues to a host differ between the two. The second one's clocks are ahead."""
    try:
        with two_hosts() as hosts, ThreadPoolExecutor(2) as threads:
            during = _namespaces()
            flags = [tmp_path / "a", tmp_path / "b"]
            answers = threads.map(_ask, hosts, flags, reversed(flags))
            (name_a, machine_a, up_a, wall_a, _), (name_b, machine_b, up_b, wall_b, _) = answers
    except HostsError as error:
        pytest.skip(f"no two hosts here: {error}")

    assert name_a != name_b
    assert machine_a != machine_b
    assert up_b - up_a > 900_000
    assert 3_500 < wall_b - wall_a < 3_700
    assert {name_a, name_b} <= during
    assert not {name_a, name_b} & _namespaces()


def test_two_hosts_without_the_tools_say_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a host cannot be made, the reason is told."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostsError, match="ip"), two_hosts():
        pass

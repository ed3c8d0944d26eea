"""Two hosts on one are told apart as machines are, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.hosts import Host, HostsError, two_hosts
from tests.ranks import run_script


_TELL = """
import json, os, socket, time
from collective_scope._process import me
print(json.dumps([me().host, me().machine, time.monotonic(), time.time(), os.listdir("/sys/class/net")]))
"""


def _ask(host: Host) -> Any:
    return json.loads(run_script("-c", _TELL, prefix=host.prefix, env=host.env).stdout)


def _namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=20)  # noqa: S607
    return {line.split()[0] for line in done.stdout.splitlines()}


def test_two_hosts_have_names_machines_and_clocks_of_their_own() -> None:
    """What the library goes by differs between the hosts, and the clocks of the second one are ahead."""
    try:
        with two_hosts() as hosts:
            during = _namespaces()
            (name_a, machine_a, up_a, wall_a, _), (name_b, machine_b, up_b, wall_b, _) = map(_ask, hosts)
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

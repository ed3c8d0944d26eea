"""
Two hosts on one: network, process, host name and clock namespaces, joined by a cable.

The addresses exist inside of the namespaces only, and nothing leaves them. Linux, and
rights to make namespaces, which a superuser has; `two_hosts()` says what is lacking.
"""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Iterator
from typing import Literal

import attrs


__all__ = ["Host", "HostsError", "set_cable", "two_hosts"]

_CABLE = "cable"
"""The network device's name on each host."""

_MONOTONIC_OFFSET_S = 1_000_000
_WALL_OFFSET_S = 3_600
_TIMEOUT_S = 20.0


class HostsError(Exception):
    """Raised when this machine does not allow to make hosts."""


@attrs.frozen
class Host:
    """
    One host.

    Attributes:
        address: Its IPv4 address.

        prefix: Words before a command to run it there.

        env: Environment variables its Python processes need.
    """

    address: str
    prefix: tuple[str, ...]
    env: dict[str, str]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """
    Make two hosts for the time of the block. The clocks of the second one are ahead.

    Raises:
        HostsError: If that is not possible here.
    """
    mark = uuid.uuid4().hex[:8]
    names = [f"hosts-{mark}-{letter}" for letter in "ab"]
    addresses = ["10.231.0.1", "10.231.0.2"]
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        ends = [f"netns {name} name {_CABLE}".split() for name in names]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(names, addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", _CABLE)
            for device in ("lo", _CABLE):
                _run("ip", "-n", name, "link", "set", "dev", device, "up")
        hosts = [
            _host(name, address, is_ahead=name is names[1]) for name, address in zip(names, addresses, strict=True)
        ]
        for host in hosts:
            _run(*host.prefix, "true")
        yield hosts[0], hosts[1]
    finally:
        for name in made:
            # Processes in there go with their own process namespace.
            _run("ip", "netns", "delete", name)


def set_cable(state: Literal["up", "down"]) -> None:
    """Put the cable into the host that this runs on, or pull it."""
    _run("ip", "link", "set", "dev", _CABLE, state)


def _host(name: str, address: str, *, is_ahead: bool) -> Host:
    clocks = ["--time", f"--monotonic={_MONOTONIC_OFFSET_S}", f"--boottime={_MONOTONIC_OFFSET_S}"]
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", *(clocks if is_ahead else [])]
    shell = ["sh", "-c", 'hostname "$0" && exec "$@"', name]
    offsets = {
        "TESTS_MONOTONIC_OFFSET_S": str(_MONOTONIC_OFFSET_S),
        "TESTS_WALL_OFFSET_S": str(_WALL_OFFSET_S),
    }
    return Host(
        address=address,
        prefix=("ip", "netns", "exec", name, *namespaces, *shell),
        env={"GLOO_SOCKET_IFNAME": _CABLE, **(offsets if is_ahead else {})},
    )


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except OSError as error:
        raise HostsError(str(error)) from error
    if done.returncode:
        line = " ".join(command)
        msg = f"{line}: {done.stderr.strip()}"
        raise HostsError(msg)

"""Chooses the network interface on which gloo listens. Anyone who can reach it can join a run: see docs/security.md."""

import os
import socket

import psutil

# Interfaces of containers and virtual machines. Their addresses are the same, or unreachable, on another machine.
BRIDGES = ("docker", "veth", "virbr", "br-")


def choose_interface() -> None:
    """Chooses the loopback if all processes are on this machine, otherwise an interface that other machines can reach.

    With several machines, a choice is needed only if this machine's own name resolves to the loopback or not at all.
    gloo listens at the address of that name, which Debian's installer sets to 127.0.1.1 in /etc/hosts, or else at the
    loopback. Each of the other machines would then try to reach itself. NCCL skips the loopback on its own. If
    GLOO_SOCKET_IFNAME is set, it is left unchanged.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
        os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
        return
    found = _interfaces()
    if _address_of(socket.gethostname()) in found:
        return
    towards_main = _address_towards(os.environ.get("MASTER_ADDR", ""))
    # On the main machine, the address may be the loopback, which is not in `found`.
    name = found.get(towards_main) or next(iter(found.values()), None)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interfaces() -> dict[str, str]:
    """IPv4 address -> name of the interface, for all interfaces that another machine may be able to reach."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup and not name.startswith(BRIDGES)}
    return {
        one.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if name in up and one.family == socket.AF_INET and not one.address.startswith("127.")
    }


def _loopback() -> str:
    """Name of the interface with the address 127.0.0.1."""
    addresses = {one.address: name for name, found in psutil.net_if_addrs().items() for one in found}
    return addresses.get("127.0.0.1", "lo")


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _address_towards(host: str) -> str:
    """This machine's own address on the route to `host`; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # chooses the route, and sends nothing
            return probe.getsockname()[0]
        except OSError:
            return ""

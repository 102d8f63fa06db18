"""Chooses gloo's network interface. Anyone who can reach a port of gloo can disturb the run: see docs/security.md."""

import os
import socket

import psutil

from data_prep.errors import require

# Interfaces with these name prefixes connect containers and virtual machines. Other machines cannot reach these
# interfaces.
BRIDGES = ("docker", "veth", "virbr", "br-")


def choose_interface() -> None:
    """Chooses the loopback if all processes are on this machine, otherwise an interface that other machines can reach.

    By default, gloo listens at the address to which this machine's host name resolves, or else at the loopback.
    Debian's installer makes the name resolve to 127.0.1.1. Other machines that use this address connect to themselves.
    So with several machines, an interface is chosen if the host name has no address that other machines can reach.
    NCCL needs no choice, because it skips the loopback. If GLOO_SOCKET_IFNAME names an interface, it is left unchanged.
    Raises InputError if this machine does not have that interface.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        present = psutil.net_if_addrs()
        for name in chosen.split(","):
            found = ", ".join(sorted(present))
            require(
                name in present,
                f"GLOO_SOCKET_IFNAME={chosen}: this machine has no interface {name}; use one of {found}",
            )
        return
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
        os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
        return
    found = _interfaces()
    if _address_of(socket.gethostname()) in found:
        return
    towards_main = _address_towards(os.environ.get("MASTER_ADDR", ""))
    # On the machine that MASTER_ADDR names, `towards_main` may be the loopback, which is not in `found`.
    name = found.get(towards_main) or next(iter(found.values()), None)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interfaces() -> dict[str, str]:
    """{IPv4 address: name} of the interfaces that another machine may be able to reach."""
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
    """The address from which this machine sends to `host`; empty if there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # selects a route without sending anything
            return probe.getsockname()[0]
        except OSError:
            return ""

"""Two machines, emulated by connected network namespaces, choose a network interface for gloo.

Each machine resolves its own host name to a loopback address, as Debian's installer configures it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.errors import InputError
from ddp_trainer.distributed.gloo_interface import BRIDGES, choose_interface
from tests.support.trainer import NARROW, REPOSITORY, environment

KEEP = "echo here; cat"
NEEDED = "needs root, iproute2 and the right to create network namespaces"
CABLE = ("192.0.2.41", "192.0.2.42")


def succeeds(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[list[str]]]:
    """A command prefix for each machine, to run commands there. A waiting process keeps each machine alive."""
    keepers = [
        subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", KEEP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        if not all(keeper.stdout and keeper.stdout.readline() == "here\n" for keeper in keepers):
            pytest.skip(NEEDED)
        there = [["nsenter", "--target", str(keeper.pid), "--net", "--uts", "--mount"] for keeper in keepers]
        first, second = (str(keeper.pid) for keeper in keepers)
        steps = [
            ["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]
        ]
        for number, enter in enumerate(there):
            hosts = tmp_path / f"hosts-{number}"
            other = f"{CABLE[1 - number]} machine-{1 - number}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 machine-{number}\n{other}\n")
            steps.append([*enter, "mount", "--bind", str(hosts), "/etc/hosts"])
            steps.append([*enter, "hostname", f"machine-{number}"])
            steps.append([*enter, "ip", "link", "set", "lo", "up"])
            steps.append([*enter, "ip", "address", "add", f"{CABLE[number]}/29", "dev", "cable"])
            steps.append([*enter, "ip", "link", "set", "cable", "up"])
        if not all(succeeds(*step) for step in steps):
            pytest.skip(NEEDED)
        yield there
    finally:
        for keeper in keepers:
            keeper.communicate()  # closing its input ends the process, and with it the namespace


def test_two_machines_connect_although_their_names_resolve_to_the_loopback(
    machines: list[list[str]], tiny_dir: Path, tmp_path: Path
) -> None:
    run = ("--data-dir", tiny_dir, "--out", tmp_path / "run")
    words = [sys.executable, "-m", NARROW, "smoke", "--device", "cpu", *run]
    launch = {
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "machine-0",
        "MASTER_PORT": "29500",
    }
    ranks = []
    for number, there in enumerate(machines):
        rank = environment(**launch, RANK=str(number))
        ranks.append(
            subprocess.Popen(
                [*there, *words], env=rank, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_choice_of_the_interface_on_one_machine_and_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        one.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET
        and not one.address.startswith("127.")
        and not name.startswith(BRIDGES)
        and psutil.net_if_stats()[name].isup
    }
    if not own:
        pytest.skip("this machine has no network")
    address, name = next(iter(own.items()))
    up = psutil.net_if_stats()
    addresses = psutil.net_if_addrs()
    unused = addresses[name][0]._replace(family=socket.AF_INET, address="192.0.2.61")

    def chosen(world: str, own_name: str, **variables: str) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "net_if_stats", lambda: {"docker0": up[name], "other0": up[name], **up})
            patch.setattr(psutil, "net_if_addrs", lambda: {"docker0": [unused], "other0": [unused], **addresses})
            patch.setattr(socket, "gethostname", lambda: own_name)
            patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
            settings = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address, **variables}
            for variable, value in settings.items():
                patch.setenv(variable, value)
            choose_interface()
            return os.environ.pop("GLOO_SOCKET_IFNAME", None)

    assert chosen("2", "127.0.1.1") == name, "not the interface on the route to the main machine"
    assert chosen("2", "no-such-name.invalid") == name
    assert chosen("2", "127.0.1.1", MASTER_ADDR="127.0.1.1") == "other0", (
        "not an interface that other machines may reach"
    )
    assert chosen("1", "127.0.1.1") is None, "an interface was chosen for a single process"
    assert chosen("2", "127.0.1.1", LOCAL_WORLD_SIZE="2") == "lo", "not the loopback for processes on one machine"
    assert chosen("2", address) is None, (
        "an interface was chosen, although other machines can reach the address of the host name"
    )
    assert chosen("2", "127.0.1.1", GLOO_SOCKET_IFNAME="other0") == "other0", "the user's choice is lost"
    with pytest.raises(InputError, match="this machine has no interface eth7"):
        chosen("2", "127.0.1.1", GLOO_SOCKET_IFNAME="eth7")

"""Two machines, as network namespaces with a cable between them; the name of each leads to its own loopback."""

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
from conftest import NARROW, REPOSITORY, environment

from ddp_trainer.gloo_interface import BRIDGES, avoid_loopback

CABLE = ("192.0.2.41", "192.0.2.42")


def succeeds(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[list[str]]]:
    """For each of two machines the words that have a command run there."""
    names = [f"ddp-{os.getpid()}-{number}" for number in range(2)]
    cabling = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
    steps, commands = [*(["netns", "add", name] for name in names), cabling], []
    for number, name in enumerate(names):
        steps.append(["-n", name, "link", "set", "lo", "up"])
        steps.append(["-n", name, "address", "add", f"{CABLE[number]}/29", "dev", "cable"])
        steps.append(["-n", name, "link", "set", "cable", "up"])
        hosts = tmp_path / f"hosts-{number}"
        other = f"{CABLE[1 - number]} machine-{1 - number}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 machine-{number}\n{other}\n")
        settle = f'mount --bind "{hosts}" /etc/hosts && hostname machine-{number} && exec "$@"'
        commands.append(["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", settle, "-"])
    try:
        if not all(succeeds("ip", *step) for step in steps) or not all(succeeds(*there, "true") for there in commands):
            pytest.skip("needs root, iproute2 and the right to make network namespaces")
        yield commands
    finally:
        for name in names:
            succeeds("ip", "netns", "delete", name)


def test_two_machines_meet_though_the_name_of_each_is_its_loopback(
    machines: list[list[str]], tiny_dir: Path, tmp_path: Path
) -> None:
    run = ("--data-dir", tiny_dir, "--out", tmp_path / "run")
    words = [sys.executable, "-m", NARROW, "smoke", "--device", "cpu", *run]
    launch = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "machine-0",
              "MASTER_PORT": "29500"}  # fmt: skip
    ranks = []
    for number, there in enumerate(machines):
        rank = environment(**launch, RANK=str(number))
        ranks.append(subprocess.Popen(
            [*there, *words], env=rank, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ))  # fmt: skip
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_an_interface_is_named_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        one.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and not one.address.startswith("127.") and not name.startswith(BRIDGES)
        and psutil.net_if_stats()[name].isup
    }  # fmt: skip
    if not own:
        pytest.skip("this machine has no network")
    address, name = next(iter(own.items()))
    up = psutil.net_if_stats()
    addresses = psutil.net_if_addrs()
    unused = addresses[name][0]._replace(family=socket.AF_INET, address="192.0.2.61")

    def named(world: str, own_name: str, **variables: str) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "net_if_stats", lambda: {"docker0": up[name], "other0": up[name], **up})
            patch.setattr(psutil, "net_if_addrs", lambda: {"docker0": [unused], "other0": [unused], **addresses})
            patch.setattr(socket, "gethostname", lambda: own_name)
            patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
            settings = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address, **variables}
            for variable, value in settings.items():
                patch.setenv(variable, value)
            avoid_loopback()
            return os.environ.pop("GLOO_SOCKET_IFNAME", None)

    assert named("2", "127.0.1.1") == name, "the way to the main machine"
    assert named("2", "no-such-name.invalid") == name
    assert named("2", "127.0.1.1", MASTER_ADDR="127.0.1.1") == "other0", "the first that is no bridge"
    assert named("1", "127.0.1.1") is None, "one machine"
    assert named("2", address) is None, "its name leads to an address that others may reach"
    assert named("2", "127.0.1.1", GLOO_SOCKET_IFNAME="eth7") == "eth7", "the user's own"

"""Each launch/*.yaml starts the documented number of processes, and Accelerate uses every setting in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.forked import free_port
from tests.support.trainer import REPOSITORY, environment

LAUNCH = REPOSITORY / "launch"
FILES = sorted(LAUNCH.glob("*.yaml"))
WORKER = "tests.support.workers.print_world"


def start(file: str, *flags: str, port: int | None = None) -> subprocess.Popen[str]:
    """Starts the worker with `accelerate launch --config_file launch/FILE`, with all GPUs hidden."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / file), *flags]
    if port is not None:
        command += ["--main_process_port", str(port)]
    return subprocess.Popen(
        [*command, "-m", WORKER],
        cwd=REPOSITORY,
        env=environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def worlds(*processes: subprocess.Popen[str]) -> list[tuple[int, int, int]]:
    """Returns (rank, world size, number of processes reached) of every worker, sorted by rank."""
    found = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        found += [tuple(json.loads(line).values()) for line in stdout.splitlines() if line.startswith("{")]
    return sorted(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_setting_reaches_the_launcher(file: Path) -> None:
    """Accelerate silently ignores a setting in a file if the flag of that setting has a default."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    settings = yaml.safe_load(file.read_text())
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, defaults, _ = _validate_launch_command(parsed)  # refuses unknown keys
    assert defaults is not None
    assert defaults.distributed_type == settings.pop("distributed_type")
    assert defaults.compute_environment == settings.pop("compute_environment")
    assert {name: getattr(arguments, name) for name in settings} == settings


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_comment_in_each_file_shows_the_command_that_uses_the_file(file: Path) -> None:
    assert f"accelerate launch --config_file launch/{file.name} " in file.read_text()


def test_one_gpu_yaml_starts_one_process() -> None:
    assert worlds(start("one_gpu.yaml")) == [(0, 1, 1)]


def test_cpu_processes_yaml_starts_two_processes() -> None:
    assert worlds(start("cpu_processes.yaml")) == [(0, 2, 2), (1, 2, 2)]


def test_all_gpus_yaml_starts_the_requested_number_of_processes() -> None:
    assert worlds(start("all_gpus.yaml", "--num_processes", "2")) == [(0, 2, 2), (1, 2, 2)]


def test_all_gpus_yaml_needs_a_gpu_if_no_number_is_requested() -> None:
    """torchrun counts the GPUs. If there is none, it fails instead of falling back to one process."""
    process = start("all_gpus.yaml")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Cuda is not available" in stderr


def test_multi_node_yaml_connects_the_machines() -> None:
    """Two launchers on this machine emulate two machines with one process each."""
    port = free_port()
    flags = ("--num_processes", "2", "--main_process_ip", "127.0.0.1")
    machines = [start("multi_node.yaml", *flags, "--machine_rank", str(rank), port=port) for rank in range(2)]
    assert worlds(*machines) == [(0, 2, 2), (1, 2, 2)]


def test_multi_cpu_still_starts_a_single_process(tmp_path: Path) -> None:
    """If this fails, Accelerate has fixed MULTI_CPU, and cpu_processes.yaml can be simpler."""
    text = (LAUNCH / "cpu_processes.yaml").read_text()
    (tmp_path / "multi_cpu.yaml").write_text(text.replace("type: MULTI_GPU", "type: MULTI_CPU"))
    assert worlds(start(str(tmp_path / "multi_cpu.yaml"))) == [(0, 1, 1)]

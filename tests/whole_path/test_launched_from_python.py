"""`ddp_trainer.launch` stops its processes cleanly, and ignores the user's Accelerate configuration."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ddp_trainer
from ddp_trainer.distributed.launch import ONE_MACHINE
from ddp_trainer.run.api import START_LAUNCHER
from tests.support.processes import is_alive, wait_until
from tests.support.trainer import SEVERAL, environment, wait_for_epochs


@pytest.mark.parametrize(("processes", "has_stderr"), [(1, True), (2, False)])
def test_ctrl_c_stops_launched_processes_and_returns_a_preempted_run(
    processes: int, has_stderr: bool, tiny_dir: Path, tmp_path: Path
) -> None:
    child, _ = launch_endless(processes, tiny_dir, tmp_path)
    if not has_stderr:  # as if Ctrl-C had also ended a program that reads the output, such as tee
        assert child.stderr is not None
        child.stderr.close()
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=120)
    assert stdout == "preempted True\n", stderr


@pytest.mark.parametrize(
    "launcher",
    [
        ("-c", START_LAUNCHER, *ONE_MACHINE, "--num_processes", "1"),
        ("-m", "accelerate.commands.launch", *SEVERAL, "--num_processes", "2"),  # the command that a report prints
    ],
)
def test_the_accelerate_configuration_of_the_user_has_no_effect(launcher: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    configuration = "distributed_type: FSDP\nuse_cpu: true\ngpu_ids: '0'\n"
    (tmp_path / "accelerate" / "default_config.yaml").write_text(configuration)
    done = subprocess.run(
        [sys.executable, *launcher, "--no_python", "env"],  # prints the environment of the processes
        env=environment(HF_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="1,2"),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()
    assert "CUDA_VISIBLE_DEVICES=1,2" in started
    assert not {"ACCELERATE_USE_FSDP=true", "ACCELERATE_USE_CPU=True"} & set(started)


@pytest.mark.parametrize("processes", [1, 2])
def test_launched_processes_save_and_stop_when_the_calling_process_is_killed(
    processes: int, tiny_dir: Path, tmp_path: Path
) -> None:
    child, out = launch_endless(processes, tiny_dir, tmp_path)
    child.kill()
    wait_until(lambda: '"preempted"' in (out / "status.json").read_text(), "the run did not stop", seconds=120)
    child.communicate()


def test_a_launched_run_that_fails_raises_an_error(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the run failed with exit status"):
        ddp_trainer.launch(
            "smoke", num_processes=1, device="cpu", data_dir=tiny_dir, out=tmp_path / "run", network="nowhere:build"
        )
    assert not (tmp_path / "run").exists()


# Starts a command that ignores SIGTERM, as `launch` starts a launcher, and sends SIGINT to itself twice.
IGNORES_SIGTERM = """
import signal, sys, threading, time
from ddp_trainer.run.api import _run_shown
child = '''import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(60)
'''
class Output:
    def write(self, line):
        print(line, end="", flush=True)
        threading.Thread(target=interrupt).start()
    def flush(self):
        pass
def interrupt():
    for _ in range(2):
        time.sleep(1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.stderr = Output()
try:
    _run_shown([sys.executable, "-c", child])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_second_ctrl_c_kills_the_launcher() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IGNORES_SIGTERM], env=environment(), text=True, capture_output=True, timeout=40
    )
    pid, said = done.stdout.splitlines()
    assert (done.returncode, said) == (0, "interrupted")
    assert not is_alive(int(pid)), "the launcher was not killed"


def launch_endless(processes: int, tiny_dir: Path, tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    """Starts a process that launches a long run, and waits for its first epoch."""
    out, settings = tmp_path / "run", "device='cpu', widths=(4, 4, 4, 4), epochs=1000, max_steps=100_000"
    program = f"""if True:
        import ddp_trainer
        result = ddp_trainer.launch(
            "smoke", num_processes={processes}, data_dir={str(tiny_dir)!r}, out={str(out)!r}, {settings}
        )
        print(result.state, len(list(result.path.glob("checkpoints/step-*"))) > 0)"""
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # children inherit an ignored SIGINT
    )
    wait_for_epochs(out, child)
    return child, out

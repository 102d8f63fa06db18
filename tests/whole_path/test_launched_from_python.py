"""When the calling process is stopped, the processes that `ddp_trainer.launch` started save a checkpoint and stop."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import wait_until
from tests.support.trainer import environment, wait_for_epochs


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


@pytest.mark.parametrize("processes", [1, 2])
def test_launched_processes_save_and_stop_when_the_calling_process_is_killed(
    processes: int, tiny_dir: Path, tmp_path: Path
) -> None:
    child, out = launch_endless(processes, tiny_dir, tmp_path)
    child.kill()
    wait_until(lambda: '"preempted"' in (out / "status.json").read_text(), "the run did not stop", seconds=120)
    child.communicate()


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

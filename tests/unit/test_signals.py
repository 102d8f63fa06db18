"""Signals ask a run to stop, whatever stderr does and however the process was started."""

import os
import signal
import subprocess
import sys
import time

from tests.support.trainer import REPOSITORY, environment


def test_second_signal_ends_the_process_at_once() -> None:
    """The first signal is SIGINT, as after Ctrl-C, so the hint about Ctrl-C is printed."""
    code = """
import os, signal, time
from ddp_trainer.distributed import signals
signals.SAME_REQUEST_SECONDS = 1
stop = signals.StopRequest()
with stop.listening():
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.pending
    os.kill(os.getpid(), signal.SIGUSR2)  # the same request, because it arrives within 1 s
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGXCPU)  # never a second request, because the kernel repeats this signal
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), timeout=60, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "\nstopping after the current step; press Ctrl-C again to stop at once\n"


def test_second_ctrl_c_raises_keyboard_interrupt_once_if_the_process_must_stay_alive() -> None:
    code = """
import os, signal, time
from ddp_trainer.distributed import signals
signals.SAME_REQUEST_SECONDS = 0.2
stop = signals.StopRequest(keeps_process=True)
caught = 0
with stop.listening():
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.pending
    for wait in (0.3, 1, 1):
        time.sleep(wait)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            caught += 1
print(caught)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_ctrl_c_with_a_full_stderr_does_not_block_later_signals() -> None:
    """A paused reader of a pipe lets it fill up. The hint about Ctrl-C is then left out."""
    code = """
import fcntl, os, signal, time
from ddp_trainer.distributed import signals
signals.SAME_REQUEST_SECONDS = 0.2
os.set_blocking(2, False)
try:
    while True:
        os.write(2, bytes(4096))
except BlockingIOError:
    os.set_blocking(2, True)
with signals.StopRequest().listening():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
"""
    reader, writer = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), timeout=60, stderr=writer)
    os.close(reader)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGTERM


def test_a_signal_that_was_blocked_at_the_start_asks_to_stop() -> None:
    code = """
import os, signal
from ddp_trainer.distributed.signals import StopRequest
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
stop = StopRequest()
with stop.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.pending
assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), timeout=60, check=True)


def test_a_repeated_signal_does_not_change_the_exit_status_of_a_finished_process() -> None:
    code = """
import atexit, sys, time
from ddp_trainer.distributed.process_end import exit_process
def wait():
    print("ending", flush=True)
    time.sleep(1)
atexit.register(wait)
exit_process(0)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.05)
    assert process.returncode == 0

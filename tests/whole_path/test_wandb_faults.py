"""W&B that is unreachable, misused, dead or frozen: the training goes on, and nobody waits for long."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.run_directories import make_run
from tests.support.tracked_runs import KEY, holds, record, track
from tests.support.trainer import environment, read_lines
from tests.support.wandb_file import of_kind, read_history, read_records


def test_results_that_cannot_be_logged_cost_a_line_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "predictions.npz").write_bytes(b"damaged")
    _, said, code = track(tmp_path / "run", [1])
    assert (code, said.count("warning")) == (0, 1)
    assert "predictions.npz" in said
    assert read_history(tmp_path / "run") == [record(1)]
    assert [end.exit_code for end in of_kind(read_records(tmp_path / "run"), "exit")] == [0]


@pytest.fixture(scope="module")
def silent_server() -> Iterator[int]:
    """A port where somebody accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    kept.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("server", ["refused", "silent", "short key"])
def test_no_server_or_no_good_key_means_a_line_and_offline(tmp_path: Path, silent_server: int, server: str) -> None:
    port = silent_server if server == "silent" else 9
    env = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "short" if server == "short key" else KEY}
    started = time.monotonic()
    run_dir = tmp_path / "run"
    _, said, code = track(run_dir, [1, 2], env=env, settings={"wandb": "auto"})
    assert code == 0
    assert time.monotonic() - started < 75
    assert len([line for line in said.splitlines() if line.startswith("warning: W&B online does not work")]) == 1
    assert "Traceback" not in said
    assert read_history(run_dir)[:2] == [record(1), record(2)]
    assert [folder.name[:11] for folder in run_dir.glob("wandb/*run-20*")] == ["offline-run"]
    assert holds(run_dir, KEY) == []


FROZEN = """
import os, signal, subprocess, sys
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True)
from ddp_trainer import tracking, wandb_mirror
from ddp_trainer.config import TrackingConfig
wandb_mirror.GIVE_UP_SECONDS = 2
tracker = tracking.build_tracker(TrackingConfig(wandb="offline"), run_dir=Path(sys.argv[1]), config={})
for listing in Path("/proc/self/task").glob("*/children"):
    for pid in map(int, listing.read_text().split()):
        os.kill(pid, getattr(signal, sys.argv[2]))
tracker.log_epoch({"epoch": 1, "step": 1})
tracker.finish(None)
print("done")
"""


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_dead_or_frozen_wandb_service_holds_nobody_up(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, str(tmp_path), name],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "warning: W&B" in done.stderr
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1

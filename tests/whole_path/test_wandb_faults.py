"""If W&B is unreachable, misconfigured, slow, dead or frozen, the run continues after a limited wait."""

import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddp_trainer.tracking import wandb_mirror
from tests.support.run_directories import make_run
from tests.support.tracked_runs import KEY, holds, track
from tests.support.trainer import environment, read_lines
from tests.support.wandb_file import of_kind, read_history, read_records


def test_results_that_cannot_be_logged_cause_one_warning(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "predictions.npz").write_bytes(b"damaged")
    _, said, code = track(tmp_path / "run", [1])
    assert (code, said.count("warning")) == (0, 1)
    assert "predictions.npz" in said
    assert [row["epoch"] for row in read_history(tmp_path / "run") if "epoch" in row] == [1]
    assert [end.exit_code for end in of_kind(read_records(tmp_path / "run"), "exit")] == [0]


@pytest.fixture(scope="module")
def silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
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


@pytest.mark.parametrize("problem", ["refused connection", "silent server", "short key"])
def test_without_a_server_or_a_valid_key_the_run_is_offline(tmp_path: Path, silent_server: int, problem: str) -> None:
    port = silent_server if problem == "silent server" else 9
    env = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "short" if problem == "short key" else KEY}
    started = time.monotonic()
    run_dir = tmp_path / "run"
    _, said, code = track(run_dir, [1, 2], env=env, settings={"wandb": "auto"})
    assert code == 0
    assert time.monotonic() - started < 75
    assert len([line for line in said.splitlines() if line.startswith("warning: W&B does not work in online")]) == 1
    assert "Traceback" not in said
    assert [row["epoch"] for row in read_history(run_dir) if "epoch" in row] == [1, 2]
    assert [folder.name[:11] for folder in run_dir.glob("wandb/*run-20*")] == ["offline-run"]
    assert holds(run_dir, KEY) == []


FROZEN = """
import os, signal, subprocess, sys
from pathlib import Path
from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking import tracker, wandb_mirror
wandb_mirror.GIVE_UP_SECONDS = 2
tracker = tracker.build_tracker(TrackingConfig(wandb="offline"), run_dir=Path(sys.argv[1]), config={})
for listing in Path("/proc/self/task").glob("*/children"):
    for pid in map(int, listing.read_text().split()):
        os.kill(pid, getattr(signal, sys.argv[2]))
for step in range(1, 1 + int(sys.argv[3])):
    tracker.log_step({"epoch": 1, "step": step, "train_loss": 1.0})
tracker.log_epoch({"epoch": 1, "step": step})
tracker.finish(None)
print("done")
"""


@pytest.mark.parametrize(("name", "steps"), [("SIGSTOP", 1), ("SIGSTOP", 3000), ("SIGKILL", 1)])
def test_a_dead_or_frozen_wandb_service_causes_one_warning_after_a_limited_wait(
    tmp_path: Path, name: str, steps: int
) -> None:
    """After a few hundred records, the socket to a frozen service is full.

    Without a time limit, the next call to W&B would then block forever.
    """
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, str(tmp_path), name, str(steps)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.startswith("warning: W&B")
    assert done.stderr.count("warning") == 1
    assert "Traceback" not in done.stderr
    assert len(read_lines(tmp_path / "steps.jsonl")) == steps
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


class StalledUploads(BaseHTTPRequestHandler):
    """A server that accepts new W&B runs but never answers an upload of records."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/graphql":
            project = {"name": "ddp-trainer", "entity": {"name": "me"}}
            run = {"id": "1", "name": json.loads(body)["variables"].get("name"), "project": project}
            files = {"runID": "1", "uploadHeaders": [], "files": []}
            answer = {"data": {"upsertBucket": {"bucket": run, "inserted": True}, "createRunFiles": files}}
            self.send_response(200)
            self.send_header("Content-Length", str(len(json.dumps(answer))))
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())
        else:
            self.rfile.read(1)  # until W&B closes the connection

    def log_message(self, format: str, *args: object) -> None:
        return


UNFINISHED = """
import sys
from pathlib import Path
from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking import tracker, wandb_mirror
wandb_mirror.FINISH_SECONDS = 1
tracker = tracker.build_tracker(TrackingConfig(wandb="online"), run_dir=Path(sys.argv[1]), config={})
tracker.log_epoch({"epoch": 1, "step": 1})
tracker.finish(None)
print("done")
"""


def test_an_upload_that_does_not_end_causes_one_warning_with_a_command_that_uploads_the_rest(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StalledUploads)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = environment(WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}", WANDB_API_KEY=KEY, NETRC="/nonexistent")
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED, str(tmp_path)], capture_output=True, text=True, env=env, timeout=60
    )
    server.shutdown()
    server.server_close()
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "W&B was not closed properly" in warning
    command = [sys.executable, "-m", *shlex.split(warning.partition("run ")[2].rstrip(")")), "--dry-run"]
    listed = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert "Would sync 1 run" in listed.stderr, "the command would upload nothing"


def test_a_run_that_is_resumed_to_complete_its_report_sends_its_results_only_once(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an online run is resumed, W&B loads the summary that the server has."""
    sent: list[Any] = []
    monkeypatch.setattr(wandb_mirror, "log_results", lambda run, found: sent.append(found))
    mirror = object.__new__(wandb_mirror.WandBMirror)  # without W&B
    run = SimpleNamespace(summary={}, finish=lambda exit_code: None)
    mirror._run, mirror._run_dir = run, smoke_run
    for accuracy in (0.5, 0.5, 0.6):  # 0.6: after a resume with a larger --max-steps
        mirror.finish({"test_accuracy": accuracy}, failed=False)
    assert len(sent) == 2
    assert run.summary == {"final/test_accuracy": 0.6}

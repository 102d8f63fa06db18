"""Records arrive once each, whatever happens to W&B: real offline runs, read back from their files."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, read_lines

from ddp_trainer.tracking import NullTracker, RunTracker, build_tracker
from ddp_trainer.wandb_service import bounded, choose_run_id, has_credentials, resolve_mode

KEY = "0123456789" * 4
MARKER = "marker-5e7d1c"


def record(epoch: int) -> dict[str, float | int]:
    return {
        "epoch": epoch, "step": 3 * epoch, "train_loss": 2.0 / epoch, "train_accuracy": 0.1 * epoch,
        "test_loss": 1.5 / epoch, "test_accuracy": 0.9 if epoch == 2 else 0.5, "test_correct": 5, "test_total": 10,
        "learning_rate": 0.1, "seconds": 1.5, "images_per_second": 100.0,
    }


# A training as far as tracking is concerned: epochs FIRST..LAST, resumed where FIRST > 1.
TRAINING = """
import json, sys
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True)
from ddp_trainer.tracking import build_tracker
given = json.loads(sys.argv[1])
tracker = build_tracker(
    ["wandb"], run_dir=Path(given["run_dir"]), config={"settings": {"seed": 7}}, wandb_mode=given["mode"],
    history=given["history"], state=given["state"])
for record in given["records"]:
    tracker.log_epoch(record)
print(json.dumps(tracker.state()))
if given["end"] == "crash":
    import os
    sys.stdout.flush()
    os._exit(9)
tracker.finish({"test_accuracy": 0.5} if given["end"] == "complete" else None, failed=given["end"] == "failed")
"""


def track(run_dir: Path, epochs: list[int], **given: Any) -> tuple[dict[str, str], str, int]:
    """-> (tracker's state, stderr, exit code) of a process of its own."""
    env = given.pop("env", {})
    history = [record(epoch) for epoch in given.pop("history", [])]
    job = {"run_dir": str(run_dir), "mode": "auto", "state": {}, "end": "complete", "history": history,
           "records": [record(epoch) for epoch in epochs], **given}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, json.dumps(job), f"--secret={MARKER}"], capture_output=True, text=True,
        env=environment(**{"NETRC": "/nonexistent", **env}), timeout=120,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, done.returncode


def stored(run_dir: Path) -> list[Any]:
    """The records of the only W&B file below `run_dir`, in W&B's own message type.

    The file: 7 bytes of header, then LevelDB's log format, blocks of 32 KiB with pieces of records behind a header
    of checksum, length and type (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    (file,) = run_dir.rglob("*.wandb")
    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole = (b"" if kind in (1, 2) else whole) + data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(whole))
    return found


def logged(run_dir: Path) -> list[dict[str, float]]:
    """What was logged to W&B, without its own columns."""
    rows = [entry.history for entry in stored(run_dir) if entry.WhichOneof("record_type") == "history"]
    return [
        {
            name: json.loads(item.value_json)
            for item in row.item
            if not (name := item.key or "/".join(item.nested_key)).startswith("_")
        }
        for row in rows
    ]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    state, said, code = track(run_dir, [1, 2, 3], env={"WANDB_NOTES": "", "SOME_TOKEN": MARKER}, mode="offline")
    assert code == 0
    assert "warning" not in said
    assert state["wandb_run_id"]
    return run_dir


def test_every_epoch_is_in_the_lines_and_in_wandb_once(offline_run: Path) -> None:
    expected = [record(epoch) for epoch in (1, 2, 3)]
    assert read_lines(offline_run / "metrics.jsonl") == expected
    assert logged(offline_run) == expected


def test_wandb_knows_axes_the_best_accuracy_the_settings_and_the_end(offline_run: Path) -> None:
    entries = stored(offline_run)
    metrics = {entry.metric.name: entry.metric for entry in entries if entry.WhichOneof("record_type") == "metric"}
    assert metrics["test_accuracy"].summary.max
    assert metrics["test_accuracy"].step_metric == "epoch"
    assert {"epoch", "step", "train_loss", "test_loss", "learning_rate"} <= set(metrics)
    text = b"".join(entry.SerializeToString() for entry in entries)
    assert b"final/test_accuracy" in text
    assert b'"seed": 7' in text or b'"seed":7' in text
    assert [entry.exit.exit_code for entry in entries if entry.WhichOneof("record_type") == "exit"] == [0]
    assert len([entry for entry in entries if entry.WhichOneof("record_type") == "run"]) >= 1


@pytest.mark.parametrize("end", ["failed", "crash"])
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, end: str) -> None:
    """Epoch 2 was logged before the end but is not in the checkpoint: it is trained and logged again."""
    state, _, _ = track(tmp_path, [1, 2], end=end, mode="offline")
    again, _, code = track(tmp_path, [2, 3], history=[1], state=state, mode="offline")
    assert (again, code) == (state, 0)
    expected = [record(epoch) for epoch in (1, 2, 3)]
    assert read_lines(tmp_path / "metrics.jsonl") == expected
    assert logged(tmp_path) == expected


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_id(tmp_path: Path) -> None:
    state, _, _ = track(tmp_path, [1], end="crash", mode="offline")
    again, _, _ = track(tmp_path, [1, 2], mode="offline")
    assert again == state
    assert logged(tmp_path) == [record(1), record(2)]


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
    key = "short" if server == "short key" else KEY
    started = time.monotonic()
    _, said, code = track(tmp_path, [1, 2], env={"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": key})
    assert code == 0
    assert time.monotonic() - started < 75
    assert len([line for line in said.splitlines() if line.startswith("warning: W&B online does not work")]) == 1
    assert "Traceback" not in said
    assert logged(tmp_path) == [record(1), record(2)]
    assert [folder.name[:11] for folder in tmp_path.glob("wandb/*run-20*")] == ["offline-run"]
    assert not holds(tmp_path, KEY)


def holds(folder: Path, secret: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def test_no_file_holds_a_key_the_environment_or_the_command_line(offline_run: Path, tmp_path: Path) -> None:
    assert holds(offline_run, MARKER) == []
    track(tmp_path, [1], mode="offline", env={"WANDB_API_KEY": KEY, "SOME_TOKEN": MARKER})
    assert holds(tmp_path, KEY) + holds(tmp_path, MARKER) == []


@pytest.mark.parametrize(
    ("env", "wanted", "mode"),
    [
        ({}, "auto", "offline"),
        ({"WANDB_API_KEY": KEY}, "auto", "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_MODE": "disabled"}, "auto", "disabled"),
        ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_MODE": "disabled"}, "offline", "offline"),
    ],
)
def test_the_mode(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], wanted: str, mode: str) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(wanted) == mode


def test_a_login_in_the_netrc_file_counts_for_its_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    file.chmod(0o600)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(file))
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_credentials()


def test_disabled_leaves_the_lines_alone(tmp_path: Path) -> None:
    tracker = build_tracker(["wandb"], run_dir=tmp_path, config={}, wandb_mode="disabled", history=[record(1)])
    tracker.log_epoch(record(2))
    assert read_lines(tmp_path / "metrics.jsonl") == [record(1), record(2)], "each line is flushed"
    tracker.finish(None)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert tracker.state() == {}


def test_a_mirror_that_fails_is_dropped_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        calls = 0

        def log_epoch(self, record: object) -> None:
            self.calls += 1
            raise ConnectionResetError("Connection lost")

        def finish(self, summary: object, *, failed: bool) -> None:
            raise AssertionError("it is gone")

    from ddp_trainer.metric_files import JsonLines

    broken = Broken()
    tracker = RunTracker(JsonLines(tmp_path / "metrics.jsonl", ()), {"W&B": broken}, {})
    tracker.log_epoch(record(1))
    tracker.log_epoch(record(2))
    tracker.finish({})
    assert broken.calls == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    assert capfd.readouterr().err.count("Connection lost") == 1


FROZEN = """
import os, signal, subprocess, sys
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True)
import ddp_trainer.tracking as tracking
tracking.GIVE_UP_SECONDS = 2
tracker = tracking.build_tracker(["wandb"], run_dir=Path(sys.argv[1]), config={}, wandb_mode="offline")
for listing in Path("/proc/self/task").glob("*/children"):
    for pid in map(int, listing.read_text().split()):
        os.kill(pid, getattr(signal, sys.argv[2]))
tracker.log_epoch({"epoch": 1, "step": 1})
tracker.finish(None)
print("done")
"""


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_dead_or_frozen_wandb_service_holds_nobody_up(tmp_path: Path, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", FROZEN, str(tmp_path), name], capture_output=True, text=True,
                          env=environment(), timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "warning: W&B" in done.stderr
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert signal.Signals[name]


def test_tensorboard_shows_each_epoch_once_after_a_resume(tmp_path: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; from ddp_trainer.tracking import build_tracker\n"
        "jobs = json.loads(sys.argv[2])\n"
        "for history, records in jobs:\n"
        "    t = build_tracker(['tensorboard'], run_dir=Path(sys.argv[1]), config={}, wandb_mode='auto',\n"
        "                      history=history)\n"
        "    [t.log_epoch(r) for r in records]; t.finish(None)\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1] + '/tensorboard'); events.Reload()\n"
        "print([(e.step, round(e.value, 4)) for e in events.Scalars('train_loss')])\n"
    )
    pytest.importorskip("tensorboard")
    jobs = json.dumps([[[], [record(1), record(2)]], [[record(1)], [record(2)]]])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), jobs], capture_output=True, text=True,
                          env=environment(), timeout=60)  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[(3, 2.0), (6, 1.0)]"], done.stderr


def test_missing_tensorboard_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.errors import InputError

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        build_tracker(["tensorboard"], run_dir=tmp_path, config={}, wandb_mode="auto")


def test_bounded_work_raises_its_own_error_and_gives_up_in_time() -> None:
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: print(1 / 0), 5)
    started, release = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError):
        bounded(lambda: print(release.wait(30)), 0.2)
    release.set()
    assert time.monotonic() - started < 5


def test_the_id_of_the_checkpoint_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    path = tmp_path / "wandb" / "run-id"
    first = choose_run_id(path, None)
    assert choose_run_id(path, None) == first
    assert choose_run_id(path, "saved") == choose_run_id(path, None) == "saved"


def test_silent_ranks_write_nothing() -> None:
    tracker = NullTracker()
    tracker.log_epoch(record(1))
    tracker.finish({})
    assert tracker.state() == {}

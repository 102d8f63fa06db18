"""Several runs: names of their folders, several runs in one process, and a dataset that changes during a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import InputError
from ddp_trainer.run.lock import lock_folder, new_folder
from tests.support.trainer import NARROW, environment, run, start, wait_for_epochs

WORDS = ("smoke", "--device", "cpu")


@pytest.mark.parametrize("module", ["ddp_trainer.train", "ddp_trainer.lr_find"])
def test_a_folder_name_with_a_line_break_is_refused(module: str, tmp_path: Path) -> None:
    done = run(module, *WORDS, "--out", tmp_path / "one\ntwo")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "--out must have no line breaks" in done.stderr
    assert not list(tmp_path.iterdir())


def test_folders_created_in_the_same_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({new_folder("smoke") for _ in range(4)}) == 4
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_a_dangling_link_named_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "purged")
    with pytest.raises(InputError, match=r"runs/smoke-.* cannot be created"):
        new_folder("smoke")


def test_lr_find_refuses_a_folder_that_another_run_is_using(tiny_dir: Path, tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    done = run("ddp_trainer.lr_find", *WORDS, "--data-dir", tiny_dir, "--out", tmp_path)
    held.close()
    assert done.returncode == 2
    assert "another run is using this folder" in done.stderr


CELLS = """
import os, signal, sys, threading
import torch
from ddp_trainer.train import main

base = [*sys.argv[2:], "--widths", "8", "8", "16", "16", "--max-steps", "1", "--out"]
torch.set_num_threads(1)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

def settings():
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "random": torch.get_rng_state().sum().item(),
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in SIGNALS],
        "wakeup": signal.set_wakeup_fd(-1),
        "alive": [thread.name for thread in threading.enumerate()],
    }

before = settings()
assert main([*base, sys.argv[1] + "/a", "--precision", "fp32", "--deterministic"]) == 0
assert main([*base, sys.argv[1] + "/b", "--precision", "bf16"]) == 0
assert main([*base, sys.argv[1] + "/c", "--batch-size", "0"]) == 2
thread = threading.Thread(target=lambda: codes.append(main([*base, sys.argv[1] + "/d", "--precision", "fp32"])))
codes = []
thread.start()
thread.join()
assert codes == [0]
after = settings()
assert after == before, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_main_restores_what_it_changes_and_can_run_in_a_thread(tiny_dir: Path, tmp_path: Path) -> None:
    """Emulates a notebook with two runs, a run in a thread, and an interrupt of a later cell."""
    done = subprocess.run(
        [sys.executable, "-c", CELLS, str(tmp_path), *WORDS, "--data-dir", str(tiny_dir)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert done.stderr.count("signals are not handled") == 1


def _start_streaming_run(data: Path, out: Path) -> subprocess.Popen:
    words = ("--epochs", "5000", "--batch-size", "16", "--max-steps", "30000", "--data-mode", "stream")
    process = start(NARROW, *WORDS, "--data-dir", data, "--out", out, *words)
    wait_for_epochs(out, process)
    return process


def test_a_run_continues_if_its_dataset_is_touched_or_replaced_by_a_copy(tiny_dir: Path, tmp_path: Path) -> None:
    data, out = Path(shutil.copytree(tiny_dir, tmp_path / "data")), tmp_path / "run"
    process = _start_streaming_run(data, out)
    for change in ("touch", "copy"):
        for beton in data.glob("*.beton"):
            if change == "touch":
                os.utime(beton)
            else:
                shutil.copyfile(beton, tmp_path / "copy")
                (tmp_path / "copy").replace(beton)
        wait_for_epochs(out, process, len((out / "metrics.jsonl").read_text().splitlines()) + 3)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr


def test_a_run_saves_a_checkpoint_and_fails_if_its_dataset_changes(tiny_dir: Path, tmp_path: Path) -> None:
    data, out = Path(shutil.copytree(tiny_dir, tmp_path / "data")), tmp_path / "run"
    process = _start_streaming_run(data, out)
    content = bytearray((data / "train.beton").read_bytes())
    content[-1] ^= 1
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "other").replace(data / "train.beton")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert stderr.splitlines()[-1].startswith("error: ")
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed"
    assert (out / "checkpoints" / f"step-{status['step']:08d}").is_dir()

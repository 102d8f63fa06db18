"""Problems with a run directory: the message gives the actual reason, and no record is lost."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.dataset import write_dataset
from data_prep.errors import InputError
from data_prep.sources.synthetic import draw_synthetic
from ddp_trainer.run import checkpoint
from ddp_trainer.run.checkpoint import FORMAT_VERSION, MANIFEST, list_checkpoints, write_checkpoint
from ddp_trainer.run.checkpoint_saver import CheckpointSaver
from ddp_trainer.run.directory import RunDirectory
from ddp_trainer.run.lock import lock_folder
from ddp_trainer.run.settings import changed_settings
from tests.support.folders import checksums
from tests.support.trainer import NARROW, Finished, environment, fork, run, train

WORDS = ("smoke", "--device", "cpu")


@pytest.fixture(scope="module")
def short_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, with two checkpoints."""
    out = tmp_path_factory.mktemp("short") / "run"
    train("--data-dir", tiny_dir, "--out", out, "--max-steps", "4", "--checkpoint-every-steps", "1", module=NARROW)
    return out


@pytest.fixture
def copied_run(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run, tmp_path / "run"))


def resume(data: Path, out: Path, *words: str, steps: int = 6) -> Finished:
    return fork(*WORDS, "--data-dir", data, "--out", out, "--resume", "--max-steps", str(steps), *words)


def assert_refused(data: Path, out: Path, problem: str, *words: str) -> None:
    before = checksums(out)
    done = resume(data, out, *words)
    assert done.returncode == 2, done.stderr
    assert problem in done.stderr.splitlines()[-1]
    assert checksums(out) == before, "a file has changed"


# Modules that Python imports at startup. They emulate a file system without locks, and one without fsync.
WITHOUT_LOCKS = """
import errno, fcntl, os
def flock(*arguments): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""
WITHOUT_SYNC = """
import errno, os
def fsync(handle):
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
os.fsync = fsync
"""


@pytest.mark.parametrize("lack", [WITHOUT_LOCKS, WITHOUT_SYNC])
def test_a_file_system_without_locks_or_without_sync_can_be_used(lack: str, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(lack)
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    out = tmp_path / "run"
    done = run(NARROW, *WORDS, "--data-dir", tiny_dir, "--out", out, "--max-steps", "2", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    if lack == WITHOUT_LOCKS:
        assert warnings == [
            f"warning: {out} cannot be locked (Function not implemented); make sure that no other run uses this folder"
        ]
    else:
        assert warnings == []
    assert len(list_checkpoints(out / "checkpoints")) == 1


def test_a_folder_that_another_run_is_using_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run"), pytest.raises(InputError, match="another run is using this folder"):
        lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "run").close()


def test_an_old_checkpoint_that_cannot_be_removed_does_not_make_a_save_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_removal(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    saver = CheckpointSaver(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        for step in (1, 2, 3):
            saver.save({"step": step}, step=step)
            saver.wait()
            patch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: options or refuse_removal(path))
        saver.close()
    assert list_checkpoints(tmp_path)[0].name == "step-00000003"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "cannot be removed" in warnings[0]


def test_an_old_checkpoint_that_cannot_be_renamed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """overlayfs, for example, cannot rename a folder of a lower layer."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.startswith("step-"):
            raise OSError(18, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    saver = CheckpointSaver(tmp_path, keep=1)
    for step in (1, 2, 2):
        saver.save({"step": step}, step=step)
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert (tmp_path / "step-00000002" / MANIFEST).exists()


def test_a_full_disk_while_weights_are_saved_gives_one_line_and_no_partial_file(tmp_path: Path, tiny_dir: Path) -> None:
    """A run with all steps done but no weights is resumed, with a file size limit that is too small for the weights.

    The run ends with an epoch, so the resumed run saves no checkpoint, which would be even larger.
    """
    out = tmp_path / "run"

    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def train(preparation: Callable[[], None] | None) -> subprocess.CompletedProcess[str]:
        words = (*WORDS, "--data-dir", str(tiny_dir), "--out", str(out), "--resume", "--max-steps", "3")
        command = [sys.executable, "-m", NARROW, *words]
        return subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=120, preexec_fn=preparation
        )

    assert train(None).returncode == 0
    for name in ("summary.json", "model.safetensors"):
        (out / name).unlink()
    done = train(full_disk)
    assert done.returncode == 1, done.stderr
    assert f"error: cannot write {out / 'model.safetensors'}: " in done.stderr.splitlines()[-1]
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    assert [path.name for path in out.glob(".*")] == [".lock"]


def test_a_resume_removes_the_temporary_files_of_a_killed_process(copied_run: Path, tiny_dir: Path) -> None:
    stray = copied_run / f".model.safetensors.{'0' * 16}"
    stray.write_bytes(b"part")
    (copied_run / ".my-notes").write_text("kept")
    assert resume(tiny_dir, copied_run).returncode == 0
    assert not stray.exists()
    assert (copied_run / ".my-notes").exists()


def rewrite(run_dir: Path, change: Callable[[dict], object], *, version: int = checkpoint.FORMAT_VERSION) -> None:
    """Changes every checkpoint of a run into one that another release might have written."""
    before = checkpoint.FORMAT_VERSION
    for place in list_checkpoints(run_dir / "checkpoints"):
        state = torch.load(place / "state.pt", weights_only=True)
        change(state)
        checkpoint.FORMAT_VERSION = version
        write_checkpoint(place, state, step=state["step"])
        checkpoint.FORMAT_VERSION = before


def test_a_dataset_with_other_test_images_or_other_colors_is_refused(
    copied_run: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    write_dataset(draw_synthetic(train_count=96, test_count=41, seed=1), tmp_path / "other")
    assert_refused(tmp_path / "other", copied_run, "test images")
    colors = Path(shutil.copytree(tiny_dir, tmp_path / "colors")) / "dataset.json"
    colors.write_text(json.dumps(json.loads(colors.read_text()) | {"mean": [0.5, 0.5, 0.5]}))
    assert_refused(colors.parent, copied_run, "mean and std")


def test_a_setting_missing_from_an_older_run_has_its_default_value(copied_run: Path, tiny_dir: Path) -> None:
    for name in ("freeze_bn_scale", "test images", "mean and std"):  # config.json still has the last two
        rewrite(copied_run, lambda state, name=name: state["settings"].pop(name))
    assert_refused(tiny_dir, copied_run, "freeze_bn_scale False -> True", "--freeze-bn-scale")
    assert resume(tiny_dir, copied_run).returncode == 0
    assert changed_settings({}, {"ema_decay": 0.0, "cutmix": 0.5}) == [("cutmix", 0.0, 0.5)]


@pytest.mark.parametrize(
    ("change", "version", "problem"),
    [(lambda state: state.pop("sums"), FORMAT_VERSION, "has no sums"), (lambda state: None, 1, "has format 1")],
)
def test_a_checkpoint_of_another_release_is_refused_with_the_actual_reason(
    copied_run: Path, tiny_dir: Path, change: Callable[[dict], object], version: int, problem: str
) -> None:
    rewrite(copied_run, change, version=version)
    config = json.loads((copied_run / "config.json").read_text())
    (copied_run / "config.json").write_text(json.dumps({**config, "git_commit": "0123abcd"}))
    assert_refused(tiny_dir, copied_run, problem)
    assert_refused(tiny_dir, copied_run, "resume with the release that started the run, commit 0123abcd")


def test_a_run_whose_checkpoints_are_gone_is_not_started_again(copied_run: Path, tiny_dir: Path) -> None:
    shutil.rmtree(copied_run / "checkpoints")
    assert_refused(tiny_dir, copied_run, "has done 4 steps, but its checkpoints are gone")
    for name in ("summary.json", "model.safetensors", "metrics.jsonl"):
        (copied_run / name).unlink()
    assert_refused(tiny_dir, copied_run, "has done 4 steps, but its checkpoints are gone")  # the 4 is from status.json
    RunDirectory(copied_run).write_failure(ValueError("a loss is not finite"), step=9, epoch=2, saved_step=7)
    assert_refused(tiny_dir, copied_run, "has done 7 steps, but its checkpoints are gone")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(copied_run: Path, tiny_dir: Path) -> None:
    for path in copied_run.iterdir():
        if path.name not in ("config.json", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copied_run / "status.json").write_text('{"state": "running", "step": 0, "epoch": 0, "message": ""}')
    assert_refused(tiny_dir, copied_run, "peak_lr 0.1 -> 0.05", "--peak-lr", "0.05")
    done = resume(tiny_dir, copied_run)
    assert done.returncode == 0, done.stderr
    assert f"nothing to resume in {copied_run}: starting from the beginning" in done.stderr


@pytest.mark.parametrize("place", ["model.json", "report", "checkpoints/step-00000004/state.pt", "wandb/run-id"])
def test_a_run_directory_with_symbolic_links_is_refused(copied_run: Path, tiny_dir: Path, place: str) -> None:
    link, target = copied_run / place, copied_run.parent / "target"
    link.parent.mkdir(exist_ok=True)
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    target.write_text("not yours")
    link.symlink_to(target)
    assert_refused(tiny_dir, copied_run, f"{link} is a symbolic link")
    assert target.read_text() == "not yours"

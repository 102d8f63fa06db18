"""A run replaces no files of other origin, and a full disk is not taken for wrong input."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import InputError
from ddp_trainer.config import RunConfig, TrainConfig
from ddp_trainer.run.directory import RunDirectory, claim_run_directory
from ddp_trainer.run.files import refuse_existing_run
from ddp_trainer.run.lock import lock_folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [("metrics.jsonl", "file"), ("predictions.npz", "file"), ("model.safetensors", "file"), ("checkpoints", "folder")],
)
def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").touch()
    if kind == "file":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name} must be a {kind}; restore it from a backup, or remove it"):
        refuse_existing_run(tmp_path, resume=True)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("status.json", content) for content in ('{"state": "running", "job": 7}', "[1]", "")),
        *((name, "") for name in ("checkpoints/step-500.ckpt", "predictions.npz")),
    ],
)
def test_files_of_other_origin_are_not_replaced(name: str, content: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="is not a run, but contains"):
        refuse_existing_run(tmp_path, resume=resume)


def test_a_run_that_was_killed_before_it_wrote_its_configuration_may_start_again(tmp_path: Path) -> None:
    RunDirectory(tmp_path).write_status("running")
    for resume in (True, False):
        refuse_existing_run(tmp_path, resume=resume)


def test_a_run_that_lost_its_configuration_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    refuse_existing_run(tmp_path, resume=True)


def test_a_failure_is_recorded_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.write_status("running", step=8, epoch=2, message="a message that is longer than the next one" * 9)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ddp_trainer.run.directory.write_json", fail)
    run_dir.write_failure(OSError("disk full"), step=9, epoch=2, saved_step=8)
    assert run_dir.status == {
        "state": "failed",
        "step": 9,
        "epoch": 2,
        "message": "OSError: disk full",
        "saved_step": 8,
    }


def test_a_folder_that_an_smb_server_has_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(InputError, match="another run is using this folder"):
        lock_folder(tmp_path)


def test_a_file_system_that_forbids_locks_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("fcntl.flock", fail)
    lock_folder(tmp_path).close()
    assert "cannot be locked (Operation not permitted)" in capsys.readouterr().err


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_folder(tmp_path).close()
    monkeypatch.setattr("os.access", lambda path, mode, **options: mode != os.W_OK | os.X_OK)
    with pytest.raises(InputError, match="cannot be written \\(Permission denied\\)"):
        lock_folder(tmp_path)


@pytest.mark.parametrize(
    ("error", "recorded"), [(RuntimeError("lost"), "failed"), (KeyboardInterrupt(), "failed"), (InputError("bad"), "")]
)
def test_a_failure_before_the_first_status_is_recorded_unless_the_input_is_wrong(
    error: BaseException, recorded: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = replace(TrainConfig(), run=RunConfig(out=out))
    with pytest.raises(type(error)), claim_run_directory(config, is_main=True):
        raise error
    if recorded:
        assert RunDirectory(out).status["state"] == recorded
    else:
        assert not out.exists(), "an unused folder was left"


def test_an_early_failure_of_a_resumed_run_keeps_its_epoch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    RunDirectory(tmp_path).write_status("preempted", step=6, epoch=2)
    config = replace(TrainConfig(), run=RunConfig(out=tmp_path, resume=True))
    with pytest.raises(RuntimeError), claim_run_directory(config, is_main=True):
        raise RuntimeError("lost")
    status = RunDirectory(tmp_path).status
    assert (status["state"], status["step"], status["epoch"]) == ("failed", 6, 2)


def test_a_damaged_status_does_not_hide_an_early_failure(tmp_path: Path) -> None:
    for name in ("config.json", "status.json"):
        (tmp_path / name).write_text("[")
    config = replace(TrainConfig(), run=RunConfig(out=tmp_path, resume=True))
    with pytest.raises(RuntimeError, match="lost"), claim_run_directory(config, is_main=True):
        raise RuntimeError("lost")
    assert RunDirectory(tmp_path).status["state"] == "failed"


def test_a_finished_run_stays_finished_if_a_resume_fails_early(tmp_path: Path) -> None:
    RunDirectory(tmp_path).write_status("done", step=6, epoch=2)
    for name in ("summary.json", "config.json"):
        (tmp_path / name).write_text("{}")
    config = replace(TrainConfig(), run=RunConfig(out=tmp_path, resume=True))
    with pytest.raises(RuntimeError), claim_run_directory(config, is_main=True):
        raise RuntimeError("lost")
    assert RunDirectory(tmp_path).status["state"] == "done"


def test_a_full_disk_is_not_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr("os.open", fail)
    with pytest.raises(OSError, match="No space left on device"):
        lock_folder(tmp_path)

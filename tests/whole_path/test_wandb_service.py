"""The mode and the id of a W&B run, and limits on waiting for W&B."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.errors import InputError
from ddp_trainer.tracking.wandb_service import bounded, choose_run_id, has_credentials, keep_run_id, resolve_mode
from tests.support.trainer import run

KEY = "0123456789" * 4


@pytest.mark.parametrize(
    ("env", "in_files", "wanted", "mode"),
    [
        ({}, "online", "auto", "offline"),
        ({"WANDB_API_KEY": KEY}, "online", "auto", "online"),
        ({"WANDB_API_KEY": KEY}, "offline", "auto", "offline"),
        ({"WANDB_API_KEY": KEY}, "dryrun", "auto", "offline"),
        ({}, "disabled", "auto", "disabled"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online", "auto", "offline"),
        ({"WANDB_MODE": "disabled"}, "online", "auto", "disabled"),
        ({"WANDB_MODE": "dryrun"}, "online", "auto", "offline"),
        ({"WANDB_MODE": "online"}, "offline", "auto", "online"),
        ({"WANDB_MODE": "disabled"}, "disabled", "offline", "offline"),
    ],
)
def test_the_mode_depends_on_the_flag_then_wandb_mode_then_the_settings_files_then_the_key(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], in_files: str, wanted: str, mode: str
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    files = SimpleNamespace(mode=in_files, api_key=None, base_url="https://api.wandb.ai")
    assert resolve_mode(wanted, lambda: files) == mode


def test_shared_is_no_valid_mode_in_wandbs_settings_file() -> None:
    """A shared run has no step number."""
    files = SimpleNamespace(mode="shared", api_key="key", base_url="https://api.wandb.ai")
    with pytest.raises(InputError, match=r"settings file must be one of online, offline, .* got shared"):
        resolve_mode("auto", lambda: files)


def test_an_unknown_wandb_mode_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_dir: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(InputError, match=r"WANDB_MODE must be one of online, offline, .* got bogus"):
        resolve_mode("auto", SimpleNamespace)
    arguments = ("smoke", "--data-dir", tiny_dir, "--wandb", "auto", "--out", tmp_path / "run")
    finished = run("ddp_trainer.train", *arguments, env={"WANDB_MODE": "bogus"})
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1), finished.stderr
    assert finished.stderr.startswith("error: WANDB_MODE must be one of")
    assert not (tmp_path / "run").exists()


def test_a_login_in_the_netrc_file_counts_only_for_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    file.chmod(0o600)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(file))
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_credentials()


def test_an_invalid_url_and_a_netrc_file_that_is_not_utf_8_mean_that_there_is_no_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert not has_credentials("http://[::1")
    (tmp_path / "netrc").write_bytes("machine api.wandb.ai login é password x".encode("latin-1"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_credentials()


def test_work_with_a_time_limit_raises_its_own_error_or_a_timeout() -> None:
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: print(1 / 0), 5)
    started, release = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError):
        bounded(lambda: print(release.wait(30)), 0.2)
    release.set()
    assert time.monotonic() - started < 5


def test_the_wandb_id_in_the_checkpoint_has_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "wandb").mkdir()
    first = choose_run_id(tmp_path, None)
    keep_run_id(tmp_path, first)
    assert choose_run_id(tmp_path, None) == first
    assert choose_run_id(tmp_path, "saved") == "saved"


def test_a_damaged_file_with_an_id_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bytes", "folder", "pipe"):
        (tmp_path / name / "wandb").mkdir(parents=True)
    (tmp_path / "bytes" / "wandb" / "run-id").write_bytes(b"\xff")
    (tmp_path / "folder" / "wandb" / "run-id").mkdir()
    os.mkfifo(tmp_path / "pipe" / "wandb" / "run-id")
    monkeypatch.setenv("WANDB_RUN_ID", "named")
    for name in ("bytes", "folder", "pipe", "new"):
        assert choose_run_id(tmp_path / name, None) == "named"

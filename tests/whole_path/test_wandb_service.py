"""Around a W&B run: online or not, its id, and never waiting for long."""

import os
import threading
import time
from pathlib import Path

import pytest

from ddp_trainer.tracking.wandb_service import bounded, choose_run_id, has_credentials, resolve_mode

KEY = "0123456789" * 4


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

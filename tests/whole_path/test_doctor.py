"""The doctor command, on this machine and on machines where something is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_trainer.doctor import disk, main
from tests.support.trainer import REPOSITORY, environment


def ask(*, path: Path | None = None, **changes: str) -> tuple[int, str]:
    """Runs the doctor and returns its exit status and output. Modules in `path` shadow the real ones."""
    found = environment(PYTHONPATH=os.pathsep.join(map(str, filter(None, [path, REPOSITORY]))), **changes)
    done = subprocess.run(
        [sys.executable, "-m", "ddp_trainer.doctor"],
        env=found,
        text=True,
        capture_output=True,
        timeout=240,
        cwd=REPOSITORY,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def line_of(answer: str, name: str) -> str:
    (line,) = [line for line in answer.splitlines() if line[9:].startswith(name + " ")]
    return line


def test_doctor_finds_this_machine_ready_and_prints_no_key() -> None:
    status, answer = ask(WANDB_API_KEY="0123456789abcdefSECRET")
    assert (status, answer.splitlines()[-1]) == (0, "ready to train"), answer
    for name in ("Python", "packages", "torch", "FFCV", "disk", "CPU", "W&B login"):
        assert line_of(answer, name).startswith("ok "), answer
    assert line_of(answer, "W&B login").endswith("yes")
    assert "SECRET" not in answer
    for package in ("g++", "libopencv", "libturbojpeg", "pkg-config", "apt-get"):
        assert package not in answer, "a system package is named, but none is needed"


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.abort()", "crashed (signal 6)"),
    ],
)
def test_doctor_prints_the_fix_for_a_package_that_cannot_be_imported(torch: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(torch)
    status, answer = ask(path=tmp_path)
    lines = answer.splitlines()
    for name in ("torch", "FFCV"):  # FFCV needs torch
        line = line_of(answer, name)
        assert line.startswith("PROBLEM")
        assert reason in line
        assert lines[lines.index(line) + 1].strip() == "fix: rm -r .venv && make setup"
    assert (status, lines[-1]) == (1, "not ready: torch, FFCV")


def test_doctor_runs_without_installed_packages(tmp_path: Path) -> None:
    """Python starts without site-packages, so none of the project's requirements can be imported."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code = f"import sys; sys.executable = {str(bare)!r}; from ddp_trainer.doctor import main; sys.exit(main())"
    done = subprocess.run([bare, "-c", code], env=environment(), text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    for name in ("packages", "torch", "FFCV"):
        assert line_of(done.stdout, name).startswith("PROBLEM")
    fixes = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("fix: ")]
    assert fixes.count("fix: make setup") >= 2
    own = REPOSITORY / ".venv" / "bin" / "python"
    assert (f"fix: {own} -m ddp_trainer.doctor" in fixes) == own.exists()


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_doctor_on_an_older_python_prints_the_supported_versions(version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    command = [python, "-m", "ddp_trainer.doctor"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert "but 3.11 to 3.13 is needed" in done.stdout


def test_arguments_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--fix"])
    assert main() == 2
    assert capsys.readouterr().err == "error: doctor takes no arguments, got --fix\n"


def test_a_deleted_current_folder_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    found = disk()
    assert found.state == "PROBLEM"
    assert found.detail == "the current folder cannot be used: No such file or directory"

"""The doctor, on this machine and on machines that lack something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trainer import REPOSITORY, environment


def ask(*, path: Path | None = None, **changes: str) -> tuple[int, str]:
    """(exit code, what is printed); `path` holds modules that shadow the real ones."""
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


def test_this_machine_can_train_and_no_key_is_printed() -> None:
    code, answer = ask(WANDB_API_KEY="0123456789abcdefSECRET")
    assert (code, answer.splitlines()[-1]) == (0, "training can work here"), answer
    for name in ("Python", "packages", "torch", "FFCV", "disk", "CPU", "W&B login"):
        assert line_of(answer, name).startswith("ok "), answer
    assert line_of(answer, "W&B login").endswith("yes")
    assert "SECRET" not in answer


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.abort()", "crashes (signal 6)"),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_remedy(torch: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(torch)
    code, answer = ask(path=tmp_path)
    lines = answer.splitlines()
    for name in ("torch", "FFCV"):  # FFCV needs torch
        line = line_of(answer, name)
        assert line.startswith("PROBLEM")
        assert told in line
        assert lines[lines.index(line) + 1].strip() == "mend: rm -r .venv && make setup"
    assert (code, lines[-1]) == (1, "training cannot work here yet: torch, FFCV")


def test_a_bare_python_gets_an_answer(tmp_path: Path) -> None:
    """Without site-packages: nothing of what the project needs is installed."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code = f"import sys; sys.executable = {str(bare)!r}; from ddp_trainer.doctor import main; sys.exit(main())"
    done = subprocess.run([bare, "-c", code], env=environment(), text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    for name in ("packages", "torch", "FFCV"):
        assert line_of(done.stdout, name).startswith("PROBLEM")
    assert done.stdout.count("make setup") >= 3

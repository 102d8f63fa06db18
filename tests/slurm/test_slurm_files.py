"""Tests the shell scripts of slurm/, their settings and preflight.py, without a cluster."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from data_prep.errors import InputError
from ddp_trainer import sweep
from ddp_trainer.run.lock import lock_folder, new_folder
from slurm import preflight
from tests.support.trainer import REPOSITORY, environment, run

SCRIPTS = sorted([*REPOSITORY.glob("slurm/*.sh"), *REPOSITORY.glob("scripts/*.sh"), REPOSITORY / ".ci" / "run"])
EXAMPLE = REPOSITORY / "slurm" / "cluster.env.example"


def test_the_example_file_lists_exactly_the_settings_that_the_scripts_use() -> None:
    """DDP_STAGED_FROM is not one of them: a script sets it for the trainer."""
    files = [path for path in (REPOSITORY / "slurm").iterdir() if path.suffix in {".sh", ".py"}]
    used = {name for path in files for name in re.findall(r"\bDDP_\w+", path.read_text())} - {"DDP_STAGED_FROM"}
    assert set(re.findall(r"^# export (DDP_\w+)", EXAMPLE.read_text(), flags=re.MULTILINE)) == used


def test_the_unchanged_example_sets_nothing_and_the_environment_has_priority(tmp_path: Path) -> None:
    show = 'set -a; source "$0"; env | grep -E "^(DDP|SBATCH)_" | sort'

    def settings(file: Path, **environment: str) -> dict[str, str]:
        variables = {"PATH": os.environ["PATH"], "HOME": "/home/me", "USER": "me", **environment}
        shown = subprocess.run(["bash", "-c", show, file], env=variables, text=True, capture_output=True, timeout=60)
        return dict(line.split("=", 1) for line in shown.stdout.splitlines())

    assert settings(EXAMPLE) == {}
    filled_in = tmp_path / "cluster.env"
    filled_in.write_text(re.sub(r"^# (export )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    wanted = settings(filled_in)
    assert wanted["DDP_RUNS_DIR"] == "/scratch/me/runs"
    assert settings(filled_in, **dict.fromkeys(wanted, "mine")) == dict.fromkeys(wanted, "mine")


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.parent.name == "slurm" and path.name != "job.sh"])
def test_a_script_is_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def test_scripts_contain_no_settings_of_a_particular_cluster() -> None:
    for script in SCRIPTS:
        assert not re.search(r"^#SBATCH.*(partition|account|qos|constraint|mail)", script.read_text(), re.MULTILINE)


def script(
    name: str, *arguments: str, cwd: Path = REPOSITORY, variables: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Runs a script. The only variables of SLURM in its environment are those in `variables`."""
    found = environment(DDP_VENV=sys.prefix, **variables)
    command = ["bash", f"slurm/{name}", *arguments]
    return subprocess.run(command, cwd=cwd, env=found, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "message"),
    [
        ("train.sh", (), {}, "this is a job script; submit it: sbatch slurm/train.sh"),
        ("train.sh", (), {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 copies of this script"),
        ("train.sh", ("--sweep", "x"), {"SLURM_JOB_ID": "7"}, "submit the sweep with bash slurm/sweep.sh"),
        (
            "train.sh",
            (),
            {"SLURM_JOB_ID": "7", "DDP_MAX_STALLED": "a[$(id)]"},
            "DDP_MAX_STALLED must be a whole number",
        ),
        ("node.sh", (), {}, "submit the job with: sbatch slurm/train.sh"),
        ("node.sh", (), {"SLURM_JOB_ID": "7"}, "submit the job with: sbatch slurm/train.sh"),
        (
            "sweep.sh",
            ("smoke",),
            {"SLURM_JOB_ID": "7"},
            "leave job 7 and run bash slurm/sweep.sh ... on the login node",
        ),
        ("sweep.sh", ("smoke", "--list"), {}, "--list works only with python -m ddp_trainer.sweep"),
        ("sweep.sh", ("smok", "--", "--time=1"), {}, "unknown recipe 'smok'"),
        ("sweep.sh", ("smoke", "--out"), {}, "expected one argument"),
    ],
)
def test_a_script_that_is_started_wrongly_prints_one_line_that_says_what_is_wrong(
    name: str, arguments: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    done = script(name, *arguments, variables=variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_sweep_help_is_shown_and_submits_nothing() -> None:
    done = script("sweep.sh", "smoke", "--help", variables={})
    assert (done.returncode, done.stderr) == (0, "")
    assert "--seeds" in done.stdout


@pytest.mark.parametrize("name", ["train.sh", "prep.sh", "sweep.sh", "node.sh"])
def test_a_script_started_outside_the_repository_prints_one_error(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", REPOSITORY / "slurm" / name], cwd=tmp_path, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def checkout(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("cluster.env", "__pycache__")
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm", ignore=ignored)
    return folder


def test_windows_line_endings_in_the_settings_are_refused_and_the_printed_fix_works(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    (folder / "slurm" / "cluster.env").write_bytes(b"export DDP_RUNS_DIR=/scratch/runs\r\n")
    done = script("prep.sh", "--help", cwd=folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "Windows line endings" in line
    subprocess.run(["bash", "-c", line.partition("fix: ")[2]], cwd=folder, check=True, timeout=60)
    assert (folder / "slurm" / "cluster.env").read_bytes() == b"export DDP_RUNS_DIR=/scratch/runs\n"


def run_fake_job(folder: Path, **programs: str) -> subprocess.CompletedProcess:
    """Runs the training job in its second attempt. `programs`: what a program does, as a line of shell."""
    usual = {
        "python": "printf '%s\\n' out data 1 no",
        "scontrol": "echo here",
        "squeue": "echo RUNNING",
        "accelerate": "",
    }
    (folder / "env" / "bin").mkdir(parents=True)
    for name, line in {**usual, **programs}.items():
        (folder / "env" / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "env" / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    variables = environment(DDP_VENV="env", SLURM_RESTART_COUNT="1", **job)
    command = ["bash", "slurm/train.sh"]
    return subprocess.run(command, cwd=folder, env=variables, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("SIGNALING", True), ("CANCELLED", False)])
def test_a_stopped_job_is_requeued_unless_slurm_ends_it(state: str, requeued: bool, tmp_path: Path) -> None:
    folder, preempted = checkout(tmp_path), '{"state": "preempted"}'
    done = run_fake_job(
        folder,
        squeue=f"echo {state}",
        srun=f"echo '{preempted}' >out/status.json",
        scontrol='echo "$1" >>calls; echo here',
    )
    assert done.returncode == 0, done.stderr
    assert ("requeue" in (folder / "calls").read_text().split()) == requeued


@pytest.mark.parametrize("content", [",BASH_VERSINFO[$(touch PWNED)0]", ",09", ",x", "", ",-1", ",1,2", ",99999999999"])
def test_the_content_of_the_attempts_file_is_not_evaluated(content: str, tmp_path: Path) -> None:
    """Bash arithmetic evaluates the text of a variable. Without a check, it would run commands from the file."""
    folder = checkout(tmp_path)
    (folder / "out").mkdir()
    (folder / "out" / "attempts").write_text(f"{content}\n")
    done = run_fake_job(folder, srun="exit 1")
    assert "error: the run failed" in done.stderr, done.stderr
    assert not (folder / "PWNED").exists()
    assert (folder / "out" / "attempts").read_text() == ",1\n", "the attempt without progress was not counted"


def test_the_arguments_of_a_listed_run_reach_the_trainer_unchanged(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sweep --list` prints a line for each run. The test splits a line with xargs, as slurm/train.sh does."""
    data = Path(shutil.copytree(tiny_dir, tmp_path / 'it\'s "odd" $(touch x) * \\ `y`'))
    assert sweep.main(["smoke", "--seeds", "2", "--data-dir", str(data), "--out", str(tmp_path / "a b"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    read = subprocess.run(["xargs", "printf", "%s\\n"], input=lines[1], text=True, capture_output=True, timeout=60)
    words = ["smoke", "--data-dir", str(data), "--seed", "1", "--out", str(tmp_path / "a b" / "seed=1")]
    assert read.stdout.splitlines() == words


@pytest.mark.parametrize("flag", ["--out", "--data-dir"])
def test_a_name_with_a_line_break_is_refused(
    flag: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job script reads the output of preflight.py line by line."""
    monkeypatch.setenv("DDP_PROCESSES_PER_NODE", "1")
    arguments = ["smoke", "--device", "cpu", "--data-dir", str(tiny_dir), flag, "two\nlines"]
    assert preflight.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {flag} must have no line breaks or other unprintable characters, got 'two\\nlines'\n"
    assert printed.out == ""


@pytest.mark.parametrize("number", ["0", "-1", "two", "²", "1e3", ""])
def test_an_impossible_number_of_processes_is_refused(
    number: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDP_PROCESSES_PER_NODE", number)
    assert preflight.main(["smoke", "--device", "cpu", "--data-dir", str(tiny_dir)]) == 2
    assert f"DDP_PROCESSES_PER_NODE must be a whole number of at least 1, got '{number}'" in capsys.readouterr().err


def test_a_batch_with_fewer_images_than_processes_on_all_nodes_is_refused(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDP_PROCESSES_PER_NODE", "3")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    before = dict(os.environ)
    assert preflight.main(["smoke", "--device", "cpu", "--batch-size", "5", "--data-dir", str(tiny_dir)]) == 2
    assert "--batch-size must be at least 6 for 6 processes" in capsys.readouterr().err
    assert dict(os.environ) == before


def test_preflight_prints_its_help_to_stderr() -> None:
    """The job script reads the standard output of preflight.py."""
    finished = run("slurm.preflight", "smoke", "--help")
    assert "--batch-size" in finished.stderr
    assert finished.stdout == ""


def test_copies_that_srun_started_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with lock_folder(tmp_path), pytest.raises(InputError, match=r"srun started 2 copies .*; use slurm/train.sh$"):
        lock_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"srun started 2 copies .* or give each copy its own folder with --out"):
        new_folder("smoke")
    assert not (tmp_path / "runs").exists()


def test_a_signal_while_the_settings_are_loaded_ends_the_attempt_without_an_error(
    tmp_path: Path,
) -> None:
    """In cluster.env, `module load` may take seconds. train.sh requeues a job that ends in this way."""
    folder = checkout(tmp_path)
    (folder / "slurm" / "cluster.env").write_text("kill -TERM $$\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "STATUS_BEFORE": ""}
    settings = {"STATUS": str(tmp_path / "status.json"), "DATA_DIR": "data", "PROCESSES": "1"}
    done = script("node.sh", "smoke", cwd=folder, variables=job | settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

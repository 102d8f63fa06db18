"""The shell scripts and their settings, as far as no cluster is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_prep.errors import InputError
from slurm.stage import stage
from tests.support.trainer import REPOSITORY, run

SCRIPTS = sorted([*REPOSITORY.glob("slurm/*.sh"), *REPOSITORY.glob("scripts/*.sh"), REPOSITORY / ".ci" / "run"])
EXAMPLE = REPOSITORY / "slurm" / "cluster.env.example"


def test_the_example_explains_every_setting_and_no_other() -> None:
    """DDP_STAGED_FROM is between a script and the trainer."""
    files = [path for path in (REPOSITORY / "slurm").iterdir() if path.suffix in {".sh", ".py"}]
    used = {name for path in files for name in re.findall(r"\bDDP_\w+", path.read_text())} - {"DDP_STAGED_FROM"}
    assert set(re.findall(r"^# export (DDP_\w+)", EXAMPLE.read_text(), flags=re.MULTILINE)) == used


def test_the_example_as_it_is_sets_nothing_and_gives_way_to_the_environment(tmp_path: Path) -> None:
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
def test_a_script_can_be_run_as_a_program(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def test_nothing_of_one_cluster_is_in_the_scripts() -> None:
    for script in SCRIPTS:
        assert not re.search(r"^#SBATCH.*(partition|account|qos|constraint|mail)", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("smoke\nsmok --seed 1\n", ", line 2: unknown recipe"),
        ("# nothing\n", "holds no training"),
        ("smoke --help\n", "line 1: --help is no training"),
        ("smoke --out 'a\n", ", line 1: No closing quotation"),
    ],
)
def test_a_faulty_sweep_is_refused_before_it_is_submitted(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from slurm.sweep import main

    (tmp_path / "settings.txt").write_text(content)
    assert main(["check", str(tmp_path / "settings.txt")]) == 2
    assert said in capsys.readouterr().err


def test_damage_of_staged_data_is_told_of_the_original(tiny_dir: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_dir, tmp_path / "data"))
    (data / "train.beton").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        stage(data, tmp_path / "copy")
    assert f"{data}/train.beton" in str(caught.value)
    assert f"--out {data}" in str(caught.value)
    assert str(tmp_path / "copy") not in str(caught.value)


def test_a_copy_that_a_disk_damaged_is_not_taken(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: target.write_bytes(source.read_bytes()[:-1] + b" "))
    with pytest.raises(InputError, match=rf"{tiny_dir} is whole, but its copy in {tmp_path}/copy .* DDP_STAGE_DIR"):
        stage(tiny_dir, tmp_path / "copy")


def test_help_is_not_taken_for_what_the_job_is_told() -> None:
    finished = run("slurm.preflight", "smoke", "--help")
    assert "--batch-size" in finished.stderr
    assert finished.stdout == ""

"""Stages of `benchmarks.acceptance`: time limits, failures, stages that are left out, and valid flags."""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import training_step
from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import images
from benchmarks.acceptance.plan import Plan, all_stages
from benchmarks.acceptance.runner import Outcome, Stage, run_stage, run_stages
from ddp_trainer.command_line import parse_command_line
from tests.support.processes import is_alive, wait_until


def shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    reports: list[list[str]] = []
    stages = [
        Stage("good", 5, [shell("echo fine")]),
        Stage("bad", 5, [shell("echo broken >&2; exit 3"), shell("echo more")]),
        Stage("good again", 5, [shell("true")]),
    ]
    outcomes = run_stages(stages, tmp_path, seconds=60, report=lambda found: reports.append(states(found)))
    assert states(outcomes) == ["passed", "failed", "passed"]
    assert outcomes[1].detail == "sh -c: exit status 3"
    assert reports == [["passed"], ["passed", "failed"], ["passed", "failed", "passed"]]
    log = (tmp_path / "bad.log").read_text()
    assert "broken\n" in log
    assert "more\n" in log


def test_a_stage_that_exceeds_its_time_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    stage = Stage("slow", 2, [shell(f"sleep 60 & echo $! >{child}; wait"), shell(f"touch {tmp_path}/second")])
    outcome = run_stage(stage, tmp_path / "log")
    assert outcome.state == "out of time"
    assert 2 <= outcome.seconds < 30
    assert not (tmp_path / "second").exists()
    wait_until(lambda: not is_alive(int(child.read_text())), "the child still runs", seconds=30, pause=0.02)


def test_a_stage_longer_than_the_remaining_time_is_left_out_and_a_shorter_one_runs(tmp_path: Path) -> None:
    stages = [Stage("long", 100, [shell(f"touch {tmp_path}/long")]), Stage("short", 1, [shell("true")])]
    outcomes = run_stages(stages, tmp_path, seconds=10, report=lambda _: None)
    assert states(outcomes) == ["left out", "passed"]
    assert outcomes[0].detail == "needs up to 100 s"
    assert not (tmp_path / "long").exists()


def test_commands_of_a_stage_run_at_the_same_time_if_together_is_set(tmp_path: Path) -> None:
    waits = shell(f"until [ -e {tmp_path}/there ]; do sleep 0.02; done")
    outcome = run_stage(Stage("two", 5, [waits, shell(f"touch {tmp_path}/there")], together=True), tmp_path / "log")
    assert outcome.state == "passed"


@pytest.mark.parametrize(("script", "status"), [("true", 0), ("false", 1)])
def test_all_states_are_written_and_a_failed_stage_sets_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: int
) -> None:
    stages = [Stage("only", 5, [shell(script)]), Stage("too long", 1000, [])]
    monkeypatch.setattr(acceptance, "all_stages", lambda plan: stages)
    arguments = ["--rehearse", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seconds", "30"]
    assert acceptance.main(arguments) == status
    written = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert [stage["state"] for stage in written["stages"]] == [("passed", "failed")[status], "left out"]
    assert written["rehearsal"] is True


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_modules_of_every_stage_exist_and_flags_for_training_are_valid(tmp_path: Path, gpus: int) -> None:
    plan = Plan(data=tmp_path, images=None, out=tmp_path, work=tmp_path, gpus=gpus)
    recipes = set()
    for command in (command for stage in all_stages(plan) for command in stage.commands):
        words = [str(word) for word in command]
        if "-m" not in words:
            continue
        modules = [word for before, word in itertools.pairwise(words) if before == "-m" and word != "gpu"]
        assert all(find_spec(module) for module in modules)
        flags = words[words.index(modules[-1]) + 1 :]
        if modules[-1] == "ddp_trainer.train":
            recipes.add(parse_command_line(flags, prog="", description="").recipe)
        elif modules[-1] == "benchmarks.training_step":
            training_step.parse_options(flags)
    assert recipes == {"fast", "baseline", "strong", "long"}


def test_images_come_from_an_archive_or_a_folder(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "photos" / "train").mkdir(parents=True)
    with tarfile.open(tmp_path / "photos.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "photos", "photos")
    assert images.unpacked(tmp_path / "photos", tmp_path / "unused") == tmp_path / "photos"
    assert images.unpacked(tmp_path / "photos.tar.xz", tmp_path / "into") == tmp_path / "into" / "photos"

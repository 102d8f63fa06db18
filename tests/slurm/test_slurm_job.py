"""Tests slurm/train.sh on a real SLURM, with a fake launcher and GPUs that exist only in SLURM's configuration."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import processes_with, read, wait_until
from tests.support.slurm_cluster import Cluster, Job, running_cluster
from tests.support.slurm_desk import Desk
from tests.support.trainer import REPOSITORY


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from running_cluster()


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(cluster, tmp_path_factory.mktemp("slurm jobs") / "desk", tiny_dir)


STOPPED_EARLY = ("starts", "starts with more steps")


@pytest.fixture(scope="module")
def requeued(desk: Desk) -> dict[str, Job]:
    """Jobs that must be requeued, and jobs that must not. They mostly wait, so they all run at once."""
    states, limit = "preempted preempted preempted done", "2"
    finished = desk.folder / "runs" / "finished after 1 step"
    finished.mkdir(parents=True)
    (finished / "config.json").write_text("{}")
    (finished / "summary.json").write_text('{"steps": 1}')
    (finished / "status.json").write_text('{"state": "done"}')
    more_steps = ("smoke", "--out", str(finished), "--resume")
    jobs = {
        "stands still": desk.submit(ENDS_AS=states, DDP_MAX_STALLED=limit),
        "makes progress": desk.submit(ENDS_AS=states, DDP_MAX_STALLED=limit, SAVES="yes"),
        "fails": desk.submit(ENDS_AS="failed", EXIT_STATUS="1"),
        "dies": desk.submit(ENDS_AS="running", EXIT_STATUS="137"),
        "starts": desk.submit(ENDS_AS="done", STARTS_FOR="300"),
        "starts with more steps": desk.submit(ENDS_AS="done", STARTS_FOR="300", arguments=more_steps),
    }
    for name in STOPPED_EARLY:
        starting = jobs[name]
        wait_until((desk.records / f"{starting.number}-0").exists, lambda starting=starting: starting.log)
        desk.cluster.call("scancel", "--signal=USR2", starting.number)
    return jobs


ODD = ("smoke", "--trackers", "wandb, tensorboard", "--out", "runs/with 'single' and \"double\" quotes, $HOME and a *")


def test_each_node_launches_a_process_for_each_gpu_with_unchanged_arguments(requeued: object, desk: Desk) -> None:
    from accelerate.commands.launch import launch_command_parser

    job = desk.submit("--nodes=2", "--gpus-per-node=3", arguments=(*ODD, "--batch-size", "96"), ENDS_AS="done")
    assert job.end() == "COMPLETED", job.log
    for node in (0, 1):
        gpus, command, *arguments = desk.launched(job, node)
        assert (len(set(gpus.split(","))), command) == (3, "launch")
        parsed = launch_command_parser().parse_args(arguments)  # refuses an unknown flag
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 6, node)
        assert (parsed.rdzv_backend, parsed.main_process_ip) == ("static", "127.0.0.1")
        assert parsed.main_process_port == 10000 + int(job.number) % 20000
        assert parsed.training_script == "ddp_trainer.train"
        assert (desk.folder / parsed.config_file).is_file()
        given = parsed.training_script_args
        assert given[0] == "smoke"
        assert given[given.index("--trackers") :] == [*ODD[1:], "--batch-size", "96"]


def test_processes_of_a_single_node_meet_at_any_free_port(requeued: object, desk: Desk) -> None:
    from accelerate.commands.launch import launch_command_parser

    job = desk.submit("--gpus-per-node=2", arguments=("smoke",), ENDS_AS="done")
    assert job.end() == "COMPLETED", job.log
    parsed = launch_command_parser().parse_args(desk.launched(job)[2:])
    assert (parsed.num_machines, parsed.num_processes, parsed.main_process_port) == (1, 2, 0)


def test_one_gpu_starts_one_process(requeued: object, desk: Desk) -> None:
    job = desk.submit(arguments=("smoke", "--seed", "3"), ENDS_AS="done")
    assert job.end() == "COMPLETED", job.log
    gpus, *command = desk.launched(job)
    assert gpus.isdecimal()
    assert command[:5] == ["launch", "--config_file", "launch/one_gpu.yaml", "-m", "ddp_trainer.train"]
    assert command[6:8] == ["--out", f"runs/train-{job.number}"]


def test_settings_of_the_cluster_choose_the_folders_of_run_and_data(requeued: object, desk: Desk) -> None:
    disk = desk.folder / "disk of the node"
    disk.mkdir()
    folders = {"DDP_RUNS_DIR": "other runs", "DDP_STAGE_DIR": "tmpdir", "TMPDIR": str(disk)}
    job = desk.submit("--job-name=my net (2)", arguments=("smoke",), **folders, ENDS_AS="done")
    assert job.end() == "COMPLETED", job.log
    given = desk.launched(job)
    assert given[given.index("--out") + 1] == f"other runs/my-net--2--{job.number}"
    assert given[-2] == "--data-dir"
    assert Path(given[-1]).name.startswith(f"ddp-trainer-{job.number}-")
    assert Path(given[-1]).parent == disk
    assert not any(disk.iterdir()), "the copy is still there"


def test_gpus_requested_with_gres_reach_the_launcher(requeued: object, desk: Desk) -> None:
    job = desk.submit("--gres=gpu:2", ENDS_AS="done")
    assert job.end() == "COMPLETED", job.log
    assert len(set(desk.launched(job)[0].split(","))) == 2


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_training_processes_learn_of_a_signal_that_only_the_script_of_the_node_gets(
    number: int, requeued: object, desk: Desk
) -> None:
    """With proctrack/cgroup, SLURM signals slurm/node.sh, but not the processes that it has started."""
    job = desk.submit(ENDS_AS="running done", TRAINS="yes")
    wait_until((desk.records / f"{job.number}-child").exists, lambda: job.log)
    processes = processes_with(f"SLURM_JOB_ID={job.number}", "slurm/node.sh")
    (script,) = [pid for pid in processes if read(pid, "cmdline").split(b"\0")[1] == b"slurm/node.sh"]
    os.kill(script, number)
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert "stopped by a signal; requeued" in job.log


# Wrong input as (flags of sbatch, arguments of the script, settings, part of the expected message).
FAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, str], str]] = {
    "environment": ((), ("smoke",), {"DDP_VENV": "/nowhere"}, "run make setup"),
    "dataset": ((), ("smoke",), {"DDP_DATA_DIR": "/nowhere"}, "sbatch slurm/prep.sh"),
    "recipe": ((), ("smok",), {}, "choose from baseline, "),
    "flag": ((), ("smoke", "--lr", "1"), {}, "--lr"),
    "no GPU": (("--gpus-per-node=0",), ("smoke",), {}, "sbatch --gpus-per-node=N"),
    "no driver": (("--gpus-per-node=2",), ("smoke",), {"DDP_VENV": sys.prefix}, "torch sees 0"),
    "tasks": (("--ntasks-per-node=2",), ("smoke",), {}, "leave --ntasks-per-node at 1"),
    "folder": (("--chdir=/",), ("smoke",), {}, "/ on "),
    "batch": (
        ("--gpus-per-node=3",),
        ("smoke", "--batch-size", "2"),
        {},
        "--batch-size must be at least 3 for 3 processes",
    ),
}


@pytest.fixture(scope="module")
def faulty(requeued: object, desk: Desk) -> dict[str, Job]:
    output = f"--output={desk.folder}/logs/%j.out"
    return {
        name: desk.submit(output, *flags, arguments=arguments, **settings)
        for name, (flags, arguments, settings, _) in FAULTS.items()
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_input_is_reported_in_one_line_before_anything_is_launched(
    fault: str, faulty: dict[str, Job], desk: Desk
) -> None:
    job = faulty[fault]
    assert job.end(seconds=90) == "FAILED"
    (line,) = job.log.splitlines()
    assert line.startswith("error: ")
    assert FAULTS[fault][3] in line
    assert not list(desk.records.glob(f"{job.number}-*"))
    assert job.restarts == 0


@pytest.mark.parametrize(("name", "state"), [("fails", "failed"), ("dies", "running")])
def test_a_failed_run_is_not_requeued(requeued: dict[str, Job], name: str, state: str) -> None:
    job = requeued[name]
    assert job.end() == "FAILED"
    assert job.restarts == 0
    assert f"error: the run failed (state: {state}" in job.log


@pytest.mark.parametrize("name", STOPPED_EARLY)
def test_a_job_that_gets_a_signal_before_the_first_step_is_requeued(requeued: dict[str, Job], name: str) -> None:
    """This also holds if an earlier job has finished the same run with fewer steps."""
    job = requeued[name]
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert job.log.count("attempt 2") == 1
    assert job.log.count(" --resume") == 1, "the printed command has a flag twice"


def test_a_run_without_progress_is_not_requeued_forever(requeued: dict[str, Job]) -> None:
    job = requeued["stands still"]
    assert job.end() == "FAILED"
    assert job.restarts == 1
    assert "error: 2 attempts in a row saved nothing new" in job.log


def test_each_task_of_an_array_requeues_only_itself(requeued: object, desk: Desk) -> None:
    """In one of the tasks, SLURM_JOB_ID is the id of the whole array. This task must not requeue the other one."""
    array = desk.submit("--array=1-2", ENDS_AS="preempted done", STARTS_FOR="3")
    tasks = [Job(desk.cluster, f"{array.number}_{task}") for task in (1, 2)]
    for task in tasks:
        wait_until(lambda task=task: task.restarts == 1 and task.state == "COMPLETED", lambda task=task: task.log)


def test_task_2_of_a_sweep_trains_line_2_of_the_file_with_the_additional_arguments(
    requeued: object, desk: Desk
) -> None:
    (desk.folder / "runs.txt").write_text("smoke --seed 1 --out a\nsmoke --seed 2 --out 'runs/it'\"'\"'s $(odd) *'\n")
    job = desk.submit("--array=2", arguments=("--sweep", "runs.txt", "--resume"), ENDS_AS="done")
    assert job.end() == "COMPLETED", job.log
    assert desk.launched(job)[-5:] == ["--seed", "2", "--out", "runs/it's $(odd) *", "--resume"]


@pytest.mark.parametrize(("task", "file", "message"), [("3", "runs.txt", "has no line 3"), ("1", "no.txt", "no.txt")])
def test_a_sweep_task_without_a_line_or_a_file_fails_with_an_error(
    requeued: object, desk: Desk, task: str, file: str, message: str
) -> None:
    (desk.folder / "runs.txt").write_text("smoke\nsmoke\n")
    job = desk.submit(f"--array={task}", arguments=("--sweep", file))
    assert job.end() == "FAILED"
    assert message in job.log
    assert "error: " in job.log.splitlines()[-1]


def test_a_run_with_progress_is_requeued_until_it_is_finished(requeued: dict[str, Job], desk: Desk) -> None:
    job = requeued["makes progress"]
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 3
    assert desk.launched(job)[-1] == "--resume"
    desk.cluster.call("scontrol", "requeue", job.number)  # as if a node had failed at the very end
    wait_until(lambda: job.restarts == 4 and job.state == "COMPLETED", lambda: job.log)
    assert job.log.count("is finished") == 1


def test_killed_tests_leave_no_process_of_their_cluster(cluster: Cluster) -> None:
    code = "from tests.support.slurm_cluster import running_cluster\n"
    code += "for cluster in running_cluster(): print(cluster.folder, flush=True); input()"
    tests = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None
    folder = tests.stdout.readline().strip()
    assert folder, "the cluster has not started"
    assert len(processes_with(f"SLURM_CONF={folder}")) >= 3
    os.kill(tests.pid, signal.SIGKILL)
    tests.communicate(timeout=30)
    wait_until(lambda: not processes_with(folder) and not Path(folder).exists(), "a process or the folder is left", 30)

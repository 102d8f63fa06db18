"""How processes start and stop: the launcher's environment variables, and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.dataset import write_dataset
from data_prep.errors import InputError
from data_prep.sources.synthetic import draw_synthetic
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.launch import check_machine
from ddp_trainer.distributed.meeting import REPORT_AFTER_SECONDS
from tests.support.forked import free_port
from tests.support.trainer import NARROW, REPOSITORY, environment, fork, run, start, wait_for_epochs

PAIR = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(free_port()),
}


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ("RANK=1", "RANK=1 is set, but this process is alone"),
        ("RANK=1 WORLD_SIZE=1", "this process is alone (WORLD_SIZE is 1)"),
        ("LOCAL_RANK=1", "LOCAL_RANK=1 is set, but this process is alone"),
        ("LOCAL_WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2 is set"),
        ("WORLD_SIZE=2", "RANK is not"),
        ("RANK=1 WORLD_SIZE=2", "MASTER_ADDR"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost", "MASTER_PORT"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=70000", "MASTER_PORT must be in [1, 65535], got 70000"),
        ("RANK=2 WORLD_SIZE=2", "RANK must be below WORLD_SIZE"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK must be below LOCAL_WORLD_SIZE"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE must be at most WORLD_SIZE"),
        ("RANK= LOCAL_RANK=", "RANK must be a number of at least 0, got ''"),
        ("RANK=none", "got 'none'"),
        ("WORLD_SIZE=0", "WORLD_SIZE must be a number of at least 1, got '0'"),
        ("OMPI_COMM_WORLD_SIZE=2", "2 processes were started (OMPI_COMM_WORLD_SIZE=2)"),
        ("PMI_SIZE=many", "got 'many'"),
        ("ACCELERATE_USE_FSDP=true", "asks for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED=true", "asks for DEEPSPEED"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "asks for PARALLELISM_CONFIG"),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "pass --compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "pass --accumulate"),
        ("ACCELERATE_TORCH_DEVICE=meta", "pass --device"),
    ],
)
def test_an_invalid_environment_is_refused(variables: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(InputError) as caught:
        check_machine(RuntimeConfig(device="cpu"))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"), [({"RANK": "1"}, "RANK=1 is set"), ({"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, "less precise")]
)
def test_an_invalid_environment_is_reported_in_one_line_before_torch_is_imported(
    changes: dict[str, str], problem: str, tiny_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    words = ("smoke", "--device", "cpu", "--data-dir", str(tiny_dir), "--out", str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-m", "ddp_trainer.train", *words],
        env=environment(**changes, PYTHONPATH=f"{tmp_path}:{REPOSITORY}"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert problem in done.stderr
    assert not (tmp_path / "run").exists()


def test_variables_of_accelerate_do_not_change_the_weights(tiny_dir: Path, tmp_path: Path) -> None:
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--max-steps", "2")
    odd = {"PMI_RANK": "1", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DEBUG_MODE": "?"}
    # The run with `odd` looks as if Accelerate had started it, so it uses all cores. The plain run must do the same.
    cores = str(len(os.sched_getaffinity(0)))
    for name, changes in (("plain", {}), ("odd", odd)):
        done = run(NARROW, *words, "--out", tmp_path / name, env={"OMP_NUM_THREADS": cores, **changes})
        assert done.returncode == 0, done.stderr
    plain, other = (tmp_path / name / "model.safetensors" for name in ("plain", "odd"))
    assert plain.read_bytes() == other.read_bytes()


def test_two_processes_without_local_rank_train(tiny_dir: Path, tmp_path: Path) -> None:
    """Kubernetes sets neither LOCAL_RANK nor LOCAL_WORLD_SIZE."""
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--max-steps", "2", "--out", tmp_path / "run")
    pod = {name: PAIR[name] for name in ("WORLD_SIZE", "MASTER_ADDR")} | {"MASTER_PORT": str(free_port())}
    pods = [start(NARROW, *words, env={**pod, "RANK": str(rank)}) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[1] for process in pods]
    assert [process.returncode for process in pods] == [0, 0], outputs
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("flag", "values", "problem"),
    [
        ("--seed", ("0", "1"), "the processes have different settings or datasets"),
        ("--precision", ("fp32", "bf16"), "the processes would use different precisions (fp32 in this one)"),
        ("--data-dir", ("{tiny}", "{other}"), "the processes have different settings or datasets"),
        ("--profile", ("0", "1"), "the processes have different settings or datasets"),
    ],
)
def test_processes_that_were_started_differently_are_refused(
    flag: str, values: tuple[str, str], problem: str, tiny_dir: Path, tmp_path: Path
) -> None:
    # The other dataset has the same training images, but one more test image.
    write_dataset(draw_synthetic(train_count=96, test_count=41, seed=1), tmp_path / "other")
    places = {"tiny": tiny_dir, "other": tmp_path / "other"}
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", tmp_path / "run", flag)
    pod = {name: PAIR[name] for name in ("WORLD_SIZE", "MASTER_ADDR")} | {"MASTER_PORT": str(free_port())}
    pods = [start(NARROW, *words, values[rank].format(**places), env={**pod, "RANK": str(rank)}) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[1] for process in pods]
    assert [process.returncode for process in pods] == [2, 2], outputs
    assert f"error: {problem}" in outputs[0]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("launched", [True, False])
def test_several_runs_work_in_the_same_processes(launched: bool, tiny_dir: Path, tmp_path: Path) -> None:
    program = "tests.support.workers.several_runs"
    if launched:
        done = run(program, tiny_dir, tmp_path, processes=2)
    else:  # without a launcher, the main process serves the key-value store
        done = fork(tiny_dir, tmp_path, program=f"{program}:main", processes=2)
    assert done.returncode == 0, done.stderr
    assert all(json.loads((tmp_path / str(seed) / "summary.json").read_text())["steps"] == 2 for seed in range(3))


def test_all_cores_are_used_unless_the_user_sets_a_number_of_threads(tiny_dir: Path, tmp_path: Path) -> None:
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--max-steps", "1")
    cores = len(os.sched_getaffinity(0))
    for name, given, expected in (("given", {"OMP_NUM_THREADS": "1"}, 1), ("free", {}, cores)):
        env = environment(**given)
        if not given:
            del env["OMP_NUM_THREADS"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", NARROW]
        done = subprocess.run(
            [*launch, *map(str, words), "--out", str(tmp_path / name)],
            env=env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "config.json").read_text())["threads"] == expected


def test_a_process_that_waits_for_another_prints_a_line_and_ends_at_the_first_signal(
    tiny_dir: Path, tmp_path: Path
) -> None:
    process = start(NARROW, "smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", tmp_path / "run", env=PAIR)
    assert process.stderr is not None
    place = f"127.0.0.1:{PAIR['MASTER_PORT']}"
    assert process.stderr.readline() == f"rank 0 of 2 is waiting for the other processes at {place}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.communicate()


def test_a_second_signal_ends_a_process_that_is_in_cpp_code(tiny_dir: Path, tmp_path: Path) -> None:
    """The process waits for another one in torch's C++ code, where Python's own handlers do not run."""
    env = {**PAIR, "MASTER_PORT": str(free_port())}
    process = start(NARROW, "smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", tmp_path / "run", env=env)
    deadline = time.monotonic() + 240
    while not _listens(process.pid):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=REPORT_AFTER_SECONDS) == 128 + signal.SIGTERM
    process.communicate()


def _listens(pid: int) -> bool:
    """Returns whether a process has a listening socket."""
    import psutil

    return any(one.status == psutil.CONN_LISTEN for one in psutil.Process(pid).net_connections())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_stop_signal_saves_a_checkpoint(tiny_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    process, out = _start_endless_run(tiny_dir, tmp_path / "run", number, signal.SIG_DFL)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (out / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tiny_dir: Path, tmp_path: Path) -> None:
    process, out = _start_endless_run(tiny_dir, tmp_path / "run", signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    lines = len((out / "metrics.jsonl").read_text().splitlines())
    process.send_signal(signal.SIGHUP)
    while len((out / "metrics.jsonl").read_text().splitlines()) < lines + 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def _start_endless_run(
    data: Path, out: Path, number: signal.Signals, handler: signal.Handlers
) -> tuple[subprocess.Popen, Path]:
    """Starts a long run with `handler` set for the signal `number`, and waits until it has finished an epoch."""
    words = ("--epochs", "5000", "--batch-size", "16", "--max-steps", "30000")
    before = signal.signal(number, handler)
    try:
        process = start(NARROW, "smoke", "--device", "cpu", "--data-dir", data, "--out", out, *words)
    finally:
        signal.signal(number, before)
    wait_for_epochs(out, process)
    return process, out


def test_two_launched_processes_train(tiny_dir: Path, tmp_path: Path) -> None:
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--max-steps", "2", "--out", tmp_path / "run")
    finished = run(NARROW, *words, processes=2)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2

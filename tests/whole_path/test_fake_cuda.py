"""The operations and waits of a step on a GPU, tested without a GPU: torch's CUDA code runs on an imitation of CUDA.

Values, speed and race conditions can be tested only on a GPU (`test_gpu.py`). For details, see
`tests/support/fake_cuda/library.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from ddp_trainer.recipes import RECIPES
from tests.support.fake_cuda import library
from tests.support.trainer import run
from tests.support.workers.fake_cuda_cases import CAPTURED, CARELESS, EAGER, NOT_CAPTURED, OPTIONS, RANKS

Cases = dict[str, dict[str, Any]]

# The host waits once per step, to read whether the previous step was skipped.
# That step has finished or is about to finish.
ONE_STEP_LATE = {"cudaEventSynchronize": 1}

# The maximum number of operations in a step without a CUDA graph. Lower a budget when a step has become cheaper.
BUDGETS = {
    "baseline": 200,
    "fast": 344,
    "strong": 344,
    "long": 350,
    "finetune": 190,
    "photos": 482,
    "smoke": 194,
    "demo": 188,
    "deterministic": 344,
    "fp16": 314,
    "fp32": 282,
    "accumulate": 534,
    "ema and clip": 373,
    "adamw": 216,
    "mixup and jitter": 398,
    "cutmix": 407,
}

STEPS, CROP_SIZES = 30, 3
MOST_OPERATIONS = 20  # launched by the host in a step with a graph
MOST_HOST_SHARE = 0.2  # CPU time of a step with a graph, divided by that of a step without a graph


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables that make a process use the imitation of CUDA."""
    return library.variables(library.build(tmp_path_factory.mktemp("cuda")))


def cases_of(module: str, *arguments: str | Path, **options: Any) -> Cases:
    finished = run(f"tests.support.workers.{module}", *arguments, **options)
    assert finished.returncode == 0, finished.stderr
    return {line["case"]: line for line in map(json.loads, finished.stdout.splitlines())}


@pytest.fixture(scope="module")
def steps(cuda: dict[str, str], synthetic_dir: Path) -> Cases:
    """Measurements of one step for each recipe, each option and each careless change that makes the host wait."""
    return cases_of("fake_cuda_steps", synthetic_dir, env=cuda)


@pytest.fixture(scope="module")
def runs(cuda: dict[str, str], synthetic_dir: Path) -> Cases:
    """Measurements of runs, most of them with CUDA graphs and on crops of three sizes."""
    return cases_of("fake_cuda_graphs", synthetic_dir, env=cuda)


@pytest.mark.parametrize("case", [*RECIPES, *OPTIONS])
def test_step_waits_only_for_the_previous_step_and_stays_within_its_budget(steps: Cases, case: str) -> None:
    assert steps[case]["waits"] == ONE_STEP_LATE
    assert steps[case]["operations"] <= BUDGETS[case]


def test_accumulate_auto_tries_smaller_passes_until_one_fits(steps: Cases) -> None:
    assert steps["passes"]["chosen"] == {"64": 1, "16": 4}


@pytest.mark.parametrize("case", CARELESS)
def test_careless_changes_that_make_the_host_wait_are_detected(steps: Cases, case: str) -> None:
    assert steps[case]["waits"] != ONE_STEP_LATE


def test_gpu_tests_that_forbid_waits_also_pass_here(cuda: dict[str, str]) -> None:
    """These tests check no computed values. Running them here finds mistakes in the tests before they fail on a GPU."""
    tests = ("tests/whole_path/test_gpu.py", "tests/whole_path/test_step_options.py")
    chosen = ("-k", "does_not_wait or growing_crops", "-p", "no:cacheprovider", "-q")
    finished = run("pytest", *tests, *chosen, env=cuda)
    assert finished.returncode == 0, finished.stdout
    assert "14 passed" in finished.stdout


def test_gpu_for_which_torch_has_no_kernels_is_refused(
    cuda: dict[str, str], synthetic_dir: Path, tmp_path: Path
) -> None:
    too_old = {**cuda, "FAKE_OLD_GPU": "1"}
    finished = run("ddp_trainer.train", "smoke", "--data-dir", synthetic_dir, "--out", tmp_path / "run", env=too_old)
    assert finished.returncode == 2
    reason = "CUDA error: no kernel image is available for execution on the device"
    assert f"error: torch cannot compute on cuda ({reason}); use --device cpu" in finished.stderr
    doctor = run("ddp_trainer.doctor", env=too_old)
    assert doctor.returncode == 1
    assert f"torch cannot compute on them: {reason}" in doctor.stdout


@pytest.mark.parametrize("case", CAPTURED)
def test_every_step_replays_a_graph_that_is_captured_once_for_each_crop_size(runs: Cases, case: str) -> None:
    found = runs[case]
    assert (found["steps"], len(found["graphs"]), found["said"], found["illegal"]) == (STEPS, STEPS, [], [])
    assert found["captures"] == {"torchvision": 1, "freeze late": CROP_SIZES + 1}.get(case, CROP_SIZES)
    assert found["cost"]["waits"] == ONE_STEP_LATE
    assert found["cost"]["operations"] <= MOST_OPERATIONS
    assert found["cost"]["host_ms"] < MOST_HOST_SHARE * runs["graph off"]["cost"]["host_ms"]


@pytest.mark.parametrize("case", EAGER)
def test_steps_that_cannot_be_captured_run_without_graphs(runs: Cases, case: str) -> None:
    assert (runs[case]["steps"], runs[case]["graphs"], runs[case]["captures"]) == (STEPS, [], 0)


@pytest.mark.parametrize("case", ["waiting", *NOT_CAPTURED])
def test_step_that_a_graph_would_replay_wrongly_is_not_captured_and_the_run_continues(runs: Cases, case: str) -> None:
    found = runs[case]
    assert (found["steps"], found["graphs"], found["captures"]) == (STEPS, [], 1)
    (line,) = found["said"]
    assert line.startswith("steps run without CUDA graphs")
    assert ("not permitted when stream is capturing" in line) == (case in ("waiting", "wait in backward"))
    assert line.endswith("the network draws random numbers on the host") == (case == "random numbers on the host")


def test_a_capture_that_fails_draws_no_random_numbers(runs: Cases) -> None:
    numbers = {runs[f"random numbers {name}"]["next random number"] for name in ("on the host", "without graphs")}
    assert len(numbers) == 1


def test_if_the_capture_fails_on_another_rank_the_graph_is_freed_before_the_run_continues(runs: Cases) -> None:
    found = runs["failure of another rank"]
    assert (found["alive"], found["graphs"], found["captures"]) == ([False], [], 1)
    assert found["said"][0].endswith("the capture failed in another process")


def test_another_thread_may_wait_during_a_capture(runs: Cases) -> None:
    """The thread that writes checkpoints waits for the device."""
    found = runs["thread"]
    assert (found["captures"], found["illegal"], found["said"]) == (1, [], [])
    assert len(found["graphs"]) == found["steps"]


def test_copying_the_state_for_a_checkpoint_does_not_wait(runs: Cases) -> None:
    """The first copy waits for the allocation of page-locked memory, which torch then reuses in the second copy."""
    assert runs["second copy"]["waits"] == {}
    assert runs["second copy"]["copies"] > 10


@pytest.fixture(scope="module")
def ranks(cuda: dict[str, str], synthetic_dir: Path) -> Cases:
    """Measurements of runs of two ranks."""
    return cases_of("fake_cuda_graphs", synthetic_dir, env={**cuda, "FAKE_GPUS": "2"}, processes=2)


@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_capture_collectives_and_free_the_graphs_before_leaving_the_group(ranks: Cases, case: str) -> None:
    """`illegal` would also list ncclCommDestroy if a graph still used the communicator: the real call would hang."""
    found = ranks[case]
    assert (found["illegal"], found["said"]) == ([], [])
    assert len(found["graphs"]) == found["steps"]
    assert found["captures"] == (2 if case == "freeze late" else 1)
    assert found["collectives"] > 0
    assert found["left"] > 0


@pytest.mark.parametrize("case", NOT_CAPTURED)
def test_two_ranks_continue_without_graphs_if_a_capture_fails(ranks: Cases, case: str) -> None:
    found = ranks[case]
    assert (found["steps"], found["graphs"], found["captures"]) == (10, [], 1)
    assert len(found["said"]) == 1

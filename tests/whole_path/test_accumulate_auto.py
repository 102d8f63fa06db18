"""--accumulate auto: all ranks use the same number of passes, and resuming with the same world size keeps it."""

import json
from pathlib import Path

import pytest

from tests.support.folders import same_model
from tests.support.trainer import Finished, fork

UNEVEN = "tests.support.workers.uneven_memory:main"
BATCH = 32  # the batch size of `smoke`


def run(data: Path, out: Path, *flags: str, fitting: str = "32,32", steps: str = "4", processes: int = 1) -> Finished:
    """Trains as if memory were limited. `fitting`: how many images fit into memory on each rank, comma-separated."""
    arguments = ("smoke", "--device", "cpu", "--data-dir", data, "--out", out, "--max-steps", steps, *flags)
    return fork(fitting, *arguments, program=UNEVEN, processes=processes)


def accumulate_of(out: Path) -> int | str:
    return json.loads((out / "config.json").read_text())["settings"]["accumulate"]


@pytest.fixture(scope="module")
def four_passes(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run with --accumulate 4."""
    out = tmp_path_factory.mktemp("four") / "run"
    assert run(tiny_dir, out, "--accumulate", "4").returncode == 0
    return out


def test_ranks_agree_on_a_number_of_passes_and_train_as_if_the_user_had_set_it(tiny_dir: Path, tmp_path: Path) -> None:
    auto, given = tmp_path / "auto", tmp_path / "given"
    finished = run(tiny_dir, auto, "--accumulate", "auto", fitting="16,4", processes=2)
    assert finished.returncode == 0, finished.stderr
    assert accumulate_of(auto) == BATCH // 2 // 4
    assert f"batch {BATCH} in 4 passes" in finished.stderr
    assert run(tiny_dir, given, "--accumulate", "4", processes=2).returncode == 0
    assert same_model(auto, given)


def test_the_run_is_refused_in_one_line_if_one_rank_has_too_little_memory(tiny_dir: Path, tmp_path: Path) -> None:
    finished = run(tiny_dir, tmp_path / "run", "--accumulate", "auto", fitting="16,1", processes=2)
    assert finished.returncode == 2
    assert finished.stderr.count("error: --accumulate auto: on rank 1, even the smallest passes") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_resumed_run_keeps_its_number_of_passes_and_equals_the_uninterrupted_run(
    four_passes: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run(tiny_dir, out, "--accumulate", "auto", fitting="8", steps="2").returncode == 0
    resumed = run(tiny_dir, out, "--accumulate", "auto", "--resume")
    assert "after step 2" in resumed.stderr
    assert accumulate_of(out) == 4
    assert same_model(out, four_passes)
    assert "finished already" in run(tiny_dir, out, "--accumulate", "auto", "--resume").stderr
    other = run(tiny_dir, out, "--accumulate", "2", "--resume")
    assert (other.returncode, "accumulate 4 -> 2" in other.stderr) == (2, True)


def test_the_number_of_passes_is_chosen_again_for_another_number_of_processes(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(tiny_dir, out, "--accumulate", "auto", fitting="8", steps="2").returncode == 0
    resumed = run(tiny_dir, out, "--accumulate", "auto", "--resume", fitting="8,8", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert accumulate_of(out) == 2

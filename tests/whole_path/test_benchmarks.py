"""Every benchmark runs and writes its figures; their values are not checked."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import training_step
from data_prep.errors import InputError
from tests.support.trainer import run

SHORT = ("--batch-size", "4", "--steps", "1")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("loading", ("--batch-size", "32", "--images", "64")),
        ("training_step", ("--recipe", "fast", "--side", "16", "--widths", "8", "8", "8", "8", *SHORT)),
        ("reliability", ("--batch-size", "4")),
    ],
)
def test_benchmark_runs_and_writes_its_figures(
    name: str, flags: tuple[str, ...], tiny_dir: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    finished = run(f"benchmarks.{name}", "--data-dir", tiny_dir, *flags, "--rounds", "1", "--result", result)
    assert finished.returncode == 0, finished.stderr
    written = json.loads(result.read_text())
    assert {"versions", "git_commit"} < written.keys()
    assert written["figures"]
    assert all(map(math.isfinite, written["figures"].values()))


def test_training_step_takes_the_flags_of_the_trainer() -> None:
    options, config = training_step.parse_options(["--recipe", "fast", "--network", "torchvision:resnet18", *SHORT])
    assert options.steps == 1
    assert config.network.network == "torchvision:resnet18"
    assert (config.recipe, config.schedule.batch_size) == ("fast", 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--side", "20"), "--side must be one of"), (("--batch-size", "97"), "--batch-size must be at most")],
)
def test_training_step_refuses_what_it_cannot_measure(flags: tuple[str, ...], message: str, tiny_dir: Path) -> None:
    with pytest.raises(InputError, match=message):
        training_step.main(["--recipe", "fast", "--data-dir", str(tiny_dir), *flags])

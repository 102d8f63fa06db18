"""--profile N traces N steps, and is refused unless the run has more than N steps."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.errors import InputError
from ddp_trainer.recipes import smoke
from ddp_trainer.run.checks import check_batch
from tests.support.narrow import changed
from tests.support.trainer import NARROW, train


def test_profiled_run_writes_a_trace_of_its_steps_and_prints_a_table(tiny_dir: Path, tmp_path: Path) -> None:
    flags = ("--batch-size", "8", "--max-steps", "5", "--profile", "2")
    finished = train("--data-dir", tiny_dir, "--out", tmp_path / "run", *flags, module=NARROW)
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert len(steps) == 2
    assert any("convolution_backward" in str(event.get("name")) for event in events)
    lines = finished.stderr.splitlines()
    start = lines.index(f"profile of 2 steps: {tmp_path / 'run' / 'trace.json.gz'}")
    shares = [float(line.split("%")[0]) for line in lines[start + 2 : start + 6]]
    assert shares == sorted(shares, reverse=True)
    assert (tmp_path / "run" / "summary.json").exists(), "the run did not continue to its end"


def test_run_without_profile_writes_no_trace(smoke_run: Path) -> None:
    assert not (smoke_run / "trace.json.gz").exists()


@pytest.mark.parametrize(("steps", "fits"), [(0, True), (5, True), (6, False)])
def test_profile_is_refused_unless_the_run_has_more_steps_than_are_traced(steps: int, fits: bool) -> None:
    config = changed(smoke(), {"run": {"profile": steps}})  # 6 steps
    if fits:
        check_batch(config, num_images=96, world_size=1)
    else:
        with pytest.raises(InputError, match="--profile must be below 6, the number of steps of the run, got 6"):
            check_batch(config, num_images=96, world_size=1)

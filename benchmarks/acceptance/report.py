"""Reports the results of an acceptance run (a check of a machine with GPUs) as a JSON object and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

from benchmarks.acceptance.plan import Plan
from benchmarks.acceptance.runner import Outcome
from data_prep.files import read_json
from ddp_trainer.run.directory import git_commit, package_versions

RUN_FIGURES = ("test_accuracy", "test_accuracy_tta", "test_total", "train_seconds", "images_per_second", "world_size")


def collect(outcomes: Sequence[Outcome], plan: Plan, gpus: Sequence[str], seconds: float) -> dict[str, Any]:
    """The machine, the stages and the results so far, as JSON values."""
    return {
        "date": date.today().isoformat(),
        "gpus": list(gpus),
        "rehearsal": plan.rehearse,
        "versions": package_versions(),
        "git_commit": git_commit(),
        "dataset": (read_json(plan.data / "dataset.json") or {}).get("source"),
        "seconds": round(seconds, 1),
        "stages": [asdict(outcome) for outcome in outcomes],
        "runs": runs(plan),
        "steps": step_times(plan),
    }


def runs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Results of each finished run, by its name."""
    found = {}
    for path in sorted(plan.run_dir("").glob("*/summary.json")):
        summary = read_json(path) or {}
        found[path.parent.name] = {name: summary.get(name) for name in RUN_FIGURES}
    return found


def step_times(plan: Plan) -> list[dict[str, Any]]:
    """The conditions and figures of each measurement that `benchmarks.training_step` made."""
    results = [read_json(path) or {} for path in sorted(plan.out.glob("step-*.json"))]
    return [{**result.get("conditions", {}), **result.get("figures", {})} for result in results]


def print_tables(outcomes: Sequence[Outcome], plan: Plan) -> None:
    print("\nstages")
    for outcome in outcomes:
        print(f"  {outcome.line()}")
    if found := runs(plan):
        print("\nruns                     accuracy    with TTA     seconds    images/s")
        for name, run in found.items():
            print(f"  {name:18} {_cells(run, RUN_FIGURES[:2], '12.4f')} {_cells(run, RUN_FIGURES[3:5], '11.1f')}")
    if steps := step_times(plan):
        print("\nspeed of the training step in images/s")
        for row in steps:
            rates = {name: value for name, value in row.items() if name.endswith("_images_per_second")}
            print(f"  {row['recipe']:10} batch {row['batch_size']:5} side {row['side']:3}  {_pairs(rates)}")


def _cells(values: Mapping[str, Any], names: Sequence[str], form: str) -> str:
    width = form.partition(".")[0]
    return "".join(f"{values[name]:{form}}" if values[name] is not None else f"{'-':>{width}}" for name in names)


def _pairs(rates: Mapping[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_images_per_second')} {value:10.0f}" for name, value in rates.items())

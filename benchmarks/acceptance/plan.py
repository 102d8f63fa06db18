"""The stages of the acceptance run, most valuable first, because late stages are left out if time runs short."""

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.acceptance.runner import Stage

Command = tuple[str | Path, ...]

# The recipe, the batch size and the side of the crops in pixels, for each measurement of step times.
STEPS = (
    ("fast", 500, 16),
    ("fast", 500, 24),
    ("fast", 500, 32),
    ("fast", 1000, 32),
    ("fast", 2000, 32),
    ("baseline", 64, 32),
    ("baseline", 512, 32),
)
TINY = ("--device", "cpu", "--widths", "8", "8", "16", "16", "--batch-size", "16")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where an acceptance run reads and writes, and whether it is only a rehearsal. All paths are absolute."""

    data: Path  # the dataset; it is prepared first if it does not exist
    images: Path | None  # images from which the dataset is prepared
    out: Path  # figures and logs
    work: Path  # run directories, and the dataset if it is prepared here
    gpus: int  # number of GPUs; 0: a rehearsal

    @property
    def rehearse(self) -> bool:
        return self.gpus == 0

    def run_dir(self, name: str) -> Path:
        return self.work / "runs" / name


def all_stages(plan: Plan) -> list[Stage]:
    """All stages. The number of each stage is its time limit in seconds."""
    return [
        Stage("machine", 60, [*([] if plan.rehearse else [("nvidia-smi",)]), _python("ddp_trainer.doctor")]),
        Stage("data", 90, [_prepare(plan)]),
        Stage("tests", 150, [_tests(plan)]),
        Stage("fast", 60, [_train(plan, "fast")]),
        Stage("step times", 150, [_step_time(plan, *row) for row in (STEPS[2:3] if plan.rehearse else STEPS)]),
        Stage("baseline", 75, [_train(plan, "baseline")]),
        Stage("launch file and kills", 90, [_launch(plan), _kills(plan)], together=True),
        Stage("runs together", 120, _runs_together(plan), together=True),
        Stage("profile", 45, [_profile(plan), ("cp", plan.run_dir("profile") / "trace.json.gz", plan.out)]),
        Stage("loader", 45, [_benchmark(plan, "loading"), _benchmark(plan, "reliability")]),
        Stage("strong", 60, [_train(plan, "strong")]),
        Stage("long", 90, [_train(plan, "long")]),
    ]


def _python(module: str, *arguments: str | Path) -> Command:
    return (sys.executable, "-W", "ignore", "-m", module, *arguments)


def _prepare(plan: Plan) -> Command:
    flags: Command = () if plan.images is None else ("--images", plan.images)
    size: Command = ("--train-count", "96", "--test-count", "40") if plan.rehearse else ()
    return _python("benchmarks.acceptance.images", "--out", plan.data, *flags, *size)


def _tests(plan: Plan) -> Command:
    """All tests that can use a GPU, except the tests of the benchmarks: other stages run the benchmarks."""
    chosen: Command = ("-m", "gpu", "tests", "--ignore", "tests/whole_path/test_benchmarks.py", "--numprocesses", "4")
    if plan.rehearse:
        chosen = ("tests/whole_path/test_trainer_on_device.py", "-k", "cpu and not cuda")
    return _python("pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={plan.out / 'junit.xml'}", *chosen)


def _train(plan: Plan, recipe: str, *, name: str = "", flags: Command = (), launcher: Command = ()) -> Command:
    """The command that trains `recipe`. `launcher`: a module that starts the trainer, followed by its own flags."""
    tiny = (
        (*TINY, "--epochs", "1", "--max-steps", "2", "--small-crops", "", "--freeze-late", "") if plan.rehearse else ()
    )
    files: Command = ("--data-dir", plan.data, "--out", plan.run_dir(name or recipe), "--wandb", "disabled")
    modules: Command = (*launcher, "-m", "ddp_trainer.train") if launcher else ("ddp_trainer.train",)
    return _python(*modules, recipe, *files, *flags, *tiny)  # type: ignore[arg-type]


def _runs_together(plan: Plan) -> list[Command]:
    """Runs of several recipes and seeds, all at once on the same GPU. Only their accuracies count, not their times."""
    seeds = [("fast", 1), ("fast", 2), ("strong", 1), ("baseline", 1), ("long", 1)]
    return [_train(plan, recipe, name=f"{recipe}-{seed}", flags=("--seed", str(seed))) for recipe, seed in seeds]


def _launch(plan: Plan) -> Command:
    """The command that trains through a launch file: one process for each GPU, or CPU processes in a rehearsal."""
    file = "launch/cpu_processes.yaml" if plan.rehearse else "launch/all_gpus.yaml"
    launcher: Command = ("accelerate.commands.launch", "--config_file", file)
    return _train(plan, "fast", name="launch-file", flags=("--epochs", "2"), launcher=launcher)


def _profile(plan: Plan) -> Command:
    steps = ("--profile", "1") if plan.rehearse else ("--profile", "10", "--max-steps", "60")
    return _train(plan, "fast", name="profile", flags=steps)


def _step_time(plan: Plan, recipe: str, batch_size: int, side: int) -> Command:
    result = plan.out / f"step-{recipe}-{batch_size}-{side}.json"
    flags: Command = ("--recipe", recipe, "--side", str(side), "--data-dir", plan.data, "--result", result)
    if plan.rehearse:
        return _python("benchmarks.training_step", *flags, *TINY, "--rounds", "1", "--steps", "1")
    size: Command = ("--rounds", "3", "--steps", "50", "--batch-size", str(batch_size))
    return _python("benchmarks.training_step", *flags, *size)


def _benchmark(plan: Plan, name: str) -> Command:
    command = _python(f"benchmarks.{name}", "--data-dir", plan.data, "--result", plan.out / f"{name}.json")
    if not plan.rehearse:
        return command
    # A rehearsal uses the CPU. These benchmarks have no --device flag, so the GPUs are hidden from them.
    return ("env", "CUDA_VISIBLE_DEVICES=", *command, "--batch-size", "4", "--rounds", "1")


def _kills(plan: Plan) -> Command:
    """The command that stops runs at random times. A resumed run must equal an uninterrupted one, bit for bit."""
    times = str(max(4 // max(plan.gpus, 1), 1))  # fewer with several GPUs, because each number of processes is tested
    chosen: Command = ("--parts", "kills", "signals", "--kills", times, "--signals", times, "--device", "cuda")
    if plan.rehearse:
        chosen = ("--parts", "kills", "--kills", "1")
    return _python("tests.soak", *chosen, "--result", plan.out / "kills.json")

"""Train: `accelerate launch -m ddp_trainer.train [RECIPE] [--flag value ...]` starts or resumes a run.

`python -m ddp_trainer.train` does the same with one process.

`run_training` shows all stages of a run in order; each is implemented in the file from which it is imported. Slow
imports are inside functions, so that a signal that arrives during an import already counts as a request to stop.
"""

import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_prep.streams import forgiving_output
from ddp_trainer.distributed.faults import reported_faults
from ddp_trainer.distributed.process_end import exit_process, release_run
from ddp_trainer.distributed.signals import Preempted, StopRequest

if TYPE_CHECKING:
    from ddp_trainer.config import TrainConfig
    from ddp_trainer.engine.observer import Observer
    from ddp_trainer.run.result import RunResult


def run_training(config: "TrainConfig", stop: StopRequest, *, observer: "Observer | None" = None) -> "RunResult | None":
    """Starts or resumes a run, and returns its result when it ends. Returns None on every rank but the main one.

    Only three methods of `observer` are called: `step_done`, `step_record` and `epoch_done`. Each is called at the end
    of the `Recorder` method with the same name. `Recorder` records the run.

    Raises InputError for wrong input, before the first step.
    """
    from ddp_trainer.distributed.hardware import require_exact_fp32, resolve_device
    from ddp_trainer.distributed.launch import check_machine

    launch = check_machine(config.runtime)  # before the imports below, which take seconds
    require_exact_fp32(resolve_device(config.runtime))
    from data_prep.dataset import read_dataset, verify_dataset
    from ddp_trainer.engine.build import build_trainer, prepare_network
    from ddp_trainer.engine.passes import resolve_passes
    from ddp_trainer.engine.train_state import require_fitting
    from ddp_trainer.run.checks import check_settings
    from ddp_trainer.run.directory import claim_run_directory
    from ddp_trainer.run.outputs import complete_results, write_results
    from ddp_trainer.run.processes import join_processes
    from ddp_trainer.run.recorder import describe_plan, open_recorder
    from ddp_trainer.run.result import result_of
    from ddp_trainer.run.resume import StartKind, find_start, load_state, thread_warnings

    dataset = read_dataset(config.data.data_dir)
    num_images = check_settings(config, dataset, world_size=launch.world_size)
    verify_dataset(config.data.data_dir, dataset, full=config.data.verify == "full")
    with claim_run_directory(config, is_main=launch.is_main) as run_dir:
        start = find_start(run_dir, config, last_step=config.schedule.last_step(num_images))
        with join_processes(config, dataset, stop, start) as (runtime, start):
            state = load_state(start, config, dataset, precision=runtime.precision)
            if start.kind == StartKind.FINISHED:
                complete_results(run_dir, config)
                return result_of(run_dir)
            network, notes = prepare_network(config, dataset, world_size=runtime.world_size, load_weights=state is None)
            if state is not None:
                require_fitting(network, state)
                notes += thread_warnings(config, runtime)
            config = resolve_passes(config, runtime, dataset, network, saved=state)
            with open_recorder(run_dir, config, dataset, runtime, state, observer) as recorder:
                try:
                    runtime.stop.raise_if_asked()
                    trainer = build_trainer(config, runtime, dataset, network=network, observer=recorder)
                    recorder.say("\n".join([describe_plan(trainer), *notes]))
                    if state is not None:
                        trainer.state.load_state_dict(state)
                        recorder.say(f"resuming {config.run.out} after step {trainer.state.step}")
                    write_results(trainer, trainer.fit(), recorder)
                except Preempted:
                    recorder.preempted()
            return result_of(run_dir)


def train_here(
    recipe: "str | TrainConfig" = "baseline", *, observer: "Observer | None" = None, **settings: Any
) -> "RunResult | None":
    """Trains in this process and returns the result, or None on every rank but the main one.

    `observer` is called on the main rank; derive it from `ddp_trainer.engine.observer.Observer`. Ctrl-C saves a
    checkpoint and returns a result whose state is "preempted". A second Ctrl-C raises KeyboardInterrupt or, with
    several ranks, ends the process, because the ranks may be waiting for each other.
    """
    from ddp_trainer.distributed.launch import Launch
    from ddp_trainer.run.api import configure

    config = configure(recipe, settings)
    stop = StopRequest(keeps_process=Launch.from_environment().world_size == 1)
    with forgiving_output(), stop.listening(), reported_faults():
        try:
            return run_training(config, stop, observer=observer)
        finally:
            release_run()


@forgiving_output()  # before `listening`, whose pipe would otherwise take the place of a closed stdout or stderr
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if the run is finished or was stopped by a signal, 2 for wrong input, 1 otherwise."""
    stop = StopRequest()
    with stop.listening(), reported_faults():
        from ddp_trainer.command_line import SMALLER_STEPS, parse_command_line, program_name, run_command
        from ddp_trainer.recipes import describe_recipes

        def run() -> None:
            words, program = sys.argv[1:] if argv is None else argv, program_name("ddp_trainer.train")
            run_training(parse_command_line(words, prog=program, description=describe_recipes()), stop)

        return run_command(run, launched=True, memory_fix=SMALLER_STEPS)


def main_process() -> None:
    """Calls `main` and ends the process. Entry point of `python -m ddp_trainer.train` and `ddp-train`."""
    exit_process(main())


class _CallableModule(types.ModuleType):
    """Makes this module callable, because `ddp_trainer.train` is both this module and a function of the Python API."""

    def __call__(self, *args: Any, **settings: Any) -> "RunResult | None":
        return train_here(*args, **settings)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    main_process()

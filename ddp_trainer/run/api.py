"""The Python function `launch`, which trains in new processes.

`ddp_trainer.train`, which trains in the current process, is `train_here` in train.py. Both functions accept a recipe,
as a name or a TrainConfig, and settings as keyword arguments, such as `batch_size` for --batch-size. An invalid setting
raises InputError, with the same message as on the command line.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from data_prep.dataset import read_dataset
from data_prep.errors import require
from data_prep.files import read_json
from ddp_trainer.command_line import adapt_to_network, as_flags, parse_flags, recipe_named, stderr
from ddp_trainer.config import TrainConfig, importing_network
from ddp_trainer.distributed.launch import ONE_MACHINE
from ddp_trainer.recipes import RECIPES
from ddp_trainer.run.checks import check_settings
from ddp_trainer.run.lock import new_folder, remove_unused
from ddp_trainer.run.result import RunResult

# Without `end_with_parent`, the run would continue unnoticed after a notebook's kernel is restarted or a script is
# killed. The launcher must not read the user's Accelerate configuration, which may ask for FSDP, a CPU or other GPUs.
START_LAUNCHER = """
import runpy, signal
from data_prep.parent import end_with_parent
end_with_parent(signal.SIGTERM)  # before the slow import of Accelerate
import accelerate.commands.config
accelerate.commands.config.default_config_file = ""
runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
"""


def configure(recipe: str | TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`recipe` with `settings` applied. Raises InputError for an unknown recipe or setting, or an invalid value."""
    importing = importing_network.get()
    require(
        not importing,
        f"the module of --network {importing} starts a run when it is imported; move the call of "
        "train or launch into an if __name__ == '__main__' block",
    )
    if isinstance(recipe, str):
        recipe = recipe_named(recipe)
    adapted = adapt_to_network(recipe, settings.get("network"), original=RECIPES.get(recipe.recipe))
    return parse_flags(TrainConfig, as_flags(settings), prog="ddp_trainer.train", default=adapted)


def launch(recipe: str | TrainConfig = "baseline", *, num_processes: int, **settings: Any) -> RunResult:
    """Trains in `num_processes` new processes under `accelerate launch`, and returns the result.

    This works in a notebook that has already initialized CUDA. The new processes print on this process's stderr, and
    can import every module that this process can import, such as your network's module in the folder of your script.
    Ctrl-C saves a checkpoint and returns. A second Ctrl-C raises KeyboardInterrupt without waiting for the processes.
    Raises InputError for an invalid setting, and RuntimeError if the run fails, for example because its network cannot
    be built.
    """
    require(num_processes >= 1, f"num_processes must be at least 1, got {num_processes}")
    config = configure(recipe, settings)
    changed = _changes(config)
    check_settings(config, read_dataset(config.data.data_dir), world_size=num_processes)  # raises InputError
    out = config.run.out or new_folder(config.recipe)
    several = ("--multi_gpu",) if num_processes > 1 else ()
    processes = (*several, "--num_processes", str(num_processes))
    launcher = [sys.executable, "-c", START_LAUNCHER, *ONE_MACHINE, *processes]
    words = as_flags({**changed, "out": out})
    status, interrupted = _run_shown([*launcher, "-m", "ddp_trainer.train", config.recipe, *words])
    # After Ctrl-C, the launcher's status is not 0, whatever the processes did.
    if status == 0 or (interrupted and _has_stopped_cleanly(out)):
        return RunResult.of(out)
    if interrupted:
        raise KeyboardInterrupt
    if config.run.out is None:
        remove_unused(out)
    folder = f" in {out}" if out.exists() else ""
    raise RuntimeError(f"the run{folder} failed with exit status {status}; its messages are above")


def _changes(config: TrainConfig) -> dict[str, Any]:
    """The settings in which `config` differs from its recipe, after the recipe was adapted to the network of `config`.

    See `adapt_to_network`. Raises InputError if no recipe has the name in `config`.
    """
    require(
        config.recipe in RECIPES,
        f"launched processes do not know a recipe named '{config.recipe}'; "
        f"derive your configuration from one of {', '.join(RECIPES)}, and keep its name",
    )
    usual = adapt_to_network(RECIPES[config.recipe], config.network.network).flat()
    return {name: value for name, value in config.flat().items() if value != usual[name]}


def _has_stopped_cleanly(out: Path) -> bool:
    return (read_json(out / "status.json") or {}).get("state") in ("preempted", "done")


def _terminate(launcher: int) -> None:
    """Sends SIGTERM to a launcher, and to its processes: a new one does not notice yet that its launcher ends."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(launcher)
        for process in (*parent.children(), parent):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _run_shown(command: list[str]) -> tuple[int, bool]:
    """Runs `command` and prints its output as it arrives. Returns its exit status, and whether Ctrl-C was pressed.

    After Ctrl-C, asks the command to stop, and waits for its end. After a second Ctrl-C, kills it.
    """
    interrupted, asked, output = False, False, stderr()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, ["", *sys.path]))}
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        errors="replace",  # the output may not be valid text
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while True:
            try:
                if interrupted and not asked:  # here, a second Ctrl-C is handled below
                    asked = True
                    _terminate(process.pid)
                for line in process.stdout:
                    with contextlib.suppress(OSError, ValueError):  # nobody may read the output any more
                        if output is not None:
                            output.write(line)
                return process.wait(), interrupted
            except BaseException as error:
                if interrupted or not isinstance(error, KeyboardInterrupt):
                    with contextlib.suppress(ProcessLookupError):
                        # The training processes may still be running after the launcher has ended.
                        os.killpg(process.pid, signal.SIGKILL)
                    raise
                interrupted = True

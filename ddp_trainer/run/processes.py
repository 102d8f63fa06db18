"""Joins the other processes of a run, and agrees with them on where the run starts."""

import contextlib
import json
from collections.abc import Iterator

from data_prep.dataset import DatasetInfo
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.process_settings import require_usual_modes, restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.run.resume import Start, StartKind
from ddp_trainer.run.settings import settings_of

# Settings that may change on --resume, but must be the same on all ranks, because they decide when the ranks run
# collective operations.
SAME_ON_ALL_RANKS = (
    *("resume", "max_steps", "checkpoint_every_steps", "log_every_steps"),
    *("graph", "compile", "profile"),  # decide whether steps are captured, which must be the same on all ranks
)
DIFFERENT_SETTINGS = "the processes have different settings or datasets; start them all with the same flags and dataset"


@contextlib.contextmanager
def join_processes(
    config: TrainConfig, dataset: DatasetInfo, stop: StopRequest, start: Start
) -> Iterator[tuple[Runtime, Start]]:
    """Joins the other processes, and yields the runtime of this process and the `start` of the main process.

    Leaves the process group after the block, but not after an error: other processes may be gone, and leaving would
    wait for them. After the block, restores settings of this process that the run changes, such as torch's number of
    threads.
    """
    require_usual_modes()
    with restored_settings():
        runtime = Runtime(config.runtime, stop=stop)
        settings = {name: value for name, value in config.flat().items() if name in SAME_ON_ALL_RANKS}
        settings |= settings_of(config, dataset, precision=runtime.precision)
        settings |= {"evaluated images": dataset.splits["test"].sha256, "classes": dataset.classes}
        runtime.require_agreement(json.dumps(settings), DIFFERENT_SETTINGS)
        kind, step = runtime.agree_on(*start)
        yield runtime, Start(StartKind(kind), step)
        runtime.close()

"""Makes the records of steps.jsonl: mean loss and accuracy over the steps since the previous record.

The values are read one step later, so that the host need not wait for the current step.
"""

from torch import Tensor

from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.engine.metrics import averages
from ddp_trainer.tracking.metric_files import Record


class StepLog:
    """Turns running sums into records. A record is copied to the host while the next step runs."""

    def __init__(self, every: int, *, timeout: float) -> None:
        """`every`: steps between two records; 0: no records. `timeout`: seconds to wait for a step to finish."""
        self._every, self._timeout = every, timeout
        self._pending: tuple[Record, HostCopy] | None = None

    def is_due(self, step: int) -> bool:
        """`step`: number of steps done."""
        return bool(self._every) and step % self._every == 0

    def add(self, position: Record, sums: Tensor) -> None:
        """Adds a record. `position`: the entries of the record that are already known.

        `sums`: (3,) as in `RunningSums`, over the images of all ranks since the previous record.
        """
        self._pending = (position, HostCopy(sums))

    def take(self) -> Record | None:
        """The pending record; None if there is none, or if all of its steps were skipped.

        Call it one step after `add`, or before the state is saved. Raises TimeoutError if the device does not finish
        the last step of the record in time.
        """
        if self._pending is None:
            return None
        (position, sums), self._pending = self._pending, None
        means = averages(sums.read(timeout=self._timeout))
        if not means.num_images:
            return None
        return {**position, "train_loss": means.loss, "train_accuracy": means.accuracy}

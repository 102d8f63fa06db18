"""The result that a run returns to Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.files import read_json

if TYPE_CHECKING:
    from torch import nn

    from ddp_trainer.run.directory import RunDirectory


@dataclass(frozen=True)
class RunResult:
    """A run directory, and what its files say about the run."""

    path: Path
    # From status.json. After `train` or `launch`: "done", or "preempted" if Ctrl-C or another signal stopped the run.
    state: str
    summary: dict[str, Any]  # content of summary.json; empty unless the run is done

    @classmethod
    def of(cls, path: Path) -> "RunResult":
        """The result of the run in `path`. Raises InputError if `path` is not a run directory."""
        status = read_json(path / "status.json")
        if status is None:
            raise InputError(f"{path} is not a run directory: it has no status.json")
        return cls(path, str(status.get("state")), read_json(path / "summary.json") or {})

    @property
    def accuracy(self) -> float | None:
        """Share of correct predictions on the evaluated images, 0 to 1; None unless the run is done."""
        return self.summary.get("test_accuracy")

    @property
    def report(self) -> Path:
        """Path of the run's HTML report."""
        return self.path / "report" / "index.html"

    def model(self) -> "nn.Module":
        """The trained network, in evaluation mode, on the CPU. Raises InputError if the run has no model yet."""
        from ddp_trainer.models.spec import load_model

        return load_model(self.path)[0]


def result_of(run_dir: "RunDirectory | None") -> RunResult | None:
    return None if run_dir is None else RunResult.of(run_dir.path)

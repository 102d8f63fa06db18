"""Distributed training of image classifiers, from Python (`ddp_trainer.train("fast", ...)`) or the command line.

Importing the package is fast: torch and the modules of the package are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.errors import InputError
    from ddp_trainer.models.spec import load_model
    from ddp_trainer.recipes import RECIPES
    from ddp_trainer.run.api import launch
    from ddp_trainer.run.result import RunResult
    from ddp_trainer.tracking.run_record import load_run
    from ddp_trainer.train import train_here as train

__version__ = "0.1.0"
__all__ = ["RECIPES", "InputError", "RunResult", "__version__", "launch", "load_model", "load_run", "train"]

_HOMES = {
    "InputError": "data_prep.errors",
    "RECIPES": "ddp_trainer.recipes",
    "RunResult": "ddp_trainer.run.result",
    "launch": "ddp_trainer.run.api",
    "load_model": "ddp_trainer.models.spec",
    "load_run": "ddp_trainer.tracking.run_record",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the module itself, which is callable: see the end of train.py
        return importlib.import_module("ddp_trainer.train")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

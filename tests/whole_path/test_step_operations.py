"""A training step stays within a budget of operations: on a fast GPU, the time of a step depends on their number.

These tests count torch operations on the CPU, so they run everywhere. `test_fake_cuda.py` counts what would be launched
on a GPU, but needs gcc and a torch with CUDA.
"""

import pytest
import torch

from data_prep.augment import NUM_DRAWS
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.models import small_map_conv
from ddp_trainer.recipes import RECIPES
from tests.support.blank_steps import blank_batch, blank_trainer
from tests.support.narrow import changed
from tests.support.operations import CountOperations

# Each budget is at most two operations above the count in docs/results.md.
BUDGET = {"fast": 250, "strong": 250, "long": 256, "baseline": 145}


@pytest.mark.parametrize("recipe", BUDGET)
def test_step_stays_within_its_budget_of_operations(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the operations of the second step, because the first one creates momentum and constants."""
    # Turns off Conv3x3's matrix products, which are used only for small feature maps on a CPU and take more operations.
    monkeypatch.setattr(small_map_conv, "LARGEST_SIDE", 0)
    config = changed(RECIPES[recipe], {"schedule": {"batch_size": 4}})
    batch, draws = blank_batch(4, torch.device("cpu")), torch.zeros((NUM_DRAWS, 4), dtype=torch.int64)
    with restored_settings():
        runtime = Runtime(RuntimeConfig(device="cpu", precision="bf16"), stop=StopRequest())
        trainer = blank_trainer(config, runtime)
        trainer.train_step(batch, 0, draws)
        with CountOperations() as count:
            trainer.train_step(batch, 0, draws)
    assert count.total <= BUDGET[recipe], count.names.most_common()

"""A training step stays within a budget of operations: on a fast GPU, their number determines the time of a step."""

import pytest
import torch

from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from tests.support.blank_steps import blank_batch, blank_trainer, changed_recipe
from tests.support.operations import CountOperations

# At most three more than the counts in docs/results.md.
BUDGET = {"fast": 345, "strong": 345, "long": 367, "baseline": 214}


@pytest.mark.parametrize("recipe", BUDGET)
def test_step_stays_within_its_budget_of_operations(recipe: str) -> None:
    """Counts the operations of the second step, because the first one creates momentum and constants."""
    config = changed_recipe(recipe, schedule={"batch_size": 4})
    batch = blank_batch(4, torch.device("cpu"))
    with restored_settings():
        runtime = Runtime(RuntimeConfig(device="cpu", precision="bf16"), stop=StopRequest())
        trainer = blank_trainer(config, runtime)
        trainer.train_step(batch, epoch=0)
        with CountOperations() as count:
            trainer.train_step(batch, epoch=0)
    assert count.total <= BUDGET[recipe], count.names.most_common()

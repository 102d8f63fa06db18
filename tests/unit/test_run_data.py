"""The data of a run: each batch comes with the random bits that decide how its images are augmented."""

from pathlib import Path

import pytest
import torch

from data_prep.dataset import read_dataset
from ddp_trainer.engine import data as data_module
from ddp_trainer.engine.data import build_data
from tests.support.narrow import narrow_settings, single_runtime


@pytest.mark.parametrize("balance", ["none", "batches"])
def test_each_step_gets_random_bits_for_its_images(
    balance: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are computed for groups of steps. The last group is smaller than the others."""
    monkeypatch.setattr(data_module, "STEPS_PER_DRAW", 2)
    changes = {"data": {"balance": balance}, "augment": {"flip": "alternating"}, "schedule": {"batch_size": 16}}
    config, runtime = narrow_settings(tiny_dir, **changes), single_runtime()
    data = build_data(config, runtime, read_dataset(tiny_dir))
    earlier_draws = data.plan(3, config=config, runtime=runtime).earlier_draws
    assert (earlier_draws is None) == (balance == "none")
    steps = list(data.batches(3, slice(1, None), config=config, runtime=runtime))
    assert len(steps) == 5
    for row, (batch, draws) in enumerate(steps):
        epoch = 3 if earlier_draws is None else torch.from_numpy(earlier_draws[1 + row])
        assert torch.equal(draws, data.augmenter.draw(batch.indices, epoch))

"""The data of a run: each batch comes with the random bits that decide how its images are augmented."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.dataset import read_dataset
from ddp_trainer.engine import data as data_module
from ddp_trainer.engine.data import build_data
from tests.support.narrow import narrow_settings, single_runtime


def test_the_seed_decides_the_order_the_augmentation_and_the_held_out_images(tiny_dir: Path) -> None:
    dataset, runtime, found = read_dataset(tiny_dir), single_runtime(), []
    for seed in (0, 1):
        config = narrow_settings(tiny_dir, data={"validation": 20}, runtime={"seed": seed})
        data = build_data(config, runtime, dataset)
        samples = np.concatenate(list(data.plan(0).samples))
        order = torch.from_numpy(np.searchsorted(data.samples, samples))  # positions among the images to train on
        held_out = torch.as_tensor(data.evaluator.samples)
        found.append((order, data.augmenter.draw(torch.arange(9), 0), held_out))
    for name, one, other in zip(("order", "augmentation", "held-out images"), *found, strict=True):
        assert not torch.equal(one, other), name


@pytest.mark.parametrize("balance", ["none", "batches"])
def test_each_step_gets_random_bits_for_its_images(
    balance: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are computed for groups of steps. The last group is smaller than the others."""
    monkeypatch.setattr(data_module, "STEPS_PER_DRAW", 2)
    changes = {"data": {"balance": balance}, "augment": {"flip": "alternating"}, "schedule": {"batch_size": 16}}
    config, runtime = narrow_settings(tiny_dir, **changes), single_runtime()
    data = build_data(config, runtime, read_dataset(tiny_dir))
    earlier_draws = data.plan(3).earlier_draws
    assert (earlier_draws is None) == (balance == "none")
    steps = list(data.batches(3, slice(1, None)))
    assert len(steps) == 5
    for row, (batch, draws) in enumerate(steps):
        epoch = 3 if earlier_draws is None else torch.from_numpy(earlier_draws[1 + row])
        assert torch.equal(draws, data.augmenter.draw(batch.indices, epoch))

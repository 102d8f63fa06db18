"""--accumulate auto splits a batch into the fewest passes that fit into memory. Measuring memory changes no state."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.config import TrainConfig
from ddp_trainer.engine import passes
from ddp_trainer.engine.passes import (
    FEW_IMAGES,
    MORE_IMAGES,
    MemoryNeed,
    has_room,
    peak_of_pass,
    resolve_passes,
)
from ddp_trainer.engine.peak_memory import PeakMemory
from ddp_trainer.models.spec import ModelSpec, build_network
from tests.support.narrow import changed, narrow_settings, single_runtime
from tests.support.stepping import differences


@pytest.mark.parametrize(
    ("images", "fitting", "expected"),
    [(12, 100, 1), (12, 12, 1), (12, 11, 2), (12, 5, 3), (12, 2, 6), (7, 4, 2), (7, 3, 3), (1, 1, 1)],
)
def test_the_fewest_passes_that_fit_are_tried_first(images: int, fitting: int, expected: int) -> None:
    assert passes.passes_to_try(images, fitting=fitting, smallest_share=images)[0] == expected


@pytest.mark.parametrize(("images", "fitting", "smallest"), [(12, 1, 12), (7, 2, 7), (12, 0, 12), (7, 3, 5)])
def test_nothing_is_tried_if_a_rank_would_have_fewer_than_two_images_in_a_pass(
    images: int, fitting: int, smallest: int
) -> None:
    assert not passes.passes_to_try(images, fitting=fitting, smallest_share=smallest)


@pytest.mark.parametrize(
    ("need", "available", "expected"),
    [
        (MemoryNeed(fixed=0, per_image=10), 1000, 100),
        (MemoryNeed(fixed=400, per_image=10), 1000, 60),
        (MemoryNeed(fixed=405, per_image=10), 1000, 59),
        (MemoryNeed(fixed=1200, per_image=10), 1000, 0),
    ],
)
def test_number_of_images_that_fit_follows_from_fixed_and_per_image_memory(
    need: MemoryNeed, available: int, expected: int
) -> None:
    assert need.images_that_fit(available) == expected


def test_peak_counts_each_tensor_while_it_exists() -> None:
    with PeakMemory() as memory:
        one = torch.zeros(1000)
        two = one + 1
        two.add_(1)
        view = two.view(10, 100)[3:]
        del one
        three = view * 2  # 7 of 10 rows
        del two, view
        four = three + 1
    assert memory.peak == 8000
    del three, four
    with memory:
        five = torch.zeros(1500)  # all earlier tensors are deleted
        six = five + 1
    assert memory.peak == 12000
    del five, six


def test_peak_includes_what_the_backward_pass_needs() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with PeakMemory() as memory:
        (weight.exp().exp().exp().sum()).backward()
    assert memory.peak >= 3 * 4000 + 4000  # three results of exp, kept for the backward pass, and a gradient


def dropout_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2))


def test_measuring_the_memory_of_a_pass_changes_no_state() -> None:
    runtime, network = single_runtime(), dropout_network()
    network(torch.zeros(2, 3, 8, 8))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    assert peak_of_pass(network, runtime, (4, 8)) > 0
    assert differences(network.state_dict(), before) == []
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    network(torch.zeros(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters()), "a later pass left no gradients"


@pytest.fixture
def config(tiny_dir: Path) -> TrainConfig:
    """Settings with batches of 32 images."""
    return narrow_settings(tiny_dir)


def network_of(config: TrainConfig) -> nn.Module:
    return build_network(config.network, ModelSpec.of(read_dataset(config.data.data_dir), config))


def test_two_small_passes_predict_the_memory_of_a_large_one(config: TrainConfig) -> None:
    runtime, model = single_runtime(), network_of(config)
    few, more, large = (peak_of_pass(model, runtime, (count, 32)) for count in (FEW_IMAGES, MORE_IMAGES, 64))
    predicted = few + (more - few) / (MORE_IMAGES - FEW_IMAGES) * (64 - FEW_IMAGES)
    assert large == pytest.approx(predicted, rel=0.03)


Resolve = Callable[..., int]


@pytest.fixture
def resolve(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """A function that returns the number of passes chosen if `fitting` images fit into memory at once."""

    def passes_of(fitting: float) -> int:
        auto = changed(config, {"schedule": {"accumulate": "auto"}})
        runtime, dataset = single_runtime(), read_dataset(config.data.data_dir)
        model = runtime.place(network_of(config))
        need = passes._need(auto, runtime, dataset, model, side=32)
        free = (need.fixed + fitting * need.per_image) / 0.5  # a run uses at most half of the free memory
        monkeypatch.setattr(passes, "free_memory", lambda device: free)
        return resolve_passes(auto, runtime, dataset, model).schedule.passes

    return passes_of


@pytest.mark.parametrize(
    ("fitting", "expected"), [(1e6, 1), (32.1, 1), (31.9, 2), (16.1, 2), (15.9, 3), (8.1, 4), (2.1, 16)]
)
def test_the_fewest_passes_that_fit_are_chosen(resolve: Resolve, fitting: float, expected: int) -> None:
    assert resolve(fitting) == expected


def test_the_need_covers_the_training_state_the_batch_and_the_passes(config: TrainConfig) -> None:
    auto, runtime = changed(config, {"schedule": {"accumulate": "auto"}}), single_runtime()
    dataset, model = read_dataset(config.data.data_dir), network_of(config)
    need = passes._need(auto, runtime, dataset, model, side=32)
    # The weights, their gradients and two optimizer states in fp32, and a batch of images in uint8.
    state, batch = 4 * sum(parameter.nbytes for parameter in model.parameters()), 32 * 3 * 32**2
    assert need.fixed >= state + batch
    few, many = (peak_of_pass(model, runtime, (count, 32)) for count in (8, 64))
    assert need.per_image == pytest.approx((many - few) / 56, rel=0.05)


def test_too_little_memory_is_refused_in_one_line(resolve: Resolve) -> None:
    with pytest.raises(InputError, match=r"--accumulate auto: .* images of 32 pixels do not fit into memory") as caught:
        resolve(1.9)
    assert "\n" not in str(caught.value)


def test_a_number_of_passes_set_by_the_user_is_kept(config: TrainConfig) -> None:
    given = changed(config, {"schedule": {"accumulate": 4}})
    assert resolve_passes(given, single_runtime(), read_dataset(config.data.data_dir), network_of(config)) is given


class SmallMemory(nn.Module):
    """A network that runs out of memory in passes of more than 4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        if len(self.norm(images)) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.linear(images.mean(dim=(2, 3)))


def test_a_pass_that_runs_out_of_memory_changes_no_state() -> None:
    runtime, network = single_runtime(), SmallMemory()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert has_room(network, runtime, (4, 8), reserved=1000)
    assert not has_room(network, runtime, (5, 8), reserved=1000)
    assert differences(network.state_dict(), before) == []

"""Networks with unusual parameters and buffers are trained correctly, or refused in one line."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig
from ddp_trainer.engine.flops import training_flops_per_image
from ddp_trainer.models.blank_pass import blank_images
from ddp_trainer.models.check import check_network
from ddp_trainer.models.initial_weights import load_tensors
from ddp_trainer.models.registry import build
from ddp_trainer.models.spec import build_network
from tests.support.unusual_tensors import Counting, FrozenInHalf, with_repeated_buffer
from tests.unit.test_networks import SPEC


def test_the_images_are_in_float32_whatever_the_dtype_of_the_frozen_layers() -> None:
    network = FrozenInHalf(converts=True)
    assert blank_images(network, 1, 32).dtype == torch.float32
    assert check_network(network, "frozen", num_classes=5, sides=[32]) == []
    network = FrozenInHalf(converts=False)  # works only in autocast, which `predict` and exports do not use
    with pytest.raises(InputError, match="fails on images"):
        check_network(network, "frozen", num_classes=5, sides=[32])


def test_the_operations_of_a_network_that_passes_the_check_can_be_counted() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    network.register_parameter("first", nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False))
    assert next(network.parameters()).dtype == torch.float64
    assert check_network(network, "frozen", num_classes=5, sides=[32]) == []
    assert training_flops_per_image(network, 32) == 2 * 2 * 3 * 32 * 32 * 5


def test_a_buffer_whose_elements_share_their_memory_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"elements of mask share memory, for example after expand\(\); add \.clone\(\)"
    ):
        check_network(with_repeated_buffer(5), "own", num_classes=5, sides=[32])


def test_scales_that_start_at_zero_are_trained_because_they_would_block_the_gradients() -> None:
    spec = replace(SPEC, architecture="tests.support.unusual_tensors:starts_at_zero")
    network = build_network(NetworkConfig(freeze_bn_scale=True), spec)
    scales = [layer.weight.requires_grad for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert scales == [False, True]


def test_a_counter_that_is_not_saved_is_refused() -> None:
    with pytest.raises(InputError, match=r"changes buffers in training that are not in a checkpoint \(passes\)"):
        check_network(Counting(5), "own", num_classes=5, sides=[32])


def test_a_network_that_needs_the_versions_of_its_layers_can_be_loaded() -> None:
    networks = [
        build("torchvision:mnasnet0_5", num_classes=5, widths=(8, 8, 16, 16), activation="relu") for _ in range(2)
    ]
    load_tensors(networks[0], dict(networks[1].state_dict()))
    one, other = (torch.cat([value.flatten() for value in network.parameters()]) for network in networks)
    assert torch.equal(one, other)

"""Networks with unusual parameters and buffers are trained correctly, or refused in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig
from ddp_trainer.engine.build import prepare_network
from ddp_trainer.engine.ema import Ema
from ddp_trainer.engine.flops import training_flops_per_image
from ddp_trainer.models.check import check_network
from ddp_trainer.models.host_generators import HostGenerators
from ddp_trainer.models.initial_weights import load_tensors
from ddp_trainer.models.registry import build
from ddp_trainer.models.spec import build_network
from ddp_trainer.models.trial_pass import trial_images
from tests.support.narrow import narrow_settings
from tests.support.networks import with_buffer
from tests.support.unusual_tensors import Centering, Counting, FrozenInHalf, KeepsLoss, with_repeated_buffer
from tests.unit.test_networks import SPEC


def test_the_images_are_in_float32_whatever_the_dtype_of_the_frozen_layers() -> None:
    network = FrozenInHalf(converts=True)
    assert trial_images(network, 1, 32).dtype == torch.float32
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


def with_weight(weight: Tensor, *, trained: bool = True) -> nn.Module:
    network = nn.Sequential(nn.Flatten(start_dim=1), nn.Linear(3 * 32 * 32, 5))
    network.register_parameter("spare", nn.Parameter(weight, requires_grad=trained))
    return network


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 6)[:, :4],
        torch.zeros(8)[::2],
        torch.zeros(8).unfold(0, 4, 1),
        torch.zeros(8, 6, 3, 3)[:, :4],
        torch.zeros(8, 6, 3, 3).to(memory_format=torch.channels_last)[:, :4],
    ],
)
def test_a_trainable_parameter_with_gaps_is_refused(weight: Tensor, channels_last: bool) -> None:
    """On the CPU, the fused optimizers would update other elements of the tensor that was sliced."""
    network = with_weight(weight)
    expected = r"elements of spare overlap or have gaps .* for example after slicing; add \.clone\(\)"
    with pytest.raises(InputError, match=expected):
        check_network(network, "own", num_classes=5, sides=[32], channels_last=channels_last)
    for accepted in (with_weight(weight.clone()), with_weight(weight, trained=False)):
        check_network(accepted, "own", num_classes=5, sides=[32], channels_last=channels_last)


@pytest.mark.parametrize("weight", [torch.zeros(6, 8).T, torch.zeros(8, 6)[2:4], torch.zeros(1, 6)[:, :1]])
def test_a_parameter_without_gaps_may_have_any_strides(weight: Tensor) -> None:
    assert check_network(with_weight(weight), "own", num_classes=5, sides=[32]) == ["spare"]


def test_a_buffer_with_five_dimensions_is_refused_even_if_it_is_not_saved() -> None:
    network = with_buffer(5, torch.zeros(1, 1, 1, 1, 1), persistent=False)
    with pytest.raises(InputError, match=r"tensors with 5 dimensions, which torch.channels_last does not support"):
        check_network(network, "own", num_classes=5, sides=[32])
    assert check_network(network, "own", num_classes=5, sides=[32], channels_last=False) == []


def test_scales_that_start_at_zero_are_not_frozen() -> None:
    """If they were, no gradient would reach the layers before them."""
    spec = replace(SPEC, architecture="tests.support.unusual_tensors:starts_at_zero")
    network = build_network(NetworkConfig(freeze_bn_scale=True), spec)
    trained = [layer.weight.requires_grad for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert trained == [False, True]


@pytest.mark.parametrize(("network", "buffer"), [(Counting(5), "passes"), (Centering(5, moves=True), "center")])
def test_a_buffer_that_changes_and_is_not_saved_is_refused(network: nn.Module, buffer: str) -> None:
    with pytest.raises(InputError, match=rf"changes unsaved buffers in training \({buffer}\)"):
        check_network(network, "own", num_classes=5, sides=[32])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("with_random_constant", "gives other logits when it is built again"),
        ("SavesHead", "cannot load its own state_dict: .* Missing key.*backbone.weight"),
        ("always_the_same", "returns layers that its function has returned"),
        ("with_shared_backbone", "returns layers that its function has returned"),
    ],
)
def test_a_network_that_could_not_be_loaded_again_is_refused(name: str, problem: str, tiny_dir: Path) -> None:
    network = NetworkConfig(network=f"tests.support.unusual_tensors:{name}")
    config, dataset = replace(narrow_settings(tiny_dir), network=network), read_dataset(tiny_dir)
    with pytest.raises(InputError, match=problem) as caught:
        prepare_network(config, dataset, world_size=1, load_weights=False)
    assert "\n" not in str(caught.value)


def test_a_network_may_draw_random_numbers_in_evaluation(tiny_dir: Path) -> None:
    network = NetworkConfig(network="tests.support.unusual_tensors:DrawsInEvaluation")
    config, dataset = replace(narrow_settings(tiny_dir), network=network), read_dataset(tiny_dir)
    before = HostGenerators.read()
    prepare_network(config, dataset, world_size=1, load_weights=False)
    after = HostGenerators.read()._replace(torch=before.torch)  # torch's generator has drawn the initial weights
    assert after.equals(before)


def test_networks_may_share_a_constant(tiny_dir: Path) -> None:
    network = NetworkConfig(network="tests.support.unusual_tensors:with_shared_constant")
    config, dataset = replace(narrow_settings(tiny_dir), network=network), read_dataset(tiny_dir)
    prepare_network(config, dataset, world_size=1, load_weights=False)


def test_a_network_that_keeps_a_tensor_of_its_training_pass_can_be_averaged() -> None:
    network = KeepsLoss(5)
    assert check_network(network, "own", num_classes=5, sides=[32]) == []
    assert Ema(network, decay=0.9).module.loss.grad_fn is None
    network.loss = [network.loss]  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"--ema-decay: the network cannot be copied .* detach the tensors"):
        Ema(network, decay=0.9)


def test_a_buffer_of_a_type_that_torch_cannot_average_is_copied() -> None:
    network = with_buffer(5, torch.ones(3).to(torch.float8_e4m3fn))
    ema = Ema(network, decay=0.9)
    for value in (1.0, 2.0):
        network.get_buffer("extra").fill_(value)
        ema.update(network, skip=torch.tensor(False))
    assert ema.module.get_buffer("extra").tolist() == [2.0] * 3


def test_a_network_that_needs_the_versions_of_its_layers_can_be_loaded() -> None:
    networks = [
        build("torchvision:mnasnet0_5", num_classes=5, widths=(8, 8, 16, 16), activation="relu") for _ in range(2)
    ]
    load_tensors(networks[0], dict(networks[1].state_dict()))
    one, other = (torch.cat([value.flatten() for value in network.parameters()]) for network in networks)
    assert torch.equal(one, other)

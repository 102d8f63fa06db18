"""Networks with faults that show only in some passes are refused in one line, before the run starts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig
from ddp_trainer.engine.build import prepare_network
from ddp_trainer.models import registry
from ddp_trainer.models.autocast_check import check_autocast
from ddp_trainer.models.check import check_network
from ddp_trainer.models.spec import ModelSpec, check_input_size
from tests.support.faulty_networks import KeepsTensor, Raises, ResizesBuffer, Whitens
from tests.support.narrow import narrow_settings
from tests.support.networks import Fails

SPEC = ModelSpec(classes=tuple("abcde"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=32)


def prepare(name: str, precision: str, data_dir: Path) -> None:
    """Prepares a network of tests/support/faulty_networks.py, as a run does."""
    config = narrow_settings(data_dir, runtime={"precision": precision})
    config = replace(config, network=NetworkConfig(network=f"tests.support.faulty_networks:{name}"))
    prepare_network(config, read_dataset(data_dir), world_size=1, load_weights=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HasNoModes", r"has no training mode \(NotImplementedError: .*\); return a module whose train\(\)"),
        ("ForgetsToReturn", r"the method train\(\) must return the network; add return self"),
        ("ChangesInput", r"changes its input in place; start its forward pass with x = x\.clone\(\)"),
        ("ResizesBuffer", r"creates, replaces or resizes buffers in its forward pass \(highest\)"),
        ("NeedsFloat32", r"fails with --precision bf16 \(RuntimeError: Index put .*\); use --precision fp32"),
        ("built_in_inference_mode", r"build the network outside torch\.inference_mode\(\)"),
    ],
)
def test_a_faulty_network_is_refused_in_one_line(name: str, expected: str, tiny_dir: Path) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        prepare(name, "bf16", tiny_dir)
    assert "\n" not in str(caught.value)


def test_a_network_that_needs_float32_is_accepted_in_fp32(tiny_dir: Path) -> None:
    prepare("NeedsFloat32", "fp32", tiny_dir)


@pytest.mark.parametrize("name", ["ClampsInEvaluation", "Whitens", "KeepsGradientOfMean"])
def test_an_unusual_network_without_faults_is_accepted(name: str, tiny_dir: Path) -> None:
    prepare(name, "bf16", tiny_dir)


def test_a_trained_network_that_fails_on_blank_images_can_be_loaded() -> None:
    check_input_size(Whitens(5), SPEC, Path("model.json"))


def test_a_loaded_network_that_keeps_a_tensor_of_its_first_pass_can_be_trained() -> None:
    network = KeepsTensor(5)
    check_input_size(network, SPEC, Path("model.json"))
    network.train()(torch.ones(2, 3, 32, 32, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        RuntimeError("the operation does not have a deterministic implementation, but you set ..."),
    ],
)
def test_some_errors_are_not_blamed_on_the_network(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        check_autocast(Raises(error), "own", torch.zeros(2, 3, 32, 32), precision="bf16")
    assert caught.value is error


def test_a_failure_on_the_device_is_not_blamed_on_the_precision() -> None:
    with pytest.raises(InputError, match="fails on the device cpu: RuntimeError"):
        check_autocast(Fails(5), "own", torch.zeros(2, 3, 32, 32), precision="bf16")


def test_a_refused_network_gets_its_buffers_back() -> None:
    network = ResizesBuffer(5)
    with pytest.raises(InputError):
        check_network(network, "own", num_classes=5, sides=[32])
    assert network.highest.shape == (0,)


def test_a_network_on_the_default_device_of_its_module_is_refused() -> None:
    with torch.device("meta"), pytest.raises(InputError, match="must be built on the CPU"):
        check_network(nn.Linear(3, 5), "own", num_classes=5, sides=[32])


MOVES = """
import os
from tests.support.networks import small
os.chdir("/")
def build(num_classes):
    os.chdir("/")
    return small(num_classes)
"""


def test_a_network_that_changes_the_working_directory_does_not_move_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moves.py").write_text(MOVES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    registry.build("moves:build", num_classes=5, widths=(8, 8, 16, 16), activation="relu")
    assert Path.cwd() == tmp_path

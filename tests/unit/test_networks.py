"""Networks by name, and their parameter groups. Faulty networks are reported in one line."""

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig, OptimConfig, is_installed
from ddp_trainer.engine.build import prepare_network
from ddp_trainer.engine.optim import build_optimizer, parameter_groups
from ddp_trainer.models import registry
from ddp_trainer.models.check import check_network
from ddp_trainer.models.spec import ModelSpec
from tests.support import networks
from tests.support.narrow import narrow_settings
from tests.support.stepping import differences

OWN = "tests.support.networks:"
SPEC = ModelSpec(classes=tuple("abcde"), mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32)  # type: ignore[arg-type]


def build(name: str) -> nn.Module:
    return registry.build(name, num_classes=5, widths=(8, 8, 16, 16), activation="relu")


@pytest.mark.parametrize(
    "name",
    ["custom_resnet", "torchvision:resnet18", "torchvision:googlenet", f"{OWN}small", f"{OWN}partial", f"{OWN}Buffers"],
)
def test_a_network_is_found_by_its_name(name: str) -> None:
    network = build(name)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert check_network(network, name, num_classes=5, sides=[32]) in ([], ["unused.weight", "unused.bias"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "torchvision:NAME"),
        ("torchvision:resnet19", "similar: resnet18"),
        ("timm:resnet18", "pip install timm"),
        ("nowhere.to_be_found:build", "there is no module nowhere"),
        (f"{OWN}nothing", "has no function nothing"),
        (f"{OWN}cannot_be_built", "ValueError: no weights for 5 classes"),
        (f"{OWN}no_module", "must return a torch.nn.Module, got str"),
        ("os:abort", "os is a module of Python's standard library; use a function of your own"),
        ("subprocess:Popen", "a function of your own"),
        (f"{OWN}copy", "has no function copy"),
        ("__main__:build", "put it into a file, such as net.py, and use net:build"),
        ("nets/mine.py:build", "got nets/mine.py:build; use nets.mine:build"),
        ("./mine.py:build", "got ./mine.py:build; use mine:build"),
        ("/some/where/mine.py:build", "got /some/where/mine.py:build; use PYTHONPATH=/some/where and mine:build"),
    ],
)
def test_an_invalid_network_name_is_reported_in_one_line(name: str, expected: str) -> None:
    if name.startswith("timm:") and is_installed("timm"):
        pytest.skip("timm is installed")
    with pytest.raises(InputError) as caught:
        build(name)
    assert expected in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` puts the current folder on the module search path, but a command such as ddp-train does not."""
    (tmp_path / "in_the_current_folder.py").write_text("from tests.support.networks import small\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert build("in_the_current_folder:small")


@pytest.mark.parametrize("edited", ["edited_module", "edited_package.layers.blocks"])
def test_no_run_starts_with_code_that_was_edited_after_its_import(
    edited: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook would otherwise train the old code, and other commands would evaluate the new code."""
    file, module = tmp_path / f"{edited.replace('.', '/')}.py", edited.partition(".")[0]
    name = f"{module}:small"
    (tmp_path / "edited_package" / "layers").mkdir(parents=True)
    (tmp_path / "edited_package" / "__init__.py").write_text("from .layers.blocks import small\n")
    file.write_text("from tests.support.networks import small\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(narrow_settings(tiny_dir), network=NetworkConfig(network=name))

    def prepare() -> None:
        prepare_network(config, read_dataset(tiny_dir), world_size=1, load_weights=False)

    prepare()
    file.write_text("from tests.support.networks import plain as small\n")
    with pytest.raises(InputError, match=rf"{file} has changed since it was imported; restart Python"):
        prepare()
    assert build(name), "a run that has started must be able to finish"
    for changed in (edited, module):
        importlib.reload(sys.modules[changed])
    assert build(name)
    prepare()


def test_a_seed_that_a_module_sets_when_it_is_imported_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_a_seed.py").write_text("from tests.support.networks import small, torch\ntorch.manual_seed(0)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return build("sets_a_seed:small").state_dict()

    first, again = weights(), weights()  # only the first call imports the module
    assert differences(first, again) == []


def test_a_module_that_ends_python_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_python.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="importing ends_python ends Python; move its main code"):
        build("ends_python:build")


def test_a_module_that_starts_a_run_when_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, each process would import the module, start the run again, and so on."""
    (tmp_path / "starts_a_run.py").write_text("import ddp_trainer\nddp_trainer.launch('smoke', num_processes=2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="starts a run when it is imported") as caught:
        build("starts_a_run:build")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("other_shape", "must return logits of shape (2, 5)"),
        ("Endless", "returns NaN or infinity with its initial weights"),
        ("TwoOutputs", "must return a tensor of logits in training, got tuple"),
        ("TwoOutputsInEvaluation", "must return a tensor of logits in evaluation, got tuple"),
        ("Squeezes", "must return logits of shape (1, 5) in evaluation"),
        ("ReplacesBuffer", "replaces or resizes buffers in its forward pass (level)"),
        ("CreatesBuffer", "creates, replaces or resizes buffers in its forward pass (ramp)"),
        ("ReplacesBufferInEvaluation", "replaces or resizes buffers in its forward pass (level)"),
        ("FailsInBackward", "fails in its backward pass: RuntimeError"),
        ("lazy", "has lazy layers"),
        ("SavesNumber", "has a state_dict with values that are not tensors: _extra_state"),
        ("with_complex_buffer", "extra has the type torch.complex128, which safetensors cannot store"),
        ("with_sparse_buffer", "extra must be a dense tensor, got torch.sparse_coo"),
        ("with_sparse_buffer_that_is_not_saved", "extra must be a dense tensor, got torch.sparse_coo"),
        ("Fails", "fails on images of shape 2x3x32x32: RuntimeError"),
        ("OnlyContiguous", "add --no-channels-last"),
        (
            "with_depth",
            "has tensors with 5 dimensions, which torch.channels_last does not support; add --no-channels-last",
        ),
        ("frozen", "no trainable parameter"),
        ("half", "must have float32 parameters, got torch.float16"),
        ("double", "must have float32 parameters, got torch.float64"),
        ("on_another_device", "must be built on the CPU"),
    ],
)
def test_a_faulty_network_is_reported_before_training(name: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        check_network(build(OWN + name), OWN + name, num_classes=5, sides=[32])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_buffer_that_is_not_saved_may_have_any_type() -> None:
    name = f"{OWN}with_complex_buffer_that_is_not_saved"
    assert check_network(build(name), name, num_classes=5, sides=[32]) == []


def test_the_check_does_not_seed_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)
    check_network(build(f"{OWN}small"), "small", num_classes=5, sides=[32])
    assert seeds == []


def test_a_network_for_contiguous_images_is_accepted_without_channels_last() -> None:
    name = f"{OWN}OnlyContiguous"
    assert check_network(build(name), name, num_classes=5, sides=[32], channels_last=False) == []


def test_a_network_that_is_built_in_evaluation_mode_is_trained_in_training_mode(tiny_dir: Path) -> None:
    config = narrow_settings(tiny_dir)
    config = replace(config, network=NetworkConfig(network=f"{OWN}in_evaluation_mode"))
    network, _ = prepare_network(config, read_dataset(tiny_dir), world_size=1, load_weights=False)
    assert network.training


def test_the_check_leaves_the_network_unchanged() -> None:
    network = build(f"{OWN}Buffers").train()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    assert check_network(network, "own", num_classes=5, sides=[16, 32]) == ["unused.weight", "unused.bias"]
    assert differences(network.state_dict(), before) == []
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training


def test_muon_groups_parameters_by_kind() -> None:
    network = networks.small(5)
    groups = parameter_groups(network, OptimConfig(optimizer="muon", peak_lr=0.1, head_lr=0.2, bias_lr=0.3))
    names = {parameter: name for name, parameter in network.named_parameters()}
    by_name = {names[parameter]: group for group in groups for parameter in group["params"]}
    assert {name: group["muon"] for name, group in by_name.items() if group["muon"]} == {
        "0.weight": "filters",  # a convolution without bias, before BatchNorm
        "4.weight": "matrix",
    }
    assert {name: group["peak_lr"] for name, group in by_name.items() if group["peak_lr"] != 0.1} == {
        "1.bias": 0.3,
        "5.bias": 0.3,
        "8.weight": 0.2,
        "8.bias": 0.2,
    }
    assert {name for name, group in by_name.items() if group["weight_decay"]} == {"4.weight", "8.weight"}


def test_a_weight_that_two_layers_share_is_updated_once() -> None:
    network = networks.Tied(5)
    optimizer = build_optimizer(network, OptimConfig(optimizer="muon"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(network.parameters()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_every_optimizer_trains_a_network_with_convolutions_and_linear_layers(optimizer: str) -> None:
    torch.manual_seed(0)
    network, images, labels = networks.small(5), torch.randn(20, 3, 32, 32), torch.arange(20) % 5
    built = build_optimizer(network, OptimConfig(optimizer=optimizer, peak_lr=0.01))  # type: ignore[arg-type]
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        built.step()
        built.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

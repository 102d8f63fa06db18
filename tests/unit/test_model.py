"""The custom ResNet: number of parameters, structure, operation count, saving and loading."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.errors import InputError
from ddp_trainer import evaluate, export, predict
from ddp_trainer.engine.flops import training_flops, training_flops_per_image
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.small_map_conv import LARGEST_SIDE, Conv3x3
from ddp_trainer.models.spec import ModelSpec, build_model, count_parameters, load_model
from ddp_trainer.recipes import RECIPES
from ddp_trainer.run.outputs import write_model
from tests.support.narrow import changed
from tests.support.stepping import differences

SPEC = ModelSpec(classes=tuple("abcdefghij"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), image_size=32)


def test_network_has_6_573_130_parameters() -> None:
    assert count_parameters(CustomResNet()) == 6_573_130


def test_evaluation_batch_shrinks_with_larger_images() -> None:
    sizes = (8, 32, 100, 2000)
    assert [replace(SPEC, image_size=size).evaluation_batch for size in sizes] == [500, 500, 100, 1]
    assert replace(SPEC, image_size=200, train_size=100).evaluation_batch == 100
    assert replace(SPEC, image_size=2000, train_size=100).evaluation_batch == 2


def test_model_json_keeps_the_size_of_the_input(tmp_path: Path) -> None:
    path, smaller = tmp_path / "model.json", replace(SPEC, train_size=24)
    smaller.write(path)
    assert ModelSpec.read(path) == smaller
    assert (SPEC.input_size, smaller.input_size) == (32, 24)
    replace(SPEC, train_size=40).write(path)
    with pytest.raises(InputError, match="train_size must be at most image_size"):
        ModelSpec.read(path)


@pytest.mark.parametrize("temperature", [0, math.nan, 1e20, 2000])
def test_a_temperature_out_of_range_is_refused(tmp_path: Path, temperature: float) -> None:
    replace(SPEC, temperature=temperature).write(tmp_path / "model.json")
    with pytest.raises(InputError, match=r"temperature must be from 0\.001 to 1000"):
        ModelSpec.read(tmp_path / "model.json")


def test_network_equals_its_layers_applied_one_by_one() -> None:
    """The order of layers is convolution, pooling, BatchNorm, activation."""
    model = CustomResNet().eval()
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)  # type: ignore[arg-type]

    def block(x: torch.Tensor, i: int, pool: bool = False) -> torch.Tensor:
        x = convolutions[i](x)
        return norms[i](torch.max_pool2d(x, 2) if pool else x).relu()

    images = torch.randn(2, 3, 32, 32)
    x = block(block(images, 0), 1, pool=True)
    x = x + block(block(x, 2), 3)
    x = block(block(x, 4, pool=True), 5, pool=True)
    x = x + block(block(x, 6), 7)
    expected = model.head(torch.max_pool2d(x, 4).flatten(1)) / 8
    torch.testing.assert_close(model(images), expected)


def test_network_returns_logits_instead_of_probabilities() -> None:
    logits = CustomResNet().eval()(torch.randn(4, 3, 32, 32))
    assert logits.min() < 0
    assert not torch.allclose(logits.sum(dim=1), torch.ones(4))


def test_operations_are_counted_without_changing_the_model() -> None:
    model = CustomResNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # A forward pass takes 379.26 million multiply-adds (two operations each), and training about three times as many.
    assert training_flops_per_image(model, 32) == pytest.approx(2.276e9, rel=0.01)
    assert differences(model.state_dict(), before) == []
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("steps", "share"),
    [(30, 1 / 4), (200, 1 / 4), (400, (2 / 4 + 2 * 9 / 16) / 4), (700, (2 / 4 + 3 * 9 / 16 + 2) / 7)],
)
def test_small_crops_take_fewer_operations(steps: int, share: float) -> None:
    """Half the side means a quarter of the pixels, and so about a quarter of the operations."""
    large = changed(RECIPES["baseline"], {"schedule": {"epochs": 7, "batch_size": 500}})
    small = changed(large, {"schedule": {"small_crops": "16:0.286,24:0.714"}})
    counted, whole = (training_flops(config, SPEC, steps=steps, num_images=50_000) for config in (small, large))
    assert counted.total / whole.total == pytest.approx(share, rel=1e-3)


def test_loaded_model_equals_the_written_one(tmp_path: Path) -> None:
    model = build_model(SPEC).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    write_model(tmp_path, model, SPEC)
    loaded, spec = load_model(tmp_path)
    assert spec == SPEC
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images))


@pytest.mark.parametrize(
    "damage", ["no model.json", "no weights", "another json file", "truncated weights", "equal classes"]
)
def test_unreadable_model_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    write_model(tmp_path, build_model(SPEC), SPEC)
    if damage == "no model.json":
        (tmp_path / "model.json").unlink()
    elif damage == "no weights":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "another json file":
        (tmp_path / "model.json").write_text('{"hello": 1}')
    elif damage == "equal classes":
        replace(SPEC, classes=("cat",) * len(SPEC.classes)).write(tmp_path / "model.json")
    else:
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("architecture", ["custom_resnet", "torchvision:squeezenet1_1", "torchvision:regnet_x_400mf"])
def test_weights_that_do_not_fit_are_refused_before_the_network_takes_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    write_model(tmp_path, nn.Linear(1, 1), replace(SPEC, architecture=architecture))
    monkeypatch.setattr("ddp_trainer.models.spec.load_tensors", lambda *arguments: pytest.fail("memory was allocated"))
    with pytest.raises(InputError, match=r"model\.safetensors does not fit model\.json: .*, expected missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("architecture", ["torchvision:squeezenet1_1", "tests.support.networks:plain"])
def test_a_size_of_images_that_the_network_cannot_process_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    spec = replace(SPEC, architecture=architecture)
    write_model(tmp_path, build_model(spec), spec)
    assert load_model(tmp_path)[1] == spec
    replace(spec, image_size=8).write(tmp_path / "model.json")
    for main, words in (
        (predict.main, ["a.png"]),
        (evaluate.main, ["--device", "cpu"]),
        (export.main, ["--format", "torch"]),
    ):
        assert main([str(tmp_path), *words]) == 2
        line = capsys.readouterr().err
        assert f"model.json: {architecture} cannot process images of 8 pixels a side" in line and line.count("\n") == 1


@pytest.mark.parametrize("largest_side", [0, 4])
def test_the_gradients_of_frozen_filters_are_not_computed(largest_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of operations is the same with and without matrix products for small feature maps."""
    monkeypatch.setattr("ddp_trainer.models.small_map_conv.LARGEST_SIDE", largest_side)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Conv3x3(8, 8))
    model[1].weight.requires_grad_(False)
    assert training_flops_per_image(model, 4) == (2 * 3 * 8 + 2 * 8 * 9 * 8) * 2 * 4**2


def test_operations_of_a_depthwise_convolution_are_counted_once_for_each_pass() -> None:
    """A layer takes three passes: forward, weight gradient, input gradient. The first layer has no input gradient."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    assert training_flops_per_image(model, 16) == (2 * 3 * 8 + 3 * 9 * 8) * 2 * 16**2


@pytest.mark.parametrize("autocast", [False, True])
def test_convolution_on_small_maps_has_the_gradients_of_torch(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = Conv3x3(5, 7).train()
    theirs = nn.Conv2d(5, 7, kernel_size=3, padding=1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        generator.manual_seed(0)
        images = torch.randn(3, 5, 2, LARGEST_SIDE, generator=generator).requires_grad_()
        with torch.autocast("cpu", enabled=autocast):
            output = layer(images * 1)
        output.backward(torch.randn(3, 7, 2, LARGEST_SIDE, generator=generator).to(output.dtype))
        results.append((output, images.grad, layer.weight.grad))
    assert "MatrixProduct" in str(results[0][0].grad_fn)
    tolerance = 0.02 if autocast else 1e-5
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)

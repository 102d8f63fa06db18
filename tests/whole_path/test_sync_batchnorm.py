"""Synchronized BatchNorm on several ranks equals plain BatchNorm on the whole batch, forward and backward.

The ranks have different numbers of images.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddp_trainer.distributed.sync_batchnorm import (
    SyncBatchNorm,
    averaged_batchnorm,
    not_synchronized,
    synchronize_batchnorm,
)
from tests.support.trainer import fork
from tests.support.workers.batchnorm import inputs


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_synchronized_batchnorm_equals_batchnorm_on_the_whole_batch(tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 3:
        pytest.skip("three GPUs are needed")
    finished = fork(tmp_path, device, program="tests.support.workers.batchnorm:main", processes=3)
    assert finished.returncode == 0, finished.stderr
    plain = nn.Sequential(nn.BatchNorm2d(3)).double()
    images, weights = inputs()
    images.requires_grad_()
    outputs = plain(images)
    (outputs * weights).sum().backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert torch.allclose(torch.cat([rank["outputs"] for rank in ranks]), outputs, rtol=1e-9, atol=1e-9)
    assert images.grad is not None
    assert torch.allclose(torch.cat([rank["images"] for rank in ranks]), images.grad, rtol=1e-9, atol=1e-9)
    gradients = torch.cat([parameter.grad for parameter in plain.parameters() if parameter.grad is not None])
    for rank in ranks:
        assert torch.allclose(rank["parameters"], gradients, rtol=1e-9, atol=1e-9)
        for name in ("0.running_mean", "0.running_var"):
            assert torch.allclose(rank[name], plain.state_dict()[name], rtol=1e-9)


def test_outputs_and_statistics_for_bf16_images_match_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: None)  # with one process, the sum is the input
    ours, plain = SyncBatchNorm(3), nn.BatchNorm2d(3)
    images = inputs()[0].bfloat16()
    found, expected = ours(images), plain(images)
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=2**-7, atol=2**-7)
    for name, value in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-5), name


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.0}]
)
def test_options_of_batchnorm_are_kept(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: None)  # with one process, the sum is the input
    plain = nn.Sequential(nn.BatchNorm2d(3, **options))
    ours = synchronize_batchnorm(copy.deepcopy(plain))
    assert isinstance(next(ours.children()), SyncBatchNorm)
    images, more_images = inputs()[0].float().split(6)
    for batch in (images, more_images):
        assert torch.allclose(ours(batch), plain(batch), rtol=1e-4, atol=1e-4)
    for name, value in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-5), name
    assert torch.allclose(ours.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-4)


def test_layer_with_two_names_is_replaced_under_both() -> None:
    layer = nn.BatchNorm2d(3)
    model = synchronize_batchnorm(nn.Sequential(layer, nn.ReLU(), layer))
    assert [type(child) for child in model._modules.values()] == [SyncBatchNorm, nn.ReLU, SyncBatchNorm]


def test_layer_that_stays_in_evaluation_mode_is_not_replaced() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self[0].eval()
            return self

    model = synchronize_batchnorm(nn.Sequential(Frozen(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)).eval())
    assert [type(layer) for layer in model.modules()][2:] == [nn.BatchNorm2d, SyncBatchNorm]
    assert [layer.training for layer in model.modules()][2:] == [False, True]


def test_layers_that_are_not_synchronized_are_named() -> None:
    class Extended(nn.BatchNorm2d):
        pass

    assert not_synchronized(nn.Sequential(nn.BatchNorm2d(3), Extended(3), Extended(3))) == ["Extended"]


def test_layers_without_running_statistics_are_not_averaged() -> None:
    with averaged_batchnorm(nn.BatchNorm1d(3, track_running_stats=False), lambda moments: moments, 2, weight=1.0):
        pass


def test_averaged_statistics_are_those_of_all_images() -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = [nn.BatchNorm1d(3).double() for _ in range(2)]
    for layer, own in zip(ranks, (values[:1], values[1:]), strict=True):
        layer.running_mean, layer.running_var = own.mean(dim=0), own.var(dim=0, correction=0)
    sent: list[torch.Tensor] = []
    with averaged_batchnorm(ranks[1], lambda moments: sent.append(moments) or moments, 2, weight=1.5):
        pass
    with averaged_batchnorm(ranks[0], lambda moments: moments + sent[0], 2, weight=0.5):
        assert torch.allclose(ranks[0].state_dict()["running_mean"], values.mean(dim=0))
        assert torch.allclose(ranks[0].state_dict()["running_var"], values.var(dim=0, correction=0))
    assert torch.equal(ranks[0].state_dict()["running_mean"], values[0]), "the statistics are not restored"

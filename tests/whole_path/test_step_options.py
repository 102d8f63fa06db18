"""Tests how options such as --accumulate, --clip-norm and --label-smoothing change a step of a narrow network."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.loader import Batch
from ddp_trainer.engine.loss import losses_per_image
from ddp_trainer.engine.metrics import averages
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.run.checkpoint import list_checkpoints, read_checkpoint
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime
from tests.support.trainer import NARROW, train

Take = Callable[..., Trainer]


@pytest.fixture
def stepped(tiny_dir: Path, device: torch.device) -> Take:
    """A function that returns a trainer after one step on 32 images, of which the second half repeats the first."""

    def take(*, accumulate: int = 1, balance: str = "none", **optim: float) -> Trainer:
        config = narrow_settings(
            tiny_dir,
            data={"balance": balance},
            optim={"weight_decay": 0.0, **optim},
            schedule={"accumulate": accumulate},
        )
        runtime = single_runtime(device=device.type)
        trainer = narrow_trainer(config, runtime, dtype=torch.float64)
        half = next(iter(trainer.data.loader.batches([np.arange(32)])))
        trainer.train_step(Batch(*(torch.cat([column[:16]] * 2) for column in half)), epoch=0)
        return trainer

    return take


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def momentum(trainer: Trainer) -> Tensor:
    """Returns the momentum. After a single step, it equals the gradient."""
    return torch.cat([slot["momentum_buffer"].flatten() for slot in trainer.state.optimizer.state.values()])


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(stepped: Take) -> None:
    """The halves of the batch are equal, so BatchNorm has the same statistics for a half as for the whole batch."""
    whole, parts = stepped(), stepped(accumulate=2)
    torch.testing.assert_close(momentum(parts), momentum(whole), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-12)
    assert averages(parts.state.sums.values) == pytest.approx(averages(whole.state.sums.values))


def test_parts_of_different_sizes_give_the_gradient_of_the_whole_batch(tiny_dir: Path, device: torch.device) -> None:
    """32 images in 3 parts, in a network without BatchNorm."""
    momenta = []
    for accumulate in (1, 3):
        config = narrow_settings(tiny_dir, schedule={"accumulate": accumulate})
        runtime = single_runtime(device=device.type)  # sets the seed for the weights of the network
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        trainer = narrow_trainer(config, runtime, dtype=torch.float64, network=network)
        next(trainer.steps(0))
        momenta.append(momentum(trainer))
    torch.testing.assert_close(momenta[1], momenta[0], rtol=1e-9, atol=1e-12)


def test_class_weights_change_the_loss_and_accumulation_keeps_the_gradient(stepped: Take) -> None:
    """The classes have 9 or 10 images each, so their weights change the loss only a little."""
    plain, whole, parts = stepped(), stepped(balance="weights"), stepped(balance="weights", accumulate=2)
    torch.testing.assert_close(momentum(parts), momentum(whole), rtol=1e-9, atol=1e-12)
    unweighted, weighted = (averages(trainer.state.sums.values).loss for trainer in (plain, whole))
    assert unweighted != pytest.approx(weighted, rel=1e-6)
    assert unweighted == pytest.approx(weighted, rel=0.05)


def test_network_sees_growing_crops(tiny_dir: Path, device: torch.device) -> None:
    config = narrow_settings(tiny_dir, schedule={"epochs": 2, "small_crops": "16:0.2,24:0.5"})
    trainer = narrow_trainer(config, single_runtime(device=device.type, graph="off"))  # a graph would not call the hook
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].size(2)))
    batch = next(iter(trainer.data.loader.batches([np.arange(32)])))
    for _ in range(trainer.total_steps):
        trainer.train_step(batch, epoch=0)
    assert seen[-6:] == [16, 24, 24, 32, 32, 32]  # on a GPU, the steps of the warm-up come first


def test_moving_average_is_evaluated(tiny_dir: Path, device: torch.device) -> None:
    runtime = single_runtime(device=device.type)
    trainer = narrow_trainer(narrow_settings(tiny_dir, optim={"ema_decay": 0.5}), runtime)
    assert trainer.evaluate().logits.any()
    assert trainer.state.ema is not None
    for name, parameter in trainer.state.ema.module.named_parameters():
        if name.startswith("head."):
            nn.init.zeros_(parameter)
    assert not trainer.evaluate().logits.any()


def test_clipping_shortens_the_gradient_and_keeps_its_direction(stepped: Take) -> None:
    free, clipped = momentum(stepped()), momentum(stepped(clip_norm=1e-3))
    assert free.norm() > 0.1
    torch.testing.assert_close(clipped, free / free.norm() * 1e-3, rtol=1e-4, atol=1e-12)


def test_label_smoothing_changes_the_loss_linearly(stepped: Take) -> None:
    sharp, smooth = (averages(stepped(label_smoothing=share).state.sums.values).loss for share in (0.0, 0.4))
    half = averages(stepped(label_smoothing=0.2).state.sums.values).loss
    assert sharp != pytest.approx(smooth, rel=1e-3)
    assert half == pytest.approx((sharp + smooth) / 2, rel=1e-9)


def test_loss_of_mixed_images_is_the_weighted_sum_over_both_labels() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, partners, share = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2]), torch.tensor([0.3, 0.3, 0.9, 0.9])
    target = share[:, None] * F.one_hot(labels, 5) + (1 - share[:, None]) * F.one_hot(partners, 5)
    expected = -((0.8 * target + 0.2 / 5) * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(losses_per_image(logits, labels, partners, share, label_smoothing=0.2), expected)


def test_run_with_ema_decay_saves_the_averaged_weights(tiny_dir: Path, tmp_path: Path) -> None:
    train("--data-dir", tiny_dir, "--out", tmp_path / "run", "--ema-decay", "0.5", module=NARROW)
    state = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == state["model"].keys()
    assert all(torch.equal(value, state["ema"][f"module.{name}"]) for name, value in saved.items())
    assert not torch.equal(saved["head.weight"], state["model"]["head.weight"])

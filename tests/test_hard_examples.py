"""Hard-example choice: which images are chosen, that they are trained on, and that the choice outlives a stop."""

import filecmp
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NARROW, fork, read_lines, run, start, train
from torch import Tensor
from torch.nn import functional as F

from data_prep.dataset import DatasetInfo, read_dataset
from data_prep.order import epoch_order
from ddp_trainer.assembly import build_data, build_network, small_network, training_flops
from ddp_trainer.checkpoint import list_checkpoints, read_checkpoint
from ddp_trainer.config import TrainConfig
from ddp_trainer.engine import Trainer
from ddp_trainer.hard_examples import SmallTrainer, choose_hard_images, hardest
from ddp_trainer.model import ModelSpec
from ddp_trainer.observer import SilentObserver
from ddp_trainer.optim import build_optimizer
from ddp_trainer.recipes import RECIPES
from ddp_trainer.run_data import HardImages
from ddp_trainer.runtime import Runtime
from ddp_trainer.signals import StopRequest

# 96 training images, 32 to choose each batch of 16 from: four epochs of 3 steps.
PLAN = ("--epochs", "4", "--max-steps", "12", "--batch-size", "16", "--candidates", "2")


def settings(data_dir: Path, **optim: float) -> TrainConfig:
    smoke = RECIPES["smoke"]
    return replace(
        smoke,
        data=replace(smoke.data, data_dir=data_dir),
        schedule=replace(smoke.schedule, epochs=4, max_steps=None, batch_size=16, candidates=2),
        optim=replace(smoke.optim, **optim),
        runtime=replace(smoke.runtime, device="cpu", precision="fp32"),
    )


def spec_of(dataset: DatasetInfo) -> ModelSpec:
    return ModelSpec(classes=dataset.classes, mean=dataset.mean, std=dataset.std, image_size=dataset.image_size,
                     widths=(32, 32, 64, 64))  # fmt: skip


def choose(data_dir: Path, **optim: float) -> np.ndarray:
    """(12, 32) bool: the marks of every step."""
    config, dataset = settings(data_dir, **optim), read_dataset(data_dir)
    runtime = Runtime(config.runtime, stop=StopRequest())  # seeds torch's generator
    hard = choose_hard_images(config, runtime, dataset, spec_of(dataset), SilentObserver())
    assert hard.seconds > 0
    return np.unpackbits(hard.marks.numpy(), axis=1).astype(bool).reshape(12, 32)


def losses_of_a_fresh_small_network(data_dir: Path) -> Tensor:
    """(12, 32), at each step of the schedule, from the same first weights."""
    config, dataset = settings(data_dir), read_dataset(data_dir)
    whole = replace(config, schedule=replace(config.schedule, batch_size=32, candidates=1))
    runtime = Runtime(config.runtime, stop=StopRequest())
    data = build_data(whole, runtime, dataset, spec_of(dataset))
    model = build_network(whole.network, small_network(spec_of(dataset))).train()
    losses = []
    for epoch in range(4):
        order = epoch_order(data.samples, seed=0, epoch=epoch).reshape(3, 32)
        for batch in data.loader.batches(order):
            logits = model(data.augmenter(batch, epoch=epoch).images)
            losses.append(F.cross_entropy(logits, batch.labels, reduction="none").detach())
    return torch.stack(losses)


def test_the_hardest_have_the_highest_losses_and_of_equal_ones_the_first() -> None:
    assert hardest(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [False, True, False, True]
    assert hardest(torch.ones(5), 2).tolist() == [True, True, False, False, False]


def test_the_small_network_marks_what_it_finds_hard(tiny_dir: Path) -> None:
    """One that stands still: its losses can be had without it."""
    losses = losses_of_a_fresh_small_network(tiny_dir)
    expected = losses >= losses.sort(dim=1, descending=True).values[:, 15:16]
    marks = choose(tiny_dir, peak_lr=1e-30)
    assert np.array_equal(marks, expected.numpy())


def test_the_small_network_learns_from_what_it_marks(tiny_dir: Path) -> None:
    """What it marks depends on its steps, and on nothing that comes after them."""
    still, learning = choose(tiny_dir, peak_lr=1e-30), choose(tiny_dir, peak_lr=0.1)
    assert (still.sum(axis=1) == 16).all()
    assert (learning.sum(axis=1) == 16).all()
    assert np.array_equal(still[0], learning[0])
    assert not np.array_equal(still[3:], learning[3:])


def test_choosing_leaves_the_generator_alone(tiny_dir: Path) -> None:
    choose(tiny_dir, peak_lr=0.1)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.fixture(scope="module")
def chosen_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chosen") / "run"
    finished = train(*PLAN, "--data-dir", tiny_dir, "--out", out, module=NARROW)
    assert "steps of the hardest 16 of 32 images" in finished.stderr
    return out


def last_state(run_dir: Path) -> dict:
    return read_checkpoint(list_checkpoints(run_dir / "checkpoints")[0])


def test_the_run_trains_on_the_marked_images_of_each_step(chosen_run: Path, tiny_dir: Path) -> None:
    state, config, dataset = last_state(chosen_run), settings(tiny_dir), read_dataset(tiny_dir)
    runtime = Runtime(config.runtime, stop=StopRequest())
    data = replace(build_data(config, runtime, dataset, spec_of(dataset)), hard=HardImages(**state["hard"]))
    model = build_network(config.network, spec_of(dataset))
    trainer = Trainer(config, runtime, model, build_optimizer(model, config.optim), data, SilentObserver())
    marks = np.unpackbits(state["hard"]["marks"].numpy(), axis=1).astype(bool).reshape(4, 3, 32)
    for epoch in range(4):
        candidates = epoch_order(data.samples, seed=0, epoch=epoch).reshape(3, 32)
        expected = [candidates[step][marks[epoch, step]].tolist() for step in range(3)]
        assert trainer.plan(epoch).tolist() == expected
    records = read_lines(chosen_run / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 9, 12]
    summary = json.loads((chosen_run / "summary.json").read_text())
    assert summary["steps"] == 12
    trained = sum(record["seconds"] for record in records)
    assert summary["train_seconds"] == pytest.approx(trained + state["hard"]["seconds"]), "the choice is training too"


def test_a_run_that_goes_on_keeps_its_choice(chosen_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    arguments = ("--data-dir", tiny_dir, "--out", tmp_path / "run")
    train(*PLAN, *arguments, "--max-steps", "5", module=NARROW)
    finished = train(*PLAN, *arguments, "--resume", module=NARROW)
    assert "after step 5" in finished.stderr
    assert "a small network chooses" not in finished.stderr
    ours, theirs = (path / "model.safetensors" for path in (chosen_run, tmp_path / "run"))
    assert filecmp.cmp(ours, theirs, shallow=False)


def test_a_stop_while_it_chooses(tiny_dir: Path, tmp_path: Path) -> None:
    """There is nothing to go on from, and nothing is lost: it begins anew."""
    arguments = ("smoke", "--device", "cpu", *PLAN, "--data-dir", tiny_dir, "--out", tmp_path / "run")
    process = start(NARROW, *arguments, "--epochs", "2000")
    assert process.stderr is not None
    while "a small network chooses" not in (line := process.stderr.readline()):
        assert line, "it ended before"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "asked to stop: nothing is saved yet" in rest
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 0)
    again = fork(*arguments, "--resume")
    assert again.returncode == 0
    assert "a small network chooses" in again.stderr


class TwoRanks:
    """What one of two ranks is told."""

    world_size = 2

    def __init__(self, rank: int, losses: Tensor) -> None:
        self.rank, self._losses = rank, losses

    def gather(self, own: Tensor) -> Tensor:
        assert torch.equal(own, self._losses[self.rank])
        return self._losses


@pytest.mark.parametrize("losses", [[[1.0, 5.0, 2.0], [4.0, 0.5, 3.0]], [[1.0, 0.5, 0.2], [4.0, 6.0, 3.0]]])
def test_the_mean_over_ranks_is_that_of_the_hardest_images(losses: list[list[float]]) -> None:
    """However many of them a rank has."""
    ranks, trainer = torch.tensor(losses), SmallTrainer.__new__(SmallTrainer)
    trainer.kept, trainer.marks = 3, []
    means = []
    for rank in range(2):
        trainer.runtime = TwoRanks(rank, ranks)  # type: ignore[assignment]
        means.append(trainer.objective(ranks[rank]))
    assert torch.equal(trainer.marks[0], trainer.marks[1])
    expected = ranks.flatten().sort(descending=True).values[:3].mean()
    assert sum(means) / 2 == pytest.approx(expected.item())


def test_a_loss_that_is_no_number_ends_the_choice(tiny_dir: Path, tmp_path: Path) -> None:
    arguments = ("smoke", "--device", "cpu", *PLAN, "--data-dir", tiny_dir, "--out", tmp_path)
    finished = run("tests.workers.poisoned_train", "2", *arguments)
    assert finished.returncode == 1
    assert "not finite" in finished.stderr
    assert "the hard images are chosen" not in finished.stderr
    assert [path.name for path in (tmp_path / "crash").iterdir()] == ["step-00000002.json"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_two_ranks_choose_as_one_does(tiny_dir: Path, tmp_path: Path) -> None:
    """With BatchNorm over all images; rounding may turn an image or two that are as hard as each other."""
    arguments = (*PLAN, "--sync-bn", "--peak-lr", "0.02", "--data-dir", tiny_dir, "--out")
    for processes in (1, 2):
        train(*arguments, tmp_path / str(processes), processes=processes, module=NARROW)
    one, two = (np.unpackbits(last_state(tmp_path / str(n))["hard"]["marks"].numpy(), axis=1) for n in (1, 2))
    assert np.array_equal(one[0, :32], two[0, :32]), "of the first step, before any sum of gradients"
    assert (one != two).mean() < 0.04


def test_operations_of_the_choice_are_counted() -> None:
    spec = ModelSpec(classes=tuple("0123456789"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=32)
    config = replace(RECIPES["long"], schedule=replace(RECIPES["long"].schedule, batch_size=500))
    half = replace(config, schedule=replace(config.schedule, candidates=2))
    plain = training_flops(config, spec, steps=5000, num_images=50_000)
    chosen = training_flops(half, spec, steps=2500, num_images=50_000)
    assert 1 / 16 < chosen / plain - 1 / 2 < 1 / 14, "a quarter of the width, over all images"

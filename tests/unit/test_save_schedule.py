"""SaveSchedule decides which steps and epochs end with a checkpoint.

The tests need no GPU: they only set the device to "cuda".
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.save_schedule import SECONDS_BETWEEN_EPOCHS, SaveSchedule
from ddp_trainer.engine.trainer import LONGEST_ROUND, Trainer
from ddp_trainer.recipes import smoke
from tests.support.narrow import changed, narrow_settings, narrow_trainer, single_runtime

STEPS_PER_EPOCH, EPOCHS = 10, 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose only element is the current time in seconds."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def schedule(
    runtime: Runtime, device: str, *, every: int = 0, validation: int = 0, last_step: int = STEPS_PER_EPOCH * EPOCHS
) -> SaveSchedule:
    runtime.device = torch.device(device)
    config = changed(smoke(), {"run": {"checkpoint_every_steps": every}, "data": {"validation": validation}})
    return SaveSchedule(config, runtime, steps_per_epoch=STEPS_PER_EPOCH, last_step=last_step)


def saved_epochs(saves: SaveSchedule, clock: list[float], *, seconds: float) -> list[bool]:
    """Returns, for each epoch, whether a checkpoint is saved at its end. Each epoch takes `seconds`."""
    answers = []
    for epoch in range(EPOCHS):
        clock[0] += seconds
        answers.append(saves.after_epoch((epoch + 1) * STEPS_PER_EPOCH))
        if answers[-1]:
            saves.saved()
    return answers


@pytest.mark.parametrize(
    ("share", "expected"), [(0.3, [True, False, False, True]), (0.6, [True, False, True, True]), (1.0, [True] * 4)]
)
def test_short_epochs_on_a_gpu_are_not_all_saved(clock: list[float], share: float, expected: list[bool]) -> None:
    seconds = share * SECONDS_BETWEEN_EPOCHS
    assert saved_epochs(schedule(single_runtime(), "cuda"), clock, seconds=seconds) == expected


def test_the_main_rank_decides_whether_a_short_epoch_is_saved(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clocks of the ranks differ, and a rank that saved alone would wait forever."""
    runtime = single_runtime()
    monkeypatch.setattr(runtime, "agree_on", lambda due: [not due])
    # On this rank, the first epoch is due, because nothing was saved yet. The last epoch is saved in any case.
    assert saved_epochs(schedule(runtime, "cuda"), clock, seconds=0.0) == [False, False, False, True]


def test_every_epoch_is_saved_on_the_cpu_or_with_validation_or_on_request(clock: list[float]) -> None:
    for saves in (
        schedule(single_runtime(), "cpu"),
        schedule(single_runtime(), "cuda", validation=20),
        schedule(single_runtime(), "cuda", every=STEPS_PER_EPOCH),
    ):
        assert saved_epochs(saves, clock, seconds=0.1) == [True] * EPOCHS


class SlowDisk(Observer):
    """Its first save is finished only in the third round of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def wait_for_save(self, *, seconds: float) -> bool:
        assert 0 < seconds <= LONGEST_ROUND
        self.calls.append("wait")
        return len(self.calls) >= 3

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        self.calls.append("save")


def test_all_ranks_wait_in_rounds_until_the_previous_save_is_finished(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that waited alone for the main rank would run into --process-group-timeout."""
    disk, agreed, runtime = SlowDisk(), list[bool](), single_runtime()
    trainer = narrow_trainer(narrow_settings(tiny_dir), runtime, observer=disk)
    monkeypatch.setattr(runtime, "all_agree", lambda agrees: agreed.append(agrees) or agrees)
    trainer.save()
    assert disk.calls == ["wait", "wait", "wait", "save"]
    assert agreed == [False, False, True]


class SavedStates(Observer):
    """Keeps the states that were saved."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, Any]] = []

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        self.states.append(copy.deepcopy(state))


def test_last_epoch_of_a_fractional_number_is_recorded_before_it_is_saved(tiny_dir: Path) -> None:
    """Otherwise, its checkpoint would have no score, and a run killed right after the save would record it again.

    An epoch that --max-steps cuts short is saved without a record, because a resumed run may continue it.
    """
    saved = SavedStates()

    def trainer(max_steps: int | None) -> Trainer:
        settings = narrow_settings(tiny_dir, schedule={"epochs": 1.7, "max_steps": max_steps})
        return narrow_trainer(settings, single_runtime(), observer=saved)

    trainer(4).fit()
    (*_, cut_short), saved.states = saved.states, []
    continued = trainer(None)
    continued.state.load_state_dict(cut_short)
    continued.fit()
    assert [len(state["history"]) for state in (cut_short, *saved.states)] == [1, 2]
    (last,), saved.states = saved.states, []
    assert last["step"] == last["history"][-1]["step"] == 5  # an epoch has 3 steps
    resumed = trainer(None)
    resumed.state.load_state_dict(last)
    assert resumed.fit().correct == last["history"][-1]["test_correct"]
    assert (len(resumed.state.history), saved.states) == (2, [])


def test_steps_are_saved_as_requested_but_not_twice_at_the_end_of_an_epoch() -> None:
    saves = schedule(single_runtime(), "cpu", every=5)
    assert [step for step in range(1, 21) if saves.after_step(step)] == [5, 15]
    assert not schedule(single_runtime(), "cpu", every=5, last_step=15).after_step(15), "saved twice at the end"
    assert not any(schedule(single_runtime(), "cpu").after_step(step) for step in range(1, 21))

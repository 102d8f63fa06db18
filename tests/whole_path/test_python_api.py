"""The Python API: `ddp_trainer.train`, `ddp_trainer.launch`, and the notebook that uses both."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import nbformat
import pytest
import torch
import torch.distributed as dist
from nbclient import NotebookClient

import ddp_trainer
from ddp_trainer.config import DEFAULT_WIDTHS, TrainConfig
from ddp_trainer.engine.observer import Observer
from ddp_trainer.recipes import FIRST_BLOCKS, RECIPES
from ddp_trainer.run import outputs
from ddp_trainer.run.api import _changes, configure
from ddp_trainer.tracking.metric_files import Record
from tests.support.folders import same_model
from tests.support.narrow import changed
from tests.support.trainer import REPOSITORY, environment

NARROW = {"device": "cpu", "widths": (8, 8, 16, 16)}


class Listener(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.records: list[int] = []
        self.accuracies: list[float] = []

    def step_done(self, step: int) -> None:
        self.steps.append(step)

    def step_record(self, record: Record) -> None:
        self.records.append(int(record["step"]))
        cast(dict, record).clear()  # must not affect the run

    def epoch_done(self, record: Record) -> None:
        self.accuracies.append(float(record["test_accuracy"]))
        cast(dict, record).clear()


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the reports, which take longer than the runs."""
    monkeypatch.setattr("ddp_trainer.run.outputs.write_report_or_warn", lambda run_dir: None)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ddp_trainer; ddp_trainer.RECIPES; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_train_can_be_called_again_and_leaves_the_process_as_it_was(tiny_dir: Path, tmp_path: Path) -> None:
    """The four calls use two different precisions, an observer that raises, and the caller's own recipe."""
    handlers, threads = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    results = [
        ddp_trainer.train("smoke", data_dir=tiny_dir, out=tmp_path / precision, precision=precision, **NARROW)
        for precision in ("fp32", "bf16")
    ]
    with pytest.raises(RuntimeError, match="error in an observer"):
        ddp_trainer.train("smoke", data_dir=tiny_dir, out=tmp_path / "broken", observer=Broken(), **NARROW)
    gentle = changed(ddp_trainer.RECIPES["smoke"], {"optim": {"peak_lr": 0.01}})
    listener = Listener()
    settings = {"data_dir": tiny_dir, "out": tmp_path / "own", "log_every_steps": 2, **NARROW}
    last = ddp_trainer.train(gentle, observer=listener, **settings)
    assert last is not None
    assert [result.summary["precision"] for result in results if result] == ["fp32", "bf16"]
    assert not same_model(tmp_path / "fp32", tmp_path / "bf16"), "autocast has no effect"
    assert (listener.steps, listener.records) == ([1, 2, 3, 4, 5, 6], [2, 4, 6])
    assert listener.accuracies[-1] == last.accuracy
    assert signal.getsignal(signal.SIGTERM) is handlers
    assert set(threading.enumerate()) <= threads
    assert not dist.is_initialized()


class Interrupts(Listener):
    """Sends SIGINT to this process after step 2."""

    def step_done(self, step: int) -> None:
        super().step_done(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_is_resumed_in_the_same_process_and_the_observer_sees_every_step(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call stops while its profiler is active. It must end the profiler: torch allows only one at a time."""
    settings = {"data_dir": tiny_dir, "out": tmp_path / "run", "profile": 4, **NARROW}
    listener = Interrupts()
    stopped = ddp_trainer.train("smoke", observer=listener, **settings)
    assert stopped is not None and stopped.state == "preempted"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        resumed = ddp_trainer.train("smoke", observer=listener, resume=True, **settings)
    finally:
        torch.set_num_threads(threads)
    assert f"the number of threads per process was {threads} before and is {threads + 1} now" in capsys.readouterr().err
    assert resumed is not None and resumed.state == "done"
    assert listener.steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("listener", [Listener, Interrupts])
def test_all_records_of_a_finished_or_stopped_run_are_flushed_to_the_disk(
    listener: type[Listener], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished run ends within an epoch, so it records this epoch after its last checkpoint."""
    fsync, flushed, order = os.fsync, {}, []

    def noting(handle: int) -> None:
        fsync(handle)
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        order.append(name)
        flushed[name] = os.fstat(handle).st_size

    monkeypatch.setattr(os, "fsync", noting)
    settings = {"data_dir": tiny_dir, "out": tmp_path / "run", "max_steps": 4, "log_every_steps": 1, **NARROW}
    ddp_trainer.train("smoke", observer=listener(), **settings)
    for name in ("steps.jsonl", "metrics.jsonl"):
        assert flushed[name] == (tmp_path / "run" / name).stat().st_size, name
    assert order.index("steps.jsonl") < order.index("state.pt")


CHANGING = """
import os
from torch import nn

def build(num_classes):
    width = int(os.environ["WIDTH"])
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, width), nn.ReLU(), nn.Linear(width, num_classes))
"""


def test_a_run_whose_network_was_edited_is_not_resumed_and_keeps_its_results(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changing.py").write_text(CHANGING)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"data_dir": tiny_dir, "out": tmp_path / "run", "device": "cpu", "network": "changing:build"}
    monkeypatch.setenv("WIDTH", "8")
    ddp_trainer.train("smoke", max_steps=3, **settings)
    monkeypatch.setenv("WIDTH", "9")
    with pytest.raises(ddp_trainer.InputError, match="the checkpoint does not fit the network"):
        ddp_trainer.train("smoke", max_steps=4, resume=True, **settings)
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("moment", ["write_model", "write_model_card_or_warn"])
def test_a_signal_while_results_are_written_does_not_stop_the_run(
    moment: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = getattr(outputs, moment)

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGUSR1)
        return write(*arguments)

    monkeypatch.setattr(outputs, moment, interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("the run no longer handles signals"))
    try:
        result = ddp_trainer.train("smoke", data_dir=tiny_dir, out=tmp_path / "run", max_steps=1, **NARROW)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert result is not None and result.state == "done"


class Broken(Observer):
    def step_done(self, step: int) -> None:
        raise RuntimeError("error in an observer")


def test_train_works_in_a_thread(tiny_dir: Path, tmp_path: Path) -> None:
    """Outside the main thread, `train` handles no signals."""
    found = []

    def work() -> None:
        found.append(ddp_trainer.train("smoke", data_dir=tiny_dir, out=tmp_path / "run", max_steps=1, **NARROW))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert found[0].state == "done"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 0}, "--epochs must be above 0 and at most 1000000, got 0"),
        ({"no_such_setting": 1}, "no-such-setting"),
        ({"precision": "fp8"}, "--precision"),
    ],
)
def test_train_and_launch_raise_input_error_for_invalid_settings(tiny_dir: Path, settings: dict, expected: str) -> None:
    for call in (ddp_trainer.train, lambda *a, **k: ddp_trainer.launch(*a, num_processes=2, **k)):
        with pytest.raises(ddp_trainer.InputError) as caught:
            call("smoke", data_dir=tiny_dir, **settings)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ddp_trainer.InputError, match="unknown recipe 'slow'"):
        ddp_trainer.train("slow")


def test_launch_refuses_a_recipe_without_a_known_name_and_creates_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ddp_trainer.InputError, match="do not know a recipe named 'custom'"):
        ddp_trainer.launch(TrainConfig(), num_processes=2)
    assert list(tmp_path.iterdir()) == []


def test_launch_passes_on_settings_that_the_recipe_drops_for_another_network() -> None:
    """The recipe `fast` sets `freeze_late` to the same value as this test, but only for its own network."""
    config = configure("fast", {"network": "torchvision:mobilenet_v2", "freeze_late": FIRST_BLOCKS})
    assert _changes(config) == {"network": "torchvision:mobilenet_v2", "freeze_late": FIRST_BLOCKS}
    assert _changes(configure("fast", {})) == {}


def test_a_derived_recipe_keeps_its_own_values_for_another_network() -> None:
    derived = changed(RECIPES["fast"], {"schedule": {"freeze_late": "layer1.*"}})
    config = configure(derived, {"network": "torchvision:resnet18"})
    assert (config.schedule.freeze_late, config.network.widths) == ("layer1.*", DEFAULT_WIDTHS)
    assert configure(RECIPES["fast"], {"network": "torchvision:resnet18"}).schedule.freeze_late == ""


def test_the_notebook_runs_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(REPOSITORY / "docs" / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [cell.outputs[-1] for cell in notebook.cells if cell.get("outputs")]
    results = [output["data"]["text/plain"] for output in shown if "data" in output]
    assert results[0].startswith("('done', ")
    assert results[1] == "('done', 2)"
    assert all(not cell.get("outputs") for cell in nbformat.read(REPOSITORY / "docs" / "notebook.ipynb", 4).cells)

"""Checkpoints are seen whole or not at all, and a damaged one is never trusted."""

from pathlib import Path

import pytest
import torch

from ddp_trainer.checkpoint import (
    STATE,
    Checkpointer,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    write_checkpoint,
)


def state(value: float) -> dict[str, object]:
    return {"step": int(value), "model": {"weight": torch.full((100, 100), value)}, "history": [{"loss": 0.5}]}


def test_saved_and_loaded_it_is_the_same_and_the_newest_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(state(step), step=step)
    checkpointer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    newest = newest_good_checkpoint(tmp_path)
    assert newest is not None
    loaded = load_checkpoint(newest)
    assert torch.equal(loaded["model"]["weight"], torch.full((100, 100), 3.0))
    assert loaded["history"] == [{"loss": 0.5}]


def test_training_on_does_not_change_what_is_being_saved(tmp_path: Path) -> None:
    weight = torch.zeros(1000, 1000)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save({"weight": weight}, step=1)
    weight += 1
    checkpointer.close()
    assert load_checkpoint(tmp_path / "step-00000001")["weight"].sum() == 0


@pytest.mark.parametrize("damage", ["empty", "truncated", "zeroed", "bit flip", "no manifest", "no state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step-{step:08d}", state(step), step)
    file = tmp_path / "step-00000002" / STATE
    content = bytearray(file.read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "zeroed":
        content = bytearray(len(content))
    elif damage == "bit flip":
        content[len(content) // 2] ^= 4
    file.write_bytes(content)
    if damage == "no manifest":
        (file.parent / "manifest.json").unlink()
    elif damage == "no state":
        file.unlink()
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


def test_a_failed_save_leaves_the_one_before_it_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(state(1), step=1)
    checkpointer.wait()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    checkpointer.save(state(2), step=2)
    with pytest.raises(CheckpointError, match=r"step-00000002.*No space left"):
        checkpointer.wait()
    checkpointer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_that_runs_code_is_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    write_checkpoint(tmp_path / "step-00000001", {"evil": Evil()}, 1)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(tmp_path / "step-00000001")

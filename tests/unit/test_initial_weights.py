"""--init-from and --freeze: the weights from which a run starts, and the parameters that stay fixed."""

import copy
import errno
import os
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig
from ddp_trainer.models.initial_weights import freeze, load_initial_weights
from ddp_trainer.models.spec import build_network, require_same_widths_and_activation
from tests.support import networks
from tests.unit.test_networks import OWN, SPEC


def test_initial_weights_with_matching_names_and_shapes_are_loaded(tmp_path: Path) -> None:
    source, other = networks.small(7), networks.small(5)
    head = copy.deepcopy(other[8].state_dict())
    for file in (tmp_path / "weights.safetensors", tmp_path / "weights.pth", tmp_path / "wrapped.pt"):
        if file.suffix == ".safetensors":
            save_file(source.state_dict(), file)
        else:
            state = {f"module.{name}": value for name, value in source.state_dict().items()}
            torch.save(state if file.suffix == ".pth" else {"state_dict": state, "epoch": 3}, file)
        network = copy.deepcopy(other)
        loaded = load_initial_weights(network, file)
        assert loaded.fresh == ("8.weight", "8.bias")
        assert torch.equal(network.state_dict()["0.weight"], source.state_dict()["0.weight"])
        assert torch.equal(network.state_dict()["8.weight"], head["weight"])
        assert "randomly initialized: 8.weight, 8.bias" in loaded.describe(file)


def test_a_shared_weight_may_have_either_of_its_names(tmp_path: Path) -> None:
    source, names = networks.Tied(5), ("first.weight", "second.weight")
    for missing in names:
        weights = {name: value for name, value in source.state_dict().items() if name != missing}
        torch.save({**weights, "first.bias": torch.zeros(7)}, tmp_path / "weights.pt")
        network = networks.Tied(5)
        assert load_initial_weights(network, tmp_path / "weights.pt").fresh == ("first.bias",)
        assert torch.equal(network.first.weight, source.first.weight)
        torch.save({name: value for name, value in weights.items() if name in names}, tmp_path / "one.pt")
        assert load_initial_weights(networks.Tied(5), tmp_path / "one.pt").fitting == tuple({*names} - {missing})


class Wrapper(nn.Module):
    """A network whose own names begin with `module.`, the prefix that DDP adds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.module, self.fc = networks.small(num_classes), nn.Linear(num_classes, num_classes)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_the_network_itself_may_begin_with_the_prefix_of_ddp(tmp_path: Path, prefix: str) -> None:
    source, network = Wrapper(5), Wrapper(5)
    weights = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    assert load_initial_weights(network, tmp_path / "weights.pt").fresh == ()
    assert torch.equal(network.state_dict()["module.0.weight"], source.state_dict()["module.0.weight"])
    torch.save({f"module.{name}": value for name, value in source.module.state_dict().items()}, tmp_path / "module.pt")
    assert load_initial_weights(network, tmp_path / "module.pt").fresh == ("fc.weight", "fc.bias")


def test_the_check_of_widths_does_not_fail_if_a_run_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_initial_weights`, which is called after this check, reports the error."""

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        require_same_widths_and_activation(SPEC, tmp_path)


def test_initial_weights_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    bias = {name: value for name, value in networks.small(5).state_dict().items() if value.ndim == 1}
    torch.save(bias, tmp_path / "bias.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    weights = networks.small(5).state_dict()
    torch.save({0: torch.zeros(3)}, tmp_path / "numbered.pt")
    torch.save({**weights, "0.weight": weights["0.weight"].to_sparse()}, tmp_path / "sparse.pt")
    torch.save({**weights, "0.weight": weights["0.weight"].to("meta")}, tmp_path / "meta.pt")
    torch.save({**weights, "0.weight": torch.full_like(weights["0.weight"], torch.nan)}, tmp_path / "nan.pt")
    torch.save({"net": {}, "epoch": 1}, tmp_path / "nested.pt")
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "state.pt").touch()
    for name in ("text.safetensors", "text.json"):
        (tmp_path / name).write_text("no weights")
    for name, expected in (
        ("other.pt", "none of its tensors has the name and shape of a weight of this network; set --network"),
        ("bias.pt", "none of its tensors has the name and shape of a weight"),
        ("list.pt", "must contain a dictionary of named tensors"),
        ("nested.pt", r"must contain a dictionary of named tensors \(it has the keys net, epoch\)"),
        ("numbered.pt", r"must contain a dictionary of named tensors \(it has the keys 0\)"),
        ("sparse.pt", "0.weight is a sparse or meta tensor"),
        ("meta.pt", "0.weight is a sparse or meta tensor"),
        ("nan.pt", "0.weight has values that are not finite"),
        ("step", "there is no file .*; use .*state.pt"),
        ("text.safetensors", "cannot be read"),
        ("text.json", "cannot be read: it is damaged, or contains more than tensors"),
        ("absent.pt", "there is no file"),
    ):
        with pytest.raises(InputError, match=expected):
            load_initial_weights(networks.small(5), tmp_path / name)


def test_a_compressed_file_is_refused_before_its_tensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"0.weight": torch.zeros(1000)}, tmp_path / "saved.pt")
    with ZipFile(tmp_path / "saved.pt") as saved, ZipFile(tmp_path / "small.pt", "w", ZIP_DEFLATED) as compressed:
        for part in saved.infolist():
            compressed.writestr(part.filename, saved.read(part))
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("the tensors were read"))
    with pytest.raises(InputError, match="cannot be read: it is compressed; save it again"):
        load_initial_weights(networks.small(5), tmp_path / "small.pt")


def test_freeze_accepts_patterns_of_parameter_names() -> None:
    network = build_network(NetworkConfig(freeze="0.*, 4.weight"), replace(SPEC, architecture=f"{OWN}small"))
    assert {name for name, value in network.named_parameters() if not value.requires_grad} == {"0.weight", "4.weight"}
    for name in ("first.weight", "second.weight"):  # the names of one parameter
        tied = networks.Tied(5)
        freeze(tied, (name,))
        assert not tied.first.weight.requires_grad
    with pytest.raises(InputError, match=r"--freeze stem\.\* matches no parameter; the first parameters are 0\.weight"):
        freeze(networks.small(5), ("stem.*",))
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze(networks.small(5), ("*",))

"""Every optimizer: found and tried before a weight is loaded, saved, and gone on with bit for bit."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.checkpoint import UNAVERAGED_FILE, WEIGHTS_FILE, Checkpoints
from crepa_trainer.optimizers import (
    OPTIMIZERS,
    MuonAndAdamW,
    check_optimizer,
    learning_rate,
    make_optimizer,
    start_training,
)
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import TrainState, parameter_groups
from crepa_trainer.state_files import read_state
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import TinyClips, metrics_rows, tiny_config, tiny_settings, train, train_elsewhere

SCHEDULE_FREE = [name for name, kind in OPTIMIZERS.items() if kind.schedule_free]
# States of 8 bits of all that a tiny model has.
ARGUMENTS: dict[str, dict[str, Any]] = {name: {"min_8bit_size": 16} for name in OPTIMIZERS if "8bit" in name}
ARGUMENTS |= {"sgd": {"momentum": 0.9}, "adamw": {"amsgrad": True}, "prodigy": {"slice_p": 3, "d0": 1e-3}}
# Else its first steps are of length 0.
ARGUMENTS |= {"radam_schedulefree": {"silent_sgd_phase": False}}


def made(name: str, groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    return make_optimizer(name, groups, arguments or ARGUMENTS.get(name, {}), 1e-2)


class Model(nn.Module):
    """Matrices, a convolution, biases, and a projector with a learning rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.conv = nn.Linear(80, 80), nn.Conv3d(80, 4, 2)
        self.crepa_projector = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        clips = self.layer(inputs).movedim(-1, 1)
        return self.crepa_projector(self.conv(clips).movedim(1, -1)).square().mean()


def state_of(name: str) -> TrainState:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True), Model()
    rate = 1.0 if OPTIMIZERS[name].one_rate else 1e-2
    groups = parameter_groups(model, rate, rate if OPTIMIZERS[name].one_rate else 2 * rate)
    optimizer = made(name, groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    prepared: Any = accelerator.prepare(model, optimizer, scheduler)
    start_training(prepared[1])
    return TrainState(accelerator, prepared[0], None, prepared[1], prepared[2])


def steps(state: TrainState, first: int, last: int) -> list[Tensor]:
    """Trains a step for each number, and gives the weights after it."""
    for step in range(first, last):
        inputs = torch.randn(2, 3, 3, 3, 80, generator=torch.Generator().manual_seed(step))
        state.accelerator.backward(state.transformer(inputs))
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in state.transformer.parameters()]


def checkpoints(state: TrainState, name: str, output: Path) -> Checkpoints:
    return Checkpoints(
        state, None, save_lora=None, output=output, kept=1, identity={"optimizer": name, "processes": 1}, model="m"
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = state_of(name)
    started = steps(whole, 0, 0)
    before = steps(whole, 0, 3)
    assert all(not torch.equal(a, b) for a, b in zip(started[:2], before[:2], strict=True))
    whole_checkpoints = checkpoints(whole, name, tmp_path)
    folder = whole_checkpoints.save(3)
    # Writing it changed nothing.
    assert all(torch.equal(a, b) for a, b in zip(before, steps(whole, 0, 0), strict=True))
    expected = steps(whole, 3, 6)
    again = state_of(name)
    steps(again, 7, 8)  # what is loaded replaces all of it
    checkpoints(again, name, tmp_path).load(whole_checkpoints.described(folder, 3))
    with torch.no_grad():  # as CREPA's own state does
        again.transformer.crepa_projector.load_state_dict(  # type: ignore[union-attr]
            dict(zip(whole.transformer.crepa_projector.state_dict(), before[4:], strict=True))  # type: ignore[union-attr]
        )
    found = steps(again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name
    rates = [group["lr"] for group in again.optimizer.param_groups]
    assert rates == [group["lr"] for group in whole.optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_checkpoint_has_the_weights_that_a_schedule_free_optimizer_means_for_use(name: str, tmp_path: Path) -> None:
    state = state_of(name)
    trained = dict(zip(dict(state.transformer.named_parameters()), steps(state, 0, 4), strict=True))
    folder = checkpoints(state, name, tmp_path).save(4)
    own = load_file(folder / UNAVERAGED_FILE)
    used = load_file(folder / WEIGHTS_FILE)
    moments = read_state(folder / "optimizer.safetensors")
    group = moments["param_groups"][0]
    beta = group["momentum"] if "momentum" in group else group["betas"][0]
    for key, weight in own.items():
        assert torch.equal(weight, trained[key])
        index = list(trained).index(key)
        z = moments["state"][str(index)]["z"]
        torch.testing.assert_close(used[key], weight + (z - weight) * (1 - 1 / beta))
        assert not torch.equal(used[key], weight)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = Model()
    optimizer = made("muon", parameter_groups(model, 1e-2, 1e-1))
    assert isinstance(optimizer, MuonAndAdamW)
    taken = [[p.ndim for p in group["params"]] for group in optimizer.param_groups]
    assert taken == [[2], [1, 5, 1], [2], [1, 1, 1]]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 1e-1, 1e-1]
    matrix, bias = model.layer.weight, model.layer.bias
    before = matrix.detach().clone(), bias.detach().clone()
    matrix.grad, bias.grad = torch.randn(80, 80), torch.full((80,), 3.0)
    optimizer.step()
    same = torch.nn.Parameter(before[0]), torch.nn.Parameter(before[1])
    same[0].grad, same[1].grad = matrix.grad, bias.grad
    torch.optim.Muon([same[0]], lr=1e-2, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW([same[1]], lr=1e-2, weight_decay=1e-2).step()
    assert torch.equal(matrix, same[0])
    assert torch.equal(bias, same[1])


def test_the_names_of_the_settings_are_those_of_the_table_and_all_decay_weights() -> None:
    import inspect

    assert get_args(RunSettings.model_fields["optimizer"].annotation) == tuple(OPTIMIZERS)
    for kind in OPTIMIZERS.values():
        assert "weight_decay" in inspect.signature(kind.load()).parameters


REFUSED = [
    ("adamw", {"beta": [0.9, 0.99]}, "optimizer_args: beta is no argument of torch.optim.AdamW; did you mean betas?"),
    ("adamw", {"warmup": 1}, r"warmup is no argument of torch.optim.AdamW; it takes betas, eps, amsgrad"),
    ("adamw", {"lr": 1}, "optimizer_args: lr of torch.optim.AdamW is what learning_rate says"),
    ("lion", {"weight_decay": 1}, "weight_decay of lion_pytorch.Lion is what weight_decay says"),
    ("adamw", {"betas": [0.9, 2]}, r'optimizer_args = \{"betas": \[0.9, 2\]\}: .*AdamW refuses it: Invalid beta'),
    (
        "adamw",
        {"betas": 0.9},
        r"optimizer_args: betas = 0.9 of torch.optim.AdamW must be a list such as \[0.9, 0.999\]",
    ),
    ("adamw", {"betas": [0.9, 0.99, 0.999]}, r"betas = \[0.9, 0.99, 0.999\] .* must be a list such as \[0.9, 0.999\]"),
    ("adamw", {"betas": "x"}, r'betas = "x" of torch.optim.AdamW must be a list such as'),
    ("adamw", {"amsgrad": "false"}, 'amsgrad = "false" of torch.optim.AdamW must be true or false'),
    ("adamw", {"eps": "1e-6"}, 'eps = "1e-6" of torch.optim.AdamW must be a number'),
    ("prodigy", {"growth_rate": True}, "growth_rate = true of prodigyopt.Prodigy must be a number"),
    ("muon", {"adjust_lr_fn": 3}, "adjust_lr_fn = 3 of .*MuonAndAdamW must be text"),
    ("adamw", {"fused": True, "foreach": True}, "AdamW refuses it: "),
    ("adamw", {"capturable": True}, "AdamW refuses it: "),
    ("adam8bit", {"amsgrad": True}, "Adam8bit refuses it: "),
    ("sgd", {"nesterov": True}, "SGD refuses it: Nesterov momentum requires a momentum"),
    ("muon", {"ns_steps": 1000}, "MuonAndAdamW refuses it: "),
    ("adamw_schedulefree", {"warmup_step": 5}, "did you mean warmup_steps?"),
    ("prodigy", {"d0": -1}, "Prodigy refuses it: "),
]


@pytest.mark.parametrize(("name", "arguments", "said"), REFUSED)
def test_arguments_that_an_optimizer_does_not_take(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        check_optimizer(name, arguments, 1e-2, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_refuses_its_own_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_optimizer(name, {}, 1e-2, "cpu")
    check_optimizer(name, {}, 1e-2, "cuda")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "package"), [(name, kind.package) for name, kind in OPTIMIZERS.items() if kind.package]
)
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, OPTIMIZERS[name].module, None)
    with pytest.raises(ValueError, match=rf"optimizer = {name}: .*: pip install {package}$"):
        check_optimizer(name, {}, 1e-2, "cpu")


def test_prodigys_logged_learning_rate_is_the_step_that_it_has_found() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = made("prodigy", [{"params": [parameter], "lr": 0.5}], d0=1e-3)
    rates = [learning_rate(optimizer)]
    for _ in range(10):
        parameter.grad = -torch.ones(2)
        optimizer.step()
        rates.append(learning_rate(optimizer))
    assert rates[0] == 0.5 * 1e-3
    assert rates == sorted(rates)
    assert rates[-1] > 10 * rates[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(models: Path, tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {"optimizer": name, "optimizer_args": ARGUMENTS.get(name, {}), "max_train_steps": 8}
    given |= {"checkpoint_every": 3, "gradient_accumulation_steps": 2}
    if OPTIMIZERS[name].one_rate:
        given["learning_rate"] = 1.0
    else:
        given["projector_learning_rate"] = 2e-2
    if not OPTIMIZERS[name].schedule_free:
        given |= {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "ema_decay": 0.8}
    config = tiny_config(models)
    whole = train(tiny_settings(models, tmp_path / "whole", **given), config, TinyClips(1, 0))
    settings = tiny_settings(models, tmp_path / "killed", **given)
    killed = train_elsewhere(settings, config, wide=1, tall=0, kill_at=2 * 7 + 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    rows = train(settings.model_copy(update={"resume": "latest"}), config, TinyClips(1, 0))
    assert rows == whole == metrics_rows(tmp_path / "killed")
    lora = "trained/pytorch_lora_weights.safetensors"
    assert (tmp_path / "killed" / lora).read_bytes() == (tmp_path / "whole" / lora).read_bytes()
    assert json.loads((tmp_path / "killed" / "checkpoints" / "step-00000008" / "state.json").read_text())["step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_looking_at_averaged_weights_changes_nothing_of_a_run(models: Path, tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {"optimizer": name, "optimizer_args": ARGUMENTS.get(name, {}), "checkpoint_every": 2}
    plain = train(tiny_settings(models, tmp_path / "plain", **given), tiny_config(models))
    prompts = {"validation_prompts": ["a"], "validation_every": 1, "validation_steps": 2}
    assert train(tiny_settings(models, tmp_path / "seen", **given, **prompts), tiny_config(models)) == plain
    # The clip at the end is of what was exported, and so is the checkpoint's LoRA.
    file = "pytorch_lora_weights.safetensors"
    trained = tmp_path / "seen" / "trained" / file
    assert (tmp_path / "seen" / "checkpoints" / "step-00000004" / file).read_bytes() == trained.read_bytes()
    strips = [tmp_path / "seen" / "validation" / f"step-{step:08d}" / "prompt-0.png" for step in (1, 4)]
    assert strips[0].read_bytes() != strips[1].read_bytes()

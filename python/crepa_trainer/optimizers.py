"""The optimizers that `optimizer` names: found and tried before a weight is loaded, then made for what is trained."""

from __future__ import annotations

import importlib
import inspect
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from crepa_kernels.config.rules import describe, nearest

# Arguments that settings of their own say.
_SAID_BY = {"lr": "learning_rate", "weight_decay": "weight_decay"}
# Of the states of Adafactor and of Prodigy, what is not of its parameter's shape; both are no larger.
SHAPED_OTHERWISE = frozenset({"row_var", "col_var", "s", "p0"})


@dataclass(frozen=True)
class Kind:
    """An optimizer.

    module, name: of its class. package: what pip installs, None where torch has it. schedule_free: it trains other
    weights than those that are to be used, and has its own warm-up. one_rate: of all parameters the same.
    """

    module: str
    name: str
    package: str | None = None
    schedule_free: bool = False
    one_rate: bool = False

    @property
    def title(self) -> str:
        return f"{self.module}.{self.name}"

    def load(self) -> type[torch.optim.Optimizer]:
        """Its class. ModuleNotFoundError where its package is not installed."""
        return getattr(importlib.import_module(self.module), self.name)


_BITSANDBYTES, _SCHEDULE_FREE = "bitsandbytes", "schedulefree"
OPTIMIZERS: Mapping[str, Kind] = MappingProxyType(
    {
        "adamw": Kind("torch.optim", "AdamW"),
        "adam": Kind("torch.optim", "Adam"),
        "nadam": Kind("torch.optim", "NAdam"),
        "radam": Kind("torch.optim", "RAdam"),
        "adamax": Kind("torch.optim", "Adamax"),
        "adagrad": Kind("torch.optim", "Adagrad"),
        "adafactor": Kind("torch.optim", "Adafactor"),
        "rmsprop": Kind("torch.optim", "RMSprop"),
        "sgd": Kind("torch.optim", "SGD"),
        "muon": Kind(__name__, "MuonAndAdamW"),
        "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", _BITSANDBYTES),
        "adam8bit": Kind("bitsandbytes.optim", "Adam8bit", _BITSANDBYTES),
        "ademamix8bit": Kind("bitsandbytes.optim", "AdEMAMix8bit", _BITSANDBYTES),
        "lion8bit": Kind("bitsandbytes.optim", "Lion8bit", _BITSANDBYTES),
        "paged_adamw8bit": Kind("bitsandbytes.optim", "PagedAdamW8bit", _BITSANDBYTES),
        "lion": Kind("lion_pytorch", "Lion", "lion-pytorch"),
        "prodigy": Kind("prodigyopt", "Prodigy", "prodigyopt", one_rate=True),
        "adamw_schedulefree": Kind("schedulefree", "AdamWScheduleFree", _SCHEDULE_FREE, schedule_free=True),
        "radam_schedulefree": Kind("schedulefree", "RAdamScheduleFree", _SCHEDULE_FREE, schedule_free=True),
        "sgd_schedulefree": Kind("schedulefree", "SGDScheduleFree", _SCHEDULE_FREE, schedule_free=True),
    }
)


def optimizer_problems(values: Mapping[str, Any], given: Collection[str]) -> Iterator[tuple[set[str], str]]:
    """Settings that contradict the optimizer's: the keys, and what is wrong. given: the keys that are not defaults."""
    name, arguments = values["optimizer"], values["optimizer_args"]
    kind = OPTIMIZERS[name]
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError):  # a date of TOML, an infinity
        rule = "its values must be numbers that are finite, text, true, false, null, and lists and mappings of them"
        yield {"optimizer_args"}, describe("optimizer_args", arguments, rule)
    if kind.schedule_free:
        own = f'{name} needs no schedule, and any warm-up is its own: optimizer_args = {{"warmup_steps": ...}}'
        for key, without in (("lr_scheduler", "constant"), ("lr_warmup_steps", 0)):
            if values[key] != without:
                yield {"optimizer", key}, describe(key, values[key], own)
        if values["ema_decay"] is not None:
            rule = f"{name} averages the weights itself"
            yield {"optimizer", "ema_decay"}, describe("ema_decay", values["ema_decay"], rule)
    if kind.one_rate:
        rate, projector = (values[key] for key in ("learning_rate", "projector_learning_rate"))
        keys = {"optimizer", "learning_rate", "projector_learning_rate"}
        if "learning_rate" not in given:
            rule = f"{name} finds the step itself and takes a factor of it: give one, as a rule 1"
            yield keys, describe("learning_rate", rate, rule)
        if projector not in (None, rate):
            rule = f"{name} has one for all: leave it out, or give learning_rate = {rate:g}"
            yield keys, describe("projector_learning_rate", projector, rule)


def check_optimizer(name: str, arguments: Mapping[str, Any], weight_decay: float, device_type: str) -> None:
    """Tries an optimizer on two parameters; on a CPU for a step as well.

    ValueError where its package is missing, or naming the argument that it does not have or does not take.
    """
    kind = OPTIMIZERS[name]
    try:
        known = inspect.signature(kind.load()).parameters
    except ModuleNotFoundError as error:
        raise ValueError(f"optimizer = {name}: {error}: pip install {kind.package}") from error
    others = [each for each in known if each not in ("params", *_SAID_BY)]
    for each in arguments:
        if each in _SAID_BY:
            raise ValueError(f"optimizer_args: {each} of {kind.title} is what {_SAID_BY[each]} says")
        if each not in others:
            match = nearest(each, others)
            hint = f"did you mean {match}?" if match else f"it takes {', '.join(others)}"
            raise ValueError(f"optimizer_args: {each} is no argument of {kind.title}; {hint}")
        if rule := _broken_rule(arguments[each], known[each].default):
            said = f"{each} = {json.dumps(arguments[each])} of {kind.title}"
            raise ValueError(f"optimizer_args: {said} must be {rule}")
    tried = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,))]
    groups: list[dict[str, Any]] = [{"params": [each], "lr": 1e-3} for each in tried]
    try:
        optimizer = make_optimizer(name, groups, arguments, weight_decay)
        if device_type == "cpu":
            _step_once(optimizer, tried)
    except Exception as error:  # of any kind: each package has its own way to refuse
        line = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{describe('optimizer_args', arguments, f'{kind.title} refuses it')}: {line}") from error


def _broken_rule(value: Any, default: Any) -> str | None:
    """What an argument with this default must be, where `value` is not: most optimizers take anything, and find it
    wrong at a step, or never.
    """
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "text"
    if isinstance(default, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(default)
        return None if fits else f"a list such as {json.dumps(default)}"
    return None


def _step_once(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if _is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    optimizer.step()


def make_optimizer(
    name: str, groups: list[dict[str, Any]], arguments: Mapping[str, Any], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a name on groups of parameters, each with its learning rate; arguments: by its own names."""
    kind: Any = OPTIMIZERS[name].load()
    with redirect_stdout(io.StringIO()):  # Prodigy prints
        return kind(groups, lr=groups[0]["lr"], weight_decay=weight_decay, **arguments)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The first group's; of Prodigy times the step that it has found."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def _is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]


def start_training(optimizer: Any) -> bool:
    """Tells a schedule-free optimizer that training begins; whether it is one."""
    if not _is_schedule_free(optimizer):
        return False
    optimizer.train()
    return True


@contextmanager
def weights_for_use(optimizer: Any) -> Iterator[None]:
    """The weights that a schedule-free optimizer means to be used, in the place of those that it trains.

    Those come back bit for bit, which its own way back does not give. Of any other they are the same.
    """
    if not _is_schedule_free(optimizer):
        yield
        return
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in trained]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, before in zip(trained, kept, strict=True):
                parameter.copy_(before)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on all matrices and AdamW on all else: biases, norms, convolutions.

    adjust_lr_fn: of torch.optim.Muon; by default its steps are as large as AdamW's, so that one learning rate is of
    both. adamw_betas, adamw_eps: of AdamW; the others are Muon's.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_betas: Sequence[float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
    ) -> None:
        groups = []
        for group in params:
            for matrices in (True, False):
                some = [parameter for parameter in group["params"] if (parameter.ndim == 2) is matrices]
                if some:
                    groups.append({**group, "params": some, "matrices": matrices})
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_coefficients": tuple(ns_coefficients)}
        muon |= {"eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if own := [group for group in groups if group["matrices"]]:
            self._parts[True] = torch.optim.Muon(own, **shared, **muon)
        if own := [group for group in groups if not group["matrices"]]:
            self._parts[False] = torch.optim.AdamW(own, betas=tuple(adamw_betas), eps=adamw_eps, **shared)  # type: ignore[arg-type]
        super().__init__(groups, shared)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each of the two, on the groups and the state that are those of this optimizer."""
        for matrices, part in self._parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["matrices"] is matrices]
            part.step(closure)

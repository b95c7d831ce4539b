"""A training step in which the host never waits for the device, of the regularizer and of the trainer.

Without a GPU the meta device stands for it: its tensors have no values, so reading one fails, and every branch that
asks for the device takes the GPU's way. Three things are replaced there, which meta has not: autocast, the checks that
transformer and projector have weights, and the copy to the host (``HostCopy``), whose own reads wait for what was sent
a step ago.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from crepa_trainer.control import RunControl
from crepa_trainer.data.sampler import MicroBatch, MicroBatches, Position
from crepa_trainer.families import TrainingFamily
from crepa_trainer.run import TrainingRun, make_accelerator
from crepa_trainer.state import make_ema, make_state
from crepa_trainer.step import flow_matching_loss, training_step
from rich.console import Console
from tiny import clip_pixels, tiny_dinov2, tiny_vae, tiny_wan, wan_inputs
from tiny_families import FAMILIES
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import TinyClips, tiny_config, tiny_settings

from crepa_kernels import CrepaRegularizer
from crepa_kernels.transfer import HostCopy

READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select",
    "unique", "_unique2", "unique_consecutive", "unique_dim", "argwhere",
}  # fmt: skip
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
COPIES = {"copy_", "_to_copy"}
FEW = 16  # numbers, which CUDA takes into the command itself: the host does not wait for them


class HostWaits(AssertionError):
    pass


class _Operators(TorchDispatchMode):
    """Fails where an operator gives values to Python, or a copy between devices makes the host wait.

    pinned: addresses of what is in pinned memory. A copy of more than a few numbers from elsewhere on the host fails
    then too, as it may block whatever it is told; and reading what is on the host does not.
    """

    def __init__(self, pinned: set[int] | None = None) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS and (self.pinned is None or any(isinstance(each, Tensor) and each.is_meta for each in args)):
            raise HostWaits(f"{func} reads a tensor")
        out = func(*args, **kwargs)
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if blocking and source.device != out.device:
                raise HostWaits(f"{func} from {source.device} to {out.device} blocks")
            large = source.numel() > FEW and source.device != out.device
            if self.pinned is not None and large and source.data_ptr() not in self.pinned:
                raise HostWaits(f"{func} from {source.device} to {out.device} is not from pinned memory")
        return out


class _Python(TorchFunctionMode):
    """Fails where numbers of Python go to a device: that blocks on a GPU, and the dispatcher does not see it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise HostWaits(f"{func.__name__} copies to {kwargs['device']}")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type != "cpu":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(one, list) or (isinstance(one, torch.Tensor) and not one.is_meta) for one in index):
                raise HostWaits("an index goes from Python to the device")
        return func(*args, **kwargs)


class _Arrived(HostCopy):
    """What was copied from a device without values: always the same similarity, over one frame."""

    arrived = True  # type: ignore[assignment]
    similarity = 0.0

    def __init__(self, numbers: torch.Tensor, *, over_ranks: bool = False) -> None:
        assert numbers.is_meta
        self._length = len(numbers)

    def read(self) -> list[float]:
        return [_Arrived.similarity, 1.0] if self._length == 2 else [0.0] * self._length


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    for check in (
        "regularizer.base.check_attachable",
        "regularizer.base.check_attached",
        "teachers.encoders.check_loaded",
    ):
        monkeypatch.setattr(f"crepa_kernels.{check}", lambda *args: None)
    for name in ("__init__", "arrived", "read"):
        monkeypatch.setattr(HostCopy, name, vars(_Arrived)[name])


SOURCES: dict[str, dict[str, Any]] = {
    "features": {"features": torch.rand(2, 3, 6, 32)},
    "features of every pixel frame": {"features": torch.rand(2, 9, 25, 32), "feature_grid": (5, 5), "num_frames": 9},
    "features of clips of other lengths": {"features": torch.rand(2, 9, 2, 3, 32), "num_frames": [9, 5]},
    "pixels": {"pixels": clip_pixels(2)},
    "pixels of clips of other lengths": {"pixels": clip_pixels(2), "num_frames": [5, 9]},
    "floating-point pixels": {"pixels": clip_pixels(2).float() / 255},
    "latents": {"latents": torch.randn(2, 4, 3, 4, 6)},
    "backbone": {},
}
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "masks": {
        "frame_mask": torch.tensor([[False, True, True], [True, True, False]]),
        "teacher_mask": torch.tensor([[True, True, True], [True, True, False]]),
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {},
    "threshold": {"crepa_similarity_threshold": 0.9},
    "probes": {
        "crepa_similarity_threshold": 0.5,
        "crepa_threshold_mode": "recoverable",
        "crepa_probe_interval": 2,
    },
    "every frame, on the teacher's grid": {
        "crepa_frame_map": "mean",
        "crepa_spatial_align": "teacher",
        "crepa_cumulative_neighbors": True,
        "crepa_adjacent_distance": 2,
    },
}

CASES = [
    *((source, "threshold", "masks") for source in SOURCES),
    *(("features", setting, "no mask") for setting in SETTINGS),
    ("pixels of clips of other lengths", "every frame, on the teacher's grid", "no mask"),
]


def on(device: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}


def steps(
    device: str, source: str, settings: dict[str, Any], number: int = 4
) -> Iterator[tuple[CrepaRegularizer, int]]:
    """A regularizer whose transformer has just run, once for each step."""
    transformer = tiny_wan()
    settings = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70, **settings}
    if source == "backbone":
        settings |= {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 2}
    models = {"vae": tiny_vae().to(device), "encoder": tiny_dinov2().to(device)}
    crepa = CrepaRegularizer(settings, transformer, **models)
    transformer.to(device)
    inputs = on(device, wan_inputs(2))
    for step in range(number):
        transformer(**inputs)
        yield crepa, step


@pytest.mark.every(3)
@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("given_on", ["meta", "cpu"])
@pytest.mark.parametrize(("source", "setting", "masks"), CASES)
def test_nothing_is_read_from_the_device(
    source: str, setting: str, masks: str, given_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Arrived, "similarity", 0.6)
    ran = []
    for crepa, step in steps("meta", source, SETTINGS[setting]):
        # The range of floating-point pixels is looked at in the first step alone.
        first = step == 0 and source == "floating-point pixels"
        given = on(given_on, {**SOURCES["pixels" if first else source], **MASKS[masks]})
        with _Operators(), _Python():
            _, logs = crepa.loss(step=step, **given)
        ran.append("crepa_loss" in logs)
    assert ran == [True] * 2 + [setting != "probes"] * 2


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("name", ["flux", "flux2", "chroma", "qwen_image", "sd3", "sana"])
@pytest.mark.parametrize("source", [{"features": torch.rand(2, 6, 32)}, {"pixels": torch.rand(2, 3, 32, 48)}], ids=list)
def test_nothing_is_read_of_images_but_the_ids_of_a_new_grid(
    name: str, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, read = FAMILIES[name], []
    inputs = tiny.inputs(2)
    cpu = torch.Tensor.cpu

    def known(self: Tensor) -> Tensor:
        read.append(self.shape)
        return inputs["img_ids"].reshape(-1, *self.shape)[0] if self.is_meta else cpu(self)

    monkeypatch.setattr(torch.Tensor, "cpu", known)
    monkeypatch.setattr(HostCopy, "read", lambda self: [1.0] * self._length)
    transformer = tiny.make()
    settings = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}
    crepa = CrepaRegularizer(settings, transformer, encoder=tiny_dinov2().to("meta"))
    transformer.to("meta")
    for step in range(3):
        transformer(**on("meta", inputs))
        given = on("meta", {key: value.to(torch.uint8) if key == "pixels" else value for key, value in source.items()})
        # Ids of a new grid are read in the first step.
        with nullcontext() if step == 0 else _Operators(), nullcontext() if step == 0 else _Python():
            _, logs = crepa.loss(step=step, **given)
        assert "crepa_loss" in logs
        assert len(read) == ("img_ids" in inputs)


@pytest.mark.usefixtures("no_values")
def test_a_projector_that_nothing_trains_is_found_without_waiting(caplog: pytest.LogCaptureFixture) -> None:
    for crepa, step in steps("meta", "features", {}, number=6):
        given = on("meta", SOURCES["features"])
        with _Operators(), _Python():
            crepa.loss(step=step, **given)
    assert "has not changed over 5 optimizer steps" in caplog.text


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.sum().item(), HostWaits),
        (lambda x: float(x.sum()), HostWaits),
        (lambda x: bool(x.sum() > 0), HostWaits),
        (lambda x: torch.equal(x, x), HostWaits),
        (lambda x: x.nonzero(), HostWaits),
        (lambda x: x[[0, 1]], HostWaits),
        (lambda x: x[torch.tensor([0, 1])], HostWaits),
        (lambda x: torch.tensor([1.0], device=x.device), HostWaits),
        (lambda x: torch.ones(3).to(x.device), HostWaits),
        (lambda x: x.copy_(torch.ones(3)), HostWaits),
        # These the meta device refuses by itself: it has no values.
        (lambda x: x[x > 0], NotImplementedError),
        (lambda x: x.tolist(), NotImplementedError),
        (lambda x: x.cpu(), NotImplementedError),
        (lambda x: x.numpy(), TypeError),
    ],
)
def test_what_would_make_the_host_wait_is_seen(wait: Any, error: type[Exception]) -> None:
    x = torch.ones(3, device="meta")
    with pytest.raises(error), _Operators(), _Python():
        wait(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("source", "setting", "masks"), CASES)
def test_a_gpu_is_not_waited_for(source: str, setting: str, masks: str) -> None:
    given = on("cuda", {**SOURCES[source], **MASKS[masks]})
    for crepa, step in steps("cuda", source, SETTINGS[setting]):
        # Kernels are compiled and pixels looked at in the first step.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            crepa.loss(step=step, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def new_state() -> Iterator[None]:
    """accelerate's own, before and after."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def device_of_runs(new_state: None) -> torch.device:
    """Meta, where runs of this process are then."""
    device = PartialState(cpu=True).device = torch.device("meta")
    return device


class _Pinned(MicroBatches):
    """Keeps the addresses of all that its batches hold: the loader would have them in pinned memory."""

    addresses: set[int]

    def __getitem__(self, wanted: Any) -> MicroBatch | Exception:
        batch = super().__getitem__(wanted)
        assert isinstance(batch, MicroBatch)
        tensors = (*batch.clips.values(), *batch.teacher.values(), batch.noise, batch.time)
        self.addresses |= {tensor.data_ptr() for tensor in tensors if isinstance(tensor, Tensor)}
        return batch


class _Late(_Arrived):
    """Counts how many steps later than its own each step's values are read."""

    sent = 0
    late: list[int]

    def __init__(self, numbers: torch.Tensor, *, over_ranks: bool = False) -> None:
        super().__init__(numbers, over_ranks=over_ranks)
        type(self).sent += 1
        self._number = self.sent

    def read(self) -> list[float]:
        self.late.append(self.sent - self._number)
        return super().read()


class _NoCheckpoints:
    """Of a device without values none can be written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, step: int) -> None:
        self.steps.append(step)


BACKBONE = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "features": ({}, {}, False),
    "pixels": ({}, {"crepa_encoder_image_size": 28}, True),
    "backbone": ({}, BACKBONE, False),
    "accumulation, an average and a schedule": (
        {"gradient_accumulation_steps": 2, "batch_size": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"},
        {"crepa_warmup_steps": 2},
        False,
    ),
    "a threshold": ({}, {"crepa_similarity_threshold": 0.9}, False),
    "a cutoff": ({}, {"crepa_cutoff_step": 2}, False),
    "all weights, without CREPA": ({"training": "full"}, {"crepa_enabled": False}, False),
}
STEPS = 5


def training_run(models: Path, output: Path, name: str) -> tuple[TrainingRun, _NoCheckpoints]:
    """A run on the device of accelerate's state, before its first step."""
    changes, crepa, pixels = RUNS[name]
    # What workers make has other addresses here.
    settings = tiny_settings(models, output, max_train_steps=STEPS, checkpoint_every=3, workers=0, **changes)
    family, accelerator, checkpoints = TrainingFamily.of(settings.model), make_accelerator(settings), _NoCheckpoints()
    state = make_state(accelerator, family, settings, tiny_config(models, **crepa))
    ema = make_ema(accelerator.unwrap_model(state.transformer), settings.ema_decay)
    clips: Any = TinyClips(pixels=pixels)
    saving: Any = checkpoints
    return TrainingRun(family, settings, clips, state, ema, saving, RunControl(output, STEPS)), checkpoints


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    addresses: set[int] = set()
    monkeypatch.setattr(_Pinned, "addresses", addresses, raising=False)
    monkeypatch.setattr("crepa_trainer.run.MicroBatches", _Pinned)
    monkeypatch.setattr("crepa_trainer.step.HostCopy", _Late)
    monkeypatch.setattr(_Late, "late", [], raising=False)
    monkeypatch.setattr(_Late, "sent", 0)
    return addresses


@pytest.mark.every(3)
@pytest.mark.usefixtures("no_values", "one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_the_trainer_waits_for_nothing(
    models: Path, tmp_path: Path, device_of_runs: torch.device, pinned: set[int], name: str
) -> None:
    run, checkpoints = training_run(models, tmp_path, name)
    assert {p.device for p in run.transformer.parameters()} == {device_of_runs}
    if run.state.crepa is not None and name == "pixels":
        # The encoder is loaded for the first pixels, which takes what it takes.
        run.transformer(**on("meta", wan_inputs()))
        run.state.crepa.loss(step=0, pixels=clip_pixels().to(device_of_runs))
    with _Operators(pinned), _Python():
        run.steps(0, Console(file=io.StringIO()))
    # Each step's values once the next is under way, but where a checkpoint is to be written.
    assert checkpoints.steps == [3, 5]
    assert _Late.late == [1, 1, 0, 1, 0]


@pytest.mark.usefixtures("no_values", "one_thread", "device_of_runs")
@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss * float(loss.detach()),
        lambda loss: loss if loss.isfinite().all() else -loss,
        lambda loss: loss * torch.ones(FEW + 1).to(loss, non_blocking=True).mean(),
        lambda loss: loss * torch.ones(1).to(loss),
    ],
    ids=["float", "a branch", "pageable memory", "a blocking copy"],
)
def test_a_wait_in_the_trainers_step_is_seen(
    models: Path, tmp_path: Path, pinned: set[int], monkeypatch: pytest.MonkeyPatch, wait: Any
) -> None:
    run, _ = training_run(models, tmp_path, "features")
    monkeypatch.setattr("crepa_trainer.step.flow_matching_loss", lambda *args: wait(flow_matching_loss(*args)))
    with pytest.raises(HostWaits), _Operators(pinned), _Python():
        run.steps(0, Console(file=io.StringIO()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.usefixtures("new_state")
@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_does_not_wait_for_a_gpu(
    models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = training_run(models, tmp_path, name)
    steps: list[int] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            steps.extend(each.step for each in args if isinstance(each, Position))
            # Kernels are compiled and pixels looked at in the first step.
            torch.cuda.set_sync_debug_mode("error" if steps[-1] else "default")
            try:
                return function(*args, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return called

    monkeypatch.setattr("crepa_trainer.run.training_step", watched(training_step))
    if run.average is not None:
        monkeypatch.setattr(run.average, "step", watched(run.average.step))
    run.steps(0, Console(file=io.StringIO()))

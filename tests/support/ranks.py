"""Training runs of one process or of two, which must come out alike: test_distributed.py compares them.

torchrun --nproc_per_node 2 tests/support/ranks.py FOLDER   writes FOLDER/RUN-RANK.pt for each of RUNS
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_wan, wan_inputs
from tiny_families import FAMILIES
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaConfig, CrepaRegularizer, crepa_loss
from crepa_kernels.regularizer.schedule import CrepaSchedule

RANKS = 2
STEPS = 20
STOPS = (10,)  # of runs that are cut off at step 11: what decides about it is still under way
SAMPLES = 4  # of one optimiser step, over ranks and micro-batches
FEATURE_SIZE = 8

CONFIG: dict[str, Any] = {
    "crepa_enabled": True,
    "crepa_block_index": 1,
    "crepa_lambda": 0.5,
    "crepa_warmup_steps": 1,  # nothing of CREPA runs in step 0
    "crepa_similarity_threshold": 0.6,
    "crepa_similarity_ema_decay": 0.5,
}
DDP_SETTINGS: dict[str, dict[str, bool]] = {
    **{
        f"unused-{unused}-static-{static}": {"find_unused_parameters": unused, "static_graph": static}
        for unused in (False, True)
        for static in (False, True)
    },
    "checkpointing": {"reentrant": False},
    "reentrant-checkpointing": {"reentrant": True, "static_graph": True},
}


def features(slot: int) -> torch.Tensor:
    """(1, 3, 6, 8): one direction for every sample, which the projector learns, and noise."""
    direction = torch.linspace(-1, 1, FEATURE_SIZE)
    return direction + 0.3 * torch.randn(1, 3, 6, FEATURE_SIZE, generator=torch.Generator().manual_seed(slot))


def frame_mask(slot: int) -> torch.Tensor:
    """(1, 3): samples have other numbers of frames in the loss, and every fourth one has none."""
    return torch.arange(3)[None] < slot % 4


def frame_mask_of_even_samples(slot: int) -> torch.Tensor:
    """(1, 3): odd samples, which are all of rank 1, have no frame in the loss."""
    return torch.full((1, 3), slot % 2 == 0)


def build(**settings: Any) -> tuple[Any, CrepaRegularizer]:
    transformer = tiny_wan()
    transformer.requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    crepa = CrepaRegularizer({**CONFIG, **settings}, transformer, feature_size=FEATURE_SIZE)
    return transformer, crepa


def optimizer_of(transformer: nn.Module) -> torch.optim.AdamW:
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    projector = [p for name, p in named if "crepa_projector" in name]
    rest = [p for name, p in named if "crepa_projector" not in name]
    return torch.optim.AdamW([{"params": rest, "lr": 1e-4}, {"params": projector, "lr": 1e-2}])


@dataclass
class Run:
    """What is trained. ``crepa`` takes part in the samples of ``masks``; ``model`` may be a wrapper of it all."""

    model: nn.Module
    crepa: CrepaRegularizer
    optimizer: torch.optim.Optimizer
    masks: Callable[[int], torch.Tensor] = frame_mask
    rank: int = 0
    ranks: int = 1

    def _accumulating(self, step: int, last: bool) -> AbstractContextManager[None]:
        # A static graph has to be seen with its reduction once before a step may go without.
        if last or not isinstance(self.model, DistributedDataParallel) or (self.model.static_graph and step == 0):
            return nullcontext()
        return self.model.no_sync()

    def train(self, steps: range) -> list[dict[str, Any]]:
        """Each step's losses and logs. The rank's own samples, which are all of them for a single process."""
        history = []
        for step in steps:
            losses = []
            for sample in range(self.rank, SAMPLES, self.ranks):
                slot = step * SAMPLES + sample
                with self._accumulating(step, last=sample + self.ranks >= SAMPLES):
                    inputs = wan_inputs(seed=slot)
                    # A reentrant checkpoint passes gradients only to inputs that ask for them.
                    inputs["hidden_states"].requires_grad_(True)
                    prediction = self.model(**inputs)[0]
                    aux, logs = self.crepa.loss(step=step, features=features(slot), frame_mask=self.masks(slot))
                    loss = prediction.square().mean() + aux
                    (loss * self.ranks / SAMPLES).backward()
                losses.append(float(loss.detach()))
            self.optimizer.step()
            self.optimizer.zero_grad()
            ema = float(logs["crepa_similarity_ema"])
            seen = {"weight": logs["crepa_weight"], "cutoff": logs["crepa_cutoff"], "ema": ema}
            history.append({"losses": losses, **seen})
        return history

    def result(self, steps: int = STEPS) -> dict[str, Any]:
        return {"history": self.train(range(steps)), "weights": trained_weights(self.model)}


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [(name.removeprefix("module."), p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in named}


def one_process(masks: Callable[[int], torch.Tensor] = frame_mask, steps: int = STEPS, **settings: Any) -> Any:
    transformer, crepa = build(**settings)
    return Run(transformer, crepa, optimizer_of(transformer), masks).result(steps)


def ddp(rank: int, masks: Callable[[int], torch.Tensor] = frame_mask, **options: Any) -> dict[str, Any]:
    """``options`` of DistributedDataParallel, ``crepa_*`` settings, and ``reentrant`` for checkpointing."""
    settings = {key: options.pop(key) for key in list(options) if key.startswith("crepa_")}
    reentrant = options.pop("reentrant", None)
    transformer, crepa = build(**settings)
    if reentrant is not None:
        transformer.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block.__call__, *args, use_reentrant=reentrant)
        )
    optimizer = optimizer_of(transformer)
    return Run(DistributedDataParallel(transformer, **options), crepa, optimizer, masks, rank, RANKS).result()


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """A run, and others that stopped after some steps and went on from accelerate's checkpoint."""
    accelerator = Accelerator(cpu=True)

    def prepared() -> Run:
        accelerator.free_memory()
        accelerator._custom_objects.clear()
        transformer, crepa = build()
        model, optimizer = accelerator.prepare(transformer, optimizer_of(transformer))
        accelerator.register_for_checkpointing(crepa)
        return Run(model, crepa, optimizer, frame_mask, rank, RANKS)

    results = {"whole": prepared().result()}
    for stop in STOPS:
        checkpoint = str(folder / f"after {stop} steps")
        first = prepared()
        first.train(range(stop))
        accelerator.save_state(checkpoint)
        second = prepared()
        second.train(range(2))  # Whatever it was doing before.
        accelerator.load_state(checkpoint)
        history = second.train(range(stop, STEPS))
        results[f"after {stop} steps"] = {"history": history, "weights": trained_weights(second.model)}
    return results


def measured(rank: int, step: int, micro: int) -> tuple[float, int] | None:
    """Metric and frames of a micro-batch; rank 1 has nothing in every third step."""
    if rank == 1 and step % 3 == 2:
        return None
    return 0.1 * ((7 * step + 3 * micro + 5 * rank) % 11) / 1.1, 1 + (step + micro + rank) % 4


def schedule(rank: int, ranks: int = RANKS) -> dict[str, Any]:
    """A schedule whose ranks measure other things, its states, and others that go on from each of them."""

    def go_on(
        crepa: CrepaSchedule, start: int, micro: int = 0, states: list[Any] | None = None
    ) -> list[tuple[Any, float | None]]:
        trace = []
        for slot in range(2 * start + micro, 2 * 30):
            step, micro = divmod(slot, 2)
            decision = crepa.decide(step)
            own = [measured(r, step, micro) for r in ([rank] if ranks > 1 else range(RANKS))]
            for value in own if decision.run else []:
                if value is not None:
                    crepa.observe(step, torch.tensor(value[0] * value[1]), torch.tensor(value[1]))
            if states is not None:
                states.append(crepa.state_dict())
            if micro == 1:
                trace.append(((decision.weight, decision.run, decision.cutoff, decision.probe), crepa.ema))
        return trace

    def new() -> CrepaSchedule:
        return CrepaSchedule(CrepaConfig(**{**CONFIG, **RECOVERABLE, "crepa_similarity_threshold": 0.45}), 1000)

    states: list[Any] = []
    trace = go_on(new(), 0, states=states)
    between, within = {}, {}
    for slot, state in enumerate(states):
        crepa = new()
        crepa.load_state_dict(state)
        step, micro = divmod(slot, 2)
        if micro == 1:
            between[step + 1] = go_on(crepa, step + 1)
        else:
            within[step] = go_on(crepa, step, 1)
    return {"trace": trace, "states": states, "from between steps": between, "from within steps": within}


def shard(transformer: nn.Module, *, projector: bool = True) -> None:
    for block in transformer.blocks:
        fully_shard(block)
    if projector:
        fully_shard(transformer.crepa_projector)
    fully_shard(transformer, reshard_after_forward=True)


def fsdp(rank: int) -> dict[str, Any]:
    transformer, crepa = build()
    shard(transformer)
    assert all(isinstance(p, DTensor) for p in transformer.parameters())
    run = Run(transformer, crepa, optimizer_of(transformer), frame_mask, rank, RANKS)
    found = run.result()
    return {**found, "read elsewhere": _read_elsewhere(crepa), **_saved(crepa)}


def _read_elsewhere(crepa: CrepaRegularizer) -> dict[str, str]:
    messages = {}
    options: dict[str, Any] = {"student_grid": (2, 3), "teacher_grid": (2, 3)}
    try:
        crepa_loss(torch.randn(1, 3, 6, 32), features(0), nn.Sequential(*crepa.projector), **options)
    except ValueError as error:
        messages["another module"] = str(error)
    transformer, crepa = build(crepa_warmup_steps=0)
    shard(transformer, projector=False)
    transformer(**wan_inputs())
    try:
        crepa.loss(step=0, features=features(0))
    except ValueError as error:
        messages["no unit of its own"] = str(error)
    return messages


def _saved(crepa: CrepaRegularizer) -> dict[str, Any]:
    """The sharded projector's state, written and read back, into a plain one and into a sharded one."""
    state = crepa.state_dict()
    transformer, other = build()
    shard(transformer)
    other.load_state_dict(state)
    restored = {name: p.full_tensor() for name, p in other.projector.state_dict().items()}
    with TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        crepa.save_pretrained(shared[0])
        dist.barrier()
        loaded = CrepaRegularizer.from_pretrained(shared[0], tiny_wan()).projector.state_dict()
        dist.barrier()
    return {"state": state, "restored": restored, "loaded": loaded}


# A block of each kind that families of images have: one that returns text and image, both in one tensor, or the image.
IMAGES = {"flux": 1, "flux single": 2, "flux2": 2, "sd3": 1, "qwen_image": 1, "chroma": 2, "sana": 1, "pixart": 1}


def image_gradients(case: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The mean over two samples of a step's gradients, of adapters and projector; with two ranks each has one."""
    tiny = FAMILIES[case.split()[0]]
    transformer = tiny.make().requires_grad_(False)
    torch.manual_seed(0)
    targets = [tiny.query_of(path) for path in tiny.blocks]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), transformer)
    settings = {"crepa_enabled": True, "crepa_block_index": IMAGES[case]}
    crepa = CrepaRegularizer(settings, transformer, feature_size=FEATURE_SIZE)
    transformer.enable_gradient_checkpointing()
    model = DistributedDataParallel(transformer) if ranks > 1 else transformer
    for sample in range(rank, RANKS, ranks):
        prediction = model(**tiny.inputs(seed=sample, model=transformer))[0]
        aux, _ = crepa.loss(step=0, features=features(sample)[:, 0])
        ((prediction.square().mean() + aux) * ranks / RANKS).backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}


RECOVERABLE = {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 3}

RUNS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    **{name: lambda rank, _, options=options: ddp(rank, **options) for name, options in DDP_SETTINGS.items()},
    "rank-1-has-no-frames": lambda rank, _: ddp(rank, frame_mask_of_even_samples, **RECOVERABLE),
    "resumed": resumed,
    "schedule": lambda rank, _: schedule(rank),
    "fsdp": lambda rank, _: fsdp(rank),
    "images": lambda rank, _: {case: image_gradients(case, rank, RANKS) for case in IMAGES},
}


def main(folder: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == RANKS
    for name, run in RUNS.items():
        started = time.monotonic()
        torch.save(run(rank, folder), folder / f"{name}-{rank}.pt")
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

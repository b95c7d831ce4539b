"""The plan of a run as a table for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..data.dataset import NAMED, FoundClips, cropped_share, enlargement, listed
from ..data.listing import counted
from ..data.names import teacher_is_encoder
from ..data.sampler import MADE_AHEAD
from ..data.video import VideoInfo
from ..terminal import plain, several
from .memory import Phase, RunMemory
from .plan import BucketPlan, Plan

if TYPE_CHECKING:
    from ..settings import RunSettings

Rows = list[tuple[str, str]]

# What the plan says of a video's picture: the share that cropping takes, and the times that it is blown up.
MUCH_CROPPED, MUCH_ENLARGED = 0.3, 1.5


def print_plan(console: Console, plan: Plan, *, memory: bool = False) -> None:
    """The plan as a table of names and values. memory: what it needs too, which takes some seconds."""
    print_rows(console, plan_rows(plan, memory=memory))


def print_rows(console: Console, rows: Rows) -> None:
    """Names and values as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows:
        table.add_row(name, plain(text))
    console.print(table, highlight=False, markup=False)


def plan_rows(plan: Plan, named: int = NAMED, *, memory: bool = False) -> Rows:
    """The plan's names and values. named: how many files one value lists. memory: as `print_plan`."""
    rows = [*_model_rows(plan), *data_rows(plan, named), *_crepa_rows(plan), *_layersync_rows(plan)]
    return [*rows, *_step_rows(plan), *(memory_rows(RunMemory(plan), plan.available) if memory else [])]


def _model_rows(plan: Plan) -> Rows:
    settings, family = plan.settings, plan.family
    how = "all weights"
    if settings.training == "lora":
        how = f"{_adapter(settings)} on {', '.join(settings.lora_targets or family.lora_targets)}"
    precision = "fp32" if settings.mixed_precision == "no" else settings.mixed_precision
    base = "" if settings.base_precision == "bf16" else f", frozen weights in {settings.base_precision}"
    base += "" if settings.offload == "none" else f", offloaded by {settings.offload}"
    checkpointing = ", gradient checkpointing" if settings.gradient_checkpointing else ""
    expert = f" ({family.transformer_part}, the {family.expert} noise levels)" if family.expert else ""
    size = f"{several(family.blocks, 'block')} of width {family.hidden_size}, {_number(plan.parameters)} parameters"
    return [
        ("model", f"{settings.model}{expert}: {family.name}, {settings.task}, {size}"),
        ("trained", f"{how}: {_number(plan.trained)} parameters, {precision}{base}{checkpointing}"),
        ("optimizer", _optimizer(settings)),
    ]


def _optimizer(settings: RunSettings) -> str:
    arguments = "".join(f", {name} {json.dumps(value)}" for name, value in settings.optimizer_args.items())
    warm_up = f" after {several(settings.lr_warmup_steps, 'step')} of warm-up" if settings.lr_warmup_steps else ""
    rate = f"learning rate {settings.learning_rate:g}, {settings.lr_scheduler}{warm_up}"
    return f"{settings.optimizer}{arguments}, {rate}, weight decay {settings.weight_decay:g}"


def _adapter(settings: RunSettings) -> str:
    kinds = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "loha": "LoHa", "lokr": "LoKr"}
    alpha = "" if settings.lora_alpha is None else f", alpha {settings.lora_alpha:g}"
    dropout = f", dropout {settings.lora_dropout:g}" if settings.lora_dropout else ""
    return f"{kinds[settings.lora_type]} of rank {settings.lora_rank}{alpha}{dropout}"


def data_rows(plan: Plan, named: int = NAMED) -> Rows:
    """Those of the plan that say what is encoded."""
    found = plan.found
    skipped = f", {len(found.skipped)} skipped" if found.skipped else ""
    rows = [
        ("data", f"{found.folder}: {several(len(found.keys), 'clip')} of {several(found.videos, 'video')}{skipped}")
    ]
    for each in plan.buckets:
        height, width = each.grid
        tokens = f"{several(each.tokens_per_frame, 'token')} a frame ({height}x{width}), {each.tokens:,} a clip"
        clips = several(each.clips, "clip")
        rows.append(("bucket", f"{each.bucket}: {clips}, {several(each.latent_frames, 'latent frame')}, {tokens}"))
    cache = ("cache", f"{readable_bytes(plan.cached)} in {plan.settings.cache_folder}, and the captions' embeddings")
    return [*rows, cache, *_footage_rows(found, plan.settings.fps, named), *_cut_rows(plan, named)]


def _footage_rows(found: FoundClips, fps: float | None, named: int) -> Rows:
    """What is passed over, and what becomes of the pictures and the times of what is not."""
    buckets = {key.video: key.bucket for key in found.keys}
    videos = [(name, found.infos[name], buckets[name]) for name in buckets if name in found.infos]
    cropped = [(name, share) for name, info, bucket in videos if (share := cropped_share(info, bucket)) > MUCH_CROPPED]
    larger = [(name, times) for name, info, bucket in videos if (times := enlargement(info, bucket)) > MUCH_ENLARGED]
    hdr = [f"{name} ({info.hdr})" for name, info, _ in videos if info.hdr]
    skipped = [f"{Path(path).relative_to(found.folder).as_posix()} ({why})" for path, why in found.skipped.items()]
    rows = {
        "passed over": counted(found.passed_over),
        "skipped": listed(skipped, named),
        "cut off": listed((f"{name} {info.cut}" for name, info, _ in videos if info.cut), named),
        "frame rates": _rates([info for _, info, _ in videos], fps),
        "cropped": listed((f"{name} loses {share:.0%} of its picture" for name, share in cropped), named),
        "enlarged": listed((f"{name} {times:.2g} times" for name, times in larger), named),
        "HDR": f"tone-mapped to SDR: {listed(hdr, named)}" if hdr else "",
    }
    return [(name, text) for name, text in rows.items() if text]


def _cut_rows(plan: Plan, named: int) -> Rows:
    """Captions whose ends train nothing."""
    rows = []
    for part, limit in plan.family.text_limits.items():
        of = f" of {part}" if len(plan.family.text_limits) > 1 else ""
        cut = listed((f"{each.name} ({each.tokens:,})" for each in plan.cut if each.tokenizer == part), named)
        if cut:
            rows.append(("captions cut", f"at {several(limit, 'token')}{of}: {cut}"))
    return rows


def _rates(infos: Sequence[VideoInfo], fps: float | None) -> str:
    kinds = Counter("variable" if not info.constant else f"{info.rate:.5g}" for info in infos)
    found = ", ".join(f"{rate} ({several(number, 'video')})" for rate, number in sorted(kinds.items()))
    if fps is not None:
        return f"taken at {fps:g} a second; found: {found}"
    mixed = "; frame by frame, whatever lies between: fps takes all at one rate" if len(kinds) > 1 else ""
    return f"{found} a second{mixed}" if found else ""


def _crepa_rows(plan: Plan) -> Rows:
    config, memory = plan.config, plan.memory
    if memory is None:
        return [("CREPA", config.idle or "off")]
    weight = f"weight {config.crepa_lambda:g}, {config.crepa_scheduler}"
    if config.crepa_relational_weight > 0:
        weight += f", relations of {config.crepa_relational_pairs} x {config.crepa_relational_weight:g}"
    rows = [("CREPA", f"block {config.crepa_block_index} of 0 to {plan.family.blocks - 1}, {weight}")]
    if config.crepa_feature_source == "backbone":
        rows.append(("teacher", f"block {config.crepa_teacher_block_index} of the model itself"))
    elif not teacher_is_encoder(config):
        rows.append(("teacher", "none: the weight is 0 throughout"))
    else:
        grids = _grids(plan.buckets)
        rows.append(("teacher", config.crepa_encoder + (f", {grids} patches a frame" if grids else "")))
        rows.append(("frames encoded", _encoded(plan)))
    if config.irepa_enabled:
        side, alpha = config.irepa_projector_kernel_size, config.irepa_spatial_norm_alpha
        norm = f"teacher less {alpha:g} of each frame's mean, over its deviation"
        rows.append(("iREPA", f"projector a convolution of {side}x{side} tokens, {norm}"))
    rows += config.idle_parts.items()
    parts = [f"projector with gradients and optimiser {readable_bytes(memory.projector)}"]
    parts.append(f"kept by the loss {readable_bytes(memory.kept)}")
    parts += [f"teacher {readable_bytes(memory.teacher)}"] if memory.teacher else []
    return [*rows, ("extra memory", f"{readable_bytes(memory.total)}: {', '.join(parts)}")]


def _layersync_rows(plan: Plan) -> Rows:
    settings = plan.settings
    if not settings.layersync_enabled:
        idle = settings.layersync.idle
        return [("LayerSync", idle)] if idle else []
    student, teacher = settings.layersync_student_block, settings.layersync_teacher_block
    blocks = f"block {student} learns from block {teacher} of 0 to {plan.family.blocks - 1}"
    kept = f"{readable_bytes(plan.layersync)} kept by the loss"
    return [("LayerSync", f"{blocks}, weight {settings.layersync_lambda:g}, {kept}")]


def _grids(buckets: Sequence[BucketPlan]) -> str:
    grids = dict.fromkeys(each.teacher_grid for each in buckets if each.teacher_grid)
    return ", ".join(f"{height}x{width}" for height, width in grids)


def _encoded(plan: Plan) -> str:
    each = ", ".join(dict.fromkeys(f"{bucket.encoded} of {bucket.bucket.frames}" for bucket in plan.buckets))
    once = "once, before training" if plan.settings.cache_teacher == "features" else "each time it is seen"
    return f"{each} of a clip, {once}"


def _step_rows(plan: Plan) -> Rows:
    settings = plan.settings
    each = [_clips_a_step(plan)]
    if settings.gradient_accumulation_steps > 1:
        each.append(f"{settings.gradient_accumulation_steps} micro-batches")
    if plan.processes > 1:
        shared = f", {settings.context_parallel} a clip" if settings.context_parallel > 1 else ""
        each.append(f"{plan.processes} processes{shared}")
    if settings.sharding == "fsdp2":
        each.append("which share the model by FSDP2")
    every, kept = settings.checkpoint_every, settings.checkpoints_kept
    rows = [
        ("steps", f"{settings.max_train_steps:,} ({', '.join(each)}), {plan.epochs:,.2f} epochs"),
        ("workers", _workers(plan)),
        ("checkpoints", f"{plan.checkpoints}, every {several(every, 'step')} and at the end, the last {kept} kept"),
    ]
    if plan.validations:
        prompts = several(len(settings.validation_prompts), "prompt")
        rows.append(("validation", f"{several(plan.validations, 'time')}, {prompts}"))
    return rows


def memory_rows(memory: RunMemory, available: int | None) -> Rows:
    """What each phase needs of a device, what the run needs, and what to switch on where that is not available."""
    checkpointing = memory.settings.gradient_checkpointing
    try:
        phases, verdict = memory.phases(), _verdict(memory, available)
        other = memory.activations(checkpointing=not checkpointing)
    except RuntimeError as error:  # an operation of a model that has no answer without values
        return [("memory", f"not counted: {str(error).splitlines()[0]}")]
    way = "without" if checkpointing else "with"
    notes = {"training": f" ({readable_bytes(other)} {way} gradient checkpointing)"}
    return [*((f"memory, {each.name}", _terms(each, notes.get(each.name, ""))) for each in phases), ("memory", verdict)]


def _terms(phase: Phase, note: str) -> str:
    parts = [
        f"{name} {readable_bytes(size)}{note * (name == 'activations')}" for name, size in phase.terms.items() if size
    ]
    return f"{readable_bytes(phase.total)}: {', '.join(parts)}"


def _verdict(memory: RunMemory, available: int | None) -> str:
    need = memory.need()
    if available is None:
        return f"needs {readable_bytes(need)}"
    said = f"needs {readable_bytes(need)}, has {readable_bytes(available)}"
    if need <= available:
        return said
    remedies = memory.remedies(available)
    saved = [f"{each.key}={_value(each.value)} saves {readable_bytes(each.saved)}" for each in remedies]
    least = remedies[-1].need if remedies else need
    if least > available:
        saved.append(
            f"{readable_bytes(least)} is still too much without smaller resolutions, frame_counts or batch_size"
        )
    return f"{said}: {', '.join(saved)}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _clips_a_step(plan: Plan) -> str:
    sizes = set(plan.batch_sizes)
    if len(sizes) == 1:
        return f"{several(round(plan.clips_a_step), 'clip')} a step"
    return f"{plan.clips_a_step:.3g} clips a step on average, in micro-batches of {min(sizes)} to {max(sizes)}"


def _workers(plan: Plan) -> str:
    if not plan.workers:
        return "none: clips are read and noise is drawn in the training process"
    whose = " for each process" if plan.processes > 1 else ""
    ahead = several(plan.workers * MADE_AHEAD, "micro-batch", "es")
    return f"{plan.workers}{whose}, which read clips and draw noise, at most {ahead} ahead"


def _number(value: int) -> str:
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return str(value)


def readable_bytes(value: int) -> str:
    """In the largest binary unit of which it is one or more, to three digits."""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} bytes"

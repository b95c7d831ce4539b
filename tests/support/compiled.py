"""Compiles what a call launches for a device that is not there, and reads back what the compiler made of it.

    python tests/support/compiled.py '{"target": "sm_90", "kernel": "dx", "hidden_size": 5120}'

prints one JSON object for every kernel of that name. Each runs in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import processes
import torch

# Bytes of shared memory that one block may take.
SHARED_MEMORY = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
_INSTRUCTION = r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+\S"
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One shape, one target, one kernel or "all", and tile fields that differ from the target's choice.

    ``masked`` gives both masks and a frame index. ``change`` is "keep", or "resample" or "pool" for a student of
    ``students`` tokens a frame, by default twice as many. ``given``: without a projector. ``compute`` is autocast's
    type for fp32 tokens. ``tiles``: for instance {"dx": {"warps": 4}}, or a whole tile where the choice is the vendor's
    product. ``margin`` asks for the relational loss's kernels instead, with pairs of frames up to ``distance`` apart.
    """

    target: str
    kernel: str
    hidden_size: int = 5120
    feature_size: int = 1536
    frames: int = 21
    tokens: int = 1560
    dtype: str = "bfloat16"
    compute: str | None = None
    distance: int = 1
    cumulative: bool = False
    recompute: bool = False
    masked: bool = False
    change: str = "keep"
    students: int | None = None
    given: bool = False
    margin: float | None = None
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> list[dict[str, Any]]:
        """Compiles in a process of its own; RuntimeError with the compiler's words if it cannot."""
        done = processes.run(compile_and_print, self, without=("TRITON_INTERPRET",))
        if done.returncode != 0:
            raise RuntimeError(f"{self} failed to compile:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout)


def choice_for(request: Request) -> Any:
    """The tiles that the target's devices take, with the request's own in their place."""
    from crepa_kernels.backends.triton.tiles import Choice, heuristic

    # fp16 that needs a gradient is multiplied in fp32.
    size = 2 if (request.compute or request.dtype) == "bfloat16" else 4
    hip = request.target.startswith("gfx")
    capability = (0, 0) if hip else divmod(int(request.target.removeprefix("sm_")), 10)
    choice = heuristic(request.hidden_size, request.feature_size, size, SHARED_MEMORY[request.target], hip, capability)
    data = choice.to_dict()
    for name, fields in request.tiles.items():
        if isinstance(fields, dict) and isinstance(data[name], dict):
            fields = data[name] | fields
        data[name] = fields
    return Choice.from_dict(data)


def relation_launches_of(request: Request) -> list[Any]:
    """Every launch that compares a clip's tokens with each other and makes the rows' gradient."""
    from crepa_kernels.backends.triton.launch import recorded
    from crepa_kernels.backends.triton.pair_tiles import relate
    from crepa_kernels.backends.triton.tiles import PairTiles, pair_tiles

    dtype = getattr(torch, request.dtype)
    memory, hip = SHARED_MEMORY[request.target], request.target.startswith("gfx")
    choice = pair_tiles(dtype.itemsize, memory, hip)
    parts = {name: replace(tile, **request.tiles.get(name, {})) for name, tile in vars(choice).items()}
    choice = PairTiles(*(parts[name] for name in ("differences", "gradient")))
    rows = torch.empty((request.frames, request.tokens, request.feature_size), dtype=dtype, device="meta")
    gradient = torch.empty_like(rows, dtype=torch.float32)
    weights = dict.fromkeys(range(request.distance + 1), 1.0)
    with recorded() as launches:
        relate(rows, rows, gradient, weights, request.margin or 0.0, 1.0, choice)
    return launches


def launches_of(request: Request) -> list[Any]:
    """Every launch and vendor product of forward and backward, from tensors without memory."""
    if request.margin is not None:
        return relation_launches_of(request)
    from crepa_kernels.backends.triton.call import CHANGES, TYPES, Call
    from crepa_kernels.backends.triton.launch import recorded
    from crepa_kernels.backends.triton.pipeline import Needs, backward, forward
    from crepa_kernels.backends.triton.tiles import forced

    dtype = getattr(torch, request.dtype)
    frames, tokens, width, features = request.frames, request.tokens, request.hidden_size, request.feature_size

    def new(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    students = tokens if request.change == "keep" else request.students or 2 * tokens
    mask = new(1, frames, kind=torch.bool) if request.masked else None
    call = Call(
        tokens=new(1, frames * students, width, kind=dtype),
        teacher=new(1, frames, tokens, features, kind=dtype),
        gamma=None if request.given else new(width),
        beta=None if request.given else new(width),
        weight=None if request.given else new(features, width),
        bias=None if request.given else new(features),
        frame_index=new(1, frames, kind=torch.int64) if request.masked else None,
        frame_mask=mask,
        teacher_mask=mask,
        keep=True,
        keep_aligned=True,
        recompute=request.recompute,
        antialias=True,
        cumulative=request.cumulative,
        normalize_sum=False,
        by_frames=True,
        change=CHANGES.index(request.change),
        compute=TYPES.index(getattr(torch, request.compute or request.dtype)),
        frames=frames,
        start=0,
        distance=request.distance,
        student_height=1,
        student_width=students,
        height=1,
        width=tokens,
        eps=1e-5,
        tau=1.0,
    )
    with forced(choice_for(request)), recorded() as launches:
        kept = forward(call)[3]
        backward(call, kept, new(), Needs(True, True, True, True, True))
    return launches


def compile_launch(launch: Any, target: str) -> dict[str, Any]:
    """Registers, stack, shared memory and the instructions that matter of one launch's kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        # What the launcher specialises: 1, and what 16 divides.
        if kernel.params[index].is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    if hip and "PRECISION" in constants:
        constants["PRECISION"] = "ieee"
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=gpu, options=options)
    found = {
        "name": launch.name, "target": target, "warps": launch.warps, "stages": launch.stages,
        "shared": built.metadata.shared, "grid": launch.grid, "triton": triton.__version__,
    }  # fmt: skip
    return found | (_amd_facts(built) if hip else _nvidia_facts(built))


def _amd_facts(built: Any) -> dict[str, Any]:
    text = built.asm["amdgcn"]

    def used(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

    wide = len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text))
    return {
        "registers": used("vgpr_count"), "stack": 4 * used("vgpr_spill_count"), "matrix": text.count("v_mfma"),
        "wide_loads": wide,
    }  # fmt: skip


def _nvidia_facts(built: Any) -> dict[str, Any]:
    from triton import knobs

    def read(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = read(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = read(knobs.nvidia.nvdisasm.path, "-c", file.name)

    def used(name: str) -> int:
        return max(int(value) for value in re.findall(rf"{name}:(\d+)", usage))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return {
        "registers": used("REG"), "stack": used("STACK"), "matrix": count(r"\b(?:HGMMA|HMMA|UTCHMMA)\b"),
        "wgmma": count(r"\bHGMMA\b"), "wide_loads": count(r"\b(?:LDG|LDGSTS)\.[\w.]*128") + count(r"\bUTMALDG\b"),
        "narrow_loads": count(r"\bLDG\.[\w.]*U16"), "barriers": count(r"\bBAR\.SYNC\b"),
        "instructions": count(_INSTRUCTION), "in_loop": _in_loop(sass),
    }  # fmt: skip


def _in_loop(sass: str) -> int:
    """Instructions of the longest loop: from the label that a jump goes back to, to the jump."""
    labels: dict[str, int] = {}
    longest = passed = 0
    for line in sass.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found.group(1)] = passed
        elif re.match(_INSTRUCTION, line):
            passed += 1
            if (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and jump.group(1) in labels:
                longest = max(longest, passed - labels[jump.group(1)])
    return longest


def compile_and_print(request: Request) -> None:
    compiled: list[dict[str, Any]] = []
    seen = set()
    for launch in launches_of(request):
        if launch.kernel is None or request.kernel not in ("all", launch.name):
            continue
        key = (launch.name, *(value for name, value in launch.arguments.items() if name.isupper()))
        if key not in seen:
            seen.add(key)
            compiled.append(compile_launch(launch, request.target))
    print(json.dumps(compiled))


if __name__ == "__main__":
    compile_and_print(Request(**json.loads(sys.argv[1])))

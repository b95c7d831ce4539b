"""Frozen weights in fewer bits: what they train, how near their gradients are, what is exported and what is refused."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.families import TrainingFamily
from crepa_trainer.precision import BasePrecision, check_base_precision, compute_in_bf16, loading, prepare_base
from crepa_trainer.run import make_accelerator
from crepa_trainer.state import TrainState, add_lora, make_state, trained_parameters
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from processes import environment
from safetensors.torch import load_file
from tiny import WAN, tiny_wan, wan_inputs
from tiny_families import FAMILIES
from training_runs import TinyClips, metrics_rows, tiny_config, tiny_settings, train, train_elsewhere

from crepa_kernels import CrepaRegularizer

TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
BACKBONE = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2}
# What a CPU can train with.
ON_A_CPU = ["bf16", "fp8", pytest.param("int8", marks=TORCHAO)]


def prepared(models: Path, base_precision: BasePrecision, **changes: Any) -> TrainState:
    """A LoRA whose second factors are not 0, so that the first have gradients."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(0)
    changes = {"mixed_precision": "bf16", "base_precision": base_precision, **changes}
    settings = tiny_settings(models, models / "unused", **changes)
    state = make_state(make_accelerator(settings), TrainingFamily.of(settings.model), settings, tiny_config(models))
    for name, parameter in trained_parameters(state.transformer).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return state


def gradients(state: TrainState) -> dict[str, torch.Tensor]:
    prediction = state.transformer(**wan_inputs())[0]
    features = torch.randn(1, 3, 6, 32, generator=torch.Generator().manual_seed(6))
    aux = state.crepa.loss(step=0, features=features)[0]
    (prediction.float().square().mean() + aux).backward()
    return {name: p.grad for name, p in state.transformer.named_parameters() if p.requires_grad}


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.float() - true.float()).norm() / true.float().norm())


def frozen_weights(transformer: Any) -> dict[str, torch.Tensor]:
    """Those of the blocks, as they are computed with, in bf16 or what they were not taken from."""
    found = {name: p.detach() for name, p in transformer.blocks.named_parameters() if not p.requires_grad}
    return {
        name: p.dequantize() if hasattr(p, "dequantize") and hasattr(p, "qdata") else p for name, p in found.items()
    }


@pytest.mark.parametrize("base_precision", ON_A_CPU[1:])
def test_gradients_are_those_of_the_weights_as_they_are_stored(models: Path, base_precision: BasePrecision) -> None:
    plain, quantized = prepared(models, "bf16"), prepared(models, base_precision)
    before, stored = (frozen_weights(each.transformer) for each in (plain, quantized))
    changed = max(error(each, before[name]) for name, each in stored.items() if name.endswith("weight"))
    expected = gradients(plain)
    found = gradients(quantized)
    assert {each.dtype for each in found.values()} == {torch.float32}
    for part in ("lora", "crepa_projector"):
        of_part = [name for name in expected if part in name]
        off = error(*(torch.cat([each[name].flatten() for name in of_part]) for each in (found, expected)))
        # Of what is in front of it a layer sees the sum of their errors.
        assert 0 < off < 4 * changed
    with torch.no_grad():
        for name, parameter in plain.transformer.blocks.named_parameters():
            if name in stored:
                parameter.copy_(stored[name])
    plain.transformer.zero_grad()
    exact = gradients(plain)
    if base_precision == "fp8":
        assert all(torch.equal(found[name], gradient) for name, gradient in exact.items())
    else:
        # Its scales are multiplied in after the product, which bf16 rounds otherwise.
        off = error(*(torch.cat([each[name].flatten() for name in exact]) for each in (found, exact)))
        assert off < 2 * torch.finfo(torch.bfloat16).eps


@TORCHAO
@pytest.mark.parametrize("name", TrainingFamily.known)
def test_layers_of_every_family_compute_in_bf16_whatever_comes_in(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    model = tiny.make()
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **loading("int8")).requires_grad_(False)
    prepare_base(model, "int8", torch.bfloat16)
    targets = list(TrainingFamily.known[name].lora_targets)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    computed = set()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
            layer.register_forward_hook(lambda _, inputs, output: computed.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**tiny.inputs(model=model), return_dict=False)[0]
    output.float().square().mean().backward()
    assert computed == {torch.bfloat16}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def trained(models: Path, output: Path, teacher: str, **changes: Any) -> list[dict[str, float]]:
    settings = tiny_settings(models, output, mixed_precision="bf16", max_train_steps=20, **changes)
    config = tiny_config(models, crepa_encoder_image_size=70, **(BACKBONE if teacher == "backbone" else {}))
    return train(settings, config, TinyClips(1, 0, pixels=teacher == "dinov2"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("base_precision", "teacher", "offload"),
    [
        pytest.param("int8", "dinov2", "block", marks=TORCHAO),
        pytest.param("int8", "backbone", "none", marks=[TORCHAO, SLOW]),
        ("fp8", "backbone", "leaf"),
        pytest.param("fp8", "dinov2", "none", marks=SLOW),
        pytest.param("bf16", "dinov2", "leaf", marks=SLOW),
        pytest.param("bf16", "backbone", "block", marks=SLOW),
    ],
)
def test_what_a_cpu_can_keep_it_in_trains_and_the_stock_pipeline_loads_the_lora(
    models: Path, tmp_path: Path, base_precision: str, teacher: str, offload: str
) -> None:
    rows = trained(models, tmp_path / "run", teacher, base_precision=base_precision, offload=offload)
    assert len(rows) == 20
    similarity = [row["crepa_similarity"] for row in rows]
    assert sum(similarity[-5:]) > sum(similarity[:5])
    pipeline = WanPipeline.from_pretrained(models / "wan")
    pipeline.load_lora_weights(tmp_path / "run" / "trained")
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    saved = load_file(tmp_path / "run" / "trained" / "pytorch_lora_weights.safetensors")
    assert {f"transformer.{name}": each.dtype for name, each in loaded.items()} == dict.fromkeys(saved, torch.float32)
    assert all(torch.equal(each, saved[f"transformer.{name}"]) for name, each in loaded.items())
    assert all(each.any() for each in saved.values())


def test_what_this_machine_cannot_train_with_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for base_precision in ("bf16", "fp8"):
        check_base_precision(base_precision, "cpu")
    monkeypatch.setattr("crepa_trainer.precision.find_spec", lambda package: None)
    for base_precision, package in (("int8", "torchao"), ("fp8_dynamic", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(
            ValueError, match=rf"^base_precision = {base_precision} needs {package}: pip install .*\[quant"
        ):
            check_base_precision(base_precision, "cuda")
    monkeypatch.setattr("crepa_trainer.precision.find_spec", lambda package: package)
    with pytest.raises(ValueError, match=r"^base_precision = nf4 needs a GPU: .*use int8 or fp8$"):
        check_base_precision("nf4", "cpu")
    with pytest.raises(
        ValueError, match=r"^base_precision = fp8_dynamic needs a GPU that multiplies fp8 .*use fp8 or int8"
    ):
        check_base_precision("fp8_dynamic", "cpu")


def test_a_machine_that_lacks_something_says_so_before_a_weight_is_loaded(models: Path, tmp_path: Path) -> None:
    from crepa_trainer.run import plan_run

    settings = tiny_settings(models, tmp_path / "run", mixed_precision="bf16", base_precision="fp8_dynamic")
    with pytest.raises(ValueError, match=r"^base_precision = fp8_dynamic needs "):
        plan_run(settings, tiny_config(models))


@TORCHAO
@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 on a CPU has no fp8 product scaled by rows")
def test_a_dynamic_fp8_layer_has_the_gradient_of_its_stored_weight() -> None:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

    layer = torch.nn.Linear(32, 48).bfloat16().requires_grad_(False)
    weight = Float8Tensor.from_hp(
        layer.weight.detach(),
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()),
    )
    inputs = torch.randn(2, 16, 32, requires_grad=True)
    plain = torch.nn.functional.linear(inputs.bfloat16(), weight.dequantize(), layer.bias)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(RuntimeError, match="derivative"):  # or it needs no help any more
        layer(inputs.bfloat16()).sum().backward()
    compute_in_bf16(layer)
    product = layer(inputs)
    assert product.dtype == torch.bfloat16
    assert error(product, plain) < 0.05  # fp8 of the inputs
    direction = torch.randn_like(product)
    product.backward(direction)
    true = direction @ weight.dequantize()
    torch.testing.assert_close(inputs.grad, true.float())


@pytest.mark.slow
@pytest.mark.parametrize("base_precision", ON_A_CPU[1:])
def test_two_processes_train_one_lora_on_bases_of_their_own(
    models: Path, tmp_path: Path, base_precision: BasePrecision
) -> None:
    changes = {"mixed_precision": "bf16", "base_precision": base_precision, "max_train_steps": 2}
    settings = tiny_settings(models, tmp_path / "two", **changes)
    done = train_elsewhere(settings, tiny_config(models), processes=2, wide=2, tall=0)
    assert done.returncode == 0, done.stderr
    together = tiny_settings(models, tmp_path / "one", gradient_accumulation_steps=2, **changes)
    for two, one in zip(
        metrics_rows(settings.output), train(together, tiny_config(models), TinyClips(2, 0)), strict=True
    ):
        # bf16's products round alike, their sums over processes and micro-batches do not.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def peak_of_loading(base_precision: BasePrecision, *folders: str) -> None:
    """Prints by how many bytes the most that this process holds grows with each of these models."""
    for folder in folders:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loaded = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **loading(base_precision))
        prepare_base(loaded, base_precision, torch.bfloat16)
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.slow
@pytest.mark.parametrize("base_precision", ON_A_CPU)
def test_loading_never_holds_the_weights_twice(tmp_path: Path, base_precision: BasePrecision) -> None:
    wide = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 4}
    tiny_wan().bfloat16().save_pretrained(tmp_path / "tiny")  # for which all is imported that quantizes
    transformer = WanTransformer3DModel(**{**WAN, **wide}).bfloat16()
    whole = sum(2 * each.numel() for each in transformer.parameters())
    transformer.save_pretrained(tmp_path / "wide", max_shard_size="50MB")
    del transformer
    code = "import sys; from test_trainer_precision import peak_of_loading; peak_of_loading(*sys.argv[1:])"
    words = [sys.executable, "-c", code, base_precision, str(tmp_path / "tiny"), str(tmp_path / "wide")]
    # What a real layer is quantized through is too large for what malloc keeps of what was freed.
    settings = {**environment(), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(words, env=settings, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    # The file is mapped: its pages count, and are given back where memory is short.
    assert int(done.stdout.split()[-1]) < 2 * whole, int(done.stdout.split()[-1]) / whole


@pytest.mark.slow
def test_bitsandbytes_layers_take_a_lora_and_a_projector(models: Path) -> None:
    # diffusers loads them on a GPU alone: here the layers are put in by hand.
    bnb = pytest.importorskip("bitsandbytes")
    transformer = tiny_wan(num_attention_heads=4).bfloat16().requires_grad_(False)
    for name, module in list(transformer.blocks.named_modules()):
        if isinstance(module, torch.nn.Linear):
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            four.load_state_dict(module.state_dict())
            transformer.blocks.set_submodule(name, four.to("cpu"))
    transformer.requires_grad_(False)
    layer, fp32 = transformer.blocks[0].attn1.to_q, torch.zeros(1, transformer.blocks[0].attn1.to_q.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(fp32).dtype == torch.float32  # or it needs no help any more
        prepare_base(transformer, "nf4", torch.bfloat16)
        assert layer(fp32).dtype == torch.bfloat16
    settings = tiny_settings(models, models / "unused", mixed_precision="bf16")
    add_lora(transformer, TrainingFamily.of(settings.model), settings)
    transformer.enable_gradient_checkpointing()
    crepa = CrepaRegularizer({"crepa_enabled": True, "crepa_block_index": 1}, transformer, feature_size=8)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            prediction = transformer(**wan_inputs())[0]
            features = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))
            aux, _ = crepa.loss(step=step, features=features)
        (prediction.float().square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(aux))
    assert type(transformer.blocks[0].attn1.to_q.base_layer.weight).__name__ == "Params4bit"
    assert losses[-1] < losses[0] - 0.2
    assert all(p.any() for p in trained_parameters(transformer).values())


@pytest.mark.slow
def test_convolutions_keep_their_type_in_fp8() -> None:
    transformer = FAMILIES["sanavideo"].make().bfloat16().requires_grad_(False)
    prepare_base(transformer, "fp8", torch.bfloat16)
    types = {
        kind: {m.weight.dtype for m in transformer.transformer_blocks.modules() if isinstance(m, kind)}
        for kind in (torch.nn.Linear, torch.nn.Conv2d)
    }
    assert torch.float8_e4m3fn in types[torch.nn.Linear]
    assert types[torch.nn.Conv2d] == {torch.bfloat16}

"""Each `lora_type`: what is trained comes out of every file again, by whoever loads that file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from crepa_trainer.adapters import Adapter, adapter_layers, peft_names
from crepa_trainer.checkpoint import Checkpoint, find_checkpoint, run_identity
from crepa_trainer.cli import main
from crepa_trainer.comfyui import comfyui_lora
from crepa_trainer.export import save_lora
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.plan import count_parameters
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import add_lora, trained_parameters
from diffusers import WanPipeline, WanTransformer3DModel
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from said import everything_said
from tiny_hub_folders import save_tiny_cogvideox, save_tiny_kandinsky
from tiny_pipelines import save_tiny_hunyuan_pipeline, save_tiny_ltx_pipeline, save_tiny_sana_pipeline
from torch import Tensor, nn
from training_runs import TinyClips, tiny_config, tiny_settings, train

from crepa_kernels import CrepaConfig

TYPES = ("lora", "dora", "rslora", "loha", "lokr")
# A scale that is not 1, nor a power of 2.
GIVEN = {"lora_rank": 2, "lora_alpha": 3.0}


def given(kind: str, **changes: Any) -> dict[str, Any]:
    form = "peft" if kind in ("loha", "lokr") else "diffusers"
    return {"lora_type": kind, "lora_format": form, **GIVEN, **changes}


def family_of(folder: Path) -> TrainingFamily:
    return TrainingFamily.of(str(folder))


def adapted(family: TrainingFamily, settings: RunSettings) -> Any:
    """A transformer with an adapter of random weights."""
    torch.manual_seed(0)
    transformer: Any = family.load_transformer(torch.float32)
    add_lora(transformer, family, settings)
    with torch.no_grad():
        for name, parameter in trained_parameters(transformer).items():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) / 4)
    return transformer


def merged(transformer: Any) -> dict[str, Tensor]:
    """The weight of each layer with an adapter, what that adds included."""
    layers = {name: each for name, each in transformer.named_modules() if hasattr(each, "get_delta_weight")}
    for each in layers.values():
        each.merge()
    return {name: each.get_base_layer().weight.detach().clone() for name, each in layers.items()}


def outputs(transformer: nn.Module) -> Tensor:
    torch.manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(1, 4, 3, 4, 6),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, transformer.config.text_dim),  # type: ignore[union-attr]
    }
    with torch.no_grad():
        return transformer.eval()(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_gives_the_trained_model_again(models: Path, tmp_path: Path, kind: str) -> None:
    family, settings = family_of(models / "wan"), tiny_settings(models, Path("output"), **given(kind))
    transformer = adapted(family, settings)
    expected = outputs(transformer)
    assert peft_names(trained_parameters(transformer)).keys() == get_peft_model_state_dict(transformer).keys()
    plain = WanTransformer3DModel.from_pretrained(models / "wan", subfolder="transformer")
    assert not torch.allclose(outputs(plain), expected, atol=1e-6)
    identity = run_identity(settings, tiny_config(models), 1)
    with everything_said() as said:
        for form in (settings.lora_format, "peft", None):
            folder = tmp_path / str(form)
            save_lora(family, trained_parameters(transformer), Checkpoint(folder, 1, identity, "wan"), form)
            if form == "peft" or kind in ("loha", "lokr"):
                fresh = WanTransformer3DModel.from_pretrained(models / "wan", subfolder="transformer")
                fresh = PeftModel.from_pretrained(fresh, folder).base_model.model
            else:
                pipeline = WanPipeline.from_pretrained(models / "wan")
                pipeline.load_lora_weights(folder)
                fresh = pipeline.transformer
            torch.testing.assert_close(outputs(fresh), expected)
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize(
    "save",
    [
        save_tiny_ltx_pipeline,
        save_tiny_hunyuan_pipeline,
        save_tiny_kandinsky,
        save_tiny_cogvideox,
        save_tiny_sana_pipeline,
    ],
)
def test_the_stock_pipeline_of_each_family_adds_what_was_trained(tmp_path: Path, save: Any, kind: str) -> None:
    family = family_of(save(tmp_path / "model"))
    settings = tiny_settings(Path("models"), Path("output"), **given(kind), lora_dropout=0.25)
    transformer = adapted(family, settings)
    identity = run_identity(settings, CrepaConfig.from_dict({}), 1)
    save_lora(family, trained_parameters(transformer), Checkpoint(tmp_path, 1, identity, "model"))
    pipeline = getattr(diffusers, family.pipelines[family.task]).from_pretrained(family.model)
    with everything_said() as said:
        pipeline.load_lora_weights(tmp_path)
    assert said == []
    expected, found = merged(transformer), merged(pipeline.transformer)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name)


def _slow(kind: str) -> Any:
    return pytest.param(kind, marks=[] if kind in ("dora", "lokr") else pytest.mark.slow)


@pytest.fixture(scope="module", params=[_slow(kind) for kind in TYPES])
def run(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The kind, and the output of a run of it with dropout where it has one."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    dropout = {} if request.param in ("loha", "lokr") else {"lora_dropout": 0.25}
    settings = tiny_settings(models, output, max_train_steps=2, **given(request.param, **dropout))
    train(settings, tiny_config(models), TinyClips(1, 0))
    return request.param, output


def test_a_run_and_its_checkpoint_write_the_same_file(models: Path, run: tuple[str, Path], tmp_path: Path) -> None:
    kind, output = run
    checkpoint = output / "checkpoints" / "step-00000002"
    file = "adapter_model.safetensors" if kind in ("loha", "lokr") else "pytorch_lora_weights.safetensors"
    trained = load_file(output / "trained" / file)
    # Trained, and not as it began: the second factor of each kind begins at 0.
    assert all(each.any() for each in trained.values())
    assert (checkpoint / file).read_bytes() == (output / "trained" / file).read_bytes()
    form = "peft" if kind in ("loha", "lokr") else "diffusers"
    assert main(["export", str(output), "--format", form, "--output", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / file).read_bytes() == (output / "trained" / file).read_bytes()


def test_what_nobody_loads_is_not_exported(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, output = run
    refused = {"loha": "diffusers", "lokr": "both", "dora": "comfyui"}
    if kind in refused:
        assert main(["export", str(output), "--format", refused[kind], "--output", str(tmp_path / "a")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert ("stock diffusers loads no" in said) or ("ComfyUI divides a DoRA's" in said)
    else:
        assert main(["export", str(output), "--format", "both", "--output", str(tmp_path / "a")]) == 0


def test_dropout_goes_on_from_a_checkpoint_bit_for_bit(models: Path, tmp_path: Path) -> None:
    changes = {"lora_dropout": 0.25, "max_train_steps": 3, "checkpoint_every": 1, "checkpoints_kept": 3}
    config, settings = tiny_config(models), tiny_settings(models, tmp_path / "run", **changes)
    whole = train(settings, config)
    checkpoints = tmp_path / "run" / "checkpoints"
    for later in ("step-00000002", "step-00000003"):
        shutil.rmtree(checkpoints / later)
    assert train(settings.replace(resume="latest"), config) == whole


def test_dropout_is_the_same_with_gradient_checkpointing(models: Path, tmp_path: Path) -> None:
    config = tiny_config(models)
    rows = [
        train(
            tiny_settings(
                models, tmp_path / str(kept), lora_dropout=0.25, max_train_steps=2, gradient_checkpointing=kept
            ),
            config,
        )
        for kept in (True, False)
    ]
    assert rows[0] == rows[1]


def read_by_comfyui(file: Mapping[str, Tensor], layer: str) -> Tensor:
    """What ComfyUI adds to a layer, from its rules: `lora`, `loha` and `lokr` of comfy/weight_adapter."""
    of_layer = {key.removeprefix(f"{layer}."): each for key, each in file.items() if key.startswith(f"{layer}.")}
    alpha = float(of_layer["alpha"])
    if "lora_A.weight" in of_layer:
        down, up = of_layer["lora_A.weight"], of_layer["lora_B.weight"]
        return up @ down * (alpha / len(down))
    if "hada_w1_a" in of_layer:
        first, second = (of_layer[f"hada_w{n}_a"] @ of_layer[f"hada_w{n}_b"] for n in (1, 2))
        return first * second * (alpha / len(of_layer["hada_w1_b"]))
    factors, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in of_layer:
            factors.append(of_layer[name])
        else:
            rank = len(of_layer[f"{name}_b"])
            factors.append(of_layer[f"{name}_a"] @ of_layer[f"{name}_b"])
    return torch.kron(*factors) * (1.0 if rank is None else alpha / rank)


@pytest.mark.parametrize("rank", [1, 2, 16])
@pytest.mark.parametrize("kind", ["lora", "rslora", "loha", "lokr"])
def test_comfyuis_file_adds_what_was_trained(models: Path, kind: str, rank: int) -> None:
    family = family_of(models / "wan")
    settings = tiny_settings(models, Path("output"), **{**given(kind), "lora_format": "comfyui", "lora_rank": rank})
    transformer = adapted(family, settings)
    adapter = Adapter.of(settings.model_dump())
    weights = peft_names(trained_parameters(transformer))
    file = comfyui_lora(family, weights, adapter)
    before = dict(family.load_transformer(torch.float32).named_parameters())
    after = merged(transformer)
    assert sorted(after) == adapter_layers(weights)
    names = {"attn1.to_q": "self_attn.q", "attn2.to_out.0": "cross_attn.o"}
    for ours, theirs in names.items():
        added = after[f"blocks.1.{ours}"] - before[f"blocks.1.{ours}.weight"]
        torch.testing.assert_close(read_by_comfyui(file, f"diffusion_model.blocks.1.{theirs}"), added)


@pytest.mark.parametrize("kind", [pytest.param("rslora", marks=pytest.mark.slow), "loha"])
def test_comfyuis_fused_layers_add_what_their_parts_do(tmp_path: Path, kind: str) -> None:
    family = family_of(save_tiny_hunyuan_pipeline(tmp_path / "hunyuan"))
    targets = ("to_q", "to_v")  # and none of the key
    changes = {**given(kind), "lora_format": "comfyui", "lora_targets": targets}
    transformer = adapted(family, tiny_settings(Path("models"), Path("output"), **changes))
    adapter = Adapter(kind, 2, 3, 0.0)
    file = comfyui_lora(family, peft_names(trained_parameters(transformer)), adapter)
    before = dict(family.load_transformer(torch.float32).named_parameters())
    after = merged(transformer)
    layer = "transformer_blocks.0.attn"
    parts = [after[f"{layer}.to_{n}"] - before[f"{layer}.to_{n}.weight"] for n in "qv"]
    whole = torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
    torch.testing.assert_close(read_by_comfyui(file, "diffusion_model.double_blocks.0.img_attn_qkv"), whole)


def test_a_lokr_of_fused_layers_and_a_layer_that_takes_none_are_refused(models: Path, tmp_path: Path) -> None:
    family = family_of(save_tiny_hunyuan_pipeline(tmp_path / "hunyuan"))
    settings = tiny_settings(models, Path("output"), lora_type="lokr", lora_format="comfyui")
    with pytest.raises(ValueError, match="is one layer in ComfyUI, and the LoKr of its parts are no LoKr of it"):
        count_parameters(settings, family)
    wan = family_of(models / "wan")
    for kind in ("loha", "lokr"):
        settings = tiny_settings(models, Path("output"), **given(kind), lora_targets=("patch_embedding",))
        with pytest.raises(ValueError, match=f"patch_embedding is a Conv3d, and only linear .* lora_type = {kind}"):
            count_parameters(settings, wan)
    settings = tiny_settings(models, Path("output"), **given("dora"), lora_targets=("patch_embedding",))
    assert count_parameters(settings, wan)[1] > 0


def test_the_scale_is_pefts() -> None:
    assert Adapter("lora", 4, 2, 0.0).scale == 0.5
    assert Adapter("rslora", 4, 2, 0.0).scale == 1.0
    assert Adapter("rslora", 3, 2, 0.0).scale == 2 / math.sqrt(3)
    assert Adapter.of({"lora_rank": 4}) == Adapter("lora", 4, 4, 0.0)


def test_another_adapter_is_another_run(models: Path, run: tuple[str, Path]) -> None:
    kind, output = run
    settings = tiny_settings(models, output, max_train_steps=2, resume="latest", **given(kind, lora_alpha=5.0))
    with pytest.raises(ValueError, match=r"lora_alpha = 5.0 \(checkpoint: 3.0\)"):
        find_checkpoint(settings, run_identity(settings, tiny_config(models), 1))


def test_the_header_says_what_diffusers_cannot_see(run: tuple[str, Path]) -> None:
    from safetensors import safe_open

    kind, output = run
    if kind in ("loha", "lokr"):
        config = json.loads((output / "trained" / "adapter_config.json").read_text())
        assert (config["peft_type"].lower(), config["r"], config["alpha"]) == (kind, 2, 3)
        return
    with safe_open(output / "trained" / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    told = json.loads(header["lora_adapter_metadata"])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (2, 3)
    assert (told["transformer.use_dora"], told["transformer.use_rslora"]) == (kind == "dora", kind == "rslora")
    assert (header["rank"], header["alpha"], header.get("type", "lora")) == ("2", "3", kind)
    assert diffusers.__version__ in header["versions"]

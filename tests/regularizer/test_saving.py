"""Files beside the model: the projector, the LoRA, the exported transformer, a run that goes on."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from said import everything_said
from tiny import tiny_pipeline, tiny_vae, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer
from crepa_kernels.regularizer.saving import replacing

CONFIG: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}
# Weights read from a file lie at other addresses, and products over them round differently.
ALIGNMENT = {"rtol": 1e-4, "atol": 1e-5}


def regularizer(transformer: Any, **settings: Any) -> CrepaRegularizer:
    torch.manual_seed(0)  # the projector's weights
    return CrepaRegularizer({**CONFIG, **settings}, transformer, feature_size=8)


def features() -> torch.Tensor:
    return torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))


def trained(steps: int = 2, *, lora: bool = True) -> tuple[WanTransformer3DModel, CrepaRegularizer]:
    transformer = tiny_wan()
    if lora:
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    crepa = regularizer(transformer)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-2)
    train(transformer, crepa, optimizer, range(steps))
    return transformer, crepa


def train(transformer: Any, crepa: CrepaRegularizer, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        prediction = transformer(**wan_inputs(seed=step))[0]
        loss = prediction.square().mean() + crepa.loss(step=step, features=features())[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def save_lora(transformer: WanTransformer3DModel, folder: Path, how: str) -> None:
    if how == "pipeline":
        WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    else:
        transformer.save_lora_adapter(folder)


@pytest.mark.parametrize("how", ["pipeline", "transformer"])
def test_the_saved_lora_loads_in_a_stock_pipeline_without_a_word(tmp_path: Path, how: str) -> None:
    transformer, _ = trained()
    save_lora(transformer, tmp_path / "lora", how)
    tiny_pipeline(tmp_path / "model")
    pipeline = WanPipeline.from_pretrained(tmp_path / "model", tokenizer=None, text_encoder=None)
    before = pipeline.transformer(**wan_inputs())[0].detach()
    with everything_said() as said:
        if how == "pipeline":
            pipeline.load_lora_weights(tmp_path / "lora")
        else:
            file = "pytorch_lora_weights.safetensors"
            pipeline.transformer.load_lora_adapter(tmp_path / "lora", prefix=None, weight_name=file)
    assert not said
    with torch.no_grad():
        expected = transformer(**wan_inputs())[0]
        found = pipeline.transformer(**wan_inputs())[0]
    torch.testing.assert_close(found, expected, **ALIGNMENT)
    assert (found - before).abs().max() > 0.01


def test_a_projector_inside_the_lora_file_would_be_noticed(tmp_path: Path) -> None:
    # So the test above can fail.
    transformer, crepa = trained()
    layers = get_peft_model_state_dict(transformer)
    stray = {f"crepa_projector.{name}": tensor for name, tensor in crepa.projector.state_dict().items()}
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers={**layers, **stray})
    pipeline = tiny_pipeline(tmp_path / "model")
    with everything_said() as said:
        try:
            pipeline.load_lora_weights(tmp_path / "lora")
        except (ValueError, KeyError) as error:
            said.append(str(error))
    assert said


@pytest.mark.parametrize("how", ["transformer", "pipeline"])
def test_the_exported_transformer_is_a_stock_one(tmp_path: Path, how: str) -> None:
    transformer, crepa = trained(lora=False)
    if how == "transformer":
        transformer.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    else:
        tiny_pipeline(tmp_path, transformer, tiny_vae())
    assert transformer.crepa_projector is crepa.projector
    with everything_said() as said:
        loaded, info = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not said
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**wan_inputs())[0], transformer(**wan_inputs())[0], **ALIGNMENT)


def test_a_copy_of_the_model_exports_its_own_weights(tmp_path: Path) -> None:
    transformer, _ = trained(lora=False)
    average = copy.deepcopy(transformer)
    with torch.no_grad():
        average.proj_out.bias.fill_(3.0)
    average.save_pretrained(tmp_path)
    assert (WanTransformer3DModel.from_pretrained(tmp_path).proj_out.bias == 3.0).all()


def test_the_projector_and_its_settings_lie_beside_the_model(tmp_path: Path) -> None:
    transformer, crepa = trained(lora=False)
    transformer.save_pretrained(tmp_path)
    crepa.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "crepa_projector.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "0.weight": (32,),
        "0.bias": (32,),
        "1.weight": (8, 32),
        "1.bias": (8,),
    }
    assert json.loads((tmp_path / "crepa_config.json").read_text())["crepa_block_index"] == 1
    with everything_said() as said:
        loaded = WanTransformer3DModel.from_pretrained(tmp_path).train()
        again = CrepaRegularizer.from_pretrained(tmp_path, loaded)
    assert not said
    assert again.config == crepa.config
    for model in (transformer, loaded):
        model(**wan_inputs())
    found, expected = (one.loss(step=2, features=features())[0] for one in (again, crepa))
    torch.testing.assert_close(found, expected, **ALIGNMENT)


def test_switched_off_crepa_is_saved_as_such(tmp_path: Path) -> None:
    CrepaRegularizer({"crepa_enabled": False}, tiny_wan()).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["crepa_config.json"]
    assert CrepaRegularizer.from_pretrained(tmp_path, tiny_wan()).projector is None


def damage(folder: Path, what: str) -> None:
    weights, config = folder / "crepa_projector.safetensors", folder / "crepa_config.json"
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "other weights":
        from safetensors.torch import save_file

        save_file({"1.weight": torch.zeros(8, 31)}, weights)
    elif what == "bad config":
        config.write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "has no crepa_config.json"),
        ("no weights", "no crepa_projector.safetensors"),
        ("truncated weights", "crepa_projector.safetensors cannot be read"),
        ("other weights", "does not hold a projector's weights"),
        ("bad config", "crepa_config.json: not JSON"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, what: str, message: str) -> None:
    trained()[1].save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        CrepaRegularizer.from_pretrained(tmp_path, tiny_wan())


def test_a_projector_of_another_width_is_refused_and_nothing_stays_attached(tmp_path: Path) -> None:
    trained()[1].save_pretrained(tmp_path)
    wider = tiny_wan(num_attention_heads=3)
    with pytest.raises(ValueError, match="from 32 to 8, this one goes from 48 to 8"):
        CrepaRegularizer.from_pretrained(tmp_path, wider)
    assert "crepa_projector" not in dict(wider.named_children())


THRESHOLD = {"crepa_similarity_threshold": 0.9, "crepa_similarity_ema_decay": 0.5}


def resumable() -> tuple[Any, CrepaRegularizer, Any]:
    transformer = tiny_wan()
    crepa = regularizer(transformer, **THRESHOLD)
    return transformer, crepa, torch.optim.AdamW(transformer.parameters(), lr=1e-2)


def test_a_run_goes_on_from_state_dict_with_the_same_losses(tmp_path: Path) -> None:
    whole = resumable()
    expected = train(*whole, range(6))
    transformer, crepa, optimizer = resumable()
    train(transformer, crepa, optimizer, range(3))
    model = {name: t for name, t in transformer.state_dict().items() if "crepa_projector" not in name}
    torch.save({"model": model, "optimizer": optimizer.state_dict(), "crepa": crepa.state_dict()}, tmp_path / "state")

    saved = torch.load(tmp_path / "state", weights_only=True)
    transformer, crepa, optimizer = resumable()
    transformer.load_state_dict(saved["model"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    crepa.load_state_dict(saved["crepa"])
    assert train(transformer, crepa, optimizer, range(3, 6)) == pytest.approx(expected[3:], rel=1e-5)
    schedules = [one.state_dict()["schedule"] for one in (crepa, whole[1])]
    assert schedules[0]["ema"] == pytest.approx(schedules[1]["ema"], rel=1e-4)
    assert schedules[0]["step"] == schedules[1]["step"] == 5


def test_a_run_under_accelerate_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)

    def prepared() -> tuple[Any, CrepaRegularizer, Any]:
        accelerator.free_memory()
        accelerator._custom_objects.clear()
        transformer, crepa, optimizer = resumable()
        transformer, optimizer = accelerator.prepare(transformer, optimizer)
        accelerator.register_for_checkpointing(crepa)
        return transformer, crepa, optimizer

    expected = train(*prepared(), range(6))
    run = prepared()
    train(*run, range(3))
    accelerator.save_state(str(tmp_path))
    resumed = prepared()
    accelerator.load_state(str(tmp_path))
    assert train(*resumed, range(3, 6)) == pytest.approx(expected[3:], rel=1e-5)


def test_a_state_that_does_not_fit_is_refused() -> None:
    _, crepa = trained()
    with pytest.raises(ValueError, match="was CREPA off in that run"):
        crepa.load_state_dict({})
    state = crepa.state_dict()
    state["projector"] = {name: tensor[:4] for name, tensor in state["projector"].items()}
    with pytest.raises(ValueError, match="does not hold a projector's weights"):
        crepa.load_state_dict(state)


def test_a_state_is_not_used_where_crepa_is_off(caplog: pytest.LogCaptureFixture) -> None:
    _, crepa = trained()
    CrepaRegularizer({"crepa_enabled": False}, tiny_wan()).load_state_dict(crepa.state_dict())
    assert "crepa_enabled is false" in caplog.text


def test_a_full_disk_leaves_the_files_before_it_whole(tmp_path: Path) -> None:
    _, crepa = trained(1)
    crepa.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit))
    try:
        with pytest.raises((OSError, SafetensorError)):
            trained(2)[1].save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"a file\.json"), replacing(tmp_path / "a file.json") as file:
            file.write_bytes(bytes(101))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

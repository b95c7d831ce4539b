"""The example scripts as a user starts them, on tiny models, and what stock pipelines make of what they write."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from scripts import image_folder, run_script
from tiny import TEXT_DIM, tiny_dinov2
from tiny_families import FAMILIES, tiny_vaes
from tiny_pipelines import UMT5, VOCABULARY, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from crepa_kernels import CrepaRegularizer

EXAMPLES = Path(__file__).parents[2] / "examples"
# What stock diffusers says of every LoRA that is the transformer's alone.
STOCK = "No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'. This is safe to ignore"


def tiny_flux(folder: Path) -> Path:
    """A whole FLUX.1 pipeline."""
    torch.manual_seed(5)
    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    clip = CLIPTextConfig(vocab_size=VOCABULARY, bos_token_id=2, eos_token_id=1, pad_token_id=0, **sizes)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vaes("flux"),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=VOCABULARY, **UMT5)),
        tokenizer_2=tiny_tokenizer(),
        transformer=FAMILIES["flux"].make(guidance_embeds=True, num_single_layers=8),
    ).save_pretrained(folder)
    return folder


train_flux = partial(run_script, EXAMPLES / "train_flux_repa.py")


def test_flux_with_repa(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data, output = tiny_flux(tmp_path / "flux"), image_folder(tmp_path / "images"), tmp_path / "lora"
    tiny_dinov2(tmp_path / "dinov2")
    words = ["--model", model, "--data", data, "--output", output, "--steps", 4, "--accumulate", 2, "--rank", 2]
    words += ["--resolution", 64, "--learning_rate", 0.01, "--crepa_encoder", tmp_path / "dinov2"]
    out = train_flux(*words)
    assert "step 4: loss" in out
    assert "crepa_similarity" in out
    assert {path.name for path in output.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "crepa_projector.safetensors",
        "crepa_config.json",
    }
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert not [key for key in weights if "crepa" in key]
    assert all(value.any() for key, value in weights.items() if "lora_B" in key)

    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "a blue square", "height": 32, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    before = pipeline(**call, max_sequence_length=16, generator=torch.Generator().manual_seed(0)).images
    caplog.clear()
    pipeline.load_lora_weights(output)
    assert [record for record in caplog.records if not record.getMessage().startswith(STOCK)] == []
    after = pipeline(**call, max_sequence_length=16, generator=torch.Generator().manual_seed(0)).images
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    again = CrepaRegularizer.from_pretrained(output, FAMILIES["flux"].make(num_single_layers=8))
    assert again.config.crepa_block_index == 8
    assert again.config.crepa_encoder_resize == "grid"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_short_and_marks_the_lines_of_its_regularizer(script: Path) -> None:
    text = script.read_text()
    lines = text[text.index("from __future__") :].splitlines()
    assert len(text.splitlines()) < 150
    own = [line for line in lines if re.search(r"crepa|urepa|Crepa|Urepa", line)]
    assert len(own) > 5
    assert [line for line in own if not re.search(r"# (C|U-)?REPA", line)] == []


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_wrong_option_or_folder_is_said_before_the_model_is_looked_for(script: Path, tmp_path: Path) -> None:
    prefix = "urepa" if "urepa" in script.stem else "crepa"
    words = ["--model", tmp_path / "nowhere", "--data", tmp_path / "photos", "--output", tmp_path / "lora"]
    with pytest.raises(AssertionError, match=r"photos holds no (images|videos)"):
        run_script(script, *words)
    image_folder(tmp_path / "photos")
    with pytest.raises(AssertionError, match=f"{prefix}_lambda = -1"):
        run_script(script, *words, f"--{prefix}_lambda", -1)


@pytest.mark.slow
def test_flux_without_repa_on_two_ranks_and_with_a_wrong_option(tmp_path: Path) -> None:
    model, data = tiny_flux(tmp_path / "flux"), image_folder(tmp_path / "images")
    tiny_dinov2(tmp_path / "dinov2")
    words = ["--model", model, "--data", data, "--output", tmp_path / "lora", "--steps", 2, "--resolution", 32]
    assert "crepa" not in train_flux(*words, "--crepa_enabled", "false")
    with pytest.raises(AssertionError, match="crepa_lambda = -1"):
        train_flux(*words, "--crepa_lambda", -1)
    assert train_flux(*words, "--crepa_encoder", tmp_path / "dinov2", ranks=2).count("crepa_similarity ") == 1

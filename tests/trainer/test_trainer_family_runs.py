"""`crepa-train run` of every family on real videos: to a LoRA that its stock pipeline loads and samples with."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.families import TrainingFamily
from crepa_trainer.run import run
from crepa_trainer.settings import load_settings
from rich.console import Console
from safetensors.torch import load_file
from said import everything_said
from tiny import tiny_dinov2
from tiny_pipelines import TINY_PIPELINES, save_tiny_hunyuan_pipeline, save_tiny_sana_pipeline
from training_runs import metrics_rows
from videos import captioned_films, captioned_squares

PROMPT = "the square moves"
TEACHERS: dict[str, dict[str, Any]] = {
    "dinov2": {"crepa_encoder_resize": "grid"},
    "backbone": {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2},
}
SHORT = [
    ("ltxvideo", "image2video", "dinov2"),
    ("sanavideo", "image2video", "dinov2"),
    ("hunyuan_video", "text2video", "backbone"),
]
LONG = [(name, task, teacher) for name, tiny in TINY_PIPELINES.items() for task in tiny.tasks for teacher in TEACHERS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos and a teacher; pipelines are added when they are first asked for."""
    root = tmp_path_factory.mktemp("families")
    tiny_dinov2(root / "dinov2")
    captioned_squares(root / "videos", 2)
    return root


def pipeline_folder(models: Path, name: str) -> Path:
    folder = models / name.replace(" ", "-")
    return folder if folder.is_dir() else TINY_PIPELINES[name].save(folder)


def train(models: Path, output: Path, name: str, task: str, teacher: str, **changes: Any) -> list[dict[str, float]]:
    *size, frames = TINY_PIPELINES[name].size
    config = {
        "model": str(pipeline_folder(models, name)),
        "data": str(models / "videos"),
        "output": str(output),
        "task": task,
        "resolutions": [size],
        "frame_counts": [frames],
        "lora_rank": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_encoder": str(models / "dinov2"),
        **TEACHERS[teacher],
        **changes,
    }
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    run(*load_settings(None, config), Console(file=io.StringIO()))
    return metrics_rows(output)


def check_lora(family: TrainingFamily, output: Path, size: tuple[int, int, int]) -> None:
    """The trained weights load in the stock pipeline, in silence, and change what it samples from a prompt's text."""
    weights = load_file(output / "trained" / "pytorch_lora_weights.safetensors")
    assert all(weight.abs().max() > 0 for weight in weights.values())
    pipeline = getattr(diffusers, family.pipelines[family.task]).from_pretrained(family.model)
    pipeline.set_progress_bar_config(disable=True)
    height, width, frames = size
    image = {"image": torch.rand(1, 3, height, width)} if family.task == "image2video" else {}
    length = {"frames" if family.name == "sanavideo" else "num_frames": frames}
    options = {"use_resolution_binning": False} if family.name == "sanavideo" else {}

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        clip: torch.Tensor = pipeline(
            prompt=PROMPT,
            height=height,
            width=width,
            **length,
            **image,
            **options,
            num_inference_steps=2,
            generator=generator,
            output_type="pt",
        ).frames
        return clip

    before = sample()
    with everything_said() as said:
        pipeline.load_lora_weights(output / "trained")
    assert said == []
    after = sample()
    assert after.shape == (1, frames, 3, height, width)
    assert not torch.equal(before, after)


def check_run(models: Path, output: Path, name: str, task: str, teacher: str, steps: int, **changes: Any) -> None:
    size = TINY_PIPELINES[name].size
    given = {"validation_prompts": [PROMPT], "validation_every": steps, "validation_steps": 2}
    rows = train(models, output, name, task, teacher, max_train_steps=steps, **given, **changes)
    assert len(rows) == steps
    assert all(row["crepa_similarity"] and float(row["flow_loss"]) > 0 for row in rows)
    assert (output / "validation" / f"step-{steps:08d}" / "prompt-0.mp4").is_file()
    check_lora(TrainingFamily.of(str(pipeline_folder(models, name)), task), output, size)


@pytest.mark.parametrize(("name", "task", "teacher"), SHORT)
def test_videos_to_a_lora(models: Path, tmp_path: Path, name: str, task: str, teacher: str) -> None:
    check_run(models, tmp_path / "run", name, task, teacher, 2, mixed_precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task", "teacher"), LONG)
def test_twenty_steps_on_films_with_each_task_and_teacher(
    models: Path, tmp_path: Path, name: str, task: str, teacher: str
) -> None:
    check_run(models, tmp_path / "run", name, task, teacher, 20, data=str(captioned_films(tmp_path / "films")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ltxvideo", "sanavideo", "hunyuan_video"])
@pytest.mark.parametrize("mode", [{"mixed_precision": "bf16"}, {"training": "full"}])
def test_other_ways_to_train(models: Path, tmp_path: Path, name: str, mode: dict[str, Any]) -> None:
    sampled = {"validation_prompts": [PROMPT], "validation_every": 3, "validation_steps": 2}
    rows = train(models, tmp_path / "run", name, "text2video", "dinov2", max_train_steps=3, **mode, **sampled)
    assert len(rows) == 3
    assert (tmp_path / "run" / "validation" / "step-00000003" / "prompt-0.mp4").is_file()
    assert all(row["crepa_similarity"] for row in rows)


def test_a_text_encoder_in_bf16_trains_and_samples_a_transformer_in_fp32(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU with mixed_precision = "no".
    monkeypatch.setattr("crepa_trainer.data.cache.encoder_type", lambda device: torch.bfloat16)
    given = {"validation_prompts": [PROMPT], "validation_every": 1, "validation_steps": 2}
    rows = train(models, tmp_path / "run", "ltxvideo", "text2video", "dinov2", max_train_steps=1, **given)
    assert len(rows) == 1


def _with(folder: Path, target: Path, part: str, **changes: Any) -> str:
    shutil.copytree(folder, target)
    file = target / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(target)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ltxvideo", (64, 80, 17), "64x80: height must be a multiple of 32, width of 32"),
        ("ltxvideo", (64, 96, 13), r"frame count 13: the VAE makes 1 \+ 8n frames"),
        ("sanavideo", (48, 64, 9), "48x64: height must be a multiple of 32"),
        ("sanavideo", (32, 64, 8), r"frame count 8: the VAE makes 1 \+ 4n frames"),
        ("sanavideo ltx2", (96, 128, 17), "96x128: height must be a multiple of 64"),
        ("hunyuan_video", (32, 40, 9), "32x40: height must be a multiple of 16"),
        ("hunyuan_video", (32, 48, 10), r"frame count 10: the VAE makes 1 \+ 4n frames"),
    ],
)
def test_a_size_that_the_vae_cannot_make_is_refused_before_a_weight_is_loaded(
    models: Path, tmp_path: Path, name: str, size: tuple[int, int, int], message: str
) -> None:
    changes = {"resolutions": [size[:2]], "frame_counts": [size[2]], "max_train_steps": 1}
    with pytest.raises(ValueError, match=message):
        train(models, tmp_path / "run", name, "text2video", "dinov2", **changes)


def test_models_that_cannot_be_trained_say_why(models: Path, tmp_path: Path) -> None:
    folders = {name: pipeline_folder(models, name) for name in ("ltxvideo", "sanavideo", "hunyuan_video")}
    with pytest.raises(ValueError, match=r"family = sanavideo, but .* has a LTXVideoTransformer3DModel \(ltxvideo\)"):
        TrainingFamily.of(str(folders["ltxvideo"]), family="sanavideo")
    with pytest.raises(
        ValueError, match=r"task = image2video: .* is a text-to-video model \(image_condition_type = None"
    ):
        TrainingFamily.of(str(folders["hunyuan_video"]), "image2video")
    image = save_tiny_hunyuan_pipeline(tmp_path / "token_replace", image_condition_type="token_replace")
    with pytest.raises(ValueError, match="lacks image_processor, which makes the text encoder's image"):
        TrainingFamily.of(str(image), "image2video")
    dc = _with(folders["sanavideo"], tmp_path / "dc", "model_index.json", vae=["diffusers", "AutoencoderDC"])
    with pytest.raises(ValueError, match="AutoencoderDC; sanavideo needs an AutoencoderKLWan or AutoencoderKLLTX2"):
        TrainingFamily.of(dc)
    lacking = Path(_with(folders["hunyuan_video"], tmp_path / "lacking", "model_index.json"))
    shutil.rmtree(lacking / "text_encoder_2")
    shutil.rmtree(lacking / "tokenizer_2")
    with pytest.raises(ValueError, match="lacks tokenizer_2, text_encoder_2: a hunyuan_video pipeline has"):
        TrainingFamily.of(str(lacking))


def test_a_model_without_embedded_guidance_is_sampled_with_the_usual_one(tmp_path: Path) -> None:
    folder = save_tiny_hunyuan_pipeline(tmp_path / "plain", guidance_embeds=False)
    assert TrainingFamily.of(str(folder)).guidance_arguments(3.0) == {"true_cfg_scale": 3.0}


def test_the_empty_prompt_has_no_instruction_before_it(tmp_path: Path) -> None:
    family = TrainingFamily.of(str(save_tiny_sana_pipeline(tmp_path / "sana")))
    parts: Any = family.load_text(torch.float32)
    (empty,) = family.encode_text(parts, [""])
    _, _, negative, mask = parts.encode_prompt("a square", complex_human_instruction=["a video of the square"])
    assert torch.equal(empty["text"], negative[0])
    assert torch.equal(empty["text_mask"], mask[0])

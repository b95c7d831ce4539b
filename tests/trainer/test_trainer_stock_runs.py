"""`crepa-train run` on real videos of every case of a pipeline folder; the LoRA in the stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.cli import main
from crepa_trainer.reporting.trackers import read_metrics
from hub_cases import CASES, HubCase
from PIL import Image
from said import everything_said
from tiny import tiny_dinov2
from videos import captioned_films, moving_square, write_video

TEACHERS: dict[str, dict[str, Any]] = {
    "dinov2": {"crepa_encoder": "dinov2"},
    # Beside it the trainer's default of frozen weights and arithmetic in bf16.
    "backbone": {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2, "mixed_precision": "bf16"},
}
QUICK = (
    "wan low",
    "wan image encoder",
    "kandinsky5",
    "cogvideox 1.5 image",
    "hunyuan token_replace",
    "hunyuan latent_concat",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and three captioned videos."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_dinov2(folder / "dinov2")
    (folder / "videos").mkdir()
    for seed in range(3):
        write_video(folder / "videos" / f"{seed}.mp4", moving_square(18, seed=seed))
        (folder / "videos" / f"{seed}.txt").write_text("a red square moves over the blue pattern"[: 20 + 6 * seed])
    return folder


def crepa_train(case: HubCase, folder: Path, model: Path, output: Path, **changes: Any) -> int:
    config = {
        "model": str(model),
        "data": str(folder / "videos"),
        "output": str(output),
        "task": case.task,
        "resolutions": [[case.size.height, case.size.width]],
        "frame_counts": [case.size.frames],
        "lora_rank": 2,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "crepa_enabled": True,
        "crepa_block_index": 1,
        **case.settings,
        **changes,
    }
    if "crepa_encoder" in config:
        config["crepa_encoder"] = str(folder / config["crepa_encoder"])
    output.mkdir()
    file = output / "config.json"
    file.write_text(json.dumps(config))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return main(["run", "--config", str(file)])


def stock_clip(case: HubCase, model: Path, pipeline: Any) -> np.ndarray:
    """What the stock pipeline shows of a prompt and, for image to video, a grey image."""
    family = case.family(model)
    grey, parts = torch.full((3, case.size.height, case.size.width), 0.5), family.load_text(torch.float32)
    text = family.encode_text_of_clip(parts, "a red square moves", (grey * 255).byte())
    (empty,) = family.encode_text(parts, [""])
    arguments = {**family.text_arguments(text, empty), **family.size_arguments(case.size)}
    if case.task == "image2video":
        arguments["image"] = family.image_argument(grey)
    seeded = torch.Generator().manual_seed(0)
    clip: np.ndarray = pipeline(**arguments, num_inference_steps=3, generator=seeded, output_type="np").frames[0]
    return clip


def check_run(name: str, teacher: str, steps: int, folder: Path, tmp_path: Path, **changes: Any) -> None:
    case, model, output = CASES[name], tmp_path / "model", tmp_path / "run"
    case.save(model)
    sampled = {"validation_prompts": ["a blue square"], "validation_every": steps, "validation_steps": 2}
    given = {"max_train_steps": steps, **sampled, **TEACHERS[teacher], **changes}
    assert crepa_train(case, folder, model, output, **given) == 0
    rows = read_metrics(output / "metrics.jsonl")
    assert len(rows) == steps
    for row in rows:
        # Backbone: features of the model itself, so similar from the start; never exactly 0, which is nothing seen.
        assert 0 < abs(float(row["crepa_similarity"])) <= 1
        assert np.isfinite(float(row["loss"]))
    with Image.open(output / "validation" / f"step-{steps:08d}" / "prompt-0.png") as strip:
        assert strip.size == (case.size.width * 8, case.size.height)
        assert np.asarray(strip).std() > 0

    pipeline = case.stock(model)
    before = stock_clip(case, model, pipeline)
    low = case.settings.get("expert") == "low"
    with everything_said() as said:
        pipeline.load_lora_weights(output / "trained", **({"load_into_transformer_2": True} if low else {}))
    assert said == []
    trained = pipeline.transformer_2 if low else pipeline.transformer
    adapters = {key: each for key, each in trained.named_parameters() if "lora_B" in key}
    blocks = {key.split(".lora_B")[0] for key in adapters}
    assert len(blocks) >= 3 * 4  # each block's projections
    after = stock_clip(case, model, pipeline)
    assert after.shape == case.shown
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-4


@pytest.mark.parametrize("name", QUICK)
def test_a_few_steps_give_a_lora_that_the_stock_pipeline_samples_with(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_run(name, "dinov2", 2, folder, tmp_path)
    assert ("load_into_transformer_2=True" in capsys.readouterr().out) == (name == "wan low")


@pytest.mark.slow
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_on_films_give_a_lora_that_the_stock_pipeline_samples_with(
    name: str, teacher: str, folder: Path, tmp_path: Path
) -> None:
    check_run(name, teacher, 20, folder, tmp_path, data=str(captioned_films(tmp_path / "films")))

"""The Wan script as a user starts it, on a tiny pipeline and real videos, and what stock pipelines make of its LoRA."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from said import everything_said
from scripts import run_script, without_marked
from tiny import tiny_dinov2, tiny_wan
from tiny_pipelines import save_tiny_wan_pipeline
from videos import captioned_films

from crepa_kernels import CrepaRegularizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_wan_lora.py"
LORA = "pytorch_lora_weights.safetensors"
train_wan = partial(run_script, SCRIPT)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Of the command line, all but the output: films of one shape, a tiny pipeline and teacher."""
    folder = tmp_path_factory.mktemp("wan")
    model = save_tiny_wan_pipeline(folder / "model", transformer={"num_layers": 9})
    data = captioned_films(folder / "films")
    tiny_dinov2(folder / "dinov2")
    given = ["--model", model, "--data", data, "--steps", 12, "--accumulate", 2, "--size", 5, 32, 48, "--rank", 2]
    given += ["--learning_rate", 0.01, "--checkpoint_every", 8, "--ema_decay", 0.8, "--crepa_warmup_steps", 2]
    return [*given, "--crepa_encoder", folder / "dinov2", "--crepa_encoder_image_size", 70]


@pytest.fixture(scope="module")
def trained(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of a run that was not stopped, and what it said."""
    output = tmp_path_factory.mktemp("lora")
    return output, train_wan(*words, "--output", output)


def test_it_trains_with_crepa_and_writes_lora_ema_and_projector(trained: tuple[Path, str]) -> None:
    output, said = trained
    assert [line.partition(":")[0] for line in said.splitlines()] == ["step 10", "step 12"]
    for name in ("lora_norm", "projector_norm", "crepa_similarity", "crepa_weight"):
        assert said.count(f" {name} ") == 2
    files = {path.name for path in output.iterdir()}
    written = {LORA, "ema", "crepa_projector.safetensors", "crepa_config.json"}
    assert files == written | {"checkpoint-000008"}
    lora, ema = (load_file(folder / LORA) for folder in (output, output / "ema"))
    assert lora.keys() == ema.keys()
    assert not [key for key in lora if "crepa" in key]
    learned = [key for key in lora if "lora_B" in key]
    # Layers behind the block learn from the main loss; the average is behind the weights.
    assert all(lora[key].any() and ema[key].norm() < 1.5 * lora[key].norm() for key in learned)
    assert not any(torch.equal(lora[key], ema[key]) for key in learned)
    again = CrepaRegularizer.from_pretrained(output, tiny_wan(num_layers=9), max_train_steps=12)
    assert again.config.crepa_block_index == 8
    assert again.config.crepa_scheduler == "cosine"


def test_a_stopped_run_goes_on_to_the_same_losses_and_weights(
    trained: tuple[Path, str], words: list[object], tmp_path: Path
) -> None:
    output, said = trained
    shutil.copytree(output / "checkpoint-000008", tmp_path / "checkpoint-000008")
    written = (tmp_path / "checkpoint-000008" / "model.safetensors").stat().st_mtime_ns
    resumed = train_wan(*words, "--output", tmp_path, "--resume")
    assert resumed == said
    # A run from the beginning says the same, but writes this one again.
    assert (tmp_path / "checkpoint-000008" / "model.safetensors").stat().st_mtime_ns == written
    for name in (LORA, f"ema/{LORA}", "crepa_projector.safetensors"):
        one, other = load_file(output / name), load_file(tmp_path / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_is_without_what_is_frozen(trained: tuple[Path, str]) -> None:
    output, _ = trained
    saved = load_file(output / "checkpoint-000008" / "model.safetensors")
    assert all(re.search("lora_[AB]|crepa_projector", name) for name in saved)


def test_the_stock_pipeline_makes_another_video_with_either_lora(
    trained: tuple[Path, str], words: list[object]
) -> None:
    output, _ = trained
    pipeline = WanPipeline.from_pretrained(words[1])
    pipeline.set_progress_bar_config(disable=True)

    def shown() -> torch.Tensor:
        call = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
        video: torch.Tensor = pipeline("a red square", **call, generator=torch.Generator().manual_seed(0)).frames
        return video

    videos = [shown()]
    for folder in (output, output / "ema"):
        with everything_said() as lines:
            pipeline.load_lora_weights(folder)
        assert lines == []
        videos.append(shown())
        pipeline.unload_lora_weights()
    assert all(video.isfinite().all() for video in videos)
    assert not torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[1], videos[2])


def test_without_the_marked_lines_it_is_the_same_script_without_crepa(words: list[object], tmp_path: Path) -> None:
    short = [*words, "--output", tmp_path, "--steps", 2, "--accumulate", 1]
    said = train_wan(*short, "--crepa_enabled", "false")
    assert said.startswith("step 2: loss ")
    assert "crepa" not in said
    assert "projector" not in said
    plain = tmp_path / "plain.py"
    plain.write_text(without_marked(SCRIPT.read_text(), "CREPA"))
    assert "crepa" not in plain.read_text().partition("from __future__")[2]
    given = "\n".join(map(str, short))
    assert run_script(plain, *re.sub(r"--crepa_\w+\n\S+\n?", "", given).split()) == said


def test_a_video_that_is_too_short_is_named(words: list[object], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"bigbuckbunny\.mp4 has \d+ frames, --size asks for 4001"):
        train_wan(*words, "--output", tmp_path, "--size", 4001, 32, 48)


@pytest.mark.slow
def test_two_ranks_stop_and_go_on(words: list[object], tmp_path: Path) -> None:
    said = train_wan(*words, "--output", tmp_path / "whole", ranks=2)
    assert said.count("step 12:") == 1
    shutil.copytree(tmp_path / "whole" / "checkpoint-000008", tmp_path / "again" / "checkpoint-000008")
    assert train_wan(*words, "--output", tmp_path / "again", "--resume", ranks=2) == said

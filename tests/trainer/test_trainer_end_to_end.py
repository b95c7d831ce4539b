"""`crepa-train run` on real videos: from a folder of videos to a LoRA, through the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.cli import main
from crepa_trainer.reporting.runs import RunFolder
from crepa_trainer.reporting.trackers import read_metrics
from PIL import Image
from tiny import tiny_dinov2
from tiny_pipelines import save_tiny_wan_pipeline
from videos import moving_square, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and five captioned videos in three shapes."""
    folder = tmp_path_factory.mktemp("end-to-end")
    save_tiny_wan_pipeline(folder / "wan")
    tiny_dinov2(folder / "dinov2")
    (folder / "videos").mkdir()
    for seed, (height, width, frames) in enumerate([(48, 80, 14), (48, 80, 9), (80, 48, 9), (80, 48, 12), (64, 64, 6)]):
        write_video(folder / "videos" / f"{seed}.mp4", moving_square(frames, height, width, seed))
        (folder / "videos" / f"{seed}.txt").write_text("a red square moves over a blue pattern")
    return folder


def config_file(folder: Path, output: Path, **changes: Any) -> Path:
    config = {
        "model": str(folder / "wan"),
        "data": str(folder / "videos"),
        "output": str(output),
        "cache": str(folder / "cache"),
        "resolutions": [[32, 48], [48, 32]],
        "frame_counts": [5, 9],
        "max_train_steps": 4,
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
        "lora_rank": 2,
        "mixed_precision": "no",
        "preset": "t2v",
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_encoder": str(folder / "dinov2"),
        "crepa_warmup_steps": 1,
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / "config.json"
    file.write_text(json.dumps({**config, **changes}))
    return file


def crepa_train(file: Path, *options: str) -> int:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return main(["run", "--config", str(file), *options])


def test_too_little_memory_is_one_line_that_says_where_to_look(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crepa_train(config_file(folder, tmp_path / "run"), "--lora_rank", "1000000000000") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crepa-train: error: [enforce fail at ")
    assert "can't allocate memory" in line
    assert line.endswith("; crepa-train run --plan says what each phase needs, and what to switch on")


@pytest.mark.parametrize("teacher", ["frames", "features"])
def test_videos_to_a_lora_with_validation_clips(folder: Path, tmp_path: Path, teacher: str) -> None:
    output = tmp_path / "run"
    given = {"validation_prompts": ["a blue square"], "validation_every": 2, "validation_steps": 2}
    file = config_file(folder, output, **given, cache_teacher=teacher, matrix_every=2)
    relations = ["--crepa_relational_weight", "0.5"] if teacher == "features" else []
    assert crepa_train(file, *relations) == 0
    rows = read_metrics(output / "metrics.jsonl")
    assert len(rows) == 4
    assert all(row["crepa_similarity"] for row in rows[1:])
    for row in rows[1:]:
        assert ("crepa_relational_loss" in row) == bool(relations)
        parts = row["flow_loss"] + row["crepa_loss"] + row.get("crepa_relational_loss", 0.0)
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert (output / "trained" / "pytorch_lora_weights.safetensors").is_file()
    # In the warm-up's first step there is nothing to look at.
    (look,) = RunFolder(output).looks()
    assert look.step == 2
    assert look.patches is not None
    with Image.open(look.patches) as picture:
        # The first row is the video, whose square is white in its colored frame; the page around is white too.
        frame = np.asarray(picture.convert("RGB"))[60:200]
    colored = np.flatnonzero((frame != 255).any((0, 2)))
    inside = frame[:, colored[len(colored) // 4 : -len(colored) // 4]]
    assert len(np.unique(inside.reshape(-1, 3), axis=0)) > 50
    for step in (2, 4):
        clip = output / "validation" / f"step-{step:08d}" / "prompt-0"
        with av.open(str(clip.with_suffix(".mp4"))) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert frames[0].shape in ((32, 48, 3), (48, 32, 3))
        assert len(frames) in (5, 9)
        with Image.open(clip.with_suffix(".png")) as strip:
            assert strip.size == (frames[0].shape[1] * min(8, len(frames)), frames[0].shape[0])


def test_an_option_of_the_command_line_resumes_and_goes_before_the_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(folder, tmp_path / "run", crepa_scheduler="constant")
    assert crepa_train(file, "--max_train_steps", "2") == 0
    assert crepa_train(file, "--max_train_steps", "3") == 2
    assert "go on from them with resume = latest" in capsys.readouterr().err
    assert crepa_train(file, "--resume", "latest", "--learning_rate", "0.5") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("crepa-train: error:")
    assert "learning_rate = 0.5 (checkpoint: 0.0001)" in error
    assert crepa_train(file, "--resume", "latest", "--max_train_steps", "3") == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def replaced(videos: Path) -> None:
    """By another one of its name, length and time."""
    times = (videos / "1.mp4").stat()
    write_video(videos / "1.mp4", moving_square(9, 48, 80, 7))
    os.utime(videos / "1.mp4", ns=(times.st_atime_ns, times.st_mtime_ns))


def added(videos: Path) -> None:
    for suffix in (".mp4", ".txt"):
        shutil.copyfile(videos / f"1{suffix}", videos / f"9{suffix}")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (replaced, "1.mp4 is another file"),
    "caption": (lambda videos: (videos / "2.txt").write_text("a blue square"), "2.mp4 has another caption"),
    "removed": (lambda videos: (videos / "0.mp4").unlink(), "0.mp4 is not there"),
    "added": (added, "9.mp4 is new"),
}


def test_a_run_does_not_go_on_with_other_videos_or_captions_and_says_so_before_it_encodes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "videos", tmp_path / "as it was")
    videos = shutil.copytree(folder / "videos", tmp_path / "videos")
    file = config_file(folder, tmp_path / "run", data=str(videos), crepa_scheduler="constant")
    assert crepa_train(file, "--max_train_steps", "1") == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("crepa_trainer.run.make_accelerator", lambda *_: pytest.fail("too late"))
        for change, message in CHANGES.values():
            change(videos)
            assert crepa_train(file, "--resume", "latest", "--max_train_steps", "2") == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.endswith(
                f"is of a run on other clips than {videos} gives: {message}; go on with what it had, or start anew in "
                "another output"
            )
            shutil.rmtree(videos)
            shutil.copytree(tmp_path / "as it was", videos, copy_function=shutil.copyfile)  # with times of their own
    assert crepa_train(file, "--resume", "latest", "--max_train_steps", "2") == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]

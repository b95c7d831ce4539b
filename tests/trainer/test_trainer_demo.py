"""`crepa-train demo` from end to end: real video, real classes, real training."""

from __future__ import annotations

import io
import json
import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.cli import main
from crepa_trainer.data.dataset import Bucket
from crepa_trainer.demo.run import DEMO_CREPA, DemoOptions, run_demo
from crepa_trainer.demo.summary import Summary
from crepa_trainer.reporting.trackers import MEASURED, read_metrics
from crepa_trainer.run import run
from diffusers import WanPipeline, WanTransformer3DModel
from rich.console import Console
from tiny import tiny_dinov2
from training_runs import metrics_rows
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig, CrepaRegularizer

SMALL = Bucket(32, 48, 9)
COLUMNS = {"step", "epoch", "loss", "flow_loss", "grad_norm", "grad_norm_model", "learning_rate", *MEASURED}
CREPA_COLUMNS = {
    "crepa_loss",
    "crepa_similarity",
    "crepa_similarity_self",
    "crepa_alignment_score",
    "crepa_weight",
    "crepa_cutoff",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(2):
        write_video(folder / f"video{seed}.mp4", moving_square(33, seed=seed))
    return folder


@pytest.fixture(scope="module", autouse=True)
def random_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher here, but where a test says another one."""
    RANDOM["crepa_encoder"] = str(folder := tmp_path_factory.mktemp("dinov2"))
    tiny_dinov2(folder, hidden_size=64, num_attention_heads=4)
    return folder


RANDOM: dict[str, Any] = {}


def demo(options: DemoOptions, **settings: Any) -> tuple[Summary, str]:
    config = CrepaConfig.from_dict({**DEMO_CREPA, **RANDOM, **settings})
    printed = io.StringIO()
    return run_demo(options, config, Console(file=printed, width=100)), printed.getvalue()


def small(videos: Path, output: Path, **changes: Any) -> DemoOptions:
    options = DemoOptions(
        output=output, data=videos, steps=6, timed_steps=2, size=SMALL, clips_per_video=2, comparison=False
    )
    return replace(options, **changes)


@pytest.fixture(scope="module")
def finished(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary, str]:
    output = tmp_path_factory.mktemp("run") / "demo"
    return output, *demo(small(videos, output, comparison=True))


def test_it_leaves_what_it_promises(finished: tuple[Path, Summary, str]) -> None:
    output, summary, printed = finished
    for name in ("training.png", "similarity_matrix.png", "patches.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    for name in ("pytorch_lora_weights.safetensors", "crepa_projector.safetensors", "crepa_config.json"):
        assert (output / "trained" / name).stat().st_size > 0
    saved = json.loads((output / "summary.json").read_text())
    assert saved["after"]["similarity"] == summary.after.similarity
    for text in ("best constant predictor", "patches shuffled", "seconds a step", "frames encoded", str(output)):
        assert text in " ".join(printed.split())


def test_every_logged_value_is_in_the_metrics_and_in_tensorboard(finished: tuple[Path, Summary, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _, _ = finished
    rows = read_metrics(output / "metrics.jsonl")
    assert next(iter(rows[0])) == "step"
    assert set(rows[0]) == COLUMNS | {"grad_norm_projector"} | CREPA_COLUMNS
    assert [row["step"] for row in rows] == list(range(6))
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    for column in events.Tags()["scalars"]:
        # TensorBoard keeps 32-bit floats.
        assert [event.value for event in events.Scalars(column)] == pytest.approx(
            [row[column] for row in rows], rel=1e-6
        )
    for row in rows:
        parts = row["flow_loss"] + row["crepa_loss"]
        # One 32-bit addition of numbers below 4.
        assert row["loss"] == pytest.approx(parts, abs=1e-6)


def test_the_same_is_trained_without_crepa_and_both_are_asked_the_same(
    finished: tuple[Path, Summary, str], videos: Path, tmp_path: Path
) -> None:
    output, summary, printed = finished
    without = metrics_rows(output / "without")
    assert [row["step"] for row in without] == [row["step"] for row in metrics_rows(output)]
    # The same weights, clip and noise at first; a LoRA's first step changes nothing before it.
    assert without[0]["flow_loss"] == metrics_rows(output)[0]["flow_loss"]
    assert without[-1]["flow_loss"] != metrics_rows(output)[-1]["flow_loss"]
    assert "crepa_loss" not in without[0]
    ours, others = summary.answers, summary.answers_without_crepa
    assert ours is not None
    assert others is not None
    assert ours.flow_loss != others.flow_loss
    assert ours.flow_loss == pytest.approx(others.flow_loss, rel=0.2)
    assert ours.readable != others.readable
    assert f"{ours.flow_loss:.3f}" in printed
    assert f"{others.flow_loss:.3f}" in printed
    assert "crepa_enabled" in (output / "report.html").read_text()
    # What is trained with CREPA is not changed by it.
    alone, _ = demo(small(videos, tmp_path / "alone"))
    assert metrics_rows(tmp_path / "alone") == metrics_rows(output)
    assert (alone.after, alone.answers) == (summary.after, None)
    assert not (tmp_path / "alone" / "without").exists()


def test_only_the_frames_that_latents_align_with_are_encoded(finished: tuple[Path, Summary, str]) -> None:
    _, summary, _ = finished
    # 9 pixel frames are 3 latent frames; the evaluation's own teacher is not in this count.
    assert summary.frames_encoded == 6 * 3
    assert summary.frames_decoded == 0
    assert (summary.clips, summary.frames_read, summary.frames_to_latents) == (4, 2 * 33, 4 * 9)


def test_the_lora_loads_in_a_stock_pipeline_without_a_warning(
    finished: tuple[Path, Summary, str], caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    output, _, _ = finished
    saved = load_file(output / "trained" / "pytorch_lora_weights.safetensors")
    assert saved
    assert not any("crepa" in name for name in saved)
    pipeline = WanPipeline.from_pretrained(output / "models" / "wan")
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline.load_lora_weights(output / "trained")
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    loaded = {
        name.replace(".default_0", ""): weight
        for name, weight in pipeline.transformer.named_parameters()
        if "lora_" in name
    }
    assert {f"transformer.{name}" for name in loaded} == set(saved)
    for name, weight in loaded.items():
        torch.testing.assert_close(weight, saved[f"transformer.{name}"], rtol=0, atol=0)
    # LoRA's B starts at zero, so what is not zero has been trained.
    trained = [name for name, weight in saved.items() if "lora_B" in name and weight.abs().max() > 0]
    # Attention of each of six blocks, to the video and to the text, four projections each.
    assert len(trained) == 6 * 2 * 4


def test_the_projector_is_saved_as_trained(finished: tuple[Path, Summary, str]) -> None:
    output, summary, _ = finished
    transformer = WanTransformer3DModel.from_pretrained(output / "models" / "wan", subfolder="transformer")
    crepa = CrepaRegularizer.from_pretrained(output / "trained", transformer, max_train_steps=1)
    assert crepa.projector is not None
    assert (crepa.projector.hidden_size, crepa.projector.feature_size) == (256, 64)
    # LayerNorm starts at ones.
    assert (crepa.projector[0].weight != 1).any()
    assert summary.rise > 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(finished: tuple[Path, Summary, str], videos: Path, tmp_path: Path) -> None:
    output, summary, _ = finished
    again, _ = demo(small(videos, tmp_path / "again"))
    assert metrics_rows(tmp_path / "again") == metrics_rows(output)
    assert (again.before, again.after) == (summary.before, summary.after)
    other, _ = demo(small(videos, tmp_path / "other", seed=1))
    assert other.before != summary.before


def test_it_trains_what_a_run_of_the_same_folders_trains(
    finished: tuple[Path, Summary, str], videos: Path, tmp_path: Path
) -> None:
    output, _, _ = finished
    options = small(videos, output)
    settings = options.settings().model_copy(update={"output": tmp_path / "run"})
    config = CrepaConfig.from_dict({**DEMO_CREPA, **RANDOM})
    run(settings, config, Console(file=io.StringIO()))
    assert metrics_rows(tmp_path / "run") == metrics_rows(output)
    for name in ("pytorch_lora_weights.safetensors", "crepa_projector.safetensors"):
        assert (tmp_path / "run/trained" / name).read_bytes() == (output / "trained" / name).read_bytes()


@pytest.mark.parametrize("comparison", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_second_demo_takes_the_place_of_the_first(videos: Path, tmp_path: Path, comparison: bool) -> None:
    output = tmp_path / "demo"
    demo(small(videos, output, steps=1, clips_per_video=1, comparison=comparison))
    other = tmp_path / "other"
    other.mkdir()
    write_video(other / "third.mp4", moving_square(9, seed=5))
    (output / "clips" / "mine.mp4").symlink_to(videos / "video0.mp4")
    (output / "clips" / "mine.txt").write_text("my own words")
    summary, _ = demo(small(other, output, steps=2, clips_per_video=1, comparison=comparison))
    for folder in (output, output / "without") if comparison else (output,):
        assert len(read_metrics(folder / "metrics.jsonl")) == 2
    # What somebody else put there is trained on, and is not removed.
    assert {path.name for path in (output / "clips").iterdir()} == {"third.mp4", "third.txt", "mine.mp4", "mine.txt"}
    assert summary.clips == 2


@pytest.mark.slow
def test_a_demo_does_not_take_the_place_of_another_run(videos: Path, tmp_path: Path) -> None:
    options = small(videos, tmp_path / "demo", steps=1)
    demo(options)
    moved = options.model_folder.rename(tmp_path / "moved")
    settings = options.settings().model_copy(update={"model": str(moved), "output": tmp_path / "own"})
    run(settings, CrepaConfig(), Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        demo(small(videos, tmp_path / "own"))
    assert list((tmp_path / "own" / "checkpoints").iterdir())


def test_without_crepa_it_trains_and_says_so(videos: Path, tmp_path: Path) -> None:
    summary, printed = demo(small(videos, tmp_path / "off"), crepa_enabled=False)
    assert summary.after is None
    assert summary.seconds_per_step is None
    logged = set(read_metrics(tmp_path / "off" / "metrics.jsonl")[0])
    assert logged == COLUMNS
    assert "CREPA was off" in printed
    assert not (tmp_path / "off" / "trained" / "crepa_projector.safetensors").exists()


@pytest.mark.slow
def test_after_a_cutoff_no_frame_is_encoded(videos: Path, tmp_path: Path) -> None:
    summary, _ = demo(small(videos, tmp_path / "cutoff"), crepa_cutoff_step=2)
    assert summary.frames_encoded == 2 * 3
    rows = read_metrics(tmp_path / "cutoff" / "metrics.jsonl")
    assert ["crepa_similarity" in row for row in rows] == [True, True, False, False, False, False]
    assert [row["crepa_cutoff"] for row in rows] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"crepa_feature_source": "backbone", "crepa_teacher_block_index": 5}, marks=pytest.mark.slow),
        pytest.param(
            {"crepa_encoder_resize": "square", "crepa_encoder_image_size": 70, "crepa_frame_map": "mean"},
            marks=pytest.mark.slow,
        ),
        {"crepa_encoder_resize": "square", "crepa_encoder_image_size": 28, "crepa_spatial_align": "teacher"},
    ],
    ids=["backbone", "mean of frames", "student resampled"],
)
def test_other_settings_run_through_to_the_plots(videos: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    summary, _ = demo(small(videos, tmp_path / "run", steps=3), **settings)
    assert summary.after is not None
    assert summary.after.constant <= summary.after.position + 1e-6
    assert (tmp_path / "run" / "patches.png").exists()


def test_a_damaged_video_is_counted_in_the_table(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "bad.mp4").write_bytes(b"no video")
    summary, printed = demo(small(folder, tmp_path / "run", steps=1))
    assert summary.videos_skipped == 1
    assert summary.clips == 4
    assert "1" in next(line for line in printed.splitlines() if "videos skipped" in line)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(videos: Path, tmp_path: Path) -> None:
    options = small(videos, tmp_path / "run", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is (nan|inf)"):
        demo(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{empty}"], "{empty}: no video in this folder"),
        (["--data", "{empty}/nowhere"], "nowhere: no such folder"),
        (["--data", "{bad}"], "no usable clip in 1 video"),
        (["--data", "{bad}", "--strict"], "bad.mp4: cannot be decoded"),
        (["--crepa_lamda", "1"], "did you mean --crepa_lambda?"),
        (["--crepa_lambda", "-1"], "crepa_lambda"),
        (["--crepa_block_index", "6"], "valid are 0 to 5"),
        (["--output", "{bad}/bad.mp4"], "bad.mp4"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    arguments: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"empty": tmp_path / "empty", "bad": tmp_path / "bad"}
    for folder in places.values():
        folder.mkdir()
    (places["bad"] / "bad.mp4").write_bytes(b"no video")
    given = [argument.format(**places) for argument in arguments]
    if "--data" not in given:
        given += ["--data", str(videos)]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "run")]
    assert main(["demo", *given, "--steps", "1", "--no-comparison"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("crepa-train: error: ")
    assert message.format(**places) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--unknown"], ["--steps", "many"]])
def test_argparse_refuses_other_mistakes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def assert_patches_answer_patches(summary: Summary) -> None:
    assert summary.before is not None
    assert summary.after is not None
    after = summary.after
    assert summary.rise >= 0.05
    assert after.similarity > after.constant
    assert after.similarity - after.shuffled >= 0.5 * (after.similarity - after.constant)
    assert all(math.isfinite(value) for value in (*summary.loss, *summary.flow_loss))
    assert summary.flow_loss[1] < summary.flow_loss[0]


def test_on_real_video_patches_answer_patches(tmp_path: Path) -> None:
    """A few of the demo's steps on half of its clips, with a random teacher; the whole of it is the slow test below."""
    options = DemoOptions(output=tmp_path, steps=30, timed_steps=1, clips_per_video=4, comparison=False)
    summary, printed = demo(options)
    assert_patches_answer_patches(summary)
    assert summary.after is not None
    beyond_position = summary.after.similarity > summary.after.position
    said = "patch answers patch" if beyond_position else "it is about where patches are"
    assert said in " ".join(printed.split())


@pytest.mark.slow
def test_the_whole_demo_knows_more_than_positions(tmp_path: Path) -> None:
    """The demo as `make demo` runs it also beats the best predictor that knows a patch's position alone."""
    assert main(["demo", "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "summary.json").read_text())
    after = saved["after"]
    assert after["similarity"] - saved["before"]["similarity"] >= 0.05
    assert after["similarity"] > after["position"] > after["constant"] > after["shuffled"]
    # What the README says that CREPA changes, and what it costs.
    ours, others = saved["answers"], saved["answers_without_crepa"]
    assert ours["readable"] == pytest.approx(0.85, abs=0.03)
    assert others["readable"] == pytest.approx(0.68, abs=0.03)
    assert ours["flow_loss"] == pytest.approx(1.59, abs=0.05)
    assert others["flow_loss"] == pytest.approx(1.51, abs=0.05)

"""Two processes fill one cache: each encodes its share, both end with the same clips."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from crepa_trainer.cli import main
from crepa_trainer.data.cache import prepare_cache
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.hunyuan_video import HunyuanVideoFamily
from crepa_trainer.families.wan import WanFamily
from crepa_trainer.reporting.trackers import read_metrics
from crepa_trainer.settings import RunSettings
from hub_cases import CASES
from processes import run
from rich.console import Console
from tiny import tiny_dinov2
from tiny_pipelines import save_tiny_wan_pipeline
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers.dinov2 import DinoV2


def _counted(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return counted


def fill_twice(given: dict[str, Any]) -> None:
    """What this process encodes of one cache, and then again: its calls, names and sums, as files of the output."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    calls: Counter[str] = Counter()
    counted_calls = [(WanFamily, name) for name in ("load_vae", "load_text", "encode_latents")]
    counted_calls += [(HunyuanVideoFamily, name) for name in ("load_text", "encode_text", "encode_text_of_clip")]
    for owner, name in (*counted_calls, (DinoV2, "load")):
        setattr(owner, name, _counted(calls, name, getattr(owner, name)))
    settings = RunSettings(**given["settings"])
    config = CrepaConfig(**given["config"])
    rank = accelerator.process_index
    if given.get("apart"):
        settings = settings.model_copy(update={"cache": settings.output / f"cache{rank}"})
    family = TrainingFamily.of(settings.model, settings.task)
    for time in ("first", "again"):
        calls.clear()
        # The other one comes late, when the first one could have written a part.
        sleep(2 * rank)
        clips = prepare_cache(settings, config, family, accelerator.device, Console(file=io.StringIO()))
        sums = [float(clips[n][name].sum()) for n in range(len(clips)) for name in ("latents", "text")]
        result = {"calls": calls, "names": [key.name for key in clips.keys], "sums": sums}
        (settings.output / f"{time}{rank}.json").write_text(json.dumps(result))


TEXT_CALLS = ("load_text", "encode_text_of_clip", "encode_text")


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    save_tiny_wan_pipeline(tmp_path / "wan")
    tiny_dinov2(tmp_path / "dinov2")
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    for n in range(5):
        video = write_video(tmp_path / "data" / f"{n}.mp4", moving_square(40 if n == 3 else 9, seed=n), faststart=True)
        video.with_suffix(".txt").write_text("a square" if n % 2 else "a red square")
        if n == 3:
            video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    settings = {
        "model": str(tmp_path / "wan"), "data": str(tmp_path / "data"), "output": str(tmp_path / "out"),
        "max_train_steps": 1, "resolutions": [[32, 48]], "frame_counts": [9], "cache_teacher": "features",
        "clips_per_video": 2, "validation_prompts": ["a video"], "validation_every": 1,
    }  # fmt: skip
    config = {
        "crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(tmp_path / "dinov2"),
        "crepa_encoder_resize": "grid",
    }  # fmt: skip
    return {"settings": settings, "config": config}


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_each_process_encodes_its_share_and_both_see_all(given: dict[str, Any], tmp_path: Path) -> None:
    done = run(fill_twice, given, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [tmp_path / "out" / f"{time}{rank}.json" for time in ("first", "again") for rank in (0, 1)]
    first, second, *again = (json.loads(file.read_text()) for file in files)
    # Video 3 is cut off after two thirds: its first clip is there, whichever process met it.
    assert first["names"] == ["0.mp4 [0:9]", "1.mp4 [0:9]", "2.mp4 [0:9]", "3.mp4 [0:9]", "4.mp4 [0:9]"]
    assert (second["names"], second["sums"]) == (first["names"], first["sums"])
    assert first["calls"] == {"load_text": 1, "load_vae": 1, "load": 1, "encode_latents": 3}
    assert second["calls"] == {"load_vae": 1, "load": 1, "encode_latents": 2}
    assert [each["calls"] for each in again] == [{}, {}]
    assert [each["sums"] for each in again] == [first["sums"]] * 2


@pytest.mark.slow
def test_a_cache_that_the_processes_do_not_share_is_refused(given: dict[str, Any]) -> None:
    done = run(fill_twice, {**given, "apart": True}, ranks=2)
    assert done.returncode != 0
    assert "cache must be a folder that they share" in done.stderr


def command(words: Sequence[str]) -> None:
    sys.exit(main(words))


def test_the_command_runs_in_two_processes_that_speak_with_one_voice(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {"validation_every": 2, "validation_steps": 1}
    settings = {**given["settings"], **validation, "max_train_steps": 2, "mixed_precision": "no", "lora_rank": 2}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**settings, **given["config"]}))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    done = run(command, ["run", "--config", str(file), "--cache_teacher", "frames"], ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = " ".join(done.stdout.split())
    for words in ("2 clips a step, 2 processes", "encoded 4 videos into", "1 of 5 videos skipped", "3.mp4: damaged"):
        assert printed.count(words) == 1, done.stdout
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 2
    assert list((tmp_path / "out" / "validation").rglob("*.mp4"))


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(given: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**given["settings"], "strict": True}))
    done = torchrun("-m", "crepa_trainer", "run", "--config", str(file))
    assert done.returncode != 0
    assert done.stderr.count("crepa-train: error: ") == 1
    assert "3.mp4: damaged or cut off" in done.stderr


@pytest.mark.slow
def test_texts_with_first_frames_are_shared_out_as_the_clips_are(given: dict[str, Any], tmp_path: Path) -> None:
    model = CASES["hunyuan token_replace"].save(tmp_path / "hunyuan")
    settings = {**given["settings"], "model": str(model), "task": "image2video"}
    done = run(fill_twice, {**given, "settings": settings}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [tmp_path / "out" / f"{time}{rank}.json" for time in ("first", "again") for rank in (0, 1)]
    first, second, *again = (json.loads(file.read_text()) for file in files)
    assert first["sums"] == second["sums"]
    # Every second one of five clips' captions, the negative prompt, which has no first frame, and one that has.
    calls = [{name: each["calls"].get(name) for name in TEXT_CALLS} for each in (first, second)]
    assert calls == [
        {"load_text": 1, "encode_text_of_clip": 4, "encode_text": None},
        {"load_text": 1, "encode_text_of_clip": 2, "encode_text": 1},
    ]
    assert [each["calls"] for each in again] == [{}, {}]
    assert len(list((tmp_path / "out" / "cache" / "text").iterdir())) == 7


@pytest.mark.slow
def test_two_processes_train_on_texts_with_first_frames(given: dict[str, Any], tmp_path: Path) -> None:
    model = CASES["hunyuan token_replace"].save(tmp_path / "hunyuan")
    settings = {**given["settings"], "model": str(model), "task": "image2video", "validation_every": 2}
    small = {"validation_steps": 1, "max_train_steps": 2, "mixed_precision": "no", "lora_rank": 2}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**settings, **small, **given["config"]}))
    done = torchrun("-m", "crepa_trainer", "run", "--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 2
    assert " ".join(done.stdout.split()).count("encoded 7 captions into") == 1

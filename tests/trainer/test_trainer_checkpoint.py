"""Checkpoints: whole or not there, the newest kept, and never gone on from under other settings."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.checkpoint import FOLDER, STATE_FILE, WEIGHTS_FILE, run_identity
from crepa_trainer.cli import main
from diffusers import WanPipeline, WanTransformer3DModel
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from processes import environment
from safetensors.torch import load_file
from said import everything_said
from training_runs import (
    TinyClips,
    command,
    latest_checkpoint,
    tiny_config,
    tiny_settings,
    train,
    train_elsewhere,
)

# A checkpoint after each of 5 steps, of which 2 are kept.
RUN: dict[str, Any] = {"max_train_steps": 5, "checkpoint_every": 1, "checkpoints_kept": 2}


def found(models: Path, output: Path, crepa: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings = tiny_settings(models, output, **{**RUN, "resume": "latest", **changes})
    return latest_checkpoint(settings, tiny_config(models, **(crepa or {})))


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / FOLDER).iterdir())


def test_the_newest_are_kept_and_the_newest_of_them_is_taken(models: Path, output: Path) -> None:
    assert names(output) == ["step-00000004", "step-00000005"]
    assert found(models, output).step == 5
    older = str(output / FOLDER / "step-00000004")
    assert found(models, output.parent / "elsewhere", resume=older).step == 4
    # What is after it there would be taken for the newest of the run that went back.
    with pytest.raises(ValueError, match=r"has checkpoints after step 4 \(step-00000005\)"):
        found(models, output, resume=older)
    shutil.rmtree(output / FOLDER / "step-00000005")
    assert found(models, output, resume=older).step == 4


def test_a_copy_under_a_name_of_its_own_is_no_checkpoint_of_the_run(models: Path, output: Path) -> None:
    shutil.copytree(output / FOLDER / "step-00000005", output / FOLDER / "step-00000005-good")
    assert found(models, output).folder.name == "step-00000005"


def test_only_trained_weights_are_in_a_checkpoint(output: Path) -> None:
    checkpoint = output / FOLDER / "step-00000005"
    assert all("lora" in name for name in load_file(checkpoint / WEIGHTS_FILE))
    assert not (checkpoint / "model.safetensors").exists()


def test_a_checkpoints_lora_loads_in_the_stock_pipeline_and_is_exported_again(
    models: Path, output: Path, tmp_path: Path
) -> None:
    checkpoint = output / FOLDER / "step-00000005"
    pipeline = WanPipeline.from_pretrained(models / "wan")
    with everything_said() as said:
        pipeline.load_lora_weights(checkpoint)
    assert said == []
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    lora = load_file(output / "trained" / "pytorch_lora_weights.safetensors")
    assert {f"transformer.{name}": tensor.tolist() for name, tensor in loaded.items()} == {
        name: tensor.tolist() for name, tensor in lora.items()
    }
    # The newest of the run, beside its checkpoints.
    assert main(["export", str(output)]) == 0
    again = load_file(output / "exported" / "step-00000005" / "pytorch_lora_weights.safetensors")
    assert again.keys() == lora.keys()
    assert all(torch.equal(again[name], lora[name]) for name in lora)
    # An adapter for peft, in another type.
    assert (
        main(["export", str(checkpoint), "--output", str(tmp_path / "peft"), "--format", "peft", "--dtype", "bf16"])
        == 0
    )
    transformer = WanTransformer3DModel.from_pretrained(models / "wan", subfolder="transformer")
    with everything_said() as said:
        adapted: Any = PeftModel.from_pretrained(transformer, tmp_path / "peft")
    assert said == []
    own = get_peft_model_state_dict(adapted)
    assert {name.removeprefix("base_model.model.") for name in own} == set(loaded)
    for name, tensor in own.items():
        assert torch.equal(tensor.bfloat16(), loaded[name.removeprefix("base_model.model.")].bfloat16())


def test_a_whole_transformer_is_exported_from_its_checkpoint(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(tiny_settings(models, output, training="full", max_train_steps=1, learning_rate=1e-3), tiny_config(models))
    assert main(["export", str(output), "--output", str(tmp_path / "a")]) == 0
    last, again = (
        WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
        for folder in (output / "trained", tmp_path / "a")
    )
    assert all(torch.equal(again[name], last[name]) for name in last)


def test_what_cannot_be_exported_is_one_line(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert f"{tmp_path} is no complete checkpoint, and no run's folder that has one" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err


def test_without_a_checkpoint_latest_is_a_run_that_starts(models: Path, tmp_path: Path) -> None:
    assert found(models, tmp_path) is None


PARTS = ["optimizer.safetensors", WEIGHTS_FILE, "random_state_0.safetensors", "crepa.safetensors"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_shortened_part_is_named(models: Path, output: Path, part: str) -> None:
    file = output / FOLDER / "step-00000005" / part
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{part} of another size"):
        found(models, output)
    file.unlink()
    with pytest.raises(ValueError, match=f"step-00000005 is not a complete checkpoint: {part} missing"):
        found(models, output)


def test_a_folder_that_is_no_checkpoint_is_an_error(models: Path, output: Path) -> None:
    with pytest.raises(ValueError, match=r'elsewhere: no such folder; it is "latest" or a checkpoint.s folder'):
        found(models, output, resume=str(output / "elsewhere"))
    with pytest.raises(ValueError, match=r"did you mean .*/step-00000005\?$"):
        found(models, output, resume="step-00000005")
    (output / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=rf"elsewhere is not a complete checkpoint: {STATE_FILE} is missing"):
        found(models, output, resume=str(output / "elsewhere"))
    state = output / FOLDER / "step-00000005" / STATE_FILE
    state.write_text(state.read_text()[:-10])
    with pytest.raises(ValueError, match=rf"{STATE_FILE} is damaged"):
        found(models, output)


def test_each_setting_that_differs_is_named(models: Path, output: Path) -> None:
    with pytest.raises(ValueError, match="of a run with other settings") as caught:
        found(models, output, {"crepa_adjacent_tau": 2.0}, learning_rate=0.5, seed=3)
    message = str(caught.value)
    assert "learning_rate = 0.5 (checkpoint: 0.01)" in message
    assert "seed = 3 (checkpoint: 0)" in message
    assert "crepa_adjacent_tau = 2.0 (checkpoint: 1.0)" in message
    assert message.count("checkpoint: ") == 3


def test_a_moved_project_goes_on(models: Path, output: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(models, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert found(moved, output).step == 5
    with (moved / "wan" / "transformer" / "diffusion_pytorch_model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x17")
    with pytest.raises(ValueError, match=r"other settings: model = \S+ \S+ \(checkpoint: "):
        found(moved, output)


def test_settings_that_change_nothing_of_the_training_may_differ(models: Path, output: Path) -> None:
    free = {"workers": 1, "checkpoint_every": 7, "checkpoints_kept": 9, "matrix_every": 2, "strict": True}
    free |= {"teacher_offload": True}
    validation = {"validation_prompts": ["a"], "validation_every": 2, "validation_steps": 3, "validation_seed": 4}
    assert found(models, output, {"crepa_backend": "torch", "crepa_recompute": True}, **free, **validation).step == 5


@pytest.mark.parametrize(
    ("changes", "crepa", "may"),
    [
        ({}, {}, True),
        ({"lr_scheduler": "cosine"}, {}, False),
        ({}, {"crepa_scheduler": "linear"}, False),
        ({}, {"crepa_scheduler": "linear", "crepa_decay_steps": 3}, True),
    ],
)
def test_a_run_may_be_made_longer_where_nothing_is_stretched_over_it(
    models: Path, tmp_path: Path, changes: dict[str, Any], crepa: dict[str, Any], may: bool
) -> None:
    short, long = (tiny_settings(models, tmp_path, **changes, max_train_steps=steps) for steps in (5, 9))
    same = run_identity(short, tiny_config(models, **crepa), 1) == run_identity(long, tiny_config(models, **crepa), 1)
    assert same is may


def test_a_checkpoint_past_the_runs_end_is_an_error(models: Path, output: Path) -> None:
    with pytest.raises(ValueError, match="is at step 5, past max_train_steps = 3"):
        found(models, output, max_train_steps=3)


def test_a_checkpoint_that_was_half_removed_goes_and_stops_nothing(models: Path, output: Path) -> None:
    folder = output / FOLDER
    (folder / "step-00000002").mkdir()
    (folder / "step-00000002" / "optimizer.bin").write_bytes(b"left over")
    shutil.copytree(folder / "step-00000005", folder / "step-00000006")
    (folder / "step-00000006" / STATE_FILE).unlink()
    train(tiny_settings(models, output, **{**RUN, "max_train_steps": 6}, resume="latest"), tiny_config(models))
    assert names(output) == ["step-00000005", "step-00000006"]
    assert found(models, output, max_train_steps=6).step == 6


def test_other_clips_are_an_error_before_any_weight_is_loaded(models: Path, output: Path) -> None:
    settings = tiny_settings(models, output, **RUN, resume="latest")
    with pytest.raises(ValueError, match="of a run on other clips"):
        train(settings, tiny_config(models), TinyClips(2, 2))


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = tiny_settings(models, output, **{**RUN, "max_train_steps": 2})
    train(settings, tiny_config(models))
    optimizer = output / FOLDER / "step-00000002" / "optimizer.safetensors"
    longer = settings.model_copy(update={"max_train_steps": 4, "resume": "latest"})
    # No file may grow past this: the metrics may, the optimiser's state may not.
    limit = optimizer.stat().st_size - 1000
    full = train_elsewhere(longer, tiny_config(models), file_size=limit)
    assert full.returncode == 1
    assert "step-00000003 could not be written" in full.stderr.splitlines()[-1]
    assert "OSError" in full.stderr.splitlines()[-1]
    assert names(output) == ["step-00000001", "step-00000002"]
    rows = train(longer, tiny_config(models))
    whole = train(settings.model_copy(update={"max_train_steps": 4, "output": tmp_path / "whole"}), tiny_config(models))
    assert rows == whole


def test_a_kill_while_writing_leaves_the_checkpoint_before_it_whole(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = tiny_settings(models, output, **{**RUN, "max_train_steps": 500})
    process = subprocess.Popen(command(settings, tiny_config(models)), env=environment(), stderr=subprocess.PIPE)
    try:
        _wait(lambda: len(list((output / FOLDER).glob("step-*"))) > 1, process)
        _wait(lambda: any((output / FOLDER).glob(".writing-*/*")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    checkpoint = found(models, output, max_train_steps=500)
    steps = checkpoint.step + 2
    rows = train(settings.model_copy(update={"max_train_steps": steps, "resume": "latest"}), tiny_config(models))
    assert len(rows) == steps
    assert names(output) == [f"step-{steps - 1:08d}", f"step-{steps:08d}"]


def _wait(ready: Any, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 240
    while not ready():
        time.sleep(0.001)  # the run wants this core too
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < end

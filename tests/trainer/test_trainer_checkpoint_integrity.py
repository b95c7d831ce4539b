"""Checkpoints damaged, mixed up or made by somebody else: found before any of it is used, and no code runs."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.checkpoint import FOLDER, STATE_FILE, WEIGHTS_FILE, Checkpoint
from crepa_trainer.state_files import file_digest, json_digest, read_state, write_state
from safetensors.torch import load_file, save_file
from training_runs import latest_checkpoint, tiny_config, tiny_settings, train

RUN: dict[str, Any] = {"max_train_steps": 4, "checkpoint_every": 1, "checkpoints_kept": 2, "ema_decay": 0.8}
PARTS = {"optimizer", "scheduler", "crepa", "average", "random_state_0", WEIGHTS_FILE.removesuffix(".safetensors")}


@pytest.fixture
def checkpoint(output: Path) -> Path:
    """Of the last step; that of the one before lies beside it."""
    return output / FOLDER / "step-00000004"


def found(models: Path, checkpoint: Path) -> Checkpoint | None:
    settings = tiny_settings(models, checkpoint.parents[1], **{**RUN, "resume": "latest"})
    return latest_checkpoint(settings, tiny_config(models))


def sign(checkpoint: Path, **changes: Any) -> None:
    """Sizes and digests as whoever wants to be believed would write them."""
    state = json.loads((checkpoint / STATE_FILE).read_text()) | changes
    state.pop("digest")
    if "parts" not in changes:
        state["parts"] = {
            name: [(checkpoint / name).stat().st_size, file_digest(checkpoint / name)] for name in state["parts"]
        }
    (checkpoint / STATE_FILE).write_text(json.dumps({**state, "digest": json_digest(state)}))


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_a_checkpoint_is_safetensors_and_json(models: Path, checkpoint: Path) -> None:
    names = {STATE_FILE, "pytorch_lora_weights.safetensors", *(f"{part}.safetensors" for part in PARTS)}
    assert {path.name for path in checkpoint.iterdir()} == names
    assert found(models, checkpoint) is not None
    for path in checkpoint.glob("*.safetensors"):
        load_file(path)


def test_no_part_of_a_checkpoint_runs_code(models: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole, ran = tmp_path / "whole", tmp_path / "ran"
    settings = tiny_settings(models, checkpoint.parents[1], **{**RUN, "max_train_steps": 5, "resume": "latest"})
    shutil.copytree(checkpoint, whole)
    # accelerate's own names too, had it been asked to load them.
    old = [
        "custom_checkpoint_0.pkl",
        "custom_checkpoint_1.pkl",
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
    ]
    for part in [*(f"{part}.safetensors" for part in sorted(PARTS)), *old]:
        shutil.rmtree(checkpoint)
        shutil.copytree(whole, checkpoint)
        torch.save(Payload(ran), checkpoint / part)
        sign(checkpoint)
        if part in old:
            continue
        with pytest.raises(ValueError, match=rf"{part} is damaged"):
            train(settings, tiny_config(models))
        assert not ran.exists()
    train(settings, tiny_config(models))
    assert not ran.exists()
    torch.load(checkpoint.with_name("step-00000004") / old[-1], weights_only=False)
    assert ran.exists()  # such a file does it


@pytest.mark.parametrize("part", sorted(PARTS))
def test_a_part_with_other_bytes_of_the_same_size_is_named(models: Path, checkpoint: Path, part: str) -> None:
    file = checkpoint / f"{part}.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    # In the header's length, in its JSON, and in what the tensors hold.
    for place in (0, 8 + header // 2, 8 + header, (8 + header + len(whole)) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[min(place, len(whole) - 1)] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"step-00000004 is damaged: {part}\.safetensors with other bytes"):
            found(models, checkpoint)
    file.write_bytes(whole)
    assert found(models, checkpoint) is not None


@pytest.mark.parametrize("part", sorted(PARTS))
def test_a_part_of_another_step_is_named(models: Path, checkpoint: Path, part: str) -> None:
    other = checkpoint.with_name("step-00000003") / f"{part}.safetensors"
    same = other.read_bytes() == (checkpoint / other.name).read_bytes()
    shutil.copy(other, checkpoint)
    if same:  # the random state: nothing is drawn from it in a step
        assert found(models, checkpoint) is not None
        return
    with pytest.raises(ValueError, match=f"step-00000004 .*{part}"):
        found(models, checkpoint)


def test_parts_under_each_others_names_are_found(models: Path, checkpoint: Path) -> None:
    first, second = checkpoint / "optimizer.safetensors", checkpoint / "average.safetensors"
    both = first.read_bytes(), second.read_bytes()
    first.write_bytes(both[1])
    second.write_bytes(both[0])
    with pytest.raises(ValueError, match=r"step-00000004 .*average.*optimizer"):
        found(models, checkpoint)


def test_a_checkpoint_under_another_steps_name_is_found(models: Path, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.with_name("step-00000003").rename(checkpoint)
    with pytest.raises(ValueError, match=r"step-00000004 holds a checkpoint of step 3"):
        found(models, checkpoint)


def test_every_changed_byte_of_the_state_is_found_in_one_line(models: Path, checkpoint: Path) -> None:
    file = checkpoint / STATE_FILE
    whole = file.read_bytes()
    same = json.loads(whole)
    places = [*range(0, len(whole), 37), whole.index(b'"step": 4') + 8]
    for place in places:
        for bit in (1, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"^[^\n]*$") if _says(damaged) != same else nullcontext():
                found(models, checkpoint)


def _says(text: bytes) -> Any:
    """What a state says, whatever the spaces between its words are."""
    try:
        return json.loads(text.decode())
    except ValueError:
        return None


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{}", b'"x"', b"[" * 100_000, b'{"step": 4, "identity": 3, "parts": 5}', b"\xff" * 10_000],
    ids=lambda text: text[:20].decode("latin-1"),
)
def test_a_state_that_is_something_else_is_an_error_of_one_line(models: Path, checkpoint: Path, text: bytes) -> None:
    (checkpoint / STATE_FILE).write_bytes(text)
    with pytest.raises(ValueError, match="step-00000004") as caught:
        found(models, checkpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_checkpoint_of_an_earlier_version_is_not_opened(models: Path, checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["digest"]
    state["parts"] = {name: size for name, (size, _) in state["parts"].items()}
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="of an earlier version, in files that can hold code"):
        found(models, checkpoint)


def _other_optimizer(checkpoint: Path, models: Path) -> str:
    file = checkpoint / "optimizer.safetensors"
    state = read_state(file)
    state["state"]["0"]["exp_avg"] = torch.zeros(3)
    write_state(file, state)
    return file.name


def _other_groups(checkpoint: Path, models: Path) -> str:
    write_state(checkpoint / "optimizer.safetensors", {"state": {}, "param_groups": []})
    return "optimizer.safetensors"


def _other_random_state(checkpoint: Path, models: Path) -> str:
    write_state(checkpoint / "random_state_0.safetensors", {"python": [9, [1], None]})
    return "random_state_0.safetensors"


def _other_crepa(checkpoint: Path, models: Path) -> str:
    write_state(checkpoint / "crepa.safetensors", {"projector": {}, "schedule": {}})
    return "crepa.safetensors"


def _other_ema(checkpoint: Path, models: Path) -> str:
    state = read_state(checkpoint / "average.safetensors")
    write_state(checkpoint / "average.safetensors", {**state, "shadow_params": state["shadow_params"][:-1]})
    return "average.safetensors"


def _other_weights(checkpoint: Path, models: Path) -> str:
    weights = load_file(checkpoint / WEIGHTS_FILE)
    weights.popitem()
    save_file(weights, checkpoint / WEIGHTS_FILE)
    return WEIGHTS_FILE


@pytest.mark.parametrize(
    "change",
    [_other_optimizer, _other_groups, _other_random_state, _other_crepa, _other_ema, _other_weights],
)
def test_a_part_of_another_run_is_an_error_that_names_its_file(models: Path, checkpoint: Path, change: Any) -> None:
    name = change(checkpoint, models)
    sign(checkpoint)
    settings = tiny_settings(models, checkpoint.parents[1], **{**RUN, "max_train_steps": 5, "resume": "latest"})
    with pytest.raises(ValueError, match=rf"{name} is of another") as caught:
        train(settings, tiny_config(models))
    assert "\n" not in str(caught.value)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "a": {"0": torch.randn(2, 3), "tensors": [torch.tensor(3), torch.zeros(0)]},
        "numbers": [1, 2.5, 1e-300, float("inf"), None, True, "text"],
        "empty": {},
    }
    write_state(tmp_path / "state.safetensors", state)
    back = read_state(tmp_path / "state.safetensors")
    assert back["a"]["0"].equal(state["a"]["0"])
    assert [each.tolist() for each in back["a"]["tensors"]] == [3, []]
    assert (back["numbers"], back["empty"]) == (state["numbers"], {})
    with pytest.raises(TypeError):
        write_state(tmp_path / "other.safetensors", {"a": object()})

"""A training run from encoded clips to what it logs and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crepa_trainer.reporting.runs import RunFolder
from crepa_trainer.state import trained_parameters
from diffusers import WanPipeline, WanTransformer3DModel
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from said import everything_said
from training_runs import TinyClips, tiny_config, tiny_settings, train

from crepa_kernels import CrepaRegularizer


@pytest.fixture(scope="module")
def lora(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """A LoRA run on one clip with an average of its weights and pictures of the matrix."""
    output = tmp_path_factory.mktemp("lora") / "run"
    settings = tiny_settings(
        models,
        output,
        max_train_steps=60,
        ema_decay=0.9,
        matrix_every=20,
        lr_scheduler="cosine",
        projector_learning_rate=3e-2,
        lora_targets=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    )
    return output, train(settings, tiny_config(models, crepa_cutoff_step=55), TinyClips(1, 0))


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def test_a_run_learns_to_align_and_logs_each_step_once(lora: tuple[Path, list[dict[str, float]]]) -> None:
    _, rows = lora
    assert [row["step"] for row in rows] == list(range(60))
    similarity = column(rows, "crepa_similarity")
    assert len(similarity) == 55  # until the cutoff
    # Features of neighbouring frames are independent draws here, so 0.65 is the most that there is.
    # Every step has another noise level, and at the higher ones there is less to see.
    assert sum(similarity[-5:]) / 5 > similarity[0] + 0.2
    assert column(rows, "crepa_cutoff") == [0] * 55 + [1] * 5
    rates = column(rows, "learning_rate")
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert column(rows, "epoch") == list(range(60))


def test_tensorboard_has_the_same_values_and_the_similarity_matrix(lora: tuple[Path, list[dict[str, float]]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, rows = lora
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert [image.step for image in events.Images("similarity_matrix")] == [0, 20, 40]


def test_looks_are_kept_and_the_constant_is_logged_with_them_alone(lora: tuple[Path, list[dict[str, float]]]) -> None:
    output, rows = lora
    looks = RunFolder(output).looks()
    assert [(look.step, look.clip) for look in looks] == [(step, "0.mp4 [0:9]") for step in (0, 20, 40)]
    assert [row["step"] for row in rows if "crepa_constant" in row] == [0, 20, 40]
    for look in looks:
        assert np.shape(look.matrix) == (3, 3)
        # By definition: the mean over frames of each frame's similarity with its own teacher frame.
        own = rows[look.step]["crepa_similarity_self"]
        assert np.trace(look.matrix) / 3 == pytest.approx(own, abs=1e-5)
        assert look.patches is not None
        with Image.open(look.patches) as picture:
            picture.load()
            assert picture.size[0] > 500
    said = json.loads((output / "looks" / "step-00000020.json").read_text())
    assert said["frames"] == [0, 4, 8]
    assert said["constant"] == rows[20]["crepa_constant"]


def test_a_lora_loads_in_the_stock_pipeline_without_a_word_and_samples(
    models: Path, lora: tuple[Path, list[dict[str, float]]]
) -> None:
    trained = lora[0] / "trained"
    pipeline = WanPipeline.from_pretrained(models / "wan")
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        sizes = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
        frames: torch.Tensor = pipeline("a red square", **sizes, generator=generator, output_type="pt").frames
        return frames

    without = sample()
    with everything_said() as said:
        pipeline.load_lora_weights(trained)
    assert said == []
    assert sample().shape == (1, 5, 3, 32, 48)
    assert not torch.allclose(sample(), without)
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    saved = load_file(trained / "pytorch_lora_weights.safetensors")
    assert {f"transformer.{name}" for name in loaded} == set(saved)
    assert all(torch.equal(loaded[name], saved[f"transformer.{name}"]) for name in loaded)


def test_the_ema_and_the_projector_lie_beside_the_lora(models: Path, lora: tuple[Path, list[dict[str, float]]]) -> None:
    trained = lora[0] / "trained"
    last, ema = (load_file(f / "pytorch_lora_weights.safetensors") for f in (trained, trained / "ema"))
    assert last.keys() == ema.keys()
    assert any(not torch.equal(last[name], ema[name]) for name in last)
    transformer = WanTransformer3DModel.from_pretrained(models / "wan", subfolder="transformer")
    crepa = CrepaRegularizer.from_pretrained(trained, transformer)
    assert crepa.projector is not None
    assert crepa.config.crepa_cutoff_step == 55


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_fully_trained_transformer_loads_without_a_word(models: Path, tmp_path: Path, precision: str) -> None:
    settings = tiny_settings(models, tmp_path / "run", training="full", mixed_precision=precision, learning_rate=1e-3)
    rows = train(settings, tiny_config(models))
    assert len(rows) == 4
    with everything_said() as said:
        loaded = WanTransformer3DModel.from_pretrained(tmp_path / "run" / "trained", subfolder="transformer")
        pipeline = WanPipeline.from_pretrained(models / "wan", transformer=loaded)
    assert said == []
    assert pipeline.transformer is loaded
    before = WanTransformer3DModel.from_pretrained(models / "wan", subfolder="transformer").state_dict()
    after = loaded.state_dict()
    # The master weights are fp32, so a step of 1e-3 is not lost in bf16's 8 bits.
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_frozen_weights_are_in_the_mixed_type_and_trained_ones_in_fp32(models: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from crepa_trainer.families import TrainingFamily
    from crepa_trainer.state import make_state

    settings = tiny_settings(models, tmp_path, mixed_precision="bf16")
    accelerator = Accelerator(cpu=True)
    state = make_state(accelerator, TrainingFamily.of(settings.model), settings, tiny_config(models))
    transformer: Any = state.transformer
    assert transformer.is_gradient_checkpointing
    trained = trained_parameters(transformer)
    assert trained
    assert all("lora" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for p in transformer.crepa_projector.parameters()} == {torch.float32}
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    groups = state.optimizer.param_groups
    optimized = {id(p) for group in groups for p in group["params"]}
    assert optimized == {id(p) for p in transformer.parameters() if p.requires_grad}


def test_an_optimizer_without_the_projector_ends_the_run_before_its_first_step(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from crepa_trainer import state as student
    from crepa_trainer.families import TrainingFamily

    def without_projector(transformer: Any, *rates: float) -> list[dict[str, Any]]:
        return [{"params": [*trained_parameters(transformer).values()], "lr": rates[0]}]

    monkeypatch.setattr(student, "parameter_groups", without_projector)
    settings = tiny_settings(models, tmp_path)
    with pytest.raises(ValueError, match="are not in the optimizer"):
        student.make_state(Accelerator(cpu=True), TrainingFamily.of(settings.model), settings, tiny_config(models))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixed_precision = fp16 needs a GPU"):
        train(tiny_settings(models, tmp_path / "run", mixed_precision="fp16"), tiny_config(models))


def test_a_lora_target_that_no_layer_has_is_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_targets: to_x is no layer of WanTransformer3DModel"):
        train(tiny_settings(models, tmp_path / "run", lora_targets=["to_q", "to_x"]), tiny_config(models))


@pytest.mark.parametrize("target", ["norm2", "blocks", "attn1"])
def test_a_lora_target_that_takes_none_is_named_by_the_plan(models: Path, target: str) -> None:
    from crepa_trainer.families import TrainingFamily
    from crepa_trainer.reporting.plan import count_parameters

    settings = tiny_settings(models, models, lora_targets=["to_q", target])
    with pytest.raises(ValueError, match=rf"lora_targets: {target} is a \w+, and only linear and convolution"):
        count_parameters(settings, TrainingFamily.of(settings.model))


def test_pixels_teach_through_the_encoder(models: Path, tmp_path: Path) -> None:
    config = tiny_config(models, crepa_encoder_image_size=28)
    rows = train(tiny_settings(models, tmp_path / "run", max_train_steps=2), config, TinyClips(pixels=True))
    assert len(column(rows, "crepa_similarity")) == 2


def test_without_crepa_a_run_trains_all_the_same(models: Path, tmp_path: Path) -> None:
    rows = train(tiny_settings(models, tmp_path / "run"), tiny_config(models, crepa_enabled=False))
    assert not [name for name in rows[0] if name.startswith("crepa")]
    assert not (tmp_path / "run" / "trained" / "crepa_projector.safetensors").exists()


def test_losses_do_not_depend_on_checkpointing_of_gradients(models: Path, tmp_path: Path) -> None:
    rows = [
        train(tiny_settings(models, tmp_path / str(on), gradient_checkpointing=on), tiny_config(models))
        for on in (False, True)
    ]
    # Recomputed activations are the same numbers on a CPU.
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_as_others_do(models: Path, tmp_path: Path, checkpointing: bool) -> None:
    rows = [
        train(
            tiny_settings(models, tmp_path / str(on), compile_blocks=on, gradient_checkpointing=checkpointing),
            tiny_config(models),
        )
        for on in (False, True)
    ]
    for one, other in zip(*rows, strict=True):
        for name in ("loss", "crepa_similarity", "grad_norm"):
            # Compiled kernels round fp32 otherwise.
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4), (one["step"], name)


def test_a_lora_learns_in_bf16(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        models, tmp_path / "run", mixed_precision="bf16", max_train_steps=25, projector_learning_rate=3e-2
    )
    similarity = column(train(settings, tiny_config(models), TinyClips(1, 0)), "crepa_similarity")
    assert similarity[-1] > similarity[0] + 0.15


def test_clips_that_are_conditioned_are_masked_in_loss_and_crepa() -> None:
    from crepa_trainer.families.noise import NoisyLatents
    from crepa_trainer.step import flow_matching_loss

    prediction, target = torch.zeros(2, 4, 3, 2, 2), torch.ones(2, 4, 3, 2, 2)
    target[:, :, 0] = 100.0
    mask = torch.tensor([[False, True, True], [False, True, False]])
    target[1, :, 2] = 50.0
    target[0, :, 1] = 2.0
    noisy = NoisyLatents(prediction, torch.zeros(2), target, mask)
    assert float(flow_matching_loss(prediction, noisy)) == pytest.approx((4 + 1 + 1) / 3)


def test_an_output_with_checkpoints_is_not_trained_over(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=1)
    train(settings, tiny_config(models))
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        train(settings, tiny_config(models))

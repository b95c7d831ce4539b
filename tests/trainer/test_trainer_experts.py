"""Wan 2.2's two transformers: which is trained, at which noise levels, and what is exported and sampled with."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.checkpoint import find_checkpoint, run_identity
from crepa_trainer.cli import main
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.noise import scheduler_shift, shifted
from crepa_trainer.run import make_accelerator, show_plan
from crepa_trainer.state import make_state
from diffusers import WanPipeline, WanTransformer3DModel
from rich.console import Console
from tiny_hub_folders import BOUNDARY, save_tiny_wan_experts
from tiny_pipelines import save_tiny_wan_pipeline
from training_runs import TinyClips, tiny_config, tiny_settings, train
from videos import moving_square, write_video

from crepa_kernels.regularizer.offloading import offloading_groups


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_dinov2

    folder = tmp_path_factory.mktemp("models")
    save_tiny_wan_experts(folder / "wan")
    tiny_dinov2(folder / "dinov2")
    return folder


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    return torch.randn(40_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("expert", ["high", "low"])
def test_noise_levels_are_those_of_one_side_of_the_boundary(models: Path, draws: torch.Tensor, expert: str) -> None:
    family = TrainingFamily.of(str(models / "wan"), expert=expert)
    levels = family.noise_level(draws, (4, 3, 4, 6))
    high = expert == "high"
    assert bool(((levels >= BOUNDARY) == high).all())
    # As though all levels were drawn and those of the other side drawn again.
    every = shifted(draws.sigmoid(), scheduler_shift(family.configs["scheduler"]))
    expected = every[(every >= BOUNDARY) == high]
    at = torch.linspace(0.02, 0.98, 25)
    # About 18 000 draws on each side: a quantile is known to within 0.01 of the share, here less than as much in level.
    torch.testing.assert_close(levels.quantile(at), expected.quantile(at), atol=0.015, rtol=0)


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_no_draw_crosses_the_boundary_of_the_pipeline(models: Path, tmp_path: Path, boundary: float) -> None:
    folder = _changed(models / "wan", tmp_path / "wan", boundary_ratio=boundary)
    far = torch.tensor([-40.0, -9.0, 0.0, 9.0, 40.0])
    for expert in ("high", "low"):
        family = TrainingFamily.of(folder, expert=expert)
        batch = {"latents": torch.randn(5, 4, 3, 4, 6)}
        noisy = family.noisy(batch, torch.randn(5, 4, 3, 4, 6), family.noise_level(far, (4, 3, 4, 6)))
        # The pipeline's own comparison.
        assert bool(((noisy.timestep >= boundary * 1000) == (expert == "high")).all())
        assert noisy.latents.isfinite().all()


def test_the_named_transformer_is_trained_and_both_are_sampled_with(models: Path) -> None:
    weights = {}
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        family = TrainingFamily.of(str(models / "wan"), expert=expert)
        loaded = family.load_transformer(torch.bfloat16)
        weights[part] = WanTransformer3DModel.from_pretrained(models / "wan" / part).proj_out.weight
        torch.testing.assert_close(loaded.proj_out.weight, weights[part].bfloat16())
        pipeline = family.pipeline(loaded, family.load_vae(torch.float32))
        assert getattr(pipeline, part) is loaded
        other = pipeline.transformer_2 if expert == "high" else pipeline.transformer
        assert other.proj_out.weight.dtype == torch.bfloat16
        assert not other.training
        assert not any(parameter.requires_grad for parameter in other.parameters())
        assert not torch.equal(other.proj_out.weight, loaded.proj_out.weight)
        assert pipeline.config.boundary_ratio == BOUNDARY
    assert not torch.equal(weights["transformer"], weights["transformer_2"])


def test_the_other_transformer_is_kept_as_the_trained_one_is(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        models, tmp_path / "run", expert="high", mixed_precision="bf16", base_precision="fp8", offload="block"
    )
    family = TrainingFamily.of(settings.model, expert="high")
    for state in (AcceleratorState, GradientState):
        state._reset_state(True) if state is AcceleratorState else state._reset_state()
    trained = make_state(make_accelerator(settings), family, settings, tiny_config(models)).transformer
    other = family.pipeline(trained, family.load_vae(torch.float32)).transformer_2
    assert other.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert len(offloading_groups(other.blocks)) == 3


def test_the_whole_low_transformer_is_exported_under_its_own_name(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", expert="low", training="full", max_train_steps=1)
    train(settings, tiny_config(models), TinyClips(1, 0))
    trained = tmp_path / "run" / "trained"
    assert not (trained / "transformer").exists()
    exported = WanTransformer3DModel.from_pretrained(trained, subfolder="transformer_2")
    before = WanTransformer3DModel.from_pretrained(models / "wan", subfolder="transformer_2")
    change = (exported.proj_out.weight - before.proj_out.weight).abs().max()
    assert 0 < change < 0.1  # one step at a learning rate of 0.01
    assert isinstance(WanPipeline.from_pretrained(models / "wan", transformer_2=exported), WanPipeline)


def test_a_run_of_one_expert_does_not_go_on_from_one_of_the_other(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", expert="low", max_train_steps=1)
    train(settings, tiny_config(models), TinyClips(1, 0))
    other = tiny_settings(models, tmp_path / "run", expert="high", max_train_steps=2, resume="latest")
    with pytest.raises(ValueError, match=r'expert = "high" \(checkpoint: "low"\)'):
        find_checkpoint(other, run_identity(other, tiny_config(models), 1))


def _changed(folder: Path, target: Path, **changes: object) -> str:
    shutil.copytree(folder, target)
    file = target / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(target)


def test_an_expert_must_be_named_where_there_are_two_and_not_where_there_is_one(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two transformers.*set expert to high .*boundary_ratio = 0\.875.* or low"):
        TrainingFamily.of(str(models / "wan"))
    one = str(save_tiny_wan_pipeline(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"expert = high: .* has one transformer"):
        TrainingFamily.of(one, expert="high")
    without = _changed(models / "wan", tmp_path / "without", boundary_ratio=None)
    with pytest.raises(ValueError, match="two transformers and no boundary_ratio"):
        TrainingFamily.of(without, expert="low")
    shutil.rmtree(tmp_path / "without" / "transformer_2")
    with pytest.raises(ValueError, match="lacks transformer_2"):
        TrainingFamily.of(without, expert="low")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "set expert to high"),
        (["--expert", "middle"], 'expert = "middle": which of two transformers is trained'),
        (["--expert", "high", "--task", "image2video"], "is a text-to-video model"),
    ],
)
def test_a_wrong_expert_is_one_line_of_the_command(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = ["--model", str(models / "wan"), "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    assert main(["run", *given, "--max_train_steps", "1", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_the_plan_says_which_transformer_is_trained(models: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "0.mp4", moving_square(9))
    (tmp_path / "videos" / "0.txt").write_text("a video")
    said = io.StringIO()
    settings = tiny_settings(models, tmp_path / "run", data=str(tmp_path / "videos"), expert="low")
    show_plan(settings, tiny_config(models), Console(file=said, width=200))
    assert "transformer_2, the low noise levels" in said.getvalue()

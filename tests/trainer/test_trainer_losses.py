"""What runs train with beside the plain CREPA: iREPA and LayerSync, each and all together."""

from __future__ import annotations

import argparse
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from crepa_trainer.data.dataset import find_clips
from crepa_trainer.data.sampler import ClipOrder, MicroBatches, Position
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.plan import make_plan, projector_bytes
from crepa_trainer.reporting.table import print_plan
from crepa_trainer.run import make_accelerator
from crepa_trainer.settings import RunSettings, add_arguments, given_values, load_settings
from crepa_trainer.state import TrainState, make_state
from crepa_trainer.state_files import json_digest
from crepa_trainer.step import training_step
from memory import saved_bytes
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_wan, wan_inputs
from training_runs import TinyClips, tiny_config, tiny_settings, train, train_elsewhere
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig, CrepaRegularizer, LayerSync

LAYERSYNC = {"layersync_enabled": True, "layersync_student_block": 0, "layersync_teacher_block": 2}
IREPA = {"irepa_enabled": True}
OFF = {"crepa_enabled": False}


@pytest.mark.parametrize(
    ("config", "settings"), [(IREPA, {}), (OFF, LAYERSYNC), (IREPA, LAYERSYNC)], ids=["iREPA", "LayerSync", "all"]
)
def test_a_run_trains_logs_and_saves_with_it(
    models: Path, tmp_path: Path, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    run = tiny_settings(models, tmp_path / "run", checkpoint_every=2, **settings)
    rows = train(run, tiny_config(models, **config), TinyClips(2, 0))
    assert len(rows) == 4
    for row in rows:
        parts = [row.get("flow_loss", 0.0), row.get("crepa_loss", 0.0), row.get("layersync_loss", 0.0)]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert ("layersync_similarity" in row) == bool(settings)
        assert ("crepa_similarity" in row) == (config is not OFF)
    assert not settings or rows[0]["layersync_loss"] == pytest.approx(-0.2 * rows[0]["layersync_similarity"])
    shapes = {name: tensor.shape for name, tensor in load_file(_projector(run)).items()} if config is not OFF else {}
    assert not shapes or set(shapes) == {"0.weight", "0.bias"}
    assert not shapes or shapes["0.weight"] == (32, 32, 3, 3)


def _projector(settings: RunSettings) -> Path:
    return next(iter(sorted((settings.output / "trained").rglob("crepa_projector.safetensors"))))


def test_the_steps_gradient_is_the_sum_of_its_losses(models: Path, tmp_path: Path) -> None:
    family = TrainingFamily.of(str(models / "wan"))
    clips: Any = TinyClips(1, 0)
    order = ClipOrder([key.bucket for key in clips.keys], batch_size=1, accumulation=2)
    position = Position(1, 0, 0)
    # The first of two micro-batches, so that its gradients stay.
    batch = MicroBatches(clips, order, family.noise_level)[position, True]

    def gradients(crepa: bool, layersync: bool) -> dict[str, torch.Tensor]:
        settings = tiny_settings(
            models, tmp_path, gradient_accumulation_steps=2, layersync_lambda=0.4, **LAYERSYNC | {"training": "full"}
        )
        torch.manual_seed(0)  # the projector's weights
        state = make_state(make_accelerator(settings), family, settings, tiny_config(models, **IREPA))
        if not crepa:
            state.crepa = None
        if not layersync:
            state.layersync = None
        training_step(state, family, batch, position)
        return {name: p.grad.clone() for name, p in state.transformer.named_parameters() if p.grad is not None}

    alone = gradients(False, False)
    with_crepa, with_layersync, together = gradients(True, False), gradients(False, True), gradients(True, True)
    assert together.keys() == alone.keys() | with_crepa.keys() | with_layersync.keys()
    changed = 0
    for name, gradient in together.items():
        parts = [each.get(name, torch.zeros_like(gradient)) for each in (with_crepa, with_layersync, alone)]
        # fp32 sums in another order.
        torch.testing.assert_close(gradient, parts[0] + parts[1] - parts[2], rtol=1e-4, atol=1e-6)
        changed += not torch.equal(parts[1], parts[2])
    assert changed, "LayerSync has no gradient"


def test_layersync_alone_has_its_states_and_lets_go_of_them(models: Path, tmp_path: Path) -> None:
    transformer = tiny_wan()
    layersync = LayerSync(LAYERSYNC, transformer)
    optimizer = torch.optim.SGD(transformer.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state = TrainState(Accelerator(cpu=True), transformer, None, optimizer, scheduler, layersync=layersync)
    family, clips = TrainingFamily.of(str(models / "wan")), TinyClips(1, 0)
    order = ClipOrder([key.bucket for key in clips.keys], batch_size=1, accumulation=1)
    batches = MicroBatches(clips, order, family.noise_level)  # type: ignore[arg-type]
    logs = training_step(state, family, batches[Position(0, 0, 0), False], Position(0, 0, 0))
    assert {"layersync_loss", "layersync_similarity"} <= logs.keys()
    with pytest.raises(ValueError, match=r"not called before loss\(\) since release"):
        layersync.loss()


@pytest.mark.parametrize(("config", "settings"), [({}, LAYERSYNC), (IREPA, {})], ids=["LayerSync", "iREPA"])
def test_another_loss_is_another_run(
    models: Path, tmp_path: Path, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    given = {"max_train_steps": 1, "checkpoint_every": 1}
    train(tiny_settings(models, tmp_path / "run", **given), tiny_config(models), TinyClips(1, 0))
    again = tiny_settings(models, tmp_path / "run", resume="latest", **given, **settings)
    with pytest.raises(ValueError, match=r"other settings: .*(layersync|irepa)_enabled = true \(checkpoint: f"):
        train(again, tiny_config(models, **config), TinyClips(1, 0))


def test_a_checkpoint_of_before_these_losses_is_gone_on_from(models: Path, tmp_path: Path) -> None:
    given = {"max_train_steps": 2, "checkpoint_every": 1}
    whole = train(tiny_settings(models, tmp_path / "whole", **given), tiny_config(models), TinyClips(1, 0))
    settings = tiny_settings(models, tmp_path / "run", **{**given, "max_train_steps": 1})
    train(settings, tiny_config(models), TinyClips(1, 0))
    file = next((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.json"
    state = json.loads(file.read_text())
    identity = {k: v for k, v in state["identity"].items() if not k.startswith(("irepa_", "layersync_"))}
    assert len(identity) < len(state["identity"])
    del state["digest"]
    state["identity"] = identity
    file.write_text(json.dumps({**state, "digest": json_digest(state)}))
    again = tiny_settings(models, tmp_path / "run", resume="latest", **given)
    assert train(again, tiny_config(models), TinyClips(1, 0)) == whole


@pytest.mark.slow
def test_a_killed_run_with_all_of_them_goes_on_as_if_it_had_not_stopped(models: Path, tmp_path: Path) -> None:
    given = {"max_train_steps": 6, "checkpoint_every": 2, "gradient_accumulation_steps": 2, **LAYERSYNC}
    config = tiny_config(models, crepa_scheduler="cosine", crepa_warmup_steps=1, crepa_cutoff_step=5, **IREPA)
    whole = train(tiny_settings(models, tmp_path / "whole", **given), config, TinyClips(1, 0))
    settings = tiny_settings(models, tmp_path / "killed", **given)
    killed = train_elsewhere(settings, config, wide=1, tall=0, kill_at=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    rows = train(settings.model_copy(update={"resume": "latest"}), config, TinyClips(1, 0))
    assert rows == whole
    assert "layersync_loss" in rows[-1]
    assert "crepa_loss" not in rows[-1]


# Settings and plan


def from_words(*words: str, config: Path | None = None) -> tuple[RunSettings, CrepaConfig]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    given, rest = parser.parse_known_args(words)
    return load_settings(config, given_values(given), rest=rest)


REQUIRED = {"model": "wan", "data": "videos", "output": "out", "max_train_steps": 10}


def test_a_file_and_the_command_line_give_them(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    crepa = {"crepa_enabled": True, "crepa_block_index": 1, "irepa_enabled": True}
    file.write_text(json.dumps({**REQUIRED, **LAYERSYNC, **crepa}))
    words = ["--layersync_lambda", "0.5", "--irepa_projector_kernel_size", "5", "--irepa_spatial_norm_alpha=0.8"]
    settings, config = from_words(*words, config=file)
    assert settings.layersync.to_dict() == {**LAYERSYNC, "layersync_lambda": 0.5}
    assert (config.irepa_enabled, config.irepa_projector_kernel_size, config.irepa_spatial_norm_alpha) == (True, 5, 0.8)
    assert RunSettings(**json.loads(settings.model_dump_json())) == settings


@pytest.mark.parametrize("key", ["urepa_enabled", "urepa_lambda"])
def test_u_repas_keys_are_told_where_they_belong(key: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**REQUIRED, key: 1}))
    for given in ((), (f"--{key}", "1")):
        with pytest.raises(ValueError, match=rf"{key}.*: U-REPA is for UNets, and crepa-train .* with the keys crepa_"):
            from_words(*given, config=None if given else file)


def test_the_help_has_each_option_once_and_layersyncs_in_a_group_of_their_own() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    text = parser.format_help()
    # With its underscores, of the usage and of its group.
    for key in (*LAYERSYNC, "layersync_lambda", "irepa_enabled", "irepa_projector_kernel_size"):
        assert text.count(f"--{key} ") + text.count(f"--{key}]") == 2, key
    assert text.index("\nCREPA:") < text.index("\n  --crepa_enabled") < text.index("\n  --irepa_enabled")
    assert text.index("\n  --irepa_enabled") < text.index("\nLayerSync:") < text.index("\n  --layersync_enabled")


def test_options_that_do_nothing_are_a_warning_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    load_settings(None, {**REQUIRED, "layersync_lambda": 0.5})
    (told,) = caplog.records
    assert told.getMessage() == (
        "LayerSync is OFF: layersync_enabled is not given, without which layersync_lambda does nothing"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", moving_square(12, 32, 48))
    (folder / "a.txt").write_text("a square")
    return folder


def planned(models: Path, data: Path, config: dict[str, Any], **settings: Any) -> Any:
    """The plan of a run, and what is printed of it."""
    run = tiny_settings(models, data / "out", data=str(data), **settings)
    family = TrainingFamily.of(run.model)
    plan = make_plan(run, tiny_config(models, crepa_encoder_image_size=70, **config), family, find_clips(run, family))
    console = Console(width=200, file=io.StringIO())
    print_plan(console, plan)
    return plan, " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_plan_says_what_they_do_and_cost(models: Path, data: Path) -> None:
    plan, text = planned(models, data, IREPA, **LAYERSYNC)
    assert plan.memory.projector == projector_bytes(32, 32, plan.config) == 16 * (9 * 32 * 32 + 32)
    assert "iREPA projector a convolution of 3x3 tokens, teacher less 0.6 of each frame's mean" in text
    assert "LayerSync block 0 learns from block 2 of 0 to 2, weight 0.2" in text
    alone, text = planned(models, data, OFF, **LAYERSYNC)
    assert alone.memory is None
    assert alone.layersync == plan.layersync > 0
    assert "CREPA off" in text
    assert "LayerSync" not in planned(models, data, {})[1]
    stray = {"irepa_projector_kernel_size": 5, "crepa_relational_pairs": "all"}
    text = planned(models, data, stray)[1]
    assert "iREPA OFF: irepa_enabled is not given, without which irepa_projector_kernel_size does nothing" in text
    assert "relational loss OFF: crepa_relational_weight is not given, without which crepa_relational_pairs" in text


@pytest.mark.parametrize("key", ["layersync_student_block", "layersync_teacher_block"])
def test_the_plan_refuses_a_block_that_the_model_lacks(models: Path, data: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} = 7: .*has 3 blocks, valid are 0 to 2"):
        planned(models, data, OFF, **{**LAYERSYNC, key: 7})


def test_the_plans_memory_is_what_the_losses_keep(models: Path, data: Path) -> None:
    plan, _ = planned(models, data, IREPA, **LAYERSYNC)
    transformer = tiny_wan()
    crepa = CrepaRegularizer(plan.config, transformer, feature_size=32)
    layersync = LayerSync(plan.settings.layersync, transformer)
    outputs: list[torch.Tensor] = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    transformer(**wan_inputs())
    features = torch.randn(1, 3, 25, 32)
    beside = [crepa.captured().hidden_states, *crepa.projector.parameters()]
    kept = saved_bytes(lambda: crepa.loss(step=0, features=features, feature_grid=(5, 5))[0], beside)
    assert kept == pytest.approx(plan.memory.kept, rel=0.1)
    assert saved_bytes(lambda: layersync.loss()[0], outputs) == pytest.approx(plan.layersync, rel=0.1)

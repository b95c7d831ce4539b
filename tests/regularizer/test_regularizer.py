"""CREPA on a stock Wan transformer: a training step, its counters, logs and masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from memory import saved_bytes
from peft import LoraConfig, get_peft_model
from tiny import clip_pixels, is_captured, pixel_frames, tiny_dinov2, tiny_vae, tiny_wan, wan_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_kernels import CrepaConfig, CrepaRegularizer, available_backends, crepa_loss, relational_loss
from crepa_kernels.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD

CONFIG: dict[str, Any] = {
    "crepa_enabled": True,
    "crepa_block_index": 1,
    "crepa_lambda": 0.5,
    "crepa_encoder_image_size": 70,
}
METRICS = {"crepa_loss", "crepa_similarity", "crepa_similarity_self", "crepa_alignment_score"}
ALWAYS = {"crepa_weight", "crepa_cutoff"}


def refuse_to_load() -> Any:
    pytest.fail("nothing should have been loaded")


def regularizer(transformer: WanTransformer3DModel, *, vae: Any = None, encoder: Any = None, **options: Any) -> Any:
    """On ``crepa_*`` options over CONFIG, with a tiny encoder; other options go to the constructor."""
    settings = {key: options.pop(key) for key in list(options) if key.startswith("crepa_")}
    encoder = tiny_dinov2() if encoder is None else encoder
    torch.manual_seed(0)  # the projector's weights
    return CrepaRegularizer({**CONFIG, **settings}, transformer, vae, encoder, **options)


def latents(batch: int = 1, frames: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, frames, 4, 6, generator=torch.Generator().manual_seed(5))


def features(batch: int = 1, frames: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, frames, 6, size, generator=torch.Generator().manual_seed(6))


# One step


def test_the_users_loop_trains_transformer_and_projector() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, vae=tiny_vae(), max_train_steps=1000)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-2)
    before = [p.detach().clone() for p in crepa.projector.parameters()]
    similarity = []
    for step in range(8):
        prediction = transformer(**wan_inputs())[0]
        aux, logs = crepa.loss(step=step, latents=latents())
        (prediction.square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        similarity.append(float(logs["crepa_similarity"]))
    assert all(not torch.equal(a, b) for a, b in zip(before, crepa.projector.parameters(), strict=True))
    assert similarity[-1] > similarity[0] + 0.1
    assert crepa.frames_decoded == 8 * 9
    assert crepa.frames_encoded == 8 * 3


class OurOperators(TorchDispatchMode):
    """The names of this package's operators that run: the reference has none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "crepa_kernels":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "torch", "triton", "reference"])
def test_the_loss_is_computed_by_the_backend_of_the_settings(backend: str) -> None:
    if backend not in ("auto", *available_backends()):
        pytest.skip("Triton does not run here")
    transformer = tiny_wan()
    crepa = regularizer(transformer, crepa_backend=backend)
    transformer(**wan_inputs())
    with OurOperators() as ours:
        crepa.loss(step=0, features=features())
    assert ("align_rows" in ours.names) == (backend in ("auto", "torch"))
    assert ("frame_alignment" in ours.names) == (backend == "triton")
    assert backend != "reference" or not ours.names


@pytest.mark.parametrize("source", ["features", "pixels", "latents", "backbone"])
def test_the_loss_is_that_of_the_captured_states_and_the_teachers_frames(source: str) -> None:
    transformer, encoder, vae = tiny_wan(), tiny_dinov2(), tiny_vae()
    options = {
        "crepa_adjacent_distance": 2,
        "crepa_adjacent_tau": 0.7,
        "crepa_cumulative_neighbors": True,
        "crepa_normalize_neighbour_sum": True,
        "crepa_normalize_by_frames": False,
        "crepa_spatial_align": False,
    }
    if source == "backbone":
        options |= {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 2}
    crepa = regularizer(transformer, vae=vae, encoder=encoder, **options)
    outputs: list[torch.Tensor] = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    transformer(**wan_inputs(batch=2))

    pixels = clip_pixels(2)
    given = {
        "features": {"features": features(2)},
        "pixels": {"pixels": pixels},
        "latents": {"latents": latents(2)},
        "backbone": {},
    }[source]
    aux, logs = crepa.loss(step=0, **given)

    grid = (2, 3)
    if source == "features":
        teacher = features(2)
    elif source == "backbone":
        teacher = outputs[2].unflatten(1, (3, 6))
    else:
        if source == "latents":
            config = vae.config
            mean, std = (torch.tensor(s).view(1, 4, 1, 1, 1) for s in (config.latents_mean, config.latents_std))
            with torch.no_grad():
                pixels = (vae.decode(latents(2) * std + mean).sample / 2 + 0.5).transpose(1, 2)
        frames = pixels[:, [0, 4, 8]].flatten(0, 1).float() / (255 if source == "pixels" else 1)
        images = torch.nn.functional.interpolate(frames, (70, 70), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            teacher = encoder((images - mean) / std).last_hidden_state[:, 1:].unflatten(0, (2, 3))
        grid = (5, 5)
    expected = crepa_loss(
        outputs[1].unflatten(1, (3, 6)),
        teacher,
        crepa.projector,
        student_grid=(2, 3),
        teacher_grid=grid,
        distance=2,
        tau=0.7,
        cumulative=True,
        normalize_neighbour_sum=True,
        normalize_by_frames=False,
        spatial_align="pool",
        backend="reference",
    )
    close = {"rtol": 1e-4, "atol": 1e-5}  # another backend, another batch size
    torch.testing.assert_close(aux, 0.5 * expected.loss, **close)
    torch.testing.assert_close(logs["crepa_loss"], aux.detach(), rtol=0, atol=0)
    torch.testing.assert_close(logs["crepa_similarity"], expected.similarity, **close)
    torch.testing.assert_close(logs["crepa_similarity_self"], expected.self_similarity, **close)
    torch.testing.assert_close(logs["crepa_alignment_score"], expected.alignment_score, **close)


@pytest.mark.parametrize("margin", [None, 0.1])
def test_relations_are_added_by_both_of_their_weights(margin: float | None) -> None:
    """Of the same states, features, masks and grids; the gradient is that of the sum."""
    mask = torch.tensor([[True, True, False]])
    options = {"crepa_adjacent_tau": 0.7, "crepa_relational_weight": 0.3, "crepa_relational_margin": margin}
    found = {}
    for name, given in (("both", options), ("alone", {"crepa_adjacent_tau": 0.7})):
        transformer = tiny_wan()
        crepa = regularizer(transformer, **given)
        transformer(**wan_inputs())
        student = crepa.captured()
        aux, logs = crepa.loss(step=0, features=features(), frame_mask=mask)
        gradient = torch.autograd.grad(aux, crepa.projector[1].weight, retain_graph=True)[0]
        found[name] = (aux, logs, gradient)
    grids = {"student_grid": (2, 3), "teacher_grid": (2, 3)}
    how = {"pairs": "neighbours", "tau": 0.7, "margin": margin, "frame_mask": mask}
    expected = 0.5 * 0.3 * relational_loss(student.hidden_states, features(), crepa.projector, **grids, **how)
    (aux, logs, gradient), (alone, without, other) = found["both"], found["alone"]
    assert logs.keys() - without.keys() == {"crepa_relational_loss"}
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(logs["crepa_relational_loss"], expected.detach(), **close)
    torch.testing.assert_close(logs["crepa_loss"], without["crepa_loss"], **close)
    torch.testing.assert_close(aux, alone + expected, **close)
    weight = crepa.projector[1].weight
    torch.testing.assert_close(gradient, other + torch.autograd.grad(expected, weight)[0], rtol=1e-4, atol=1e-7)


def test_relations_that_are_off_cost_nothing() -> None:
    names = []
    for weight in (0.0, 1.0):
        transformer = tiny_wan()
        crepa = regularizer(transformer, crepa_relational_weight=weight)
        transformer(**wan_inputs())
        with OurOperators() as ours:
            crepa.loss(step=0, features=features())
        names.append(ours.names)
    assert "relate_frames" not in names[0]
    assert "relate_frames" in names[1]


def test_logs_are_detached_tensors_but_for_weight_and_cutoff() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, crepa_similarity_threshold=0.9)
    transformer(**wan_inputs())
    aux, logs = crepa.loss(step=0, features=features())
    assert set(logs) == METRICS | ALWAYS | {"crepa_similarity_ema"}
    assert (type(logs["crepa_weight"]), type(logs["crepa_cutoff"])) == (float, bool)
    for key in set(logs) - ALWAYS:
        assert logs[key].shape == ()
        assert not logs[key].requires_grad
    assert math.isnan(logs["crepa_similarity_ema"])  # before its first value
    assert aux.requires_grad


@pytest.mark.parametrize("align", [True, False, "teacher", "smaller"])
def test_every_token_of_every_frame_has_a_gradient(align: bool | str) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, crepa_spatial_align=align)
    outputs: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    transformer(**wan_inputs(height=16, width=20))
    outputs[0].retain_grad()
    aux, _ = crepa.loss(step=0, pixels=clip_pixels())
    aux.backward()
    assert outputs[0].grad is not None
    assert (outputs[0].grad.abs().amax(dim=-1) > 0).all()


def test_recomputing_keeps_less_and_gives_the_same() -> None:
    found = []
    for recompute in (False, True):
        transformer = tiny_wan()
        crepa = regularizer(transformer, crepa_recompute=recompute, crepa_backend="torch")
        transformer(**wan_inputs())
        losses: list[torch.Tensor] = []

        def loss(crepa: CrepaRegularizer = crepa, losses: list[torch.Tensor] = losses) -> torch.Tensor:
            losses.append(crepa.loss(step=0, features=features())[0])
            return losses[0]

        kept = saved_bytes(loss, [crepa.captured().hidden_states, *transformer.parameters()])
        losses[0].backward()
        found.append((kept, losses[0], [each.grad for each in transformer.parameters() if each.grad is not None]))
    (much, one, gradients), (little, other, same) = found
    assert little < much
    assert torch.equal(one, other)
    assert all(torch.equal(*each) for each in zip(gradients, same, strict=True))


# What runs and what does not


def test_81_frames_of_21_latents_encode_21() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, vae=tiny_vae())
    assert pixel_frames(21) == 81
    transformer(**wan_inputs(frames=21))
    crepa.loss(step=0, pixels=clip_pixels(1, 81))
    assert (crepa.frames_encoded, crepa.frames_decoded) == (21, 0)
    crepa.loss(step=0, latents=latents(frames=21))
    assert (crepa.frames_encoded, crepa.frames_decoded) == (42, 81)


@pytest.mark.parametrize(
    ("options", "steps", "cutoff"),
    [
        ({"crepa_lambda": 0.0}, (0, 5), False),
        ({"crepa_warmup_steps": 10}, (0,), False),
        ({"crepa_cutoff_step": 3}, (3, 4), True),
        ({"crepa_scheduler": "linear", "crepa_decay_steps": 2}, (2, 9), False),
    ],
)
def test_weight_0_loads_and_runs_nothing(options: dict[str, Any], steps: tuple[int, ...], cutoff: bool) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, vae=refuse_to_load, encoder=refuse_to_load, feature_size=32, **options)
    for step in steps:
        prediction = transformer(**wan_inputs())[0]
        aux, logs = crepa.loss(step=step, latents=latents(), pixels=clip_pixels())
        assert set(logs) == ALWAYS
        assert (logs["crepa_weight"], logs["crepa_cutoff"]) == (0.0, cutoff)
        assert float(aux) == 0.0
        (prediction.square().mean() + aux).backward()
    assert (crepa.frames_encoded, crepa.frames_decoded) == (0, 0)
    assert not any(p.grad.any() for p in crepa.projector.parameters())


def test_after_a_final_cutoff_nothing_is_captured_any_more() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, crepa_cutoff_step=2)
    captured = []
    for step in range(4):
        transformer(**wan_inputs())
        captured.append(is_captured(crepa))
        crepa.loss(step=step, features=features())
    # The forward of step 2 comes before anything can know that it is step 2.
    assert captured == [True, True, True, False]


def test_warm_up_is_captured_from_its_first_step() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, crepa_warmup_steps=4)
    weights = []
    for step in range(3):
        transformer(**wan_inputs())
        weights.append(crepa.loss(step=step, features=features())[1]["crepa_weight"])
    assert weights == [0.0, 0.125, 0.25]


def test_backbone_mode_and_given_features_load_nothing(tmp_path: Path) -> None:
    transformer = tiny_wan()
    crepa = regularizer(
        transformer,
        vae=refuse_to_load,
        encoder=str(tmp_path / "nowhere"),
        crepa_use_backbone_features=True,
        crepa_teacher_block_index=2,
    )
    assert (crepa.projector.hidden_size, crepa.projector.feature_size) == (32, 32)
    transformer(**wan_inputs())
    assert crepa.loss(step=0, latents=latents())[0].requires_grad
    crepa.remove()

    crepa = regularizer(transformer, vae=refuse_to_load, encoder=refuse_to_load, feature_size=8)
    transformer(**wan_inputs())
    assert crepa.loss(step=0, latents=latents(), features=features(size=8))[0].requires_grad


def test_the_teaching_block_gets_no_gradient() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, crepa_use_backbone_features=True, crepa_teacher_block_index=2)
    transformer(**wan_inputs())
    crepa.loss(step=0)[0].backward()
    reached = {int(n.split(".")[1]) for n, p in transformer.named_parameters() if "blocks" in n and p.grad is not None}
    assert reached == {0, 1}


def test_folders_are_enough(tmp_path: Path) -> None:
    tiny_vae(tmp_path / "vae")
    tiny_dinov2(tmp_path / "encoder")
    config = CrepaConfig(**CONFIG, crepa_encoder=str(tmp_path / "encoder"))
    results = []
    for vae, encoder in ((tmp_path, None), (tiny_vae(), tiny_dinov2())):
        transformer = tiny_wan()
        torch.manual_seed(0)
        crepa = CrepaRegularizer(config, transformer, vae, encoder)
        transformer(**wan_inputs())
        results.append(crepa.loss(step=0, latents=latents())[0])
    # Weights read from a file lie at other addresses, and products over them round differently.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_disabled_attaches_nothing() -> None:
    transformer = tiny_wan()
    keys, hooks = set(transformer.state_dict()), dict(transformer._forward_hooks)
    crepa = CrepaRegularizer({"crepa_enabled": False}, transformer, vae=refuse_to_load, encoder=refuse_to_load)
    assert (set(transformer.state_dict()), dict(transformer._forward_hooks)) == (keys, hooks)
    aux, logs = crepa.loss(step=0, latents=latents())
    assert (float(aux), logs, crepa.projector, crepa.state_dict()) == (0.0, {}, None, {})
    assert (crepa.frames_encoded, crepa.frames_decoded) == (0, 0)
    crepa.release()
    crepa.load_state_dict({})
    crepa.remove()


def test_a_peft_models_inner_transformer_can_be_given() -> None:
    wrapped = get_peft_model(tiny_wan(), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    crepa = regularizer(wrapped.get_base_model())
    wrapped(**wan_inputs())
    crepa.loss(step=0, features=features())[0].backward()
    assert all(p.grad is not None for p in crepa.projector.parameters())
    assert all(p in set(wrapped.parameters()) for p in crepa.projector.parameters())


# Cutoff by similarity


def aligned_features(crepa: Any, transformer: WanTransformer3DModel) -> torch.Tensor:
    """Features that the projector already makes: similarity 1."""
    transformer(**wan_inputs())
    with torch.no_grad():
        return crepa.projector(crepa.captured(1).hidden_states)


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_similarity_cutoff_stops_everything_and_probes_only_where_it_may_come_back(mode: str) -> None:
    transformer = tiny_wan()
    crepa = regularizer(
        transformer,
        crepa_similarity_threshold=0.9,
        crepa_similarity_ema_decay=0.0,
        crepa_threshold_mode=mode,
        crepa_probe_interval=3,
        crepa_adjacent_distance=0,
    )
    good, bad = aligned_features(crepa, transformer), features()
    seen = []
    for step in range(12):
        transformer(**wan_inputs())
        aux, logs = crepa.loss(step=step, features=good if step < 4 else bad)
        seen.append(logs["crepa_weight"])
        assert (set(logs) == ALWAYS | {"crepa_similarity_ema"}) == (logs["crepa_weight"] == 0)
        assert aux.requires_grad == (logs["crepa_weight"] > 0)
        if step >= 2:
            assert math.isfinite(logs["crepa_similarity_ema"])
    # Step 0's similarity decides from step 2 on; a probe at step 4 is read at step 6.
    off = 10 if mode == "permanent" else 4
    assert seen == [0.5] * 2 + [0.0] * off + [0.5] * (10 - off)


def test_micro_batches_of_a_step_count_once() -> None:
    transformer = tiny_wan()
    options = {"crepa_similarity_threshold": 1.0, "crepa_similarity_ema_decay": 0.5, "crepa_adjacent_distance": 0}
    crepa = regularizer(transformer, **options)
    good = aligned_features(crepa, transformer)
    mask = torch.tensor([[True, False, False]])
    for sign, frames in ((1, None), (-1, mask)):  # 3 frames of +1, one of -1
        transformer(**wan_inputs())
        crepa.loss(step=0, features=sign * good, frame_mask=frames)
    for step in (1, 2):
        transformer(**wan_inputs())
        _, logs = crepa.loss(step=step, features=good)
    torch.testing.assert_close(logs["crepa_similarity_ema"], torch.tensor((3 - 1) / 4))

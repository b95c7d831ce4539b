"""U-REPA on stock UNets: what is captured, the loss and its gradients, decoding, training, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from said import everything_said
from tiny import CHANNELS, tiny_dinov2, tiny_wan
from tiny_unets import TEXT, UNETS, WIDTH, tiny_kl, tiny_unet, unet_inputs
from torch.nn.parallel import DistributedDataParallel

from crepa_kernels import CrepaRegularizer, UrepaConfig, UrepaRegularizer, resample_tokens

ON: dict[str, Any] = {"urepa_enabled": True, "urepa_encoder_image_size": 70}
E = 6


def urepa_on(unet: Any, *, seed: int = 3, **settings: Any) -> UrepaRegularizer:
    torch.manual_seed(seed)  # the projector's weights
    return UrepaRegularizer({**ON, **settings}, unet, feature_size=E)


def features(height: int = 7, width: int = 7, *, batch: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, height, width, E, generator=torch.Generator().manual_seed(seed))


def adapted(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return unet


def trained_parameters(unet: Any) -> list[torch.nn.Parameter]:
    return [each for each in unet.parameters() if each.requires_grad]


def middles_of(unet: Any) -> list[torch.Tensor]:
    """A list that gets what the UNet's middle returns in each forward."""
    maps: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, args, output: maps.append(output))
    return maps


def plain_loss(
    states: torch.Tensor, y: torch.Tensor, projector: Any, *, onto: tuple[int, int], manifold: float
) -> torch.Tensor:
    """U-REPA by its definition, in fp64, for a map (B, C, h, w) and features (B, H, W, E)."""
    grid = (states.shape[2], states.shape[3])
    norm, linear = (copy.deepcopy(layer).double() for layer in projector)
    p = linear(norm(states.double().flatten(2).transpose(1, 2)))
    p = F.normalize(resample_tokens(p, grid, onto), dim=-1)
    y = F.normalize(resample_tokens(y.double().flatten(1, 2), (y.shape[1], y.shape[2]), onto), dim=-1)
    cosine = (p * y).sum(-1).mean()
    relations = (p @ p.transpose(1, 2) - y @ y.transpose(1, 2)).square().mean()
    return -cosine + manifold * relations


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=str)
def test_what_is_captured_is_the_middle_of_the_unet_on_its_own_grid(name: str, size: tuple[int, int]) -> None:
    unet = tiny_unet(name)
    seen = middles_of(unet)
    urepa = urepa_on(unet)
    unet(**unet_inputs(name, size=size))
    [middle] = seen
    states, layout = urepa.captured()
    assert layout.grid == tuple(middle.shape[2:])
    assert states.shape == (2, 1, middle.shape[2] * middle.shape[3], WIDTH)
    assert torch.equal(states[:, 0], middle.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("align", "onto"), [("teacher", (7, 5)), ("student", (4, 4)), ("smaller", (4, 4))], ids=lambda value: str(value)
)
@pytest.mark.parametrize("manifold", [3.0, 0.0])
def test_loss_and_gradients_are_those_of_the_definition(align: str, onto: tuple[int, int], manifold: float) -> None:
    unet = tiny_unet()
    urepa = urepa_on(unet, urepa_spatial_align=align, urepa_manifold_weight=manifold, urepa_lambda=0.7)
    y = features(7, 5)
    maps = middles_of(unet)
    unet(**unet_inputs())
    [middle] = maps
    loss, logs = urepa.loss(step=0, features=y)
    expected = 0.7 * plain_loss(middle, y, urepa.projector, onto=onto, manifold=manifold)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    # Through the whole UNet, once by each.
    inner = [each for name, each in unet.named_parameters() if name.startswith(("down_blocks", "mid_block"))]
    ours = torch.autograd.grad(loss, inner, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, inner, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6 + 1e-4 * float(other.abs().max()))
    assert logs["urepa_loss"] == loss.detach()
    assert logs["urepa_alignment_loss"] == -logs["urepa_similarity"]
    assert ("urepa_manifold_loss" in logs) == (manifold > 0)
    if manifold:
        assert float(logs["urepa_manifold_loss"]) > 1e-3
        total = 0.7 * (logs["urepa_alignment_loss"] + manifold * logs["urepa_manifold_loss"])
        torch.testing.assert_close(total, logs["urepa_loss"])


def test_gradients_of_the_projector_are_those_of_the_definition() -> None:
    unet = tiny_unet()
    urepa = urepa_on(unet)
    y = features()
    unet(**unet_inputs())
    states, layout = urepa.captured()
    middle = states[:, 0].detach().transpose(1, 2).unflatten(2, layout.grid)
    urepa.loss(step=0, features=y)[0].backward()
    plain = torch.nn.Sequential(*copy.deepcopy(list(urepa.projector))).double()  # type: ignore[arg-type]
    plain.zero_grad()
    p = F.normalize(resample_tokens(plain(middle.double().flatten(2).transpose(1, 2)), layout.grid, (7, 7)), dim=-1)
    t = F.normalize(y.double().flatten(1, 2), dim=-1)
    relations = (p @ p.transpose(1, 2) - t @ t.transpose(1, 2)).square().mean()
    (0.5 * (-(p * t).sum(-1).mean() + 3 * relations)).backward()
    for mine, other in zip(urepa.projector.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad.float(), rtol=1e-4, atol=1e-6)


def test_nothing_of_the_manifold_runs_at_weight_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr("crepa_kernels.regularizer.urepa.relational_loss", refuse)
    unet = tiny_unet()
    urepa = urepa_on(unet, urepa_manifold_weight=0)
    unet(**unet_inputs())
    urepa.loss(step=0, features=features())


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_a_bright_corner_of_16x16_lies_on_the_same_corner_of_37x37(corner: tuple[int, int]) -> None:
    unet = tiny_unet("sd15")
    urepa = urepa_on(unet, urepa_manifold_weight=0)
    maps = middles_of(unet)
    unet(**unet_inputs("sd15", batch=1, size=(32, 32)))
    assert urepa.captured().layout.grid == (16, 16)
    y = torch.zeros(1, 37, 37, E)
    rows, columns = (slice(0, 18) if low == 0 else slice(19, 37) for low in corner)
    y[0, rows, columns, 0] = 1.0  # the other three quarters have no direction
    [gradient] = torch.autograd.grad(urepa.loss(step=0, features=y)[0], maps)
    strength = gradient[0].norm(dim=0)  # [16, 16]
    assert (strength > 0).sum() >= 64
    near = [slice(0, 9) if low == 0 else slice(7, 16) for low in corner]
    assert strength[near[0], near[1]].sum() > 0.999 * strength.sum()


@pytest.mark.parametrize(
    ("name", "lora"), [("sdxl", True), ("sd15", False), ("kolors", True)], ids=lambda value: str(value)
)
def test_twenty_steps_raise_the_similarity(name: str, lora: bool) -> None:
    unet = tiny_unet(name)
    urepa = urepa_on(adapted(unet) if lora else unet, urepa_manifold_weight=1.0)
    optimizer = torch.optim.AdamW(trained_parameters(unet), lr=1e-2)
    urepa.check_optimizer(optimizer)
    given, y = unet_inputs(name), features()
    similarity = []
    for step in range(20):
        aux, logs = _step(unet, urepa, given, step, y)
        aux.backward()
        optimizer.step()
        optimizer.zero_grad()
        similarity.append(float(logs["urepa_similarity"]))
    assert similarity[-1] > similarity[0] + 0.1


def _step(unet: Any, urepa: UrepaRegularizer, given: Any, step: int, y: torch.Tensor) -> tuple[torch.Tensor, Any]:
    main = unet(**given).sample.square().mean()
    aux, logs = urepa.loss(step=step, features=y)
    return 0.01 * main + aux, logs


def stock(unet: Any, vae: Any) -> StableDiffusionXLPipeline:
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False, **nothing
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shown(pipeline: StableDiffusionXLPipeline, latents: torch.Tensor) -> torch.Tensor:
    """What the pipeline shows (B, 3, H, W) of latents at the end of its steps."""
    images: torch.Tensor = pipeline(
        prompt_embeds=torch.zeros(len(latents), 5, TEXT),
        pooled_prompt_embeds=torch.zeros(len(latents), TEXT),
        guidance_scale=1.0,
        height=32,
        width=32,
        num_inference_steps=1,
        output_type="pt",
        callback_on_step_end=lambda *_: {"latents": latents.clone()},
    ).images
    return images


@pytest.mark.parametrize("case", ["SDXL", "its own mean and std", "fp16 that overflows"])
def test_latents_are_decoded_as_the_stock_pipeline_decodes_them(case: str) -> None:
    own = {"latents_mean": [0.5, -1.0, 0.2, 1.5], "latents_std": [2.0, 0.5, 1.5, 3.0], "scaling_factor": 0.5}
    vae = tiny_kl(**(own if case == "its own mean and std" else {}))
    if case == "fp16 that overflows":
        vae.half()
    unet = tiny_unet()
    urepa = UrepaRegularizer(ON, unet, vae=vae, encoder=tiny_dinov2())
    given = unet_inputs()
    latents = 0.5 * torch.randn(2, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(8))
    unet(**given)
    losses = [urepa.loss(step=0, latents=latents)[0]]
    assert urepa.frames_decoded == 2
    assert vae.dtype == (torch.float16 if case == "fp16 that overflows" else torch.float32)
    pixels = shown(stock(tiny_unet(), vae), latents)
    losses.append(urepa.loss(step=0, pixels=pixels)[0])
    assert urepa.frames_encoded == 4
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_checkpointing_and_ddp_change_no_gradient(tmp_path: Path) -> None:
    def gradients(*, checkpointing: bool, ddp: bool = False) -> list[torch.Tensor]:
        unet = tiny_unet("sd15")
        urepa = urepa_on(unet, urepa_cutoff_step=1)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        model: Any = DistributedDataParallel(unet, static_graph=False) if ddp else unet
        # The second forward comes after the cutoff: DDP still wants every weight to have a gradient.
        for step in range(2):
            main = model(**unet_inputs("sd15")).sample.square().mean()
            (main + urepa.loss(step=step, features=features())[0]).backward()
        return [each.grad for each in unet.parameters() if each.grad is not None]

    expected = gradients(checkpointing=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for found in (gradients(checkpointing=True), gradients(checkpointing=True, ddp=True)):
            for mine, other in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_middle_is_captured() -> None:
    losses = []
    for compiled in (False, True):
        unet = tiny_unet("sd15")
        urepa = urepa_on(unet)
        if compiled:
            unet.mid_block.compile(backend="aot_eager")
        unet(**unet_inputs("sd15"))
        losses.append(urepa.loss(step=0, features=features())[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_autocast_leaves_the_projector_and_the_loss_in_fp32() -> None:
    unet = tiny_unet("sd15")
    urepa = urepa_on(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unet(**unet_inputs("sd15"))
        assert urepa.captured().hidden_states.dtype == torch.bfloat16
        loss, _ = urepa.loss(step=0, features=features())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in urepa.projector.parameters())


def with_lora_of(unet: Any, folder: Path) -> tuple[Any, list[str]]:
    """A stock pipeline's UNet with the LoRA of another one, saved and loaded, and what is said of it."""
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    pipeline = stock(tiny_unet(), tiny_kl())
    with everything_said() as said:
        pipeline.load_lora_weights(folder)
    return pipeline.unet, said


@pytest.mark.parametrize("how", ["LoRA", "full"])
def test_what_is_saved_loads_in_stock_diffusers_without_a_word(tmp_path: Path, how: str) -> None:
    unet = tiny_unet()
    urepa = urepa_on(adapted(unet) if how == "LoRA" else unet)
    optimizer = torch.optim.AdamW(trained_parameters(unet), lr=1e-2)
    for step in range(2):
        aux, _ = _step(unet, urepa, unet_inputs(), step, features())
        aux.backward()
        optimizer.step()
    if how == "LoRA":
        loaded, said = with_lora_of(unet, tmp_path)
        # That the text encoders have none, diffusers says of every LoRA of a UNet.
        _, always_said = with_lora_of(adapted(tiny_unet()), tmp_path / "plain")
        assert said == always_said
    else:
        unet.save_pretrained(tmp_path)
        with everything_said() as said:
            loaded = UNet2DConditionModel.from_pretrained(tmp_path)
        assert said == []
    assert not any("urepa" in name for file in tmp_path.glob("*.safetensors") for name in load_file(file))
    with torch.no_grad():
        theirs = loaded.eval()(**unet_inputs()).sample
        urepa.remove()
        torch.testing.assert_close(unet.eval()(**unet_inputs()).sample, theirs, rtol=1e-4, atol=1e-5)
    assert not hasattr(unet, "urepa_projector")


def test_the_projector_is_saved_under_its_own_name_and_comes_back(tmp_path: Path) -> None:
    urepa = urepa_on(tiny_unet("sd15"), urepa_manifold_weight=1.5)
    urepa.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"urepa_projector.safetensors", "urepa_config.json"}
    unet = tiny_unet("sd15")
    again = UrepaRegularizer.from_pretrained(tmp_path, unet)
    assert again.config == urepa.config
    for mine, other in zip(again.projector.parameters(), urepa.projector.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert unet.urepa_projector is again.projector


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    schedule = {"urepa_similarity_threshold": 0.9, "urepa_threshold_mode": "recoverable", "urepa_scheduler": "cosine"}

    def started() -> tuple[Any, UrepaRegularizer, Any]:
        unet = tiny_unet("sd15")
        torch.manual_seed(3)
        urepa = UrepaRegularizer({**ON, **schedule}, unet, max_train_steps=6, feature_size=E)
        return unet, urepa, torch.optim.SGD(unet.parameters(), lr=1e-2)

    def train(run: Any, steps: range) -> list[float]:
        unet, urepa, optimizer = run
        losses = []
        for step in steps:
            aux, logs = _step(unet, urepa, unet_inputs("sd15", seed=step), step, features())
            aux.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [float(aux.detach()), float(logs["urepa_weight"]), float(logs["urepa_similarity_ema"])]
        return losses

    whole = started()
    expected = train(whole, range(6))
    first = started()
    train(first, range(3))
    second = started()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    assert train(second, range(3, 6)) == expected[9:]


def test_a_copy_captures_nothing_and_trains_on_by_itself() -> None:
    unet = tiny_unet("sd15")
    urepa = urepa_on(unet)
    unet(**unet_inputs("sd15"))
    average = copy.deepcopy(unet)
    average(**unet_inputs("sd15", seed=9))
    states = urepa.captured().hidden_states
    unet(**unet_inputs("sd15"))
    assert torch.equal(states, urepa.captured().hidden_states)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"urepa_lambda": -0.1}, "urepa_lambda = -0.1"),
        ({"urepa_manifold_weight": -1}, "urepa_manifold_weight = -1"),
        ({"urepa_model": "Qwen/Qwen2-VL"}, "urepa_model"),
        ({"urepa_encoder_image_size": 500}, "urepa_encoder_image_size = 500.*patch size"),
        ({"urepa_spatial_align": "pool"}, 'urepa_spatial_align = "pool".*"smaller"'),
        ({"urepa_scheduler": "sine"}, 'urepa_scheduler = "sine"'),
        ({"urepa_warmup_steps": -1}, "urepa_warmup_steps = -1"),
        ({"urepa_decay_steps": 1.5}, "urepa_decay_steps = 1.5"),
        ({"urepa_lambda_end": -1}, "urepa_lambda_end = -1"),
        ({"urepa_power": 0}, "urepa_power = 0"),
        ({"urepa_cutoff_step": -5}, "urepa_cutoff_step = -5"),
        ({"urepa_similarity_threshold": 1.2}, "urepa_similarity_threshold = 1.2.*at most 1"),
        ({"urepa_similarity_ema_decay": 1}, "urepa_similarity_ema_decay = 1"),
        ({"urepa_threshold_mode": "once"}, 'urepa_threshold_mode = "once"'),
        ({"urepa_manifold_wight": 2}, "urepa_manifold_wight = 2: unknown key; did you mean urepa_manifold_weight"),
        ({"urepa_enabled": "yes"}, 'urepa_enabled = "yes"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_rule_of_the_settings_is_one_error(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as raised:
        UrepaConfig.from_dict({**settings, "crepa_lambda": "left alone"})
    assert len(raised.value.problems) == 1


def test_defaults_and_other_names() -> None:
    config = UrepaConfig.from_dict({"urepa_model": "dino_v2_s"})
    assert config.urepa_model == "dinov2_vits14"
    assert (config.urepa_lambda, config.urepa_manifold_weight, config.urepa_spatial_align) == (0.5, 3.0, "teacher")
    assert UrepaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown preset 't2v': U-REPA has no presets"):
        UrepaConfig.preset("t2v")
    assert UrepaConfig.parse_known_args(["--urepa_enabled", "--urepa_lambda", "0.3"])[0].urepa_lambda == 0.3


def test_unets_and_transformers_are_told_where_they_belong() -> None:
    with pytest.raises(ValueError, match="CrepaRegularizer with crepa_enabled"):
        UrepaRegularizer(ON, tiny_wan(), feature_size=E)
    crepa = {"crepa_enabled": True, "crepa_block_index": 1}
    with pytest.raises(ValueError, match="UrepaRegularizer with urepa_enabled"):
        CrepaRegularizer(crepa, tiny_unet("sd15"), feature_size=E)
    with pytest.raises(ValueError, match="no UNet2DConditionModel"):
        UrepaRegularizer(ON, torch.nn.Linear(2, 2), feature_size=E)
    with pytest.raises(ValueError, match="mid_block"):
        UrepaRegularizer(ON, tiny_unet("sd15", mid_block_type=None), feature_size=E)
    with pytest.raises(ValueError, match="UrepaRegularizer takes a UrepaConfig"):
        UrepaRegularizer(CrepaRegularizer.CONFIG(**crepa), tiny_unet("sd15"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"crepa_enabled = true is of CREPA, for a transformer.* by urepa_enabled"):
        UrepaRegularizer(crepa, tiny_unet("sd15"))
    with pytest.raises(ValueError, match=r"urepa_enabled = true is of U-REPA, for a unet.* by crepa_enabled"):
        CrepaRegularizer({"urepa_enabled": True}, tiny_wan())
    assert UrepaRegularizer({**crepa, "urepa_enabled": False}, tiny_unet("sd15")).projector is None


def test_what_is_wrong_in_a_step_is_said_in_the_name_of_u_repa() -> None:
    unet = tiny_unet("sd15")
    urepa = urepa_on(unet)
    with pytest.raises(ValueError, match="call unet"):
        urepa.loss(step=0, features=features())
    with torch.no_grad():
        unet(**unet_inputs("sd15"))
    with pytest.raises(ValueError, match="unet ran without gradients"):
        urepa.loss(step=0, features=features())
    unet(**unet_inputs("sd15"))
    with pytest.raises(ValueError, match=r"UrepaRegularizer\(vae="):
        urepa.loss(step=0, latents=unet_inputs("sd15")["sample"])
    with pytest.raises(ValueError, match=r"latents must be .*unet's forward"):
        urepa.loss(step=0, latents=torch.zeros(2, CHANNELS, 8, 16))
    with pytest.raises(ValueError, match="one of latents="):
        urepa.loss(step=0)
    with pytest.raises(ValueError, match=r"pass UrepaRegularizer\(feature_size=9\)"):
        urepa.loss(step=0, features=torch.randn(2, 7, 7, 9))
    with pytest.raises(ValueError, match="already has a urepa_projector"):
        urepa_on(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet(**unet_inputs("sd15"))
    with pytest.raises(ValueError, match=r"urepa_projector must be trainable.*adapters, UrepaRegularizer, optimizer"):
        urepa.loss(step=0, features=features())


def test_a_lora_after_the_middle_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny_unet("sd15").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=r"up_blocks.*to_q"))
    urepa = urepa_on(unet)
    for _ in range(2):
        unet(**unet_inputs("sd15"))
        urepa.loss(step=0, features=features())
    [record] = caplog.records
    assert "no trainable weight acts on mid_block" in record.getMessage()
    assert "only U-REPA's projector learns" in record.getMessage()


def test_it_ends_where_the_mean_cosine_reaches_the_threshold() -> None:
    unet = tiny_unet("sd15")
    urepa = urepa_on(unet, urepa_similarity_threshold=0.2, urepa_similarity_ema_decay=0.0)
    unet(**unet_inputs("sd15"))
    states, layout = urepa.captured()
    with torch.no_grad():
        taught = urepa.projector(states[:, 0]).unflatten(1, layout.grid)
    weights = []
    for step in range(4):
        unet(**unet_inputs("sd15"))
        weights.append(urepa.loss(step=step, features=taught)[1]["urepa_weight"])
    assert weights == [0.5, 0.5, 0.0, 0.0]
    assert urepa.ended


def test_off_attaches_nothing() -> None:
    unet = tiny_unet("sd15")
    urepa = UrepaRegularizer({"urepa_enabled": False}, unet)
    unet(**unet_inputs("sd15"))
    assert urepa.loss(step=0) == (torch.zeros(()), {})
    assert not hasattr(unet, "urepa_projector")


def test_keys_of_crepa_that_do_nothing_are_said(caplog: pytest.LogCaptureFixture) -> None:
    own = {"urepa_enabled": True, "crepa_encoder": "dinov2_vits14"}
    UrepaRegularizer(own, tiny_unet("sd15"), feature_size=8)
    assert "crepa_encoder does nothing for U-REPA, whose keys begin with urepa_" in caplog.text
    caplog.clear()
    UrepaRegularizer({**own, "crepa_enabled": False}, tiny_unet("sd15"), feature_size=8)
    assert "does nothing" not in caplog.text

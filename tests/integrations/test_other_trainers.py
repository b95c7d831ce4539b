"""Every snippet for another trainer runs on a stand-in: classes with the names, methods and calls that it publishes.

finetrainers itself runs where it can be imported; the others are in no registry. What is not of a trainer is real:
diffusers' Wan, its VAE, a DINOv2, optimizers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import clip_pixels, tiny_dinov2, tiny_vae, tiny_wan, wan_inputs
from tiny_pipelines import save_tiny_wan_pipeline
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from crepa_kernels import CrepaRegularizer

PAGE = Path(__file__).parents[2] / "docs" / "other-trainers.md"
PIPELINE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
DIM, STEPS = 32, 3


def snippets(section: str) -> list[str]:
    (text,) = re.findall(rf"^## {section}\n((?:(?!^## ).*\n)*)", PAGE.read_text(), re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(code: str, **known: Any) -> dict[str, Any]:
    names = {"__name__": "snippet", **known}
    exec(code, names)
    return names


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher and the VAE that the snippets name, tiny ones, in folders of the hub ids."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny_dinov2(Path("facebook/dinov2-giant"), hidden_size=1536, num_hidden_layers=1, mlp_ratio=1)
    tiny_vae(Path(PIPELINE, "vae"))


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module that can be imported by its dotted name while the test runs."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        each = ModuleType(".".join(parts[:end]))
        each.__path__ = []
        monkeypatch.setitem(sys.modules, each.__name__, each)
    vars(each).update(content)
    return each


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x)) + e


class WanModel(nn.Module):
    """Wan's own names: clips x in, a list of clips out, no config."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = DIM
        self.patch_embedding = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.time_embedding = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(10))
        self.head = nn.ConvTranspose3d(DIM, 4, (1, 2, 2), (1, 2, 2))

    def forward(
        self, x: Any, t: Tensor, context: Any, seq_len: int, clip_fea: Any = None, y: Any = None
    ) -> list[Tensor]:
        maps = torch.cat([self.patch_embedding(clip[None]) for clip in x])
        tokens, e = maps.flatten(2).transpose(1, 2), self.time_embedding(t.float()[:, None] / 1000)[:, None]
        for block in self.blocks:
            tokens = block(tokens, e=e)
        assert tokens.shape[1] == seq_len
        return list(self.head(tokens.transpose(1, 2).unflatten(2, maps.shape[2:])))


class LoRA(nn.Module):
    """Beside the model, in forwards that it replaced, as musubi-tuner and ai-toolkit have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and "blocks" in name:
                down, up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
                nn.init.zeros_(up.weight)
                self.layers.append(nn.Sequential(down, up))
                layer.forward = self.around(layer.forward, self.layers[-1])

    @staticmethod
    def around(forward: Any, added: nn.Module) -> Any:
        return lambda x: forward(x) + added(x)


def changed(parameters: list[Tensor], before: list[Tensor]) -> bool:
    return all(not one.equal(other) for one, other in zip(parameters, before, strict=True))


def copies(parameters: Any) -> list[Tensor]:
    return [each.detach().clone() for each in parameters]


class WanNetworkTrainer:
    """The order of musubi-tuner's trainer: model, LoRA, optimizer, cast, start, batches."""

    def extra_trainable_params(self, args: Any, accelerator: Any, network: Any, transformer: Any, params: Any) -> Any:
        return params

    def on_train_start(self, args: Any, accelerator: Any, network: Any, transformer: Any, optimizer: Any) -> None:
        pass

    def process_batch(
        self, args: Any, accelerator: Any, transformer: Any, network: Any, batch: Any, latents: Tensor, noise: Tensor,
        noise_scheduler: Any, dit_dtype: Any, network_dtype: Any, vae: Any, global_step: int,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        seq_len = latents[0, 0].numel() // 4
        answer = transformer(
            latents + noise, t=torch.full((1,), 500), context=[], seq_len=seq_len, clip_fea=None, y=None
        )
        return nn.functional.mse_loss(torch.stack(answer), noise - latents), {}

    def train(self, args: Any) -> list[float]:
        accelerator, transformer = Accelerator(cpu=True), WanModel()
        transformer.eval()
        transformer.requires_grad_(False)
        network = LoRA(transformer)
        params = self.extra_trainable_params(
            args, accelerator, network, transformer, [{"params": list(network.parameters()), "lr": args.learning_rate}]
        )
        optimizer = torch.optim.AdamW(params)
        before = [copies(group["params"]) for group in optimizer.param_groups]
        kinds = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
        transformer.to(torch.bfloat16)  # as --fp8_base does it with another type
        for name, parameter in transformer.named_parameters():
            if not name.startswith("crepa"):
                parameter.data = parameter.data.to(kinds[name])
        transformer.train()
        self.on_train_start(args, accelerator, network, transformer, optimizer)
        latents, losses = wan_inputs()["hidden_states"], []
        for step in range(STEPS):
            noise = torch.randn_like(latents)
            loss, _ = self.process_batch(
                args, accelerator, transformer, network, {}, latents, noise, None, None, None, None, step
            )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert all(changed(group["params"], old) for group, old in zip(optimizer.param_groups, before, strict=True))
        return losses


def test_musubi_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = snippets("musubi-tuner")
    trainer = module(monkeypatch, "musubi_tuner.wan_train_network", WanNetworkTrainer=WanNetworkTrainer)
    vars(sys.modules["musubi_tuner"])["wan_train_network"] = trainer  # as importing it does
    found: list[Any] = []

    def main() -> None:
        run_by = trainer.WanNetworkTrainer()
        run_by.train(SimpleNamespace(learning_rate=1e-3))
        found.append(run_by)

    trainer.main = main  # type: ignore[attr-defined]
    run(code, __name__="__main__")
    assert found[0].crepa.frames_encoded == 3 * STEPS


class SDTrainer:
    """The order of ai-toolkit's trainer: model, LoRA, extra parameters, optimizer, losses of batches."""

    def __init__(self) -> None:
        unet = tiny_wan(num_layers=10)
        unet.requires_grad_(False)
        self.sd = SimpleNamespace(unet=unet, vae=tiny_vae())
        self.train_config = SimpleNamespace(lr=1e-3, steps=200)
        self.step_num = 0

    def hook_add_extra_train_params(self, params: Any) -> Any:
        return params

    def calculate_loss(
        self, noise_pred: Tensor, noise: Tensor, noisy_latents: Tensor, timesteps: Tensor, batch: Any,
        mask_multiplier: float = 1.0, prior_pred: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        return nn.functional.mse_loss(noise_pred, noise - batch.latents)

    def run(self) -> None:
        network = LoRA(self.sd.unet)
        params = self.hook_add_extra_train_params([{"params": list(network.parameters()), "lr": 1e-3}])
        for group in params:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(params)
        before = [copies(group["params"]) for group in params]
        for self.step_num in range(100, 100 + STEPS):
            inputs = wan_inputs()
            noise, batch = torch.randn_like(inputs["hidden_states"]), SimpleNamespace(latents=inputs["hidden_states"])
            noisy = batch.latents + noise
            prediction = self.sd.unet(**{**inputs, "hidden_states": noisy}, return_dict=False)[0]
            loss = self.calculate_loss(
                noise_pred=prediction, noise=noise, noisy_latents=noisy, timesteps=inputs["timestep"], batch=batch,
                mask_multiplier=1.0, prior_pred=None,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(changed(group["params"], old) for group, old in zip(params[1:], before[1:], strict=True))


def test_ai_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = snippets("ai-toolkit")
    module(monkeypatch, "extensions_built_in.sd_trainer.SDTrainer", SDTrainer=SDTrainer)
    module(monkeypatch, "toolkit.extension", Extension=object)
    (extension,) = run(code)["AI_TOOLKIT_EXTENSIONS"]
    trainer = extension.get_process()()
    trainer.run()
    assert trainer.crepa.frames_encoded == 3 * STEPS


class WanModelSpecification:
    """finetrainers' specification: its forward makes the noisy latents of its conditions, the prediction and target."""

    def forward(
        self, transformer: nn.Module, condition_model_conditions: Any, latent_model_conditions: Any, sigmas: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        latents = latent_model_conditions.pop("latents")
        noise = torch.randn_like(latents)
        latent_model_conditions["hidden_states"] = (1 - sigmas) * latents + sigmas * noise
        timesteps = (sigmas.flatten() * 1000).long()
        prediction = transformer(
            **latent_model_conditions, **condition_model_conditions, timestep=timesteps, return_dict=False
        )[0]
        return prediction, noise - latents, sigmas


class SFTTrainer:
    """The order of finetrainers' trainer: adapters, optimizer, steps that count micro-batches from 1."""

    def __init__(self, args: Any, specification: Any) -> None:
        self.args, self.model_specification = args, specification
        self.state = SimpleNamespace(train_state=SimpleNamespace(step=0))

    def _prepare_trainable_parameters(self) -> None:
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))

    def run(self) -> list[float]:
        self.transformer = tiny_wan(num_layers=10)
        self._prepare_trainable_parameters()
        trained = [each for each in self.transformer.parameters() if each.requires_grad]
        optimizer, gradients = torch.optim.AdamW(trained, 1e-3), []
        for _ in range(STEPS * self.args.gradient_accumulation_steps):
            self.state.train_state.step += 1
            inputs = wan_inputs()
            prediction, target, _ = self.model_specification.forward(
                transformer=self.transformer,
                scheduler=None,
                condition_model_conditions={"encoder_hidden_states": inputs["encoder_hidden_states"]},
                latent_model_conditions={"latents": inputs["hidden_states"]},
                sigmas=torch.full((1, 1, 1, 1, 1), 0.5),
                compute_posterior=True,
            )
            loss = (prediction.float() - target.float()).pow(2).mean() / self.args.gradient_accumulation_steps
            loss.backward()
            if self.state.train_state.step % self.args.gradient_accumulation_steps == 0:
                gradients.append(self.transformer.crepa_projector[1].weight.grad.abs().sum().item())
                optimizer.step()
                optimizer.zero_grad()
        return gradients


def losses_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """(step, latents) of each loss that CREPA is asked for from here on."""
    seen: list[tuple[int, Tensor]] = []
    loss = CrepaRegularizer.loss

    def told(crepa: CrepaRegularizer, **given: Any) -> Any:
        seen.append((given["step"], given["latents"]))
        return loss(crepa, **given)

    monkeypatch.setattr(CrepaRegularizer, "loss", told)
    return seen


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_finetrainers(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = snippets("finetrainers")
    module(monkeypatch, "finetrainers.trainer", SFTTrainer=SFTTrainer)
    args = {
        "train_steps": 200 * micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "pretrained_model_name_or_path": PIPELINE,
    }
    seen = losses_of(monkeypatch)
    gradients = run(code)["CrepaTrainer"](SimpleNamespace(**args), WanModelSpecification()).run()
    # The weight begins at 0 with the preset's warm-up, and the gradient with it.
    assert gradients[0] == 0
    assert all(gradient > 0 for gradient in gradients[1:])
    assert [step for step, _ in seen] == [step for step in range(STEPS) for _ in range(micro_batches)]
    for _, latents in seen:
        torch.testing.assert_close(latents, wan_inputs()["hidden_states"])


class Clips(IterableDataset[dict[str, Any]]):
    """Clips with captions, of the shape that finetrainers' own data sets have."""

    _precomputable_once = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {"caption": "red", "video": torch.rand(9, 3, 64, 64) * 2 - 1}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_finetrainers_itself(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its whole training, on what it does not have for a CPU: memory statistics and a list of devices with foreach."""
    pytest.importorskip("finetrainers.trainer", exc_type=ImportError)
    from finetrainers import data, utils
    from finetrainers.args import BaseArgs
    from finetrainers.models.wan import WanModelSpecification as Specification
    from finetrainers.trainer.sft_trainer.config import SFTLowRankConfig

    save_tiny_wan_pipeline(Path(PIPELINE), transformer={"num_layers": 10})
    buckets = {"video_resolution_buckets": [[9, 32, 48]], "reshape_mode": "bicubic"}
    datasets = [{"data_root": "clips", "dataset_type": "video", **buckets}]
    Path("data.json").write_text(json.dumps({"datasets": datasets}))
    options = {
        "model_name": "wan", "pretrained_model_name_or_path": PIPELINE, "training_type": "lora", "rank": 2,
        "target_modules": "blocks.*(to_q|to_k)", "dataset_config": "data.json", "output_dir": "out", "lr": 1e-3,
        "train_steps": STEPS * micro_batches, "gradient_accumulation_steps": micro_batches, "lr_scheduler": "constant",
        "parallel_backend": "accelerate", "flow_weighting_scheme": "logit_normal",
        "checkpointing_steps": STEPS,
    }  # fmt: skip
    line = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train", *line])
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(data, "initialize_dataset", lambda *_, **__: Clips())
    monkeypatch.setattr(utils, "get_memory_statistics", lambda *_: {})
    monkeypatch.setattr(utils.torch, "_device_has_foreach_support", lambda device: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    args = BaseArgs()
    args.register_args(SFTLowRankConfig())
    args = args.parse_args()
    seen = losses_of(monkeypatch)
    (code,) = snippets("finetrainers")
    specification = Specification(PIPELINE, text_encoder_dtype=torch.float32, vae_dtype=torch.float32)
    run(code)["CrepaTrainer"](args, specification).run()
    assert [step for step, _ in seen] == [step for step in range(STEPS) for _ in range(micro_batches)]
    (lora,) = Path("out/lora_weights", f"{STEPS * micro_batches:06d}").glob("*.safetensors")
    assert not [name for name in load_file(lora) if "crepa" in name]
    state = load_file(Path("out", f"finetrainers_step_{STEPS * micro_batches}", "model.safetensors"))
    assert state["crepa_projector.1.bias"].abs().sum() > 0  # begins at 0


def test_diffusion_pipe() -> None:
    (code,) = snippets("diffusion-pipe")
    model = WanModel()
    latents = wan_inputs()["hidden_states"]
    names = run(code, blocks=model.blocks, dim=DIM)
    answer = model(list(latents), t=torch.full((1,), 500), context=[], seq_len=latents[0, 0].numel() // 4)
    main_loss = torch.stack(answer).square().mean()
    loss = names["loss_with_crepa"](main_loss, latents, torch.randn(1, 3, 4, 1536), (2, 2))
    loss.backward()
    assert loss != main_loss
    assert all(each.grad is not None for each in names["projector"].parameters())
    assert not names["kept"]


def test_ones_own_transformer() -> None:
    attaching, _ = snippets("Your own loop and your own transformer")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Conv3d(4, 1024, (1, 2, 2), (1, 2, 2))
            self.trunk = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1024, 1024) for _ in range(3))})

        def forward(self, video: Tensor) -> Tensor:
            tokens = self.into(video).flatten(2).transpose(1, 2)
            for layer in self.trunk["layers"]:  # type: ignore[union-attr]
                tokens = layer(tokens)
            return tokens

    def decode(latents: Tensor) -> Tensor:
        return latents[:, :3].sigmoid().transpose(1, 2)

    model = Own()
    crepa = run(attaching, model=model, decode=decode)["crepa"]
    latents = wan_inputs()["hidden_states"]
    model(video=latents)
    loss, _ = crepa.loss(step=0, latents=latents)
    loss.backward()
    assert model.into.weight.grad is not None


def test_the_functions_alone() -> None:
    _, alone = snippets("Your own loop and your own transformer")
    states = torch.randn(1, 3 * 6, 1024, requires_grad=True)
    known: dict[str, Any] = {
        "states": states,
        "latents": wan_inputs()["hidden_states"],
        "frames": clip_pixels(frames=3)[0],
        "frame_numbers": [0, 4, 8],
        "video_digest": "1234-abcd",
        "main_loss": torch.zeros((), requires_grad=True),
    }
    assert "loss" not in run(alone, **known, step=0)  # warm-up: the weight is 0
    run(alone, **known, step=1000)["loss"].backward()
    assert states.grad is not None
    assert len(list(Path("cache/teacher").iterdir())) == 1

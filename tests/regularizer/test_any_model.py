"""CREPA on a transformer that no table knows: a small DiT of this file's own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_vae
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaConfig, CrepaRegularizer, Family, TokenLayout, register_family, supported_families
from crepa_kernels.models import families
from crepa_kernels.models.layouts import tokens_of_any

WIDTH, PATCH = 32, (1, 2, 2)
CLIP = (2, 4, 3, 8, 12)  # (B, C, T, H, W)
GRID = (4, 6)
# [crepa]
SETTINGS = {"crepa_enabled": True, "crepa_encoder_image_size": 28}
# [/crepa]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, None]:
        normed = self.norm(tokens)
        return tokens + self.attention(normed, normed, normed)[0] + time, None


class SmallDiT(nn.Module):
    """Not of diffusers: no config, no save_pretrained, blocks in a part, tuples out of blocks."""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        self.into = nn.Conv3d(4, WIDTH, PATCH, PATCH)
        self.time = nn.Linear(1, WIDTH)
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(6))})
        self.out = nn.ConvTranspose3d(WIDTH, 4, PATCH, PATCH)
        self.checkpoints = checkpoints

    def forward(self, video: torch.Tensor, *, time: torch.Tensor) -> torch.Tensor:
        maps = self.into(video)
        tokens, level = maps.flatten(2).transpose(1, 2), self.time(time[:, None])[:, None]
        layers: Any = self.trunk["layers"]
        for block in layers:
            tokens = (
                checkpoint(block, tokens, level, use_reentrant=False)[0]
                if self.checkpoints
                else block(tokens, level)[0]
            )
        return self.out(tokens.transpose(1, 2).unflatten(2, maps.shape[2:]))


# [crepa]
def layout(arguments: Any) -> tuple[int, int, int]:
    return arguments["video"][2], arguments["video"][3] // 2, arguments["video"][4] // 2


# [/crepa]


def encode(frames: torch.Tensor) -> torch.Tensor:
    """A teacher of 16 channels on 2 x 2 patches of 14 pixels."""
    pooled = nn.functional.adaptive_avg_pool2d(frames, 2)
    return torch.cat([pooled.sin(), pooled.cos(), *[(pooled * k).sin() for k in range(2, 5)]], 1).permute(0, 2, 3, 1)


def clip(seed: int = 0) -> torch.Tensor:
    return torch.randn(CLIP, generator=torch.Generator().manual_seed(seed))


def pixels_of(latents: torch.Tensor) -> torch.Tensor:
    """A decoder: (B, C, T, H, W) to (B, P, 3, 2 H, 2 W), P = 1 + 4 (T - 1)."""
    frames = latents[:, :3].sigmoid().repeat_interleave(4, 2)[:, :, 3:]
    return nn.functional.interpolate(frames, scale_factor=(1, 2, 2)).transpose(1, 2)


def train(
    steps: int,
    model: SmallDiT,
    attach: Callable[[SmallDiT], CrepaRegularizer],
    wrapped: Callable[[Any], nn.Module] = lambda model: model,
) -> list[float]:
    crepa = attach(model)
    wrapper = wrapped(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    latents, found = clip(), []
    for step in range(steps):
        noise = torch.randn(CLIP, generator=torch.Generator().manual_seed(step))
        prediction = wrapper(latents + noise, time=torch.ones(2))
        loss = (prediction - noise).square().mean()
        # [crepa]
        aux, logs = crepa.loss(step=step, latents=latents)
        loss = loss + aux
        crepa.release()
        # [/crepa]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(logs["crepa_similarity"]))
    return found


def attach(model: SmallDiT, **changes: Any) -> CrepaRegularizer:
    given: dict[str, Any] = {"hidden_size": WIDTH, "layout": layout, "vae": pixels_of, "encoder": encode}
    return CrepaRegularizer(SETTINGS, model, **{"block": "trunk.layers.2", **given, **changes})


def attach_plainly(model: SmallDiT) -> CrepaRegularizer:
    # [crepa]
    return CrepaRegularizer(
        SETTINGS, model, pixels_of, encode, block="trunk.layers.2", hidden_size=WIDTH, layout=layout
    )
    # [/crepa]


def own_lines() -> list[str]:
    """Of this file, those between the marks: all that a script with a model, a decoder and a teacher adds."""
    source = Path(__file__).read_text()
    marked = re.findall(r"^ *# \[crepa\]\n(.*?)^ *# \[/crepa\]\n", source, re.MULTILINE | re.DOTALL)
    return [line for part in marked for line in part.splitlines() if line.strip()]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_an_unknown_class_trains_in_ten_lines() -> None:
    found = train(30, SmallDiT(), attach_plainly)
    assert found[-1] > found[0] + 0.3
    assert 0 < len(own_lines()) <= 10, own_lines()


class ListDiT(SmallDiT):
    """Of Wan's original kind: takes a list of clips (C, T, H, W) and returns one."""

    answer: Callable[[torch.Tensor], Any] = staticmethod(list)  # type: ignore[assignment]

    def forward(self, video: list[torch.Tensor], *, time: torch.Tensor) -> Any:  # type: ignore[override]
        return self.answer(super().forward(torch.stack(list(video)), time=time))


@dataclasses.dataclass
class Answer:
    prediction: torch.Tensor


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (list, lambda answer: torch.stack(answer)),
        (lambda clips: {"prediction": clips}, lambda answer: answer["prediction"]),
        (lambda clips: (list(clips), None), lambda answer: torch.stack(answer[0])),
        (Answer, lambda answer: answer.prediction),
    ],
    ids=["list", "mapping", "nested", "dataclass"],
)
def test_a_model_may_take_and_return_what_it_likes(answer: Any, read: Any) -> None:
    model = ListDiT()
    model.answer = answer
    described: list[Any] = []

    def of_lists(arguments: Any) -> tuple[int, ...]:
        described.append(arguments["video"])
        _, frames, height, width = arguments["video"][0]
        return frames, height // 2, width // 2

    crepa = attach(model, layout=of_lists)
    prediction = read(model(list(clip()), time=torch.ones(2)))
    loss, _ = crepa.loss(step=0, latents=clip())
    (loss + prediction.mean()).backward()
    # No tensor of the call is kept for the loss.
    assert described[0] == [CLIP[1:], CLIP[1:]]
    assert all(parameter.grad is not None for parameter in model.crepa_projector.parameters())


def test_a_model_that_returns_no_tensor_is_told_so() -> None:
    model = ListDiT()
    model.answer = str  # type: ignore[assignment]
    attach(model)
    with pytest.raises(ValueError, match=r"must return a tensor, or a tuple.*got str"):
        model(list(clip()), time=torch.ones(2))


def test_compiled_blocks_and_ddp_train_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = train(3, SmallDiT(), attach)
    torch.manual_seed(0)
    model = SmallDiT()
    for block in model.trunk["layers"]:  # type: ignore[union-attr]
        block.compile(backend="eager")
    assert train(3, model, attach) == pytest.approx(expected, abs=1e-6)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        assert train(3, SmallDiT(), attach, DistributedDataParallel) == pytest.approx(expected, abs=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", ["trunk.layers.2", "module", "list"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_block_by_name_by_module_and_by_index_are_one(block: str, checkpoints: bool) -> None:
    def chosen(model: SmallDiT) -> CrepaRegularizer:
        if block == "list":
            given = {"block": "trunk.layers", "hidden_size": WIDTH, "layout": layout, "vae": pixels_of}
            config = CrepaConfig.from_dict({**SETTINGS, "crepa_block_index": 2})
            return CrepaRegularizer(config, model, encoder=encode, **given)
        layers: Any = model.trunk["layers"]
        return attach(model, block=layers[2] if block == "module" else block)

    torch.manual_seed(0)
    expected = train(3, SmallDiT(), attach)
    torch.manual_seed(0)
    assert train(3, SmallDiT(checkpoints), chosen) == pytest.approx(expected, abs=1e-6)


def test_backbone_mode_has_both_blocks_of_a_list() -> None:
    settings = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_feature_source": "backbone"}
    model = SmallDiT()
    crepa = CrepaRegularizer(
        {**settings, "crepa_teacher_block_index": 4}, model, block="trunk.layers", hidden_size=WIDTH, layout=layout
    )
    model(clip(), time=torch.ones(2))
    loss, _ = crepa.loss(step=0)
    loss.backward()
    layers: Any = model.trunk["layers"]
    assert layers[1].norm.weight.grad.abs().sum() > 0
    assert layers[4].norm.weight.grad is None


class RegisteredDiT(SmallDiT):
    """A class of its own."""


def test_a_registered_family_is_one_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "REGISTERED", {})
    family = Family(
        name="small",
        transformer="RegisteredDiT",
        vaes=(),
        block_lists=("trunk.layers",),
        after_blocks=("out",),
        block_index=2,
        hidden_size=lambda config: WIDTH,
        arguments=("video",),
        token_layout=lambda config, arguments: TokenLayout(3, GRID, 1, CLIP[2:]),
        video_tokens=tokens_of_any,
        temporal_factors=(4,),
    )
    with pytest.raises(ValueError, match="RegisteredDiT is not a supported transformer"):
        CrepaRegularizer({**SETTINGS, "crepa_block_index": 2}, RegisteredDiT(), encoder=encode)
    register_family(family)
    assert "small" in supported_families()
    assert CrepaConfig.preset("t2v", family="small").crepa_block_index == 2

    def by_row(model: SmallDiT) -> CrepaRegularizer:
        return CrepaRegularizer(CrepaConfig.preset("i2v"), model, vae=pixels_of, encoder=encode)

    assert train(2, RegisteredDiT(), by_row)
    with pytest.raises(ValueError, match=r"wan .*which is known"):
        register_family(Family(name="wan", transformer="Other", vaes=(), block_lists=("blocks",)))
    with pytest.raises(ValueError, match="register_family takes a Family, got dict"):
        register_family({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layout": lambda a: (3, 4, 7)}, r"returned \(2, 72, 32\), expected \(B, 84, D\): 3 frames of 4 x 7 tokens"),
        (
            {"layout": lambda a: (3, 24)},
            r"layout returns.*\(frames, height, width\), three positive integers.*\(3, 24\)",
        ),
        ({"layout": lambda a: None}, "three positive integers, got None"),
        ({"layout": (3, 4, 6)}, "layout must be a callable"),
        ({"layout": None}, "block=, hidden_size= and layout= go together"),
        ({"block": None}, "block=, hidden_size= and layout= go together"),
        ({"block": "trunk.layers.9"}, "block = 'trunk.layers.9'"),
        ({"block": nn.Linear(2, 2)}, "this Linear is no part of the SmallDiT"),
        ({"hidden_size": 0}, "hidden_size must be the width D .*positive integer, got 0"),
        ({"hidden_size": 33}, r"33"),
        (
            {"vae": lambda latents: latents.transpose(1, 2)},
            r"must decode latents .* to pixels \(2, P, 3, H, W\), got \(2, 3, 4, 8, 12\)",
        ),
        ({"vae": lambda latents: None}, "got NoneType"),
        ({"vae": lambda latents: 300 * pixels_of(latents)}, r"\[0, 1\]"),
        ({"vae": Path(__file__).parent}, r"neither config.json nor vae/config.json is in that folder"),
        ({"vae": None}, "no VAE to decode them"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(1, SmallDiT(), lambda model: attach(model, **changes))


def test_a_folder_holds_a_vae_of_any_family(tmp_path: Path) -> None:
    tiny_vae(tmp_path / "vae")
    model = SmallDiT()
    crepa = attach(model, vae=tmp_path)
    model(clip(), time=torch.ones(2))
    crepa.loss(step=0, latents=clip())
    assert crepa.frames_decoded == 2 * 9


def test_what_only_comes_after_the_block_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = SmallDiT()
    model.requires_grad_(False)
    model.out.requires_grad_(True)
    crepa = attach(model)
    model(clip(), time=torch.ones(2))
    crepa.loss(step=0, latents=clip())
    assert "only CREPA's projector learns from CREPA" in caplog.text


def test_taken_off_it_leaves_the_model_as_it_was() -> None:
    model = SmallDiT()
    before = set(model.state_dict())
    crepa = attach(model)
    assert any(name.startswith("crepa_projector") for name in model.state_dict())
    crepa.remove()
    assert set(model.state_dict()) == before
    assert not model._forward_hooks

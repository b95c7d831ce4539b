"""Every Python snippet of README and docs runs, and the README's diff is that of the example's marked lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import clip_pixels, tiny_dinov2, tiny_vae, tiny_wan, wan_inputs
from tiny_unets import tiny_kl, tiny_unet, unet_inputs

import crepa_kernels
from crepa_kernels.config.__main__ import page as options_page

ROOT = Path(__file__).resolve().parents[1]
# The Japanese README's code is the English one's, below.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its snippets are for other trainers, which tests/integrations/ has: it runs them.
ELSEWHERE = {"other-trainers.md"}
SNIPPETS = [
    (f"{page.name}: {title}", code)
    for page in PAGES
    if page.name not in ELSEWHERE
    for title, part in re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", page.read_text(), re.MULTILINE)
    for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL)
]
CREPA = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_resize": "grid"}
MAIN = torch.zeros((), requires_grad=True)
Known = dict[str, Any]


def of_the_loss() -> Known:
    tokens, patches = torch.randn(1, 2, 1560, 1536, requires_grad=True), torch.randn(1, 2, 1369, 1536)
    return {"hidden_states": tokens, "teacher_features": patches, "main_loss": MAIN}


def of_relations() -> Known:
    tokens, patches = torch.randn(1, 2, 1560, 16, requires_grad=True), torch.randn(1, 2, 1369, 8)
    projector = crepa_kernels.CrepaProjector(hidden_size=16, feature_size=8)
    return {"hidden_states": tokens, "features": patches, "projector": projector, "main_loss": MAIN}


def on_a_transformer(transformer: WanTransformer3DModel) -> Known:
    inputs = wan_inputs()
    names = {"noisy_latents": "hidden_states", "timestep": "timestep", "text": "encoder_hidden_states"}
    return {
        **{name: inputs[argument] for name, argument in names.items()},
        "torch": torch,
        "transformer": transformer,
        "main_loss": MAIN,
        "step": 0,
        "latents": torch.randn_like(inputs["hidden_states"]),
    }


def of_layersync() -> Known:
    known = on_a_transformer(tiny_wan(num_layers=21))
    encoder = tiny_dinov2()
    return {**known, "crepa": crepa_kernels.CrepaRegularizer(CREPA, known["transformer"], tiny_vae(), encoder)}


def of_ones_own_teacher() -> Known:
    names = {"FrozenEncoder": crepa_kernels.FrozenEncoder, "CrepaRegularizer": crepa_kernels.CrepaRegularizer}
    return {**on_a_transformer(tiny_wan()), **names, "backbone": torch.nn.Conv2d(3, 384, 16, 16), "settings": CREPA}


def of_u_repa() -> Known:
    tiny_dinov2(Path("facebook/dinov2-giant"), hidden_size=1536, num_hidden_layers=1, mlp_ratio=1)  # is the hub id, too
    call = unet_inputs(batch=1)
    return {
        "unet": tiny_unet(),
        "vae": tiny_kl(),
        "AdamW": torch.optim.AdamW,
        "noisy": call["sample"],
        "timesteps": call["timestep"],
        "text": call["encoder_hidden_states"],
        "added": call["added_cond_kwargs"],
        "latents": torch.randn_like(call["sample"]),
        "main_loss": MAIN,
        "step": 0,
    }


# What stands before each snippet in its page.
KNOWN: dict[str, Callable[[], Known]] = {
    "README.md: The loss alone": of_the_loss,
    "families.md: UNets: U-REPA": of_u_repa,
    "losses.md: LayerSync in full": of_layersync,
    "losses.md: Relations of tokens: `relational_loss`": of_relations,
    "training.md: Your own teacher": of_ones_own_teacher,
}


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_snippet_is_known() -> None:
    assert [title for title, _ in SNIPPETS] == sorted(KNOWN, key=[title for title, _ in SNIPPETS].index)
    written = sum(page.read_text().count("```python") for page in PAGES if page.name not in ELSEWHERE)
    assert written == len(SNIPPETS)


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_a_snippet_runs(title: str, code: str) -> None:
    torch.manual_seed(0)
    known = KNOWN[title]()
    exec(code, known)
    if "loss" in known:
        assert known["loss"].isfinite()
        known["loss"].backward()


def test_the_teacher_of_ones_own_teaches() -> None:
    (code,) = [code for title, code in SNIPPETS if title == "training.md: Your own teacher"]
    known = of_ones_own_teacher()
    exec(code, known)
    known["transformer"](**wan_inputs())
    loss, logs = known["crepa"].loss(step=0, pixels=clip_pixels())
    assert loss == logs["crepa_loss"] == -0.5 * logs["crepa_alignment_score"]
    assert not known["backbone"].weight.requires_grad


def test_the_readmes_diff_is_the_marked_lines_of_the_example() -> None:
    script = (ROOT / "examples/train_wan_lora.py").read_text().split("from __future__")[1].splitlines()
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = diff.splitlines()
    marked = [line for line in script if re.search("# CREPA(:|$)", line)]
    assert [line[1:] for line in lines if line[0] == "+"] == marked
    rest = iter(script)
    assert [line for line in lines if line[0] not in "+ " or line[1:] not in rest] == []


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_the_readme_is_read_in_four_minutes() -> None:
    assert len(prose((ROOT / "README.md").read_text()).split()) < 4 * 230


def test_the_japanese_readme_has_the_same_code_numbers_and_links() -> None:
    english, japanese = ((ROOT / name).read_text() for name in ("README.md", "README.ja.md"))

    def facts(text: str) -> tuple[list[str], list[str], set[str]]:
        targets = {target for target in re.findall(r"\]\(([^)]*)\)", text) if not target.startswith("README")}
        numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"\]\([^)]*\)", "", prose(text)))
        return re.findall(r"```.*?```", text, re.DOTALL), sorted(numbers), targets

    assert facts(japanese) == facts(english)


def test_the_page_of_options_is_that_of_the_schemas() -> None:
    assert (ROOT / "docs/options.md").read_text() == options_page() + "\n"


def test_every_key_is_in_the_page_of_options() -> None:
    page = (ROOT / "docs/options.md").read_text()
    kinds = (crepa_kernels.CrepaConfig, crepa_kernels.UrepaConfig, crepa_kernels.LayerSyncConfig)
    keys = {key for kind in kinds for key in kind.model_fields}
    assert set(re.findall(r"^\| `((?:crepa|irepa|urepa|layersync)_\w+)` \| `[^|]*` \| [^|]+ \| ", page, re.M)) == keys

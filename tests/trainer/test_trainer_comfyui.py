"""A LoRA for ComfyUI: exactly the original names, and exactly what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from crepa_trainer.adapters import Adapter
from crepa_trainer.checkpoint import read_checkpoint
from crepa_trainer.cli import main
from crepa_trainer.comfyui import comfyui_lora, original_layers
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.plan import count_parameters
from crepa_trainer.state import add_lora
from crepa_trainer.state_files import json_digest
from diffusers.loaders import single_file_utils
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from said import everything_said
from tiny_hub_folders import save_tiny_cogvideox, save_tiny_kandinsky, save_tiny_wan_image
from tiny_pipelines import (
    save_tiny_hunyuan_pipeline,
    save_tiny_ltx_pipeline,
    save_tiny_sana_pipeline,
)
from torch import Tensor
from training_runs import save_models, tiny_config, tiny_settings, train

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RANK_2 = Adapter("lora", 2, 2, 0.0)
Folders = Callable[[str], TrainingFamily]

SAVED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "wan": (save_tiny_wan_image, "image2video"),
    "ltxvideo": (save_tiny_ltx_pipeline, "text2video"),
    "hunyuan_video": (save_tiny_hunyuan_pipeline, "text2video"),
    "kandinsky5_video": (save_tiny_kandinsky, "text2video"),
    "cogvideox": (save_tiny_cogvideox, "text2video"),
    "sanavideo": (save_tiny_sana_pipeline, "text2video"),
}
# The original state dicts' names of layers that take a LoRA: of the first block of each kind, and outside blocks.
ORIGINAL = {
    "wan": (
        """
        blocks.0.self_attn.q blocks.0.self_attn.k blocks.0.self_attn.v blocks.0.self_attn.o
        blocks.0.cross_attn.q blocks.0.cross_attn.k blocks.0.cross_attn.v blocks.0.cross_attn.o
        blocks.0.cross_attn.k_img blocks.0.cross_attn.v_img blocks.0.ffn.0 blocks.0.ffn.2
        """,
        """
        patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2 time_projection.1
        img_emb.proj.1 img_emb.proj.3 head.head
        """,
    ),
    "ltxvideo": (
        """
        transformer_blocks.0.attn1.to_q transformer_blocks.0.attn1.to_k transformer_blocks.0.attn1.to_v
        transformer_blocks.0.attn1.to_out.0 transformer_blocks.0.attn2.to_q transformer_blocks.0.attn2.to_k
        transformer_blocks.0.attn2.to_v transformer_blocks.0.attn2.to_out.0 transformer_blocks.0.ff.net.0.proj
        transformer_blocks.0.ff.net.2
        """,
        """
        patchify_proj adaln_single.linear adaln_single.emb.timestep_embedder.linear_1
        adaln_single.emb.timestep_embedder.linear_2 caption_projection.linear_1 caption_projection.linear_2
        proj_out
        """,
    ),
    "hunyuan_video": (
        """
        double_blocks.0.img_attn_qkv double_blocks.0.img_attn_proj double_blocks.0.txt_attn_qkv
        double_blocks.0.txt_attn_proj double_blocks.0.img_mlp.fc1 double_blocks.0.img_mlp.fc2
        double_blocks.0.txt_mlp.fc1 double_blocks.0.txt_mlp.fc2 double_blocks.0.img_mod.linear
        double_blocks.0.txt_mod.linear single_blocks.0.linear1 single_blocks.0.linear2
        single_blocks.0.modulation.linear txt_in.individual_token_refiner.blocks.0.self_attn_qkv
        txt_in.individual_token_refiner.blocks.0.self_attn_proj txt_in.individual_token_refiner.blocks.0.mlp.fc1
        txt_in.individual_token_refiner.blocks.0.mlp.fc2
        txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1
        """,
        """
        img_in.proj txt_in.input_embedder txt_in.t_embedder.mlp.0 txt_in.t_embedder.mlp.2
        txt_in.c_embedder.linear_1 txt_in.c_embedder.linear_2 time_in.mlp.0 time_in.mlp.2 vector_in.in_layer
        vector_in.out_layer guidance_in.mlp.0 guidance_in.mlp.2 final_layer.linear
        """,
    ),
    "kandinsky5_video": (
        """
        text_transformer_blocks.0.self_attention.to_query text_transformer_blocks.0.self_attention.to_key
        text_transformer_blocks.0.self_attention.to_value text_transformer_blocks.0.self_attention.out_layer
        text_transformer_blocks.0.feed_forward.in_layer text_transformer_blocks.0.feed_forward.out_layer
        text_transformer_blocks.0.text_modulation.out_layer visual_transformer_blocks.0.self_attention.to_query
        visual_transformer_blocks.0.self_attention.to_key visual_transformer_blocks.0.self_attention.to_value
        visual_transformer_blocks.0.self_attention.out_layer
        visual_transformer_blocks.0.cross_attention.to_query visual_transformer_blocks.0.cross_attention.to_key
        visual_transformer_blocks.0.cross_attention.to_value
        visual_transformer_blocks.0.cross_attention.out_layer visual_transformer_blocks.0.feed_forward.in_layer
        visual_transformer_blocks.0.feed_forward.out_layer
        visual_transformer_blocks.0.visual_modulation.out_layer
        """,
        """
        time_embeddings.in_layer time_embeddings.out_layer text_embeddings.in_layer
        pooled_text_embeddings.in_layer visual_embeddings.in_layer out_layer.modulation.out_layer
        out_layer.out_layer
        """,
    ),
}
# Of the last layer the halves are the other way round in the original.
SWAPPED = {"hunyuan_video": ["norm_out.linear"]}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("families")

    def family(name: str) -> TrainingFamily:
        save, task = SAVED[name]
        if not (root / name).is_dir():
            save(root / name)
        return TrainingFamily.of(str(root / name), task)

    return family


def weights_of_layers(transformer: Any) -> dict[str, Any]:
    """Every layer that takes a LoRA, by name."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return {name: each for name, each in transformer.named_modules() if isinstance(each, kinds)}


def adapted(family: TrainingFamily, targets: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """A LoRA of rank 2 of whole numbers, whose products are exact in every order."""
    transformer: Any = family.load_transformer(torch.float32)
    settings = tiny_settings(Path("models"), Path("output"), lora_rank=2, lora_targets=targets)
    add_lora(transformer, family, settings)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(-8, 9, tensor.shape, generator=generator).float()
        for name, tensor in sorted(get_peft_model_state_dict(transformer).items())
    }


def delta(lora: Mapping[str, Tensor], layer: str) -> Tensor:
    down, up = lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"]
    return up.flatten(1) @ down.flatten(1)


def without_alpha(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As those of diffusers' converters read it that know no alpha, whose meaning is 1 here."""
    for name, alpha in lora.items():
        if name.endswith(".alpha"):
            assert alpha.shape == ()
            assert alpha == len(lora[name.replace(".alpha", ".lora_A.weight")])
    return {name: tensor for name, tensor in lora.items() if not name.endswith(".alpha")}


def deltas(transformer: Any) -> dict[str, Tensor]:
    """What the adapter that was loaded adds to each weight."""
    adapted = {name: each for name, each in transformer.named_modules() if hasattr(each, "lora_A")}
    return {name: each.get_delta_weight("default_0").detach() for name, each in adapted.items()}


def check_read_back(family: TrainingFamily, lora: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> None:
    """The stock pipeline, given the file, adds to every weight what the LoRA adds, and nothing else."""
    pipeline = getattr(diffusers, family.pipelines[family.task]).from_pretrained(family.model)
    with everything_said() as said:
        pipeline.load_lora_weights(dict(file))
    assert said == []
    found = deltas(pipeline.transformer)
    assert {f"{name}.lora_A.weight" for name in found} == {name for name in lora if name.endswith(".lora_A.weight")}
    for name, added in found.items():
        assert torch.equal(added, delta(lora, name))


@pytest.mark.parametrize("name", ORIGINAL)
def test_every_layer_has_exactly_its_original_name(families: Folders, name: str) -> None:
    family = families(name)
    layers = weights_of_layers(family.load_transformer(torch.float32))
    found = original_layers(family, [each for each in layers if each not in SWAPPED.get(name, [])])
    blocks, outside = (set(each.split()) for each in ORIGINAL[name])
    numbered = {each for each in found if "blocks." in each}
    assert {each for each in numbered if "blocks.0." in each} == blocks
    assert found.keys() - numbered == outside
    # Each layer once; of those that are one in the original, the trainer knows the outputs without the weights.
    parts = [part for each in found.values() for part in each]
    assert sorted(parts) == sorted(set(layers) - set(SWAPPED.get(name, [])))
    for each in found.values():
        if len(each) > 1:
            assert [family.original_rows(part) for part in each] == [len(layers[part].weight) for part in each]


@pytest.mark.parametrize(
    ("name", "converter"),
    [
        ("wan", single_file_utils.convert_wan_transformer_to_diffusers),
        ("ltxvideo", single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers),
        ("hunyuan_video", single_file_utils.convert_hunyuan_video_transformer_to_diffusers),
    ],
)
def test_the_names_are_those_that_stock_diffusers_converts_whole_checkpoints_from(
    families: Folders, name: str, converter: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    family = families(name)
    layers = [each for each in weights_of_layers(family.load_transformer(torch.float32)) if each != "norm_out.linear"]
    rows = 3 * 3072 + 3  # it cuts single blocks of HunyuanVideo at the real model's width
    original = {f"{each}.weight": torch.zeros(rows, 1) for each in original_layers(family, layers)}
    assert sorted(converter(original)) == sorted(f"{layer}.weight" for layer in layers)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("wan", (*ATTENTION, "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2")),
        ("ltxvideo", (*ATTENTION, "ff.net.0.proj", "ff.net.2")),
    ],
)
def test_stock_diffusers_reads_it_back_to_equal_weights(families: Folders, name: str, targets: tuple[str, ...]) -> None:
    family = families(name)
    lora = adapted(family, targets)
    file = comfyui_lora(family, lora, RANK_2)
    assert all(each.startswith("diffusion_model.") for each in file)
    assert sum(each.endswith(".alpha") for each in file) == len(lora) // 2
    # Of Wan it reads alpha, of LTX it refuses a file that has one.
    check_read_back(family, lora, file if name == "wan" else without_alpha(file))


@pytest.mark.parametrize("targets", [None, (*ATTENTION, "add_k_proj", "proj_mlp"), ("to_v",)])
def test_fused_layers_add_exactly_what_their_parts_do(families: Folders, targets: tuple[str, ...] | None) -> None:
    family = families("hunyuan_video")
    layers = weights_of_layers(family.load_transformer(torch.float32))
    lora = adapted(family, targets)
    file = without_alpha(comfyui_lora(family, lora, RANK_2))
    trained = [each.removesuffix(".lora_A.weight") for each in lora if each.endswith(".lora_A.weight")]
    for original, parts in original_layers(family, trained).items():
        zero = [torch.zeros_like(layers[part].weight) for part in parts]
        added = [delta(lora, part) if part in trained else none for part, none in zip(parts, zero, strict=True)]
        assert torch.equal(delta(file, f"diffusion_model.{original}"), torch.cat(added))
        assert len(file[f"diffusion_model.{original}.lora_A.weight"]) == 2 * len(set(parts) & set(trained))


def test_stock_diffusers_reads_hunyuans_fused_layers_back(families: Folders, tmp_path: Path) -> None:
    family = families("hunyuan_video")
    # Of the text's refiner it cuts a fused lora_A in three, which no LoRA of three parts survives.
    lora = {name: each for name, each in adapted(family).items() if name.startswith("transformer_blocks.")}
    check_read_back(family, lora, without_alpha(comfyui_lora(family, lora, RANK_2)))
    # Single blocks it takes for those of the real model's width.
    folder = save_tiny_hunyuan_pipeline(tmp_path / "wide")
    config = folder / "transformer" / "config.json"
    wide = {**json.loads(config.read_text()), "num_attention_heads": 24, "attention_head_dim": 128}
    config.write_text(json.dumps(wide))
    family = TrainingFamily.of(str(folder))
    draw = partial(torch.randint, -8, 9, generator=torch.Generator().manual_seed(0))
    rows = {"single_transformer_blocks.0.proj_mlp": int(3072 * wide["mlp_ratio"])}
    double = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    layers = [*double, *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"), *rows]
    lora = {f"{layer}.lora_A.weight": draw((2, 3072)).float() for layer in layers}
    lora |= {f"{layer}.lora_B.weight": draw((rows.get(layer, 3072), 2)).float() for layer in layers}
    file = without_alpha(comfyui_lora(family, lora, RANK_2))
    back: Any = diffusers.HunyuanVideoPipeline.lora_state_dict(file)
    back = {name.removeprefix("transformer."): tensor for name, tensor in back.items()}
    assert back.keys() == lora.keys()
    for layer in layers:
        assert torch.equal(delta(back, layer), delta(lora, layer))


@pytest.mark.parametrize("name", ["cogvideox", "sanavideo"])
def test_a_family_without_known_names_is_refused_by_the_plan(families: Folders, name: str) -> None:
    settings = tiny_settings(Path("models"), Path("output"), lora_format="comfyui")
    said = f"names for the layers of {name} are not known, those of hunyuan_video, kandinsky5_video, ltxvideo, wan are"
    with pytest.raises(ValueError, match=said):
        count_parameters(settings, families(name))


def test_a_layer_whose_halves_are_swapped_is_refused(families: Folders) -> None:
    family = families("hunyuan_video")
    with pytest.raises(ValueError, match=r"ComfyUI's name for norm_out.linear of hunyuan_video is not known"):
        original_layers(family, ["norm_out.linear"])


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_run_that_goes_on_with_another_format_leaves_no_file_of_fewer_steps(models: Path, tmp_path: Path) -> None:
    for steps, form in ((1, "both"), (2, "peft"), (3, "comfyui")):
        changes = {"max_train_steps": steps, "lora_format": form, "resume": "latest", "ema_decay": 0.5}
        train(tiny_settings(models, tmp_path / "run", **changes), tiny_config(models))
        trained = tmp_path / "run" / "trained"
        for folder in (trained, trained / "ema"):
            files = [each for each in folder.glob("*.safetensors") if not each.name.startswith("crepa")]
            assert {header(each)["steps"] for each in files} == {str(steps)}
            assert len(files) == (2 if form == "both" else 1)


def test_a_run_and_its_checkpoint_write_both_files_with_what_they_are_in_the_header(tmp_path: Path) -> None:
    models, output = save_models(tmp_path), tmp_path / "run"
    settings = tiny_settings(models, output, max_train_steps=2, ema_decay=0.5, lora_format="both")
    train(settings, tiny_config(models))
    files = ["comfyui_lora.safetensors", "pytorch_lora_weights.safetensors"]
    trained, checkpoint = output / "trained", output / "checkpoints" / "step-00000002"
    for folder in (trained, trained / "ema"):
        assert sorted(each.name for each in folder.glob("*lora*")) == files
    # Beside ComfyUI's file, and CREPA's projector, diffusers finds its own, and ComfyUI's by its name.
    pipeline = diffusers.WanPipeline.from_pretrained(models / "wan")
    with everything_said() as said:
        pipeline.load_lora_weights(trained)
        ours = deltas(pipeline.transformer)
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(trained, weight_name=files[0])
    assert said == []
    theirs = deltas(pipeline.transformer)
    assert len(ours) == 3 * 8
    assert all(ours[name].any() and torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    # The same from the checkpoint.
    for form in ("comfyui", "both"):
        assert main(["export", str(checkpoint), "--format", form, "--output", str(tmp_path / form)]) == 0
    assert [each.name for each in (tmp_path / "comfyui").iterdir()] == files[:1]
    assert main(["export", str(checkpoint), "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert all((trained / name).read_bytes() == (tmp_path / "both" / name).read_bytes() for name in files)
    written = [checkpoint / files[1], tmp_path / "comfyui" / files[0], tmp_path / "peft" / "adapter_model.safetensors"]
    written += [folder / name for folder in (trained, trained / "ema", tmp_path / "both") for name in files]
    (said_by_file,) = {json.dumps(header(each), sort_keys=True) for each in written}
    said_of = json.loads(said_by_file)
    assert set(json.loads(said_of.pop("versions"))) == {"crepa-kernels", "diffusers", "peft", "torch"}
    digest = said_of.pop("settings_sha256")
    assert digest == json_digest(dict(read_checkpoint(checkpoint).identity))
    assert said_of == {
        "format": "pt",
        "base_model": "wan",
        "rank": "2",
        "alpha": "2",
        "targets": json.dumps(
            [f"blocks.*.{part}.{layer}" for part in ("attn1", "attn2") for layer in sorted(ATTENTION)]
        ),
        "steps": "2",
    }


def test_a_wrong_format_is_one_line_that_names_the_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), "--format", "kohya"])
    said = capsys.readouterr().err
    assert all(form in said for form in ("kohya", "diffusers", "comfyui", "both", "peft"))

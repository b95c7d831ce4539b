"""Settings of `crepa-train run`: the file, the command line over it, presets under it, and what is refused."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.settings import RunSettings, add_arguments, given_values, load_settings
from tiny_pipelines import save_tiny_wan_pipeline

from crepa_kernels.config import ConfigError, CrepaConfig

REQUIRED = {"model": "wan", "data": "videos", "output": "out", "max_train_steps": 10}


def write(folder: Path, values: Any) -> Path:
    path = folder / "settings.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def from_words(*words: str, config: Path | None = None) -> tuple[RunSettings, CrepaConfig]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    given, rest = parser.parse_known_args(words)
    return load_settings(config, given_values(given), rest=rest)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan_pipeline(tmp_path_factory.mktemp("model") / "wan")


def test_a_file_gives_both_settings(tmp_path: Path) -> None:
    file = {
        **REQUIRED,
        "resolutions": [[32, 48], [48, 32]],
        "frame_counts": [9, 5],
        "lora_targets": ["to_q"],
        "learning_rate": 1,
        "max_train_steps": 1e3,
        "cache": None,
        "crepa_enabled": True,
        "crepa_block_index": 1,
    }
    settings, config = load_settings(write(tmp_path, file), {})
    assert (settings.model, settings.data, settings.output) == ("wan", Path("videos"), Path("out"))
    assert (settings.resolutions, settings.frame_counts) == (((32, 48), (48, 32)), (9, 5))
    assert settings.lora_targets == ("to_q",)
    assert settings.learning_rate == 1.0
    assert settings.max_train_steps == 1000
    assert settings.cache_folder == Path("out/cache")
    assert config == CrepaConfig(crepa_enabled=True, crepa_block_index=1)


def test_a_table_of_toml_is_a_mapping_of_arguments(tmp_path: Path) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in REQUIRED.items()]
    file = tmp_path / "settings.toml"
    file.write_text("\n".join([*lines, "[optimizer_args]", "betas = [0.9, 0.99]", "eps = 1e-6"]))
    settings, _ = load_settings(file, {"seed": 3})
    assert settings == RunSettings(**REQUIRED, optimizer_args={"betas": [0.9, 0.99], "eps": 1e-6}, seed=3)
    file.write_text("\n".join([*lines, "[optimizer_args]", "eps = 2024-01-02"]))
    with pytest.raises(
        ConfigError, match=r"optimizer_args = .*2024.*: its values must be numbers that are finite, text, true"
    ):
        load_settings(file, {})


def test_settings_are_an_immutable_value() -> None:
    settings = RunSettings(**REQUIRED)
    assert hash(settings) == hash(RunSettings(**REQUIRED))
    given = RunSettings(**REQUIRED, optimizer_args={"betas": [0.9, 0.99], "eps": 1e-6})
    assert (hash(given), given != settings) == (hash(RunSettings(**json.loads(given.model_dump_json()))), True)
    assert pickle.loads(pickle.dumps(given)) == given
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert RunSettings(**settings.model_dump()) == settings
    assert RunSettings(**json.loads(settings.model_dump_json())) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3


def test_every_key_is_an_option_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, {**REQUIRED, "seed": 1, "crepa_lambda": 0.25, "crepa_adjacent_distance": 2})
    settings, config = from_words(
        *("--seed", "7"),
        *("--resolutions", "[[32, 48]]"),
        "--frame_counts=[5]",
        "--strict",
        *("--gradient_checkpointing", "false"),
        *("--ema_decay", "0.9"),
        *("--validation_prompts", '["a red square"]', "--validation_every", "2"),
        *("--resume", "latest"),
        *("--optimizer", "lion", "--optimizer_args", '{"betas": [0.9, 0.99]}'),
        *("--crepa_lambda", "0.125"),
        config=file,
    )
    assert (settings.seed, settings.resolutions, settings.frame_counts) == (7, ((32, 48),), (5,))
    assert (settings.strict, settings.gradient_checkpointing, settings.ema_decay) == (True, False, 0.9)
    assert (settings.optimizer, settings.optimizer_args) == ("lion", {"betas": (0.9, 0.99)})
    assert (settings.validation_prompts, settings.resume) == (("a red square",), "latest")
    assert (config.crepa_lambda, config.crepa_adjacent_distance) == (0.125, 2)
    options = {f"--{key}" for key in RunSettings.model_fields}
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    assert options <= set(parser.format_help().replace("[", " ").split())


def test_everything_can_be_on_the_command_line() -> None:
    words = [word for key, value in REQUIRED.items() for word in (f"--{key}", str(value))]
    assert from_words(*words)[0] == RunSettings(**REQUIRED)


def test_a_preset_lies_under_the_users_own_keys(tmp_path: Path) -> None:
    own = {"crepa_block_index": 1, "crepa_lambda": 0.25, "crepa_similarity_threshold": None}
    file = write(tmp_path, {**REQUIRED, "preset": "t2v", **own})
    config = load_settings(file, {})[1]
    assert config == CrepaConfig.preset("t2v", **own)
    assert (config.crepa_scheduler, config.crepa_lambda, config.crepa_similarity_threshold) == ("cosine", 0.25, None)
    replaced = from_words("--preset", "i2v", "--crepa_model", "dinov2_s", config=file)[1]
    assert replaced == CrepaConfig.preset("i2v", **own, crepa_encoder="dinov2_vits14")


def test_crepa_options_that_do_nothing_are_a_warning_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    words = [word for key, value in REQUIRED.items() for word in (f"--{key}", str(value))]
    from_words(*words, "--crepa_enabled", "false", "--crepa_lambda", "0.3")
    from_words(*words)
    assert caplog.records == []
    from_words(*words, "--crepa_lambda", "0.3")
    (told,) = caplog.records
    assert (told.levelname, "without which crepa_lambda does nothing" in told.getMessage()) == ("WARNING", True)


def test_the_block_is_the_familys_recommended_one_and_told(
    tmp_path: Path, pipeline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, {**REQUIRED, "model": str(pipeline), "preset": "i2v"})
    with caplog.at_level(logging.INFO, "crepa_trainer"):
        config = load_settings(file, {})[1]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "crepa_block_index = 8, the recommended block for wan"
    # The tiny model has three blocks: that 8 is not among them is said by the model's check, not hidden here.
    assert config == CrepaConfig.preset("i2v", family="wan")
    caplog.clear()
    with caplog.at_level(logging.INFO, "crepa_trainer"):
        assert load_settings(file, {"crepa_block_index": 2})[1].crepa_block_index == 2
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"crepa_teacher_block_index = 5: must be deeper.*crepa_block_index = 8"):
        load_settings(file, {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 5})


def test_a_disabled_crepa_needs_neither_block_nor_model(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, REQUIRED), {})[1] == CrepaConfig()
    off = load_settings(write(tmp_path, {**REQUIRED, "preset": "t2v", "crepa_enabled": False}), {})[1]
    assert not off.crepa_enabled


def test_a_model_without_its_family_is_told_before_anything(tmp_path: Path) -> None:
    file = write(tmp_path, {**REQUIRED, "model": str(tmp_path / "nowhere"), "preset": "i2v"})
    with pytest.raises(ValueError, match="nowhere"):
        load_settings(file, {})


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_train_step": 5}, ["max_train_step = 5: unknown key; did you mean max_train_steps?"]),
    ({"Learning-Rate": 1}, ["did you mean learning_rate?"]),
    ({"crepa_lamda": 1}, ["crepa_lamda = 1: unknown key; did you mean crepa_lambda?"]),
    ({"crep_lambda": 1}, ["did you mean crepa_lambda?"]),
    ({"max_train_steps": "10"}, ['max_train_steps = "10": ', "an integer >= 1"]),
    ({"max_train_steps": 1.5}, ["max_train_steps = 1.5: "]),
    ({"max_train_steps": True}, ["max_train_steps = true: "]),
    ({"max_train_steps": None}, ["max_train_steps: ", "required"]),
    ({"model": ""}, ['model = "": ']),
    ({"data": 3}, ["data = 3: folder of videos"]),
    ({"data": ""}, ['data = "": folder of videos']),
    ({"output": []}, ["output = []: "]),
    ({"output": "videos/../videos"}, ["output = ", "another folder than data"]),
    ({"task": "t2v"}, ['task = "t2v": ', '"text2video" or "image2video"']),
    ({"expert": "middle"}, ['expert = "middle": ', '"high" or "low"']),
    ({"training": "Lora"}, ['training = "Lora": ', '"lora" or "full"']),
    ({"lora_rank": 0}, ["lora_rank = 0: ", ">= 1"]),
    ({"report_to": [1]}, ["report_to = [1]: ", "a list of names such as"]),
    ({"lora_type": "lora+"}, ['lora_type = "lora+": ', '"lora", "dora", "rslora", "loha" or "lokr"']),
    ({"lora_alpha": 0}, ["lora_alpha = 0: ", "a number > 0"]),
    ({"lora_dropout": 1}, ["lora_dropout = 1: ", "[0, 1)"]),
    ({"lora_type": "dora", "training": "full"}, ['lora_type = "dora": training = "full" trains all weights']),
    ({"lora_alpha": 2, "training": "full"}, ['lora_alpha = 2.0: training = "full" trains all weights']),
    ({"lora_dropout": 0.1, "lora_type": "lokr", "lora_format": "peft"}, ["lora_dropout = 0.1: ", "has none in peft"]),
    ({"lora_type": "loha"}, ['lora_format = "diffusers": pipelines of stock', 'must be "peft" or "comfyui"']),
    (
        {"lora_type": "dora", "lora_format": "both"},
        ['lora_format = "both": ComfyUI reads lora_type = "dora"'],
    ),
    ({"optimizer": "adamv"}, ['optimizer = "adamv": ', '"adamw", "adam", ']),
    ({"optimizer_args": [1]}, ["optimizer_args = [1]: ", "a mapping such as"]),
    ({"optimizer": "prodigy"}, ["learning_rate = 0.0001: prodigy finds the step itself", "as a rule 1"]),
    (
        {"optimizer": "prodigy", "learning_rate": 1, "projector_learning_rate": 2},
        ["projector_learning_rate = 2.0: prodigy has one for all", "learning_rate = 1"],
    ),
    ({"optimizer": "adamw_schedulefree", "lr_warmup_steps": 3}, ["lr_warmup_steps = 3: ", '{"warmup_steps": ...}']),
    (
        {"optimizer": "sgd_schedulefree", "lr_scheduler": "cosine"},
        ['lr_scheduler = "cosine": sgd_schedulefree needs no'],
    ),
    ({"optimizer": "adamw_schedulefree", "ema_decay": 0.9}, ["ema_decay = 0.9: ", "averages the weights itself"]),
    ({"lora_targets": []}, ["lora_targets = []: "]),
    ({"lora_format": "kohya"}, ['lora_format = "kohya": ', '"diffusers", "comfyui", "both" or "peft"']),
    ({"lora_format": "both", "training": "full"}, ['lora_format = "both": training = "full" trains all weights']),
    ({"lora_targets": "to_q"}, ['lora_targets = "to_q": ', '["to_q", "to_v"]']),
    ({"resolutions": [480, 832]}, ["resolutions = [480, 832]: ", "[[480, 832]]"]),
    ({"resolutions": [[480]]}, ["resolutions = [[480]]: "]),
    ({"resolutions": [[0, 832]]}, ["resolutions = [[0, 832]]: "]),
    ({"frame_counts": 81}, ["frame_counts = 81: ", "[81]"]),
    ({"frame_counts": [True]}, ["frame_counts = [true]: "]),
    ({"learning_rate": 0}, ["learning_rate = 0: ", "> 0"]),
    ({"workers": -1}, ["workers = -1: "]),
    ({"workers": 1.5}, ["workers = 1.5: "]),
    ({"learning_rate": float("nan")}, ["learning_rate = NaN: "]),
    ({"projector_learning_rate": -1}, ["projector_learning_rate = -1: "]),
    ({"weight_decay": "none"}, ['weight_decay = "none": ']),
    ({"lr_scheduler": "cosin"}, ['lr_scheduler = "cosin": ', '"cosine"']),
    ({"lr_warmup_steps": 5}, ["lr_warmup_steps = 5: ", "constant_with_warmup"]),
    ({"lr_warmup_steps": 11, "lr_scheduler": "cosine"}, ["lr_warmup_steps = 11: ", "at most max_train_steps = 10"]),
    ({"max_grad_norm": 0}, ["max_grad_norm = 0: "]),
    ({"mixed_precision": "fp8"}, ['mixed_precision = "fp8": ']),
    ({"base_precision": "int4"}, ['base_precision = "int4": ', '"fp8_dynamic" or "nf4"']),
    ({"base_precision": "fp8", "training": "full"}, ['base_precision = "fp8": training = "full" keeps all weights']),
    ({"base_precision": "int8", "mixed_precision": "no"}, ['base_precision = "int8": it computes in bf16']),
    ({"base_precision": "fp8", "compile_blocks": True}, ['base_precision = "fp8": compile_blocks must be false']),
    ({"offload": "model"}, ['offload = "model": ', '"none", "block" or "leaf"']),
    ({"offload": "block", "training": "full"}, ['offload = "block": training = "full" has no frozen weights']),
    ({"offload": "leaf", "gradient_checkpointing": False}, ['offload = "leaf": ', "must be true"]),
    ({"offload": "leaf", "compile_blocks": True}, ['offload = "leaf": compile_blocks must be false']),
    ({"offload": "block", "base_precision": "nf4"}, ['offload = "block": ', "base_precision must be another"]),
    ({"base_precision": "int8", "lora_type": "dora"}, ['base_precision = "int8": lora_type = "dora" has only been']),
    (
        {"offload": "leaf", "lora_type": "loha", "lora_format": "peft"},
        ['offload = "leaf": lora_type = "loha" has only been'],
    ),
    ({"sharding": "zero2"}, ['sharding = "zero2": ', 'must be "none" or "fsdp2"']),
    (
        {"sharding": "fsdp2", "mixed_precision": "fp16"},
        ['mixed_precision = "fp16": sharding = "fsdp2" has no gradient scaler'],
    ),
    ({"sharding": "fsdp2", "optimizer": "lion"}, ['optimizer = "lion": sharding = "fsdp2" needs "adamw" or']),
    ({"sharding": "fsdp2", "offload": "block"}, ['offload = "block": sharding = "fsdp2" needs "none"']),
    ({"sharding": "fsdp2", "context_parallel": 2}, ['context_parallel = 2: sharding = "fsdp2" needs 1']),
    ({"sharding": "fsdp2", "lora_type": "dora"}, ['lora_type = "dora": sharding = "fsdp2" needs "lora" or "rslora"']),
    ({"gradient_checkpointing": 1}, ["gradient_checkpointing = 1: ", "true or false"]),
    ({"ema_decay": 1}, ["ema_decay = 1: ", "[0, 1)"]),
    ({"fps": 0}, ["fps = 0: ", "> 0, at most 1000"]),
    ({"fps": 1001}, ["fps = 1001: "]),
    ({"hdr": "raw"}, ['hdr = "raw": ', '"tonemap" or "skip"']),
    ({"seed": -1}, ["seed = -1: "]),
    ({"seed": 2**32}, ["seed = 4294967296: ", "an integer from 0 to 4294967295"]),
    ({"validation_seed": 2**32}, ["validation_seed = 4294967296: ", "an integer from 0 to 4294967295"]),
    ({"step_timeout": 604801}, ["step_timeout = 604801: ", "from 1 to 604800"]),
    ({"optimizer_args": {"eps": float("inf")}}, ["optimizer_args = ", "its values must be numbers that are finite"]),
    ({"data": "vid\0eos"}, ['data = "vid\\u0000eos": folder of videos']),
    ({"model": "w\0n"}, ['model = "w\\u0000n": pipeline folder']),
    ({"report_to": ["wandb", "wandb"]}, ['report_to = ["wandb", "wandb"]: ', "each once"]),
    ({"seed": 2**63}, ["seed = 9223372036854775808: ", "at most 64 bits"]),
    ({"max_train_steps": 1e30}, ["max_train_steps = 1", "at most 64 bits"]),
    ({"resolutions": [[32, 2**63]]}, ["resolutions = [[32, 9223372036854775808]]: ", "at most 64 bits"]),
    ({"cache_teacher": "pixels"}, ['cache_teacher = "pixels": ', '"frames" or "features"']),
    ({"cache_teacher_precision": "fp4"}, ['cache_teacher_precision = "fp4": ', '"teacher" or "int8"']),
    ({"cache_teacher_precision": "int8"}, ['cache_teacher_precision = "int8": ', 'give cache_teacher = "features"']),
    ({"teacher_device": "gpu"}, ['teacher_device = "gpu": ', "must be a device"]),
    ({"teacher_device": "cpu", "teacher_offload": True}, ["teacher_offload = true: ", "give one of the two"]),
    ({"checkpoints_kept": 0}, ["checkpoints_kept = 0: "]),
    ({"validation_prompts": [""]}, ['validation_prompts = [""]: ']),
    ({"validation_prompts": ["a cat"]}, ['validation_prompts = ["a cat"]: ', "validation_every is not given"]),
    ({"validation_every": 5}, ["validation_every = 5: ", "validation_prompts is empty"]),
    ({"resume": True}, ["resume = true: ", '"latest"']),
    ({"layersync_student_block": -1}, ["layersync_student_block = -1: ", "an integer >= 0"]),
    ({"layersync_teacher_block": 1.5}, ["layersync_teacher_block = 1.5: ", "an integer >= 0"]),
    ({"layersync_student_block": 1, "layersync_teacher_block": 1}, ["layersync_teacher_block = 1: ", "another block"]),
    ({"layersync_enabled": True, "layersync_student_block": 1}, ["layersync_teacher_block = null: required when"]),
    ({"layersync_lambda": 0}, ["layersync_lambda = 0: ", "must be a number > 0"]),
    ({"layersync_lamda": 1}, ["layersync_lamda = 1: ", "did you mean layersync_lambda?"]),
    ({"irepa_enabled": True}, ["irepa_enabled = true: ", "needs crepa_enabled = true"]),
    ({"irepa_alfa": 1}, ["irepa_alfa = 1: unknown key"]),
    ({"preset": "t2w"}, ['preset = "t2w": ', "did you mean 't2v'?"]),
    ({"preset": 5}, ["preset = 5: must be one of i2v, t2v, solid_background"]),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[json.dumps(change) for change, _ in BAD])
def test_a_refused_key_is_one_line_with_value_and_rule(tmp_path: Path, change: Any, words: list[str]) -> None:
    file = write(tmp_path, {**REQUIRED, **change})
    with pytest.raises(ConfigError) as error:
        load_settings(file, {})
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(f"{file}: ")
    assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(ConfigError) as error:
        load_settings(write(tmp_path, REQUIRED), change)
    assert str(error.value).startswith(f"{file} and the command line: ")


def test_all_wrong_keys_are_one_error(tmp_path: Path) -> None:
    file = write(tmp_path, {"batch_size": 0, "sede": 1, "crepa_lambda": -1, "preset": "x", "output": "out"})
    with pytest.raises(ConfigError) as error:
        load_settings(file, {})
    keys = [problem.split(" = ")[0].split(":")[0] for problem in error.value.problems]
    assert keys == ["preset", "sede", "model", "data", "max_train_steps", "batch_size", "crepa_lambda"]
    assert str(error.value).startswith(f"{file}: 7 settings are wrong:")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": "wan",\n "data": }', ["not JSON", "line 2 column 10"]),
        ('{"model": "wan", "model": "ltx"}', ["each key may appear once; repeated: model"]),
        ('["model"]', ["one JSON object"]),
    ],
)
def test_a_file_that_is_not_one_json_object_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_settings(file, {})
    assert str(error.value).startswith(f"{file}: ")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-train-step", "5"], "--max-train-step: unknown option; did you mean --max_train_steps?"),
        (["--crepa_lamda=1"], "--crepa_lamda: unknown option; did you mean --crepa_lambda?"),
        (["--layersync_lamda", "1"], "--layersync_lamda: unknown option; did you mean --layersync_lambda?"),
        (["--preste", "t2v"], "did you mean --preset?"),
        (["-x"], "-x: unknown option"),
        (["--seed", "1", "2"], "2: not an option"),
    ],
)
def test_a_word_that_is_no_option_is_named(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_words(*words, config=write(tmp_path, REQUIRED))
    assert [message in problem for problem in error.value.problems] == [True]


def test_every_key_has_bad_input_or_is_a_plain_switch_or_count() -> None:
    tried = {key for change, _ in BAD for key in change}
    plain = {name for name, field in RunSettings.model_fields.items() if field.annotation in (bool, int)}
    strings_and_numbers = {"family", "cache", "validation_guidance"}
    assert set(RunSettings.model_fields) <= tried | plain | strings_and_numbers
    for name in sorted((plain | strings_and_numbers) - tried):
        with pytest.raises(ConfigError, match=rf"^{name} = \[\]: "):
            RunSettings(**REQUIRED | {name: []})


def test_the_schedulers_are_those_of_diffusers_that_need_no_rule_string() -> None:
    from typing import get_args

    from diffusers.optimization import SchedulerType

    names = get_args(RunSettings.model_fields["lr_scheduler"].annotation)
    assert {*names, "piecewise_constant"} == {kind.value for kind in SchedulerType}


def test_validation_every_0_is_never_beside_prompts_too() -> None:
    settings = RunSettings(**REQUIRED, validation_prompts=["a cat"], validation_every=0)
    assert settings.validation_every == 0


def test_paths_on_a_command_line_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--data", "2024", "--output=~/run", "--model", "~/wan", "--resume", "3", "--cache", "true"]
    words += ["--max_train_steps", "4", "--crepa_encoder", "~/7"]
    settings, config = load_settings(None, given_values(parser.parse_args(words)))
    assert (settings.data, settings.output, settings.cache) == (Path("2024"), Path("/home/me/run"), Path("true"))
    assert (settings.model, settings.resume, settings.max_train_steps) == ("/home/me/wan", "3", 4)
    assert config.crepa_encoder == "/home/me/7"

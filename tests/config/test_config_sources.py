"""JSON files and the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from crepa_kernels.config import ConfigError, CrepaConfig
from crepa_kernels.config.sources import parse_settings, read_settings


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "settings.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_json_file_gives_what_its_object_gives(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"crepa_lambda": 0.25, "crepa_block_index": null, "other": {"a": [1]}}')
    assert CrepaConfig.from_file(path) == CrepaConfig(crepa_lambda=0.25)
    assert CrepaConfig.from_file(str(path)) == CrepaConfig(crepa_lambda=0.25)
    path = write(tmp_path, json.dumps(CrepaConfig.preset("t2v").to_dict()))
    assert CrepaConfig.from_file(path) == CrepaConfig.preset("t2v")
    path = write(tmp_path, '{"crepa_enabled": true}')
    assert CrepaConfig.from_file(path, family="hunyuan_video").crepa_block_index == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not JSON"]),
        ("{'crepa_lambda': 1}", ["not JSON", "line 1"]),
        ('{"crepa_lambda": 1,}', ["not JSON"]),
        (b"\xff\xfe{}", ["not JSON", "UTF-8"]),
        ("[" * 100_000, ["nested too deeply"]),
        ("[1]", ["one JSON object", "list"]),
        ("null", ["one JSON object", "NoneType"]),
        ('{"crepa_lambda": 1, "crepa_lambda": 2}', ["crepa_lambda", "once"]),
        ('{"crepa_lambda": NaN}', ["crepa_lambda = NaN", "a number"]),
        ('{"crepa_lamda": 1, "crepa_power": 0}', ["crepa_lambda", "crepa_power = 0"]),
        ('{"crepa_lambda": ' + "9" * 5000 + "}", ["settings.json"]),
    ],
)
def test_a_wrong_json_file_is_named(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        CrepaConfig.from_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert all(word in str(error.value) for word in words), str(error.value)


FILES = {
    ".toml": """
crepa_enabled = true
crepa_lambda = 1e-1  # of the loss
crepa_block_index = 0x2
crepa_encoder = "no"
other = [1, 2]
""",
    ".yaml": """
crepa_enabled: true
crepa_lambda: 1e-1  # of the loss
crepa_block_index: 0x2
crepa_encoder: no
crepa_similarity_threshold: null
other: [1, 2]
""",
}


@pytest.mark.parametrize("suffix", [*FILES, ".YML"])
def test_toml_and_yaml_are_read_by_the_files_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text(FILES.get(suffix, FILES[".yaml"]), encoding="utf-8-sig")
    own = {"crepa_lambda": 0.1, "crepa_block_index": 2, "crepa_encoder": "no"}
    assert CrepaConfig.from_file(path) == CrepaConfig(crepa_enabled=True, **own)
    path.write_text("")
    if suffix == ".toml":
        assert read_settings(path) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("Yes", "Yes"),
        ("off", "off"),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("1e-4", 1e-4),
        ("1E3", 1e3),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10),
        ("0o10", 8),
        ("-0x1f", "-0x1f"),
        ("0x1f", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("'1'", "1"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("[a, {b: 1e2}]", ["a", {"b": 100.0}]),
    ],
)
def test_yaml_is_that_of_version_1_2(text: str, value: Any) -> None:
    read = parse_settings(f"key: {text}", ".yaml")["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("suffix", "text", "words"),
    [
        (".toml", "crepa_lambda = 1\ncrepa_power = one\n", ["not TOML", "line 2", "crepa_power = one"]),
        (".toml", "crepa_lambda = 1\ncrepa_lambda = 2\n", ["line 2", "crepa_lambda = 2"]),
        (".toml", "crepa_lamda = 1", ["crepa_lamda = 1: unknown key; did you mean crepa_lambda?"]),
        (".toml", b"\xff\xfe", ["not TOML", "UTF-8"]),
        (".toml", "crepa_lambda = 2024-01-02", ["crepa_lambda = ", "a number"]),
        (".toml", "crepa_lambda = inf", ["crepa_lambda = Infinity", "a number"]),
        (".yaml", "crepa_lambda: 1\ncrepa_power: [1\n", ["not YAML", "line 3"]),
        (".yaml", "crepa_lambda: 1\n\tcrepa_power: 1", ["not YAML", "line 2", "crepa_power: 1"]),
        (".yaml", "crepa_lambda: 1\ncrepa_lambda: 2", ["each key may appear once", "crepa_lambda", "line 2"]),
        (".yaml", "a: 1\n3: 2", ["the key 3 is no text", "line 2"]),
        (".yaml", "a: &a [1]\nb: *a", ["*a stands for another value", "line 2"]),
        (".yaml", "a: !!python/name:os.system", ["python/name:os.system", "line 1"]),
        (".yaml", "a: 1\n---\nb: 2", ["not YAML", "single document", "line 2"]),
        (".yaml", "- 1", ["one YAML object", "list"]),
        (".yaml", "", ["one YAML object", "NoneType"]),
        (".yaml", "a: 1\nb: \x00", ["not YAML", "line 2"]),
        (".yaml", "a: 1\n[a, b]: 2", ["the key [a, b] is no text", "line 2"]),
        (".yaml", "[" * 100_000, ["nested too deeply"]),
        (".yaml", "a: " + "9" * 5000, ["settings.yaml", "a number has more than 4300 digits"]),
        (".toml", "a = " + "9" * 5000, ["settings.toml", "a number has more than 4300 digits"]),
        (".yaml", "crepa_lambda: half", ['crepa_lambda = "half"']),
    ],
)
def test_a_wrong_toml_or_yaml_file_is_named_with_the_line(
    tmp_path: Path, suffix: str, text: str | bytes, words: list[str]
) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        CrepaConfig.from_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_settings(tmp_path / "nowhere.json")


def parse(*words: str, base: Any = None, family: str | None = None) -> CrepaConfig:
    return CrepaConfig.parse_known_args(words, base, family=family)[0]


def test_command_line_values_are_json() -> None:
    config = parse(
        "--crepa_enabled",
        *("--crepa_block_index", "3"),
        *("--crepa_lambda", "2.5e-1"),
        "--crepa_normalize_by_frames=false",
        *("--crepa_encoder_frames_batch_size", "-1"),
        *("--crepa_spatial_align", "pool"),
        *("--crepa_scheduler", '"cosine"'),
        *("--crepa_similarity_threshold", "null"),
        *("--crepa_model", "dinov2_s"),
    )
    assert config == CrepaConfig(
        crepa_enabled=True,
        crepa_block_index=3,
        crepa_lambda=0.25,
        crepa_normalize_by_frames=False,
        crepa_spatial_align="pool",
        crepa_scheduler="cosine",
        crepa_encoder="dinov2_s",
        crepa_encoder_frames_batch_size=-1,
    )


def test_an_empty_command_line_is_the_base() -> None:
    assert parse() == CrepaConfig()
    base = CrepaConfig.preset("t2v")
    assert parse(base=base) == base


def test_the_command_line_wins_over_its_base() -> None:
    base = CrepaConfig.preset("t2v", crepa_encoder="dinov2_s")
    config = parse("--crepa_lambda", "0.1", "--crepa_model", "dinov2_vitb14", base=base)
    assert config == base.replace(crepa_lambda=0.1, crepa_encoder="dinov2_vitb14")
    assert parse("--crepa_similarity_threshold", "null", base=base).crepa_similarity_threshold is None
    backbone = CrepaConfig(crepa_feature_source="backbone", crepa_block_index=8, crepa_teacher_block_index=9)
    assert parse("--crepa_feature_source", "encoder", base=backbone).crepa_feature_source == "encoder"
    assert parse("--crepa_use_backbone_features", "false", base=backbone).crepa_feature_source == "encoder"


def test_a_base_that_needs_the_command_line_may_be_a_mapping() -> None:
    base = {"crepa_enabled": True, "seed": 1}
    assert parse("--crepa_block_index", "4", base=base).crepa_block_index == 4
    assert parse(base=base, family="sanavideo").crepa_block_index == 10


def test_words_of_others_are_handed_back() -> None:
    words = ["--steps", "5", "--crepa_lambda", "0.1", "clip.mp4", "--crepa_drop_vae_encoder", "--crep", "x"]
    config, rest = CrepaConfig.parse_known_args(words)
    assert (config.crepa_lambda, config.crepa_drop_vae_encoder) == (0.1, True)
    assert rest == ["--steps", "5", "clip.mp4", "--crep", "x"]


@pytest.mark.parametrize("use_own_parser", [False, True])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--crepa_lamda", "0.5"], ["--crepa_lamda", "did you mean --crepa_lambda?"]),
        (["--crepa_lamda=0.5"], ["--crepa_lamda:", "did you mean --crepa_lambda?"]),
        (["--crepa-lambda", "0.5"], ["--crepa-lambda", "did you mean --crepa_lambda?"]),
        (["--crepa_zzz"], ["--crepa_zzz: unknown option"]),
        (["--crepa_lambda"], ["crepa_lambda = true", "a number"]),
        (["--crepa_lambda", "-1"], ["crepa_lambda = -1"]),
        (["--crepa_lambda", "half"], ['crepa_lambda = "half"']),
        (["--crepa_lambda", "NaN"], ["crepa_lambda = NaN"]),
        (["--crepa_enabled", "yes", "--crepa_block_index", "1"], ['crepa_enabled = "yes"', "true or false"]),
        (["--crepa_enabled", "1"], ["crepa_enabled = 1", "true or false"]),
        (["--crepa_use_tae"], ["crepa_use_tae = true", "not supported"]),
        (["--crepa_lamda", "1", "--crepa_power", "0"], ["--crepa_lamda", "crepa_power = 0", "2 settings"]),
    ],
)
def test_a_wrong_command_line_is_one_error(use_own_parser: bool, words: list[str], expected: list[str]) -> None:
    def with_own_parser() -> None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--steps", type=int, default=1)
        CrepaConfig.add_arguments(parser)
        namespace, rest = parser.parse_known_args(words)
        CrepaConfig.from_args(namespace, rest=rest)

    with pytest.raises(ConfigError) as error:
        with_own_parser() if use_own_parser else CrepaConfig.parse_known_args(words)
    assert all(word in str(error.value) for word in expected), str(error.value)


def test_a_trainers_own_parser_takes_the_options() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1)
    CrepaConfig.add_arguments(parser)
    namespace = parser.parse_args(["--steps", "3", "--crepa_enabled", "--crepa_block_index", "2"])
    assert CrepaConfig.from_args(namespace) == CrepaConfig(crepa_enabled=True, crepa_block_index=2)
    text = " ".join(parser.format_help().split())
    for key, field in CrepaConfig.model_fields.items():
        assert f"--{key}" in text
        assert (field.description or "missing") in text

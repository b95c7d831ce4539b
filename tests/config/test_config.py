from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest

from crepa_kernels.config import ConfigError, CrepaConfig

DEFAULTS = {
    "irepa_enabled": False,
    "irepa_spatial_norm_alpha": 0.6,
    "irepa_projector_kernel_size": 3,
    "crepa_enabled": False,
    "crepa_block_index": None,
    "crepa_lambda": 0.5,
    "crepa_adjacent_distance": 1,
    "crepa_adjacent_tau": 1.0,
    "crepa_cumulative_neighbors": False,
    "crepa_normalize_neighbour_sum": False,
    "crepa_normalize_by_frames": True,
    "crepa_spatial_align": True,
    "crepa_frame_map": "last",
    "crepa_encoder": "dinov2_vitg14",
    "crepa_encoder_image_size": 518,
    "crepa_encoder_resize": "square",
    "crepa_encoder_frames_batch_size": -1,
    "crepa_feature_source": "encoder",
    "crepa_use_backbone_features": False,
    "crepa_teacher_block_index": None,
    "crepa_drop_vae_encoder": False,
    "crepa_scheduler": "constant",
    "crepa_warmup_steps": 0,
    "crepa_decay_steps": 0,
    "crepa_lambda_end": 0.0,
    "crepa_power": 1.0,
    "crepa_cutoff_step": 0,
    "crepa_similarity_threshold": None,
    "crepa_similarity_metric": "similarity",
    "crepa_similarity_ema_decay": 0.99,
    "crepa_threshold_mode": "permanent",
    "crepa_probe_interval": 50,
    "crepa_relational_weight": 0.0,
    "crepa_relational_pairs": "neighbours",
    "crepa_relational_margin": None,
    "crepa_recompute": False,
    "crepa_backend": "auto",
}
BOOLEANS = [key for key, value in DEFAULTS.items() if isinstance(value, bool) and key != "crepa_spatial_align"]
INTEGERS = [key for key, value in DEFAULTS.items() if type(value) is int or key.endswith("block_index")]
NUMBERS = [key for key, value in DEFAULTS.items() if isinstance(value, float)]
NUMBERS += ["crepa_similarity_threshold", "crepa_relational_margin"]
WORDS = ["crepa_frame_map", "crepa_encoder_resize", "crepa_feature_source", "crepa_scheduler"]
WORDS += ["crepa_similarity_metric", "crepa_threshold_mode", "crepa_relational_pairs", "crepa_backend"]


def test_defaults() -> None:
    assert CrepaConfig().to_dict() == DEFAULTS
    assert CrepaConfig.from_dict({}) == CrepaConfig()
    assert len(BOOLEANS) + len(INTEGERS) + len(NUMBERS) + len(WORDS) == len(DEFAULTS) - 2


@pytest.mark.parametrize("key", DEFAULTS)
def test_null_means_the_default(key: str) -> None:
    assert CrepaConfig.from_dict({key: None}) == CrepaConfig()


GOOD: list[tuple[str, Any, Any]] = [
    ("crepa_enabled", False, False),
    ("crepa_block_index", 0, 0),
    ("crepa_block_index", 8.0, 8),
    ("crepa_lambda", 0, 0.0),
    ("crepa_lambda", 2, 2.0),
    ("crepa_adjacent_distance", 0, 0),
    ("crepa_adjacent_tau", 1e-9, 1e-9),
    *(("crepa_spatial_align", value, value) for value in (True, False, "student", "teacher", "smaller", "pool")),
    *(("crepa_frame_map", value, value) for value in ("last", "center", "mean")),
    ("crepa_encoder_image_size", 14, 14),
    ("crepa_encoder_image_size", 224, 224),
    ("crepa_encoder_resize", "grid", "grid"),
    ("crepa_encoder_frames_batch_size", -7, -7),
    ("crepa_encoder_frames_batch_size", 0, 0),
    ("crepa_encoder_frames_batch_size", 3, 3),
    *(("crepa_scheduler", value, value) for value in ("constant", "linear", "cosine", "polynomial")),
    ("crepa_warmup_steps", 1e3, 1000),
    ("crepa_similarity_threshold", 1, 1.0),
    ("crepa_similarity_threshold", 1e-6, 1e-6),
    ("crepa_similarity_metric", "alignment_score", "alignment_score"),
    ("crepa_similarity_ema_decay", 0, 0.0),
    ("crepa_similarity_ema_decay", 0.999, 0.999),
    ("crepa_threshold_mode", "recoverable", "recoverable"),
    ("crepa_probe_interval", 1, 1),
    ("crepa_encoder_frames_batch_size", -(2**63), -(2**63)),
    *((key, 2**63 - 1, 2**63 - 1) for key in ("crepa_block_index", "crepa_adjacent_distance", "crepa_warmup_steps")),
    ("crepa_relational_weight", 2, 2.0),
    *(("crepa_relational_pairs", value, value) for value in ("frame", "all", "cross", "neighbours")),
    ("crepa_relational_margin", 0, 0.0),
    ("crepa_relational_margin", 0.1, 0.1),
    *(("crepa_backend", value, value) for value in ("auto", "triton", "torch", "reference")),
    ("irepa_spatial_norm_alpha", 0, 0.0),
    *(("irepa_projector_kernel_size", value, value) for value in (1, 3, 7)),
    ("crepa_encoder", "facebook/dinov2-small", "facebook/dinov2-small"),
    ("crepa_encoder", "./my encoder", "./my encoder"),
    *(("crepa_encoder", name, name) for size in "sblg" for name in (f"dinov2_vit{size}14", f"dinov2_vit{size}14_reg")),
    *(("crepa_encoder", name, "dinov2_vitg14") for name in ("dino_v2_g", "dinov2_g", "dinov2-vitg14")),
    *(("crepa_encoder", name, "dinov2_vits14") for name in ("dino_v2_s", "dinov2_s")),
    ("crepa_encoder", "dinov2-vitb14", "dinov2_vitb14"),
]


@pytest.mark.parametrize(("key", "given", "stored"), GOOD)
def test_accepted_values(key: str, given: Any, stored: Any) -> None:
    value = getattr(CrepaConfig.from_dict({key: given}), key)
    assert value == stored
    assert type(value) is type(stored)


BAD: list[tuple[str, Any, str]] = [
    *((key, value, "true or false") for key in BOOLEANS for value in (0, 1, 1.0, "true", "yes", [], {})),
    *((key, value, "an integer") for key in INTEGERS for value in (True, False, 1.5, "1", [1], math.nan, math.inf)),
    *((key, value, "a number") for key in NUMBERS for value in (True, False, "0.5", "nan", [0.5], {})),
    *((key, value, "a number") for key in NUMBERS for value in (math.nan, math.inf, -math.inf, 10**400)),
    *((key, value, 'must be "') for key in WORDS for value in ("nearest", "", "Last", 1, True, ["last"])),
    *((key, value, "at most 64 bits") for key in INTEGERS for value in (2**63, -(2**63) - 1, 1e19, 10**400)),
    ("crepa_block_index", -1, ">= 0"),
    ("crepa_teacher_block_index", -1, ">= 0"),
    ("crepa_lambda", -0.1, ">= 0"),
    ("crepa_lambda_end", -0.1, ">= 0"),
    ("crepa_adjacent_distance", -1, ">= 0"),
    ("crepa_adjacent_tau", 0, "> 0"),
    ("crepa_adjacent_tau", -1.0, "> 0"),
    *(("crepa_spatial_align", value, "true (student)") for value in ("grid", 0, 1, "true", ["pool"])),
    *(("crepa_encoder", value, "a local folder or a hub id") for value in ("", 14, True, ["dinov2_g"])),
    *(("crepa_encoder_image_size", value, "multiple of the patch size") for value in (0, -14, 13, 15, 500, 519)),
    ("crepa_warmup_steps", -1, ">= 0"),
    ("crepa_decay_steps", -1, ">= 0"),
    ("crepa_cutoff_step", -1, ">= 0"),
    ("crepa_power", 0, "> 0"),
    ("crepa_power", -1, "> 0"),
    ("crepa_similarity_threshold", 0, "> 0"),
    ("crepa_similarity_threshold", -0.5, "> 0"),
    ("crepa_similarity_threshold", 1.0000001, "at most 1"),
    ("crepa_similarity_ema_decay", -0.01, "[0, 1)"),
    ("crepa_similarity_ema_decay", 1, "[0, 1)"),
    ("crepa_probe_interval", 0, ">= 1"),
    ("irepa_spatial_norm_alpha", -0.1, ">= 0"),
    *(("irepa_projector_kernel_size", value, "an integer >= 1 and odd") for value in (0, -1, 2, 4.0)),
    ("irepa_enabled", True, "needs crepa_enabled = true"),
    ("irepa_alpha", 0.5, "unknown key"),
    ("irepa_spatial_norm_alfa", 0.5, "did you mean irepa_spatial_norm_alpha?"),
    ("crepa_relational_weight", -0.1, ">= 0"),
    ("crepa_relational_margin", -0.1, ">= 0"),
    ("crepa_feature_source", "self_flow", "not supported by this package"),
    *(("crepa_encoder", name, "not supported by this package") for name in ("Qwen/Qwen2.5-VL-7B", "qwen2_vl")),
    ("crepa_use_tae", True, "not supported by this package"),
    ("crepa_use_tae", 0, "not supported by this package"),
    ("crepa_self_flow", True, "not supported by this package"),
    ("crepa_self_flow_mask_ratio", 0.1, "not supported by this package"),
    ("crepa_self_flow_mask_ratio", False, "not supported by this package"),
    ("crepa_lamda", 0.5, "did you mean crepa_lambda?"),
    ("crepa_Lambda", 0.5, "did you mean crepa_lambda?"),
    ("crepa_normalise_by_frames", True, "did you mean crepa_normalize_by_frames?"),
    ("crepa_block", 8, "did you mean crepa_block_index?"),
    ("crepa_modle", "x", "did you mean crepa_model?"),
    ("crepa_", 1, "unknown key"),
    ("crepa_zzz", 1, "unknown key"),
]


@pytest.mark.parametrize(("key", "value", "rule"), BAD)
def test_a_refused_value_names_key_value_and_rule(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} = ") as error:
        CrepaConfig.from_dict({key: value})
    message = str(error.value)
    assert json.dumps(value, ensure_ascii=False)[:40] in message
    assert rule in message
    assert len(error.value.problems) == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"^{key} = "):
        CrepaConfig(**{key: value})


def test_every_key_of_the_table_has_bad_input() -> None:
    assert {key for key, _, _ in BAD} >= set(DEFAULTS)


ON = {"crepa_enabled": True, "crepa_block_index": 8}
BACKBONE = {**ON, "crepa_feature_source": "backbone"}


def test_other_keys_are_left_alone() -> None:
    given: dict[Any, Any] = {"learning_rate": "x", "crepa": 1, "Crepa_lambda": 3, 7: 8, "crepa_lambda": 0.25}
    before = dict(given)
    assert CrepaConfig.from_dict(given).crepa_lambda == 0.25
    assert given == before


def test_keyword_arguments_must_be_known() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        CrepaConfig(learning_rate=1)
    with pytest.raises(ConfigError, match="must be a mapping"):
        CrepaConfig.from_dict([("crepa_lambda", 1)])  # type: ignore[arg-type]


def test_a_configuration_is_immutable_and_a_value() -> None:
    config = CrepaConfig(**ON)
    with pytest.raises(ValueError, match="frozen"):
        config.crepa_lambda = 3.0
    assert config == CrepaConfig(**ON)
    assert hash(config) == hash(CrepaConfig(**ON))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert CrepaConfig.model_validate_json(config.model_dump_json()) == config


def test_replace_is_validated() -> None:
    config = CrepaConfig(**BACKBONE, crepa_teacher_block_index=12)
    changed = config.replace(crepa_feature_source="encoder", crepa_lambda=1)
    assert (changed.crepa_feature_source, changed.crepa_use_backbone_features) == ("encoder", False)
    assert changed.crepa_lambda == 1.0
    assert config.crepa_feature_source == "backbone"
    assert changed.replace(crepa_lambda=None).crepa_lambda == 0.5
    assert CrepaConfig(crepa_encoder="dinov2_s").replace(crepa_model="dinov2_g").crepa_encoder == "dinov2_vitg14"
    for change in (config.replace, lambda **update: config.model_copy(update=update)):
        with pytest.raises(ConfigError, match="crepa_teacher_block_index = 3"):
            change(crepa_teacher_block_index=3)


def test_errors_survive_pickling() -> None:
    error = ConfigError(["a = 1: b", "c = 2: d"], "file.json")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems, again.source) == (str(error), error.problems, error.source)


@pytest.mark.parametrize(
    ("value", "name"), [(True, "student"), (False, "pool"), ("smaller", "smaller"), ("teacher", "teacher")]
)
def test_spatial_align_has_a_name(value: Any, name: str) -> None:
    assert CrepaConfig(crepa_spatial_align=value).spatial_align == name


def test_the_schema_describes_every_key() -> None:
    properties = CrepaConfig.model_json_schema()["properties"]
    assert list(properties) == list(DEFAULTS)
    assert all(" must be " in field["description"] for field in properties.values())
    assert {key: field["default"] for key, field in properties.items()} == DEFAULTS
    assert properties["crepa_scheduler"]["enum"] == ["constant", "linear", "cosine", "polynomial"]
    assert properties["crepa_warmup_steps"]["maximum"] == 2**63 - 1
    assert properties["crepa_probe_interval"] | {"minimum": 1, "type": "integer"} == properties["crepa_probe_interval"]


def test_each_option_of_the_loss_is_under_its_own_name() -> None:
    from inspect import signature

    from crepa_kernels import crepa_loss

    defaults = {name: each.default for name, each in signature(crepa_loss).parameters.items()}
    assert CrepaConfig().loss_options().items() <= defaults.items()
    given = {
        "crepa_adjacent_distance": 3,
        "crepa_adjacent_tau": 2.5,
        "crepa_cumulative_neighbors": True,
        "crepa_normalize_neighbour_sum": True,
        "crepa_normalize_by_frames": False,
        "crepa_spatial_align": False,
        "crepa_recompute": True,
        "crepa_backend": "torch",
    }
    assert CrepaConfig.from_dict(given).loss_options() == {
        "recompute": True,
        "distance": 3,
        "tau": 2.5,
        "cumulative": True,
        "normalize_neighbour_sum": True,
        "normalize_by_frames": False,
        "spatial_align": "pool",
        "backend": "torch",
    }


def test_each_option_of_the_relational_loss_is_under_its_own_name() -> None:
    from inspect import signature

    from crepa_kernels import relational_loss

    given = {
        "crepa_adjacent_distance": 3,
        "crepa_adjacent_tau": 2.5,
        "crepa_relational_pairs": "cross",
        "crepa_relational_margin": 0.1,
        "crepa_spatial_align": False,
        "crepa_backend": "torch",
    }
    options = CrepaConfig.from_dict(given).relational_options()
    assert options.keys() <= signature(relational_loss).parameters.keys()
    assert options == {
        "pairs": "cross",
        "distance": 3,
        "tau": 2.5,
        "margin": 0.1,
        "spatial_align": "pool",
        "backend": "torch",
    }

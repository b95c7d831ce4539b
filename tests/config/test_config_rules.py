"""Rules over several keys, presets, families and threshold scales."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from tiny_families import FAMILIES
from tiny_unets import tiny_unet

from crepa_kernels import CrepaRegularizer, UrepaConfig, UrepaRegularizer
from crepa_kernels.config import ConfigError, CrepaConfig
from crepa_kernels.config.rules import PRESETS, recommended_block_index
from crepa_kernels.neighbours import Neighbours

ON = {"crepa_enabled": True, "crepa_block_index": 8}
BACKBONE = {**ON, "crepa_feature_source": "backbone"}
SCORE = {"crepa_similarity_metric": "alignment_score"}
JOINT_BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"crepa_enabled": True}, ["crepa_block_index = null", "required", "wan 8"]),
    (BACKBONE, ["crepa_teacher_block_index = null", "required"]),
    ({**BACKBONE, "crepa_teacher_block_index": 8}, ["crepa_teacher_block_index = 8", "deeper", "8"]),
    ({**BACKBONE, "crepa_teacher_block_index": 3}, ["crepa_teacher_block_index = 3", "deeper", "8"]),
    ({**ON, "crepa_use_backbone_features": True}, ["crepa_teacher_block_index = null", "required"]),
    (
        {**ON, "crepa_use_backbone_features": True, "crepa_feature_source": "encoder"},
        ["crepa_use_backbone_features = true", "contradicts", "crepa_feature_source"],
    ),
    (
        {"crepa_model": "dinov2_s", "crepa_encoder": "dinov2_g"},
        ["crepa_encoder = ", "dinov2_vitg14", "crepa_model", "dinov2_vits14"],
    ),
    ({"crepa_model": 3}, ["crepa_model = 3"]),
    ({"crepa_model": "Qwen/Qwen-Image"}, ["crepa_model = ", "not supported"]),
    ({"crepa_encoder": "dinov2_s", "crepa_encoder_image_size": 256}, ["crepa_encoder_image_size = 256", "14"]),
    ({"crepa_encoder": "some/vit-patch16", "crepa_encoder_image_size": 0}, ["crepa_encoder_image_size = 0"]),
    # 1 + 2/e = 1.73576
    ({**SCORE, "crepa_similarity_threshold": 1.7358}, ["1.7358", "at most 1.73576"]),
    ({**SCORE, "crepa_similarity_threshold": 1.01, "crepa_adjacent_distance": 0}, ["at most 1 "]),
    ({**SCORE, "crepa_similarity_threshold": 1.01, "crepa_normalize_neighbour_sum": True}, ["at most 1 "]),
    # 1 + 2(e^-1 + e^-2) = 2.00643
    (
        {
            **SCORE,
            "crepa_similarity_threshold": 2.01,
            "crepa_adjacent_distance": 2,
            "crepa_cumulative_neighbors": True,
        },
        ["at most 2.00643"],
    ),
    ({**SCORE, "crepa_similarity_threshold": 1.3, "crepa_adjacent_distance": 2}, ["at most 1.27067"]),
]


@pytest.mark.parametrize(("given", "words"), JOINT_BAD)
def test_rules_over_several_keys(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        CrepaConfig.from_dict(given)
    assert len(error.value.problems) == 1
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {**SCORE, "crepa_similarity_threshold": 1.7357},
        {**SCORE, "crepa_similarity_threshold": 2.0, "crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True},
        {**SCORE, "crepa_similarity_threshold": 2.9, "crepa_adjacent_tau": 1e300},
        {"crepa_encoder": "some/vit-patch16", "crepa_encoder_image_size": 256},
        {"crepa_model": "dinov2_g", "crepa_encoder": "dinov2-vitg14"},
        {"crepa_model": None, "crepa_encoder": "dinov2_s"},
        {**BACKBONE, "crepa_teacher_block_index": 9},
        {**BACKBONE, "crepa_use_backbone_features": True, "crepa_teacher_block_index": 20},
        {"crepa_feature_source": "encoder", "crepa_use_backbone_features": False},
        {"crepa_use_tae": False, "crepa_self_flow": False, "crepa_self_flow_mask_ratio": 0},
        {"crepa_use_tae": None, "crepa_self_flow": None, "crepa_self_flow_mask_ratio": 0.0},
    ],
)
def test_accepted_together(given: dict[str, Any]) -> None:
    config = CrepaConfig.from_dict(given)
    assert CrepaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["crepa_use_backbone_features", "crepa_feature_source"])
def test_either_name_of_backbone_mode_works_on_its_own(name: str) -> None:
    value = True if name == "crepa_use_backbone_features" else "backbone"
    config = CrepaConfig.from_dict({**ON, name: value, "crepa_teacher_block_index": 12})
    assert config.crepa_feature_source == "backbone"
    assert config.crepa_use_backbone_features is True
    assert CrepaConfig(**{name: value}).crepa_feature_source == "backbone"


def test_model_is_another_name_of_encoder() -> None:
    assert CrepaConfig(crepa_model="dinov2_s").crepa_encoder == "dinov2_vits14"


def test_one_error_lists_every_wrong_key() -> None:
    with pytest.raises(ConfigError) as error:
        CrepaConfig.from_dict(
            {
                "crepa_enabled": True,
                "crepa_lamda": 0.5,
                "crepa_lambda": -1,
                "crepa_power": "x",
                "crepa_use_tae": True,
                "crepa_similarity_threshold": 2.0,
                "learning_rate": -1,
            }
        )
    keys = [problem.split(" = ")[0] for problem in error.value.problems]
    assert sorted(keys) == [
        "crepa_block_index",
        "crepa_lambda",
        "crepa_lamda",
        "crepa_power",
        "crepa_similarity_threshold",
        "crepa_use_tae",
    ]
    assert all(problem in str(error.value) for problem in error.value.problems)
    assert "6 settings are wrong" in str(error.value)


def test_a_rule_over_several_keys_is_not_judged_on_a_refused_value() -> None:
    with pytest.raises(ConfigError) as error:
        CrepaConfig.from_dict({"crepa_enabled": True, "crepa_block_index": "eight"})
    assert len(error.value.problems) == 1


def test_preset_values() -> None:
    shared = {"crepa_enabled": True, "crepa_block_index": 8, "crepa_lambda": 0.5, "crepa_encoder_resize": "grid"}
    expected = {
        "i2v": {**shared, "crepa_scheduler": "constant"},
        "t2v": {
            **shared,
            "crepa_scheduler": "cosine",
            "crepa_warmup_steps": 100,
            "crepa_decay_steps": 0,
            "crepa_lambda_end": 0.1,
            "crepa_similarity_threshold": 0.85,
            "crepa_similarity_metric": "alignment_score",
            "crepa_threshold_mode": "permanent",
        },
        "solid_background": {**shared, "crepa_cutoff_step": 2000},
    }
    assert set(PRESETS) == set(expected)
    for name, values in expected.items():
        assert CrepaConfig.preset(name) == CrepaConfig(**values)


def test_a_recommended_block_is_for_its_family_alone() -> None:
    hunyuan = FAMILIES["hunyuan_video"].make()
    wan = CrepaConfig.preset("t2v", family="wan")
    for config in (wan, wan.replace(crepa_lambda=0.1)):
        with pytest.raises(ValueError, match=r"crepa_block_index = 8 is the recommended block for wan, and the tran"):
            CrepaRegularizer(config, hunyuan)
    given = CrepaConfig.preset(
        "t2v", crepa_block_index=1, crepa_lambda=0.0, crepa_feature_source="backbone", crepa_teacher_block_index=2
    )
    assert CrepaRegularizer(given, hunyuan, max_train_steps=10).projector is not None


def test_options_that_do_nothing_without_crepa_enabled_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    transformer = FAMILIES["wan"].make()
    for off in ({}, {"crepa_enabled": False, "crepa_lambda": 0.3}, CrepaConfig(crepa_enabled=False).to_dict()):
        CrepaRegularizer(off, transformer)
    assert caplog.records == []
    CrepaRegularizer({"crepa_lambda": 0.3, "crepa_model": "dinov2_s", "learning_rate": 1}, transformer)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CREPA is OFF: " in caplog.text
    assert "without which crepa_lambda, crepa_encoder do nothing" in caplog.text


def test_options_of_a_part_that_nobody_switched_on_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    on = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_lambda": 0.0}
    silent: list[dict[str, Any]] = [
        on,
        on | {"irepa_enabled": False, "irepa_projector_kernel_size": 5},
        on | {"crepa_relational_weight": 0.0, "crepa_relational_pairs": "all"},
        on | {"irepa_enabled": True, "irepa_projector_kernel_size": 5, "crepa_relational_weight": 0.5},
        CrepaConfig.from_dict(on).to_dict(),
    ]
    for given in silent:
        CrepaRegularizer(given, FAMILIES["wan"].make(), feature_size=8)
    assert caplog.records == []
    stray = {"irepa_projector_kernel_size": 5, "crepa_relational_pairs": "all", "crepa_relational_margin": 0.1}
    CrepaRegularizer(on | stray, FAMILIES["wan"].make(), feature_size=8)
    UrepaRegularizer({"urepa_enabled": True, "irepa_spatial_norm_alpha": 0.5}, tiny_unet(), feature_size=8)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"{title} is OFF: {switch} is not given, without which {rest} nothing")
        for title, switch, rest in (
            ("iREPA", "irepa_enabled", "irepa_projector_kernel_size does"),
            ("relational loss", "crepa_relational_weight", "crepa_relational_pairs, crepa_relational_margin do"),
            ("iREPA", "irepa_enabled", "irepa_spatial_norm_alpha does"),
        )
    ]


def test_the_name_that_crepa_has_for_the_encoder_is_answered_with_urepas() -> None:
    with pytest.raises(ValueError, match=r"urepa_encoder = .*did you mean urepa_model\?"):
        UrepaConfig.from_dict({"urepa_encoder": "dinov2_vitb14"})
    with pytest.raises(ValueError, match=r"--urepa_encoder: unknown key; did you mean urepa_model\?"):
        UrepaConfig.parse_known_args(["--urepa_encoder", "dinov2_vitb14"])


def test_a_preset_takes_overrides_and_the_block_of_its_family(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert CrepaConfig.preset("t2v", family="sanavideo").crepa_block_index == 10
    assert "crepa_block_index = 10" in caplog.text
    caplog.clear()
    config = CrepaConfig.preset("t2v", crepa_lambda=0.25, crepa_block_index=3, crepa_model="dinov2_s")
    assert (config.crepa_lambda, config.crepa_block_index, config.crepa_encoder) == (0.25, 3, "dinov2_vits14")
    assert not caplog.records


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CrepaConfig.preset("t2w"), ["'t2w'", "i2v, t2v, solid_background", "did you mean 't2v'?"]),
        (lambda: CrepaConfig.preset("i2v", crepa_lamda=1), ["crepa_lamda = 1", "crepa_lambda"]),
        (lambda: CrepaConfig.preset("i2v", lambda_=1), ["lambda_ = 1", "crepa_lambda"]),
        (lambda: CrepaConfig.preset("i2v", crepa_lambda=-1), ["crepa_lambda = -1"]),
        (lambda: CrepaConfig.preset("i2v", family="sora"), ["'sora'", "hunyuan_video"]),
        (lambda: recommended_block_index("sora"), ["'sora'", "wan, ltxvideo"]),
    ],
)
def test_wrong_presets_and_families(call: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("family", "index"),
    [("wan", 8), ("ltxvideo", 8), ("kandinsky5_video", 8), ("cogvideox", 8), ("sanavideo", 10), ("hunyuan_video", 10)],
)
def test_recommended_block(family: str, index: int) -> None:
    assert recommended_block_index(family) == index
    assert CrepaConfig.from_dict({"crepa_enabled": True}, family=family).crepa_block_index == index
    assert CrepaConfig.from_dict({"crepa_enabled": True, "crepa_block_index": 1}, family=family).crepa_block_index == 1
    assert CrepaConfig.from_dict({}, family=family).crepa_block_index is None


@pytest.mark.parametrize(("distance", "tau"), [(1, 1.0), (3, 0.7), (8, 100.0), (2, 1e-12), (5, 1e300), (3, 5e-324)])
def test_neighbour_weights_add_up(distance: int, tau: float) -> None:
    offsets = range(1, distance + 1)
    # A few units in the last place: the sum is computed in closed form.
    expected = 2 * sum(math.exp(-offset / tau) for offset in offsets)
    assert Neighbours(distance, tau, cumulative=True).weight_sum == pytest.approx(expected, rel=1e-13)
    expected = 2 * math.exp(-distance / tau)
    assert Neighbours(distance, tau).weight_sum == pytest.approx(expected, rel=1e-13)


def test_no_neighbours_weigh_nothing_and_huge_distances_are_finite() -> None:
    assert Neighbours(0, 1.0, cumulative=True).weight_sum == 0.0
    huge = CrepaConfig(crepa_adjacent_distance=2**63 - 1)
    assert huge.replace(crepa_cumulative_neighbors=True).neighbours.weight_sum == pytest.approx(2 / (math.e - 1))
    assert huge.neighbours.weight_sum == 0.0


def test_a_threshold_is_told_on_the_other_scale() -> None:
    assert CrepaConfig().threshold_on_other_scale() is None
    metric, value = CrepaConfig.preset("t2v").threshold_on_other_scale() or ("", 0.0)
    assert metric == "similarity"
    assert value == pytest.approx(0.85 / (1 + 2 / math.e))
    assert f"{value:.2f}" == "0.49"
    config = CrepaConfig(crepa_similarity_threshold=0.5)
    assert config.threshold_on_other_scale() == ("alignment_score", pytest.approx(0.5 * (1 + 2 / math.e)))
    config = config.replace(crepa_normalize_neighbour_sum=True)
    assert config.threshold_on_other_scale() == ("alignment_score", 0.5)

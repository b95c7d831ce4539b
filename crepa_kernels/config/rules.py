"""What settings know besides their fields: the error, other names, tables, rules over several keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..models.families import known_families
from ..neighbours import Neighbours

# Of all keys of this package; a typo is looked for among the keys of its own prefix first.
PREFIXES = ("crepa_", "urepa_", "irepa_", "layersync_")

DINOV2_PATCH_SIZE = 14
DINOV2_HUB_IDS = {
    f"dinov2_vit{letter}14{suffix}": f"facebook/dinov2-{registers}{size}"
    for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
    for suffix, registers in {"": "", "_reg": "with-registers-"}.items()
}
EFFICIENTNET_LITE0 = "efficientnet_lite0"
ENCODER_PATCH_SIZES = {**dict.fromkeys(DINOV2_HUB_IDS, DINOV2_PATCH_SIZE), EFFICIENTNET_LITE0: 16}
ENCODER_ALIASES = {
    "dino_v2_g": "dinov2_vitg14",
    "dinov2_g": "dinov2_vitg14",
    "dinov2-vitg14": "dinov2_vitg14",
    "dino_v2_s": "dinov2_vits14",
    "dinov2_s": "dinov2_vits14",
    "dinov2-vitb14": "dinov2_vitb14",
}

UNSUPPORTED = "not supported by this package"

# What operators, schedules and checkpoints hold.
LEAST_INTEGER, MOST_INTEGER = -(2**63), 2**63 - 1

_PRESET_BASE = {
    "crepa_enabled": True,
    "crepa_lambda": 0.5,
    "crepa_scheduler": "constant",
    "crepa_encoder_resize": "grid",
}
# By name; `CrepaConfig.preset` adds the family's block index.
PRESETS: dict[str, dict[str, Any]] = {
    "i2v": {**_PRESET_BASE},
    "t2v": {
        **_PRESET_BASE,
        "crepa_scheduler": "cosine",
        "crepa_warmup_steps": 100,
        "crepa_decay_steps": 0,
        "crepa_lambda_end": 0.1,
        "crepa_similarity_threshold": 0.85,
        "crepa_similarity_metric": "alignment_score",
        "crepa_threshold_mode": "permanent",
    },
    "solid_background": {**_PRESET_BASE, "crepa_cutoff_step": 2000},
}


class ConfigError(ValueError):
    """Every wrong key of one configuration; `problems` has one line for each, `source` names the file."""

    def __init__(self, problems: Iterable[str], source: str | None = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        heading = f"{source}: " if source else ""
        if len(self.problems) == 1:
            message = heading + self.problems[0]
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            message = f"{heading}{len(self.problems)} settings are wrong:{lines}"
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)


def describe(key: str, value: Any, rule: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return f"{key} = {text}: {rule}"


def whole_rule(rule: str, value: Any) -> str:
    """A key's rule, with that of all integers where `value` breaks it."""
    return f"{rule}; integers have at most 64 bits" if _is_too_long(value) else rule


def _is_too_long(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_too_long, value))
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not LEAST_INTEGER <= value <= MOST_INTEGER


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` is most likely a typo of, or None. The prefix that many keys share does not count."""
    word, choices = word.strip().lower().replace("-", "_"), list(choices)
    prefix = _prefix(word)
    for alike in ([choice for choice in choices if _prefix(choice) == prefix], choices):
        by_stem = {choice.removeprefix(_prefix(choice)): choice for choice in alike}
        found = difflib.get_close_matches(word.removeprefix(prefix), by_stem, n=1, cutoff=0.6)
        if found:
            return by_stem[found[0]]
    return None


def _prefix(word: str) -> str:
    return next((prefix for prefix in PREFIXES if word.startswith(prefix)), "")


def unknown_preset(name: Any) -> str:
    match = nearest(str(name), PRESETS)
    return f"must be one of {', '.join(PRESETS)}" + (f"; did you mean {match!r}?" if match else "")


def refused_keys(error: Any, fields: Mapping[str, Any]) -> list[str]:
    """Keys whose values a pydantic `ValidationError` refuses, in the order of the model's `fields`."""
    refused = {str(details["loc"][0]) for details in error.errors(include_url=False, include_context=False)}
    return sorted(refused, key=list(fields).index)


def unknown_key(key: str, known: Iterable[str]) -> str:
    match = nearest(key, known)
    return f"unknown key; did you mean {match}?" if match else "unknown key"


def recommended_block_index(family: str) -> int:
    """Block whose output to align for a model family (zero-based); ValueError for an unknown family."""
    found = {row.name: row.block_index for row in known_families()}
    if family not in found:
        raise ValueError(f"no recommended block index for family {family!r}; known families: {', '.join(found)}")
    return found[family]


def is_off(value: Any, off: Any) -> bool:
    """Whether a value is the one at which a key does nothing; true is no 1."""
    return isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(off, bool) and value == off


def refuse_qwen(key: str, values: dict[str, Any], written: Mapping[str, str]) -> list[str]:
    """What is wrong of a Qwen encoder under `key`, which is taken out of `values`."""
    encoder = values.get(key)
    if not isinstance(encoder, str):
        return []
    name = encoder.lower().replace("\\", "/").rstrip("/")
    if not (name.startswith("qwen") or name.rsplit("/", 1)[-1].startswith("qwen")):
        return []
    return [describe(written[key], values.pop(key), f"Qwen encoders are {UNSUPPORTED}")]


def settle_source(values: dict[str, Any]) -> list[str]:
    """Puts in `values` what `crepa_feature_source` and `crepa_use_backbone_features` mean together; what is wrong."""
    source = values.get("crepa_feature_source")
    if source == "self_flow":
        return [describe("crepa_feature_source", values.pop("crepa_feature_source"), UNSUPPORTED)]
    if values.get("crepa_use_backbone_features") is True:
        if source == "encoder":
            # "encoder" stays, so that the rules of backbone mode are not reported on top of this.
            del values["crepa_use_backbone_features"]
            rule = 'contradicts crepa_feature_source = "encoder"; it means "backbone"'
            return [describe("crepa_use_backbone_features", True, rule)]
        values.setdefault("crepa_feature_source", "backbone")
    elif source == "backbone" and values.get("crepa_use_backbone_features") in (None, False):
        values["crepa_use_backbone_features"] = True
    return []


def joint_problems(values: Mapping[str, Any], neighbours: Neighbours) -> Iterator[tuple[set[str], str]]:
    """Rules over several keys, on values that each field accepts: the keys involved and what is wrong."""
    block, teacher = values["crepa_block_index"], values["crepa_teacher_block_index"]
    enabled, backbone = values["crepa_enabled"], values["crepa_feature_source"] == "backbone"
    if enabled and block is None:
        families = ", ".join(f"{family.name} {family.block_index}" for family in known_families())
        rule = f"required when crepa_enabled is true (recommended: {families})"
        yield {"crepa_enabled", "crepa_block_index"}, describe("crepa_block_index", None, rule)
    keys = {"crepa_teacher_block_index", "crepa_feature_source", "crepa_use_backbone_features"}
    if enabled and backbone and teacher is None:
        rule = 'required when crepa_feature_source is "backbone": a block deeper than crepa_block_index'
        yield keys | {"crepa_enabled"}, describe("crepa_teacher_block_index", None, rule)
    if backbone and None not in (block, teacher) and teacher <= block:
        rule = f"must be deeper than the student's block, crepa_block_index = {block}"
        yield keys | {"crepa_block_index"}, describe("crepa_teacher_block_index", teacher, rule)

    threshold, metric = values["crepa_similarity_threshold"], values["crepa_similarity_metric"]
    ceiling = neighbours.most if metric == "alignment_score" else 1.0
    if threshold is not None and threshold > ceiling:
        keys = {"crepa_similarity_threshold", "crepa_similarity_metric"}
        reason = "the largest cosine"
        if metric == "alignment_score":
            keys |= {f"crepa_adjacent_{name}" for name in ("distance", "tau")}
            keys |= {"crepa_cumulative_neighbors", "crepa_normalize_neighbour_sum"}
            reason = "1 + Σw of the neighbours"
            if values["crepa_normalize_neighbour_sum"]:
                reason = "the neighbour sum is normalised"
        rule = f"must be at most {ceiling:.6g} on crepa_similarity_metric = {json.dumps(metric)} ({reason})"
        yield keys, describe("crepa_similarity_threshold", threshold, rule)

"""The form's values: every setting in it, and the same out as in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.settings import RunSettings
from crepa_trainer.ui.form import (
    FIELDS,
    LOSSES,
    SECTIONS,
    check,
    command_line,
    json_text,
    read_command_line,
    read_json_text,
    shown_value,
)
from crepa_trainer.ui.form_words import field_help, field_label
from crepa_trainer.ui.guard import Folders
from crepa_trainer.ui.starting import read_settings, saved_name, settings_files
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crepa_kernels.config import CrepaConfig
from crepa_kernels.config.rules import PRESETS

NEEDED = {"model": "owner/name", "data": "videos", "output": "runs/a", "max_train_steps": 1000}
_VALUES = st.one_of(
    st.text(max_size=12).filter(lambda text: "\x00" not in text),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.lists(st.integers(), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
)


def test_every_setting_is_in_the_form_once_and_has_its_words() -> None:
    keys = {"preset", *RunSettings.model_fields, *CrepaConfig.model_fields}
    assert set(FIELDS) == keys
    for field in FIELDS.values():
        assert field.section in SECTIONS
        assert field.help
        assert field_label(field, "ja") != field.label, field.key
        assert field_help(field, "ja") != field.help, field.key
    by_label = {(field.section, field.label) for field in FIELDS.values()}
    assert len(by_label) == len(FIELDS)


def test_labels_are_those_of_crepas_documentation() -> None:
    labels = {field.label: field.key for field in FIELDS.values() if field.section == LOSSES}
    assert labels["CREPA Block Index"] == "crepa_block_index"
    assert labels["Weight"] == "crepa_lambda"
    assert labels["Adjacent Distance"] == "crepa_adjacent_distance"
    assert labels["Temporal Decay"] == "crepa_adjacent_tau"


# Other processes take the time, not what is drawn.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@example(
    values={"cache_teacher": "true", "lr_scheduler": "1", "crepa_spatial_align": 0, "expert": "null", "data": '"a"'}
)
@given(values=st.dictionaries(st.sampled_from(sorted(FIELDS)), _VALUES, max_size=8))
def test_values_come_back_from_file_command_and_fields(values: dict[str, Any]) -> None:
    assert read_json_text(json_text(values)) == values
    # Text where the command line takes any word as text: there 2024 is "2024", as a folder may be named.
    for key, value in values.items():
        if FIELDS[key].is_text and not isinstance(value, str):
            continue
        assert FIELDS[key].read(FIELDS[key].written(value)) == value
    typed = {key: v for key, v in values.items() if isinstance(v, str) or not FIELDS[key].is_text}
    back = read_command_line(command_line(typed))
    assert back == typed
    assert list(back) == list(typed)


def test_each_problem_stands_at_its_field() -> None:
    checked = check({**NEEDED, "crepa_enabled": True, "crepa_lambda": -1, "learning_rate": "fast", "crepa_lamda": 2})
    assert set(checked.wrong) == {"crepa_lambda", "learning_rate"}
    assert "must be a number >= 0" in checked.wrong["crepa_lambda"]
    assert [line for line in checked.others if "did you mean crepa_lambda?" in line]
    assert not checked.is_usable
    # A contradiction stands at the key that the command line names.
    assert set(check({**NEEDED, "lr_warmup_steps": 5}).wrong) == {"lr_warmup_steps"}
    assert set(check({}).wrong) == set(NEEDED)


def test_an_alias_is_the_key_that_it_means() -> None:
    values = {**NEEDED, "crepa_enabled": True, "crepa_model": 3}
    assert set(check(values).wrong) == {"crepa_encoder"}
    assert shown_value(values, "crepa_encoder") == (3, "given")


def test_a_preset_is_shown_under_what_is_given() -> None:
    values = {"preset": "t2v", "crepa_lambda": 0.3}
    assert shown_value(values, "crepa_lambda") == (0.3, "given")
    assert shown_value(values, "crepa_warmup_steps") == (PRESETS["t2v"]["crepa_warmup_steps"], "preset")
    assert shown_value(values, "crepa_power") == (1.0, "default")


def test_the_weight_over_the_run_is_the_schedules() -> None:
    values = {**NEEDED, "preset": "t2v", "crepa_cutoff_step": 700}
    weights = dict(check(values).weights)
    assert weights[0] == 0
    assert max(weights.values()) == pytest.approx(0.5, abs=0.01)
    assert weights[700] == weights[999] == 0
    assert 0.1 < max(weight for step, weight in weights.items() if 600 < step < 700) < 0.5
    assert check({**NEEDED, "crepa_enabled": False}).weights == ()


def test_settings_that_do_nothing_are_noted() -> None:
    checked = check({**NEEDED, "crepa_lambda": 0.3})
    assert checked.is_usable
    assert "OFF" in checked.notes[0]


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', "[" * 5000, "1"])
def test_a_text_that_is_no_file_of_settings_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_json_text(text)


@pytest.mark.parametrize("text", ["", "rm -rf /", "crepa-train demo", "crepa-train run 'open", "crepa-train run word"])
def test_a_text_that_is_no_command_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_command_line(text)


def test_a_command_with_spaces_and_a_typo_is_read() -> None:
    read = read_command_line("crepa-train run --data videos --crepa_lambda 0.3 --crepa_enabled --lerning_rate=1")
    assert read == {"data": "videos", "crepa_lambda": 0.3, "crepa_enabled": True, "lerning_rate": 1}
    assert json.loads(json_text(read)) == read


def test_the_page_opens_toml_and_yaml_and_saves_json(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    (tmp_path / "a.toml").write_text('model = "owner/wan"\nlearning_rate = 1e-4\n')
    (tmp_path / "b.yaml").write_text("model: owner/wan\nlearning_rate: 1e-4\n")
    (tmp_path / "c.json").write_text('{"model": "owner/wan", "learning_rate": 1e-4}')
    (tmp_path / "notes.txt").write_text("none")
    assert settings_files(folders) == ["a.toml", "b.yaml", "c.json"]
    assert [saved_name(name) for name in (*settings_files(folders), "d.1")] == [
        "a.json",
        "b.json",
        "c.json",
        "d.1.json",
    ]
    for name in settings_files(folders):
        assert read_settings(folders, name) == {"model": "owner/wan", "learning_rate": 1e-4}
    (tmp_path / "b.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"^b\.yaml: not YAML: .*line 1"):
        read_settings(folders, "b.yaml")

"""`report_to`: accelerate's trackers beside metrics.jsonl, which is always there."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.reporting.trackers import check_trackers
from training_runs import TinyClips, tiny_config, tiny_settings, train, train_elsewhere


def test_a_name_alone_is_a_list_of_one(models: Path, tmp_path: Path) -> None:
    assert tiny_settings(models, tmp_path, report_to="wandb").report_to == ("wandb",)
    assert tiny_settings(models, tmp_path, report_to=[]).report_to == ()
    assert tiny_settings(models, tmp_path).report_to == ("tensorboard",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "report_to: tensorbord is unknown; did you mean tensorboard?"),
        ("nowhere", "report_to: nowhere is unknown; accelerate knows aim, .*wandb"),
        ("comet_ml", "report_to: comet_ml is not installed: pip install comet-ml"),
    ],
)
def test_one_that_is_unknown_or_not_installed_is_named(name: str, said: str) -> None:
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=said):
        check_trackers(["tensorboard", name])


def test_a_run_may_have_the_metrics_alone(models: Path, tmp_path: Path) -> None:
    rows = train(
        tiny_settings(models, tmp_path / "run", report_to=[], matrix_every=2, max_train_steps=2), tiny_config(models)
    )
    assert [row["step"] for row in rows] == [0, 1]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "looks" / "step-00000000.json").is_file()


def records(file: Path) -> list[Any]:
    """All that wandb wrote into its file, which is a log as LevelDB's: pieces in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, piece, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        piece += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            found.append(Record.FromString(piece))
            piece = b""
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_every_value_and_picture_without_a_network(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = tiny_settings(
        models,
        tmp_path / "run",
        report_to=["wandb", "tensorboard"],
        matrix_every=2,
        max_train_steps=4,
        validation_prompts=["a"],
        validation_every=2,
        validation_steps=2,
    )
    rows = train(settings, tiny_config(models), TinyClips(1, 0))
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    found = records(file)
    history: dict[int, dict[str, Any]] = {}
    for record in found:
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history.setdefault(record.history.step.num, {}).update(items)
    for row in rows:
        at = history[row["step"]]
        assert {name: at[name] for name in row if name != "step"} == {k: v for k, v in row.items() if k != "step"}
    assert [step for step in history if "similarity_matrix" in history[step]] == [0, 2]
    assert [step for step in history if "validation/0" in history[step]] == [2, 4]
    config = {
        item.key: json.loads(item.value_json)
        for record in found
        if record.HasField("config")
        for item in record.config.update
    }
    assert (config["learning_rate"], config["crepa_block_index"], config["frame_counts"]) == (0.01, 1, "[9]")
    (run,) = (record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name) == ("crepa", "run")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_an_account_is_one_line(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    ended = train_elsewhere(tiny_settings(models, tmp_path / "run", report_to="wandb"), tiny_config(models))
    assert ended.returncode == 1
    assert "ValueError: report_to: UsageError: No API key configured" in ended.stderr

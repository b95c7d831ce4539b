"""What plans and errors say, in Japanese: every sentence of a plan that says much, and names of files as they are."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import crepa_trainer
import numpy as np
import pytest
from corner_videos import corners, write
from crepa_trainer.control import ask
from crepa_trainer.data.dataset import find_clips
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.memory import RunMemory
from crepa_trainer.reporting.plan import make_plan
from crepa_trainer.reporting.table import memory_rows, plan_rows
from crepa_trainer.reporting.words import JAPANESE
from crepa_trainer.settings import RunSettings
from crepa_trainer.ui.form import FIELDS, check
from crepa_trainer.ui.form_words import field_help
from crepa_trainer.ui.guard import Folders
from crepa_trainer.ui.phrases import phrase
from crepa_trainer.ui.starting import resume_run, save_settings

import crepa_kernels
from crepa_kernels import CrepaConfig

# Words of which no sentence does without some.
ENGLISH = re.compile(
    r"\b(a|all|ahead|and|are|at|before|block|by|clips?|each|every|for|frames?|from|has|in|is|it|its|kept|last|none|of|off|on|"
    r"over|parameters|seen|skipped|steps?|teacher|the|times?|tokens?|variable|videos?|weight|with|without)\b"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tags = {"colorspace": 9, "color_range": 1, "color_trc": 18, "color_primaries": 9}
    write(folder / "2 clips of 3 videos.mp4", [corners()] * 12)
    write(folder / "hdr.mov", [np.full((96, 160, 3), 512, np.uint16)] * 12, pixels="yuv420p10le", tags=tags)
    write(folder / "portrait.mp4", [corners(384, 216)] * 12, rate=60)
    write(folder / "small.mp4", [corners(16, 24)] * 12)
    write(folder / "short (a).mp4", [corners()] * 2)
    write(folder / "vfr.mkv", [corners()] * 12, times=[n * (n + 1) for n in range(12)])
    (folder / "bad.mp4").write_bytes(b"\x17" * 1000)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("corners " * (600 if path.name == "vfr.mkv" else 1))
    shutil.copy(folder / "small.txt", folder / "alone.txt")
    for name in (".hidden", "._small.mp4", "other.xyz"):
        (folder / name).touch()
    return folder


def rows(
    models: Path, data: Path, config: dict[str, Any], *, memory: bool = False, **changes: Any
) -> list[tuple[str, str]]:
    values: dict[str, Any] = {"model": str(models / "wan"), "data": data, "output": data.parent / "out"}
    values |= {"max_train_steps": 10, "resolutions": ((32, 48),), "frame_counts": (5, 9), **changes}
    settings = RunSettings(**values)
    family = TrainingFamily.of(settings.model)
    found = find_clips(settings, family)
    plan = make_plan(settings, CrepaConfig.from_dict(config), family, found, processes=changes.get("batch_size", 1))
    needed = RunMemory(plan)
    verdicts = [row for has in (None, 10**4, 10**12) * memory for row in memory_rows(needed, has)]
    return [*plan_rows(plan), *verdicts]


def test_every_sentence_of_a_plan_is_in_japanese(models: Path, data: Path) -> None:
    crepa = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(models / "dinov2")}
    more = {"crepa_encoder_image_size": 28, "irepa_enabled": True, "crepa_relational_weight": 0.5}
    itself = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2}
    layersync = {"layersync_enabled": True, "layersync_student_block": 0, "layersync_teacher_block": 2}
    sampled = {"validation_prompts": ("a",), "validation_every": 5}
    plans = [
        rows(models, data, {}, batch_size=4, gradient_accumulation_steps=2, workers=2, **sampled),
        rows(models, data, {**crepa, **more}, fps=12.5, training="full", gradient_checkpointing=False, workers=1),
        rows(models, data, {**crepa, **itself}, hdr="skip", cache_teacher="features", batch_size=1, **layersync),
        rows(models, data, {**crepa, "crepa_encoder_image_size": 28}, cache_teacher="features"),
        rows(models, data, {**crepa, "crepa_lambda": 0.0}),
        rows(models, data, crepa, lora_type="dora", lora_dropout=0.1, lora_alpha=2.0, ema_decay=0.9, memory=True),
        rows(models, data, crepa, optimizer="adamw8bit", lr_scheduler="constant_with_warmup", lr_warmup_steps=2),
        rows(models, data, crepa, base_precision="int8", offload="block", cache_teacher="features", memory=True),
        rows(models, data, crepa, sharding="fsdp2", batch_size=2),
    ]
    english = []
    for key, value in (row for plan in plans for row in plan):
        lists = ("skipped", "cut off", "cropped", "enlarged", "HDR", "captions cut")
        for line in value.split("; ") if key in lists else [value]:
            said = left = phrase(line, "ja")
            for name in (*(path.name for path in data.iterdir()), str(data), str(models), str(data.parent)):
                left = left.replace(name, "")
            if said == line or ENGLISH.search(left):
                english.append((key, said))
            # CREPA, iREPA, LayerSync and HDR are names.
            assert key in JAPANESE or not key.islower(), key
            assert phrase(line, "en") == line
    assert english == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a (b).mp4 (2 frames, the shortest clip needs 5)", "a (b).mp4（2 フレーム。最短のクリップに 5 必要）"),
        ("1 frame of 32x48, 25 fps → 1 frame of 16x16", "32x48、1 フレーム、25 fps → 16x16、1 フレーム"),
        ("loses 3 frames.mp4 1.7 times", "loses 3 frames.mp4：1.7 倍"),
        ("no sentence of ours: off, hidden", "no sentence of ours: off, hidden"),
        ("off", "オフ"),
        ("step 7: the loss is nan; lower the learning rate", "ステップ 7：loss is nan。学習率を下げてください"),
        (
            "step 7: the loss is nan; it came from the teacher, which no learning rate changes: the teacher's weights "
            "or its frames are damaged",
            "ステップ 7：loss is nan。原因は the teacher で、学習率では変わりません。"
            "教師の重みかフレームが壊れています",
        ),
        (
            "CUDA out of memory; crepa-train run --plan says what each phase needs, and what to switch on",
            "CUDA out of memory。段階ごとの必要量と減らし方は、「計画」のページか crepa-train run --plan で見られます",
        ),
        ("{x} is there already", "{x} はすでにあります"),
    ],
)
def test_names_stay_as_they_are(text: str, said: str) -> None:
    assert phrase(text, "ja") == said


ODD = ("x", -1, 0, 1.5, 10**9, [], {}, True, "", [[1]], None)
NEEDED = {"model": "a/b", "data": "d", "output": "o", "max_train_steps": 10}


def test_whatever_is_wrong_of_a_setting_is_said_in_japanese() -> None:
    said = set()
    for key in FIELDS:
        for value in ODD:
            checked = check({**NEEDED, "crepa_enabled": True, key: value})
            said |= {*checked.wrong.values(), *checked.others, *checked.notes}
    assert len(said) > 400
    assert sorted(line for line in said if phrase(line, "ja") == line) == []


# Where what a person reads of settings, models, videos and runs is said: all of the trainer but for what is said to
# those who start a server or the demo, or write programs.
ELSEWHERE = ("cli.py", "demo", "data/clips.py", "data/shares.py", "reporting/report.py", "step.py", "ui/server.py")
SAID = ("ValueError", "DataError", "VideoError", "OSError", "ChildProcessError")
# No sentences; said behind others; or to those who write programs, or start servers.
OTHERS = {
    "model = 7: 7; only 7 or null is accepted",
    "its weights have other shapes",
    "its parameter 7 is not of the shape 7",
    "its header would be longer than the file",
    "model = 7: a GPU that multiplies fp8 (compute capability 8.9 or MI300)",
    "--queue 7: 7",
}


def _sentences(node: ast.AST, constants: Mapping[str, str]) -> list[str]:
    """What an expression may say, with 7 for every value in it; none for one that is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*(_sentences(part, constants) or ["7"] for part in node.values))]
    if isinstance(node, ast.IfExp):
        return [*_sentences(node.body, constants), *_sentences(node.orelse, constants)]
    if isinstance(node, ast.FormattedValue):
        return _sentences(node.value, constants)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "several":
        noun, *ending = (_sentences(argument, constants)[0] for argument in node.args[1:])
        return [f"7 {noun}{ending[0] if ending else 's'}"]
    return [constants[node.id]] if isinstance(node, ast.Name) and node.id in constants else []


def _said_in(tree: ast.Module) -> Iterator[str]:
    constants: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants.update((node.targets[0].id, text) for text in _sentences(node.value, constants))
    for each in ast.walk(tree):
        if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call) and each.exc.args:
            if getattr(each.exc.func, "id", "") in SAID:
                yield from _sentences(each.exc.args[0], constants)
        elif isinstance(each, ast.Call) and getattr(each.func, "id", "") == "describe":
            yield from (f"model = 7: {rule}" for rule in _sentences(each.args[2], constants))
        elif isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "rule":
            yield from (f"model = 7: {rule}" for rule in _sentences(each.value, constants))


def _is_said(line: str) -> bool:
    """Alone, behind its setting (what a rule of pydantic's raises), or behind its file, as why that is passed over."""
    behind = (f"7.mp4 ({line})", f"7.txt {line}")
    return (
        line != phrase(line, "ja")
        or not phrase(f"fps = 7: {line}", "ja").startswith("fps = 7:")
        or any(line not in phrase(text, "ja") for text in behind)
    )


def test_every_sentence_that_a_person_reads_has_its_japanese() -> None:
    trainer, kernels = Path(crepa_trainer.__file__).parent, Path(crepa_kernels.__file__).parent
    found = [
        *(kernels / "config").glob("*.py"),
        *(file for file in trainer.rglob("*.py") if not file.relative_to(trainer).as_posix().startswith(ELSEWHERE)),
    ]
    said = {line for file in found for line in _said_in(ast.parse(file.read_text()))}
    worded = {line for line in said - OTHERS if re.search("[a-z]{2}", line.removeprefix("model = 7"))}
    assert len(worded) > 180
    assert sorted(line for line in worded if not _is_said(line)) == []


def test_several_wrong_settings_in_one_line_are_each_in_japanese() -> None:
    wrong = check({**NEEDED, "max_train_steps": 0, "crepa_lambda": -1, "lr_warmup_steps": -2}).wrong.values()
    line = f"mine.json: {'; '.join(wrong)}; weight_decay: no sentence of ours"
    said = phrase(line, "ja")
    assert said.startswith("mine.json：max_train_steps")
    assert said.endswith("；weight_decay: no sentence of ours")
    assert not re.search(r"\bmust\b", said)
    assert said.count("；") == 3


def test_errors_of_the_page_are_in_japanese(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    said = []
    for act in (
        lambda: folders.inside("/elsewhere"),
        lambda: save_settings(folders, "a/b", {}),
        lambda: resume_run(folders, tmp_path / "none", queued=False),
        lambda: ask(tmp_path, "save"),
    ):
        with pytest.raises(ValueError, match=r"\w") as error:
            act()
        said.append((str(error.value), phrase(str(error.value), "ja")))
    assert [english for english, japanese in said if english == japanese] == []
    wrong = check({"model": "a/b", "data": "d", "output": "o", "max_train_steps": 0, "crepa_lambda": -1}).wrong
    for key in ("max_train_steps", "crepa_lambda"):
        assert phrase(wrong[key], "ja").endswith(f"：{field_help(FIELDS[key], 'ja')}")

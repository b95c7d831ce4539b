"""`crepa-train cache`: shares of a folder encoded side by side are, byte for byte, what one process encodes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.cli import main
from crepa_trainer.data.shares import Share
from hub_cases import CASES
from processes import run
from videos import moving_square, write_video, write_with_empty_samples

NAMES = [f"videos/{number}.mp4" for number in range(100)]
NAMES_HERE = [f"{name}.mp4" for name in "abcdef"]


@pytest.mark.parametrize("of", [1, 2, 3, 7, 500])
def test_each_name_is_in_one_share(of: int) -> None:
    shares = [[name for name in NAMES if Share(number, of).has(name)] for number in range(1, of + 1)]
    assert sorted(name for share in shares for name in share) == sorted(NAMES)
    if of == 2:
        assert min(map(len, shares)) > 30


@pytest.mark.parametrize("text", ["", "0/4", "5/4", "1/0", "1", "a/b", "-1/4", "1/2/3", "1.0/4", " 1/4"])
def test_what_is_no_share_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--shard", text] if text[:1] != "-" else ["cache", f"--shard={text}"]) == 2
    expected = f"--shard {text}: must be i/n with i from 1 to n, such as 1/8"
    assert capsys.readouterr().err == " ".join(f"crepa-train: error: {expected}".split()) + "\n"


def test_each_prompt_is_in_one_share() -> None:
    captions = {name: f"caption {number % 30}" for number, name in enumerate(NAMES)} | {"broken.mp4": "of none"}
    others = ("", "a prompt", "caption 3")
    shares = [Share(number, 5) for number in range(1, 6)]
    videos = set(NAMES)
    parts = [each.prompts(captions, others, {captions[v] for v in videos if each.has(v)}) for each in shares]
    wanted = {*captions.values(), *others} - {"of none"}
    assert sorted(prompt for part in parts for prompt in part) == sorted(wanted)
    assert all(captions[video] == prompt for part in parts for prompt, video in part.items() if video)
    # Videos that come later in the folder's order move nothing.
    more = {**captions, "z.mp4": "caption 3", "zz.mp4": "a new one"}
    again = [each.prompts(more, others, {more[v] for v in [*videos, "zz.mp4"] if each.has(v)}) for each in shares]
    assert [{prompt: part[prompt] for prompt in part if prompt != "a new one"} for part in again] == parts


def job(words: list[str], killed_at: int | None = None) -> None:
    """One share, of as many as there are ranks, which know nothing of each other; all of it where there is one.

    killed_at: the file of the first one at which SIGKILL comes, written and not yet in its place.
    """
    number, of = int(os.environ.pop("RANK", "0")) + 1, int(os.environ.pop("WORLD_SIZE", "1"))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    replace, places = os.replace, iter(range(1_000_000))

    def replace_or_die(source: Any, target: Any) -> None:
        if number == 1 and next(places) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    assert main(["cache", *words, *([f"--shard={number}/{of}"] if of > 1 else [])]) == 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six videos in two shares; one is cut off, one ends early, and captions of both shares are the same."""
    (folder := tmp_path / "data").mkdir()
    first = [Share(1, 2).has(f"{name}.mp4") for name in "abcdef"]
    assert 0 < sum(first) < 6
    for seed, name in enumerate("abcdef"):
        path = folder / f"{name}.mp4"
        path.with_suffix(".txt").write_text({"a": "a square", "e": "a square", "f": "a square"}.get(name, name))
        if name == "d":
            write_with_empty_samples(path, moving_square(12, 48, 80))
            continue
        write_video(path, moving_square(40 if name == "b" else 9, seed=seed), faststart=True)
    path = folder / "b.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 6])
    return folder


def words(models: Path, data: Path, cache: Path, **changes: Any) -> list[str]:
    settings = {
        "model": str(models / "wan"), "data": str(data), "output": str(data.parent / "out"), "cache": str(cache),
        "max_train_steps": 1, "resolutions": [[32, 48]], "frame_counts": [5, 9, 21], "cache_teacher": "features",
        "validation_prompts": ["a video", "c"], "validation_every": 1, "crepa_enabled": True, "crepa_block_index": 1,
        "crepa_encoder": str(models / "dinov2"), "crepa_encoder_resize": "grid",
    } | changes  # fmt: skip
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def contents(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def made_by(given: dict[str, Any], killed_at: int | None = None, ranks: int = 1) -> str:
    done = run(job, words(**given), killed_at, ranks=ranks)
    assert done.returncode == (0 if killed_at is None else -signal.SIGKILL), done.stderr
    return " ".join(done.stdout.split())


def test_two_shares_that_were_killed_make_what_one_process_makes(models: Path, data: Path, tmp_path: Path) -> None:
    given = {"models": models, "data": data, "cache": tmp_path / "two"}
    made_by(given, killed_at=3, ranks=2)
    unfinished = list((tmp_path / "two").rglob("*.tmp"))
    assert unfinished
    said = made_by(given, ranks=2)
    assert f"{tmp_path}/two has share 1/2 of {data}" in said
    assert f"{tmp_path}/two has share 2/2 of {data}" in said
    for path in unfinished:
        assert path.exists()  # it may be another job's, until it is an hour old
        path.unlink()
    made_by({**given, "cache": tmp_path / "one"})
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name.split("/")[0] for name in one} == {"latents", "teacher", "text", "frames"}
    assert one.keys() == two.keys()
    assert one == two
    # What the run makes of it: nothing.
    assert "encoded" not in made_by(given)
    assert contents(tmp_path / "two") == two


def test_a_share_without_a_video_is_done_at_once(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = next(n for n in range(1, 65) if not any(Share(n, 64).has(name) for name in ("", "a video", *NAMES_HERE)))
    assert main(["cache", *words(models, data, tmp_path / "cache"), f"--shard={empty}/64"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache has share {empty}/64 of {data}\n"
    assert not (tmp_path / "cache").exists()


def test_what_a_run_would_refuse_is_refused_before_anything_is_encoded(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *words(models, data, tmp_path / "cache", crepa_block_index=7)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "crepa_block_index = 7: " in line
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_shares_of_texts_with_first_frames_leave_those_of_prompts_to_the_run(data: Path, tmp_path: Path) -> None:
    model = CASES["hunyuan token_replace"].save(tmp_path / "hunyuan")
    (tmp_path / "models").mkdir()
    changes: dict[str, Any] = {"model": str(model), "task": "image2video", "crepa_enabled": False}
    changes["validation_prompts"] = ["a video", "another"]
    given = {"models": tmp_path / "models", "data": data, "cache": tmp_path / "two", **changes}
    made_by(given, ranks=2)
    made_by({**given, "cache": tmp_path / "one"})
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert all(one[name] == content for name, content in two.items())
    assert {name.split("/")[0] for name in one.keys() - two.keys()} == {"text"}
    assert len(one) - len(two) == 2  # two validation prompts
    assert "encoded 2 captions" in made_by(given)
    assert contents(tmp_path / "two") == one

"""What a folder holds: videos of every name, and what is passed over, counted by kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crepa_trainer.data.listing import counted, list_videos
from crepa_trainer.data.video import DataError


def names(folder: Path, *ours: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_videos(folder, ours).videos]


def make(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_every_container_in_either_case(tmp_path: Path) -> None:
    kinds = (
        "gif",
        "3gp",
        "wmv",
        "MTS",
        "m2ts",
        "flv",
        "ogv",
        "mxf",
        "AVI",
        "mpg",
        "vob",
        "asf",
        "f4v",
        "webm",
        "TS",
        "qt",
    )
    make(tmp_path, *(f"a{n:02}.{kind}" for n, kind in enumerate(kinds)))
    assert names(tmp_path) == [f"a{n:02}.{kind}" for n, kind in enumerate(kinds)]


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    data = make(
        tmp_path / "data",
        "a.mp4", "a.txt", "B.MOV", "B.TXT", "._a.mp4", "._a.txt", ".DS_Store", ".trash/c.mp4", "@eaDir/a.mp4",
        "deep/@eaDir/a.mp4", ".ipynb_checkpoints/a.mp4", "alone.txt", "deep/alone.txt", "notes.json", "cover.jpg",
        "folder.mp4/d.mp4",
    )  # fmt: skip
    os.mkfifo(data / "pipe.mp4")
    (data / "gone.mp4").symlink_to(data / "nowhere.mp4")
    listing = list_videos(data)
    assert [path.name for path in listing.videos] == ["B.MOV", "a.mp4"]
    assert listing.passed_over == {
        ".ipynb_checkpoints": 1,
        "@eaDir": 2,
        "AppleDouble (._*)": 2,
        "broken links": 1,
        "captions without a video": 2,
        "files of other kinds": 2,
        "folders with a video's name": 1,
        "hidden": 2,
        "pipes and devices": 1,
    }
    assert counted({"hidden": 2, "@eaDir": 1}) == "hidden: 2, @eaDir: 1"


def test_links_are_followed_and_end_where_they_lead_back(tmp_path: Path) -> None:
    data, elsewhere = make(tmp_path / "data", "z/a.mp4"), make(tmp_path / "elsewhere", "b.mp4", "deeper/c.mkv")
    (data / "link").symlink_to(elsewhere)
    (elsewhere / "deeper" / "back").symlink_to(data)
    (data / "z" / "self").symlink_to(data / "z")
    (data / "again").symlink_to(data / "z")
    (data / "one.mp4").symlink_to(elsewhere / "b.mp4")
    assert names(data) == ["link/b.mp4", "link/deeper/c.mkv", "one.mp4", "z/a.mp4"]
    assert list_videos(data).passed_over == {"links to folders that were seen": 3}


def test_what_runs_wrote_is_passed_over(tmp_path: Path) -> None:
    clip = "validation/step-00000001/prompt-0.mp4"
    data = make(tmp_path, "a.mp4", f"first/{clip}", "first/metrics.jsonl", f"second/{clip}", "cached/b.mp4")
    assert names(data, data / "second", data / "cached") == ["a.mp4"]
    assert list_videos(data, (data / "second", data / "cached")).passed_over == {"output folders of this trainer": 3}
    # A folder that is only called so is none.
    assert names(make(data, "validation/c.mp4"), data / "second", data / "cached") == ["a.mp4", "validation/c.mp4"]


def test_a_folder_without_videos_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no video in this folder .*passed over: files of other kinds: 1$"):
        list_videos(make(tmp_path, "a.zip"))

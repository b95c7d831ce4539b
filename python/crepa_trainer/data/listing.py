"""Which files below a folder are videos, and what else is there, by kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..folders import METRICS_FILE
from .video import DataError

# Of containers that the decoder opens and that hold pictures in motion.
VIDEO_SUFFIXES = frozenset(
    {
        ".264", ".265", ".266", ".3g2", ".3gp", ".3gpp", ".amv", ".apng", ".asf", ".av1",
        ".avc", ".avi", ".avs2", ".avs3", ".bik", ".cavs", ".cine", ".dav", ".dif", ".divx",
        ".drc", ".dv", ".evo", ".f4v", ".flc", ".fli", ".flv", ".gif", ".gxf", ".h261",
        ".h263", ".h264", ".h265", ".h266", ".hevc", ".insv", ".ismv", ".ivf", ".ivr", ".lrv",
        ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d",
        ".mkv", ".mod", ".moflex", ".mov", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpg", ".mpg4",
        ".mpv", ".mts", ".mxf", ".nsv", ".nut", ".nuv", ".obu", ".ogm", ".ogv", ".ogx",
        ".psp", ".pva", ".qt", ".rm", ".rmvb", ".roq", ".smk", ".swf", ".tod", ".tp",
        ".trp", ".ts", ".ty", ".vc1", ".viv", ".vob", ".vro", ".vvc", ".webm", ".wmv",
        ".wtv", ".y4m",
    }
)  # fmt: skip
# What a run leaves beside its metrics, some of it videos.
_OF_A_RUN = ("cache", "checkpoints", "trained", "validation")
CAPTION = ".txt"


@dataclass(frozen=True)
class Listing:
    """The videos below a folder, sorted, so that runs agree on the order, and how many of what else there is."""

    videos: tuple[Path, ...]
    passed_over: dict[str, int]


def list_videos(folder: Path, ours: tuple[Path, ...] = ()) -> Listing:
    """Every video file below `folder`, links to files and folders followed, each folder once.

    ours: folders that this run writes into. Those of other runs are known by what is in them.
    Raises DataError for no folder, and for one without a video.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    search = _Search({each.resolve() for each in ours})
    search.folder(folder)
    passed = search.passed_over()
    if not search.videos:
        kinds = " ".join(sorted(VIDEO_SUFFIXES))
        raise DataError(
            f"--data {folder}: no video in this folder ({kinds}){f'; passed over: {counted(passed)}' if passed else ''}"
        )
    return Listing(tuple(sorted(search.videos)), passed)


def counted(kinds: Mapping[str, int]) -> str:
    """How many of each kind, in one line."""
    return ", ".join(f"{kind}: {number:,}" for kind, number in kinds.items())


class _Search:
    def __init__(self, ours: set[Path]) -> None:
        self.ours, self.seen = ours, set[Path]()
        self.videos: list[Path] = []
        self.captions: list[Path] = []
        self.kinds: Counter[str] = Counter()

    def folder(self, folder: Path) -> None:
        self.seen.add(folder.resolve())
        # A folder itself before links to it, whose names would be other ones.
        for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path)):
            kind = self._kind(path)
            if kind is not None:
                self.kinds[kind] += 1
            elif path.is_dir():
                self.folder(path)

    def _kind(self, path: Path) -> str | None:
        """What a path is passed over as; None for what was taken, and for folders to look into."""
        name = path.name
        if name.startswith("._"):
            return "AppleDouble (._*)"
        if name in ("@eaDir", ".ipynb_checkpoints"):
            return name
        if name.startswith("."):
            return "hidden"
        if path.is_dir():
            return self._kind_of_folder(path)
        if not path.exists():
            return "broken links"
        if not path.is_file():
            return "pipes and devices"
        if path.suffix.lower() in VIDEO_SUFFIXES:
            self.videos.append(path)
        elif path.suffix.lower() == CAPTION:
            self.captions.append(path)
        else:
            return "files of other kinds"
        return None

    def _kind_of_folder(self, path: Path) -> str | None:
        whole = path.resolve()
        of_a_run = (path / METRICS_FILE).is_file() and any((path / name).is_dir() for name in _OF_A_RUN)
        if whole in self.ours or of_a_run:
            return "output folders of this trainer"
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return "folders with a video's name"
        if whole in self.seen:
            return "links to folders that were seen"
        return None if os.access(path, os.R_OK | os.X_OK) else "folders that cannot be read"

    def passed_over(self) -> dict[str, int]:
        stems = {video.with_suffix("") for video in self.videos}
        alone = sum(caption.with_suffix("") not in stems for caption in self.captions)
        kinds = dict(sorted(self.kinds.items()))
        return {**kinds, "captions without a video": alone} if alone else kinds

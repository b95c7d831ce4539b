"""Shares of a data folder, encoded side by side into one cache by jobs that never speak to each other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The `number`-th of `of` shares, from 1 on.

    Which share a name is in depends on the name and `of` alone: each is in exactly one, and adding others moves none.
    """

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Share:
        """Of "i/n". ValueError for any other text, and for an i that is not from 1 to n."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise ValueError(f"--shard {text}: must be i/n with i from 1 to n, such as 1/8")
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, name: str) -> bool:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest, "big") % self.of == self.number - 1

    def prompts(
        self, captions: Mapping[str, str], others: Collection[str], made: Collection[str]
    ) -> dict[str, str | None]:
        """The prompts that this share encodes, each with the video that it is the caption of; all shares' are disjoint.

        A caption is encoded where its first video is, unless no video that has it can be encoded; what is no caption
        goes by its own text.

        captions: of every video of the folder, in its order; others: prompts that may be none of them; made: captions
        of the videos of this share that were encoded.
        """
        first: dict[str, str] = {}
        for video, caption in captions.items():
            first.setdefault(caption, video)
        wanted = {caption for video, caption in captions.items() if not self.has(video)}.union(made)
        ours = {caption: video for caption, video in first.items() if caption in wanted and self.has(video)}
        return ours | {text: None for text in others if text not in first and self.has(text)}

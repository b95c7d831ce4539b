"""Whether a video file goes on to where it says that it ends: a download or a full disk cuts off what still decodes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_OF_FRAMES = (b"moov", b"moof", b"mdat")
_TS_PACKETS = (188, 192, 204)
_SEGMENT = 0x18538067  # Matroska's outermost element, after the header
_LAST_PAGE = 4  # of Ogg's flags
_LAST_OF_GIF = b"\x3b"
_ZEROS = 1 << 16  # bytes that may follow it


def what_is_cut_off(path: Path, stream: Any) -> str | None:
    """What a file lacks at its end, for a message; None where nothing is known to be missing.

    stream: its video stream, as the demuxer opened it.
    """
    kind = stream.container.format.name.split(",")[0]
    size = path.stat().st_size
    with path.open("rb") as file:
        if kind in _SAID_SIZES:
            said = max(_SAID_SIZES[kind](file), _end_of_index(stream))
            return f"has {size:,} of its {said:,} bytes" if said > size else None
        return "ends before its last part" if kind in _ENDS and not _ENDS[kind](file, size) else None


def _end_of_index(stream: Any) -> int:
    """Where the last frame ends by the index, or 0 for a container that has none at its beginning."""
    if stream.container.format.name.split(",")[0] != "mov":
        return 0
    return max((entry.pos + entry.size for entry in stream.index_entries), default=0)


def _end_of_boxes(file: BinaryIO) -> int:
    # Cameras leave at the end what only looks like a box.
    return max((place + size for name, place, size in boxes(file) if name in _OF_FRAMES), default=0)


def boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size in bytes of each outer box of an MP4; one that goes on to the end has what is left."""
    whole, place = file.seek(0, os.SEEK_END), 0
    while place + 8 <= whole:
        file.seek(place)
        size, name = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        elif size == 0:
            size = whole - place
        if size < 8:
            return
        yield name, place, size
        place += size


def _end_of_segment(file: BinaryIO) -> int:
    """Of a Matroska file; 0 where it was written to a pipe and does not say."""
    file.seek(0)
    for _ in range(2):  # the header, and the segment
        identity, length = _vint(file, keep_marker=True)[0], _vint(file)
        if identity == _SEGMENT:
            unknown = length[0] == (1 << 7 * length[1]) - 1
            return 0 if unknown else file.tell() + length[0]
        file.seek(length[0], os.SEEK_CUR)
    return 0


def _vint(file: BinaryIO, *, keep_marker: bool = False) -> tuple[int, int]:
    """EBML's number of variable length, and its length."""
    first = file.read(1) or b"\0"
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big")
    return (value if keep_marker else value & ((1 << 7 * length) - 1)), length


def _end_of_riff(file: BinaryIO) -> int:
    """Of an AVI's first part; 0 where it was written to a pipe and does not say."""
    file.seek(4)
    size = int.from_bytes(file.read(4), "little")
    return 0 if size in (0, 0xFFFFFFFF) else size + 8


def _ends_with_a_packet(file: BinaryIO, size: int) -> bool:
    """Of MPEG-TS, whose packets all have the same length."""
    file.seek(0)
    begin = file.read(8 * max(_TS_PACKETS))
    for length in _TS_PACKETS:
        first = 4 if length == 192 else 0  # each packet of an M2TS begins with a time
        if all(each == 0x47 for each in begin[first::length]):
            return size % length == 0
    return True


def _ends_with_a_last_page(file: BinaryIO, size: int) -> bool:
    """Of Ogg: its last page is whole, and of some stream the last."""
    file.seek(max(size - (1 << 16) - 27 - 255, 0))  # no page is longer
    rest = file.read()
    place = rest.rfind(b"OggS")
    header = rest[place : place + 27] if place >= 0 else b""
    if len(header) < 27:
        return False
    table = rest[place + 27 : place + 27 + header[26]]
    return bool(header[5] & _LAST_PAGE) and len(rest) >= place + 27 + header[26] + sum(table)


def _ends_with_its_mark(file: BinaryIO, size: int) -> bool:
    file.seek(max(size - _ZEROS, 0))
    return file.read().rstrip(b"\0").endswith(_LAST_OF_GIF)


_SAID_SIZES: dict[str, Callable[[BinaryIO], int]] = {
    "mov": _end_of_boxes,
    "matroska": _end_of_segment,
    "avi": _end_of_riff,
}
_ENDS: dict[str, Callable[[BinaryIO, int], bool]] = {
    "mpegts": _ends_with_a_packet,
    "ogg": _ends_with_a_last_page,
    "gif": _ends_with_its_mark,
}

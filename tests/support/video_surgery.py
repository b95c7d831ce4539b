"""Videos that were copied, trimmed, cut off or damaged after an encoder wrote them, and what lies beside a video."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from corner_videos import write

Pictures = Sequence[np.ndarray]
TICK = 512  # of an MP4's own clock, for a frame of 25 a second


def _packets(source: Any) -> list[Any]:
    return [packet for packet in source.demux(video=0) if packet.size]


def copied(path: Path, pictures: Pictures, start: int | None, options: Mapping[str, str]) -> None:
    """A stream copy without the frames before `start`; None: from the second key frame in the file's order.

    In MP4 and MOV from the key frame before it on, and what comes before `start` is left out by an edit list.
    """
    listed = path.suffix in (".mp4", ".mov")
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / f"whole{path.suffix}", pictures, options=options)
        with av.open(str(whole)) as source, av.open(str(path), "w") as target:
            stream, packets = target.add_stream_from_template(source.streams.video[0]), _packets(source)
            keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
            if start is None:
                kept = packets[keys[1] :]
                # No edit list leaves out the frames before the key frame, which need those that were cut away.
                zero = min(packet.pts for packet in kept) if listed else 0
            else:
                kept = packets[max(key for key in keys if key <= start) :]
                zero = sorted(packet.pts for packet in packets)[start] if listed else 0
            for packet in kept:
                packet.stream, packet.pts = stream, packet.pts - zero
                packet.dts = None if packet.dts is None else packet.dts - zero
                target.mux(packet)


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def _in_boxes(data: bytes, names: Sequence[bytes], change: Callable[[bytes], bytes]) -> bytes:
    """An MP4's boxes with the content of the first one that lies in boxes of these names changed."""
    kept, place, changed = [], 0, False
    while place < len(data):
        size, name = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + size]
        if name == names[0] and not changed:
            content = change(content) if len(names) == 1 else _in_boxes(content, names[1:], change)
            changed = True
        kept.append(_box(name, content))
        place += size
    assert changed, names
    return b"".join(kept)


def edited(path: Path, pictures: Pictures, edits: Sequence[tuple[int, int]]) -> None:
    """edits: for how many milliseconds it is shown from which frame on; -1: nothing is."""
    write(path, pictures, options={"bf": "0"})
    entries = [struct.pack(">IiI", last, first * TICK if first >= 0 else -1, 1 << 16) for last, first in edits]
    listed = struct.pack(">II", 0, len(entries)) + b"".join(entries)
    # The header is at the end: nothing that it points to moves.
    path.write_bytes(_in_boxes(path.read_bytes(), [b"moov", b"trak", b"edts", b"elst"], lambda _: listed))


def _jpeg(picture: np.ndarray) -> bytes:
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.color_range, encoder.time_base = "yuvj420p", 2, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()])


def with_exif(path: Path, pictures: Pictures) -> None:
    """JPEGs that say what camera made them."""
    maker = b"Camera\0\0"
    tags = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x010F, 2, len(maker), 26, 0) + maker
    note = b"Exif\0\0" + tags
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.color_range = "yuvj420p", 2
        for number, picture in enumerate(pictures):
            data = _jpeg(picture)
            packet = av.Packet(data[:2] + b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note + data[2:])
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)


def with_orientation_message(path: Path, pictures: Pictures) -> None:
    """H.264 that itself asks to be turned by 90 degrees counterclockwise."""
    stored = [np.ascontiguousarray(np.rot90(each, -1)) for each in pictures]
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / "whole.h264", stored)
        with av.open(str(whole)) as source, path.open("wb") as file:
            turn = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0])
            for packet in [*source.demux(video=0), None]:
                if packet is None or packet.size:
                    file.writelines(bytes(each) for each in turn.filter(packet))


def with_display_size(path: Path, pictures: Pictures, display: tuple[int, int], **how: Any) -> None:
    """Matroska that says in what size (height, width) it is shown, in the place of what it says of its colours."""
    write(path, pictures, tags={"colorspace": 5, "color_range": 1, "color_primaries": 5}, **how)
    data = path.read_bytes()
    place = data.index(b"\x55\xb0")
    length = 3 + (data[place + 2] & 0x7F)
    said = b"\x54\xb0\x81" + bytes([display[1]]) + b"\x54\xba\x81" + bytes([display[0]])
    padding = length - len(said)
    path.write_bytes(
        data[:place] + said + b"\xec" + bytes([0x80 | padding - 2]) + bytes(padding - 2) + data[place + length :]
    )


def with_rotation(path: Path, pictures: Pictures, degrees: int, codec: str = "libx264") -> None:
    """One that asks to be turned counterclockwise by so many degrees, as its container has it."""
    stored = [np.ascontiguousarray(np.rot90(each, -degrees // 90)) for each in pictures]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = stored[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees)
        for picture in stored:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def with_other_streams(
    path: Path, pictures: Pictures, sound: str | None = None, seconds: float = 0.36, second: bool = False
) -> None:
    """With silence that lasts so long, or a second video that is not the one to show unless it is asked for."""
    with av.open(str(path), "w") as container:
        codec = "mpeg4" if path.suffix == ".avi" else "libx264"
        video = container.add_stream(codec, rate=25)
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        other: Any = container.add_stream("libx264", rate=25) if second else None
        audio: Any = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        if other is not None:
            other.height, other.width, other.pix_fmt = 32, 32, "yuv420p"
        for number, picture in enumerate(pictures):
            grey = np.full((32, 32, 3), 128, np.uint8)
            for stream, shown in ((video, picture), (other, grey)):
                if stream is not None:
                    frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    container.mux(stream.encode(frame))
        if audio is not None:
            _silence(container, audio, seconds)
        for stream in (video, other, audio):
            if stream is not None:
                container.mux(stream.encode())


def _silence(container: Any, stream: Any, seconds: float) -> None:
    size, encoder = 1024, stream.codec_context
    if not encoder.is_open:
        encoder.open()
    for number in range(max(round(seconds * 48000) // size, 1)):
        values = np.zeros((1, size), np.float32 if "flt" in encoder.format.name else np.int16)
        frame = av.AudioFrame.from_ndarray(values, format=encoder.format.name, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, number * size, Fraction(1, 48000)
        container.mux(stream.encode(frame))


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        _silence(container, stream, 1.0)
        container.mux(stream.encode())


def with_cover(path: Path, pictures: Pictures) -> None:
    """A picture that players show in their list of files."""
    cover = _jpeg(np.full((512, 512, 3), 90, np.uint8))
    if path.suffix == ".mkv":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            container.add_attachment("cover.jpg", "image/jpeg", cover)
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return
    write(path, pictures)
    kind = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    data = _box(b"ilst", _box(b"covr", _box(b"data", struct.pack(">II", 13, 0) + cover)))
    tags = _box(b"udta", _box(b"meta", bytes(4) + kind + data))
    path.write_bytes(_in_boxes(path.read_bytes(), [b"moov"], lambda content: content + tags))


def _places(path: Path) -> list[tuple[int, int]]:
    """Where each frame's data begins in a file, and how long it is."""
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [(packet.pos, bytes(packet)) for packet in _packets(container)]
    return [(data.index(each) if place is None else place, len(each)) for place, each in packets]


def cut_off(path: Path, pictures: Pictures, frames: int, *, share: float = 0.5, **how: Any) -> None:
    """What a full disk leaves: so many frames, and a share of the next one."""
    write(path, pictures, **how)
    place, size = _places(path)[frames]
    path.write_bytes(path.read_bytes()[: place + round(share * size)])


def with_zeros(path: Path, pictures: Pictures, **how: Any) -> None:
    """Zeros after its end, as tools leave them that write whole blocks."""
    write(path, pictures, **how)
    path.write_bytes(path.read_bytes() + bytes(512))


class _Pipe:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def through_a_pipe(path: Path, pictures: Pictures, codec: str) -> None:
    """Nothing that was written can be put right at the end, such as sizes."""
    muxer = {".mkv": "matroska", ".ts": "mpegts"}.get(path.suffix, path.suffix[1:])
    with path.open("wb") as file, av.open(_Pipe(file), "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def damaged(path: Path, pictures: Pictures, frame: int, **how: Any) -> None:
    """A frame's data overwritten, the file's own structure kept; of MPEG-TS a packet of it lost."""
    write(path, pictures, **how)
    data, (place, size) = bytearray(path.read_bytes()), _places(path)[frame]
    if path.suffix == ".ts":
        path.write_bytes(data[: place + 188] + data[place + 2 * 188 :])
        return
    noise = np.random.default_rng(0).integers(0, 256, size // 2, np.uint8).tobytes()
    data[place + size // 3 : place + size // 3 + len(noise)] = noise
    path.write_bytes(data)


def write_animated_webp(path: Path, pictures: Pictures) -> None:
    write(path, pictures, codec="libwebp_anim", format="webp")


def jpeg_file(path: Path) -> None:
    path.write_bytes(_jpeg(np.full((48, 64, 3), 90, np.uint8)))

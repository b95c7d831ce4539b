"""A clip of every container, codec, pixel format and colour, as an encoder writes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corner_videos import PRIMARIES_2020, as_yuv, hlg, linear, pq, write
from video_kinds import (
    FINE,
    FULL,
    HEIGHT,
    NEAR_5_BITS,
    NEAR_HDR,
    NO_LOG,
    WIDTH,
    X265,
    Kind,
    kind,
    of,
    pictures,
    written,
)
from video_surgery import with_exif

CONTAINERS = [
    kind("mp4.mp4"),
    kind("mov.MOV"),
    kind("m4v.m4v", format="mp4"),
    kind("3gp.3gp"),
    kind("3g2.3g2", "mpeg4"),
    kind("f4v.f4v"),
    kind("qt.qt", format="mov"),
    kind("ismv.ismv"),
    kind("mj2.mj2", "jpeg2000", "rgb24", format="mp4"),
    kind("mkv.mkv"),
    kind("mk3d.mk3d", format="matroska"),
    kind("webm.webm", "libvpx-vp9"),
    kind("avi.AVI", "mpeg4", options=FINE),
    kind("divx.divx", "mpeg4", format="avi"),
    kind("ts.ts"),
    kind("m2ts.m2ts", format="mpegts", mux={"mpegts_m2ts_mode": "1"}),
    kind("mts.MTS", format="mpegts", mux={"mpegts_m2ts_mode": "1"}),
    kind("trp.trp", "mpeg2video", format="mpegts"),
    kind("mpg.mpg", "mpeg1video"),
    kind("mpeg.mpeg", "mpeg2video"),
    kind("vob.vob", "mpeg2video"),
    kind("flv.flv"),
    kind("wmv.wmv", "wmv2"),
    kind("asf.asf", "msmpeg4"),
    kind("rm.rm", "rv10", size=(96, 128)),
    kind("ogv.ogv", "libtheora"),
    kind("vp8.ogv", "libvpx"),
    kind("wtv.wtv", "mpeg2video"),
    kind("mxf.mxf", "mpeg2video"),
    kind("nut.nut", "ffv1"),
    kind("gif.gif", "gif", "rgb8"),
    kind("apng.apng", "apng", "rgb24"),
    kind("swf.swf", "flv"),
    kind("amv.avi", "amv", "yuvj420p", tags=FULL),
    kind("dv.dv", "dvvideo", size=(576, 720), shown=(576, 768)),  # its pixels are 16:15
    kind("roq.roq", "roqvideo", "yuvj444p", size=(128, 128)),
    kind("ivf.ivf", "libvpx-vp9"),
    kind("y4m.y4m", "wrapped_avframe", format="yuv4mpegpipe"),
    kind("h264.h264"),
    kind("264.264", format="h264"),
    kind("h265.h265", "libx265", format="hevc", options=X265),
    kind("obu.obu", "libsvtav1"),
    kind("m1v.m1v", "mpeg1video"),
    kind("m2v.m2v", "mpeg2video"),
    kind("mjpeg.mjpeg", "mjpeg", "yuvj420p", tags=FULL),
    kind("fragmented.mp4", mux={"movflags": "frag_keyframe+empty_moov"}, options={"g": "3"}),
    kind("fragments after samples.mp4", mux={"movflags": "frag_keyframe"}, options={"g": "3"}),
    kind("faststart.mp4", mux={"movflags": "faststart"}),
]

HIDDEN = {"auto-alt-ref": "1", "lag-in-frames": "16"}  # decoded, and never shown
CODECS = [
    kind("h264 with B-frames.mp4", options={"bf": "3", "g": "5"}),
    kind("h264 rgb.mkv", "libx264rgb", "rgb24"),
    kind("hevc.mp4", "libx265", options=X265),
    kind("hevc.flv", "libx265", options=X265),
    kind("av1.mp4", "libsvtav1"),
    kind("av1.mkv", "libsvtav1"),
    kind("vp8.webm", "libvpx"),
    kind("vp8 with hidden frames.webm", "libvpx", options=HIDDEN),
    kind("vp9 with hidden frames.webm", "libvpx-vp9", options=HIDDEN),
    kind("vp9 with hidden frames.mp4", "libvpx-vp9", options=HIDDEN),
    kind("h264 with B-frames.avi", options={"bf": "2"}),
    kind("h264 with B-frames.ts", options={"bf": "2"}),
    kind("hevc with B-frames.mkv", "libx265", options={"x265-params": f"bframes=3:{NO_LOG}"}),
    kind("mpeg4 with B-frames.avi", "mpeg4", options={"bf": "2"}),
    kind("vp9.mp4", "libvpx-vp9"),
    kind("mpeg4.mp4", "mpeg4", options={"bf": "2"}),
    kind("mpeg2.ts", "mpeg2video", options={"bf": "2"}),
    kind("mpeg1.mkv", "mpeg1video"),
    kind("mjpeg.mov", "mjpeg", "yuvj422p", tags=FULL, options=FINE),
    kind("ljpeg.avi", "ljpeg", "yuvj420p", tags=FULL),
    kind("prores.mov", "prores_ks", "yuv422p10le"),
    kind("prores 4444.mov", "prores_ks", "yuva444p10le"),
    # The decoder takes it as BT.709, as it is defined.
    Kind(
        "dnxhr.mov",
        lambda path: _signals(path, 1, False, size=(128, 256), codec="dnxhd", options={"profile": "dnxhr_hqx"}),
        size=(128, 256),
    ),
    kind("cfhd.mov", "cfhd", "yuv422p10le"),
    kind("ffv1.mkv", "ffv1", "yuv444p16le"),
    kind("huffyuv.avi", "huffyuv", "yuv422p"),
    kind("ffvhuff.avi", "ffvhuff"),
    kind("utvideo.avi", "utvideo"),
    kind("magicyuv.mov", "magicyuv", "gbrp"),
    kind("png.mov", "png", "rgb24"),
    kind("qtrle.mov", "qtrle", "rgb24"),
    kind("tiff.mov", "tiff", "rgb24"),
    kind("targa.mov", "targa", "bgr24"),
    kind("dpx.mov", "dpx", "rgb24"),
    kind("cinepak.mov", "cinepak", "rgb24"),
    kind("svq1.mov", "svq1", "yuv410p"),
    kind("rpza.mov", "rpza", "rgb555le", near=NEAR_5_BITS),
    kind("msvideo1.avi", "msvideo1", "rgb555le", near=NEAR_5_BITS),
    kind("wmv1.wmv", "wmv1"),
    kind("msmpeg4v2.avi", "msmpeg4v2"),
    kind("flv1.flv", "flv"),
    kind("flashsv.flv", "flashsv", "bgr24"),
    kind("h263.3gp", "h263", size=(96, 128), shown=(96, 140)),  # its pixels are 12:11
    kind("h261.avi", "h261", size=(144, 176)),
    kind("rv20.rm", "rv20", size=(96, 128)),
    kind("asv1.avi", "asv1"),
    kind("jpeg2000.mxf", "jpeg2000"),
    kind("jpegls.avi", "jpegls", "rgb24"),
    kind("zmbv.avi", "zmbv", "bgr0"),
    kind("zlib.avi", "zlib", "bgr24"),
    kind("speedhq.avi", "speedhq"),
    kind("dxv.mov", "dxv", "rgba"),
    kind("raw rgb.mov", "rawvideo", "rgb24"),
    kind("raw yuv.avi", "rawvideo"),
    kind("raw uyvy.mov", "rawvideo", "uyvy422"),
    kind("v210.mov", "v210", "yuv422p"),
    kind("dv.avi", "dvvideo", size=(576, 720), shown=(576, 768)),
    Kind("jpegs with exif.mov", of(with_exif)),
]

PIXELS = [
    kind("yuv422p.mp4", pixels="yuv422p"),
    kind("yuv444p.mp4", pixels="yuv444p"),
    kind("nv12.mp4", pixels="nv12"),
    kind("10 bits.mp4", pixels="yuv420p10le"),
    kind("10 bits 422.mkv", "libx265", "yuv422p10le", options=X265),
    kind("12 bits.mkv", "libx265", "yuv444p12le", options=X265),
    kind("gbr.mkv", "libx265", "gbrp", options=X265),
    kind("alpha.webm", "libvpx-vp9", "yuva420p"),
    kind("yuv411p.mkv", "ffv1", "yuv411p"),
    kind("yuv410p.mkv", "ffv1", "yuv410p"),
    kind("yuv440p.webm", "libvpx-vp9", "yuv440p"),
    kind("alpha 16 bits.mkv", "ffv1", "rgba64le"),
    kind("alpha.mov", "png", "rgba"),
    kind("bgr48.nut", "rawvideo", "bgr48le"),
]


def _signals(path: Path, matrix: int, full: bool, size: tuple[int, int] = (HEIGHT, WIDTH), **how: Any) -> Path:
    """R'G'B' by a matrix's own equations, in 10 bits."""
    signals = [as_yuv(each / 255, matrix, full) for each in pictures(*size)]
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    return write(path, signals, **{"pixels": "yuv422p10le", "tags": tags, **how})


def _wide(path: Path, from_bt709: np.ndarray, primaries: int, transfer: int) -> Path:
    """Of wider primaries than an SDR screen's, with its transfer function."""
    signals = [linear(each) @ from_bt709.T for each in pictures()]
    signals = [np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) for light in signals]
    matrix = 9 if primaries == 9 else 1
    tags = {"colorspace": matrix, "color_range": 1, "color_trc": transfer, "color_primaries": primaries}
    return write(path, [as_yuv(each, matrix, False) for each in signals], pixels="yuv420p10le", tags=tags)


def _hdr(path: Path, curve: Any, transfer: int, codec: str = "libx264") -> Path:
    signals = [as_yuv(curve(linear(each) @ PRIMARIES_2020.T), 9, False) for each in pictures()]
    tags = {"colorspace": 9, "color_range": 1, "color_trc": transfer, "color_primaries": 9}
    options = X265 if codec == "libx265" else {}
    return write(path, signals, codec=codec, pixels="yuv420p10le", tags=tags, options=options)


# Of DCI-P3 with D65, by SMPTE RP 177 from both chromaticities.
PRIMARIES_P3 = np.array([[0.8225, 0.1775, 0.0], [0.0332, 0.9668, 0.0], [0.0171, 0.0724, 0.9105]])
COLORS = [
    Kind(f"{name} {'full' if full else 'limited'}.{suffix}", partial(_signals, matrix=matrix, full=full))
    for name, matrix in (("BT.601", 5), ("SMPTE 170M", 6), ("BT.709", 1), ("BT.2020", 9))
    for full, suffix in ((False, "mp4"), (True, "mkv"))
] + [
    *(
        Kind(f"transfer {name}.mp4", partial(written, tags={"color_trc": number}))
        for name, number in (("BT.709", 1), ("SMPTE 170M", 6), ("sRGB", 13), ("BT.2020 in 10 bits", 14))
    ),
    Kind("P3.mov", partial(_wide, from_bt709=PRIMARIES_P3, primaries=12, transfer=1)),
    Kind("BT.2020 without HDR.mp4", partial(_wide, from_bt709=PRIMARIES_2020, primaries=9, transfer=14)),
    Kind("PQ.mp4", partial(_hdr, curve=pq, transfer=16, codec="libx265"), near=NEAR_HDR, said="PQ.mp4 (PQ)"),
    Kind("PQ.mkv", partial(_hdr, curve=pq, transfer=16), near=NEAR_HDR, said="PQ.mkv (PQ)"),
    Kind(
        "PQ in AV1.webm", partial(_hdr, curve=pq, transfer=16, codec="libsvtav1"), near=NEAR_HDR, said="AV1.webm (PQ)"
    ),
    Kind("HLG.mov", partial(_hdr, curve=hlg, transfer=18), near=NEAR_HDR, said="HLG.mov (HLG)"),
    Kind("HLG.ts", partial(_hdr, curve=hlg, transfer=18, codec="libx265"), near=NEAR_HDR, said="HLG.ts (HLG)"),
]

ENCODED = [*CONTAINERS, *CODECS, *PIXELS, *COLORS]
